//! Options whose value is one of a few words.

use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use migration::policy::OnStall;
use vmm::guest::Content;
use vmm::memory::Thp;
use vmm::sandbox::Mode;
use vmm::virtio::block::Aio;
use whimbrel::api::model::TransportChoice;
use whimbrel::security::{Encryption, Ktls};

/// The words of an option: each with what it stands for and what the help says of it.
pub type Choices<T> = &'static [(&'static str, T, &'static str)];

/// `--fill-with`
pub const CONTENTS: Choices<Content> = &[
    ("random", Content::Random, "Random bytes"),
    ("repeating", Content::Repeating, "Eight bytes that repeat throughout a page; each page has others"),
    ("zero", Content::Zero, "Zeros"),
];

/// `--aio`
pub const AIO: Choices<Aio> = &[
    ("auto", Aio::Auto, "io_uring if the kernel has it, except for disks that use the page cache"),
    ("io_uring", Aio::IoUring, "Several requests at a time"),
    ("sync", Aio::Sync, "One request after the other, with system calls"),
];

/// `--seccomp`
pub const SECCOMP: Choices<Mode> = &[
    ("on", Mode::Enforce, "Other calls and files are refused, or the call ends the process"),
    ("log", Mode::Log, "Other calls are carried out, and the kernel logs them; all files can be opened"),
    ("off", Mode::Off, "All is allowed"),
];

/// What follows a reset that a guest asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnReboot {
    Reset,
    Exit,
}

/// `--on-reboot`
pub const ON_REBOOT: Choices<OnReboot> = &[
    ("reset", OnReboot::Reset, "The guest boots again"),
    ("exit", OnReboot::Exit, "The machine and its process end"),
];

/// `--thp`
pub const THP: Choices<Thp> = &[
    ("on", Thp::On, "Wherever the host allows them"),
    ("off", Thp::Off, "The kernel is advised against them"),
];

/// `--transport`
pub const TRANSPORTS: Choices<TransportChoice> = &[
    (
        "auto",
        TransportChoice::Auto,
        "RDMA if both sides can, otherwise TCP; continues over TCP if RDMA breaks",
    ),
    ("rdma", TransportChoice::Rdma, "RDMA only; fails if it is not available"),
    ("tcp", TransportChoice::Tcp, "TCP"),
];

/// `--encryption`
pub const ENCRYPTION: Choices<Encryption> = &[
    ("preferred", Encryption::Preferred, "Memory that travels over RDMA is not encrypted, all else is"),
    ("required", Encryption::Required, "Everything is encrypted, so RDMA is not used"),
    ("off", Encryption::Off, "Memory is not encrypted over TCP either; both sides have to say so"),
];

/// `--ktls`
pub const KTLS: Choices<Ktls> =
    &[("auto", Ktls::Auto, "The kernel encrypts memory, if it can"), ("off", Ktls::Off, "The program does")];

/// `--on-stall`
pub const ON_STALL: Choices<OnStall> = &[
    ("abort", OnStall::Abort, "Give up; the guest continues to run at the source"),
    ("switch", OnStall::Switch, "Switch over, with a blackout longer than the limit"),
    ("throttle", OnStall::Throttle, "Slow the guest's writers, just as much as it takes"),
];

/// The APIs that there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Api {
    Machine,
    Host,
}

/// `openapi`
pub const APIS: Choices<Api> = &[
    ("machine", Api::Machine, "The API of a machine, or of a process that waits for one"),
    ("host", Api::Host, "The API of the service of a host"),
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
