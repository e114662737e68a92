//! Peers that do not keep to the protocol, on either side.

use migration::message::{Hello, Message, Prepare};
use migration::preamble::{self, Preamble, Status};
use migration::transport::{Proof, Secret, Token};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::thread::{self, JoinHandle};
use std::time::Duration;
use vmm::{Host, Machine, MachineConfig, SerialOutput};

/// How long a rogue waits for an answer.
const PATIENCE: Duration = Duration::from_secs(60);

/// One end of a connection, with what it takes to speak the protocol, well or badly.
pub struct Rogue {
    stream: TcpStream,
}

impl Rogue {
    /// Calls a receiver and says nothing yet.
    pub fn call(to: SocketAddr) -> Self {
        Rogue::on(TcpStream::connect(to).unwrap())
    }

    fn on(stream: TcpStream) -> Self {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_nodelay(true).unwrap();
        Rogue { stream }
    }

    /// A control connection that a receiver has taken for a session's, and the session's secret.
    pub fn session(to: SocketAddr, token: Token) -> (Self, Secret) {
        let mut rogue = Rogue::call(to);
        let (secret, status) = rogue.open(token).unwrap();
        assert_eq!(status, Status::Ok);
        (rogue, secret)
    }

    /// Opens a control connection as a source should; returns the secret and what the receiver says to it.
    pub fn open(&mut self, token: Token) -> Option<(Secret, Status)> {
        let preamble = Preamble::control(token);
        assert_eq!(self.preamble(preamble)?.status, Status::Ok);
        let mut secret = Secret::NONE;
        self.stream.read_exact(&mut secret.0).ok()?;
        let answer = self.prove(&preamble, &secret)?;
        Some((secret, answer.status))
    }

    /// Opens a lane as a source should; returns what the receiver says to it.
    pub fn lane(&mut self, preamble: Preamble, secret: &Secret) -> Option<Status> {
        match self.preamble(preamble)?.status {
            Status::Ok => Some(self.prove(&preamble, secret)?.status),
            refused => Some(refused),
        }
    }

    fn prove(&mut self, preamble: &Preamble, secret: &Secret) -> Option<Preamble> {
        self.raw(&secret.proof(&preamble.encode()));
        self.answer()
    }

    fn answer(&mut self) -> Option<Preamble> {
        let mut answer = [0; preamble::LEN];
        self.stream.read_exact(&mut answer).ok()?;
        Preamble::decode(&answer).ok()
    }

    /// Greets the receiver as a source should that knows no feature, so that nothing is sent it but what it
    /// must have.
    pub fn greet(mut self) -> Self {
        self.send(&Message::Hello(Hello { software: "rogue".into(), features: 0 }));
        assert_eq!(self.receive().map(|m| m.name()), Some("Welcome"));
        self
    }

    /// Sends a preamble and reads the answer to it.
    pub fn preamble(&mut self, preamble: Preamble) -> Option<Preamble> {
        self.raw(&preamble.encode());
        self.answer()
    }

    /// Sends bytes as they are. The other side may have hung up already.
    pub fn raw(&mut self, bytes: &[u8]) {
        let _ = self.stream.write_all(bytes);
    }

    /// Sends a frame that contains anything.
    pub fn frame(&mut self, content: &[u8]) {
        self.raw(&[&(content.len() as u32).to_le_bytes(), content].concat());
    }

    /// Sends a message.
    pub fn send(&mut self, message: &Message) {
        self.frame(&message.encode());
    }

    /// The next message; none when the other side hangs up.
    pub fn receive(&mut self) -> Option<Message> {
        let mut length = [0; 4];
        self.stream.read_exact(&mut length).ok()?;
        let mut frame = vec![0; u32::from_le_bytes(length) as usize];
        self.stream.read_exact(&mut frame).ok()?;
        Message::decode(&frame).ok()
    }

    /// Reads all that comes until the other side hangs up.
    pub fn rest(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        // A connection that is reset has ended as well.
        let _ = self.stream.read_to_end(&mut bytes);
        bytes
    }
}

/// A peer that accepts one connection and does with it what `behave` does. The first 32 bytes have been read
/// by then.
pub fn pretend(
    behave: impl FnOnce(Rogue, [u8; preamble::LEN]) + Send + 'static,
) -> (SocketAddr, JoinHandle<()>) {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let address = listener.local_addr().unwrap();
    let thread = thread::spawn(move || {
        let mut rogue = Rogue::on(listener.accept().unwrap().0);
        let mut first = [0; preamble::LEN];
        rogue.stream.read_exact(&mut first).unwrap();
        behave(rogue, first);
    });
    (address, thread)
}

/// A peer that accepts one connection, opens it as a receiver does, and then behaves.
pub fn pretend_receiver(behave: impl FnOnce(Rogue) + Send + 'static) -> (SocketAddr, JoinHandle<()>) {
    pretend(|mut rogue, first| {
        let preamble = Preamble::decode(&first).unwrap();
        let go_on = preamble.answer(Status::Ok).encode();
        rogue.raw(&[&go_on[..], &[7; Secret::LEN]].concat());
        rogue.stream.read_exact(&mut Proof::default()).unwrap();
        rogue.raw(&go_on);
        behave(rogue);
    })
}

/// A machine of 16 MiB in this process that has not run, whose description a rogue source can send.
pub fn honest_machine() -> Machine {
    let host = Host::open().unwrap();
    let config = MachineConfig::new(&host, 16 << 20, 1).unwrap();
    Machine::build(&host, MachineConfig { serial: SerialOutput::Null, ..config }).unwrap()
}

/// What an honest source would ask for.
pub fn honest_prepare(machine: &Machine) -> Prepare {
    use migration::machine::SourceMachine;
    Prepare {
        description: machine.describe().unwrap(),
        layout: machine.memory().ram().layout(),
        transports: vec![transport_tcp::NAME.into()],
    }
}
