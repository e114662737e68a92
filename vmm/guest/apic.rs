//! Interrupt controllers and timers.

use crate::clock::tsc;
use crate::cpu::{PIT_VECTOR, SPURIOUS_VECTOR, TIMER_VECTOR, cpuid, out, write_msr};
use core::sync::atomic::{AtomicU64, Ordering};

const LOCAL: u64 = 0xfee0_0000;
const IO: u64 = 0xfec0_0000;
const TSC_DEADLINE: u32 = 0x6e0;

/// What the local APIC's timer counts by itself: KVM's counts nanoseconds.
const BUS_HZ: u32 = 1_000_000_000;

/// TSC ticks between timer interrupts; 0 while the timer is periodic by itself. Read by the handler.
#[unsafe(no_mangle)]
static timer_period: AtomicU64 = AtomicU64::new(0);

/// Timer interrupts of each vCPU, counted by the handler.
#[unsafe(no_mangle)]
static timer_ticks: [AtomicU64; 256] = [const { AtomicU64::new(0) }; 256];

/// PIT interrupts, counted by the handler.
#[unsafe(no_mangle)]
static pit_ticks: AtomicU64 = AtomicU64::new(0);

/// Timer interrupts that vCPU `number` has had.
pub fn ticks(number: usize) -> u64 {
    timer_ticks[number].load(Ordering::Relaxed)
}

/// PIT interrupts.
pub fn pit() -> u64 {
    pit_ticks.load(Ordering::Relaxed)
}

fn local_write(register: u64, value: u32) {
    // SAFETY: a register of the local APIC, whose page is mapped one to one.
    unsafe { ((LOCAL + register) as *mut u32).write_volatile(value) }
}

fn local_read(register: u64) -> u32 {
    // SAFETY: as above.
    unsafe { ((LOCAL + register) as *const u32).read_volatile() }
}

fn io_write(register: u32, value: u32) {
    // SAFETY: the index and data registers of the I/O APIC, mapped one to one.
    unsafe {
        (IO as *mut u32).write_volatile(register);
        ((IO + 16) as *mut u32).write_volatile(value);
    }
}

/// Masks all lines of the old interrupt controllers.
pub fn silence_pic() {
    out(0x21, 0xff);
    out(0xa1, 0xff);
}

/// Enables this vCPU's local APIC.
pub fn enable() {
    local_write(0xf0, 0x100 | u32::from(SPURIOUS_VECTOR));
}

/// TSC ticks within which a vCPU should start: some tenths of a second. On a crowded host it may take
/// longer, so STARTUP is sent again, to no effect if the first one was on its way.
const START_PATIENCE: u64 = 1 << 30;
const START_ATTEMPTS: usize = 20;

/// Starts another vCPU at `entry`: INIT, then STARTUP until it `is_up`. False if it never is.
pub fn start(number: u32, entry: usize, is_up: impl Fn() -> bool) -> bool {
    unsafe extern "C" {
        static trampoline: u8;
        static trampoline_end: u8;
    }
    // SAFETY: boot.s defines both labels around the code; the page at `entry` is RAM that nobody else
    // uses, and only one vCPU is being started at a time.
    unsafe {
        let length = (&raw const trampoline_end).offset_from(&raw const trampoline) as usize;
        for at in 0..length {
            (entry as *mut u8).add(at).write_volatile((&raw const trampoline).add(at).read_volatile());
        }
    }
    command(number, 0x4500);
    for _ in 0..START_ATTEMPTS {
        command(number, 0x4600 | (entry >> 12) as u32);
        let sent = tsc();
        while tsc() - sent < START_PATIENCE {
            if is_up() {
                return true;
            }
            core::hint::spin_loop();
        }
    }
    false
}

/// Sends an interprocessor interrupt.
fn command(number: u32, what: u32) {
    local_write(0x310, number << 24);
    local_write(0x300, what);
    while local_read(0x300) & 0x1000 != 0 {
        core::hint::spin_loop();
    }
}

/// Starts this vCPU's timer.
pub fn start_timer(hz: u32, tsc_khz: u32) {
    if cpuid(1).2 & 1 << 24 != 0 && tsc_khz != 0 {
        timer_period.store(u64::from(tsc_khz) * 1000 / u64::from(hz), Ordering::Relaxed);
        local_write(0x320, 2 << 17 | u32::from(TIMER_VECTOR));
        arm();
    } else {
        local_write(0x3e0, 0xb);
        local_write(0x320, 1 << 17 | u32::from(TIMER_VECTOR));
        local_write(0x380, BUS_HZ / hz);
    }
}

/// Sets the next deadline, for the first time or after one was lost.
pub fn arm() {
    let period = timer_period.load(Ordering::Relaxed);
    if period != 0 {
        // SAFETY: the timer is in deadline mode.
        unsafe { write_msr(TSC_DEADLINE, tsc() + period) }
    }
}

/// Starts the PIT, through the I/O APIC to the first vCPU.
pub fn start_pit(hz: u32) {
    // The PIT's line arrives at pin 0 or 2, as the VMM wires it.
    for pin in [0, 2] {
        io_write(0x11 + 2 * pin, 0);
        io_write(0x10 + 2 * pin, u32::from(PIT_VECTOR));
    }
    let divisor = 1_193_182 / hz;
    out(0x43, 0x34);
    out(0x40, divisor as u8);
    out(0x40, (divisor >> 8) as u8);
}
