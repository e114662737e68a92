//! What is to happen in a move. The seed of the run and the move's number decide all of it.

use super::cable::Place;
use super::fault::{Class, Fault};
use crate::kills::AIMS;
use crate::sides::Guest;
use migration::monitor::Phase;
use std::time::Duration;

/// Seconds of silence after which the destination counts as lost.
const SILENCE: &str = "2s";

/// When a fault strikes, and for how long.
#[derive(Clone, Copy, Debug)]
pub struct Strike {
    /// What.
    pub fault: Fault,
    /// In which phase, or later; before the move begins if in none.
    pub aim: Option<Phase>,
    /// How long after the phase has begun.
    pub delay: Duration,
    /// For how long, at most until the move is over.
    pub lasts: Duration,
}

/// A move.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Who moves.
    pub guest: Guest,
    /// Further arguments of `whimbrel migrate`.
    pub options: Vec<String>,
    /// Whether a slow relay is between the hosts, so that each phase takes a while.
    pub relayed: bool,
    /// What goes wrong.
    pub strikes: Vec<Strike>,
}

impl Plan {
    /// That of a move; its faults last so long at most.
    pub fn of(seed: u64, number: u64, place: Place, longest: Duration) -> Self {
        // Neighbours must have nothing in common.
        let mut random = fastrand::Rng::with_seed(seed ^ number.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let random = &mut random;
        let fill = random.choice([0, 0, 4 << 20, 16 << 20]).unwrap_or(0);
        let guest = Guest { memory: 64 << 20, vcpus: random.u32(1..=2), fill, ..Guest::SMALL };
        let mut options: Vec<_> =
            ["--on-stall", "switch", "--silence", SILENCE].map(String::from).into_iter().collect();
        let transports: &[&str] = if place == Place::Lab { &["auto", "rdma", "tcp"] } else { &["tcp"] };
        options.extend(["--transport".into(), (*random.choice(transports).unwrap_or(&"tcp")).into()]);
        options.extend(["--streams".into(), random.u32(1..=4).to_string()]);
        if random.bool() {
            options.push("--compare-memory".into());
        }
        // The lab is slow by itself.
        let relayed = place == Place::Machine && random.bool();
        let mut classes = [
            Class::Network,
            Class::Network,
            Class::Process,
            Class::Process,
            Class::Resource,
            Class::Operator,
        ];
        random.shuffle(&mut classes);
        // Nothing goes wrong in few of them, and in some two things do.
        let count = random.choice([0, 1, 1, 1, 1, 1, 2, 2]).unwrap_or(1);
        let mut classes: Vec<_> = classes.into_iter().take(count).collect();
        classes.dedup();
        let strikes =
            classes.into_iter().map(|class| Strike::random(random, class, place, longest)).collect();
        Plan { guest, options, relayed, strikes }
    }
}

impl Plan {
    /// Whether the disk is to be without room.
    pub fn fills_disk(&self) -> bool {
        self.strikes.iter().any(|strike| strike.fault == Fault::FullDisk)
    }
}

impl Strike {
    fn random(random: &mut fastrand::Rng, class: Class, place: Place, longest: Duration) -> Self {
        let before = matches!(class, Class::Network | Class::Resource) && random.u32(0..3) == 0;
        let aim = if before { None } else { random.choice(AIMS) };
        // As many in each order of magnitude.
        let mut between =
            |least: f64, most: f64| Duration::from_secs_f64(least * (most / least).powf(random.f64()));
        let (delay, lasts) = (between(0.0002, 0.3), between(0.02, longest.as_secs_f64()));
        Strike { fault: Fault::random(random, class, place), aim, delay, lasts }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONGEST: Duration = Duration::from_secs(8);

    #[test]
    fn a_seed_decides() {
        let plan = |seed, number| format!("{:?}", Plan::of(seed, number, Place::Lab, LONGEST));
        assert_eq!(plan(1, 7), plan(1, 7));
        assert_ne!(plan(1, 7), plan(2, 7));
        assert_ne!(plan(1, 7), plan(1, 8));
    }

    #[test]
    fn every_kind_of_fault_occurs() {
        let kinds = |place| {
            let strikes = (0..1000).flat_map(|number| Plan::of(3, number, place, LONGEST).strikes);
            strikes.map(|strike| strike.fault.kind()).collect::<std::collections::BTreeSet<_>>()
        };
        assert_eq!(kinds(Place::Machine).len(), 12);
        assert_eq!(kinds(Place::Lab).len(), 17);
    }
}
