//! The turn, as the shim and the supervisor pass it on.
//!
//! One thread at a time has the turn (`Control::turn`). A thread that waits inside the process gives it away
//! there, to a thread that wants it or to nobody, and takes it again when there is something for it: no stop.
//! A thread that stops gives it to the supervisor ([`HELD`]), which gives it to the next. So what the supervisor
//! knows of who runs may be out of date; [`Unit::sync_turn`] brings it up to date (ARCHITECTURE.md, "Turns").

use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::SeqCst;

use ftrun_abi::fast::{CALLS_PER_TURN, GRANTED, HELD, NOBODY, Slot, WAITS, WANTS};

use crate::tracee::{self, Event};
use crate::unit::{Halt, Place, Result, State, Unit, Waiting, now};

/// `SIG_IGN`.
const IGNORED: u64 = 1;

impl Unit {
    /// Where a thread waits in the process; the last threads of very many have no such place.
    fn slot(&self, vtid: i32) -> Option<&Slot> {
        self.log.control().slots.get(self.threads.get(&vtid)?.slot)
    }

    fn slot_is(&self, vtid: i32, state: u32) -> bool {
        self.slot(vtid).is_some_and(|slot| slot.state.load(SeqCst) == state)
    }

    /// The thread waits in the process.
    pub(crate) fn waits_inside(&self, vtid: i32) -> bool {
        self.slot_is(vtid, WAITS)
    }

    /// Follows what threads did with the turn without the supervisor.
    pub(crate) fn sync_turn(&mut self) {
        if !self.shim || self.replaying {
            return;
        }
        let turn = self.log.control().turn.load(SeqCst);
        let owner = (turn != HELD && turn != NOBODY).then_some(turn as i32);
        if turn != HELD && owner != self.current {
            if let Some(t) = self.current.take().and_then(|v| self.threads.get_mut(&v)) {
                t.place = Place::Waiting;
                t.state = State::Blocked(Waiting::default());
            }
            if let Some(vtid) = owner
                && let Some(t) = self.threads.get_mut(&vtid)
            {
                t.place = Place::Program;
                t.state = State::Running;
                self.current = owner;
                self.turn_since = now();
            }
        }
        if self.log.control().wanting.load(SeqCst) > 0 {
            for vtid in self.threads.keys().copied().collect::<Vec<_>>() {
                if self.threads[&vtid].place == Place::Waiting && self.slot_is(vtid, WANTS) {
                    self.make_ready(vtid);
                }
            }
        }
    }

    /// The supervisor has the turn, or takes it if nobody has it.
    pub(crate) fn hold_turn(&mut self) -> bool {
        if !self.shim {
            return true;
        }
        let turn = &self.log.control().turn;
        let held = match turn.load(SeqCst) {
            HELD => true,
            NOBODY => turn.compare_exchange(NOBODY, HELD, SeqCst, SeqCst).is_ok(),
            _ => false,
        };
        if held {
            // What was logged before it was taken.
            self.follow_shim();
        } else {
            self.sync_turn();
        }
        held
    }

    /// Nothing is to be done: whoever finds something in the process may take the turn. False when somebody wants
    /// it already.
    pub(crate) fn release_turn(&mut self) -> bool {
        if !self.shim {
            return true;
        }
        // Whoever takes it goes by what holds now.
        self.allow_shim();
        let control = self.log.control();
        control.turn.store(NOBODY, SeqCst);
        if control.wanting.load(SeqCst) == 0 {
            return true;
        }
        self.sync_turn();
        self.ready.is_empty()
    }

    /// A thread that had the turn has stopped: the supervisor has it now. False if the thread did not have it.
    pub(crate) fn stopped_with_turn(&mut self, vtid: i32) -> bool {
        if !self.shim {
            return true;
        }
        let turn = &self.log.control().turn;
        let held = turn.compare_exchange(vtid as u32, HELD, SeqCst, SeqCst).is_ok() || turn.load(SeqCst) == HELD;
        if held && !self.replaying {
            self.follow_shim();
        }
        held
    }

    /// The thread is about to run: it has the turn.
    pub(crate) fn has_turn(&self, vtid: i32) {
        self.log.control().turn.store(vtid as u32, SeqCst);
    }

    /// Gives the turn to a thread that waits in the process. False if it has to be asked out for that.
    pub(crate) fn grant(&mut self, vtid: i32) -> bool {
        let chosen = |slot: &Slot| slot.state.compare_exchange(WANTS, GRANTED, SeqCst, SeqCst).is_ok();
        if self.has_signals(vtid) || !self.slot(vtid).is_some_and(chosen) {
            return false;
        }
        let t = self.thread(vtid);
        t.place = Place::Program;
        t.state = State::Running;
        self.current = Some(vtid);
        self.allow_shim();
        if let Some(slot) = self.slot(vtid) {
            slot.word.fetch_add(1, SeqCst);
            wake(&slot.word);
        }
        true
    }

    /// The call that a stopped thread stands before can wait in the process, and the thread has not just come
    /// from there for another reason.
    pub(crate) fn can_wait_inside(&mut self, vtid: i32) -> bool {
        let sii = self.sii;
        if !self.uses_shim()
            || !self.can_tell()
            || self.is_slow()
            || self.has_signals(vtid)
            || self.slot(vtid).is_none()
        {
            return false;
        }
        let t = self.thread(vtid);
        let waits = matches!(
            t.regs.orig_rax as i64,
            libc::SYS_epoll_wait
                | libc::SYS_epoll_pwait
                | libc::SYS_epoll_pwait2
                | libc::SYS_accept
                | libc::SYS_accept4
                | libc::SYS_poll
                | libc::SYS_ppoll
                | libc::SYS_select
                | libc::SYS_pselect6
                | libc::SYS_recvmsg
                | libc::SYS_read
                | libc::SYS_recvfrom
                | libc::SYS_nanosleep
                | libc::SYS_clock_nanosleep
        );
        let plain = match &t.state {
            State::Blocked(w) => !w.futex && !w.child && w.mask.is_none(),
            state => *state == State::Entry,
        };
        let site = t.regs.rip - 2;
        waits && plain && t.own_mask.is_none() && t.sent_back != sii && self.model.sites.sites.contains_key(&site)
    }

    /// Lets a stopped thread make its call again in the process, to wait there. False if it cannot.
    pub(crate) fn send_back(&mut self, vtid: i32) -> Result<bool> {
        if !self.can_wait_inside(vtid) {
            return Ok(false);
        }
        self.unpark(vtid)?;
        let begun = self.outside.begun.get(&vtid).cloned().unwrap_or_default();
        if let Some(slot) = self.slot(vtid) {
            slot.digest.store(begun.digest, SeqCst);
            slot.deadline.store(begun.deadline.unwrap_or(0), SeqCst);
            slot.again.store(u32::from(begun.deadline.is_some()), SeqCst);
        }
        self.thread(vtid).sent_back = self.sii;
        self.step_back(vtid);
        self.resume(vtid)?;
        Ok(true)
    }

    /// A thread of the unit can signal the supervisor, kill(2): others would keep the turn to themselves.
    fn can_tell(&self) -> bool {
        // SAFETY: no arguments.
        let us = unsafe { libc::getuid() };
        self.model.credentials.as_ref().is_none_or(|c| c.uids[..2].contains(&us))
    }

    /// Calls of the unit must come to the supervisor: a signal waits to be delivered, or a call of which a part is
    /// done goes on with the rest. In cold recovery each is followed in the model.
    fn is_slow(&self) -> bool {
        self.cold.is_some()
            || self.outside.signals.values().any(|q| !q.is_empty())
            || self.outside.begun.values().any(|begun| begun.done > 0)
    }

    /// The thread is in the process and waits for something that has not come.
    pub(crate) fn still_waits(&self, vtid: i32) -> bool {
        self.threads.get(&vtid).is_some_and(|t| t.place == Place::Waiting)
            && self.slot_is(vtid, WAITS)
            && !self.has_signals(vtid)
    }

    /// Takes a thread out of its wait in the process; it stands in a stop afterwards, and will try its call again.
    pub(crate) fn call_in(&mut self, vtid: i32) -> Result<()> {
        let tid = self.tid(vtid);
        tracee::interrupt(tid)?;
        loop {
            match tracee::wait_tick(tid)? {
                // It was just about to wait.
                None => tracee::interrupt(tid)?,
                Some(Event::Seccomp) => break,
                Some(Event::Signal(_)) => {
                    let info = tracee::get_siginfo(tid)?;
                    self.keep_signal(vtid, info);
                    self.go_on(tid)?;
                }
                Some(Event::Stop(_)) => self.go_on(tid)?,
                Some(Event::Other(_)) => tracee::cont(tid, 0)?,
                Some(Event::Ended(_)) => return Err(Halt::Died),
            }
        }
        self.arrived(vtid)?;
        self.make_ready(vtid);
        Ok(())
    }

    /// Says what the thread that is about to run may do in the process; it has the turn.
    pub(crate) fn allow_shim(&mut self) {
        let slow = self.is_slow();
        let stopped = |v: &i32| self.threads.get(v).is_some_and(|t| t.place != Place::Waiting);
        let shared = self.ready.iter().any(stopped);
        let mut until = 0;
        let mut may_wait = !shared || self.can_tell();
        let budget = if shared { u64::from(CALLS_PER_TURN) } else { u64::MAX };
        for (vtid, t) in &self.threads {
            if Some(*vtid) == self.current || matches!(t.place, Place::Parked | Place::Waiting) {
                continue;
            }
            match &t.state {
                State::Blocked(w) => match w.deadline {
                    Some(d) if until == 0 || d < until => until = d,
                    _ => {}
                },
                _ if self.ready.contains(vtid) => {}
                _ => may_wait = false,
            }
        }
        let control = self.log.control();
        control.budget.store(budget, SeqCst);
        control.turn_calls.store(0, SeqCst);
        control.shared.store(u32::from(shared), SeqCst);
        control.single.store(u32::from(self.threads.len() == 1), SeqCst);
        control.may_wait.store(u32::from(may_wait), SeqCst);
        control.wait_until.store(until, SeqCst);
        let ignores_pipe = self.model.actions.get(libc::SIGPIPE as usize - 1).is_some_and(|a| a[0] == IGNORED);
        control.ignores_pipe.store(u32::from(ignores_pipe), SeqCst);
        control.alone.store(u32::from(self.outside.children.values().all(|c| c.ended.is_some())), SeqCst);
        control.futex_waiters.store(self.model.futexes.len() as u32, SeqCst);
        control.slow.store(u32::from(slow), SeqCst);
        if let Some(vtid) = self.current {
            self.has_turn(vtid);
        }
    }

    /// Has the running thread come to the supervisor at its next call.
    pub(crate) fn call_back(&self) {
        self.log.control().slow.store(1, SeqCst);
        if let Some(vtid) = self.current.filter(|v| self.slot_is(*v, WAITS)) {
            // A thread that is gone, or stopped by itself, needs no interruption.
            let _gone = tracee::interrupt(self.tid(vtid));
        }
    }

    /// Another thread can run: the running one has so many more calls, and says when it waits.
    pub(crate) fn share_turn(&self) {
        let control = self.log.control();
        control.shared.store(1, SeqCst);
        if !self.can_tell() {
            control.may_wait.store(0, SeqCst);
        }
        control.budget.fetch_min(u64::from(CALLS_PER_TURN), SeqCst);
        if self.current.is_some_and(|v| self.slot_is(v, WAITS)) {
            self.call_back();
        }
    }

    /// The running thread has had its share of calls while others wait for the turn.
    pub(crate) fn turn_is_over(&self) -> bool {
        self.shim && !self.ready.is_empty() && self.log.control().turn_calls.load(SeqCst) > CALLS_PER_TURN
    }

    /// The call that has just come had begun to wait in the process: it is a blocked one.
    pub(crate) fn take_wait(&mut self, vtid: i32) {
        let Some(slot) = self.slot(vtid) else { return };
        if slot.waited.swap(0, SeqCst) == 0 {
            return;
        }
        let (digest, deadline) = (slot.digest.load(SeqCst), slot.deadline.load(SeqCst));
        let deadline = Some(deadline).filter(|d| *d != 0);
        self.begun(vtid, digest).deadline = deadline;
        let t = self.thread(vtid);
        if let libc::SYS_epoll_wait | libc::SYS_epoll_pwait | libc::SYS_epoll_pwait2 = t.regs.orig_rax as i64 {
            let fds = vec![(t.regs.rdi as i32, libc::POLLIN)];
            t.state = State::Blocked(Waiting { fds, deadline, ..Waiting::default() });
        }
    }
}

/// Wakes the thread that waits for a word, in another process: the memory is shared.
fn wake(word: &AtomicU32) {
    // SAFETY: futex(2) with an address that outlives the call.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, 1, 0, 0, 0) };
}
