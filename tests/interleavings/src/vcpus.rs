//! Pausing and ending vCPUs.

use crate::explore;
use crate::finds;
use kick::Vcpu;
use outcome::Outcome;
use std::sync::Arc;
use std::time::Duration;

taken!(control);
taken!(control_looks_before_it_clears);
taken!(control_pauses_without_a_kick);
taken!(control_parks_in_silence);
taken!(control_pauses_only_until_the_first);
taken!(control_resets_without_a_kick);
taken!(control_lets_go_in_silence);
taken!(control_pauses_who_is_held_in_silence);

/// A vCPU that KVM runs, and the signal that kicks it.
pub mod kick {
    use crate::sync::{Condvar, Mutex};
    use std::sync::Arc;

    #[derive(Default)]
    pub struct Vcpu {
        /// The flag, and whether the vCPU runs its guest.
        state: Mutex<(bool, bool)>,
        kicked: Condvar,
    }

    impl Vcpu {
        /// KVM_RUN, of a guest that only a kick stops.
        pub fn run(&self) {
            let mut state = self.state.lock().unwrap();
            state.1 = true;
            self.kicked.notify_all();
            while !state.0 {
                state = self.kicked.wait(state).unwrap();
            }
            state.1 = false;
        }

        /// KVM_RUN, of a guest that ends.
        pub fn end(&self) {
            self.state.lock().unwrap().1 = false;
        }

        pub fn clear_immediate_exit(&self) {
            self.state.lock().unwrap().0 = false;
        }

        /// Waits until it runs its guest.
        pub fn wait(&self) {
            let mut state = self.state.lock().unwrap();
            while !state.1 {
                state = self.kicked.wait(state).unwrap();
            }
        }

        pub fn runs(&self) -> bool {
            self.state.lock().unwrap().1
        }
    }

    pub type Thread = Arc<Vcpu>;

    /// The signal's handler sets the flag whether or not KVM_RUN is under way, and KVM_RUN then comes back.
    ///
    /// # Safety
    /// None is needed here.
    pub unsafe fn kick(vcpu: &Thread) {
        vcpu.state.lock().unwrap().0 = true;
        vcpu.kicked.notify_all();
    }
}

/// How a guest ends.
pub mod outcome {
    #[derive(Clone, Debug, PartialEq)]
    pub enum Outcome {
        Stopped,
        PoweredOff,
        Reset,
    }

    impl Outcome {
        pub fn is_reset(&self) -> bool {
            *self == Outcome::Reset
        }
    }
}

/// The scenarios, over one of the modules.
macro_rules! scenarios {
    ($control:ident) => {
        pub mod $control {
            use super::super::$control::{Control, Duty, Phase};
            use super::*;
            use loom::thread::{self, JoinHandle};

            /// A machine's vCPU threads, parked, as `Machine` starts them. The first vCPU's guest ends like
            /// this once, if it is to.
            fn machine(
                vcpus: usize,
                end: Option<Outcome>,
            ) -> (Arc<Control>, Vec<Arc<Vcpu>>, Vec<JoinHandle<()>>) {
                let control = Arc::new(Control::new(true));
                let all: Vec<Arc<Vcpu>> = (0..vcpus).map(|_| Arc::default()).collect();
                control.set_threads(all.clone());
                let work = |index: usize| {
                    let (control, vcpu) = (control.clone(), all[index].clone());
                    let mut end = end.clone().filter(|_| index == 0);
                    move || {
                        while control.park() {
                            loop {
                                if let Some(end) = end.take() {
                                    vcpu.end();
                                    control.end(end);
                                    break;
                                }
                                vcpu.run();
                                if !control.go_on(index as u8, || vcpu.clear_immediate_exit()) {
                                    break;
                                }
                            }
                        }
                    }
                };
                let threads = (0..vcpus).map(|index| thread::spawn(work(index))).collect();
                control.pause(vcpus);
                (control, all, threads)
            }

            /// A pause of a guest that has just begun to run, and another one after that.
            pub fn pauses(vcpus: usize, times: usize) {
                let (control, all, threads) = machine(vcpus, None);
                for _ in 0..times {
                    control.resume().unwrap();
                    control.pause(vcpus);
                    assert!(!all.iter().any(|vcpu| vcpu.runs()), "a vCPU runs in a pause");
                }
                control.stop();
                threads.into_iter().for_each(|thread| thread.join().unwrap());
            }

            /// A vCPU is held and let go meanwhile, or held all the time.
            pub fn pauses_who_is_held(for_good: bool) {
                let (control, all, threads) = machine(1, None);
                control.resume().unwrap();
                let holding = control.clone();
                let holder = thread::spawn(move || {
                    holding.hold(0, true);
                    if !for_good {
                        holding.hold(0, false);
                    }
                });
                control.pause(1);
                assert!(!all[0].runs(), "a vCPU runs in a pause");
                holder.join().unwrap();
                control.stop();
                threads.into_iter().for_each(|thread| thread.join().unwrap());
            }

            /// A vCPU runs on once it is let go.
            pub fn lets_go() {
                let (control, all, threads) = machine(1, None);
                control.resume().unwrap();
                control.hold(0, true);
                control.hold(0, false);
                all[0].wait();
                control.stop();
                threads.into_iter().for_each(|thread| thread.join().unwrap());
            }

            /// Somebody else stops the machine meanwhile.
            pub fn stops_in_a_pause() {
                let (control, _, threads) = machine(1, None);
                control.resume().unwrap();
                let stopping = control.clone();
                let other = thread::spawn(move || stopping.stop());
                control.pause(1);
                other.join().unwrap();
                assert_eq!(control.status(), (Phase::Stopping, Some(Outcome::Stopped)));
                threads.into_iter().for_each(|thread| thread.join().unwrap());
            }

            /// The guest asks for a reset, which somebody makes.
            pub fn resets(vcpus: usize) {
                let (control, all, threads) = machine(vcpus, Some(Outcome::Reset));
                control.resume().unwrap();
                assert_eq!(control.next_duty(Duration::MAX), Duty::Reset);
                assert!(control.park_for_reset(vcpus));
                assert!(!all.iter().any(|vcpu| vcpu.runs()), "a vCPU runs in a reset");
                control.reset_done();
                control.stop();
                threads.into_iter().for_each(|thread| thread.join().unwrap());
            }

            /// The same while it is being paused; both under the lock that keeps them apart. No vCPU runs in
            /// either.
            pub fn resets_in_a_pause(vcpus: usize) {
                let (control, all, threads) = machine(vcpus, Some(Outcome::Reset));
                let standing = Arc::new(crate::sync::Mutex::new(()));
                let resetter = {
                    let (control, all, standing) = (control.clone(), all.clone(), standing.clone());
                    thread::spawn(move || {
                        while control.next_duty(Duration::MAX) == Duty::Reset {
                            let _standing = standing.lock().unwrap();
                            if control.park_for_reset(vcpus) {
                                assert!(!all.iter().any(|vcpu| vcpu.runs()), "a vCPU runs in a reset");
                                control.reset_done();
                            }
                        }
                    })
                };
                control.resume().unwrap();
                {
                    let _standing = standing.lock().unwrap();
                    control.pause(vcpus);
                    assert!(!all.iter().any(|vcpu| vcpu.runs()), "a vCPU runs in a pause");
                }
                control.stop();
                resetter.join().unwrap();
                threads.into_iter().for_each(|thread| thread.join().unwrap());
            }

            /// The guest ends by itself while it is being paused.
            pub fn ends_in_a_pause() {
                let (control, all, threads) = machine(2, Some(Outcome::PoweredOff));
                control.resume().unwrap();
                control.pause(2);
                assert!(!all[1].runs(), "a vCPU runs in a pause");
                // It may not have come so far, and goes on then.
                let ended = control.status().1.is_some();
                assert_eq!(control.resume().is_err(), ended);
                assert_eq!(control.wait(), Outcome::PoweredOff);
                control.stop();
                threads.into_iter().for_each(|thread| thread.join().unwrap());
            }
        }
    };
}

mod over {
    use super::*;
    scenarios!(control);
    scenarios!(control_looks_before_it_clears);
    scenarios!(control_pauses_without_a_kick);
    scenarios!(control_parks_in_silence);
    scenarios!(control_pauses_only_until_the_first);
    scenarios!(control_resets_without_a_kick);
    scenarios!(control_lets_go_in_silence);
    scenarios!(control_pauses_who_is_held_in_silence);
}

#[test]
fn a_pause_returns_and_no_vcpu_runs_then() {
    explore(3, || over::control::pauses(1, 2));
    explore(2, || over::control::pauses(2, 1));
}

#[test]
fn who_is_held_runs_once_it_is_let_go_and_is_paused_meanwhile() {
    explore(3, || over::control::pauses_who_is_held(true));
    explore(3, || over::control::pauses_who_is_held(false));
    explore(3, over::control::lets_go);
}

#[test]
fn a_machine_that_is_stopped_in_a_pause_ends() {
    explore(3, over::control::stops_in_a_pause);
}

#[test]
fn no_vcpu_runs_in_a_reset_or_in_a_pause_beside_it() {
    explore(2, || over::control::resets_in_a_pause(1));
    explore(1, || over::control::resets_in_a_pause(2));
    explore(2, || over::control::resets(2));
}

#[test]
fn a_guest_that_ends_in_a_pause_has_ended() {
    explore(2, over::control::ends_in_a_pause);
}

#[test]
fn every_broken_rule_is_found() {
    finds(3, || over::control_looks_before_it_clears::pauses(1, 2));
    finds(2, || over::control_pauses_without_a_kick::pauses(1, 1));
    finds(2, || over::control_parks_in_silence::pauses(1, 1));
    finds(2, || over::control_pauses_only_until_the_first::pauses(2, 1));
    finds(2, || over::control_resets_without_a_kick::resets(2));
    finds(3, over::control_lets_go_in_silence::lets_go);
    finds(2, || over::control_pauses_who_is_held_in_silence::pauses_who_is_held(true));
}
