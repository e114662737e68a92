//! The one error type that crosses the wire.
//!
//! Whatever ends a migration, on whichever side, must be readable by both operators. So a failure
//! is a code that programs can compare and a sentence that people can act on, and it travels as
//! it is. Errors that never leave their process (a socket's, a verb's) keep their own types in
//! their own crates and become a [`Failure`] where they end a migration.

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;

/// Longest message text that is sent or kept, in bytes. A peer's text is cut to this.
pub const MAX_MESSAGE: usize = 2048;

/// What kind of thing went wrong. Sent as its number, so that a code from a newer peer still
/// arrives (as [`Code::OTHER`]'s sibling with an unknown number) instead of breaking the decoder.
/// JSON has its name.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Code(pub u16);

macro_rules! codes {
    ($($(#[$doc:meta])* $name:ident = $number:literal, $text:literal;)*) => {
        impl Code {
            $($(#[$doc])* pub const $name: Code = Code($number);)*

            /// The code's name as it appears in JSON and in logs.
            pub fn name(self) -> &'static str {
                match self { $(Code::$name => $text,)* _ => "unknown" }
            }

            fn from_name(name: &str) -> Code {
                match name { $($text => Code::$name,)* _ => Code(u16::MAX) }
            }

            #[cfg(feature = "schema")]
            const NAMES: &[&str] = &[$($text,)* "unknown"];
        }
    };
}

codes! {
    /// Anything without a code of its own.
    OTHER = 0, "other";
    /// No common protocol version.
    VERSION = 1, "version";
    /// The peer broke the protocol: an unexpected, malformed or oversized message.
    PROTOCOL = 2, "protocol";
    /// The receiver is already taking in another guest, or the guest is already moving.
    BUSY = 3, "busy";
    /// The destination's CPU or KVM lacks something that the guest was promised.
    CPU = 4, "cpu";
    /// Not enough memory, or a memory layout that does not match.
    MEMORY = 5, "memory";
    /// A device the destination cannot provide.
    DEVICE = 6, "device";
    /// Device or vCPU state that cannot be saved, read or restored.
    STATE = 7, "state";
    /// The data plane failed.
    TRANSPORT = 8, "transport";
    /// The connection was lost.
    LINK = 9, "link";
    /// The peer did not answer in time.
    TIMEOUT = 10, "timeout";
    /// An operator cancelled.
    CANCELLED = 11, "cancelled";
    /// The guest dirties memory faster than it can be sent, within the limits that were set.
    NOT_CONVERGING = 12, "not-converging";
    /// Memory differs between the two sides after the last barrier.
    DIGEST = 13, "digest";
    /// The disks are locked by somebody else.
    DISKS = 14, "disks";
    /// The host cannot run virtual machines (no /dev/kvm, no permission, a missing capability).
    HOST = 15, "host";
    /// The guest has ended and can no longer be moved.
    GUEST_ENDED = 16, "guest-ended";
    /// One side does not trust the other, or only one of them encrypts.
    AUTHENTICATION = 17, "authentication";
    /// The guest exceeds what the destination's operator allows.
    LIMITS = 18, "limits";
}

impl Serialize for Code {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() {
            serializer.serialize_str(self.name())
        } else {
            serializer.serialize_u16(self.0)
        }
    }
}

impl<'de> Deserialize<'de> for Code {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        if deserializer.is_human_readable() {
            Ok(Code::from_name(&String::deserialize(deserializer)?))
        } else {
            u16::deserialize(deserializer).map(Code)
        }
    }
}

#[cfg(feature = "schema")]
impl utoipa::ToSchema for Code {}

#[cfg(feature = "schema")]
impl utoipa::PartialSchema for Code {
    fn schema() -> utoipa::openapi::RefOr<utoipa::openapi::Schema> {
        utoipa::openapi::ObjectBuilder::new()
            .schema_type(utoipa::openapi::schema::Type::String)
            .enum_values(Some(Code::NAMES.iter().copied()))
            .description(Some("What kind of failure it is."))
            .into()
    }
}

impl fmt::Debug for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}({})", self.name(), self.0)
    }
}

/// Why a migration, or a step of one, failed.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, thiserror::Error)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[error("{message}")]
#[non_exhaustive]
pub struct Failure {
    /// What kind of failure this is.
    pub code: Code,
    /// What happened and what to do about it, for a person. At most [`MAX_MESSAGE`] bytes.
    pub message: String,
}

impl Failure {
    /// A failure of kind `code`. Text past [`MAX_MESSAGE`] bytes is cut off.
    pub fn new(code: Code, message: impl fmt::Display) -> Self {
        Failure { code, message: printable(message.to_string()) }
    }

    /// The failure with its text made [`printable`].
    pub fn bounded(self) -> Self {
        Failure { message: printable(self.message), ..self }
    }

    /// The same failure with `context` put before its text.
    pub fn context(self, context: impl fmt::Display) -> Self {
        Failure::new(self.code, format_args!("{context}: {}", self.message))
    }
}

/// `text` cut to [`MAX_MESSAGE`] bytes, with a space in the place of each control character: what a peer says
/// reaches an operator's terminal.
pub fn printable(mut text: String) -> String {
    if text.len() > MAX_MESSAGE {
        let end = (0..=MAX_MESSAGE).rev().find(|i| text.is_char_boundary(*i)).unwrap_or(0);
        text.truncate(end);
    }
    if text.chars().any(char::is_control) {
        text = text.replace(char::is_control, " ");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_from_a_peer_is_bounded_and_printable() {
        let hostile = Failure { code: Code(999), message: "\x1b[2J".to_string() + &"é".repeat(4000) };
        let safe = hostile.bounded();
        assert!(safe.message.len() <= MAX_MESSAGE);
        assert!(!safe.message.contains('\x1b'));
        assert_eq!(safe.code.name(), "unknown");
    }
}
