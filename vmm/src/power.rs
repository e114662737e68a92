//! ACPI's fixed power registers: powering off, and the events that this machine does not have yet.
//!
//! | port | register |
//! |---|---|
//! | 0x600 | PM1 status: no event ever happens |
//! | 0x602 | PM1 enable: keeps what is written, since kernels read it back |
//! | 0x604 | PM1 control: writing SLP_EN powers the machine off |

use crate::devices::Request;
use serde::{Deserialize, Serialize};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// First port of the PM1 event registers.
pub const EVENT_PORT: u16 = 0x600;
/// The PM1 control register.
pub const CONTROL_PORT: u16 = 0x604;
/// The last port of all.
pub const LAST_PORT: u16 = 0x605;
/// The bit in PM1 control that puts the machine into the chosen sleeping state: off is the only one.
pub const SLEEP_ENABLE: u16 = 1 << 13;
/// The sleeping state's number in PM1 control.
pub const SOFT_OFF: u8 = 5;
/// ACPI's interrupt line.
pub const SCI: u16 = 9;

/// In PM1 control: events raise the SCI. Always set, as there is no other mode.
const SCI_ENABLE: u16 = 1;

/// The registers as they are saved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PowerState {
    enable: u16,
    control: u16,
}

/// The registers.
#[derive(Default)]
pub struct Power(Mutex<PowerState>);

impl Power {
    fn lock(&self) -> MutexGuard<'_, PowerState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A guest's read at `offset` from [`EVENT_PORT`].
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        let state = *self.lock();
        let [e0, e1] = state.enable.to_le_bytes();
        let [c0, c1] = (state.control | SCI_ENABLE).to_le_bytes();
        let registers = [0, 0, e0, e1, c0, c1];
        for (byte, at) in data.iter_mut().zip(usize::from(offset)..) {
            *byte = registers.get(at).copied().unwrap_or(0xff);
        }
    }

    /// A guest's write at `offset` from [`EVENT_PORT`], and what it asks of the machine.
    pub fn write(&self, offset: u16, data: &[u8]) -> Option<Request> {
        let mut state = self.lock();
        for (byte, at) in data.iter().zip(offset..) {
            let (register, shift) = match at {
                2 | 3 => (&mut state.enable, (at - 2) * 8),
                4 | 5 => (&mut state.control, (at - 4) * 8),
                _ => continue,
            };
            *register = *register & !(0xff << shift) | u16::from(*byte) << shift;
        }
        let sleep = state.control & SLEEP_ENABLE != 0;
        state.control &= !SLEEP_ENABLE;
        sleep.then_some(Request::PowerOff)
    }

    /// The registers.
    pub fn save(&self) -> PowerState {
        *self.lock()
    }

    /// Restores the registers.
    pub fn load(&self, state: &PowerState) {
        *self.lock() = PowerState { control: state.control & !SLEEP_ENABLE, ..*state };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_keep_what_is_written_and_sleep_is_asked_for_once() {
        let power = Power::default();
        assert_eq!(power.write(2, &0x0120u16.to_le_bytes()), None);
        assert_eq!(power.write(4, &0x1400u16.to_le_bytes()), None);
        let mut all = [0; 8];
        power.read(0, &mut all);
        assert_eq!(all, [0, 0, 0x20, 0x01, 0x01, 0x14, 0xff, 0xff]);
        let restored = Power::default();
        restored.load(&power.save());
        assert_eq!(restored.save(), power.save());
        assert_eq!(power.write(4, &0x3400u16.to_le_bytes()), Some(Request::PowerOff));
        assert_eq!(power.write(2, &[0, 0]), None);
        assert_eq!(power.write(5, &[0x20]), Some(Request::PowerOff), "by its upper byte alone");
    }
}
