//! The host service, and what it is told.

use super::target::{AnyHost, HostArgs};
use clap::Args;
use std::net::SocketAddr;
use std::path::PathBuf;

#[derive(Args, Debug)]
pub struct ServiceArgs {
    /// TOML file with what the host's operator has decided. Without it, guests come from this host alone
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Address where guests are taken in, in the place of that of the file; repeatable. Default:
    /// 127.0.0.1:4444
    #[arg(long, short = 'l', value_name = "ADDRESS")]
    pub listen: Vec<SocketAddr>,
    #[command(flatten)]
    pub host: HostArgs,
}

#[derive(Args, Debug)]
pub struct DrainArgs {
    /// Take guests in again
    #[arg(long)]
    pub off: bool,
    #[command(flatten)]
    pub host: AnyHost,
}

#[derive(Args, Debug)]
pub struct StartArgs {
    /// The machine's name: its file is NAME.toml in the folder of `machines` of the host's configuration
    pub name: String,
    #[command(flatten)]
    pub host: AnyHost,
    /// Answer as JSON
    #[arg(long)]
    pub json: bool,
}
