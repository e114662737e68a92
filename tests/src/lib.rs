//! End-to-end tests: real processes, real KVM, real sockets, real faults. What they share is here; the
//! tests are in `tests/`.

pub mod command;
pub mod inspect;
pub mod program;
pub mod proxy;
pub mod rogue;
pub mod say;
pub mod sides;
