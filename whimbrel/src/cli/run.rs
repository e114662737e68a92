//! `whimbrel run`: a virtual machine in this process.

use super::Exit;
use super::args::RunArgs;
use super::process::{Keeper, quit_on_signals, stay};
use serde_json::json;
use std::path::PathBuf;
use std::sync::Arc;
use vmm::boot_disk;
use vmm::guest::{self, Workload};
use vmm::host::Host;
use vmm::loader::{Boot, Image};
use vmm::machine::{Machine, MachineConfig};
use vmm::sandbox;
use vmm::virtio::net::{Mac, NetConfig};
use vmm::virtio::{DeviceConfig, LocalConfig};
use whimbrel::api::server;
use whimbrel::instance::Instance;
use whimbrel::slot::Slot;

pub fn run(args: RunArgs) -> anyhow::Result<Exit> {
    sandbox::enter(args.process.seccomp)?;
    let slot = Arc::new(Slot::default());
    quit_on_signals(&slot)?;
    let _server =
        args.process.api.as_deref().map(|path| server::serve(path, Arc::clone(&slot))).transpose()?;
    let keeper = Keeper::new(&args.process)?;
    // What is wrong with certificates is said now, not when the guest is to move.
    args.process.security.security().connector()?;
    let boot = boot(&args)?;
    let host = Host::open()?;
    let mut config = MachineConfig::new(&host, args.machine.memory, args.machine.vcpus)?;
    config.pages = args.machine.pages;
    config.thp = args.process.thp;
    if let Some(name) = &args.process.name {
        config.name.clone_from(name);
    }
    config.serial = args.process.serial();
    config.devices = devices(&args)?;
    let taps = args.net.iter().map(|net| net.tap.clone()).collect();
    config.local = LocalConfig { taps, ..args.process.local() };
    let machine = Machine::build(&host, config)?;
    match boot {
        Some(boot) => machine.boot(&boot)?,
        None => {
            let workload = Workload {
                vcpus: args.machine.vcpus,
                working_set: args.workload.working_set,
                rate: args.workload.rate,
                hz: args.workload.timer_hz,
                fill: args.workload.fill,
                content: args.workload.fill_with,
                journal: args.workload.journal,
            };
            workload.boot(&machine)?;
        }
    }
    let _terminal = args.process.connect(&machine)?;
    machine.resume()?;
    let name = machine.config().name.clone();
    let told = name.clone();
    let security = args.process.security.security();
    let instance =
        Instance::new(name, Arc::new(machine), security, move |over| keeper.migration(&told, over));
    slot.put(Arc::clone(&instance));
    args.process.tell("running", "the guest runs", json!({ "pid": std::process::id() }));
    Ok(stay(&args.process, &instance))
}

/// What the command line says to boot; `None` for the embedded guest, which alone keeps journals.
fn boot(args: &RunArgs) -> anyhow::Result<Option<Boot>> {
    let file = |path: &PathBuf| Image::File(path.clone());
    Ok(match (&args.kernel, args.disk.first()) {
        (Some(kernel), _) => Some(Boot {
            kernel: file(kernel),
            initramfs: args.initramfs.as_ref().map(file),
            cmdline: args.cmdline.clone(),
        }),
        (None, Some(disk)) if args.workload.journal == 0 => Some(boot_disk::read(disk, 0, &args.cmdline)?),
        (None, _) => {
            let (vcpus, most) = (args.machine.vcpus, guest::MAX_VCPUS);
            anyhow::ensure!(
                usize::try_from(vcpus)? <= most,
                "{vcpus} virtual CPUs: the embedded guest has at most {most}; use fewer, or give a kernel"
            );
            None
        }
    })
}

/// The PCI devices that the command line asks for.
fn devices(args: &RunArgs) -> anyhow::Result<Vec<DeviceConfig>> {
    let rng = args.rng.then_some(DeviceConfig::Rng);
    let console = args.process.console.as_ref().map(|_| DeviceConfig::Console);
    let mut devices: Vec<_> = args.disk.iter().cloned().map(DeviceConfig::Block).collect();
    for (net, number) in args.net.iter().zip(0..) {
        let mac = net.mac.map_or_else(Mac::random, Ok)?;
        devices.push(DeviceConfig::Net(NetConfig { number, mac, pairs: net.pairs, negotiated: None }));
    }
    devices.extend(rng.into_iter().chain(console));
    Ok(devices)
}
