//! Network interfaces of this host: finding one, and setting one up, by rtnetlink.
//!
//! Two kinds of messages are needed, and each of them is answered by one. So they are put together here.

use socket2::{Domain, Protocol, Socket, Type};
use std::io::{self, Read, Write};

/// Room for an answer. That about one interface takes a few kilobytes.
const ROOM: usize = 64 << 10;

/// Lengths of the heads of a message, of what it says of an interface, and of an attribute.
const HEAD: usize = 16;
const INTERFACE: usize = 16;
const ATTRIBUTE: usize = 4;

/// Has the kernel give an interface no IPv6 address; libc lacks the attribute's number.
const ADDRESS_MODE: u16 = 8;
const NO_ADDRESS: u8 = 1;

/// An interface.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Link {
    /// Its number.
    pub index: u32,
    /// Whether it is up.
    pub up: bool,
    /// Bytes of the longest packet.
    pub mtu: u32,
    /// What kind of interface it is, such as `bridge`; empty for hardware.
    pub kind: String,
    /// The bridge to which it belongs, by its number.
    pub bridge: Option<u32>,
    /// What it is for.
    pub alias: String,
}

/// The interface of this name, if there is one.
///
/// # Errors
/// The system's answer.
pub fn find(name: &str) -> io::Result<Option<Link>> {
    let mut ask = Message::new(libc::RTM_GETLINK, 0, 0, false);
    ask.text(libc::IFLA_IFNAME, name);
    match ask.exchange() {
        Ok(answer) => Ok(Some(parse(&answer))),
        // A name that no interface can have is none.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENODEV | libc::ERANGE | libc::EINVAL)) => {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// Makes an interface, which is down, a port of a bridge, and puts it up. It gets an address of its own that
/// is higher than those of hardware: a bridge takes the lowest of its ports' for its own.
///
/// # Errors
/// The system's answer.
pub fn join(index: u32, bridge: &Link, address: [u8; 6], alias: &str) -> io::Result<()> {
    // No word of this host's own to the guest. A kernel without IPv6 refuses, and says none either.
    let mode = attribute(ADDRESS_MODE, &[NO_ADDRESS]);
    let mut quiet = Message::new(libc::RTM_SETLINK, libc::NLM_F_ACK, index, false);
    quiet.put(libc::IFLA_AF_SPEC, &attribute(libc::AF_INET6 as u16, &mode));
    let _ = quiet.exchange();
    let mut set = Message::new(libc::RTM_SETLINK, libc::NLM_F_ACK, index, true);
    set.put(libc::IFLA_ADDRESS, &address);
    set.put(libc::IFLA_MTU, &bridge.mtu.to_ne_bytes());
    set.text(libc::IFLA_IFALIAS, alias);
    set.put(libc::IFLA_MASTER, &bridge.index.to_ne_bytes());
    set.exchange().map(drop)
}

/// A message about an interface.
struct Message(Vec<u8>);

impl Message {
    /// A message of this kind about the interface of this number, which is to be put up or left as it is.
    fn new(kind: u16, flags: libc::c_int, index: u32, up: bool) -> Self {
        let flags = libc::NLM_F_REQUEST | flags;
        let up = if up { libc::IFF_UP as u32 } else { 0 };
        let mut bytes = vec![0; HEAD + INTERFACE];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes[6..8].copy_from_slice(&(flags as u16).to_ne_bytes());
        bytes[HEAD + 4..HEAD + 8].copy_from_slice(&index.to_ne_bytes());
        bytes[HEAD + 8..HEAD + 12].copy_from_slice(&up.to_ne_bytes());
        bytes[HEAD + 12..HEAD + 16].copy_from_slice(&up.to_ne_bytes());
        Message(bytes)
    }

    fn put(&mut self, kind: u16, value: &[u8]) {
        self.0.extend_from_slice(&attribute(kind, value));
    }

    fn text(&mut self, kind: u16, text: &str) {
        self.put(kind, &[text.as_bytes(), &[0]].concat());
    }

    /// Sends it, and returns what the kernel says of the interface, if it says anything.
    fn exchange(mut self) -> io::Result<Vec<u8>> {
        let len = self.0.len() as u32;
        self.0[..4].copy_from_slice(&len.to_ne_bytes());
        let protocol = Protocol::from(libc::NETLINK_ROUTE);
        let mut socket = Socket::new(Domain::from(libc::AF_NETLINK), Type::RAW, Some(protocol))?;
        socket.write_all(&self.0)?;
        let mut answer = vec![0; ROOM];
        let len = socket.read(&mut answer)?;
        answer.truncate(len);
        let kind = answer.get(4..6).map(|bytes| u16::from_ne_bytes([bytes[0], bytes[1]]));
        match (kind.map(libc::c_int::from), number(&answer, HEAD)) {
            (Some(libc::NLMSG_ERROR), Some(0)) => Ok(Vec::new()),
            (Some(libc::NLMSG_ERROR), Some(code)) => Err(io::Error::from_raw_os_error(-(code as i32))),
            (Some(_), Some(_)) => Ok(answer.split_off(HEAD)),
            _ => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

/// An attribute, with what fills it up to a multiple of four bytes.
fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let len = ATTRIBUTE + value.len();
    let mut bytes = [(len as u16).to_ne_bytes(), kind.to_ne_bytes()].concat();
    bytes.extend_from_slice(value);
    bytes.resize(len.next_multiple_of(4), 0);
    bytes
}

/// Four bytes as a number.
fn number(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at + 4).map(|bytes| u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
}

/// The attributes in these bytes.
fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let [a, b, c, d] = *bytes.first_chunk()?;
        let len = usize::from(u16::from_ne_bytes([a, b]));
        let value = bytes.get(ATTRIBUTE..len)?;
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
        // The upper bits say how it is written.
        Some((u16::from_ne_bytes([c, d]) & 0x3fff, value))
    })
}

fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

/// What the kernel says of an interface.
fn parse(said: &[u8]) -> Link {
    let up = number(said, 8).is_some_and(|flags| flags & libc::IFF_UP as u32 != 0);
    let mut link = Link { index: number(said, 4).unwrap_or_default(), up, ..Link::default() };
    for (kind, value) in attributes(said.get(INTERFACE..).unwrap_or_default()) {
        match kind {
            libc::IFLA_MTU => link.mtu = number(value, 0).unwrap_or_default(),
            libc::IFLA_MASTER => link.bridge = number(value, 0),
            libc::IFLA_IFALIAS => link.alias = text(value),
            libc::IFLA_LINKINFO => {
                let kind = attributes(value).find(|(kind, _)| *kind == libc::IFLA_INFO_KIND);
                link.kind = kind.map(|(_, value)| text(value)).unwrap_or_default();
            }
            _ => {}
        }
    }
    link
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interfaces_are_found_by_their_names() {
        let lo = find("lo").unwrap().unwrap();
        assert_eq!((lo.index, lo.bridge, lo.kind.as_str()), (1, None, ""));
        assert!(lo.mtu > 0);
        for none in ["nonexistent0", "", "a-name-that-is-longer-than-they-are"] {
            assert_eq!(find(none).unwrap(), None, "{none}");
        }
    }

    #[test]
    fn attributes_end_where_the_bytes_do() {
        let both = [attribute(1, b"abc"), attribute(0x8002, b"")].concat();
        assert_eq!(attributes(&both).collect::<Vec<_>>(), [(1, &b"abc"[..]), (2, b"")]);
        for end in 0..both.len() {
            assert!(attributes(&both[..end]).count() < 2);
        }
        assert_eq!(attributes(&[0; 8]).count(), 0);
        assert_eq!(parse(&[]), Link::default());
    }
}
