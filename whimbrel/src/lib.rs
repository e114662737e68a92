//! What the `whimbrel` program is made of: one virtual machine as its operators see it, and the HTTP API
//! that they reach it by.
//!
//! [`instance`] is one machine of the `vmm` crate with at most one migration, [`api`] serves it and asks
//! it, and [`transports`] says which data planes a migration may use. [`node`] runs the program as a child
//! process, for benchmarks and tests. [`doctor`] examines the host.

pub mod api;
pub mod doctor;
pub mod instance;
pub mod node;
pub mod transports;
