//! What a machine boots from when its guest resets it.
//!
//! A kernel that was read from files, or is part of this program, is kept beside the guest's RAM, in memory
//! that the guest cannot reach and that moves with the guest: whoever has the machine can boot it again,
//! without the files. One that was read from the guest's disk is read from there again, since the guest may
//! have installed another.

use crate::loader::{Boot, Image};
use crate::memory::GuestRam;
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestMemoryRegion, MemoryRegionAddress};

/// What follows a reset that the guest asks for, and a triple fault, which resets PCs as well.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reboot {
    /// The machine ends.
    #[default]
    Never,
    /// It boots what it was booted from at first, which is kept in so many bytes beside its RAM.
    Kept {
        /// Bytes, as [`Reboot::keeping`] counts them.
        len: u64,
    },
    /// It boots the kernel that is then on its first disk.
    Disk {
        /// What the kernel's command line says beside the name of the root file system.
        cmdline: String,
    },
}

/// First bytes of what is kept.
const MAGIC: [u8; 8] = *b"WHIMBOOT";
/// Length of the first part: the magic, and the lengths of kernel, initramfs and command line. An initramfs
/// that there is not has the length [`ABSENT`].
const HEAD: usize = 32;
const ABSENT: u64 = u64::MAX;
/// Most bytes that are kept: what fits below the hole in a guest's address space, with some room.
pub(crate) const MAX_KEPT: u64 = 4 << 30;

/// Why a machine cannot be booted again.
#[derive(Debug, thiserror::Error)]
pub enum KeepError {
    /// What it is booted from is not the one for which there is room.
    #[error("the machine was built to keep {room} bytes of what it boots from, and there are {len}")]
    Room {
        /// Bytes there is room for.
        room: u64,
        /// Bytes there are.
        len: u64,
    },
    /// Something is still in a file.
    #[error("what a machine keeps to boot from must be read into memory first")]
    File,
    /// What is kept is damaged, which it can be only if it came from elsewhere so.
    #[error("what the machine has kept to boot from is damaged")]
    Damaged,
}

fn bytes(image: &Image) -> Result<&[u8], KeepError> {
    match image {
        Image::Bytes(bytes) => Ok(bytes),
        Image::File(_) => Err(KeepError::File),
    }
}

/// The parts that are kept, in their order.
fn parts(boot: &Boot) -> Result<[Option<&[u8]>; 3], KeepError> {
    let initramfs = boot.initramfs.as_ref().map(bytes).transpose()?;
    Ok([Some(bytes(&boot.kernel)?), initramfs, Some(boot.cmdline.as_bytes())])
}

/// Bytes that these take when they are kept.
fn kept_len(parts: &[Option<&[u8]>; 3]) -> u64 {
    HEAD as u64 + parts.iter().flatten().map(|part| part.len() as u64).sum::<u64>()
}

impl Reboot {
    /// Boots this again, whatever becomes of the files that it came from.
    ///
    /// # Errors
    /// [`KeepError::File`] if something is still in a file; see [`Boot::into_memory`].
    pub fn keeping(boot: &Boot) -> Result<Self, KeepError> {
        Ok(Reboot::Kept { len: kept_len(&parts(boot)?) })
    }

    /// Bytes that are needed beside RAM.
    pub(crate) fn store(&self) -> u64 {
        match self {
            Reboot::Kept { len } => *len,
            Reboot::Never | Reboot::Disk { .. } => 0,
        }
    }
}

/// Keeps `boot`.
pub(super) fn keep(ram: &GuestRam, boot: &Boot) -> Result<(), KeepError> {
    let Some(store) = ram.boot_store() else { return Ok(()) };
    let parts = parts(boot)?;
    let len = kept_len(&parts);
    let room = store.len();
    if len > room {
        return Err(KeepError::Room { room, len });
    }
    let mut head = MAGIC.to_vec();
    for part in parts {
        head.extend_from_slice(&part.map_or(ABSENT, |part| part.len() as u64).to_le_bytes());
    }
    let mut at = 0;
    for part in [head.as_slice()].into_iter().chain(parts.into_iter().flatten()) {
        store.write_slice(part, MemoryRegionAddress(at)).map_err(|_| KeepError::Room { room, len })?;
        at += part.len() as u64;
    }
    Ok(())
}

/// What was kept.
pub(super) fn kept(ram: &GuestRam) -> Result<Boot, KeepError> {
    let store = ram.boot_store().ok_or(KeepError::Damaged)?;
    let read = |at: u64, len: u64| {
        // Nothing is allocated for a length that cannot be.
        if at.checked_add(len).is_none_or(|end| end > store.len()) {
            return Err(KeepError::Damaged);
        }
        let mut bytes = vec![0; len as usize];
        store.read_slice(&mut bytes, MemoryRegionAddress(at)).map_err(|_| KeepError::Damaged)?;
        Ok(bytes)
    };
    let head = read(0, HEAD as u64)?;
    let (words, _) = head.as_chunks::<8>();
    if words[0] != MAGIC {
        return Err(KeepError::Damaged);
    }
    let mut at = HEAD as u64;
    let mut next = |len: u64| {
        let bytes = read(at, len)?;
        at += len;
        Ok::<_, KeepError>(bytes)
    };
    let [kernel, initramfs, cmdline] = [1, 2, 3].map(|word| u64::from_le_bytes(words[word]));
    let kernel = Image::Bytes(next(kernel)?.into());
    let initramfs = if initramfs == ABSENT { None } else { Some(Image::Bytes(next(initramfs)?.into())) };
    let cmdline = String::from_utf8(next(cmdline)?).map_err(|_| KeepError::Damaged)?;
    Ok(Boot { kernel, initramfs, cmdline })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{PageSize, Thp};

    fn some(initramfs: Option<&'static [u8]>) -> Boot {
        let image = |bytes: &'static [u8]| Image::Bytes(bytes.into());
        Boot { kernel: image(b"kernel"), initramfs: initramfs.map(image), cmdline: "console=ttyS0".into() }
    }

    fn ram(store: u64) -> GuestRam {
        GuestRam::with_boot_store(16 << 20, PageSize::Small, Thp::Off, store).unwrap()
    }

    #[test]
    fn what_is_kept_comes_back() {
        for initramfs in [None, Some(&b""[..]), Some(&[7u8; 10_000][..])] {
            let boot = some(initramfs);
            let ram = ram(Reboot::keeping(&boot).unwrap().store());
            assert!(matches!(kept(&ram), Err(KeepError::Damaged)), "nothing is there yet");
            keep(&ram, &boot).unwrap();
            let again = kept(&ram).unwrap();
            assert_eq!(again.cmdline, boot.cmdline);
            assert_eq!(bytes(&again.kernel).unwrap(), b"kernel");
            assert_eq!(again.initramfs.as_ref().map(|image| bytes(image).unwrap()), initramfs);
        }
    }

    #[test]
    fn what_does_not_fit_or_is_a_file_or_damaged_is_refused() {
        let small = ram(4096);
        assert!(matches!(keep(&small, &some(Some(&[1; 5000]))), Err(KeepError::Room { room: 4096, .. })));
        let file = Boot { kernel: Image::File("vmlinuz".into()), ..some(None) };
        assert!(matches!(Reboot::keeping(&file), Err(KeepError::File)));
        keep(&small, &some(None)).unwrap();
        let store = small.boot_store().unwrap();
        for word in 0..4 {
            let at = MemoryRegionAddress(word * 8);
            let good: u64 = store.read_obj(at).unwrap();
            for bad in [u64::MAX - 1, 5000, 1 << 40] {
                store.write_obj(bad, at).unwrap();
                assert!(matches!(kept(&small), Err(KeepError::Damaged)), "word {word} is {bad}");
            }
            store.write_obj(good, at).unwrap();
        }
        assert!(kept(&small).is_ok());
    }

    #[test]
    fn a_guest_cannot_reach_it() {
        use vm_memory::{GuestAddress, GuestMemoryBackend};
        let ram = ram(4096);
        let layout = ram.ram().layout();
        assert_eq!((layout.len(), ram.guest_regions()), (2, 1));
        assert!(!ram.memory().address_in_range(GuestAddress(layout[1].guest_address)));
    }
}
