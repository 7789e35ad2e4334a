//! What remains of a unit when every process of it has been killed: a directory in memory with checkpoint images, the
//! event log, the desk, and what was run.
//!
//! | name | what |
//! |---|---|
//! | `*.ckpt` | checkpoint images ([`crate::standby`]) |
//! | `log` | the event log ([`crate::evlog`]) |
//! | `desk` | the desk ([`crate::desk`]); may be missing, where the rest comes from another machine |
//! | `spec` | [`Spec`] |
//!
//! Each file is made exclusively, readable by its owner alone, and has all of its memory from the start, so that a
//! file system that is full is an error then, and no SIGBUS later.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use ftrun_ckpt::image::Chain;
use serde::{Deserialize, Serialize};

use crate::cli::{RunOptions, StoreOptions};
use crate::desk::Desk;
use crate::fds;
use crate::launch::Program;
use crate::report::Error;
use crate::unitdir::UnitDir;

const LOG: &str = "log";
const DESK: &str = "desk";
const SPEC: &str = "spec";
/// How long a process that was killed may take to end.
const END_WITHIN_MS: i32 = 10_000;
/// Version of [`Spec`].
const VERSION: u32 = 2;

/// What was run: enough to supervise it again.
#[derive(Debug, Serialize, Deserialize)]
pub struct Spec {
    version: u32,
    options: RunOptions,
    program: Program,
}

impl Spec {
    /// What is about to be run.
    pub fn new(options: &RunOptions, program: &Program) -> Self {
        Self { version: VERSION, options: options.clone(), program: program.clone() }
    }

    /// As it is kept.
    ///
    /// # Errors
    /// None is known.
    pub fn to_bytes(&self) -> Result<Vec<u8>, Error> {
        postcard::to_stdvec(self).map_err(|e| Error::bug(format!("what is run cannot be noted: {e}")))
    }

    /// What [`Spec::to_bytes`] gave.
    ///
    /// # Errors
    /// It is something else, or of another version.
    pub fn read(bytes: &[u8]) -> Result<Self, String> {
        let spec: Self = postcard::from_bytes(bytes).map_err(|e| e.to_string())?;
        if spec.version != VERSION {
            return Err(format!("version {}, this ftrun writes version {VERSION}", spec.version));
        }
        Ok(spec)
    }

    /// Its events and checkpoints go there from now on.
    pub fn use_store(&mut self, store: StoreOptions) {
        self.options.store = Some(store);
    }

    /// How it is run.
    pub fn options(&self) -> &RunOptions {
        &self.options
    }

    /// Options and program of the unit `name`.
    pub fn into_parts(self, name: &str) -> (RunOptions, Program) {
        (RunOptions { name: Some(name.to_owned()), ..self.options }, self.program)
    }
}

/// A directory with what remains of a unit that nobody runs.
#[derive(Debug)]
pub struct Remains {
    dir: PathBuf,
}

impl Remains {
    /// Lays out the directory of a unit that is about to run: its desk, and the empty file of its log.
    ///
    /// # Errors
    /// There is no room.
    pub fn lay(dir: &Path, spec: &Spec) -> Result<(&'static Desk, File), Error> {
        let full = |name: &'static str| {
            let at = dir.join(name);
            move |e: std::io::Error| {
                let hint =
                    "give the file system more room (mount -o remount,size=SIZE /dev/shm), or use --durability process";
                Error::environment(format!("{}: {e}", at.display()), hint)
            }
        };
        let create = |name| {
            let mut options = OpenOptions::new();
            options.read(true).write(true).create_new(true).mode(0o600).open(dir.join(name))
        };
        let bytes = spec.to_bytes()?;
        let mut file = create(SPEC).map_err(full(SPEC))?;
        std::io::Write::write_all(&mut file, &bytes).map_err(full(SPEC))?;
        let desk = create(DESK).and_then(|file| Desk::map(Some(&file))).map_err(full(DESK))?;
        let log = create(LOG).map_err(full(LOG))?;
        Ok((desk, log))
    }

    /// What remains of a unit whose lock we have, if it can be gone on with: it was started, and has not ended.
    pub fn of(dir: &UnitDir) -> Option<Self> {
        let remains = Self { dir: dir.found_memory()? };
        let there = |name: &str| remains.dir.join(name).is_file();
        let ended = || {
            let file = OpenOptions::new().read(true).write(true).open(remains.dir.join(DESK)).ok()?;
            let desk = Desk::find(&file).ok()?;
            Some(desk.code.load(std::sync::atomic::Ordering::SeqCst) >= 0)
        };
        let started = Chain::open(&remains.dir).is_ok_and(|chain| chain.newest().is_some());
        (there(LOG) && there(SPEC) && started && ended() != Some(true)).then_some(remains)
    }

    /// What was run, the desk, the log. Whoever goes on says so on the desk ([`Desk::take_over`]).
    ///
    /// # Errors
    /// A file cannot be read, or is not of this version.
    pub fn take(&self) -> Result<(Spec, &'static Desk, File), Error> {
        let wrong = |name: &str, what: &dyn std::fmt::Display| {
            let path = self.dir.join(name);
            Error::environment(format!("{}: {what}", path.display()), "`ftrun rm` gives the unit up")
        };
        let open = |name: &str| {
            let opened = OpenOptions::new().read(true).write(true).open(self.dir.join(name));
            opened.map_err(|e| wrong(name, &e))
        };
        let bytes = fs::read(self.dir.join(SPEC)).map_err(|e| wrong(SPEC, &e))?;
        let spec = Spec::read(&bytes).map_err(|e| wrong(SPEC, &e))?;
        let desk = if self.dir.join(DESK).exists() {
            Desk::find(&open(DESK)?).map_err(|e| wrong(DESK, &e))?
        } else {
            let desk = Desk::map(None).map_err(|e| Error::bug(format!("the desk: {e}")))?;
            // Its first supervisor takes over.
            desk.generation.store(1, std::sync::atomic::Ordering::SeqCst);
            desk
        };
        Ok((spec, desk, open(LOG)?))
    }

    /// The number of events at the newest checkpoint.
    pub fn newest(&self) -> Option<u64> {
        Chain::open(&self.dir).ok()?.newest()
    }

    /// Waits until a process that has the log mapped has ended, if it is one of the unit's: what it was doing in the kernel
    /// has come to its end then. False when that takes too long.
    pub fn await_end(&self, pid: i32) -> bool {
        let log = self.dir.join(LOG);
        let Some(log) = log.to_str() else { return false };
        let maps = |task: fs::DirEntry| fs::read_to_string(task.path().join("maps")).unwrap_or_default();
        let pidfd = fds::process(pid);
        let mut tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
        if pid <= 0 || !tasks.any(|task| maps(task).contains(log)) {
            return true;
        }
        pidfd.is_ok_and(|process| fds::has_ended(&process, END_WITHIN_MS))
    }

    /// Why a unit of this name is not started anew.
    pub fn refuse(&self, name: &str) -> Error {
        Error::environment(
            format!("the unit {name} was killed with all of ftrun, and can be gone on with"),
            format!("`ftrun resume {name}` goes on with it; `ftrun rm {name}` gives it up"),
        )
    }
}
