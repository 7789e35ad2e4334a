//! The signals that were ignored when ftrun was started: `nohup` and its like mean them for the program.
//!
//! Rust's runtime ignores SIGPIPE before `main`, so they are read earlier, when the dynamic loader runs
//! the executable's initialisers.

use std::sync::atomic::{AtomicU64, Ordering};

static IGNORED: AtomicU64 = AtomicU64::new(0);

/// Runs before the runtime's own start, with nothing of the standard library set up.
extern "C" fn note_ignored() {
    let mut ignored = 0;
    for signal in 1..=64 {
        let mut action = [0u64; 4];
        let r =
            crate::marshal::raw_call(libc::SYS_rt_sigaction as u64, &[signal, 0, (&raw mut action) as u64, 8, 0, 0]);
        if r == 0 && action[0] == libc::SIG_IGN as u64 {
            ignored |= 1 << (signal - 1);
        }
    }
    IGNORED.store(ignored, Ordering::Relaxed);
}

// SAFETY: the loader calls every pointer in this section once; the function makes system calls and stores
// to a static, nothing else.
#[used]
#[unsafe(link_section = ".init_array")]
static NOTE_IGNORED: extern "C" fn() = note_ignored;

/// Signals 1 to 64 that are to be ignored in the program from its start: bit 0 is signal 1.
pub fn ignored() -> u64 {
    IGNORED.load(Ordering::Relaxed)
}
