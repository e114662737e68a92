//! Who may write to guest RAM.

use super::Ram;
use std::io;
use std::ops::Deref;
use std::sync::Arc;

/// A VMM's own hold on its RAM: only through it can safe code write there.
///
/// It is made of a [`Ram`] that nobody else has yet. Others get an `Arc<Ram>`, which is all that the engine
/// and the transports want, and no way leads back from it:
///
/// ```
/// use whimbrel_migration::memory::{Ram, RamOwner, RegionLayout};
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let owner = RamOwner::new(Ram::allocate(&[RegionLayout { guest_address: 0, len: 1 << 20 }])?);
/// owner.write(0, 4096, b"a page")?;
/// let shared = std::sync::Arc::clone(&owner);
/// # let mut page = [0; 6];
/// shared.regions()[0].read(4096, &mut page)?;
/// # assert_eq!(&page, b"a page");
/// # Ok(())
/// # }
/// ```
/// ```compile_fail
/// # use whimbrel_migration::memory::Ram;
/// fn write(shared: &Ram) {
///     let _ = shared.regions()[0].write(4096, b"a page");
/// }
/// ```
pub struct RamOwner(Arc<Ram>);

impl RamOwner {
    /// The owner of `ram`.
    pub fn new(ram: Ram) -> Self {
        RamOwner(Arc::new(ram))
    }

    /// Writes `bytes` to region number `region` from `offset` on, by file. Whoever writes while writes are
    /// tracked tells the tracker afterwards, see
    /// [`SourceMachine::collect_dirty`](crate::machine::SourceMachine::collect_dirty). Nobody writes to a
    /// paused machine.
    ///
    /// # Errors
    /// `InvalidInput` for bytes outside the region; what the system says. hugetlbfs cannot be written by
    /// file.
    pub fn write(&self, region: usize, offset: u64, bytes: &[u8]) -> io::Result<()> {
        match self.0.regions().get(region) {
            Some(region) => region.write(offset, bytes),
            None => Err(io::Error::new(io::ErrorKind::InvalidInput, "no such memory region")),
        }
    }
}

impl Deref for RamOwner {
    type Target = Arc<Ram>;

    fn deref(&self) -> &Arc<Ram> {
        &self.0
    }
}
