//! An allocator that counts: a few hostile bytes must not cost gigabytes.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

/// No parser may ask for more at once.
const ONE_MAX: usize = 2 << 30;

thread_local! {
    static NOW: Cell<usize> = const { Cell::new(0) };
    static PEAK: Cell<usize> = const { Cell::new(0) };
}

/// The system's allocator; counts what each thread holds.
pub struct Counting;

fn count(more: usize, less: usize) {
    // A thread that is ending has no counters any more.
    let _ = NOW.try_with(|now| {
        let held = (now.get() + more).saturating_sub(less);
        now.set(held);
        let _ = PEAK.try_with(|peak| peak.set(peak.get().max(held)));
    });
}

// SAFETY: everything is handed on to the system's allocator as it came; refusing is allowed.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if layout.size() > ONE_MAX {
            return std::ptr::null_mut();
        }
        count(layout.size(), 0);
        // SAFETY: the caller keeps the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        count(0, layout.size());
        // SAFETY: the caller keeps the contract of `dealloc`.
        unsafe { System.dealloc(ptr, layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        if new_size > ONE_MAX {
            return std::ptr::null_mut();
        }
        count(new_size, layout.size());
        // SAFETY: the caller keeps the contract of `realloc`.
        unsafe { System.realloc(ptr, layout, new_size) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if layout.size() > ONE_MAX {
            return std::ptr::null_mut();
        }
        count(layout.size(), 0);
        // SAFETY: the caller keeps the contract of `alloc_zeroed`.
        unsafe { System.alloc_zeroed(layout) }
    }
}

/// Forgets the peak of this thread.
pub fn start() -> usize {
    PEAK.set(NOW.get());
    NOW.get()
}

/// The most that this thread held at once since [`start`], beyond what it held then.
pub fn peak(start: usize) -> usize {
    PEAK.get().saturating_sub(start)
}
