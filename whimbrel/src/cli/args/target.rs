//! Which machine is meant.

use clap::Args;
use std::path::PathBuf;

#[derive(Args, Debug)]
pub struct Target {
    /// Unix socket of the machine's API
    #[arg(long)]
    pub api: PathBuf,
    /// Answer as JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Args, Debug)]
pub struct ResumeArgs {
    #[command(flatten)]
    pub target: Target,
    /// Resume a held guest; only if it certainly does not run at the destination
    #[arg(long)]
    pub force: bool,
}
