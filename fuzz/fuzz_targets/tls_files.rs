//! The files of a host: certificates, key and list of what is revoked. The first byte says which one is not
//! as it should be; if its highest bit is set it is replaced, and changed otherwise.

#![no_main]

use libfuzzer_sys::fuzz_target;
use std::sync::OnceLock;
use tempfile::TempDir;
use transport_tcp::tls::{Files, Renewed};
use whimbrel_fuzz::{Input, change, tls};

fuzz_target!(|bytes: &[u8]| {
    static FOLDER: OnceLock<TempDir> = OnceLock::new();
    let folder = FOLDER.get_or_init(tls::folder).path();
    let mut input = Input(bytes);
    let Some(first) = input.byte() else { return };
    let (name, good) = tls::FILES[usize::from(first) % tls::FILES.len()];
    let mut content = good.to_vec();
    if first & 0x80 != 0 {
        content = input.0.to_vec();
    } else {
        while let Some((at, new)) = change(content.len(), &mut input) {
            content[at..at + new.len()].copy_from_slice(new);
        }
    }
    tls::put(folder, name, &content);
    match Renewed::new(Files::in_folder(folder), Vec::new()).protection() {
        Ok(protection) => assert!(protection.is_some()),
        Err(error) => assert_eq!(error.to_string().lines().count(), 1, "{error:?}"),
    }
    tls::put(folder, name, good);
});
