//! Carries out requests with an io_uring, while further requests are taken from the queue.
//!
//! The queue's thread submits what the guest has made available, then waits for completions and for the
//! doorbell alike, so that a request never waits for another. Before it lets go of the queue's lock it waits
//! until the kernel has nothing left. So nothing is in flight once somebody else has the lock, to pause, save
//! or reset the queue.

use super::device::{Disk, QUEUE_SIZE};
use super::file_op::{Direction, FileOp};
use super::held::Held;
use super::job::Job;
use crate::memory::GuestMemory;
use crate::virtio::queue::{LockedQueue, QueueError, WaitFor};
use io_uring::register::Restriction;
use io_uring::types::{Fd, FsyncFlags};
use io_uring::{IoUring, opcode};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Most requests in flight: as many as the queue holds.
const MAX_IN_FLIGHT: usize = QUEUE_SIZE as usize;

/// A ring that has worked fails in this way only if the restrictions of this thread have changed.
const REFUSED: QueueError = QueueError::Request("the kernel does not take it");

/// A queue's ring and the requests in it.
pub struct Uring {
    uring: IoUring,
    /// As many as were ever in flight at a time, in no order.
    jobs: Vec<Job>,
    /// Those that are not in flight.
    free: Vec<u16>,
    /// Operations that are in the ring and not yet submitted.
    queued: usize,
    /// Operations that the kernel has.
    submitted: usize,
    /// Chains for the used ring: heads, and how many bytes were written to each.
    done: Vec<(u16, u32)>,
    /// The kernel has refused an operation: it gets no more.
    dead: bool,
}

impl Uring {
    /// A ring for one queue.
    ///
    /// # Errors
    /// If the kernel has no io_uring, or the restrictions of this process forbid it.
    pub fn new() -> io::Result<Self> {
        let uring = IoUring::builder().setup_r_disabled().build(MAX_IN_FLIGHT as u32)?;
        // Threads that serve a guest may make few system calls (`sandbox`). A ring carries out calls of its
        // own, and must not be a way around that.
        let mut allowed =
            [opcode::Readv::CODE, opcode::Writev::CODE, opcode::Fsync::CODE, opcode::Fallocate::CODE]
                .map(Restriction::sqe_op);
        uring.submitter().register_restrictions(&mut allowed)?;
        uring.submitter().register_enable_rings()?;
        Ok(Uring {
            uring,
            jobs: Vec::new(),
            free: Vec::new(),
            queued: 0,
            submitted: 0,
            done: Vec::new(),
            dead: false,
        })
    }

    /// Serves a queue until the guest has made no more available, or somebody wants the queue's lock, and
    /// nothing is in flight.
    ///
    /// # Errors
    /// As [`serve`](crate::virtio::VirtioDevice::serve) says.
    ///
    /// Requests that `again` has are tried first. If it has any, none is taken from the queue, nor once one
    /// has to wait. Afterwards it has those that wait.
    pub fn serve(
        &mut self,
        disk: &Disk,
        again: &mut Vec<Held>,
        queue: &mut LockedQueue<'_>,
    ) -> Result<WaitFor, QueueError> {
        if self.dead {
            return Err(REFUSED);
        }
        let served = self.work(disk, again, queue);
        if served.is_err() {
            self.drain(queue);
        }
        served
    }

    fn work(
        &mut self,
        disk: &Disk,
        waiting: &mut Vec<Held>,
        queue: &mut LockedQueue<'_>,
    ) -> Result<WaitFor, QueueError> {
        let memory = queue.memory();
        let mut again = std::mem::take(waiting);
        let retries = !again.is_empty();
        loop {
            let more = !retries && waiting.is_empty();
            while let Some(place) = self.place() {
                let job = &mut self.jobs[usize::from(place)];
                let op = if let Some(held) = again.pop() {
                    job.begin_again(disk, memory, &held)?
                } else if more && let Some(chain) = queue.pop()? {
                    job.begin(disk, memory, chain)?
                } else {
                    break;
                };
                match op {
                    Some(op) => {
                        self.free.pop();
                        self.push(disk, place, op);
                    }
                    None => self.finish(memory, waiting, place)?,
                }
            }
            self.submit()?;
            self.reap(disk, memory, waiting)?;
            if !self.done.is_empty() {
                queue.add_used_all(&self.done)?;
                self.done.clear();
            } else if self.queued == 0 {
                if self.submitted == 0 {
                    return Ok(WaitFor::Buffers);
                }
                let room = more && self.place().is_some();
                queue.wait(self.fd(), room)?;
            }
        }
    }

    /// Where the next request goes, if there is room for one more. It stays free until it is taken off the
    /// list.
    fn place(&mut self) -> Option<u16> {
        if self.free.is_empty() && self.jobs.len() < MAX_IN_FLIGHT {
            self.free.push(self.jobs.len() as u16);
            self.jobs.push(Job::default());
        }
        self.free.last().copied()
    }

    fn push(&mut self, disk: &Disk, place: u16, op: FileOp) {
        let fd = Fd(disk.image.fd());
        let entry = match op {
            FileOp::Transfer { direction: Direction::Read, vectors, count, offset } => {
                opcode::Readv::new(fd, vectors, count).offset(offset).build()
            }
            FileOp::Transfer { direction: Direction::Write, vectors, count, offset } => {
                opcode::Writev::new(fd, vectors, count).offset(offset).build()
            }
            FileOp::Sync => opcode::Fsync::new(fd).flags(FsyncFlags::DATASYNC).build(),
            FileOp::Allocate { mode, offset, len } => {
                opcode::Fallocate::new(fd, len).offset(offset).mode(mode).build()
            }
        };
        // SAFETY: a job's vectors, and guest RAM or constants, which they point to, stay until its operation
        // has been reaped: the job is not used before, and nobody leaves `serve` while an operation is in
        // flight. The image is open as long as its disk.
        let pushed = unsafe { self.uring.submission().push(&entry.user_data(u64::from(place))) };
        debug_assert!(pushed.is_ok(), "each request has one operation in flight, and the ring room for all");
        self.queued += 1;
    }

    /// Hands the kernel what it does not have yet.
    fn submit(&mut self) -> Result<(), QueueError> {
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

    /// Completes a request, unless it has to wait.
    fn finish(
        &mut self,
        memory: &GuestMemory,
        waiting: &mut Vec<Held>,
        place: u16,
    ) -> Result<(), QueueError> {
        let job = &self.jobs[usize::from(place)];
        if job.waits() {
            waiting.push(job.held());
        } else {
            self.done.push(job.complete(memory)?);
        }
        Ok(())
    }

    fn reap(&mut self, disk: &Disk, memory: &GuestMemory, waiting: &mut Vec<Held>) -> Result<(), QueueError> {
        while let Some((place, result)) = self.completion() {
            let job = &mut self.jobs[usize::from(place)];
            match job.proceed(disk, memory, result) {
                Some(op) => self.push(disk, place, op),
                None => {
                    self.free.push(place);
                    self.finish(memory, waiting, place)?;
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

    /// Waits until the kernel has nothing left, so that it does not touch guest RAM any more. The guest is
    /// told nothing, because the queue is broken until a reset.
    fn drain(&mut self, queue: &mut LockedQueue<'_>) {
        while self.queued + self.submitted > 0 {
            if self.submit().is_err() {
                // What is left in the ring must never come out of it.
                (self.dead, self.queued) = (true, 0);
            }
            if let Some((place, _)) = self.completion() {
                self.jobs[usize::from(place)].cancel(queue.memory());
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
    use super::super::tests::has_uring;
    use super::*;

    #[test]
    fn it_carries_out_nothing_that_a_disk_does_not_need() {
        if !has_uring() {
            return;
        }
        let mut ring = Uring::new().unwrap();
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
