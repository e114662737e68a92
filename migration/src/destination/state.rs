//! The destination's state machine: when the guest may run here.
//!
//! Like the source's it does no I/O and reads no clock: one event in, one command out.
//!
//! ```text
//!  Hello → Welcome → Prepare → Build → Prepared → (data arrives) → State → Fence → Load → Ready
//!                                      (Retire → Retired, where the source changes the transport)
//!     │ any failure, Abort, link lost, silence, cancelled                              │
//!     ▼                                                                              Commit
//!  Discard → GaveUp → Discarded ◄── refused ── TakeDisks ◄─────────────────────────────┘
//!     ▲                                            │ all taken
//!     └───────────────── failed ───────────────── Run → Running
//! ```
//!
//! **Without `Commit` the guest never runs here**, however complete it is and however dead the
//! source seems. **With `Commit` in hand the link no longer matters**: the guest is this side's,
//! provided that its disks are. `GaveUp` is said only after the shadow machine is gone, because
//! the source runs the guest on that word.

use crate::failure::{Code, Failure};
use crate::message::{self, Hello, Message, Prepare, Prepared, Ready, Running};

/// What the driver is to do. Each command is answered by exactly one event.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Command {
    /// Wait for a message. → `Received`, `LinkLost`, `Deadline` or `Cancel`
    Wait(Waiting),
    /// Send a message. → `Done` or `LinkLost`
    Send(Message),
    /// Build the shadow machine and open it to the data plane. → `Built` or `Failed`
    Build(Box<Prepare>),
    /// Shut one data plane, of this name, out of RAM, for good. → `Done` or `Failed`
    Retire(String),
    /// Shut the data plane out of RAM, for good. → `Done` or `Failed`
    Fence,
    /// Restore the state. → `Loaded` or `Failed`
    Load(Box<message::State>),
    /// Take all disk locks or none, of a machine that has an arbiter. → `Done` or `Failed`
    TakeDisks,
    /// Run the guest. → `Started` or `Failed`
    Run,
    /// Destroy the shadow machine and let go of its disks. → `Done`
    Discard,
    /// It is over.
    Finish(Outcome),
}

/// What the destination waits for; decides how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Waiting {
    /// The greeting.
    Hello,
    /// What to build.
    Prepare,
    /// The state; data arrives meanwhile.
    State,
    /// The guest.
    Commit,
}

impl Waiting {
    /// Whether a message only brings something for later, and the wait goes on after it.
    pub fn goes_on_after(self, message: &Message) -> bool {
        self == Waiting::State
            && matches!(message, Message::StatePart(_) | Message::ChunkDigests(_) | Message::Waiting)
    }
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// Begin.
    Start,
    /// The shadow machine stands.
    Built(Prepared),
    /// The state is in place.
    Loaded(Ready),
    /// The guest runs.
    Started(Running),
    /// The command succeeded.
    Done,
    /// The command failed.
    Failed(Failure),
    /// A message came.
    Received(Message),
    /// The link broke, or carried what is no message.
    LinkLost(Failure),
    /// The wait took too long.
    Deadline,
    /// The operator does not want the guest. Only answers a `Wait`.
    Cancel,
}

/// How it ended.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// The guest runs here.
    Running,
    /// There is no guest here and there will be none.
    Discarded(Failure),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Step {
    Idle,
    AwaitHello,
    SendWelcome,
    AwaitPrepare,
    Build,
    SendPrepared,
    AwaitState,
    Retire,
    SendRetired,
    Fence,
    Load,
    SendReady,
    AwaitCommit,
    TakeDisks,
    Run,
    SendRunning,
    Discard,
    SendGaveUp,
    Finished,
}

/// Deliberate violations, compiled into this crate's own tests only.
#[cfg(test)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Sabotage {
    /// Take the guest over when the source falls silent before `Commit`.
    RunWithoutCommit,
    /// Run without the disk locks.
    RunWithoutDisks,
    /// Be ready although the state could not be loaded, or memory differs.
    ReadyWithoutState,
    /// Say that the guest is given back before it is discarded.
    GiveUpFirst,
}

/// The state machine.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct State {
    step: Step,
    hello: Hello,
    state: Option<Box<message::State>>,
    failure: Option<Failure>,
    #[cfg(test)]
    pub(crate) sabotage: Option<Sabotage>,
}

impl State {
    /// A machine that has not begun.
    pub fn new(hello: Hello) -> Self {
        State {
            step: Step::Idle,
            hello,
            state: None,
            failure: None,
            #[cfg(test)]
            sabotage: None,
        }
    }

    fn go(&mut self, step: Step, command: Command) -> Command {
        self.step = step;
        command
    }

    /// Takes what happened, returns what to do.
    pub fn handle(&mut self, event: Event) -> Command {
        match (self.step, event) {
            (Step::Idle, Event::Start) => self.go(Step::AwaitHello, Command::Wait(Waiting::Hello)),
            (Step::AwaitHello, Event::Received(Message::Hello(_))) => {
                let welcome = Message::Welcome(self.hello.clone());
                self.go(Step::SendWelcome, Command::Send(welcome))
            }
            (Step::SendWelcome, Event::Done) => self.go(Step::AwaitPrepare, Command::Wait(Waiting::Prepare)),
            (Step::AwaitPrepare, Event::Received(Message::Prepare(prepare))) => {
                self.go(Step::Build, Command::Build(Box::new(prepare)))
            }
            (Step::Build, Event::Built(prepared)) => {
                self.go(Step::SendPrepared, Command::Send(Message::Prepared(prepared)))
            }
            (Step::SendPrepared, Event::Done) => self.go(Step::AwaitState, Command::Wait(Waiting::State)),
            (Step::AwaitState, Event::Received(Message::State(state))) => {
                self.state = Some(Box::new(state));
                self.go(Step::Fence, Command::Fence)
            }
            (Step::AwaitState, Event::Received(Message::Retire(name))) => {
                self.go(Step::Retire, Command::Retire(name))
            }
            (Step::Retire, Event::Done) => self.go(Step::SendRetired, Command::Send(Message::Retired)),
            (Step::SendRetired, Event::Done) => self.go(Step::AwaitState, Command::Wait(Waiting::State)),
            (Step::Fence, Event::Done) => match self.state.take() {
                Some(state) => self.go(Step::Load, Command::Load(state)),
                None => self.discard(Failure::new(Code::PROTOCOL, "no state to load")),
            },
            (Step::Load, Event::Loaded(ready)) => {
                self.go(Step::SendReady, Command::Send(Message::Ready(ready)))
            }
            (Step::SendReady, Event::Done) => self.go(Step::AwaitCommit, Command::Wait(Waiting::Commit)),

            // The guest is ours from here on; the link's fate changes nothing.
            (Step::AwaitCommit, Event::Received(Message::Commit)) => self.take_over(),
            (Step::TakeDisks, Event::Done) => self.go(Step::Run, Command::Run),
            (Step::Run, Event::Started(running)) => {
                self.go(Step::SendRunning, Command::Send(Message::Running(running)))
            }
            (Step::SendRunning, Event::Done | Event::LinkLost(_)) => {
                self.go(Step::Finished, Command::Finish(Outcome::Running))
            }

            // The guest is not ours, or cannot be run.
            (Step::Discard, _) => match self.failure.clone() {
                Some(why) => self.go(Step::SendGaveUp, Command::Send(Message::GaveUp(why))),
                None => self.finish_discarded(),
            },
            (Step::SendGaveUp | Step::Finished, _) => self.finish_discarded(),
            #[cfg(test)]
            (Step::Load, Event::Failed(_)) if self.sabotage == Some(Sabotage::ReadyWithoutState) => {
                self.go(Step::SendReady, Command::Send(Message::Ready(Ready { spans: Vec::new() })))
            }
            #[cfg(test)]
            (Step::AwaitCommit, Event::LinkLost(_) | Event::Deadline)
                if self.sabotage == Some(Sabotage::RunWithoutCommit) =>
            {
                self.take_over()
            }
            (_, Event::Received(Message::Abort(why))) => {
                self.discard(why.context("the source called the migration off"))
            }
            (_, Event::LinkLost(why) | Event::Failed(why)) => self.discard(why),
            (_, Event::Cancel) => self.discard(Failure::new(Code::CANCELLED, "cancelled at the destination")),
            (_, Event::Deadline) => self.discard(Failure::new(Code::TIMEOUT, "the source fell silent")),
            (_, Event::Received(message)) => self.discard(Failure::new(
                Code::PROTOCOL,
                format_args!("the source sent {} when it was not its turn", message.name()),
            )),
            (step, event) => self.discard(Failure::new(
                Code::PROTOCOL,
                format_args!("the driver answered {step:?} with {event:?}"),
            )),
        }
    }

    fn take_over(&mut self) -> Command {
        #[cfg(test)]
        if self.sabotage == Some(Sabotage::RunWithoutDisks) {
            return self.go(Step::Run, Command::Run);
        }
        self.go(Step::TakeDisks, Command::TakeDisks)
    }

    fn discard(&mut self, why: Failure) -> Command {
        #[cfg(test)]
        if self.sabotage == Some(Sabotage::GiveUpFirst) {
            self.failure = Some(why.clone());
            return self.go(Step::SendGaveUp, Command::Send(Message::GaveUp(why)));
        }
        self.failure = Some(why);
        self.go(Step::Discard, Command::Discard)
    }

    fn finish_discarded(&mut self) -> Command {
        let why = self.failure.take().unwrap_or_else(|| Failure::new(Code::OTHER, "the migration failed"));
        self.go(Step::Finished, Command::Finish(Outcome::Discarded(why)))
    }
}
