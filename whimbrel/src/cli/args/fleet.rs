//! What `whimbrel fleet` is told.

use clap::{Args, Subcommand};
use std::path::PathBuf;

#[derive(Args, Debug)]
pub struct FleetArgs {
    #[command(subcommand)]
    pub command: FleetCommand,
}

#[derive(Debug, Subcommand)]
pub enum FleetCommand {
    /// Make certificates, corosync.conf, its key and Pacemaker's configuration out of one file
    Init {
        /// TOML file that describes hosts, storages, fencing and machines
        file: PathBuf,
        /// Folder to make. In one that was made by this command, certificates and keys stay as they are
        folder: PathBuf,
        /// Do without fencing. Guests of a host that has died are then started nowhere until an operator says
        /// that it is off
        #[arg(long)]
        without_fencing: bool,
        /// How long new certificates are good
        #[arg(long, default_value_t = 365, value_parser = clap::value_parser!(u32).range(1..=36_500))]
        days: u32,
    },
}
