//! The embedded guest: a bare-metal program that notices by itself when a move has damaged it.
//!
//! Each vCPU rewrites its share of a working set over and over. Every page it comes to must hold the stamp
//! that this vCPU left there on its last pass: of its own page number, of that generation, the same in all
//! stamped words. Pages that were lost, pages that are stale, and pages with parts from different times are
//! told apart and counted. Between pages the vCPU looks at the clock. The longest time between two looks is
//! what the guest *felt* of the world outside. Time must not run backwards, neither on one vCPU nor from one
//! to another. Timers of two kinds (local APIC, PIT) have to keep ticking.
//!
//! If the command line asks for it, the first vCPU keeps a journal on a disk and checks it as well.
//!
//! Without a working set the guest is idle: it halts between timer ticks, and looks at the clock at each of
//! them.
//!
//! Two things shape the code. It runs where KVM emulates instructions, which offers no vector registers and
//! only a few million instructions a second. And an idle guest must be nearly nothing to move, so it does not
//! touch what it does not use.

#![no_std]
#![no_main]

#[allow(dead_code)] // the VMM uses some items that this side does not
mod abi;
mod apic;
mod clock;
mod cpu;
mod disk;
mod journal;
mod memory;
mod options;
mod report;
mod serial;
mod stamps;
mod watch;
mod work;

use clock::KvmClock;
use core::arch::global_asm;
use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicU32, Ordering};
use memory::WorkingSet;
use options::Options;
use serial::{Piece, line};

/// Where the other vCPUs begin, in real mode.
const TRAMPOLINE: usize = 0x8000;

/// Bytes of each vCPU's stack. `boot.s` has it from here.
const STACK_SIZE: usize = 8192;

global_asm!(
    ".set STACK_SIZE, {stack}",
    ".set TRAMPOLINE, {trampoline}",
    include_str!("boot.s"),
    stack = const STACK_SIZE,
    trampoline = const TRAMPOLINE,
    options(att_syntax)
);

/// What the other vCPUs have to know.
struct Plan(UnsafeCell<Option<(Options, WorkingSet, u32)>>);

// SAFETY: written by the first vCPU before it starts the others, only read afterwards.
unsafe impl Sync for Plan {}

static PLAN: Plan = Plan(UnsafeCell::new(None));

/// Number of the vCPU that is being started; read by its first instructions.
#[unsafe(no_mangle)]
static starting: AtomicU32 = AtomicU32::new(0);

/// How many vCPUs have come up.
static UP: AtomicU32 = AtomicU32::new(0);

/// The first vCPU, in 64-bit mode with the first 4 GiB mapped.
#[unsafe(no_mangle)]
extern "C" fn first_main(start_info: u32) -> ! {
    // SAFETY: the loader passed the address of its PVH start info, below 4 GiB.
    let (options, memory) = unsafe { memory::read(u64::from(start_info)) };
    let working_set = memory.pages() * abi::PAGE;
    report::begin(options.vcpus, working_set);
    line(&[
        Piece::Number(u64::from(options.vcpus)),
        Piece::Text(" vCPUs, working set of "),
        Piece::Number(working_set >> 10),
        Piece::Text(" KiB"),
    ]);
    memory.map();
    cpu::load_tables(0);
    apic::silence_pic();
    apic::enable();
    let tsc_khz = clock::tsc_khz(KvmClock::start(0));
    report::field!(report::header(), tsc_khz).set(tsc_khz);
    // SAFETY: no other vCPU runs yet.
    unsafe { *PLAN.0.get() = Some((options, memory, tsc_khz)) };
    UP.store(1, Ordering::Release);
    report::state(abi::STATE_FILLING);
    for number in 1..options.vcpus {
        starting.store(number, Ordering::Release);
        if !apic::start(number, TRAMPOLINE, || UP.load(Ordering::Acquire) == number + 1) {
            report::fail(abi::FAILED_START, u64::from(number));
            line(&[Piece::Text("no answer from vCPU "), Piece::Number(u64::from(number))]);
            cpu::stop();
        }
    }
    work::run(0, &options, memory, tsc_khz)
}

/// The others.
#[unsafe(no_mangle)]
extern "C" fn other_main(number: u32) -> ! {
    cpu::load_tables(number as usize);
    apic::enable();
    // SAFETY: written before this vCPU was started.
    let plan = unsafe { *PLAN.0.get() };
    UP.store(number + 1, Ordering::Release);
    match plan {
        Some((options, memory, tsc_khz)) => work::run(number as usize, &options, memory, tsc_khz),
        None => cpu::stop(),
    }
}

/// An exception: reports it and stops everything that this vCPU does.
#[unsafe(no_mangle)]
extern "C" fn on_exception(vector: u64, rip: u64) -> ! {
    report::fail(vector, rip);
    line(&[Piece::Text("exception "), Piece::Number(vector), Piece::Text(" at "), Piece::Number(rip)]);
    cpu::stop()
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    report::fail(abi::FAILED_PANIC, 0);
    line(&[Piece::Text("panic")]);
    cpu::stop()
}
