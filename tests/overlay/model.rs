//! Random operations against a flat byte array; after each case plain QEMU must see the same disk.

use crate::common::*;
use proptest::prelude::*;
use vmar::overlay::Overlay;

/// Base and disk end in the middle of a subcluster, of different clusters.
const BASE_SIZE: u64 = 3 * 65536 + 2560;
const SIZE: u64 = 5 * 65536 + 512;
/// As far as it can grow, in the middle of a subcluster too.
const CAPACITY: u64 = 7 * 65536 + 1024;
const SECTORS: u64 = CAPACITY / 512;

#[derive(Clone, Debug)]
enum Op {
    Write {
        sector: u64,
        sectors: u64,
        fill: u8,
    },
    WriteZeroes {
        sector: u64,
        sectors: u64,
        unmap: bool,
    },
    /// Four threads, each with every fourth sector of a range: they meet in every subcluster.
    Parallel {
        sector: u64,
        sectors: u64,
        fill: u8,
    },
    Flush {
        look: bool,
    },
    /// The disk becomes so many sectors larger, or as large as it can be.
    Grow {
        sectors: u64,
        /// While four threads write around its old end.
        busy: bool,
    },
    /// Clean stop, then open.
    Reopen,
    /// Dropped without a close, then opened: what kill -9 does.
    Kill,
}

fn range() -> impl Strategy<Value = (u64, u64)> {
    let len = prop_oneof![4 => 1u64..8, 2 => 1u64..64, 1 => 64u64..300];
    (0..SECTORS, len).prop_map(|(at, len)| (at, len.min(SECTORS - at)))
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => (range(), 1u8..).prop_map(|((sector, sectors), fill)| Op::Write { sector, sectors, fill }),
        3 => (range(), any::<bool>()).prop_map(|((sector, sectors), unmap)| Op::WriteZeroes { sector, sectors, unmap }),
        1 => (range(), 1u8..).prop_map(|((sector, sectors), fill)| Op::Parallel { sector, sectors, fill }),
        2 => any::<bool>().prop_map(|look| Op::Flush { look }),
        2 => (prop_oneof![0u64..8, 0u64..200], any::<bool>()).prop_map(|(sectors, busy)| Op::Grow { sectors, busy }),
        1 => Just(Op::Reopen),
        2 => Just(Op::Kill),
    ]
}

fn sector_of(fill: u8, sector: u64) -> [u8; 512] {
    let mut bytes = [fill; 512];
    bytes[..8].copy_from_slice(&sector.to_le_bytes());
    bytes
}

fn bytes_of(fill: u8, sector: u64, sectors: u64) -> Vec<u8> {
    (sector..sector + sectors).flat_map(|s| sector_of(fill, s)).collect()
}

/// The part of a range that is on the disk: the range was drawn for the largest disk.
fn clip(op: &Op, disk_sectors: u64) -> Op {
    let clip = |sector: u64, sectors: u64| (sector.min(disk_sectors), sectors.min(disk_sectors.saturating_sub(sector)));
    match op.clone() {
        Op::Write { sector, sectors, fill } => {
            let (sector, sectors) = clip(sector, sectors);
            Op::Write { sector, sectors, fill }
        }
        Op::WriteZeroes { sector, sectors, unmap } => {
            let (sector, sectors) = clip(sector, sectors);
            Op::WriteZeroes { sector, sectors, unmap }
        }
        Op::Parallel { sector, sectors, fill } => {
            let (sector, sectors) = clip(sector, sectors);
            Op::Parallel { sector, sectors, fill }
        }
        other => other,
    }
}

fn grow(fx: &Fixture, o: &Overlay, model: &mut Vec<u8>, sectors: u64, busy: bool) {
    let old = model.len() as u64 / 512;
    let new = (old + sectors).min(SECTORS);
    std::thread::scope(|s| {
        if busy {
            for t in 0..4 {
                s.spawn(move || {
                    for n in (old - 12..old).filter(|n| n % 4 == t) {
                        write(o, fx, n * 512, &sector_of(0x77, n));
                    }
                });
            }
        }
        o.resize(new * 512).unwrap();
    });
    if busy {
        let bytes = bytes_of(0x77, old - 12, 12);
        model[((old - 12) * 512) as usize..].copy_from_slice(&bytes);
    }
    model.resize((new * 512) as usize, 0);
    assert_eq!(o.size(), new * 512);
}

fn apply(fx: &Fixture, o: Overlay, model: &mut Vec<u8>, op: &Op) -> Overlay {
    match clip(op, model.len() as u64 / 512) {
        Op::Grow { sectors, busy } => grow(fx, &o, model, sectors, busy),
        Op::Write { sector, sectors, fill } => {
            let bytes = bytes_of(fill, sector, sectors);
            write(&o, fx, sector * 512, &bytes);
            model[(sector * 512) as usize..][..bytes.len()].copy_from_slice(&bytes);
        }
        Op::WriteZeroes { sector, sectors, unmap } => {
            o.write_zeroes(sector * 512, sectors * 512, unmap, fx).unwrap();
            model[(sector * 512) as usize..][..(sectors * 512) as usize].fill(0);
        }
        Op::Parallel { sector, sectors, fill } => {
            std::thread::scope(|s| {
                for t in 0..4 {
                    let o = &o;
                    s.spawn(move || {
                        for n in (sector..sector + sectors).filter(|n| n % 4 == t) {
                            write(o, fx, n * 512, &sector_of(fill, n));
                        }
                    });
                }
            });
            let bytes = bytes_of(fill, sector, sectors);
            model[(sector * 512) as usize..][..bytes.len()].copy_from_slice(&bytes);
        }
        Op::Flush { look } => {
            o.flush().unwrap();
            if look {
                qemu_check(&fx.overlay);
                assert!(convert(fx) == *model, "plain QEMU sees what was flushed");
            }
        }
        Op::Reopen => {
            o.close().unwrap();
            drop(o);
            return fx.open();
        }
        Op::Kill => {
            drop(o);
            return fx.open();
        }
    }
    o
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn an_overlay_is_a_flat_byte_array(ops in prop::collection::vec(op(), 1..40)) {
        let fx = Fixture::with_capacity(BASE_SIZE, SIZE, CAPACITY);
        let mut model = fx.base.clone();
        model.resize(SIZE as usize, 0);
        let mut o = fx.open();
        for op in &ops {
            o = apply(&fx, o, &mut model, op);
            let mut part = vec![0; 66 * 512];
            read(&o, &fx, 65536 - 512, &mut part);
            prop_assert!(part == model[65536 - 512..][..part.len()], "after {op:?}");
        }
        prop_assert!(read_all(&o, &fx) == model);
        qemu_check(&fx.overlay);
        o.close().unwrap();
        drop(o);
        qemu_check(&fx.overlay);
        prop_assert!(convert(&fx) == model);
        prop_assert_eq!(vmar::overlay::check(&fx.overlay).unwrap(), Vec::<String>::new());
        prop_assert!(fx.live_files().is_empty());
    }
}
