//! Slowing the vCPUs that write, so that a guest that writes faster than its memory can be sent converges.
//!
//! What the vCPUs may write in all is a number of pages a second. Each has a *token bucket*. Tokens come in
//! at an equal share of the limit; what a vCPU has no room for, since it writes little, goes to those that
//! want more. Each page that a vCPU is the first to write since it was last sent costs a token, and KVM
//! counts those pages for each vCPU ([`Counter`]). A vCPU in debt is *held*: it is kicked out of KVM_RUN and
//! waits until its debt is paid. So a vCPU that only reads is never held, and one that writes gets just what
//! the limit leaves.
//!
//! ```text
//!     limit ──┬── share ──▶ [vCPU 0: full ]──┐ overflow     reads: never held
//!             └── share ──▶ [vCPU 1: −120 ]◀─┘              writes: held until 0
//! ```
//! Where KVM does not count them (before Linux 5.14, where the processor logs writes by itself, and where KVM
//! is not what it seems), every vCPU that is not held is taken to write its part of what the guest wrote
//! before: a *duty cycle* for all.
//!
//! Pages that a guest touches for the first time ever are not among those that KVM counts. Each is written so
//! once at most, and who reads one cannot be told from who writes it.
//!
//! The guest cannot tell being held from not being scheduled. A vCPU that waits for another one's lock spins.

use super::control::Control;
use super::stats::Counter;
use crate::lock::lock;
use migration::machine::Throttle as Limit;
use migration::memory::PAGE_SIZE;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How often debts are looked at. A vCPU writes a few hundred pages in that time at most, so that it is held
/// for short times only.
const TICK: Duration = Duration::from_millis(1);

/// So much time's share may be saved up, or so many pages: whoever writes now and then is not held at once.
const BURST: Duration = Duration::from_millis(10);
const LEAST_BURST: f64 = 16.0;

/// Holds vCPUs of one machine.
pub(crate) struct Throttle {
    /// Of each vCPU; `None` where KVM does not count.
    counters: Vec<Option<Counter>>,
    orders: Mutex<Orders>,
    changed: Condvar,
}

#[derive(Default)]
struct Orders {
    limit: Option<Limit>,
    /// A thread keeps to it.
    kept: bool,
    /// How long each vCPU was held since the first limit.
    held: Vec<Duration>,
}

impl Throttle {
    /// One for vCPUs with these counters.
    pub fn new(counters: Vec<Option<Counter>>) -> Self {
        Throttle { counters, orders: Mutex::default(), changed: Condvar::new() }
    }

    /// Sets the limit. True if the caller has to start a thread that [keeps](Self::keep) to it.
    pub fn set(&self, limit: Option<Limit>) -> bool {
        let mut orders = lock(&self.orders);
        let begins = orders.limit.is_none() && limit.is_some();
        if begins {
            orders.held = vec![Duration::ZERO; self.counters.len()];
        }
        orders.limit = limit;
        self.changed.notify_all();
        limit.is_some() && !std::mem::replace(&mut orders.kept, true)
    }

    /// No thread could be started.
    pub fn not_kept(&self) {
        let mut orders = lock(&self.orders);
        (orders.limit, orders.kept) = (None, false);
    }

    /// How long each vCPU was held since the limit was first set.
    pub fn held(&self) -> Vec<Duration> {
        lock(&self.orders).held.clone()
    }

    /// Keeps vCPUs to the limit, until there is none; then none is held.
    pub fn keep(&self, control: &Control) {
        let mut buckets = Buckets::new(self.counters.len());
        let mut counted = self.count();
        // Pages were written since they are tracked. Whoever has counted none does not count.
        let counts = counted.iter().flatten().any(|count| *count > 0);
        let mut last = Instant::now();
        while let Some(limit) = self.wait() {
            let passed = last.elapsed();
            last += passed;
            let pages = |bytes_a_second: u64, time: Duration| {
                bytes_a_second as f64 * time.as_secs_f64() / PAGE_SIZE as f64
            };
            let now = self.count();
            let guess = pages(limit.dirty_rate, passed) / self.counters.len().max(1) as f64;
            let written = now.iter().zip(&counted).zip(&buckets.tokens).map(|((now, before), tokens)| {
                match (now, before) {
                    (Some(now), Some(before)) if counts => now.saturating_sub(*before) as f64,
                    // It is held.
                    _ if *tokens < 0.0 => 0.0,
                    _ => guess,
                }
            });
            let written: Vec<_> = written.collect();
            self.note(&buckets, passed);
            buckets.tick(pages(limit.limit, passed), pages(limit.limit, BURST), &written);
            counted = now;
            (0..=u8::MAX).zip(&buckets.tokens).for_each(|(vcpu, tokens)| control.hold(vcpu, *tokens < 0.0));
        }
        (0..=u8::MAX).zip(&self.counters).for_each(|(vcpu, _)| control.hold(vcpu, false));
    }

    /// Waits for a tick. The limit then; `None`, and this thread's part is over, if there is none.
    fn wait(&self) -> Option<Limit> {
        let limited = |orders: &mut Orders| orders.limit.is_some();
        let waited = self.changed.wait_timeout_while(lock(&self.orders), TICK, limited);
        let mut orders = waited.unwrap_or_else(PoisonError::into_inner).0;
        orders.kept = orders.limit.is_some();
        orders.limit
    }

    /// Notes how long who was in debt has been held.
    fn note(&self, buckets: &Buckets, passed: Duration) {
        let mut orders = lock(&self.orders);
        let held = orders.held.iter_mut().zip(&buckets.tokens).filter(|(_, tokens)| **tokens < 0.0);
        held.for_each(|(held, _)| *held += passed);
    }

    fn count(&self) -> Vec<Option<u64>> {
        self.counters.iter().map(|counter| counter.as_ref()?.read().ok()).collect()
    }
}

/// Tokens, in pages, of each vCPU.
struct Buckets {
    tokens: Vec<f64>,
}

impl Buckets {
    fn new(vcpus: usize) -> Self {
        Buckets { tokens: vec![LEAST_BURST; vcpus] }
    }

    /// Some time has passed, for which there are so many `pages` in all. `most` of them may be saved up in
    /// all.
    fn tick(&mut self, pages: f64, most: f64, written: &[f64]) {
        let vcpus = self.tokens.len().max(1) as f64;
        let mut overflow = 0.0;
        for (tokens, written) in self.tokens.iter_mut().zip(written) {
            *tokens += pages / vcpus - written;
            let room = (most / vcpus).max(LEAST_BURST);
            if *tokens > room {
                overflow += *tokens - room;
                *tokens = room;
            }
        }
        let debtors = self.tokens.iter().filter(|tokens| **tokens < 0.0).count();
        let each = overflow / debtors.max(1) as f64;
        self.tokens.iter_mut().filter(|tokens| **tokens < 0.0).for_each(|tokens| *tokens += each);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What vCPUs get to write in a second of ticks with 1000 pages, if they want so many each tick when they
    /// are not held; and in how many ticks they are.
    fn second(wants: &[f64]) -> (Vec<f64>, Vec<u32>) {
        let mut buckets = Buckets::new(wants.len());
        let mut written = vec![0.0; wants.len()];
        let mut held = vec![0; wants.len()];
        for _ in 0..1000 {
            let now: Vec<_> = wants
                .iter()
                .zip(&buckets.tokens)
                .map(|(want, tokens)| if *tokens < 0.0 { 0.0 } else { *want })
                .collect();
            for (vcpu, now) in now.iter().enumerate() {
                written[vcpu] += now;
                held[vcpu] += u32::from(buckets.tokens[vcpu] < 0.0);
            }
            buckets.tick(1.0, 10.0, &now);
        }
        (written, held)
    }

    #[test]
    fn who_only_reads_is_never_held_and_leaves_its_share_to_others() {
        let (written, held) = second(&[50.0, 0.0]);
        assert_eq!(held[1], 0);
        assert!((900.0..1100.0).contains(&written[0]), "{written:?}");
        assert!(held[0] > 900, "{held:?}");
    }

    #[test]
    fn writers_share_what_a_modest_one_leaves() {
        let (written, held) = second(&[50.0, 50.0, 0.1]);
        assert_eq!(held[2], 0);
        assert!((400.0..520.0).contains(&written[0]) && (400.0..520.0).contains(&written[1]), "{written:?}");
    }

    #[test]
    fn nobody_is_held_below_the_limit() {
        let (written, held) = second(&[0.4, 0.5]);
        assert_eq!(held, [0, 0]);
        assert!(written[0] > 390.0 && written[1] > 490.0, "{written:?}");
    }
}
