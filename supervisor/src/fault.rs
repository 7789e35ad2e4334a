//! Fault points: places where tests have the unit killed.
//!
//! `FTRUN_FAULT=NAME[:N]` kills the unit with SIGKILL the Nth time (default 1) that point NAME is passed,
//! and never again; `FTRUN_FAULT=supervisor@NAME[:N]` kills the supervisor there, `FTRUN_FAULT=all@NAME[:N]` keeper and supervisor, and
//! the unit with them. Several, separated by commas, are armed together. Without the variable a point costs one comparison.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};

/// Every point, in the order of a unit's life.
pub const POINTS: [&str; 37] = [
    "restore-memory",
    "restore-end",
    "replay-begin",
    "replay-event",
    "replay-end",
    "thaw-begin",
    "thaw-end",
    "itself-opened",
    "call-entry",
    "hands-ordered",
    "hands-made",
    "call-logged",
    "call-written",
    "unloggable-made",
    "signal-logged",
    "fatal-kept",
    "checkpoint-begin",
    "checkpoint-copied",
    "checkpoint-end",
    "exec-made",
    "shim-seam",
    "settle-found",
    "settle-logged",
    "standby-written",
    "output-leaving",
    "output-left",
    "record-grouped",
    "record-acknowledged",
    "record-put",
    "retrieve-opened",
    "retrieve-laid",
    "hold-sending",
    "hold-sent",
    "hold-noted",
    "hold-closed",
    "hold-forgotten",
    "hold-returned",
];

struct Armed {
    name: String,
    victim: Victim,
    left: AtomicI64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Victim {
    Unit,
    /// The process that passes the point.
    Supervisor,
    /// Its parent, which is the keeper, and then that process.
    All,
}

static DISARMED: AtomicBool = AtomicBool::new(false);

/// In a supervisor that takes over: the point has been passed.
pub fn disarm() {
    DISARMED.store(true, Ordering::Relaxed);
}

fn armed() -> &'static [Armed] {
    static ARMED: OnceLock<Vec<Armed>> = OnceLock::new();
    ARMED.get_or_init(|| {
        let text = std::env::var("FTRUN_FAULT").ok().filter(|_| !DISARMED.load(Ordering::Relaxed)).unwrap_or_default();
        let arm = |text: &str| {
            let (name, n) = text.split_once(':').map_or((text, 1), |(a, b)| (a, b.parse().unwrap_or(1)));
            let (victim, name) = match name.split_once('@') {
                Some(("supervisor", name)) => (Victim::Supervisor, name),
                Some(("all", name)) => (Victim::All, name),
                _ => (Victim::Unit, name),
            };
            POINTS.contains(&name).then(|| Armed { name: name.to_owned(), victim, left: AtomicI64::new(n) })
        };
        text.split(',').filter_map(arm).collect()
    })
}

/// For the shim: how many of its seams are passed before the one at which it kills its own process; 0 for
/// never.
pub fn in_shim() -> u64 {
    armed()
        .iter()
        .find(|a| a.name == "shim-seam" && a.victim == Victim::Unit)
        .map_or(0, |a| a.left.load(Ordering::Relaxed).max(0) as u64)
}

/// Passes a point of a thread or process that does not know the unit's: only what it is part of can be killed there.
pub fn point_beside(name: &str) {
    // A process that there is not: signalled as the unit it would be the caller's group.
    point(name, i32::MAX);
}

/// Passes point `name`: kills process `pid` if the point is armed and its turn has come.
pub fn point(name: &str, pid: i32) {
    for a in armed().iter().filter(|a| a.name == name) {
        if a.left.fetch_sub(1, Ordering::Relaxed) == 1 {
            // SAFETY: no arguments.
            let (own, parent) = unsafe { (libc::getpid(), libc::getppid()) };
            let victims = match a.victim {
                Victim::Unit => &[pid][..],
                Victim::Supervisor => &[own],
                Victim::All => &[parent, own],
            };
            for victim in victims {
                // SAFETY: this process, or one of ours, alive or not yet reaped.
                unsafe { libc::kill(*victim, libc::SIGKILL) };
            }
        }
    }
}

/// The same where the keeper is all there is.
pub fn keepers_point(name: &str) {
    for a in armed().iter().filter(|a| a.name == name && a.victim == Victim::All) {
        if a.left.fetch_sub(1, Ordering::Relaxed) == 1 {
            // SAFETY: this process.
            unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
        }
    }
}
