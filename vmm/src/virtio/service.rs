//! When a queue's thread serves it, and when it rests.
//!
//! A queue's thread sleeps until its doorbell rings (KVM rings it on the guest's notification, see
//! [`crate::pci::Platform`]) or, for a queue that waits for something else, until the device's
//! input is readable. Everything it does with the queue happens under the queue's lock, and before
//! each chain it looks whether the machine wants to pause. So bringing a device to rest is setting
//! that flag and taking each lock once: after that no thread touches guest RAM, and what the guest
//! had made available and nobody took is still in the ring, for whoever resumes it.
//!
//! After a pause every active queue's doorbell is rung, since a notification may have been used up
//! by a thread that was not to serve it, or have stayed behind on another host.

use crate::lock::lock;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard};

/// Why a device stopped serving a queue: what it waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WaitFor {
    /// Buffers, beside those that it put back: go on when the guest has made some available.
    Buffers,
    /// Input: it has buffers. Go on when the device's input is readable.
    Input,
}

/// What wakes a queue's thread. Ringing it wakes the next wait, if none is under way.
pub(super) trait Doorbell {
    fn ring(&self);

    /// As if it had not rung.
    fn silence(&self);
}

/// A queue under its lock.
pub(super) struct Inner<Q> {
    pub queue: Q,
    /// The device may serve it: the driver has said so and the rings lie in RAM.
    pub active: bool,
    /// The guest has made it unusable.
    pub broken: bool,
    /// The machine is paused.
    paused: bool,
}

/// What a queue's thread, the transport and the machine share.
pub(super) struct Service<Q, D> {
    inner: Mutex<Inner<Q>>,
    /// How many wait for the lock: whoever serves lets go of it before the next chain.
    waiting: AtomicUsize,
    ending: AtomicBool,
    doorbell: D,
}

impl<Q, D: Doorbell> Service<Q, D> {
    /// Of a queue that is not active, in a paused machine.
    pub fn new(queue: Q, doorbell: D) -> Self {
        Service {
            inner: Mutex::new(Inner { queue, active: false, broken: false, paused: true }),
            waiting: AtomicUsize::new(0),
            ending: AtomicBool::new(false),
            doorbell,
        }
    }

    pub fn doorbell(&self) -> &D {
        &self.doorbell
    }

    fn lock(&self) -> MutexGuard<'_, Inner<Q>> {
        lock(&self.inner)
    }

    /// Takes the lock from whoever serves the queue.
    pub fn interrupt_and_lock(&self) -> MutexGuard<'_, Inner<Q>> {
        self.waiting.fetch_add(1, Ordering::AcqRel);
        let inner = self.lock();
        self.waiting.fetch_sub(1, Ordering::AcqRel);
        inner
    }

    /// Whether somebody waits for the lock.
    pub fn is_wanted(&self) -> bool {
        self.waiting.load(Ordering::Acquire) != 0
    }

    /// The queue's thread, which ends once it is [told](Self::end). `wait` waits for the doorbell and, if it
    /// is told so, for input; `serve` serves and says whether to wait for input next.
    pub fn work(&self, wait: impl Fn(&D, bool), serve: impl Fn() -> bool) {
        let mut for_input = false;
        loop {
            wait(&self.doorbell, for_input);
            self.doorbell.silence();
            if self.ending.load(Ordering::Acquire) {
                return;
            }
            for_input = serve();
        }
    }

    /// Serves the queue by passes of `once` until that says what to wait for (`None`: there is more), or
    /// somebody else wants the lock. Whether to wait for input next. After an error, of which `failed` tells
    /// the guest, the queue is broken.
    pub fn serve<E>(
        &self,
        mut once: impl FnMut(&mut Q) -> Result<Option<WaitFor>, E>,
        failed: impl Fn(),
    ) -> bool {
        let mut inner = self.lock();
        while inner.active && !inner.paused {
            if self.is_wanted() {
                // There may be more to do, once whoever waits has had the lock.
                self.doorbell.ring();
                break;
            }
            match once(&mut inner.queue) {
                Ok(Some(next)) => return next == WaitFor::Input,
                Ok(None) => {}
                Err(_) => {
                    (inner.active, inner.broken) = (false, true);
                    failed();
                }
            }
        }
        false
    }

    /// Stops serving. When it returns, nothing of the device's touches guest RAM for this queue.
    pub fn pause(&self) {
        self.interrupt_and_lock().paused = true;
    }

    /// Serves again.
    pub fn resume(&self) {
        self.lock().paused = false;
        self.doorbell.ring();
    }

    /// Has the queue's thread end.
    pub fn end(&self) {
        self.ending.store(true, Ordering::Release);
        self.waiting.fetch_add(1, Ordering::AcqRel);
        self.doorbell.ring();
    }
}
