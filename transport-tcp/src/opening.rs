//! How a connection begins, and how it is proved to belong to its session.
//!
//! ```text
//!   source                                   destination
//!   preamble                             →
//!                                        ←   answer: go on, or why not
//!   ------------- here TLS begins, if the preamble says so -------------
//!                                        ←   a control link only: the session's secret, 32 bytes
//!   proof of the secret for the preamble →
//!                                        ←   answer: go on, or why not
//! ```
//! The secret is chosen by the destination for each session and proved with every connection, so nothing that
//! was recorded of another session is of any use, protected or not. Over a protected control link nobody else
//! learns it. A proof is good for one preamble: whoever changes a lane's number on the way has spoiled it.
//!
//! Whether the destination is busy, and whether it admits this peer, is said only after the proof.

use crate::Error;
use crate::channel::{Channel, Protection};
use crate::stream::{self, Stream, read_by};
use migration::preamble::{Kind, LEN, Preamble, PreambleError, Status};
use migration::transport::{Proof, Secret};
use std::io;
use std::thread;
use std::time::{Duration, Instant};

/// Milliseconds to wait before each further attempt. A destination at which many call may drop one that has
/// not yet shown who it is, as does a host whose service is started anew, and nothing has happened by then.
const PAUSES: [u64; 6] = [20, 50, 100, 200, 400, 800];

/// Opens a connection, once more if the other end hangs up in the middle of it.
pub(crate) fn insist<T>(mut open: impl FnMut() -> Result<T, Error>) -> Result<T, Error> {
    let mut hung_up = None;
    for pause in PAUSES {
        match (open(), hung_up.take()) {
            (Err(error @ Error::HungUp { .. }), _) => hung_up = Some(error),
            // It was there before, and what it did then says more.
            (Err(Error::Connect { .. }), Some(before)) => return Err(before),
            (result, _) => return result,
        }
        thread::sleep(Duration::from_millis(pause));
    }
    open()
}

/// What the connecting end has to know to open a connection.
pub(crate) struct Caller<'a> {
    /// What the other end is called in messages.
    pub to: &'a str,
    /// The host that it has to prove to be, if the connection is protected.
    pub host: &'a str,
    pub protection: &'a Protection,
    /// How long each step may take.
    pub patience: Duration,
}

impl Caller<'_> {
    /// Sends `preamble` on a fresh socket, has it answered, and protects the connection.
    pub fn call(&self, mut channel: Channel, preamble: Preamble) -> Result<Channel, Error> {
        stream::call(&mut channel, self.to, preamble, self.patience)?;
        match (channel, self.protection.get()) {
            (Channel::Clear(socket), Some(protect)) => {
                let deadline = Instant::now() + self.patience;
                let place = self.protection.place(preamble.kind);
                protect.connect(socket, self.to, self.host, place, deadline).map(Channel::Protected)
            }
            (channel, _) => Ok(channel),
        }
    }
}

/// The connecting end of a control link whose preamble has been answered: takes the session's secret and
/// proves it.
pub(crate) fn take_secret(
    stream: &mut impl Stream,
    to: &str,
    preamble: &Preamble,
    patience: Duration,
) -> Result<Secret, Error> {
    let mut secret = Secret::NONE;
    let read = read_by(stream, &mut secret.0, Some(Instant::now() + patience));
    read.map_err(|source| stream::unanswered(to, source, patience))?;
    prove(stream, to, preamble, &secret, patience)?;
    Ok(secret)
}

/// The connecting end: proves the secret.
pub(crate) fn prove(
    stream: &mut impl Stream,
    to: &str,
    preamble: &Preamble,
    secret: &Secret,
    patience: Duration,
) -> Result<(), Error> {
    let mut verdict = [0; LEN];
    stream
        .write_all(&secret.proof(&preamble.encode()))
        .and_then(|()| stream.flush())
        .and_then(|()| read_by(stream, &mut verdict, Some(Instant::now() + patience)))
        .map_err(|source| stream::unanswered(to, source, patience))?;
    stream::judge(to, &verdict)
}

/// The accepting end of a control link: tells the secret of a new session and has it proved before the
/// deadline.
pub(crate) fn give_secret(
    stream: &mut impl Stream,
    preamble: &Preamble,
    deadline: Instant,
) -> Result<Secret, Error> {
    let secret = Secret::random().map_err(Error::NoPreamble)?;
    stream.write_all(&secret.0).and_then(|()| stream.flush()).map_err(Error::NoPreamble)?;
    if is_proved(stream, preamble, &secret, Some(deadline))? { Ok(secret) } else { Err(Error::Unproved) }
}

/// The accepting end: whether the secret is proved before the deadline. What is wrong is told.
pub(crate) fn is_proved(
    stream: &mut impl Stream,
    preamble: &Preamble,
    secret: &Secret,
    deadline: Option<Instant>,
) -> Result<bool, Error> {
    let mut proof = Proof::default();
    read_by(stream, &mut proof, deadline).map_err(Error::NoPreamble)?;
    let proved = secret.is_proved(&preamble.encode(), &proof);
    if !proved {
        answer(stream, preamble, Status::Session).map_err(Error::NoPreamble)?;
    }
    Ok(proved)
}

/// Answers a preamble, in the clear or behind the protection.
pub(crate) fn answer(stream: &mut impl Stream, preamble: &Preamble, status: Status) -> io::Result<()> {
    stream.write_all(&preamble.answer(status).encode())?;
    stream.flush()
}

/// Answers a preamble as far as it says whether the connection goes on encrypted. It has to if this end has
/// `protection`, which may make an exception of lanes.
pub(crate) fn agree(
    stream: &mut impl Stream,
    preamble: &Preamble,
    protection: &Protection,
) -> Result<(), Error> {
    let excepted = preamble.kind == Kind::Data && protection.has_clear_lanes();
    let (status, refused) = match (protection.is_some(), preamble.encrypted) {
        (true, false) if !excepted => (Status::Encrypted, Some(Error::NotEncrypted)),
        (false, true) => (Status::Clear, Some(Error::NoCertificate)),
        _ => (Status::Ok, None),
    };
    answer(stream, preamble, status).map_err(Error::NoPreamble)?;
    refused.map_or(Ok(()), Err)
}

/// What a preamble of another kind than is expected counts as.
pub(crate) fn misplaced() -> Error {
    Error::Preamble { to: stream::PEER.into(), why: PreambleError::Malformed }
}

#[cfg(test)]
mod tests {
    use super::*;
    use migration::transport::Token;
    use std::io::{Read, Write};
    use std::net::Shutdown;
    use std::os::unix::net::UnixStream;

    /// Longer than anything here takes that does not hang.
    const PATIENCE: Duration = Duration::from_secs(60);

    #[derive(Clone, Copy, Debug)]
    enum Fault {
        /// The connection is cut before this byte.
        Cut(usize),
        /// This byte is changed on the way.
        Changed(usize),
    }

    /// A connection on which something happens to what this end says.
    struct Faulty {
        stream: UnixStream,
        said: usize,
        fault: Option<Fault>,
    }

    impl Read for Faulty {
        fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
            self.stream.read(bytes)
        }
    }

    impl Write for Faulty {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let mut byte = bytes[0];
            match self.fault {
                Some(Fault::Cut(at)) if at == self.said => {
                    self.stream.shutdown(Shutdown::Both)?;
                    return Err(io::ErrorKind::BrokenPipe.into());
                }
                Some(Fault::Changed(at)) if at == self.said => byte ^= 1,
                _ => {}
            }
            self.said += 1;
            self.stream.write(&[byte])
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Stream for Faulty {
        fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
            self.stream.set_read_timeout(timeout)
        }

        fn set_write_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
            self.stream.set_write_timeout(timeout)
        }
    }

    /// What an end has when a connection is open.
    type Opened = Result<Secret, Error>;

    /// Opens a control link, or a lane of the session with this secret. Returns what both ends have then, and
    /// how many bytes they have said.
    fn open(lane: Option<Secret>, source: Option<Fault>, destination: Option<Fault>) -> [(Opened, usize); 2] {
        let (here, there) = UnixStream::pair().unwrap();
        let mut here = Faulty { stream: here, said: 0, fault: source };
        let mut there = Faulty { stream: there, said: 0, fault: destination };
        let token = Token([7; 16]);
        let preamble = if lane.is_some() { Preamble::data(token, 1, 2) } else { Preamble::control(token) };
        let accepting = thread::spawn(move || {
            let mut accept = || {
                let deadline = Instant::now() + PATIENCE;
                let preamble = stream::hear(&mut there, Some(deadline))?;
                agree(&mut there, &preamble, &Protection::none())?;
                let secret = match lane {
                    None => give_secret(&mut there, &preamble, deadline)?,
                    Some(secret) if is_proved(&mut there, &preamble, &secret, Some(deadline))? => secret,
                    Some(_) => return Err(Error::Unproved),
                };
                answer(&mut there, &preamble, Status::Ok).map_err(Error::NoPreamble)?;
                Ok(secret)
            };
            (accept(), there.said)
        });
        let mut connect = || {
            stream::call(&mut here, "it", preamble, PATIENCE)?;
            match lane {
                None => take_secret(&mut here, "it", &preamble, PATIENCE),
                Some(secret) => prove(&mut here, "it", &preamble, &secret, PATIENCE).map(|()| secret),
            }
        };
        let opened = connect();
        let said = here.said;
        drop(here);
        [(opened, said), accepting.join().unwrap()]
    }

    #[test]
    fn an_opening_that_is_cut_or_changed_anywhere_lets_nobody_in() {
        for lane in [None, Some(Secret([9; Secret::LEN]))] {
            let [source, destination] = open(lane, None, None);
            assert_eq!(source.0.unwrap().0, destination.0.unwrap().0);
            for at in 0..source.1 {
                for fault in [Fault::Cut(at), Fault::Changed(at)] {
                    let [(here, _), (there, _)] = open(lane, Some(fault), None);
                    assert!(here.is_err() && there.is_err(), "the source's {fault:?}");
                }
            }
            for at in 0..destination.1 {
                let [(here, _), (there, _)] = open(lane, None, Some(Fault::Cut(at)));
                assert!(here.is_err() && there.is_err(), "the destination's byte {at} is cut off");
                let [(here, _), (there, _)] = open(lane, None, Some(Fault::Changed(at)));
                // The source may find fault with a verdict that the destination has told. It is never let in
                // where it is not, and both have the same secret.
                if let Ok(here) = here {
                    assert_eq!(here.0, there.unwrap().0, "the destination's byte {at} is changed");
                }
            }
        }
    }

    #[test]
    fn only_who_hangs_up_is_called_again() {
        let hung_up = || Error::HungUp { to: "x".into() };
        let gone = || Error::Connect { to: "x".into(), source: io::ErrorKind::ConnectionRefused.into() };
        let attempts = |errors: Vec<Error>| {
            let count = errors.len();
            let mut errors = errors.into_iter();
            let result = insist(|| errors.next().map_or(Ok(()), Err));
            (count - errors.len(), result.err().map(|error| error.to_string()))
        };
        assert_eq!(attempts(vec![hung_up(), hung_up()]), (2, None));
        assert_eq!(attempts(vec![gone(), hung_up()]), (1, Some(gone().to_string())));
        assert_eq!(attempts(vec![hung_up(), gone()]), (2, Some(hung_up().to_string())));
        let always = (0..9).map(|_| hung_up()).collect();
        assert_eq!(attempts(always), (1 + PAUSES.len(), Some(hung_up().to_string())));
    }
}
