//! Calls that move data through descriptors and may block, made without ever blocking the tracer.
//!
//! A call is tried so that it cannot block. When it would, the thread waits in `ppoll` and the call is
//! tried again. What a blocking `write` has already handed over is remembered outside of the unit
//! ([`crate::unit::Begun`]), so that a death in its middle neither loses nor repeats a byte.

use ftrun_abi::table::{Row, Wait};

use crate::hands;
use crate::live::Outcome;
use crate::marshal::{Prepared, steady_call};
use crate::tracee;
use crate::unit::{Result, Unit, Waiting, now};

const AGAIN: i64 = -(libc::EAGAIN as i64);
const INTR: i64 = -(libc::EINTR as i64);
const NOT_SUPPORTED: i64 = -(libc::EOPNOTSUPP as i64);

/// What a descriptor is, as far as blocking goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// `O_NONBLOCK`, or something that never blocks: make the call as it is.
    Immediate,
    Socket,
    Pipe,
    Other,
}

fn kind(fd: i32) -> Kind {
    // SAFETY: queries about a descriptor number.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFL) };
    if flags < 0 || flags & libc::O_NONBLOCK != 0 {
        return Kind::Immediate;
    }
    // SAFETY: plain integers, for which zero is valid.
    let mut st: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: `st` outlives the call.
    if unsafe { libc::fstat(fd, &raw mut st) } != 0 {
        return Kind::Immediate;
    }
    match st.st_mode & libc::S_IFMT {
        libc::S_IFREG | libc::S_IFDIR | libc::S_IFBLK => Kind::Immediate,
        libc::S_IFSOCK => Kind::Socket,
        libc::S_IFIFO => Kind::Pipe,
        _ => Kind::Other,
    }
}

/// Writes what surely fits into a pipe that is writable: one page.
fn write_page(call: &mut Prepared, fd: i32, done: usize) -> i64 {
    if !hands::was_made(libc::SYS_write as u64, call.digest) && !ready(fd, libc::POLLOUT) {
        return AGAIN;
    }
    let rest = &call.payload()[done..];
    let (at, len) = (rest.as_ptr() as u64, rest.len().min(libc::PIPE_BUF) as u64);
    call.run_with(libc::SYS_write as u64, &[fd as u64, at, len, 0, 0, 0], 1 << 1)
}

/// `poll` of one descriptor without waiting.
fn ready(fd: i32, events: i16) -> bool {
    let mut p = libc::pollfd { fd, events, revents: 0 };
    steady_call(libc::SYS_poll as u64, &[(&raw mut p) as u64, 1, 0, 0, 0, 0]) != 0
}

/// `SO_RCVTIMEO` or `SO_SNDTIMEO` in nanoseconds; `None` if not set.
fn socket_timeout(fd: i32, option: i32) -> Option<u64> {
    let mut tv = libc::timeval { tv_sec: 0, tv_usec: 0 };
    let mut len = size_of::<libc::timeval>() as u32;
    // SAFETY: the buffer is as long as `len` says.
    let r = unsafe { libc::getsockopt(fd, libc::SOL_SOCKET, option, (&raw mut tv).cast(), &raw mut len) };
    let ns = tv.tv_sec as u64 * 1_000_000_000 + tv.tv_usec as u64 * 1000;
    (r == 0 && ns > 0).then_some(ns)
}

impl Unit {
    /// A call that the table describes wholly.
    pub(crate) fn regular(
        &mut self,
        vtid: i32,
        nr: u64,
        args: &[u64; 6],
        call: &mut Prepared,
        row: &Row,
    ) -> Result<Outcome> {
        match row.wait {
            Wait::Readable(i) => self.read_like(vtid, nr, args, call, args[i as usize] as i32),
            Wait::Writable(i) => self.write_like(vtid, nr, args, call, args[i as usize] as i32),
            Wait::Never | Wait::Special => Ok(Outcome::Done(call.run(nr))),
        }
    }

    fn wait_fd(&mut self, vtid: i32, digest: u64, fd: i32, events: i16, timeout: Option<u64>) -> Outcome {
        let begun = self.begun(vtid, digest);
        if begun.deadline.is_none() {
            begun.deadline = timeout.map(|t| now() + t);
        }
        if begun.deadline.is_some_and(|d| d <= now()) {
            return Outcome::Done(AGAIN);
        }
        Outcome::Block(Waiting { fds: vec![(fd, events)], deadline: begun.deadline, ..Waiting::default() })
    }

    fn read_like(&mut self, vtid: i32, nr: u64, args: &[u64; 6], call: &mut Prepared, fd: i32) -> Result<Outcome> {
        if nr as i64 == libc::SYS_read && is_signalfd(fd) {
            return self.read_signalfd(vtid, args, call.digest);
        }
        let kind = kind(fd);
        let mut changed = None;
        if kind == Kind::Socket {
            match nr as i64 {
                libc::SYS_recvfrom if args[3] & libc::MSG_DONTWAIT as u64 == 0 => changed = Some(3),
                libc::SYS_recvmsg if args[2] & libc::MSG_DONTWAIT as u64 == 0 => changed = Some(2),
                libc::SYS_recvfrom | libc::SYS_recvmsg => {
                    return Ok(Outcome::Done(call.run(nr)));
                }
                _ => {}
            }
        }
        let made = hands::was_made(nr, call.digest);
        if kind == Kind::Immediate || (changed.is_none() && (made || ready(fd, libc::POLLIN))) {
            let r = call.run(nr);
            if kind != Kind::Immediate && r == AGAIN {
                return Ok(self.wait_fd(vtid, call.digest, fd, libc::POLLIN, None));
            }
            return Ok(Outcome::Done(r));
        }
        if let Some(flags) = changed {
            // MSG_WAITALL: wait until all of it is there, or the end of the stream.
            let all = args[flags] & libc::MSG_WAITALL as u64 != 0 && nr as i64 == libc::SYS_recvfrom;
            if all && !made && !enough(fd, args[2]) && !ready(fd, libc::POLLRDHUP) {
                let timeout = socket_timeout(fd, libc::SO_RCVTIMEO);
                let outcome = self.wait_fd(vtid, call.digest, fd, libc::POLLRDHUP, timeout.or(Some(5_000_000)));
                if timeout.is_none() {
                    // Polled by time: readiness cannot say "this many bytes". The deadline starts anew.
                    self.begun(vtid, call.digest).deadline = None;
                }
                if let Outcome::Block(_) = outcome {
                    return Ok(outcome);
                }
            }
            call.args[flags] |= libc::MSG_DONTWAIT as u64;
            let r = call.run(nr);
            if r != AGAIN {
                return Ok(Outcome::Done(r));
            }
        }
        let timeout = (kind == Kind::Socket).then(|| socket_timeout(fd, libc::SO_RCVTIMEO)).flatten();
        Ok(self.wait_fd(vtid, call.digest, fd, libc::POLLIN, timeout))
    }

    /// `read` of a signalfd: it gives the signals of its caller, so the unit reads it itself.
    fn read_signalfd(&mut self, vtid: i32, args: &[u64; 6], digest: u64) -> Result<Outcome> {
        let fd = args[0] as i32;
        if !self.unit_poll(vtid, fd)? {
            // SAFETY: queries about a descriptor number.
            let flags = unsafe { libc::fcntl(fd, libc::F_GETFL) };
            if flags & libc::O_NONBLOCK != 0 {
                return Ok(Outcome::With(AGAIN, vec![]));
            }
            return Ok(self.wait_fd(vtid, digest, fd, libc::POLLIN, None));
        }
        let r = self.gate(vtid, libc::SYS_read, *args)?;
        let mut outs = Vec::new();
        if r > 0 {
            let mut bytes = vec![0; r as usize];
            tracee::read_mem(self.tid(vtid), args[1], &mut bytes)?;
            outs.push((args[1], bytes));
            self.took_signal = true;
        }
        Ok(Outcome::With(r, outs))
    }

    /// Asks in the unit whether a descriptor is readable now.
    pub(crate) fn unit_poll(&mut self, vtid: i32, fd: i32) -> Result<bool> {
        let t = self.thread(vtid);
        let (tid, at) = (t.tid, crate::launch::GATE.slot(t.slot));
        let mut bytes = fd.to_le_bytes().to_vec();
        bytes.extend_from_slice(&libc::POLLIN.to_le_bytes());
        bytes.extend_from_slice(&[0; 2]);
        tracee::write_mem(tid, at, &bytes)?;
        Ok(self.gate(vtid, libc::SYS_poll, [at, 1, 0, 0, 0, 0])? > 0)
    }

    fn write_like(&mut self, vtid: i32, nr: u64, args: &[u64; 6], call: &mut Prepared, fd: i32) -> Result<Outcome> {
        if nr as i64 == libc::SYS_write && is_proc(fd) {
            // What such a file says of its process, only the process itself may change; a checkpoint keeps it.
            let r = self.gate(vtid, libc::SYS_write, *args)?;
            self.unloggable = Some("write to a file of /proc".to_owned());
            return Ok(Outcome::With(r, vec![]));
        }
        let kind = kind(fd);
        let flags = match nr as i64 {
            libc::SYS_sendto => Some(3),
            libc::SYS_sendmsg => Some(2),
            _ => None,
        };
        let dontwait = flags.is_some_and(|i| args[i] & libc::MSG_DONTWAIT as u64 != 0);
        let quiet = flags.is_some_and(|i| args[i] & libc::MSG_NOSIGNAL as u64 != 0);
        let outcome = if kind == Kind::Immediate || dontwait || kind == Kind::Other {
            if let Some(i) = flags {
                call.args[i] |= libc::MSG_NOSIGNAL as u64;
            }
            Outcome::Done(call.run(nr))
        } else {
            self.write_on(vtid, nr, call, fd, kind, flags)
        };
        if let Outcome::Done(r) = outcome
            && r == -i64::from(libc::EPIPE)
            && !quiet
        {
            self.broken_pipe(vtid)?;
        }
        Ok(outcome)
    }

    /// Goes on with a blocking write where it was left.
    fn write_on(
        &mut self,
        vtid: i32,
        nr: u64,
        call: &mut Prepared,
        fd: i32,
        kind: Kind,
        flags: Option<usize>,
    ) -> Outcome {
        let (digest, total) = (call.digest, call.payload().len());
        loop {
            let done = self.begun(vtid, digest).done;
            if done >= total && total > 0 {
                // All of it was written for a supervisor that could not log it any more.
                return Outcome::Done(done as i64);
            }
            let r = if kind == Kind::Socket {
                match flags {
                    Some(2) => {
                        if done > 0 {
                            call.advance_message(done);
                        }
                        call.args[2] |= (libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) as u64;
                        call.run(nr)
                    }
                    _ => {
                        let rest = &call.payload()[done..];
                        let (at, n) = (rest.as_ptr() as u64, rest.len() as u64);
                        let (f, addr, len) =
                            if flags.is_some() { (call.args[3], call.args[4], call.args[5]) } else { (0, 0, 0) };
                        let f = f | (libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) as u64;
                        let args = [fd as u64, at, n, f, addr, len];
                        call.run_with(libc::SYS_sendto as u64, &args, 1 << 1 | 1 << 4)
                    }
                }
            } else {
                let args = [fd as u64, call.rest(done), 1, u64::MAX, 0, libc::RWF_NOWAIT as u64];
                // preadv2(2): offset -1 means the current one; RWF_NOWAIT works on pipes since Linux 6.4.
                match call.run_with(libc::SYS_pwritev2 as u64, &args, 1 << 1) {
                    NOT_SUPPORTED => write_page(call, fd, done),
                    r => r,
                }
            };
            if r == INTR {
                continue;
            }
            if r == AGAIN {
                let timeout = (kind == Kind::Socket).then(|| socket_timeout(fd, libc::SO_SNDTIMEO)).flatten();
                let outcome = self.wait_fd(vtid, digest, fd, libc::POLLOUT, timeout);
                return match outcome {
                    Outcome::Done(_) if done > 0 => Outcome::Done(done as i64),
                    other => other,
                };
            }
            if r < 0 {
                return Outcome::Done(if done > 0 { done as i64 } else { r });
            }
            let done = done + r as usize;
            self.begun(vtid, digest).done = done;
            self.keep_outside(self.sii);
            if done >= total || r == 0 {
                return Outcome::Done(done as i64);
            }
        }
    }

    /// A write met a closed pipe: the thread gets SIGPIPE, as from the kernel.
    fn broken_pipe(&mut self, vtid: i32) -> Result<()> {
        let handler = self.model.actions.get(libc::SIGPIPE as usize - 1).map_or(0, |a| a[0]);
        let mask = tracee::get_sigmask(self.tid(vtid))?;
        if handler == 1 {
            return Ok(());
        }
        if handler == 0 && mask & (1 << (libc::SIGPIPE - 1)) == 0 {
            self.ending = true;
        }
        let (pid, vpid) = (self.pid, self.vpid);
        // SAFETY: no arguments.
        let uid = unsafe { libc::getuid() };
        if handler > 1 {
            self.keep_signal(vtid, tracee::make_siginfo(libc::SIGPIPE, libc::SI_USER, vpid, uid, 0));
        } else {
            tracee::tgkill(pid, self.tid(vtid), libc::SIGPIPE)?;
        }
        Ok(())
    }
}

/// The descriptor is a signalfd.
pub(crate) fn is_signalfd(fd: i32) -> bool {
    is_anonymous(fd, "anon_inode:[signalfd]")
}

/// The descriptor is an eventfd.
pub(crate) fn is_eventfd(fd: i32) -> bool {
    is_anonymous(fd, "anon_inode:[eventfd]")
}

/// The descriptor is a stream socket.
pub(crate) fn is_stream(fd: i32) -> bool {
    let (mut kind, mut len) = (0i32, 4u32);
    // SAFETY: the buffer is as long as `len` says.
    let r = unsafe { libc::getsockopt(fd, libc::SOL_SOCKET, libc::SO_TYPE, (&raw mut kind).cast(), &raw mut len) };
    r == 0 && kind == libc::SOCK_STREAM
}

/// The descriptor has this name. Anonymous inodes have no file type.
fn is_anonymous(fd: i32, name: &str) -> bool {
    // SAFETY: plain integers, for which zero is valid.
    let mut st: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: `st` outlives the call.
    let r = unsafe { libc::fstat(fd, &raw mut st) };
    r == 0
        && st.st_mode & libc::S_IFMT == 0
        && std::fs::read_link(format!("/proc/thread-self/fd/{fd}")).is_ok_and(|l| l.as_os_str() == name)
}

/// The descriptor is of a file in /proc.
fn is_proc(fd: i32) -> bool {
    // SAFETY: plain integers, for which zero is valid.
    let mut found: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: `found` outlives the call.
    let r = unsafe { libc::fstatfs(fd, &raw mut found) };
    r == 0 && found.f_type == libc::PROC_SUPER_MAGIC
}

/// At least `want` bytes can be read.
fn enough(fd: i32, want: u64) -> bool {
    let mut n: libc::c_int = 0;
    // SAFETY: FIONREAD writes one int.
    let r = unsafe { libc::ioctl(fd, libc::FIONREAD, &raw mut n) };
    r != 0 || n as u64 >= want
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;
    use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

    /// `poll` is interrupted even when it does not wait. What is not ready must not be taken for ready then: the
    /// supervisor would wait in the call that follows, and nobody would serve the one who could end it.
    ///
    /// Break it: ask by `libc::poll` in [`ready`].
    #[test]
    fn a_signal_makes_nothing_ready() {
        crate::told::listen();
        let (empty, _far) = std::os::unix::net::UnixStream::pair().unwrap();
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
            let wrong = (0..300_000).filter(|_| ready(empty.as_raw_fd(), libc::POLLIN)).count();
            done.store(true, SeqCst);
            assert_eq!(wrong, 0);
        });
    }
}
