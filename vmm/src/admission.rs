//! What a host decides about each guest that comes: whether it comes, and what it gets here.
//!
//! A host asks an [`Admission`] once a guest's description has been read and is within the
//! [`Limits`](crate::limits::Limits), before anything is built for it. Without one, an interface gets the tap
//! of its number ([`LocalConfig::taps`](crate::virtio::LocalConfig)), and disks are found among
//! [`LocalConfig::images`](crate::virtio::LocalConfig).

use crate::virtio::DeviceConfig;
use crate::virtio::block::{BlockConfig, Images};
use crate::virtio::net::{NetConfig, TapConfig};
use migration::Failure;
use std::fmt;

/// Who decides about guests that come to a host.
pub trait Admission: fmt::Debug + Send + Sync {
    /// Decides about a guest. The source waits for the answer, and nothing has moved yet.
    ///
    /// # Errors
    /// Why the guest cannot come. The source's operator reads it: it says what to do.
    fn admit(&self, guest: &Guest<'_>) -> Result<Admitted, Failure>;
}

/// What a host must know of a guest to decide about it. A peer has said it, and it is within the limits.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Guest<'a> {
    /// What it is called; a name that a machine may have ([`check_name`](crate::machine::check_name)).
    pub name: &'a str,
    /// Bytes of RAM, or of what the machine keeps to boot from if that is more.
    pub memory: u64,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Whether it is to stay paused.
    pub stays_paused: bool,
    /// Its PCI devices, by place.
    pub devices: &'a [DeviceConfig],
}

impl<'a> Guest<'a> {
    /// Its disks, each with the [storage](BlockConfig::storage) that it names.
    pub fn disks(&self) -> impl Iterator<Item = &'a BlockConfig> + use<'a> {
        self.devices.iter().filter_map(|device| match device {
            DeviceConfig::Block(disk) => Some(disk),
            _ => None,
        })
    }

    /// Its network interfaces, each with the [network](NetConfig::network) that it names.
    pub fn interfaces(&self) -> impl Iterator<Item = &'a NetConfig> + use<'a> {
        self.devices.iter().filter_map(|device| match device {
            DeviceConfig::Net(interface) => Some(interface),
            _ => None,
        })
    }
}

/// What a guest gets on this host. What is `None` is as [`LocalConfig`](crate::virtio::LocalConfig) says.
#[derive(Default)]
pub struct Admitted {
    /// The taps of its interfaces: each has the one at the place that its [number](NetConfig::number) says.
    pub taps: Option<Vec<TapConfig>>,
    /// Where its disks are.
    pub images: Option<Images>,
    /// What is held for it.
    pub reservation: Option<Reservation>,
}

/// What is held for a guest. It is dropped when the guest does not come after all, and otherwise when its
/// machine is dropped here, which has closed its taps and disks by then. A process that ends may do so
/// without dropping anything.
pub type Reservation = Box<dyn Send + Sync>;

impl fmt::Debug for Admitted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Admitted")
            .field("taps", &self.taps)
            .field("images", &self.images)
            .field("reservation", &self.reservation.is_some())
            .finish()
    }
}
