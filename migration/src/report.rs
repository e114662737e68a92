//! What a migration was, in figures. Serialised as it is for `--json`.

use crate::failure::Failure;
use crate::message::Span;
use crate::transport::LaneStats;
use serde::{Deserialize, Serialize};
use std::ops::AddAssign;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// One pre-copy round, or the final one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RoundReport {
    /// Number, from 0; the final round, in the blackout, is the last.
    pub round: u32,
    /// Bytes of pages that were dirty at its beginning (in round 0: all memory).
    pub dirty: u64,
    /// Bytes that travelled.
    pub sent: u64,
    /// Bytes that exist but hold zeros, and were only named or skipped.
    pub zero: u64,
    /// Bytes skipped because nobody ever touched them.
    pub untouched: u64,
    /// Microseconds from begin to confirmed barrier.
    pub elapsed_us: u64,
    /// The barrier's part of that.
    pub barrier_us: u64,
    /// Bytes that were dirty again at the end.
    pub remaining: u64,
    /// Blackout in microseconds that was predicted after it.
    pub predicted_blackout_us: u64,
}

/// A transport that was not used, and why.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Declined {
    /// Its name.
    pub transport: String,
    /// Why not.
    pub why: Failure,
}

/// How it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// The guest runs at the destination.
    Moved,
    /// The guest runs at the source.
    Stayed,
    /// The guest is paused at the source.
    Held,
}

/// The whole story.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// How it ended.
    pub verdict: Verdict,
    /// Why, unless the guest has moved.
    pub failure: Option<Failure>,
    /// Why a blackout over the limit was accepted, if it was.
    pub over_limit: Option<String>,
    /// Transport of the last round; empty if none was connected.
    pub transport: String,
    /// Transports that were not used, or broke in mid-flight.
    pub declined: Vec<Declined>,
    /// Guest memory in bytes.
    pub memory: u64,
    /// All rounds; the last is the one in the blackout, if it came so far.
    pub rounds: Vec<RoundReport>,
    /// Counters of each lane of the last transport.
    pub lanes: Vec<LaneStats>,
    /// Microseconds from the beginning to the end.
    pub total_us: u64,
    /// Microseconds until the data plane was connected: greeting, building, connecting.
    pub setup_us: u64,
    /// Microseconds of that in which the destination built the shadow machine.
    pub build_us: u64,
    /// Microseconds from the pause at the source to the destination's word that the guest runs;
    /// longer than the blackout by half a round trip. 0 if there was no switchover.
    pub blackout_us: u64,
    /// The blackout's parts, in order; together they are the blackout.
    pub spans: Vec<Span>,
    /// CPU time in microseconds of the source's migration threads, those of its transport included.
    pub source_cpu_us: u64,
    /// Of that, microseconds in user space, as exactly as the kernel samples it: by the tick.
    pub source_user_us: u64,
    /// The same of the destination, if it said so.
    pub destination_cpu_us: Option<u64>,
    /// Bytes of guest memory resident at the destination afterwards, if it said so.
    pub destination_resident: Option<u64>,
    /// What the destination's VMM had to say afterwards, in its own form; `None` if it said nothing.
    pub remarks: Option<String>,
}

impl Report {
    /// The report of a migration of `memory` bytes that failed before the destination was reached.
    pub fn not_begun(failure: Failure, memory: u64) -> Self {
        Report {
            verdict: Verdict::Stayed,
            failure: Some(failure),
            over_limit: None,
            transport: String::new(),
            declined: Vec::new(),
            memory,
            rounds: Vec::new(),
            lanes: Vec::new(),
            total_us: 0,
            setup_us: 0,
            build_us: 0,
            blackout_us: 0,
            spans: Vec::new(),
            source_cpu_us: 0,
            source_user_us: 0,
            destination_cpu_us: None,
            destination_resident: None,
            remarks: None,
        }
    }

    /// Bytes that travelled, over all rounds.
    pub fn sent(&self) -> u64 {
        self.rounds.iter().map(|r| r.sent).sum()
    }

    /// Bytes found to be zero, over all rounds.
    pub fn zero(&self) -> u64 {
        self.rounds.iter().map(|r| r.zero).sum()
    }

    /// Bytes skipped as never touched.
    pub fn untouched(&self) -> u64 {
        self.rounds.iter().map(|r| r.untouched).sum()
    }
}

/// CPU time, of one thread or of several.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuTime {
    /// All of it.
    pub all: Duration,
    /// The part in user space. The kernel knows the sum exactly and divides it as its ticks have found the
    /// thread, so that this is a sample: worth something from some tens of milliseconds on.
    pub user: Duration,
}

impl CpuTime {
    /// What was used since `before`.
    pub fn since(self, before: CpuTime) -> CpuTime {
        CpuTime { all: self.all.saturating_sub(before.all), user: self.user.saturating_sub(before.user) }
    }
}

impl AddAssign for CpuTime {
    fn add_assign(&mut self, other: CpuTime) {
        self.all += other.all;
        self.user += other.user;
    }
}

/// CPU time that the calling thread has used so far.
pub fn thread_cpu() -> CpuTime {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call writes one timespec through a pointer to one.
    let result = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    let all =
        if result == 0 { Duration::new(time.tv_sec as u64, time.tv_nsec as u32) } else { Duration::ZERO };
    // SAFETY: plain data, for which zeros are valid.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: the call writes one rusage through a pointer to one. Where it fails, the zeros stay.
    unsafe { libc::getrusage(libc::RUSAGE_THREAD, &mut usage) };
    let user = usage.ru_utime;
    CpuTime { all, user: Duration::new(user.tv_sec as u64, user.tv_usec as u32 * 1000).min(all) }
}

/// The CPU time of a thread that others ask about: it writes down what it has used so far, every so often.
#[derive(Debug, Default)]
pub struct CpuMeter {
    all_us: AtomicU64,
    user_us: AtomicU64,
}

impl CpuMeter {
    /// Writes down what the calling thread, the only one that does so here, has used so far.
    pub fn note(&self) {
        let cpu = thread_cpu();
        self.all_us.store(cpu.all.as_micros() as u64, Ordering::Relaxed);
        self.user_us.store(cpu.user.as_micros() as u64, Ordering::Relaxed);
    }

    /// What was written down last.
    pub fn read(&self) -> CpuTime {
        let read = |us: &AtomicU64| Duration::from_micros(us.load(Ordering::Relaxed));
        CpuTime { all: read(&self.all_us), user: read(&self.user_us) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_meter_knows_what_its_thread_has_used() {
        let meter = CpuMeter::default();
        assert_eq!(meter.read(), CpuTime::default());
        let before = thread_cpu();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while thread_cpu().user < Duration::from_millis(20) {
                    std::hint::black_box([0u8; 4096].iter().map(|b| u64::from(*b)).sum::<u64>());
                }
                meter.note();
            });
        });
        let read = meter.read();
        assert!(read.user >= Duration::from_millis(20) && read.all >= read.user, "{read:?}");
        // Another thread's time is not ours.
        assert!(thread_cpu().since(before).all < read.all);
    }
}
