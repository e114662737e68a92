//! Whether devices may do anything of their own accord.

use crate::lock::lock;
use std::sync::{Mutex, MutexGuard};

/// Set by whoever pauses and resumes the machine.
#[derive(Default)]
pub(crate) struct Awake(Mutex<bool>);

impl Awake {
    fn lock(&self) -> MutexGuard<'_, bool> {
        lock(&self.0)
    }

    /// Puts them to rest, once what they are doing is done, or wakes them.
    pub fn set(&self, awake: bool) {
        *self.lock() = awake;
    }

    /// Does `work` if they may, and says whether. Whoever puts them to rest waits for it.
    pub fn work(&self, work: impl FnOnce()) -> bool {
        let awake = self.lock();
        if *awake {
            work();
        }
        *awake
    }
}
