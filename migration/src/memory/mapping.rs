//! Whether memory is what its owner says: a shared mapping of the files that stand for it.
//!
//! The engine asks the files which pages exist, and transports read and write by file. Of anonymous memory,
//! or of a private mapping, a migration would find nothing and report success. So the kernel is asked once,
//! when a region is described, what is mapped where.

use super::MemoryError;
use std::fs;
use std::os::fd::AsRawFd;

/// One part of a region, as its owner says it is mapped.
pub(super) struct Claim<'a, F> {
    /// Address of its first byte in this process.
    pub address: usize,
    /// Length in bytes.
    pub len: u64,
    /// The file.
    pub file: &'a F,
    /// Where in the file it begins, in bytes.
    pub offset: u64,
}

/// One line of /proc/self/maps.
#[derive(Debug, PartialEq)]
struct Mapping {
    start: usize,
    end: usize,
    /// Readable, writable and shared.
    shared: bool,
    offset: u64,
    /// Device and inode of the file; 0 where there is none.
    file: (u64, u64),
}

/// Checks every claim against what the kernel has mapped.
pub(super) fn check<F: AsRawFd>(claims: &[Claim<'_, F>]) -> Result<(), MemoryError> {
    let text = fs::read_to_string("/proc/self/maps")
        .map_err(|source| MemoryError::System { what: "read from /proc/self/maps what backs", source })?;
    let mappings: Vec<Mapping> = text.lines().filter_map(parse).collect();
    for claim in claims {
        let stat = stat(claim.file)?;
        if stat.st_size as u64 <= claim.offset || stat.st_size as u64 - claim.offset < claim.len {
            // Touching what lies beyond the file's end is SIGBUS.
            return Err(MemoryError::NotShared { address: claim.address });
        }
        let identity = comparable(claim.file)?.then_some((stat.st_dev, stat.st_ino));
        let mut at = claim.address;
        let end = claim.address.saturating_add(claim.len as usize);
        while at < end {
            let offset = claim.offset + (at - claim.address) as u64;
            let fits = |m: &&Mapping| {
                m.shared
                    && m.file.1 != 0
                    && identity.is_none_or(|file| m.file == file)
                    && m.offset + (at - m.start) as u64 == offset
            };
            let found = mappings.iter().find(|m| (m.start..m.end).contains(&at)).filter(fits);
            at = found.ok_or(MemoryError::NotShared { address: at })?.end;
        }
    }
    Ok(())
}

/// `start-end rwxs offset major:minor inode path`, everything but the inode in hexadecimal.
fn parse(line: &str) -> Option<Mapping> {
    let mut fields = line.split_ascii_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let access = fields.next()?;
    let offset = fields.next()?;
    let (major, minor) = fields.next()?.split_once(':')?;
    let inode = fields.next()?.parse().ok()?;
    let device = libc::makedev(u32::from_str_radix(major, 16).ok()?, u32::from_str_radix(minor, 16).ok()?);
    Some(Mapping {
        start: usize::from_str_radix(start, 16).ok()?,
        end: usize::from_str_radix(end, 16).ok()?,
        shared: access.starts_with("rw") && access.ends_with('s'),
        offset: u64::from_str_radix(offset, 16).ok()?,
        file: (device, inode),
    })
}

fn stat(file: &impl AsRawFd) -> Result<libc::stat, MemoryError> {
    // SAFETY: plain data, for which zeros are valid.
    let mut stat: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: the call writes one stat through a pointer to one; the descriptor is borrowed.
    match unsafe { libc::fstat(file.as_raw_fd(), &mut stat) } {
        0 => Ok(stat),
        _ => Err(MemoryError::last("look at the file of")),
    }
}

fn statfs(file: &impl AsRawFd) -> Result<libc::statfs, MemoryError> {
    // SAFETY: plain data, for which zeros are valid.
    let mut stat: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: the call writes one statfs through a pointer to one; the descriptor is borrowed.
    match unsafe { libc::fstatfs(file.as_raw_fd(), &mut stat) } {
        0 => Ok(stat),
        _ => Err(MemoryError::last("look at the file system of")),
    }
}

/// Whether device and inode in /proc are those that `fstat` tells. So it is in memory; file systems that lie
/// on top of others, or have several volumes, tell others.
fn comparable(file: &impl AsRawFd) -> Result<bool, MemoryError> {
    let kind = statfs(file)?.f_type;
    Ok(kind == libc::TMPFS_MAGIC || kind == libc::HUGETLBFS_MAGIC)
}

/// Size in bytes of the pages that a file is made of.
#[cfg(feature = "vm-memory")]
pub(super) fn backing_page(file: &impl AsRawFd) -> Result<u64, MemoryError> {
    let stat = statfs(file)?;
    Ok(if stat.f_type == libc::HUGETLBFS_MAGIC { stat.f_bsize as u64 } else { super::PAGE_SIZE })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_kernel_are_read() {
        let line =
            "7f22a0000000-7f22a4000000 rw-s 00001000 00:01 2055                       /memfd:ram (deleted)";
        let expected = Mapping {
            start: 0x7f22_a000_0000,
            end: 0x7f22_a400_0000,
            shared: true,
            offset: 0x1000,
            file: (1, 2055),
        };
        assert_eq!(parse(line), Some(expected));
        assert!(!parse("7f0000-7f1000 rw-p 00000000 00:00 0").unwrap().shared);
        assert_eq!(parse("nonsense"), None);
    }
}
