//! Where RAM lies in the guest.
//!
//! Up to 3 GiB from address 0, the rest from 4 GiB up. Between them is the hole for PCI, the
//! interrupt controllers and KVM's own pages, where every x86 guest expects it.

use super::Error;
use migration::memory::{PAGE_SIZE, RegionLayout};
use vm_memory::GuestAddress;

/// Least RAM a machine may have, in bytes.
pub const MIN_RAM: u64 = 16 << 20;
/// RAM comes in multiples of this many bytes.
pub const RAM_UNIT: u64 = 1 << 20;
/// Where ACPI's root pointer is: in the range that firmware without a better way is searched for it.
pub const RSDP: GuestAddress = GuestAddress(0xe_0000);
/// Most RAM below 4 GiB, and the start of the hole.
pub const HOLE_START: u64 = 3 << 30;
/// Where RAM goes on above the hole.
pub const HOLE_END: u64 = 4 << 30;
/// Where PCI functions' registers begin: the lower half of the hole.
pub const PCI_WINDOW_START: u64 = HOLE_START;
/// Where they end.
pub const PCI_WINDOW_END: u64 = HOLE_START + (512 << 20);

/// Where the engine finds what a guest boots from again: an address that no guest can have, so that neither
/// its CPUs nor its devices reach it.
pub const BOOT_STORE: u64 = 1 << 51;

/// The region of `len` bytes, rounded up to whole pages, for what a guest boots from again.
pub fn boot_store(len: u64) -> RegionLayout {
    RegionLayout { guest_address: BOOT_STORE, len: len.next_multiple_of(PAGE_SIZE) }
}

/// The regions of a machine with `size` bytes of RAM.
///
/// # Errors
/// [`Error::Size`] unless `size` is a multiple of [`RAM_UNIT`] and at least [`MIN_RAM`].
pub fn regions(size: u64) -> Result<Vec<RegionLayout>, Error> {
    if size < MIN_RAM || !size.is_multiple_of(RAM_UNIT) || size > i64::MAX as u64 {
        return Err(Error::Size { size });
    }
    let low = size.min(HOLE_START);
    let mut regions = vec![RegionLayout { guest_address: 0, len: low }];
    if size > low {
        regions.push(RegionLayout { guest_address: HOLE_END, len: size - low });
    }
    Ok(regions)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_goes_around_the_hole() {
        let region = |guest_address, len| RegionLayout { guest_address, len };
        assert_eq!(regions(16 << 20).unwrap(), [region(0, 16 << 20)]);
        assert_eq!(regions(3 << 30).unwrap(), [region(0, 3 << 30)]);
        assert_eq!(
            regions((3 << 30) + (256 << 20)).unwrap(),
            [region(0, 3 << 30), region(4 << 30, 256 << 20)]
        );
    }

    #[test]
    fn sizes_that_make_no_machine_are_refused() {
        for size in [0, 1, 15 << 20, (16 << 20) + 1, (16 << 20) + 4096, u64::MAX, !(RAM_UNIT - 1)] {
            assert!(matches!(regions(size), Err(Error::Size { .. })), "{size}");
        }
    }
}
