//! Fault points: places where tests have the unit killed.
//!
//! `FTRUN_FAULT=NAME[:N]` kills the unit with SIGKILL the Nth time (default 1) that point NAME is passed,
//! and never again. Without the variable a point costs one comparison.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicI64, Ordering};

/// Every point, in the order of a unit's life.
pub const POINTS: [&str; 15] = [
    "restore-memory",
    "restore-end",
    "replay-begin",
    "replay-event",
    "replay-end",
    "call-entry",
    "call-logged",
    "call-written",
    "unloggable-made",
    "signal-logged",
    "checkpoint-begin",
    "checkpoint-copied",
    "checkpoint-end",
    "exec-made",
    "shim-seam",
];

struct Armed {
    name: String,
    left: AtomicI64,
}

fn armed() -> Option<&'static Armed> {
    static ARMED: OnceLock<Option<Armed>> = OnceLock::new();
    ARMED
        .get_or_init(|| {
            let text = std::env::var("FTRUN_FAULT").ok()?;
            let (name, n) = text.split_once(':').map_or((text.as_str(), 1), |(a, b)| (a, b.parse().unwrap_or(1)));
            POINTS.contains(&name).then(|| Armed { name: name.to_owned(), left: AtomicI64::new(n) })
        })
        .as_ref()
}

/// For the shim: how many of its seams are passed before the one at which it kills its own process; 0 for
/// never.
pub fn in_shim() -> u64 {
    armed().filter(|a| a.name == "shim-seam").map_or(0, |a| a.left.load(Ordering::Relaxed).max(0) as u64)
}

/// Passes point `name`: kills process `pid` if the point is armed and its turn has come.
pub fn point(name: &str, pid: i32) {
    if let Some(a) = armed()
        && a.name == name
        && a.left.fetch_sub(1, Ordering::Relaxed) == 1
    {
        // SAFETY: a process of ours, alive or not yet reaped.
        unsafe { libc::kill(pid, libc::SIGKILL) };
    }
}
