//! Where a disk's file systems may be: the whole disk, or the partitions of a GPT or an MBR.
//!
//! The published readers of partition tables reserve memory for as many entries as the disk announces; this
//! one reads tables that an untrusted guest wrote, so it announces limits instead. What it takes for a
//! partition is checked again by the guest's own kernel, checksums included.

use super::{filesystem, u32_at, u64_at};
use crate::virtio::block::DiskImage;
use std::fmt;
use std::io;

/// Most entries of a GPT that are looked at. 128 is usual.
const MAX_ENTRIES: u32 = 1024;
/// Sizes that an entry of a GPT may have, in bytes. 128 is usual.
const ENTRY_SIZES: std::ops::RangeInclusive<u32> = 128..=4096;
/// Types of MBR partitions that hold further tables.
const EXTENDED: [u8; 3] = [0x05, 0x0f, 0x85];

/// A part of a disk that may have a file system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    /// Number of the partition, from 1; 0 for the whole disk.
    pub number: u32,
    /// Where it begins, in bytes.
    pub start: u64,
    /// Its length in bytes, none of it beyond the disk's end.
    pub len: u64,
    /// The partition's identity, as Linux writes it (`PARTUUID`).
    pub identity: Option<String>,
}

impl fmt::Display for Volume {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.number {
            0 => write!(f, "the whole disk"),
            number => write!(f, "partition {number}"),
        }
    }
}

/// The volumes of a disk: its partitions in their order, or the whole disk if it has none.
///
/// # Errors
/// What the system says.
pub fn volumes(image: &DiskImage) -> io::Result<Vec<Volume>> {
    let geometry = image.geometry();
    let unit = u64::from(geometry.unit);
    let whole = Volume { number: 0, start: 0, len: geometry.len, identity: None };
    // Too small for a file system as much as for a table.
    if geometry.len < 4 * unit.max(1024) {
        return Ok(vec![whole]);
    }
    let mut first = [0; 512];
    image.read_exact_at(0, &mut first)?;
    let mut header = [0; 512];
    image.read_exact_at(unit, &mut header)?;
    if header.starts_with(b"EFI PART") {
        return gpt(image, &header);
    }
    let mut magic = [0; 2];
    image.read_exact_at(filesystem::MAGIC_OFFSET, &mut magic)?;
    if u16::from_le_bytes(magic) != filesystem::MAGIC && first[510..] == [0x55, 0xaa] {
        return Ok(mbr(&first, geometry.len, unit));
    }
    Ok(vec![whole])
}

/// The volume between two places on the disk, if there is such a place.
fn volume(number: u32, start: Option<u64>, len: Option<u64>, disk: u64, identity: String) -> Option<Volume> {
    let (start, len) = (start?, len?);
    let fits = start > 0 && len > 0 && start.checked_add(len)? <= disk;
    fits.then_some(Volume { number, start, len, identity: Some(identity) })
}

fn gpt(image: &DiskImage, header: &[u8; 512]) -> io::Result<Vec<Volume>> {
    let geometry = image.geometry();
    let unit = u64::from(geometry.unit);
    let (entries, size) = (u32_at(header, 80).min(MAX_ENTRIES), u32_at(header, 84));
    let table = u64_at(header, 72).checked_mul(unit).filter(|_| ENTRY_SIZES.contains(&size));
    let len = u64::from(entries) * u64::from(size);
    let table = table.filter(|start| start.checked_add(len).is_some_and(|end| end <= geometry.len));
    let Some(table) = table else { return Ok(Vec::new()) };
    let mut bytes = vec![0; len as usize];
    image.read_exact_at(table, &mut bytes)?;
    let entries = bytes.chunks_exact(size as usize).zip(1..);
    let used = entries.filter(|(entry, _)| entry[..16] != [0; 16]);
    Ok(used
        .filter_map(|(entry, number)| {
            let (first, last) = (u64_at(entry, 32), u64_at(entry, 40));
            let start = first.checked_mul(unit);
            let len = last.checked_sub(first).and_then(|n| n.checked_add(1)?.checked_mul(unit));
            volume(number, start, len, geometry.len, guid(&entry[16..32]))
        })
        .collect())
}

/// The primary partitions.
fn mbr(sector: &[u8; 512], disk: u64, unit: u64) -> Vec<Volume> {
    let signature = u32_at(sector, 440);
    let entries = sector[446..510].chunks_exact(16).zip(1..);
    entries
        .filter(|(entry, _)| entry[4] != 0 && !EXTENDED.contains(&entry[4]))
        .filter_map(|(entry, number)| {
            let sectors = |at| u64::from(u32_at(entry, at)).checked_mul(unit);
            volume(number, sectors(8), sectors(12), disk, format!("{signature:08x}-{number:02x}"))
        })
        .collect()
}

/// A GUID as text; its first three fields are little-endian.
fn guid(b: &[u8]) -> String {
    let hex =
        |bytes: &mut dyn Iterator<Item = &u8>| bytes.map(|byte| format!("{byte:02x}")).collect::<String>();
    [
        hex(&mut b[..4].iter().rev()),
        hex(&mut b[4..6].iter().rev()),
        hex(&mut b[6..8].iter().rev()),
        hex(&mut b[8..10].iter()),
        hex(&mut b[10..16].iter()),
    ]
    .join("-")
}
