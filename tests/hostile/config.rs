//! The config space: what it says, and the one byte of it that can be written.

use crate::common::{Bench, text, tool};
use crate::frontend::*;
use crate::{SECTORS, Target, pattern};

const RO: u64 = 1 << 5;
const CONFIG_WCE: u64 = 1 << 11;
const DISCARD: u64 = 1 << 13;
const WRITE_ZEROES: u64 = 1 << 14;
const WRITEBACK: u32 = 32;

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

#[test]
fn the_config_space_says_what_is_offered() {
    for read_only in [false, true] {
        let mut target = Target::start(if read_only { &["--read-only"] } else { &[] });
        let mut f = target.connect(FEATURES, 1, 16);
        let offered = f.u64_of(GET_FEATURES);
        let expected = if read_only { RO } else { CONFIG_WCE | DISCARD | WRITE_ZEROES };
        assert_eq!(offered & (RO | CONFIG_WCE | DISCARD | WRITE_ZEROES), expected);
        let space = f.config(0, 60);
        assert_eq!(u64::from_le_bytes(space[..8].try_into().unwrap()), SECTORS);
        assert_eq!(word(&space, 20), 512, "block size");
        assert_eq!(space[24..32], [3, 0, 8, 0, 128, 0, 0, 0], "physical block, alignment, least and best I/O");
        assert_eq!(space[32], 1, "the write cache is on");
        let limits: Vec<u32> = (36..56).step_by(4).map(|at| word(&space, at)).collect();
        let (sectors, aligned) = (1 << 22, 8);
        assert_eq!(limits, if read_only { [0; 5] } else { [sectors, 1, aligned, sectors, 1] });
        drop(f);
        target.check();
    }
}

#[test]
fn only_the_cache_mode_can_be_set_and_the_connection_goes_on() {
    let mut target = Target::writable();
    let mut f = target.connect(FEATURES | CONFIG_WCE, 1, 16);
    let before = f.config(0, 60);
    for (offset, bytes) in [
        (0, &[0xFF; 8][..]),
        (20, &[0, 2, 0, 0]),
        (WRITEBACK - 1, &[0]),
        (WRITEBACK + 1, &[0]),
        (WRITEBACK, &[0, 0]),
        (WRITEBACK, &[2]),
        (WRITEBACK, &[0xFF]),
        (34, &[9, 0]),
        (255, &[0]),
    ] {
        assert!(!f.set_config(offset, bytes), "{offset}: {bytes:?}");
        assert_eq!(f.config(0, 60), before);
    }
    for value in [0, 0, 1, 0, 1, 1] {
        assert!(f.set_config(WRITEBACK, &[value]));
        assert_eq!(f.config(WRITEBACK, 1), [value]);
        f.write(0, 16, 4096, 0x40 + value);
        assert_eq!(f.read(0, 16, 4096), [0x40 + value; 4096]);
    }
    drop(f);
    target.check();
    let target = Target::start(&["--read-only"]);
    let mut f = target.connect(FEATURES, 1, 16);
    assert!(!f.set_config(WRITEBACK, &[0]));
    assert_eq!(f.config(WRITEBACK, 1), [1]);
}

/// Off, each write is flushed before it completes, in part written subclusters and zeroes too; on, none is. What was
/// flushed is in the tables that plain QEMU reads.
#[test]
fn the_cache_mode_decides_who_flushes() {
    let bench = Bench::with_library();
    let image = bench.file("base.raw", &pattern());
    bench.add(&[format!("base={}", text(&image))]);
    let overlay = bench.overlay("base");
    let server = bench.serve_overlay("base", &overlay);
    let mut f = Frontend::connect(&server.socket, FEATURES | CONFIG_WCE, 1, 16);
    let mut last = String::new();
    let mut changed = || {
        let now = tool("qemu-img", &["map", "-U", "--output=json", text(&overlay)]);
        std::mem::replace(&mut last, now.clone()) != now
    };
    changed();
    f.write(0, 0, 4096, 1);
    assert!(!changed(), "the cache is on");
    assert!(f.set_config(WRITEBACK, &[0]));
    assert!(changed(), "what was written before is flushed by the switch");
    for (sector, len) in [(64, 4096), (129, 512), (203, 8192)] {
        f.write(0, sector, len, 2);
        assert!(changed(), "sector {sector}");
    }
    f.zero(0, 256, 16, true);
    assert!(changed(), "zeroes");
    assert!(f.set_config(WRITEBACK, &[1]));
    changed();
    f.write(0, 512, 4096, 3);
    f.zero(0, 640, 16, false);
    assert!(!changed(), "the cache is on again");
    assert_eq!(f.read(0, 129, 512), [2; 512]);
}
