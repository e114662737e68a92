//! Chains of work requests: collected one by one, and posted by a single call.

use super::window::Admitted;
use crate::queue::QueuePair;
use crate::zeroed::Zeroed;
use rdma_sys::*;
use std::io;
use std::ptr;

/// Requests in a chain.
pub(super) const MAX_CHAIN_REQUESTS: usize = 32;

/// A chain of send requests with at most one scatter/gather element each.
///
/// All memory is allocated once. A request is linked to its element and its successor when the chain is
/// posted.
pub(super) struct Chain {
    requests: Box<[ibv_send_wr]>,
    /// Element `n` belongs to request `n`.
    elements: Box<[ibv_sge]>,
    len: usize,
}

// SAFETY: the pointers inside `requests` lead into `requests` and `elements`, which are on the heap, belong
// to this struct alone and move with it. They are set anew before each use (`link`).
unsafe impl Send for Chain {}

impl Chain {
    /// An empty chain.
    pub(super) fn new() -> Chain {
        Chain {
            requests: (0..MAX_CHAIN_REQUESTS).map(|_| ibv_send_wr::zeroed()).collect(),
            elements: vec![ibv_sge { addr: 0, length: 0, lkey: 0 }; MAX_CHAIN_REQUESTS].into(),
            len: 0,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether the chain has to be posted before one more request can be added.
    pub(super) fn is_full(&self) -> bool {
        self.len == self.requests.len()
    }

    /// Adds an RDMA write of `local` to the peer's memory at `remote_addr` under the key `rkey`.
    ///
    /// # Panics
    /// When the chain is full, as the other two that add.
    pub(super) fn write(&mut self, admitted: Admitted, local: ibv_sge, remote_addr: u64, rkey: u32) {
        self.elements[self.len] = local;
        let request = self.add(admitted, ibv_wr_opcode::IBV_WR_RDMA_WRITE, 1);
        request.wr.rdma.remote_addr = remote_addr;
        request.wr.rdma.rkey = rkey;
    }

    /// Adds a message.
    pub(super) fn send(&mut self, admitted: Admitted, message: ibv_sge) {
        self.elements[self.len] = message;
        self.add(admitted, ibv_wr_opcode::IBV_WR_SEND, 1);
    }

    /// Adds an RDMA write of no bytes with immediate data. It needs neither a key nor an address.
    pub(super) fn write_immediate(&mut self, admitted: Admitted, immediate: u32) {
        let request = self.add(admitted, ibv_wr_opcode::IBV_WR_RDMA_WRITE_WITH_IMM, 0);
        request.imm_data_invalidated_rkey_union.imm_data = immediate.to_be();
        request.wr.rdma.remote_addr = 0;
        request.wr.rdma.rkey = 0;
    }

    fn add(&mut self, admitted: Admitted, opcode: ibv_wr_opcode::Type, elements: i32) -> &mut ibv_send_wr {
        let request = &mut self.requests[self.len];
        request.wr_id = admitted.id;
        request.opcode = opcode;
        request.num_sge = elements;
        request.send_flags = if admitted.signaled { ibv_send_flags::IBV_SEND_SIGNALED.0 } else { 0 };
        self.len += 1;
        request
    }

    /// Posts all requests and empties the chain.
    ///
    /// # Errors
    /// When the device refuses one; those before it may have been taken.
    ///
    /// # Safety
    /// What the requests point to must be registered in the pair's domain under the keys that were given, and
    /// stay so until the requests are complete. A message's buffer must be left alone until its request is
    /// complete, or until the peer has handled the message.
    pub(super) unsafe fn post(&mut self, queue: &QueuePair) -> io::Result<()> {
        let Some(first) = self.link() else { return Ok(()) };
        self.len = 0;
        // SAFETY: `link` has made a chain of initialised requests that ends in null. Each points to an
        // element of this struct, which has one for every request. The call copies requests and elements and
        // keeps no pointer to them. The caller vouches for the memory that the elements name.
        unsafe { queue.post_send(first) }
    }

    /// Points each request to its element and its successor. Returns the first, `None` if there is none.
    fn link(&mut self) -> Option<*mut ibv_send_wr> {
        let (requests, elements) = (self.requests.as_mut_ptr(), self.elements.as_mut_ptr());
        for index in 0..self.len {
            let is_last = index + 1 == self.len;
            // SAFETY: both slices have more than `index` entries, and more than `index + 1` unless this is
            // the last; no reference to any of them exists.
            unsafe {
                let request = requests.add(index);
                (*request).sg_list = elements.add(index);
                (*request).next = if is_last { ptr::null_mut() } else { requests.add(index + 1) };
            }
        }
        (self.len > 0).then_some(requests)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn admitted(id: u64) -> Admitted {
        Admitted { id, signaled: id.is_multiple_of(2) }
    }

    fn sge(number: u32) -> ibv_sge {
        ibv_sge { addr: u64::from(number) << 12, length: number, lkey: number + 100 }
    }

    /// Walks a linked chain: for each request its number, opcode, flags and element.
    fn walk(chain: &mut Chain) -> Vec<(u64, u32, u32, Option<u32>)> {
        let mut found = Vec::new();
        let mut next = chain.link().unwrap_or(ptr::null_mut());
        // SAFETY: `link` says that the pointers lead to requests of the chain, or are null.
        while let Some(request) = unsafe { next.as_ref() } {
            // SAFETY: a request with an element points to one of the chain's.
            let element = (request.num_sge == 1).then(|| unsafe { (*request.sg_list).length });
            found.push((request.wr_id, request.opcode, request.send_flags, element));
            next = request.next;
        }
        found
    }

    const SIGNALED: u32 = ibv_send_flags::IBV_SEND_SIGNALED.0;

    #[test]
    fn an_empty_chain_has_nothing_to_post() {
        let mut chain = Chain::new();
        assert!(chain.is_empty() && !chain.is_full());
        assert_eq!(chain.link(), None);
    }

    #[test]
    fn requests_keep_their_order_elements_and_flags() {
        let mut chain = Chain::new();
        chain.write(admitted(1), sge(1), 0x5000, 77);
        chain.send(admitted(2), sge(2));
        chain.write_immediate(admitted(3), 0x0102_0304);
        assert_eq!(
            walk(&mut chain),
            [
                (1, ibv_wr_opcode::IBV_WR_RDMA_WRITE, 0, Some(1)),
                (2, ibv_wr_opcode::IBV_WR_SEND, SIGNALED, Some(2)),
                (3, ibv_wr_opcode::IBV_WR_RDMA_WRITE_WITH_IMM, 0, None),
            ]
        );
        // SAFETY: these are the forms of the unions that the requests' kinds have.
        let (remote, immediate) = unsafe {
            let immediate = chain.requests[2].imm_data_invalidated_rkey_union.imm_data;
            (chain.requests[0].wr.rdma, immediate)
        };
        assert_eq!((remote.remote_addr, remote.rkey), (0x5000, 77));
        assert_eq!(immediate.to_ne_bytes(), [1, 2, 3, 4]);
    }

    #[test]
    fn a_full_chain_is_linked_to_its_end() {
        let mut chain = Chain::new();
        for number in 0..MAX_CHAIN_REQUESTS as u32 {
            assert!(!chain.is_full());
            chain.write(admitted(u64::from(number)), sge(number), 0, 0);
        }
        assert!(chain.is_full());
        let lengths: Vec<_> = walk(&mut chain).into_iter().filter_map(|(.., element)| element).collect();
        assert!(lengths.into_iter().eq(0..MAX_CHAIN_REQUESTS as u32));
    }

    /// A shorter chain in the place of a longer one ends at its own last request, and carries none of its
    /// flags.
    #[test]
    fn a_chain_is_used_again() {
        let mut chain = Chain::new();
        (0..4).for_each(|id| chain.send(Admitted { id, signaled: true }, sge(9)));
        chain.link();
        chain.len = 0;
        chain.write_immediate(Admitted { id: 4, signaled: false }, 0);
        assert_eq!(walk(&mut chain), [(4, ibv_wr_opcode::IBV_WR_RDMA_WRITE_WITH_IMM, 0, None)]);
    }
}
