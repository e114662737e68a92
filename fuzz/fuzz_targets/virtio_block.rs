//! A disk with a hostile driver, by io_uring or by system calls, whichever the first byte says.

#![no_main]

use libfuzzer_sys::fuzz_target;
use std::sync::OnceLock;
use tempfile::TempDir;
use vmm::virtio::block::{Aio, BlockConfig};
use vmm::virtio::{DeviceConfig, LocalConfig};
use whimbrel_fuzz::guest;

/// Bytes of the disk.
const LEN: u64 = 1 << 20;

fuzz_target!(|input: &[u8]| {
    static FOLDER: OnceLock<TempDir> = OnceLock::new();
    let path = FOLDER
        .get_or_init(|| {
            let folder = tempfile::tempdir().expect("a folder");
            std::fs::File::create(folder.path().join("disk"))
                .and_then(|file| file.set_len(LEN))
                .expect("a disk");
            folder
        })
        .path()
        .join("disk");
    let Some((how, input)) = input.split_first() else { return };
    let aio = if how & 1 == 0 { Aio::Sync } else { Aio::IoUring };
    let local = LocalConfig { aio, ..LocalConfig::default() };
    let (cached, readonly, queues) = (how & 1 == 0, how & 2 != 0, if how & 4 == 0 { 1 } else { 2 });
    let config = DeviceConfig::Block(BlockConfig { cached, readonly, queues, ..BlockConfig::new(path) });
    let device = config.build(&local).expect("a device");
    device.take_disk_lock().expect("the disk's lock");
    guest::drive(device, &local, input);
});
