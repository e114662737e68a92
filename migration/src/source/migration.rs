//! One migration as a VMM asks for it.

use super::drive::{self, Options};
use super::path::Path;
use crate::link::ControlLink;
use crate::machine::{Arbiter, SourceMachine};
use crate::monitor::{Monitor, Phase};
use crate::policy::Policy;
use crate::report::Report;
use crate::transport::{Session, SourceTransport};
use crate::unwind;
use std::sync::Arc;
use std::time::Duration;

/// How long the destination may take for each step. Begin with the default and change what is to differ.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Timeouts {
    /// To answer the greeting. Default: 10 s.
    pub answer: Duration,
    /// To build the shadow machine; populating hundreds of gibibytes takes minutes. Default: 300 s.
    pub build: Duration,
    /// To load the state. Default: 20 s.
    pub load: Duration,
    /// To say that it runs. Default: 20 s.
    pub run: Duration,
    /// To confirm data. Default: 10 s.
    pub data: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Timeouts {
            answer: Duration::from_secs(10),
            build: Duration::from_secs(300),
            load: Duration::from_secs(20),
            run: Duration::from_secs(20),
            data: Duration::from_secs(10),
        }
    }
}

impl Timeouts {
    /// The same with another [`answer`](Self::answer).
    pub fn with_answer(self, answer: Duration) -> Self {
        Timeouts { answer, ..self }
    }

    /// The same with another [`build`](Self::build).
    pub fn with_build(self, build: Duration) -> Self {
        Timeouts { build, ..self }
    }

    /// The same with another [`load`](Self::load).
    pub fn with_load(self, load: Duration) -> Self {
        Timeouts { load, ..self }
    }

    /// The same with another [`run`](Self::run).
    pub fn with_run(self, run: Duration) -> Self {
        Timeouts { run, ..self }
    }

    /// The same with another [`data`](Self::data).
    pub fn with_data(self, data: Duration) -> Self {
        Timeouts { data, ..self }
    }
}

/// A machine's move to the destination at the other end of a link, before it is begun by [`run`](Self::run).
///
/// ```no_run
/// # use whimbrel_migration::{link::ControlLink, machine::SourceMachine};
/// # use whimbrel_migration::{source::Migration, transport::SourceTransport};
/// # fn example(machine: &dyn SourceMachine, link: &mut dyn ControlLink, tcp: Box<dyn SourceTransport>) {
/// let report = Migration::new(machine, link).transports([tcp]).run();
/// println!("{:?} after {} ms", report.verdict, report.total_us / 1000);
/// # }
/// ```
#[must_use = "nothing moves before `run` is called"]
pub struct Migration<'a> {
    machine: &'a dyn SourceMachine,
    link: &'a mut dyn ControlLink,
    transports: Vec<Box<dyn SourceTransport>>,
    monitor: Option<&'a Monitor>,
    options: Options,
}

impl<'a> Migration<'a> {
    /// A move of `machine`, which runs, over `link`, whose session it becomes. Needs a
    /// [`transport`](Self::transport) at least.
    pub fn new(machine: &'a dyn SourceMachine, link: &'a mut dyn ControlLink) -> Self {
        Migration { machine, link, transports: Vec::new(), monitor: None, options: Options::default() }
    }

    /// Adds a transport. Those that were added before it are tried first; it also steps in for one that
    /// breaks.
    pub fn transport(self, transport: impl SourceTransport + 'static) -> Self {
        self.transports([Box::new(transport) as Box<dyn SourceTransport>])
    }

    /// Adds transports, best first.
    pub fn transports(mut self, transports: impl IntoIterator<Item = Box<dyn SourceTransport>>) -> Self {
        self.transports.extend(transports);
        self
    }

    /// Name and version of the program, for the destination's logs. Default: this crate's.
    pub fn software(mut self, software: impl Into<String>) -> Self {
        self.options.software = software.into();
        self
    }

    /// When to switch over.
    pub fn policy(mut self, policy: Policy) -> Self {
        self.options.policy = policy;
        self
    }

    /// How long to wait for the destination.
    pub fn timeouts(mut self, timeouts: Timeouts) -> Self {
        self.options.timeouts = timeouts;
        self
    }

    /// Whether to compare a digest of all RAM on both sides before handing over. Lengthens the blackout by
    /// the time of reading all of memory. Default: no.
    pub fn compare_memory(mut self, compare: bool) -> Self {
        self.options.compare_memory = compare;
        self
    }

    /// Makes the migration wait in [`Phase::ReadyToSwitch`] once the switchover is due, until
    /// [`Monitor::proceed`] is called. The guest runs on meanwhile, and what it dirties is sent about once a
    /// second. After `patience` the migration fails with [`Code::TIMEOUT`](crate::Code::TIMEOUT), and the
    /// guest stays here. The policy's limits of rounds and time do not count the wait.
    pub fn pause_before_switchover(mut self, patience: Duration) -> Self {
        self.options.switchover_patience = Some(patience);
        self
    }

    /// What a handover of such a machine is known to take in all, usually [`Report::handover`] of an earlier
    /// one. Predictions count the longer of this and what the two machines
    /// [estimate](SourceMachine::handover_estimate).
    pub fn handover(mut self, known: Duration) -> Self {
        self.options.handover = Some(known);
        self
    }

    /// Whom to tell of the progress and to take orders from. A monitor serves one migration: with one that
    /// has served another, this one fails with [`Code::BUSY`](crate::Code::BUSY).
    pub fn monitor(mut self, monitor: &'a Monitor) -> Self {
        self.monitor = Some(monitor);
        self
    }

    /// Moves the machine, in the calling thread. Returns when the guest runs at either side, or is held. A
    /// panic of the machine, the link or a transport counts as a failure of what it was asked to do.
    pub fn run(self) -> Report {
        let Migration { machine, link, transports, monitor, options } = self;
        let own = Monitor::default();
        let monitor = monitor.unwrap_or(&own);
        let begun = unwind::catch("memory of the machine", || {
            let (ram, token, secret) = (machine.ram(), link.token(), link.secret());
            Ok((ram, token, secret, machine.arbiter().is_some_and(Arbiter::decides)))
        });
        let (ram, token, secret, has_arbiter) = match begun {
            Ok(begun) => begun,
            Err(why) => {
                monitor.end(Phase::Stayed);
                return Report::not_begun(why, 0);
            }
        };
        if let Err(why) = monitor.take() {
            return Report::not_begun(why, ram.len());
        }
        let session = Session::new(token, Arc::clone(&ram), options.timeouts.data).with_secret(secret);
        let fence_patience = options.timeouts.answer + options.timeouts.load;
        let path = Path::new(link, transports, session, monitor, fence_patience);
        drive::drive(machine, &ram, has_arbiter, path, &options, monitor)
    }
}
