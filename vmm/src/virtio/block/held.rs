//! Requests that this host could not carry out, and that wait until it can, while the guest is paused.
//!
//! The driver knows nothing of it: to it they are still in flight. Each is kept as its buffers, which are the
//! device's until the request is completed, and moves with the guest.

use super::request::{Request, RequestType, Segment};
use serde::{Deserialize, Serialize};
use vm_memory::GuestAddress;

/// One of them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    /// The head of its chain.
    pub head: u16,
    pub request_type: RequestType,
    sector: u64,
    readable: Vec<(u64, u64)>,
    writable: Vec<(u64, u64)>,
    status_at: u64,
}

fn bare(parts: &[Segment]) -> Vec<(u64, u64)> {
    parts.iter().map(|part| (part.address.0, part.len as u64)).collect()
}

fn segments(parts: &[(u64, u64)]) -> impl Iterator<Item = Segment> {
    parts.iter().map(|(address, len)| Segment { address: GuestAddress(*address), len: *len as usize })
}

impl Held {
    /// A request of which nothing has been taken off.
    pub fn new(head: u16, request_type: RequestType, request: &Request) -> Self {
        Held {
            head,
            request_type,
            sector: request.sector,
            readable: bare(request.all_outgoing()),
            writable: bare(request.incoming()),
            status_at: request.status_at().0,
        }
    }

    /// Makes `request` this one. Where its buffers lie is looked at when they are used: a state may say
    /// anything.
    pub fn restore(&self, request: &mut Request) {
        let (readable, writable) = (segments(&self.readable), segments(&self.writable));
        request.restore(self.sector, readable, writable, GuestAddress(self.status_at));
    }
}
