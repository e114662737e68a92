//! A tap that was opened before the interface that it is for, by this process or by another one.

use super::tap::{KIND, attach};
use crate::lock::lock;
use std::ffi::CStr;
use std::io;
use std::mem;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

/// An open tap. One interface has it, once.
#[derive(Clone, Debug)]
pub struct OpenTap {
    queues: Arc<Mutex<Vec<OwnedFd>>>,
    mtu: u16,
}

impl PartialEq for OpenTap {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.queues, &other.queues)
    }
}

impl Eq for OpenTap {}

impl OpenTap {
    /// A tap that is open, by the files of its queues: one for each pair of the interface. Its packets have
    /// up to `mtu` bytes. The files are as [`make`](Self::make) opens them.
    pub fn new(queues: Vec<OwnedFd>, mtu: u16) -> Self {
        OpenTap { queues: Arc::new(Mutex::new(queues)), mtu }
    }

    /// Makes a tap that is there for as long as one of its files is open: the kernel removes it with the last
    /// of them, however the processes end that have them. `pattern` is its name, in which `%d` stands for the
    /// lowest number that is free. Returns the files, which other processes may have, and the name. The tap is
    /// down, and is connected to nothing.
    ///
    /// # Errors
    /// The system's answer. It takes `CAP_NET_ADMIN`.
    pub fn make(pattern: &CStr, pairs: u16) -> io::Result<(Vec<OwnedFd>, String)> {
        // SAFETY: all zeros is a valid value of the structure.
        let mut request: libc::ifreq = unsafe { mem::zeroed() };
        let bytes = pattern.to_bytes();
        if bytes.len() >= request.ifr_name.len() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        request.ifr_name.iter_mut().zip(bytes).for_each(|(to, byte)| *to = *byte as libc::c_char);
        let kind = if pairs > 1 { KIND | libc::IFF_MULTI_QUEUE } else { KIND };
        let queues = (0..pairs).map(|_| Ok(attach(&mut request, kind)?.into())).collect::<io::Result<_>>()?;
        let name: Vec<u8> = request.ifr_name.iter().map(|byte| *byte as u8).take_while(|b| *b != 0).collect();
        Ok((queues, String::from_utf8_lossy(&name).into_owned()))
    }

    /// Its files, and its MTU, for the one who uses it.
    pub(super) fn take(&self) -> Option<(Vec<OwnedFd>, u16)> {
        let queues = mem::take(&mut *lock(&self.queues));
        (!queues.is_empty()).then_some((queues, self.mtu))
    }
}
