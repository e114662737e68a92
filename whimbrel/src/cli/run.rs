//! `whimbrel run`: a virtual machine in this process.

use super::Exit;
use super::args::{NetArg, RunArgs};
use super::choice::OnReboot;
use super::place::{Place, lock, without_name};
use super::process::{Keeper, quit_on_signals, stay};
use serde_json::json;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use vmm::boot_disk::{self, BootReader};
use vmm::guest::{self, Workload};
use vmm::host::Host;
use vmm::loader::{Boot, Image};
use vmm::machine::{DEFAULT_NAME, Machine, MachineConfig, Reboot};
use vmm::sandbox::{self, Needs};
use vmm::virtio::block::{Images, Opened};
use vmm::virtio::net::{Mac, NetConfig, TapConfig};
use vmm::virtio::{DeviceConfig, LocalConfig};
use whimbrel::host::config::HostConfig;
use whimbrel::host::taps::{Here, TapMaker, Wanted};
use whimbrel::instance::Instance;
use whimbrel::security::Encryption;
use whimbrel::slot::Slot;

pub fn run(args: RunArgs) -> anyhow::Result<Exit> {
    // Whatever takes privileges, or a process of its own, comes before this one gives up both.
    let host_config = args.process.host_config()?.unwrap_or_default();
    let boot = boot(&args, &host_config)?;
    let boot_reader =
        reboots_from_disk(&args).then(|| BootReader::start(args.process.seccomp)).transpose()?;
    // What is wrong with certificates is said now, not when the guest is to move.
    args.process.security.security().connector(Encryption::default())?;
    let images = Images::Opened(Opened::new(&args.disk, &host_config.images(Images::Any))?);
    let taps = taps(&args, &host_config)?;
    let keeper = Keeper::new(&args.process)?;
    let host = Host::open()?;
    let opens_taps = taps.iter().any(|tap| tap.opened.is_none());
    let mut config = MachineConfig::new(&host, args.machine.memory, args.machine.vcpus)?;
    if let Some(name) = &args.process.name {
        config.name.clone_from(name);
    }
    let place = Arc::new(Mutex::new(Place::new(&args.process)?));
    let needs = args.process.needs(&lock(&place));
    sandbox::enter(args.process.seccomp, &Needs { taps: opens_taps, ..needs })?;
    let slot = Arc::new(Slot::default());
    quit_on_signals(&slot)?;
    lock(&place).serve(&slot, Some(&config.name))?;
    let workload = Workload {
        vcpus: args.machine.vcpus,
        working_set: args.workload.working_set,
        rate: args.workload.rate,
        hz: args.workload.timer_hz,
        fill: args.workload.fill,
        content: args.workload.fill_with,
        journal: args.workload.journal,
    };
    config.pages = args.machine.pages;
    config.thp = args.process.thp;
    config.reboot = reboot(&args, boot.as_ref().unwrap_or(&workload.guest()))?;
    config.serial = args.process.serial();
    config.devices = devices(&args)?;
    config.local = LocalConfig { images, taps, boot_reader, ..args.process.local() };
    let machine = Machine::build(&host, config)?;
    match boot {
        Some(boot) => machine.boot(&boot)?,
        None => workload.boot(&machine)?,
    }
    args.process.tell_notices(&machine);
    let _terminal = args.process.connect(&machine)?;
    machine.resume()?;
    let name = machine.config().name.clone();
    let told = name.clone();
    let security = args.process.security.security();
    let keep = without_name(&place, move |over| keeper.migration(&told, over));
    let instance = Instance::new(name, Arc::new(machine), security, keep);
    slot.put(Arc::clone(&instance));
    args.process.tell("running", "the guest runs", json!({ "pid": std::process::id() }));
    Ok(stay(&args.process, &instance))
}

/// What the command line says to boot; `None` for the embedded guest, which alone keeps journals.
fn boot(args: &RunArgs, host: &HostConfig) -> anyhow::Result<Option<Boot>> {
    let file = |path: &PathBuf| Image::File(path.clone());
    Ok(match (&args.kernel, args.disk.first()) {
        (Some(kernel), _) => {
            let initramfs = args.initramfs.as_ref().map(file);
            Some(Boot { kernel: file(kernel), initramfs, cmdline: args.cmdline.clone() }.into_memory()?)
        }
        (None, Some(disk)) if args.workload.journal == 0 => Some(boot_disk::read_apart(
            disk,
            &host.images(Images::Any),
            0,
            &args.cmdline,
            args.process.seccomp,
        )?),
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

/// What follows when the guest resets its machine, which boots this at first.
fn reboot(args: &RunArgs, boot: &Boot) -> anyhow::Result<Reboot> {
    Ok(match args.on_reboot {
        OnReboot::Exit => Reboot::Never,
        // It may have another kernel by then.
        OnReboot::Reset if reboots_from_disk(args) => Reboot::Disk { cmdline: args.cmdline.clone() },
        OnReboot::Reset => Reboot::keeping(boot)?,
    })
}

/// Whether it boots from its first disk, and does so again when it is reset.
fn reboots_from_disk(args: &RunArgs) -> bool {
    let from_disk = args.kernel.is_none() && !args.disk.is_empty() && args.workload.journal == 0;
    from_disk && args.on_reboot == OnReboot::Reset
}

/// The taps of the interfaces. Those that are not named are made.
fn taps(args: &RunArgs, host: &HostConfig) -> anyhow::Result<Vec<TapConfig>> {
    let maker = Here { networks: host.networks.clone() };
    let machine = args.process.name.as_deref().unwrap_or(DEFAULT_NAME);
    let tap = |(net, number): (&NetArg, u8)| match &net.network {
        Some(network) if net.tap.name.is_empty() => {
            let (network, machine) = (network.clone(), machine.into());
            let tap = maker.make(&Wanted { network, machine, number, pairs: net.pairs });
            Ok(TapConfig { offloads: net.tap.offloads, ..tap.map_err(anyhow::Error::msg)? })
        }
        _ => Ok(net.tap.clone()),
    };
    args.net.iter().zip(0..).map(tap).collect()
}

/// The PCI devices that the command line asks for.
fn devices(args: &RunArgs) -> anyhow::Result<Vec<DeviceConfig>> {
    let rng = args.rng.then_some(DeviceConfig::Rng);
    let console = args.process.console.as_ref().map(|_| DeviceConfig::Console);
    let mut devices: Vec<_> = args.disk.iter().cloned().map(DeviceConfig::Block).collect();
    for (net, number) in args.net.iter().zip(0..) {
        let mac = net.mac.map_or_else(Mac::random, Ok)?;
        let network = net.network.clone();
        devices.push(DeviceConfig::Net(NetConfig {
            number,
            mac,
            pairs: net.pairs,
            negotiated: None,
            network,
        }));
    }
    devices.extend(rng.into_iter().chain(console));
    Ok(devices)
}
