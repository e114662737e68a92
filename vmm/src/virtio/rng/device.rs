//! The entropy device.

use super::state::RngState;
use crate::component::{self, Component, Kind};
use crate::retry::retry;
use crate::virtio::queue::{Chain, LockedQueue, QueueError, WaitFor};
use crate::virtio::{DeviceConfig, DeviceType, VirtioDevice};
use std::io;
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use vm_memory::Bytes;

/// "Other" class: an entropy source has none of its own.
const CLASS: u32 = 0xff_0000;
/// Chains that fit the queue.
pub const QUEUE_SIZE: u16 = 64;
/// Most bytes for one request: a guest that asks for gigabytes must not keep its machine from
/// pausing. It is told how much it got, and asks again.
const MAX_BYTES: u32 = 64 << 10;
/// Bytes fetched at a time; the kernel gives up to 256 without being interrupted by signals.
const PIECE: usize = 256;

/// An entropy device.
#[derive(Default)]
pub struct Rng(());

impl Rng {
    /// An entropy device.
    pub fn new() -> Self {
        Rng(())
    }
}

/// Fills the chain's writable buffers; returns how many bytes were written.
fn fill(chain: &mut Chain<'_>, queue: &LockedQueue<'_>) -> Result<u32, QueueError> {
    let mut written = 0;
    for buffer in chain.filter(|descriptor| descriptor.is_write_only()) {
        let (mut address, mut rest) = (buffer.addr(), buffer.len().min(MAX_BYTES - written));
        while rest > 0 {
            let mut random = [0; PIECE];
            let piece = &mut random[..PIECE.min(rest as usize)];
            get_random(piece).map_err(|_| QueueError::Request("the host has no random numbers"))?;
            let refused = |_| QueueError::OUTSIDE;
            queue.memory().write_slice(piece, address).map_err(refused)?;
            let len = piece.len() as u32;
            address.0 = address.0.wrapping_add(u64::from(len));
            rest -= len;
            written += len;
        }
    }
    Ok(written)
}

pub fn get_random(buffer: &mut [u8]) -> io::Result<()> {
    // SAFETY: the kernel writes at most as many bytes as the buffer has.
    let got = retry!(unsafe { libc::getrandom(buffer.as_mut_ptr().cast(), buffer.len(), 0) })?;
    // Up to 256 bytes come whole.
    if got == buffer.len() as isize { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}

impl VirtioDevice for Rng {
    fn name(&self) -> &'static str {
        "rng"
    }

    fn device_type(&self) -> DeviceType {
        DeviceType { id: VIRTIO_ID_RNG as u16, class: CLASS }
    }

    fn config(&self) -> DeviceConfig {
        DeviceConfig::Rng
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn serve(&self, _index: usize, queue: &mut LockedQueue<'_>) -> Result<WaitFor, QueueError> {
        while let Some(mut chain) = queue.pop()? {
            let written = fill(&mut chain, queue)?;
            queue.add_used(chain.head_index(), written)?;
        }
        Ok(WaitFor::Buffers)
    }

    fn state_kind(&self) -> Kind {
        Kind::Rng
    }

    fn save(&self, index: u8) -> Result<Component, component::Error> {
        Component::new(Kind::Rng, index, &RngState {})
    }

    fn load(&self, components: &[Component], index: u8) -> Result<(), component::Error> {
        component::payload::<RngState>(components, Kind::Rng, index).map(|RngState {}| ())
    }
}
