//! Announcing a guest, and ending a thread that rests.

use crate::sync::atomic::{AtomicBool, Ordering};
use crate::{explore, finds};
use loom::thread;
use std::sync::Arc;
use std::time::Duration;

taken!(awake);
taken!(awake_works_without_the_lock);
taken!(ended);
taken!(ended_in_silence);

macro_rules! announcing {
    ($awake:ident) => {
        /// A round of announcements, while the machine pauses and goes on.
        fn $awake() {
            let awake = Arc::new($awake::Awake::default());
            let rests = Arc::new(AtomicBool::new(true));
            awake.set(true);
            rests.store(false, Ordering::Release);
            let announcing = thread::spawn({
                let (awake, rests) = (awake.clone(), rests.clone());
                move || _ = awake.work(|| assert!(!rests.load(Ordering::Acquire), "announced in a pause"))
            });
            awake.set(false);
            rests.store(true, Ordering::Release);
            rests.store(false, Ordering::Release);
            awake.set(true);
            announcing.join().unwrap();
        }
    };
}

macro_rules! resting {
    ($ended:ident) => {
        fn $ended() {
            let ended = Arc::new($ended::Ended::default());
            let resting = ended.clone();
            let thread = thread::spawn(move || while resting.rest(Duration::from_secs(60)) {});
            ended.end();
            thread.join().unwrap();
        }
    };
}

announcing!(awake);
announcing!(awake_works_without_the_lock);
resting!(ended);
resting!(ended_in_silence);

#[test]
fn nobody_announces_in_a_pause() {
    explore(3, awake);
}

#[test]
fn a_thread_that_rests_ends() {
    explore(3, ended);
}

#[test]
fn every_broken_rule_is_found() {
    finds(3, awake_works_without_the_lock);
    finds(3, ended_in_silence);
}
