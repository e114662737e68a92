//! ACPI tables: how a stock kernel learns of its vCPUs, of the PCI host bridge, and of how to power
//! the machine off and reset it.
//!
//! The machine is one with ACPI's fixed hardware, not a "hardware-reduced" one: Linux takes the
//! latter to have neither PIC nor PIT, and this machine has both.
//!
//! | table | what it says |
//! |---|---|
//! | FADT | where the power registers ([`crate::power`]) and the reset register are |
//! | MADT | one local APIC a vCPU, one IOAPIC, lines 0 to 15 on pins 0 to 15 |
//! | DSDT | the host bridge and its window, the serial port, the value for "soft off" |

use crate::devices::{RESET_COMMAND, RESET_PORT, SERIAL_PORT};
use crate::memory::GuestMemory;
use crate::memory::layout::{self, RSDP};
use crate::pci::CONFIG_ADDRESS_PORT;
use crate::power::{CONTROL_PORT, EVENT_PORT, SCI, SOFT_OFF};
use crate::serial;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Interrupt, Name, Package, ResourceTemplate,
};
use acpi_tables::facs::FACS;
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace as Space, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, madt};
use vm_memory::{Bytes, GuestAddress};

/// Where the tables follow, on the alignment that the FACS needs.
const TABLES: u64 = RSDP.0 + 64;
/// Where they must end: the legacy area does.
const END: u64 = 1 << 20;

const OEM: [u8; 6] = *b"WHIMBR";
const OEM_TABLE: [u8; 8] = *b"WHIMBREL";
const REVISION: u32 = 1;

const LOCAL_APIC: u32 = 0xfee0_0000;
const IO_APIC: u32 = 0xfec0_0000;

/// IA-PC boot flags of the FADT: there are devices on the ISA bus; no VGA; no CMOS clock. (That
/// there is no 8042 keyboard controller is said by its flag's absence.)
const LEGACY_DEVICES: u16 = 1;
const NO_VGA: u16 = 1 << 2;
const NO_CMOS_CLOCK: u16 = 1 << 5;

/// Writes the tables of a machine with `vcpus` vCPUs, whose APIC IDs are 0 and up.
///
/// # Errors
/// If RAM cannot be written.
pub fn write(memory: &GuestMemory, vcpus: u8) -> Result<(), vm_memory::GuestMemoryError> {
    for (address, bytes) in tables(vcpus) {
        memory.write_slice(&bytes, GuestAddress(address))?;
    }
    Ok(())
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

/// All tables with their addresses.
fn tables(vcpus: u8) -> Vec<(u64, Vec<u8>)> {
    let mut placed = Vec::new();
    let mut next = TABLES;
    let mut place = |bytes: Vec<u8>| {
        let address = next;
        next = (next + bytes.len() as u64).next_multiple_of(64);
        debug_assert!(next <= END);
        placed.push((address, bytes));
        address
    };
    let facs = place(bytes(&FACS::new()));
    let dsdt = place(dsdt());
    let fadt = place(fadt(facs as u32, dsdt));
    let madt = place(madt(vcpus));
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = place(bytes(&xsdt));
    placed.push((RSDP.0, bytes(&Rsdp::new(OEM, xsdt))));
    placed
}

fn fadt(facs: u32, dsdt: u64) -> Vec<u8> {
    let reset = GAS::new(Space::SystemIo, 8, 0, AccessSize::ByteAccess, u64::from(RESET_PORT));
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, REVISION)
        .dsdt_64(dsdt)
        .firmware_ctrl_32(facs)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        // This says that there is no such button among the fixed registers. A power button there is.
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::ResetRegSup);
    fadt.sci_int = SCI.into();
    fadt.pm1a_evt_blk = u32::from(EVENT_PORT).into();
    fadt.pm1_evt_len = 4;
    fadt.pm1a_cnt_blk = u32::from(CONTROL_PORT).into();
    fadt.pm1_cnt_len = 2;
    fadt.iapc_boot_arch = (LEGACY_DEVICES | NO_VGA | NO_CMOS_CLOCK).into();
    fadt.reset_reg = reset;
    fadt.reset_value = RESET_COMMAND;
    bytes(&fadt.finalize())
}

fn madt(vcpus: u8) -> Vec<u8> {
    let header =
        bytes(&madt::MADT::new(OEM, OEM_TABLE, REVISION, LocalInterruptController::Address(LOCAL_APIC)));
    // An `Sdt` rather than the `MADT`, which has no entries of the two last kinds.
    let mut table = Sdt::new(*b"APIC", header.len() as u32, 3, OEM, OEM_TABLE, REVISION);
    table.write_u32(36, LOCAL_APIC);
    table.write_u32(40, 1); // there are two 8259s as well
    for id in 0..vcpus {
        table.append_slice(&bytes(&ProcessorLocalApic::new(id, id, EnabledStatus::Enabled)));
    }
    table.append_slice(&bytes(&IoApic::new(vcpus, IO_APIC, 0)));
    // Interrupt source override: ACPI's own interrupt is level-triggered, active high. All other
    // ISA lines are what the specification takes them to be.
    table.append_slice(&[2, 10, 0, SCI as u8, SCI as u8, 0, 0, 0, 0b1101, 0]);
    // Local APIC NMI: everybody's LINT1.
    table.append_slice(&[4, 6, 0xff, 0, 0, 1]);
    table.as_slice().to_vec()
}

fn dsdt() -> Vec<u8> {
    let mut dsdt = Sdt::new(*b"DSDT", 36, 2, OEM, OEM_TABLE, REVISION);
    let window = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        layout::PCI_WINDOW_START as u32,
        (layout::PCI_WINDOW_END - 1) as u32,
        None,
    );
    let buses = AddressSpace::new_bus_number(0u16, 0u16);
    let config = IO::new(CONFIG_ADDRESS_PORT, CONFIG_ADDRESS_PORT, 1, 8);
    // No _PRT: no function has an interrupt pin, all interrupts are messages.
    let bridge = bytes(&Device::new(
        "_SB_.PCI0".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0A03")),
            &Name::new("_UID".into(), &0u8),
            &Name::new("_SEG".into(), &0u8),
            &Name::new("_BBN".into(), &0u8),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&buses, &config, &window])),
        ],
    ));
    let port = IO::new(SERIAL_PORT, SERIAL_PORT, 1, 8);
    let line = Interrupt::new(true, true, false, false, serial::IRQ);
    let serial = bytes(&Device::new(
        "_SB_.COM1".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &0u8),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&port, &line])),
        ],
    ));
    let soft_off = bytes(&Name::new("_S5_".into(), &Package::new(vec![&SOFT_OFF, &SOFT_OFF, &0u8, &0u8])));
    [bridge, serial, soft_off].iter().for_each(|definition| dsdt.append_slice(definition));
    dsdt.as_slice().to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn u32_at(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum: u8, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn the_tables_of_every_machine_hang_together() {
        for vcpus in 1..=254u8 {
            let tables = tables(vcpus);
            let at = |address: u64| &tables.iter().find(|(a, _)| *a == address).unwrap().1;
            let mut ranges: Vec<_> = tables.iter().map(|(a, b)| (*a, *a + b.len() as u64)).collect();
            ranges.sort_unstable();
            assert!(ranges.windows(2).all(|pair| pair[0].1 <= pair[1].0), "tables overlap");
            assert!(ranges.last().unwrap().1 <= END);
            let rsdp = at(RSDP.0);
            assert_eq!((sum(&rsdp[..20]), sum(rsdp)), (0, 0));
            let xsdt = at(u64::from(u32_at(rsdp, 24)));
            let named = |name: &[u8; 4]| {
                let entries = xsdt[36..].chunks(8).map(|e| at(u64::from(u32_at(e, 0))));
                entries.into_iter().find(|table| &table[..4] == name).unwrap()
            };
            let (fadt, madt) = (named(b"FACP"), named(b"APIC"));
            let dsdt = at(u64::from(u32_at(fadt, 140)));
            assert_eq!(&at(u64::from(u32_at(fadt, 36)))[..4], b"FACS");
            for table in [xsdt, fadt, madt, dsdt] {
                assert_eq!(sum(table), 0, "{:?}", &table[..4]);
                assert_eq!(u32_at(table, 4) as usize, table.len(), "{:?}", &table[..4]);
            }
            // Walk the MADT as a guest does.
            let (mut entry, mut processors) = (44, Vec::new());
            while entry < madt.len() {
                if madt[entry] == 0 {
                    processors.push(madt[entry + 3]);
                }
                entry += usize::from(madt[entry + 1]);
            }
            assert_eq!(entry, madt.len());
            assert_eq!(processors, (0..vcpus).collect::<Vec<_>>());
        }
    }
}
