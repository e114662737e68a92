//! What the names that a guest brings with it are on this host: its networks, and its storages.

use super::config::{HostConfig, Network};
use super::taps::{self, TapMaker, Wanted};
use migration::{Code, Failure};
use std::collections::BTreeMap;
use std::fmt;
use vmm::admission::{Admission, Admitted, Guest};
use vmm::virtio::block::{Images, Storages};
use vmm::virtio::net::{self, NetConfig, TapConfig};

impl HostConfig {
    /// Where disks are on this host: those of its storages, and `others` if they name none.
    pub fn images(&self, others: Images) -> Images {
        let storages = self.storage.iter().map(|(name, storage)| (name.clone(), storage.path.clone()));
        Images::Named(storages.collect::<Storages>(), Box::new(others))
    }
}

/// Gives each guest that comes what it names, or refuses it.
#[derive(Debug)]
pub struct Resolver {
    networks: BTreeMap<String, Network>,
    images: Images,
    taps: Vec<TapConfig>,
    maker: Box<dyn TapMaker>,
}

impl Resolver {
    /// By the configuration of a host. Interfaces that name no network have these `taps`, in their order, and
    /// disks that name no storage are among `others`.
    pub fn new(host: &HostConfig, taps: Vec<TapConfig>, others: Images, maker: Box<dyn TapMaker>) -> Self {
        Resolver { networks: host.networks.clone(), images: host.images(others), taps, maker }
    }
}

/// A tap that an interface gets.
enum Tap {
    /// One that was named for it.
    Named(TapConfig),
    /// One that is to be made.
    Made(Wanted),
}

impl Admission for Resolver {
    /// Storages that this host does not know are refused when disks are opened, which is before anything
    /// moves.
    fn admit(&self, guest: &Guest<'_>) -> Result<Admitted, Failure> {
        let refused = |error: net::Error| Failure::from(vmm::Error::from(error));
        let device = |why: &dyn fmt::Display| Failure::new(Code::DEVICE, why);
        let mut by_name = self.taps.iter().cloned();
        let tap = |(interface, number): (&NetConfig, u8)| {
            let pairs = interface.pairs;
            if interface.number != number {
                return Err(device(&"the guest's network interfaces are not in their order"));
            }
            if !(1..=net::MAX_PAIRS).contains(&pairs) {
                return Err(refused(net::Error::Pairs(pairs)));
            }
            let Some(network) = &interface.network else {
                return by_name.next().map(Tap::Named).ok_or_else(|| refused(net::Error::NoTap { number }));
            };
            taps::known(&self.networks, network, number).map_err(|error| device(&error))?;
            Ok(Tap::Made(Wanted { network: network.clone(), machine: guest.name.into(), number, pairs }))
        };
        // All of it is known before anything is made.
        let taps: Vec<_> = guest.interfaces().zip(0..).map(tap).collect::<Result<_, _>>()?;
        let get = |tap| match tap {
            Tap::Named(tap) => Ok(tap),
            Tap::Made(wanted) => self.maker.make(&wanted).map_err(|why| device(&why)),
        };
        let taps = taps.into_iter().map(get).collect::<Result<_, _>>()?;
        Ok(Admitted { taps: Some(taps), images: Some(self.images.clone()), reservation: None })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};
    use vmm::virtio::DeviceConfig;
    use vmm::virtio::net::Mac;

    /// Makes taps that are called after what they are for.
    #[derive(Debug, Default)]
    struct Maker(Arc<Mutex<Vec<Wanted>>>);

    impl TapMaker for Maker {
        fn make(&self, wanted: &Wanted) -> Result<TapConfig, String> {
            self.0.lock().unwrap().push(wanted.clone());
            Ok(TapConfig::named(format!("{}{}", wanted.network, wanted.number)))
        }
    }

    fn interface(number: u8, network: Option<&str>) -> DeviceConfig {
        let (mac, network) = (Mac([0x52, 0x54, 0, 0, 0, number]), network.map(String::from));
        DeviceConfig::Net(NetConfig { number, mac, pairs: 2, negotiated: None, network })
    }

    #[test]
    fn interfaces_get_the_tap_of_their_network_or_the_next_one_by_name() {
        let bridge = |name: &str| (name.to_string(), Network { bridge: format!("br-{name}") });
        let host = HostConfig { networks: [bridge("blue"), bridge("green")].into(), ..HostConfig::default() };
        let made = Arc::new(Mutex::new(Vec::new()));
        let admit = |taps: &[&str], devices: &[DeviceConfig]| {
            let taps = taps.iter().map(|name| TapConfig::named(*name)).collect();
            let maker = Box::new(Maker(Arc::clone(&made)));
            let resolver = Resolver::new(&host, taps, Images::default(), maker);
            let guest = Guest { name: "web1", memory: 1 << 24, vcpus: 1, stays_paused: false, devices };
            let admitted = resolver.admit(&guest)?;
            Ok::<_, Failure>(admitted.taps.unwrap().into_iter().map(|tap| tap.name).collect::<Vec<_>>())
        };
        let refused = |taps: &[&str], devices: &[DeviceConfig]| admit(taps, devices).unwrap_err().message;
        let devices =
            [interface(0, Some("blue")), DeviceConfig::Rng, interface(1, None), interface(2, Some("green"))];
        assert_eq!(admit(&["mine", "more"], &devices).unwrap(), ["blue0", "mine", "green2"]);
        let wanted = made.lock().unwrap().pop().unwrap();
        assert_eq!((wanted.machine.as_str(), wanted.number, wanted.pairs), ("web1", 2, 2));
        assert_eq!(admit(&["mine"], &[]).unwrap(), [""; 0]);

        made.lock().unwrap().clear();
        assert!(refused(&[], &devices).contains("network interface 2 has no tap here"));
        let told = refused(&["mine"], &[interface(0, Some("blue")), interface(1, Some("red"))]);
        assert!(told.contains("interface 2 belongs to the network red"), "{told}");
        assert!(told.contains("it knows: blue, green."), "{told}");
        assert!(refused(&["mine"], &[interface(0, None), interface(0, Some("blue"))]).contains("order"));
        assert!(made.lock().unwrap().is_empty(), "nothing is made for a guest that is refused");
    }
}
