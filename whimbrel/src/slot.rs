//! The place of a process's virtual machine, and what happens there until it has one.
//!
//! `whimbrel run` fills it at once. `whimbrel receive` has a place before it has a guest: it waits, takes a
//! guest in, may refuse it, and waits again. Operators see all of that through the API, and can end it.

use crate::api::events::Events;
use crate::api::model::{Arrival, Event, EventKind, Vm, VmState};
use crate::instance::Instance;
use crate::security::Secured;
use migration::destination::{Monitor, Phase};
use migration::{Code, Failure};
use std::net::SocketAddr;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, SystemTime};

/// How long a receiver that is told to quit may take to call off what it is doing.
const QUIT_PATIENCE: Duration = Duration::from_secs(5);

/// The place of an instance.
#[derive(Default)]
pub struct Slot {
    instance: OnceLock<Arc<Instance>>,
    /// Only a receiver has this.
    reception: Option<Mutex<Reception>>,
    /// Notified when a receiver has a guest, or takes nobody in any more.
    settled: Condvar,
    events: Arc<Events>,
}

/// What a receiver is doing.
#[derive(Default)]
struct Reception {
    /// The name that the operator has chosen.
    name: Option<String>,
    /// Who watches the guest that is being taken in.
    monitor: Option<Arc<Monitor>>,
    /// That guest, or the last one.
    arrival: Option<Arrival>,
    /// An operator wants the process to end.
    quit: bool,
    /// The receiver takes nobody in any more.
    closed: bool,
}

/// The present time, as it is told to people and programs.
pub fn now() -> String {
    humantime::format_rfc3339_millis(SystemTime::now()).to_string()
}

impl Slot {
    /// The place of a guest that comes from another host. It is called `name`, or as it was called there.
    pub fn receiver(name: Option<String>) -> Self {
        let reception = Reception { name, ..Reception::default() };
        Slot { reception: Some(Mutex::new(reception)), ..Slot::default() }
    }

    /// Puts the instance in its place; the first one stays.
    pub fn put(&self, instance: Arc<Instance>) {
        instance.tell(&self.events);
        let _ = self.instance.set(instance);
        // Whoever is between looking and waiting holds the lock.
        drop(self.reception());
        self.settled.notify_all();
    }

    /// What happens here.
    pub fn events(&self) -> &Arc<Events> {
        &self.events
    }

    /// The instance, if it is there yet.
    pub fn get(&self) -> Option<&Arc<Instance>> {
        self.instance.get()
    }

    fn reception(&self) -> Option<MutexGuard<'_, Reception>> {
        // Nothing that holds it can leave it half changed.
        self.reception.as_ref().map(|r| r.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// What the process is doing; `None` before a machine that is started here exists.
    pub fn status(&self) -> Option<Vm> {
        if let Some(instance) = self.get() {
            return Some(instance.status());
        }
        let reception = self.reception()?;
        let progress = reception.monitor.as_ref().map(|monitor| monitor.progress());
        Some(Vm {
            name: reception.name.clone().unwrap_or_default(),
            state: if progress.is_some() { VmState::Receiving } else { VmState::Waiting },
            memory: progress.map_or(0, |progress| progress.memory),
            vcpus: 0,
            pid: std::process::id(),
            trouble: None,
            guest: None,
        })
    }

    /// The guest that is being taken in, or the last one that was, or was not.
    pub fn arrival(&self) -> Option<Arrival> {
        let reception = self.reception()?;
        let mut arrival = reception.arrival.clone()?;
        if let Some(monitor) = &reception.monitor {
            arrival.progress = monitor.progress();
        }
        Some(arrival)
    }

    /// A guest comes from `from`; who watches it. `None` if the receiver is to end, and forever after.
    pub fn begin(&self, from: SocketAddr, secured: Option<Secured>) -> Option<Arc<Monitor>> {
        let mut reception = self.reception()?;
        if reception.quit {
            return None;
        }
        let monitor = Arc::new(Monitor::default());
        let number = reception.arrival.as_ref().map_or(1, |arrival| arrival.number + 1);
        reception.arrival = Some(Arrival {
            number,
            from,
            secured,
            began: now(),
            ended: None,
            sender: None,
            progress: monitor.progress(),
            failure: None,
        });
        reception.monitor = Some(Arc::clone(&monitor));
        let name = reception.name.as_deref().unwrap_or_default();
        self.events.add(Event::state(name, VmState::Receiving));
        if let Some(arrival) = reception.arrival.clone() {
            self.events.add(Event::arrival(EventKind::ArrivalBegun, name, arrival));
        }
        Some(monitor)
    }

    /// The guest has arrived, from a program called `sender`, or will never; what there is to be told of it.
    pub fn end(&self, outcome: Result<&str, Failure>) -> Option<Arrival> {
        let mut reception = self.reception()?;
        let progress = reception.monitor.take()?.progress();
        let arrival = reception.arrival.as_mut()?;
        arrival.progress = progress;
        arrival.ended = Some(now());
        match outcome {
            Ok(sender) => arrival.sender = Some(sender.into()),
            Err(failure) => arrival.failure = Some(failure),
        }
        let arrival = arrival.clone();
        let given = reception.name.as_deref().unwrap_or_default();
        let name = self.get().map_or(given, |instance| instance.name());
        self.events.add(Event::arrival(EventKind::ArrivalEnded, name, arrival.clone()));
        if arrival.failure.is_some() {
            self.events.add(Event::state(given, VmState::Waiting));
        }
        Some(arrival)
    }

    /// Whether a receiver is to end.
    pub fn told_to_quit(&self) -> bool {
        self.reception().is_some_and(|reception| reception.quit)
    }

    /// The receiver takes nobody in any more.
    pub fn close(&self) {
        if let Some(mut reception) = self.reception() {
            reception.closed = true;
        }
        self.settled.notify_all();
    }

    /// Ends the process: calls a migration off, and stops the machine if there is one.
    ///
    /// # Errors
    /// [`Code::BUSY`] when a guest is being handed over to this host, or has just arrived: it runs nowhere
    /// else any more.
    pub fn quit(&self) -> Result<(), Failure> {
        if let Some(instance) = self.get() {
            instance.quit();
            return Ok(());
        }
        let late = || {
            let text = "a guest has been handed over to this host; quit once more if it is to end";
            Failure::new(Code::BUSY, text)
        };
        let Some(mut reception) = self.reception() else {
            return Err(Failure::new(Code::BUSY, "the machine is being started; try again"));
        };
        if let Some(monitor) = &reception.monitor {
            if matches!(monitor.progress().phase, Phase::Committed | Phase::Arrived) {
                return Err(late());
            }
            monitor.cancel();
        }
        reception.quit = true;
        let busy = |reception: &mut Reception| !reception.closed && self.get().is_none();
        let waited = self.settled.wait_timeout_while(reception, QUIT_PATIENCE, busy);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
        if self.get().is_some() {
            return Err(late());
        }
        // A receiver that builds a machine hears of it when that is done.
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    #[test]
    fn a_receiver_s_guests_are_told_of() {
        let slot = Slot::receiver(Some("web1".into()));
        let state = || slot.status().unwrap().state;
        assert_eq!((state(), slot.arrival()), (VmState::Waiting, None));
        let from = "192.0.2.1:7".parse().unwrap();
        slot.begin(from, None).unwrap();
        assert_eq!(state(), VmState::Receiving);
        assert_eq!(slot.arrival().unwrap().ended, None);
        let failure = Failure::new(Code::MEMORY, "too large");
        let told = slot.end(Err(failure.clone())).unwrap();
        assert_eq!((told.number, told.from, told.failure), (1, from, Some(failure)));
        assert!(told.ended.is_some() && state() == VmState::Waiting);
        slot.begin(from, None).unwrap();
        assert_eq!(slot.end(Ok("someone 1.0")).unwrap().sender.as_deref(), Some("someone 1.0"));
        assert_eq!(slot.arrival().unwrap().number, 2);
    }

    #[test]
    fn a_receiver_that_is_to_end_takes_nobody_in() {
        let slot = Slot::receiver(None);
        let from = "192.0.2.1:7".parse().unwrap();
        let monitor = slot.begin(from, None).unwrap();
        thread::scope(|scope| {
            let quitting = scope.spawn(|| slot.quit());
            while !monitor.cancelled() {
                thread::sleep(Duration::from_millis(1));
            }
            slot.end(Err(Failure::new(Code::OTHER, "cancelled"))).unwrap();
            while !slot.told_to_quit() {
                thread::sleep(Duration::from_millis(1));
            }
            assert!(slot.begin(from, None).is_none());
            slot.close();
            assert_eq!(quitting.join().unwrap(), Ok(()));
        });
    }
}
