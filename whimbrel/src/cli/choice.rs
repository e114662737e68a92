//! Options whose value is one of a few words.

use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use migration::policy::OnStall;
use vmm::guest::Content;
use vmm::sandbox::Mode;
use vmm::virtio::block::Aio;
use whimbrel::api::model::TransportChoice;

/// The words of an option: each with what it stands for and what the help says of it.
pub type Choices<T> = &'static [(&'static str, T, &'static str)];

/// `--fill-with`
pub const CONTENTS: Choices<Content> = &[
    ("random", Content::Random, "Random bytes"),
    ("repeating", Content::Repeating, "Eight bytes all over a page, others in the next"),
    ("zero", Content::Zero, "Zeros"),
];

/// `--aio`
pub const AIO: Choices<Aio> = &[
    ("auto", Aio::Auto, "By io_uring where it can be had, but for disks that use the page cache"),
    ("io_uring", Aio::IoUring, "Several of a queue at a time"),
    ("sync", Aio::Sync, "One after the other"),
];

/// `--seccomp`
pub const SECCOMP: Choices<Mode> = &[
    ("on", Mode::Enforce, "It is refused, or ends the process"),
    ("log", Mode::Log, "The kernel logs it"),
    ("off", Mode::Off, "Nothing"),
];

/// `--transport`
pub const TRANSPORTS: Choices<TransportChoice> = &[
    ("auto", TransportChoice::Auto, "The best that both sides have; falls back by itself"),
    ("rdma", TransportChoice::Rdma, "RDMA; fails where it cannot be had"),
    ("tcp", TransportChoice::Tcp, "TCP"),
];

/// `--on-stall`
pub const ON_STALL: Choices<OnStall> = &[
    ("abort", OnStall::Abort, "Give up; the guest runs on at the source"),
    ("switch", OnStall::Switch, "Switch over with a blackout over the limit"),
];

/// Parses one of `choices`.
pub fn one_of<T: Copy + Send + Sync + 'static>(choices: Choices<T>) -> impl TypedValueParser<Value = T> {
    let words = choices.iter().map(|(word, _, help)| PossibleValue::new(*word).help(*help));
    PossibleValuesParser::new(words).try_map(move |given| {
        let found = choices.iter().find(|(word, _, _)| *word == given);
        // The parser lets no other word pass.
        found.map(|(_, value, _)| *value).ok_or("no such word")
    })
}
