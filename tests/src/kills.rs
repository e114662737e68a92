//! Schedules of `kill -9` during a migration.
//!
//! The two sides talk through a relay that is as slow as a long line, so that each phase lasts long enough to
//! be hit, and that knows which messages were delivered. Each schedule aims at a phase, waits until the
//! source says it is in it, and kills some random time later. `WHIMBREL_SEED` repeats a choice of schedules;
//! when exactly each kill strikes is up to the machine.

use crate::proxy::{OPENING, Plane, Proxy, Rules, Way};
use crate::say;
use crate::sides::{request, wait_until};
use migration::monitor::Phase;
use std::collections::BTreeMap;
use std::thread;
use std::time::Duration;
use whimbrel::node::Node;

/// The line: each piece of control traffic takes a while.
pub const LINE: Rules = Rules {
    control_delay: Duration::from_millis(6),
    data_delay: Duration::from_millis(1),
    cut: None,
    cut_before: None,
};

/// Two of each three kills aim at the second half of a migration, which is the shorter one.
pub const AIMS: [Phase; 6] = [
    Phase::Preparing,
    Phase::Switchover,
    Phase::Committed,
    Phase::Precopy,
    Phase::Switchover,
    Phase::Committed,
];

/// Short delays stay in the phase aimed at, long ones reach beyond it.
const LONGEST_DELAY: Duration = Duration::from_millis(10);

/// Who is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The source.
    Source,
    /// The destination.
    Destination,
}

/// When who is killed.
#[derive(Clone, Copy, Debug)]
pub struct Schedule {
    /// Who.
    pub victim: Side,
    /// In which phase, or later.
    pub aim: Phase,
    /// How long after it has begun.
    pub delay: Duration,
}

/// So many of them.
pub fn schedules(scenario: &str, count: usize) -> Vec<Schedule> {
    let seed = std::env::var("WHIMBREL_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(|| fastrand::u64(..));
    say::figures(scenario, format_args!("WHIMBREL_SEED={seed} repeats this choice of schedules"));
    let mut random = fastrand::Rng::with_seed(seed);
    let schedule = |number: usize| Schedule {
        victim: if number.is_multiple_of(2) { Side::Source } else { Side::Destination },
        aim: AIMS[number / 2 % AIMS.len()],
        delay: Duration::from_micros(random.u64(0..LONGEST_DELAY.as_micros() as u64)),
    };
    (0..count).map(schedule).collect()
}

impl Schedule {
    /// Begins a migration through the relay and kills the victim; the phase in which that struck. `look` sees
    /// the source just before.
    ///
    /// # Panics
    /// When the migration does not begin.
    pub fn strike(
        &self,
        source: &mut Node,
        destination: &mut Node,
        proxy: &Proxy,
        look: impl FnOnce(&Node),
    ) -> Phase {
        let mut request = request(proxy.address());
        request.silence_s = 2;
        source.migrate(&request).expect("a migration");
        // Before that the destination knows nothing of a migration, and has nothing to say of its end.
        wait_until("the source's proof", || proxy.passed(Plane::Control, Way::Up) >= OPENING);
        let mut phase = wait_phase(source, self.aim);
        thread::sleep(self.delay);
        if let Some(later) = phase_of(source) {
            phase = later;
        }
        look(source);
        match self.victim {
            Side::Source => source.kill(),
            Side::Destination => destination.kill(),
        }
        .expect("a process that can be killed");
        phase
    }
}

fn phase_of(source: &Node) -> Option<Phase> {
    source.migration().ok().map(|migration| migration.progress.phase)
}

/// Waits until a migration has come to a phase, or past it.
fn wait_phase(source: &Node, aim: Phase) -> Phase {
    loop {
        let phase = phase_of(source).expect("a migration");
        if reached(phase, aim) {
            return phase;
        }
    }
}

/// Whether a migration that is in this phase has come to the other one, or past it.
pub fn reached(phase: Phase, aim: Phase) -> bool {
    let order = |phase: Phase| match phase {
        Phase::Preparing => 0,
        Phase::Precopy => 1,
        Phase::Switchover => 2,
        Phase::Committed => 3,
        _ => 4,
    };
    order(phase) >= order(aim)
}

/// What came of the kills.
#[derive(Debug, Default)]
pub struct Outcomes(BTreeMap<String, BTreeMap<&'static str, usize>>);

impl Outcomes {
    /// Counts one.
    pub fn add(&mut self, victim: Side, phase: Phase, outcome: &'static str) {
        let place = format!("{victim:?} killed in {phase:?}");
        *self.0.entry(place).or_default().entry(outcome).or_default() += 1;
    }

    /// Tells all of them.
    ///
    /// # Panics
    /// When they are not so many, or the second half of a migration was never hit.
    pub fn tell(&self, count: usize) {
        for (what, outcomes) in &self.0 {
            let outcomes: Vec<_> = outcomes.iter().map(|(outcome, n)| format!("{n} {outcome}")).collect();
            say::figures(&what.to_lowercase(), outcomes.join(", "));
        }
        assert_eq!(self.0.values().flat_map(BTreeMap::values).sum::<usize>(), count);
        let reached = |text: &str| self.0.keys().any(|what| what.ends_with(text));
        assert!(reached("Switchover") && reached("Committed"), "the switchover was never hit: {self:?}");
    }
}
