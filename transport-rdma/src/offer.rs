//! What a destination tells the source about how to connect.
//!
//! ```text
//! offset  0       4         6      8         24        25
//!         magic   version   port   address   regions   log2 of the chunk size, a byte for each region
//! ```
//! Integers are little-endian; an IPv4 address is written as an IPv6 one that maps it.

use crate::chunks::{MAX_CHUNK_SHIFT, MIN_CHUNK_SHIFT};
use migration::memory::MAX_REGIONS;
use migration::transport::PlaneError;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};

const MAGIC: [u8; 4] = *b"WRDM";

/// Version of what is told here, of the private data and of the messages.
const VERSION: u16 = 2;

/// Bytes before the chunk sizes.
const HEADER_BYTES: usize = 25;

/// A destination's offer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Offer {
    /// Where rdma_cm listens.
    pub address: SocketAddr,
    /// For each region, log2 of the least size in which memory is registered.
    pub chunk_shifts: Vec<u8>,
}

impl Offer {
    /// The bytes that a source decodes.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let ip = match self.address.ip() {
            IpAddr::V4(v4) => v4.to_ipv6_mapped(),
            IpAddr::V6(v6) => v6,
        };
        let mut bytes = Vec::with_capacity(HEADER_BYTES + self.chunk_shifts.len());
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&self.address.port().to_le_bytes());
        bytes.extend_from_slice(&ip.octets());
        bytes.push(self.chunk_shifts.len() as u8);
        bytes.extend_from_slice(&self.chunk_shifts);
        bytes
    }

    /// Reads an offer for a machine of `regions` regions.
    ///
    /// # Errors
    /// [`PlaneError::Protocol`] for anything but an offer that makes sense.
    pub(crate) fn decode(bytes: &[u8], regions: usize) -> Result<Offer, PlaneError> {
        let wrong = |what: &str| PlaneError::Protocol(format!("the destination's RDMA offer {what}"));
        let Some((head, shifts)) = bytes.split_first_chunk::<HEADER_BYTES>() else {
            return Err(wrong("is too short"));
        };
        if head[..4] != MAGIC {
            return Err(wrong("is no offer"));
        }
        let version = u16::from_le_bytes([head[4], head[5]]);
        if version != VERSION {
            return Err(wrong(&format!("has version {version}, and this program speaks {VERSION}")));
        }
        if regions > MAX_REGIONS || usize::from(head[24]) != regions || shifts.len() != regions {
            return Err(wrong("is for another machine"));
        }
        if let Some(shift) = shifts.iter().find(|shift| !(MIN_CHUNK_SHIFT..=MAX_CHUNK_SHIFT).contains(shift))
        {
            return Err(wrong(&format!("has chunks of 2^{shift} bytes")));
        }
        let mut octets = [0; 16];
        octets.copy_from_slice(&head[8..24]);
        let ip = Ipv6Addr::from(octets).to_canonical();
        let port = u16::from_le_bytes([head[6], head[7]]);
        if port == 0 || ip.is_unspecified() || ip.is_multicast() {
            return Err(wrong(&format!("names {ip} port {port}, to which nobody can connect")));
        }
        Ok(Offer { address: SocketAddr::new(ip, port), chunk_shifts: shifts.to_vec() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offer(address: &str) -> Offer {
        Offer { address: address.parse().unwrap(), chunk_shifts: vec![24, 30] }
    }

    #[test]
    fn offers_survive() {
        for address in ["10.77.0.2:4711", "[2001:db8::7]:1"] {
            let offer = offer(address);
            assert_eq!(Offer::decode(&offer.encode(), 2).unwrap(), offer);
        }
    }

    #[test]
    fn nonsense_is_refused() {
        let good = offer("10.77.0.2:4711").encode();
        for end in 0..good.len() {
            assert!(Offer::decode(&good[..end], 2).is_err(), "{end} bytes");
        }
        assert!(Offer::decode(&[&good[..], &[0]].concat(), 2).is_err());
        assert!(Offer::decode(&good, 1).is_err() && Offer::decode(&good, 3).is_err());
        for (at, value) in [(0, b'X'), (4, 9), (24, 200), (25, 3), (26, 64)] {
            let mut bad = good.clone();
            bad[at] = value;
            assert!(Offer::decode(&bad, 2).is_err(), "byte {at}");
        }
        for address in ["10.77.0.2:0", "0.0.0.0:1", "224.0.0.1:1", "[::]:1", "[ff02::1]:1"] {
            assert!(Offer::decode(&offer(address).encode(), 2).is_err(), "{address}");
        }
    }
}
