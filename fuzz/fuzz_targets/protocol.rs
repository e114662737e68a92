//! Both engines as they are, each with a peer that sends any messages: who runs the guest is checked by the
//! rules of ownership.

#![no_main]

use libfuzzer_sys::fuzz_target;
use migration::Failure;
use migration::cpu::CpuTime;
use migration::dirty::DirtySet;
use migration::link::{ControlLink, LinkError};
use migration::machine::{DestinationHost, DestinationMachine, SourceMachine};
use migration::memory::{Extent, Ram, RegionLayout};
use migration::message::Message;
use migration::report::Verdict;
use migration::transport::{
    DestinationPlane, DestinationTransport, Interrupt, Lane, LaneStats, PlaneError, Secret, Session,
    SourcePlane, SourceTransport, Token,
};
use migration::{Code, destination, source};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;
use whimbrel_fuzz::Input;

/// What has happened, in its order.
#[derive(Clone, Default)]
struct Story(Arc<Mutex<Vec<&'static str>>>);

impl Story {
    fn tell(&self, what: &'static str) {
        self.0.lock().unwrap().push(what);
    }

    fn at(&self, what: &str) -> Option<usize> {
        self.0.lock().unwrap().iter().position(|told| *told == what)
    }

    fn last(&self, what: &str) -> Option<usize> {
        self.0.lock().unwrap().iter().rposition(|told| *told == what)
    }
}

/// A link whose other end sends what the input has.
struct Tape<'a> {
    input: Input<'a>,
    story: Story,
}

impl ControlLink for Tape<'_> {
    fn token(&self) -> Token {
        Token([7; 16])
    }

    fn secret(&self) -> Secret {
        Secret::NONE
    }

    fn send(&mut self, frame: &[u8]) -> Result<(), LinkError> {
        match Message::decode(frame).expect("what this side sends is a message") {
            Message::Commit => self.story.tell("said Commit"),
            Message::GaveUp(_) => self.story.tell("said GaveUp"),
            _ => {}
        }
        Ok(())
    }

    fn receive(&mut self, _: Duration) -> Result<Option<Vec<u8>>, LinkError> {
        let len = self.input.word().ok_or(LinkError::Closed)?;
        let frame = self.input.bytes(len.into()).to_vec();
        match Message::decode(&frame) {
            Ok(Message::Commit) => self.story.tell("heard Commit"),
            Ok(Message::Running(_)) => self.story.tell("heard Running"),
            Ok(Message::GaveUp(_)) => self.story.tell("heard GaveUp"),
            _ => {}
        }
        Ok(Some(frame))
    }
}

fn ram() -> Arc<Ram> {
    static RAM: OnceLock<Arc<Ram>> = OnceLock::new();
    let layout = RegionLayout { guest_address: 0, len: 1 << 20 };
    RAM.get_or_init(|| Arc::new(Ram::allocate(&[layout]).expect("memory"))).clone()
}

/// The machine on either side.
struct Vm {
    ram: Arc<Ram>,
    story: Story,
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.story.tell("dropped");
    }
}

struct Host(Story);

impl DestinationHost for Host {
    type Machine = Vm;

    fn build(&mut self, _: &[u8], layout: &[RegionLayout]) -> Result<Vm, Failure> {
        let story = self.0.clone();
        if layout == ram().layout() {
            return Ok(Vm { ram: ram(), story });
        }
        // Address space costs nothing, but there is an end to it.
        if layout.iter().map(|region| region.len).sum::<u64>() > 1 << 30 {
            return Err(Failure::new(Code::MEMORY, "too large"));
        }
        Ok(Vm { ram: Arc::new(Ram::allocate(layout)?), story })
    }
}

impl DestinationMachine for Vm {
    fn ram(&self) -> Arc<Ram> {
        self.ram.clone()
    }

    fn load(&mut self, state: &[u8]) -> Result<(), Failure> {
        if state.first() == Some(&0xff) { Err(Failure::new(Code::STATE, "refused")) } else { Ok(()) }
    }

    fn run(&mut self) -> Result<(), Failure> {
        self.story.tell("run");
        Ok(())
    }
}

impl SourceMachine for Vm {
    fn ram(&self) -> Arc<Ram> {
        self.ram.clone()
    }

    fn describe(&self) -> Result<Vec<u8>, Failure> {
        Ok(vec![1, 2, 3])
    }

    fn start_tracking(&self) -> Result<(), Failure> {
        Ok(())
    }

    fn stop_tracking(&self) -> Result<(), Failure> {
        Ok(())
    }

    fn collect_dirty(&self, _: &mut DirtySet) -> Result<(), Failure> {
        Ok(())
    }

    fn pause(&self) -> Result<(), Failure> {
        self.story.tell("pause");
        Ok(())
    }

    fn resume(&self) -> Result<(), Failure> {
        self.story.tell("resume");
        Ok(())
    }

    fn save(&self) -> Result<Vec<u8>, Failure> {
        Ok(vec![4, 5, 6])
    }
}

/// A transport that takes everything and moves nothing.
struct Void(Vec<Box<dyn Lane>>);

struct VoidLane;

impl Interrupt for VoidLane {
    fn interrupt(&self) {}
}

impl DestinationTransport for Void {
    fn name(&self) -> &'static str {
        "void"
    }

    fn offer(&mut self, _: &Session) -> Result<(Vec<u8>, Box<dyn DestinationPlane>), PlaneError> {
        Ok((vec![8], Box::new(Void(Vec::new()))))
    }
}

impl DestinationPlane for Void {
    fn name(&self) -> &'static str {
        "void"
    }

    fn fence(&mut self) -> Result<(), PlaneError> {
        Ok(())
    }

    fn bytes_placed(&self) -> u64 {
        0
    }

    fn error(&self) -> Option<String> {
        None
    }
}

impl SourceTransport for Void {
    fn name(&self) -> &'static str {
        "void"
    }

    fn connect(&mut self, _: &Session, offer: &[u8]) -> Result<Box<dyn SourcePlane>, PlaneError> {
        match offer {
            [8, ..] => Ok(Box::new(Void(vec![Box::new(VoidLane)]))),
            _ => Err(PlaneError::Protocol("no offer".into())),
        }
    }
}

impl SourcePlane for Void {
    fn name(&self) -> &'static str {
        "void"
    }

    fn lanes(&mut self) -> &mut Vec<Box<dyn Lane>> {
        &mut self.0
    }

    fn interrupter(&self) -> Arc<dyn Interrupt> {
        Arc::new(VoidLane)
    }

    fn cpu(&self) -> CpuTime {
        CpuTime::default()
    }
}

impl Lane for VoidLane {
    fn write(&mut self, _: &[Extent]) -> Result<(), PlaneError> {
        Ok(())
    }

    fn zero(&mut self, _: &[Extent]) -> Result<(), PlaneError> {
        Ok(())
    }

    fn post_barrier(&mut self, _: u32) -> Result<(), PlaneError> {
        Ok(())
    }

    fn wait_barrier(&mut self, _: u32) -> Result<(), PlaneError> {
        Ok(())
    }

    fn stats(&self) -> LaneStats {
        LaneStats::default()
    }
}

fn destination(input: Input<'_>, story: &Story) {
    let (mut host, mut link) = (Host(story.clone()), Tape { input, story: story.clone() });
    let arrived = destination::Migration::new(&mut host, &mut link).transport(Void(Vec::new())).run();
    let (commit, run) = (story.at("heard Commit"), story.at("run"));
    assert_eq!(arrived.is_ok(), run.is_some());
    if let Some(run) = run {
        assert!(commit.is_some_and(|commit| commit < run), "the guest runs without Commit");
        assert_eq!(story.at("said GaveUp"), None, "given up and run");
    }
    if let Some(gave_up) = story.at("said GaveUp") {
        assert!(story.at("dropped").is_none_or(|dropped| dropped < gave_up), "given up before it was gone");
    }
    if let Ok(arrival) = arrived {
        drop(arrival.conclude());
    }
}

fn source(input: Input<'_>, story: &Story) {
    let machine = Vm { ram: ram(), story: story.clone() };
    let mut link = Tape { input, story: story.clone() };
    let report = source::Migration::new(&machine, &mut link).transport(Void(Vec::new())).run();
    let (commit, pause, resume) = (story.at("said Commit"), story.last("pause"), story.last("resume"));
    // The word that comes first once the guest may be there decides.
    let after = |what| story.last(what).filter(|at| commit.is_some_and(|commit| commit < *at));
    match report.verdict {
        Verdict::Moved => assert!(after("heard Running").is_some() && resume.is_none()),
        Verdict::Stayed => {
            assert!(pause.is_none_or(|pause| resume.is_some_and(|resume| pause < resume)), "stays paused");
            assert!(
                commit.is_none() || after("heard GaveUp").is_some(),
                "runs without the destination's word"
            );
        }
        _ => assert!(commit.is_some() && resume.is_none(), "held without need"),
    }
}

fuzz_target!(|bytes: &[u8]| {
    let (mut input, story) = (Input(bytes), Story::default());
    match input.byte() {
        Some(0) => destination(input, &story),
        Some(_) => source(input, &story),
        None => {}
    }
});
