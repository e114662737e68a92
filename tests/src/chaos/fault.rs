//! What goes wrong during a move.

use super::cable::{Cable, NOTHING, Place};
use super::target::Target;
use crate::journal::Disk;
use crate::kills::Side;
use crate::lab::DeviceGone;
use crate::proxy::Way;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

/// One thing that goes wrong.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fault {
    /// Nothing passes from now on: one way, or both ways.
    Partition(Option<Way>),
    /// So many kilobits a second pass, both ways.
    Throttle(u32),
    /// Of a hundred packets so many are lost, both ways.
    Loss(u32),
    /// Of a hundred packets so many come twice.
    Duplication(u32),
    /// Of a hundred packets so many overtake the others.
    Reordering(u32),
    /// A process stands still.
    Stop(Side),
    /// A process is killed.
    Kill(Side),
    /// The receiver may have no more descriptors than that.
    Descriptors(u64),
    /// The receiver's address space may not grow by more than so many KiB.
    Memory(u64),
    /// There is no room left for what the guest's disk has not held before.
    FullDisk,
    /// Both hosts' clocks jump by so many seconds.
    Clock(i64),
    /// The RDMA device of the destination goes away.
    Device,
    /// The operator calls the migration off.
    Cancel,
}

/// Faults of one class have one and the same thing to change: a move has one of them at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// What passes between the hosts.
    Network,
    /// Whether a process goes on.
    Process,
    /// What a process may have.
    Resource,
    /// What somebody does.
    Operator,
}

impl Fault {
    /// One of a class.
    pub fn random(random: &mut fastrand::Rng, class: Class, place: Place) -> Self {
        let lab = place == Place::Lab;
        let side = if random.bool() { Side::Source } else { Side::Destination };
        match class {
            Class::Network => match random.u32(0..if lab { 9 } else { 4 }) {
                0 => Fault::Partition(None),
                1 => Fault::Partition(Some(Way::Up)),
                2 => Fault::Partition(Some(Way::Down)),
                // From 2 Mbit/s to 200 Mbit/s.
                3 => Fault::Throttle((2000.0 * 100f64.powf(random.f64())) as u32),
                4 | 5 => Fault::Loss(random.u32(1..20)),
                6 => Fault::Duplication(random.u32(1..50)),
                7 => Fault::Reordering(random.u32(1..50)),
                _ => Fault::Device,
            },
            Class::Process => match random.u32(0..2) {
                0 => Fault::Stop(side),
                _ => Fault::Kill(side),
            },
            Class::Resource => match random.u32(0..if lab { 4 } else { 3 }) {
                0 => Fault::Descriptors(32),
                1 => Fault::Memory(random.u64(0..64 << 10)),
                2 => Fault::FullDisk,
                _ => Fault::Clock(random.i64(1..86400) * if random.bool() { 1 } else { -1 }),
            },
            Class::Operator => Fault::Cancel,
        }
    }

    /// What it is counted as.
    pub fn kind(&self) -> &'static str {
        match self {
            Fault::Partition(None) => "partition both ways",
            Fault::Partition(Some(Way::Up)) => "partition to the destination",
            Fault::Partition(Some(Way::Down)) => "partition to the source",
            Fault::Throttle(_) => "throttled line",
            Fault::Loss(_) => "lost packets",
            Fault::Duplication(_) => "duplicated packets",
            Fault::Reordering(_) => "reordered packets",
            Fault::Stop(Side::Source) => "source stopped",
            Fault::Stop(Side::Destination) => "destination stopped",
            Fault::Kill(Side::Source) => "source killed",
            Fault::Kill(Side::Destination) => "destination killed",
            Fault::Descriptors(_) => "few descriptors",
            Fault::Memory(_) => "little memory",
            Fault::FullDisk => "full disk",
            Fault::Clock(_) => "clock jumped",
            Fault::Device => "RDMA device gone",
            Fault::Cancel => "cancelled",
        }
    }

    /// Lets it happen; what is returned ends it.
    pub fn strike<'a>(&self, cable: &'a Cable, pair: &'a Pair<'_>) -> Box<dyn FnOnce() + 'a> {
        const BOTH: &[Way] = &[Way::Up, Way::Down];
        let line = |ways: &'static [Way], how: &str| -> Box<dyn FnOnce() + 'a> {
            ways.iter().for_each(|way| cable.treat(*way, how));
            Box::new(move || ways.iter().for_each(|way| cable.mend(*way)))
        };
        match *self {
            Fault::Partition(None) => line(BOTH, NOTHING),
            Fault::Partition(Some(Way::Up)) => line(&[Way::Up], NOTHING),
            Fault::Partition(Some(Way::Down)) => line(&[Way::Down], NOTHING),
            Fault::Throttle(rate) => line(BOTH, &format!("tbf rate {rate}kbit burst 64kb latency 50ms")),
            Fault::Loss(percent) => line(BOTH, &format!("netem loss {percent}%")),
            Fault::Duplication(percent) => line(BOTH, &format!("netem duplicate {percent}%")),
            Fault::Reordering(percent) => line(BOTH, &format!("netem delay 3ms reorder {percent}%")),
            Fault::Stop(side) => {
                pair.of(side).signal(libc::SIGSTOP);
                Box::new(move || pair.of(side).signal(libc::SIGCONT))
            }
            Fault::Kill(side) => {
                pair.look();
                pair.of(side).signal(libc::SIGKILL);
                Box::new(|| ())
            }
            Fault::Descriptors(most) => pair.destination.limit(libc::RLIMIT_NOFILE, most),
            Fault::Memory(more) => {
                let most = pair.destination.address_space() + (more << 10);
                // Where it matters it ends a process, which has written nothing later.
                pair.look();
                pair.destination.limit(libc::RLIMIT_AS, most)
            }
            Fault::FullDisk => {
                let end = pair.disk.fill();
                Box::new(move || {
                    if [pair.source, pair.destination].iter().any(|side| side.waits_for_disk()) {
                        pair.waited.store(true, Ordering::Release);
                    }
                    end();
                })
            }
            Fault::Clock(seconds) => {
                jump(seconds);
                Box::new(move || jump(-seconds))
            }
            Fault::Device => {
                pair.gone.lock().unwrap_or_else(PoisonError::into_inner).push(DeviceGone::begin());
                Box::new(|| ())
            }
            Fault::Cancel => {
                pair.source.cancel();
                Box::new(|| ())
            }
        }
    }
}

/// Both sides of a move.
pub struct Pair<'a> {
    /// The source.
    pub source: &'a Target,
    /// The destination.
    pub destination: &'a Target,
    /// The guest's disk.
    pub disk: &'a Disk,
    /// Whether the guest was seen to wait for it.
    pub waited: AtomicBool,
    /// Entries of the journal that the guest is known to have written.
    pub known: AtomicU64,
    /// The devices that are away. They cannot come back while the processes live.
    pub gone: Mutex<Vec<DeviceGone>>,
}

impl Pair<'_> {
    fn of(&self, side: Side) -> &Target {
        match side {
            Side::Source => self.source,
            Side::Destination => self.destination,
        }
    }

    /// Asks the guest for what it has written.
    fn look(&self) {
        for target in [self.source, self.destination] {
            self.known.fetch_max(target.confirmed(), Ordering::AcqRel);
        }
    }
}

/// Has this system's clock jump.
fn jump(seconds: i64) {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the time lives across the calls.
    let set = unsafe {
        libc::clock_gettime(libc::CLOCK_REALTIME, &mut now);
        now.tv_sec += seconds;
        libc::clock_settime(libc::CLOCK_REALTIME, &now)
    };
    assert_eq!(set, 0, "{}", io::Error::last_os_error());
}
