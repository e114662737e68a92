//! What the embedded guest reports about itself.

use super::abi::{self, Cpu, Header};
use super::gaps::{self, Gaps, LongGap};
use serde::{Deserialize, Serialize};
use std::fmt;

const BEFORE: usize = abi::PHASE_BEFORE as usize;
const DURING: usize = abi::PHASE_DURING as usize;
const AFTER: usize = abi::PHASE_AFTER as usize;

/// A vCPU that has not looked at the clock for so many seconds, while others have, has lost its timer for
/// good. It sleeps, and cannot notice by itself.
const SILENCE: u64 = 2;

/// For how many seconds a vCPU may run without an interrupt of the local APIC's timer, and of the PIT, until
/// that timer counts as lost.
///
/// An interrupt of the local timer comes with the vCPU: KVM makes it before the guest goes on. Those of the
/// PIT are made by a thread of the host's kernel (`kvm-pit`), which waits for a processor like any other. On
/// a host that has more to do than it has processors, it has waited for over a second while the vCPU ran.
/// Such a PIT is late, and nothing is lost.
const PATIENCE: [(u64, &str); 2] = [(1, "local timer"), (10, "PIT")];

/// The guest's own account of itself. All times in microseconds of guest time.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Testimony {
    /// `booting`, `filling`, `running`, `finished` or `failed`.
    pub state: String,
    /// Whether nothing at all is wrong.
    pub clean: bool,
    /// What is wrong, in words.
    pub problems: Vec<String>,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Bytes of its working set.
    pub working_set: u64,
    /// Pages checked and rewritten.
    pub pages: u64,
    /// Times that each vCPU went through its share, summed up.
    pub passes: u64,
    /// Pages verified once more after it was told to finish.
    pub verified: u64,
    /// How often it looked at the clock.
    pub samples: u64,
    /// Timer interrupts.
    pub ticks: u64,
    /// Those of them that the PIT made.
    #[serde(default)]
    pub pit_ticks: u64,
    /// Entries of the journal on its disk that the disk has confirmed.
    #[serde(default)]
    pub journal: u64,
    /// Longest time between two looks at the clock on any vCPU: before the switchover, around it,
    /// after it.
    pub longest_gap_us: [f64; abi::PHASES],
    /// Usual gaps, outside switchovers, over all vCPUs.
    pub usual_gaps: Gaps,
    /// Gaps around switchovers.
    pub switchover_gaps: Gaps,
    /// The longest of the gaps that the guest still remembers, longest first.
    pub long_gaps: Vec<LongGap>,
    /// Pages rewritten (without a working set: looks at the clock) in each of the last intervals of
    /// 10 ms, oldest first, at most 128.
    pub timeline: Vec<u64>,
}

impl Testimony {
    pub(super) fn of(header: &Header, cpus: &[Cpu]) -> Self {
        let us = |ticks: u64| ticks as f64 * 1e3 / f64::from(header.tsc_khz.max(1));
        let sum = |field: fn(&Cpu) -> u64| cpus.iter().map(field).fold(0, u64::saturating_add);
        let problems = problems(header, cpus);
        Testimony {
            state: state(header.state).into(),
            clean: problems.is_empty(),
            problems,
            vcpus: cpus.len() as u32,
            working_set: header.working_set,
            pages: sum(|c| c.pages),
            passes: sum(|c| c.passes),
            verified: sum(|c| c.verified),
            samples: sum(|c| c.samples),
            ticks: sum(|c| c.ticks.saturating_add(c.pit_ticks)),
            pit_ticks: sum(|c| c.pit_ticks),
            journal: header.journal,
            longest_gap_us: gaps::longest(cpus).map(us),
            usual_gaps: gaps::distribution(cpus, &[BEFORE, AFTER], us),
            switchover_gaps: gaps::distribution(cpus, &[DURING], us),
            long_gaps: gaps::long_gaps(cpus, us),
            timeline: gaps::timeline(cpus),
        }
    }

    /// How much longer than a usual gap (the 99th percentile) the switchover was felt to be, in
    /// microseconds.
    pub fn felt_blackout_us(&self) -> f64 {
        (self.longest_gap_us[DURING] - self.usual_gaps.p99_us).max(0.0)
    }
}

fn state(state: u32) -> &'static str {
    match state {
        abi::STATE_BOOTING => "booting",
        abi::STATE_FILLING => "filling",
        abi::STATE_RUNNING => "running",
        abi::STATE_FINISHED => "finished",
        _ => "failed",
    }
}

fn problems(header: &Header, cpus: &[Cpu]) -> Vec<String> {
    let mut problems = Vec::new();
    if state(header.state) == "failed" {
        problems.push(match header.detail {
            [abi::FAILED_START, vcpu] => format!("vCPU {vcpu} did not start"),
            [abi::FAILED_DISK, _] => "the guest has no disk for its journal".into(),
            [abi::FAILED_PANIC, _] => "the guest found an error in itself".into(),
            [vector, rip] => format!("the guest met exception {vector} at {rip:#x}"),
        });
    }
    if header.journal_failed != 0 {
        problems.push(format!("{} requests to the disk failed", header.journal_failed));
    }
    if header.journal_bad != 0 {
        let first = wrong("block", &header.journal_first);
        problems.push(format!("{} wrong blocks on the disk: {first}", header.journal_bad));
    }
    let latest = cpus.iter().map(|cpu| cpu.last_tsc).max().unwrap_or(0);
    let patience = u64::from(header.tsc_khz) * 1000 * SILENCE;
    for (number, cpu) in cpus.iter().enumerate() {
        let counts = [
            (cpu.lost, "pages lost"),
            (cpu.stale, "pages stale"),
            (cpu.torn, "pages torn"),
            (cpu.backwards, "times the clock went backwards"),
            (cpu.behind, "times the clock was behind another vCPU's"),
        ];
        problems.extend(
            counts.iter().filter(|(n, _)| *n != 0).map(|(n, what)| format!("vCPU {number}: {n} {what}")),
        );
        let second = u64::from(header.tsc_khz) * 1000;
        for (silence, (most, timer)) in cpu.silence.iter().zip(PATIENCE) {
            if second != 0 && *silence > most * second {
                let seconds = *silence as f64 / second as f64;
                problems.push(format!("vCPU {number}: the {timer} was silent for {seconds:.1} s"));
            }
        }
        if patience != 0 && cpu.samples != 0 && latest.saturating_sub(cpu.last_tsc) > patience {
            problems.push(format!("vCPU {number}: silent for over {SILENCE} s while others ran"));
        }
        let bad = cpu.lost.saturating_add(cpu.stale).saturating_add(cpu.torn).min(abi::BAD_PAGES as u64);
        problems.extend(cpu.bad[..bad as usize].iter().map(|bad| describe(number, bad)));
    }
    problems
}

fn describe(vcpu: usize, bad: &abi::BadPage) -> String {
    format!("vCPU {vcpu}: {}", wrong("page", bad))
}

/// What is wrong with a page of memory, or with a block of the disk, which may be ahead of memory.
fn wrong(what: &str, bad: &abi::BadPage) -> String {
    let abi::BadPage { page, expected, word, found } = *bad;
    let held = match abi::generation_of(found, page, word) {
        generation if generation <= expected.saturating_add(1) => format!("generation {generation}"),
        _ => format!("{found:#x}"),
    };
    format!("{what} {page} should be of generation {expected}; its word {word} holds {held}")
}

/// A bar for each pair of intervals, relative to the interval in which most was done.
fn bars(timeline: &[u64]) -> String {
    const BARS: [char; 9] = [' ', '▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let pairs: Vec<u64> = timeline.chunks(2).map(|pair| pair.iter().fold(0, |a, b| a.max(*b))).collect();
    let most = pairs.iter().copied().max().unwrap_or(0).max(1);
    pairs.iter().map(|n| BARS[(n.saturating_mul(8).div_ceil(most) as usize).min(8)]).collect()
}

impl fmt::Display for Testimony {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = |us: f64| us / 1e3;
        let [before, during, after] = self.longest_gap_us;
        writeln!(
            f,
            "the guest: {} pages checked in {} passes, {} timer ticks: {}",
            self.pages,
            self.passes,
            self.ticks,
            if self.clean { "all right" } else { "DAMAGED" }
        )?;
        self.problems.iter().try_for_each(|problem| writeln!(f, "  {problem}"))?;
        writeln!(
            f,
            "longest gap it felt: {:.2} ms in the switchover, {:.2} ms before, {:.2} ms after (usual: {:.2} ms, \
             99% within {:.2} ms)",
            ms(during),
            ms(before),
            ms(after),
            ms(self.usual_gaps.median_us),
            ms(self.usual_gaps.p99_us)
        )?;
        writeln!(f, "its pace until now, 20 ms each: {}", bars(&self.timeline))
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use vm_memory::ByteValued;

    pub(crate) fn running() -> Header {
        let mut header = Header::zeroed();
        header.magic = abi::MAGIC;
        header.version = abi::VERSION;
        header.state = abi::STATE_RUNNING;
        header.vcpus = 1;
        header.tsc_khz = 1_000_000;
        header.working_set = 1 << 20;
        header
    }

    pub(crate) fn empty() -> Cpu {
        Cpu::zeroed()
    }

    #[test]
    fn extremes_are_survived() {
        for fill in [0u8, 0x7f, 0xff] {
            let mut header = running();
            header.as_mut_slice().fill(fill);
            let mut cpu = empty();
            cpu.as_mut_slice().fill(fill);
            let testimony = Testimony::of(&header, &[cpu, cpu]);
            assert_eq!(testimony.clean, fill == 0);
            assert!(!testimony.to_string().is_empty());
        }
    }

    #[test]
    fn wrong_pages_and_timers_are_named() {
        let header = running();
        let mut cpu = empty();
        assert!(Testimony::of(&header, &[cpu]).clean);
        cpu.stale = 1;
        cpu.bad[0] = abi::BadPage { page: 9, expected: 4, word: 2, found: abi::stamp(9, 3, 2) };
        cpu.silence = [0, 10_100_000_000];
        cpu.longest_gap = [1000, 9_000_000, 2000];
        cpu.gaps[0][abi::gap_bucket(1000)] = 100;
        let testimony = Testimony::of(&header, &[cpu]);
        assert!(!testimony.clean);
        assert_eq!(testimony.problems.len(), 3, "{:?}", testimony.problems);
        assert_eq!(testimony.problems[1], "vCPU 0: the PIT was silent for 10.1 s");
        assert!(testimony.problems[2].ends_with("word 2 holds generation 3"), "{:?}", testimony.problems);
        assert_eq!(testimony.longest_gap_us[1], 9000.0);
        assert!(testimony.felt_blackout_us() > 8990.0);
    }

    /// The host's kernel makes the PIT's interrupts when its thread gets a processor.
    #[test]
    fn a_pit_may_be_late_and_a_local_timer_may_not() {
        let mut cpu = empty();
        cpu.silence = [900_000_000, 2_000_000_000];
        assert!(Testimony::of(&running(), &[cpu]).clean);
        cpu.silence[0] = 1_100_000_000;
        let problems = Testimony::of(&running(), &[cpu]).problems;
        assert_eq!(problems, ["vCPU 0: the local timer was silent for 1.1 s"]);
    }

    #[test]
    fn a_vcpu_that_sleeps_for_ever_is_named() {
        let (mut awake, mut asleep) = (empty(), empty());
        (awake.samples, awake.last_tsc) = (1, 5_000_000_000);
        (asleep.samples, asleep.last_tsc) = (1, 4_000_000_000);
        assert!(Testimony::of(&running(), &[awake, asleep]).clean);
        asleep.last_tsc = 1_000_000_000;
        let problems = Testimony::of(&running(), &[awake, asleep]).problems;
        assert!(problems.len() == 1 && problems[0].starts_with("vCPU 1: silent"), "{problems:?}");
    }

    #[test]
    fn a_failure_is_explained() {
        let mut header = running();
        header.state = abi::STATE_FAILED;
        header.detail = [abi::FAILED_START, 3];
        assert_eq!(Testimony::of(&header, &[]).problems, ["vCPU 3 did not start"]);
        header.detail = [14, 0x20_0000];
        assert_eq!(Testimony::of(&header, &[]).problems, ["the guest met exception 14 at 0x200000"]);
    }

    #[test]
    fn the_pace_is_drawn() {
        assert_eq!(bars(&[8, 8, 4, 2, 0, 0, 1]), "█▄ ▁");
        assert_eq!(bars(&[]), "");
    }
}
