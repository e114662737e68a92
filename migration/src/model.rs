//! Every schedule within bounds: the two state machines as a model for an exhaustive checker.
//!
//! The [simulation](crate::simulation) throws dice and sees many long schedules. This sees *all* schedules,
//! as long as no more than a stated number of things go wrong in each. What runs is the very code that runs
//! in production: [`source::State`](src::State) and [`destination::State`](dst::State), unchanged. The world
//! around them is the model: a wire in each direction, the locks of shared disks, an operator on each side
//! who cancels, and a killer.
//!
//! A fault is any of these: an action fails; a wait ends too early; a message arrives twice; a send reports
//! an error although its bytes arrive; the operator cancels; the line is cut, and each direction loses any
//! number of its youngest messages; a process is killed. What follows from a fault by itself costs nothing
//! more: on a line that is cut, a send may or may not report an error, and a wait ends when the other side
//! can say no more. The source may also replace a transport that breaks, which is a fault too. So is memory
//! that differs between the sides, and an operator's time limit that passes.
//!
//! What is moved is checked as well as who has it: the guest's memory changes while it runs, and once more
//! when its state is saved, as the kernel may then write to it. What the destination runs must have all of
//! that.
//!
//! A schedule begins with the opening of the control link ([`opening`]), of which each step may fail: the
//! line is cut, nothing comes, what comes was changed on the way, the destination has no room, or its verdict
//! arrives although it could not tell it. One side may then have a session that the other knows nothing of.
//! A lane that is refused is a [`Connect`](src::Command::Connect) that fails.
//!
//! Of what an operator orders beside cancelling, the state machines see nothing but how a command ends:
//! waiting before the switchover and switching at once are [`Precopy`](src::Command::Precopy) that ends later
//! or sooner, and a guest that was paused is resumed by a machine that leaves it paused. "The guest runs"
//! here means of such a guest that it is there, to be run by whoever has it.
//!
//! Messages that not every peer knows (a state in parts, digests and hashes of pages, an estimate) are sent
//! where the drivers send them, and a wait goes on after them where the drivers' waits do.
//!
//! `WHIMBREL_MODEL_FAULTS=n` sets how many faults a schedule may have; eight unless told otherwise. The
//! number of states is printed. It grows slowly beyond that, since few faults can be met before somebody
//! gives up.

mod luck;
mod opening;
mod step;
mod world;

use self::luck::Luck;
use self::opening::Opening;
use self::world::{REPLACEMENTS, Side, World};
use crate::{destination as dst, source as src};
use stateright::{Checker, Expectation, Model, Property};
use std::time::Instant;

/// What may happen next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    /// A side's command ends so.
    Step(Side, Luck),
    /// The line is cut; this many messages of each direction still arrive.
    Cut { to_destination: usize, to_source: usize },
    /// `kill -9`.
    Kill(Side),
}

/// The bounds of a check, and the rule that is broken on purpose.
struct Bounds {
    arbiter: bool,
    /// Both sides know all messages, and memory is compared.
    newer: bool,
    faults: u8,
    broken: Option<Broken>,
}

/// A rule that is broken on purpose: the checker must find out.
#[derive(Clone, Copy)]
enum Broken {
    Source(src::Sabotage),
    Destination(dst::Sabotage),
    /// The source takes the disks back without looking whether they were used.
    Blind,
    /// The destination lets in whoever calls.
    Credulous,
}

impl Model for Bounds {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        vec![World::new(self)]
    }

    fn actions(&self, world: &World, actions: &mut Vec<Action>) {
        for side in [Side::Source, Side::Destination] {
            actions.extend(world.lucks(side, self.newer).into_iter().map(|luck| Action::Step(side, luck)));
        }
        if world.faults_left == 0 {
            return;
        }
        if !world.to_destination.cut || !world.to_source.cut {
            for to_destination in 0..=world.to_destination.len() {
                for to_source in 0..=world.to_source.len() {
                    actions.push(Action::Cut { to_destination, to_source });
                }
            }
        }
        if world.source_command.is_some() || world.source_opening.goes_on() {
            actions.push(Action::Kill(Side::Source));
        }
        if world.destination_command.is_some() || world.destination_opening.goes_on() {
            actions.push(Action::Kill(Side::Destination));
        }
    }

    fn next_state(&self, last: &World, action: Action) -> Option<World> {
        let mut world = last.clone();
        match action {
            Action::Cut { to_destination, to_source } => {
                world.faults_left -= 1;
                (world.to_destination.cut, world.to_source.cut) = (true, true);
                world.to_destination.lose(to_destination);
                world.to_source.lose(to_source);
            }
            Action::Kill(side) => {
                world.faults_left -= 1;
                world.kill(side);
            }
            Action::Step(side, luck) => {
                if last.costs(side, luck) {
                    world.faults_left -= 1;
                }
                match side {
                    _ if last.opening(side).goes_on() => {
                        world.open(side, luck, matches!(self.broken, Some(Broken::Credulous)));
                    }
                    Side::Source => {
                        let command = world.source_command.clone()?;
                        if let Some(event) = world.step_source(&command, luck, self) {
                            let next = world.source.handle(event);
                            // The process closes its end; what it sent still arrives.
                            world.to_destination.cut |= matches!(next, src::Command::Finish(_));
                            world.source_command = Some(next);
                        }
                    }
                    Side::Destination => {
                        let command = world.destination_command.clone()?;
                        if let Some(event) = world.step_destination(&command, luck, self.newer) {
                            let next = world.destination.handle(event);
                            world.to_source.cut |= matches!(next, dst::Command::Finish(_));
                            world.destination_command = Some(next);
                        }
                    }
                }
            }
        }
        Some(world)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("the guest never runs at both sides", |_, world: &World| {
                !(world.source_runs && world.destination_runs)
            }),
            Property::always("the source never goes on from older memory", |_, world: &World| {
                !(world.source_runs && world.destination_ran)
            }),
            Property::always("whoever runs the guest has its disks", |_, world: &World| {
                (!world.source_runs || world.holds_all(Side::Source))
                    && (!world.destination_runs || world.holds_all(Side::Destination))
            }),
            Property::always("what runs at the destination has all memory", |_, world: &World| {
                !(world.destination_runs && world.sent_too_early)
            }),
            Property::always("what runs at the destination was loaded", |_, world: &World| {
                !world.destination_runs || world.loaded
            }),
            Property::always("a guest is given back only when it is gone", |_, world: &World| {
                !world.gave_up_too_early
            }),
            Property::always("a session begins with a proof of its secret", |_, world: &World| {
                !world.unproved
            }),
            Property::always("every end has a rightful owner", |model: &Bounds, world: &World| {
                let mut actions = Vec::new();
                model.actions(world, &mut actions);
                !actions.iter().all(|action| matches!(action, Action::Kill(_) | Action::Cut { .. }))
                    || world.ends_well()
            }),
            Property::sometimes("the guest moves", |_, world: &World| {
                matches!(world.source_command, Some(src::Command::Finish(src::Outcome::Moved)))
                    && world.destination_runs
            }),
            Property::sometimes("the guest stays", |_, world: &World| {
                matches!(world.source_command, Some(src::Command::Finish(src::Outcome::Stayed(_))))
                    && world.source_runs
            }),
            Property::sometimes(
                "a session that only the destination knows comes to nothing",
                |_, world: &World| {
                    (world.source_opening, world.destination_opening) == (Opening::Closed, Opening::Open)
                        && matches!(world.destination_command, Some(dst::Command::Finish(_)))
                        && world.source_runs
                },
            ),
            Property::sometimes(
                "a session that only the source knows comes to nothing",
                |_, world: &World| {
                    (world.source_opening, world.destination_opening) == (Opening::Open, Opening::Closed)
                        && world.destination_command.is_none()
                        && matches!(world.source_command, Some(src::Command::Finish(src::Outcome::Stayed(_))))
                        && world.source_runs
                },
            ),
            Property::sometimes("the guest is held", |_, world: &World| {
                matches!(world.source_command, Some(src::Command::Finish(src::Outcome::Held(_))))
            }),
            Property::sometimes("the guest moves over the second transport", |_, world: &World| {
                matches!(world.source_command, Some(src::Command::Finish(src::Outcome::Moved)))
                    && world.replacements_left < REPLACEMENTS
            }),
        ]
    }
}

fn faults() -> u8 {
    std::env::var("WHIMBREL_MODEL_FAULTS").ok().and_then(|text| text.parse().ok()).unwrap_or(8)
}

fn check(arbiter: bool, newer: bool) {
    let began = Instant::now();
    let bounds = Bounds { arbiter, newer, faults: faults(), broken: None };
    let checker = bounds.checker().threads(2).spawn_bfs().join();
    println!(
        "with {} faults, {}, {}: {} states, {} of them different, schedules of up to {} steps, in {:.1} s",
        faults(),
        if arbiter { "disks that decide" } else { "no disks" },
        if newer { "all messages and memory compared" } else { "a peer that knows only the first messages" },
        checker.state_count(),
        checker.unique_state_count(),
        checker.max_depth(),
        began.elapsed().as_secs_f64(),
    );
    checker.assert_properties();
}

#[test]
fn every_schedule_with_disks_that_decide_has_one_owner() {
    check(true, false);
    check(true, true);
}

#[test]
fn every_schedule_without_disks_has_one_owner() {
    check(false, false);
    check(false, true);
}

/// The properties that the checker finds violated when this rule is broken.
fn violated(arbiter: bool, broken: Broken) -> Vec<&'static str> {
    let bounds = Bounds { arbiter, newer: true, faults: 2, broken: Some(broken) };
    let always: Vec<_> =
        bounds.properties().iter().filter(|p| p.expectation == Expectation::Always).map(|p| p.name).collect();
    let checker = bounds.checker().threads(2).spawn_bfs().join();
    let found = checker.discoveries();
    always.into_iter().filter(|name| found.contains_key(name)).collect()
}

#[test]
fn every_broken_rule_is_found() {
    use Broken::{Blind, Credulous, Destination, Source};
    for (arbiter, broken, expected) in [
        (true, Source(src::Sabotage::ResumeAfterCommit), "whoever runs the guest has its disks"),
        (false, Source(src::Sabotage::ResumeAfterCommit), "the guest never runs at both sides"),
        (false, Source(src::Sabotage::SaveLast), "what runs at the destination has all memory"),
        (false, Source(src::Sabotage::PauseLast), "what runs at the destination has all memory"),
        (true, Source(src::Sabotage::ResumeWithoutDisks), "whoever runs the guest has its disks"),
        (false, Destination(dst::Sabotage::RunWithoutCommit), "the guest never runs at both sides"),
        (true, Destination(dst::Sabotage::RunWithoutDisks), "whoever runs the guest has its disks"),
        (false, Destination(dst::Sabotage::ReadyWithoutState), "what runs at the destination was loaded"),
        (false, Destination(dst::Sabotage::GiveUpFirst), "a guest is given back only when it is gone"),
        (false, Credulous, "a session begins with a proof of its secret"),
        (true, Blind, "the source never goes on from older memory"),
    ] {
        let found = violated(arbiter, broken);
        assert!(found.contains(&expected), "{expected:?} is not among what was found: {found:?}");
    }
}
