//! What a guest may have that arrives.

use super::values::size;
use clap::Args;
use vmm::limits::{Limits, NamePattern};

/// The most that a guest may have which arrives.
#[derive(Args, Clone, Debug, Default)]
pub struct LimitArgs {
    /// Most memory that an arriving guest may have. Without it, what the host has available
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub max_memory: Option<u64>,
    /// Most vCPUs that it may have. Without it, eight for each processor of the host
    #[arg(long, value_name = "N")]
    pub max_vcpus: Option<u32>,
    /// Most disks
    #[arg(long, value_name = "N")]
    pub max_disks: Option<usize>,
    /// Most network interfaces
    #[arg(long, value_name = "N")]
    pub max_nics: Option<usize>,
    /// Most entropy devices
    #[arg(long, value_name = "N")]
    pub max_rngs: Option<usize>,
    /// Most virtio consoles
    #[arg(long, value_name = "N")]
    pub max_consoles: Option<usize>,
    /// Name that an arriving guest may have, in which * stands for any text; repeatable. Without it, any
    #[arg(long, value_name = "NAME")]
    pub names: Vec<NamePattern>,
}

impl LimitArgs {
    pub fn limits(&self) -> Limits {
        Limits {
            memory: self.max_memory,
            vcpus: self.max_vcpus,
            disks: self.max_disks,
            nics: self.max_nics,
            rngs: self.max_rngs,
            consoles: self.max_consoles,
            names: self.names.clone(),
        }
    }
}
