//! The parts of the `whimbrel` program: one virtual machine as its operators see it, and the HTTP API by
//! which they reach it.
//!
//! [`instance`] is one machine of the `vmm` crate with at most one migration. [`slot`] is its place in a
//! process, which a receiver has before its guest. [`record`] keeps what became of each move. [`api`] is the
//! HTTP API, its server and its client. [`transports`] says which data planes a migration may use.
//! [`security`] says how connections are protected, and [`pki`] makes certificates. [`node`] runs the program
//! as a child process, for benchmarks and tests. [`doctor`] examines the host. [`host`] is what a host
//! knows of its machines. [`toml_file`] says what is wrong in an operator's file.

pub mod api;
pub mod doctor;
pub mod host;
pub mod instance;
pub mod node;
pub mod pki;
pub mod record;
pub mod security;
pub mod slot;
pub mod toml_file;
pub mod transports;
