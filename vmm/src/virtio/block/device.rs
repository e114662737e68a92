//! The disk as its driver sees it.

use super::held::Held;
use super::image::DiskImage;
use super::job::Job;
use super::request::{MAX_BUFFERS, MAX_RANGES, RequestType, SECTOR};
use super::state::BlockState;
use super::uring::Uring;
use super::{Aio, BlockConfig, Error, ErrorPolicy, Geometry, Images, MAX_QUEUES, OnError};
use crate::component::{self, Component, Kind};
use crate::lock::lock;
use crate::virtio::queue::{LockedQueue, QueueError, WaitFor};
use crate::virtio::structure::Structure;
use crate::virtio::{Alarm, DeviceConfig, DeviceType, VirtioDevice};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, Once, OnceLock};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_ID_BYTES, virtio_blk_config,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

/// Mass storage controller, other.
const CLASS: u32 = 0x01_8000;
pub const QUEUE_SIZE: u16 = MAX_BUFFERS as u16;
/// Data segments of one request, beside its header and its status byte.
const MAX_SEGMENTS: u32 = QUEUE_SIZE as u32 - 2;
/// Most sectors of one range to be discarded or zeroed: 1 GiB.
pub const MAX_SECTORS: u32 = 1 << 21;

const FLUSH: u64 = 1 << VIRTIO_BLK_F_FLUSH;

/// What all queues share.
pub struct Disk {
    pub image: DiskImage,
    pub identity: [u8; VIRTIO_BLK_ID_BYTES as usize],
    /// The driver never flushes: every write is made durable before it is confirmed.
    write_through: AtomicBool,
    cached: bool,
    errors: ErrorPolicy,
    /// Why the last request that waits has to.
    trouble: Mutex<Option<String>>,
}

impl Disk {
    /// Whether every write is made durable before it is confirmed.
    pub fn writes_through(&self) -> bool {
        self.write_through.load(Ordering::Relaxed)
    }

    /// Whether a request that has failed so is to be tried again later, instead of telling the driver.
    ///
    /// A flush of what the page cache has is not: the kernel forgets what it could not write, and another
    /// flush would succeed without it.
    pub fn waits_after(&self, request_type: RequestType, error: &io::Error) -> bool {
        let (policy, what) = match request_type {
            RequestType::Read => (self.errors.read, "read"),
            RequestType::Flush if self.cached => (OnError::Report, "flush"),
            RequestType::Flush => (self.errors.write, "flush"),
            _ => (self.errors.write, "write to"),
        };
        let waits = policy.stops(error);
        if waits {
            let path = self.image.path().display();
            *lock(&self.trouble) = Some(format!("cannot {what} the disk image {path}: {error}"));
        }
        waits
    }
}

/// What executes a queue's requests.
enum Engine {
    /// One after the other, by system calls.
    Sync(Box<Job>),
    /// Several at a time.
    IoUring(Box<Uring>),
}

/// A disk.
pub struct Block {
    config: BlockConfig,
    disk: Disk,
    queue_sizes: Vec<u16>,
    /// One for each queue; only the queue's thread takes its lock.
    engines: Vec<Mutex<Engine>>,
    /// For each queue the requests that wait. Its lock comes after that of the queue.
    held: Vec<Mutex<Vec<Held>>>,
    alarm: OnceLock<Alarm>,
}

impl Block {
    /// Opens a disk's image, without a lock.
    ///
    /// # Errors
    /// [`Error`].
    pub fn open(config: &BlockConfig, images: &Images, aio: Aio) -> Result<Self, Error> {
        if !(1..=MAX_QUEUES).contains(&config.queues) {
            return Err(Error::Queues(config.queues));
        }
        let config = config.clone().portable()?;
        let image = DiskImage::open(&config, images)?;
        let mut identity = [0; VIRTIO_BLK_ID_BYTES as usize];
        let name = config.path.file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
        let printable = name.bytes().filter(u8::is_ascii_graphic);
        identity.iter_mut().zip(printable).for_each(|(byte, letter)| *byte = letter);
        let queue_sizes = vec![QUEUE_SIZE; usize::from(config.queues)];
        // What the page cache has takes less time than a ring, and what it has not the kernel gives to
        // threads of its own.
        let mut aio = if aio == Aio::Auto && config.cached { Aio::Sync } else { aio };
        if image.is_on_nfs() && !config.readonly && !config.cached {
            if aio == Aio::Sync || super::io_uring().is_err() {
                return Err(Error::NeedsRing { path: image.path().into() });
            }
            aio = Aio::IoUring;
        }
        Ok(Block {
            config: BlockConfig { geometry: Some(image.geometry()), ..config.clone() },
            disk: Disk {
                image,
                identity,
                write_through: AtomicBool::new(true),
                cached: config.cached,
                errors: config.errors,
                trouble: Mutex::default(),
            },
            engines: engines(queue_sizes.len(), aio)?,
            held: queue_sizes.iter().map(|_| Mutex::default()).collect(),
            alarm: OnceLock::new(),
            queue_sizes,
        })
    }
}

/// Engines for so many queues.
fn engines(count: usize, aio: Aio) -> Result<Vec<Mutex<Engine>>, Error> {
    let sync = || (0..count).map(|_| Mutex::new(Engine::Sync(Box::default()))).collect();
    if aio == Aio::Sync {
        return Ok(sync());
    }
    let rings = (0..count).map(|_| Ok(Mutex::new(Engine::IoUring(Box::new(Uring::new()?))))).collect();
    match rings {
        Err(source) if aio == Aio::IoUring => Err(Error::NoRing(source)),
        Err(error) => {
            static TOLD: Once = Once::new();
            TOLD.call_once(|| {
                eprintln!(
                    "whimbrel: no io_uring ({error}): disks carry out their requests one after the other"
                );
            });
            Ok(sync())
        }
        Ok(rings) => Ok(rings),
    }
}

impl Block {
    /// Serves a queue. Requests that wait are tried first; if there are any, none is taken from the queue.
    fn work(&self, index: usize, queue: &mut LockedQueue<'_>) -> Result<WaitFor, QueueError> {
        let held = &mut *lock(&self.held[index]);
        let served = match &mut *lock(&self.engines[index]) {
            Engine::Sync(job) => serve_sync(job, &self.disk, held, queue),
            Engine::IoUring(uring) => uring.serve(&self.disk, held, queue),
        };
        if held.is_empty() {
            return served;
        }
        if let Some(alarm) = self.alarm.get() {
            alarm();
        }
        // Not for what is in the ring: it is served once the requests that wait are done.
        served.map(|_| WaitFor::Input)
    }
}

/// Serves a queue by system calls, as [`Uring::serve`] does.
fn serve_sync(
    job: &mut Job,
    disk: &Disk,
    waiting: &mut Vec<Held>,
    queue: &mut LockedQueue<'_>,
) -> Result<WaitFor, QueueError> {
    let memory = queue.memory();
    let mut again = std::mem::take(waiting);
    let retries = !again.is_empty();
    loop {
        let mut op = if let Some(held) = again.pop() {
            job.begin_again(disk, memory, &held)?
        } else if !retries
            && waiting.is_empty()
            && let Some(chain) = queue.pop()?
        {
            job.begin(disk, memory, chain)?
        } else {
            return Ok(WaitFor::Buffers);
        };
        while let Some(next) = op {
            op = job.proceed(disk, memory, disk.image.execute(next));
        }
        if job.waits() {
            waiting.push(job.held());
        } else {
            let (head, len) = job.complete(memory)?;
            queue.add_used(head, len)?;
        }
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
        let Geometry { len, unit } = self.disk.image.geometry();
        let fields = virtio_blk_config {
            capacity: len / SECTOR,
            seg_max: MAX_SEGMENTS,
            blk_size: unit,
            num_queues: self.config.queues,
            max_discard_sectors: MAX_SECTORS,
            max_discard_seg: MAX_RANGES as u32,
            discard_sector_alignment: unit / SECTOR as u32,
            max_write_zeroes_sectors: MAX_SECTORS,
            max_write_zeroes_seg: MAX_RANGES as u32,
            write_zeroes_may_unmap: 1,
            ..Default::default()
        };
        Structure(fields).read_config(offset, data);
    }

    fn activate(&self, features: u64) {
        self.disk.write_through.store(features & FLUSH == 0, Ordering::Relaxed);
    }

    fn serve(&self, index: usize, queue: &mut LockedQueue<'_>) -> Result<WaitFor, QueueError> {
        if !lock(&self.held[index]).is_empty() {
            self.retry(index, queue)?;
            if !lock(&self.held[index]).is_empty() {
                return Ok(WaitFor::Input);
            }
        }
        self.work(index, queue)
    }

    fn reset(&self) {
        self.held.iter().for_each(|held| lock(held).clear());
        *lock(&self.disk.trouble) = None;
    }

    fn set_alarm(&self, alarm: Alarm) {
        let _ = self.alarm.set(alarm);
    }

    fn trouble(&self) -> Option<String> {
        lock(&self.disk.trouble).clone()
    }

    fn retry(&self, index: usize, queue: &mut LockedQueue<'_>) -> Result<(), QueueError> {
        if !lock(&self.held[index]).is_empty() {
            self.work(index, queue)?;
        }
        // One that is locked is being served, and says itself what becomes of it.
        let mut trouble = lock(&self.disk.trouble);
        if self.held.iter().all(|held| held.try_lock().is_ok_and(|held| held.is_empty())) {
            *trouble = None;
        }
        Ok(())
    }

    fn disk_lock_decides(&self) -> bool {
        self.disk.image.lock_decides()
    }

    fn flush_disk(&self) {
        // One that fails now fails again when it matters.
        let _ = self.disk.image.flush();
    }

    fn check_disk_shared(&self, trusted: bool) -> Result<(), crate::Error> {
        Ok(self.disk.image.check_shared(trusted)?)
    }

    fn boot_image(&self) -> Option<Result<DiskImage, Error>> {
        Some(self.disk.image.to_read())
    }

    fn take_disk_lock(&self) -> Result<(), crate::Error> {
        Ok(self.disk.image.take_lock()?)
    }

    fn claim_disk(&self) -> Result<(), crate::Error> {
        Ok(self.disk.image.claim()?)
    }

    fn release_disk_lock(&self) -> Result<(), crate::Error> {
        Ok(self.disk.image.release_lock()?)
    }

    fn holds_disk_lock(&self) -> bool {
        self.disk.image.holds_lock()
    }

    fn state_kind(&self) -> Kind {
        Kind::Block
    }

    fn save(&self, index: u8) -> Result<Component, component::Error> {
        let Geometry { len, unit } = self.disk.image.geometry();
        let held = self.held.iter().map(|held| lock(held).clone()).collect();
        Component::new(Kind::Block, index, &BlockState { len, unit, held })
    }

    fn load(&self, components: &[Component], index: u8) -> Result<(), component::Error> {
        let BlockState { len, unit, held } = component::payload(components, Kind::Block, index)?;
        let own = self.disk.image.geometry();
        if (len, unit) != (own.len, own.unit) {
            return Err(self.disk.image.mismatch(index, len, unit));
        }
        if held.len() != self.held.len() || held.iter().any(|held| held.len() > usize::from(QUEUE_SIZE)) {
            let what = "it has requests that wait in other queues than this disk's".into();
            return Err(component::Error::Malformed { kind: Kind::Block, index, what });
        }
        if held.iter().any(|held| !held.is_empty()) {
            *lock(&self.disk.trouble) = Some("requests wait to be tried again".into());
        }
        self.held.iter().zip(held).for_each(|(own, held)| *lock(own) = held);
        Ok(())
    }
}
