//! A request as file operations that follow one another. Who executes them, and when, is another matter.

use super::device::{Disk, MAX_SECTORS};
use super::file_op::{Direction, FileOp};
use super::held::Held;
use super::request::{MAX_RANGES, Request, RequestType, SECTOR, Segment};
use crate::memory::GuestMemory;
use crate::virtio::queue::{Chain, QueueError};
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

/// What the operation under way is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Stage {
    /// Data, from or to what is left of the vectors.
    Transfer(Direction),
    /// The range at this offset, of this length, to be freed or zeroed.
    Range(u64, u64),
    /// The same, by writing zeros.
    Zeros(u64, u64),
    /// Making durable what was written.
    Sync,
    /// None: the request has its status.
    #[default]
    Complete,
}

/// One request; used again for another, so that its lists need not grow anew.
#[derive(Default)]
pub struct Job {
    head: u16,
    request: Request,
    request_type: RequestType,
    stage: Stage,
    vectors: Vec<libc::iovec>,
    /// The first vector of which something is left.
    next_vector: usize,
    offset: u64,
    /// Ranges looked at so far.
    ranges: usize,
    /// The file system may free the last of them.
    deallocate: bool,
    status: u8,
    /// It waits until this host can carry it out.
    waits: bool,
    /// Bytes written to the descriptor chain, without the status byte: the length in its used ring element.
    used_len: u32,
}

// SAFETY: the vectors' addresses, which alone keep it from being so by itself, are of guest RAM or of
// constant zeros, which belong to no thread.
unsafe impl Send for Job {}

impl Job {
    /// Takes a request over. Returns its first operation, unless it needs none.
    ///
    /// # Errors
    /// [`QueueError::Request`] if it is malformed. Then there is no job.
    pub fn begin(
        &mut self,
        disk: &Disk,
        memory: &GuestMemory,
        mut chain: Chain<'_>,
    ) -> Result<Option<FileOp>, QueueError> {
        self.head = chain.head_index();
        self.request_type = self.request.parse(memory, &mut chain)?;
        self.start(disk, memory)
    }

    /// Takes a request over that was tried before.
    ///
    /// # Errors
    /// [`QueueError::Request`] if it is malformed. Then there is no job.
    pub fn begin_again(
        &mut self,
        disk: &Disk,
        memory: &GuestMemory,
        held: &Held,
    ) -> Result<Option<FileOp>, QueueError> {
        (self.head, self.request_type) = (held.head, held.request_type);
        held.restore(&mut self.request);
        self.start(disk, memory)
    }

    fn start(&mut self, disk: &Disk, memory: &GuestMemory) -> Result<Option<FileOp>, QueueError> {
        self.waits = false;
        (self.status, self.used_len, self.ranges) = (OK, 0, 0);
        Ok(match self.request_type {
            RequestType::Read => self.transfer(disk, memory, Direction::Read)?,
            RequestType::Write => self.transfer(disk, memory, Direction::Write)?,
            RequestType::Flush => self.sync(disk),
            RequestType::Discard | RequestType::WriteZeroes => self.next_range(disk, memory),
            RequestType::GetId => self.get_id(disk, memory),
            RequestType::Unknown => self.end(UNSUPPORTED),
        })
    }

    /// Takes the result of an operation. Returns the next one, if one follows.
    pub fn proceed(
        &mut self,
        disk: &Disk,
        memory: &GuestMemory,
        result: io::Result<usize>,
    ) -> Option<FileOp> {
        match (self.stage, result) {
            (Stage::Transfer(direction), Ok(moved @ 1..)) => {
                self.advance(moved);
                match self.transfer_op(direction) {
                    None => self.transferred(disk, memory, direction),
                    op => op,
                }
            }
            // In neither case was anything moved.
            (Stage::Transfer(direction), Err(error)) if is_transient(&error) => self.transfer_op(direction),
            // The image has become shorter, or cannot be read or written.
            (Stage::Transfer(direction), result) => {
                if direction == Direction::Read {
                    self.request.mark(memory);
                }
                self.fail(disk, result.err())
            }
            (Stage::Range(..), Ok(_)) => self.next_range(disk, memory),
            (Stage::Range(offset, len), Err(error)) if is_unsupported(&error) => {
                // A discard is a hint: the file system need not free anything.
                if self.request_type == RequestType::WriteZeroes {
                    self.zeros_op(offset, len)
                } else {
                    self.next_range(disk, memory)
                }
            }
            (Stage::Range(offset, len), Err(error)) if is_transient(&error) => self.range_op(offset, len),
            (Stage::Zeros(offset, len), Ok(moved @ 1..)) => match len.saturating_sub(moved as u64) {
                0 => self.next_range(disk, memory),
                rest => self.zeros_op(offset + len - rest, rest),
            },
            (Stage::Zeros(offset, len), Err(error)) if is_transient(&error) => self.zeros_op(offset, len),
            (Stage::Sync, Ok(_)) => self.end(OK),
            (Stage::Sync, Err(error)) if is_transient(&error) => Some(FileOp::Sync),
            (Stage::Zeros(..), result) | (Stage::Range(..) | Stage::Sync, result @ Err(_)) => {
                self.fail(disk, result.err())
            }
            (Stage::Complete, _) => None,
        }
    }

    /// Gives the request up, now that the operation under way has come to its end. The driver gets no status.
    pub fn cancel(&mut self, memory: &GuestMemory) {
        if self.stage == Stage::Transfer(Direction::Read) {
            self.request.mark(memory);
        }
        self.stage = Stage::Complete;
    }

    /// Writes the request's status. Returns what the used ring has to say: the chain's head, and how many
    /// bytes of the chain were written.
    ///
    /// # Errors
    /// If RAM is gone.
    pub fn complete(&self, memory: &GuestMemory) -> Result<(u16, u32), QueueError> {
        self.request.complete(memory, self.status)?;
        Ok((self.head, self.used_len + 1))
    }

    /// Whether the request waits until this host can carry it out: it has no status, and is not completed.
    pub fn waits(&self) -> bool {
        self.waits
    }

    /// The request that waits.
    pub fn held(&self) -> Held {
        Held::new(self.head, self.request_type, &self.request)
    }

    /// This host could not carry it out; without an error, because the image has become shorter.
    fn fail(&mut self, disk: &Disk, error: Option<io::Error>) -> Option<FileOp> {
        let error = error.unwrap_or_else(|| io::ErrorKind::UnexpectedEof.into());
        self.waits = disk.waits_after(self.request_type, &error);
        self.end(FAILED)
    }

    fn end(&mut self, status: u8) -> Option<FileOp> {
        (self.stage, self.status) = (Stage::Complete, status);
        if status != OK {
            self.used_len = 0;
        }
        None
    }

    fn parts(&self, direction: Direction) -> &[Segment] {
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
    ) -> Result<Option<FileOp>, QueueError> {
        let mut vectors = std::mem::take(&mut self.vectors);
        vectors.clear();
        for part in self.parts(direction) {
            vectors.push(part.vector(memory)?);
        }
        self.vectors = vectors;
        self.next_vector = 0;
        let len: u64 = self.vectors.iter().map(|vector| vector.iov_len as u64).sum();
        if direction == Direction::Read {
            // A chain has less than 4 GiB.
            self.used_len = len as u32;
        }
        let Ok(offset) = disk.image.check(self.request.sector, len, direction == Direction::Write) else {
            return Ok(self.end(FAILED));
        };
        self.offset = offset;
        if !disk.image.takes(&self.vectors) {
            return Ok(match disk.image.bounce(direction, offset, memory, self.parts(direction)) {
                Ok(()) => self.transferred(disk, memory, direction),
                Err(error) => self.fail(disk, Some(error)),
            });
        }
        self.stage = Stage::Transfer(direction);
        Ok(match self.transfer_op(direction) {
            None => self.transferred(disk, memory, direction),
            op => op,
        })
    }

    fn transfer_op(&self, direction: Direction) -> Option<FileOp> {
        let rest = &self.vectors[self.next_vector..];
        let count = rest.len().min(MAX_VECTORS) as u32;
        (count > 0).then_some(FileOp::Transfer {
            direction,
            vectors: rest.as_ptr(),
            count,
            offset: self.offset,
        })
    }

    /// All data has been moved.
    fn transferred(&mut self, disk: &Disk, memory: &GuestMemory, direction: Direction) -> Option<FileOp> {
        match direction {
            Direction::Read => {
                // After the kernel's writes, so that whoever clears the mark in between sees them all.
                self.request.mark(memory);
                self.end(OK)
            }
            Direction::Write => self.finish_write(disk),
        }
    }

    /// Takes `moved` bytes off the vectors.
    fn advance(&mut self, mut moved: usize) {
        self.offset += moved as u64;
        while let Some(first) = self.vectors.get_mut(self.next_vector) {
            if moved < first.iov_len {
                first.iov_base = first.iov_base.wrapping_byte_add(moved);
                first.iov_len -= moved;
                break;
            }
            moved -= first.iov_len;
            self.next_vector += 1;
        }
    }

    /// The image has changed. For a driver that never flushes, the change is made durable.
    fn finish_write(&mut self, disk: &Disk) -> Option<FileOp> {
        if disk.writes_through() { self.sync(disk) } else { self.end(OK) }
    }

    fn sync(&mut self, disk: &Disk) -> Option<FileOp> {
        if disk.image.is_readonly() {
            return self.end(OK);
        }
        self.stage = Stage::Sync;
        Some(FileOp::Sync)
    }

    fn next_range(&mut self, disk: &Disk, memory: &GuestMemory) -> Option<FileOp> {
        while self.ranges < MAX_RANGES
            && let Some(range) = self.request.next_range(memory)
        {
            self.ranges += 1;
            let discard = self.request_type == RequestType::Discard;
            if range.unknown_flags || range.unmap && discard {
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
                self.zeros_op(offset, len)
            } else {
                self.range_op(offset, len)
            };
        }
        // More ranges than were promised, or a part of one.
        if self.request.outgoing().is_empty() { self.finish_write(disk) } else { self.end(FAILED) }
    }

    fn range_op(&mut self, offset: u64, len: u64) -> Option<FileOp> {
        self.stage = Stage::Range(offset, len);
        let mode = if self.deallocate { libc::FALLOC_FL_PUNCH_HOLE } else { libc::FALLOC_FL_ZERO_RANGE };
        Some(FileOp::Allocate { mode: mode | libc::FALLOC_FL_KEEP_SIZE, offset, len })
    }

    fn zeros_op(&mut self, offset: u64, len: u64) -> Option<FileOp> {
        self.stage = Stage::Zeros(offset, len);
        (self.next_vector, self.offset) = (0, offset);
        self.vectors.clear();
        let mut rest = len;
        while rest > 0 && self.vectors.len() < MAX_VECTORS {
            let piece = rest.min(ZEROS.0.len() as u64);
            self.vectors
                .push(libc::iovec { iov_base: ZEROS.0.as_ptr().cast_mut().cast(), iov_len: piece as usize });
            rest -= piece;
        }
        self.transfer_op(Direction::Write)
    }

    fn get_id(&mut self, disk: &Disk, memory: &GuestMemory) -> Option<FileOp> {
        let mut rest = &disk.identity[..];
        for part in self.request.incoming() {
            let count = part.len.min(rest.len());
            // Parts of RAM were found to be there.
            let _ = memory.write_slice(&rest[..count], part.address);
            rest = &rest[count..];
        }
        self.used_len = (disk.identity.len() - rest.len()) as u32;
        self.end(OK)
    }
}

fn is_transient(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN))
}

fn is_unsupported(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL))
}
