//! POSIX timers and interval timers. They belong to the kernel's process, so a recovered one gets them anew.

use ftrun_abi::table::Row;

use crate::calls::{SEC, err};
use crate::launch::GATE;
use crate::live::Outcome;
use crate::marshal::Prepared;
use crate::outside::Timer;
use crate::tracee::{self};
use crate::unit::{Place, Result, Unit, now};

impl Unit {
    pub(crate) fn setitimer(&mut self, vtid: i32, nr: u64, args: &[u64; 6]) -> Result<Outcome> {
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

    pub(crate) fn timer_create(&mut self, vtid: i32, args: &[u64; 6]) -> Result<Outcome> {
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

    pub(crate) fn make_timer(&mut self, vtid: i32, timer: &Timer) -> Result<std::result::Result<i32, i64>> {
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

    pub(crate) fn timer_call(
        &mut self,
        vtid: i32,
        nr: u64,
        args: &[u64; 6],
        call: &mut Prepared,
        row: &Row,
    ) -> Result<Outcome> {
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
        let outcome = self.unit_outputs(vtid, nr, args, call, row, r)?;
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
