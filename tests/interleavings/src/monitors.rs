//! Who directs a migration, and the engine.

use crate::sync::atomic::{AtomicUsize, Ordering};
use crate::{explore, finds, transport::Interrupt};

taken!(monitor);
taken!(monitor_cancels_without_the_lock);
taken!(monitor_looks_before_it_arms);
taken!(monitor_expires_without_the_lock);
taken!(monitor_is_taken_in_two_steps);

/// A plane that counts how often it is interrupted.
#[derive(Default)]
struct Plane(AtomicUsize);

impl Interrupt for Plane {
    fn interrupt(&self) {
        self.0.fetch_add(1, Ordering::AcqRel);
    }
}

macro_rules! scenarios {
    ($monitor:ident) => {
        pub mod $monitor {
            use super::super::$monitor::Monitor;
            use super::*;
            use loom::thread::{self, JoinHandle};
            use std::sync::Arc;
            use std::time::{Duration, Instant};

            fn does(monitor: &Arc<Monitor>, what: fn(&Monitor)) -> JoinHandle<()> {
                let monitor = monitor.clone();
                thread::spawn(move || what(&monitor))
            }

            /// The engine waits for an operator, who gives this order.
            pub fn waits(order: fn(&Monitor)) {
                let monitor = Arc::new(Monitor::default());
                let operator = does(&monitor, order);
                monitor.await_orders(Duration::from_secs(600));
                operator.join().unwrap();
            }

            /// The migration is cancelled, or its time is up, while it changes its plane.
            pub fn stops_planes(stop: fn(&Monitor)) {
                let monitor = Arc::new(Monitor::default());
                let other = does(&monitor, stop);
                let planes: [Arc<Plane>; 2] = Default::default();
                planes.iter().for_each(|plane| monitor.arm(plane.clone()));
                other.join().unwrap();
                assert!(monitor.stopped().is_some());
                assert_ne!(planes[1].0.load(Ordering::Acquire), 0, "a plane that nobody stops");
            }

            pub fn expires(monitor: &Monitor) {
                monitor.set_deadline(Some(Instant::now()));
                monitor.keep_deadline();
            }

            /// The guest is handed over while its time runs out.
            pub fn hands_over() {
                let monitor = Arc::new(Monitor::default());
                monitor.set_deadline(Some(Instant::now()));
                let watch = does(&monitor, Monitor::keep_deadline);
                monitor.settle();
                let before = monitor.stopped();
                watch.join().unwrap();
                assert_eq!(before, monitor.stopped(), "expired after it was settled");
            }

            /// The deadline moves while it is watched; the watch ends with the migration.
            pub fn extends() {
                let monitor = Arc::new(Monitor::default());
                let watch = does(&monitor, Monitor::keep_deadline);
                monitor.set_deadline(Some(Instant::now() + Duration::from_secs(600)));
                monitor.extend_deadline(Duration::from_secs(900));
                monitor.set_deadline(None);
                monitor.settle();
                watch.join().unwrap();
                assert_eq!(monitor.stopped(), None);
            }

            /// Two migrations are given the same monitor.
            pub fn serves_one() {
                let monitor = Arc::new(Monitor::default());
                let taken = Arc::new(AtomicUsize::new(0));
                let take = |monitor: &Monitor, taken: &AtomicUsize| {
                    if monitor.take().is_ok() {
                        taken.fetch_add(1, Ordering::AcqRel);
                    }
                };
                let (theirs, counted) = (monitor.clone(), taken.clone());
                let other = thread::spawn(move || take(&theirs, &counted));
                take(&monitor, &taken);
                other.join().unwrap();
                assert_eq!(taken.load(Ordering::Acquire), 1);
            }
        }
    };
}

mod over {
    use super::*;
    scenarios!(monitor);
    scenarios!(monitor_cancels_without_the_lock);
    scenarios!(monitor_looks_before_it_arms);
    scenarios!(monitor_expires_without_the_lock);
    scenarios!(monitor_is_taken_in_two_steps);
}

#[test]
fn an_order_wakes_whoever_waits_for_it() {
    use monitor::Monitor;
    for order in [Monitor::cancel, Monitor::proceed, Monitor::switch_now, over::monitor::expires] {
        explore(3, move || over::monitor::waits(order));
    }
}

#[test]
fn what_stops_a_migration_stops_its_plane() {
    for stop in [monitor::Monitor::cancel, over::monitor::expires] {
        explore(3, move || over::monitor::stops_planes(stop));
    }
}

#[test]
fn a_deadline_ends_with_the_migration() {
    explore(3, over::monitor::hands_over);
    explore(3, over::monitor::extends);
}

#[test]
fn a_monitor_serves_one_migration() {
    explore(3, over::monitor::serves_one);
}

#[test]
fn every_broken_rule_is_found() {
    finds(3, || {
        over::monitor_cancels_without_the_lock::waits(monitor_cancels_without_the_lock::Monitor::cancel);
    });
    finds(3, || {
        over::monitor_looks_before_it_arms::stops_planes(monitor_looks_before_it_arms::Monitor::cancel);
    });
    finds(3, over::monitor_expires_without_the_lock::hands_over);
    finds(3, over::monitor_is_taken_in_two_steps::serves_one);
}
