//! No processor copies a page, on either side: memory travels to which nobody in this process has access.

mod common;

use common::Devices;
use migration::conformance::Bed;
use migration::conformance::bed::{REGION_PAGES, extent, scramble};
use migration::memory::Ram;
use std::io;
use std::sync::Arc;

/// RAM that this process can neither read nor write, until this is dropped. Nor can the kernel on its behalf:
/// a system call that copies from or to it fails. What a device has pinned it reaches all the same.
struct Untouchable(Arc<Ram>);

impl Untouchable {
    fn new(ram: &Arc<Ram>) -> Untouchable {
        protect(ram, libc::PROT_NONE);
        Untouchable(Arc::clone(ram))
    }
}

impl Drop for Untouchable {
    fn drop(&mut self) {
        protect(&self.0, libc::PROT_READ | libc::PROT_WRITE);
    }
}

fn protect(ram: &Ram, access: i32) {
    for region in ram.regions() {
        // SAFETY: the region is a mapping of its own, to which nobody holds references; whoever dereferences
        // a pointer to it meanwhile gets a signal, which is what this test is about.
        let result = unsafe { libc::mprotect(region.address().cast(), region.len() as usize, access) };
        assert_eq!(result, 0, "{}", io::Error::last_os_error());
    }
}

/// Has the kernel copy a page out of RAM, into a pipe.
fn copy_a_page(ram: &Ram) -> io::Result<()> {
    let (_reader, writer) = io::pipe()?;
    let page = ram.regions()[0].address();
    // SAFETY: the page is mapped; without access to it the call fails, and nothing else happens.
    let copied = unsafe { libc::write(std::os::fd::AsRawFd::as_raw_fd(&writer), page.cast(), 4096) };
    if copied == 4096 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[test]
#[ignore = "needs RDMA devices: ci/rdma runs it in the lab"]
fn pages_travel_that_no_processor_may_touch() {
    let mut bed = Bed::new(&Devices::of_this_host(), 2);
    let all = [extent(0, 0, REGION_PAGES[0]), extent(1, 0, REGION_PAGES[1])];
    let fill = |bed: &Bed, seed| {
        let mut random = fastrand::Rng::with_seed(seed);
        all.iter().for_each(|extent| scramble(&bed.source.ram, extent, &mut random));
    };
    let send = |bed: &mut Bed, round| {
        for (lane, extent) in bed.plane.lanes().iter_mut().zip(&all) {
            lane.write(&[*extent]).expect("a healthy lane");
        }
        bed.barrier(round);
    };
    // The first round pins memory, which needs access to it.
    fill(&bed, 1);
    send(&mut bed, 0);
    assert_eq!(bed.differences(), []);

    fill(&bed, 2);
    assert_ne!(bed.differences(), []);
    for ram in [&bed.source.ram, &bed.shadow] {
        copy_a_page(ram).expect("a page that can be read");
    }
    let shut = [Untouchable::new(&bed.source.ram), Untouchable::new(&bed.shadow)];
    for side in &shut {
        let refused = copy_a_page(&side.0).expect_err("a page that nobody can read");
        assert_eq!(refused.raw_os_error(), Some(libc::EFAULT));
    }
    send(&mut bed, 1);
    drop(shut);
    assert_eq!(bed.differences(), []);
}
