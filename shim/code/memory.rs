//! The functions that compiled code expects to find, and copying.

use core::arch::asm;

/// Copies `n` bytes.
///
/// # Safety
/// As for `core::ptr::copy_nonoverlapping`; a fault in the program's memory is the supervisor's to handle.
pub(crate) unsafe fn copy(to: *mut u8, from: *const u8, n: usize) {
    if n >= 8 && n <= 128 {
        let mut at = 0;
        while at + 8 <= n {
            // SAFETY: within `n` bytes.
            unsafe { to.add(at).cast::<u64>().write_unaligned(from.add(at).cast::<u64>().read_unaligned()) };
            at += 8;
        }
        // SAFETY: the last 8 of at least 8 bytes; some are copied twice.
        unsafe { to.add(n - 8).cast::<u64>().write_unaligned(from.add(n - 8).cast::<u64>().read_unaligned()) };
        return;
    }
    // SAFETY: by the contract of this function; the direction flag is clear.
    unsafe { asm!("rep movsb", inout("rcx") n => _, inout("rdi") to => _, inout("rsi") from => _) };
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, n: usize) -> *mut u8 {
    // SAFETY: the caller's contract is that of `memcpy`.
    unsafe { asm!("rep movsb", inout("rcx") n => _, inout("rdi") to => _, inout("rsi") from => _) };
    to
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, byte: i32, n: usize) -> *mut u8 {
    // SAFETY: the caller's contract is that of `memset`.
    unsafe { asm!("rep stosb", inout("rcx") n => _, inout("rdi") to => _, in("al") byte as u8) };
    to
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(a: *const u8, b: *const u8, n: usize) -> i32 {
    for i in 0..n {
        // SAFETY: the caller's contract is that of `memcmp`.
        let (x, y) = unsafe { (a.add(i).read(), b.add(i).read()) };
        if x != y {
            return i32::from(x) - i32::from(y);
        }
    }
    0
}

/// Named by the exception tables of the core library; nothing unwinds here.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}
