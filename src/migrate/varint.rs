//! Numbers of one to ten bytes, seven bits a byte, the lowest first (LEB128): most numbers of a frame are small.

/// Appends a number.
pub fn write(out: &mut Vec<u8>, mut n: u64) {
    while n >= 0x80 {
        out.push(n.to_le_bytes()[0] | 0x80);
        n >>= 7;
    }
    out.push(n.to_le_bytes()[0]);
}

/// Takes a number off the front. `None` if there is none, or one that has no place in 64 bits or could be shorter.
pub fn read(bytes: &mut &[u8]) -> Option<u64> {
    let mut n = 0u64;
    for shift in (0..64).step_by(7) {
        let (first, rest) = bytes.split_first()?;
        let bits = u64::from(first & 0x7F);
        if bits << shift >> shift != bits {
            return None;
        }
        n |= bits << shift;
        *bytes = rest;
        if first & 0x80 == 0 {
            return (*first != 0 || shift == 0).then_some(n);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_and_back() {
        for n in (0..64).flat_map(|bit| [1u64 << bit, (1 << bit) - 1, u64::MAX >> bit]) {
            let mut out = Vec::new();
            write(&mut out, n);
            out.push(7);
            let mut rest = &out[..];
            assert_eq!(read(&mut rest), Some(n));
            assert_eq!(rest, [7]);
        }
    }

    #[test]
    fn what_is_cut_or_too_long_is_none() {
        for bytes in [
            &b""[..],
            &[0x80],
            &[0x80; 12],
            &[0x80, 0],
            &[0xFF; 10],
            &[0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 2],
        ] {
            assert_eq!(read(&mut &bytes[..]), None, "{bytes:x?}");
        }
    }
}
