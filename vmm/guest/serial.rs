//! A few words on the serial port. Never waits long: a port that is never ready loses bytes.

use crate::cpu::{input, out};
use core::sync::atomic::{AtomicBool, Ordering};

const PORT: u16 = 0x3f8;

/// How often to look whether the port is ready, or whether another vCPU is done with its line.
const PATIENCE: usize = 1000;

/// Whether a vCPU prints a line.
static BUSY: AtomicBool = AtomicBool::new(false);

/// Part of a line.
pub enum Piece<'a> {
    Text(&'a str),
    Number(u64),
}

/// Prints a line. Those of different vCPUs do not mix, unless one gets stuck.
pub fn line(pieces: &[Piece<'_>]) {
    for _ in 0..PATIENCE {
        if !BUSY.swap(true, Ordering::Acquire) {
            break;
        }
        core::hint::spin_loop();
    }
    text("whimbrel guest: ");
    for piece in pieces {
        match piece {
            Piece::Text(piece) => text(piece),
            Piece::Number(piece) => number(*piece),
        }
    }
    text("\r\n");
    BUSY.store(false, Ordering::Release);
}

fn byte(byte: u8) {
    for _ in 0..PATIENCE {
        if input(PORT + 5) & 0x20 != 0 {
            break;
        }
    }
    out(PORT, byte);
}

fn text(text: &str) {
    text.bytes().for_each(byte);
}

fn number(number: u64) {
    let mut unit = 1;
    while number / unit >= 10 {
        unit *= 10;
    }
    while unit > 0 {
        byte(b'0' + (number / unit % 10) as u8);
        unit /= 10;
    }
}
