//! Boots the embedded guest, lets it rewrite its memory for a second, and prints what it has recorded.
//!
//! ```sh
//! cargo run -p whimbrel-vmm --example boot
//! ```

use std::error::Error;
use std::thread;
use std::time::Duration;
use whimbrel_vmm::guest::{self, Content, Workload};
use whimbrel_vmm::{Host, Machine, MachineConfig, SerialOutput};

const MIB: u64 = 1 << 20;

/// How long the guest works.
const TIME: Duration = Duration::from_secs(1);

fn main() -> Result<(), Box<dyn Error>> {
    let host = Host::open()?;
    let config = MachineConfig { serial: SerialOutput::Null, ..MachineConfig::new(&host, 64 * MIB, 1)? };
    let vcpus = config.vcpus;
    let machine = Machine::build(&host, config)?;
    let workload = Workload {
        vcpus,
        working_set: MIB,
        rate: 0,
        hz: None,
        fill: 0,
        content: Content::Random,
        journal: 0,
    };
    workload.boot(&machine)?;
    machine.resume()?;
    thread::sleep(TIME);
    machine.pause()?;
    let record = guest::testimony(machine.memory()).ok_or("the guest has recorded nothing")?;
    machine.stop();
    println!("{}: {} pages rewritten, {} verified", record.state, record.pages, record.verified);
    println!("99.9 % of the gaps in its time are at most {:.0} µs", record.usual_gaps.p999_us);
    match record.clean && record.pages > 0 {
        true => Ok(()),
        false => Err(format!("the guest found errors: {:?}", record.problems).into()),
    }
}
