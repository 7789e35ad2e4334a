//! Processes by pidfd: a signal through one can never reach a stranger that got the number later.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// A process, whatever becomes of its number.
#[derive(Debug)]
pub struct Process {
    fd: OwnedFd,
    /// Its number when it was opened.
    pub pid: i32,
}

impl Process {
    /// Opens the process that has number `pid` now.
    pub fn open(pid: i32) -> io::Result<Self> {
        // SAFETY: pidfd_open takes two numbers and touches no memory of ours.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        let Ok(fd) = i32::try_from(fd) else { return Err(io::Error::other("a descriptor beyond int")) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just made this descriptor for us, and nothing else knows it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Self { fd, pid })
    }

    /// Sends a signal.
    pub fn signal(&self, signal: i32) -> io::Result<()> {
        let no_info: *const libc::siginfo_t = std::ptr::null();
        // SAFETY: the descriptor is open as long as `self`; a null siginfo is allowed.
        let r = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, self.fd.as_raw_fd(), signal, no_info, 0) };
        if r < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Waits for its end; false if it has not come within `limit`.
    pub fn ended_within(&self, limit: Duration) -> bool {
        let millis = u16::try_from(limit.as_millis()).unwrap_or(u16::MAX);
        let mut fds = [PollFd::new(self.fd.as_fd(), PollFlags::POLLIN)];
        loop {
            match poll(&mut fds, PollTimeout::from(millis)) {
                Ok(n) => return n > 0,
                Err(nix::errno::Errno::EINTR) => {}
                Err(_) => return false,
            }
        }
    }
}

/// The `Key:\tvalue` lines of `/proc/PID/status`.
pub fn proc_status(pid: i32) -> io::Result<HashMap<String, String>> {
    let text = io::read_to_string(File::open(format!("/proc/{pid}/status"))?)?;
    Ok(text.lines().filter_map(|l| l.split_once(':')).map(|(k, v)| (k.to_owned(), v.trim().to_owned())).collect())
}

/// The number under `key` in `/proc/PID/status`.
pub fn proc_number(pid: i32, key: &str) -> Option<i32> {
    proc_status(pid).ok()?.get(key)?.parse().ok()
}

/// Lets this process, and what it starts, have so many descriptors open.
pub fn allow_descriptors(count: u64) -> Result<(), crate::Error> {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let of = |e: nix::errno::Errno| crate::error!("RLIMIT_NOFILE: {e}");
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).map_err(of)?;
    if soft >= count {
        return Ok(());
    }
    setrlimit(Resource::RLIMIT_NOFILE, count, hard.max(count))
        .map_err(|e| crate::error!("{count} open descriptors (ulimit -n) are needed, {hard} are allowed: {e}"))
}

/// Whether we are root.
pub fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}
