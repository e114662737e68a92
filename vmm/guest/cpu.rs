//! Instructions and tables of one vCPU.

use crate::abi::MAX_VCPUS;
use core::arch::asm;
use core::cell::UnsafeCell;

/// Vector of the PIT. After a pause KVM delivers all ticks of the PIT that were missed, one upon the
/// other: its priority must be below that of the other timer, which would starve on a crowded host.
pub const PIT_VECTOR: u8 = 0x30;
/// Vector of the local APIC's timer.
pub const TIMER_VECTOR: u8 = 0x40;
/// Vector of spurious interrupts.
pub const SPURIOUS_VECTOR: u8 = 0xff;

unsafe extern "C" {
    fn on_timer();
    fn on_pit();
    fn on_spurious();
    static exceptions: [u64; 32];
}

/// Words of the stack on which interrupts and exceptions are handled; the latter also print.
const INTERRUPT_STACK: usize = 512;

/// Memory that one vCPU writes, or that is written only before the others run.
#[repr(transparent)]
struct Own<T>(UnsafeCell<T>);

// SAFETY: each element of the tables below is written by its own vCPU, before anything reads it.
unsafe impl<T> Sync for Own<T> {}

#[repr(C, align(16))]
#[derive(Clone, Copy)]
struct Tables {
    gdt: [u64; 6],
    /// Task state: only the interrupt stack (IST 1) at byte 36 matters.
    tss: [u32; 26],
    interrupt_stack: [u64; INTERRUPT_STACK],
}

static TABLES: [Own<Tables>; MAX_VCPUS] = [const {
    Own(UnsafeCell::new(Tables { gdt: [0; 6], tss: [0; 26], interrupt_stack: [0; INTERRUPT_STACK] }))
}; MAX_VCPUS];

static IDT: Own<[[u64; 2]; 256]> = Own(UnsafeCell::new([[0; 2]; 256]));

#[repr(C, packed)]
struct Pointer {
    limit: u16,
    base: u64,
}

/// Loads this vCPU's segment, task and interrupt tables. The first vCPU fills the interrupt table for
/// all.
pub fn load_tables(number: usize) {
    // SAFETY: vCPU `number` alone uses this element, and calls this once.
    let tables = unsafe { &mut *TABLES[number].0.get() };
    let stack_end = tables.interrupt_stack.as_ptr_range().end as u64;
    tables.tss[9] = stack_end as u32;
    tables.tss[10] = (stack_end >> 32) as u32;
    let tss = tables.tss.as_ptr() as u64;
    let limit = (size_of::<[u32; 26]>() - 1) as u64;
    tables.gdt = [
        0,
        0x00af_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        0x00cf_9b00_0000_ffff,
        limit | (tss & 0xff_ffff) << 16 | 0x89 << 40 | (tss >> 24 & 0xff) << 56,
        tss >> 32,
    ];
    if number == 0 {
        fill_idt();
    }
    let gdtr = Pointer { limit: 47, base: tables.gdt.as_ptr() as u64 };
    let idtr = Pointer { limit: 4095, base: IDT.0.get() as u64 };
    // SAFETY: both tables are complete and live forever; the code and data descriptors are those that
    // are in use, so that no segment register needs to be loaded again.
    unsafe {
        asm!("lgdt [{}]", in(reg) &gdtr);
        asm!("lidt [{}]", in(reg) &idtr);
        asm!("ltr {:x}", in(reg) 0x20u16);
    }
}

fn fill_idt() {
    // SAFETY: no interrupt is enabled and no other vCPU runs yet.
    let idt = unsafe { &mut *IDT.0.get() };
    let gate = |address: u64| {
        [address & 0xffff | 8 << 16 | 1 << 32 | 0x8e << 40 | (address >> 16 & 0xffff) << 48, address >> 32]
    };
    // SAFETY: boot.s defines the table.
    let handlers = unsafe { &exceptions };
    for (entry, handler) in idt.iter_mut().zip(handlers) {
        *entry = gate(*handler);
    }
    idt[usize::from(TIMER_VECTOR)] = gate(on_timer as *const () as u64);
    idt[usize::from(PIT_VECTOR)] = gate(on_pit as *const () as u64);
    idt[usize::from(SPURIOUS_VECTOR)] = gate(on_spurious as *const () as u64);
}

/// Stops this vCPU for good.
pub fn stop() -> ! {
    loop {
        // SAFETY: halting with interrupts off touches nothing.
        unsafe { asm!("cli", "hlt") }
    }
}

/// Sleeps until the next interrupt, which must be able to come.
pub fn wait() {
    // SAFETY: `sti` takes effect after `hlt` has begun, so that no interrupt is missed between them;
    // handlers save what they use.
    unsafe { asm!("sti", "hlt") }
}

/// Lets interrupts in.
pub fn enable_interrupts() {
    // SAFETY: the tables are loaded; handlers save what they use.
    unsafe { asm!("sti") }
}

/// Lets no later instruction begin before all earlier loads are complete.
pub fn load_fence() {
    // SAFETY: a fence has no effect but order.
    unsafe { asm!("lfence", options(nostack, preserves_flags)) }
}

/// Writes a byte to a port.
pub fn out(port: u16, value: u8) {
    // SAFETY: only device registers of this machine are written.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack)) }
}

/// Writes a word to a port.
pub fn out_word(port: u16, value: u16) {
    // SAFETY: as for `out`.
    unsafe { asm!("out dx, ax", in("dx") port, in("ax") value, options(nomem, nostack)) }
}

/// Writes a double word to a port.
pub fn out_long(port: u16, value: u32) {
    // SAFETY: as for `out`.
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") value, options(nomem, nostack)) }
}

/// Reads a double word from a port.
pub fn input_long(port: u16) -> u32 {
    let value;
    // SAFETY: as for `out`.
    unsafe { asm!("in eax, dx", in("dx") port, out("eax") value, options(nomem, nostack)) }
    value
}

/// Reads a byte from a port.
pub fn input(port: u16) -> u8 {
    let value;
    // SAFETY: as for `out`.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack)) }
    value
}

/// Writes a model-specific register.
///
/// # Safety
/// The register must exist and the value must not break what the compiler relies on.
pub unsafe fn write_msr(register: u32, value: u64) {
    // SAFETY: the caller vouches for the register.
    unsafe {
        asm!("wrmsr", in("ecx") register, in("eax") value as u32, in("edx") (value >> 32) as u32, options(nostack));
    }
}

/// CPUID: (eax, ebx, ecx, edx).
pub fn cpuid(leaf: u32) -> (u32, u32, u32, u32) {
    let r = core::arch::x86_64::__cpuid_count(leaf, 0);
    (r.eax, r.ebx, r.ecx, r.edx)
}

// What the compiler calls by name for copies and comparisons.

/// # Safety
/// As C's memcpy.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, count: usize) -> *mut u8 {
    // SAFETY: the caller vouches for both ranges; the direction flag is clear.
    unsafe { asm!("rep movsb", inout("rcx") count => _, inout("rdi") to => _, inout("rsi") from => _) }
    to
}

/// # Safety
/// As C's memset.
#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, value: i32, count: usize) -> *mut u8 {
    // SAFETY: as for `memcpy`.
    unsafe { asm!("rep stosb", inout("rcx") count => _, inout("rdi") to => _, in("al") value as u8) }
    to
}

/// # Safety
/// As C's memcmp.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(a: *const u8, b: *const u8, count: usize) -> i32 {
    for at in 0..count {
        // SAFETY: as for `memcpy`.
        let (x, y) = unsafe { (a.add(at).read_volatile(), b.add(at).read_volatile()) };
        if x != y {
            return i32::from(x) - i32::from(y);
        }
    }
    0
}
