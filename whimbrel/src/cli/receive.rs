//! `whimbrel receive`: waits for a virtual machine, then holds it as `run` does.

use super::args::{ProcessArgs, ReceiveArgs};
use super::place::Place;
use super::process::{Keeper, quit_on_signals, stay};
use super::terminal::Terminal;
use super::{Exit, render};
use anyhow::Context;
use migration::destination::{Arrival, Migration};
use serde_json::json;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use transport_tcp::Listener;
use vmm::boot_disk::BootReader;
use vmm::incoming::{IncomingHost, IncomingMachine, IncomingOptions};
use vmm::sandbox;
use vmm::virtio::LocalConfig;
use vmm::virtio::block::Images;
use vmm::virtio::net;
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
    let keeper = Keeper::new(&args.process)?;
    for folder in &args.disks {
        let found = std::fs::read_dir(folder);
        found.with_context(|| format!("cannot use {} as a folder of disks", folder.display()))?;
    }
    for tap in &args.net {
        net::find_tap(&tap.name)?;
    }
    let security = args.process.security.security();
    anyhow::ensure!(
        security.may_listen(args.listen),
        "whoever reaches {} could send a guest: use --tls FOLDER (`whimbrel pki` makes certificates), or --insecure if \
         nobody can reach it whom you do not trust",
        args.listen
    );
    anyhow::ensure!(
        args.encryption != Encryption::Required || matches!(security, Security::Tls(_)),
        "encryption is required, and there are no certificates: use --tls FOLDER"
    );
    let protecting = security.protecting(args.allow.clone(), args.encryption)?;
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
        ..IncomingOptions::default()
    })?;
    let mut place = Place::new(&args.process)?;
    let mut needs = args.process.needs(&place);
    needs.write.extend(args.disks.iter().cloned());
    needs.taps = !args.net.is_empty();
    needs.low_port = (1..1024).contains(&args.listen.port());
    sandbox::enter(args.process.seccomp, &needs)?;
    let slot = Arc::new(Slot::receiver(args.process.name.clone()));
    quit_on_signals(&slot)?;
    place.serve(&slot, args.process.name.as_deref())?;
    // While nobody waits for it.
    transport_rdma::warm_up();
    let listener = Listener::bind_protected(1, args.listen, protecting)?;
    let address = listener.local_addr();
    listener.on_refused(|refused| {
        let more = match refused.untold {
            0 => String::new(),
            untold => format!(" ({untold} more before it)"),
        };
        eprintln!("whimbrel: the caller from {} was refused: {}{more}", refused.peer, refused.why);
    });
    args.process.tell(
        "listening",
        &format!("waiting for a guest on {address}"),
        json!({ "address": address }),
    );
    loop {
        let call = listener.next_control(PATIENCE)?;
        if slot.told_to_quit() {
            drop(call);
            slot.close();
            args.process.tell("quit", "told to quit", json!({}));
            return Ok(Exit::Done);
        }
        let Some(mut call) = call else { continue };
        let peer = call.peer();
        let secured = call.identity().map(Secured::from);
        let Some(monitor) = slot.begin(peer, secured.clone()) else { continue };
        let transports = transports::destination(&call, &listener, args.busy_poll, args.encryption);
        let arrived = Migration::new(&mut host, &mut call)
            .transports(transports)
            .software(SOFTWARE)
            .monitor(&monitor)
            .run()
            .map(|arrival| welcome(&args.process, &keeper, &mut place, &slot, peer, arrival));
        // Whoever reads the event may call at once.
        drop(call);
        match arrived {
            Ok((instance, terminal)) => {
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
                if args.once {
                    return Ok(Exit::Failed);
                }
            }
        }
    }
}

/// Makes an instance of a machine that has arrived, and tells the source how its guest fares. The terminal is
/// the guest's until it is dropped.
fn welcome(
    process: &ProcessArgs,
    keeper: &Keeper,
    place: &mut Place,
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
    if let Err(error) = place.name(&name) {
        eprintln!("whimbrel: nobody reaches the guest by its name: {error:#}");
    }
    let (told, keep) = (name.clone(), keeper.clone());
    let instance = Instance::new(name.clone(), machine, process.security.security(), move |over| {
        keep.migration(&told, over)
    });
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
