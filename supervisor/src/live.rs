//! Live execution: one thread of the unit runs at a time, its calls are made and logged.
//!
//! **Invariant.** Between two events every thread stands before a call, waits in one, or stands in user
//! code without the turn; the thread whose event was logged last ran from there to its next call
//! before anything else happened. So the order of events is the order of the program's steps, and
//! replay needs no other record of the turn than the thread of each event.

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

use ftrun_abi::fast::RECORD;
use ftrun_abi::record::{Kind, flag};
use ftrun_abi::table::{self, Class, Place as Who};

use crate::commit::LOOK_AGAIN_NS;
use crate::hands;
use crate::marshal::Prepared;
use crate::outside::Begun;
use crate::tracee::{self, Event};
use crate::unit::{Halt, PREEMPTED, Place, Result, State, Unit, Waiting, now};

/// How long a thread may keep the turn while others could run, nanoseconds.
const SLICE_NS: u64 = 2_000_000;
/// How long a thread may compute without a call while others wait, before it is preempted.
const PREEMPT_NS: u64 = 50_000_000;

/// Checkpoints that are taken for the sake of a short replay may take one part in this many of all time.
const PAUSE_SHARE: u64 = 50;

/// How often a running thread is asked to pass the turn, at most.
const TICK_NS: u64 = 2_000_000;
/// How often the names of mapped files are looked at.
const FILES_NS: u64 = 500_000_000;

/// What came of trying a call.
pub(crate) enum Outcome {
    /// Complete, with this result; outputs are in the prepared call.
    Done(i64),
    /// Complete, with this result and these outputs.
    With(i64, Vec<(u64, Vec<u8>)>),
    /// It would block.
    Block(Waiting),
    /// The handler has logged it and let the thread go on (or ended it).
    Handled,
}

/// A `struct flock` counts from the end of the file.
fn locks_from_end(lock: &[u8]) -> bool {
    lock.get(2..4) == Some(&(libc::SEEK_END as u16).to_le_bytes()[..])
}

impl Unit {
    /// Runs the unit until something ends that.
    pub fn live(&mut self) -> Result<std::convert::Infallible> {
        if let Some(desk) = self.desk {
            desk.leave_table();
            desk.has_run.store(1, SeqCst);
            desk.runs.store(1, SeqCst);
        }
        self.log.control().mode.store(RECORD, SeqCst);
        // The thread of the last event may be on its way to its next call; the others have arrived.
        let running = self.current.filter(|v| self.threads.get(v).is_some_and(|t| t.place == Place::Program));
        let arrived = self.current.take().filter(|v| Some(*v) != running && self.threads.contains_key(v));
        self.turn_since = now();
        self.last_entry = now();
        for vtid in self.threads.keys().copied().collect::<Vec<_>>() {
            if Some(vtid) != running {
                self.make_ready(vtid);
            }
        }
        match running {
            Some(vtid) => self.arm_on_the_way(vtid)?,
            None => self.arm_timers()?,
        }
        if let Some(vtid) = arrived
            && self.thread(vtid).state == State::Entry
            && self.thread(vtid).regs.orig_rax == libc::SYS_futex as u64
        {
            // As at every arrival: whether it waits must not hang on what others do, or a checkpoint come before.
            self.ready.retain(|v| *v != vtid);
            self.attempt(vtid)?;
        }
        if let Some(vtid) = hands::owed_to() {
            // What its call has done is done: it is told before anything else happens.
            if self.threads.contains_key(&vtid) {
                self.ready.retain(|v| *v != vtid);
                self.attempt(vtid)?;
            }
            hands::settle_debt(vtid);
        }
        if self.outside.signals.get(&-1).is_some_and(|q| !q.is_empty()) {
            // A child's end was announced to the process that died.
            // SAFETY: our own child.
            unsafe { libc::kill(self.pid, libc::SIGCHLD) };
        }
        self.report_children()?;
        loop {
            self.sync_turn();
            self.housekeeping()?;
            while self.current.is_none() && self.hold_turn() {
                let Some(vtid) = self.pick() else { break };
                self.give_turn(vtid)?;
            }
            if self.current.is_none() {
                self.park_all()?;
                if !self.release_turn() {
                    continue;
                }
            }
            self.keep_outside(self.sii);
            match tracee::wait(-1, 0) {
                Ok(Some((tid, event))) => self.on_event(tid, event)?,
                Ok(None) => {}
                Err(e) if e.raw_os_error() == Some(libc::ECHILD) => return Err(Halt::Died),
                Err(e) => return Err(Halt::Broken(format!("waitpid: {e}"))),
            }
        }
    }

    /// Sets timers through a thread that is in user code, which does not notice.
    fn arm_on_the_way(&mut self, vtid: i32) -> Result<()> {
        self.current = Some(vtid);
        if self.outside.timers.is_empty() && self.outside.itimers.is_empty() {
            return Ok(());
        }
        let tid = self.tid(vtid);
        tracee::interrupt(tid)?;
        loop {
            match tracee::wait_one(tid)? {
                Event::Stop(_) => break,
                Event::Seccomp => {
                    self.arrived(vtid)?;
                    self.current = None;
                    self.arm_timers()?;
                    // As at every arrival: whether a futex call waits must not hang on what others do meanwhile.
                    return self.attempt(vtid);
                }
                event => self.on_event(tid, event)?,
            }
        }
        let regs = tracee::get_regs(tid)?;
        let t = self.thread(vtid);
        t.regs = regs;
        t.place = Place::Stopped;
        self.arm_timers()?;
        self.resume(vtid)
    }

    fn pick(&mut self) -> Option<i32> {
        let time = now();
        let due: Vec<i32> = self
            .threads
            .iter()
            .filter(|(_, t)| match &t.state {
                State::Blocked(w) => t.place == Place::Stopped && w.deadline.is_some_and(|d| d <= time),
                _ => false,
            })
            .map(|(v, _)| *v)
            .collect();
        for vtid in due {
            self.make_ready(vtid);
        }
        self.ready.pop_front()
    }

    fn give_turn(&mut self, vtid: i32) -> Result<()> {
        let Some(t) = self.threads.get(&vtid) else { return Ok(()) };
        let waits = t.place == Place::Waiting;
        if self.still_waits(vtid) || (waits && self.grant(vtid)) {
            return Ok(());
        }
        let Some(t) = self.threads.get(&vtid) else { return Ok(()) };
        self.turn_since = now();
        match t.state {
            State::Running => Ok(()),
            State::User => {
                self.begin_record(Kind::Sched);
                self.append(vtid, 0, 0, 0, 0)?;
                self.resume(vtid)
            }
            State::Entry | State::Blocked(_) => {
                if self.send_back(vtid)? {
                    return Ok(());
                }
                self.unpark(vtid)?;
                self.attempt(vtid)
            }
        }
    }

    /// An event of some traced thread or child.
    pub(crate) fn on_event(&mut self, tid: i32, event: Event) -> Result<()> {
        let Some(&vtid) = self.vtids.get(&tid) else {
            return self.on_outsider(tid, event);
        };
        self.follow_shim();
        self.sync_turn();
        match event {
            Event::Seccomp if self.thread(vtid).place == Place::Waiting => {
                // Called out of its wait, without the turn.
                self.arrived(vtid)?;
                self.make_ready(vtid);
                self.share_turn();
                Ok(())
            }
            Event::Seccomp => {
                if self.thread(vtid).place == Place::Parked {
                    self.thread(vtid).place = Place::Stopped;
                    self.make_ready(vtid);
                    self.share_turn();
                    return Ok(());
                }
                let regs = self.arrived(vtid)?;
                self.count_slow(regs.rip, regs.orig_rax);
                self.shared.slow.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                self.last_entry = now();
                crate::fault::point("call-entry", self.pid);
                self.sweep()?;
                if self.checkpoint_due() && regs.orig_rax != libc::SYS_futex as u64 {
                    self.current = None;
                    self.ready.push_front(vtid);
                    return self.checkpoint();
                }
                if (self.slice_over() || self.turn_is_over()) && regs.orig_rax != libc::SYS_futex as u64 {
                    self.current = None;
                    self.make_ready(vtid);
                    return Ok(());
                }
                self.attempt(vtid)
            }
            Event::Signal(signal) => self.on_signal(vtid, signal),
            Event::Stop(signal) if signal != libc::SIGTRAP && signal != 0 => {
                self.pulse.stopped = true;
                Ok(tracee::listen(tid)?)
            }
            Event::Stop(_) => {
                self.pulse.stopped = false;
                self.go_on(tid)
            }
            Event::Other(_) => Ok(tracee::cont(tid, 0)?),
            Event::Ended(status) => {
                if tid != self.pid {
                    return Err(Halt::Died);
                }
                Err(if self.ending { Halt::Ended(status) } else { Halt::Died })
            }
        }
    }

    /// A thread of the unit stopped before a call.
    pub(crate) fn arrived(&mut self, vtid: i32) -> Result<libc::user_regs_struct> {
        let regs = self.stopped_regs(vtid)?;
        let with_turn = self.stopped_with_turn(vtid);
        let t = self.thread(vtid);
        t.place = Place::Stopped;
        t.regs = regs;
        t.state = State::Entry;
        self.take_wait(vtid);
        if with_turn {
            self.take_part(vtid);
        }
        Ok(regs)
    }

    fn slice_over(&self) -> bool {
        !self.ready.is_empty() && now() - self.turn_since > SLICE_NS
    }

    /// Collects what other threads reported meanwhile, when the slice of the running one is over.
    fn sweep(&mut self) -> Result<()> {
        let time = now();
        if time - self.turn_since <= SLICE_NS || self.threads.len() == 1 {
            return Ok(());
        }
        let parked: Vec<i32> = self.threads.values().filter(|t| t.place == Place::Parked).map(|t| t.tid).collect();
        for tid in parked {
            if let Ok(Some((tid, event))) = tracee::wait(tid, libc::WNOHANG) {
                self.on_event(tid, event)?;
            }
        }
        Ok(())
    }

    /// Tries the call that a stopped thread stands before.
    pub(crate) fn attempt(&mut self, vtid: i32) -> Result<()> {
        self.current = Some(vtid);
        hands::serve(vtid, self.sii);
        if hands::owed_to() != Some(vtid) && self.interrupted(vtid)? {
            return Ok(());
        }
        let regs = self.thread(vtid).regs;
        let (nr, args) = tracee::call_of(&regs);
        let tid = self.tid(vtid);
        let row = table::lookup(nr, &args);
        let mut call = Prepared::new(tid, nr, &row, &args, &|path| self.path_of(vtid, path))?;
        let judged = if self.in_doubt.is_some() { self.judge(vtid, nr, &row, &args, &mut call) } else { None };
        let tried = match judged {
            Some(outcome) => Ok(outcome),
            None => self.try_call(vtid, nr, &args, &mut call, &row),
        };
        let outcome = match tried {
            Err(Halt::BadAddress) => Outcome::With(-i64::from(libc::EFAULT), vec![]),
            other => other?,
        };
        match outcome {
            Outcome::Done(r) => {
                let outs = if row.place == Who::Supervisor { call.written(r) } else { Vec::new() };
                if row.effect == table::Effect::Lock && r >= 0 && locks_from_end(call.payload()) {
                    // The model of the descriptors would not know which bytes these are.
                    self.unloggable = self.standby.as_ref().map(|_| "a lock from the end of a file".to_owned());
                }
                self.complete(vtid, nr, r, call.digest, outs)
            }
            Outcome::With(r, outs) => self.complete(vtid, nr, r, call.digest, outs),
            Outcome::Block(w) => self.block(vtid, w),
            Outcome::Handled => Ok(()),
        }
    }

    fn try_call(
        &mut self,
        vtid: i32,
        nr: u64,
        args: &[u64; 6],
        call: &mut Prepared,
        row: &table::Row,
    ) -> Result<Outcome> {
        let args = *args;
        if !self.may_leave(vtid, row, &args, call)? {
            return Ok(Outcome::Block(Waiting { deadline: Some(now() + LOOK_AGAIN_NS), ..Waiting::default() }));
        }
        self.before_fd_call(row, &args, call.passes_control());
        Ok(match row.class {
            Class::Deny => Outcome::Done(-i64::from(row.deny_errno)),
            _ if row.irregular => self.irregular(vtid, nr, &args, call, row)?,
            Class::Unknown => {
                let r = self.gate(vtid, nr as libc::c_long, self.real_ids(row, &args))?;
                self.unloggable = Some(row.name.to_owned());
                Outcome::Done(r)
            }
            _ if row.place == Who::Unit => {
                self.before_arch_prctl(vtid, nr, &args)?;
                let r = self.gate(vtid, nr as libc::c_long, self.real_ids(row, &args))?;
                self.unit_outputs(vtid, nr, &args, call, row, r)?
            }
            _ => self.regular(vtid, nr, &args, call, row)?,
        })
    }

    /// Logs a completed call, gives the thread its result and lets it run to its next call.
    pub(crate) fn complete(
        &mut self,
        vtid: i32,
        nr: u64,
        result: i64,
        digest: u64,
        outs: Vec<(u64, Vec<u8>)>,
    ) -> Result<()> {
        self.begin_record(Kind::Call);
        for (addr, bytes) in &outs {
            self.output(*addr, bytes)?;
        }
        self.outside.begun.remove(&vtid);
        let (_, args) = tracee::call_of(&self.thread(vtid).regs);
        self.after_fd_call(nr, &args, result);
        self.note_made(nr, &args, result, &outs);
        let took = if std::mem::take(&mut self.took_signal) { flag::TOOK_SIGNAL } else { 0 };
        let flags = took | if self.unloggable.is_some() { flag::UNLOGGABLE } else { 0 };
        self.append(vtid, nr as u16, result, digest, flags)?;
        if let Some((_, needed)) = self.expected.take_if(|(expected, _)| *expected == result && flags == 0) {
            // Without this event the call would be made again and come out the same.
            self.log.control().needed.store(needed, SeqCst);
        }
        crate::fault::point("call-logged", self.pid);
        self.finish_call(vtid, result, &outs)?;
        crate::fault::point("call-written", self.pid);
        if let Some(cause) = self.unloggable.take() {
            crate::fault::point("unloggable-made", self.pid);
            self.note_unloggable(&cause);
            self.model.irregular = Some(cause);
            // The state after the call stands in the checkpoint: the call itself is never replayed.
            let t = self.thread(vtid);
            t.regs.orig_rax = u64::MAX;
            t.state = State::User;
            self.current = None;
            self.make_ready(vtid);
            return self.checkpoint();
        }
        if self.deliver_after(vtid)? {
            return Ok(());
        }
        self.resume(vtid)
    }

    /// Puts outputs and result in place.
    pub(crate) fn finish_call(&mut self, vtid: i32, result: i64, outs: &[(u64, Vec<u8>)]) -> Result<()> {
        let t = self.thread(vtid);
        let (result, length) = tracee::result_of(&t.regs, result);
        t.regs.rax = result as u64;
        let (tid, own_mask) = (t.tid, t.own_mask.take());
        if let Some(mask) = own_mask {
            tracee::set_sigmask(tid, mask)?;
        }
        let length = length.iter().map(|(addr, bytes)| (addr, &bytes[..]));
        for (addr, bytes) in outs.iter().map(|(addr, bytes)| (addr, &bytes[..])).chain(length) {
            // A bad address is left at that: the kernel would have failed with EFAULT after the effect, too.
            if let Err(e @ tracee::TraceError::Gone(_)) = tracee::write_mem(tid, *addr, bytes) {
                return Err(e.into());
            }
        }
        Ok(())
    }

    /// The call would block: the thread waits, the turn is free.
    pub(crate) fn block(&mut self, vtid: i32, w: Waiting) -> Result<()> {
        let t = self.thread(vtid);
        let tid = t.tid;
        if let Some(mask) = w.mask
            && t.own_mask.is_none()
        {
            t.own_mask = Some(tracee::get_sigmask(tid)?);
            tracee::set_sigmask(tid, mask)?;
        }
        let lazy = w.futex || w.child;
        self.thread(vtid).state = State::Blocked(w);
        self.current = None;
        self.offer_signals();
        if self.can_wait_inside(vtid) {
            self.make_ready(vtid);
            return Ok(());
        }
        if lazy { Ok(()) } else { self.park(vtid) }
    }

    /// Lets a blocked thread wait in the kernel, behind the gate.
    pub(crate) fn park(&mut self, vtid: i32) -> Result<()> {
        let t = self.thread(vtid);
        let State::Blocked(w) = &t.state else { return Ok(()) };
        let w = w.clone();
        let (tid, slot, regs) = (t.tid, crate::launch::GATE.slot(t.slot), t.regs);
        if t.xstate.is_none() {
            t.xstate = Some(tracee::get_xstate(tid)?);
        }
        let mut timeout = 0;
        let mut bytes = Vec::with_capacity(16 + w.fds.len() * 8);
        let left = w.deadline.map(|d| d.saturating_sub(now()));
        if let Some(left) = left {
            timeout = slot;
            bytes.extend_from_slice(&(left / 1_000_000_000).to_le_bytes());
            bytes.extend_from_slice(&(left % 1_000_000_000).to_le_bytes());
        } else {
            bytes.extend_from_slice(&[0; 16]);
        }
        let room = (tracee::Gate::SLOT_BYTES as usize - 16) / 8;
        for (fd, events) in w.fds.iter().take(room) {
            bytes.extend_from_slice(&fd.to_le_bytes());
            bytes.extend_from_slice(&events.to_le_bytes());
            bytes.extend_from_slice(&[0; 2]);
        }
        tracee::write_mem(tid, slot, &bytes)?;
        let n = w.fds.len().min(room) as u64;
        let args = [slot + 16, n, timeout, 0, 8, 0];
        tracee::set_regs(tid, &crate::launch::GATE.regs(&regs, libc::SYS_ppoll as u64, args))?;
        tracee::cont(tid, 0)?;
        self.thread(vtid).place = Place::Parked;
        Ok(())
    }

    /// Nothing can run: every blocked thread waits in the kernel, so that signals can wake it.
    pub(crate) fn park_all(&mut self) -> Result<()> {
        let stopped: Vec<i32> = self
            .threads
            .iter()
            .filter(|(_, t)| t.place == Place::Stopped && matches!(t.state, State::Blocked(_)))
            .map(|(v, _)| *v)
            .collect();
        for vtid in stopped {
            self.park(vtid)?;
        }
        Ok(())
    }

    /// Checkpoints that are due, requests, preemption.
    fn housekeeping(&mut self) -> Result<()> {
        use std::sync::atomic::Ordering::Relaxed;
        // A unit that waits for input, with its outputs in the queue, would not find out by itself.
        if let Some(why) = self.recorder.as_ref().and_then(|r| r.lost()) {
            return Err(Halt::Broken(why));
        }
        if self.shared.stop.swap(false, Relaxed) {
            self.ending = true;
            crate::pulse::ending();
            // SAFETY: our own child.
            unsafe { libc::kill(self.pid, libc::SIGTERM) };
            if self.model.actions.get(libc::SIGTERM as usize - 1).is_none_or(|a| a[0] == 0) {
                return Ok(());
            }
        }
        let time = now();
        let before = self.sii;
        self.follow_shim();
        if self.sii != before {
            // It makes calls that we do not see.
            self.last_entry = time;
        }
        self.feel_pulse(time);
        self.look_at_files(time);
        let due = self.checkpoint_due();
        let others = !self.ready.is_empty() || self.threads.values().any(|t| t.place == Place::Parked);
        let starving = self.current.is_some_and(|c| !self.ready.is_empty() || self.has_signals(c) || others);
        if let Some(vtid) = self.current {
            if due || (self.slice_over() && time - self.last_tick > TICK_NS) {
                self.last_tick = time;
                self.call_back();
            }
            let waited = if due { 20_000_000 } else { PREEMPT_NS };
            if (due || starving) && time - self.turn_since.max(self.last_entry) > waited {
                return self.preempt(vtid);
            }
            return Ok(());
        }
        if due && self.hold_turn() { self.checkpoint() } else { Ok(()) }
    }

    /// Stops a thread in the middle of its computation. Replay could not find that point again, so a
    /// checkpoint is taken there (DESIGN rule 4) and execution goes on from it.
    fn preempt(&mut self, vtid: i32) -> Result<()> {
        let tid = self.tid(vtid);
        self.call_back();
        tracee::interrupt(tid)?;
        loop {
            let Some(event) = tracee::wait_tick(tid)? else {
                tracee::interrupt(tid)?;
                continue;
            };
            match event {
                Event::Stop(_) => {
                    if !self.is_in_shim(tracee::get_regs(tid)?.rip) {
                        break;
                    }
                    // It comes out by itself: served, or at the filter. Until the next tick, that is: interrupted
                    // at once it might never execute an instruction, being on our own processor.
                    self.go_on(tid)?;
                }
                // It came to a call by itself. The stop follows when it is continued.
                Event::Seccomp => return self.on_event(tid, event),
                event => {
                    self.on_event(tid, event)?;
                    if self.current != Some(vtid) {
                        return Ok(());
                    }
                }
            }
        }
        let regs = tracee::get_regs(tid)?;
        self.stopped_with_turn(vtid);
        let t = self.thread(vtid);
        t.regs = regs;
        t.place = Place::Stopped;
        t.state = State::User;
        self.current = None;
        self.make_ready(vtid);
        self.model.irregular = Some(PREEMPTED.to_owned());
        self.checkpoint()?;
        self.deliver_preempted(vtid)
    }

    /// A checkpoint was asked for, is due by time or log, or a recovery would take too long: replay takes its
    /// time for each event. That last reason must not spend more than a share of the time on checkpoints.
    fn checkpoint_due(&mut self) -> bool {
        let age = now().saturating_sub(self.checkpoint_at);
        let events = self.sii - self.snapshot.as_ref().map_or(0, |s| s.sii);
        (self.shared.checkpoint.load(std::sync::atomic::Ordering::Relaxed) && self.can_store())
            || (age >= self.checkpoint_every && events > 0)
            || self.lost_a_file.load(SeqCst)
            || self.log.bytes() >= self.checkpoint_log
            || (events * self.replay_ns > self.replay_max && age > self.pause_ns * PAUSE_SHARE)
    }

    /// Files that memory is mapped from are put in the place of others while the unit does nothing, too: then their content
    /// is to be in a checkpoint before the process dies.
    fn look_at_files(&mut self, time: u64) {
        if time.saturating_sub(self.files_looked_at) < FILES_NS || self.lost_a_file.load(SeqCst) {
            return;
        }
        self.files_looked_at = time;
        let (pid, taken, lost) = (self.pid, self.mapped.taken(), Arc::clone(&self.lost_a_file));
        self.service.post(move || {
            let maps = ftrun_ckpt::maps::read_maps(pid).map(crate::capture::program_maps);
            lost.store(maps.is_ok_and(|maps| taken.lacks_one(&maps)), SeqCst);
        });
    }

    /// Adds an output to the record under construction.
    pub(crate) fn output(&mut self, addr: u64, bytes: &[u8]) -> Result<()> {
        self.record.push_output(addr, bytes).map_err(|e| Halt::Broken(format!("an event is too large: {e:?}")))
    }

    /// The memory of a call begun by this thread, fresh if it is another call.
    pub(crate) fn begun(&mut self, vtid: i32, digest: u64) -> &mut Begun {
        let b = self.outside.begun.entry(vtid).or_default();
        if b.digest != digest {
            *b = Begun { digest, ..Begun::default() };
        }
        b
    }
}
