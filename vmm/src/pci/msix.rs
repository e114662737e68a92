//! MSI-X: a table of messages, one for each thing that a function may interrupt for.
//!
//! A message is sent by a call (KVM_SIGNAL_MSI) rather than through an irqfd. KVM may hand an
//! irqfd's interrupt to a kernel thread of its own, and one that was still on its way when the
//! local APICs were saved would be lost to the guest. After the call the interrupt is in the APIC,
//! so a device that has come to rest has nothing left in flight; and a destination has no routes
//! to set up in the blackout. It costs the caller one system call, as the write to an irqfd does.

use super::Platform;
use crate::lock::lock;
use serde::{Deserialize, Serialize};
use std::sync::{Arc, Mutex, MutexGuard};

/// ID of the capability.
pub const CAPABILITY: u8 = 0x11;
/// Bytes of one table entry.
pub const ENTRY_LEN: usize = 16;

/// In the capability's control word.
const ENABLE: u16 = 1 << 15;
const MASK_ALL: u16 = 1 << 14;
/// In an entry's last word.
const MASKED: u32 = 1;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    address: u64,
    data: u32,
    control: u32,
}

/// Most vectors that a table can have.
const MAX_VECTORS: usize = 2048;

/// The table, saved. What is enabled and masked as a whole is in the configuration space.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MsixState {
    #[serde(deserialize_with = "migration::bounded::at_most::<MAX_VECTORS, _, _>")]
    entries: Vec<Entry>,
    /// One bit an entry: it would have been sent but for a mask.
    #[serde(deserialize_with = "migration::bounded::at_most::<MAX_VECTORS, _, _>")]
    pending: Vec<bool>,
}

impl MsixState {
    fn initial(vectors: usize) -> Self {
        let entry = Entry { address: 0, data: 0, control: MASKED };
        MsixState { entries: vec![entry; vectors], pending: vec![false; vectors] }
    }
}

struct Inner {
    enabled: bool,
    masked: bool,
    state: MsixState,
}

/// A function's MSI-X table.
pub struct Msix {
    platform: Arc<dyn Platform>,
    inner: Mutex<Inner>,
}

impl Msix {
    /// A table of `vectors` entries, all masked.
    pub fn new(platform: Arc<dyn Platform>, vectors: u16) -> Self {
        let state = MsixState::initial(vectors.into());
        Msix { platform, inner: Mutex::new(Inner { enabled: false, masked: false, state }) }
    }

    /// Body of the capability for a table of `vectors` entries and the bits that a guest may write:
    /// the table is at `table` and the pending bits are at `pending` in BAR 0.
    pub fn capability(vectors: u16, table: u32, pending: u32) -> ([u8; 10], [u8; 2]) {
        let mut body = [0; 10];
        body[..2].copy_from_slice(&(vectors - 1).to_le_bytes());
        body[2..6].copy_from_slice(&table.to_le_bytes());
        body[6..].copy_from_slice(&pending.to_le_bytes());
        (body, (ENABLE | MASK_ALL).to_le_bytes())
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        lock(&self.inner)
    }

    /// How many entries the table has.
    pub fn vectors(&self) -> u16 {
        self.lock().state.entries.len() as u16
    }

    /// Takes the capability's control word after the guest wrote to it.
    pub fn set_control(&self, control: u16) {
        let mut inner = self.lock();
        inner.enabled = control & ENABLE != 0;
        inner.masked = control & MASK_ALL != 0;
        (0..inner.state.entries.len()).for_each(|vector| self.deliver(&mut inner, vector));
    }

    /// Sends message `vector`, now or once it is unmasked. False if the guest does not use MSI-X.
    pub fn signal(&self, vector: u16) -> bool {
        let mut inner = self.lock();
        if !inner.enabled {
            return false;
        }
        let vector = usize::from(vector);
        if let Some(pending) = inner.state.pending.get_mut(vector) {
            *pending = true;
            self.deliver(&mut inner, vector);
        }
        true
    }

    /// Sends message `vector` if it is pending and nothing masks it.
    fn deliver(&self, inner: &mut Inner, vector: usize) {
        let entry = inner.state.entries[vector];
        if inner.enabled && !inner.masked && entry.control & MASKED == 0 && inner.state.pending[vector] {
            inner.state.pending[vector] = false;
            self.platform.send_message(entry.address, entry.data);
        }
    }

    /// A guest's read of the table.
    pub fn read_table(&self, offset: usize, data: &mut [u8]) {
        let inner = self.lock();
        for (byte, at) in data.iter_mut().zip(offset..) {
            *byte = inner.state.entries.get(at / ENTRY_LEN).map_or(0, |e| e.bytes()[at % ENTRY_LEN]);
        }
    }

    /// A guest's write to the table.
    pub fn write_table(&self, offset: usize, data: &[u8]) {
        let mut inner = self.lock();
        for (byte, at) in data.iter().zip(offset..) {
            let Some(entry) = inner.state.entries.get_mut(at / ENTRY_LEN) else { return };
            let mut bytes = entry.bytes();
            bytes[at % ENTRY_LEN] = *byte;
            *entry = Entry::of(&bytes);
        }
        // Unmasking sends what was pending.
        self.deliver(&mut inner, offset / ENTRY_LEN);
    }

    /// A guest's read of the pending bits.
    pub fn read_pending(&self, offset: usize, data: &mut [u8]) {
        let inner = self.lock();
        for (byte, at) in data.iter_mut().zip(offset..) {
            let bits = inner.state.pending.iter().skip(at * 8).take(8);
            *byte = bits.enumerate().fold(0, |byte, (bit, pending)| byte | u8::from(*pending) << bit);
        }
    }

    /// The table.
    pub fn save(&self) -> MsixState {
        self.lock().state.clone()
    }

    /// The table as at reset: disabled, with all entries masked.
    pub fn reset(&self) {
        let mut inner = self.lock();
        let vectors = inner.state.entries.len();
        *inner = Inner { enabled: false, masked: false, state: MsixState::initial(vectors) };
    }

    /// Restores the table, sending nothing: what was sent is in the saved APICs. `control` is the
    /// restored capability's control word.
    ///
    /// # Errors
    /// A text that says what is wrong with the state.
    pub fn load(&self, state: &MsixState, control: u16) -> Result<(), String> {
        let mut inner = self.lock();
        let own = inner.state.entries.len();
        if (state.entries.len(), state.pending.len()) != (own, own) {
            return Err(format!("{} interrupt vectors where {own} belong", state.entries.len()));
        }
        let (enabled, masked) = (control & ENABLE != 0, control & MASK_ALL != 0);
        *inner = Inner { enabled, masked, state: state.clone() };
        Ok(())
    }
}

impl Entry {
    fn bytes(&self) -> [u8; ENTRY_LEN] {
        let mut bytes = [0; ENTRY_LEN];
        bytes[..8].copy_from_slice(&self.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.data.to_le_bytes());
        bytes[12..].copy_from_slice(&self.control.to_le_bytes());
        bytes
    }

    fn of(bytes: &[u8; ENTRY_LEN]) -> Self {
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        Entry { address: u64::from(word(0)) | u64::from(word(4)) << 32, data: word(8), control: word(12) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::recorder::Recorder;

    fn table() -> (Arc<Recorder>, Msix) {
        let recorder = Arc::new(Recorder::default());
        let msix = Msix::new(recorder.clone(), 10);
        msix.write_table(16, &0xfee0_1000u64.to_le_bytes());
        msix.write_table(24, &0x4031u32.to_le_bytes());
        (recorder, msix)
    }

    #[test]
    fn a_message_is_sent_once_nothing_masks_it() {
        let (recorder, msix) = table();
        assert!(!msix.signal(1), "not enabled");
        msix.set_control(ENABLE | MASK_ALL);
        assert!(msix.signal(1) && msix.signal(1));
        let mut pending = [0; 3];
        msix.read_pending(0, &mut pending);
        assert_eq!(pending, [0b10, 0, 0]);
        msix.set_control(ENABLE);
        assert_eq!(recorder.messages(), [], "its entry is still masked");
        msix.write_table(28, &0u32.to_le_bytes());
        assert_eq!(recorder.messages(), [(0xfee0_1000, 0x4031)]);
        assert!(msix.signal(1));
        assert_eq!(recorder.messages().len(), 2);
        assert!(msix.signal(10) && msix.signal(u16::MAX), "no such vector: nothing happens");
        assert_eq!(recorder.messages().len(), 2);
    }

    #[test]
    fn the_table_is_read_as_written_and_harmless_beyond_its_end() {
        let (_, msix) = table();
        let mut entry = [0; 16];
        msix.read_table(16, &mut entry);
        assert_eq!(Entry::of(&entry), Entry { address: 0xfee0_1000, data: 0x4031, control: 1 });
        msix.write_table(9 * 16 + 12, &[0xff; 8]);
        msix.read_table(10 * 16, &mut entry);
        assert_eq!(entry, [0; 16]);
        msix.read_pending(4000, &mut entry);
    }

    #[test]
    fn what_was_pending_stays_so_over_a_move() {
        let (_, source) = table();
        source.set_control(ENABLE | MASK_ALL);
        source.write_table(28, &0u32.to_le_bytes());
        source.signal(1);
        let (recorder, target) = table();
        target.load(&source.save(), ENABLE | MASK_ALL).unwrap();
        assert_eq!(target.save(), source.save());
        assert_eq!(recorder.messages(), []);
        target.set_control(ENABLE);
        assert_eq!(recorder.messages(), [(0xfee0_1000, 0x4031)]);
        assert!(Msix::new(recorder, 9).load(&source.save(), 0).is_err());
    }
}
