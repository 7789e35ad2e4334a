//! `cargo xtask bench`: measurements. They report what they saw and assert nothing about time.

pub(crate) mod calls;
mod drive;
mod mode;
pub(crate) mod recovery;
pub(crate) mod replay;
mod stats;
pub(crate) mod store;
pub(crate) mod throughput;
mod workloads;

use std::path::Path;

use ftrun_tests::{Error, error};
use serde_json::{Value, json};

/// What the figures depend on.
fn machine() -> Value {
    let first = |path: &str, key: &str| {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        let line = text.lines().find(|l| l.starts_with(key)).unwrap_or_default();
        line.split_once(": ").map_or(line, |(_, value)| value).trim().to_owned()
    };
    json!({
        "kernel": first("/proc/sys/kernel/osrelease", ""),
        "cpu": first("/proc/cpuinfo", "model name"),
        "cpus": std::thread::available_parallelism().map_or(0, usize::from),
    })
}

fn write_json(path: &Path, all: &Value) -> Result<(), Error> {
    std::fs::write(path, format!("{all:#}\n")).map_err(|e| error!("{}: {e}", path.display()))
}
