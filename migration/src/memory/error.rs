//! What guest memory cannot be moved, and what to do about it.

use super::{MAX_ADDRESS, MAX_REGIONS, PAGE_SIZE, RegionLayout};
use crate::failure::{Code, Failure};
use std::io;

/// Why guest memory cannot be moved.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MemoryError {
    /// There is none.
    #[error("there is no guest memory: give at least one region")]
    NoRegions,
    /// More than [`MAX_REGIONS`].
    #[error("{count} regions of guest memory are too many: at most {MAX_REGIONS} can be moved")]
    TooManyRegions {
        /// How many there are.
        count: usize,
    },
    /// A length of 0, or one that is no multiple of [`PAGE_SIZE`].
    #[error(
        "the memory region at {:#x} is {} bytes long: use a multiple of {PAGE_SIZE} that is not 0",
        region.guest_address, region.len
    )]
    Length {
        /// The region.
        region: RegionLayout,
    },
    /// A guest address that is no multiple of [`PAGE_SIZE`], or a region that ends beyond [`MAX_ADDRESS`].
    #[error(
        "no memory region of {:#x} bytes can be at {:#x}: use an address that is a multiple of {PAGE_SIZE}, \
         and end at or below {MAX_ADDRESS:#x}",
        region.len, region.guest_address
    )]
    Address {
        /// The region.
        region: RegionLayout,
    },
    /// Two regions hold the same guest address.
    #[error("two memory regions overlap at {address:#x}: give each guest address to one region")]
    Overlap {
        /// The lowest guest address that both have.
        address: u64,
    },
    /// The files behind a region are not as many as it has parts.
    #[error("{files} files for a memory region of {parts} parts: give one file for each part")]
    Files {
        /// How many files were given.
        files: usize,
        /// How many parts there are.
        parts: u64,
    },
    /// Memory that is not a shared mapping of the file that was given with it: anonymous memory, a private
    /// mapping, another file, another place in the file. Nobody could find out through the file what of it
    /// exists, and what a data plane writes to the file would not reach the guest.
    #[error(
        "guest memory at {address:#x} in this process is not a readable and writable MAP_SHARED mapping of the \
         file that was named for it: anonymous and private memory cannot be moved. Map a memfd with MAP_SHARED, \
         or let Ram::allocate do it"
    )]
    NotShared {
        /// The lowest address in this process of which that is so.
        address: usize,
    },
    /// A system call failed.
    #[error("cannot {what} guest memory: {source}")]
    System {
        /// What was being done.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

impl MemoryError {
    /// The last system call's error.
    pub(super) fn last(what: &'static str) -> Self {
        MemoryError::System { what, source: io::Error::last_os_error() }
    }
}

impl From<MemoryError> for Failure {
    fn from(error: MemoryError) -> Self {
        Failure::new(Code::MEMORY, error)
    }
}

/// Checks that memory can be laid out so: 1 to [`MAX_REGIONS`] regions of whole pages, in any order, that do
/// not overlap and end at or below [`MAX_ADDRESS`].
///
/// # Errors
/// [`MemoryError`] says which region is wrong, and how.
pub fn check_layout(layout: &[RegionLayout]) -> Result<(), MemoryError> {
    match layout.len() {
        0 => return Err(MemoryError::NoRegions),
        1..=MAX_REGIONS => {}
        count => return Err(MemoryError::TooManyRegions { count }),
    }
    layout.iter().try_for_each(RegionLayout::check)?;
    let mut sorted = layout.to_vec();
    sorted.sort_unstable_by_key(|region| region.guest_address);
    match sorted.windows(2).find(|two| two[1].guest_address - two[0].guest_address < two[0].len) {
        Some(two) => Err(MemoryError::Overlap { address: two[1].guest_address }),
        None => Ok(()),
    }
}

impl RegionLayout {
    /// Checks that there can be such a region.
    ///
    /// # Errors
    /// [`MemoryError::Length`] or [`MemoryError::Address`].
    pub fn check(&self) -> Result<(), MemoryError> {
        if self.len == 0 || !self.len.is_multiple_of(PAGE_SIZE) {
            return Err(MemoryError::Length { region: *self });
        }
        let end = self.guest_address.checked_add(self.len);
        if !self.guest_address.is_multiple_of(PAGE_SIZE) || end.is_none_or(|end| end > MAX_ADDRESS) {
            return Err(MemoryError::Address { region: *self });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(guest_address: u64, len: u64) -> RegionLayout {
        RegionLayout { guest_address, len }
    }

    #[test]
    fn layouts_that_cannot_be_are_refused() {
        let refused = |layout: &[RegionLayout]| check_layout(layout).unwrap_err();
        assert!(matches!(refused(&[]), MemoryError::NoRegions));
        let many: Vec<_> = (0..65).map(|n| region(n << 20, 1 << 20)).collect();
        assert!(matches!(refused(&many), MemoryError::TooManyRegions { count: 65 }));
        assert!(check_layout(&many[..64]).is_ok());
        for len in [0, 1, 4095, 4097] {
            assert!(matches!(refused(&[region(0, len)]), MemoryError::Length { .. }), "{len}");
        }
        for (address, len) in [(1, 4096), (MAX_ADDRESS, 4096), (u64::MAX - 4095, 4096)] {
            assert!(matches!(refused(&[region(address, len)]), MemoryError::Address { .. }), "{address:#x}");
        }
        // Whatever their order.
        for two in [[region(0, 8192), region(4096, 4096)], [region(4096, 8192), region(0, 8192)]] {
            assert!(matches!(refused(&two), MemoryError::Overlap { address: 4096 }), "{two:?}");
        }
        assert!(check_layout(&[region(4096, 4096), region(0, 4096)]).is_ok());
    }
}
