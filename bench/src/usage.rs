//! How much processor time other processes used during a run.

use std::fs;

/// Processor time used up to some moment, in seconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Usage {
    /// By all processes and the kernel.
    all: f64,
    /// Idle time.
    idle: f64,
    /// By this process and by those of its children that have ended.
    own: f64,
}

impl Usage {
    /// Processor time up to now; `None` where the kernel does not report it.
    pub fn now() -> Option<Self> {
        let stat = fs::read_to_string("/proc/stat").ok()?;
        let (all, idle) = parse(&stat)?;
        let own = [libc::RUSAGE_SELF, libc::RUSAGE_CHILDREN].into_iter().map(cpu_seconds).sum();
        Some(Usage { all: seconds(all), idle: seconds(idle), own })
    }

    /// The share of all processors, in per cent, that other processes used since `earlier`. The kernel's
    /// threads count as other processes.
    pub fn of_others(&self, earlier: &Usage) -> Option<f64> {
        let whole = (self.all - earlier.all) + (self.idle - earlier.idle);
        let others = (self.all - earlier.all) - (self.own - earlier.own);
        // Ticks are hundredths of a second, so the difference may come out a little below zero.
        (whole > 0.0).then(|| (100.0 * others / whole).max(0.0))
    }
}

/// The first line of `/proc/stat`: busy ticks and idle ticks.
fn parse(stat: &str) -> Option<(u64, u64)> {
    let fields = stat.lines().next()?.strip_prefix("cpu ")?.split_whitespace();
    let fields: Vec<u64> = fields.map_while(|field| field.parse().ok()).collect();
    // The fields are user, nice, system, idle, iowait, irq, softirq, steal. User time includes guest time.
    let [user, nice, system, idle, iowait, irq, softirq, ..] = fields[..] else { return None };
    Some((user + nice + system + irq + softirq, idle + iowait))
}

/// Converts ticks to seconds.
fn seconds(ticks: u64) -> f64 {
    // SAFETY: the call takes no pointers.
    let each = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
    ticks as f64 / each.max(1) as f64
}

/// Processor seconds of a process or a thread, user and system: fields 14 and 15 of its `stat` file.
pub fn cpu_seconds_in(stat: &str) -> Option<f64> {
    // The second field is a name in parentheses, which may hold any characters.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let mut field = || fields.next()?.parse::<u64>().ok();
    Some(seconds(field()? + field()?))
}

/// Processor seconds of `RUSAGE_SELF` or `RUSAGE_CHILDREN`, user and system.
pub fn cpu_seconds(who: libc::c_int) -> f64 {
    // SAFETY: all zeros is a valid value of the structure, and the kernel fills it in.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer is to a structure of the right type that lives across the call.
    if unsafe { libc::getrusage(who, &mut usage) } != 0 {
        return 0.0;
    }
    let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 / 1e6;
    seconds(usage.ru_utime) + seconds(usage.ru_stime)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_line_is_read() {
        assert_eq!(parse("cpu  10 1 20 300 5 2 3 99 7 0\ncpu0 1\n"), Some((36, 305)));
        assert_eq!(parse("cpu 1 2 3\n"), None);
        assert_eq!(parse(""), None);
        assert!(Usage::now().is_some());
    }

    #[test]
    fn a_threads_time_is_read_whatever_its_name() {
        let stat = |name: &str| format!("7 ({name}) S 1 1 1 0 -1 0 0 0 0 0 150 50 9 9 20 0 1 0 0");
        assert_eq!(cpu_seconds_in(&stat("vcpu0")), Some(seconds(200)));
        assert_eq!(cpu_seconds_in(&stat("a) R 1 (b")), Some(seconds(200)));
        assert_eq!(cpu_seconds_in("7 (a) S 1"), None);
    }

    #[test]
    fn others_are_whoever_is_not_us() {
        let at = |all, idle, own| Usage { all, idle, own };
        let before = at(100.0, 50.0, 10.0);
        assert_eq!(at(104.0, 56.0, 13.0).of_others(&before), Some(10.0));
        assert_eq!(at(104.0, 56.0, 14.5).of_others(&before), Some(0.0));
        assert_eq!(before.of_others(&before), None);
    }
}
