//! Threads, children, images, ends, and signals that the unit sends: calls about processes.

use crate::calls::err;
use crate::launch::{self, GATE};
use crate::live::Outcome;
use crate::marshal::Prepared;
use crate::outside::Child;
use crate::tracee::{self, Event};
use crate::unit::{Halt, Place, Result, State, Thread, Unit, Waiting};

/// What `clone`, `fork`, `vfork` and `clone3` ask for, in one form.
pub(crate) struct CloneRequest {
    pub(crate) flags: u64,
    pub(crate) parent_tid: u64,
    pub(crate) child_tid: u64,
    pub(crate) sp: u64,
    pub(crate) tls: u64,
}

impl Unit {
    pub(crate) fn wait4(&mut self, args: &[u64; 6]) -> Outcome {
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

    pub(crate) fn waitid(&mut self, args: &[u64; 6]) -> Outcome {
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
    pub(crate) fn take_child(
        &mut self,
        wanted: i32,
        nohang: bool,
        take: bool,
    ) -> std::result::Result<(i32, i32), Outcome> {
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

    pub(crate) fn clone(&mut self, vtid: i32, nr: u64, args: &[u64; 6], call: &Prepared) -> Result<Outcome> {
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
        self.share_fds();
        let made = self.clone_and_keep(vtid, tid, &regs, flags, pointers, None)?;
        let child = match made {
            Ok(child) => child,
            Err(e) => return Ok(err(e.raw_os_error().unwrap_or(libc::EAGAIN)).into_with()),
        };
        // The child runs on its own: its time-stamp counter is nobody's input.
        let tsc = [libc::PR_SET_TSC as u64, libc::PR_TSC_ENABLE as u64, 0, 0, 0, 0];
        launch::gate_call(child, &regs, libc::SYS_prctl as u64, tsc, &mut |_| {})?;
        self.release_child(vtid, child);
        self.outside.children.insert(child, Child { ended: None, reported: false });
        let mut outs = Vec::new();
        if request.flags & libc::CLONE_PARENT_SETTID as u64 != 0 {
            outs.push((request.parent_tid, child.to_le_bytes().to_vec()));
        }
        self.complete_fork(vtid, nr, child, call.digest, outs, &request)?;
        Ok(Outcome::Handled)
    }

    /// The event is logged before the child runs, so that a death here leaves no child nobody knows of.
    pub(crate) fn complete_fork(
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
        if self.uses_shim() {
            regs.gs_base = 0;
            match self.restore_sites(child) {
                // Killed meanwhile: its end is reported.
                Ok(()) | Err(Halt::Died) => {}
                Err(e) => return Err(e),
            }
        }
        let done = self.complete(vtid, nr, i64::from(child), digest, outs);
        let started = tracee::set_regs(child, &regs).and_then(|()| tracee::cont(child, 0));
        if let Err(tracee::TraceError::Sys { .. }) = started {
            started?;
        }
        done
    }

    /// [`launch::clone_through_gate`]; signals that arrive meanwhile are kept for the caller.
    fn clone_and_keep(
        &mut self,
        vtid: i32,
        tid: i32,
        regs: &libc::user_regs_struct,
        flags: u64,
        pointers: [u64; 4],
        set_tid: Option<i32>,
    ) -> Result<std::result::Result<i32, std::io::Error>> {
        let mut caught = Vec::new();
        let made = launch::clone_through_gate(tid, regs, flags, pointers, set_tid, &mut |info| caught.push(info));
        for info in caught {
            self.keep_signal(vtid, info);
        }
        Ok(made?)
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
        let made = self.clone_and_keep(vtid, tid, &regs, request.flags, pointers, set_tid)?;
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
        self.inherit_cpus(vtid, known);
        self.learn_id(new, known);
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
                sent_back: 0,
            },
        );
        self.give_area(known)?;
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

    pub(crate) fn exit_thread(&mut self, vtid: i32, digest: u64) -> Result<Outcome> {
        self.begin_record(ftrun_abi::record::Kind::Call);
        self.append(vtid, libc::SYS_exit as u16, 0, digest, 0)?;
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
                    Event::Signal(_) => {
                        // The process's, perhaps: another thread has to take it.
                        let info = tracee::get_siginfo(tid)?;
                        let other = self.threads.keys().copied().find(|v| *v != vtid);
                        let (_, code, _) = tracee::siginfo_head(&info);
                        if let Some(other) = other.filter(|_| code != libc::SI_TKILL) {
                            self.keep_signal(other, info);
                        }
                        tracee::cont(tid, 0)?;
                    }
                    Event::Stop(_) | Event::Other(_) => tracee::cont(tid, 0)?,
                }
            }
        }
        self.threads.remove(&vtid);
        self.vtids.remove(&tid);
        self.outside.ids.remove(&tid);
        self.outside.signals.remove(&vtid);
        self.model.affinity.remove(&vtid);
        self.outside.begun.remove(&vtid);
        self.current = None;
        self.offer_signals();
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
        self.append(vtid, libc::SYS_exit_group as u16, code as i64, digest, 0)?;
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

    pub(crate) fn kill(&mut self, vtid: i32, nr: u64, args: &[u64; 6], call: &mut Prepared) -> Result<Outcome> {
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
    pub(crate) fn park_stopped(&mut self) -> Result<()> {
        if self.threads.len() > 1 { self.park_all() } else { Ok(()) }
    }

    /// A thread or process that is not of the unit: its child, or a new one.
    pub(crate) fn on_outsider(&mut self, tid: i32, event: Event) -> Result<()> {
        // An outsider that dies under our hands reports its end by itself.
        let ignore_gone = |r: tracee::Result<()>| match r {
            Err(tracee::TraceError::Sys { .. }) | Ok(()) | Err(tracee::TraceError::Gone(_)) => Ok(()),
        };
        match event {
            Event::Seccomp | Event::Other(_) => ignore_gone(tracee::cont(tid, 0)),
            Event::Signal(signal) => ignore_gone(tracee::cont(tid, signal)),
            Event::Stop(signal) if signal == libc::SIGTRAP || signal == 0 => ignore_gone(tracee::cont(tid, 0)),
            Event::Stop(_) => ignore_gone(tracee::listen(tid)),
            Event::Ended(status) => self.child_ended(tid, status),
        }
    }

    /// A child's end becomes an input of the unit.
    pub(crate) fn child_ended(&mut self, pid: i32, status: i32) -> Result<()> {
        let Some(child) = self.outside.children.get_mut(&pid) else { return Ok(()) };
        child.ended = Some(status);
        if self.threads.is_empty() {
            return Ok(());
        }
        self.report_children()
    }

    /// Gives the unit the signals of children that ended, and wakes those who wait for them.
    pub(crate) fn report_children(&mut self) -> Result<()> {
        let news: Vec<(i32, i32)> = self
            .outside
            .children
            .iter()
            .filter(|(_, c)| !c.reported)
            .filter_map(|(pid, c)| Some((*pid, c.ended?)))
            .collect();
        for (pid, status) in news {
            if let Some(c) = self.outside.children.get_mut(&pid) {
                c.reported = true;
            }
            let (code, value) = if libc::WIFEXITED(status) {
                (libc::CLD_EXITED, libc::WEXITSTATUS(status))
            } else {
                (libc::CLD_KILLED, libc::WTERMSIG(status))
            };
            // SAFETY: no arguments.
            let uid = unsafe { libc::getuid() };
            let info = tracee::make_siginfo(libc::SIGCHLD, code, pid, uid, value);
            self.outside.signals.entry(-1).or_default().push_back(info);
            // The kernel chooses the thread and honours masks; the information above replaces its own.
            // SAFETY: our own child.
            unsafe { libc::kill(self.pid, libc::SIGCHLD) };
        }
        let waiting: Vec<i32> = self
            .threads
            .iter()
            .filter(|(_, t)| matches!(&t.state, State::Blocked(w) if w.child))
            .map(|(v, _)| *v)
            .collect();
        for vtid in waiting {
            self.make_ready(vtid);
        }
        Ok(())
    }
}
