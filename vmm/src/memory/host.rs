//! What the host can give: checked before RAM is mapped, because a memfd promises anything and the
//! shortage would otherwise show as a killed process in the middle of a migration.

use super::{Error, PageSize};
use std::fs;

/// Refuses RAM of `size` bytes that the host does not have free now.
///
/// The figure is a snapshot: two machines started at once may both pass. It catches the mistake of
/// asking for more than the host has, not every race for its last pages.
///
/// # Errors
/// [`Error::HostMemory`] or [`Error::HugePages`], naming what is free.
pub fn check(size: u64, pages: PageSize) -> Result<(), Error> {
    match pages {
        PageSize::Small => match available() {
            Some(available) if size > available => Err(Error::HostMemory { size, available }),
            _ => Ok(()),
        },
        PageSize::Huge2M | PageSize::Huge1G => {
            let unit = pages.bytes();
            let free = free_huge_pages(unit).ok_or(Error::NoHugePages { kib: unit >> 10 })?;
            let wanted = size / unit;
            if wanted > free {
                return Err(Error::HugePages { wanted, free, kib: unit >> 10 });
            }
            Ok(())
        }
    }
}

/// Memory that the host could give now (`MemAvailable`), in bytes; `None` where /proc does not say.
pub fn available() -> Option<u64> {
    meminfo("MemAvailable:")
}

/// Shared memory in use on the whole host (`Shmem`), in bytes: guests' RAM is part of it. `None` where /proc
/// does not say.
pub fn shared() -> Option<u64> {
    meminfo("Shmem:")
}

fn meminfo(name: &str) -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find(|line| line.starts_with(name))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok()?.checked_mul(1024)
}

/// Free and unreserved huge pages of `unit` bytes; `None` where the host has no such size.
fn free_huge_pages(unit: u64) -> Option<u64> {
    let read = |name: &str| -> Option<u64> {
        let path = format!("/sys/kernel/mm/hugepages/hugepages-{}kB/{name}", unit >> 10);
        fs::read_to_string(path).ok()?.trim().parse().ok()
    };
    Some(read("free_hugepages")?.saturating_sub(read("resv_hugepages")?) + read("nr_overcommit_hugepages")?)
}
