//! One function's configuration space: 256 bytes. A mask says which bits the guest may change.
//!
//! A BAR needs nothing beyond that mask: its low bits are fixed, and a guest that writes all ones
//! to learn its size reads them back.

/// Length of a conventional configuration space.
pub const LEN: usize = 256;

const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const BAR0: usize = 0x10;
const CAPABILITIES: usize = 0x34;
const FIRST_CAPABILITY: usize = 0x40;

/// In the command register: memory BARs are decoded.
pub const MEMORY_ENABLE: u16 = 1 << 1;
/// In the command register: the function may write to RAM, and so send messages.
pub const BUS_MASTER: u16 = 1 << 2;
/// In the command register: no interrupt pin.
const INTX_DISABLE: u16 = 1 << 10;
const STATUS_CAPABILITIES: u16 = 1 << 4;

/// What a function is.
#[derive(Clone, Copy, Debug)]
pub struct Identity {
    /// Vendor.
    pub vendor: u16,
    /// Device.
    pub device: u16,
    /// Class, subclass and programming interface, from the top.
    pub class: u32,
    /// Revision.
    pub revision: u8,
    /// Subsystem vendor and device.
    pub subsystem: (u16, u16),
}

/// A configuration space.
#[derive(Clone)]
pub struct ConfigSpace {
    bytes: [u8; LEN],
    /// Bits that a guest may change.
    writable: [u8; LEN],
    next_capability: usize,
    /// Where the offset of the next capability goes.
    link: usize,
}

impl ConfigSpace {
    /// A function of a single-function device, without BARs and capabilities.
    pub fn new(identity: &Identity) -> Self {
        let mut space = ConfigSpace {
            bytes: [0; LEN],
            writable: [0; LEN],
            next_capability: FIRST_CAPABILITY,
            link: CAPABILITIES,
        };
        space.put(0x00, &identity.vendor.to_le_bytes());
        space.put(0x02, &identity.device.to_le_bytes());
        space.put(0x08, &[identity.revision]);
        space.put(0x09, &identity.class.to_le_bytes()[..3]);
        space.put(0x2c, &identity.subsystem.0.to_le_bytes());
        space.put(0x2e, &identity.subsystem.1.to_le_bytes());
        // Cache line size, latency timer, interrupt line: notes that kernels leave to themselves.
        for at in [0x0c, 0x0d, 0x3c] {
            space.writable[at] = 0xff;
        }
        let command = MEMORY_ENABLE | BUS_MASTER | INTX_DISABLE;
        space.writable[COMMAND..COMMAND + 2].copy_from_slice(&command.to_le_bytes());
        space
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// Makes BAR 0 a 32-bit memory BAR of `size` bytes, a power of two, placed at `address` and
    /// decoded from the start, as firmware would leave it.
    pub fn set_memory_bar(&mut self, address: u32, size: u32) {
        debug_assert!(size.is_power_of_two() && size >= 16 && address & (size - 1) == 0);
        self.put(BAR0, &address.to_le_bytes());
        self.writable[BAR0..BAR0 + 4].copy_from_slice(&(!(size - 1)).to_le_bytes());
        self.put(COMMAND, &(MEMORY_ENABLE | BUS_MASTER).to_le_bytes());
    }

    /// Adds a capability: its ID, what follows the two bytes that all capabilities begin with, and
    /// what of that a guest may change (zeros beyond `writable`'s end). Returns its offset.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> usize {
        let at = self.next_capability;
        let end = at + 2 + body.len();
        debug_assert!(end <= LEN && writable.len() <= body.len());
        self.bytes[self.link] = at as u8;
        self.put(at, &[id, 0]);
        self.put(at + 2, body);
        self.writable[at + 2..at + 2 + writable.len()].copy_from_slice(writable);
        let status = self.u16_at(STATUS) | STATUS_CAPABILITIES;
        self.put(STATUS, &status.to_le_bytes());
        self.link = at + 1;
        self.next_capability = end.next_multiple_of(4);
        at
    }

    /// A guest's read. Beyond the end all bits are ones.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        for (byte, at) in data.iter_mut().zip(offset..) {
            *byte = self.bytes.get(at).copied().unwrap_or(0xff);
        }
    }

    /// A guest's write: what it may not change stays.
    pub fn write(&mut self, offset: usize, data: &[u8]) {
        for (byte, at) in data.iter().zip(offset..LEN) {
            self.bytes[at] = self.bytes[at] & !self.writable[at] | byte & self.writable[at];
        }
    }

    /// Two bytes at `at`.
    pub fn u16_at(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.bytes[at], self.bytes[at + 1]])
    }

    /// Four bytes at `at`.
    pub fn u32_at(&self, at: usize) -> u32 {
        u32::from(self.u16_at(at)) | u32::from(self.u16_at(at + 2)) << 16
    }

    /// The command register.
    pub fn command(&self) -> u16 {
        self.u16_at(COMMAND)
    }

    /// Where BAR 0 is decoded, if it is.
    pub fn memory_bar(&self) -> Option<u64> {
        let enabled = self.command() & MEMORY_ENABLE != 0;
        enabled.then(|| u64::from(self.u32_at(BAR0) & !0xf))
    }

    /// All bytes, to be saved.
    pub fn save(&self) -> Vec<u8> {
        self.bytes.to_vec()
    }

    /// Restores what [`save`](Self::save) saved.
    ///
    /// # Errors
    /// A text that says what is wrong: the bytes are those of another function if they differ in
    /// anything that a guest cannot change.
    pub fn load(&mut self, saved: &[u8]) -> Result<(), String> {
        let saved: [u8; LEN] =
            saved.try_into().map_err(|_| format!("{} bytes of configuration space", saved.len()))?;
        let fixed = |at: &usize| (saved[*at] ^ self.bytes[*at]) & !self.writable[*at] != 0;
        if let Some(at) = (0..LEN).find(fixed) {
            return Err(format!("its configuration space differs from this function's at {at:#x}"));
        }
        self.bytes = saved;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const IDENTITY: Identity =
        Identity { vendor: 0x1af4, device: 0x1044, class: 0x00ff_0000, revision: 1, subsystem: (1, 2) };

    fn space() -> ConfigSpace {
        let mut space = ConfigSpace::new(&IDENTITY);
        space.set_memory_bar(0xc000_8000, 0x8000);
        space
    }

    #[test]
    fn a_bar_tells_its_size_and_is_decoded_only_when_enabled() {
        let mut space = space();
        assert_eq!(space.memory_bar(), Some(0xc000_8000));
        space.write(BAR0, &[0xff; 4]);
        assert_eq!(space.u32_at(BAR0), 0xffff_8000);
        space.write(BAR0, &0xd000_0007u32.to_le_bytes());
        assert_eq!(space.memory_bar(), Some(0xd000_0000));
        space.write(COMMAND, &[0xfd, 0xfb]);
        assert_eq!((space.memory_bar(), space.command()), (None, BUS_MASTER));
        space.write(0x14, &[0xff; 4]);
        assert_eq!(space.u32_at(0x14), 0, "there is no other BAR");
    }

    #[test]
    fn capabilities_are_chained_and_mostly_read_only() {
        let mut space = space();
        assert_eq!(space.u16_at(STATUS) & STATUS_CAPABILITIES, 0);
        let first = space.add_capability(0x09, &[9; 14], &[]);
        let second = space.add_capability(0x11, &[0; 10], &[0, 0xc0]);
        assert_eq!((first, second), (0x40, 0x50));
        let (head, next, last) = (space.bytes[CAPABILITIES], space.bytes[0x41], space.bytes[0x51]);
        assert_eq!((head, next, last), (0x40, 0x50, 0));
        space.write(0, &[0xff; LEN]);
        assert_eq!(space.u16_at(0), 0x1af4);
        assert_eq!((space.bytes[0x42], space.u16_at(0x52)), (9, 0xc000));
        assert_ne!(space.u16_at(STATUS) & STATUS_CAPABILITIES, 0);
    }

    #[test]
    fn accesses_of_any_place_and_length_are_harmless() {
        let mut space = space();
        let mut data = [0; 8];
        space.read(LEN - 2, &mut data);
        assert_eq!(data, [0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]);
        space.read(usize::MAX - 9, &mut data);
        space.write(LEN - 2, &[1; 8]);
        space.write(LEN + 8, &[1; 8]);
    }

    #[test]
    fn another_function_s_bytes_are_refused() {
        let mut source = space();
        source.write(BAR0, &0xd000_0000u32.to_le_bytes());
        let mut target = space();
        target.load(&source.save()).unwrap();
        assert_eq!(target.save(), source.save());
        assert_eq!(target.memory_bar(), Some(0xd000_0000));
        let mut other = source.save();
        other[2] ^= 1;
        assert!(target.load(&other).unwrap_err().contains("at 0x2"));
        assert!(target.load(&other[..255]).unwrap_err().contains("255 bytes"));
    }
}
