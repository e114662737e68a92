//! Putting a kernel into guest RAM and a vCPU at its door.
//!
//! Two kinds of kernels are taken: ELF images with a PVH entry (most bare-metal guests, and
//! `vmlinux`), and Linux bzImages with a 64-bit entry (`vmlinuz` as distributions ship it). What is
//! in low memory afterwards, below the kernel at 1 MiB:
//!
//! | address | what |
//! |---|---|
//! | 0x500 | GDT |
//! | 0x6000 | PVH start info, its module list (0x6100) and memory map (0x6200) |
//! | 0x7000 | Linux boot parameters ("zero page") |
//! | 0x9000 to 0xf000 | page tables that map the first 4 GiB one to one |
//! | 0x20000 | command line |
//! | 0x9e000 | MP table; pointer to it at 0x9fc00 |
//! | 0xe0000 | ACPI tables |

mod bzimage;
mod elf;
mod entry;
mod memmap;
pub mod mptable;

pub use entry::Entry;

use crate::ioctl::KvmError;
use crate::memory::GuestMemory;
use std::borrow::Cow;
use std::fs;
use std::io::Cursor;
use std::path::PathBuf;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

/// Where kernels may begin.
const HIGH_MEMORY: u64 = 1 << 20;
const START_INFO: GuestAddress = GuestAddress(0x6000);
const MODULE_LIST: GuestAddress = GuestAddress(0x6100);
const PVH_MEMORY_MAP: GuestAddress = GuestAddress(0x6200);
const ZERO_PAGE: GuestAddress = GuestAddress(0x7000);
const COMMAND_LINE: GuestAddress = GuestAddress(0x2_0000);
/// Longest command line, without its terminating zero: what Linux takes on x86.
pub const MAX_COMMAND_LINE: usize = 2047;

/// What to boot.
#[derive(Clone, Debug)]
pub struct Boot {
    /// The kernel.
    pub kernel: Image,
    /// Its command line.
    pub cmdline: String,
    /// Its initial RAM disk.
    pub initramfs: Option<Image>,
}

/// A kernel, or what goes with it.
#[derive(Clone, Debug)]
pub enum Image {
    /// In a file.
    File(PathBuf),
    /// Part of this program.
    Bytes(Cow<'static, [u8]>),
}

impl Boot {
    /// The same, with the content of files in place of their paths: whoever boots it needs no files.
    ///
    /// # Errors
    /// [`Error::Read`].
    pub fn in_memory(self) -> Result<Self, Error> {
        let kernel = Image::Bytes(read("kernel", &self.kernel)?.into_owned().into());
        let initramfs = match &self.initramfs {
            Some(image) => Some(Image::Bytes(read("initramfs", image)?.into_owned().into())),
            None => None,
        };
        Ok(Boot { kernel, initramfs, cmdline: self.cmdline })
    }
}

/// Why a kernel cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file cannot be read.
    #[error("cannot read {what} {}: {source}", path.display())]
    Read {
        /// Kernel or initramfs.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Neither ELF nor bzImage.
    #[error(
        "the kernel image is neither an ELF file nor a bzImage; use a vmlinux with PVH entry or a vmlinuz"
    )]
    UnknownFormat,
    /// An ELF file that cannot be loaded.
    #[error("the kernel image is a broken or truncated ELF file, or does not fit in guest memory: {0}")]
    Elf(linux_loader::loader::Error),
    /// An ELF file without PVH entry.
    #[error("the ELF kernel has no PVH entry point; build it with CONFIG_PVH, or use its bzImage")]
    NoPvhEntry,
    /// An ELF file that is not for x86_64.
    #[error("the ELF kernel is not a 64-bit x86 image (class {class}, machine {machine})")]
    WrongMachine {
        /// ELF class: 2 is 64-bit.
        class: u8,
        /// ELF machine: 62 is x86_64.
        machine: u16,
    },
    /// An entry point where no RAM is.
    #[error("the kernel's entry point {0:#x} lies outside what it loads")]
    Entry(u64),
    /// A bzImage that cannot be loaded.
    #[error("the kernel image is a broken bzImage, or does not fit in guest memory: {0}")]
    BzImage(linux_loader::loader::Error),
    /// A bzImage that ends early.
    #[error(
        "the bzImage is truncated: its header announces {announced} bytes of kernel, the file has {present}"
    )]
    Truncated {
        /// Bytes announced.
        announced: u64,
        /// Bytes there.
        present: u64,
    },
    /// A bzImage without 64-bit entry.
    #[error(
        "the bzImage has no 64-bit entry point (boot protocol {version:#x}); use a 64-bit kernel of Linux 3.8 or newer"
    )]
    No64BitEntry {
        /// Its boot protocol version.
        version: u16,
    },
    /// Too little RAM.
    #[error("the {what} needs guest memory up to {} MiB and the guest has {} MiB below 4 GiB; give it more memory", end.div_ceil(1 << 20), memory >> 20)]
    TooBig {
        /// Kernel or initramfs.
        what: &'static str,
        /// Where it would end.
        end: u64,
        /// RAM below the hole.
        memory: u64,
    },
    /// A command line that is too long or has a zero byte.
    #[error("the kernel command line has {len} bytes; at most {most} are possible, none of them zero")]
    CommandLine {
        /// Its length.
        len: usize,
        /// The most this kernel takes.
        most: usize,
    },
    /// RAM could not be written.
    #[error("cannot write boot data to guest memory: {0}")]
    Memory(#[from] vm_memory::GuestMemoryError),
    /// KVM refused to put the vCPU at the kernel's door.
    #[error(transparent)]
    Kvm(#[from] KvmError),
}

/// An initial RAM disk in guest RAM.
#[derive(Clone, Copy, Debug)]
struct Initramfs {
    address: GuestAddress,
    len: u64,
}

/// Loads what `boot` names, and says how a vCPU enters it.
///
/// # Errors
/// [`Error`] for images that cannot be booted; RAM may have been written to by then.
pub fn load(memory: &GuestMemory, boot: &Boot) -> Result<Entry, Error> {
    let image = read("kernel", &boot.kernel)?;
    let mut cursor = Cursor::new(&image[..]);
    match &image[..] {
        [0x7f, b'E', b'L', b'F', ..] => elf::load(memory, &image, &mut cursor, boot),
        _ if image.get(0x202..0x206) == Some(b"HdrS") => bzimage::load(memory, &image, &mut cursor, boot),
        _ => Err(Error::UnknownFormat),
    }
}

fn read<'a>(what: &'static str, image: &'a Image) -> Result<Cow<'a, [u8]>, Error> {
    let path = match image {
        Image::Bytes(bytes) => return Ok(Cow::Borrowed(bytes)),
        Image::File(path) => path,
    };
    let fail = |source| Error::Read { what, path: path.to_path_buf(), source };
    // A device or a pipe might never end.
    if !fs::metadata(path).map_err(fail)?.is_file() {
        return Err(fail(std::io::Error::new(std::io::ErrorKind::InvalidInput, "not a regular file")));
    }
    fs::read(path).map(Cow::Owned).map_err(fail)
}

/// Length of the RAM below the hole, in bytes.
fn low_memory(memory: &GuestMemory) -> u64 {
    memory.iter().find(|r| r.start_addr().0 == 0).map_or(0, |r| r.len())
}

fn write_command_line(memory: &GuestMemory, text: &str, most: usize) -> Result<(), Error> {
    let most = most.min(MAX_COMMAND_LINE);
    if text.len() > most || text.bytes().any(|byte| byte == 0) {
        return Err(Error::CommandLine { len: text.len(), most });
    }
    memory.write_slice(text.as_bytes(), COMMAND_LINE)?;
    memory.write_slice(&[0], GuestAddress(COMMAND_LINE.0 + text.len() as u64))?;
    Ok(())
}

/// Puts the initramfs as high as it goes: below `limit`, above `kernel_end`.
fn load_initramfs(
    memory: &GuestMemory,
    image: Option<&Image>,
    kernel_end: u64,
    limit: u64,
) -> Result<Option<Initramfs>, Error> {
    let Some(image) = image else { return Ok(None) };
    let content = read("initramfs", image)?;
    let len = content.len() as u64;
    let low = low_memory(memory);
    let top = low.min(limit);
    let address = top.checked_sub(len).map(|at| at & !0xfff).filter(|at| *at >= kernel_end);
    let end = kernel_end.saturating_add(len);
    let address = GuestAddress(address.ok_or(Error::TooBig { what: "initramfs", end, memory: low })?);
    memory.write_slice(&content, address)?;
    Ok(Some(Initramfs { address, len }))
}
