//! What fuzz targets share.

pub mod guest;
pub mod tls;

/// Makes a write to a connection whose other end has gone an error, as in every Rust program. Here
/// `main` is the fuzzer's.
pub fn ignore_broken_pipes() {
    // SAFETY: no handler is installed; the signal is ignored.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
}

/// An input, from which values are taken one after the other.
pub struct Input<'a>(pub &'a [u8]);

impl<'a> Input<'a> {
    /// The next bytes; `None` once there are fewer.
    pub fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (first, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*first)
    }

    /// The next byte.
    pub fn byte(&mut self) -> Option<u8> {
        self.array().map(u8::from_le_bytes)
    }

    /// The next two bytes.
    pub fn word(&mut self) -> Option<u16> {
        self.array().map(u16::from_le_bytes)
    }

    /// The next four bytes.
    pub fn long(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    /// The next `len` bytes, or zeros once there are fewer: an access of so many bytes.
    pub fn access(&mut self, len: usize) -> [u8; 8] {
        let mut access = [0; 8];
        let bytes = self.bytes(len);
        access[..bytes.len()].copy_from_slice(bytes);
        access
    }

    /// The next `len` bytes, or as many as there are.
    pub fn bytes(&mut self, len: usize) -> &'a [u8] {
        let (first, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        first
    }
}

/// A change to `len` bytes, as the input says: where, and what is there then.
pub fn change<'a>(len: usize, input: &mut Input<'a>) -> Option<(usize, &'a [u8])> {
    let (at, count) = (input.long()?, input.byte()?);
    let at = at as usize % len;
    let bytes = input.bytes(count.into());
    Some((at, &bytes[..bytes.len().min(len - at)]))
}
