//! A control link's bytes at the destination: the preamble, then frames of messages.

#![no_main]

use libfuzzer_sys::fuzz_target;
use migration::link::ControlLink;
use migration::message::Message;
use migration::preamble::{self, Preamble};
use migration::transport::Token;
use std::io::{self, Read, Write};
use std::time::Duration;
use transport_tcp::{Stream, StreamLink};

/// What a peer has sent.
struct Sent<'a>(&'a [u8]);

impl Read for Sent<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.0.read(into)
    }
}

impl Write for Sent<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Stream for Sent<'_> {
    fn set_read_timeout(&self, _: Option<Duration>) -> io::Result<()> {
        Ok(())
    }

    fn set_write_timeout(&self, _: Option<Duration>) -> io::Result<()> {
        Ok(())
    }
}

const PATIENCE: Duration = Duration::from_secs(5);

fuzz_target!(|sent: &[u8]| {
    if let Some(first) = sent.first_chunk()
        && let Ok(preamble) = Preamble::decode(first)
    {
        assert_eq!(preamble.encode(), *first);
    }
    // No input knows the secret of its session, so this goes no further than the proof.
    assert!(StreamLink::accept(Sent(sent), PATIENCE).is_err());
    let frames = sent.get(preamble::LEN..).unwrap_or_default();
    let mut link = StreamLink::new(Sent(frames), Token([7; 16]));
    while let Ok(Some(frame)) = link.receive(PATIENCE) {
        let _ = Message::decode(&frame);
    }
});
