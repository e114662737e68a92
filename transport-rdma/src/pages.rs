//! What may be written or cleared: whole pages of guest RAM.

use migration::memory::{Extent, PAGE_SIZE, Ram};
use migration::transport::PlaneError;

/// Checks that an extent lies inside `ram` and consists of whole pages.
///
/// # Errors
/// [`PlaneError::OutOfBounds`] or [`PlaneError::Protocol`].
pub(crate) fn check_whole_pages(ram: &Ram, extent: &Extent) -> Result<(), PlaneError> {
    ram.check(extent)?;
    if extent.offset.is_multiple_of(PAGE_SIZE) && extent.len.is_multiple_of(PAGE_SIZE) {
        Ok(())
    } else {
        Err(PlaneError::Protocol(format!("{extent:?} does not consist of whole pages")))
    }
}
