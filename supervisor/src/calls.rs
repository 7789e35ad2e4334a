//! Calls with a handler of their own: the rows marked irregular in the table.

use ftrun_abi::table::{Arg, Class, Row};

use crate::launch::{self, GATE};
use crate::live::Outcome;
use crate::marshal::{Prepared, raw_call};
use crate::tracee::{self, Event};
use crate::unit::{Child, Halt, Place, Result, State, Thread, Timer, Unit, Waiting, now};

/// A negative errno as a result.
pub(crate) fn err(errno: i32) -> Outcome {
    Outcome::Done(-i64::from(errno))
}

const SEC: u64 = 1_000_000_000;

/// What `clone`, `fork`, `vfork` and `clone3` ask for, in one form.
pub(crate) struct CloneRequest {
    pub(crate) flags: u64,
    pub(crate) parent_tid: u64,
    pub(crate) child_tid: u64,
    pub(crate) sp: u64,
    pub(crate) tls: u64,
}

impl Unit {
    /// Tries a call that has its own handler.
    pub(crate) fn irregular(
        &mut self,
        vtid: i32,
        nr: u64,
        args: &[u64; 6],
        call: &mut Prepared,
        row: &Row,
    ) -> Result<Outcome> {
        match nr as i64 {
            libc::SYS_getpid => Ok(Outcome::Done(i64::from(self.vpid))),
            libc::SYS_gettid => Ok(Outcome::Done(i64::from(vtid))),
            libc::SYS_getppid => Ok(Outcome::Done(i64::from(std::process::id()))),
            libc::SYS_sched_yield => Ok(self.sched_yield(vtid)),
            libc::SYS_poll | libc::SYS_ppoll => self.poll(vtid, nr, args, call),
            libc::SYS_select | libc::SYS_pselect6 => self.select(vtid, nr, args, call),
            libc::SYS_epoll_wait | libc::SYS_epoll_pwait | libc::SYS_epoll_pwait2 => {
                self.epoll_wait(vtid, nr, args, call)
            }
            libc::SYS_nanosleep | libc::SYS_clock_nanosleep => self.sleep(vtid, nr, args, call),
            libc::SYS_pause => Ok(Outcome::Block(Waiting::default())),
            libc::SYS_rt_sigsuspend => {
                let mask = tracee::read_u64(self.tid(vtid), args[0])?;
                Ok(Outcome::Block(Waiting { mask: Some(mask), ..Waiting::default() }))
            }
            libc::SYS_rt_sigtimedwait => self.sigtimedwait(vtid, args, call),
            libc::SYS_futex => self.futex(vtid, args, call.digest),
            libc::SYS_wait4 => Ok(self.wait4(args)),
            libc::SYS_waitid => Ok(self.waitid(args)),
            libc::SYS_clone | libc::SYS_clone3 | libc::SYS_fork | libc::SYS_vfork => self.clone(vtid, nr, args, call),
            libc::SYS_execve | libc::SYS_execveat => self.exec(vtid, nr, args),
            libc::SYS_exit => self.exit_thread(vtid, call.digest),
            libc::SYS_exit_group => self.exit_group(vtid, args[0], call.digest),
            libc::SYS_kill
            | libc::SYS_tkill
            | libc::SYS_tgkill
            | libc::SYS_rt_sigqueueinfo
            | libc::SYS_rt_tgsigqueueinfo => self.kill(vtid, nr, args, call),
            libc::SYS_clock_gettime => {
                let clock = args[0] as i32;
                if clock < 0 || clock == libc::CLOCK_PROCESS_CPUTIME_ID || clock == libc::CLOCK_THREAD_CPUTIME_ID {
                    let r = self.gate(vtid, nr as libc::c_long, *args)?;
                    return self.unit_outputs(vtid, nr, args, row, r);
                }
                Ok(self.supervisor_outputs(call, nr))
            }
            libc::SYS_connect => self.connect(vtid, args, call),
            libc::SYS_setitimer | libc::SYS_alarm => self.setitimer(vtid, nr, args),
            libc::SYS_timer_create => self.timer_create(vtid, args),
            libc::SYS_timer_settime | libc::SYS_timer_gettime | libc::SYS_timer_getoverrun | libc::SYS_timer_delete => {
                self.timer_call(vtid, nr, args, row)
            }
            libc::SYS_fcntl if args[1] == libc::F_SETLKW as u64 || args[1] == F_OFD_SETLKW => {
                // SETLKW is SETLK plus one; the lock is tried, and tried again until it is free.
                call.args[1] -= 1;
                let r = call.run(nr);
                Ok(self.retry_busy(r))
            }
            libc::SYS_flock => {
                call.args[1] |= libc::LOCK_NB as u64;
                let r = call.run(nr);
                if args[1] & libc::LOCK_NB as u64 != 0 { Ok(Outcome::Done(r)) } else { Ok(self.retry_busy(r)) }
            }
            _ if row.place == ftrun_abi::table::Place::Unit => {
                let r = self.gate(vtid, nr as libc::c_long, *args)?;
                if row.class == Class::Control {
                    self.unloggable = Some(row.name.to_owned());
                }
                self.unit_outputs(vtid, nr, args, row, r)
            }
            libc::SYS_sendfile | libc::SYS_splice | libc::SYS_tee | libc::SYS_copy_file_range => {
                self.transfer(vtid, nr, args, call)
            }
            _ => {
                let mut r = call.run(nr);
                while r == -i64::from(libc::EINTR) {
                    r = call.run(nr);
                }
                Ok(self.supervisor_result(call, r))
            }
        }
    }

    /// Result and outputs of a call that the supervisor has made, whatever the row's place says.
    fn supervisor_result(&self, call: &Prepared, r: i64) -> Outcome {
        let mut outs = Vec::new();
        let done = call.outputs(r, |addr, bytes| {
            outs.push((addr, bytes.to_vec()));
            Ok(())
        });
        debug_assert!(done.is_ok(), "collecting cannot fail");
        Outcome::With(r, outs)
    }

    fn supervisor_outputs(&self, call: &mut Prepared, nr: u64) -> Outcome {
        let r = call.run(nr);
        self.supervisor_result(call, r)
    }

    /// Result of a call that the unit has made: inputs are read back to be logged, and the model follows.
    pub(crate) fn unit_outputs(
        &mut self,
        vtid: i32,
        nr: u64,
        args: &[u64; 6],
        row: &Row,
        result: i64,
    ) -> Result<Outcome> {
        self.local_effect(vtid, nr, args, result)?;
        let mut outs = Vec::new();
        if row.class != Class::Local && result >= 0 {
            let tid = self.tid(vtid);
            for (i, arg) in row.args.iter().enumerate() {
                let len = match arg {
                    Arg::Out(len, _) | Arg::InOut(len) => *len,
                    _ => continue,
                };
                if args[i] == 0 {
                    continue;
                }
                let n = match len {
                    ftrun_abi::table::Len::Fixed(n) => n as usize,
                    ftrun_abi::table::Len::Arg(a) => args[a as usize] as usize,
                    ftrun_abi::table::Len::ArgTimes(a, size) => args[a as usize] as usize * size as usize,
                    _ => 0,
                };
                let mut bytes = vec![0; n.min(1 << 20)];
                if tracee::read_mem(tid, args[i], &mut bytes).is_ok() {
                    outs.push((args[i], bytes));
                }
            }
        }
        if nr == libc::SYS_mmap as u64 && result > 0 && args[3] & libc::MAP_ANONYMOUS as u64 == 0 {
            match std::fs::read_link(format!("/proc/thread-self/fd/{}", args[4] as i32)) {
                Ok(path) if path.is_absolute() && path.exists() => {
                    use std::os::unix::ffi::OsStrExt;
                    outs.push((0, path.as_os_str().as_bytes().to_vec()));
                }
                _ => self.unloggable = Some("mmap of a file without a path".into()),
            }
        }
        Ok(Outcome::With(result, outs))
    }

    /// What a call inside the unit changes of the state that a checkpoint must hold.
    pub(crate) fn local_effect(&mut self, vtid: i32, nr: u64, args: &[u64; 6], result: i64) -> Result<()> {
        if result < 0 && result > -4096 {
            return Ok(());
        }
        let tid = self.tid(vtid);
        match nr as i64 {
            libc::SYS_rt_sigaction if args[1] != 0 => {
                let mut raw = [0u8; 32];
                tracee::read_mem(tid, args[1], &mut raw)?;
                let word = |i: usize| u64::from_le_bytes(raw[i * 8..i * 8 + 8].try_into().unwrap_or([0; 8]));
                let (handler, flags, restorer, mask) = (word(0), word(1), word(2), word(3));
                if let Some(action) = self.model.actions.get_mut(args[0] as usize - 1) {
                    *action = [handler, flags, restorer, mask];
                }
            }
            libc::SYS_sigaltstack if args[0] != 0 => {
                let mut raw = [0u8; 24];
                tracee::read_mem(tid, args[0], &mut raw)?;
                let word = |i: usize| u64::from_le_bytes(raw[i..i + 8].try_into().unwrap_or([0; 8]));
                self.thread(vtid).altstack = (word(0), word(16), word(8) as u32);
            }
            libc::SYS_set_robust_list => self.thread(vtid).robust = (args[0], args[1]),
            libc::SYS_set_tid_address => self.thread(vtid).clear_tid = args[0],
            libc::SYS_arch_prctl => {
                let now = tracee::get_regs(tid)?;
                let t = self.thread(vtid);
                (t.regs.fs_base, t.regs.gs_base) = (now.fs_base, now.gs_base);
            }
            libc::SYS_brk => self.model.brk = result as u64,
            libc::SYS_setuid
            | libc::SYS_setgid
            | libc::SYS_setresuid
            | libc::SYS_setresgid
            | libc::SYS_setreuid
            | libc::SYS_setregid
            | libc::SYS_setgroups
            | libc::SYS_setfsuid
            | libc::SYS_setfsgid => {
                self.follow_credentials()?;
            }
            libc::SYS_prlimit64 | libc::SYS_setrlimit => self.follow_limits(),
            _ => {}
        }
        Ok(())
    }

    fn sched_yield(&mut self, vtid: i32) -> Outcome {
        if self.ready.is_empty() || self.thread(vtid).yielded {
            return Outcome::Done(0);
        }
        let t = self.thread(vtid);
        t.yielded = true;
        t.state = State::Entry;
        self.current = None;
        self.make_ready(vtid);
        Outcome::Handled
    }

    /// The deadline of a call's relative timeout: computed once, remembered across retries and recovery.
    fn deadline(&mut self, vtid: i32, digest: u64, timeout: Option<u64>) -> Option<u64> {
        let begun = self.begun(vtid, digest);
        if begun.deadline.is_none() {
            begun.deadline = timeout.map(|t| now().saturating_add(t));
        }
        begun.deadline
    }

    fn poll(&mut self, vtid: i32, nr: u64, args: &[u64; 6], call: &mut Prepared) -> Result<Outcome> {
        let tid = self.tid(vtid);
        let (timeout, mask) = if nr == libc::SYS_poll as u64 {
            let ms = args[2] as i32;
            ((ms >= 0).then(|| ms as u64 * 1_000_000), None)
        } else {
            (timespec(tid, args[2])?, sigmask(tid, args[3])?)
        };
        let mut fds = vec![0u8; (args[1] as usize).min(1 << 16) * 8];
        if !fds.is_empty() {
            tracee::read_mem(tid, args[0], &mut fds)?;
        }
        let r = raw_call(libc::SYS_poll as u64, &[fds.as_mut_ptr() as u64, (fds.len() / 8) as u64, 0, 0, 0, 0]);
        // A signalfd is readable for its own process only.
        let mut r = r;
        for at in (0..fds.len()).step_by(8) {
            let fd = i32::from_le_bytes([fds[at], fds[at + 1], fds[at + 2], fds[at + 3]]);
            let wants = i16::from_le_bytes([fds[at + 4], fds[at + 5]]) & libc::POLLIN != 0;
            if wants && crate::blocking::is_signalfd(fd) && self.unit_poll(vtid, fd)? {
                fds[at + 6..at + 8].copy_from_slice(&libc::POLLIN.to_le_bytes());
                r = r.max(0) + 1;
            }
        }
        if r != 0 && r != -i64::from(libc::EINTR) {
            return Ok(Outcome::With(r, if r > 0 { vec![(args[0], fds)] } else { vec![] }));
        }
        let deadline = self.deadline(vtid, call.digest, timeout);
        if deadline.is_some_and(|d| d <= now()) {
            return Ok(Outcome::With(0, if fds.is_empty() { vec![] } else { vec![(args[0], fds)] }));
        }
        let fds = fds
            .chunks_exact(8)
            .map(|c| (i32::from_le_bytes([c[0], c[1], c[2], c[3]]), i16::from_le_bytes([c[4], c[5]])))
            .collect();
        Ok(Outcome::Block(Waiting { fds, deadline, mask, ..Waiting::default() }))
    }

    fn select(&mut self, vtid: i32, nr: u64, args: &[u64; 6], call: &mut Prepared) -> Result<Outcome> {
        let tid = self.tid(vtid);
        let n = (args[0] as i32).clamp(0, 65536) as usize;
        let bytes = n.div_ceil(64) * 8;
        let mut sets = [vec![0u8; bytes], vec![0u8; bytes], vec![0u8; bytes]];
        for (i, set) in sets.iter_mut().enumerate() {
            if args[i + 1] != 0 {
                tracee::read_mem(tid, args[i + 1], set)?;
            }
        }
        let (timeout, mask) = if nr == libc::SYS_select as u64 {
            let t = if args[4] == 0 {
                None
            } else {
                Some(tracee::read_u64(tid, args[4])? * SEC + tracee::read_u64(tid, args[4] + 8)? * 1000)
            };
            (t, None)
        } else {
            let mask = if args[5] == 0 { None } else { sigmask(tid, tracee::read_u64(tid, args[5])?)? };
            (timespec(tid, args[4])?, mask)
        };
        let bit = |set: &[u8], fd: usize| set[fd / 8] & (1 << (fd % 8)) != 0;
        let events = [libc::POLLIN, libc::POLLOUT, libc::POLLPRI];
        let mut fds: Vec<libc::pollfd> = Vec::new();
        for fd in 0..n {
            let e = (0..3).filter(|i| bit(&sets[*i], fd)).fold(0, |e, i| e | events[i]);
            if e != 0 {
                fds.push(libc::pollfd { fd: fd as i32, events: e, revents: 0 });
            }
        }
        let r = raw_call(libc::SYS_poll as u64, &[fds.as_mut_ptr() as u64, fds.len() as u64, 0, 0, 0, 0]);
        if fds.iter().any(|p| p.revents & libc::POLLNVAL != 0) {
            return Ok(err(libc::EBADF));
        }
        let deadline = self.deadline(vtid, call.digest, timeout);
        if r <= 0 && deadline.is_none_or(|d| d > now()) {
            let fds = fds.iter().map(|p| (p.fd, p.events)).collect();
            return Ok(Outcome::Block(Waiting { fds, deadline, mask, ..Waiting::default() }));
        }
        // What counts as readable, writable and exceptional: select(2), "Correspondence between select() and poll()".
        let shown = [
            libc::POLLIN | libc::POLLRDNORM | libc::POLLRDBAND | libc::POLLHUP | libc::POLLERR,
            libc::POLLOUT | libc::POLLWRNORM | libc::POLLWRBAND | libc::POLLERR,
            libc::POLLPRI,
        ];
        let mut count = 0;
        let mut out = [vec![0u8; bytes], vec![0u8; bytes], vec![0u8; bytes]];
        for p in &fds {
            let fd = p.fd as usize;
            for i in 0..3 {
                if bit(&sets[i], fd) && p.revents & shown[i] != 0 {
                    out[i][fd / 8] |= 1 << (fd % 8);
                    count += 1;
                }
            }
        }
        let mut outs: Vec<(u64, Vec<u8>)> =
            out.into_iter().enumerate().filter(|(i, _)| args[i + 1] != 0).map(|(i, b)| (args[i + 1], b)).collect();
        if args[4] != 0 {
            let left = deadline.unwrap_or(0).saturating_sub(now());
            let unit = if nr == libc::SYS_select as u64 { 1000 } else { 1 };
            let mut b = (left / SEC).to_le_bytes().to_vec();
            b.extend_from_slice(&(left % SEC / unit).to_le_bytes());
            outs.push((args[4], b));
        }
        Ok(Outcome::With(count, outs))
    }

    fn epoll_wait(&mut self, vtid: i32, nr: u64, args: &[u64; 6], call: &mut Prepared) -> Result<Outcome> {
        let tid = self.tid(vtid);
        let timeout = if nr == libc::SYS_epoll_pwait2 as u64 {
            timespec(tid, args[3])?
        } else {
            let ms = args[3] as i32;
            (ms >= 0).then(|| ms as u64 * 1_000_000)
        };
        let mask = if nr == libc::SYS_epoll_wait as u64 { None } else { sigmask(tid, args[4])? };
        let max = (args[2] as i32).clamp(0, 65536) as usize;
        let mut events = vec![0u8; max * 12];
        let at = events.as_mut_ptr() as u64;
        let r = raw_call(libc::SYS_epoll_wait as u64, &[args[0], at, args[2].min(65536), 0, 0, 0]);
        if r != 0 && r != -i64::from(libc::EINTR) {
            events.truncate(r.max(0) as usize * 12);
            return Ok(Outcome::With(r, if r > 0 { vec![(args[1], events)] } else { vec![] }));
        }
        if timeout == Some(0) {
            return Ok(Outcome::Done(0).into_with());
        }
        let deadline = self.deadline(vtid, call.digest, timeout);
        if deadline.is_some_and(|d| d <= now()) {
            return Ok(Outcome::With(0, vec![]));
        }
        let fds = vec![(args[0] as i32, libc::POLLIN)];
        Ok(Outcome::Block(Waiting { fds, deadline, mask, ..Waiting::default() }))
    }

    fn sleep(&mut self, vtid: i32, nr: u64, args: &[u64; 6], call: &mut Prepared) -> Result<Outcome> {
        let tid = self.tid(vtid);
        let (clock, absolute, at) = if nr == libc::SYS_nanosleep as u64 {
            (libc::CLOCK_MONOTONIC, false, args[0])
        } else {
            (args[0] as i32, args[1] & libc::TIMER_ABSTIME as u64 != 0, args[2])
        };
        let Some(mut time) = timespec(tid, at)? else { return Ok(err(libc::EFAULT)) };
        if tracee::read_u64(tid, at + 8)? >= SEC {
            return Ok(err(libc::EINVAL));
        }
        if absolute {
            let mut ts = libc::timespec { tv_sec: 0, tv_nsec: 0 };
            // SAFETY: `ts` outlives the call.
            if unsafe { libc::clock_gettime(clock, &raw mut ts) } != 0 {
                return Ok(err(libc::EINVAL));
            }
            time = time.saturating_sub(ts.tv_sec as u64 * SEC + ts.tv_nsec as u64);
        }
        let deadline = self.deadline(vtid, call.digest, Some(time));
        if deadline.is_some_and(|d| d <= now()) {
            return Ok(Outcome::With(0, vec![]));
        }
        Ok(Outcome::Block(Waiting { deadline, ..Waiting::default() }))
    }

    fn sigtimedwait(&mut self, vtid: i32, args: &[u64; 6], call: &Prepared) -> Result<Outcome> {
        let tid = self.tid(vtid);
        let timeout = timespec(tid, args[2])?;
        // Asked without waiting, the call only takes what is pending. The time stands in our own memory.
        let at = GATE.slot(self.thread(vtid).slot);
        tracee::write_mem(tid, at, &[0; 16])?;
        let r = self.gate(vtid, libc::SYS_rt_sigtimedwait, [args[0], args[1], at, args[3], 0, 0])?;
        if r != -i64::from(libc::EAGAIN) {
            let mut outs = Vec::new();
            if r > 0 && args[1] != 0 {
                let mut info = vec![0; 128];
                tracee::read_mem(tid, args[1], &mut info)?;
                outs.push((args[1], info));
            }
            return Ok(Outcome::With(r, outs));
        }
        let deadline = self.deadline(vtid, call.digest, timeout);
        if deadline.is_some_and(|d| d <= now()) {
            return Ok(err(libc::EAGAIN).into_with());
        }
        // A blocked signal interrupts no wait, so its arrival is looked for from time to time.
        let step = now() + 5_000_000;
        let deadline = Some(deadline.map_or(step, |d| d.min(step)));
        Ok(Outcome::Block(Waiting { deadline, ..Waiting::default() }))
    }

    fn retry_busy(&mut self, r: i64) -> Outcome {
        if r == -i64::from(libc::EAGAIN) || r == -i64::from(libc::EACCES) {
            return Outcome::Block(Waiting { deadline: Some(now() + 2_000_000), ..Waiting::default() });
        }
        Outcome::With(r, vec![])
    }

    fn transfer(&mut self, vtid: i32, nr: u64, args: &[u64; 6], call: &mut Prepared) -> Result<Outcome> {
        let (input, output) = if nr == libc::SYS_sendfile as u64 { (args[1], args[0]) } else { (args[0], args[2]) };
        let mut fds = [
            libc::pollfd { fd: input as i32, events: libc::POLLIN, revents: 0 },
            libc::pollfd { fd: output as i32, events: libc::POLLOUT, revents: 0 },
        ];
        raw_call(libc::SYS_poll as u64, &[fds.as_mut_ptr() as u64, 2, 0, 0, 0, 0]);
        // SAFETY: queries about a descriptor number.
        let flags = unsafe { libc::fcntl(output as i32, libc::F_GETFL) };
        let blocking = flags >= 0 && flags & libc::O_NONBLOCK == 0;
        if blocking {
            for p in &fds {
                if p.revents == 0 {
                    let fds = vec![(p.fd, p.events)];
                    return Ok(Outcome::Block(Waiting { fds, ..Waiting::default() }));
                }
            }
            // A blocking socket would take all of it; what fits is a result that callers must expect too.
            let count = if nr == libc::SYS_sendfile as u64 { 3 } else { 4 };
            call.args[count] = call.args[count].min(65536);
        }
        let _ = vtid;
        Ok(self.supervisor_outputs(call, nr))
    }

    fn connect(&mut self, vtid: i32, args: &[u64; 6], call: &mut Prepared) -> Result<Outcome> {
        let fd = args[0] as i32;
        // SAFETY: queries about a descriptor number.
        let flags = unsafe { libc::fcntl(fd, libc::F_GETFL) };
        if flags < 0 || flags & libc::O_NONBLOCK != 0 {
            return Ok(Outcome::With(call.run(libc::SYS_connect as u64), vec![]));
        }
        if !self.begun(vtid, call.digest).started {
            // SAFETY: sets a flag of a descriptor, and takes it back.
            unsafe { libc::fcntl(fd, libc::F_SETFL, flags | libc::O_NONBLOCK) };
            let r = call.run(libc::SYS_connect as u64);
            // SAFETY: as above.
            unsafe { libc::fcntl(fd, libc::F_SETFL, flags) };
            if r == -i64::from(libc::EAGAIN) {
                // A Unix socket whose listener has no room: tried again later.
                return Ok(Outcome::Block(Waiting { deadline: Some(now() + 2_000_000), ..Waiting::default() }));
            }
            if r != -i64::from(libc::EINPROGRESS) {
                return Ok(Outcome::With(r, vec![]));
            }
            self.begun(vtid, call.digest).started = true;
        }
        let mut p = libc::pollfd { fd, events: libc::POLLOUT, revents: 0 };
        raw_call(libc::SYS_poll as u64, &[(&raw mut p) as u64, 1, 0, 0, 0, 0]);
        if p.revents == 0 {
            return Ok(Outcome::Block(Waiting { fds: vec![(fd, libc::POLLOUT)], ..Waiting::default() }));
        }
        let mut error: libc::c_int = 0;
        let mut len = 4u32;
        // SAFETY: the buffer is as long as `len` says.
        unsafe {
            libc::getsockopt(fd, libc::SOL_SOCKET, libc::SO_ERROR, (&raw mut error).cast(), &raw mut len);
        }
        Ok(Outcome::With(-i64::from(error), vec![]))
    }

    fn wait4(&mut self, args: &[u64; 6]) -> Outcome {
        let wanted = args[0] as i32;
        match self.take_child(wanted, args[2] & libc::WNOHANG as u64 != 0, true) {
            Ok((pid, status)) => {
                let mut outs = Vec::new();
                if args[1] != 0 && pid != 0 {
                    outs.push((args[1], status.to_le_bytes().to_vec()));
                }
                if args[3] != 0 && pid != 0 {
                    outs.push((args[3], vec![0; 144]));
                }
                Outcome::With(i64::from(pid), outs)
            }
            Err(outcome) => outcome,
        }
    }

    fn waitid(&mut self, args: &[u64; 6]) -> Outcome {
        let wanted = if args[0] as u32 == libc::P_PID { args[1] as i32 } else { -1 };
        let keep = args[3] & libc::WNOWAIT as u64 != 0;
        match self.take_child(wanted, args[3] & libc::WNOHANG as u64 != 0, !keep) {
            Ok((pid, status)) => {
                let mut outs = Vec::new();
                if args[2] != 0 {
                    let (code, value) = if libc::WIFEXITED(status) {
                        (libc::CLD_EXITED, libc::WEXITSTATUS(status))
                    } else {
                        (libc::CLD_KILLED, libc::WTERMSIG(status))
                    };
                    let info = if pid == 0 {
                        [0; 128]
                    } else {
                        // SAFETY: no arguments.
                        let uid = unsafe { libc::getuid() };
                        tracee::make_siginfo(libc::SIGCHLD, code, pid, uid, value)
                    };
                    outs.push((args[2], info.to_vec()));
                }
                Outcome::With(0, outs)
            }
            Err(outcome) => outcome,
        }
    }

    /// A child that has ended, or pid 0 if none has and the caller does not want to wait.
    fn take_child(&mut self, wanted: i32, nohang: bool, take: bool) -> std::result::Result<(i32, i32), Outcome> {
        let mut matching = self.outside.children.iter().filter(|(pid, _)| wanted <= 0 || **pid == wanted).peekable();
        if matching.peek().is_none() {
            return Err(err(libc::ECHILD).into_with());
        }
        if let Some((pid, status)) = matching.find_map(|(pid, c)| Some((*pid, c.ended?))) {
            if take {
                self.outside.children.remove(&pid);
            }
            return Ok((pid, status));
        }
        if nohang { Ok((0, 0)) } else { Err(Outcome::Block(Waiting { child: true, ..Waiting::default() })) }
    }

    /// Reads what a clone call asks for; `None` if it cannot be done.
    pub(crate) fn clone_request(&mut self, vtid: i32, nr: u64, args: &[u64; 6]) -> Result<Option<CloneRequest>> {
        let tid = self.tid(vtid);
        Ok(Some(match nr as i64 {
            libc::SYS_clone => CloneRequest {
                flags: args[0] & !0xff,
                sp: args[1],
                parent_tid: args[2],
                child_tid: args[3],
                tls: args[4],
            },
            libc::SYS_clone3 => {
                let mut raw = [0u8; 88];
                tracee::read_mem(tid, args[0], &mut raw[..(args[1] as usize).min(88)])?;
                let word = |i: usize| u64::from_le_bytes(raw[i * 8..i * 8 + 8].try_into().unwrap_or([0; 8]));
                if word(0) & libc::CLONE_PIDFD as u64 != 0 || word(0) & (1 << 33) != 0 {
                    return Ok(None);
                }
                let sp = if word(5) == 0 { 0 } else { word(5) + word(6) };
                CloneRequest { flags: word(0), child_tid: word(2), parent_tid: word(3), sp, tls: word(7) }
            }
            _ => CloneRequest { flags: 0, parent_tid: 0, child_tid: 0, sp: 0, tls: 0 },
        }))
    }

    fn clone(&mut self, vtid: i32, nr: u64, args: &[u64; 6], call: &Prepared) -> Result<Outcome> {
        let Some(request) = self.clone_request(vtid, nr, args)? else { return Ok(err(libc::EINVAL).into_with()) };
        if request.flags & libc::CLONE_THREAD as u64 != 0 {
            return Ok(match self.new_thread(vtid, &request, None)? {
                Ok(new) => {
                    self.make_ready(new);
                    Outcome::With(i64::from(new), vec![])
                }
                Err(e) => err(e.raw_os_error().unwrap_or(libc::EAGAIN)).into_with(),
            });
        }
        // A child of its own: a copy (also for vfork, so that nothing writes to our memory behind the log),
        // and a child of the supervisor, so that it outlives the unit's death.
        let dropped = libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_FILES | libc::CLONE_FS | libc::CLONE_SIGHAND;
        let flags = request.flags & !(dropped as u64) | libc::CLONE_PARENT as u64;
        let t = self.thread(vtid);
        let (tid, regs) = (t.tid, t.regs);
        let pointers = [request.parent_tid, request.child_tid, request.sp, request.tls];
        let made = launch::clone_through_gate(tid, &regs, flags, pointers, None)?;
        let child = match made {
            Ok(child) => child,
            Err(e) => return Ok(err(e.raw_os_error().unwrap_or(libc::EAGAIN)).into_with()),
        };
        // The child runs on its own: its time-stamp counter is nobody's input.
        let tsc = [libc::PR_SET_TSC as u64, libc::PR_TSC_ENABLE as u64, 0, 0, 0, 0];
        launch::gate_call(child, &regs, libc::SYS_prctl as u64, tsc, &mut |_| {})?;
        self.outside.children.insert(child, Child { ended: None, reported: false });
        let mut outs = Vec::new();
        if request.flags & libc::CLONE_PARENT_SETTID as u64 != 0 {
            outs.push((request.parent_tid, child.to_le_bytes().to_vec()));
        }
        self.complete_fork(vtid, nr, child, call.digest, outs, &request)?;
        Ok(Outcome::Handled)
    }

    /// The event is logged before the child runs, so that a death here leaves no child nobody knows of.
    fn complete_fork(
        &mut self,
        vtid: i32,
        nr: u64,
        child: i32,
        digest: u64,
        outs: Vec<(u64, Vec<u8>)>,
        request: &CloneRequest,
    ) -> Result<()> {
        let mut regs = self.thread(vtid).regs;
        regs.rax = 0;
        regs.orig_rax = u64::MAX;
        if request.sp != 0 {
            regs.rsp = request.sp;
        }
        if request.flags & libc::CLONE_SETTLS as u64 != 0 {
            regs.fs_base = request.tls;
        }
        let done = self.complete(vtid, nr, i64::from(child), digest, outs);
        let started = tracee::set_regs(child, &regs).and_then(|()| tracee::cont(child, 0));
        if let Err(tracee::TraceError::Sys { .. }) = started {
            started?;
        }
        done
    }

    /// Makes a thread inside the unit. It stands in user code without the turn.
    pub(crate) fn new_thread(
        &mut self,
        vtid: i32,
        request: &CloneRequest,
        want: Option<i32>,
    ) -> Result<std::result::Result<i32, std::io::Error>> {
        let slot = self.free_slot();
        let t = self.thread(vtid);
        let (tid, mut regs) = (t.tid, t.regs);
        let pointers = [request.parent_tid, request.child_tid, request.sp, request.tls];
        let set_tid = want.filter(|_| self.set_tid);
        let made = launch::clone_through_gate(tid, &regs, request.flags, pointers, set_tid)?;
        let new = match made {
            Ok(new) => new,
            Err(e) => return Ok(Err(e)),
        };
        let known = want.unwrap_or(new);
        for (flag, at) in
            [(libc::CLONE_PARENT_SETTID, request.parent_tid), (libc::CLONE_CHILD_SETTID, request.child_tid)]
        {
            if request.flags & flag as u64 != 0 && known != new {
                tracee::write_mem(tid, at, &known.to_le_bytes())?;
            }
        }
        regs.rax = 0;
        regs.orig_rax = u64::MAX;
        if request.sp != 0 {
            regs.rsp = request.sp;
        }
        if request.flags & libc::CLONE_SETTLS as u64 != 0 {
            regs.fs_base = request.tls;
        }
        let clear_tid = if request.flags & libc::CLONE_CHILD_CLEARTID as u64 != 0 { request.child_tid } else { 0 };
        self.vtids.insert(new, known);
        self.threads.insert(
            known,
            Thread {
                tid: new,
                slot,
                state: State::User,
                place: Place::Stopped,
                regs,
                own_mask: None,
                xstate: None,
                altstack: (0, 0, libc::SS_DISABLE as u32),
                clear_tid,
                robust: (0, 0),
                yielded: false,
            },
        );
        Ok(Ok(known))
    }

    /// Runs `execve` in the unit; on success the process stands before the new image's first instruction.
    pub(crate) fn exec(&mut self, vtid: i32, nr: u64, args: &[u64; 6]) -> Result<Outcome> {
        let t = self.thread(vtid);
        let (tid, regs) = (t.tid, t.regs);
        tracee::set_regs(tid, &GATE.regs(&regs, nr, *args))?;
        tracee::cont(tid, 0)?;
        loop {
            let (who, event) = match tracee::wait(-1, 0) {
                Ok(Some(x)) => x,
                Ok(None) => continue,
                Err(_) => return Err(Halt::Died),
            };
            match event {
                Event::Other(libc::PTRACE_EVENT_EXEC) if who == self.pid => return Err(Halt::Exec(who)),
                Event::Seccomp if who == tid => {
                    let r = tracee::get_regs(tid)?.rdi as i64;
                    self.thread(vtid).place = Place::Stopped;
                    return Ok(Outcome::With(r, vec![]));
                }
                Event::Ended(_) if who == self.pid => return Err(Halt::Died),
                Event::Ended(_) if self.vtids.contains_key(&who) => {}
                _ => self.on_event(who, event)?,
            }
        }
    }

    fn exit_thread(&mut self, vtid: i32, digest: u64) -> Result<Outcome> {
        self.begin_record(ftrun_abi::record::Kind::Call);
        self.append(vtid, libc::SYS_exit as u16, 0, digest, 0);
        self.end_thread(vtid)?;
        Ok(Outcome::Handled)
    }

    /// Lets a thread end, and does what the kernel does then with `clear_child_tid`.
    pub(crate) fn end_thread(&mut self, vtid: i32) -> Result<()> {
        if self.threads.len() == 1 {
            self.ending = true;
        }
        let clear = self.thread(vtid).clear_tid;
        if clear != 0 && self.threads.len() > 1 {
            // The kernel's own clearing would come at a time of its choosing.
            self.gate(vtid, libc::SYS_set_tid_address, [0; 6])?;
        }
        let t = self.thread(vtid);
        let (tid, regs) = (t.tid, t.regs);
        let code = regs.rdi;
        tracee::set_regs(tid, &GATE.regs(&regs, libc::SYS_exit as u64, [code, 0, 0, 0, 0, 0]))?;
        tracee::cont(tid, 0)?;
        if self.threads.len() == 1 || tid != self.pid {
            loop {
                match tracee::wait_one(tid)? {
                    Event::Ended(status) if self.threads.len() == 1 => return Err(Halt::Ended(status)),
                    Event::Ended(_) => break,
                    Event::Seccomp => return Err(Halt::Broken("a thread did not end".into())),
                    _ => tracee::cont(tid, 0)?,
                }
            }
        }
        self.threads.remove(&vtid);
        self.vtids.remove(&tid);
        self.outside.signals.remove(&vtid);
        self.outside.begun.remove(&vtid);
        self.current = None;
        if clear != 0 {
            if let Some(other) = self.threads.values().next().map(|t| t.tid)
                && let Err(e @ tracee::TraceError::Gone(_)) = tracee::write_mem(other, clear, &[0; 4])
            {
                return Err(e.into());
            }
            self.wake_futex(clear, 1, u32::MAX);
        }
        Ok(())
    }

    pub(crate) fn exit_group(&mut self, vtid: i32, code: u64, digest: u64) -> Result<Outcome> {
        self.ending = true;
        self.begin_record(ftrun_abi::record::Kind::Exit);
        self.append(vtid, libc::SYS_exit_group as u16, code as i64, digest, 0);
        self.end_process(vtid, code)
    }

    /// Lets the whole process end.
    pub(crate) fn end_process(&mut self, vtid: i32, code: u64) -> Result<Outcome> {
        let t = self.thread(vtid);
        let (tid, regs) = (t.tid, t.regs);
        tracee::set_regs(tid, &GATE.regs(&regs, libc::SYS_exit_group as u64, [code, 0, 0, 0, 0, 0]))?;
        tracee::cont(tid, 0)?;
        loop {
            // The main thread is reported last, when all others have been reaped.
            let (who, event) = match tracee::wait(-1, 0) {
                Ok(Some(x)) => x,
                Ok(None) => continue,
                Err(_) => return Err(Halt::Died),
            };
            match event {
                Event::Ended(status) if who == self.pid => return Err(Halt::Ended(status)),
                Event::Ended(_) if self.vtids.contains_key(&who) => {}
                _ if self.vtids.contains_key(&who) => match tracee::cont(who, 0) {
                    Err(e @ tracee::TraceError::Sys { .. }) => return Err(e.into()),
                    Ok(()) | Err(tracee::TraceError::Gone(_)) => {}
                },
                _ => self.on_event(who, event)?,
            }
        }
    }

    /// The call sends a signal to the unit itself.
    pub(crate) fn is_self_signal(&self, nr: u64, args: &[u64; 6]) -> bool {
        let target = args[0] as i32;
        match nr as i64 {
            libc::SYS_tkill => self.threads.contains_key(&target),
            _ => target == self.vpid || (nr == libc::SYS_rt_sigqueueinfo as u64 && self.threads.contains_key(&target)),
        }
    }

    /// The same call with the kernel's ids.
    pub(crate) fn signal_args(&self, nr: u64, args: &[u64; 6]) -> [u64; 6] {
        let mut a = *args;
        a[0] = self.real_id(args[0] as i32) as u64;
        if nr == libc::SYS_tgkill as u64 || nr == libc::SYS_rt_tgsigqueueinfo as u64 {
            a[1] = self.real_id(args[1] as i32) as u64;
        }
        a
    }

    fn kill(&mut self, vtid: i32, nr: u64, args: &[u64; 6], call: &mut Prepared) -> Result<Outcome> {
        let real = self.signal_args(nr, args);
        if !self.is_self_signal(nr, args) {
            call.args[0] = real[0];
            return Ok(Outcome::With(call.run(nr), vec![]));
        }
        let signal = match nr as i64 {
            libc::SYS_tgkill | libc::SYS_rt_tgsigqueueinfo => args[2],
            _ => args[1],
        } as i32;
        if signal == libc::SIGKILL || signal == libc::SIGSTOP {
            self.ending = signal == libc::SIGKILL;
            return Err(match self.gate(vtid, nr as libc::c_long, real) {
                Err(Halt::Died) => Halt::Ended(libc::SIGKILL),
                Err(e) => e,
                Ok(r) => return Ok(Outcome::With(r, vec![])),
            });
        }
        let r = self.gate(vtid, nr as libc::c_long, real)?;
        self.park_stopped()?;
        Ok(Outcome::With(r, vec![]))
    }

    /// Threads that wait without the kernel's knowledge would not notice a signal: they wait in it now.
    fn park_stopped(&mut self) -> Result<()> {
        if self.threads.len() > 1 { self.park_all() } else { Ok(()) }
    }

    fn setitimer(&mut self, vtid: i32, nr: u64, args: &[u64; 6]) -> Result<Outcome> {
        let tid = self.tid(vtid);
        let alarm = nr == libc::SYS_alarm as u64;
        let r = self.gate(vtid, nr as libc::c_long, *args)?;
        let mut outs = Vec::new();
        if r >= 0 {
            let (which, first, period) = if alarm {
                (libc::ITIMER_REAL, args[0] as u32 as u64 * SEC, 0)
            } else if args[1] == 0 {
                (args[0] as i32, 0, 0)
            } else {
                let w = |i: u64| tracee::read_u64(tid, args[1] + i * 8);
                (args[0] as i32, w(2)? * SEC + w(3)? * 1000, w(0)? * SEC + w(1)? * 1000)
            };
            let next = (first > 0).then(|| now() + first);
            self.outside.itimers.insert(which, Timer { clock: which, event: vec![], next, period, kernel_id: Some(0) });
            if !alarm && args[2] != 0 {
                let mut old = vec![0; 32];
                tracee::read_mem(tid, args[2], &mut old)?;
                outs.push((args[2], old));
            }
        }
        Ok(Outcome::With(r, outs))
    }

    fn timer_create(&mut self, vtid: i32, args: &[u64; 6]) -> Result<Outcome> {
        let tid = self.tid(vtid);
        let id = (0..).find(|i| !self.outside.timers.contains_key(i)).unwrap_or(0);
        let mut event = vec![0u8; 64];
        if args[1] == 0 {
            event[..8].copy_from_slice(&(id as u64).to_le_bytes());
            event[8..12].copy_from_slice(&libc::SIGALRM.to_le_bytes());
        } else {
            tracee::read_mem(tid, args[1], &mut event)?;
        }
        let timer = Timer { clock: args[0] as i32, event, next: None, period: 0, kernel_id: None };
        match self.make_timer(vtid, &timer)? {
            Ok(kernel_id) => {
                self.outside.timers.insert(id, Timer { kernel_id: Some(kernel_id), ..timer });
                Ok(Outcome::With(0, vec![(args[2], id.to_le_bytes().to_vec())]))
            }
            Err(r) => Ok(Outcome::With(r, vec![])),
        }
    }

    fn make_timer(&mut self, vtid: i32, timer: &Timer) -> Result<std::result::Result<i32, i64>> {
        let t = self.thread(vtid);
        let (tid, at) = (t.tid, GATE.slot(t.slot));
        let mut event = timer.event.clone();
        let word = |i: usize| i32::from_le_bytes([event[i], event[i + 1], event[i + 2], event[i + 3]]);
        // SIGEV_THREAD_ID names a thread by the program's id.
        if word(12) == 4 {
            let real = self.real_id(word(16));
            event[16..20].copy_from_slice(&real.to_le_bytes());
        }
        tracee::write_mem(tid, at, &event)?;
        let r = self.gate(vtid, libc::SYS_timer_create, [timer.clock as u64, at, at + 64, 0, 0, 0])?;
        if r < 0 {
            return Ok(Err(r));
        }
        Ok(Ok(tracee::read_u32(tid, at + 64)? as i32))
    }

    fn timer_call(&mut self, vtid: i32, nr: u64, args: &[u64; 6], row: &Row) -> Result<Outcome> {
        let id = args[0] as i32;
        let Some(kernel_id) = self.outside.timers.get(&id).and_then(|t| t.kernel_id) else {
            return Ok(err(libc::EINVAL).into_with());
        };
        let mut real = *args;
        real[0] = kernel_id as u64;
        let r = self.gate(vtid, nr as libc::c_long, real)?;
        if r >= 0 && nr == libc::SYS_timer_delete as u64 {
            self.outside.timers.remove(&id);
        }
        let outcome = self.unit_outputs(vtid, nr, args, row, r)?;
        if r >= 0 && nr == libc::SYS_timer_settime as u64 {
            let (tid, at) = (self.tid(vtid), GATE.slot(self.thread(vtid).slot));
            self.gate(vtid, libc::SYS_timer_gettime, [kernel_id as u64, at, 0, 0, 0, 0])?;
            let w = |i: u64| tracee::read_u64(tid, at + i * 8);
            let (period, left) = (w(0)? * SEC + w(1)?, w(2)? * SEC + w(3)?);
            if let Some(t) = self.outside.timers.get_mut(&id) {
                t.next = (left > 0).then(|| now() + left);
                t.period = period;
            }
        }
        Ok(outcome)
    }

    /// After a recovery: timers that the model knows are made and set again.
    pub(crate) fn arm_timers(&mut self) -> Result<()> {
        let Some(vtid) = self.threads.iter().find(|(_, t)| t.place == Place::Stopped).map(|(v, _)| *v) else {
            return Ok(());
        };
        let (tid, at) = (self.tid(vtid), GATE.slot(self.thread(vtid).slot));
        let split = |ns: u64, unit: u64| [ns / SEC, ns % SEC / unit];
        let left = |t: &Timer| {
            t.next.map_or(0, |n| {
                let time = now();
                if n > time || t.period == 0 {
                    n.saturating_sub(time).max(1000)
                } else {
                    t.period - (time - n) % t.period
                }
            })
        };
        for id in self.outside.timers.keys().copied().collect::<Vec<_>>() {
            let timer = self.outside.timers[&id].clone();
            if timer.kernel_id.is_some() {
                continue;
            }
            let Ok(kernel_id) = self.make_timer(vtid, &timer)? else { continue };
            let words = [split(timer.period, 1), split(left(&timer), 1)].concat();
            let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
            tracee::write_mem(tid, at, &bytes)?;
            self.gate(vtid, libc::SYS_timer_settime, [kernel_id as u64, 0, at, 0, 0, 0])?;
            if let Some(t) = self.outside.timers.get_mut(&id) {
                t.kernel_id = Some(kernel_id);
            }
        }
        for which in self.outside.itimers.keys().copied().collect::<Vec<_>>() {
            let timer = self.outside.itimers[&which].clone();
            if timer.kernel_id.is_some() || timer.next.is_none() {
                continue;
            }
            let words = [split(timer.period, 1000), split(left(&timer), 1000)].concat();
            let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
            tracee::write_mem(tid, at, &bytes)?;
            self.gate(vtid, libc::SYS_setitimer, [which as u64, at, 0, 0, 0, 0])?;
            if let Some(t) = self.outside.itimers.get_mut(&which) {
                t.kernel_id = Some(0);
            }
        }
        Ok(())
    }
}

const F_OFD_SETLKW: u64 = 38;

impl Outcome {
    /// The same without outputs of the prepared call.
    pub(crate) fn into_with(self) -> Self {
        match self {
            Outcome::Done(r) => Outcome::With(r, vec![]),
            other => other,
        }
    }
}

/// A `struct timespec` in nanoseconds; `None` for a null pointer.
pub(crate) fn timespec(tid: i32, at: u64) -> Result<Option<u64>> {
    if at == 0 {
        return Ok(None);
    }
    Ok(Some(tracee::read_u64(tid, at)?.saturating_mul(SEC).saturating_add(tracee::read_u64(tid, at + 8)?)))
}

/// A signal mask; `None` for a null pointer.
fn sigmask(tid: i32, at: u64) -> Result<Option<u64>> {
    if at == 0 { Ok(None) } else { Ok(Some(tracee::read_u64(tid, at)?)) }
}
