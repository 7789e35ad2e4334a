//! Signals: kept when they arrive, delivered at calls, logged, and delivered again in replay.
//!
//! The kernel tells us of a signal when the thread is about to receive it, which may be anywhere in the
//! program. Replay could not find that place, so the signal is kept and delivered when the thread next
//! comes to a call: before the call, or instead of the call's wait. Delivery itself is always done the
//! same way ([`Unit::deliver`]): the signal is sent to the thread again, and when the kernel reports it
//! the logged information and the thread's registers are put in place. So the kernel builds the frame,
//! in replay as in live execution.
//!
//! Faults of the program's own instructions are no inputs: replay meets them again by itself.

use ftrun_abi::record::Kind;
use libc::c_int;

use crate::tracee::{self, Event, SigInfo};
use crate::unit::{Halt, Place, Result, State, Unit};

/// What a signal does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Disposition {
    Ignore,
    Stop,
    Fatal,
    Handler,
}

/// Key of [`crate::unit::Outside::signals`] for signals that were sent to the process.
pub(crate) const ANY_THREAD: i32 = 0;

/// Calls that a handler ends with `EINTR` even with `SA_RESTART` (signal(7)).
const NEVER_RESTARTED: [i64; 13] = [
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_select,
    libc::SYS_pselect6,
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_pause,
    libc::SYS_rt_sigsuspend,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_io_getevents,
];

impl Unit {
    fn disposition(&self, signal: c_int) -> Disposition {
        let handler = self.model.actions.get(signal as usize - 1).map_or(0, |a| a[0]);
        match handler {
            1 => Disposition::Ignore,
            0 => match signal {
                libc::SIGCHLD | libc::SIGURG | libc::SIGWINCH | libc::SIGCONT => Disposition::Ignore,
                libc::SIGSTOP | libc::SIGTSTP | libc::SIGTTIN | libc::SIGTTOU => Disposition::Stop,
                _ => Disposition::Fatal,
            },
            _ => Disposition::Handler,
        }
    }

    /// The signal was sent by the unit itself: replay sends it again.
    fn sent_by_unit(&self, info: &SigInfo) -> bool {
        let (_, code, pid) = tracee::siginfo_head(info);
        code <= 0 && code != libc::SI_TIMER && (pid == self.pid || pid == self.vpid)
    }

    /// Keeps a signal that arrived for a thread, if it does anything.
    pub(crate) fn keep_signal(&mut self, vtid: i32, mut info: SigInfo) {
        let (signal, _, pid) = tracee::siginfo_head(&info);
        // SAFETY: no arguments.
        let us = unsafe { libc::getpid() };
        if signal == libc::SIGCHLD && pid == us {
            // Sent by `report_children`, which left the true information here.
            if let Some(true_info) = self.outside.signals.remove(&-1).and_then(|mut q| q.pop_front()) {
                info = true_info;
            }
        }
        self.note_expiry(&info);
        if self.disposition(signal) == Disposition::Ignore {
            return;
        }
        let own = self.sent_by_unit(&info);
        let (_, code, _) = tracee::siginfo_head(&info);
        let to = if code == libc::SI_TKILL { vtid } else { ANY_THREAD };
        let queue = if own && self.replaying {
            self.regenerated.entry(to).or_default()
        } else {
            self.outside.signals.entry(to).or_default()
        };
        if signal >= 32 || !queue.iter().any(|i| tracee::siginfo_head(i).0 == signal) {
            queue.push_back(info);
        }
        if to == ANY_THREAD {
            self.offered = false;
        }
        if !self.replaying && self.current != Some(vtid) {
            // It may wait, and was disturbed only for a moment: it has to look at its call again.
            self.make_ready(vtid);
        }
    }

    /// A timer's signal has left the kernel: a recovery must not let that expiry happen again.
    fn note_expiry(&mut self, info: &SigInfo) {
        const SI_KERNEL: c_int = 0x80;
        let (signal, code, id) = tracee::siginfo_head(info);
        let timer = if code == libc::SI_TIMER {
            self.outside.timers.values_mut().find(|t| t.kernel_id == Some(id))
        } else if code == SI_KERNEL && signal == libc::SIGALRM {
            self.outside.itimers.get_mut(&libc::ITIMER_REAL)
        } else {
            None
        };
        if let Some(t) = timer {
            t.next = if t.period == 0 { None } else { Some(crate::unit::now() + t.period) };
        }
    }

    /// A thread stands before the delivery of a signal.
    pub(crate) fn on_signal(&mut self, vtid: i32, signal: c_int) -> Result<()> {
        let tid = self.tid(vtid);
        let info = tracee::get_siginfo(tid)?;
        let (_, code, _) = tracee::siginfo_head(&info);
        let running = self.thread(vtid).place == Place::Program;
        let fault = matches!(signal, libc::SIGSEGV | libc::SIGBUS | libc::SIGFPE | libc::SIGILL | libc::SIGTRAP);
        if running && fault && code > 0 && self.is_in_shim(tracee::get_regs(tid)?.rip) {
            return self.fault_in_shim(vtid);
        }
        if running && fault && code > 0 {
            if matches!(signal, libc::SIGSEGV | libc::SIGILL) && self.trapped_instruction(vtid)? {
                return Ok(());
            }
            if signal == libc::SIGSEGV && self.enters_guarded(vtid)? {
                return Ok(());
            }
            if self.disposition(signal) != Disposition::Handler {
                let addr = u64::from_le_bytes(info[16..24].try_into().unwrap_or([0; 8]));
                self.fault = Some((signal, addr));
            }
            return Ok(tracee::cont(tid, signal)?);
        }
        match self.disposition(signal) {
            Disposition::Ignore => Ok(tracee::cont(tid, 0)?),
            Disposition::Stop => Ok(tracee::cont(tid, signal)?),
            Disposition::Fatal => {
                self.ending = true;
                self.outside.fatal = Some(signal);
                self.keep_outside(self.sii);
                crate::fault::point("fatal-kept", self.pid);
                Ok(tracee::cont(tid, signal)?)
            }
            Disposition::Handler => {
                self.keep_signal(vtid, info);
                self.call_back();
                if self.thread(vtid).place == Place::Parked {
                    self.thread(vtid).place = Place::Stopped;
                    self.make_ready(vtid);
                    return Ok(());
                }
                self.go_on(tid)
            }
        }
    }

    /// Executes `rdtsc`, `rdtscp` or `cpuid` for a thread that was stopped by it. False if the fault was
    /// something else.
    fn trapped_instruction(&mut self, vtid: i32) -> Result<bool> {
        let tid = self.tid(vtid);
        let mut regs = tracee::get_regs(tid)?;
        let Some(length) = self.trapped_at(tid, regs.rip)? else { return Ok(false) };
        if self.replaying {
            return Err(Halt::Broken("a trapped instruction in replay reached the live path".into()));
        }
        let values = execute_trapped(length, regs.rax as u32, regs.rcx as u32);
        self.begin_record(Kind::Insn);
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.output(0, &bytes)?;
        self.append(vtid, length.0, 0, regs.rip, 0)?;
        apply_trapped(&mut regs, length, values);
        tracee::set_regs(tid, &regs)?;
        tracee::cont(tid, 0)?;
        Ok(true)
    }

    /// The next kept signal that can be delivered to a stopped thread under its mask.
    fn next_signal(&mut self, vtid: i32, mask: Option<u64>) -> Result<Option<SigInfo>> {
        if !self.has_signals(vtid) {
            return Ok(None);
        }
        let mask = match mask {
            Some(m) => m,
            None => tracee::get_sigmask(self.tid(vtid))?,
        };
        let mut found = None;
        for to in [vtid, ANY_THREAD] {
            for info in self.outside.signals.remove(&to).unwrap_or_default() {
                let (signal, ..) = tracee::siginfo_head(&info);
                let free = found.is_none() && mask & (1 << (signal - 1)) == 0;
                match self.disposition(signal) {
                    Disposition::Handler if free => found = Some((to, info)),
                    Disposition::Fatal if free => {
                        self.ending = true;
                        found = Some((to, info));
                    }
                    Disposition::Ignore => {}
                    _ => self.outside.signals.entry(to).or_default().push_back(info),
                }
            }
        }
        self.outside.delivering = found;
        Ok(found.map(|(_, info)| info))
    }

    /// A thread has left signals of the process to the others (it masks them, or has ended): each other thread
    /// looks at them, once.
    pub(crate) fn offer_signals(&mut self) {
        if !self.offered && self.outside.signals.get(&ANY_THREAD).is_some_and(|q| !q.is_empty()) {
            self.offered = true;
            for vtid in self.threads.keys().copied().collect::<Vec<_>>() {
                self.make_ready(vtid);
            }
        }
    }

    /// Signals are kept that this thread may take.
    pub(crate) fn has_signals(&self, vtid: i32) -> bool {
        [vtid, ANY_THREAD].iter().any(|to| self.outside.signals.get(to).is_some_and(|q| !q.is_empty()))
    }

    /// A signal is due for a thread whose call is about to be tried. True if the thread was given it.
    pub(crate) fn interrupted(&mut self, vtid: i32) -> Result<bool> {
        if !self.has_signals(vtid) || self.model.woken.contains(&vtid) {
            return Ok(false);
        }
        let t = self.thread(vtid);
        let waiting = match &t.state {
            State::Blocked(w) => Some(w.clone()),
            _ => None,
        };
        let mask = waiting.as_ref().and_then(|w| w.mask);
        let (nr, args) = tracee::call_of(&t.regs);
        let Some(info) = self.next_signal(vtid, mask)? else { return Ok(false) };
        let (signal, ..) = tracee::siginfo_head(&info);
        let Some(waiting) = waiting else {
            self.log_signal(vtid, &info, 0, None)?;
            self.step_back(vtid);
            return self.deliver(vtid, &info, None).map(|()| true);
        };
        self.model.futexes.retain(|w| w.vtid != vtid);
        if let Some(mask) = waiting.mask {
            self.outside.begun.remove(&vtid);
            self.log_signal(vtid, &info, Self::signal_flags(false, true), Some(mask))?;
            self.finish_call(vtid, -i64::from(libc::EINTR), &[])?;
            return self.deliver(vtid, &info, Some(mask)).map(|()| true);
        }
        let flags = self.model.actions[signal as usize - 1][1];
        let begun = self.outside.begun.remove(&vtid).unwrap_or_default();
        let timed_futex = nr == libc::SYS_futex as u64 && waiting.deadline.is_some();
        if flags & libc::SA_RESTART as u64 != 0
            && !NEVER_RESTARTED.contains(&(nr as i64))
            && !timed_futex
            && begun.done == 0
        {
            self.log_signal(vtid, &info, 0, None)?;
            self.step_back(vtid);
            return self.deliver(vtid, &info, None).map(|()| true);
        }
        let result = if begun.done > 0 { begun.done as i64 } else { -i64::from(libc::EINTR) };
        let outs = self.interrupted_outputs(nr, &args, waiting.deadline);
        self.begin_record(Kind::Call);
        for (addr, bytes) in &outs {
            self.output(*addr, bytes)?;
        }
        self.append(vtid, nr as u16, result, begun.digest, 0)?;
        self.finish_call(vtid, result, &outs)?;
        self.log_signal(vtid, &info, Self::signal_flags(true, false), None)?;
        self.deliver(vtid, &info, None).map(|()| true)
    }

    /// What an interrupted sleep writes: the time that was left.
    fn interrupted_outputs(&self, nr: u64, args: &[u64; 6], deadline: Option<u64>) -> Vec<(u64, Vec<u8>)> {
        let at = match nr as i64 {
            libc::SYS_nanosleep => args[1],
            libc::SYS_clock_nanosleep if args[1] & libc::TIMER_ABSTIME as u64 == 0 => args[3],
            _ => 0,
        };
        if at == 0 {
            return Vec::new();
        }
        let left = deadline.unwrap_or(0).saturating_sub(crate::unit::now());
        let mut bytes = (left / 1_000_000_000).to_le_bytes().to_vec();
        bytes.extend_from_slice(&(left % 1_000_000_000).to_le_bytes());
        vec![(at, bytes)]
    }

    /// Delivers a kept signal to a thread that has just completed a call. True if there was one.
    pub(crate) fn deliver_after(&mut self, vtid: i32) -> Result<bool> {
        let Some(info) = self.next_signal(vtid, None)? else { return Ok(false) };
        self.log_signal(vtid, &info, Self::signal_flags(true, false), None)?;
        self.deliver(vtid, &info, None)?;
        Ok(true)
    }

    /// Delivers a kept signal to a thread that was stopped in user code.
    pub(crate) fn deliver_preempted(&mut self, vtid: i32) -> Result<()> {
        if self.deliver_after(vtid)? {
            self.ready.retain(|v| *v != vtid);
        }
        Ok(())
    }

    /// The thread will make its call again when the handler has returned.
    pub(crate) fn step_back(&mut self, vtid: i32) {
        let t = self.thread(vtid);
        t.regs.rip -= 2;
        t.regs.rax = t.regs.orig_rax;
    }

    fn log_signal(&mut self, vtid: i32, info: &SigInfo, flags: u32, mask: Option<u64>) -> Result<()> {
        self.begin_record(Kind::Signal);
        self.output(0, info)?;
        if let Some(mask) = mask {
            self.output(1, &mask.to_le_bytes())?;
        }
        let (signal, ..) = tracee::siginfo_head(info);
        self.outside.delivering = None;
        if self.disposition(signal) == Disposition::Fatal {
            self.outside.fatal = Some(signal);
        }
        self.append(vtid, signal as u16, 0, 0, flags)?;
        crate::fault::point("signal-logged", self.pid);
        Ok(())
    }

    /// Delivers a signal to a stopped thread on top of its registers, and lets it run the handler. With
    /// `mask` the handler runs inside `rt_sigsuspend(mask)`, whose return restores the thread's own.
    pub(crate) fn deliver(&mut self, vtid: i32, info: &SigInfo, mask: Option<u64>) -> Result<()> {
        let (signal, ..) = tracee::siginfo_head(info);
        let pid = self.pid;
        // SAFETY: no arguments.
        let us = unsafe { libc::getpid() };
        let t = self.thread(vtid);
        t.regs.orig_rax = u64::MAX;
        t.place = Place::Program;
        t.state = State::Running;
        t.xstate = None;
        let (tid, regs, slot) = (t.tid, t.regs, crate::launch::GATE.slot(t.slot));
        self.masks.remove(&vtid);
        self.current = Some(vtid);
        self.has_turn(vtid);
        tracee::tgkill(pid, tid, signal)?;
        match mask {
            Some(mask) => {
                tracee::write_mem(tid, slot, &mask.to_le_bytes())?;
                let args = [slot, 8, 0, 0, 0, 0];
                tracee::set_regs(tid, &crate::launch::GATE.regs(&regs, libc::SYS_rt_sigsuspend as u64, args))?;
            }
            None => tracee::set_regs(tid, &regs)?,
        }
        tracee::cont(tid, 0)?;
        loop {
            match tracee::wait_one(tid)? {
                Event::Signal(_) => {
                    let found = tracee::get_siginfo(tid)?;
                    if tracee::siginfo_head(&found) == (signal, libc::SI_TKILL, us) {
                        break;
                    }
                    self.keep_signal(vtid, found);
                    tracee::cont(tid, 0)?;
                }
                Event::Stop(_) | Event::Other(_) => tracee::cont(tid, 0)?,
                Event::Ended(_) => return Err(Halt::Died),
                Event::Seccomp => {
                    return Err(Halt::Broken(format!("signal {signal} could not be delivered to thread {vtid}")));
                }
            }
        }
        let action = &mut self.model.actions[signal as usize - 1];
        let handled = action[0] > 1;
        self.allow_shim();
        let action = &mut self.model.actions[signal as usize - 1];
        if action[1] & libc::SA_RESETHAND as u64 != 0 {
            *action = [0; 4];
        }
        tracee::set_siginfo(tid, info)?;
        tracee::set_regs(tid, &regs)?;
        if !handled {
            return Ok(tracee::cont(tid, signal)?);
        }
        // A step with a handled signal stops before the handler's first instruction.
        tracee::step(tid, signal)?;
        match tracee::wait_one(tid)? {
            Event::Signal(libc::SIGTRAP) => {}
            Event::Ended(_) => return Err(Halt::Died),
            other => return Err(Halt::Broken(format!("{other:?} instead of the handler of signal {signal}"))),
        }
        clean_frame(tid, info)?;
        Ok(tracee::cont(tid, 0)?)
    }
}

/// Makes a fresh signal frame the same in every process: the kernel leaves in it what the program's stack
/// held before (bytes 416 to 463 of the legacy area, which XSAVE may or may not write), and the trap
/// number, error code and address of the last fault, which a process inherits from the one that made it.
/// The layout is `struct rt_sigframe` of x86-64; see sigreturn(2) and the processor manual on XSAVE.
fn clean_frame(tid: i32, info: &SigInfo) -> Result<()> {
    const CONTEXT: u64 = 8 + 40;
    let frame = tracee::get_regs(tid)?.rsp;
    let (signal, code, _) = tracee::siginfo_head(info);
    let fault =
        code > 0 && matches!(signal, libc::SIGSEGV | libc::SIGBUS | libc::SIGILL | libc::SIGFPE | libc::SIGTRAP);
    if !fault {
        tracee::write_mem(tid, frame + CONTEXT + 19 * 8, &[0; 16])?;
        tracee::write_mem(tid, frame + CONTEXT + 22 * 8, &[0; 8])?;
    }
    let extended = tracee::read_u64(tid, frame + CONTEXT + 23 * 8)?;
    if extended != 0 {
        tracee::write_mem(tid, extended + 416, &[0; 48])?;
    }
    Ok(())
}

/// An instruction that traps: its length, and which one it is by the first distinguishing byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Trapped(pub(crate) u16);

fn execute_trapped(which: Trapped, eax: u32, ecx: u32) -> [u64; 4] {
    if which.0 == 0xa2 {
        let mut r = std::arch::x86_64::__cpuid_count(eax, ecx);
        match eax {
            // RDRAND.
            1 => r.ecx &= !(1 << 30),
            // RDSEED, HLE, RTM.
            7 if ecx == 0 => r.ebx &= !(1 << 18 | 1 << 4 | 1 << 11),
            _ => {}
        }
        return [u64::from(r.eax), u64::from(r.ebx), u64::from(r.ecx), u64::from(r.edx)];
    }
    // SAFETY: rdtsc is available on every x86-64; the supervisor has not disabled it for itself.
    let tsc = unsafe { std::arch::x86_64::_rdtsc() };
    [tsc & 0xffff_ffff, 0, 0, tsc >> 32]
}

/// Puts the results of a trapped instruction into registers and steps over it.
pub(crate) fn apply_trapped(regs: &mut libc::user_regs_struct, which: Trapped, v: [u64; 4]) {
    regs.rax = v[0];
    regs.rdx = v[3];
    match which.0 {
        0xa2 => {
            regs.rbx = v[1];
            regs.rcx = v[2];
            regs.rip += 2;
        }
        0xf9 => {
            regs.rcx = 0;
            regs.rip += 3;
        }
        _ => regs.rip += 2,
    }
}
