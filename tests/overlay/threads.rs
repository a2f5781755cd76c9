//! Several queue threads on the same subclusters.

use crate::common::*;
use std::sync::atomic::{AtomicBool, Ordering};
use vmar::overlay::{self, SessionInfo};

#[test]
fn four_threads_write_sectors_of_the_same_subclusters() {
    let fx = Fixture::with_sizes(1 << 20, 1 << 20);
    let o = fx.open();
    let stop = AtomicBool::new(false);
    std::thread::scope(|s| {
        let writers: Vec<_> = (0..4u64)
            .map(|t| {
                let (o, fx) = (&o, &fx);
                s.spawn(move || {
                    for round in 1..=6u8 {
                        for sector in (t..1024).step_by(4) {
                            write(o, fx, sector * 512, &[round * 16 + t as u8; 512]);
                            let mut back = [0; 512];
                            read(o, fx, sector * 512, &mut back);
                            assert_eq!(back, [round * 16 + t as u8; 512], "own sector {sector}");
                        }
                        // Half of the next quarter of a MiB reads as zeros in between: fills come from there then.
                        if t == 0 {
                            o.write_zeroes(512 * 1024, 256 * 1024, round % 2 == 0, fx).unwrap();
                        }
                    }
                })
            })
            .collect();
        let flusher = s.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                o.flush().unwrap();
            }
        });
        // Sectors that nobody writes keep the base's content, whatever is filled around them.
        let reader = s.spawn(|| {
            let mut back = [0; 512];
            while !stop.load(Ordering::Relaxed) {
                read(&o, &fx, 900 * 1024, &mut back);
                assert!(back == fx.base[900 * 1024..][..512]);
            }
        });
        writers.into_iter().for_each(|w| w.join().unwrap());
        stop.store(true, Ordering::Relaxed);
        flusher.join().unwrap();
        reader.join().unwrap();
    });
    let mut want = fx.base.clone();
    for sector in 0..1024usize {
        want[sector * 512..][..512].fill(6 * 16 + (sector % 4) as u8);
    }
    want[512 * 1024..768 * 1024].fill(0);
    assert!(read_all(&o, &fx) == want);
    o.close().unwrap();
    qemu_check(&fx.overlay);
    assert!(convert(&fx) == want);
}

#[test]
fn writes_and_write_zeroes_of_one_range_leave_one_of_them_in_each_sector() {
    let fx = Fixture::with_sizes(1 << 20, 1 << 20);
    let o = fx.open();
    // Sectors 3 to 37: partial subclusters at both ends. Writers cover it as a whole, or sector by sector.
    const AT: u64 = 3 * 512;
    const LEN: u64 = 35 * 512;
    for round in 0..50u64 {
        std::thread::scope(|s| {
            let (o, fx) = (&o, &fx);
            s.spawn(move || write(o, fx, AT, &[0x11; LEN as usize]));
            s.spawn(move || (0..35).for_each(|n| write(o, fx, AT + n * 512, &[0x22; 512])));
            s.spawn(move || o.write_zeroes(AT, LEN, round % 2 == 0, fx).unwrap());
            s.spawn(move || o.write_zeroes(AT + 512 * (round % 30), 2048, true, fx).unwrap());
        });
        let all = read_all(&o, &fx);
        assert!(all[..AT as usize] == fx.base[..AT as usize], "before the range");
        let end = (AT + LEN) as usize;
        assert!(all[end..] == fx.base[end..], "after the range");
        for (n, sector) in all[AT as usize..end].chunks(512).enumerate() {
            let first = sector[0];
            assert!([0, 0x11, 0x22].contains(&first) && sector.iter().all(|b| *b == first), "round {round} sector {n}");
        }
    }
    o.close().unwrap();
    qemu_check(&fx.overlay);
}

#[test]
fn a_look_from_outside_is_right_while_flushes_count_and_the_disk_grows() {
    let fx = Fixture::with_capacity(1 << 20, 1 << 20, 4 << 20);
    let o = fx.open();
    let stop = AtomicBool::new(false);
    std::thread::scope(|s| {
        let flusher = s.spawn(|| {
            let mut flushes = 0;
            while !stop.load(Ordering::Relaxed) {
                // Back and forth, so that each flush has a word to write.
                let at = flushes * 4096 % (1 << 20);
                o.write_zeroes(at, 4096, false, &fx).unwrap();
                o.flush().unwrap();
                write(&o, &fx, at, &[7; 4096]);
                o.flush().unwrap();
                flushes += 2;
            }
            flushes
        });
        let mut size = o.size();
        for n in 0..100 {
            let info = overlay::inspect(&fx.overlay, &fx.state_dir()).unwrap();
            assert_eq!((info.session, info.in_use), (SessionInfo::Open, true));
            assert_eq!((info.size, info.capacity), (size, 4 << 20));
            if n % 10 == 0 {
                size += 512;
                o.resize(size).unwrap();
            }
        }
        stop.store(true, Ordering::Relaxed);
        assert!(flusher.join().unwrap() > 0);
    });
    o.close().unwrap();
    qemu_check(&fx.overlay);
}
