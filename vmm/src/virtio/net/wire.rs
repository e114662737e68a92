//! For tests, in this package and others: network namespaces with taps in them, and the other end of a tap.

#![allow(clippy::disallowed_methods)] // this is for tests, also of other crates
#![allow(dead_code, unreachable_pub)] // each test program uses its own part of this

#[path = "../skip.rs"]
pub mod skip;

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::Command;
use std::time::{Duration, Instant};

/// How long what is sure to come may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// Runs `test` in a network namespace of its own, which has these taps.
pub fn with_taps(taps: &[&str], test: impl FnOnce() + Send) {
    let name = std::thread::current().name().unwrap_or("a test of virtio-net").to_owned();
    let run = || {
        // SAFETY: changes the namespace of this thread only, which ends with the test.
        let own = unsafe { libc::unshare(libc::CLONE_NEWNET) } == 0;
        if !own || std::fs::File::open("/dev/net/tun").is_err() {
            skip::skipped("needs root and /dev/net/tun, for a network namespace with taps");
            return;
        }
        ip("link set lo up");
        for tap in taps {
            add_tap(tap, "");
        }
        test();
    };
    let result = std::thread::scope(|scope| {
        std::thread::Builder::new().name(name).spawn_scoped(scope, run).expect("a thread").join()
    });
    if let Err(panic) = result {
        std::panic::resume_unwind(panic);
    }
}

/// Makes a tap, and puts it up.
pub fn add_tap(name: &str, options: &str) {
    ip(&format!("tuntap add dev {name} mode tap {options}"));
    // No address, and with it no word from this host's kernel.
    ip(&format!("link set dev {name} addrgenmode none"));
    ip(&format!("link set {name} up"));
}

/// Runs `ip` with these arguments, in this thread's namespace.
pub fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split_whitespace()).status().unwrap();
    assert!(status.success(), "ip {arguments}");
}

/// Waits until a tap that was opened just now carries what is sent to it: the kernel sees to that in
/// the background, and loses frames until then.
pub fn wait_up(name: &str) {
    let deadline = Instant::now() + PATIENCE;
    let is_up = || {
        let shown = Command::new("ip").args(["link", "show", name]).output().unwrap();
        String::from_utf8_lossy(&shown.stdout).contains("state UP")
    };
    while !is_up() {
        assert!(Instant::now() < deadline, "{name} does not come up");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The header before a frame, as this end has it.
pub const HEADER: usize = 10;

/// The network's end of a tap: what the guest sends can be received here, and the other way round.
pub struct Wire(OwnedFd);

impl Wire {
    /// The other end of the tap of this name.
    pub fn of(tap: &str) -> Self {
        Self::filtered(tap, None)
    }

    /// The same, for frames of one protocol only, so that others do not take their place in the meantime.
    pub fn with_protocol(tap: &str, protocol: u16) -> Self {
        Self::filtered(tap, Some(protocol))
    }

    fn filtered(tap: &str, protocol: Option<u16>) -> Self {
        // SAFETY: the call takes integers only. A socket of no protocol takes no frame until it is bound.
        let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
        assert!(fd >= 0, "{}", io::Error::last_os_error());
        // SAFETY: the kernel just gave us this descriptor.
        let wire = Wire(unsafe { OwnedFd::from_raw_fd(fd) });
        let on: libc::c_int = 1;
        let int = size_of::<libc::c_int>() as libc::socklen_t;
        // SAFETY: the option's value is an int that lives across the call.
        let set = unsafe {
            libc::setsockopt(fd, libc::SOL_PACKET, libc::PACKET_VNET_HDR, (&raw const on).cast(), int)
        };
        assert_eq!(set, 0);
        // Before it is bound: frames that come between the two would pass.
        if let Some(protocol) = protocol {
            wire.take_only(protocol);
        }
        let name = std::ffi::CString::new(tap).unwrap();
        // SAFETY: all zeros is a valid value of the structure.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
        // SAFETY: a valid C string.
        address.sll_ifindex = unsafe { libc::if_nametoindex(name.as_ptr()) } as i32;
        let len = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
        // SAFETY: the address lives across the call and has that length.
        assert_eq!(unsafe { libc::bind(fd, (&raw const address).cast(), len) }, 0);
        // The first question has the kernel begin to note the times.
        let _ = wire.ask_stamp();
        wire
    }

    /// Has the kernel drop frames of all other protocols.
    fn take_only(&self, protocol: u16) {
        let code = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
        // Half a word at 12; if it is the protocol, all of the frame, or else nothing of it. (A socket that
        // is bound to the protocol sees nothing of what a bridge takes.)
        let mut program = [
            code((libc::BPF_LD | libc::BPF_H | libc::BPF_ABS) as u16, 0, 0, 12),
            code((libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16, 0, 1, protocol.into()),
            code((libc::BPF_RET | libc::BPF_K) as u16, 0, 0, u32::MAX),
            code((libc::BPF_RET | libc::BPF_K) as u16, 0, 0, 0),
        ];
        let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
        let (value, len) = ((&raw const filter).cast(), size_of::<libc::sock_fprog>() as libc::socklen_t);
        let socket = self.0.as_raw_fd();
        // SAFETY: the option's value is a filter program, which lives across the call.
        let set = unsafe { libc::setsockopt(socket, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, value, len) };
        assert_eq!(set, 0, "{}", io::Error::last_os_error());
    }

    /// Sends a frame with its header to the guest.
    pub fn send_with(&self, header: [u8; HEADER], frame: &[u8]) {
        let bytes = [&header, frame].concat();
        // SAFETY: the bytes live across the call.
        let sent = unsafe { libc::send(self.0.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), 0) };
        assert_eq!(sent, bytes.len() as isize, "{}", io::Error::last_os_error());
    }

    /// Sends a whole frame to the guest.
    pub fn send(&self, frame: &[u8]) {
        self.send_with([0; HEADER], frame);
    }

    /// The next frame that comes from the guest within this time, after its header.
    pub fn next(&self, patience: Duration) -> Option<Vec<u8>> {
        let deadline = Instant::now() + patience;
        loop {
            let left = deadline.saturating_duration_since(Instant::now()).as_millis() as libc::c_int;
            let mut poll = libc::pollfd { fd: self.0.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: one pollfd, which lives across the call.
            match unsafe { libc::poll(&mut poll, 1, left) } {
                0 => return None,
                count if count < 0 => {
                    let error = io::Error::last_os_error();
                    assert_eq!(error.kind(), io::ErrorKind::Interrupted, "{error}");
                    continue;
                }
                _ => {}
            }
            let mut bytes = vec![0; 70_000];
            // SAFETY: all zeros is a valid value of the structure.
            let mut from: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
            let mut len = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
            let (buffer, room) = (bytes.as_mut_ptr().cast(), bytes.len());
            // SAFETY: buffer and address live across the call and have those lengths.
            let got = unsafe {
                libc::recvfrom(self.0.as_raw_fd(), buffer, room, 0, (&raw mut from).cast(), &mut len)
            };
            assert!(got >= 0, "{}", io::Error::last_os_error());
            bytes.truncate(got as usize);
            // What goes to the guest is shown to all sockets but the one that sent it.
            if from.sll_pkttype != libc::PACKET_OUTGOING {
                return Some(bytes);
            }
        }
    }

    /// When the last frame came that was received, since 1970.
    pub fn stamp(&self) -> Duration {
        self.ask_stamp().unwrap()
    }

    fn ask_stamp(&self) -> io::Result<Duration> {
        // libc lacks this one.
        const SIOCGSTAMPNS: libc::Ioctl = 0x8907;
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: the command writes one timespec, which lives across the call.
        match unsafe { libc::ioctl(self.0.as_raw_fd(), SIOCGSTAMPNS, &raw mut time) } {
            0 => Ok(Duration::new(time.tv_sec as u64, time.tv_nsec as u32)),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// The next frame, which is sure to come: its header and itself.
    pub fn receive(&self) -> (Vec<u8>, Vec<u8>) {
        let bytes = self.next(PATIENCE).expect("a frame comes");
        (bytes[..HEADER].to_vec(), bytes[HEADER..].to_vec())
    }

    /// Nothing comes.
    pub fn is_silent(&self) -> bool {
        self.next(Duration::from_millis(60)).is_none()
    }
}
