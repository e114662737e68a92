//! KVM's calls while signals come: a busy host, a debugger, a profiler.

mod common;

use common::machine;
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

static SIGNALS: AtomicU64 = AtomicU64::new(0);

extern "C" fn count(_: libc::c_int) {
    SIGNALS.fetch_add(1, Ordering::Relaxed);
}

/// A timer that signals the calling thread again and again. What the signal interrupts is not restarted.
struct Storm(libc::timer_t);

impl Storm {
    fn begin(every: Duration) -> Storm {
        // SAFETY: a zeroed sigaction has no flags, an empty mask, and gets its handler below; the handler
        // does nothing but add to an atomic.
        unsafe {
            let mut action: libc::sigaction = MaybeUninit::zeroed().assume_init();
            action.sa_sigaction = count as extern "C" fn(libc::c_int) as libc::sighandler_t;
            assert_eq!(libc::sigaction(libc::SIGUSR1, &action, ptr::null_mut()), 0);
        }
        // SAFETY: zeroed, the struct is valid; all pointers are to live variables.
        let timer = unsafe {
            let mut event: libc::sigevent = MaybeUninit::zeroed().assume_init();
            event.sigev_notify = libc::SIGEV_THREAD_ID;
            event.sigev_signo = libc::SIGUSR1;
            event.sigev_notify_thread_id = libc::gettid();
            let mut timer = ptr::null_mut();
            assert_eq!(libc::timer_create(libc::CLOCK_MONOTONIC, &mut event, &mut timer), 0);
            timer
        };
        let time = libc::timespec { tv_sec: 0, tv_nsec: i64::from(every.subsec_nanos()) };
        let interval = libc::itimerspec { it_interval: time, it_value: time };
        // SAFETY: the timer exists, and the kernel only reads the interval.
        assert_eq!(unsafe { libc::timer_settime(timer, 0, &interval, ptr::null_mut()) }, 0);
        Storm(timer)
    }
}

impl Drop for Storm {
    fn drop(&mut self) {
        // SAFETY: the timer was made above and is deleted once.
        unsafe { libc::timer_delete(self.0) };
    }
}

#[test]
fn machines_are_built_while_signals_come() {
    let storm = Storm::begin(Duration::from_micros(1700));
    let began = Instant::now();
    let mut built = 0;
    while built < 40 || SIGNALS.load(Ordering::Relaxed) < 100 {
        drop(machine(32, 2));
        built += 1;
    }
    drop(storm);
    println!("{built} machines, {} signals, {:?}", SIGNALS.load(Ordering::Relaxed), began.elapsed());
}
