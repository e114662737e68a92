//! Patterns of peers (`--allow`) and of guests' names (`--names`): a pattern, and after a line's end a name.

#![no_main]

use libfuzzer_sys::fuzz_target;
use transport_tcp::tls::Pattern;
use vmm::limits::NamePattern;

/// What a pattern of names stands for, found by trying everything.
fn stands_for(pattern: &[u8], name: &[u8]) -> bool {
    // Whether what was seen of the pattern stands for the first bytes of the name, by their number.
    let mut fits: Vec<bool> = (0..=name.len()).map(|seen| seen == 0).collect();
    for byte in pattern {
        if *byte == b'*' {
            for seen in 1..fits.len() {
                fits[seen] |= fits[seen - 1];
            }
        } else {
            for seen in (1..fits.len()).rev() {
                fits[seen] = fits[seen - 1] && name[seen - 1] == *byte;
            }
            fits[0] = false;
        }
    }
    fits[name.len()]
}

fuzz_target!(|text: &str| {
    let (pattern, name) = text.split_once('\n').unwrap_or((text, ""));
    match pattern.parse::<Pattern>() {
        Ok(peers) => assert_eq!(peers.to_string().parse::<Pattern>().as_ref(), Ok(&peers)),
        Err(error) => assert!(error.to_string().contains("is no peer")),
    }
    match pattern.parse::<NamePattern>() {
        Ok(names) => {
            assert_eq!(names.to_string().parse::<NamePattern>().as_ref(), Ok(&names));
            assert_eq!(names.stands_for(name), stands_for(pattern.as_bytes(), name.as_bytes()), "{text:?}");
        }
        Err(error) => assert!(error.to_string().contains("stands for no machine's name")),
    }
});
