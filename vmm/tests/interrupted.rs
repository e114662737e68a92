//! KVM's calls while signals come: a busy host, a debugger, a profiler.

mod common;

use common::guests::{self, BACKWARDS, BAD_READS, LOOPS, TICKS};
use common::{boot, copy_ram, machine, peek, wait_above};
use migration::machine::{DestinationHost, DestinationMachine, SourceMachine};
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use whimbrel_vmm::Machine;
use whimbrel_vmm::incoming::{IncomingHost, IncomingOptions};

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

/// Saving, building, loading and resuming, with all that they ask of KVM.
#[test]
fn guests_move_while_signals_come() {
    let first = machine(16, 2);
    first.boot(&boot(guests::ticker())).unwrap();
    Machine::resume(&first).unwrap();
    let mut current = Arc::new(first);
    let _storm = Storm::begin(Duration::from_micros(900));
    for _ in 0..20 {
        wait_above(&current, TICKS, peek(&current, TICKS) + 1);
        current.start_tracking().unwrap();
        SourceMachine::pause(&*current).unwrap();
        let mut host = IncomingHost::open(IncomingOptions::default()).unwrap();
        let layout = current.memory().ram().layout();
        let mut shadow = host.build(&current.describe().unwrap(), &layout).unwrap();
        let next = shadow.machine();
        let state = Machine::save(&current).unwrap();
        copy_ram(&current, &next);
        shadow.load(&state).unwrap();
        current.stop();
        shadow.run().unwrap();
        wait_above(&next, LOOPS, peek(&current, LOOPS) + 10);
        current = next;
    }
    Machine::pause(&current).unwrap();
    assert_eq!((peek(&current, BACKWARDS), peek(&current, BAD_READS)), (0, 0));
}
