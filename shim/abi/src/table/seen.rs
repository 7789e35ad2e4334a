//! Which calls others can see: what has to wait for output commit (Johnson §2.1.8; DESIGN, invariant 1).

use super::{Class, Row};
use crate::stream::stays_plain;

const O_CREAT: u64 = 0o100;
const O_TRUNC: u64 = 0o1000;
const CLONE_THREAD: u64 = 0x10000;
/// Commands of `fcntl`: locks, owners of signals, the size of a pipe.
const FCNTL_SEEN: [u64; 9] = [6, 7, 8, 10, 15, 37, 38, 1031, 1033];
/// `FIONBIO`, `FIONCLEX`, `FIOCLEX`, `FIOASYNC`: about the descriptor alone.
const IOCTL_OWN: [u64; 4] = [0x5421, 0x5450, 0x5451, 0x5452];

/// Whether somebody outside the unit can see that this call was made. What is not known to be the unit's own affair
/// can be seen. That a file's contents are brought to the disk cannot, nor that a socket is made.
pub fn is_seen(row: &Row, args: &[u64; 6]) -> bool {
    match row.class {
        Class::Local | Class::Input | Class::Deny => false,
        Class::Unknown => true,
        Class::Output => !matches!(row.nr, FSYNC | FDATASYNC | SYNC | TEE | SYNC_FILE_RANGE | SYNCFS),
        Class::Object => match row.nr {
            OPEN => args[1] & (O_CREAT | O_TRUNC) != 0,
            OPENAT => args[2] & (O_CREAT | O_TRUNC) != 0,
            FCNTL => FCNTL_SEEN.contains(&args[1]),
            // What has been sent before has to have left as what it was.
            SETSOCKOPT => !stays_plain(args[1], args[2]),
            IOCTL => !IOCTL_OWN.contains(&args[1]),
            CLOSE | DUP2 | BIND | LISTEN | FLOCK | CREAT | DUP3 | CLOSE_RANGE | OPENAT2 => true,
            _ => false,
        },
        Class::Control => match row.nr {
            CLONE => args[0] & CLONE_THREAD == 0,
            SCHED_YIELD | PAUSE | EXIT | WAIT4 | RT_SIGTIMEDWAIT | RT_SIGSUSPEND | FUTEX | RESTART_SYSCALL | WAITID => {
                false
            }
            _ => true,
        },
    }
}

const OPEN: u16 = 2;
const CLOSE: u16 = 3;
const IOCTL: u16 = 16;
const SCHED_YIELD: u16 = 24;
const DUP2: u16 = 33;
const PAUSE: u16 = 34;
const BIND: u16 = 49;
const LISTEN: u16 = 50;
const SETSOCKOPT: u16 = 54;
const CLONE: u16 = 56;
const EXIT: u16 = 60;
const WAIT4: u16 = 61;
const FCNTL: u16 = 72;
const FLOCK: u16 = 73;
const FSYNC: u16 = 74;
const FDATASYNC: u16 = 75;
const CREAT: u16 = 85;
const RT_SIGTIMEDWAIT: u16 = 128;
const RT_SIGSUSPEND: u16 = 130;
const SYNC: u16 = 162;
const FUTEX: u16 = 202;
const RESTART_SYSCALL: u16 = 219;
const WAITID: u16 = 247;
const OPENAT: u16 = 257;
const TEE: u16 = 276;
const SYNC_FILE_RANGE: u16 = 277;
const DUP3: u16 = 292;
const SYNCFS: u16 = 306;
const CLOSE_RANGE: u16 = 436;
const OPENAT2: u16 = 437;

#[cfg(test)]
mod tests {
    use super::super::{by_name, lookup};
    use super::*;

    fn seen(name: &str, args: [u64; 6]) -> bool {
        by_name(name).is_some_and(|row| is_seen(&lookup(u64::from(row.nr), &args), &args))
    }

    /// Break it: take any name out of the lists, or let an unknown call pass.
    #[test]
    fn what_others_can_see() {
        for name in ["write", "sendto", "sendmsg", "writev", "pwrite64", "unlink", "rename", "connect", "close", "dup2"]
        {
            assert!(seen(name, [3; 6]), "{name}");
        }
        for name in ["execve", "fork", "kill", "exit_group", "shutdown", "flock", "ftruncate", "bind", "creat"] {
            assert!(seen(name, [3; 6]), "{name}");
        }
        for name in ["read", "epoll_ctl", "socket", "accept4", "mmap", "rt_sigaction", "fsync", "futex", "lseek", "dup"]
        {
            assert!(!seen(name, [3; 6]), "{name}");
        }
        assert!(seen("open", [0, O_CREAT, 0, 0, 0, 0]) && !seen("open", [0; 6]));
        assert!(seen("openat", [0, 0, O_TRUNC, 0, 0, 0]) && !seen("openat", [0; 6]));
        assert!(seen("fcntl", [3, 6, 0, 0, 0, 0]) && !seen("fcntl", [3, 4, 0, 0, 0, 0]));
        // What is not listed (TIOCSTI) can be seen, FIONBIO cannot.
        assert!(seen("ioctl", [3, 0x5412, 0, 0, 0, 0]) && !seen("ioctl", [3, 0x5421, 0, 0, 0, 0]));
        assert!(seen("clone", [0; 6]) && !seen("clone", [CLONE_THREAD, 0, 0, 0, 0, 0]));
        assert!(is_seen(&lookup(9999, &[0; 6]), &[0; 6]));
    }
}
