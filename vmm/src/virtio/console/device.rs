//! The console.

use super::ConsoleConfig;
use super::state::ConsoleState;
use crate::component::{self, Component, Kind};
use crate::error::Error;
use crate::serial::Output;
use crate::virtio::queue::{LockedQueue, QueueError, WaitFor};
use crate::virtio::{DeviceConfig, DeviceType, VirtioDevice};
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;
use vm_memory::Bytes;

/// Simple communication controller, other.
const CLASS: u32 = 0x07_8000;
const QUEUE_SIZE: u16 = 64;
/// The queue of buffers for what the guest is to read.
const RECEIVE: usize = 0;
/// Bytes copied at a time: as much as a pipe takes whole.
const PIECE: usize = 4096;

/// A console.
pub struct Console {
    output: Output,
    input: Option<File>,
    input_ended: AtomicBool,
}

impl Console {
    /// Opens what the console is connected to.
    ///
    /// # Errors
    /// [`Error::Console`] if a file cannot be opened.
    pub fn open(config: &ConsoleConfig) -> Result<Self, Error> {
        let (path, output) = config.output.open();
        let output = output.map_err(|source| Error::Console { path, source })?;
        let open = |path| open_input(path).map_err(|source| Error::Console { path: name(path), source });
        let input = config.input.as_deref().map(open).transpose()?;
        Ok(Console { output, input, input_ended: AtomicBool::new(false) })
    }

    /// Copies what the guest wrote to the output.
    fn transmit(&self, queue: &mut LockedQueue<'_>) -> Result<WaitFor, QueueError> {
        let mut output = self.output.clone();
        let mut bytes = [0; PIECE];
        while let Some(mut chain) = queue.pop()? {
            for buffer in chain.by_ref().filter(|descriptor| !descriptor.is_write_only()) {
                let (mut address, mut rest) = (buffer.addr(), buffer.len() as usize);
                while rest > 0 {
                    let piece = &mut bytes[..PIECE.min(rest)];
                    let refused = |_| QueueError::OUTSIDE;
                    queue.memory().read_slice(piece, address).map_err(refused)?;
                    // What the output cannot take is counted there.
                    let _ = output.write(piece);
                    address.0 = address.0.wrapping_add(piece.len() as u64);
                    rest -= piece.len();
                }
            }
            queue.add_used(chain.head_index(), 0)?;
        }
        Ok(WaitFor::Buffers)
    }

    /// Reads input into the guest's buffers, a chain for what one read gives.
    fn receive(&self, queue: &mut LockedQueue<'_>) -> Result<WaitFor, QueueError> {
        let Some(mut input) = self.input.as_ref().filter(|_| !self.input_ended.load(Ordering::Relaxed))
        else {
            // The buffers stay with the device for an input that may be there after a move.
            return Ok(WaitFor::Input);
        };
        while let Some(mut chain) = queue.pop()? {
            let head = chain.head_index();
            let Some(buffer) = chain.find(|descriptor| descriptor.is_write_only()) else {
                return Err(QueueError::Request("a receive buffer cannot be written"));
            };
            let mut bytes = [0; PIECE];
            match input.read(&mut bytes[..PIECE.min(buffer.len() as usize)]) {
                Ok(read @ 1..) => {
                    let refused = |_| QueueError::OUTSIDE;
                    queue.memory().write_slice(&bytes[..read], buffer.addr()).map_err(refused)?;
                    queue.add_used(head, read as u32)?;
                }
                ended => {
                    // Nothing to read now, or, if it is anything else, nothing ever again.
                    let later = matches!(ended, Err(error) if error.kind() == ErrorKind::WouldBlock);
                    self.input_ended.store(!later, Ordering::Relaxed);
                    queue.undo_pop(1);
                    return Ok(WaitFor::Input);
                }
            }
        }
        Ok(WaitFor::Buffers)
    }
}

fn name(path: &Path) -> String {
    path.display().to_string()
}

fn open_input(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).custom_flags(libc::O_NONBLOCK);
    // A named pipe that nobody has open for writing is at its end. Writers may come and go for as
    // long as we are one ourselves.
    options.write(std::fs::metadata(path)?.file_type().is_fifo());
    options.open(path)
}

impl VirtioDevice for Console {
    fn name(&self) -> &'static str {
        "console"
    }

    fn device_type(&self) -> DeviceType {
        DeviceType { id: VIRTIO_ID_CONSOLE as u16, class: CLASS }
    }

    fn config(&self) -> DeviceConfig {
        DeviceConfig::Console
    }

    // Without features the configuration space is empty: columns, rows and ports all belong to some.
    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; 2]
    }

    fn serve(&self, index: usize, queue: &mut LockedQueue<'_>) -> Result<WaitFor, QueueError> {
        if index == RECEIVE { self.receive(queue) } else { self.transmit(queue) }
    }

    fn input(&self, index: usize) -> Option<BorrowedFd<'_>> {
        let input = self.input.as_ref()?;
        (index == RECEIVE && !self.input_ended.load(Ordering::Relaxed)).then(|| input.as_fd())
    }

    fn output(&self) -> Option<Output> {
        Some(self.output.clone())
    }

    fn state_kind(&self) -> Kind {
        Kind::Console
    }

    fn save(&self, index: u8) -> Result<Component, component::Error> {
        Component::new(Kind::Console, index, &ConsoleState {})
    }

    fn load(&self, components: &[Component], index: u8) -> Result<(), component::Error> {
        component::payload::<ConsoleState>(components, Kind::Console, index).map(|ConsoleState {}| ())
    }
}
