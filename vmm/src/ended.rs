//! The end of a thread that rests most of the time.

use crate::lock::lock;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

/// Whether such a thread is to end.
#[derive(Default)]
pub(crate) struct Ended {
    ended: Mutex<bool>,
    changed: Condvar,
}

impl Ended {
    /// In the thread: waits for `time`. False if it is to end.
    pub fn rest(&self, time: Duration) -> bool {
        let waited = self.changed.wait_timeout_while(lock(&self.ended), time, |ended| !*ended);
        !*waited.unwrap_or_else(PoisonError::into_inner).0
    }

    /// Has the thread end, at once if it rests.
    pub fn end(&self) {
        *lock(&self.ended) = true;
        self.changed.notify_all();
    }
}
