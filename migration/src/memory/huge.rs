//! Transparent huge pages, and the kernels on which memory that is to be moved must not have any.
//!
//! While a kernel before 6.4 makes a huge page of small ones of a memfd (khugepaged, `MADV_COLLAPSE`), it has
//! put the huge one, which is locked and not up to date, into the file in the place of what it is made of.
//! For that time `SEEK_DATA` and `mincore` both say of up to 2 MiB that they do not exist, whatever they
//! hold. A first round would take them for memory that was never touched and leave them out, and the guest
//! would arrive with zeros there. Linux 6.4 puts the huge page in only when it is complete ("mm/khugepaged:
//! maintain page cache uptodate flag").

use super::PAGE_SIZE;
use std::ffi::CStr;
use std::ptr::NonNull;
use std::sync::LazyLock;

/// The first kernel that hides nothing.
const HONEST: (u32, u32) = (6, 4);

/// Whether this kernel hides pages while it makes a huge page of them. All RAM of 4 KiB pages that is made
/// into a [`RamRegion`](super::RamRegion) is then advised against huge pages, and must stay so.
pub fn making_huge_pages_hides_memory() -> bool {
    static HIDES: LazyLock<bool> = LazyLock::new(|| version(&release()).is_none_or(|found| found < HONEST));
    *HIDES
}

/// Keeps the kernel from making huge pages of a mapping, where that hides memory.
pub(super) fn keep_small(address: NonNull<u8>, len: u64, backing_page: u64) {
    if backing_page == PAGE_SIZE && making_huge_pages_hides_memory() {
        // A kernel without such pages refuses the advice, and needs none.
        // SAFETY: the advice changes no content, whatever is mapped there.
        unsafe { libc::madvise(address.as_ptr().cast(), len as usize, libc::MADV_NOHUGEPAGE) };
    }
}

/// What the kernel calls its release, as in `6.1.0-32-amd64`.
fn release() -> String {
    // SAFETY: all zeros are a valid `utsname`: arrays of characters.
    let mut name: libc::utsname = unsafe { std::mem::zeroed() };
    // SAFETY: the call fills the struct, and leaves it as it is if it fails.
    unsafe { libc::uname(&mut name) };
    // SAFETY: the array ends with a zero: the kernel puts one there, or all are.
    unsafe { CStr::from_ptr(name.release.as_ptr()) }.to_string_lossy().into_owned()
}

fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    let mut number = || numbers.next()?.parse().ok();
    Some((number()?, number()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_and_in_order() {
        for (release, expected) in [
            ("6.1.0-32-amd64", Some((6, 1))),
            ("6.4.0", Some((6, 4))),
            ("6.12-rc3", Some((6, 12))),
            ("10.0", Some((10, 0))),
            ("", None),
            ("6", None),
            ("odd", None),
        ] {
            assert_eq!(version(release), expected, "{release}");
        }
        assert!(version("5.14.0-570.el9.x86_64") < Some(HONEST) && version("6.12.1") > Some(HONEST));
    }

    #[test]
    fn this_kernel_says_which_it_is() {
        assert!(version(&release()).is_some(), "{}", release());
    }
}
