//! What makes a host of single machines: where their sockets are, and what the host's operator has decided.

pub mod claim;
pub mod config;
pub mod evacuation;
pub mod inventory;
pub mod run_dir;
