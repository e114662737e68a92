//! Intel's MultiProcessor table, specification 1.4: how a guest without ACPI learns of its vCPUs,
//! of the IOAPIC, and of which interrupt arrives where.

use super::Error;
use crate::memory::GuestMemory;
use vm_memory::{Bytes, GuestAddress};

/// Where the table is: the last 8 KiB below the legacy area, enough for 254 vCPUs.
pub const TABLE: GuestAddress = GuestAddress(0x9_e000);
/// Where the pointer to it is: the last KiB of base memory is one of the places guests search.
const POINTER: GuestAddress = GuestAddress(0x9_fc00);

const LOCAL_APIC: u32 = 0xfee0_0000;
const IO_APIC: u32 = 0xfec0_0000;
/// Version registers of KVM's APICs.
const LOCAL_APIC_VERSION: u8 = 0x14;
const IO_APIC_VERSION: u8 = 0x11;
const SPECIFICATION: u8 = 4;

/// Writes the table for `vcpus` vCPUs, whose APIC IDs are 0 and up.
///
/// # Errors
/// [`Error::Memory`] if RAM cannot be written.
pub fn write(memory: &GuestMemory, vcpus: u8) -> Result<(), Error> {
    memory.write_slice(&table(vcpus), TABLE)?;
    memory.write_slice(&pointer(), POINTER)?;
    Ok(())
}

/// The byte that makes all of `bytes` add up to zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)).wrapping_neg()
}

fn pointer() -> [u8; 16] {
    let mut pointer = [0u8; 16];
    pointer[..4].copy_from_slice(b"_MP_");
    pointer[4..8].copy_from_slice(&(TABLE.0 as u32).to_le_bytes());
    pointer[8] = 1; // length in units of 16 bytes
    pointer[9] = SPECIFICATION;
    pointer[10] = checksum(&pointer);
    pointer
}

fn table(vcpus: u8) -> Vec<u8> {
    let io_apic_id = vcpus; // the first ID that no vCPU has
    let mut entries = Vec::new();
    let mut count = 0u16;
    let mut add = |entry: &[u8]| {
        entries.extend_from_slice(entry);
        count += 1;
    };
    for id in 0..vcpus {
        let flags = if id == 0 { 0b11 } else { 0b01 }; // enabled, and the boot processor
        let mut processor = [0u8; 20];
        processor[..4].copy_from_slice(&[0, id, LOCAL_APIC_VERSION, flags]);
        processor[4..8].copy_from_slice(&0x600u32.to_le_bytes()); // family 6
        processor[8..12].copy_from_slice(&0x201u32.to_le_bytes()); // has an FPU and an APIC
        add(&processor);
    }
    add(&[1, 0, b'I', b'S', b'A', b' ', b' ', b' ']);
    let mut io_apic = [2, io_apic_id, IO_APIC_VERSION, 1, 0, 0, 0, 0];
    io_apic[4..].copy_from_slice(&IO_APIC.to_le_bytes());
    add(&io_apic);
    // Type 3: kind (0 vectored), flags (as the bus has it), source bus and line, IOAPIC and pin.
    // KVM's default routing takes line n to pin n, the timer's line 0 included; line 2 is the
    // cascade of the two PICs, on which nothing arrives.
    for line in (0..16u8).filter(|line| *line != 2) {
        add(&[3, 0, 0, 0, 0, line, io_apic_id, line]);
    }
    // Type 4, local: ExtINT at the boot processor's LINT0, NMI at everybody's LINT1.
    add(&[4, 3, 0, 0, 0, 0, 0, 0]);
    add(&[4, 1, 0, 0, 0, 0, 0xff, 1]);

    let mut table = vec![0u8; 44];
    table[..4].copy_from_slice(b"PCMP");
    table[4..6].copy_from_slice(&((44 + entries.len()) as u16).to_le_bytes());
    table[6] = SPECIFICATION;
    table[8..16].copy_from_slice(b"WHIMBREL");
    table[16..28].copy_from_slice(b"MACHINE     ");
    table[34..36].copy_from_slice(&count.to_le_bytes());
    table[36..40].copy_from_slice(&LOCAL_APIC.to_le_bytes());
    table.extend_from_slice(&entries);
    table[7] = checksum(&table);
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_lengths_and_counts_hold_for_every_size() {
        for vcpus in 1..=254 {
            let table = table(vcpus);
            assert_eq!(checksum(&table), 0);
            assert_eq!(u16::from_le_bytes([table[4], table[5]]) as usize, table.len());
            assert!(TABLE.0 + table.len() as u64 <= POINTER.0);
            // Walk the entries as a guest does: 20 bytes for a processor, 8 for all others.
            let (mut at, mut count, mut processors) = (44, 0, 0);
            while at < table.len() {
                processors += u32::from(table[at] == 0);
                at += if table[at] == 0 { 20 } else { 8 };
                count += 1;
            }
            assert_eq!(at, table.len());
            assert_eq!(count, u16::from_le_bytes([table[34], table[35]]));
            assert_eq!(processors, u32::from(vcpus));
        }
        assert_eq!(checksum(&pointer()), 0);
    }
}
