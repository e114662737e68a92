//! The I/O ports that are emulated here; the interrupt controllers and the timer are KVM's.
//!
//! | port | what |
//! |---|---|
//! | 0x64 | keyboard controller: writing 0xfe resets the machine |
//! | 0x80 | POST codes: ignored |
//! | 0x3f8 to 0x3ff | serial port |
//! | 0x604 | power: writing a word with bit 13 set (ACPI's SLP_EN) powers the machine off |
//!
//! All other ports, and memory where there is nothing, read as all ones and swallow writes.

use crate::serial::SerialPort;

/// First port of the serial port's eight.
pub const SERIAL_PORT: u16 = 0x3f8;
/// The keyboard controller's command port.
pub const RESET_PORT: u16 = 0x64;
/// The command that pulses the CPU's reset line.
pub const RESET_COMMAND: u8 = 0xfe;
/// The power control port.
pub const POWER_PORT: u16 = 0x604;
/// The bit in a word written to [`POWER_PORT`] that powers the machine off.
pub const POWER_OFF: u16 = 1 << 13;

/// What a write asks of the machine as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Start over.
    Reset,
    /// End.
    PowerOff,
}

/// The devices behind the port bus.
pub struct Devices {
    serial: SerialPort,
}

impl Devices {
    /// A bus with these devices.
    pub fn new(serial: SerialPort) -> Self {
        Devices { serial }
    }

    /// The serial port.
    pub fn serial(&self) -> &SerialPort {
        &self.serial
    }

    /// A guest's read. String instructions arrive as many accesses to one port.
    pub fn port_in(&self, port: u16, data: &mut [u8]) {
        match port {
            SERIAL_PORT..=0x3ff => {
                data.iter_mut().for_each(|byte| *byte = self.serial.read((port - SERIAL_PORT) as u8));
            }
            // Neither input nor output buffer full: the controller is ready for a command.
            RESET_PORT => data.fill(0),
            _ => data.fill(0xff),
        }
    }

    /// A guest's write, and what it asks of the machine.
    pub fn port_out(&self, port: u16, data: &[u8]) -> Option<Request> {
        match port {
            SERIAL_PORT..=0x3ff => {
                data.iter().for_each(|byte| self.serial.write((port - SERIAL_PORT) as u8, *byte));
                None
            }
            RESET_PORT => data.contains(&RESET_COMMAND).then_some(Request::Reset),
            POWER_PORT => match data {
                [low, high, ..] if u16::from_le_bytes([*low, *high]) & POWER_OFF != 0 => {
                    Some(Request::PowerOff)
                }
                _ => None,
            },
            _ => None,
        }
    }
}
