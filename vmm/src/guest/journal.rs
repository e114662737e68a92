//! The journal that the embedded guest keeps on a disk (`guest/journal.rs`), read from the disk.

use super::abi::{self, PAGE};

/// Counts the entries in the journal that fills `image`. At every moment there is an unbroken series: the
/// last entries, as many as there are blocks.
///
/// # Errors
/// What is wrong, in words.
pub fn entries(image: &[u8]) -> Result<u64, String> {
    let (blocks, _) = image.as_chunks::<{ PAGE as usize }>();
    let count = blocks.len() as u64;
    // The entry in each block, of those that have one.
    let found = blocks.iter().zip(0..).map(|(block, place)| {
        let generation = generation(block, place)?;
        Ok(generation.map(|generation| generation * count + place))
    });
    let found: Vec<Option<u64>> = found.collect::<Result<_, String>>()?;
    let entries = found.iter().flatten().max().map_or(0, |last| last + 1);
    for (place, entry) in (0..).zip(found) {
        // The last one that belongs here.
        let round = (entries + count - 1 - place) / count;
        let expected = round.checked_sub(1).map(|generation| generation * count + place);
        if entry != expected {
            return Err(format!("block {place} has entry {entry:?} instead of {expected:?}, of {entries}"));
        }
    }
    Ok(entries)
}

/// The generation of which a block is; `None` for one of zeros, that was never written.
fn generation(block: &[u8; PAGE as usize], place: u64) -> Result<Option<u64>, String> {
    let words = || block.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word));
    if words().all(|word| word == 0) {
        return Ok(None);
    }
    let mut generations = words().zip(0..).map(|(word, index)| abi::generation_of(word, place, index));
    let first = generations.next().unwrap_or(0);
    // More than any disk takes: of no generation.
    if first > u64::from(u32::MAX) {
        return Err(format!("block {place} holds something else"));
    }
    match generations.find(|generation| *generation != first) {
        None => Ok(Some(first)),
        Some(other) => Err(format!("block {place} is torn: of generation {first} and {other}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An image of four blocks with so many entries.
    fn image(entries: u64) -> Vec<u8> {
        let mut image = vec![0; 4 * PAGE as usize];
        for entry in 0..entries {
            let place = entry % 4;
            let words = (0..PAGE / 8).flat_map(|index| abi::stamp(place, entry / 4, index).to_le_bytes());
            let at = (place * PAGE) as usize;
            image.splice(at..at + PAGE as usize, words);
        }
        image
    }

    fn block(image: &mut [u8], place: usize) -> &mut [u8] {
        &mut image[place * PAGE as usize..][..PAGE as usize]
    }

    #[test]
    fn unbroken_series_are_counted() {
        for count in [0, 1, 3, 4, 5, 11, 400] {
            assert_eq!(entries(&image(count)), Ok(count));
        }
    }

    #[test]
    fn lost_torn_and_old_blocks_are_found() {
        let wrong = |damage: fn(&mut [u8])| {
            let mut image = image(11);
            damage(&mut image);
            entries(&image).unwrap_err()
        };
        assert!(wrong(|i| block(i, 1).fill(0)).contains("None instead of Some(9)"));
        assert!(wrong(|i| block(i, 1).fill(7)).contains("something else"));
        assert!(wrong(|i| block(i, 1).copy_from_slice(block(&mut image(6), 1))).contains("Some(5)"));
        assert!(
            wrong(|i| block(i, 1)[512..].copy_from_slice(&block(&mut image(6), 1)[512..])).contains("torn")
        );
        assert!(wrong(|i| block(i, 1).copy_from_slice(block(&mut image(16), 1))).contains("instead of"));
    }
}
