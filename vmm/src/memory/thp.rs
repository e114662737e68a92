//! Transparent huge pages: what the kernel is told of guest RAM, and asked to make of it.
//!
//! A memfd gets folios of 2 MiB only if the host allows them for shared memory, and with the host's setting
//! `advise` only where they were asked for. So all guest RAM is advised, and lies where they fit. Whatever
//! the setting is, short of `deny`, the kernel makes one of what is there if it is asked to at once
//! (`MADV_COLLAPSE`, Linux 6.1). That copies 2 MiB, with the guest shut out of them meanwhile, and is done
//! in the background, or while [RAM is populated](super::GuestRam::populate).
//!
//! Kernels before 6.4 [hide memory](migration::memory::making_huge_pages_hides_memory) while they make huge
//! pages of it: there, guest RAM is to have none.

use super::{Error, GuestRam, PageSize};
use migration::memory::{ALIGNMENT, RamRegion, making_huge_pages_hides_memory};
use serde::{Deserialize, Serialize};
use std::io;
use std::ptr::NonNull;

/// Bytes of a huge page.
pub(super) const HUGE: u64 = ALIGNMENT as u64;

/// Linux 6.1; libc has it only for some targets.
const MADV_COLLAPSE: libc::c_int = 25;

/// Whether guest RAM of ordinary pages may come to lie in transparent huge pages. Each host decides for
/// itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Thp {
    /// Wherever the host allows it.
    #[default]
    On,
    /// The kernel is advised against them, and never asked for one.
    Off,
}

/// Tells the kernel about a fresh mapping. A kernel without such pages refuses the advice, and needs none.
pub(super) fn advise(address: NonNull<u8>, len: usize, thp: Thp) {
    let advice = match thp {
        Thp::On => libc::MADV_HUGEPAGE,
        Thp::Off => libc::MADV_NOHUGEPAGE,
    };
    // SAFETY: the advice changes no content, whatever is mapped there.
    unsafe { libc::madvise(address.as_ptr().cast(), len, advice) };
}

impl GuestRam {
    /// Whether it may come to lie in transparent huge pages.
    pub fn thp(&self) -> Thp {
        self.thp
    }
}

/// Makes huge pages of `len` bytes from `offset` of a region on, both multiples of [`HUGE`]. Content stays.
/// What does not exist of them comes to exist, if the first page of each 2 MiB does.
///
/// # Errors
/// `EAGAIN` while somebody uses a page of them, `ENOMEM` and `EBUSY` if there is no memory in one piece, or
/// not for this process, and `EINVAL` where the kernel cannot do it, or is set to `deny`, or outside the
/// region.
pub(super) fn collapse(region: &RamRegion, offset: u64, len: u64) -> io::Result<()> {
    if offset.checked_add(len).is_none_or(|end| end > region.len()) {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    let address = region.address().wrapping_add(offset as usize);
    // SAFETY: the range was checked to lie inside the region's mapping; the call moves pages to other places
    // in memory and changes no content.
    match unsafe { libc::madvise(address.cast(), len as usize, MADV_COLLAPSE) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Tries whether this host makes huge pages of shared memory that exists.
///
/// # Errors
/// Why not: a kernel before 6.4, the setting `deny`, or no 2 MiB of memory in one piece.
pub fn try_collapse() -> Result<(), Error> {
    if making_huge_pages_hides_memory() {
        return Err(Error::HidesMemory);
    }
    let system = |source| Error::System { what: "make a huge page of", source };
    let ram = GuestRam::with_thp(super::layout::MIN_RAM, PageSize::Small, Thp::Off)?;
    ram.populate_range(0, 0, HUGE)?;
    let region = ram.ram().regions().first().ok_or(Error::Layout)?;
    // Small pages so far. But where it was advised against huge ones, the kernel makes none.
    advise(NonNull::new(region.address()).ok_or(Error::Layout)?, HUGE as usize, Thp::On);
    collapse(region, 0, HUGE).map_err(system)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use std::fs;

    /// The value of a line of /proc/self/smaps, in whatever mappings lie in the first region; for numbers, in
    /// bytes.
    pub fn smaps(ram: &GuestRam, name: &str) -> Vec<String> {
        let region = &ram.ram().regions()[0];
        let ours = region.address() as u64..region.address() as u64 + region.len();
        let (mut inside, mut found) = (false, Vec::new());
        for line in fs::read_to_string("/proc/self/smaps").unwrap().lines() {
            let start = line.split_once('-').and_then(|(start, _)| u64::from_str_radix(start, 16).ok());
            if let Some(start) = start {
                inside = ours.contains(&start);
            } else if let (true, Some(value)) = (inside, line.strip_prefix(name)) {
                found.push(value.trim_start_matches(':').trim().to_owned());
            }
        }
        found
    }

    /// Bytes of the first region that are mapped by huge pages.
    pub fn mapped_huge(ram: &GuestRam) -> u64 {
        let kib = |value: &String| value.split(' ').next().unwrap().parse::<u64>().unwrap();
        smaps(ram, "ShmemPmdMapped").iter().map(kib).sum::<u64>() << 10
    }

    #[test]
    fn ram_lies_where_huge_pages_fit() {
        // Lengths that are no multiple of 2 MiB are those that the kernel aligns least.
        let sizes = [16u64, 17, 33, 1023];
        let kept: Vec<_> =
            sizes.iter().map(|mib| GuestRam::new(mib << 20, PageSize::Small).unwrap()).collect();
        for ram in &kept {
            for region in ram.ram().regions() {
                assert_eq!(region.address() as u64 % HUGE, 0);
                assert!(region.parts() == 1 || region.part_len() % HUGE == 0);
                assert_eq!(region.layout().guest_address % HUGE, 0);
                assert!(region.pieces(0, region.len()).all(|piece| piece.offset == 0));
            }
        }
    }

    #[test]
    fn all_ram_is_advised_as_it_was_said() {
        let on = if making_huge_pages_hides_memory() { ("nh", "hg") } else { ("hg", "nh") };
        for (thp, flag, other) in [(Thp::On, on.0, on.1), (Thp::Off, "nh", "hg")] {
            let ram = GuestRam::with_thp(64 << 20, PageSize::Small, thp).unwrap();
            let flags = smaps(&ram, "VmFlags");
            assert_eq!(flags.len(), ram.ram().regions()[0].parts());
            for flags in flags {
                let has = |flag| flags.split(' ').any(|f| f == flag);
                assert!(has(flag) && !has(other), "{thp:?}: {flags}");
            }
        }
    }
}
