//! A virtqueue's thread: serving, pausing and ending.

use crate::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use crate::sync::{Condvar, Mutex};
use crate::{explore, finds};
use std::sync::Arc;

taken!(service);
taken!(service_yields_in_silence);
taken!(service_resumes_in_silence);
taken!(service_serves_in_a_pause);
taken!(service_rings_before_it_ends);

/// An eventfd.
#[derive(Default)]
struct Bell {
    rung: Mutex<bool>,
    ringing: Condvar,
}

impl Bell {
    fn wait(&self) {
        // Whoever yields the lock to somebody may come by again before that one has taken it.
        loom::thread::yield_now();
        let mut rung = self.rung.lock().unwrap();
        while !*rung {
            rung = self.ringing.wait(rung).unwrap();
        }
    }
}

/// What is outside of the queue: what the guest has made available, and whether the machine rests.
#[derive(Default)]
struct World {
    available: AtomicUsize,
    rests: AtomicBool,
    served: Mutex<usize>,
    changed: Condvar,
}

macro_rules! scenarios {
    ($service:ident) => {
        pub mod $service {
            use super::super::$service::{Doorbell, Service, WaitFor};
            use super::*;
            use loom::thread::{self, JoinHandle};

            impl Doorbell for Bell {
                fn ring(&self) {
                    *self.rung.lock().unwrap() = true;
                    self.ringing.notify_all();
                }

                fn silence(&self) {
                    *self.rung.lock().unwrap() = false;
                }
            }

            /// The queue's content is how many chains were taken.
            type Queue = Arc<Service<usize, Bell>>;

            /// One pass, as devices make it: chain by chain, until there is none or the lock is wanted.
            fn once(queue: &Queue, world: &World, taken: &mut usize) -> Result<Option<WaitFor>, ()> {
                while !queue.is_wanted() && *taken < world.available.load(Ordering::Acquire) {
                    assert!(!world.rests.load(Ordering::Acquire), "served in a pause");
                    *taken += 1;
                    *world.served.lock().unwrap() = *taken;
                    world.changed.notify_all();
                }
                let more = *taken < world.available.load(Ordering::Acquire);
                Ok(if more { None } else { Some(WaitFor::Buffers) })
            }

            fn start() -> (Queue, Arc<World>, JoinHandle<()>) {
                let queue: Queue = Arc::new(Service::new(0, Bell::default()));
                let world = Arc::new(World::default());
                let (served, of) = (queue.clone(), world.clone());
                let thread = thread::spawn(move || {
                    let serve = || served.serve(|taken| once(&served, &of, taken), || ());
                    served.work(|bell, _| bell.wait(), serve);
                });
                queue.interrupt_and_lock().active = true;
                queue.resume();
                (queue, world, thread)
            }

            /// A guest that offers so many chains, one after the other.
            fn guest(queue: &Queue, world: &Arc<World>, chains: usize) -> JoinHandle<()> {
                let (queue, world) = (queue.clone(), world.clone());
                thread::spawn(move || {
                    for _ in 0..chains {
                        world.available.fetch_add(1, Ordering::AcqRel);
                        queue.doorbell().ring();
                    }
                })
            }

            /// Ends the thread once all chains have been served.
            fn finish((queue, world, thread): (Queue, Arc<World>, JoinHandle<()>), chains: usize) {
                let mut served = world.served.lock().unwrap();
                while *served < chains {
                    served = world.changed.wait(served).unwrap();
                }
                drop(served);
                queue.end();
                thread.join().unwrap();
            }

            /// The machine pauses and resumes while the guest offers chains.
            pub fn pauses(chains: usize) {
                let (queue, world, thread) = start();
                let guest = guest(&queue, &world, chains);
                queue.pause();
                world.rests.store(true, Ordering::Release);
                world.rests.store(false, Ordering::Release);
                queue.resume();
                guest.join().unwrap();
                finish((queue, world, thread), chains);
            }

            /// A vCPU looks at the queue's registers while it is served.
            pub fn looks(chains: usize) {
                let (queue, world, thread) = start();
                let guest = guest(&queue, &world, chains);
                drop(queue.interrupt_and_lock());
                guest.join().unwrap();
                finish((queue, world, thread), chains);
            }

            /// The machine ends while the guest offers chains.
            pub fn ends() {
                let (queue, world, thread) = start();
                let guest = guest(&queue, &world, 1);
                queue.end();
                thread.join().unwrap();
                guest.join().unwrap();
            }
        }
    };
}

mod over {
    use super::*;
    scenarios!(service);
    scenarios!(service_yields_in_silence);
    scenarios!(service_resumes_in_silence);
    scenarios!(service_serves_in_a_pause);
    scenarios!(service_rings_before_it_ends);
}

#[test]
fn nothing_is_served_in_a_pause_and_everything_after_it() {
    explore(3, || over::service::pauses(1));
}

#[test]
fn whoever_looks_at_a_queue_does_not_stop_it() {
    explore(3, || over::service::looks(1));
}

#[test]
fn a_queue_s_thread_ends() {
    explore(3, over::service::ends);
}

#[test]
fn every_broken_rule_is_found() {
    finds(3, || over::service_yields_in_silence::looks(1));
    finds(3, || over::service_resumes_in_silence::pauses(1));
    finds(3, || over::service_serves_in_a_pause::pauses(1));
    finds(3, over::service_rings_before_it_ends::ends);
}
