//! A PVH ELF file made by hand. The end-to-end tests include this file as well.

/// Where guests are loaded and entered.
pub const BASE: u32 = 0x10_0000;

fn push<const N: usize>(out: &mut Vec<u8>, fields: [&[u8]; N]) {
    fields.into_iter().for_each(|field| out.extend_from_slice(field));
}

/// An ELF file with `code` at [`BASE`] and a PVH note that points there.
pub fn pvh_elf(code: &[u8]) -> Vec<u8> {
    const HEADERS: u64 = 64 + 2 * 56;
    const NOTE: u64 = 20;
    let mut elf = Vec::new();
    push(&mut elf, [b"\x7fELF", &[2, 1, 1, 0], &[0; 8]]);
    push(&mut elf, [&2u16.to_le_bytes(), &62u16.to_le_bytes(), &1u32.to_le_bytes()]);
    push(&mut elf, [&u64::from(BASE).to_le_bytes(), &64u64.to_le_bytes(), &0u64.to_le_bytes()]);
    push(&mut elf, [&0u32.to_le_bytes(), &64u16.to_le_bytes(), &56u16.to_le_bytes(), &2u16.to_le_bytes()]);
    push(&mut elf, [&[0; 6]]);
    let mut program_header = |kind: u32, offset: u64, address: u64, len: u64| {
        push(&mut elf, [&kind.to_le_bytes(), &7u32.to_le_bytes(), &offset.to_le_bytes()]);
        push(&mut elf, [&address.to_le_bytes(), &address.to_le_bytes()]);
        push(&mut elf, [&len.to_le_bytes(), &len.to_le_bytes(), &4u64.to_le_bytes()]);
    };
    program_header(1, HEADERS + NOTE, BASE.into(), code.len() as u64);
    program_header(4, HEADERS, 0, NOTE);
    push(&mut elf, [&4u32.to_le_bytes(), &4u32.to_le_bytes(), &18u32.to_le_bytes(), b"Xen\0"]);
    push(&mut elf, [&BASE.to_le_bytes(), code]);
    elf
}
