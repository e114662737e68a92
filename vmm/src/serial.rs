//! The serial port: a 16550 at 0x3f8 on interrupt line 4, and where its bytes go.
//!
//! The port's registers are vm-superio's. Ours are the interrupt line, the output that never holds
//! a vCPU up, the input, and the saved form.

mod input;
mod output;

pub use output::Output;

use crate::ioctl;
use crate::lock::lock;
use input::Gate;
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use vm_superio::serial::SerialState as Registers;
use vm_superio::{Serial, Trigger};

/// Interrupt line of the first serial port, as on every PC.
pub const IRQ: u32 = 4;

/// Where the guest's serial output goes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum SerialOutput {
    /// This process's standard output.
    #[default]
    Stdout,
    /// A file or device, appended to; created if absent. A file becomes no longer than 256 MiB; what the
    /// guest writes beyond that is dropped until somebody truncates the file.
    File(PathBuf),
    /// Nowhere.
    Null,
}

impl SerialOutput {
    /// Opens it; the name, for messages, is where it goes.
    pub(crate) fn open(&self) -> (String, io::Result<Output>) {
        match self {
            SerialOutput::Stdout => {
                let file = io::stdout().as_fd().try_clone_to_owned();
                ("stdout".into(), file.map(|fd| Output::to(fd.into())))
            }
            SerialOutput::File(path) => {
                let file = OpenOptions::new().append(true).create(true).open(path);
                let regular = |file: &File| file.metadata().is_ok_and(|metadata| metadata.is_file());
                let output = |file| {
                    if regular(&file) { Output::bounded(file, output::MAX_FILE) } else { Output::to(file) }
                };
                (path.display().to_string(), file.map(output))
            }
            SerialOutput::Null => ("nowhere".into(), Ok(Output::null())),
        }
    }
}

/// The output of the port cannot be opened.
#[derive(Debug, thiserror::Error)]
#[error("cannot use {path} for the serial port: {source}")]
pub struct OpenError {
    /// The file.
    pub path: String,
    /// What the system said.
    pub source: io::Error,
}

/// The port's interrupt line.
///
/// It is raised by a call rather than through an irqfd: KVM injects an irqfd's interrupt from a
/// kernel thread some time later, and one that arrived after the interrupt controllers were saved
/// would be lost to the guest.
struct Line {
    vm: Arc<VmFd>,
    /// Unset while registers are restored: the saved interrupt controllers already know.
    live: AtomicBool,
}

#[derive(Clone)]
struct LineTrigger(Arc<Line>);

impl Trigger for LineTrigger {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        if !self.0.live.load(Ordering::Acquire) {
            return Ok(());
        }
        // ISA lines are edge-triggered: up and down again is one interrupt.
        for level in [true, false] {
            ioctl::retried!("KVM_IRQ_LINE", self.0.vm.set_irq_line(IRQ, level)).map_err(|e| e.source)?;
        }
        Ok(())
    }
}

type Port = Serial<LineTrigger, Gate, Output>;

/// The serial port as the machine has it.
pub struct SerialPort {
    port: Arc<Mutex<Port>>,
    line: Arc<Line>,
    gate: Gate,
    output: Output,
}

/// The port's saved registers, in this crate's own form: vm-superio's has no serialised one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialState {
    registers: [u8; 9],
    /// Bytes that arrived and the guest has not read yet.
    #[serde(with = "migration::bounded::bytes")]
    input: Vec<u8>,
}

impl SerialState {
    fn of(r: Registers) -> Self {
        SerialState {
            registers: [
                r.baud_divisor_low,
                r.baud_divisor_high,
                r.interrupt_enable,
                r.interrupt_identification,
                r.line_control,
                r.line_status,
                r.modem_control,
                r.modem_status,
                r.scratch,
            ],
            input: r.in_buffer,
        }
    }
}

impl SerialPort {
    /// A port with its registers at reset.
    ///
    /// # Errors
    /// If the output cannot be opened.
    pub fn new(vm: Arc<VmFd>, output: &SerialOutput) -> Result<Self, OpenError> {
        let (path, output) = output.open();
        let output = output.map_err(|source| OpenError { path, source })?;
        let line = Arc::new(Line { vm, live: AtomicBool::new(true) });
        let gate = Gate::default();
        let port = Serial::with_events(LineTrigger(line.clone()), gate.clone(), output.clone());
        Ok(SerialPort { port: Arc::new(Mutex::new(port)), line, gate, output })
    }

    /// A guest's write to register `offset`.
    pub fn write(&self, offset: u8, value: u8) {
        // What the output could not take is counted there; the guest goes on as on real hardware.
        let _ = lock(&self.port).write(offset, value);
    }

    /// A guest's read of register `offset`.
    pub fn read(&self, offset: u8) -> u8 {
        lock(&self.port).read(offset)
    }

    /// Where its bytes go.
    pub fn output(&self) -> &Output {
        &self.output
    }

    /// Feeds `input`, without what `filter` leaves out of it, to the guest from a thread of its own, until
    /// the input ends. Nothing is taken from it while the machine is paused, nor beyond what the port has
    /// room for: what the port has goes along with its state, what it has not is still in the input.
    ///
    /// # Errors
    /// If the thread cannot be started.
    pub fn attach_input(
        &self,
        input: File,
        filter: impl FnMut(u8) -> Option<u8> + Send + 'static,
    ) -> io::Result<()> {
        let (port, gate) = (Arc::downgrade(&self.port), self.gate.clone());
        let feed = move || input::feed(&port, &gate, input, filter);
        std::thread::Builder::new().name("serial-input".into()).spawn(feed)?;
        Ok(())
    }

    /// Takes no more input. When it returns, the port changes no more by itself.
    pub fn pause(&self) {
        let _port = lock(&self.port);
        self.gate.close();
    }

    /// Takes input again.
    pub fn resume(&self) {
        let _port = lock(&self.port);
        self.gate.open();
    }

    /// The port's registers.
    pub fn save(&self) -> SerialState {
        SerialState::of(lock(&self.port).state())
    }

    /// The registers of a port that nobody has used yet.
    pub fn initial() -> SerialState {
        SerialState::of(Registers::default())
    }

    /// Restores the port's registers, raising no interrupt.
    ///
    /// # Errors
    /// A text that says what is wrong with the state.
    pub fn load(&self, state: &SerialState) -> Result<(), String> {
        let [low, high, enable, identification, control, status, modem_control, modem_status, scratch] =
            state.registers;
        let registers = Registers {
            baud_divisor_low: low,
            baud_divisor_high: high,
            interrupt_enable: enable,
            interrupt_identification: identification,
            line_control: control,
            line_status: status,
            modem_control,
            modem_status,
            scratch,
            in_buffer: state.input.clone(),
        };
        let mut port = lock(&self.port);
        self.line.live.store(false, Ordering::Release);
        let trigger = LineTrigger(self.line.clone());
        let restored = Serial::from_state(&registers, trigger, self.gate.clone(), self.output.clone());
        self.line.live.store(true, Ordering::Release);
        *port = restored.map_err(|_| format!("{} bytes of input do not fit its FIFO", state.input.len()))?;
        Ok(())
    }
}
