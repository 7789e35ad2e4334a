//! Futexes of the unit, kept by the supervisor.
//!
//! Threads run one at a time, so a futex is a list: waiters in the order in which they came, woken in that
//! order. The list is a function of the log, and replay rebuilds it: a thread that had been woken but had
//! not yet gone on when the process died is still woken afterwards, which the kernel's own queue could
//! not tell (futex(2)).

use crate::calls::timespec;
use crate::live::Outcome;
use crate::tracee;
use crate::unit::{Result, State, Unit, Waiter, Waiting, now};

const WAIT: i32 = 0;
const WAKE: i32 = 1;
const REQUEUE: i32 = 3;
const CMP_REQUEUE: i32 = 4;
const WAKE_OP: i32 = 5;
const LOCK_PI: i32 = 6;
const UNLOCK_PI: i32 = 7;
const TRYLOCK_PI: i32 = 8;
const WAIT_BITSET: i32 = 9;
const WAKE_BITSET: i32 = 10;
const LOCK_PI2: i32 = 13;

const WAITERS: u32 = 0x8000_0000;
const TID_MASK: u32 = 0x3fff_ffff;

fn done(r: i64) -> Outcome {
    Outcome::With(r, vec![])
}

fn fail(errno: i32) -> Outcome {
    Outcome::With(-i64::from(errno), vec![])
}

impl Unit {
    /// `futex(2)`, live.
    pub(crate) fn futex(&mut self, vtid: i32, args: &[u64; 6], digest: u64) -> Result<Outcome> {
        let op = args[1] as i32 & 0x7f;
        let absolute = op == WAIT_BITSET || op == LOCK_PI || op == LOCK_PI2;
        let mut deadline = None;
        if matches!(op, WAIT | WAIT_BITSET | LOCK_PI | LOCK_PI2) && args[3] != 0 {
            let time = timespec(self.tid(vtid), args[3])?.unwrap_or(0);
            let realtime = args[1] as i32 & libc::FUTEX_CLOCK_REALTIME != 0 || op == LOCK_PI;
            let begun = self.begun(vtid, digest);
            if begun.deadline.is_none() {
                begun.deadline = Some(match (absolute, realtime) {
                    (false, _) => now().saturating_add(time),
                    (true, false) => time,
                    (true, true) => now().saturating_add(time.saturating_sub(realtime_now())),
                });
            }
            deadline = begun.deadline;
        }
        let waited = matches!(&self.thread(vtid).state, State::Blocked(w) if w.futex);
        if waited {
            if let Some(i) = self.model.woken.iter().position(|v| *v == vtid) {
                self.model.woken.remove(i);
                return Ok(done(0));
            }
            if deadline.is_some_and(|d| d <= now()) {
                self.model.futexes.retain(|w| w.vtid != vtid);
                return Ok(fail(libc::ETIMEDOUT));
            }
            return Ok(Outcome::Block(Waiting { deadline, futex: true, ..Waiting::default() }));
        }
        let outcome = self.futex_step(vtid, args)?;
        if let Outcome::Block(_) = outcome {
            if deadline.is_some_and(|d| d <= now()) {
                self.model.futexes.retain(|w| w.vtid != vtid);
                return Ok(fail(libc::ETIMEDOUT));
            }
            return Ok(Outcome::Block(Waiting { deadline, futex: true, ..Waiting::default() }));
        }
        Ok(outcome)
    }

    /// The part of a futex call that depends on memory and the list alone: live and in replay.
    pub(crate) fn futex_step(&mut self, vtid: i32, args: &[u64; 6]) -> Result<Outcome> {
        let tid = self.tid(vtid);
        let [addr, op, value, value2, addr2, value3] = *args;
        let word = |at: u64| tracee::read_u32(tid, at);
        Ok(match op as i32 & 0x7f {
            op @ (WAIT | WAIT_BITSET) => {
                let bits = if op == WAIT { u32::MAX } else { value3 as u32 };
                if bits == 0 {
                    return Ok(fail(libc::EINVAL));
                }
                if word(addr)? != value as u32 {
                    return Ok(fail(libc::EAGAIN));
                }
                self.model.futexes.push(Waiter { addr, vtid, bits });
                Outcome::Block(Waiting::default())
            }
            WAKE => done(self.wake_futex(addr, value as i32, u32::MAX)),
            WAKE_BITSET => done(self.wake_futex(addr, value as i32, value3 as u32)),
            op @ (REQUEUE | CMP_REQUEUE) => {
                if op == CMP_REQUEUE && word(addr)? != value3 as u32 {
                    return Ok(fail(libc::EAGAIN));
                }
                let woken = self.wake_futex(addr, value as i32, u32::MAX);
                let mut moved = 0;
                for w in self.model.futexes.iter_mut().filter(|w| w.addr == addr).take(value2 as u32 as usize) {
                    w.addr = addr2;
                    moved += 1;
                }
                done(if op == CMP_REQUEUE { woken + moved } else { woken })
            }
            WAKE_OP => {
                let (code, shift_arg) = ((value3 >> 28) as u32 & 7, value3 >> 31 & 1 != 0);
                let mut oparg = ((value3 as u32) << 8) as i32 >> 20;
                let cmparg = ((value3 as u32) << 20) as i32 >> 20;
                if shift_arg {
                    oparg = 1 << (oparg & 31);
                }
                let old = word(addr2)?;
                let new = match code {
                    0 => oparg as u32,
                    1 => old.wrapping_add(oparg as u32),
                    2 => old | oparg as u32,
                    3 => old & !(oparg as u32),
                    _ => old ^ oparg as u32,
                };
                tracee::write_mem(tid, addr2, &new.to_le_bytes())?;
                let old = old as i32;
                let second = match value3 >> 24 & 15 {
                    0 => old == cmparg,
                    1 => old != cmparg,
                    2 => old < cmparg,
                    3 => old <= cmparg,
                    4 => old > cmparg,
                    _ => old >= cmparg,
                };
                let mut n = self.wake_futex(addr, value as i32, u32::MAX);
                if second {
                    n += self.wake_futex(addr2, value2 as i32, u32::MAX);
                }
                done(n)
            }
            op @ (LOCK_PI | LOCK_PI2 | TRYLOCK_PI) => {
                let old = word(addr)?;
                if old & TID_MASK == 0 {
                    let new = vtid as u32 | (old & !TID_MASK);
                    tracee::write_mem(tid, addr, &new.to_le_bytes())?;
                    return Ok(done(0));
                }
                if old & TID_MASK == vtid as u32 {
                    return Ok(fail(libc::EDEADLK));
                }
                if op == TRYLOCK_PI {
                    return Ok(fail(libc::EAGAIN));
                }
                tracee::write_mem(tid, addr, &(old | WAITERS).to_le_bytes())?;
                self.model.futexes.push(Waiter { addr, vtid, bits: u32::MAX });
                Outcome::Block(Waiting::default())
            }
            UNLOCK_PI => {
                if word(addr)? & TID_MASK != vtid as u32 {
                    return Ok(fail(libc::EPERM));
                }
                let next = self.model.futexes.iter().find(|w| w.addr == addr).map(|w| w.vtid);
                let more = self.model.futexes.iter().filter(|w| w.addr == addr).count() > 1;
                // The lock is handed over: the next waiter owns it before it runs.
                let new = next.map_or(0, |v| v as u32 | if more { WAITERS } else { 0 });
                tracee::write_mem(tid, addr, &new.to_le_bytes())?;
                self.wake_futex(addr, 1, u32::MAX);
                done(0)
            }
            _ => fail(libc::ENOSYS),
        })
    }

    /// Wakes up to `n` waiters of `addr`; returns how many.
    pub(crate) fn wake_futex(&mut self, addr: u64, n: i32, bits: u32) -> i64 {
        let mut woken = 0;
        let mut i = 0;
        while woken < i64::from(n) && i < self.model.futexes.len() {
            let w = &self.model.futexes[i];
            if w.addr == addr && w.bits & bits != 0 {
                let vtid = self.model.futexes.remove(i).vtid;
                self.model.woken.push(vtid);
                if !self.replaying {
                    self.make_ready(vtid);
                }
                woken += 1;
            } else {
                i += 1;
            }
        }
        woken
    }
}

fn realtime_now() -> u64 {
    let mut ts = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `ts` outlives the call.
    unsafe { libc::clock_gettime(libc::CLOCK_REALTIME, &raw mut ts) };
    ts.tv_sec as u64 * 1_000_000_000 + ts.tv_nsec as u64
}
