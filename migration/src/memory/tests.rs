//! Which memory is taken, which is refused, and that its bytes are where they are said to be.

use super::*;
use std::os::fd::FromRawFd;

const LEN: u64 = 64 << 10;

fn memfd(len: u64) -> File {
    // SAFETY: the name is a C string, and lives for ever.
    let fd = unsafe { libc::memfd_create(c"test".as_ptr(), libc::MFD_CLOEXEC) };
    assert!(fd >= 0, "{}", io::Error::last_os_error());
    // SAFETY: the kernel just gave us this descriptor and nobody else has it.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(len).unwrap();
    file
}

/// A mapping of `LEN` bytes that is never unmapped, and the region that it is said to be.
fn describe(
    flags: i32,
    access: i32,
    map: Option<(&File, u64)>,
    say: RamFile,
) -> Result<RamRegion, MemoryError> {
    let (fd, offset) = map.map_or((-1, 0), |(file, offset)| (file.as_raw_fd(), offset));
    // SAFETY: a new mapping at an address of the kernel's choice overlaps nothing of ours.
    let address = unsafe { libc::mmap(std::ptr::null_mut(), LEN as usize, access, flags, fd, offset as i64) };
    assert_ne!(address, libc::MAP_FAILED, "{}", io::Error::last_os_error());
    let layout = RegionLayout { guest_address: 0, len: LEN };
    let address = NonNull::new(address.cast()).unwrap();
    // SAFETY: what is wrong with the mapping is refused, which is what is tested; it lives for ever.
    unsafe { RamRegion::new(layout, address, PAGE_SIZE, vec![say], LEN, Arc::new(())) }
}

fn refused(region: Result<RamRegion, MemoryError>) -> bool {
    matches!(region.err(), Some(MemoryError::NotShared { .. }))
}

const ACCESS: i32 = libc::PROT_READ | libc::PROT_WRITE;

#[test]
fn only_shared_mappings_of_the_named_file_are_taken() {
    let file = memfd(3 * LEN);
    let at = |file: &File, offset| RamFile { file: file.try_clone().unwrap().into(), offset };
    let same = |offset| at(&file, offset);
    let (shared, private) = (libc::MAP_SHARED, libc::MAP_PRIVATE);
    assert!(describe(shared, ACCESS, Some((&file, 0)), same(0)).is_ok());
    assert!(describe(shared, ACCESS, Some((&file, LEN)), same(LEN)).is_ok());

    let anonymous = libc::MAP_ANONYMOUS;
    assert!(refused(describe(private | anonymous, ACCESS, None, same(0))), "anonymous");
    // Shared anonymous memory is a file to the kernel, but not the one that was named.
    assert!(refused(describe(shared | anonymous, ACCESS, None, same(0))), "shared, anonymous");
    assert!(refused(describe(private, ACCESS, Some((&file, 0)), same(0))), "private");
    assert!(refused(describe(shared, libc::PROT_READ, Some((&file, 0)), same(0))), "not writable");
    assert!(refused(describe(shared, ACCESS, Some((&file, 0)), same(LEN))), "elsewhere in the file");
    assert!(refused(describe(shared, ACCESS, Some((&file, 0)), at(&memfd(LEN), 0))), "another file");
    let short = memfd(LEN - PAGE_SIZE);
    assert!(refused(describe(shared, ACCESS, Some((&short, 0)), at(&short, 0))), "beyond the file's end");
}

#[test]
fn allocated_memory_has_the_layout_that_was_asked_for_and_nothing_in_it() {
    let layout = [
        RegionLayout { guest_address: 0, len: 20 << 20 },
        RegionLayout { guest_address: 1 << 32, len: 4096 },
    ];
    let ram = Ram::allocate(&layout).unwrap();
    assert_eq!(ram.layout(), layout);
    let region = &ram.regions()[0];
    assert_eq!((region.parts(), region.part_len()), (3, 8 << 20));
    crate::scan::existing(region, 0, region.pages(), |first, _| panic!("page {first} exists"));
    // Across the border of two parts, by file and by mapping.
    let offset = (8 << 20) - 3;
    region.write(offset, b"border").unwrap();
    let mut content = [0; 8];
    region.read(offset - 1, &mut content).unwrap();
    assert_eq!(&content, b"\0border\0");
    // SAFETY: inside the mapping, which nobody else uses.
    assert_eq!(unsafe { region.address().add(offset as usize).read_volatile() }, b'b');
    assert!(region.read(region.len() - 7, &mut content).is_err());
    assert!(region.write(u64::MAX, b"x").is_err());
}

#[test]
fn memory_that_cannot_be_is_not_asked_of_the_host() {
    let region = |guest_address, len| RegionLayout { guest_address, len };
    let refused = |layout: &[RegionLayout]| Ram::allocate(layout).err().expect("refused");
    assert!(matches!(refused(&[]), MemoryError::NoRegions));
    assert!(matches!(refused(&[region(0, 4097)]), MemoryError::Length { .. }));
    assert!(matches!(refused(&[region(0, 8192), region(4096, 8192)]), MemoryError::Overlap { .. }));
    let regions = || Ram::allocate(&[region(0, 4096)]).unwrap().regions;
    let twice = regions().into_iter().chain(regions()).collect();
    assert!(matches!(Ram::new(twice).err(), Some(MemoryError::Overlap { address: 0 })));
}

#[cfg(feature = "vm-memory")]
mod guest_memory {
    use super::*;
    use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

    #[test]
    fn what_vm_memory_has_mapped_from_files_is_taken_as_it_is() {
        // One file behind two regions, the second from the file's middle.
        let file = Arc::new(memfd(3 * LEN));
        let at = |offset| Some(FileOffset::from_arc(Arc::clone(&file), offset));
        let (low, high) = (GuestAddress(0), GuestAddress(1 << 32));
        let memory = GuestMemoryMmap::<()>::from_ranges_with_files([
            (low, LEN as usize, at(0)),
            (high, 2 * LEN as usize, at(LEN)),
        ])
        .unwrap();
        let ram = Ram::from_guest_memory(&memory).unwrap();
        let region = |guest_address, len| RegionLayout { guest_address, len };
        assert_eq!(ram.layout(), [region(0, LEN), region(1 << 32, 2 * LEN)]);
        memory.write_obj(0x1234_5678u32, GuestAddress((1 << 32) + LEN)).unwrap();
        let mut found = Vec::new();
        let high = &ram.regions()[1];
        crate::scan::existing(high, 0, high.pages(), |first, pages| found.push((first, pages)));
        assert_eq!(found, [(LEN / PAGE_SIZE, 1)]);
        let mut content = [0; 4];
        high.read(LEN, &mut content).unwrap();
        assert_eq!(u32::from_le_bytes(content), 0x1234_5678);
        // The mapping outlives the collection that it was described from.
        drop(memory);
        // SAFETY: inside the mapping, which nobody else uses.
        assert_eq!(unsafe { high.address().add(LEN as usize).read_volatile() }, 0x78);
    }

    #[test]
    fn anonymous_memory_is_refused_and_not_moved_as_nothing() {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), LEN as usize)]).unwrap();
        let refused = Ram::from_guest_memory(&memory).err().expect("refused");
        assert!(matches!(refused, MemoryError::NotShared { .. }), "{refused}");
        assert!(refused.to_string().contains("MAP_SHARED"), "{refused}");
    }
}
