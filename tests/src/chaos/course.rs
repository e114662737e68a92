//! The course of a move: both sides start, the move begins, faults strike, and somebody is told how it ended.

use super::cable::Cable;
use super::fault::{Fault, Pair};
use super::plan::{Plan, Strike};
use super::target::Target;
use crate::command::{Ran, run};
use crate::kills::{LINE, Side, reached};
use crate::lab::DeviceGone;
use crate::proxy::Proxy;
use crate::scene::{Host, Scene};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, Sender};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};
use whimbrel::node::Node;

/// From one look to the next of somebody who waits.
const STEP: Duration = Duration::from_millis(5);

/// A move that is over, and nobody has looked at it yet.
pub struct Course<'a> {
    /// The guest and its disk.
    pub scene: &'a Scene,
    /// The hosts. It goes after their processes.
    pub cable: &'a Cable,
    /// The source's process.
    pub source: Node,
    /// The destination's.
    pub destination: Node,
    /// Where it listens.
    pub address: SocketAddr,
    /// The relay, if there was one.
    pub proxy: Option<Proxy>,
    /// What `whimbrel migrate` said.
    pub ran: Ran,
    /// What has struck. Other faults came too late.
    pub struck: Vec<Fault>,
    /// Entries of the journal that the guest is known to have written.
    pub known: u64,
    /// Whether the guest was seen to wait until its disk has room.
    pub waited: bool,
    /// The devices that are away as long as the processes live.
    pub gone: Vec<DeviceGone>,
}

impl<'a> Course<'a> {
    /// Runs a move to its end.
    ///
    /// # Panics
    /// When it cannot begin, or does not end.
    pub fn run(plan: &Plan, scene: &'a Scene, cable: &'a Cable) -> Self {
        let source = cable.at(Host::A, || scene.guest(Host::A, "source"));
        let (destination, address) =
            cable.at(Host::B, || scene.receiver_on(Host::B, "destination", cable.listen()));
        let proxy = plan.relayed.then(|| cable.at(Host::A, || Proxy::start(address, LINE)));
        let to = proxy.as_ref().map_or(address, Proxy::address).to_string();
        let pair = Pair {
            source: &Target::of(&source),
            destination: &Target::of(&destination),
            disk: &scene.disk,
            waited: AtomicBool::default(),
            known: AtomicU64::default(),
            gone: Mutex::default(),
        };
        let over = AtomicBool::new(false);
        let (ran, struck) = thread::scope(|scope| {
            // Whoever waits for the end must not wait for ever if this fails.
            let _over = Over(&over);
            let (sender, ready) = mpsc::channel();
            let strikes: Vec<_> = plan.strikes.iter().map(|strike| (strike, sender.clone())).collect();
            drop(sender);
            let (pair, over) = (&pair, &over);
            let strikes: Vec<_> = strikes
                .into_iter()
                .map(|(strike, ready)| scope.spawn(move || strike.carry_out(cable, pair, ready, over)))
                .collect();
            // It ends when nobody is left who could send.
            ready.iter().for_each(drop);
            let api = source.api_path().to_str().expect("a path of letters");
            let fixed = ["migrate", "--insecure", "--api", api, "--json", "--to", &to];
            let ran = run(fixed.into_iter().chain(plan.options.iter().map(String::as_str)));
            over.store(true, Ordering::Release);
            let struck =
                strikes.into_iter().filter_map(|strike| strike.join().expect("a fault that can strike"));
            (ran, struck.collect())
        });
        let (known, waited) = (pair.known.into_inner(), pair.waited.into_inner());
        let gone = pair.gone.into_inner().unwrap_or_else(PoisonError::into_inner);
        Course { scene, cable, source, destination, address, proxy, ran, struck, known, waited, gone }
    }

    /// Whether one of the sides was killed.
    pub fn killed(&self, side: Side) -> bool {
        self.struck.contains(&Fault::Kill(side))
    }
}

struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

impl Strike {
    /// Strikes when the time has come, and ends it; nothing if the move was over by then. `ready` is dropped
    /// as soon as the move may begin.
    fn carry_out(
        &self,
        cable: &Cable,
        pair: &Pair<'_>,
        ready: Sender<()>,
        over: &AtomicBool,
    ) -> Option<Fault> {
        if let Some(aim) = self.aim {
            drop(ready);
            while !pair.source.phase().is_some_and(|phase| reached(phase, aim)) {
                if over.load(Ordering::Acquire) {
                    return None;
                }
            }
            if wait(self.delay, over) {
                return None;
            }
            let end = self.fault.strike(cable, pair);
            wait(self.lasts, over);
            end();
        } else {
            let end = self.fault.strike(cable, pair);
            drop(ready);
            wait(self.lasts, over);
            end();
        }
        Some(self.fault)
    }
}

/// Waits so long, or until the move is over; whether it is.
fn wait(time: Duration, over: &AtomicBool) -> bool {
    let until = Instant::now() + time;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        if over.load(Ordering::Acquire) || left.is_zero() {
            return over.load(Ordering::Acquire);
        }
        thread::sleep(left.min(STEP));
    }
}
