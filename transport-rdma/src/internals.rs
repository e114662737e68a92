//! What fuzzing reaches of this crate's inside. It may change in any release.

use crate::buffers::MAX_MESSAGE_BYTES;
use crate::cm::{MAX_PRIVATE_DATA_BYTES, PrivateData};
use crate::hello;
use crate::message::{self, Message};
use crate::offer::Offer;
use migration::transport::{Secret, Token};

/// Reads a message and writes it again: what is read is what was sent.
pub fn message(bytes: &[u8]) {
    let Ok(message) = message::get(bytes) else { return };
    if let Message::Zero(extents) = message {
        assert_eq!(extents.iter().count(), (bytes.len() - 4) / 20);
    }
    let mut buffer = [0; MAX_MESSAGE_BYTES];
    if bytes.len() <= buffer.len() {
        // An errno below 1 is written as 1; all else is written as it was read.
        let len = message::put(&mut buffer, &message);
        let once = message::get(&buffer[..len]).expect("a message");
        let mut again = [0; MAX_MESSAGE_BYTES];
        let len = message::put(&mut again, &once);
        assert_eq!(message::get(&again[..len]).ok(), Some(once));
    }
}

/// Reads the private data of a connection request, and of a refusal.
pub fn hello(bytes: &[u8]) {
    let mut private_data: PrivateData = [0; MAX_PRIVATE_DATA_BYTES];
    let len = bytes.len().min(private_data.len());
    private_data[..len].copy_from_slice(&bytes[..len]);
    let token = Token([7; 16]);
    if let Ok(purpose) = hello::accept(&private_data, token, &Secret::NONE) {
        let mut again: PrivateData = [0; MAX_PRIVATE_DATA_BYTES];
        let request = hello::request(token, &Secret::NONE, purpose, 64);
        again[..request.len()].copy_from_slice(&request);
        assert_eq!(hello::accept(&again, token, &Secret::NONE), Ok(purpose));
    }
    hello::refused(&private_data);
}

/// Reads an offer and writes it again.
pub fn offer(bytes: &[u8], regions: usize) {
    if let Ok(offer) = Offer::decode(bytes, regions) {
        assert_eq!(Offer::decode(&offer.encode(), regions).ok(), Some(offer));
    }
}

/// One of each kind: messages, a request, an offer.
pub fn examples() -> (Vec<Vec<u8>>, Vec<u8>, Vec<u8>) {
    let extent = migration::memory::Extent { region: 0, offset: 0x3000, len: 0x2000 };
    let mut buffer = [0; MAX_MESSAGE_BYTES];
    let len = message::put_zeros(&mut buffer, &[extent, extent]);
    let mut messages = vec![buffer[..len].to_vec()];
    for message in [
        Message::Progress(1 << 20),
        Message::Done { messages: 3, round: None },
        Message::Done { messages: 4, round: Some(2) },
        Message::Request(extent),
        Message::Announce { extent, outcome: Ok(9) },
    ] {
        let len = message::put(&mut buffer, &message);
        messages.push(buffer[..len].to_vec());
    }
    let request = hello::request(Token([7; 16]), &Secret::NONE, hello::Purpose::Lane(1), 4).to_vec();
    let address = std::net::SocketAddr::from(([10, 0, 0, 1], 4711));
    (messages, request, Offer { address, chunk_shifts: vec![24, 30] }.encode())
}
