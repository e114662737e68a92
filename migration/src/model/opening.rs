//! How the control link is opened before there is a migration: the preamble, its answer, the session's
//! secret, the proof of it, and the verdict. Preambles, proofs and their judgement are those of production.

use super::luck::Luck;
use super::world::Wire;
use crate::preamble::{LEN, Preamble, Status};
use crate::transport::{Proof, Secret, Token};
use std::collections::VecDeque;

/// The secret that the destination chooses.
const SECRET: Secret = Secret([5; Secret::LEN]);

fn preamble() -> Preamble {
    Preamble::control(Token([7; 16]))
}

/// How far a side is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Opening {
    /// The source is about to call.
    Calls,
    /// It waits for the answer to its preamble.
    AwaitsAnswer,
    /// It waits for the secret, and then proves it.
    AwaitsSecret,
    /// It waits to hear whether it is let in.
    AwaitsVerdict,
    /// The destination waits for a caller's preamble.
    AwaitsCall,
    /// It has told the secret and waits for the proof.
    AwaitsProof,
    /// It has let the other side in, or was let in.
    Open,
    /// There is no session for this side, or its process is dead.
    Closed,
}

impl Opening {
    /// Whether it has not come to an end.
    pub fn goes_on(self) -> bool {
        !matches!(self, Opening::Open | Opening::Closed)
    }

    /// Whether it waits for the other side.
    pub fn waits(self) -> bool {
        self.goes_on() && self != Opening::Calls
    }

    /// How its next step may end, beside the ends that every wait has.
    pub fn lucks(self, comes: bool, lucks: &mut Vec<Luck>) {
        match self {
            Opening::Calls => lucks.extend([Luck::Well, Luck::Fails]),
            Opening::AwaitsProof if comes => lucks.extend([Luck::Changed, Luck::NoRoom, Luck::HalfDone]),
            _ if comes => lucks.push(Luck::Changed),
            _ => {}
        }
    }

    /// What follows a step. With `credulous` the destination lets everybody in. Returns whether it has let in
    /// somebody who has not proved the secret.
    pub fn step(&mut self, luck: Luck, incoming: &mut Wire, outgoing: &mut Wire, credulous: bool) -> bool {
        if *self == Opening::Calls {
            *self = if luck == Luck::Fails { Opening::Closed } else { Opening::AwaitsAnswer };
            if *self == Opening::AwaitsAnswer {
                outgoing.say(&preamble().encode());
            }
            return false;
        }
        let heard = if luck == Luck::Late { None } else { incoming.opening.pop_front() };
        let Some(mut heard) = heard else {
            *self = Opening::Closed;
            return false;
        };
        if luck == Luck::Changed {
            heard[0] ^= 1;
        }
        let status = || Some(Preamble::decode(heard.first_chunk::<LEN>()?).ok()?.status);
        let mut unproved = false;
        *self = match self {
            Opening::AwaitsAnswer if status() == Some(Status::Ok) => Opening::AwaitsSecret,
            Opening::AwaitsSecret => match heard.first_chunk() {
                Some(secret) => {
                    outgoing.say(&Secret(*secret).proof(&preamble().encode()));
                    Opening::AwaitsVerdict
                }
                None => Opening::Closed,
            },
            Opening::AwaitsVerdict if status() == Some(Status::Ok) => Opening::Open,
            Opening::AwaitsCall => match status() {
                Some(Status::Ok) => {
                    outgoing.say(&preamble().answer(Status::Ok).encode());
                    outgoing.say(&SECRET.0);
                    Opening::AwaitsProof
                }
                _ => Opening::Closed,
            },
            Opening::AwaitsProof => {
                let proved =
                    heard.len() == size_of::<Proof>() && SECRET.is_proved(&preamble().encode(), &heard);
                let (verdict, next) = match luck {
                    _ if !proved && !credulous => (Status::Session, Opening::Closed),
                    Luck::NoRoom => (Status::Busy, Opening::Closed),
                    // It could not tell, as it thinks.
                    Luck::HalfDone => (Status::Ok, Opening::Closed),
                    _ => (Status::Ok, Opening::Open),
                };
                outgoing.say(&preamble().answer(verdict).encode());
                unproved = !proved && next == Opening::Open;
                next
            }
            _ => Opening::Closed,
        };
        unproved
    }
}

impl Wire {
    fn say(&mut self, bytes: &[u8]) {
        if !self.cut {
            self.opening.push_back(bytes.to_vec());
        }
    }

    /// What is under way, of the opening and after it.
    pub(super) fn len(&self) -> usize {
        self.opening.len() + self.queue.len()
    }

    /// Loses the youngest, so that `len` are left.
    pub(super) fn lose(&mut self, len: usize) {
        self.queue.truncate(len.saturating_sub(self.opening.len()));
        self.opening.truncate(len);
    }
}

/// What is said while a link is opened, each step's bytes by themselves.
pub(super) type Said = VecDeque<Vec<u8>>;
