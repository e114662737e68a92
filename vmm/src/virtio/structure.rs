//! Structures of the specification, as they lie in a configuration space or in guest RAM.

use virtio_bindings::virtio_blk::{virtio_blk_config, virtio_blk_discard_write_zeroes, virtio_blk_outhdr};
use virtio_bindings::virtio_net::virtio_net_config;
use vm_memory::ByteValued;

const _: () = assert!(cfg!(target_endian = "little"), "the specification's integers are little-endian");

/// A structure whose bytes can be read and written.
#[derive(Clone, Copy, Default)]
#[repr(transparent)]
pub struct Structure<T>(pub T);

// SAFETY: the structure is packed and made of integers, or of structures of integers without padding, so that
// any bytes are a valid value and each of its bytes is initialised.
unsafe impl ByteValued for Structure<virtio_blk_config> {}
// SAFETY: the structure is made of integers, each of which begins where the one before ends; as above.
unsafe impl ByteValued for Structure<virtio_blk_discard_write_zeroes> {}
// SAFETY: as above.
unsafe impl ByteValued for Structure<virtio_blk_outhdr> {}
// SAFETY: the structure is packed and made of integers; as above.
unsafe impl ByteValued for Structure<virtio_net_config> {}

impl<T> Structure<T>
where
    Self: ByteValued,
{
    /// Carries out a driver's read of this configuration space from `offset` on. Zeros are read beyond its
    /// end.
    pub fn read_config(&self, offset: u64, data: &mut [u8]) {
        let rest = usize::try_from(offset).ok().and_then(|offset| self.as_slice().get(offset..));
        let rest = rest.unwrap_or_default();
        let there = rest.len().min(data.len());
        data[..there].copy_from_slice(&rest[..there]);
        data[there..].fill(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_part_of_a_configuration_space_can_be_read() {
        let space =
            Structure(virtio_net_config { mac: [1, 2, 3, 4, 5, 6], mtu: 0x1234, ..Default::default() });
        let read = |offset| {
            let mut data = [0xff; 4];
            space.read_config(offset, &mut data);
            data
        };
        assert_eq!(read(3), [4, 5, 6, 0]);
        assert_eq!(read(9), [0, 0x34, 0x12, 0]);
        let end = size_of::<virtio_net_config>() as u64;
        assert_eq!([read(end - 1), read(end), read(u64::MAX)], [[0; 4]; 3]);
    }
}
