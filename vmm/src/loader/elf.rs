//! ELF kernels with a PVH entry: 32-bit protected mode, paging off, EBX at the start info.

use super::{
    Before, Boot, COMMAND_LINE, Entry, Error, HIGH_MEMORY, MAX_COMMAND_LINE, MODULE_LIST, PVH_MEMORY_MAP,
    START_INFO, load_initramfs, low_memory, memmap, write_command_line, zero,
};
use crate::memory::GuestMemory;
use crate::memory::layout::RSDP;
use linux_loader::loader::KernelLoader;
use linux_loader::loader::elf::{Elf, PvhBootCapability};
use linux_loader::loader::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use std::io::Cursor;
use vm_memory::{Bytes, GuestAddress};

const START_MAGIC: u32 = 0x336e_c578;
const CLASS_64: u8 = 2;
const MACHINE_X86_64: u16 = 62;

pub fn load(memory: &GuestMemory, image: &[u8], boot: &Boot, before: Before) -> Result<Entry, Error> {
    if let (Some(class), Some(machine)) = (image.get(4), image.get(18..20)) {
        let machine = u16::from_le_bytes([machine[0], machine[1]]);
        // Some bare-metal images keep the class of the code they contain; the loader reads only
        // the 64-bit headers.
        if *class != CLASS_64 || machine != MACHINE_X86_64 {
            return Err(Error::WrongMachine { class: *class, machine });
        }
    }
    let load = || Elf::load(memory, None, &mut Cursor::new(image), None).map_err(Error::Elf);
    let mut loaded = load()?;
    let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap else {
        return Err(Error::NoPvhEntry);
    };
    if entry.0 >= loaded.kernel_end {
        return Err(Error::Entry(entry.0));
    }
    let low = low_memory(memory);
    // The loader checks only what the file holds; the rest of a segment (.bss) must exist too.
    if loaded.kernel_end > low {
        return Err(Error::TooBig { what: "kernel", end: loaded.kernel_end, memory: low });
    }
    if before == Before::Guest {
        // The loader writes what the file holds. What a kernel has beside that (.bss) it takes to be zero.
        zero(memory, HIGH_MEMORY, loaded.kernel_end)?;
        loaded = load()?;
    }
    write_command_line(memory, &boot.cmdline, MAX_COMMAND_LINE)?;
    let initramfs = load_initramfs(memory, boot.initramfs.as_ref(), loaded.kernel_end, low)?;
    write_start_info(memory, initramfs)?;
    Ok(Entry::Pvh { entry, start_info: START_INFO })
}

fn write_start_info(memory: &GuestMemory, initramfs: Option<super::Initramfs>) -> Result<(), Error> {
    let ranges = memmap::ranges(memory);
    let size = size_of::<hvm_memmap_table_entry>() as u64;
    for (range, at) in ranges.iter().zip((PVH_MEMORY_MAP.0..).step_by(size as usize)) {
        let entry =
            hvm_memmap_table_entry { addr: range.start, size: range.len, type_: range.kind, reserved: 0 };
        memory.write_obj(entry, GuestAddress(at))?;
    }
    let mut info = hvm_start_info {
        magic: START_MAGIC,
        version: 1, // with a memory map
        cmdline_paddr: COMMAND_LINE.0,
        rsdp_paddr: RSDP.0,
        memmap_paddr: PVH_MEMORY_MAP.0,
        memmap_entries: ranges.len() as u32,
        ..Default::default()
    };
    if let Some(initramfs) = initramfs {
        let module =
            hvm_modlist_entry { paddr: initramfs.address.0, size: initramfs.len, ..Default::default() };
        memory.write_obj(module, MODULE_LIST)?;
        info.nr_modules = 1;
        info.modlist_paddr = MODULE_LIST.0;
    }
    memory.write_obj(info, START_INFO)?;
    Ok(())
}
