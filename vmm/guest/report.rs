//! The pages in which the guest says how it fares. The VMM reads them from outside at any time, and
//! writes two words of the first.

use crate::abi::{self, Cpu, Header, MAGIC, PAGE, REPORT_ADDRESS, VERSION};

/// The header.
pub fn header() -> *mut Header {
    REPORT_ADDRESS as *mut Header
}

/// The page of vCPU `number`.
pub fn cpu(number: usize) -> *mut Cpu {
    (REPORT_ADDRESS + (number as u64 + 1) * PAGE) as *mut Cpu
}

/// Access to one field of a report. All of it is volatile: the VMM reads and writes behind the compiler's
/// back.
#[derive(Clone, Copy)]
pub struct Field<T>(*mut T);

impl<T: Copy> Field<T> {
    /// # Safety
    /// The pointer must be to a field in the report's pages.
    pub unsafe fn new(pointer: *mut T) -> Self {
        Field(pointer)
    }

    pub fn get(self) -> T {
        // SAFETY: the report's pages are RAM at a fixed place that nothing else uses, each of them
        // written by one vCPU only; `new` vouches for the pointer.
        unsafe { self.0.read_volatile() }
    }

    pub fn set(self, value: T) {
        // SAFETY: as in `get`.
        unsafe { self.0.write_volatile(value) }
    }
}

impl Field<u64> {
    pub fn add(self, count: u64) {
        self.set(self.get() + count);
    }
}

/// The [`Field`] of a report: `field!(pointer, name)` or `field!(pointer, name[index]…)`.
macro_rules! field {
    ($pointer:expr, $name:ident $([$index:expr])*) => {{
        let pointer = $pointer;
        // SAFETY: the pointer is from `report::header` or `report::cpu`, and indexing checks bounds.
        unsafe { $crate::report::Field::new(&raw mut (*pointer).$name $([$index])*) }
    }};
}
pub(crate) use field;

/// Begins the report.
pub fn begin(vcpus: u32, working_set: u64) {
    let header = header();
    field!(header, version).set(VERSION);
    field!(header, vcpus).set(vcpus);
    field!(header, working_set).set(working_set);
    field!(header, state).set(abi::STATE_BOOTING);
    field!(header, magic).set(MAGIC);
}

/// Says what the guest is doing. A failure stays.
pub fn state(state: u32) {
    let field = field!(header(), state);
    if field.get() != abi::STATE_FAILED {
        field.set(state);
    }
}

/// Says that the guest cannot go on.
pub fn fail(what: u64, place: u64) {
    field!(header(), detail).set([what, place]);
    state(abi::STATE_FAILED);
}
