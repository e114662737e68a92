//! Looking at the clock and at the timers.

use crate::abi::{self, Cpu, INTERVAL_MS, LONG_GAP_MS, LongGap, PHASES, RECENT_GAPS, TIMELINE};
use crate::clock::{self, KvmClock};
use crate::report::{self, field};
use crate::{apic, cpu};
use core::sync::atomic::{AtomicU64, Ordering};

/// The highest TSC that any vCPU has read. Two that write it at the same time may lower it by a little, which
/// only makes the check weaker for a moment; that is why no locked instruction is needed.
static LATEST: AtomicU64 = AtomicU64::new(0);

/// A vCPU that is away for longer than this part of a second was not running all that time.
const LONGEST_RUN: u64 = 50;

/// One vCPU's watch.
pub struct Watch {
    number: usize,
    report: *mut Cpu,
    kvmclock: Option<KvmClock>,
    tsc_khz: u64,
    /// Ticks from which a gap is a long one.
    long_gap: u64,
    last_tsc: u64,
    last_ns: u64,
    /// Of the local APIC's timer and the PIT: interrupts so far, and how long this vCPU has run since the
    /// last one was noticed.
    ticks: [u64; 2],
    silent: [u64; 2],
    /// How long it has run since timers and kvmclock were checked, and when that was: once in a
    /// millisecond, since it costs as much as rewriting several pages.
    ran: u64,
    checked: u64,
    interval: u32,
    interval_end: u64,
    in_interval: u64,
}

impl Watch {
    /// The watch of vCPU `number`, to be called by it. `waits_ms` is how long it sleeps at most.
    pub fn begin(number: usize, tsc_khz: u32, waits_ms: u64, kvmclock: Option<KvmClock>) -> Self {
        let now = clock::tsc();
        let tsc_khz = u64::from(tsc_khz);
        Watch {
            number,
            report: report::cpu(number),
            kvmclock,
            tsc_khz,
            long_gap: (LONG_GAP_MS + waits_ms) * tsc_khz,
            last_tsc: now,
            last_ns: kvmclock.map_or(0, KvmClock::nanoseconds),
            ticks: [0; 2],
            silent: [0; 2],
            ran: 0,
            checked: now,
            interval: 0,
            interval_end: 0,
            in_interval: 0,
        }
    }

    /// When it last looked.
    pub fn last_tsc(&self) -> u64 {
        self.last_tsc
    }

    /// Looks. `units` is what the vCPU has done since it last did.
    pub fn look(&mut self, units: u64) {
        let latest = LATEST.load(Ordering::Relaxed);
        // The counter must not be read before `latest` was, or another vCPU's later reading could be in
        // there.
        cpu::load_fence();
        let now = clock::tsc();
        if now < latest {
            let own = now < self.last_tsc;
            (if own { field!(self.report, backwards) } else { field!(self.report, behind) }).add(1);
        } else {
            LATEST.store(now, Ordering::Relaxed);
        }
        let gap = now.saturating_sub(self.last_tsc);
        self.last_tsc = now;
        self.note_gap(now, gap);
        self.note_interval(now, units);
        // What a single gap adds is limited: in a long one the guest was away, and so were its timers.
        self.ran += gap.min(self.tsc_khz * 1000 / LONGEST_RUN);
        if now.saturating_sub(self.checked) >= self.tsc_khz {
            self.checked = now;
            self.check_kvmclock();
            self.check_timers();
        }
    }

    fn check_kvmclock(&mut self) {
        if let Some(kvmclock) = self.kvmclock {
            let nanoseconds = kvmclock.nanoseconds();
            if nanoseconds < self.last_ns {
                field!(self.report, backwards).add(1);
            }
            self.last_ns = nanoseconds;
        }
    }

    fn note_gap(&self, now: u64, gap: u64) {
        field!(self.report, samples).add(1);
        field!(self.report, last_tsc).set(now);
        let phase = field!(report::header(), phase).get() as usize % PHASES;
        let longest = field!(self.report, longest_gap[phase]);
        if gap > longest.get() {
            longest.set(gap);
        }
        let bucket = field!(self.report, gaps[phase][abi::gap_bucket(gap)]);
        bucket.set(bucket.get().wrapping_add(1));
        if gap > self.long_gap {
            let count = field!(self.report, long_gaps);
            field!(self.report, recent[count.get() as usize % RECENT_GAPS])
                .set(LongGap { end: now, length: gap });
            count.add(1);
        }
    }

    fn note_interval(&mut self, now: u64, units: u64) {
        // Comparing is cheaper than dividing, and nearly always enough.
        if now >= self.interval_end {
            if self.in_interval != 0 {
                let entry = [self.interval, self.in_interval as u32];
                field!(self.report, timeline[self.interval as usize % TIMELINE]).set(entry);
            }
            let length = (self.tsc_khz * INTERVAL_MS).max(1);
            self.interval = (now / length) as u32;
            self.interval_end = (now / length + 1) * length;
            self.in_interval = 0;
        }
        self.in_interval += units;
    }

    fn check_timers(&mut self) {
        let ran = core::mem::take(&mut self.ran);
        self.check_timer(0, apic::ticks(self.number), ran);
        if self.number == 0 {
            self.check_timer(1, apic::pit(), ran);
        }
    }

    fn check_timer(&mut self, which: usize, ticks: u64, ran: u64) {
        if ticks != self.ticks[which] {
            self.ticks[which] = ticks;
            self.silent[which] = 0;
            let counter =
                if which == 0 { field!(self.report, ticks) } else { field!(self.report, pit_ticks) };
            counter.set(ticks);
            return;
        }
        let before = self.silent[which];
        self.silent[which] += ran;
        let longest = field!(self.report, silence[which]);
        if self.silent[which] > longest.get() {
            longest.set(self.silent[which]);
        }
        // A deadline that was lost is not set again by its handler.
        let second = (self.tsc_khz * 1000).max(1);
        if which == 0 && before / second != self.silent[which] / second {
            apic::arm();
        }
    }
}
