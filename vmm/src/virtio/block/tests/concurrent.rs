//! Several requests at a time, on storage that can be held up: a file system that is frozen keeps writes
//! waiting, in the kernel, until it is thawed, and lets reads pass.

use super::*;
use crate::virtio::testing::SIZE;
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch, apply_filter};
use std::process::Command;
use std::thread;
use std::time::Duration;

/// How long something that must not happen is waited for.
const WHILE: Duration = Duration::from_millis(200);
const WRITES: u16 = 4;

/// A file system of its own, mounted; unmounted in the end.
struct Mounted(tempfile::TempDir);

impl Mounted {
    /// `None`, which is said, where that is not possible.
    fn new() -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let run = |program: &str, words: &[&str]| {
            let output = Command::new(program).args(words).current_dir(folder.path()).output();
            let output = output.map_err(|error| format!("{program}: {error}"))?;
            let text = String::from_utf8_lossy(&output.stderr).into_owned();
            if output.status.success() { Ok(()) } else { Err(format!("{program}: {text}")) }
        };
        File::create(folder.path().join("storage")).unwrap().set_len(64 << 20).unwrap();
        std::fs::create_dir(folder.path().join("mount")).unwrap();
        let made = run("mkfs.ext4", &["-q", "storage"])
            .and_then(|()| run("mount", &["-o", "loop,noatime", "storage", "mount"]));
        match made {
            Ok(()) => Some(Mounted(folder)),
            Err(error) => {
                skipped(format_args!("needs root, loop devices and ext4: {error}"));
                None
            }
        }
    }

    fn image(&self) -> PathBuf {
        let path = self.0.path().join("mount/disk.raw");
        let content: Vec<u8> = (0..LEN).map(pattern).collect();
        std::fs::write(&path, content).unwrap();
        File::open(&path).unwrap().sync_all().unwrap();
        path
    }

    fn freeze(&self) -> Frozen {
        let frozen = Frozen(self.0.path().join("mount"));
        let status = Command::new("fsfreeze").arg("-f").arg(&frozen.0).status().unwrap();
        assert!(status.success(), "fsfreeze");
        frozen
    }
}

/// A frozen file system, thawed in the end: to be dropped before whatever waits for it.
struct Frozen(PathBuf);

impl Drop for Frozen {
    fn drop(&mut self) {
        let thawed = Command::new("fsfreeze").arg("-u").arg(&self.0).status();
        assert!(thawed.is_ok_and(|status| status.success()) || thread::panicking());
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // At once, or when the last of its files is closed.
        let unmounted = Command::new("umount").arg("-l").arg(self.0.path().join("mount")).status();
        assert!(unmounted.is_ok_and(|status| status.success()) || thread::panicking());
    }
}

/// A request for the page of the image that has its number.
fn offer(bench: &mut Bench, number: u16, kind: u32) {
    bench.guest_writes(STATUS + u64::from(number), &[0x77]);
    offer_page(bench, number, kind, u64::from(number) * 8);
    bench.notify(0);
}

/// A running disk in a frozen file system, with writes that do not come to an end.
fn held_up(mounted: &Mounted) -> (Bench, BlockConfig, Frozen) {
    let config = BlockConfig::new(mounted.image());
    let mut bench = bench(Arc::new(Block::open(&config, &Images::Any, Aio::IoUring).unwrap()));
    let frozen = mounted.freeze();
    for number in 0..WRITES {
        bench.guest_writes(DATA + u64::from(number) * 4096, &[number as u8 + 1; 4096]);
        offer(&mut bench, number, VIRTIO_BLK_T_OUT);
    }
    bench.wait_taken(0);
    assert_eq!(bench.used(0), 0);
    (bench, config, frozen)
}

/// Does `work`, which has to wait for the writes, and thaws the file system meanwhile.
fn waits_for_writes(bench: &Bench, frozen: Frozen, work: impl FnOnce() + Send) {
    let used = bench.used(0);
    thread::scope(|scope| {
        let work = scope.spawn(work);
        thread::sleep(WHILE);
        assert!(!work.is_finished(), "writes are in flight");
        assert_eq!(bench.used(0), used);
        drop(frozen);
        work.join().unwrap();
    });
}

fn assert_written(config: &BlockConfig) {
    let mut bytes = vec![0; 4096];
    for number in 0..WRITES {
        File::open(&config.path).unwrap().read_exact_at(&mut bytes, u64::from(number) * 4096).unwrap();
        assert_eq!(bytes, [number as u8 + 1; 4096]);
    }
}

/// What is offered last comes back first, and what saves the device finds nothing in flight.
#[test]
fn requests_overtake_one_another_and_a_pause_waits_for_all() {
    let Some(mounted) = has_uring().then(Mounted::new).flatten() else { return };
    let (mut bench, config, frozen) = held_up(&mounted);
    offer(&mut bench, WRITES, VIRTIO_BLK_T_IN);
    assert_eq!(bench.wait_used(0), (u32::from(WRITES) * 3, 4097));
    let at = u64::from(WRITES) * 4096;
    assert_eq!(bench.bytes(DATA + at, 4096), expected(at, 4096));
    assert_eq!(bench.used(0), 1);
    waits_for_writes(&bench, frozen, || bench.function.pause());
    assert_eq!(bench.used(0), WRITES + 1);
    assert_written(&config);
    bench.function.device().release_disk_lock().unwrap();
    let next = Block::open(&config, &Images::Any, Aio::IoUring).unwrap();
    next.take_disk_lock().unwrap();
    let mut bench = bench.hop(Arc::new(next));
    let mut heads: Vec<_> = (0..WRITES).map(|_| bench.wait_used(0)).collect();
    heads.sort_unstable();
    assert_eq!(heads, (0..WRITES).map(|number| (u32::from(number) * 3, 1)).collect::<Vec<_>>());
    assert_eq!(request(&mut bench, 0, VIRTIO_BLK_T_IN, 0, &[Buffer::In(DATA, 4096)]), (OK, 4097));
    assert_eq!(bench.bytes(DATA, 4096), [1; 4096]);
}

#[test]
fn a_reset_waits_for_all_as_well() {
    let Some(mounted) = has_uring().then(Mounted::new).flatten() else { return };
    let (mut bench, config, frozen) = held_up(&mounted);
    waits_for_writes(&bench, frozen, || bench.set_status(0));
    assert_written(&config);
    bench.start(bench.offered());
    assert_eq!(request(&mut bench, 0, VIRTIO_BLK_T_IN, 0, &[Buffer::In(DATA, 4096)]), (OK, 4097));
}

/// What ends the use of a queue leaves nothing in flight either.
#[test]
fn a_malformed_request_waits_for_those_before_it() {
    let Some(mounted) = has_uring().then(Mounted::new).flatten() else { return };
    let (mut bench, config, frozen) = held_up(&mounted);
    bench.offer(0, SIZE - 1, &[Buffer::Out(HEADER, 16)]);
    bench.notify(0);
    waits_for_writes(&bench, frozen, || bench.wait_needs_reset());
    assert_written(&config);
    bench.start(bench.offered());
    assert_eq!(request(&mut bench, 0, VIRTIO_BLK_T_IN, 0, &[Buffer::In(DATA, 4096)]), (OK, 4097));
}

#[test]
fn without_an_io_uring_there_is_the_other_way_unless_it_is_a_must() {
    let forbidden = [(libc::SYS_io_uring_setup, Vec::new())].into_iter().collect();
    let refuse = SeccompAction::Errno(libc::EPERM.unsigned_abs());
    let filter = SeccompFilter::new(forbidden, SeccompAction::Allow, refuse, TargetArch::x86_64).unwrap();
    let filter: BpfProgram = filter.try_into().unwrap();
    // Of this thread and those that it starts.
    let confined = thread::spawn(move || {
        apply_filter(&filter).unwrap();
        let must = Folder::new(Aio::IoUring);
        let refused = Block::open(&BlockConfig::new(must.image()), &Images::Any, Aio::IoUring).err();
        assert!(matches!(refused, Some(Error::NoRing(_))), "{refused:?}");
        let folder = Folder::new(Aio::Auto);
        let mut bench = bench(folder.disk(|_| {}));
        assert_eq!(request(&mut bench, 0, VIRTIO_BLK_T_IN, 0, &[Buffer::In(DATA, 4096)]), (OK, 4097));
        assert_eq!(bench.bytes(DATA, 4096), expected(0, 4096));
    });
    confined.join().unwrap();
}
