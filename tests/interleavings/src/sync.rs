//! What the code under test has in the place of `std::sync`: loom's types, and what loom lacks.

pub use loom::sync::{Mutex, MutexGuard};
pub use std::sync::{Arc, LockResult, PoisonError};

pub mod atomic {
    pub use loom::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
}

pub mod thread {
    // `use …::thread::{self, …}` names the module itself as well.
    pub use loom::thread::{Builder, JoinHandle};
}

use atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// A condition variable on which no wait ends by time: a wake-up that is lost is a deadlock, which loom
/// finds.
#[derive(Debug, Default)]
pub struct Condvar(loom::sync::Condvar);

impl Condvar {
    pub fn new() -> Self {
        Condvar::default()
    }

    pub fn wait<'a, T>(&self, guard: MutexGuard<'a, T>) -> LockResult<MutexGuard<'a, T>> {
        self.0.wait(guard)
    }

    pub fn wait_timeout<'a, T>(&self, guard: MutexGuard<'a, T>, _: Duration) -> Waited<'a, T> {
        Ok((self.0.wait(guard).unwrap_or_else(PoisonError::into_inner), ()))
    }

    pub fn wait_timeout_while<'a, T>(
        &self,
        mut guard: MutexGuard<'a, T>,
        _: Duration,
        mut condition: impl FnMut(&mut T) -> bool,
    ) -> Waited<'a, T> {
        while condition(&mut guard) {
            guard = self.0.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
        Ok((guard, ()))
    }

    pub fn notify_all(&self) {
        self.0.notify_all();
    }
}

/// What a wait that could have ended by time returns.
type Waited<'a, T> = LockResult<(MutexGuard<'a, T>, ())>;

/// A value that is set once. Whether it is set is loom's to say.
#[derive(Debug)]
pub struct OnceLock<T> {
    value: std::sync::OnceLock<T>,
    set: AtomicBool,
}

impl<T> OnceLock<T> {
    pub fn new() -> Self {
        OnceLock { value: std::sync::OnceLock::new(), set: AtomicBool::new(false) }
    }

    pub fn set(&self, value: T) -> Result<(), T> {
        self.value.set(value)?;
        self.set.store(true, Ordering::Release);
        Ok(())
    }

    pub fn get(&self) -> Option<&T> {
        if self.set.load(Ordering::Acquire) { self.value.get() } else { None }
    }
}

impl<T> Default for OnceLock<T> {
    fn default() -> Self {
        OnceLock::new()
    }
}
