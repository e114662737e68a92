//! PCI: one bus with a host bridge and up to 31 functions, each of them a device of its own.
//!
//! Configuration space is reached through ports 0xcf8 and 0xcfc (mechanism 1), which every kernel
//! and every firmware can do. Functions are conventional ones with 256 bytes of it, so that a
//! memory-mapped window would give them nothing.
//!
//! Every function has one memory BAR, which is placed and enabled from the start as firmware would
//! have done it: function n has the nth slice of the window below 4 GiB. A guest may move it.
//! Interrupts are MSI-X messages only; no function has an interrupt pin.

pub mod config;
pub mod msix;
mod platform;
#[cfg(test)]
pub(crate) mod recorder;

pub use platform::{KvmPlatform, Platform};

use crate::lock::lock;
use crate::memory::layout;
use config::{ConfigSpace, Identity};
use serde::{Deserialize, Serialize};
use std::sync::{Arc, Mutex, MutexGuard};

/// The port that says what [`CONFIG_DATA_PORT`] is about.
pub const CONFIG_ADDRESS_PORT: u16 = 0xcf8;
/// The first of four ports of configuration data.
pub const CONFIG_DATA_PORT: u16 = 0xcfc;
/// The chipset's reset register, and the bit that resets.
const RESET_PORT: u16 = 0xcf9;
const RESET_CPU: u8 = 1 << 2;
/// Most functions beside the host bridge.
pub const MAX_FUNCTIONS: usize = 31;
/// Address space that each function's BAR may take, in bytes.
pub const BAR_SLICE: u64 = 1 << 20;

const _: () = assert!(
    layout::PCI_WINDOW_START + MAX_FUNCTIONS as u64 * BAR_SLICE <= layout::PCI_WINDOW_END,
    "the window has a slice for every function"
);

/// Red Hat's generic host bridge; nothing in it needs a driver.
const HOST_BRIDGE: Identity =
    Identity { vendor: 0x1b36, device: 0x0008, class: 0x06_0000, revision: 0, subsystem: (0, 0) };

/// A function on the bus.
pub trait Function: Send + Sync {
    /// A guest's read of configuration space.
    fn read_config(&self, offset: usize, data: &mut [u8]);
    /// A guest's write to configuration space.
    fn write_config(&self, offset: usize, data: &[u8]);
    /// The offset in its BAR that `address` is, if the BAR has it.
    fn offset(&self, address: u64) -> Option<u64>;
    /// A guest's read of its BAR.
    fn read_bar(&self, offset: u64, data: &mut [u8]);
    /// A guest's write to its BAR.
    fn write_bar(&self, offset: u64, data: &[u8]);
}

/// Where function number `index` has its BAR at first.
pub fn bar_address(index: usize) -> u32 {
    (layout::PCI_WINDOW_START + index as u64 * BAR_SLICE) as u32
}

/// What the bus itself saves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BusState {
    /// What was last written to [`CONFIG_ADDRESS_PORT`].
    address: u32,
}

/// The bus.
pub struct Bus {
    address: Mutex<BusState>,
    bridge: ConfigSpace,
    functions: Vec<Arc<dyn Function>>,
}

impl Bus {
    /// A bus with these functions, on device numbers 1 and up.
    pub fn new(functions: Vec<Arc<dyn Function>>) -> Self {
        debug_assert!(functions.len() <= MAX_FUNCTIONS);
        Bus { address: Mutex::default(), bridge: ConfigSpace::new(&HOST_BRIDGE), functions }
    }

    fn lock(&self) -> MutexGuard<'_, BusState> {
        lock(&self.address)
    }

    /// The device number and the register that the data port at `port` now is.
    fn target(&self, port: u16) -> Option<(usize, usize)> {
        let address = self.lock().address;
        let (enabled, bus, function) = (address >> 31 != 0, address >> 16 & 0xff, address >> 8 & 7);
        let register = (address & 0xfc) as usize + usize::from(port - CONFIG_DATA_PORT);
        (enabled && bus == 0 && function == 0).then_some(((address >> 11 & 0x1f) as usize, register))
    }

    /// Whether a guest's write to `port` asks for a reset by the byte between the two registers, which PCs'
    /// chipsets have as their reset register.
    pub fn asks_for_reset(port: u16, data: &[u8]) -> bool {
        port == RESET_PORT && data.first().is_some_and(|byte| byte & RESET_CPU != 0)
    }

    /// A guest's read of a port from [`CONFIG_ADDRESS_PORT`] to the last of the data ports.
    pub fn port_in(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        if port < CONFIG_DATA_PORT {
            // Only a whole register is one.
            if let (CONFIG_ADDRESS_PORT, [_, _, _, _]) = (port, &data) {
                data.copy_from_slice(&self.lock().address.to_le_bytes());
            }
            return;
        }
        match self.target(port) {
            Some((0, register)) => self.bridge.read(register, data),
            Some((device, register)) => {
                if let Some(function) = self.functions.get(device - 1) {
                    function.read_config(register, data);
                }
            }
            None => {}
        }
    }

    /// A guest's write to such a port.
    pub fn port_out(&self, port: u16, data: &[u8]) {
        if port < CONFIG_DATA_PORT {
            if let (CONFIG_ADDRESS_PORT, Ok(bytes)) = (port, data.try_into()) {
                self.lock().address = u32::from_le_bytes(bytes) & 0x80ff_fffc;
            }
            return;
        }
        // Nothing of the host bridge can be changed.
        if let Some((device @ 1.., register)) = self.target(port)
            && let Some(function) = self.functions.get(device - 1)
        {
            function.write_config(register, data);
        }
    }

    fn decode(&self, address: u64) -> Option<(&dyn Function, u64)> {
        self.functions.iter().find_map(|f| f.offset(address).map(|offset| (f.as_ref(), offset)))
    }

    /// A guest's read of memory where no RAM is.
    pub fn mmio_read(&self, address: u64, data: &mut [u8]) {
        match self.decode(address) {
            Some((function, offset)) => function.read_bar(offset, data),
            None => data.fill(0xff),
        }
    }

    /// A guest's write there.
    pub fn mmio_write(&self, address: u64, data: &[u8]) {
        if let Some((function, offset)) = self.decode(address) {
            function.write_bar(offset, data);
        }
    }

    /// The bus's own state; functions save theirs.
    pub fn save(&self) -> BusState {
        *self.lock()
    }

    /// Restores the bus's own state.
    pub fn load(&self, state: &BusState) {
        *self.lock() = *state;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Plain(Mutex<ConfigSpace>);

    impl Function for Plain {
        fn read_config(&self, offset: usize, data: &mut [u8]) {
            self.0.lock().unwrap().read(offset, data);
        }
        fn write_config(&self, offset: usize, data: &[u8]) {
            self.0.lock().unwrap().write(offset, data);
        }
        fn offset(&self, address: u64) -> Option<u64> {
            let offset = address.checked_sub(self.0.lock().unwrap().memory_bar()?)?;
            (offset < 0x1000).then_some(offset)
        }
        fn read_bar(&self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }
        fn write_bar(&self, _: u64, _: &[u8]) {}
    }

    fn bus() -> Bus {
        let identity = Identity { vendor: 0x1af4, device: 0x1044, ..HOST_BRIDGE };
        let mut space = ConfigSpace::new(&identity);
        space.set_memory_bar(bar_address(0), 0x1000);
        Bus::new(vec![Arc::new(Plain(Mutex::new(space)))])
    }

    fn read(bus: &Bus, device: u32, register: u32) -> u32 {
        bus.port_out(CONFIG_ADDRESS_PORT, &(1 << 31 | device << 11 | register).to_le_bytes());
        let mut data = [0; 4];
        bus.port_in(CONFIG_DATA_PORT, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn a_guest_finds_what_is_there_and_nothing_else() {
        let bus = bus();
        assert_eq!(read(&bus, 0, 0), 0x0008_1b36);
        assert_eq!(read(&bus, 0, 8) >> 8, 0x06_0000);
        assert_eq!(read(&bus, 1, 0), 0x1044_1af4);
        assert!((2..32).all(|device| read(&bus, device, 0) == u32::MAX));
        assert_eq!(read(&bus, 1 << 5, 0), u32::MAX, "another bus");
        let mut data = [0; 2];
        bus.port_out(CONFIG_ADDRESS_PORT, &(1u32 << 31 | 1 << 11).to_le_bytes());
        bus.port_in(CONFIG_DATA_PORT + 2, &mut data);
        assert_eq!(u16::from_le_bytes(data), 0x1044);
        bus.port_out(CONFIG_ADDRESS_PORT, &(1u32 << 11).to_le_bytes());
        bus.port_in(CONFIG_DATA_PORT, &mut data);
        assert_eq!(data, [0xff; 2], "not enabled");
    }

    #[test]
    fn the_address_register_is_a_whole_one_and_part_of_the_state() {
        let bus = bus();
        read(&bus, 1, 4);
        bus.port_out(CONFIG_ADDRESS_PORT + 1, &[6]);
        let mut data = [0; 4];
        bus.port_in(CONFIG_ADDRESS_PORT, &mut data);
        assert_eq!(u32::from_le_bytes(data), 1 << 31 | 1 << 11 | 4);
        let other = super::tests::bus();
        other.load(&bus.save());
        other.port_in(CONFIG_ADDRESS_PORT, &mut data);
        assert_eq!(u32::from_le_bytes(data), 1 << 31 | 1 << 11 | 4);
    }

    #[test]
    fn memory_is_decoded_where_the_bar_is() {
        let bus = bus();
        let mut data = [0; 4];
        bus.mmio_read(u64::from(bar_address(0)) + 7, &mut data);
        assert_eq!(data, [7; 4]);
        bus.mmio_read(u64::from(bar_address(0)) + 0x1000, &mut data);
        assert_eq!(data, [0xff; 4]);
        bus.port_out(CONFIG_ADDRESS_PORT, &(1u32 << 31 | 1 << 11 | 0x10).to_le_bytes());
        bus.port_out(CONFIG_DATA_PORT, &0xd123_0000u32.to_le_bytes());
        bus.mmio_read(0xd123_0009, &mut data);
        assert_eq!(data, [9; 4]);
    }
}
