//! ACPI's fixed power registers: powering off, and the power button.
//!
//! | port | register |
//! |---|---|
//! | 0x600 | PM1 status: bit 8, the power button was pressed; writing a bit clears it |
//! | 0x602 | PM1 enable: the events of which the guest wants to be told |
//! | 0x604 | PM1 control: writing SLP_EN powers the machine off |
//!
//! An event that is enabled holds ACPI's interrupt line up until the guest has cleared it.

use crate::lock::lock;
use serde::{Deserialize, Serialize};
use std::sync::{Mutex, MutexGuard};

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

/// In PM1 status and enable: the power button.
const POWER_BUTTON: u16 = 1 << 8;

/// In PM1 control: events raise the SCI. Always set, as there is no other mode.
const SCI_ENABLE: u16 = 1;

/// What a write asks of the machine as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Start over.
    Reset,
    /// End.
    PowerOff,
}

/// The registers as they are saved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PowerState {
    status: u16,
    enable: u16,
    control: u16,
}

impl PowerState {
    /// Whether an event holds the interrupt line up.
    fn raises(&self) -> bool {
        self.status & self.enable != 0
    }
}

/// Sets the level of ACPI's interrupt line.
type Line = Box<dyn Fn(bool) + Send + Sync>;

/// The registers.
pub struct Power {
    state: Mutex<PowerState>,
    line: Line,
}

impl Power {
    /// Registers as at reset, on an interrupt line.
    pub fn new(line: Line) -> Self {
        Power { state: Mutex::default(), line }
    }

    fn lock(&self) -> MutexGuard<'_, PowerState> {
        lock(&self.state)
    }

    /// Presses the power button. False if the guest does not listen to it, and nothing was done.
    pub fn press(&self) -> bool {
        let mut state = self.lock();
        let listens = state.enable & POWER_BUTTON != 0;
        if listens {
            state.status |= POWER_BUTTON;
            (self.line)(true);
        }
        listens
    }

    /// A guest's read at `offset` from [`EVENT_PORT`].
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        let state = *self.lock();
        let [s0, s1] = state.status.to_le_bytes();
        let [e0, e1] = state.enable.to_le_bytes();
        let [c0, c1] = (state.control | SCI_ENABLE).to_le_bytes();
        let registers = [s0, s1, e0, e1, c0, c1];
        for (byte, at) in data.iter_mut().zip(usize::from(offset)..) {
            *byte = registers.get(at).copied().unwrap_or(0xff);
        }
    }

    /// A guest's write at `offset` from [`EVENT_PORT`], and what it asks of the machine.
    pub fn write(&self, offset: u16, data: &[u8]) -> Option<Request> {
        let mut state = self.lock();
        let raised = state.raises();
        for (byte, at) in data.iter().zip(offset..) {
            let (register, shift) = match at {
                0 | 1 => {
                    state.status &= !(u16::from(*byte) << (at * 8));
                    continue;
                }
                2 | 3 => (&mut state.enable, (at - 2) * 8),
                4 | 5 => (&mut state.control, (at - 4) * 8),
                _ => continue,
            };
            *register = *register & !(0xff << shift) | u16::from(*byte) << shift;
        }
        if state.raises() != raised {
            (self.line)(!raised);
        }
        let sleep = state.control & SLEEP_ENABLE != 0;
        state.control &= !SLEEP_ENABLE;
        sleep.then_some(Request::PowerOff)
    }

    /// The registers.
    pub fn save(&self) -> PowerState {
        *self.lock()
    }

    /// The registers as at reset, and the line down.
    pub fn reset(&self) {
        *self.lock() = PowerState::default();
        (self.line)(false);
    }

    /// Restores the registers. The saved interrupt controllers know the line's level already.
    pub fn load(&self, state: &PowerState) {
        *self.lock() = PowerState { control: state.control & !SLEEP_ENABLE, ..*state };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    /// Registers, and every level that their line was set to.
    fn power() -> (Power, Arc<Mutex<Vec<bool>>>) {
        let levels = Arc::new(Mutex::new(Vec::new()));
        let line = Arc::clone(&levels);
        (Power::new(Box::new(move |level| line.lock().unwrap().push(level))), levels)
    }

    #[test]
    fn registers_keep_what_is_written_and_sleep_is_asked_for_once() {
        let (power, _) = power();
        assert_eq!(power.write(2, &0x0120u16.to_le_bytes()), None);
        assert_eq!(power.write(4, &0x1400u16.to_le_bytes()), None);
        let mut all = [0; 8];
        power.read(0, &mut all);
        assert_eq!(all, [0, 0, 0x20, 0x01, 0x01, 0x14, 0xff, 0xff]);
        assert_eq!(power.write(4, &0x3400u16.to_le_bytes()), Some(Request::PowerOff));
        assert_eq!(power.write(2, &[0, 0]), None);
        assert_eq!(power.write(5, &[0x20]), Some(Request::PowerOff), "by its upper byte alone");
    }

    #[test]
    fn the_button_holds_the_line_up_until_it_is_cleared_also_after_a_move() {
        let (power, levels) = self::power();
        assert!(!power.press(), "nobody listens");
        power.write(2, &POWER_BUTTON.to_le_bytes());
        assert!(power.press());
        assert_eq!(*levels.lock().unwrap(), [true]);
        let (moved, levels) = self::power();
        moved.load(&power.save());
        assert_eq!(moved.save(), power.save());
        let mut status = [0; 2];
        moved.read(0, &mut status);
        assert_eq!(u16::from_le_bytes(status), POWER_BUTTON);
        moved.write(0, &1u16.to_le_bytes());
        assert!(levels.lock().unwrap().is_empty(), "another bit was cleared");
        moved.write(0, &POWER_BUTTON.to_le_bytes());
        assert_eq!(*levels.lock().unwrap(), [false]);
        moved.read(0, &mut status);
        assert_eq!(status, [0; 2]);
    }
}
