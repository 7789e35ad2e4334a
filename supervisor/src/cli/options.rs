//! What `ftrun run` was asked to do.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process;
use std::time::Duration;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::systemd::Ready;
use crate::unitdir::{NAME_BYTES_MAX, check_name};

/// What `ftrun run` was asked to do.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RunOptions {
    /// Name given; see [`RunOptions::unit_name`].
    pub name: Option<String>,
    /// State directory, absolute.
    pub state_dir: PathBuf,
    /// Durability level.
    pub durability: Durability,
    /// Stable storage, at durability `node`.
    pub store: Option<StoreOptions>,
    /// Longest time between checkpoints.
    pub checkpoint_every: Duration,
    /// A checkpoint is taken earlier when replay alone would take longer than this.
    pub recover_within: Duration,
    /// A checkpoint is taken when the log since the last one has this many bytes.
    pub checkpoint_log_bytes: u64,
    /// Whether every event and checkpoint is written to the state directory as it comes.
    pub journal: bool,
    /// Variables to add to the program's environment.
    pub env: Vec<(OsString, OsString)>,
    /// Working directory of the program, if it is not ours.
    pub cwd: Option<PathBuf>,
    /// Whether the fast path may be used.
    pub shim: bool,
    /// When the service manager is told that the unit is ready.
    pub ready: Ready,
    /// The program as given.
    pub program: OsString,
    /// Its arguments, without the program.
    pub args: Vec<OsString>,
    /// How many `-v`.
    pub verbose: u8,
    /// Log lines as JSON.
    pub log_json: bool,
    /// A recovery may go on without descriptors that cannot be made again.
    pub lossy: bool,
    /// What remains of a unit of this name that was killed with all of ftrun is gone on with.
    pub resume: bool,
    /// Checkpoints have the files that memory is mapped from.
    pub self_contained: bool,
    /// Its descriptors are left with the service manager, so that they outlive all of ftrun.
    pub hold: bool,
}

/// Where a unit's events and checkpoints go.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StoreOptions {
    /// URL of the store; `None` for one in the unit's own directory.
    pub url: Option<String>,
    /// When an event counts as stable.
    pub stable: Stable,
}

/// When an event counts as stable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
pub enum Stable {
    /// When the store has it in memory: for a store on another machine.
    Memory,
    /// When it is in the page cache of the store's machine.
    Cache,
    /// When it is on the store's disk.
    Disk,
}

impl From<Stable> for ftrun_store::Durability {
    fn from(stable: Stable) -> Self {
        match stable {
            Stable::Memory => Self::Memory,
            Stable::Cache => Self::Cache,
            Stable::Disk => Self::Disk,
        }
    }
}

impl RunOptions {
    /// The name given, or the program's with our pid.
    pub fn unit_name(&self) -> String {
        self.name.clone().unwrap_or_else(|| default_name(&self.program, process::id()))
    }
}

pub(super) fn default_name(program: &OsString, pid: u32) -> String {
    let base = Path::new(program).file_name().unwrap_or(program);
    let clean = |c: char| if check_name(&c.to_string()).is_ok() || c == '.' { c } else { '_' };
    let mut name: String = base.to_string_lossy().chars().map(clean).collect();
    let suffix = format!("-{pid}");
    name.truncate(NAME_BYTES_MAX - suffix.len());
    name + &suffix
}

/// What a unit survives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
pub enum Durability {
    /// The death of any process of the unit, however it dies.
    Process,
    /// Also the death of the supervisor.
    Supervisor,
    /// Also the loss of the machine: nothing is given out before what led to it is in the store.
    Node,
}

impl Durability {
    /// Its name on the command line and in the status.
    pub fn name(self) -> &'static str {
        match self {
            Self::Process => "process",
            Self::Supervisor => "supervisor",
            Self::Node => "node",
        }
    }

    /// Whether the death of the supervisor is survived.
    pub fn survives_supervisor(self) -> bool {
        self != Self::Process
    }
}
