//! Calls with a handler of their own: the rows marked irregular in the table.

use ftrun_abi::table::{Class, Row};
use ftrun_ckpt::files::Named;

use crate::live::Outcome;
use crate::marshal::{Prepared, steady_call};
use crate::tracee::{self};
use crate::unit::{Result, Unit, Waiting};

/// A negative errno as a result.
pub(crate) fn err(errno: i32) -> Outcome {
    Outcome::Done(-i64::from(errno))
}

pub(crate) const SEC: u64 = 1_000_000_000;

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
            libc::SYS_getppid => Ok(Outcome::Done(i64::from(self.parent()))),
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
                    return self.unit_outputs(vtid, nr, args, call, row, r);
                }
                Ok(self.supervisor_outputs(call, nr))
            }
            libc::SYS_connect => self.connect(vtid, args, call),
            libc::SYS_setitimer | libc::SYS_alarm => self.setitimer(vtid, nr, args),
            libc::SYS_timer_create => self.timer_create(vtid, args),
            libc::SYS_timer_settime | libc::SYS_timer_gettime | libc::SYS_timer_getoverrun | libc::SYS_timer_delete => {
                self.timer_call(vtid, nr, args, call, row)
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
            libc::SYS_sched_setaffinity | libc::SYS_sched_getaffinity if self.is_own(args[0] as i32) => {
                Ok(self.affinity(vtid, nr, args, call))
            }
            _ if row.place == ftrun_abi::table::Place::Unit => {
                let r = self.gate(vtid, nr as libc::c_long, self.real_ids(row, args))?;
                if row.class == Class::Control {
                    self.unloggable = Some(row.name.to_owned());
                }
                self.unit_outputs(vtid, nr, args, call, row, r)
            }
            libc::SYS_sendfile | libc::SYS_splice | libc::SYS_tee | libc::SYS_copy_file_range => {
                self.transfer(vtid, nr, args, call)
            }
            _ => {
                let r = call.run(nr);
                Ok(Outcome::With(r, call.written(r)))
            }
        }
    }

    fn supervisor_outputs(&self, call: &mut Prepared, nr: u64) -> Outcome {
        let r = call.run(nr);
        Outcome::With(r, call.written(r))
    }

    /// Result of a call that the unit has made: inputs are read back to be logged, and the model follows.
    pub(crate) fn unit_outputs(
        &mut self,
        vtid: i32,
        nr: u64,
        args: &[u64; 6],
        call: &mut Prepared,
        row: &Row,
        result: i64,
    ) -> Result<Outcome> {
        self.local_effect(vtid, nr, args, result)?;
        let mut outs = Vec::new();
        if row.class != Class::Local {
            call.read_back(self.tid(vtid))?;
            outs = call.written(result);
        }
        if nr == libc::SYS_mmap as u64 && result > 0 && args[3] & libc::MAP_ANONYMOUS as u64 == 0 {
            let fd = args[4] as i32;
            let link = std::fs::read_link(format!("/proc/thread-self/fd/{fd}"));
            let file = link.and_then(|path| Named::new(fd, &path)).ok();
            let file = file.filter(|file| self.mapped.has(file, args[5], args[1]));
            match file.map(|file| postcard::to_stdvec(&file)) {
                Some(Ok(file)) => outs.push((0, file)),
                _ => self.unloggable = Some("mmap of a file that is needed later".into()),
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
                if self.uses_shim() {
                    let t = self.thread(vtid);
                    t.regs.gs_base = ftrun_abi::fast::area(t.slot);
                }
            }
            libc::SYS_mmap => {
                let range = result as u64..result as u64 + args[1].next_multiple_of(4096);
                self.forget_code(&range);
                if args[2] & libc::PROT_EXEC as u64 != 0 {
                    self.judge_code(vtid, range)?;
                }
            }
            libc::SYS_munmap => self.forget_code(&(args[0]..args[0] + args[1])),
            libc::SYS_mprotect | libc::SYS_pkey_mprotect if args[2] & libc::PROT_EXEC as u64 != 0 => {
                self.judge_code(vtid, args[0]..args[0] + args[1])?;
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

    fn transfer(&mut self, vtid: i32, nr: u64, args: &[u64; 6], call: &mut Prepared) -> Result<Outcome> {
        let (input, output) = if nr == libc::SYS_sendfile as u64 { (args[1], args[0]) } else { (args[0], args[2]) };
        let mut fds = [
            libc::pollfd { fd: input as i32, events: libc::POLLIN, revents: 0 },
            libc::pollfd { fd: output as i32, events: libc::POLLOUT, revents: 0 },
        ];
        steady_call(libc::SYS_poll as u64, &[fds.as_mut_ptr() as u64, 2, 0, 0, 0, 0]);
        // SAFETY: queries about a descriptor number.
        let flags = unsafe { libc::fcntl(output as i32, libc::F_GETFL) };
        let blocking = flags >= 0 && flags & libc::O_NONBLOCK == 0;
        // What was made for a supervisor that died has taken and filled what was ready.
        if blocking && !crate::hands::was_made(nr, call.digest) {
            for p in &fds {
                if p.revents == 0 {
                    let fds = vec![(p.fd, p.events)];
                    return Ok(Outcome::Block(Waiting { fds, ..Waiting::default() }));
                }
            }
        }
        if blocking {
            // A blocking socket would take all of it; what fits is a result that callers must expect too.
            let count = if nr == libc::SYS_sendfile as u64 { 3 } else { 4 };
            call.args[count] = call.args[count].min(65536);
        }
        let _ = vtid;
        Ok(self.supervisor_outputs(call, nr))
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
pub(crate) fn sigmask(tid: i32, at: u64) -> Result<Option<u64>> {
    if at == 0 { Ok(None) } else { Ok(Some(tracee::read_u64(tid, at)?)) }
}
