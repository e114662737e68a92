//! `whimbrel receive`: waits for a virtual machine, then holds it as `run` does.

use super::args::{ProcessArgs, ReceiveArgs};
use super::arrivals::AtGate;
use super::place::{Place, SharedPlace, lock, without_name};
use super::process::{Keeper, quit_on_signals, stay};
use super::terminal::Terminal;
use super::{Exit, render};
use anyhow::Context;
use migration::destination::{Arrival, Migration};
use migration::link::ControlLink;
use serde_json::json;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use transport_tcp::Listener;
use vmm::admission::Admission;
use vmm::boot_disk::BootReader;
use vmm::incoming::{IncomingHost, IncomingMachine, IncomingOptions};
use vmm::sandbox;
use vmm::virtio::LocalConfig;
use vmm::virtio::block::Images;
use vmm::virtio::net;
use whimbrel::host::config::HostConfig;
use whimbrel::host::resolve::Resolver;
use whimbrel::host::taps::Beside;
use whimbrel::instance::{Instance, SOFTWARE};
use whimbrel::security::{Encryption, Secured, Security};
use whimbrel::slot::Slot;
use whimbrel::transports;

/// How long one wait for a caller lasts, after which a receiver looks whether it is to end.
const PATIENCE: Duration = Duration::from_millis(100);

pub fn receive(args: ReceiveArgs) -> anyhow::Result<Exit> {
    // Whatever is missing on this host is said now, not when a guest arrives. Whatever takes privileges comes
    // before this process gives them up, as does a process of its own.
    let boot_reader = Some(BootReader::start(args.process.seccomp)?);
    let host_config = args.process.host_config()?;
    let admission = host_config.as_ref().map(|host| admission(&args, host)).transpose()?;
    let keeper = Keeper::new(&args.process)?;
    let storages = host_config.iter().flat_map(|host| host.storage.values().map(|storage| &storage.path));
    for folder in args.disks.iter().chain(storages.clone()) {
        let found = std::fs::read_dir(folder);
        found.with_context(|| format!("cannot use {} as a folder of disks", folder.display()))?;
    }
    for tap in &args.net {
        net::find_tap(&tap.name)?;
    }
    let security = args.process.security.security();
    // Whoever sends connections here has looked at that himself.
    let exposed = args.listen.filter(|listen| !security.may_listen(*listen));
    anyhow::ensure!(
        exposed.is_none(),
        "whoever reaches {} could send a guest: use --tls FOLDER (`whimbrel pki` makes certificates), or --insecure if \
         nobody can reach it whom you do not trust",
        exposed.map(|listen| listen.to_string()).unwrap_or_default()
    );
    anyhow::ensure!(
        args.encryption != Encryption::Required || matches!(security, Security::Tls(_)),
        "encryption is required, and there are no certificates: use --tls FOLDER"
    );
    let protecting = security.protecting(args.allow.clone(), args.encryption)?;
    let place = Arc::new(Mutex::new(Place::new(&args.process)?));
    let at_gate = args.gate.as_ref().map(|_| Arc::new(AtGate::new(Arc::clone(&place), admission.clone())));
    let admission = at_gate.clone().map(|gate| gate as Arc<dyn Admission>).or(admission);
    let mut host = IncomingHost::open(IncomingOptions {
        serial: args.process.serial(),
        local: LocalConfig {
            images: Images::Below(args.disks.clone()),
            taps: args.net.clone(),
            boot_reader,
            ..args.process.local()
        },
        populate: args.populate,
        thp: args.process.thp,
        trust_storage: args.trust_storage,
        limits: args.limits.limits(),
        admission,
    })?;
    let mut needs = args.process.needs(&lock(&place));
    needs.write.extend(args.disks.iter().chain(storages).cloned());
    needs.taps = !args.net.is_empty();
    needs.low_port = args.listen.is_some_and(|listen| (1..1024).contains(&listen.port()));
    sandbox::enter(args.process.seccomp, &needs)?;
    let slot = Arc::new(Slot::receiver(args.process.name.clone()));
    quit_on_signals(&slot)?;
    lock(&place).serve(&slot, args.process.name.as_deref())?;
    // While nobody waits for it.
    transport_rdma::warm_up();
    let listener = match (&args.gate, &at_gate, args.listen) {
        (Some(path), Some(at_gate), _) => {
            let (listener, feed) = Listener::fed(1, protecting);
            at_gate.stand(path, feed)?;
            listener
        }
        (_, _, Some(listen)) => Listener::bind_protected(1, listen, protecting)?,
        _ => anyhow::bail!("say where to listen by --listen"),
    };
    listener.on_refused(|refused| eprintln!("whimbrel: {refused}"));
    if at_gate.is_none() {
        let address = listener.local_addr();
        let text = format!("waiting for a guest on {address}");
        args.process.tell("listening", &text, json!({ "address": address }));
    }
    loop {
        let call = listener.next_control(PATIENCE)?;
        if slot.told_to_quit() {
            drop(call);
            slot.close();
            args.process.tell("quit", "told to quit", json!({}));
            return Ok(Exit::Done);
        }
        let Some(mut call) = call else {
            if at_gate.as_ref().is_some_and(|at_gate| at_gate.is_over()) {
                slot.close();
                return Ok(Exit::Done);
            }
            continue;
        };
        if let Some(at_gate) = &at_gate {
            // Its lanes come here from now on.
            at_gate.session(call.token());
        }
        let peer = call.peer();
        let secured = call.identity().map(Secured::from);
        let Some(monitor) = slot.begin(peer, secured.clone()) else { continue };
        let transports = transports::destination(&call, &listener, args.busy_poll, args.encryption);
        let arrived = Migration::new(&mut host, &mut call)
            .transports(transports)
            .software(SOFTWARE)
            .monitor(&monitor)
            .run()
            .map(|arrival| welcome(&args.process, &keeper, &place, &slot, peer, arrival));
        // Whoever reads the event may call at once.
        drop(call);
        match arrived {
            Ok((instance, terminal)) => {
                if let Some(at_gate) = &at_gate {
                    at_gate.settled(instance.name(), instance.machine().config().memory);
                }
                drop(listener);
                let exit = stay(&args.process, &instance);
                drop(terminal);
                return Ok(exit);
            }
            Err(why) => {
                let arrival = slot.end(Err(why.clone()));
                args.process.tell(
                    "refused",
                    &format!(
                        "the guest from {} was not taken in: {why}",
                        render::from(peer, secured.as_ref())
                    ),
                    json!({ "from": peer, "secured": secured, "why": why, "arrival": arrival }),
                );
                if let Some(arrival) = arrival {
                    keeper.arrival(args.process.name.as_deref().unwrap_or_default(), &arrival);
                }
                // At a gate another process waits by now.
                if args.once || at_gate.is_some() {
                    return Ok(Exit::Failed);
                }
            }
        }
    }
}

/// What the names that guests bring are on this host. Taps are made by a process of its own, which starts
/// now.
fn admission(args: &ReceiveArgs, host: &HostConfig) -> anyhow::Result<Arc<dyn Admission>> {
    let maker = Beside::start(host.networks.clone(), args.process.seccomp);
    let maker = Box::new(maker.context("cannot start the process that makes taps")?);
    let images = Images::Below(args.disks.clone());
    Ok(Arc::new(Resolver::new(host, args.net.clone(), images, maker)))
}

/// Makes an instance of a machine that has arrived, and tells the source how its guest fares. The terminal is
/// the guest's until it is dropped.
fn welcome(
    process: &ProcessArgs,
    keeper: &Keeper,
    place: &SharedPlace,
    slot: &Slot,
    peer: SocketAddr,
    arrival: Arrival<'_, IncomingMachine>,
) -> (Arc<Instance>, Option<Terminal>) {
    let machine = arrival.machine().machine();
    process.tell_notices(&machine);
    // The guest runs here by now: it goes on without a keyboard, if it must.
    let terminal = process.connect(&machine).unwrap_or_else(|error| {
        eprintln!("whimbrel: the guest's serial port has no input: {error:#}");
        None
    });
    let what = if machine.stays_paused() { "is paused, as it was there" } else { "runs" };
    let name = process.name.as_ref().unwrap_or(&machine.config().name).clone();
    if let Err(error) = lock(place).name(&name) {
        eprintln!("whimbrel: nobody reaches the guest by its name: {error:#}");
    }
    let (told, keep) = (name.clone(), keeper.clone());
    let keep = without_name(place, move |over| keep.migration(&told, over));
    let instance = Instance::new(name.clone(), machine, process.security.security(), keep);
    slot.put(Arc::clone(&instance));
    let story = slot.end(Ok(arrival.sender()));
    let secured = story.as_ref().and_then(|story| story.secured.as_ref());
    let figures = story.as_ref().map(render::arrival).unwrap_or_default();
    process.tell(
        "arrived",
        &format!("a guest has arrived from {} and {what}, {name}; {figures}", render::from(peer, secured)),
        json!({ "from": peer, "secured": secured, "sender": arrival.sender(), "name": name, "arrival": story }),
    );
    arrival.conclude();
    if let Some(story) = story {
        keeper.arrival(&name, &story);
    }
    (instance, terminal)
}
