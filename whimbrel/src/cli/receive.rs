//! `whimbrel receive`: waits for a virtual machine, then holds it as `run` does.

use super::Exit;
use super::args::ReceiveArgs;
use super::process::{quit_on_signals, stay};
use migration::destination::{self, Timeouts};
use migration::link::ControlLink;
use serde_json::json;
use std::sync::Arc;
use std::time::Duration;
use transport_tcp::Listener;
use vmm::incoming::{IncomingHost, IncomingOptions};
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
        let mut transports = transports::destination(&call, &listener, args.busy_poll);
        let token = call.token();
        let taken = destination::receive(
            &mut host,
            &mut call,
            token,
            &mut transports,
            SOFTWARE,
            &Timeouts::default(),
        );
        match taken {
            Ok(mut arrival) => {
                let machine = arrival.machine.machine();
                // The guest runs here by now: it goes on without a keyboard, if it must.
                let terminal = args.process.connect(&machine);
                if let Err(error) = &terminal {
                    eprintln!("whimbrel: the guest's serial port has no input: {error:#}");
                }
                let instance = Instance::new(args.process.name.clone(), machine);
                slot.put(Arc::clone(&instance));
                args.process.tell(
                    "arrived",
                    &format!("a guest has arrived from {peer} and runs"),
                    json!({ "from": peer, "sender": arrival.sender }),
                );
                arrival.conclude(&mut call);
                drop((call, transports, listener));
                return Ok(stay(&args.process, &instance));
            }
            Err(why) => {
                // Whoever reads the event may call at once.
                drop((call, transports));
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
