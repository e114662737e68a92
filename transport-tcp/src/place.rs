//! Places what arrives in guest RAM, with as little work as the kernel allows.
//!
//! **Memory that exists** is received into through its mapping: one copy, from the socket's buffers to the
//! guest's page.
//!
//! **Memory that does not exist yet** would need a page fault for each page, which clears the page only for
//! it to be overwritten at once. So large extents of such memory are written to the memfd as to a file, by
//! `splice` through a pipe. The kernel then allocates a page knowing that all of it will be written. This is
//! the same single copy, without the fault and without the clearing.
//!
//! The kernel lets only one thread at a time write to a file, and the others spin. So guest RAM is in several
//! files, and the source sends from each in turn. A stream that finds another one at its file does not wait:
//! it makes the extent's pages exist in one call (`MADV_POPULATE_WRITE`, which avoids the single faults and
//! needs no such lock) and receives into them through the mapping. That is more work than writing the file,
//! and better than an idle processor.
//!
//! **Low water.** A receiver that is woken for each 64 KiB spends as much time on waking up as on copying. So
//! in the middle of a large frame it asks to be woken for [`BATCH_BYTES`] bytes or more. It may do so only
//! while at least that many bytes of the frame are still to come; otherwise it would sleep for ever over the
//! frame's end.
//!
//! **From a socket whose bytes the kernel decrypts**, all is received through the mapping: the kernel
//! decrypts to where it is wanted, and has nothing that could go through a pipe without another copy. Such a
//! socket has no low-water mark: TLS takes parts of records off it, so that what is left there is less than
//! what is still to come.

use crate::iovec::{self, MAX_IOVECS};
use migration::memory::{Extent, PAGE_SIZE, Piece, Ram, RamRegion};
use migration::scan;
use socket2::Socket;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, TryLockError};

/// Bytes to be woken for in the middle of a frame.
const BATCH_BYTES: u64 = 512 << 10;

/// From this length on, it is worth asking whether an extent exists.
const MIN_SPLICE_BYTES: u64 = 64 << 10;

/// Whose turn it is to write to each part of each region. All streams of a session share it.
pub(crate) struct Turns(Vec<Vec<Mutex<()>>>);

impl Turns {
    pub(crate) fn new(ram: &Ram) -> Self {
        let parts = |region: &RamRegion| (0..region.parts()).map(|_| Mutex::new(())).collect();
        Turns(ram.regions().iter().map(parts).collect())
    }

    /// The turn at the file of a region's part, until it is dropped; `None` when another stream has it.
    pub(crate) fn try_take(&self, region: u32, part: usize) -> Option<MutexGuard<'_, ()>> {
        match self.0[region as usize][part].try_lock() {
            Ok(turn) => Some(turn),
            // A stream that panicked with the turn writes no more.
            Err(TryLockError::Poisoned(turn)) => Some(turn.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }
}

/// Places frames of one stream.
pub(crate) struct Placer {
    /// Made when it is first needed; `None` also where there can be none.
    pipe: Option<Pipe>,
    no_pipe: bool,
    /// Whether the kernel decrypts.
    decrypted: bool,
    low_water: u64,
    /// Bytes of the frame that are still to come.
    left: u64,
}

impl Placer {
    /// From a socket that carries them as they are, or whose bytes the kernel decrypts.
    pub(crate) fn new(decrypted: bool) -> Self {
        Placer { pipe: None, no_pipe: decrypted, decrypted, low_water: 1, left: 0 }
    }

    /// Receives the content of checked extents.
    pub(crate) fn place(
        &mut self,
        stream: &Socket,
        ram: &Ram,
        turns: &Turns,
        extents: &[Extent],
    ) -> io::Result<()> {
        self.left = extents.iter().map(|extent| extent.len).sum();
        let mut iovecs = [iovec::EMPTY; MAX_IOVECS];
        let mut filled = 0;
        for extent in extents {
            let region = ram.check(extent).map_err(io::Error::other)?;
            let mut at = extent.offset;
            for piece in region.pieces(extent.offset, extent.len) {
                let address = region.address().wrapping_add(at as usize);
                if piece.len >= MIN_SPLICE_BYTES && is_new(region, at) {
                    if self.has_pipe()
                        && let Some(turn) = turns.try_take(extent.region, piece.part)
                    {
                        self.receive(stream, &mut iovecs[..filled])?;
                        filled = 0;
                        self.splice(stream, &piece)?;
                        drop(turn);
                        at += piece.len;
                        continue;
                    }
                    populate(address, piece.len);
                }
                at += piece.len;
                iovecs[filled] = libc::iovec { iov_base: address.cast(), iov_len: piece.len as usize };
                filled += 1;
                if filled == MAX_IOVECS {
                    self.receive(stream, &mut iovecs)?;
                    filled = 0;
                }
            }
        }
        self.receive(stream, &mut iovecs[..filled])?;
        // The next frame's head must be noticed at once.
        self.wake_at(stream, 1)
    }

    /// Whether there is a pipe, or can be one.
    fn has_pipe(&mut self) -> bool {
        if self.pipe.is_none() && !self.no_pipe {
            self.pipe = Pipe::new().ok();
            self.no_pipe = self.pipe.is_none();
        }
        self.pipe.is_some()
    }

    fn wake_at(&mut self, stream: &Socket, bytes: u64) -> io::Result<()> {
        if self.low_water != bytes {
            set_low_water(stream, bytes)?;
            self.low_water = bytes;
        }
        Ok(())
    }

    /// Before something is waited for: how many bytes may be received under the low-water mark that is
    /// now set.
    fn allowance(&mut self, stream: &Socket) -> io::Result<u64> {
        if self.decrypted {
            Ok(self.left)
        } else if self.left > BATCH_BYTES {
            // Whenever the receiver sleeps before these have come, at least BATCH_BYTES more are to come.
            self.wake_at(stream, BATCH_BYTES)?;
            Ok(self.left - BATCH_BYTES)
        } else {
            self.wake_at(stream, 1)?;
            Ok(self.left)
        }
    }

    /// Fills buffers of guest memory.
    fn receive(&mut self, stream: &Socket, iovecs: &mut [libc::iovec]) -> io::Result<()> {
        let (mut first, end) = (0, iovecs.len());
        while first < end {
            let allowed = self.allowance(stream)? as usize;
            // Of the first buffers as many as may be received now; the last of them perhaps in part.
            let (mut count, mut bytes) = (0, 0);
            while first + count < end && bytes < allowed {
                bytes += iovecs[first + count].iov_len;
                count += 1;
            }
            let surplus = bytes.saturating_sub(allowed);
            let last = first + count - 1;
            iovecs[last].iov_len -= surplus;
            // SAFETY: an all-zero msghdr is a valid empty one.
            let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
            message.msg_iov = iovecs[first..].as_mut_ptr();
            message.msg_iovlen = count;
            // SAFETY: the iovecs describe writable guest memory: pieces of extents that `Ram::check` has
            // passed, whose mapping `ram` keeps alive, and the last was only made shorter. No reference to
            // guest memory exists in this process while the kernel writes.
            let got = unsafe { libc::recvmsg(stream.as_raw_fd(), &mut message, libc::MSG_WAITALL) };
            iovecs[last].iov_len += surplus;
            let got = received(got)?;
            self.left -= got;
            first = iovec::advance(iovecs, first, end, got as usize);
        }
        Ok(())
    }

    /// Writes a piece to its file. The caller has the turn.
    fn splice(&mut self, stream: &Socket, piece: &Piece<'_>) -> io::Result<()> {
        let mut offset = piece.offset as libc::loff_t;
        let mut wanted = piece.len;
        while wanted > 0 {
            let most = self.allowance(stream)?.min(wanted);
            let Some(pipe) = &self.pipe else { return Err(io::ErrorKind::BrokenPipe.into()) };
            let mut held = pipe.fill(stream, most)?;
            self.left -= held;
            wanted -= held;
            while held > 0 {
                held -= pipe.drain(piece.fd, &mut offset, held)?;
            }
        }
        Ok(())
    }
}

/// Whether the page at `offset` does not exist, and what begins there can be written as a file. Any way of
/// placing is right for any memory; this only chooses the cheapest one.
pub(crate) fn is_new(region: &RamRegion, offset: u64) -> bool {
    if region.backing_page() > PAGE_SIZE {
        return false;
    }
    let mut new = true;
    scan::existing(region, offset / PAGE_SIZE, 1, |_, _| new = false);
    new
}

/// Linux 5.14; libc has it only for some targets.
const MADV_POPULATE_WRITE: libc::c_int = 23;

/// Makes the pages of a checked extent exist. Where the kernel cannot, each is made by a fault when it is
/// received into.
pub(crate) fn populate(address: *mut u8, len: u64) {
    // SAFETY: the range lies inside a mapping of guest memory; populating changes no content.
    unsafe { libc::madvise(address.cast(), len as usize, MADV_POPULATE_WRITE) };
}

/// A pipe through which bytes go from a socket to a file without being copied in between.
struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
}

/// Bytes that a pipe holds: [`BATCH_BYTES`] in pages, when each arrives in a buffer of its own. The kernel's
/// limit for unprivileged users is 1 MiB.
const PIPE_BYTES: libc::c_int = 1 << 20;

impl Pipe {
    fn new() -> io::Result<Self> {
        let mut ends = [0; 2];
        // SAFETY: the kernel writes two descriptors into an array of two.
        if unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just given us these descriptors; nobody else has them.
        let pipe =
            unsafe { Pipe { read: OwnedFd::from_raw_fd(ends[0]), write: OwnedFd::from_raw_fd(ends[1]) } };
        // SAFETY: F_SETPIPE_SZ takes an integer. A refusal leaves a smaller pipe, which works as well.
        unsafe { libc::fcntl(pipe.write.as_raw_fd(), libc::F_SETPIPE_SZ, PIPE_BYTES) };
        Ok(pipe)
    }

    /// Moves up to `most` bytes from the socket into the empty pipe; waits for the first.
    fn fill(&self, stream: &Socket, most: u64) -> io::Result<u64> {
        loop {
            // SAFETY: no offsets are given, so no memory is involved; both descriptors are open.
            let got = unsafe {
                libc::splice(
                    stream.as_raw_fd(),
                    std::ptr::null_mut(),
                    self.write.as_raw_fd(),
                    std::ptr::null_mut(),
                    most as usize,
                    libc::SPLICE_F_MOVE,
                )
            };
            match received(got)? {
                0 => {}
                got => return Ok(got),
            }
        }
    }

    /// Moves up to `most` of the bytes in the pipe to a file.
    fn drain(&self, file: libc::c_int, offset: &mut libc::loff_t, most: u64) -> io::Result<u64> {
        // SAFETY: `offset` is a live integer, which the kernel advances; both descriptors are open.
        let put = unsafe {
            libc::splice(
                self.read.as_raw_fd(),
                std::ptr::null_mut(),
                file,
                offset,
                most as usize,
                libc::SPLICE_F_MOVE,
            )
        };
        received(put)
    }
}

/// A system call's count of bytes: none is the stream's end, and one that was interrupted has moved none.
fn received(result: libc::ssize_t) -> io::Result<u64> {
    match result {
        0 => Err(io::ErrorKind::UnexpectedEof.into()),
        n if n < 0 => {
            let error = io::Error::last_os_error();
            if error.kind() == io::ErrorKind::Interrupted { Ok(0) } else { Err(error) }
        }
        n => Ok(n as u64),
    }
}

fn set_low_water(stream: &Socket, bytes: u64) -> io::Result<()> {
    let value = bytes as libc::c_int;
    // SAFETY: the option's value is an int, and its length is given.
    let result = unsafe {
        libc::setsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVLOWAT,
            std::ptr::from_ref(&value).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use migration::conformance::bed::ram_of;
    use std::io::Write;
    use std::net::{TcpListener, TcpStream};
    use std::thread;

    fn extent(first_page: u64, pages: u64) -> Extent {
        Extent { region: 0, offset: first_page * PAGE_SIZE, len: pages * PAGE_SIZE }
    }

    /// Sends random content for each frame's extents and says that it is in place, and that nothing was
    /// taken off the stream that does not belong to the frame. A receiver that asks to be woken for
    /// more than comes would hang here.
    fn frames_arrive(frames: &[&[Extent]], touched: &[Extent]) {
        let ram = ram_of(&[4096]);
        for extent in touched {
            // SAFETY: inside the mapping; nobody else uses it.
            unsafe { ram.address(extent).unwrap().write_bytes(0xee, extent.len as usize) };
        }
        let turns = Turns::new(&ram);
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut sender = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let receiver = Socket::from(listener.accept().unwrap().0);
        let mut placer = Placer::new(false);
        let mut random = fastrand::Rng::with_seed(7);
        for extents in frames {
            let bytes: u64 = extents.iter().map(|e| e.len).sum();
            let content: Vec<u8> = std::iter::repeat_with(|| random.u8(..)).take(bytes as usize).collect();
            thread::scope(|scope| {
                scope.spawn(|| sender.write_all(&content).unwrap());
                placer.place(&receiver, &ram, &turns, extents).unwrap();
            });
            let mut at = 0;
            for extent in *extents {
                let len = extent.len as usize;
                // SAFETY: inside the mapping; the frame is in place and nobody writes any more.
                let got = unsafe { std::slice::from_raw_parts(ram.address(extent).unwrap(), len) };
                assert!(got == &content[at..at + len], "{extent:?}");
                at += len;
            }
        }
    }

    #[test]
    fn new_and_existing_memory_are_written_alike() {
        let frames: [&[Extent]; 3] = [
            &[extent(0, 300), extent(301, 1), extent(400, 16), extent(1000, 1500)],
            &[extent(3, 700), extent(2600, 1), extent(2610, 15), extent(2700, 17)],
            &[extent(0, 4096)],
        ];
        frames_arrive(&frames, &[]);
        frames_arrive(&frames, &[extent(100, 50), extent(400, 1), extent(1001, 900)]);
        frames_arrive(&frames, &[extent(0, 4096)]);
    }

    #[test]
    fn frames_of_any_length_end() {
        let batch = BATCH_BYTES / PAGE_SIZE;
        for pages in [1, 15, 16, 17, batch - 1, batch, batch + 1, 2 * batch - 1, 2 * batch, 2 * batch + 1] {
            frames_arrive(&[&[extent(5, pages)], &[extent(5, pages)], &[extent(5, 1)]], &[]);
        }
    }

    #[test]
    fn more_buffers_than_a_call_takes() {
        let scattered: Vec<Extent> = (0..2 * MAX_IOVECS as u64).map(|page| extent(2 * page, 1)).collect();
        frames_arrive(&[&scattered, &scattered], &[]);
    }

    #[test]
    fn a_stream_that_ends_is_an_error() {
        let ram = ram_of(&[512]);
        for (touched, sent) in [(false, 4096), (true, 4096), (false, 0)] {
            if touched {
                // SAFETY: the whole mapping; nobody else uses it.
                unsafe { ram.address(&extent(0, 512)).unwrap().write_bytes(1, 512 * PAGE_SIZE as usize) };
            }
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let mut sender = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let receiver = Socket::from(listener.accept().unwrap().0);
            sender.write_all(&vec![1; sent]).unwrap();
            drop(sender);
            let error =
                Placer::new(false).place(&receiver, &ram, &Turns::new(&ram), &[extent(0, 512)]).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        }
    }
}
