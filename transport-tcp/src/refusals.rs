//! Telling of callers that were not let in, though not of each: anybody can call as often as he likes.

use std::fmt::{self, Display};
use std::net::SocketAddr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How often refused callers are told of at most.
const INTERVAL: Duration = Duration::from_secs(1);

/// A caller that was not let in.
#[derive(Debug)]
#[non_exhaustive]
pub struct Refused {
    /// Who called.
    pub peer: SocketAddr,
    /// What was wrong, for a person.
    pub why: String,
    /// Callers that were refused since the last one that was told of.
    pub untold: u64,
}

/// In a sentence.
impl Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the caller from {} was refused: {}", self.peer, self.why)?;
        if self.untold > 0 {
            write!(f, " ({} more before it)", self.untold)?;
        }
        Ok(())
    }
}

type OnRefused = Box<dyn Fn(&Refused) + Send>;

/// Who is told, and when somebody was.
#[derive(Default)]
pub struct Refusals(Mutex<State>);

#[derive(Default)]
struct State {
    callback: Option<OnRefused>,
    last: Option<Instant>,
    untold: u64,
}

impl Refusals {
    /// Tells `callback` from now on.
    pub fn tell_to(&self, callback: impl Fn(&Refused) + Send + 'static) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).callback = Some(Box::new(callback));
    }

    /// This caller was refused. It is told of, or counted.
    pub fn tell(&self, peer: SocketAddr, why: impl Display) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if state.callback.is_none() {
            return;
        }
        if state.last.is_some_and(|last| last.elapsed() < INTERVAL) {
            state.untold += 1;
            return;
        }
        state.last = Some(Instant::now());
        let refused = Refused { peer, why: why.to_string(), untold: std::mem::take(&mut state.untold) };
        if let Some(callback) = &state.callback {
            callback(&refused);
        }
    }
}
