//! How a machine ended.

use serde::Serialize;
use std::fmt;

/// How a machine ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "outcome", content = "detail")]
pub enum Outcome {
    /// The guest powered itself off.
    PoweredOff,
    /// The guest asked for a reset.
    Reset,
    /// The guest crashed: no further instruction of it can be run.
    Crashed(Crash),
    /// It was stopped from outside.
    Stopped,
}

/// Why a guest crashed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "cause")]
pub enum Crash {
    /// A fault while handling a fault while handling a fault.
    TripleFault {
        /// The vCPU.
        vcpu: u8,
    },
    /// KVM had to emulate an instruction and could not.
    Emulation {
        /// The vCPU.
        vcpu: u8,
        /// Address of the instruction.
        rip: u64,
        /// Its first bytes where KVM gave them, in hexadecimal.
        bytes: String,
    },
    /// Another internal error of KVM.
    Internal {
        /// The vCPU.
        vcpu: u8,
        /// KVM's number for it.
        suberror: u32,
        /// Where the vCPU was.
        rip: u64,
    },
    /// The CPU refused to enter the guest.
    Entry {
        /// The vCPU.
        vcpu: u8,
        /// The CPU's reason.
        reason: u64,
    },
    /// The guest said so itself.
    Reported {
        /// The vCPU.
        vcpu: u8,
    },
    /// It was reset and could not be booted again.
    NotRebooted {
        /// Why not.
        why: String,
    },
    /// Running the vCPU failed, or ended in a way this program does not know.
    Unknown {
        /// The vCPU.
        vcpu: u8,
        /// What happened.
        what: String,
    },
}

impl Outcome {
    /// Whether it is what a PC answers by starting over.
    pub(crate) fn is_reset(&self) -> bool {
        matches!(self, Outcome::Reset | Outcome::Crashed(Crash::TripleFault { .. }))
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Outcome::PoweredOff => f.write_str("the guest powered off"),
            Outcome::Reset => f.write_str("the guest asked for a reset"),
            Outcome::Crashed(crash) => write!(f, "the guest crashed: {crash}"),
            Outcome::Stopped => f.write_str("the machine was stopped"),
        }
    }
}

impl fmt::Display for Crash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Crash::TripleFault { vcpu } => write!(f, "triple fault on vCPU {vcpu}"),
            Crash::Emulation { vcpu, rip, bytes } => {
                write!(f, "KVM cannot emulate the instruction at {rip:#x} on vCPU {vcpu}")?;
                if bytes.is_empty() { Ok(()) } else { write!(f, " (bytes {bytes})") }
            }
            Crash::Internal { vcpu, suberror, rip } => {
                write!(f, "KVM internal error {suberror} on vCPU {vcpu} at {rip:#x}")
            }
            Crash::Entry { vcpu, reason } => {
                write!(f, "the CPU refused to enter the guest on vCPU {vcpu} (reason {reason:#x})")
            }
            Crash::Reported { vcpu } => write!(f, "reported by the guest on vCPU {vcpu}"),
            Crash::NotRebooted { why } => write!(f, "it was reset and cannot boot again: {why}"),
            Crash::Unknown { vcpu, what } => write!(f, "vCPU {vcpu} cannot continue: {what}"),
        }
    }
}
