//! Peers that do not keep to the protocol, on either side.

use migration::message::{Hello, Message, Prepare};
use migration::preamble::{self, Preamble};
use migration::transport::Token;
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

    /// A control connection to a receiver that has answered the preamble.
    pub fn session(to: SocketAddr, token: Token) -> Self {
        let mut rogue = Rogue::call(to);
        let answer = rogue.preamble(Preamble::control(token));
        assert_eq!(answer.map(|a| a.status), Some(preamble::Status::Ok));
        rogue
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
        let mut answer = [0; preamble::LEN];
        self.stream.read_exact(&mut answer).ok()?;
        Preamble::decode(&answer).ok()
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

/// A peer that accepts one connection, answers the preamble as a receiver does, and then behaves.
pub fn pretend_receiver(behave: impl FnOnce(Rogue) + Send + 'static) -> (SocketAddr, JoinHandle<()>) {
    pretend(|mut rogue, first| {
        let preamble = Preamble::decode(&first).unwrap();
        rogue.raw(&preamble.answer(preamble::Status::Ok).encode());
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
