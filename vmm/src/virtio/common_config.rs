//! The registers of the common configuration, `struct virtio_pci_common_cfg` in the specification.

/// A register, by the specification's name. Addresses of 64 bits are two registers, as drivers write them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Register {
    /// Which half of the offered features [`DeviceFeature`](Self::DeviceFeature) shows.
    DeviceFeatureSelect,
    /// Half of the features that the device offers.
    DeviceFeature,
    /// Which half of the accepted features [`DriverFeature`](Self::DriverFeature) is.
    DriverFeatureSelect,
    /// Half of the features that the driver accepts.
    DriverFeature,
    /// The MSI-X vector for changes of the configuration.
    ConfigMsixVector,
    /// How many queues the device has.
    NumQueues,
    /// The device status.
    DeviceStatus,
    /// Tells a driver that the configuration changed while it was being read.
    ConfigGeneration,
    /// Which queue the registers from here on are about.
    QueueSelect,
    /// The queue's size.
    QueueSize,
    /// Its MSI-X vector.
    QueueMsixVector,
    /// Whether the driver has set it up.
    QueueEnable,
    /// The number of its doorbell.
    QueueNotifyOff,
    /// Address of its descriptor table.
    QueueDescLow,
    /// See [`QueueDescLow`](Self::QueueDescLow).
    QueueDescHigh,
    /// Address of its available ring.
    QueueDriverLow,
    /// See [`QueueDriverLow`](Self::QueueDriverLow).
    QueueDriverHigh,
    /// Address of its used ring.
    QueueDeviceLow,
    /// See [`QueueDeviceLow`](Self::QueueDeviceLow).
    QueueDeviceHigh,
}

use Register::*;

/// All registers with their lengths in bytes. Each begins where the one before ends.
const LAYOUT: [(Register, usize); 19] = [
    (DeviceFeatureSelect, 4),
    (DeviceFeature, 4),
    (DriverFeatureSelect, 4),
    (DriverFeature, 4),
    (ConfigMsixVector, 2),
    (NumQueues, 2),
    (DeviceStatus, 1),
    (ConfigGeneration, 1),
    (QueueSelect, 2),
    (QueueSize, 2),
    (QueueMsixVector, 2),
    (QueueEnable, 2),
    (QueueNotifyOff, 2),
    (QueueDescLow, 4),
    (QueueDescHigh, 4),
    (QueueDriverLow, 4),
    (QueueDriverHigh, 4),
    (QueueDeviceLow, 4),
    (QueueDeviceHigh, 4),
];

/// All registers with their offsets and lengths.
fn layout() -> impl Iterator<Item = (Register, usize, usize)> {
    LAYOUT.iter().scan(0, |end, &(register, len)| {
        let offset = *end;
        *end += len;
        Some((register, offset, len))
    })
}

impl Register {
    /// The register that has this offset and this length, if there is one.
    pub fn at(offset: usize, len: usize) -> Option<Self> {
        layout().find(|(_, at, own)| (*at, *own) == (offset, len)).map(|(register, ..)| register)
    }

    /// Its offset and its length in bytes.
    #[cfg(test)]
    pub fn place(self) -> (u64, usize) {
        let (_, offset, len) = layout().find(|(register, ..)| *register == self).unwrap();
        (offset as u64, len)
    }
}

/// Carries out a read of any offset and length: `value` is asked for the registers that it touches, and for
/// no others. Zeros are read where there are none.
pub fn read(offset: usize, data: &mut [u8], value: impl Fn(Register) -> u32) {
    data.fill(0);
    let end = offset.saturating_add(data.len());
    for (register, at, len) in layout() {
        if at < end && offset < at + len {
            let bytes = value(register).to_le_bytes();
            let (from, to) = (offset.max(at), end.min(at + len));
            data[from - offset..to - offset].copy_from_slice(&bytes[from - at..to - at]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;

    /// As the specification and Linux (`VIRTIO_PCI_COMMON_*`) have them.
    #[test]
    fn registers_are_where_the_specification_puts_them() {
        let places = [
            (DeviceFeatureSelect, 0),
            (DeviceFeature, 4),
            (DriverFeatureSelect, 8),
            (DriverFeature, 12),
            (ConfigMsixVector, 16),
            (NumQueues, 18),
            (DeviceStatus, 20),
            (ConfigGeneration, 21),
            (QueueSelect, 22),
            (QueueSize, 24),
            (QueueMsixVector, 26),
            (QueueEnable, 28),
            (QueueNotifyOff, 30),
            (QueueDescLow, 32),
            (QueueDescHigh, 36),
            (QueueDriverLow, 40),
            (QueueDriverHigh, 44),
            (QueueDeviceLow, 48),
            (QueueDeviceHigh, 52),
        ];
        assert_eq!(places, LAYOUT.map(|(register, _)| (register, register.place().0)));
        assert_eq!(layout().last().map(|(_, offset, len)| offset + len), Some(56));
        assert_eq!(Register::at(20, 1), Some(DeviceStatus));
        assert_eq!((Register::at(20, 2), Register::at(56, 4), Register::at(21, 2)), (None, None, None));
    }

    #[test]
    fn a_read_asks_for_what_it_touches_and_nothing_else() {
        let asked = RefCell::new(Vec::new());
        let read = |offset, data: &mut [u8]| {
            asked.borrow_mut().clear();
            read(offset, data, |register| {
                asked.borrow_mut().push(register);
                0x4433_2211
            });
            asked.borrow().clone()
        };
        let mut data = [0xff; 8];
        assert_eq!(read(20, &mut data[..1]), [DeviceStatus]);
        assert_eq!(data[..2], [0x11, 0xff]);
        assert_eq!(read(17, &mut data[..4]), [ConfigMsixVector, NumQueues, DeviceStatus]);
        assert_eq!(data[..5], [0x22, 0x11, 0x22, 0x11, 0xff]);
        assert_eq!(read(52, &mut data), [QueueDeviceHigh]);
        assert_eq!(data, [0x11, 0x22, 0x33, 0x44, 0, 0, 0, 0], "zeros beyond the end");
        assert_eq!(read(56, &mut data), []);
        assert_eq!((read(usize::MAX - 1, &mut data), data), (vec![], [0; 8]));
    }
}
