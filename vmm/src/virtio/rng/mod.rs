//! virtio-rng: random bytes for the guest, from the host kernel's generator.

mod device;
mod state;
#[cfg(test)]
mod tests;

pub use device::Rng;
pub(crate) use device::get_random;
