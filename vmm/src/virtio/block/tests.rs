//! The device, driven through its registers, with a real image.

mod concurrent;
mod pace;

use super::device::{MAX_SECTORS, QUEUE_SIZE};
use super::request::{MAX_RANGES, SECTOR};
use super::uring::Uring;
use super::{Aio, Block, BlockConfig, Error, Geometry, Images};
use crate::virtio::VirtioDevice;
use crate::virtio::common_config::Register;
use crate::virtio::net::wire::skip::skipped;
use crate::virtio::testing::{BUFFERS, Bench, Buffer};
use std::fs::File;
use std::mem::offset_of;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    virtio_blk_config,
};

const LEN: u64 = 4 << 20;
const OK: u8 = VIRTIO_BLK_S_OK as u8;
const IOERR: u8 = VIRTIO_BLK_S_IOERR as u8;
const UNSUPP: u8 = VIRTIO_BLK_S_UNSUPP as u8;
/// Where the tests put a request's header and status, and its data.
const HEADER: u64 = BUFFERS;
const STATUS: u64 = BUFFERS + 0x1000;
const DATA: u64 = BUFFERS + 0x10_0000;

/// Each of the following tests, once for either way of carrying requests out.
macro_rules! both_ways {
    ($($test:ident,)*) => {
        mod sync {
            $(#[test] fn $test() { super::$test(super::Aio::Sync) })*
        }
        mod by_uring {
            $(#[test] fn $test() {
                if super::has_uring() {
                    super::$test(super::Aio::IoUring)
                }
            })*
        }
    };
}

both_ways! {
    what_is_written_is_read_and_in_the_image,
    buffers_may_be_cut_up_and_lie_anywhere,
    every_page_it_writes_is_logged_and_no_other,
    pages_are_logged_before_the_chain_is_back,
    ranges_are_zeroed_and_discarded,
    what_is_none_of_the_guest_s_is_refused,
    a_read_only_disk_is_not_written_and_is_shared,
    one_machine_writes_and_the_next_is_told_who,
    requests_go_on_in_the_machine_that_gets_the_lock,
    a_driver_that_never_flushes_writes_through,
    the_configuration_tells_the_geometry,
    images_that_cannot_be_disks_are_refused_by_name,
    an_arriving_machine_has_only_images_that_were_set_aside,
}

/// Whether there is an io_uring. A kernel that has one and refuses what disks need of it is an error.
pub fn has_uring() -> bool {
    match Uring::new() {
        Ok(_) => true,
        // None in the kernel; or switched off, or forbidden to this process.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EPERM)) => {
            skipped(format_args!("no io_uring: {error}"));
            false
        }
        Err(error) => panic!("there is an io_uring, and disks cannot use it: {error}"),
    }
}

/// An image whose byte at offset n is made of n, in a folder that is removed with it.
struct Folder(tempfile::TempDir, Aio);

impl Folder {
    fn new(aio: Aio) -> Self {
        Folder::new_in(&std::env::temp_dir(), aio)
    }

    fn new_in(parent: &Path, aio: Aio) -> Self {
        let folder = Folder(tempfile::tempdir_in(parent).unwrap(), aio);
        let content: Vec<u8> = (0..LEN).map(pattern).collect();
        std::fs::write(folder.image(), content).unwrap();
        folder
    }

    fn image(&self) -> PathBuf {
        self.0.path().join("disk.raw")
    }

    /// With direct I/O if this file system has it: where the tests run decides.
    fn config(&self) -> BlockConfig {
        let direct = BlockConfig::new(self.image());
        match Block::open(&direct, &Images::Any, self.1) {
            Err(Error::NoDirectIo { .. }) => BlockConfig { cached: true, ..direct },
            _ => direct,
        }
    }

    fn disk(&self, change: impl FnOnce(&mut BlockConfig)) -> Arc<Block> {
        let mut config = self.config();
        change(&mut config);
        Arc::new(Block::open(&config, &Images::Any, self.1).unwrap())
    }

    fn bytes(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        File::open(self.image()).unwrap().read_exact_at(&mut bytes, offset).unwrap();
        bytes
    }
}

fn pattern(offset: u64) -> u8 {
    (offset ^ offset >> 9 ^ offset >> 17) as u8
}

fn expected(offset: u64, len: usize) -> Vec<u8> {
    (offset..offset + len as u64).map(pattern).collect()
}

/// A running disk that holds its lock.
fn bench(disk: Arc<Block>) -> Bench {
    disk.take_disk_lock().unwrap();
    Bench::with(disk).running()
}

/// One request on a queue: the status and how many bytes the device says it wrote.
fn request(bench: &mut Bench, queue: usize, kind: u32, sector: u64, data: &[Buffer]) -> (u8, u32) {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    bench.guest_writes(HEADER, &header);
    bench.guest_writes(STATUS, &[0x77]);
    let buffers = [&[Buffer::Out(HEADER, 16)], data, &[Buffer::In(STATUS, 1)]].concat();
    let (_, written) = bench.request(queue, &buffers);
    (bench.bytes(STATUS, 1)[0], written)
}

/// Makes a request of one page available, with descriptors, header, status and data of its own, by its place;
/// does not ring the doorbell.
fn offer_page(bench: &mut Bench, place: u16, kind: u32, sector: u64) {
    let at = u64::from(place);
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    bench.guest_writes(HEADER + at * 16, &header);
    let data = DATA + at * 4096;
    let data = if kind == VIRTIO_BLK_T_IN { Buffer::In(data, 4096) } else { Buffer::Out(data, 4096) };
    bench.offer(0, place * 3, &[Buffer::Out(HEADER + at * 16, 16), data, Buffer::In(STATUS + at, 1)]);
}

fn what_is_written_is_read_and_in_the_image(aio: Aio) {
    let folder = Folder::new(aio);
    let mut bench = bench(folder.disk(|config| config.queues = 3));
    for (queue, sector, pages) in [(0, 0, 1), (1, 8, 16), (2, LEN / 512 - 8, 1)] {
        let len = pages * 4096;
        let data = [Buffer::In(DATA, len)];
        assert_eq!(request(&mut bench, queue, VIRTIO_BLK_T_IN, sector, &data), (OK, len + 1));
        assert_eq!(bench.bytes(DATA, len as usize), expected(sector * 512, len as usize));
        let written = vec![queue as u8 + 1; len as usize];
        bench.guest_writes(DATA, &written);
        let data = [Buffer::Out(DATA, 4096), Buffer::Out(DATA + 4096, len - 4096)];
        let data = if pages == 1 { &data[..1] } else { &data };
        assert_eq!(request(&mut bench, queue, VIRTIO_BLK_T_OUT, sector, data), (OK, 1));
        assert_eq!(request(&mut bench, queue, VIRTIO_BLK_T_FLUSH, 0, &[]), (OK, 1));
        assert_eq!(folder.bytes(sector * 512, len as usize), written);
    }
    assert_eq!(folder.bytes(17 * 4096, 4096), expected(17 * 4096, 4096), "nothing beside them");
}

fn buffers_may_be_cut_up_and_lie_anywhere(aio: Aio) {
    let folder = Folder::new(aio);
    let mut bench = bench(folder.disk(|_| {}));
    // A header in three parts, data at odd addresses, the status behind the data in one buffer.
    let mut header = [0; 16];
    header[8] = 16;
    bench.guest_writes(HEADER + 5, &header);
    let buffers = [
        Buffer::Out(HEADER + 5, 1),
        Buffer::Out(HEADER + 6, 12),
        Buffer::Out(HEADER + 18, 3),
        Buffer::In(DATA + 1, 700),
        Buffer::In(DATA + 0x1003, 4096 - 700 + 1),
    ];
    assert_eq!(bench.request(0, &buffers), (0, 4097));
    let both = [bench.bytes(DATA + 1, 700), bench.bytes(DATA + 0x1003, 4096 - 700)].concat();
    assert_eq!(both, expected(16 * 512, 4096));
    assert_eq!(bench.bytes(DATA + 0x1003 + 4096 - 700, 1), [OK]);
    // And the other way, more than is copied at a time.
    let len = (256 << 10) + 8192;
    let content: Vec<u8> = (0..len).map(|at| (at % 251) as u8).collect();
    bench.guest_writes(DATA + 7, &content);
    let data = [Buffer::Out(DATA + 7, 1000), Buffer::Out(DATA + 1007, len - 1000)];
    assert_eq!(request(&mut bench, 0, VIRTIO_BLK_T_OUT, 64, &data), (OK, 1));
    assert_eq!(folder.bytes(64 * 512, len as usize), content);
}

fn every_page_it_writes_is_logged_and_no_other(aio: Aio) {
    let folder = Folder::new(aio);
    let mut bench = bench(folder.disk(|_| {}));
    let (data, status) = (DATA >> 12, STATUS >> 12);
    let used = Bench::used_page(0);
    bench.logged(0);
    let buffers = [Buffer::In(DATA, 8192), Buffer::In(DATA + 0x8000, 4096)];
    assert_eq!(request(&mut bench, 0, VIRTIO_BLK_T_IN, 0, &buffers).0, OK);
    assert_eq!(bench.logged(0), [used, status, data, data + 1, data + 8]);
    // By way of the copy that odd addresses need.
    assert_eq!(request(&mut bench, 0, VIRTIO_BLK_T_IN, 0, &[Buffer::In(DATA + 1, 4096)]).0, OK);
    assert_eq!(bench.logged(0), [used, status, data, data + 1]);
    assert_eq!(request(&mut bench, 0, VIRTIO_BLK_T_OUT, 0, &[Buffer::Out(DATA, 4096)]).0, OK);
    assert_eq!(bench.logged(0), [used, status]);
    let id = [Buffer::In(DATA + 0x2ff8, 20)];
    assert_eq!(request(&mut bench, 0, VIRTIO_BLK_T_GET_ID, 0, &id), (OK, 21));
    assert_eq!(bench.bytes(DATA + 0x2ff8, 8), b"disk.raw");
    assert_eq!(bench.logged(0), [used, status, data + 2, data + 3]);
    // A read that fails half-way: the image has become shorter.
    File::options().write(true).open(folder.image()).unwrap().set_len(LEN - 4096).unwrap();
    let end = LEN / 512 - 16;
    assert_eq!(request(&mut bench, 0, VIRTIO_BLK_T_IN, end, &[Buffer::In(DATA, 8192)]), (IOERR, 1));
    assert_eq!(bench.logged(0), [used, status, data, data + 1]);
}

/// Whoever sees that a chain is back sees as well that its pages are dirty.
fn pages_are_logged_before_the_chain_is_back(aio: Aio) {
    let folder = Folder::new(aio);
    let mut bench = bench(folder.disk(|_| {}));
    let header = [0; 16];
    bench.guest_writes(HEADER, &header);
    for round in 0..4000u64 {
        let page = DATA + round % 64 * 4096;
        bench.logged(0);
        let before = bench.used(0);
        bench.offer(0, 0, &[Buffer::Out(HEADER, 16), Buffer::In(page, 4096), Buffer::In(STATUS, 1)]);
        bench.notify(0);
        while bench.used(0) == before {
            std::hint::spin_loop();
        }
        let logged = bench.logged(0);
        assert!(
            [page >> 12, STATUS >> 12].iter().all(|page| logged.contains(page)),
            "round {round}: {logged:?}"
        );
        bench.wait_used(0);
    }
}

fn ranges(bench: &Bench, ranges: &[(u64, u32, u32)]) -> [Buffer; 1] {
    let bytes: Vec<u8> = ranges
        .iter()
        .flat_map(|(sector, sectors, flags)| {
            [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
        })
        .collect();
    bench.guest_writes(DATA, &bytes);
    [Buffer::Out(DATA, bytes.len() as u32)]
}

fn ranges_are_zeroed_and_discarded(aio: Aio) {
    let temporary = std::env::temp_dir();
    // A tmpfs, which has no way to zero a range but to write zeros.
    for folder in [temporary.as_path(), Path::new("/dev/shm")] {
        ranges_of(&Folder::new_in(folder, aio));
    }
}

fn ranges_of(folder: &Folder) {
    let mut bench = bench(folder.disk(|_| {}));
    let two = ranges(&bench, &[(8, 8, 0), (32, 16, 1)]);
    assert_eq!(request(&mut bench, 0, VIRTIO_BLK_T_WRITE_ZEROES, 0, &two), (OK, 1));
    assert_eq!(folder.bytes(8 * 512, 4096), [0; 4096]);
    assert_eq!(folder.bytes(32 * 512, 8192), [0; 8192]);
    assert_eq!(folder.bytes(16 * 512, 8192), expected(16 * 512, 8192));
    let one = ranges(&bench, &[(64, 64, 0)]);
    assert_eq!(request(&mut bench, 0, VIRTIO_BLK_T_DISCARD, 0, &one), (OK, 1));
    assert_eq!(folder.bytes(128 * 512, 4096), expected(128 * 512, 4096));
    for (kind, range, status) in [
        (VIRTIO_BLK_T_DISCARD, (0, 8, 1), UNSUPP),
        (VIRTIO_BLK_T_WRITE_ZEROES, (0, 8, 2), UNSUPP),
        (VIRTIO_BLK_T_WRITE_ZEROES, (LEN / 512 - 8, 16, 0), IOERR),
        (VIRTIO_BLK_T_WRITE_ZEROES, (u64::MAX, 8, 0), IOERR),
        (VIRTIO_BLK_T_DISCARD, (0, u32::MAX, 0), IOERR),
    ] {
        let data = ranges(&bench, &[range]);
        assert_eq!(request(&mut bench, 0, kind, 0, &data), (status, 1), "{range:?}");
    }
    ranges(&bench, &[(256, 8, 0), (272, 8, 0)]);
    let part = [Buffer::Out(DATA, 24)];
    assert_eq!(request(&mut bench, 0, VIRTIO_BLK_T_DISCARD, 0, &part), (IOERR, 1), "a range and a half");
    assert_eq!(folder.bytes(0, 4096), expected(0, 4096));
}

fn what_is_none_of_the_guest_s_is_refused(aio: Aio) {
    let folder = Folder::new(aio);
    let mut bench = bench(folder.disk(|_| {}));
    let page = [Buffer::In(DATA, 4096)];
    for sector in [LEN / 512, LEN / 512 - 4, u64::MAX, u64::MAX / 512, 1 << 55] {
        assert_eq!(request(&mut bench, 0, VIRTIO_BLK_T_IN, sector, &page), (IOERR, 1), "{sector}");
    }
    assert_eq!(request(&mut bench, 0, VIRTIO_BLK_T_IN, 0, &[Buffer::In(DATA, 100)]), (IOERR, 1));
    assert_eq!(request(&mut bench, 0, 99, 0, &[]), (UNSUPP, 1));
    let hostile: [&[Buffer]; 4] = [
        &[Buffer::Out(HEADER, 16)],
        &[Buffer::Out(HEADER, 15), Buffer::In(STATUS, 1)],
        &[Buffer::Out(HEADER, 16), Buffer::In(u64::MAX - 1, 4096), Buffer::In(STATUS, 1)],
        &[Buffer::In(STATUS, 1)],
    ];
    for buffers in hostile {
        bench.offer(0, 0, buffers);
        bench.notify(0);
        bench.wait_needs_reset();
        bench.start(bench.offered());
        assert_eq!(request(&mut bench, 0, VIRTIO_BLK_T_IN, 0, &page), (OK, 4097));
    }
}

fn a_read_only_disk_is_not_written_and_is_shared(aio: Aio) {
    let folder = Folder::new(aio);
    let readonly = |config: &mut BlockConfig| config.readonly = true;
    let mut one = bench(folder.disk(readonly));
    let other = folder.disk(readonly);
    other.take_disk_lock().unwrap();
    assert!(!other.disk_lock_decides(), "it decides nothing");
    assert!(matches!(folder.disk(|_| {}).take_disk_lock(), Err(crate::Error::Disk(Error::Held { .. }))));
    let page = [Buffer::Out(DATA, 4096)];
    assert_eq!(request(&mut one, 0, VIRTIO_BLK_T_OUT, 0, &page), (IOERR, 1));
    let range = ranges(&one, &[(0, 8, 0)]);
    assert_eq!(request(&mut one, 0, VIRTIO_BLK_T_WRITE_ZEROES, 0, &range), (IOERR, 1));
    assert_eq!(request(&mut one, 0, VIRTIO_BLK_T_IN, 0, &[Buffer::In(DATA, 4096)]), (OK, 4097));
    assert_eq!(folder.bytes(0, 4096), expected(0, 4096));
}

fn one_machine_writes_and_the_next_is_told_who(aio: Aio) {
    let folder = Folder::new(aio);
    let (first, second) = (folder.disk(|_| {}), folder.disk(|_| {}));
    first.take_disk_lock().unwrap();
    first.take_disk_lock().unwrap();
    let refusal = second.take_disk_lock().unwrap_err();
    assert_eq!(refusal.code(), migration::Code::DISKS);
    let me = format!("process {}", std::process::id());
    assert!(refusal.to_string().contains(&me), "{refusal}");
    assert!(first.holds_disk_lock() && !second.holds_disk_lock());
    // Whoever does not hold it does no I/O, whatever its guest asks.
    let mut idle = Bench::with(second.clone()).running();
    let page = [Buffer::Out(DATA, 4096)];
    assert_eq!(request(&mut idle, 0, VIRTIO_BLK_T_OUT, 0, &page), (IOERR, 1));
    assert_eq!(folder.bytes(0, 4096), expected(0, 4096));
    first.release_disk_lock().unwrap();
    first.release_disk_lock().unwrap();
    second.take_disk_lock().unwrap();
    assert_eq!(request(&mut idle, 0, VIRTIO_BLK_T_OUT, 0, &page), (OK, 1));
    assert!(first.take_disk_lock().is_err());
}

fn requests_go_on_in_the_machine_that_gets_the_lock(aio: Aio) {
    let folder = Folder::new(aio);
    let mut bench = bench(folder.disk(|config| config.queues = 2));
    for round in 0..8u64 {
        let (sector, queue) = (round * 8, round as usize % 2);
        bench.guest_writes(DATA, &[round as u8 + 1; 4096]);
        let page = [Buffer::Out(DATA, 4096)];
        assert_eq!(request(&mut bench, queue, VIRTIO_BLK_T_OUT, sector, &page), (OK, 1));
        // One more that nobody has taken when the machine pauses.
        bench.function.pause();
        let mut header = [0; 16];
        header[8..].copy_from_slice(&sector.to_le_bytes());
        bench.guest_writes(HEADER, &header);
        let buffers = [Buffer::Out(HEADER, 16), Buffer::In(DATA + 0x2000, 4096), Buffer::In(STATUS, 1)];
        bench.offer(queue, 4, &buffers);
        bench.notify(queue);
        let next = folder.disk(|config| config.queues = 2);
        bench.function.device().release_disk_lock().unwrap();
        next.take_disk_lock().unwrap();
        bench = bench.hop(next);
        assert_eq!(bench.wait_used(queue), (4, 4097));
        assert_eq!(bench.bytes(DATA + 0x2000, 4096), [round as u8 + 1; 4096]);
    }
}

fn a_driver_that_never_flushes_writes_through(aio: Aio) {
    let folder = Folder::new(aio);
    let disk = folder.disk(|_| {});
    disk.take_disk_lock().unwrap();
    let mut bench = Bench::with(disk);
    bench.function.resume();
    bench.start(bench.offered() & !(1 << VIRTIO_BLK_F_FLUSH));
    assert_eq!(request(&mut bench, 0, VIRTIO_BLK_T_OUT, 0, &[Buffer::Out(DATA, 4096)]), (OK, 1));
    assert_eq!(folder.bytes(0, 4096), [0; 4096]);
}

fn the_configuration_tells_the_geometry(aio: Aio) {
    let folder = Folder::new(aio);
    let bench = bench(folder.disk(|config| config.queues = 4));
    let field = |offset, len| bench.config(offset, len);
    assert_eq!(field(offset_of!(virtio_blk_config, capacity), 8), LEN / SECTOR);
    assert_eq!(field(offset_of!(virtio_blk_config, num_queues), 2), 4);
    let unit = field(offset_of!(virtio_blk_config, blk_size), 4);
    assert!(matches!(unit, 512 | 4096), "{unit}");
    assert_eq!(field(offset_of!(virtio_blk_config, seg_max), 4), u64::from(QUEUE_SIZE) - 2);
    for (sectors, ranges) in [
        (offset_of!(virtio_blk_config, max_discard_sectors), offset_of!(virtio_blk_config, max_discard_seg)),
        (
            offset_of!(virtio_blk_config, max_write_zeroes_sectors),
            offset_of!(virtio_blk_config, max_write_zeroes_seg),
        ),
    ] {
        assert_eq!((field(sectors, 4), field(ranges, 4)), (MAX_SECTORS.into(), MAX_RANGES as u64));
    }
    assert_eq!(field(offset_of!(virtio_blk_config, discard_sector_alignment), 4), unit / SECTOR);
    assert_eq!(field(offset_of!(virtio_blk_config, write_zeroes_may_unmap), 1), 1);
    assert_eq!(field(0x800, 4), 0);
    assert_eq!(bench.register(Register::NumQueues), 4);
}

fn images_that_cannot_be_disks_are_refused_by_name(aio: Aio) {
    let folder = Folder::new(aio);
    let open = |config: &BlockConfig| Block::open(config, &Images::Any, aio).map(drop);
    let at = |path: &str| BlockConfig { path: path.into(), ..folder.config() };
    assert!(matches!(open(&at("/nonexistent/disk")), Err(Error::Open { .. })));
    assert!(matches!(open(&at("/")), Err(Error::NoImage { .. })));
    assert!(matches!(open(&at("/dev/null")), Err(Error::NoImage { .. })));
    assert!(matches!(open(&BlockConfig { queues: 0, ..folder.config() }), Err(Error::Queues(0))));
    assert!(matches!(open(&BlockConfig { queues: 17, ..folder.config() }), Err(Error::Queues(17))));
    let wanted = Geometry { len: LEN + 4096, unit: 512 };
    let other = BlockConfig { geometry: Some(wanted), ..folder.config() };
    assert!(matches!(open(&other), Err(Error::Geometry { .. })));
    let strange = BlockConfig { geometry: Some(Geometry { len: LEN, unit: 1000 }), ..folder.config() };
    assert!(matches!(open(&strange), Err(Error::Geometry { .. })));
    for len in [0, 1000] {
        File::options().write(true).open(folder.image()).unwrap().set_len(len).unwrap();
        assert!(matches!(open(&folder.config()), Err(Error::Size { .. })), "{len}");
    }
}

fn an_arriving_machine_has_only_images_that_were_set_aside(aio: Aio) {
    let folder = Folder::new(aio);
    let below = |path: &Path| Images::Below(vec![path.into()]);
    let check = |images: &Images, path: &Path| {
        Block::open(&BlockConfig { path: path.into(), ..folder.config() }, images, aio).map(drop)
    };
    assert!(check(&below(folder.0.path()), &folder.image()).is_ok());
    let refused = check(&Images::Below(Vec::new()), &folder.image()).unwrap_err();
    assert!(refused.to_string().contains("--disks"), "{refused}");
    let elsewhere = Folder::new(aio);
    assert!(check(&below(elsewhere.0.path()), &folder.image()).is_err());
    let by_way_of = elsewhere.0.path().join("..").join(folder.0.path().file_name().unwrap()).join("disk.raw");
    assert!(check(&below(elsewhere.0.path()), &by_way_of).is_err());
    let link = elsewhere.0.path().join("link");
    std::os::unix::fs::symlink(folder.image(), &link).unwrap();
    assert!(check(&below(elsewhere.0.path()), &link).is_err());
}
