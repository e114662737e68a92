//! A tap: an interface of the host whose frames a process reads and writes.

use super::{Error, HEADER, OpenTap};
use crate::lock::lock;
use crate::retry::retry;
use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixDatagram;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Everything that a tap may leave to whoever reads from it.
pub const OFFLOADS: libc::c_uint =
    libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN;

/// A tap with one queue.
pub const KIND: libc::c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

/// One of a tap's queues.
struct TapQueue {
    file: File,
    /// Whether the tap gives it frames.
    attached: AtomicBool,
    /// Readable once it does again: what is waited for instead while it does not.
    again: EventFd,
}

impl TapQueue {
    fn new(file: File) -> io::Result<Self> {
        Ok(TapQueue { file, attached: AtomicBool::new(true), again: EventFd::new(EFD_NONBLOCK)? })
    }
}

/// An open tap.
pub struct Tap {
    queues: Vec<TapQueue>,
    mtu: u16,
    offloads: libc::c_uint,
    /// How many of the queues are in use; the lock is held while that changes.
    in_use: Mutex<usize>,
}

impl Tap {
    /// Opens a tap that is there and up, with one queue in use. Reads and writes never wait.
    ///
    /// # Errors
    /// [`Error`].
    pub fn open(name: &str, pairs: u16) -> Result<Self, Error> {
        let failed = |source| Error::System { name: name.into(), source };
        let mut request = request(name)?;
        // Opening a tap that is not there would make one, which leads nowhere.
        let socket = UnixDatagram::unbound().map_err(failed)?;
        let mut ask = |command| interface(&socket, command, &mut request);
        let missing = |error: io::Error| match error.raw_os_error() {
            Some(libc::ENODEV) => Error::Missing(name.into()),
            _ => failed(error),
        };
        // SAFETY: the kernel filled in the flags.
        let flags = ask(libc::SIOCGIFFLAGS).map(|ask| unsafe { ask.ifr_ifru.ifru_flags }).map_err(missing)?;
        if libc::c_int::from(flags) & libc::IFF_UP == 0 {
            return Err(Error::Down(name.into()));
        }
        // The kernel lets processes share a tap that has several queues. None of them would get all frames.
        if is_open(&socket, name)? {
            return Err(Error::InUse(name.into()));
        }
        // SAFETY: the kernel filled in the MTU.
        let mtu = ask(libc::SIOCGIFMTU).map(|ask| unsafe { ask.ifr_ifru.ifru_mtu }).map_err(failed)?;

        let kind = KIND;
        let several = kind | libc::IFF_MULTI_QUEUE;
        let opened = if pairs > 1 { open_queue(name, several) } else { open_queue(name, kind) };
        // With one queue either kind of tap serves.
        let (first, kind) = match opened {
            Err(error) if pairs == 1 && error.raw_os_error() == Some(libc::EINVAL) => {
                (open_queue(name, several), several)
            }
            opened => (opened, if pairs > 1 { several } else { kind }),
        };
        let refused = |error: io::Error| match error.raw_os_error() {
            Some(libc::EINVAL) => Error::Kind { name: name.into(), pairs },
            Some(libc::EBUSY) => Error::InUse(name.into()),
            _ => failed(error),
        };
        let mut queues = vec![first.map_err(refused)?];
        for _ in 1..pairs {
            queues.push(open_queue(name, kind).map_err(refused)?);
        }
        Tap::begin(queues, u16::try_from(mtu).unwrap_or(u16::MAX)).map_err(failed)
    }

    /// Takes over a tap that is open already, with one queue in use.
    ///
    /// # Errors
    /// [`Error::InUse`] if somebody has taken it before, [`Error::Kind`], [`Error::System`].
    pub fn of(name: &str, opened: &OpenTap, pairs: u16) -> Result<Self, Error> {
        let failed = |source| Error::System { name: name.into(), source };
        let (files, mtu) = opened.take().ok_or_else(|| Error::InUse(name.into()))?;
        if files.len() != usize::from(pairs) {
            return Err(Error::Kind { name: name.into(), pairs });
        }
        let queues = files.into_iter().map(|file| TapQueue::new(file.into())).collect::<io::Result<_>>();
        queues.and_then(|queues| Tap::begin(queues, mtu)).map_err(failed)
    }

    /// A tap with these queues, of which one is in use.
    fn begin(queues: Vec<TapQueue>, mtu: u16) -> io::Result<Self> {
        let offloads = probe(&queues[0].file);
        let tap = Tap { offloads, in_use: Mutex::new(queues.len()), queues, mtu };
        tap.set_offloads(0)?;
        tap.use_queues(1)?;
        Ok(tap)
    }

    /// What stands in for a tap where frames come from a fuzzer: its queues are sockets that keep messages
    /// apart, and it leaves everything to whoever reads.
    #[cfg(feature = "internals")]
    pub fn stand_in(queues: Vec<UnixDatagram>, mtu: u16) -> io::Result<Self> {
        let queue = |socket: UnixDatagram| {
            socket.set_nonblocking(true)?;
            TapQueue::new(std::os::fd::OwnedFd::from(socket).into())
        };
        let queues = queues.into_iter().map(queue).collect::<io::Result<Vec<_>>>()?;
        let tap = Tap { offloads: OFFLOADS, in_use: Mutex::new(queues.len()), queues, mtu };
        tap.use_queues(1)?;
        Ok(tap)
    }

    /// Bytes of the longest packet that it takes to be sent to the guest.
    pub fn mtu(&self) -> u16 {
        self.mtu
    }

    /// What it can leave to the guest.
    pub fn offloads(&self) -> libc::c_uint {
        self.offloads
    }

    /// Chooses what it leaves to the guest.
    ///
    /// # Errors
    /// If it cannot.
    pub fn set_offloads(&self, offloads: libc::c_uint) -> io::Result<()> {
        control(&self.queues[0].file, libc::TUNSETOFFLOAD, libc::c_ulong::from(offloads))
    }

    /// Lets it spread frames over the first `count` queues and no others.
    ///
    /// # Errors
    /// If it cannot.
    pub fn use_queues(&self, count: usize) -> io::Result<()> {
        let mut in_use = self.lock();
        while *in_use > count {
            let queue = &self.queues[*in_use - 1];
            queue.attached.store(false, Ordering::Release);
            set_queue(&queue.file, libc::IFF_DETACH_QUEUE)?;
            *in_use -= 1;
        }
        while *in_use < count.min(self.queues.len()) {
            let queue = &self.queues[*in_use];
            set_queue(&queue.file, libc::IFF_ATTACH_QUEUE)?;
            queue.attached.store(true, Ordering::Release);
            // Full is as good as rung.
            let _ = queue.again.write(1);
            *in_use += 1;
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, usize> {
        lock(&self.in_use)
    }

    /// What to wait for when queue `index` has no frame.
    pub fn input(&self, index: usize) -> Option<BorrowedFd<'_>> {
        let queue = self.queues.get(index)?;
        let attached = queue.attached.load(Ordering::Acquire);
        // SAFETY: the event's descriptor is open for as long as the tap, from which it is borrowed.
        let again = || unsafe { BorrowedFd::borrow_raw(queue.again.as_raw_fd()) };
        Some(if attached { queue.file.as_fd() } else { again() })
    }

    /// Reads a frame with its header into memory; `None` if there is none. Longer ones are cut off.
    ///
    /// # Errors
    /// Only if memory may have been written and there is no frame in it all the same.
    ///
    /// # Safety
    /// The vectors are memory that may be written to.
    pub unsafe fn read(&self, index: usize, vectors: &[libc::iovec]) -> io::Result<Option<usize>> {
        let Some(queue) = self.queues.get(index) else { return Ok(None) };
        if !queue.attached.load(Ordering::Acquire) {
            // Non-blocking: fails when it was not this that ended a wait.
            let _ = queue.again.read();
            return Ok(None);
        }
        let read = || {
            // SAFETY: the caller's promise; the count is that of the slice.
            let read = unsafe {
                libc::readv(queue.file.as_raw_fd(), vectors.as_ptr(), vectors.len() as libc::c_int)
            };
            usize::try_from(read).map_err(|_| io::Error::last_os_error())
        };
        match read() {
            Ok(len) => Ok(Some(len)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Err(error),
            Err(_) => {
                // Detached just now, or the interface has been deleted: then it would be readable for
                // ever, and there is never a frame again.
                let _guard = self.lock();
                let result = read();
                queue.attached.store(result.is_ok(), Ordering::Release);
                result.map(Some)
            }
        }
    }

    /// Sends a frame with its header. One that the kernel does not take is lost, as on any network.
    ///
    /// # Safety
    /// The vectors are memory that may be read.
    pub unsafe fn write(&self, index: usize, vectors: &[libc::iovec]) {
        // A queue that is not in use has no way out; the first one always has.
        let queue = self.queues.get(index).filter(|queue| queue.attached.load(Ordering::Acquire));
        let queue = queue.unwrap_or(&self.queues[0]);
        // SAFETY: the caller's promise; the count is that of the slice.
        unsafe { libc::writev(queue.file.as_raw_fd(), vectors.as_ptr(), vectors.len() as libc::c_int) };
    }

    /// Sends a frame of our own.
    pub fn send(&self, frame: &[u8]) {
        let header = [0u8; HEADER];
        let vectors = [vector(header.as_ptr(), header.len()), vector(frame.as_ptr(), frame.len())];
        // SAFETY: both live across the call.
        unsafe { self.write(0, &vectors) };
    }

    /// Throws away what is waiting to be read: at most as much as there can be now, however fast more
    /// comes in.
    pub fn discard(&self) {
        const MAX_WAITING: usize = 4096;
        let mut header = [0u8; HEADER];
        let vectors = [vector(header.as_mut_ptr(), header.len())];
        for index in 0..self.queues.len() {
            // SAFETY: the header lives across the call, and nobody else uses it.
            let read = || unsafe { self.read(index, &vectors) };
            (0..MAX_WAITING).take_while(|_| matches!(read(), Ok(Some(_)))).for_each(drop);
        }
    }
}

/// Names a part of memory.
pub fn vector(address: *const u8, len: usize) -> libc::iovec {
    libc::iovec { iov_base: address.cast_mut().cast(), iov_len: len }
}

/// A request about the interface of this name.
fn request(name: &str) -> Result<libc::ifreq, Error> {
    // SAFETY: all zeros is a valid value of the structure.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let bytes = CString::new(name).unwrap_or_default().into_bytes_with_nul();
    // No interface has a name that does not fit, or an empty one; the kernel would number a pattern.
    if bytes.len() < 2 || bytes.len() > request.ifr_name.len() || name.contains('%') {
        return Err(Error::Missing(name.escape_default().to_string()));
    }
    request.ifr_name.iter_mut().zip(bytes).for_each(|(to, byte)| *to = byte as libc::c_char);
    Ok(request)
}

/// Whether this host has an interface of that name. Nothing is opened, so that whoever has it is not
/// disturbed.
///
/// # Errors
/// [`Error::Missing`], or what the system said.
pub fn find(name: &str) -> Result<(), Error> {
    let failed = |source| Error::System { name: name.into(), source };
    let socket = UnixDatagram::unbound().map_err(failed)?;
    match interface(&socket, libc::SIOCGIFFLAGS, &mut request(name)?) {
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Err(Error::Missing(name.into())),
        found => found.map(drop).map_err(failed),
    }
}

/// Asks a socket about an interface.
fn interface(
    socket: &UnixDatagram,
    command: libc::Ioctl,
    request: &mut libc::ifreq,
) -> io::Result<libc::ifreq> {
    // SAFETY: the commands read and write one ifreq, which lives across the call, as does what its pointer
    // names: as many bytes as the question in them is answered with.
    retry!(unsafe { libc::ioctl(socket.as_raw_fd(), command, &raw mut *request) })?;
    Ok(*request)
}

/// Whether it is a tap (or the like) that somebody has open: one has a carrier as long as that is so.
fn is_open(socket: &UnixDatagram, name: &str) -> Result<bool, Error> {
    // libc lacks these: the numbers of two questions to drivers, and the lengths of the answers.
    const DRIVER: (u32, usize) = (3, 196);
    const LINK: (u32, usize) = (10, 8);
    let mut request = request(name)?;
    let mut ask = |(number, len): (u32, usize)| {
        let mut answer = vec![0; len];
        answer[..4].copy_from_slice(&number.to_ne_bytes());
        request.ifr_ifru.ifru_data = answer.as_mut_ptr().cast();
        // A driver that has no answer is not a tap's.
        interface(socket, libc::SIOCETHTOOL, &mut request).ok().map(|_| answer.split_off(4))
    };
    let is_tap = ask(DRIVER).is_some_and(|name| name.starts_with(b"tun\0"));
    Ok(is_tap && ask(LINK).is_some_and(|link| link != [0; 4]))
}

/// Opens one more queue of a tap.
fn open_queue(name: &str, kind: libc::c_int) -> io::Result<TapQueue> {
    TapQueue::new(attach(&mut request(name).map_err(io::Error::other)?, kind)?)
}

/// A new queue of the tap that a request names. One that is not there is made, and the request has its name.
pub fn attach(request: &mut libc::ifreq, kind: libc::c_int) -> io::Result<File> {
    let mut options = OpenOptions::new();
    let file = options.read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun")?;
    request.ifr_ifru.ifru_flags = kind as libc::c_short;
    // SAFETY: the command reads and writes one ifreq, which lives across the call.
    retry!(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut *request) })?;
    let len = HEADER as libc::c_int;
    // SAFETY: the command reads one int, which lives across the call.
    retry!(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const len) })?;
    Ok(file)
}

/// What the tap can leave to whoever reads from it: all, checksums, or nothing.
fn probe(file: &File) -> libc::c_uint {
    let can = |offloads: &libc::c_uint| control(file, libc::TUNSETOFFLOAD, (*offloads).into()).is_ok();
    [OFFLOADS, libc::TUN_F_CSUM].into_iter().find(can).unwrap_or(0)
}

fn set_queue(file: &File, what: libc::c_int) -> io::Result<()> {
    // SAFETY: all zeros is a valid value of the structure.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_ifru.ifru_flags = what as libc::c_short;
    // SAFETY: the command reads one ifreq, which lives across the call.
    match retry!(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETQUEUE, &raw mut request) }) {
        // What stands in for a tap has nothing to detach.
        Err(error) if cfg!(feature = "internals") && error.raw_os_error() == Some(libc::ENOTTY) => Ok(()),
        result => result.map(drop),
    }
}

fn control(file: &File, command: libc::Ioctl, argument: libc::c_ulong) -> io::Result<()> {
    // SAFETY: the command takes its argument by value.
    retry!(unsafe { libc::ioctl(file.as_raw_fd(), command, argument) }).map(drop)
}
