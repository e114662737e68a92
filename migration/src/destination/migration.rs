//! Taking a guest in: what it needs, and how long it may wait.

use super::Arrival;
use super::drive::{self, Options};
use super::monitor::Monitor;
use crate::failure::Failure;
use crate::link::ControlLink;
use crate::machine::DestinationHost;
use crate::message;
use crate::transport::DestinationTransport;
use std::time::Duration;

/// How long the source may be silent.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Timeouts {
    /// Between the messages of the beginning, and for `Commit`.
    pub answer: Duration,
    /// While data is expected: with neither data nor a message, and also with nothing but the same few
    /// pages. A source that has reason to wait says so, and one of an earlier version, which cannot, has ten
    /// times as long.
    pub silence: Duration,
    /// From the machine that stands ready to its state, whatever the source says meanwhile.
    pub whole: Duration,
    /// Waiting for a barrier's confirmation to be taken off our hands, and the like.
    pub data: Duration,
}

impl Default for Timeouts {
    /// 10 s, 60 s, 24 hours and 10 s.
    fn default() -> Self {
        Timeouts {
            answer: Duration::from_secs(10),
            silence: Duration::from_secs(60),
            whole: Duration::from_secs(24 * 3600),
            data: Duration::from_secs(10),
        }
    }
}

/// One guest that is to be taken in from the source at the other end of a link.
///
/// ```no_run
/// use whimbrel_migration::destination::Migration;
/// # use whimbrel_migration::{Failure, link::ControlLink, machine::DestinationHost};
/// # use whimbrel_migration::transport::DestinationTransport;
///
/// # fn take<H: DestinationHost>(
/// #     host: &mut H, link: &mut dyn ControlLink, tcp: impl DestinationTransport + 'static,
/// # ) -> Result<H::Machine, Failure> {
/// let arrival = Migration::new(host, link).transport(tcp).software("example 1.0").run()?;
/// println!("a guest of {} runs here", arrival.sender());
/// // Tells the source how the guest fares, which is what ends the migration there.
/// let machine = arrival.conclude();
/// # Ok(machine)
/// # }
/// ```
#[must_use = "nothing happens before `run`"]
pub struct Migration<'a, H: DestinationHost> {
    host: &'a mut H,
    link: &'a mut dyn ControlLink,
    transports: Vec<Box<dyn DestinationTransport>>,
    options: Options,
    monitor: Option<&'a Monitor>,
}

impl<'a, H: DestinationHost> Migration<'a, H> {
    /// A migration into a machine that `host` builds. It has no transports yet, and none can succeed without.
    pub fn new(host: &'a mut H, link: &'a mut dyn ControlLink) -> Self {
        let options = Options { software: message::SOFTWARE.into(), timeouts: Timeouts::default() };
        Migration { host, link, transports: Vec::new(), options, monitor: None }
    }

    /// Adds a way in which data may come. The source chooses among those that both sides have.
    pub fn transport(self, transport: impl DestinationTransport + 'static) -> Self {
        self.transports([Box::new(transport) as Box<dyn DestinationTransport>])
    }

    /// Adds several.
    pub fn transports(mut self, transports: impl IntoIterator<Item = Box<dyn DestinationTransport>>) -> Self {
        self.transports.extend(transports);
        self
    }

    /// Name and version of the program, which the source is told. Default: those of this engine.
    pub fn software(mut self, software: impl Into<String>) -> Self {
        self.options.software = software.into();
        self
    }

    /// How long the source may be silent.
    pub fn timeouts(mut self, timeouts: Timeouts) -> Self {
        self.options.timeouts = timeouts;
        self
    }

    /// Shares `monitor` with whoever watches this migration, or wants to cancel it. A monitor serves one
    /// migration.
    pub fn monitor(mut self, monitor: &'a Monitor) -> Self {
        self.monitor = Some(monitor);
        self
    }

    /// Takes the guest in. Returns when it runs here, or with the reason why it never will.
    ///
    /// # Errors
    /// The reason. The shadow machine has been dropped, the source has been told if it can be reached, and
    /// its guest runs on there. The host can be used again, the link cannot.
    pub fn run(self) -> Result<Arrival<'a, H::Machine>, Failure> {
        let Migration { host, link, transports, options, monitor } = self;
        let own = Monitor::default();
        drive::drive(host, link, transports, &options, monitor.unwrap_or(&own))
    }
}
