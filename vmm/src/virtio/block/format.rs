//! Formats of disk images that are not raw, by what their files begin with.

/// Where a format has its magic, the magic, and what `qemu-img` calls the format.
const FORMATS: [(usize, &[u8], &str); 8] = [
    // Also the first version, which qemu-img tells apart by itself.
    (0, b"QFI\xfb", "qcow2"),
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"# Disk DescriptorFile", "vmdk"),
    (64, b"\x7f\x10\xda\xbe", "vdi"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"conectix", "vpc"),
    (0, b"QED\0", "qed"),
];

/// Bytes from an image's beginning on that tell.
pub const HEAD: usize = 512;

/// The format of an image that begins so; `None` for a raw one.
pub fn of(head: &[u8; HEAD]) -> Option<&'static str> {
    let found = FORMATS.iter().find(|(at, magic, _)| head[*at..].starts_with(magic));
    found.map(|(_, _, name)| *name)
}
