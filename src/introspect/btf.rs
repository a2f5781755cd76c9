//! Numbers of page flags, from the kernel's own description of its types (BTF), which is in its image.
//!
//! The note has the flags that crash dumps are filtered by, and others moved between versions: `PG_dirty` is bit 3 of Linux 5.10 and
//! bit 4 of 6.12. Of BTF two enumerations are read, `pageflags` and, where there is one, `pagetype`; all other types are stepped
//! over. That takes less than a crate that builds all of them would, and nothing of it can be led astray.

use super::GuestMemory;
use crate::codec::Cursor;
use crate::units::to_usize;
use std::collections::HashMap;

/// Magic number 0xeb9f and version 1, no flags.
const MAGIC: [u8; 4] = [0x9f, 0xeb, 0x01, 0x00];
/// Bytes of the header; later versions may have more.
const HEADER: usize = 24;
/// How far after the start of the kernel's code its BTF may be.
const IMAGE_MAX: u64 = 256 << 20;
/// Bytes that are looked through at once.
const STEP: usize = 1 << 20;
/// Bytes of types and of strings: those of a whole kernel, not of a module's, which know no page flags.
const PART: std::ops::RangeInclusive<u32> = 256 << 10..=64 << 20;
/// Headers that are followed before the search is given up.
const HEADERS_MAX: usize = 16;

const ENUM: u32 = 6;
/// Bytes that follow a type of each kind: a fixed part, and one for each of its members.
const SIZES: [(usize, usize); 20] = [
    (0, 0),
    (4, 0),
    (0, 0),
    (12, 0),
    (0, 12),
    (0, 12),
    (0, 8),
    (0, 0),
    (0, 0),
    (0, 0),
    (0, 0),
    (0, 0),
    (0, 0),
    (0, 8),
    (4, 0),
    (0, 12),
    (0, 0),
    (4, 0),
    (0, 0),
    (0, 12),
];

/// The enumerations of page flags and page types.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Enums {
    flags: HashMap<String, u32>,
    types: HashMap<String, u32>,
}

impl Enums {
    /// Bit of a page flag, `PG_dirty` for one.
    pub fn flag(&self, name: &str) -> Option<u32> {
        self.flags.get(name).copied().filter(|bit| *bit < 64)
    }

    /// Number of a page type, `PGTY_table` for one; from Linux 6.11 on.
    pub fn page_type(&self, name: &str) -> Option<u32> {
        self.types.get(name).copied()
    }

    /// Of the parts of a BTF. None when they make no sense or have no page flags.
    pub fn parse(types: &[u8], strings: &[u8]) -> Option<Enums> {
        let mut c = Cursor::new(types);
        let mut out = Enums::default();
        // Each type takes 12 bytes at least.
        while c.position() < types.len() {
            let (name, info, _) = (c.u32_le()?, c.u32_le()?, c.u32_le()?);
            let (kind, members) = (info >> 24 & 0x1f, to_usize((info & 0xffff).into()));
            let (fixed, each) = SIZES.get(to_usize(kind.into())).filter(|_| kind != 0)?;
            let body = c.take(fixed + each * members)?;
            if kind != ENUM {
                continue;
            }
            let to = match string(strings, name)? {
                "pageflags" if out.flags.is_empty() => &mut out.flags,
                "pagetype" if out.types.is_empty() => &mut out.types,
                _ => continue,
            };
            let mut member = Cursor::new(body);
            for _ in 0..members {
                let (name, value) = (member.u32_le()?, member.u32_le()?);
                to.insert(string(strings, name)?.to_string(), value);
            }
        }
        (!out.flags.is_empty()).then_some(out)
    }
}

/// The string at an offset, up to its zero.
fn string(strings: &[u8], at: u32) -> Option<&str> {
    let rest = strings.get(to_usize(at.into())..)?;
    // Names are short: what has no end soon is none.
    let len = rest.iter().take(512).position(|byte| *byte == 0)?;
    str::from_utf8(&rest[..len]).ok()
}

/// The kernel's BTF, looked for from the start of its image on, which is contiguous.
pub fn find(memory: &impl GuestMemory, image: u64) -> Option<Enums> {
    let mut buf = vec![0; STEP + HEADER];
    let mut tries = 0;
    for step in 0..IMAGE_MAX / STEP as u64 {
        let start = image.checked_add(step * STEP as u64)?;
        // The step that reaches over the end of RAM is the last, and has nothing: RAM does not end within the image.
        if !memory.read(start, &mut buf) {
            return None;
        }
        let places = (0..STEP).filter(|at| buf[*at..].starts_with(&MAGIC));
        for at in places {
            let Some(parts) = buf.get(at..at + HEADER).and_then(header) else { continue };
            tries += 1;
            if tries > HEADERS_MAX {
                return None;
            }
            let enums = parts.read(memory, start + at as u64);
            if enums.is_some() {
                return enums;
            }
        }
    }
    None
}

/// Where the parts of a BTF are, from its start on.
struct Parts {
    types: (u64, u32),
    strings: (u64, u32),
}

/// Of a header that may be one of a kernel.
fn header(bytes: &[u8]) -> Option<Parts> {
    let mut c = Cursor::new(bytes.get(MAGIC.len()..)?);
    let header = c.u32_le().filter(|len| (24..=256).contains(len))?;
    let mut part = || {
        let (at, len) = (c.u32_le()?, c.u32_le()?);
        (PART.contains(&len) && at <= *PART.end()).then_some((u64::from(header) + u64::from(at), len))
    };
    Some(Parts { types: part()?, strings: part()? })
}

impl Parts {
    fn read(&self, memory: &impl GuestMemory, start: u64) -> Option<Enums> {
        let take = |(at, len): (u64, u32)| {
            let mut bytes = vec![0; to_usize(len.into())];
            memory.read(start.checked_add(at)?, &mut bytes).then_some(bytes)
        };
        Enums::parse(&take(self.types)?, &take(self.strings)?)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{BlockMemory, Layout, synthetic};
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn enumerations_are_found_between_other_types() {
        let (types, strings) = synthetic::btf(&[("PG_dirty", 4), ("PG_writeback", 1)], &[("PGTY_table", 0xf2)]);
        let enums = Enums::parse(&types, &strings).unwrap();
        assert_eq!(enums.flag("PG_dirty"), Some(4));
        assert_eq!(enums.flag("PG_uptodate"), None);
        assert_eq!(enums.page_type("PGTY_table"), Some(0xf2));
        assert_eq!(Enums::parse(&types[..types.len() - 1], &strings), None, "cut off");
        let (types, strings) = synthetic::btf(&[], &[("PGTY_table", 0xf2)]);
        assert_eq!(Enums::parse(&types, &strings), None, "no page flags");
    }

    #[test]
    fn a_kernels_btf_is_found_at_any_byte_and_a_modules_is_not() {
        let blob = synthetic::btf_blob(&[("PG_dirty", 3)], &[]);
        let mut bytes = vec![0; 8 << 20];
        // What looks like the header of a module's, and one that leads nowhere.
        bytes[0x5000..][..blob.len()].copy_from_slice(&blob);
        bytes[0x5000 + 12..][..4].copy_from_slice(&100u32.to_le_bytes());
        bytes[0x6000..][..24].copy_from_slice(&blob[..24]);
        bytes[0x6004..0x6008].fill(0xff);
        // Across the border of two steps.
        let at = (2 << 20) - 7;
        bytes[at..at + blob.len()].copy_from_slice(&blob);
        let layout = Layout::with_split(8 << 20, 8 << 20).unwrap();
        let memory = BlockMemory::new(layout, &bytes).unwrap();
        assert_eq!(find(&memory, 0x1000).and_then(|enums| enums.flag("PG_dirty")), Some(3));
        assert_eq!(find(&memory, 4 << 20), None, "it is before the image");
    }

    proptest! {
        #[test]
        fn any_bytes_can_be_parsed(types in prop::collection::vec(any::<u8>(), 0..400), strings in prop::collection::vec(any::<u8>(), 0..40)) {
            Enums::parse(&types, &strings);
        }

        #[test]
        fn a_btf_with_a_wrong_byte_is_no_trap(at in 0usize..200, byte: u8) {
            let (mut types, strings) = synthetic::btf(&[("PG_dirty", 4)], &[("PGTY_table", 0xf2)]);
            if let Some(place) = types.get_mut(at) {
                *place = byte;
            }
            Enums::parse(&types, &strings);
        }
    }
}
