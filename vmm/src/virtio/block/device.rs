//! The disk as its driver sees it.

use super::image::{Direction, Image};
use super::request::{MOST_RANGES, Operation, Request};
use super::state::BlockState;
use super::{BlockConfig, Error, Geometry, Images, MOST_QUEUES};
use crate::state::{self, Component, Kind};
use crate::virtio::queue::{Broken, Next, Serving};
use crate::virtio::{DeviceConfig, DeviceType, VirtioDevice};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR,
    VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use vm_memory::Bytes;

/// Mass storage controller, other.
const CLASS: u32 = 0x01_8000;
const QUEUE_SIZE: u16 = 256;
/// Buffers of one request, beside header and outcome.
const SEGMENTS: u32 = QUEUE_SIZE as u32 - 2;
/// Most sectors of one range to be discarded or zeroed: 1 GiB.
const MOST_SECTORS: u32 = 1 << 21;

const FLUSH: u64 = 1 << VIRTIO_BLK_F_FLUSH;

/// A disk.
pub struct Block {
    config: BlockConfig,
    image: Image,
    queue_sizes: Vec<u16>,
    identity: [u8; VIRTIO_BLK_ID_BYTES as usize],
    /// The driver never flushes: every write is made durable before it is confirmed.
    write_through: AtomicBool,
}

impl Block {
    /// Opens a disk's image, without a lock.
    ///
    /// # Errors
    /// [`Error`].
    pub fn open(config: &BlockConfig, images: &Images) -> Result<Self, Error> {
        images.check(&config.path)?;
        if !(1..=MOST_QUEUES).contains(&config.queues) {
            return Err(Error::Queues(config.queues));
        }
        // Another process, on another host, has another working directory.
        let path = std::path::absolute(&config.path)
            .map_err(|source| Error::Open { path: config.path.clone(), source })?;
        let config = BlockConfig { path, ..config.clone() };
        let image = Image::open(&config)?;
        let mut identity = [0; VIRTIO_BLK_ID_BYTES as usize];
        let name = config.path.file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
        let printable = name.bytes().filter(u8::is_ascii_graphic);
        identity.iter_mut().zip(printable).for_each(|(byte, letter)| *byte = letter);
        let queue_sizes = vec![QUEUE_SIZE; usize::from(config.queues)];
        Ok(Block {
            config: BlockConfig { geometry: Some(image.geometry()), ..config },
            image,
            queue_sizes,
            identity,
            write_through: AtomicBool::new(true),
        })
    }

    /// Carries a request out; the bytes written to the guest, without the outcome.
    fn carry_out(&self, operation: Operation, request: &mut Request<'_>) -> Result<u32, u8> {
        let failed = |_: io::Error| VIRTIO_BLK_S_IOERR as u8;
        match operation {
            Operation::Read => {
                self.image.transfer(Direction::Read, request.sector, request.incoming()).map_err(failed)?;
                // A chain has less than 4 GiB.
                Ok(request.incoming_len() as u32)
            }
            Operation::Write => {
                self.image.transfer(Direction::Write, request.sector, request.outgoing()).map_err(failed)?;
                self.written().map_err(failed)
            }
            Operation::Flush => self.image.flush().map_err(failed).map(|()| 0),
            Operation::Identify => {
                let mut rest = &self.identity[..];
                for slice in request.incoming() {
                    let count = slice.write(rest, 0).unwrap_or(0);
                    rest = &rest[count..];
                }
                Ok((self.identity.len() - rest.len()) as u32)
            }
            Operation::Discard | Operation::WriteZeroes => {
                for _ in 0..MOST_RANGES {
                    let Some(range) = request.next_range() else { break };
                    let len = u64::from(range.sectors) * 512;
                    if range.strange || range.unmap && operation == Operation::Discard {
                        return Err(VIRTIO_BLK_S_UNSUPP as u8);
                    }
                    if range.sectors > MOST_SECTORS {
                        return Err(VIRTIO_BLK_S_IOERR as u8);
                    }
                    match operation {
                        Operation::Discard => self.image.discard(range.sector, len),
                        _ => self.image.zero(range.sector, len, range.unmap),
                    }
                    .map_err(failed)?;
                }
                // More ranges than were promised, or a part of one.
                if !request.outgoing().is_empty() {
                    return Err(VIRTIO_BLK_S_IOERR as u8);
                }
                self.written().map_err(failed)
            }
            Operation::Unknown => Err(VIRTIO_BLK_S_UNSUPP as u8),
        }
    }

    fn written(&self) -> io::Result<u32> {
        if self.write_through.load(Ordering::Relaxed) {
            self.image.flush()?;
        }
        Ok(0)
    }
}

impl VirtioDevice for Block {
    fn name(&self) -> &'static str {
        "disk"
    }

    fn device_type(&self) -> DeviceType {
        DeviceType { id: VIRTIO_ID_BLOCK as u16, class: CLASS }
    }

    fn config(&self) -> DeviceConfig {
        DeviceConfig::Block(self.config.clone())
    }

    fn features(&self) -> u64 {
        let common = FLUSH | 1 << VIRTIO_BLK_F_SEG_MAX | 1 << VIRTIO_BLK_F_BLK_SIZE | 1 << VIRTIO_BLK_F_MQ;
        let writable = 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES;
        common | if self.config.readonly { 1 << VIRTIO_BLK_F_RO } else { writable }
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let Geometry { len, unit } = self.image.geometry();
        let mut config = [0; 60];
        let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &(len / 512).to_le_bytes());
        put(12, &SEGMENTS.to_le_bytes());
        put(20, &unit.to_le_bytes());
        put(34, &self.config.queues.to_le_bytes());
        let (sectors, ranges) = (MOST_SECTORS.to_le_bytes(), (MOST_RANGES as u32).to_le_bytes());
        put(36, &sectors); // to discard, in so many ranges, aligned so
        put(40, &ranges);
        put(44, &(unit / 512).to_le_bytes());
        put(48, &sectors); // to zero, in so many ranges, whose storage may be given back
        put(52, &ranges);
        put(56, &[1]);
        for (byte, at) in data.iter_mut().zip(offset as usize..) {
            *byte = config.get(at).copied().unwrap_or(0);
        }
    }

    fn activate(&self, features: u64) {
        self.write_through.store(features & FLUSH == 0, Ordering::Relaxed);
    }

    fn serve(&self, _index: usize, queue: &mut Serving<'_>) -> Result<Next, Broken> {
        let memory = queue.memory();
        let mut request = Request::default();
        while let Some(mut chain) = queue.take()? {
            let head = chain.head_index();
            let operation = request.parse(memory, &mut chain)?;
            let (written, outcome) = match self.carry_out(operation, &mut request) {
                Ok(written) => (written, VIRTIO_BLK_S_OK as u8),
                Err(outcome) => (0, outcome),
            };
            request.conclude(outcome)?;
            queue.give_back(head, written + 1)?;
        }
        Ok(Next::Buffers)
    }

    fn has_arbiter(&self) -> bool {
        self.image.decides()
    }

    fn flush_storage(&self) {
        // One that fails now fails again when it matters.
        let _ = self.image.flush();
    }

    fn take_storage(&self) -> Result<(), crate::Error> {
        Ok(self.image.take()?)
    }

    fn claim_storage(&self) -> Result<(), crate::Error> {
        Ok(self.image.claim()?)
    }

    fn release_storage(&self) -> Result<(), crate::Error> {
        Ok(self.image.release()?)
    }

    fn holds_storage(&self) -> bool {
        self.image.is_held()
    }

    fn state_kind(&self) -> Kind {
        Kind::Block
    }

    fn save(&self, index: u8) -> Result<Component, state::Error> {
        let Geometry { len, unit } = self.image.geometry();
        Component::new(Kind::Block, index, &BlockState { len, unit })
    }

    fn load(&self, components: &[Component], index: u8) -> Result<(), state::Error> {
        let BlockState { len, unit } = state::payload(components, Kind::Block, index)?;
        let own = self.image.geometry();
        if (len, unit) != (own.len, own.unit) {
            return Err(self.image.mismatch(index, len, unit));
        }
        Ok(())
    }
}
