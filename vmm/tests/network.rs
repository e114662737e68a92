//! Network interfaces of real machines: who says where a guest is, and when.

mod common;
#[path = "../src/virtio/net/wire.rs"]
mod wire;

use common::guests::{self, TICKS};
use common::{boot, copy_ram, peek, wait_above};
use migration::Code;
use migration::machine::{DestinationHost, DestinationMachine, SourceMachine};
use std::time::Duration;
use whimbrel_vmm::incoming::{IncomingHost, IncomingMachine, IncomingOptions};
use whimbrel_vmm::virtio::net::{Announcing, Mac, NetConfig, TapConfig};
use whimbrel_vmm::virtio::{DeviceConfig, LocalConfig};
use whimbrel_vmm::{Host, Machine, MachineConfig, SerialOutput};
use wire::{HEADER, Wire, add_tap, wait_up, with_taps};

/// The waits between rounds, in milliseconds: short, so that the test is.
const WAITS: [u64; 3] = [10, 30, 40];
const ROUNDS: usize = WAITS.len() + 1;

fn local(taps: &[&str]) -> LocalConfig {
    let taps = taps.iter().map(|name| TapConfig::named(*name)).collect();
    let [initial, step, most] = [10, 20, 40].map(Duration::from_millis);
    let announcing = Announcing { rounds: ROUNDS as u32, initial, step, most };
    LocalConfig { taps, announcing, ..LocalConfig::default() }
}

fn mac(number: u8) -> Mac {
    Mac([0x52, 0x54, 0, 0, 0, number])
}

/// A machine with an interface on each of these taps, whose guest knows of none of them.
fn machine(taps: &[&str]) -> Machine {
    let host = Host::open().unwrap();
    let net = |number| NetConfig { number, mac: mac(number + 1), pairs: 1, negotiated: None, network: None };
    let devices = (0..taps.len() as u8).map(net).map(DeviceConfig::Net).collect();
    let config = MachineConfig::new(&host, 16 << 20, 1).unwrap();
    let config = MachineConfig { serial: SerialOutput::Null, devices, local: local(taps), ..config };
    let machine = Machine::build(&host, config).unwrap();
    taps.iter().for_each(|tap| wait_up(tap));
    machine.boot(&boot(guests::ticker())).unwrap();
    Machine::resume(&machine).unwrap();
    machine
}

fn shadow(source: &Machine, taps: &[&str]) -> Result<IncomingMachine, migration::Failure> {
    let options =
        IncomingOptions { serial: SerialOutput::Null, local: local(taps), ..IncomingOptions::default() };
    let mut host = IncomingHost::open(options).unwrap();
    let shadow = host.build(&source.describe().unwrap(), &source.memory().ram().layout())?;
    taps.iter().for_each(|tap| wait_up(tap));
    Ok(shadow)
}

/// The addresses that RARP frames on this wire name, until none has come for a while.
fn announced(wire: &Wire) -> Vec<Mac> {
    let frames = std::iter::from_fn(|| wire.next(Duration::from_millis(300)));
    let named = |bytes: Vec<u8>| {
        let frame = &bytes[HEADER..];
        assert_eq!((&frame[..6], &frame[12..14]), (&[0xff; 6][..], &[0x80, 0x35][..]), "{frame:02x?}");
        assert_eq!((&frame[6..12], frame.len()), (&frame[22..28], 60));
        Mac(frame[6..12].try_into().unwrap())
    };
    frames.map(named).collect()
}

#[test]
fn the_network_is_told_by_whoever_has_the_guest_and_nobody_else() {
    with_taps(&["a0", "a1", "b0", "b1"], || {
        let wires = ["a0", "a1", "b0", "b1"].map(Wire::of);
        let said = || wires.each_ref().map(announced);
        let nothing = [const { Vec::new() }; 4];
        let source = machine(&["a0", "a1"]);
        assert_eq!(said(), nothing, "a guest that starts speaks for itself");
        let mut target = shadow(&source, &["b0", "b1"]).unwrap();
        SourceMachine::pause(&source).unwrap();
        copy_ram(&source, &target.machine());
        target.load(&SourceMachine::save(&source).unwrap()).unwrap();
        // Called off before it was given up: nobody ever had a reason to look for it elsewhere.
        SourceMachine::resume(&source).unwrap();
        assert_eq!(said(), nothing);
        // Given up and taken back: it may have run there for a moment.
        SourceMachine::pause(&source).unwrap();
        source.release_disk_locks().unwrap();
        source.take_disk_locks().unwrap();
        assert_eq!(said(), nothing);
        SourceMachine::resume(&source).unwrap();
        let [first, second] = [1, 2].map(|number| vec![mac(number); ROUNDS]);
        assert_eq!(said(), [first.clone(), second.clone(), vec![], vec![]]);

        SourceMachine::pause(&source).unwrap();
        source.release_disk_locks().unwrap();
        target.announce();
        assert_eq!(said(), nothing, "not before it runs");
        target.run().unwrap();
        target.announce();
        assert_eq!(said(), [vec![], vec![], first, second]);
        let machine = target.machine();
        wait_above(&machine, TICKS, peek(&machine, TICKS) + 2);
        // It has hardly arrived when it is paused: from then on nobody hears of it.
        target.announce();
        let frame = wires[3].receive().1;
        assert_eq!(frame[6..12], mac(2).0);
        Machine::pause(&machine).unwrap();
        let before = announced(&wires[3]).len();
        assert!(before < ROUNDS - 1, "{before}");
        drop((machine, target));
    });
}

#[test]
fn a_host_without_a_tap_for_each_interface_refuses() {
    with_taps(&["a0", "a1", "b0"], || {
        let source = machine(&["a0", "a1"]);
        let refused = |taps: &[&str]| shadow(&source, taps).err().unwrap();
        for (taps, message) in [
            (&[][..], "network interface 1 has no tap here"),
            (&["b0"], "network interface 2 has no tap here"),
            (&["b0", "b0"], "in use"),
            (&["b0", "b1"], "there is no tap b1"),
        ] {
            let refusal = refused(taps);
            assert_eq!(refusal.code, Code::DEVICE);
            assert!(refusal.message.contains(message), "{refusal}");
        }
        add_tap("b1", "");
        assert!(shadow(&source, &["b0", "b1"]).is_ok());
        wait_above(&source, TICKS, peek(&source, TICKS) + 2);
    });
}
