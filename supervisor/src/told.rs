//! Waiting for a child's event, or to be told of something by SIGUSR2: by the clock, or by a thread of the unit that
//! gives the turn away ([`crate::turn`]).
//!
//! `wait4` takes no signal mask, so a signal that comes after the last look at what it tells of and before the call
//! would be lost, and the unit would stand still until the next tick. The handler therefore looks where it
//! has interrupted us: between the look at the flag and the call, it leads past the call.

use std::arch::global_asm;
use std::sync::atomic::{AtomicU8, Ordering::SeqCst};

use libc::{c_int, c_void, siginfo_t, ucontext_t};

use crate::marshal::steady_call;

static TOLD: AtomicU8 = AtomicU8::new(0);

global_asm!(
    ".globl ftrun_wait_told, ftrun_wait_told_call, ftrun_wait_told_not",
    // wait4(edi, rsi, edx, NULL) unless the byte at rcx is set; the result as the kernel returns it.
    "ftrun_wait_told:",
    "mov r8, rcx",
    "xor r10d, r10d",
    "cmp byte ptr [r8], 0",
    "jne ftrun_wait_told_not",
    "mov eax, 61",
    "ftrun_wait_told_call:",
    "syscall",
    "ret",
    "ftrun_wait_told_not:",
    "mov rax, -4",
    "ret",
);

unsafe extern "C" {
    fn ftrun_wait_told(pid: c_int, status: *mut c_int, options: c_int, told: *const AtomicU8) -> i64;
    static ftrun_wait_told_call: u8;
    static ftrun_wait_told_not: u8;
}

extern "C" fn told(_: c_int, _: *mut siginfo_t, context: *mut c_void) {
    TOLD.store(1, SeqCst);
    // SAFETY: the kernel passes the context of what was interrupted.
    let at = unsafe { &mut (*context.cast::<ucontext_t>()).uc_mcontext.gregs[libc::REG_RIP as usize] };
    let (begin, call) = (ftrun_wait_told as *const () as i64, (&raw const ftrun_wait_told_call) as i64);
    // At `call` itself it has not been made: an interrupted one is not begun again, without SA_RESTART.
    if (begin..=call).contains(at) {
        *at = (&raw const ftrun_wait_told_not) as i64;
    }
}

/// Takes SIGUSR2 for being told, in the whole process.
pub(crate) fn listen() {
    // SAFETY: installs a handler that touches an atomic and its own context.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = told as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO;
        libc::sigaction(libc::SIGUSR2, &raw const action, std::ptr::null_mut());
    }
}

/// Does something in which no call is interrupted: what is told meanwhile is heard afterwards.
pub(crate) fn hold<R>(f: impl FnOnce() -> R) -> R {
    // SAFETY: signal sets are plain data; the mask of this thread is changed, and put back.
    unsafe {
        let (mut told, mut before): (libc::sigset_t, libc::sigset_t) = std::mem::zeroed();
        libc::sigaddset(&raw mut told, libc::SIGUSR2);
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const told, &raw mut before);
        let result = f();
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, std::ptr::null_mut());
        result
    }
}

/// `wait4`; `-EINTR` when somebody has told something since the last time that this was said. With `WNOHANG` that makes
/// no difference.
pub(crate) fn wait4(pid: i32, status: &mut c_int, options: c_int) -> i64 {
    if options & libc::WNOHANG != 0 {
        let at = std::ptr::from_mut(status) as u64;
        return steady_call(libc::SYS_wait4 as u64, &[pid as u64, at, options as u64, 0, 0, 0]);
    }
    // SAFETY: the status outlives the call.
    let result = unsafe { ftrun_wait_told(pid, status, options, &raw const TOLD) };
    if result == -i64::from(libc::EINTR) {
        TOLD.store(0, SeqCst);
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Cold recovery makes sockets by calls that wait for a moment: they failed with EINTR now and then.
    ///
    /// Break it: call `f` alone.
    #[test]
    fn what_is_held_is_not_interrupted() {
        listen();
        // SAFETY: plain calls.
        let (us, me) = unsafe { (libc::getpid(), libc::gettid()) };
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(SeqCst) {
                    // SAFETY: a signal to a thread that handles it.
                    unsafe { libc::syscall(libc::SYS_tgkill, us, me, libc::SIGUSR2) };
                }
            });
            let nap = || {
                let ms = libc::timespec { tv_sec: 0, tv_nsec: 1_000_000 };
                // SAFETY: a time that outlives the call.
                unsafe { libc::nanosleep(&raw const ms, std::ptr::null_mut()) }
            };
            let interrupted = (0..50).filter(|_| hold(nap) != 0).count();
            done.store(true, SeqCst);
            assert_eq!(interrupted, 0);
        });
    }

    use std::sync::atomic::AtomicBool;
    use std::sync::atomic::AtomicU64;
    use std::time::{Duration, Instant};

    /// Each signal ends a wait, whenever it comes. Break it: leave out the change of `at` in [`told`].
    #[test]
    fn no_signal_is_missed() {
        listen();
        // SAFETY: plain calls; the child waits to be killed.
        let (us, me, child) = unsafe {
            let child = libc::fork();
            if child == 0 {
                loop {
                    libc::pause();
                }
            }
            (libc::getpid(), libc::gettid(), child)
        };
        let (told, done) = (AtomicU64::new(0), AtomicBool::new(false));
        let heard = AtomicU64::new(0);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let end = Instant::now() + Duration::from_millis(1500);
                while Instant::now() < end {
                    let n = told.fetch_add(1, SeqCst) + 1;
                    // SAFETY: a signal to a thread that handles it.
                    unsafe { libc::syscall(libc::SYS_tgkill, us, me, libc::SIGUSR2) };
                    let start = Instant::now();
                    while heard.load(SeqCst) < n {
                        assert!(start.elapsed() < Duration::from_secs(10), "signal {n} was missed");
                    }
                }
                done.store(true, SeqCst);
                // SAFETY: as above.
                unsafe { libc::syscall(libc::SYS_tgkill, us, me, libc::SIGUSR2) };
            });
            while !done.load(SeqCst) {
                heard.store(told.load(SeqCst), SeqCst);
                let mut status = 0;
                wait4(child, &mut status, 0);
            }
        });
        // SAFETY: our own child.
        unsafe {
            libc::kill(child, libc::SIGKILL);
            libc::waitpid(child, std::ptr::null_mut(), 0);
        }
        assert!(told.load(SeqCst) > 100);
    }
}
