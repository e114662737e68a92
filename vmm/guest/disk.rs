//! A virtio disk, driven by one vCPU: one request of one block at a time, and no interrupts.

use crate::abi::PAGE;
use crate::cpu;
use core::cell::UnsafeCell;
use core::mem::offset_of;

const CONFIG_ADDRESS: u16 = 0xcf8;
const CONFIG_DATA: u16 = 0xcfc;
/// Device and vendor of a modern virtio-blk.
const IDENTITY: u32 = 0x1042_1af4;
const CAPABILITIES: u32 = 0x34;
const BARS: u32 = 0x10;
/// More capabilities than this do not fit into a function's configuration.
const MAX_CAPABILITIES: usize = 48;
const VENDOR_CAPABILITY: u32 = 9;
const COMMON: u32 = 1;
const DOORBELLS: u32 = 2;
const DEVICE: u32 = 4;

/// Registers of the common configuration.
const FEATURE_SELECT: u64 = 0x08;
const FEATURES: u64 = 0x0c;
const STATUS: u64 = 0x14;
const QUEUE_SELECT: u64 = 0x16;
const QUEUE_SIZE: u64 = 0x18;
const QUEUE_ENABLE: u64 = 0x1c;
const QUEUE_DOORBELL: u64 = 0x1e;
const QUEUE_PARTS: [u64; 3] = [0x20, 0x28, 0x30];

/// The driver has seen the device, then agreed on features, then set it up.
const DRIVER: u8 = 3;
const FEATURES_OK: u8 = DRIVER | 8;
const DRIVER_OK: u8 = FEATURES_OK | 4;

/// Entries of the ring; a request takes three descriptors.
const SIZE: usize = 4;
const NEXT: u64 = 1;
const DEVICE_WRITES: u64 = 2;

/// What a request does; the device's own numbers.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    Read = 0,
    Write = 1,
}

/// What the device and this side both use.
#[repr(C, align(4096))]
struct Area {
    block: [u64; 512],
    descriptors: [[u64; 2]; SIZE],
    /// Flags and index, then the ring.
    available: [u16; 2 + SIZE],
    /// Flags and index, then the ring's pairs.
    used: [u32; 1 + 2 * SIZE],
    /// Kind and sector.
    request: [u64; 2],
    outcome: u8,
}

struct Shared(UnsafeCell<Area>);

// SAFETY: one vCPU and the device use it; this side by volatile loads and stores only.
unsafe impl Sync for Shared {}

static AREA: Shared = Shared(UnsafeCell::new(Area {
    block: [0; 512],
    descriptors: [[0; 2]; SIZE],
    available: [0; 2 + SIZE],
    used: [0; 1 + 2 * SIZE],
    request: [0; 2],
    outcome: 0,
}));

fn address(offset: usize) -> u64 {
    AREA.0.get() as u64 + offset as u64
}

/// Writes to [`AREA`] or to a register of the device.
fn store<T>(address: u64, value: T) {
    // SAFETY: both are mapped one to one; callers pass addresses of either, aligned for the type.
    unsafe { (address as *mut T).write_volatile(value) }
}

/// Reads from there.
fn load<T>(address: u64) -> T {
    // SAFETY: as in `store`, and integers are valid whatever the bits.
    unsafe { (address as *const T).read_volatile() }
}

fn config(device: u32, register: u32) -> u32 {
    cpu::out_long(CONFIG_ADDRESS, 1 << 31 | device << 11 | register);
    cpu::input_long(CONFIG_DATA)
}

/// The first disk on the PCI bus.
pub struct Disk {
    doorbell: u64,
    blocks: u64,
    /// Requests so far.
    requests: u16,
}

impl Disk {
    /// Finds it and sets it up.
    pub fn find() -> Option<Self> {
        let device = (0..32).find(|device| config(*device, 0) == IDENTITY)?;
        let (mut common, mut doorbells, mut multiplier, mut own) = (0, 0, 0, 0);
        let mut at = config(device, CAPABILITIES) & 0xfc;
        for _ in 0..MAX_CAPABILITIES {
            if at == 0 {
                break;
            }
            let head = config(device, at);
            if head & 0xff == VENDOR_CAPABILITY {
                let bar = config(device, BARS + 4 * (config(device, at + 4) & 7)) & !0xf;
                let place = u64::from(bar) + u64::from(config(device, at + 8));
                match head >> 24 {
                    COMMON => common = place,
                    DOORBELLS => (doorbells, multiplier) = (place, u64::from(config(device, at + 16))),
                    DEVICE => own = place,
                    _ => {}
                }
            }
            at = head >> 8 & 0xfc;
        }
        if common == 0 || doorbells == 0 || own == 0 {
            return None;
        }
        store(common + STATUS, 0u8);
        store(common + STATUS, DRIVER);
        // Version 1, and nothing else: without FLUSH, what is confirmed is durable.
        store(common + FEATURE_SELECT, 1u32);
        store(common + FEATURES, 1u32);
        store(common + STATUS, FEATURES_OK);
        store(common + QUEUE_SELECT, 0u16);
        store(common + QUEUE_SIZE, SIZE as u16);
        let parts = [offset_of!(Area, descriptors), offset_of!(Area, available), offset_of!(Area, used)];
        for (register, part) in QUEUE_PARTS.into_iter().zip(parts) {
            store(common + register, address(part) as u32);
            store(common + register + 4, 0u32);
        }
        store(common + QUEUE_ENABLE, 1u16);
        let doorbell = doorbells + u64::from(load::<u16>(common + QUEUE_DOORBELL)) * multiplier;
        store(common + STATUS, DRIVER_OK);
        // Two halves: a register is at most four bytes wide where KVM emulates.
        let sectors = u64::from(load::<u32>(own)) | u64::from(load::<u32>(own + 4)) << 32;
        Some(Disk { doorbell, blocks: sectors / (PAGE / 512), requests: 0 })
    }

    /// Its size in blocks of [`PAGE`] bytes.
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    /// The block that goes to the disk, or has come from there.
    pub fn block(&self) -> *mut u64 {
        address(offset_of!(Area, block)) as *mut u64
    }

    /// Asks for block `number` to be read or written. No other request may be under way.
    pub fn begin(&mut self, operation: Operation, number: u64) {
        let at = |index: usize| address(offset_of!(Area, descriptors)) + index as u64 * 16;
        let describe = |index: usize, part: usize, len: u64, flags: u64| {
            store(at(index), address(part));
            store(at(index) + 8, len | flags << 32 | (index as u64 + 1) << 48);
        };
        let request = address(offset_of!(Area, request));
        store(request, operation as u64);
        store(request + 8, number * (PAGE / 512));
        let direction = if operation == Operation::Read { DEVICE_WRITES } else { 0 };
        describe(0, offset_of!(Area, request), 16, NEXT);
        describe(1, offset_of!(Area, block), PAGE, NEXT | direction);
        describe(2, offset_of!(Area, outcome), 1, DEVICE_WRITES);
        let available = address(offset_of!(Area, available));
        // Always the chain that begins at descriptor 0.
        store(available + 4 + u64::from(self.requests) % SIZE as u64 * 2, 0u16);
        self.requests = self.requests.wrapping_add(1);
        // Stores are not seen out of order on this architecture.
        store(available + 2, self.requests);
        store(self.doorbell, 0u16);
    }

    /// Whether the last request is done.
    pub fn is_done(&self) -> bool {
        load::<u16>(address(offset_of!(Area, used)) + 2) == self.requests
    }

    /// Whether it succeeded.
    pub fn succeeded(&self) -> bool {
        load::<u8>(address(offset_of!(Area, outcome))) == 0
    }
}
