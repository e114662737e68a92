//! What makes a host of single machines: where their sockets are, what the host's operator has decided, and
//! the service by whose port they come.

mod bandwidth;
pub mod claim;
pub mod config;
pub mod evacuation;
pub mod events;
pub mod gate;
pub mod history;
pub mod inventory;
pub mod links;
mod log_file;
pub mod metrics;
mod page;
pub mod processes;
pub mod resolve;
pub mod run_dir;
pub mod server;
pub mod service;
pub mod taps;
pub mod units;
