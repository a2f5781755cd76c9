//! Tells formats apart by their first (or last) bytes. What looks like nothing known is raw.

use super::Format;

/// Bytes at the start of a file that [`classify`] looks at, if there are so many.
pub(super) const HEAD_BYTES: usize = 512;
/// Bytes at the end of a file that [`classify`] looks at, if there are so many.
pub(super) const TAIL_BYTES: usize = 512;

/// What a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Something that vmar takes.
    Known(Format),
    /// An image that `qemu-img` could make raw, but vmar does not do that by itself.
    Foreign(&'static str),
    /// Has to be unpacked first, with this command.
    Packed(&'static str, &'static str),
    /// A volume whose plain bytes are not in the file.
    Encrypted,
}

/// Classifies a file by its first and last bytes.
pub(super) fn classify(head: &[u8], tail: &[u8]) -> Kind {
    let starts: &[(&[u8], Kind)] = &[
        (b"KDMV", Kind::Known(Format::Vmdk)),
        (b"COWD", Kind::Known(Format::Vmdk)),
        (b"# Disk DescriptorFile", Kind::Known(Format::Vmdk)),
        (b"vhdxfile", Kind::Foreign("VHDX")),
        (b"conectix", Kind::Foreign("VHD")),
        (b"QED\0", Kind::Foreign("QED")),
        (b"WithoutFreeSpace", Kind::Foreign("Parallels")),
        (b"WithouFreSpacExt", Kind::Foreign("Parallels")),
        (b"\x1f\x8b\x08", Kind::Packed("gzip", "gunzip")),
        (b"\xfd7zXZ\0", Kind::Packed("xz", "unxz")),
        (b"\x28\xb5\x2f\xfd", Kind::Packed("zstd", "unzstd")),
        (b"\x04\x22\x4d\x18", Kind::Packed("lz4", "unlz4")),
        (b"PK\x03\x04", Kind::Packed("zip", "unzip")),
        (b"7z\xbc\xaf\x27\x1c", Kind::Packed("7z", "7z x")),
        (b"LUKS\xba\xbe", Kind::Encrypted),
    ];
    if let Some((_, kind)) = starts.iter().find(|(magic, _)| head.starts_with(magic)) {
        return *kind;
    }
    if head.starts_with(b"QFI\xfb") {
        return match head.get(4..8) {
            Some([0, 0, 0, 2 | 3]) => Kind::Known(Format::Qcow2),
            Some([0, 0, 0, 1]) => Kind::Foreign("qcow (version 1)"),
            _ => Kind::Foreign("qcow of an unknown version"),
        };
    }
    let bzip2 = head.starts_with(b"BZh") && head.get(4..10) == Some(b"\x31\x41\x59\x26\x53\x59");
    match () {
        _ if bzip2 => Kind::Packed("bzip2", "bunzip2"),
        _ if head.get(0x40..0x44) == Some(b"\x7f\x10\xda\xbe") => Kind::Foreign("VDI"),
        _ if head.get(257..262) == Some(b"ustar") => Kind::Packed("tar", "tar xf"),
        // A fixed VHD is the raw bytes and a footer; a dynamic one has the footer at both ends.
        _ if tail.starts_with(b"conectix") => Kind::Foreign("VHD"),
        _ if tail.starts_with(b"koly") => Kind::Foreign("DMG"),
        _ => Kind::Known(Format::Raw),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_magic_is_recognized_and_the_rest_is_raw() {
        let at = |offset: usize, magic: &[u8]| {
            let mut head = vec![0u8; HEAD_BYTES];
            head[offset..offset + magic.len()].copy_from_slice(magic);
            classify(&head, &[0; TAIL_BYTES])
        };
        assert_eq!(at(0, b"QFI\xfb\0\0\0\x03"), Kind::Known(Format::Qcow2));
        assert_eq!(at(0, b"QFI\xfb\0\0\0\x02"), Kind::Known(Format::Qcow2));
        assert!(matches!(at(0, b"QFI\xfb\0\0\0\x01"), Kind::Foreign(_)));
        assert!(matches!(at(0, b"QFI\xfb\0\0\0\x04"), Kind::Foreign(_)));
        assert_eq!(at(0, b"KDMV"), Kind::Known(Format::Vmdk));
        assert_eq!(at(0, b"# Disk DescriptorFile\n"), Kind::Known(Format::Vmdk));
        assert_eq!(at(0, b"vhdxfile"), Kind::Foreign("VHDX"));
        assert_eq!(at(0x40, b"\x7f\x10\xda\xbe"), Kind::Foreign("VDI"));
        assert!(matches!(at(0, b"\x1f\x8b\x08"), Kind::Packed("gzip", _)));
        assert!(matches!(at(0, b"BZh9\x31\x41\x59\x26\x53\x59"), Kind::Packed("bzip2", _)));
        assert!(matches!(at(257, b"ustar"), Kind::Packed("tar", _)));
        assert_eq!(at(0, b"LUKS\xba\xbe"), Kind::Encrypted);
        assert_eq!(at(0, b"BZhello"), Kind::Known(Format::Raw));
        assert_eq!(at(0, b"\xeb\x63\x90"), Kind::Known(Format::Raw));
        let mut footer = [0; TAIL_BYTES];
        footer[..8].copy_from_slice(b"conectix");
        assert_eq!(classify(&[0; HEAD_BYTES], &footer), Kind::Foreign("VHD"));
        assert_eq!(classify(&[], &[]), Kind::Known(Format::Raw));
    }
}
