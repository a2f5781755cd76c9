//! Which edges of the code an input took: counters that LLVM puts into the crate when it is built through `cover.sh`. In an
//! ordinary build there are none, and this does nothing.

use std::sync::atomic::{AtomicUsize, Ordering};

/// The counters: one byte an edge. Several objects bring some each.
const TABLES_MAX: usize = 64;
static STARTS: [AtomicUsize; TABLES_MAX] = [const { AtomicUsize::new(0) }; TABLES_MAX];
static ENDS: [AtomicUsize; TABLES_MAX] = [const { AtomicUsize::new(0) }; TABLES_MAX];
static TABLES: AtomicUsize = AtomicUsize::new(0);

/// Called by constructors of instrumented objects, before `main`.
// SAFETY: the name is reserved for this purpose by LLVM's SanitizerCoverage; nothing else defines it here.
#[unsafe(no_mangle)]
extern "C" fn __sanitizer_cov_8bit_counters_init(start: *mut u8, end: *mut u8) {
    let at = TABLES.load(Ordering::Relaxed);
    if start < end && at < TABLES_MAX && STARTS[..at].iter().all(|s| s.load(Ordering::Relaxed) != start as usize) {
        STARTS[at].store(start as usize, Ordering::Relaxed);
        ENDS[at].store(end as usize, Ordering::Relaxed);
        TABLES.store(at + 1, Ordering::Relaxed);
    }
}

/// Called likewise; addresses of the edges are of no use here.
// SAFETY: as above.
#[unsafe(no_mangle)]
extern "C" fn __sanitizer_cov_pcs_init(_: *const usize, _: *const usize) {}

fn tables() -> impl Iterator<Item = (*mut u8, usize)> {
    (0..TABLES.load(Ordering::Relaxed)).map(|i| {
        let (start, end) = (STARTS[i].load(Ordering::Relaxed), ENDS[i].load(Ordering::Relaxed));
        (start as *mut u8, end - start)
    })
}

/// All counters to zero.
pub fn clear() {
    for (start, len) in tables() {
        // SAFETY: LLVM has said that these bytes are its counters; they are racy by design, and nobody holds a reference.
        unsafe { std::ptr::write_bytes(start, 0, len) };
    }
}

/// A number for each edge that was taken and about how often.
pub fn edges() -> Vec<u64> {
    let mut out = Vec::new();
    let mut base = 1u64 << 40;
    for (start, len) in tables() {
        for i in 0..len {
            // SAFETY: as in `clear`.
            let count = unsafe { start.add(i).read_volatile() };
            if count > 0 {
                out.push((base + i as u64) << 4 | u64::from(count.ilog2()));
            }
        }
        base += len as u64;
    }
    out
}
