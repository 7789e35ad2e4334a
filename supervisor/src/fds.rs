//! Descriptors in the tables of this process's threads, which are not all the same (ARCHITECTURE.md, "One descriptor
//! table").

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use crate::marshal::raw_call;

/// A copy, in the calling thread's table, of a descriptor in that of the process's first thread.
///
/// # Errors
/// There is no such descriptor, or no room for two.
pub fn take(fd: i32) -> io::Result<OwnedFd> {
    // SAFETY: no arguments.
    let pid = unsafe { libc::getpid() };
    take_from(&process(pid)?, fd)
}

/// A descriptor of a process (pidfd_open(2)).
///
/// # Errors
/// There is none, or no room for another descriptor.
pub fn process(pid: i32) -> io::Result<OwnedFd> {
    owned(raw_call(libc::SYS_pidfd_open as u64, &[pid as u64, 0, 0, 0, 0, 0]))
}

/// Whether that process has ended, or does within so many milliseconds.
pub fn has_ended(process: &OwnedFd, within: i32) -> bool {
    let mut poll = libc::pollfd { fd: process.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one structure that outlives the call.
    unsafe { libc::poll(&raw mut poll, 1, within) == 1 }
}

/// A copy, in the calling thread's table, of a descriptor in the table of a process's first thread.
///
/// # Errors
/// There is no such descriptor, or no room for another one.
pub fn take_from(process: &OwnedFd, fd: i32) -> io::Result<OwnedFd> {
    owned(raw_call(libc::SYS_pidfd_getfd as u64, &[process.as_raw_fd() as u64, fd as u64, 0, 0, 0, 0]))
}

/// The descriptor that a call has returned.
fn owned(result: i64) -> io::Result<OwnedFd> {
    if result < 0 {
        return Err(io::Error::from_raw_os_error(-result as i32));
    }
    // SAFETY: a fresh descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(result as i32) })
}

/// Whether two numbers in a thread's table lead to one open file description (kcmp(2)).
pub fn are_same(tid: i32, one: i32, other: i32) -> bool {
    const KCMP_FILE: i32 = 0;
    // SAFETY: plain numbers.
    unsafe { libc::syscall(libc::SYS_kcmp, tid, tid, KCMP_FILE, one, other) == 0 }
}

/// Every descriptor in the table of a thread of this process.
///
/// # Errors
/// The thread has ended, or /proc is not there.
pub fn list(tid: i32) -> io::Result<Vec<i32>> {
    let listed = std::fs::read_dir(format!("/proc/self/task/{tid}/fd"))?;
    let mut fds: Vec<i32> = listed.flatten().filter_map(|e| e.file_name().to_str()?.parse().ok()).collect();
    // SAFETY: no arguments, and queries about numbers.
    unsafe {
        if tid == libc::gettid() {
            // The one by which they were listed is closed.
            fds.retain(|fd| libc::fcntl(*fd, libc::F_GETFD) >= 0);
        }
    }
    Ok(fds)
}
