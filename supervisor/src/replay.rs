//! Replay: the log is fed to a restored unit until it is where the process died.
//!
//! Each event is applied to its thread, which then runs to its next call before the next event is looked
//! at: the invariant of [`crate::live`]. No input and no output call is made. A call that differs from its
//! event in number, arguments or input memory is a [`Divergence`], and ends the recovery.

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

use ftrun_abi::fast::REPLAY;
use ftrun_abi::record::{Header, Kind, Record, flag};
use ftrun_abi::table::{self, Class, Place as Who};

use ftrun_ckpt::files::Named;

use crate::capture::read;
use crate::divergence::{Divergence, describe, describe_call};
use crate::launch::LaunchError;
use crate::live::Outcome;
use crate::mapper::{Aside, Mapper};
use crate::marshal::Prepared;
use crate::signals::{ANY_THREAD, Trapped, apply_trapped};
use crate::tracee::{self, Event, SigInfo};
use crate::unit::{Halt, Place, Result, State, Unit, Waiting};

impl Unit {
    /// Applies every record of the log above the unit's SII. Returns how many.
    pub fn replay(&mut self) -> Result<u64> {
        self.replaying = true;
        self.futex_results.clear();
        crate::fault::point("replay-begin", self.pid);
        self.log.drop_unloggable();
        let result = self.replay_records();
        self.replaying = false;
        let n = result?;
        for (vtid, queue) in std::mem::take(&mut self.regenerated) {
            self.outside.signals.entry(vtid).or_default().extend(queue);
        }
        crate::fault::point("replay-end", self.pid);
        Ok(n)
    }

    fn replay_records(&mut self) -> Result<u64> {
        let mut n = 0;
        // Where the shim goes on, too: it takes the events that it can, and leaves the others to us.
        let from = self.log.begin();
        let control = self.log.control();
        control.replay_at.store(from, SeqCst);
        control.sii.store(self.sii, SeqCst);
        if self.cold.is_none() {
            control.mode.store(REPLAY, SeqCst);
        }
        while let Some((bytes, next)) = self.log.read_at(self.log.control().replay_at.load(SeqCst)) {
            let bytes = bytes.to_vec();
            let (record, _) =
                Record::parse(&bytes).map_err(|e| Halt::Broken(format!("an event in memory is damaged: {e}")))?;
            let sii = record.header.sii;
            self.log.control().replay_at.store(next, SeqCst);
            if sii <= self.sii {
                continue;
            }
            let next = self.next_header();
            let vtid = record.header.tid as i32;
            if !self.threads.contains_key(&vtid) {
                return Err(self.diverged(&record, sii, format!("the unit has no thread {vtid}")));
            }
            self.sii = sii;
            self.log.control().sii.store(sii, SeqCst);
            if self.off_line {
                self.shared.events.store(sii, SeqCst);
            }
            crate::fault::point("replay-event", self.pid);
            crate::pulse::beat();
            self.current = Some(vtid);
            let runs = self.apply(&record, sii)?;
            n += 1;
            let signal_follows = next.is_some_and(|h| {
                h.kind == Kind::Signal as u16 && h.flags & flag::AFTER_CALL != 0 && h.tid as i32 == vtid
            });
            match runs {
                Applied::Stopped if signal_follows => {}
                Applied::Stopped => {
                    // A kept record of this kind means that the process died before the thread went on.
                    self.resume(vtid)?;
                    self.run_to_call(vtid, next.as_ref())?;
                }
                Applied::Running => self.run_to_call(vtid, next.as_ref())?,
                Applied::Gone => {}
            }
            // What the shim has taken meanwhile.
            let taken = self.log.control().sii.load(SeqCst);
            n += taken - self.sii;
            self.sii = taken;
        }
        Ok(n)
    }

    /// The event that replay comes to next.
    fn next_header(&self) -> Option<Header> {
        let (bytes, _) = self.log.read_at(self.log.control().replay_at.load(SeqCst))?;
        Some(Record::parse(bytes).ok()?.0.header)
    }

    fn diverged(&self, record: &Record<'_>, sii: u64, found: String) -> Halt {
        Halt::Diverged(Box::new(Divergence {
            sii,
            tid: record.header.tid as i32,
            expected: describe(&record.header),
            found,
        }))
    }

    fn apply(&mut self, record: &Record<'_>, sii: u64) -> Result<Applied> {
        let h = record.header;
        let vtid = h.tid as i32;
        let at_call = matches!(self.thread(vtid).state, State::Entry | State::Blocked(_));
        match record.kind {
            // It was to make an output next (`Unit::may_leave`).
            Kind::Sched if at_call => Ok(Applied::Gone),
            Kind::Sched => {
                if self.thread(vtid).state != State::User {
                    return Err(self.diverged(record, sii, "the thread is in a call".into()));
                }
                self.resume(vtid)?;
                Ok(Applied::Running)
            }
            Kind::Call | Kind::Exit if !at_call => {
                Err(self.diverged(record, sii, "the thread is not in a call".into()))
            }
            Kind::Call => self.apply_call(record, sii),
            Kind::Exit => {
                self.ending = true;
                let code = h.result as u64;
                self.end_process(vtid, code).map(|_| Applied::Gone)
            }
            Kind::Signal => self.apply_signal(record, at_call),
            Kind::Insn => {
                let tid = self.tid(vtid);
                let mut regs = tracee::get_regs(tid)?;
                let out = record.outputs().next().map(|o| o.1.to_vec()).unwrap_or_default();
                if regs.rip != h.digest || out.len() != 32 {
                    return Err(self.diverged(record, sii, format!("the thread is at {:#x}", regs.rip)));
                }
                let word = |i: usize| u64::from_le_bytes(out[i * 8..i * 8 + 8].try_into().unwrap_or([0; 8]));
                apply_trapped(&mut regs, Trapped(h.nr), [word(0), word(1), word(2), word(3)]);
                tracee::set_regs(tid, &regs)?;
                tracee::cont(tid, 0)?;
                Ok(Applied::Running)
            }
            Kind::Exec => Err(Halt::Broken("an image change inside the log".into())),
        }
    }

    fn apply_signal(&mut self, record: &Record<'_>, at_call: bool) -> Result<Applied> {
        let h = record.header;
        let vtid = h.tid as i32;
        let mut outs = record.outputs();
        let mut info: SigInfo = [0; 128];
        if let Some((_, bytes)) = outs.next() {
            info.copy_from_slice(bytes.get(..128).ok_or_else(|| Halt::Broken("a short siginfo".into()))?);
        }
        let signal = i32::from(h.nr);
        for to in [vtid, ANY_THREAD] {
            if let Some(queue) = self.regenerated.get_mut(&to)
                && let Some(i) = queue.iter().position(|q| tracee::siginfo_head(q).0 == signal)
            {
                queue.remove(i);
                break;
            }
        }
        let mut mask = None;
        if h.flags & flag::SUSPENDED != 0 {
            mask = outs.next().and_then(|(_, b)| Some(u64::from_le_bytes(b.get(..8)?.try_into().ok()?)));
            self.thread(vtid).regs.rax = -i64::from(libc::EINTR) as u64;
            self.model.futexes.retain(|w| w.vtid != vtid);
        } else if h.flags & flag::AFTER_CALL == 0 && at_call {
            self.model.futexes.retain(|w| w.vtid != vtid);
            self.step_back(vtid);
        }
        self.deliver(vtid, &info, mask)?;
        Ok(Applied::Running)
    }

    fn apply_call(&mut self, record: &Record<'_>, sii: u64) -> Result<Applied> {
        let h = record.header;
        let vtid = h.tid as i32;
        let regs = self.thread(vtid).regs;
        let (nr, args) = tracee::call_of(&regs);
        let tid = self.tid(vtid);
        let row = table::lookup(nr, &args);
        let mut call = Prepared::new(tid, nr, &row, &args, &|p| p)?;
        if nr != u64::from(h.nr) || (h.digest != 0 && h.digest != call.digest) {
            return Err(self.diverged(record, sii, describe_call(nr, &args, call.digest)));
        }
        let mut result = h.result;
        let failed = (-4095..0).contains(&result);
        match nr as i64 {
            libc::SYS_futex => self.apply_futex(record, sii)?,
            libc::SYS_exit => {
                self.end_thread(vtid)?;
                return Ok(Applied::Gone);
            }
            libc::SYS_clone | libc::SYS_clone3 if !failed => {
                if let Some(request) = self.clone_request(vtid, nr, &args)?
                    && request.flags & libc::CLONE_THREAD as u64 != 0
                    && let Err(e) = self.new_thread(vtid, &request, Some(result as i32))?
                {
                    return Err(Halt::Broken(format!("making thread {result} again: {e}")));
                }
            }
            libc::SYS_kill
            | libc::SYS_tkill
            | libc::SYS_tgkill
            | libc::SYS_rt_sigqueueinfo
            | libc::SYS_rt_tgsigqueueinfo
                if !failed && self.is_self_signal(nr, &args) =>
            {
                let real = self.signal_args(nr, &args);
                self.gate(vtid, nr as libc::c_long, real)?;
            }
            libc::SYS_sched_setaffinity if !failed && self.is_own(args[0] as i32) => {
                self.affinity(vtid, nr, &args, &mut call);
            }
            libc::SYS_set_tid_address => {
                self.gate(vtid, nr as libc::c_long, args)?;
                self.local_effect(vtid, nr, &args, result)?;
            }
            _ if row.class == Class::Local && row.place == Who::Unit && !failed => {
                self.before_arch_prctl(vtid, nr, &args)?;
                let r = self.execute_again(vtid, nr, self.real_ids(&row, &args), record)?;
                self.local_effect(vtid, nr, &args, r)?;
                if r != result {
                    let found = format!("{} = {r:#x}, logged {result:#x}", describe_call(nr, &args, call.digest));
                    return Err(self.diverged(record, sii, found));
                }
                result = r;
            }
            _ => {}
        }
        if nr == libc::SYS_rt_sigtimedwait as u64 && result > 0 {
            self.take_pending(vtid, result as u32)?;
        } else if h.flags & flag::TOOK_SIGNAL != 0 {
            for info in record.outputs().flat_map(|o| o.1.chunks_exact(128)) {
                self.take_pending(vtid, u32::from_le_bytes([info[0], info[1], info[2], info[3]]))?;
            }
        }
        self.follow_cold(&row, &args, &call, record);
        let outs: Vec<(u64, Vec<u8>)> =
            record.outputs().filter(|(addr, _)| *addr != 0).map(|(addr, b)| (addr, b.to_vec())).collect();
        self.finish_call(vtid, result, &outs)?;
        Ok(Applied::Stopped)
    }

    /// Takes a signal that is pending because replay has sent it again; one from outside is not there.
    fn take_pending(&mut self, vtid: i32, signal: u32) -> Result<()> {
        let t = self.thread(vtid);
        let (tid, at) = (t.tid, crate::launch::GATE.slot(t.slot));
        let mut bytes = (1u64 << signal.clamp(1, 64).wrapping_sub(1)).to_le_bytes().to_vec();
        bytes.extend_from_slice(&[0; 16]);
        tracee::write_mem(tid, at, &bytes)?;
        self.gate(vtid, libc::SYS_rt_sigtimedwait, [at, 0, at + 8, 8, 0, 0])?;
        Ok(())
    }

    /// Makes a call about the process itself again, so that it comes out where it did.
    fn execute_again(&mut self, vtid: i32, nr: u64, mut args: [u64; 6], record: &Record<'_>) -> Result<i64> {
        let result = record.header.result as u64;
        match nr as i64 {
            libc::SYS_mmap => {
                args[0] = result;
                args[3] = args[3] & !(libc::MAP_FIXED_NOREPLACE as u64) | libc::MAP_FIXED as u64;
                if args[3] & libc::MAP_ANONYMOUS as u64 == 0 {
                    let file =
                        record.outputs().find(|o| o.0 == 0).and_then(|o| postcard::from_bytes::<Named>(o.1).ok());
                    let Some(file) = file else {
                        return Err(Halt::Broken("the log does not tell what was mapped".into()));
                    };
                    if self.off_line {
                        args[3] = args[3] & !(libc::MAP_TYPE as u64) | libc::MAP_PRIVATE as u64;
                    }
                    let shared = args[3] & libc::MAP_SHARED as u64 != 0;
                    let write = shared && args[2] & libc::PROT_WRITE as u64 != 0;
                    let (snapshot, pages) = (self.snapshot.clone(), Arc::clone(&self.pages));
                    let known = snapshot.as_ref().map_or(&[][..], |snapshot| &snapshot.files);
                    let open = || file.open(write, known, &read(&pages)).map(Some);
                    let aside = Aside::open(open).map_err(LaunchError::from)?;
                    let locked = self.log.control().locked.load(SeqCst) != 0;
                    let t = self.thread(vtid);
                    t.place = Place::Stopped;
                    let mut mapper = Mapper::begin(t.tid, &t.regs, locked)?;
                    if let Some(aside) = aside {
                        args[4] = mapper.open_aside(aside, file.path(), (0, 0), write)? as u64;
                    }
                    let r = mapper.call(nr as libc::c_long, args)?;
                    for info in mapper.end()? {
                        self.keep_signal(vtid, info);
                    }
                    return Ok(r);
                }
            }
            libc::SYS_mremap if result != args[0] => {
                args[3] |= (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED) as u64;
                args[4] = result;
            }
            _ => {}
        }
        self.gate(vtid, nr as libc::c_long, args)
    }

    fn apply_futex(&mut self, record: &Record<'_>, sii: u64) -> Result<()> {
        let vtid = record.header.tid as i32;
        let result = record.header.result;
        if let Some(done) = self.futex_results.remove(&vtid) {
            if done != result {
                return Err(self.diverged(record, sii, format!("the futex call gives {done}")));
            }
            return Ok(());
        }
        if let Some(i) = self.model.woken.iter().position(|v| *v == vtid) {
            self.model.woken.remove(i);
            if result != 0 {
                return Err(self.diverged(record, sii, "the thread has been woken".into()));
            }
            return Ok(());
        }
        if matches!(&self.thread(vtid).state, State::Blocked(w) if w.futex) {
            if result == 0 {
                return Err(self.diverged(record, sii, "nobody has woken the thread".into()));
            }
            self.model.futexes.retain(|w| w.vtid != vtid);
            return Ok(());
        }
        // A thread that a checkpoint found before its call, and whose call is the first event after it.
        let args = tracee::args_of(&self.thread(vtid).regs);
        match self.futex_step(vtid, &args)? {
            Outcome::With(r, _) if r != result => Err(self.diverged(record, sii, format!("the futex call gives {r}"))),
            _ => {
                self.model.futexes.retain(|w| w.vtid != vtid);
                Ok(())
            }
        }
    }

    /// Lets a running thread come to its next call (or trapped instruction).
    fn run_to_call(&mut self, vtid: i32, next: Option<&Header>) -> Result<()> {
        let tid = self.tid(vtid);
        if next.is_none() && !self.arrive_last {
            // From here on it is live, and may compute for long.
            return Ok(());
        }
        loop {
            let event = match tracee::wait_tick(tid)? {
                Some(event) => event,
                // The shim has taken the last event: from there on it is live.
                None if !self.arrive_last && self.next_header().is_none() => return Ok(()),
                None => continue,
            };
            match event {
                Event::Seccomp => break,
                Event::Signal(libc::SIGSEGV) if self.is_in_shim(tracee::get_regs(tid)?.rip) => {
                    self.fault_in_shim(vtid)?;
                }
                Event::Signal(libc::SIGSEGV | libc::SIGILL) if self.at_trapped(vtid)? => {
                    self.thread(vtid).place = Place::Stopped;
                    return Ok(());
                }
                Event::Signal(signal) => self.on_signal(vtid, signal)?,
                Event::Ended(_) => return Err(Halt::Died),
                _ => tracee::cont(tid, 0)?,
            }
        }
        let regs = self.arrived(vtid)?;
        let next = self.next_header();
        let next = next.as_ref();
        // A futex call was tried as soon as the thread came to it, and may have changed the list.
        let signal_first = next.is_some_and(|n| n.kind == Kind::Signal as u16 && n.tid as i32 == vtid && n.flags == 0);
        // The last thread's has not been tried when its process died, or the log would say so: it is made live.
        let untried = next.is_none() && !self.arrive_last;
        if regs.orig_rax == libc::SYS_futex as u64 && !signal_first && !untried {
            let args = tracee::args_of(&regs);
            match self.futex_step(vtid, &args)? {
                Outcome::Block(_) => {
                    self.thread(vtid).state = State::Blocked(Waiting { futex: true, ..Waiting::default() });
                }
                Outcome::With(r, _) | Outcome::Done(r) => {
                    self.futex_results.insert(vtid, r);
                }
                Outcome::Handled => {}
            }
        }
        Ok(())
    }

    /// The thread stands before the delivery of a fault that one of the trapped instructions caused.
    fn at_trapped(&mut self, vtid: i32) -> Result<bool> {
        let tid = self.tid(vtid);
        let (_, code, _) = tracee::siginfo_head(&tracee::get_siginfo(tid)?);
        Ok(code > 0 && self.trapped_at(tid, tracee::get_regs(tid)?.rip)?.is_some())
    }
}

/// Where a thread stands after an event has been applied to it.
enum Applied {
    /// Behind its call, to be let go.
    Stopped,
    /// Already in user code.
    Running,
    /// It has ended.
    Gone,
}
