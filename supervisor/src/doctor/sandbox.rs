//! Trying things in a child, so that nothing of it stays with us and a crash is a result.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork};

use super::Outcome;

/// A probe that takes longer hangs.
const SECONDS_MAX: u32 = 10;

/// Ends a forked child without running anything of the parent's.
pub(super) fn exit_child(code: i32) -> ! {
    // SAFETY: _exit(2) has no preconditions.
    unsafe { libc::_exit(code) }
}

/// Runs `attempt` in a child with a time limit and hands its result back.
pub(super) fn in_child(attempt: impl FnOnce() -> Outcome) -> Outcome {
    let (mut from_child, mut to_parent) = std::io::pipe().map_err(|e| format!("pipe: {e}"))?;
    // SAFETY: `doctor` runs before ftrun starts any thread, so the child may allocate and run code
    // like its parent (glibc makes malloc safe after fork for tests, which have threads).
    let child = match unsafe { fork() }.map_err(|e| format!("fork: {e}"))? {
        ForkResult::Child => {
            drop(from_child);
            nix::unistd::alarm::set(SECONDS_MAX);
            let outcome = attempt();
            let (Ok(text) | Err(text)) = &outcome;
            let sent = to_parent.write_all(&[u8::from(outcome.is_ok())]);
            let sent = sent.and_then(|()| to_parent.write_all(text.as_bytes()));
            exit_child(i32::from(sent.is_err()));
        }
        ForkResult::Parent { child } => child,
    };
    drop(to_parent);
    let mut answer = Vec::new();
    let read = from_child.read_to_end(&mut answer);
    let status = wait(child);
    read.map_err(|e| format!("read: {e}"))?;
    match answer.split_first() {
        Some((&1, text)) => Ok(String::from_utf8_lossy(text).into_owned()),
        Some((_, text)) => Err(String::from_utf8_lossy(text).into_owned()),
        None => Err(match status {
            Ok(WaitStatus::Signaled(_, Signal::SIGALRM, _)) => format!("no result after {SECONDS_MAX} s"),
            Ok(WaitStatus::Signaled(_, signal, _)) => format!("the attempt died of {signal}"),
            other => format!("the attempt gave no result ({other:?})"),
        }),
    }
}

/// `waitpid` for one child, whatever kind of child it is.
pub(super) fn wait(child: Pid) -> nix::Result<WaitStatus> {
    loop {
        match waitpid(child, Some(nix::sys::wait::WaitPidFlag::__WALL)) {
            Err(Errno::EINTR) => {}
            result => return result,
        }
    }
}

/// A child of a probe; killed and reaped when dropped.
pub(super) struct Child(pub(super) Pid);

impl Child {
    /// Forks a child that does `f` and exits with its result once `go` is closed or has a byte.
    pub(super) fn start(f: impl FnOnce() -> i32) -> Result<(Self, OwnedFd), String> {
        let (mut wait, go) = std::io::pipe().map_err(|e| format!("pipe: {e}"))?;
        // SAFETY: probes run in a child of `in_child`, which has one thread.
        match unsafe { fork() }.map_err(|e| format!("fork: {e}"))? {
            ForkResult::Child => {
                drop(go);
                nix::unistd::alarm::set(SECONDS_MAX);
                let mut byte = [0];
                if wait.read(&mut byte).is_err() {
                    exit_child(1);
                }
                exit_child(f());
            }
            ForkResult::Parent { child } => Ok((Self(child), go.into())),
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // Both fail only when it is gone, which is what is wanted.
        let _gone = kill(self.0, Signal::SIGKILL).and_then(|()| wait(self.0).map(drop));
    }
}
