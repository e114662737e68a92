//! Linux bzImages, entered in 64-bit mode: RSI at the zero page, the first 4 GiB mapped.

use super::{
    Boot, COMMAND_LINE, Entry, Error, HIGH_MEMORY, MAX_COMMAND_LINE, ZERO_PAGE, load_initramfs, low_memory,
    memmap, write_command_line,
};
use crate::memory::GuestMemory;
use crate::memory::layout::RSDP;
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use linux_loader::loader::{BzImage, KernelLoader};
use std::io::Cursor;
use vm_memory::{Bytes, GuestAddress};

/// Offset of the 64-bit entry in the part that is loaded.
const ENTRY_64: u64 = 0x200;
/// First boot protocol with a 64-bit entry that the header tells of.
const PROTOCOL_2_12: u16 = 0x20c;
const XLF_KERNEL_64: u16 = 1;
/// "A boot loader without a number of its own."
const LOADER_UNDEFINED: u8 = 0xff;

pub fn load(
    memory: &GuestMemory,
    image: &[u8],
    cursor: &mut Cursor<&[u8]>,
    boot: &Boot,
) -> Result<Entry, Error> {
    let low = low_memory(memory);
    let start = GuestAddress(HIGH_MEMORY);
    let loaded = BzImage::load(memory, Some(start), cursor, None).map_err(Error::BzImage)?;
    let Some(mut header) = loaded.setup_header else { return Err(Error::UnknownFormat) };
    let (version, flags) = (header.version, header.xloadflags);
    if version < PROTOCOL_2_12 || flags & XLF_KERNEL_64 == 0 {
        return Err(Error::No64BitEntry { version });
    }
    let setup = (u64::from(if header.setup_sects == 0 { 4 } else { header.setup_sects }) + 1) * 512;
    let announced = u64::from(header.syssize) * 16;
    let present = (image.len() as u64).saturating_sub(setup);
    // The header counts in paragraphs of 16 bytes, rounded up.
    if present + 15 < announced || present <= ENTRY_64 {
        return Err(Error::Truncated { announced, present });
    }
    // The kernel unpacks itself where it prefers to be, and wants `init_size` bytes there.
    let pref_address = header.pref_address;
    let base = start.0.max(pref_address);
    let kernel_end = base.saturating_add(u64::from(header.init_size)).max(loaded.kernel_end);
    if kernel_end > low {
        return Err(Error::TooBig { what: "kernel", end: kernel_end, memory: low });
    }
    write_command_line(memory, &boot.cmdline, MAX_COMMAND_LINE.min(header.cmdline_size as usize))?;
    let limit = u64::from(header.initrd_addr_max) + 1;
    let initramfs = load_initramfs(memory, boot.initramfs.as_ref(), kernel_end, limit)?;

    header.type_of_loader = LOADER_UNDEFINED;
    header.cmd_line_ptr = COMMAND_LINE.0 as u32;
    if let Some(initramfs) = initramfs {
        // Below the hole, so 32 bits hold both.
        header.ramdisk_image = initramfs.address.0 as u32;
        header.ramdisk_size = initramfs.len as u32;
    }
    let mut params = boot_params { hdr: header, acpi_rsdp_addr: RSDP.0, ..Default::default() };
    let ranges = memmap::ranges(memory);
    for (range, slot) in ranges.iter().zip(&mut params.e820_table) {
        *slot = boot_e820_entry { addr: range.start, size: range.len, r#type: range.kind };
    }
    params.e820_entries = ranges.len() as u8;
    memory.write_obj(params, ZERO_PAGE)?;
    Ok(Entry::Linux64 { entry: GuestAddress(start.0 + ENTRY_64), zero_page: ZERO_PAGE })
}
