//! `whimbrel receive`: waits for a virtual machine, then holds it as `run` does.

use super::Exit;
use super::args::{ProcessArgs, ReceiveArgs};
use super::process::{quit_on_signals, stay};
use super::terminal::Terminal;
use migration::destination::{Arrival, Migration};
use serde_json::json;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use transport_tcp::Listener;
use vmm::incoming::{IncomingHost, IncomingMachine, IncomingOptions};
use vmm::sandbox;
use vmm::virtio::LocalConfig;
use vmm::virtio::block::Images;
use whimbrel::api::server::{self, Slot};
use whimbrel::instance::{Instance, SOFTWARE};
use whimbrel::transports;

/// How long one wait for a caller lasts; there is no limit to how many there are.
const PATIENCE: Duration = Duration::from_secs(3600);

pub fn receive(args: ReceiveArgs) -> anyhow::Result<Exit> {
    sandbox::enter(args.process.seccomp)?;
    let slot = Arc::new(Slot::default());
    quit_on_signals(&slot)?;
    let _server =
        args.process.api.as_deref().map(|path| server::serve(path, Arc::clone(&slot))).transpose()?;
    // Whatever is missing on this host is said now, not when a guest arrives.
    let mut host = IncomingHost::open(IncomingOptions {
        serial: args.process.serial(),
        local: LocalConfig {
            images: Images::Below(args.disks.clone()),
            taps: args.net.clone(),
            ..args.process.local()
        },
        populate: args.populate,
    })?;
    // While nobody waits for it.
    transport_rdma::warm_up();
    let listener = Listener::bind(args.listen)?;
    let address = listener.local_addr();
    args.process.tell(
        "listening",
        &format!("waiting for a guest on {address}"),
        json!({ "address": address }),
    );
    loop {
        let Some(mut call) = listener.next_control(PATIENCE)? else { continue };
        let peer = call.peer();
        let transports = transports::destination(&call, &listener, args.busy_poll);
        let arrived = Migration::new(&mut host, &mut call)
            .transports(transports)
            .software(SOFTWARE)
            .run()
            .map(|arrival| welcome(&args.process, &slot, peer, arrival));
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
                args.process.tell(
                    "refused",
                    &format!("the guest from {peer} was not taken in: {why}"),
                    json!({ "from": peer, "why": why }),
                );
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
    slot: &Slot,
    peer: SocketAddr,
    arrival: Arrival<'_, IncomingMachine>,
) -> (Arc<Instance>, Option<Terminal>) {
    let machine = arrival.machine().machine();
    // The guest runs here by now: it goes on without a keyboard, if it must.
    let terminal = process.connect(&machine).unwrap_or_else(|error| {
        eprintln!("whimbrel: the guest's serial port has no input: {error:#}");
        None
    });
    let instance = Instance::new(process.name.clone(), machine);
    slot.put(Arc::clone(&instance));
    process.tell(
        "arrived",
        &format!("a guest has arrived from {peer} and runs"),
        json!({ "from": peer, "sender": arrival.sender() }),
    );
    arrival.conclude();
    (instance, terminal)
}
