//! The life of a unit: start, death, recovery, end.
//!
//! ```text
//!            exec in a scratch process, first checkpoint
//!                 │
//!                 ▼            killed
//!   ┌──────► restore ◄──────────────────────┐
//!   │             │                         │
//!   │             ▼   killed                │
//!   │          replay ────► bury ───────────┤
//!   │             │                         │
//!   │             ▼   killed                │
//!   └─ exec ─── live ─────► bury ───────────┘
//!                 │ exit, fatal signal it asked for
//!                 ▼
//!              stopped          (failed: replay diverged, or a fault came back three times)
//! ```

use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::{Arc, RwLock};

use ftrun_abi::fast::FD_PRIVATE;
use ftrun_abi::record::{Kind, flag};
use ftrun_ckpt::pages::PageStore;
use ftrun_ckpt::state::Snapshot;

use crate::capture::broken;
use crate::hands;
use crate::launch::{self, LaunchError, Program};
use crate::report::Error;
use crate::run::lock;
use crate::status::{RecoveryInfo, State as UnitState};
use crate::systemd::environment;
use crate::tracee::{self, Event};
use crate::unit::{Halt, Model, Unit, now};

/// How often a fault may come back at one SII before it is the program's own.
const FAULTS_MAX: u32 = 3;

/// How a unit's life ended.
#[derive(Debug)]
pub enum End {
    /// The program ended; its wait status.
    Ended(i32),
    /// The unit cannot be recovered; what to tell the user.
    Failed(String),
}

impl Unit {
    /// Starts the program and keeps it alive until it ends by itself.
    ///
    /// `last` is what a supervisor that was killed has left, if one was.
    pub fn supervise(&mut self, program: &Program, last: Option<crate::standby::State>) -> Result<End, Error> {
        let mut died_at = None;
        if let Some((snapshot, pages)) = last {
            died_at = Some(now());
            match self.take_over(snapshot, pages) {
                Ok(Some(status)) => return Ok(End::Ended(status)),
                Ok(None) => {}
                Err(e) => return Ok(End::Failed(e.to_string())),
            }
        } else {
            self.start(program)?;
        }
        let mut faults = (0, 0);
        loop {
            let halt = self.run_once(died_at.take());
            match halt {
                Halt::Ended(status) => return Ok(End::Ended(status)),
                Halt::Exec(pid) => {
                    match self.open_numbers() {
                        Ok(open) => close_on_exec(open),
                        Err(e) => return Ok(End::Failed(e.to_string())),
                    }
                    self.hold_executed();
                    self.note_all_changed();
                    self.begin_record(Kind::Exec);
                    self.model.credentials.get_or_insert_with(Default::default);
                    // Only the checkpoint that follows can stand for it: without one the call is made again.
                    let logged = self.append(self.vpid, libc::SYS_execve as u16, 0, 0, flag::UNLOGGABLE);
                    match logged.and_then(|()| self.adopt_image(pid)) {
                        // What could not be stored has been told; recovery uses memory.
                        Ok(_told) => {}
                        Err(e) => {
                            if !matches!(e, Halt::Died) && !self.is_dying(pid) {
                                return Ok(End::Failed(e.to_string()));
                            }
                            launch::kill_and_reap(pid);
                            died_at = Some(now());
                        }
                    }
                }
                Halt::Died => {
                    let at = now();
                    let fault = self.fault.take();
                    let status = self.bury();
                    if let Err(e) = self.settle() {
                        return Ok(End::Failed(e.to_string()));
                    }
                    if self.ending {
                        return Ok(End::Ended(status));
                    }
                    if let Some((signal, addr)) = fault {
                        faults = if faults.0 == self.sii { (self.sii, faults.1 + 1) } else { (self.sii, 1) };
                        if faults.1 >= FAULTS_MAX {
                            self.failed_signal = Some(signal);
                            return Ok(End::Failed(self.own_fault(signal, addr)));
                        }
                    }
                    died_at = Some(at);
                    tracing::info!(pid = self.pid, sii = self.sii, status, "the process died; recovering");
                }
                Halt::Diverged(d) => {
                    self.bury();
                    return Ok(End::Failed(d.to_string()));
                }
                Halt::Lost(why) => {
                    if let Some(desk) = self.desk.filter(|_| self.standby.is_some()) {
                        desk.lacks();
                    }
                    return Ok(End::Failed(why));
                }
                Halt::BadAddress => return Ok(End::Failed("a bad address in the supervisor's own work".into())),
                Halt::Broken(why) => {
                    if self.is_dying(self.pid) {
                        self.bury();
                        if let Err(e) = self.settle() {
                            return Ok(End::Failed(e.to_string()));
                        }
                        died_at = Some(now());
                        continue;
                    }
                    self.bury();
                    return Ok(End::Failed(why));
                }
            }
        }
    }

    /// Executes the program, and takes its image for the first checkpoint.
    fn start(&mut self, program: &Program) -> Result<(), Error> {
        let scratch = launch::exec_scratch(program).map_err(|e| launch_error(&e))?;
        if self.set_tid {
            self.vpid = scratch;
            let mm = self.service.run(|| launch::read_mm(scratch, None));
            let mm = mm.map_err(|e| Error::bug(format!("the program's image: {e}")))?;
            environment::name_process(scratch, &mm, scratch).map_err(|e| Error::bug(e.to_string()))?;
        }
        let stored = self.adopt_image(scratch).map_err(|e| Error::bug(format!("the program was not started: {e}")))?;
        stored.map_err(|why| {
            Error::environment(
                format!("the first checkpoint cannot be stored, so that the program was not started: {why}"),
                "free some space there, or choose another directory with --state-dir DIR or FTRUN_STATE_DIR",
            )
        })
    }

    /// Goes on where a supervisor was killed, and the unit with it: the wait status if the unit was ending.
    fn take_over(&mut self, snapshot: Snapshot, pages: PageStore) -> crate::unit::Result<Option<i32>> {
        if let Some(desk) = self.desk {
            // Before the first restore only the image knows.
            self.vpid = match desk.vpid.load(SeqCst) {
                0 => snapshot.threads.first().map_or(0, |t| t.tid),
                vpid => vpid,
            };
            self.pid = desk.pid.load(SeqCst);
            self.incarnation = desk.incarnation.load(SeqCst).max(1);
        }
        let model: Model = postcard::from_bytes(&snapshot.model).map_err(broken("decoding the model"))?;
        self.shim = model.sites.used;
        self.sii = snapshot.sii;
        self.snapshot = Some(Arc::new(snapshot));
        self.pages = Arc::new(RwLock::new(pages));
        if !self.log.leads_on(self.sii) {
            return Err(Halt::Broken(
                "the supervisor was killed while the memory that outlives it was full, and the last checkpoint there is too \
                 old"
                    .into(),
            ));
        }
        self.count_log();
        self.find_outside()?;
        if self.desk.is_some_and(|desk| desk.is_cold()) {
            self.settle_cold()?;
        } else {
            self.close_aside();
            self.find_doubt();
            self.settle()?;
        }
        // Who has a socket beside the unit is forgotten before calls that change it; what else was known is asked for anew.
        let cold = self.desk.is_some_and(|desk| desk.is_cold());
        self.log.forget_fds(None, if cold { 0 } else { FD_PRIVATE });
        hands::take_over(self.sii);
        tracing::info!(sii = self.sii, "the supervisor was killed; recovering");
        Ok(self.outside.fatal)
    }

    fn own_fault(&self, signal: i32, addr: u64) -> String {
        let name = lock(&self.status).name.clone();
        format!(
            "the program failed by itself: {signal_name} (signal {signal}) at address {addr:#x} came back {FAULTS_MAX} times at event \
             {sii}; the unit is kept as it is. `ftrun log {name} --from {from}` shows what led there",
            signal_name = nix::sys::signal::Signal::try_from(signal).map_or("signal", |s| s.as_str()),
            sii = self.sii,
            from = self.sii.saturating_sub(20),
        )
    }

    /// Restores, replays and runs the unit until it halts.
    fn run_once(&mut self, died_at: Option<u64>) -> Halt {
        let begin = now();
        if died_at.is_some() {
            lock(&self.status).state = UnitState::Recovering;
            self.incarnation += 1;
        }
        // A thread to which the result of a call is owed has come to that call before.
        self.arrive_last = hands::owed_to().is_some();
        if let Err(h) = self.restore() {
            return h;
        }
        let restored = now();
        let events = match self.replay() {
            Ok(n) => n,
            Err(h) => {
                if matches!(h, Halt::Lost(_)) {
                    self.bury();
                }
                return h;
            }
        };
        if let Err(h) = self.thaw() {
            return h;
        }
        if let Err(h) = self.enter_table() {
            return h;
        }
        if let Err(e) = self.open_itself_again() {
            return Halt::Broken(format!("descriptors of the unit's own files in /proc: {e}"));
        }
        self.begin_outputs();
        // Who brought its descriptors back, or made them again, may have needed more than the unit has.
        self.follow_limits();
        self.begin_hold();
        let replayed = now();
        if events >= 1000 {
            self.replay_ns = (replayed - restored) / events;
        }
        self.publish_events();
        {
            let mut status = lock(&self.status);
            status.state = UnitState::Running;
            status.incarnation = self.incarnation;
            status.dirty_backend = self.tracker.name().to_owned();
            if let Some(died) = died_at {
                status.recoveries += 1;
                if let Some(desk) = self.desk {
                    desk.recoveries.store(status.recoveries, SeqCst);
                    desk.incarnation.store(self.incarnation, SeqCst);
                }
                status.last_recovery = Some(RecoveryInfo {
                    total_ms: (replayed - died) as f64 / 1e6,
                    restore_ms: (restored - begin) as f64 / 1e6,
                    replay_ms: (replayed - restored) as f64 / 1e6,
                    events,
                });
            }
        }
        match self.live() {
            Ok(never) => match never {},
            Err(h) => h,
        }
    }

    /// Waits until a killed process is gone; returns its wait status.
    pub(crate) fn bury(&mut self) -> i32 {
        let pid = self.pid;
        if let Some(desk) = self.desk {
            desk.runs.store(0, SeqCst);
        }
        // SAFETY: our own child, not reaped yet.
        unsafe { libc::kill(pid, libc::SIGKILL) };
        let threads = std::mem::take(&mut self.vtids);
        // What children report from here on is for the next incarnation.
        self.threads.clear();
        let status = loop {
            match tracee::wait(-1, 0) {
                Ok(Some((who, Event::Ended(status)))) if who == pid => break status,
                Ok(Some((who, Event::Ended(_)))) if threads.contains_key(&who) => {}
                Ok(Some((who, event))) => {
                    // Children go on meanwhile. Whatever fails here is reported by their own end.
                    if let Err(e) = self.on_event(who, event) {
                        tracing::debug!(pid = who, error = %e, "an event during the burial");
                    }
                }
                // Its end may have been taken already by who waited for it; its children do not end with it.
                Ok(None) => match tracee::wait(pid, libc::WNOHANG) {
                    Ok(Some((_, Event::Ended(status)))) => break status,
                    Ok(_) => {}
                    Err(_) => break 0,
                },
                Err(_) => break 0,
            }
        };
        self.outside.forget_own_signals(self.pid, self.vpid);
        status
    }

    /// Serves children that outlive the program: their calls come to us, who let them through.
    pub fn serve_children(&mut self) {
        self.threads.clear();
        self.vtids.clear();
        while self.outside.children.values().any(|c| c.ended.is_none()) {
            match tracee::wait(-1, 0) {
                Ok(Some((who, event))) => {
                    if let Err(e) = self.on_event(who, event) {
                        tracing::debug!(pid = who, error = %e, "an event of a child");
                    }
                }
                Ok(None) => {}
                Err(_) => return,
            }
        }
    }

    /// Adds to the count of what could not be logged.
    pub(crate) fn note_unloggable(&mut self, cause: &str) {
        lock(&self.status).unloggable.add(cause);
    }

    /// Copies counters into the status that users see.
    pub fn publish_counters(shared: &crate::unit::Shared, status: &mut crate::status::Status) {
        status.events = shared.events.load(Relaxed);
        status.log.bytes = shared.log_bytes.load(Relaxed);
        status.calls.slow = shared.slow.load(Relaxed);
        status.calls.fast = shared.fast.load(Relaxed);
    }
}

/// Descriptors that `execve` closes are closed in the table that stays; limits may have been lowered below their numbers.
fn close_on_exec(open: Vec<i32>) {
    for fd in open {
        // SAFETY: the unit's descriptors; the kernel has closed them in the unit's own table.
        unsafe {
            let flags = libc::fcntl(fd, libc::F_GETFD);
            if flags >= 0 && flags & libc::FD_CLOEXEC != 0 {
                libc::close(fd);
            }
        }
    }
}

fn launch_error(e: &LaunchError) -> Error {
    match e {
        LaunchError::Exec { program, source } => crate::run::exec_error(program, source),
        e => Error::bug(e.to_string()),
    }
}
