//! What came from outside: it happened once, outlives the death of the process, and is never rolled back.
//!
//! Where the supervisor's death is to be survived, too, it is kept on the desk: each change before anything that
//! follows from it, and what an event changes together with that event ([`crate::desk::Desk::keep_outside`]).

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::Ordering::SeqCst;

use serde::{Deserialize, Serialize};

use crate::capture::broken;
use crate::tracee::{self, SigInfo};
use crate::unit::{Model, Result, Unit};

/// A timer of `timer_create(2)` or `setitimer(2)`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Timer {
    /// Clock, or `ITIMER_*` for interval timers.
    pub clock: i32,
    /// `struct sigevent` (64 bytes), empty for interval timers.
    pub event: Vec<u8>,
    /// `CLOCK_MONOTONIC` nanoseconds of the next expiry.
    pub next: Option<u64>,
    /// Period in nanoseconds, 0 for one shot.
    pub period: u64,
    /// The kernel's id in this process, when it exists.
    #[serde(skip)]
    pub kernel_id: Option<i32>,
}

/// A child process of the unit. It runs on its own.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Child {
    /// Wait status when it has ended.
    pub ended: Option<i32>,
    /// The signal of its end has been given to the unit.
    pub reported: bool,
}

/// A call that a thread has begun: what a retry must remember.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Begun {
    /// Digest of the call, so that nothing is applied to another one.
    pub digest: u64,
    /// `CLOCK_MONOTONIC` nanoseconds.
    pub deadline: Option<u64>,
    /// Bytes already written.
    pub done: usize,
    /// `connect` has been started.
    pub started: bool,
    /// Flags of its descriptor that are to be put back (`F_SETFL`).
    pub mode: Option<i32>,
}

/// What happened outside; never rolled back.
#[derive(Debug, Default)]
pub struct Outside {
    /// Children by pid.
    pub children: BTreeMap<i32, Child>,
    /// Calls begun and not completed, by thread.
    pub begun: BTreeMap<i32, Begun>,
    /// POSIX timers by the program's id: time passes whether the process lives or not.
    pub timers: BTreeMap<i32, Timer>,
    /// Interval timers by `ITIMER_*`.
    pub itimers: BTreeMap<i32, Timer>,
    /// Signals that arrived and have not been delivered, by thread; 0 for those sent to the process, -1 for
    /// what is known of children whose SIGCHLD is on its way.
    pub signals: BTreeMap<i32, VecDeque<SigInfo>>,
    /// A signal that has been taken from them, by whom it was for, until its delivery is in the log.
    pub delivering: Option<(i32, SigInfo)>,
    /// A signal that ends the program has been given to it.
    pub fatal: Option<i32>,
    /// The program's ids of threads by the kernel's, where they differ; also of those that were killed, as long as a
    /// descriptor may name them ([`crate::procfs`]).
    pub ids: BTreeMap<i32, i32>,
    /// Descriptors that lead to one description, while they are replaced one after the other ([`crate::procfs`]).
    pub copies: Vec<Vec<i32>>,
}

/// [`Outside`], as it is kept.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Kept {
    children: BTreeMap<i32, Child>,
    begun: BTreeMap<i32, Begun>,
    timers: BTreeMap<i32, Timer>,
    itimers: BTreeMap<i32, Timer>,
    signals: Vec<(i32, Vec<u8>)>,
    delivering: Option<(i32, Vec<u8>)>,
    fatal: Option<i32>,
    ids: BTreeMap<i32, i32>,
    copies: Vec<Vec<i32>>,
}

impl Outside {
    pub(crate) fn to_bytes(&self) -> postcard::Result<Vec<u8>> {
        let each = |(to, queue): (&i32, &VecDeque<SigInfo>)| -> Vec<_> {
            queue.iter().map(|info| (*to, info.to_vec())).collect()
        };
        postcard::to_stdvec(&Kept {
            children: self.children.clone(),
            begun: self.begun.clone(),
            timers: self.timers.clone(),
            itimers: self.itimers.clone(),
            signals: self.signals.iter().flat_map(each).collect(),
            delivering: self.delivering.map(|(to, info)| (to, info.to_vec())),
            fatal: self.fatal,
            ids: self.ids.clone(),
            copies: self.copies.clone(),
        })
    }

    /// As a new supervisor finds it. What was being delivered is delivered again, and children have died with the
    /// supervisor, whose tracees they were.
    fn from_bytes(bytes: &[u8]) -> postcard::Result<Self> {
        let kept: Kept = postcard::from_bytes(bytes)?;
        let mut outside = Self {
            children: kept.children,
            begun: kept.begun,
            timers: kept.timers,
            itimers: kept.itimers,
            fatal: kept.fatal,
            ids: kept.ids,
            copies: kept.copies,
            ..Self::default()
        };
        for (to, info) in kept.delivering.into_iter().chain(kept.signals) {
            let info = info.try_into().map_err(|_| postcard::Error::DeserializeBadEncoding)?;
            outside.signals.entry(to).or_default().push_back(info);
        }
        for child in outside.children.values_mut() {
            child.ended.get_or_insert(libc::SIGKILL);
        }
        Ok(outside)
    }

    /// The process `pid`, which the program knows as `vpid`, has died: what it sent itself it will send again.
    pub fn forget_own_signals(&mut self, pid: i32, vpid: i32) {
        for queue in self.signals.values_mut() {
            queue.retain(|info| {
                let (_, code, from) = tracee::siginfo_head(info);
                !(code <= 0 && code != libc::SI_TIMER && (from == pid || from == vpid))
            });
        }
    }
}

impl Unit {
    /// Keeps what is known of the outside world for the next supervisor, as it is when the log has come to event
    /// `from`.
    pub(crate) fn keep_outside(&mut self, from: u64) {
        let Some(desk) = self.desk.filter(|_| self.standby.is_some() && !self.replaying) else { return };
        let kept = self.outside.to_bytes().map_err(|e| e.to_string());
        match kept {
            Ok(bytes) if bytes == self.kept_outside => {}
            Ok(bytes) => match desk.keep_outside(self.sii, from, &bytes) {
                Ok(()) => self.kept_outside = bytes,
                Err(n) => tracing::warn!("{n} bytes of signals and children do not outlive the supervisor"),
            },
            Err(e) => tracing::warn!("what is known of the outside world does not outlive the supervisor: {e}"),
        }
    }

    /// What the last supervisor kept when the log had come to where it is.
    pub(crate) fn find_outside(&mut self) -> Result<()> {
        let Some(desk) = self.desk else { return Ok(()) };
        // Without a desk, as on another machine, it is what it was at the checkpoint.
        let checkpointed = || postcard::from_bytes::<Model>(&self.snapshot.as_ref()?.model).ok()?.outside;
        if let Some(bytes) = desk.outside(self.sii).or_else(checkpointed) {
            self.outside = Outside::from_bytes(&bytes).map_err(broken("what was kept of the outside world"))?;
        }
        let (pid, vpid) = (desk.pid.load(SeqCst), desk.vpid.load(SeqCst));
        self.outside.forget_own_signals(pid, vpid);
        Ok(())
    }
}
