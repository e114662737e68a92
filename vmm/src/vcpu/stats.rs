//! What KVM counts of a vCPU: its binary statistics (Linux 5.14).
//!
//! The file of a vCPU's statistics begins with a header. It says where the descriptions are, one for each
//! statistic with its name, and where the numbers. What is read here is described in the kernel's
//! `Documentation/virt/kvm/api.rst`, "KVM_GET_STATS_FD".

use crate::ioctl;
use kvm_ioctls::VcpuFd;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Faults that were over once a page was writable again: the first write to a page since it was last marked
/// clean.
const FIRST_WRITES: &str = "pf_fast";

/// With this, processors log what is written by themselves, and such faults do not happen.
const PAGE_MODIFICATION_LOG: &str = "/sys/module/kvm_intel/parameters/pml";

/// Bytes of the header: six numbers of 32 bits.
const HEADER: usize = 24;

/// Bytes of a description before its name.
const DESCRIPTION: usize = 16;

/// More statistics than any kernel has.
const MOST_BYTES: usize = 1 << 20;

/// A counter of one vCPU.
pub(crate) struct Counter {
    file: File,
    offset: u64,
}

impl Counter {
    /// How often the vCPU was the first to write to a page that was clean. `None` where KVM does not count
    /// that.
    pub fn of_first_writes(vcpu: &VcpuFd) -> Option<Self> {
        if logged_by_processors(Path::new(PAGE_MODIFICATION_LOG)) {
            return None;
        }
        Counter::find(ioctl::get_stats(vcpu).ok()?, FIRST_WRITES).ok()?
    }

    fn find(file: File, name: &str) -> io::Result<Option<Self>> {
        let mut header = [0; HEADER];
        file.read_exact_at(&mut header, 0)?;
        let number = |index: usize| u32_at(&header, 4 * index).map(|number| number as usize);
        let fields = (number(1), number(2), number(4), number(5));
        let (Some(name_size), Some(count), Some(descriptions), Some(data)) = fields else { return Ok(None) };
        let each = DESCRIPTION + name_size;
        let Some(bytes) = count.checked_mul(each).filter(|bytes| *bytes <= MOST_BYTES) else {
            return Ok(None);
        };
        let mut all = vec![0; bytes];
        file.read_exact_at(&mut all, descriptions as u64)?;
        let found = all.chunks_exact(each).find(|description| {
            let (_, said) = description.split_at(DESCRIPTION);
            said.split(|byte| *byte == 0).next() == Some(name.as_bytes())
        });
        let offset = found.and_then(|description| u32_at(description, 8));
        Ok(offset.map(|offset| Counter { file, offset: data as u64 + u64::from(offset) }))
    }

    /// What it stands at.
    pub fn read(&self) -> io::Result<u64> {
        let mut bytes = [0; 8];
        self.file.read_exact_at(&mut bytes, self.offset)?;
        Ok(u64::from_ne_bytes(bytes))
    }
}

fn logged_by_processors(parameter: &Path) -> bool {
    std::fs::read_to_string(parameter).is_ok_and(|value| value.trim() == "Y")
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn statistics(descriptions: &[(&str, u32)], data: &[u64]) -> File {
        const NAME: usize = 48;
        let mut file = tempfile::tempfile().unwrap();
        let header = [
            0,
            NAME as u32,
            descriptions.len() as u32,
            24,
            24,
            (24 + descriptions.len() * (16 + NAME)) as u32,
        ];
        header.iter().for_each(|number| file.write_all(&number.to_ne_bytes()).unwrap());
        for (name, offset) in descriptions {
            let mut description = [0; DESCRIPTION + NAME];
            description[8..12].copy_from_slice(&offset.to_ne_bytes());
            description[DESCRIPTION..][..name.len()].copy_from_slice(name.as_bytes());
            file.write_all(&description).unwrap();
        }
        data.iter().for_each(|number| file.write_all(&number.to_ne_bytes()).unwrap());
        file
    }

    #[test]
    fn a_counter_is_found_by_its_name() {
        let file = || statistics(&[("pf_fast_and_more", 0), ("pf_fast", 8)], &[1, 2]);
        assert_eq!(Counter::find(file(), FIRST_WRITES).unwrap().unwrap().read().unwrap(), 2);
        assert!(Counter::find(file(), "pf_fas").unwrap().is_none());
        assert!(Counter::find(tempfile::tempfile().unwrap(), FIRST_WRITES).is_err());
    }
}
