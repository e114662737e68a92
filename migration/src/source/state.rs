//! The source's state machine: who owns the guest, and what happens next.
//!
//! It does no I/O and reads no clock. [`State::handle`] takes one event and returns one command. The driver
//! carries the command out and returns with the event that resulted. The real driver ([`super::drive`]) uses
//! sockets and KVM, the simulation ([`crate::simulation`]) uses dice, so the rule of ownership is checked on
//! the same code that runs in production.
//!
//! ```text
//!  Describe → Hello → Welcome → Prepare → Prepared → Connect → Precopy
//!     → Pause → Save → FinalRound → State → Ready → ReleaseDisks ─┐
//!        │ (any failure up to here)                               │
//!        ▼                                                    Commit ══════ the line of no return
//!      Abort → [TakeDisks] → Resume → Stayed                      │
//!                  │                                        AwaitRunning ── Running → Moved
//!                  │ refused                                 │         │
//!                  ▼                                   GaveUp│         │link lost, silence
//!                 Held ◄── no arbiter, or refused ── TakeDisks ◄───────┘ (only with an arbiter)
//!                                                            │ all taken
//!                                                            ▼
//!                                                    Resume → Stayed
//! ```
//!
//! **The state is saved before the last round**, because saving may write to guest memory: the kernel updates
//! the guest's clock page and what else it shares with it. The last round takes those pages along.
//!
//! **Up to `Commit` the source owns the guest**, so every failure leads to `Resume`. **From the
//! moment it tries to send `Commit` it does not**, because it cannot know whether the frame
//! arrived: a failed send may have put all of it on the wire. It then runs the guest only on the
//! destination's own word that it has discarded the guest (`GaveUp`), or after it got *all* disk
//! locks back, which the destination needs as well to run. With neither, the guest stays paused
//! ([`Outcome::Held`]) and an operator decides.

use crate::failure::{Code, Failure};
use crate::message::{self, Hello, Message, Offer, Prepare};

/// What the driver is to do. Each command is answered by exactly one event.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Command {
    /// Describe the machine. → `Described` or `Failed`
    Describe,
    /// Send a message. → `Done` or `LinkLost`
    Send(Message),
    /// Wait for a message. → `Received`, `LinkLost`, `Deadline`, `Cancel`, or `Failed` when the operator's
    /// time limit has passed
    Wait(Waiting),
    /// Connect one of the offered data planes. → `Done` or `Failed`
    Connect(Vec<Offer>),
    /// Start dirty tracking and send rounds until the switchover is due. → `Done` or `Failed`
    Precopy,
    /// Stop the guest. → `Done` or `Failed`
    Pause,
    /// Save the machine's state. → `Saved` or `Failed`
    Save,
    /// Send what is still dirty and await the barrier. → `Done` or `Failed`
    FinalRound,
    /// Give up the disk locks. → `Done` or `Failed`
    ReleaseDisks,
    /// Take all disk locks or none. → `Done` or `Failed`
    TakeDisks,
    /// Let the guest run here. → `Done` or `Failed`
    Resume,
    /// It is over.
    Finish(Outcome),
}

/// What the source waits for; decides how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Waiting {
    /// The greeting's answer.
    Welcome,
    /// The shadow machine.
    Prepared,
    /// The state to be loaded.
    Ready,
    /// The guest to run there.
    Running,
}

impl Waiting {
    /// Whether a message only tells something, and the wait goes on after it.
    pub fn goes_on_after(self, message: &Message) -> bool {
        match message {
            Message::Estimate(_) => self == Waiting::Prepared,
            Message::PageHashes(_) => self == Waiting::Ready,
            _ => false,
        }
    }
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// Begin.
    Start,
    /// The machine's description.
    Described(Box<Prepare>),
    /// The state of the paused machine.
    Saved(Box<message::State>),
    /// The command succeeded.
    Done,
    /// The command failed; for `TakeDisks`, somebody else holds a lock.
    Failed(Failure),
    /// A message came.
    Received(Message),
    /// The link broke, or carried what is no message.
    LinkLost(Failure),
    /// The wait took too long.
    Deadline,
    /// The operator wants it stopped.
    Cancel,
}

/// How it ended.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// The guest runs at the destination.
    Moved,
    /// The guest runs here, as if nothing had been.
    Stayed(Failure),
    /// The guest is paused here and may or may not run at the destination: an operator decides.
    Held(Failure),
}

/// The command that is being carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Step {
    Idle,
    Describe,
    SendHello,
    AwaitWelcome,
    SendPrepare,
    AwaitPrepared,
    Connect,
    Precopy,
    Pause,
    Save,
    FinalRound,
    SendState,
    AwaitReady,
    ReleaseDisks,
    SendCommit,
    AwaitRunning,
    SendAbort,
    TakeDisks,
    Resume,
    Finished,
}

/// Deliberate violations, compiled into this crate's own tests only.
#[cfg(test)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Sabotage {
    /// Run the guest on its own word when the line is cut after `Commit`.
    ResumeAfterCommit,
    /// Save the state only after the last round.
    SaveLast,
    /// Stop the guest only after the last round.
    PauseLast,
    /// Run the guest without its disks when the migration fails after they were released.
    ResumeWithoutDisks,
}

/// The state machine.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct State {
    step: Step,
    hello: Hello,
    has_arbiter: bool,
    prepare: Option<Box<Prepare>>,
    /// What was saved, until the last round is through.
    saved: Option<Box<message::State>>,
    paused: bool,
    disks_released: bool,
    failure: Option<Failure>,
    #[cfg(test)]
    pub(crate) sabotage: Option<Sabotage>,
}

impl State {
    /// A machine that has not begun. `has_arbiter`: disks on shared storage can decide who owns
    /// the guest.
    pub fn new(hello: Hello, has_arbiter: bool) -> Self {
        State {
            step: Step::Idle,
            hello,
            has_arbiter,
            prepare: None,
            saved: None,
            paused: false,
            disks_released: false,
            failure: None,
            #[cfg(test)]
            sabotage: None,
        }
    }

    /// Takes what happened, returns what to do.
    pub fn handle(&mut self, event: Event) -> Command {
        if self.committed() { self.handle_committed(event) } else { self.handle_owned(event) }
    }

    /// Whether `Commit` may have reached the destination.
    pub fn committed(&self) -> bool {
        matches!(self.step, Step::SendCommit | Step::AwaitRunning)
    }

    fn go(&mut self, step: Step, command: Command) -> Command {
        self.step = step;
        command
    }

    fn finish(&mut self, outcome: Outcome) -> Command {
        self.go(Step::Finished, Command::Finish(outcome))
    }

    /// Everything before `Commit`, and the way back.
    fn handle_owned(&mut self, event: Event) -> Command {
        #[cfg(test)]
        let event = match self.sabotaged(event) {
            Ok(command) => return command,
            Err(event) => event,
        };
        match (self.step, event) {
            (Step::Idle, Event::Start) => self.go(Step::Describe, Command::Describe),
            (Step::Describe, Event::Described(prepare)) => {
                self.prepare = Some(prepare);
                let hello = Message::Hello(self.hello.clone());
                self.go(Step::SendHello, Command::Send(hello))
            }
            (Step::SendHello, Event::Done) => self.go(Step::AwaitWelcome, Command::Wait(Waiting::Welcome)),
            (Step::AwaitWelcome, Event::Received(Message::Welcome(_))) => match self.prepare.take() {
                Some(prepare) => self.go(Step::SendPrepare, Command::Send(Message::Prepare(*prepare))),
                None => self.abort(Failure::new(Code::PROTOCOL, "Welcome came twice")),
            },
            (Step::SendPrepare, Event::Done) => {
                self.go(Step::AwaitPrepared, Command::Wait(Waiting::Prepared))
            }
            (Step::AwaitPrepared, Event::Received(Message::Prepared(p))) => {
                self.go(Step::Connect, Command::Connect(p.offers))
            }
            (Step::Connect, Event::Done) => self.go(Step::Precopy, Command::Precopy),
            (Step::Precopy, Event::Done) => self.go(Step::Pause, Command::Pause),
            (Step::Pause, Event::Done) => {
                self.paused = true;
                self.go(Step::Save, Command::Save)
            }
            (Step::Save, Event::Saved(state)) => {
                self.saved = Some(state);
                self.go(Step::FinalRound, Command::FinalRound)
            }
            (Step::FinalRound, Event::Done) => match self.saved.take() {
                Some(state) => self.go(Step::SendState, Command::Send(Message::State(*state))),
                None => self.abort(Failure::new(Code::PROTOCOL, "no state to send")),
            },
            (Step::SendState, Event::Done) => self.go(Step::AwaitReady, Command::Wait(Waiting::Ready)),
            (Step::AwaitReady, Event::Received(Message::Ready(_))) => {
                // From here on a lock may be missing even if giving it up fails half-way.
                self.disks_released = true;
                self.go(Step::ReleaseDisks, Command::ReleaseDisks)
            }
            (Step::ReleaseDisks, Event::Done) => self.go(Step::SendCommit, Command::Send(Message::Commit)),

            // The way back.
            (Step::SendAbort, _) => self.recover(),
            (Step::TakeDisks, Event::Done) => {
                self.disks_released = false;
                self.recover()
            }
            (Step::TakeDisks, Event::Failed(why)) => {
                let why = why.context("the disk locks could not be taken back, the guest stays paused");
                self.finish(Outcome::Held(why))
            }
            (Step::Resume, Event::Done) => {
                self.paused = false;
                self.recover()
            }
            (Step::Resume, Event::Failed(why)) => self.finish(Outcome::Held(why)),

            // Failures before the line of no return.
            (_, Event::Received(Message::GaveUp(why))) => {
                self.give_up(why.context("the destination refused"))
            }
            (_, Event::LinkLost(why)) => self.give_up(why),
            (Step::Pause, Event::Failed(why)) => {
                // Some vCPUs may have stopped.
                self.paused = true;
                self.abort(why)
            }
            (_, Event::Failed(why)) => self.abort(why),
            (_, Event::Deadline) => {
                self.abort(Failure::new(Code::TIMEOUT, "the destination did not answer in time"))
            }
            (_, Event::Cancel) => self.abort(Failure::new(Code::CANCELLED, "cancelled")),
            (_, Event::Received(message)) => self.abort(Failure::new(
                Code::PROTOCOL,
                format_args!("the destination sent {} when it was not its turn", message.name()),
            )),
            (step, event) => self.abort(Failure::new(
                Code::PROTOCOL,
                format_args!("the driver answered {step:?} with {event:?}"),
            )),
        }
    }

    /// What a broken rule makes of an event, if it has to do with it.
    #[cfg(test)]
    fn sabotaged(&mut self, event: Event) -> Result<Command, Event> {
        use Sabotage::{PauseLast, SaveLast};
        let Some(rule) = self.sabotage else { return Err(event) };
        Ok(match (rule, self.step, event) {
            (SaveLast, Step::Pause, Event::Done) => {
                self.paused = true;
                self.go(Step::FinalRound, Command::FinalRound)
            }
            (SaveLast, Step::FinalRound, Event::Done) => self.go(Step::Save, Command::Save),
            (SaveLast, Step::Save, Event::Saved(state)) => {
                self.go(Step::SendState, Command::Send(Message::State(*state)))
            }
            (PauseLast, Step::Precopy, Event::Done) => self.go(Step::FinalRound, Command::FinalRound),
            (PauseLast, Step::FinalRound, Event::Done) => self.go(Step::Pause, Command::Pause),
            (PauseLast, Step::Save, Event::Saved(state)) => {
                self.go(Step::SendState, Command::Send(Message::State(*state)))
            }
            (_, _, event) => return Err(event),
        })
    }

    /// Once `Commit` may have arrived. Nothing here resumes the guest without the destination's
    /// word or all of the disk locks.
    fn handle_committed(&mut self, event: Event) -> Command {
        match (self.step, event) {
            (Step::SendCommit, Event::Done) => self.go(Step::AwaitRunning, Command::Wait(Waiting::Running)),
            (_, Event::Received(Message::Running(_))) => self.finish(Outcome::Moved),
            (_, Event::Received(Message::GaveUp(why))) => {
                self.give_up(why.context("the destination gave the guest back"))
            }
            (_, Event::LinkLost(why)) => {
                self.uncertain(why.context("the connection was lost after the guest was handed over"))
            }
            (_, Event::Deadline) => self.uncertain(Failure::new(
                Code::TIMEOUT,
                "the destination does not say whether it runs the guest that was handed over",
            )),
            // Too late to cancel; whatever else was said changes nothing either.
            (_, _) => self.go(Step::AwaitRunning, Command::Wait(Waiting::Running)),
        }
    }

    /// Tells the destination, then goes the way back.
    fn abort(&mut self, why: Failure) -> Command {
        if matches!(self.step, Step::SendAbort | Step::TakeDisks | Step::Resume | Step::Finished) {
            // A driver that breaks its rules on the way back gets no second attempt.
            return self.finish(Outcome::Held(why));
        }
        self.failure.get_or_insert(why.clone());
        self.go(Step::SendAbort, Command::Send(Message::Abort(why)))
    }

    /// Goes the way back without a word: the destination knows, or cannot be reached.
    fn give_up(&mut self, why: Failure) -> Command {
        self.failure.get_or_insert(why);
        self.recover()
    }

    /// The next step of the way back: disks, then guest, then the end.
    fn recover(&mut self) -> Command {
        #[cfg(test)]
        if self.sabotage == Some(Sabotage::ResumeWithoutDisks) {
            self.disks_released = false;
        }
        if self.disks_released {
            return self.go(Step::TakeDisks, Command::TakeDisks);
        }
        if self.paused {
            return self.go(Step::Resume, Command::Resume);
        }
        let why = self.failure.take().unwrap_or_else(|| Failure::new(Code::OTHER, "the migration failed"));
        self.finish(Outcome::Stayed(why))
    }

    /// Nobody knows whether the destination has the guest: the locks decide, if there are any.
    fn uncertain(&mut self, why: Failure) -> Command {
        #[cfg(test)]
        if self.sabotage == Some(Sabotage::ResumeAfterCommit) {
            self.disks_released = false;
            return self.give_up(why);
        }
        if self.has_arbiter { self.give_up(why) } else { self.finish(Outcome::Held(why)) }
    }
}
