//! Kills: SIGKILL for a unit's process, its supervisor or both, at any moment.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::load::Victim;
use crate::process::{self, Process};
use crate::unit::{LIMIT, LOOK_AGAIN, Unit};
use crate::{Error, error};

/// A kill that was carried out.
#[derive(Debug, Clone, Copy)]
pub struct Killed {
    /// The unit's process; 0 when it was another one.
    pub pid: i32,
    /// When the signal was sent.
    pub sent: Instant,
    /// When the process was gone.
    pub gone: Instant,
}

impl Unit {
    /// Kills the unit's root process with SIGKILL, and waits for its death.
    ///
    /// While the unit is between two processes this waits for the next one. One that is still being restored
    /// has no number in the status, but where numbers can be chosen it has the old one, so it is struck too.
    /// Only a process that belongs to the unit's supervisor is ever killed.
    pub fn kill9(&self) -> Result<Killed, Error> {
        let start = Instant::now();
        while start.elapsed() < LIMIT {
            let status = self.status()?;
            let of = |key: &str| status[key].as_i64().and_then(|n| i32::try_from(n).ok()).unwrap_or(0);
            let owners = [of("supervisor_pid"), of("keeper_pid")];
            let pid = if of("pid") > 0 { of("pid") } else { self.last_killed.load(Ordering::Relaxed) };
            if let Some(killed) = strike(pid, owners)? {
                self.last_killed.store(pid, Ordering::Relaxed);
                return Ok(killed);
            }
            if let Some(status) = self.child().try_wait()? {
                return Err(error!("ftrun ended: {status}"));
            }
            std::thread::sleep(LOOK_AGAIN);
        }
        Err(error!("no living process to kill in {} s: {}", LIMIT.as_secs(), self.status()?))
    }

    /// Kills one of the unit's processes, or both, with SIGKILL.
    pub fn kill9_victim(&self, victim: Victim) -> Result<Killed, Error> {
        match victim {
            Victim::Unit => self.kill9(),
            Victim::Supervisor => self.kill9_supervisor(),
            Victim::Both => {
                let killed = self.kill9()?;
                self.kill9_supervisor()?;
                Ok(killed)
            }
        }
    }

    /// Kills the supervisor with SIGKILL, and waits for its death; the keeper starts another one.
    pub fn kill9_supervisor(&self) -> Result<Killed, Error> {
        let start = Instant::now();
        while start.elapsed() < LIMIT {
            let status = self.status()?;
            let of = |key: &str| status[key].as_i64().and_then(|n| i32::try_from(n).ok()).unwrap_or(0);
            if let Some(killed) = strike(of("supervisor_pid"), [of("keeper_pid"); 2])? {
                return Ok(Killed { pid: 0, ..killed });
            }
            if let Some(status) = self.child().try_wait()? {
                return Err(error!("ftrun ended: {status}"));
            }
            std::thread::sleep(LOOK_AGAIN);
        }
        Err(error!("no supervisor to kill in {} s: {}", LIMIT.as_secs(), self.status()?))
    }

    /// Kills keeper, supervisor and program with SIGKILL, one right after the other in an order that `order` chooses (0
    /// to 5), and waits until nobody is left who runs the unit.
    pub fn kill9_all(&self, order: u64) -> Result<(), Error> {
        const ORDERS: [[usize; 3]; 6] = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]];
        let status = self.status()?;
        let of = |key: &str| status[key].as_i64().and_then(|n| i32::try_from(n).ok()).unwrap_or(0);
        let keys = ["keeper_pid", "supervisor_pid", "pid"];
        let processes: Vec<_> = keys.iter().map(|key| Process::open(of(key)).ok()).collect();
        for i in ORDERS[usize::try_from(order % 6).unwrap_or(0)] {
            if let Some(process) = &processes[i] {
                // A program that was traced by the supervisor is gone with it.
                let _already_gone = process.signal(libc::SIGKILL);
            }
        }
        self.await_nobody()
    }

    /// Waits until nobody is left who runs a unit whose keeper has been killed.
    pub fn await_nobody(&self) -> Result<(), Error> {
        self.child().wait()?;
        // What came of a supervisor that the keeper has just started is not known yet: it holds the lock.
        let start = Instant::now();
        loop {
            let status = self.status()?;
            if status["state"] == "stopped" && status["supervisor_pid"].is_null() {
                return Ok(());
            }
            if let Some(pid) = status["supervisor_pid"].as_i64().and_then(|n| i32::try_from(n).ok())
                && let Ok(process) = Process::open(pid)
            {
                let _already_gone = process.signal(libc::SIGKILL);
            }
            if start.elapsed() > LIMIT {
                return Err(error!("the unit lives on: {status}"));
            }
            std::thread::sleep(LOOK_AGAIN);
        }
    }

    /// Kills the unit's root process so many times, each time as soon as it is there again: in the middle of
    /// being built, restored and replayed. `pause` says how long to wait before kill number n.
    ///
    /// Asking for the status takes longer than that, so this needs the process id to stay what it is.
    pub fn kill_rapidly(&self, count: u64, mut pause: impl FnMut(u64) -> Duration) -> Result<(), Error> {
        if !self.may_choose_pids() {
            return (0..count).try_for_each(|n| {
                std::thread::sleep(pause(n));
                self.kill9().map(drop)
            });
        }
        let status = self.status()?;
        let of = |key: &str| status[key].as_i64().and_then(|n| i32::try_from(n).ok()).unwrap_or(0);
        let (pid, owners) = (of("pid"), [of("supervisor_pid"), of("keeper_pid")]);
        for n in 0..count {
            std::thread::sleep(pause(n));
            let start = Instant::now();
            while strike(pid, owners)?.is_none() {
                if let Some(status) = self.child().try_wait()? {
                    return Err(error!("ftrun ended before kill {n}: {status}"));
                }
                if start.elapsed() > LIMIT {
                    return Err(error!("no process {pid} for kill {n} in {} s: {}", LIMIT.as_secs(), self.status()?));
                }
                std::thread::yield_now();
            }
        }
        Ok(())
    }
}

/// Kills process `pid` if it is there and belongs to one of `owners`, and waits for its death.
fn strike(pid: i32, owners: [i32; 2]) -> Result<Option<Killed>, Error> {
    let Some(process) = (pid > 0).then(|| Process::open(pid).ok()).flatten() else { return Ok(None) };
    if !belongs_to(pid, owners) || process.ended_within(Duration::ZERO) {
        return Ok(None);
    }
    let sent = Instant::now();
    process.signal(libc::SIGKILL)?;
    if !process.ended_within(LIMIT) {
        return Err(error!("process {pid} lives on after SIGKILL"));
    }
    Ok(Some(Killed { pid, sent, gone: Instant::now() }))
}

/// Whether `pid` is traced by, or a child of, one of these processes.
fn belongs_to(pid: i32, owners: [i32; 2]) -> bool {
    let tracer = process::proc_number(pid, "TracerPid").and_then(|tid| process::proc_number(tid, "Tgid"));
    let parent = process::proc_number(pid, "PPid");
    [tracer, parent].into_iter().flatten().any(|p| p > 0 && owners.contains(&p))
}
