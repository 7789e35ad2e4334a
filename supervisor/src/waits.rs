//! Calls that wait by rules of their own: poll, select, epoll, sleeps, connect, locks.

use crate::calls::{SEC, err, sigmask, timespec};
use crate::launch::GATE;
use crate::live::Outcome;
use crate::marshal::{Prepared, steady_call};
use crate::tracee::{self};
use crate::unit::{Result, State, Unit, Waiting, now};

impl Unit {
    pub(crate) fn sched_yield(&mut self, vtid: i32) -> Outcome {
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
    pub(crate) fn deadline(&mut self, vtid: i32, digest: u64, timeout: Option<u64>) -> Option<u64> {
        let begun = self.begun(vtid, digest);
        if begun.deadline.is_none() {
            begun.deadline = timeout.map(|t| now().saturating_add(t));
        }
        begun.deadline
    }

    pub(crate) fn poll(&mut self, vtid: i32, nr: u64, args: &[u64; 6], call: &mut Prepared) -> Result<Outcome> {
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
        let r = steady_call(libc::SYS_poll as u64, &[fds.as_mut_ptr() as u64, (fds.len() / 8) as u64, 0, 0, 0, 0]);
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
        if r != 0 {
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

    pub(crate) fn select(&mut self, vtid: i32, nr: u64, args: &[u64; 6], call: &mut Prepared) -> Result<Outcome> {
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
        let r = steady_call(libc::SYS_poll as u64, &[fds.as_mut_ptr() as u64, fds.len() as u64, 0, 0, 0, 0]);
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

    pub(crate) fn epoll_wait(&mut self, vtid: i32, nr: u64, args: &[u64; 6], call: &mut Prepared) -> Result<Outcome> {
        let tid = self.tid(vtid);
        let timeout = if nr == libc::SYS_epoll_pwait2 as u64 {
            timespec(tid, args[3])?
        } else {
            let ms = args[3] as i32;
            (ms >= 0).then(|| ms as u64 * 1_000_000)
        };
        let mask = if nr == libc::SYS_epoll_wait as u64 { None } else { sigmask(tid, args[4])? };
        let max = (args[2] as i32).clamp(0, 65536) as usize;
        let at = call.more(max * 12);
        let r = call.run_with(libc::SYS_epoll_wait as u64, &[args[0], at, args[2].min(65536), 0, 0, 0], 1 << 1);
        if r != 0 {
            let events = call.bytes_at(at, r.max(0) as usize * 12);
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

    pub(crate) fn sleep(&mut self, vtid: i32, nr: u64, args: &[u64; 6], call: &mut Prepared) -> Result<Outcome> {
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

    pub(crate) fn sigtimedwait(&mut self, vtid: i32, args: &[u64; 6], call: &Prepared) -> Result<Outcome> {
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

    pub(crate) fn retry_busy(&mut self, r: i64) -> Outcome {
        if r == -i64::from(libc::EAGAIN) || r == -i64::from(libc::EACCES) {
            return Outcome::Block(Waiting { deadline: Some(now() + 2_000_000), ..Waiting::default() });
        }
        Outcome::With(r, vec![])
    }

    pub(crate) fn connect(&mut self, vtid: i32, args: &[u64; 6], call: &mut Prepared) -> Result<Outcome> {
        let fd = args[0] as i32;
        // SAFETY: queries about a descriptor number.
        let flags = unsafe { libc::fcntl(fd, libc::F_GETFL) };
        // A supervisor may have died while the flag was set.
        let flags = self.begun(vtid, call.digest).mode.unwrap_or(flags);
        if flags < 0 || flags & libc::O_NONBLOCK != 0 {
            return Ok(Outcome::With(call.run(libc::SYS_connect as u64), vec![]));
        }
        if !self.begun(vtid, call.digest).started {
            self.begun(vtid, call.digest).mode = Some(flags);
            self.keep_outside(self.sii);
            // SAFETY: sets a flag of a descriptor, and takes it back.
            unsafe { libc::fcntl(fd, libc::F_SETFL, flags | libc::O_NONBLOCK) };
            let r = call.run(libc::SYS_connect as u64);
            // SAFETY: as above.
            unsafe { libc::fcntl(fd, libc::F_SETFL, flags) };
            self.begun(vtid, call.digest).mode = None;
            if r == -i64::from(libc::EAGAIN) {
                // A Unix socket whose listener has no room: tried again later.
                return Ok(Outcome::Block(Waiting { deadline: Some(now() + 2_000_000), ..Waiting::default() }));
            }
            if r != -i64::from(libc::EINPROGRESS) {
                return Ok(Outcome::With(r, vec![]));
            }
            self.begun(vtid, call.digest).started = true;
            self.keep_outside(self.sii);
        }
        let mut p = libc::pollfd { fd, events: libc::POLLOUT, revents: 0 };
        steady_call(libc::SYS_poll as u64, &[(&raw mut p) as u64, 1, 0, 0, 0, 0]);
        if p.revents == 0 {
            return Ok(Outcome::Block(Waiting { fds: vec![(fd, libc::POLLOUT)], ..Waiting::default() }));
        }
        // Asking for the error clears it.
        let (error, len) = (call.more(4), call.more(4));
        call.put_at(len, &4u32.to_le_bytes());
        let args = [fd as u64, libc::SOL_SOCKET as u64, libc::SO_ERROR as u64, error, len, 0];
        call.run_with(libc::SYS_getsockopt as u64, &args, 1 << 3 | 1 << 4);
        Ok(Outcome::With(-i64::from(u32::from_le_bytes(call.bytes_at(error, 4).try_into().unwrap_or([0; 4]))), vec![]))
    }
}
