//! How fast one processor seals and opens what TLS sends.
//!
//! It is done as rustls does it: by ring, with the cipher that two of our processes agree on, in full
//! records. They stay in the processor's cache, so this is the most that a processor can do.

use crate::figures::{self, Figures};
use anyhow::anyhow;
use migration::cpu::thread_cpu;
use ring::aead::{AES_128_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use std::time::Duration;

/// Bytes that a full record carries.
const CARRIED: usize = 16 << 10;

/// Bytes that are sealed with them: the last says of what type they are.
const CONTENT: usize = CARRIED + 1;

/// Bytes that sealing adds.
const TAG: usize = 16;

/// A full record's head, which is authenticated as well: its type, a version, and the length of what follows.
const HEAD: [u8; 5] = [23, 3, 3, ((CONTENT + TAG) >> 8) as u8, (CONTENT + TAG) as u8];

/// Records that are sealed, and then opened, between two looks at the clock.
const RECORDS: usize = 32;

/// Seals records and opens them again until either has taken half of this processor time.
///
/// # Errors
/// When what was sealed cannot be opened.
pub fn run(time: Duration) -> anyhow::Result<Figures> {
    let broken = |_| anyhow!("ring does not open what it has sealed");
    let key = LessSafeKey::new(UnboundKey::new(&AES_128_GCM, &[0x5a; 16]).map_err(broken)?);
    let mut records = vec![[0xa5u8; CONTENT + TAG]; RECORDS];
    let (mut sealing, mut opening) = (Duration::ZERO, Duration::ZERO);
    let mut number = 0u64;
    while sealing.min(opening) < time / 2 {
        let began = thread_cpu();
        for (record, number) in records.iter_mut().zip(number..) {
            let (content, tag) = record.split_at_mut(CONTENT);
            let made =
                key.seal_in_place_separate_tag(nonce(number), Aad::from(HEAD), content).map_err(broken)?;
            tag.copy_from_slice(made.as_ref());
        }
        let sealed = thread_cpu();
        for (record, number) in records.iter_mut().zip(number..) {
            key.open_in_place(nonce(number), Aad::from(HEAD), record).map_err(broken)?;
        }
        let opened = thread_cpu();
        sealing += sealed.since(began).all;
        opening += opened.since(sealed).all;
        number += RECORDS as u64;
    }
    let mib = number as f64 * CARRIED as f64 / f64::from(1 << 20);
    let rate = |taken: Duration| Some(mib / taken.as_secs_f64());
    Ok(figures::named([("sealed_mib_s", rate(sealing)), ("opened_mib_s", rate(opening))]))
}

/// A record's nonce: like TLS's, its number, but without the secret that makes it unlike other keys'.
fn nonce(number: u64) -> Nonce {
    let mut bytes = [0; NONCE_LEN];
    bytes[NONCE_LEN - 8..].copy_from_slice(&number.to_be_bytes());
    Nonce::assume_unique_for_key(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_a_full_one_of_tls() {
        assert_eq!(usize::from(u16::from_be_bytes([HEAD[3], HEAD[4]])), (16 << 10) + 1 + 16);
        let figures = run(Duration::from_millis(2)).unwrap();
        assert!(figures["sealed_mib_s"] > 0.0 && figures["opened_mib_s"] > 0.0, "{figures:?}");
    }
}
