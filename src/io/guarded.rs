//! A copy between two mappings that may lose their pages: a file that is truncated, or fails to be read, under a mapping
//! raises SIGBUS in whoever touches it. Here that ends the copy early, and nothing else.
//!
//! The copy is one instruction, `rep movsb`, which keeps its progress in registers. The signal handler knows its address:
//! when the fault came from there it goes on behind it, so the caller finds the bytes that are missing in the counter. Any
//! other SIGBUS is passed on to what was installed before. Nothing is allocated, locked or mapped in the handler.

use std::io;

/// True where [`copy`] exists. On other machines the page cache is read by system calls.
pub const AVAILABLE: bool = cfg!(target_arch = "x86_64");

/// Installs the signal handler, once a process.
///
/// # Errors
/// `Unsupported` where there is no [`copy`]; those of sigaction(2).
pub fn install() -> io::Result<()> {
    imp::install()
}

/// Copies `len` bytes and returns how many were *not* copied: 0 unless a page was lost. Fast for a page and more
/// (`rep movsb`, which the processors of the last ten years move by cache lines).
///
/// # Safety
/// [`install`] has succeeded. `len` bytes are mapped at both addresses, readable and writable, for the whole call, even if
/// the files behind the mappings are shorter; the ranges do not overlap; no Rust reference covers them.
#[inline]
pub unsafe fn copy(dst: *mut u8, src: *const u8, len: usize) -> usize {
    // SAFETY: the caller's promise.
    unsafe { imp::copy(dst, src, len) }
}

/// Has the processor fetch the first lines of a copy that is to come. A hint that never faults.
#[inline]
pub fn fetch(src: *const u8, dst: *mut u8) {
    imp::fetch(src, dst);
}

#[cfg(target_arch = "x86_64")]
mod imp {
    use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
    use std::io;
    use std::mem::MaybeUninit;
    use std::ptr::null_mut;
    use std::sync::{Mutex, OnceLock, PoisonError};

    // System V: rdi, rsi and rdx are destination, source and length; the direction flag is clear.
    core::arch::global_asm!(
        ".pushsection .text.vmar_guarded_copy,\"ax\",@progbits",
        ".globl vmar_guarded_copy",
        ".hidden vmar_guarded_copy",
        ".type vmar_guarded_copy,@function",
        "vmar_guarded_copy:",
        "mov rcx, rdx",
        ".globl vmar_guarded_copy_at",
        ".hidden vmar_guarded_copy_at",
        "vmar_guarded_copy_at:",
        "rep movsb",
        ".globl vmar_guarded_copy_behind",
        ".hidden vmar_guarded_copy_behind",
        "vmar_guarded_copy_behind:",
        "mov rax, rcx",
        "ret",
        ".size vmar_guarded_copy, . - vmar_guarded_copy",
        ".popsection",
    );

    unsafe extern "C" {
        fn vmar_guarded_copy(dst: *mut u8, src: *const u8, len: usize) -> usize;
        static vmar_guarded_copy_at: u8;
        static vmar_guarded_copy_behind: u8;
    }

    /// What SIGBUS did before.
    static BEFORE: OnceLock<libc::sigaction> = OnceLock::new();

    pub(super) unsafe fn copy(dst: *mut u8, src: *const u8, len: usize) -> usize {
        // SAFETY: the caller's promise; the function touches nothing else and keeps to the calling convention.
        unsafe { vmar_guarded_copy(dst, src, len) }
    }

    /// Lines fetched at the source: what the copy takes to get going.
    const LINES: usize = 4;

    #[inline]
    pub(super) fn fetch(src: *const u8, dst: *mut u8) {
        for line in 0..LINES {
            // SAFETY: a prefetch of any address is allowed.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(src.wrapping_add(64 * line).cast()) };
        }
        // SAFETY: as above.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(dst.cast_const().cast()) };
    }

    pub(super) fn install() -> io::Result<()> {
        static ONCE: Mutex<()> = Mutex::new(());
        let _one = ONCE.lock().unwrap_or_else(PoisonError::into_inner);
        if BEFORE.get().is_some() {
            return Ok(());
        }
        // SAFETY: an all-zero sigaction is a valid one (SIG_DFL).
        let (mut new, mut old): (libc::sigaction, libc::sigaction) =
            unsafe { (MaybeUninit::zeroed().assume_init(), MaybeUninit::zeroed().assume_init()) };
        // SAFETY: asks for the present action only; then, below, installs a handler that is async-signal-safe.
        if unsafe { libc::sigaction(libc::SIGBUS, std::ptr::null(), &raw mut old) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // Before the handler can run.
        let _ = BEFORE.set(old);
        new.sa_sigaction = on_bus as *const () as usize;
        new.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
        // SAFETY: see above; the handler lives as long as the program.
        if unsafe { libc::sigaction(libc::SIGBUS, &raw const new, null_mut()) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    extern "C" fn on_bus(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
        let context = context.cast::<libc::ucontext_t>();
        // SAFETY: the kernel hands both to a handler with SA_SIGINFO, and nobody else uses them meanwhile.
        let (code, at) = unsafe { ((*info).si_code, &mut (*context).uc_mcontext.gregs[libc::REG_RIP as usize]) };
        // A fault has a positive code; a signal that somebody sent may find the copy at work too.
        if code > 0 && *at == (&raw const vmar_guarded_copy_at) as i64 {
            *at = (&raw const vmar_guarded_copy_behind) as i64;
            return;
        }
        // Not ours: the instruction faults again and finds what was installed before; what was sent is sent again.
        if let Some(before) = BEFORE.get() {
            // SAFETY: both are async-signal-safe, and the action is the one that the kernel gave.
            unsafe {
                libc::sigaction(signal, std::ptr::from_ref(before), null_mut());
                if code <= 0 {
                    libc::raise(signal);
                }
            }
        }
    }
}

#[cfg(not(target_arch = "x86_64"))]
mod imp {
    use std::io;

    pub(super) fn install() -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    pub(super) fn fetch(_src: *const u8, _dst: *mut u8) {}

    pub(super) unsafe fn copy(_dst: *mut u8, _src: *const u8, len: usize) -> usize {
        len
    }
}

#[cfg(test)]
#[cfg(target_arch = "x86_64")]
mod tests {
    use super::*;
    use memmap2::MmapOptions;
    use std::os::unix::fs::FileExt;

    #[test]
    fn copies_and_stops_where_the_file_ends() {
        install().unwrap();
        install().unwrap();
        let file = tempfile::tempfile().unwrap();
        let data: Vec<u8> = (0..4 * 4096u32).map(|i| (i % 251) as u8).collect();
        file.write_all_at(&data, 0).unwrap();
        let map = MmapOptions::new().map_raw_read_only(&file).unwrap();
        let mut out = vec![0u8; data.len()];
        // SAFETY: both are mapped for the whole test, and `out` is not looked at meanwhile.
        let left = |out: &mut [u8], from, len| unsafe { copy(out.as_mut_ptr(), map.as_ptr().wrapping_add(from), len) };
        assert_eq!(left(&mut out, 1, 9000), 0);
        assert_eq!(out[..9000], data[1..9001]);
        // The kernel takes the pages away that are behind the new end; its last page reads as zeros to its own end.
        file.set_len(4096 + 10).unwrap();
        out.fill(0xEE);
        assert_eq!(left(&mut out, 0, data.len()), 2 * 4096);
        assert_eq!(out[..4106], data[..4106]);
        assert_eq!(out[8192..], [0xEE; 8192]);
        // It is over only for that copy.
        file.set_len(4 * 4096).unwrap();
        assert_eq!(left(&mut out, 0, data.len()), 0);
        assert_eq!(out[4106..], vec![0; data.len() - 4106]);
    }

    #[test]
    fn any_other_fault_does_what_it_did_before() {
        // In a process of its own: it dies. `fork` in a test binary is fine as the child makes system calls only.
        install().unwrap();
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        let map = MmapOptions::new().map_raw_read_only(&file).unwrap();
        file.set_len(0).unwrap();
        // SAFETY: the child touches nothing but the lost page, and ends by `_exit` if it survives that.
        let child = unsafe {
            let child = libc::fork();
            if child == 0 {
                libc::signal(libc::SIGALRM, libc::SIG_DFL);
                libc::alarm(20);
                std::ptr::read_volatile(map.as_ptr());
                libc::_exit(0);
            }
            child
        };
        let mut status = 0;
        // SAFETY: waits for the child made above.
        assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
        // Rust's own handler may stand before the default: either way it ends by a signal of a fault.
        assert!(libc::WIFSIGNALED(status), "{status:#x}");
        assert!([libc::SIGBUS, libc::SIGABRT].contains(&libc::WTERMSIG(status)), "{status:#x}");
    }
}
