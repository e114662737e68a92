//! What kind of machine, and what the embedded guest does in it.

use super::super::choice::{CONTENTS, one_of};
use super::values::{memory, size};
use clap::Args;
use vmm::guest::Content;
use vmm::host::MAX_VCPUS;
use vmm::memory::PageSize;
use whimbrel::host::processes::{USUAL_MEMORY, USUAL_VCPUS};

/// What kind of machine.
#[derive(Args, Clone, Debug)]
pub struct MachineArgs {
    /// Guest memory, such as 512M or 4G; from 16M up
    #[arg(long, short = 'm', default_value = USUAL_MEMORY, value_parser = memory)]
    pub memory: u64,
    /// Virtual CPUs
    #[arg(long, short = 'c', default_value_t = USUAL_VCPUS, value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_VCPUS)))]
    pub vcpus: u32,
    /// Pages that back guest memory: 4k, or 2m and 1g huge pages
    #[arg(long, default_value = "4k")]
    pub pages: PageSize,
}

/// The embedded guest.
#[derive(Args, Clone, Debug)]
pub struct WorkloadArgs {
    /// Memory that the embedded guest keeps rewriting and checking; 0 for an idle guest
    #[arg(long, default_value = "0", value_parser = size)]
    pub working_set: u64,
    /// Pages that it rewrites each second; 0 for as many as it can
    #[arg(long, default_value_t = 0)]
    pub rate: u64,
    /// Timer interrupts a second on each of its virtual CPUs. The default is 1000 for an idle guest, which
    /// looks at the clock at each of them, and 100 for a guest that never sleeps
    #[arg(long, value_parser = clap::value_parser!(u32).range(20..=10_000))]
    pub timer_hz: Option<u32>,
    /// Memory to fill before it starts, in addition to its working set
    #[arg(long, default_value = "0", value_parser = size)]
    pub fill: u64,
    /// What to fill it with
    #[arg(long, default_value = "random", value_parser = one_of(CONTENTS))]
    pub fill_with: Content,
    /// Number of blocks of 4 KiB at the start of its first disk that it keeps writing and checking; their
    /// present content is lost
    #[arg(long, value_name = "BLOCKS", default_value_t = 0)]
    pub journal: u64,
}
