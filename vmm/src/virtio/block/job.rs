//! A request on its way, as steps that follow one another: who carries them out, and when, is another matter.

use super::device::{Disk, MAX_SECTORS};
use super::request::{MAX_RANGES, Operation, Part, Request, SECTOR};
use super::step::{Direction, Step};
use crate::memory::GuestMemory;
use crate::virtio::queue::{Broken, Chain};
use std::io;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP};
use vm_memory::Bytes;

const OK: u8 = VIRTIO_BLK_S_OK as u8;
const FAILED: u8 = VIRTIO_BLK_S_IOERR as u8;
const UNSUPPORTED: u8 = VIRTIO_BLK_S_UNSUPP as u8;

/// Most vectors that one system call takes.
const MAX_VECTORS: usize = libc::UIO_MAXIOV as usize;

/// What is written where a file system has no shorter way to zero a range, as direct I/O takes it.
static ZEROS: Zeros = Zeros([0; 64 << 10]);

#[repr(align(4096))]
struct Zeros([u8; 64 << 10]);

/// What the step under way is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Stage {
    /// Data, from or to what is left of the vectors.
    Transfer(Direction),
    /// The range at this offset, of this length, to be given back or zeroed.
    Range(u64, u64),
    /// The same, by writing zeros.
    Zeros(u64, u64),
    /// Making durable what was written.
    Sync,
    /// None: there is an outcome.
    #[default]
    Over,
}

/// One request; used again for another, so that its lists need not grow anew.
#[derive(Default)]
pub struct Job {
    head: u16,
    request: Request,
    operation: Operation,
    stage: Stage,
    vectors: Vec<libc::iovec>,
    /// The first vector of which something is left.
    next: usize,
    offset: u64,
    /// Ranges looked at so far.
    ranges: usize,
    /// The storage of the last of them may be given back.
    deallocate: bool,
    outcome: u8,
    /// Bytes written to the guest, without the outcome.
    written: u32,
}

// SAFETY: the vectors' addresses, which alone keep it from being so by itself, are of guest RAM or of constant zeros,
// which belong to no thread.
unsafe impl Send for Job {}

impl Job {
    /// Takes a request over: its first step, unless it needs none.
    ///
    /// # Errors
    /// [`Broken::Request`] if it is malformed. Then there is no job.
    pub fn begin(
        &mut self,
        disk: &Disk,
        memory: &GuestMemory,
        mut chain: Chain<'_>,
    ) -> Result<Option<Step>, Broken> {
        self.head = chain.head_index();
        self.operation = self.request.parse(memory, &mut chain)?;
        (self.outcome, self.written, self.ranges) = (OK, 0, 0);
        Ok(match self.operation {
            Operation::Read => self.transfer(disk, memory, Direction::Read)?,
            Operation::Write => self.transfer(disk, memory, Direction::Write)?,
            Operation::Flush => self.sync(disk),
            Operation::Discard | Operation::WriteZeroes => self.next_range(disk, memory),
            Operation::Identify => self.identify(disk, memory),
            Operation::Unknown => self.end(UNSUPPORTED),
        })
    }

    /// Takes the result of a step; the next one, if one follows.
    pub fn proceed(&mut self, disk: &Disk, memory: &GuestMemory, result: io::Result<usize>) -> Option<Step> {
        match (self.stage, result) {
            (Stage::Transfer(direction), Ok(moved @ 1..)) => {
                self.advance(moved);
                match self.transfer_step(direction) {
                    None => self.transferred(disk, memory, direction),
                    step => step,
                }
            }
            // In neither case was anything moved.
            (Stage::Transfer(direction), Err(error)) if is_transient(&error) => self.transfer_step(direction),
            // The image has become shorter, or cannot be read or written.
            (Stage::Transfer(direction), _) => {
                if direction == Direction::Read {
                    self.request.mark(memory);
                }
                self.end(FAILED)
            }
            (Stage::Range(..), Ok(_)) => self.next_range(disk, memory),
            (Stage::Range(offset, len), Err(error)) if is_unsupported(&error) => {
                // To give storage back is not a must.
                if self.operation == Operation::WriteZeroes {
                    self.zeros_step(offset, len)
                } else {
                    self.next_range(disk, memory)
                }
            }
            (Stage::Range(offset, len), Err(error)) if is_transient(&error) => self.range_step(offset, len),
            (Stage::Zeros(offset, len), Ok(written @ 1..)) => match len.saturating_sub(written as u64) {
                0 => self.next_range(disk, memory),
                rest => self.zeros_step(offset + len - rest, rest),
            },
            (Stage::Zeros(offset, len), Err(error)) if is_transient(&error) => self.zeros_step(offset, len),
            (Stage::Sync, Ok(_)) => self.end(OK),
            (Stage::Sync, Err(error)) if is_transient(&error) => Some(Step::Sync),
            (Stage::Zeros(..), _) | (Stage::Range(..) | Stage::Sync, Err(_)) => self.end(FAILED),
            (Stage::Over, _) => None,
        }
    }

    /// Gives the request up, now that the step under way has come to its end: no outcome is told.
    pub fn abandon(&mut self, memory: &GuestMemory) {
        if self.stage == Stage::Transfer(Direction::Read) {
            self.request.mark(memory);
        }
        self.stage = Stage::Over;
    }

    /// Tells the guest's driver the outcome, all but that it is there: which chain it is, and how many bytes of it were
    /// written.
    ///
    /// # Errors
    /// If RAM is gone.
    pub fn conclude(&self, memory: &GuestMemory) -> Result<(u16, u32), Broken> {
        self.request.conclude(memory, self.outcome)?;
        Ok((self.head, self.written + 1))
    }

    fn end(&mut self, outcome: u8) -> Option<Step> {
        (self.stage, self.outcome) = (Stage::Over, outcome);
        if outcome != OK {
            self.written = 0;
        }
        None
    }

    fn parts(&self, direction: Direction) -> &[Part] {
        match direction {
            Direction::Read => self.request.incoming(),
            Direction::Write => self.request.outgoing(),
        }
    }

    fn transfer(
        &mut self,
        disk: &Disk,
        memory: &GuestMemory,
        direction: Direction,
    ) -> Result<Option<Step>, Broken> {
        let mut vectors = std::mem::take(&mut self.vectors);
        vectors.clear();
        for part in self.parts(direction) {
            vectors.push(part.vector(memory)?);
        }
        self.vectors = vectors;
        self.next = 0;
        let len: u64 = self.vectors.iter().map(|vector| vector.iov_len as u64).sum();
        if direction == Direction::Read {
            // A chain has less than 4 GiB.
            self.written = len as u32;
        }
        let Ok(offset) = disk.image.check(self.request.sector, len, direction == Direction::Write) else {
            return Ok(self.end(FAILED));
        };
        self.offset = offset;
        if !disk.image.takes(&self.vectors) {
            return Ok(match disk.image.bounce(direction, offset, memory, self.parts(direction)) {
                Ok(()) => self.transferred(disk, memory, direction),
                Err(_) => self.end(FAILED),
            });
        }
        self.stage = Stage::Transfer(direction);
        Ok(match self.transfer_step(direction) {
            None => self.transferred(disk, memory, direction),
            step => step,
        })
    }

    fn transfer_step(&self, direction: Direction) -> Option<Step> {
        let rest = &self.vectors[self.next..];
        let count = rest.len().min(MAX_VECTORS) as u32;
        (count > 0).then_some(Step::Transfer {
            direction,
            vectors: rest.as_ptr(),
            count,
            offset: self.offset,
        })
    }

    /// All data has been moved.
    fn transferred(&mut self, disk: &Disk, memory: &GuestMemory, direction: Direction) -> Option<Step> {
        match direction {
            Direction::Read => {
                // After the kernel's writes, so that whoever clears the mark in between sees them all.
                self.request.mark(memory);
                self.end(OK)
            }
            Direction::Write => self.written(disk),
        }
    }

    /// Takes `moved` bytes off the vectors.
    fn advance(&mut self, mut moved: usize) {
        self.offset += moved as u64;
        while let Some(first) = self.vectors.get_mut(self.next) {
            if moved < first.iov_len {
                first.iov_base = first.iov_base.wrapping_byte_add(moved);
                first.iov_len -= moved;
                break;
            }
            moved -= first.iov_len;
            self.next += 1;
        }
    }

    /// The image has changed: durably, for a driver that never flushes.
    fn written(&mut self, disk: &Disk) -> Option<Step> {
        if disk.writes_through() { self.sync(disk) } else { self.end(OK) }
    }

    fn sync(&mut self, disk: &Disk) -> Option<Step> {
        if disk.image.is_readonly() {
            return self.end(OK);
        }
        self.stage = Stage::Sync;
        Some(Step::Sync)
    }

    fn next_range(&mut self, disk: &Disk, memory: &GuestMemory) -> Option<Step> {
        while self.ranges < MAX_RANGES
            && let Some(range) = self.request.next_range(memory)
        {
            self.ranges += 1;
            let discard = self.operation == Operation::Discard;
            if range.strange || range.unmap && discard {
                return self.end(UNSUPPORTED);
            }
            let len = u64::from(range.sectors) * SECTOR;
            let offset = disk.image.check(range.sector, len, true);
            let (Ok(offset), true) = (offset, range.sectors <= MAX_SECTORS) else { return self.end(FAILED) };
            if len == 0 || discard && disk.image.is_on_nfs() {
                continue;
            }
            self.deallocate = discard || range.unmap;
            return if disk.image.is_on_nfs() {
                self.zeros_step(offset, len)
            } else {
                self.range_step(offset, len)
            };
        }
        // More ranges than were promised, or a part of one.
        if self.request.outgoing().is_empty() { self.written(disk) } else { self.end(FAILED) }
    }

    fn range_step(&mut self, offset: u64, len: u64) -> Option<Step> {
        self.stage = Stage::Range(offset, len);
        let mode = if self.deallocate { libc::FALLOC_FL_PUNCH_HOLE } else { libc::FALLOC_FL_ZERO_RANGE };
        Some(Step::Allocate { mode: mode | libc::FALLOC_FL_KEEP_SIZE, offset, len })
    }

    fn zeros_step(&mut self, offset: u64, len: u64) -> Option<Step> {
        self.stage = Stage::Zeros(offset, len);
        (self.next, self.offset) = (0, offset);
        self.vectors.clear();
        let mut rest = len;
        while rest > 0 && self.vectors.len() < MAX_VECTORS {
            let piece = rest.min(ZEROS.0.len() as u64);
            self.vectors
                .push(libc::iovec { iov_base: ZEROS.0.as_ptr().cast_mut().cast(), iov_len: piece as usize });
            rest -= piece;
        }
        self.transfer_step(Direction::Write)
    }

    fn identify(&mut self, disk: &Disk, memory: &GuestMemory) -> Option<Step> {
        let mut rest = &disk.identity[..];
        for part in self.request.incoming() {
            let count = part.len.min(rest.len());
            // Parts of RAM were found to be there.
            let _ = memory.write_slice(&rest[..count], part.address);
            rest = &rest[count..];
        }
        self.written = (disk.identity.len() - rest.len()) as u32;
        self.end(OK)
    }
}

fn is_transient(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN))
}

fn is_unsupported(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL))
}
