//! What a peer can make a side allocate is a small multiple of what it has sent.

use migration::Code;
use migration::machine::DestinationHost;
use migration::message::{MAX_DESCRIPTION, MAX_FRAME, Message};
use vmm::component;
use vmm::incoming::{IncomingHost, IncomingOptions};
use whimbrel_tests::counting::{Counting, most};
use whimbrel_tests::say;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Times what was sent, in bytes.
const MULTIPLE: usize = 4;

/// A number as postcard writes it.
fn number(mut value: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while value > 0x7f {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
    bytes
}

/// `head`, and then a list of as many elements `element` as a message of `len` bytes has room for.
fn listing(head: &[u8], element: &[u8], len: usize) -> Vec<u8> {
    let count = (len - head.len() - 10) / element.len();
    [head, &number(count as u64), &element.repeat(count)].concat()
}

fn cheap(what: &str, sent: &[u8], decode: impl FnOnce(&[u8])) {
    let took = most(|| decode(sent));
    println!("{what}: {} bytes sent, {took} taken", sent.len());
    assert!(took <= MULTIPLE * sent.len() + (64 << 10), "{what}: {took} bytes for {}", sent.len());
}

#[test]
fn a_message() {
    let frames = [
        ("nothing but zeros", vec![0; MAX_FRAME]),
        // The numbers of the variants are part of the protocol.
        ("Hello", listing(&[0], b"x", MAX_FRAME)),
        ("the description in Prepare", listing(&[2], b"x", MAX_FRAME)),
        ("regions in Prepare", listing(&[2, 0], &[0, 1], MAX_FRAME)),
        ("names in Prepare", listing(&[2, 0, 0], &[0], MAX_FRAME)),
        ("offers in Prepared", listing(&[3], &[0, 0, 0], MAX_FRAME)),
        ("State", listing(&[4], b"x", MAX_FRAME)),
        ("spans in Ready", listing(&[5], &[0, 0], MAX_FRAME)),
        ("spans in Running", listing(&[7], &[0, 0], MAX_FRAME)),
        ("Epilogue", listing(&[10, 1], b"x", MAX_FRAME)),
        ("Retire", listing(&[11], b"x", MAX_FRAME)),
        ("StatePart", listing(&[13], b"x", MAX_FRAME)),
        ("ChunkDigests", listing(&[15], &[0], MAX_FRAME)),
        ("PageHashes", listing(&[16, 0, 0], &[0], MAX_FRAME)),
    ];
    for (what, frame) in &frames {
        cheap(what, frame, |frame| drop(Message::decode(frame)));
    }
    say::figures(
        "what a message costs",
        format_args!("{} of 64 MiB, at most {MULTIPLE} times", frames.len()),
    );
}

#[test]
fn a_state() {
    let len = 48 << 20;
    let states = [
        ("components", listing(b"WHIM", &[1, 0, 1, 0], len)),
        ("a component", listing(b"WHIM\x01\x01\x00\x01", b"x", len)),
    ];
    for (what, state) in &states {
        cheap(what, state, |state| drop(component::decode(state)));
    }
}

#[test]
fn a_description() {
    let mut host = IncomingHost::open(IncomingOptions::default()).unwrap();
    // Version, bytes of memory, pages, vCPUs, kHz.
    let head = [&[3][..], &number(16 << 20), &[0, 1], &number(2_000_000)].concat();
    let after = |more: &[u8]| [&head, more].concat();
    let descriptions = [
        ("CPUID", listing(&head, &[0; 10], MAX_DESCRIPTION)),
        ("MSRs", listing(&after(&[0]), &[0], MAX_DESCRIPTION)),
        ("devices", listing(&after(&[0, 0]), &[0], MAX_DESCRIPTION)),
        ("a name", listing(&after(&[0, 0, 0]), b"x", MAX_DESCRIPTION)),
    ];
    for (what, description) in &descriptions {
        cheap(what, description, |description| {
            let refused = host.build(description, &[]).err().expect("refused");
            assert_eq!(refused.code, Code::STATE, "{what}: {refused}");
        });
    }
}
