//! The transport, driven as a kernel does.

use super::common_config::Register;
use super::queue::{LockedQueue, QueueError, WaitFor};
use super::registers::BAR_LEN;
use super::rng::Rng;
use super::testing::{BUFFERS, Bench, Buffer};
use super::{DeviceConfig, DeviceType, VirtioDevice};
use crate::component::{Component, Error, Kind};
use crate::pci::{Function, bar_address};
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::sync::Arc;

const COMMAND: usize = 4;
const BAR0: usize = 0x10;
/// Where the window capability is: the fifth of those that begin at 0x40.
const WINDOW: usize = 0x40 + 3 * 16 + 20;

fn bench() -> Bench {
    Bench::with(Arc::new(Rng::new())).running()
}

#[test]
fn doorbells_are_where_the_bar_is() {
    let bench = bench();
    let first = u64::from(bar_address(3));
    assert_eq!(bench.recorder.doorbells(), [first + 0x3000], "from the start");
    assert_eq!(bench.function.offset(first + 0x3000), Some(0x3000));
    assert_eq!(bench.function.offset(first + u64::from(BAR_LEN)), None);
    bench.function.write_config(COMMAND, &[4, 0]);
    assert_eq!((bench.recorder.doorbells(), bench.function.offset(first)), (vec![], None));
    bench.function.write_config(BAR0, &0xd000_0000u32.to_le_bytes());
    bench.function.write_config(COMMAND, &[6, 0]);
    assert_eq!(bench.recorder.doorbells(), [0xd000_3000]);
    // So are those of a function that the state is loaded into.
    let bench = bench.hop(Arc::new(Rng::new()));
    assert_eq!(bench.recorder.doorbells(), [0xd000_3000]);
    assert_eq!(bench.function.offset(0xd000_0000), Some(0));
}

#[test]
fn the_window_in_configuration_space_reaches_the_registers() {
    let bench = bench();
    let set = |offset: u32, len: u32| {
        bench.function.write_config(WINDOW + 8, &offset.to_le_bytes());
        bench.function.write_config(WINDOW + 12, &len.to_le_bytes());
    };
    let read = || {
        let mut data = [0; 4];
        bench.function.read_config(WINDOW + 16, &mut data);
        u32::from_le_bytes(data)
    };
    let mut id = [0; 4];
    bench.function.read_config(WINDOW, &mut id);
    assert_eq!((id[0], id[3]), (9, 5));
    set(0x12, 2);
    assert_eq!(read(), 1, "the number of queues");
    set(0x16, 2);
    bench.function.write_config(WINDOW + 16, &7u32.to_le_bytes());
    assert_eq!(bench.register(Register::QueueSelect), 7);
    for (offset, len) in [(0x13, 2), (0, 3), (u32::MAX, 4), (BAR_LEN, 4), (BAR_LEN - 2, 4)] {
        set(offset, len);
        bench.function.write_config(WINDOW + 16, &9u32.to_le_bytes());
        assert_eq!(read(), 9, "no window: only memory");
    }
    assert_eq!(bench.register(Register::QueueSelect), 7);
}

#[test]
fn any_access_to_the_bar_is_harmless() {
    let bench = bench();
    for offset in (0..u64::from(BAR_LEN)).step_by(3) {
        for len in [1, 2, 3, 4, 8] {
            let mut data = [0; 8];
            bench.function.read_bar(offset, &mut data[..len]);
            bench.function.write_bar(offset, &[0x5a; 8][..len]);
        }
    }
    let mut bench = bench;
    bench.start(bench.offered());
    assert_eq!(bench.request(0, &[Buffer::In(BUFFERS, 16)]), (0, 16));
}

#[test]
fn a_state_that_is_cut_or_changed_is_refused_or_harmless() {
    let mut bench = bench();
    bench.request(0, &[Buffer::In(BUFFERS, 16)]);
    bench.function.pause();
    let saved = bench.save();
    let target = Bench::beside(Arc::new(Rng::new()), bench.ram.clone());
    let load = |payload: &[u8]| {
        let mut components = saved.clone();
        components[0].set_bytes(payload);
        target.function.load(&components)
    };
    let good = saved[0].bytes().to_vec();
    for end in 0..good.len() {
        assert!(matches!(load(&good[..end]), Err(Error::Malformed { .. })), "cut at {end}");
    }
    assert!(load(&[&good[..], &[0]].concat()).is_err());
    for at in 0..good.len() {
        for change in [1, 0x80, 0xff] {
            let mut changed = good.clone();
            changed[at] ^= change;
            // Rings elsewhere, for example, are as good as those that were there.
            let _ = load(&changed);
        }
    }
    assert!(matches!(target.function.load(&saved[..1]), Err(Error::Missing { .. })));
    load(&good).unwrap();
    assert_eq!(target.save(), saved);
}

/// A device with a mistake in it.
struct Broken(Rng);

impl VirtioDevice for Broken {
    fn name(&self) -> &'static str {
        "broken"
    }

    fn device_type(&self) -> DeviceType {
        self.0.device_type()
    }

    fn config(&self) -> DeviceConfig {
        self.0.config()
    }

    fn features(&self) -> u64 {
        self.0.features()
    }

    fn queue_sizes(&self) -> &[u16] {
        self.0.queue_sizes()
    }

    fn serve(&self, _: usize, _: &mut LockedQueue<'_>) -> Result<WaitFor, QueueError> {
        panic!("a mistake")
    }

    fn state_kind(&self) -> Kind {
        self.0.state_kind()
    }

    fn save(&self, index: u8) -> Result<Component, Error> {
        self.0.save(index)
    }

    fn load(&self, components: &[Component], index: u8) -> Result<(), Error> {
        self.0.load(components, index)
    }
}

#[test]
fn a_device_that_panics_ends_the_process_with_a_message() {
    const CHILD: &str = "WHIMBREL_TEST_CHILD";
    if std::env::var_os(CHILD).is_some() {
        let mut bench = Bench::with(Arc::new(Broken(Rng::new()))).running();
        bench.offer(0, 0, &[Buffer::In(BUFFERS, 16)]);
        bench.notify(0);
        // A guest that waits for its device: it would for ever.
        std::thread::sleep(std::time::Duration::from_secs(10));
        return;
    }
    let name = "virtio::tests::a_device_that_panics_ends_the_process_with_a_message";
    let mut child = Command::new(std::env::current_exe().unwrap());
    let output = child.args(["--exact", name, "--nocapture"]).env(CHILD, "1").output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.signal(), Some(libc::SIGABRT), "{stderr}");
    assert!(stderr.contains("the thread broken.0 has panicked; the machine ends"), "{stderr}");
}
