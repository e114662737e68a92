//! Requests carried out by the kernel while others are taken, by an io_uring.
//!
//! The queue's thread submits what the guest has made available, then waits for completions and for the doorbell alike,
//! so that a request never waits for another. Before it lets go of the queue's lock it waits until the kernel has
//! nothing left: whoever gets the lock, to pause, save or reset the queue, finds nothing in flight.

use super::device::{Disk, QUEUE_SIZE};
use super::job::Job;
use super::step::{Direction, Step};
use crate::memory::GuestMemory;
use crate::virtio::queue::{Broken, Next, Serving};
use io_uring::register::Restriction;
use io_uring::types::{Fd, FsyncFlags};
use io_uring::{IoUring, opcode};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Most requests in flight: all that the queue holds.
const MAX_IN_FLIGHT: usize = QUEUE_SIZE as usize;

/// After a ring was found to work, nothing but a change of what confines this thread does that.
const REFUSED: Broken = Broken::Request("the kernel does not take it");

/// A queue's ring and the requests in it.
pub struct Ring {
    uring: IoUring,
    /// As many as were ever in flight at a time, in no order.
    jobs: Vec<Job>,
    /// Those that are not in flight.
    free: Vec<u16>,
    /// Steps that the ring has and the kernel not yet.
    queued: usize,
    /// Steps that the kernel has.
    submitted: usize,
    /// Chains to give back, and how much was written to each.
    done: Vec<(u16, u32)>,
    /// The kernel has refused a step: it gets no more.
    dead: bool,
}

impl Ring {
    /// A ring for one queue.
    ///
    /// # Errors
    /// If the kernel, or what this process is confined by, has none.
    pub fn new() -> io::Result<Self> {
        let uring = IoUring::builder().setup_r_disabled().build(MAX_IN_FLIGHT as u32)?;
        // Threads that serve a guest may make few system calls (`sandbox`). A ring carries out calls of its own, and
        // must not be a way around that.
        let mut allowed =
            [opcode::Readv::CODE, opcode::Writev::CODE, opcode::Fsync::CODE, opcode::Fallocate::CODE]
                .map(Restriction::sqe_op);
        uring.submitter().register_restrictions(&mut allowed)?;
        uring.submitter().register_enable_rings()?;
        Ok(Ring {
            uring,
            jobs: Vec::new(),
            free: Vec::new(),
            queued: 0,
            submitted: 0,
            done: Vec::new(),
            dead: false,
        })
    }

    /// Serves a queue until the guest has made no more available, or somebody wants the queue's lock, and nothing is in
    /// flight.
    ///
    /// # Errors
    /// As [`serve`](crate::virtio::VirtioDevice::serve) says.
    pub fn serve(&mut self, disk: &Disk, queue: &mut Serving<'_>) -> Result<Next, Broken> {
        if self.dead {
            return Err(REFUSED);
        }
        let served = self.work(disk, queue);
        if served.is_err() {
            self.drain(queue);
        }
        served
    }

    fn work(&mut self, disk: &Disk, queue: &mut Serving<'_>) -> Result<Next, Broken> {
        let memory = queue.memory();
        loop {
            while let Some(place) = self.place()
                && let Some(chain) = queue.take()?
            {
                match self.jobs[usize::from(place)].begin(disk, memory, chain)? {
                    Some(step) => {
                        self.free.pop();
                        self.push(disk, place, step);
                    }
                    None => self.done.push(self.jobs[usize::from(place)].conclude(memory)?),
                }
            }
            self.submit()?;
            self.reap(disk, memory)?;
            if !self.done.is_empty() {
                queue.give_back_all(&self.done)?;
                self.done.clear();
            } else if self.queued == 0 {
                if self.submitted == 0 {
                    return Ok(Next::Buffers);
                }
                let room = self.place().is_some();
                queue.wait(self.fd(), room)?;
            }
        }
    }

    /// Where the next request goes, if there is room for one more. It stays free until it is taken off the list.
    fn place(&mut self) -> Option<u16> {
        if self.free.is_empty() && self.jobs.len() < MAX_IN_FLIGHT {
            self.free.push(self.jobs.len() as u16);
            self.jobs.push(Job::default());
        }
        self.free.last().copied()
    }

    fn push(&mut self, disk: &Disk, place: u16, step: Step) {
        let fd = Fd(disk.image.fd());
        let entry = match step {
            Step::Transfer { direction: Direction::Read, vectors, count, offset } => {
                opcode::Readv::new(fd, vectors, count).offset(offset).build()
            }
            Step::Transfer { direction: Direction::Write, vectors, count, offset } => {
                opcode::Writev::new(fd, vectors, count).offset(offset).build()
            }
            Step::Sync => opcode::Fsync::new(fd).flags(FsyncFlags::DATASYNC).build(),
            Step::Allocate { mode, offset, len } => {
                opcode::Fallocate::new(fd, len).offset(offset).mode(mode).build()
            }
        };
        // SAFETY: a job's vectors, and guest RAM or constants, which they point to, stay until its step has been reaped: the job is
        // not used before, and nobody leaves `serve` while a step is in flight. The image is open as long as its disk.
        let pushed = unsafe { self.uring.submission().push(&entry.user_data(u64::from(place))) };
        debug_assert!(pushed.is_ok(), "each request has one step in flight, and the ring room for all");
        self.queued += 1;
    }

    /// Hands the kernel what it does not have yet.
    fn submit(&mut self) -> Result<(), Broken> {
        if self.queued == 0 {
            return Ok(());
        }
        match self.uring.submit() {
            Ok(count) => {
                (self.queued, self.submitted) = (self.queued - count, self.submitted + count);
                Ok(())
            }
            // It is short of memory, or wants completions reaped: again later.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY | libc::EINTR)) => {
                std::thread::yield_now();
                Ok(())
            }
            Err(_) => Err(REFUSED),
        }
    }

    fn reap(&mut self, disk: &Disk, memory: &GuestMemory) -> Result<(), Broken> {
        while let Some((place, result)) = self.completion() {
            let job = &mut self.jobs[usize::from(place)];
            match job.proceed(disk, memory, result) {
                Some(step) => self.push(disk, place, step),
                None => {
                    self.free.push(place);
                    self.done.push(self.jobs[usize::from(place)].conclude(memory)?);
                }
            }
        }
        Ok(())
    }

    fn completion(&mut self) -> Option<(u16, io::Result<usize>)> {
        let entry = self.uring.completion().next()?;
        self.submitted -= 1;
        let failed = |_| io::Error::from_raw_os_error(-entry.result());
        Some((entry.user_data() as u16, usize::try_from(entry.result()).map_err(failed)))
    }

    /// Waits until the kernel has nothing left, so that nothing of it touches guest RAM any more, and tells the guest of
    /// nothing: the queue is broken until a reset.
    fn drain(&mut self, queue: &mut Serving<'_>) {
        while self.queued + self.submitted > 0 {
            if self.submit().is_err() {
                // What is left in the ring must never come out of it.
                (self.dead, self.queued) = (true, 0);
            }
            if let Some((place, _)) = self.completion() {
                self.jobs[usize::from(place)].abandon(queue.memory());
                self.free.push(place);
            } else if self.submitted > 0 {
                // Fails only for the guest's rings, which are not looked at.
                let _ = queue.wait(self.fd(), false);
            }
        }
        self.done.clear();
    }

    fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the ring is open as long as it is there.
        unsafe { BorrowedFd::borrow_raw(self.uring.as_raw_fd()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_carries_out_nothing_that_a_disk_does_not_need() {
        let Ok(mut ring) = Ring::new() else { return };
        let nowhere = c"/dev/null".as_ptr();
        let entries = [
            (opcode::Nop::new().build(), -libc::EACCES),
            (opcode::OpenAt::new(Fd(libc::AT_FDCWD), nowhere).build(), -libc::EACCES),
            (opcode::Close::new(Fd(-1)).build(), -libc::EACCES),
            (opcode::Fsync::new(Fd(-1)).build(), -libc::EBADF),
        ];
        for (entry, expected) in entries {
            // SAFETY: the path is constant, and the others refer to no memory.
            unsafe { ring.uring.submission().push(&entry) }.unwrap();
            ring.uring.submit_and_wait(1).unwrap();
            assert_eq!(ring.uring.completion().next().unwrap().result(), expected, "{entry:?}");
        }
    }
}
