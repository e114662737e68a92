//! What the driver asks for on the control queue.

use super::Mac;
use crate::virtio::queue::{LockedQueue, QueueError, WaitFor};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK, VIRTIO_NET_CTRL_GUEST_OFFLOADS,
    VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET, VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET,
    VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_ERR, VIRTIO_NET_OK,
};
use vm_memory::{Bytes, GuestAddress};

/// Longest command that there is, with its class and number.
const MAX_COMMAND: usize = 2 + 8;

/// A command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// It has announced itself.
    Announced,
    /// Its address is another one from here on.
    SetMac(Mac),
    /// Use so many pairs of queues.
    SetPairs(u16),
    /// Leave it this, and nothing else.
    SetOffloads(u64),
}

impl Command {
    fn parse(bytes: &[u8]) -> Option<Self> {
        let (head, rest) = bytes.split_first_chunk::<2>()?;
        match (u32::from(head[0]), u32::from(head[1])) {
            (VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK) if rest.is_empty() => {
                Some(Command::Announced)
            }
            (VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET) => {
                Some(Command::SetMac(Mac(rest.try_into().ok()?)))
            }
            (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET) => {
                Some(Command::SetPairs(u16::from_le_bytes(rest.try_into().ok()?)))
            }
            (VIRTIO_NET_CTRL_GUEST_OFFLOADS, VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET) => {
                Some(Command::SetOffloads(u64::from_le_bytes(rest.try_into().ok()?)))
            }
            _ => None,
        }
    }
}

/// Serves the control queue. `execute` carries a command out, and says whether it could.
pub fn control(
    queue: &mut LockedQueue<'_>,
    execute: impl Fn(Command) -> bool,
) -> Result<WaitFor, QueueError> {
    let memory = queue.memory();
    while let Some(mut chain) = queue.pop()? {
        let mut bytes = [0; MAX_COMMAND + 1];
        let mut len = 0;
        let mut answer = None;
        for buffer in chain.by_ref() {
            if buffer.is_write_only() {
                answer = (buffer.len() > 0).then(|| buffer.addr());
                continue;
            }
            let rest = &mut bytes[len..];
            let count = rest.len().min(buffer.len() as usize);
            let refused = |_| QueueError::OUTSIDE;
            memory.read_slice(&mut rest[..count], buffer.addr()).map_err(refused)?;
            len += count;
        }
        let answer: GuestAddress = answer.ok_or(QueueError::Request("it has no place for its answer"))?;
        // One that is too long is none of those that are known.
        let done = Command::parse(&bytes[..len]).is_some_and(&execute);
        let outcome = if done { VIRTIO_NET_OK } else { VIRTIO_NET_ERR } as u8;
        memory
            .write_obj(outcome, answer)
            .map_err(|_| QueueError::Request("it has no place for its answer"))?;
        queue.add_used(chain.head_index(), 1)?;
    }
    Ok(WaitFor::Buffers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_have_exactly_their_length() {
        assert_eq!(Command::parse(&[3, 0]), Some(Command::Announced));
        assert_eq!(Command::parse(&[1, 1, 2, 0, 0, 0, 0, 9]), Some(Command::SetMac(Mac([2, 0, 0, 0, 0, 9]))));
        assert_eq!(Command::parse(&[4, 0, 2, 1]), Some(Command::SetPairs(0x102)));
        let offloads = [5, 0, 0x83, 0, 0, 0, 0, 0, 0, 1];
        assert_eq!(Command::parse(&offloads), Some(Command::SetOffloads(0x83 | 1 << 56)));
        let wrong: [&[u8]; 8] =
            [&[], &[3], &[3, 0, 0], &[3, 1], &[1, 1, 2, 0, 0, 0, 0], &[4, 0, 2], &[0, 0, 1], &offloads[..9]];
        assert!(wrong.iter().all(|bytes| Command::parse(bytes).is_none()));
        assert!(Command::parse(&[&offloads[..], &[0]].concat()).is_none());
    }
}
