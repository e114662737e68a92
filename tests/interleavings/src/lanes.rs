//! The streams of a session at its destination, and the fence.

use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::{Condvar, Mutex};
use crate::{explore, finds};
use std::sync::Arc;

taken!(streams);
taken!(streams_let_in_after_the_fence);
taken!(streams_are_not_waited_for);
taken!(streams_are_not_shut);

/// A connection, on which so many frames have arrived, and more may come until it is shut.
#[derive(Default)]
struct Line {
    state: Mutex<(usize, bool)>,
    changed: Condvar,
}

impl Line {
    /// The next frame; `None` once it is shut. What has arrived before can still be read.
    fn read(&self) -> Option<()> {
        let mut state = self.state.lock().unwrap();
        loop {
            match *state {
                (0, true) => return None,
                (0, false) => state = self.changed.wait(state).unwrap(),
                (frames, _) => {
                    state.0 = frames - 1;
                    return Some(());
                }
            }
        }
    }
}

macro_rules! scenarios {
    ($streams:ident) => {
        pub mod $streams {
            use super::super::$streams::{Shut, Streams};
            use super::*;
            use loom::thread;

            impl Shut for Arc<Line> {
                fn shut(&self) {
                    self.state.lock().unwrap().1 = true;
                    self.changed.notify_all();
                }
            }

            type Lines = Arc<Streams<Arc<Line>>>;

            /// What a lane's thread does with each frame.
            fn serve(streams: &Lines, line: &Line, fenced: &AtomicBool) {
                while !streams.over() && line.read().is_some() {
                    assert!(!fenced.load(Ordering::Acquire), "memory is written behind the fence");
                }
            }

            /// A lane with one frame is let in while the session is fenced.
            pub fn joins() {
                let streams: Lines = Arc::new(Streams::new());
                let fenced = Arc::new(AtomicBool::new(false));
                let joining = thread::spawn({
                    let (streams, fenced) = (streams.clone(), fenced.clone());
                    move || {
                        let line = Arc::new(Line::default());
                        line.state.lock().unwrap().0 = 1;
                        let mut all = streams.lock();
                        if all.admit(0, 2) {
                            assert!(!all.admit(0, 2), "a lane is let in twice");
                            assert!(!all.admit(2, 3), "a lane is let in that was not announced");
                            let (plane, handle) = (streams.clone(), line.clone());
                            let work = move || serve(&plane, &line, &fenced);
                            all.start("lane".into(), Some(0), handle, work).unwrap();
                        }
                    }
                });
                streams.fence().unwrap();
                fenced.store(true, Ordering::Release);
                assert!(!streams.lock().admit(1, 2), "a lane is let in behind the fence");
                joining.join().unwrap();
            }

            /// A stream that has not said yet which lane it is; it may say so, with one frame behind it.
            pub fn expects() {
                let streams: Lines = Arc::new(Streams::new());
                let fenced = Arc::new(AtomicBool::new(false));
                let line = Arc::new(Line::default());
                let (plane, seen, own) = (streams.clone(), fenced.clone(), line.clone());
                let work = move || {
                    if own.read().is_some() && plane.lock().admit(0, 1) {
                        serve(&plane, &own, &seen);
                    }
                };
                streams.lock().start("lane".into(), None, line.clone(), work).unwrap();
                let peer = thread::spawn(move || {
                    line.state.lock().unwrap().0 = 2;
                    line.changed.notify_all();
                });
                streams.fence().unwrap();
                fenced.store(true, Ordering::Release);
                peer.join().unwrap();
            }
        }
    };
}

mod over {
    use super::*;
    scenarios!(streams);
    scenarios!(streams_let_in_after_the_fence);
    scenarios!(streams_are_not_waited_for);
    scenarios!(streams_are_not_shut);
}

#[test]
fn no_lane_writes_behind_the_fence() {
    explore(3, over::streams::joins);
    explore(3, over::streams::expects);
}

#[test]
fn every_broken_rule_is_found() {
    finds(3, over::streams_let_in_after_the_fence::joins);
    finds(3, over::streams_are_not_waited_for::joins);
    finds(3, over::streams_are_not_shut::expects);
}
