//! Control messages, their encoding and their bounds.
//!
//! A message is one frame on the control link: `postcard` of [`Message`], nothing after it. A frame's length
//! is bounded before it is read ([`MAX_FRAME`]), bytes and texts in it cannot be longer than the frame, and
//! lists are bounded while they are decoded. So a peer cannot make us allocate more than a small multiple of
//! what it has sent.
//!
//! | bound | of what | most |
//! |---|---|---|
//! | [`MAX_FRAME`] | one frame | 64 MiB |
//! | [`MAX_DESCRIPTION`] | what `describe` returns | 4 MiB |
//! | [`MAX_STATE`] | what `save` returns | 1 GiB |
//! | [`MAX_STATE_PART`] | the part of it in one message | 48 MiB |
//! | [`MIN_STATE_PART`] | the same, of a part with more to follow | at least 16 MiB |
//! | [`MAX_REMARKS`] | what `after_run` returns | 1 MiB |
//! | [`MAX_NAME`] | a transport's name | 32 bytes |
//! | [`MAX_OFFERS`] | transports | 8 |
//! | [`MAX_SPANS`] | parts of the blackout on one side | 64 |
//! | [`MAX_REGIONS`] | memory regions | 64 |
//! | [`failure::MAX_MESSAGE`](crate::failure::MAX_MESSAGE) | a failure's text that is kept | 2 KiB |

use crate::bounded::{at_most, bytes};
use crate::digest::MAX_CHUNKS;
pub use crate::digest::PageHashes;
use crate::failure::{Code, Failure};
use crate::memory::{MAX_REGIONS, RegionLayout, check_layout};
use crate::report::Span;
use serde::{Deserialize, Serialize};

/// Largest frame in bytes.
pub const MAX_FRAME: usize = 64 << 20;

/// Largest machine description in bytes.
pub const MAX_DESCRIPTION: usize = 4 << 20;

/// Largest machine state in bytes. One that does not fit into one message travels in parts, if the peer takes
/// them. The receiver's buffer grows with what arrives.
pub const MAX_STATE: usize = 1 << 30;

/// Most bytes of a machine's state in one message.
pub const MAX_STATE_PART: usize = 48 << 20;

/// Fewest bytes in a part of a state that is to be followed by more: a state cannot come byte by byte.
pub const MIN_STATE_PART: usize = 16 << 20;

/// Longest remarks on a move in bytes.
pub const MAX_REMARKS: usize = 1 << 20;

/// Longest name of a transport in bytes.
pub const MAX_NAME: usize = 32;

/// Most transports that may be offered.
pub const MAX_OFFERS: usize = 8;

/// Most spans that one side may tell of.
pub const MAX_SPANS: usize = 64;

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
    /// Source, during pre-copy and the last round: the data plane of this name is broken and another takes
    /// its place. Answered by `Retired` once no write of it can land any more: what it still has in the
    /// network must not overwrite what the other one brings.
    Retire(String),
    /// Destination: it is fenced.
    Retired,
    /// Source, before `State`: the next bytes of a state that is longer than [`MAX_STATE_PART`]; `State` has
    /// the last. Only to a peer with [`STATE_IN_PARTS`].
    StatePart(StatePart),
    /// Destination, before `Prepared`: how long its part of the switchover takes, if its machine knows. Only
    /// to a peer with [`HANDOVER_ESTIMATE`].
    Estimate(Estimate),
    /// Source, before `State` with a digest: digests of the chunks of RAM. Only to a peer with
    /// [`NAMED_DIFFERENCES`].
    ChunkDigests(ChunkDigests),
    /// Destination, before it gives up as memory differs, to a source that has sent `ChunkDigests`: what it
    /// has in one of the chunks that differ.
    PageHashes(PageHashes),
    /// Source, during pre-copy: it is there, even if little or nothing of memory has come of late. It waits
    /// for its operator, or what its guest writes again and again is next to nothing. Only to a peer with
    /// [`SAYS_THAT_IT_WAITS`].
    Waiting,
}

/// Feature bit: takes a machine's state in parts.
pub const STATE_IN_PARTS: u64 = 1 << 0;

/// Feature bit: counts an [`Estimate`] in the predictions of the blackout.
pub const HANDOVER_ESTIMATE: u64 = 1 << 1;

/// Feature bit: names the pages that differ when a comparison of memory fails.
pub const NAMED_DIFFERENCES: u64 = 1 << 2;

/// Feature bit: a source that waits says so, and one that neither says so nor gets on is given up.
pub const SAYS_THAT_IT_WAITS: u64 = 1 << 3;

/// Feature bits of this program. A peer's unknown bits are ignored; both sides use the
/// intersection.
pub const FEATURES: u64 = STATE_IN_PARTS | HANDOVER_ESTIMATE | NAMED_DIFFERENCES | SAYS_THAT_IT_WAITS;

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
    #[serde(with = "bytes")]
    pub description: Vec<u8>,
    /// RAM regions, in the order in which extents number them.
    #[serde(deserialize_with = "at_most::<MAX_REGIONS, _, _>")]
    pub layout: Vec<RegionLayout>,
    /// Transports the source would use, best first.
    #[serde(deserialize_with = "at_most::<MAX_OFFERS, _, _>")]
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
    #[serde(deserialize_with = "at_most::<MAX_OFFERS, _, _>")]
    pub offers: Vec<Offer>,
    /// Microseconds that building the shadow machine took.
    pub build_us: u64,
}

/// What the destination expects of the switchover.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Estimate {
    /// Microseconds that its part takes: loading the state, taking the disks, running.
    pub handover_us: u64,
}

/// The paused machine.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct State {
    /// What the VMM saved, in its own encoding; what is left of it after the [`StatePart`]s.
    #[serde(with = "bytes")]
    pub state: Vec<u8>,
    /// Digest of all RAM, if the operator asked for the comparison.
    pub digest: Option<crate::digest::Digest>,
}

/// Bytes of a machine's state, to be followed by more.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct StatePart(#[serde(with = "bytes")] pub Vec<u8>);

/// Digests of the chunks of RAM.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ChunkDigests(
    /// Of each, in the order of regions and addresses.
    #[serde(deserialize_with = "at_most::<MAX_CHUNKS, _, _>")]
    pub Vec<u64>,
);

/// The destination could run the guest now.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Ready {
    /// What it did since the state arrived.
    #[serde(deserialize_with = "at_most::<MAX_SPANS, _, _>")]
    pub spans: Vec<Span>,
}

/// The guest runs at the destination.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Running {
    /// What it did since `Commit` arrived.
    #[serde(deserialize_with = "at_most::<MAX_SPANS, _, _>")]
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
            Message::Prepare(p) => match check_layout(&p.layout) {
                Ok(()) => Ok(Message::Prepare(p)),
                Err(why) => Err(malformed(&why.to_string())),
            },
            Message::State(s) if s.state.len() > MAX_STATE_PART => Err(malformed("state too long")),
            Message::StatePart(p) if !(MIN_STATE_PART..=MAX_STATE_PART).contains(&p.0.len()) => {
                Err(malformed("a part of a state that is too short or too long"))
            }
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
            Message::StatePart(_) => "StatePart",
            Message::Estimate(_) => "Estimate",
            Message::ChunkDigests(_) => "ChunkDigests",
            Message::PageHashes(_) => "PageHashes",
            Message::Waiting => "Waiting",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::PAGE_SIZE;

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

    /// Bytes as a list of numbers, which is what programs before this one sent.
    #[derive(Serialize)]
    enum Before {
        #[allow(dead_code)] // only its place counts
        Hello,
        #[allow(dead_code)]
        Welcome,
        Prepare(Vec<u8>, Vec<RegionLayout>, Vec<String>),
    }

    #[test]
    fn bytes_travel_as_they_always_did() {
        let layout = vec![RegionLayout { guest_address: 0, len: 16 << 20 }];
        let before = Before::Prepare(vec![1, 2, 3], layout, vec!["tcp".into()]);
        assert_eq!(postcard::to_stdvec(&before).unwrap(), prepare().encode());
    }

    #[test]
    fn a_list_with_too_many_elements_is_refused() {
        let names = |count| {
            let Message::Prepare(prepare) = prepare() else { unreachable!() };
            Message::Prepare(Prepare { transports: vec![String::new(); count], ..prepare }).encode()
        };
        assert!(Message::decode(&names(MAX_OFFERS)).is_ok());
        assert_eq!(Message::decode(&names(1 << 20)).unwrap_err().code, Code::PROTOCOL);
    }

    #[test]
    fn impossible_regions_are_refused() {
        let region = |guest_address| RegionLayout { guest_address, len: PAGE_SIZE };
        for layout in [vec![], vec![region(1)], vec![region(0), region(0)], vec![region(0); MAX_REGIONS + 1]]
        {
            let prepare = Prepare { description: vec![], layout, transports: vec![] };
            let frame = Message::Prepare(prepare).encode();
            assert_eq!(Message::decode(&frame).unwrap_err().code, Code::PROTOCOL);
        }
    }
}
