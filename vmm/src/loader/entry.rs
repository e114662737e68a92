//! The state a boot vCPU is in at a kernel's first instruction.

use super::Error;
use crate::ioctl;
use crate::memory::GuestMemory;
use kvm_bindings::{kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress};

const GDT: GuestAddress = GuestAddress(0x500);
const PML4: GuestAddress = GuestAddress(0x9000);
const PDPT: GuestAddress = GuestAddress(0xa000);
/// Four directories, one for each GiB.
const DIRECTORIES: GuestAddress = GuestAddress(0xb000);
const STACK: u64 = 0x8ff0;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// RFLAGS has one bit that is always set.
const RFLAGS: u64 = 2;
const PRESENT_WRITABLE: u64 = 0b11;
const LARGE_PAGE: u64 = 1 << 7;

/// How a loaded kernel is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// PVH: 32-bit protected mode, flat segments, no paging.
    Pvh {
        /// The first instruction.
        entry: GuestAddress,
        /// The start info.
        start_info: GuestAddress,
    },
    /// Linux's 64-bit entry: long mode, the first 4 GiB mapped one to one.
    Linux64 {
        /// The first instruction.
        entry: GuestAddress,
        /// The zero page.
        zero_page: GuestAddress,
    },
}

/// Which kind of flat code segment.
#[derive(Clone, Copy)]
enum Code {
    Bits32,
    Bits64,
}

impl Entry {
    /// Puts a vCPU into this state.
    pub(crate) fn apply(&self, vcpu: &VcpuFd, memory: &GuestMemory) -> Result<(), Error> {
        let code = match self {
            Entry::Pvh { .. } => Code::Bits32,
            Entry::Linux64 { .. } => Code::Bits64,
        };
        // Selectors 0x10 and 0x18 are what Linux's boot protocol asks for.
        let (cs, ds, tss) = (code_segment(code), data_segment(), task_segment());
        let gdt = [0, 0, descriptor(&cs), descriptor(&ds), descriptor(&tss)];
        for (entry, at) in gdt.into_iter().zip((GDT.0..).step_by(8)) {
            memory.write_obj(entry, GuestAddress(at))?;
        }
        let mut sregs = ioctl::retried!("KVM_GET_SREGS", vcpu.get_sregs())?;
        (sregs.cs, sregs.tr) = (cs, tss);
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (ds, ds, ds, ds, ds);
        (sregs.gdt.base, sregs.gdt.limit) = (GDT.0, (size_of_val(&gdt) - 1) as u16);
        (sregs.idt.base, sregs.idt.limit) = (0, 0);
        sregs.cr0 = CR0_PE | CR0_ET;
        sregs.cr4 = 0;
        sregs.efer = 0;
        let mut regs = kvm_regs { rflags: RFLAGS, ..Default::default() };
        match self {
            Entry::Pvh { entry, start_info } => {
                regs.rip = entry.0;
                regs.rbx = start_info.0;
            }
            Entry::Linux64 { entry, zero_page } => {
                write_page_tables(memory)?;
                sregs.cr3 = PML4.0;
                sregs.cr4 = CR4_PAE;
                sregs.cr0 |= CR0_PG;
                sregs.efer = EFER_LME | EFER_LMA;
                regs.rip = entry.0;
                regs.rsi = zero_page.0;
                (regs.rsp, regs.rbp) = (STACK, STACK);
            }
        }
        ioctl::retried!("KVM_SET_SREGS", vcpu.set_sregs(&sregs))?;
        Ok(ioctl::retried!("KVM_SET_REGS", vcpu.set_regs(&regs))?)
    }
}

/// Maps the first 4 GiB one to one, in pages of 2 MiB.
fn write_page_tables(memory: &GuestMemory) -> Result<(), Error> {
    memory.write_obj(PDPT.0 | PRESENT_WRITABLE, PML4)?;
    for gib in 0..4u64 {
        let directory = DIRECTORIES.0 + gib * 0x1000;
        memory.write_obj(directory | PRESENT_WRITABLE, GuestAddress(PDPT.0 + gib * 8))?;
        for page in 0..512u64 {
            let address = gib << 30 | page << 21;
            let entry = address | PRESENT_WRITABLE | LARGE_PAGE;
            memory.write_obj(entry, GuestAddress(directory + page * 8))?;
        }
    }
    Ok(())
}

fn code_segment(code: Code) -> kvm_segment {
    let (l, db) = match code {
        Code::Bits32 => (0, 1),
        Code::Bits64 => (1, 0),
    };
    // Type 0xb: execute and read, accessed.
    kvm_segment { selector: 0x10, type_: 0xb, l, db, ..data_segment() }
}

fn data_segment() -> kvm_segment {
    // Type 3: read and write, accessed; all of 4 GiB.
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: 0x18,
        type_: 3,
        present: 1,
        s: 1,
        db: 1,
        g: 1,
        ..Default::default()
    }
}

fn task_segment() -> kvm_segment {
    // Type 0xb: a busy TSS, without which VM entry is refused.
    kvm_segment { base: 0, limit: 0x67, selector: 0x20, type_: 0xb, present: 1, ..Default::default() }
}

/// A segment as the GDT has it.
fn descriptor(s: &kvm_segment) -> u64 {
    let limit = u64::from(if s.g == 1 { s.limit >> 12 } else { s.limit });
    let access = u64::from(s.type_ | s.s << 4 | s.dpl << 5 | s.present << 7);
    let flags = u64::from(s.avl | s.l << 1 | s.db << 2 | s.g << 3);
    limit & 0xffff
        | (s.base & 0xff_ffff) << 16
        | access << 40
        | (limit >> 16 & 0xf) << 48
        | flags << 52
        | (s.base >> 24 & 0xff) << 56
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_the_well_known_ones() {
        assert_eq!(descriptor(&code_segment(Code::Bits64)), 0x00af_9b00_0000_ffff);
        assert_eq!(descriptor(&code_segment(Code::Bits32)), 0x00cf_9b00_0000_ffff);
        assert_eq!(descriptor(&data_segment()), 0x00cf_9300_0000_ffff);
    }
}
