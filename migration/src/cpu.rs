//! CPU time that threads have used.

use std::ops::AddAssign;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

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
