//! What makes a host of single machines: where their sockets are, and what the host's operator has decided.

pub mod claim;
pub mod config;
pub mod evacuation;
pub mod history;
pub mod inventory;
pub mod links;
pub mod resolve;
pub mod run_dir;
pub mod taps;
