//! Hardware addresses, and the frame that tells switches where one is.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::io;
use std::str::FromStr;

/// Length of a frame without the checksum that the wire adds, at least.
const MIN_FRAME: usize = 60;
/// The protocol of a RARP frame.
const RARP: [u8; 2] = [0x80, 0x35];

/// A hardware address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// An address that nobody else has, in all likelihood.
    ///
    /// # Errors
    /// If the system has no random numbers.
    pub fn random() -> io::Result<Self> {
        let mut bytes = [0; 6];
        crate::virtio::rng::get_random(&mut bytes)?;
        // Administered locally, and of one interface.
        bytes[0] = bytes[0] & 0xfc | 2;
        Ok(Mac(bytes))
    }

    /// Whether one interface can have it: not zero, and of no group.
    pub fn is_unicast(self) -> bool {
        self.0 != [0; 6] && self.0[0] & 1 == 0
    }

    /// A broadcast frame as if the interface had sent it: a reverse ARP request for its own address.
    /// Every switch that passes it on learns where the address is, and no host has to answer.
    pub(super) fn rarp(self) -> [u8; MIN_FRAME] {
        let mut frame = [0; MIN_FRAME];
        let mut at = 0;
        let mut put = |bytes: &[u8]| {
            frame[at..at + bytes.len()].copy_from_slice(bytes);
            at += bytes.len();
        };
        put(&[0xff; 6]);
        put(&self.0);
        put(&RARP);
        put(&[0, 1, 8, 0, 6, 4]); // Ethernet, IPv4, and the length of an address of each
        put(&[0, 3]); // request reverse
        put(&self.0); // from it, whose IP address is not known,
        put(&[0; 4]);
        put(&self.0); // for it
        put(&[0; 4]);
        frame
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for Mac {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let part = |part: &str| match part.as_bytes() {
            [a, b] if a.is_ascii_hexdigit() && b.is_ascii_hexdigit() => u8::from_str_radix(part, 16).ok(),
            _ => None,
        };
        let bytes: Option<Vec<u8>> = text.split(':').map(part).collect();
        let mac = bytes.and_then(|bytes| bytes.try_into().ok()).map(Mac).filter(|mac| mac.is_unicast());
        mac.ok_or_else(|| {
            format!("{text} is not an address of a network interface, such as 52:54:00:12:34:56")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_six_bytes_of_one_interface() {
        let mac: Mac = "52:54:00:ab:CD:ef".parse().unwrap();
        assert_eq!(mac, Mac([0x52, 0x54, 0, 0xab, 0xcd, 0xef]));
        assert_eq!(mac.to_string(), "52:54:00:ab:cd:ef");
        for wrong in ["", "52:54:00:ab:cd", "52:54:00:ab:cd:ef:01", "52:54:0:ab:cd:ef", "52:54:00:ab:cd:+f"] {
            assert!(wrong.parse::<Mac>().is_err(), "{wrong}");
        }
        assert!("00:00:00:00:00:00".parse::<Mac>().is_err() && "01:00:5e:00:00:01".parse::<Mac>().is_err());
        let (one, other) = (Mac::random().unwrap(), Mac::random().unwrap());
        assert!(one != other && one.is_unicast() && one.0[0] & 2 != 0);
    }

    #[test]
    fn the_frame_is_a_reverse_request_for_itself() {
        let frame = Mac([0x52, 0x54, 0, 1, 2, 3]).rarp();
        let expected = [
            0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x52, 0x54, 0, 1, 2, 3, 0x80, 0x35, //
            0, 1, 8, 0, 6, 4, 0, 3, 0x52, 0x54, 0, 1, 2, 3, 0, 0, 0, 0, 0x52, 0x54, 0, 1, 2, 3, 0, 0, 0, 0,
        ];
        assert_eq!(frame[..42], expected);
        assert_eq!(frame[42..], [0; 18]);
    }
}
