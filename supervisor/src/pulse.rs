//! The pulse: signs of life of a supervisor and its unit, for the keeper, who answers the service manager's watchdog.
//!
//! A beat says that the supervisor gets on with its work. While the unit runs, it also says that the unit makes
//! progress, or rightly waits: no thread can go on, or the one that has the turn waits in the process, or somebody
//! has stopped it.

use std::sync::OnceLock;
use std::sync::atomic::Ordering::SeqCst;

use crate::desk::Desk;
use crate::unit::Unit;

/// How often a running unit is looked at, nanoseconds.
const LOOK_NS: u64 = 100_000_000;

static DESK: OnceLock<&'static Desk> = OnceLock::new();

/// A supervisor has begun: its beats are told on this desk.
pub fn tell(desk: &'static Desk) {
    // It has one desk.
    let _the_same = DESK.set(desk);
    beat();
}

/// The supervisor gets on with its work.
pub fn beat() {
    if let Some(desk) = DESK.get() {
        desk.beats.fetch_add(1, SeqCst);
    }
}

/// The supervisor's death would not be survived now, or would be again.
pub fn degraded(yes: bool) {
    if let Some(desk) = DESK.get() {
        desk.degraded.store(u32::from(yes), SeqCst);
    }
}

/// The run comes to its end.
pub fn ending() {
    if let Some(desk) = DESK.get() {
        desk.ending.store(1, SeqCst);
    }
}

/// What was last seen of a running unit.
#[derive(Debug, Default)]
pub struct Pulse {
    at: u64,
    sii: u64,
    cpu: i64,
    /// A signal has stopped it.
    pub stopped: bool,
}

impl Unit {
    /// Beats if the unit has made progress, or rightly waits.
    pub(crate) fn feel_pulse(&mut self, now: u64) {
        if self.desk.is_none() || now.saturating_sub(self.pulse.at) < LOOK_NS {
            return;
        }
        let cpu = cpu_time(self.pid);
        let waits = self.pulse.stopped || self.current.is_none_or(|vtid| self.waits_inside(vtid));
        if waits || (self.sii, cpu) != (self.pulse.sii, self.pulse.cpu) {
            beat();
        }
        (self.pulse.at, self.pulse.sii, self.pulse.cpu) = (now, self.sii, cpu);
    }
}

/// Processor time of a process, nanoseconds.
fn cpu_time(pid: i32) -> i64 {
    let mut clock = 0;
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: both objects outlive the calls.
    let known = unsafe {
        libc::clock_getcpuclockid(pid, &raw mut clock) == 0 && libc::clock_gettime(clock, &raw mut time) == 0
    };
    if known { time.tv_sec * 1_000_000_000 + time.tv_nsec } else { 0 }
}
