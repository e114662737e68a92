//! Control messages, their encoding and their bounds.
//!
//! A message is one frame on the control link: `postcard` of [`Message`], nothing after it. A
//! frame's length is bounded before it is read ([`MAX_FRAME`]), and within a frame no collection
//! can be longer than the bytes that are there, so a peer cannot make us allocate more than a
//! frame's worth.

use crate::failure::{Code, Failure};
use crate::memory::{MAX_REGIONS, PAGE_SIZE, RegionLayout};
use serde::{Deserialize, Serialize};

/// Largest frame in bytes.
pub const MAX_FRAME: usize = 64 << 20;

/// Largest machine description in bytes.
pub const MAX_DESCRIPTION: usize = 4 << 20;

/// Largest machine state in bytes.
pub const MAX_STATE: usize = 48 << 20;

/// Longest remarks on a move in bytes.
pub const MAX_REMARKS: usize = 1 << 20;

/// Longest name of a transport in bytes.
pub const MAX_NAME: usize = 32;

/// Most transports that may be offered.
pub const MAX_OFFERS: usize = 8;

/// How the engine calls itself where the VMM gives no name of its own.
pub(crate) const SOFTWARE: &str = concat!(env!("CARGO_PKG_NAME"), " ", env!("CARGO_PKG_VERSION"));

/// Everything that crosses the control link. The order of variants is part of the protocol.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Message {
    /// Source: who is calling.
    Hello(Hello),
    /// Destination: who is answering.
    Welcome(Hello),
    /// Source: what to build.
    Prepare(Prepare),
    /// Destination: the shadow machine stands; this is how to write into it.
    Prepared(Prepared),
    /// Source: the machine's state; all RAM is confirmed by a barrier.
    State(State),
    /// Destination: everything is loaded, the data plane is fenced, only `Commit` is missing.
    Ready(Ready),
    /// Source: the guest is yours. Nothing takes this back.
    Commit,
    /// Destination: the guest runs here.
    Running(Running),
    /// Source: this migration is over; the guest stays with me.
    Abort(Failure),
    /// Destination: I have discarded the shadow machine and shall never run this guest.
    GaveUp(Failure),
    /// Destination, after `Running`: what the guest said of its move.
    Epilogue(Epilogue),
    /// Source, during pre-copy and the last round: the data plane of this name is broken and another takes its
    /// place. Answered by `Retired` once no write of it can land any more: what it still has in the network
    /// must not overwrite what the other one brings.
    Retire(String),
    /// Destination: it is fenced.
    Retired,
}

/// Feature bits, an empty set so far. A peer's unknown bits are ignored; both sides use the
/// intersection.
pub const FEATURES: u64 = 0;

/// Greeting of either side.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Hello {
    /// Program name and version, for logs and reports.
    pub software: String,
    /// Feature bits of the sender.
    pub features: u64,
}

/// What the destination must build.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Prepare {
    /// The VMM's own description of its machine.
    pub description: Vec<u8>,
    /// RAM regions, in the order in which extents number them.
    pub layout: Vec<RegionLayout>,
    /// Transports the source would use, best first.
    pub transports: Vec<String>,
}

/// One transport the destination has, or why it has it not.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Offer {
    /// The transport's name.
    pub transport: String,
    /// How to connect, in the transport's own encoding; or what is missing.
    pub details: Result<Vec<u8>, Failure>,
}

/// The destination's answer to [`Prepare`].
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Prepared {
    /// One entry for each transport that was asked for.
    pub offers: Vec<Offer>,
    /// Microseconds that building the shadow machine took.
    pub build_us: u64,
}

/// The paused machine.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct State {
    /// What the VMM saved, in its own encoding.
    pub state: Vec<u8>,
    /// Digest of all RAM, if the operator asked for the comparison.
    pub digest: Option<crate::digest::Digest>,
}

/// A named part of the blackout on one side.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Span {
    /// What was being done.
    pub name: String,
    /// How long it took, in microseconds.
    pub us: u64,
}

/// The destination could run the guest now.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Ready {
    /// What it did since the state arrived.
    pub spans: Vec<Span>,
}

/// The guest runs at the destination.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Running {
    /// What it did since `Commit` arrived.
    pub spans: Vec<Span>,
}

/// Known only some time after the switchover.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Epilogue {
    /// What the destination's VMM has to say of the move, in its own words.
    pub remarks: Option<String>,
    /// CPU time in microseconds that the migration cost the destination.
    pub cpu_us: u64,
    /// Bytes of guest RAM that are resident at the destination.
    pub resident: u64,
}

impl Message {
    /// The frame.
    pub fn encode(&self) -> Vec<u8> {
        // Serialising to a Vec fails only for types that refuse to be serialised; ours are plain.
        postcard::to_stdvec(self).unwrap_or_default()
    }

    /// Reads a frame and checks every bound of its content.
    ///
    /// # Errors
    /// [`Code::PROTOCOL`] when the frame is no message, has bytes left over, or breaks a bound.
    pub fn decode(frame: &[u8]) -> Result<Self, Failure> {
        let malformed = |what: &str| {
            Failure::new(Code::PROTOCOL, format_args!("the peer sent a malformed message: {what}"))
        };
        let (message, rest) =
            postcard::take_from_bytes::<Message>(frame).map_err(|e| malformed(&e.to_string()))?;
        if !rest.is_empty() {
            return Err(malformed("bytes left over"));
        }
        match message {
            Message::Prepare(p) if p.description.len() > MAX_DESCRIPTION => {
                Err(malformed("description too long"))
            }
            Message::Prepare(p) if p.layout.is_empty() || p.layout.len() > MAX_REGIONS => {
                Err(malformed("no memory regions, or too many"))
            }
            Message::Prepare(p) if !p.layout.iter().all(sane) => {
                Err(malformed("a memory region that cannot be"))
            }
            Message::Prepare(p) if p.transports.len() > MAX_OFFERS => Err(malformed("too many transports")),
            Message::Prepared(p) if p.offers.len() > MAX_OFFERS => Err(malformed("too many offers")),
            Message::State(s) if s.state.len() > MAX_STATE => Err(malformed("state too long")),
            Message::Epilogue(e) if e.remarks.as_ref().is_some_and(|r| r.len() > MAX_REMARKS) => {
                Err(malformed("remarks too long"))
            }
            Message::Retire(name) if name.len() > MAX_NAME => Err(malformed("a transport's name too long")),
            Message::Abort(f) => Ok(Message::Abort(f.bounded())),
            Message::GaveUp(f) => Ok(Message::GaveUp(f.bounded())),
            message => Ok(message),
        }
    }

    /// The message's name, for error texts.
    pub fn name(&self) -> &'static str {
        match self {
            Message::Hello(_) => "Hello",
            Message::Welcome(_) => "Welcome",
            Message::Prepare(_) => "Prepare",
            Message::Prepared(_) => "Prepared",
            Message::State(_) => "State",
            Message::Ready(_) => "Ready",
            Message::Commit => "Commit",
            Message::Running(_) => "Running",
            Message::Abort(_) => "Abort",
            Message::GaveUp(_) => "GaveUp",
            Message::Epilogue(_) => "Epilogue",
            Message::Retire(_) => "Retire",
            Message::Retired => "Retired",
        }
    }
}

fn sane(region: &RegionLayout) -> bool {
    region.len > 0
        && region.len.is_multiple_of(PAGE_SIZE)
        && region.guest_address.is_multiple_of(PAGE_SIZE)
        && region.guest_address.checked_add(region.len).is_some_and(|end| end <= 1 << 52)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prepare() -> Message {
        Message::Prepare(Prepare {
            description: vec![1, 2, 3],
            layout: vec![RegionLayout { guest_address: 0, len: 16 << 20 }],
            transports: vec!["tcp".into()],
        })
    }

    #[test]
    fn round_trip() {
        for message in [prepare(), Message::Commit, Message::Abort(Failure::new(Code::BUSY, "busy"))] {
            assert_eq!(Message::decode(&message.encode()), Ok(message));
        }
    }

    #[test]
    fn every_truncation_and_every_flipped_bit_is_survived() {
        let frame = prepare().encode();
        for end in 0..frame.len() {
            assert!(Message::decode(&frame[..end]).is_err(), "cut at {end}");
        }
        for bit in 0..frame.len() * 8 {
            let mut damaged = frame.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            // Some flips still decode (a byte of the description); none may panic.
            let _ = Message::decode(&damaged);
        }
        let mut long = frame.clone();
        long.push(0);
        assert_eq!(Message::decode(&long).unwrap_err().code, Code::PROTOCOL);
    }

    #[test]
    fn an_announced_length_of_two_to_the_63_is_refused_without_allocating_it() {
        // Prepare (variant 2), then a description that claims 2^63 bytes.
        let frame = [2, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x01];
        assert_eq!(Message::decode(&frame).unwrap_err().code, Code::PROTOCOL);
    }

    #[test]
    fn impossible_regions_are_refused() {
        for (guest_address, len) in [(0, 0), (0, 4097), (1, 4096), (u64::MAX - 4095, 4096), (1 << 52, 4096)] {
            let message = Message::Prepare(Prepare {
                description: vec![],
                layout: vec![RegionLayout { guest_address, len }],
                transports: vec![],
            });
            assert!(Message::decode(&message.encode()).is_err(), "{guest_address:#x} + {len:#x}");
        }
    }
}
