//! Input, from wherever it comes to the port.

use super::Port;
use crate::lock::lock;
use crate::poll::poll;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::fd::AsRawFd;
use std::sync::{Arc, Condvar, Mutex, PoisonError, Weak};
use std::time::Duration;
use vm_superio::serial::SerialEvents;

/// As much as the port holds.
const FIFO_LEN: usize = 64;
/// The modem control register, and its bit by which the port hears nobody but itself.
const MODEM_CONTROL: u8 = 4;
const LOOPBACK: u8 = 1 << 4;
/// A guest that ends loopback does not say so: look again from time to time.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// Whether the port takes input. It changes only under the port's lock.
#[derive(Clone, Default)]
pub struct Gate(Arc<(Mutex<State>, Condvar)>);

#[derive(Default)]
struct State {
    /// The machine runs.
    open: bool,
    /// Something has changed since the input thread looked.
    changed: bool,
}

impl Gate {
    /// Lets input in.
    pub fn open(&self) {
        self.change(|state| state.open = true);
    }

    /// Keeps it out.
    pub fn close(&self) {
        self.change(|state| state.open = false);
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        let mut state = lock(&self.0.0);
        change(&mut state);
        state.changed = true;
        self.0.1.notify_one();
    }

    /// Whether it is open, as of now.
    fn look(&self) -> bool {
        let mut state = lock(&self.0.0);
        state.changed = false;
        state.open
    }

    /// Waits for a change since the last [`look`](Self::look).
    fn wait(&self) {
        let (state, changed) = &*self.0;
        let waited = changed.wait_timeout_while(lock(state), LOOK_AGAIN, |state| !state.changed);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }
}

impl SerialEvents for Gate {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        self.change(|_| ());
    }
}

/// Feeds a port until the input ends or the port is gone.
pub fn feed(
    port: &Weak<Mutex<Port>>,
    gate: &Gate,
    mut input: File,
    mut filter: impl FnMut(u8) -> Option<u8>,
) {
    let mut bytes = [0; FIFO_LEN];
    loop {
        if !poll([Some(input.as_raw_fd())], libc::POLLIN, -1) {
            continue;
        }
        let Some(port) = port.upgrade() else { return };
        let mut port = lock(&port);
        let listens = gate.look() && port.read(MODEM_CONTROL) & LOOPBACK == 0;
        let room = if listens { port.fifo_capacity().min(FIFO_LEN) } else { 0 };
        if room == 0 {
            drop(port);
            gate.wait();
            continue;
        }
        // There is something to read, or its end, unless somebody else reads the same terminal.
        match input.read(&mut bytes[..room]) {
            Ok(0) => return,
            Ok(read) => {
                let mut kept = 0;
                for at in 0..read {
                    if let Some(byte) = filter(bytes[at]) {
                        (bytes[kept], kept) = (byte, kept + 1);
                    }
                }
                // There is room, and what an interrupt fails by is not to be mended here.
                let _ = port.enqueue_raw_bytes(&bytes[..kept]);
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(_) => return,
        }
    }
}
