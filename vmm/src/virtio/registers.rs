//! Where things are in a virtio function's BAR, and what the driver wrote to the transport.
//!
//! | offset | what |
//! |---|---|
//! | 0x0000 | common configuration |
//! | 0x1000 | ISR |
//! | 0x2000 | the device's own configuration |
//! | 0x3000 | doorbells, four bytes a queue |
//! | 0x4000 | MSI-X table |
//! | 0x5000 | MSI-X pending bits |

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

/// Length of the BAR.
pub const BAR_LEN: u32 = 0x8000;
/// Length of each part of it.
pub const PART_LEN: u32 = 0x1000;
pub const COMMON_CONFIG: u32 = 0x0000;
pub const ISR_STATUS: u32 = 0x1000;
pub const DEVICE_CONFIG: u32 = 0x2000;
pub const DOORBELLS: u32 = 0x3000;
pub const MSIX_TABLE: u32 = 0x4000;
pub const MSIX_PENDING: u32 = 0x5000;

/// Bytes from one doorbell to the next.
pub const DOORBELL_LEN: u32 = 4;
/// Length of the common configuration (without the fields of features that are not offered).
pub const COMMON_CONFIG_LEN: u32 = 56;

/// What a virtio capability is about: its `cfg_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CapabilityType {
    /// The common configuration.
    Common = 1,
    /// The doorbells.
    Notify = 2,
    /// The ISR status.
    Isr = 3,
    /// The device's own configuration.
    Device = 4,
    /// A window to all of these in configuration space, for those who cannot reach the BAR.
    PciConfig = 5,
}

/// The features that every device here has.
pub const COMMON_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;
/// The event index feature.
pub const EVENT_INDEX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;
/// Without this one there is no driver for these registers.
const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;

pub const DRIVER_OK: u8 = VIRTIO_CONFIG_S_DRIVER_OK as u8;
pub const FEATURES_OK: u8 = VIRTIO_CONFIG_S_FEATURES_OK as u8;
pub const NEEDS_RESET: u8 = VIRTIO_CONFIG_S_NEEDS_RESET as u8;
/// What a driver may set in the status.
const DRIVER_STATUS: u8 = VIRTIO_CONFIG_S_ACKNOWLEDGE as u8
    | VIRTIO_CONFIG_S_DRIVER as u8
    | DRIVER_OK
    | FEATURES_OK
    | VIRTIO_CONFIG_S_FAILED as u8;

/// What the driver wrote to the transport, but for its queues.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registers {
    /// Which half of the offered features it looks at.
    pub device_feature_select: u32,
    /// Which half of the accepted ones it looks at.
    pub driver_feature_select: u32,
    /// The features that it accepted.
    pub features: u64,
    /// The status it has come to.
    pub status: u8,
    /// Which queue it looks at.
    pub queue_select: u16,
}

impl Registers {
    /// Half of `features`, as the driver reads them.
    pub fn half(features: u64, select: u32) -> u32 {
        match select {
            0 => features as u32,
            1 => (features >> 32) as u32,
            _ => 0,
        }
    }

    /// The driver accepts half of the features. They no longer change once they are agreed on.
    pub fn accept(&mut self, half: u32) {
        if self.status & FEATURES_OK != 0 {
            return;
        }
        match self.driver_feature_select {
            0 => self.features = self.features & !0xffff_ffff | u64::from(half),
            1 => self.features = self.features & 0xffff_ffff | u64::from(half) << 32,
            _ => {}
        }
    }

    /// Whether the accepted features are some that a device with these `offered` can work with.
    pub fn agrees(&self, offered: u64) -> bool {
        self.features & !offered == 0 && self.features & VERSION_1 != 0
    }

    /// The driver adds to its status; true if it thereby became ready. A step that it may not take,
    /// or not yet, shows in the status that it reads back.
    pub fn advance(&mut self, status: u8, offered: u64) -> bool {
        let before = self.status;
        let mut after = before | status & DRIVER_STATUS;
        if !self.agrees(offered) {
            after &= !FEATURES_OK;
        }
        if after & FEATURES_OK == 0 {
            after &= !DRIVER_OK;
        }
        self.status = after;
        before & DRIVER_OK == 0 && after & DRIVER_OK != 0
    }

    /// Whether they are such as a driver can have come to.
    pub fn plausible(&self, offered: u64) -> bool {
        self.status & !DRIVER_STATUS == 0
            && (self.status & FEATURES_OK == 0 || self.agrees(offered))
            && (self.status & DRIVER_OK == 0 || self.status & FEATURES_OK != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_driver_is_ready_only_with_features_that_were_offered() {
        let offered = COMMON_FEATURES | 1;
        let mut registers = Registers::default();
        assert!(!registers.advance(3 | FEATURES_OK, offered));
        assert_eq!(registers.status, 3, "no features were accepted, not even version 1");
        registers.driver_feature_select = 1;
        registers.accept(1);
        registers.driver_feature_select = 0;
        registers.accept(2);
        registers.driver_feature_select = 7;
        registers.accept(u32::MAX);
        assert!(!registers.advance(FEATURES_OK, offered) && registers.status == 3, "2 was not offered");
        assert!(!registers.advance(DRIVER_OK, offered) && registers.status == 3, "out of order");
        registers.driver_feature_select = 0;
        registers.accept(1);
        assert!(!registers.advance(FEATURES_OK, offered));
        assert_eq!(registers.status, 3 | FEATURES_OK);
        registers.accept(0);
        assert_eq!(registers.features, 1 | VERSION_1, "no change once agreed");
        assert!(registers.advance(DRIVER_OK, offered));
        assert!(!registers.advance(DRIVER_OK, offered), "ready only once");
        assert!(registers.plausible(offered));
        assert!(!registers.plausible(offered & !1));
        assert!(!Registers { status: DRIVER_OK, ..registers }.plausible(offered));
        assert!(!Registers { status: NEEDS_RESET, ..registers }.plausible(offered));
    }
}
