//! What has happened, kept for a while and told as it happens: server-sent events.
//!
//! Whoever lets something happen adds an [`Event`] and waits for nobody. Whoever listens has a place in what
//! is kept, and reads on from there.

use super::model::{Arrival, Event, EventKind, Migration, VmState, word};
use super::server::{Closing, Refusal};
use axum::extract::{FromRequestParts, Query};
use axum::http::StatusCode;
use axum::http::request::Parts;
use axum::response::sse::{self, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use std::collections::{BTreeMap, VecDeque};
use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::watch;
use utoipa::IntoParams;

/// How many events are kept.
const KEPT: usize = 4096;

/// After so much silence whoever listens gets a line without meaning: it is noticed if nobody does.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// The header by which somebody who has listened before says what they know.
pub(crate) const LAST: &str = "last-event-id";

/// The events of a machine, or of a host.
pub struct Events {
    kept: Mutex<Kept>,
    changed: watch::Sender<()>,
}

struct Kept {
    /// The number of the last one.
    last: u64,
    /// All after this one are kept.
    floor: u64,
    events: VecDeque<Event>,
    /// The last that was told of each machine's state, and of the host's.
    present: BTreeMap<Option<String>, Event>,
}

impl Default for Events {
    fn default() -> Self {
        let now = now();
        let kept = Kept { last: now, floor: now, events: VecDeque::new(), present: BTreeMap::new() };
        Events { kept: Mutex::new(kept), changed: watch::Sender::new(()) }
    }
}

impl Kept {
    /// Whether this is not what was told last. It is from now on.
    fn is_another_state(&mut self, event: &Event) -> bool {
        let before = self.present.get(&event.name);
        if before.is_some_and(|before| (before.state, before.drained) == (event.state, event.drained)) {
            return false;
        }
        // A machine that comes has no name at first.
        if event.name.is_some() {
            self.present.retain(|name, before| name.is_some() || before.event == EventKind::Drain);
        }
        self.present.insert(event.name.clone(), event.clone());
        true
    }
}

/// Microseconds since 1970.
pub(crate) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros() as u64)
}

impl Event {
    /// One that has no number yet.
    pub(crate) fn new(event: EventKind, name: &str) -> Self {
        let name = Some(name.to_owned()).filter(|name| !name.is_empty());
        Event {
            id: 0,
            at: String::new(),
            event,
            name,
            state: None,
            migration: None,
            arrival: None,
            drained: None,
        }
    }

    /// A machine is in another state.
    pub(crate) fn state(name: &str, state: VmState) -> Self {
        Event { state: Some(state), ..Event::new(EventKind::Machine, name) }
    }

    /// Something about a migration.
    pub(crate) fn migration(event: EventKind, name: &str, migration: Migration) -> Self {
        Event { migration: Some(migration), ..Event::new(event, name) }
    }

    /// Something about a guest that comes.
    pub(crate) fn arrival(event: EventKind, name: &str, arrival: Arrival) -> Self {
        Event { arrival: Some(arrival), ..Event::new(event, name) }
    }

    /// With its time in words, which is that of its number unless it has another one.
    fn dated(mut self) -> Self {
        if self.at.is_empty() {
            let time = UNIX_EPOCH + Duration::from_micros(self.id);
            self.at = humantime::format_rfc3339_millis(time).to_string();
        }
        self
    }
}

impl Events {
    fn lock(&self) -> MutexGuard<'_, Kept> {
        // Nothing that holds it can leave it half changed.
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Something has happened. What is no news, a state that was told last, is left out.
    pub fn add(&self, event: Event) {
        if self.add_quietly(event) {
            self.changed.send_replace(());
        }
    }

    /// The same while nobody is to be woken: those who listen hear of it with what follows. Whether it is
    /// news.
    pub fn add_quietly(&self, event: Event) -> bool {
        let mut kept = self.lock();
        let event = Event { id: now().max(kept.last + 1), ..event };
        let is_news = match event.event {
            EventKind::Gone => kept.present.remove(&event.name).is_some(),
            EventKind::Machine | EventKind::Drain => kept.is_another_state(&event),
            _ => true,
        };
        if !is_news {
            return false;
        }
        kept.last = event.id;
        if kept.events.len() == KEPT {
            kept.floor = kept.events.pop_front().map_or(0, |first| first.id);
        }
        kept.events.push_back(event);
        true
    }

    /// The machines that are being moved away.
    pub(crate) fn migrating(&self) -> Vec<String> {
        let kept = self.lock();
        let moving = kept.present.values().filter(|event| event.state == Some(VmState::Migrating));
        moving.filter_map(|event| event.name.clone()).collect()
    }

    /// What is now, and from where on the rest follows.
    fn present(&self) -> (Vec<Event>, u64) {
        let kept = self.lock();
        let mut present: Vec<_> = kept.present.values().cloned().map(Event::dated).collect();
        present.sort_by_key(|event| event.id);
        // Whoever has heard these goes on after the last one of all.
        present.iter_mut().for_each(|event| event.id = kept.last);
        (present, kept.last)
    }

    /// All that are kept after this one.
    fn since(&self, id: u64) -> Vec<Event> {
        let kept = self.lock();
        let from = kept.events.partition_point(|event| event.id <= id);
        kept.events.range(from..).cloned().map(Event::dated).collect()
    }

    /// All after this number are kept.
    pub(crate) fn floor(&self) -> u64 {
        self.lock().floor
    }

    /// The answer to somebody who listens, who is told of `earlier` ones first.
    pub(crate) fn answer(self: Arc<Self>, asked: &Asked, earlier: Vec<Event>) -> Response {
        let (queue, last) = match asked.since {
            Some(since) => (earlier, since),
            None => self.present(),
        };
        let changed = self.changed.subscribe();
        let Asked { follow, closing, .. } = asked.clone();
        let listener = Listener { events: self, changed, queue: queue.into(), last, follow, closing };
        let stream = futures_util::stream::unfold(listener, |mut listener: Listener| async move {
            let event = listener.next().await?;
            Some((Ok::<_, Infallible>(sent(&event)), listener))
        });
        Sse::new(stream).keep_alive(KeepAlive::new().interval(KEEP_ALIVE)).into_response()
    }
}

/// An event as it travels.
fn sent(event: &Event) -> sse::Event {
    let named = sse::Event::default().id(event.id.to_string()).event(word(&event.event));
    // What is in an event can be written as JSON.
    named.json_data(event).unwrap_or_default()
}

/// Somebody who listens.
struct Listener {
    events: Arc<Events>,
    changed: watch::Receiver<()>,
    queue: VecDeque<Event>,
    /// The number of the last one that has come into the queue.
    last: u64,
    follow: bool,
    closing: Closing,
}

impl Listener {
    /// The next one, which is waited for; `None` after the last one.
    async fn next(&mut self) -> Option<Event> {
        loop {
            if let Some(event) = self.queue.pop_front() {
                return Some(event);
            }
            // Whatever has happened before the end is told.
            let over = !self.follow || self.closing.has_begun();
            self.queue = self.events.since(self.last).into();
            match self.queue.back() {
                Some(last) => self.last = last.id,
                None if over => return None,
                None => tokio::select! {
                    changed = self.changed.changed() => changed.ok()?,
                    () = self.closing.begin() => {}
                },
            }
        }
    }
}

/// What somebody who listens asks for.
#[derive(Clone)]
pub(crate) struct Asked {
    /// The number of the last event that they know. Without one, they are told first what is now.
    pub since: Option<u64>,
    follow: bool,
    closing: Closing,
}

/// The same as a query says it.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct Listen {
    /// Tell of the events after the one of this number, as `Last-Event-ID` does, which stands above it.
    /// Without either, the stream begins with what is now: the state of each machine.
    #[param(minimum = 0)]
    since: Option<u64>,
    /// Go on as events happen. Otherwise the stream ends with those that have happened.
    #[serde(default = "yes")]
    #[param(default = true)]
    follow: bool,
}

fn yes() -> bool {
    true
}

impl<S: Send + Sync> FromRequestParts<S> for Asked {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Refusal> {
        let Query(Listen { mut since, follow }) = Query::from_request_parts(parts, state).await?;
        if let Some(last) = parts.headers.get(LAST) {
            let number = last.to_str().ok().and_then(|last| last.parse().ok());
            let wrong = || Refusal::new(StatusCode::BAD_REQUEST, "Last-Event-ID is no number of an event");
            since = Some(number.ok_or_else(wrong)?);
        }
        // An API that nobody closes is open.
        let closing = parts.extensions.get::<Closing>().cloned().unwrap_or_default();
        Ok(Asked { since, follow, closing })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(name: &str, state: VmState) -> Event {
        Event::state(name, state)
    }

    fn told(events: &[Event]) -> Vec<(Option<&str>, Option<VmState>)> {
        events.iter().map(|event| (event.name.as_deref(), event.state)).collect()
    }

    #[test]
    fn what_was_told_is_told_again_and_nothing_twice() {
        let events = Events::default();
        let began = events.floor();
        events.add(state("web1", VmState::Running));
        events.add(state("web2", VmState::Running));
        events.add(state("web1", VmState::Running));
        events.add(state("web1", VmState::Paused));
        let all = events.since(began);
        let (running, paused) = (Some(VmState::Running), Some(VmState::Paused));
        assert_eq!(told(&all), [(Some("web1"), running), (Some("web2"), running), (Some("web1"), paused)]);
        assert!(all.is_sorted_by_key(|event| event.id) && all.iter().all(|event| event.at.ends_with('Z')));
        assert_eq!(told(&events.since(all[1].id)), [(Some("web1"), paused)]);
        let (present, last) = events.present();
        assert_eq!(told(&present), [(Some("web2"), running), (Some("web1"), paused)]);
        assert!(present.iter().all(|event| event.id == last) && events.since(last).is_empty());
        events.add(Event::new(EventKind::Gone, "web1"));
        events.add(Event::new(EventKind::Gone, "web1"));
        assert_eq!(told(&events.present().0), [(Some("web2"), running)]);
        assert_eq!(events.since(last).len(), 1);
        // One that has no name at first is the same when it has one.
        events.add(state("", VmState::Receiving));
        events.add(state("web3", VmState::Running));
        assert_eq!(told(&events.present().0), [(Some("web2"), running), (Some("web3"), running)]);
    }

    #[test]
    fn only_the_last_ones_are_kept() {
        let events = Events::default();
        let began = events.floor();
        for number in 0..=KEPT {
            let next = if number % 2 == 0 { VmState::Running } else { VmState::Paused };
            events.add(state("web1", next));
        }
        let kept = events.since(began);
        assert_eq!(kept.len(), KEPT);
        assert!(events.floor() > began && events.floor() < kept[0].id);
    }
}
