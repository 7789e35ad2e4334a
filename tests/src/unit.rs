//! One unit in a directory of its own: start it, ask about it, stop it.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::net::{TcpListener, TcpStream};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::binaries::{self, Mode};
use crate::process::{self, Process};
use crate::{Error, error};

/// How long a start, a recovery or a stop may take.
pub const LIMIT: Duration = Duration::from_secs(30);
/// Between two looks at something that cannot be awaited.
pub(crate) const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// How a program shows that it can be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ready {
    /// It prints `ready PORT`.
    Line,
    /// It accepts connections at this port.
    Port(u16),
    /// It need not be waited for.
    AtOnce,
}

/// A unit to be: what to run, how, and where.
#[derive(Debug)]
pub struct Launch {
    name: String,
    dir: tempfile::TempDir,
    argv: Vec<OsString>,
    options: Vec<OsString>,
    env: Vec<(OsString, OsString)>,
    through: Vec<OsString>,
    uid: Option<u32>,
    ready: Ready,
    /// Without ftrun, whatever the mode of this run: the words that stand before the program, if any.
    instead: Option<Vec<OsString>>,
}

static OPTIONS: OnceLock<&'static str> = OnceLock::new();

/// Options of `ftrun run`, separated by blanks, with which this test program starts every unit.
pub fn start_all_with(options: &'static str) {
    assert_eq!(*OPTIONS.get_or_init(|| options), options, "they are the same for every unit");
}

impl Launch {
    /// A unit whose name begins with `name`, in a fresh directory.
    pub fn new(name: &str) -> Result<Self, Error> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("{name}-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let dir = tempfile::Builder::new().prefix("ftrun-test-").tempdir()?;
        for part in ["work", "state"] {
            std::fs::create_dir(dir.path().join(part))?;
        }
        let (argv, options, env, through) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        Ok(Self { name, dir, argv, options, env, through, uid: None, ready: Ready::AtOnce, instead: None })
    }

    /// The program's working directory.
    pub fn work(&self) -> PathBuf {
        self.dir.path().join("work")
    }

    /// The state directory of `ftrun`.
    pub fn state_dir(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    /// Sets the program and its arguments.
    pub fn run<A: AsRef<OsStr>>(&mut self, program: impl AsRef<OsStr>, args: impl IntoIterator<Item = A>) -> &mut Self {
        self.argv = vec![program.as_ref().to_owned()];
        self.argv.extend(args.into_iter().map(|a| a.as_ref().to_owned()));
        self
    }

    /// Adds arguments for the program.
    pub fn add_args<A: AsRef<OsStr>>(&mut self, args: impl IntoIterator<Item = A>) -> &mut Self {
        self.argv.extend(args.into_iter().map(|a| a.as_ref().to_owned()));
        self
    }

    /// Adds options for `ftrun run`.
    pub fn options<A: AsRef<OsStr>>(&mut self, options: impl IntoIterator<Item = A>) -> &mut Self {
        self.options.extend(options.into_iter().map(|a| a.as_ref().to_owned()));
        self
    }

    /// Adds a variable to ftrun's environment, and so to the program's.
    pub fn env(&mut self, key: &str, value: impl AsRef<OsStr>) -> &mut Self {
        self.env.push((key.into(), value.as_ref().to_owned()));
        self
    }

    /// Runs the program without ftrun, under another tool whose words these are, or bare if there are none.
    pub fn without_ftrun<A: AsRef<OsStr>>(&mut self, words: impl IntoIterator<Item = A>) -> &mut Self {
        self.instead = Some(words.into_iter().map(|a| a.as_ref().to_owned()).collect());
        self
    }

    /// Starts it all by a program that executes its last arguments, as nohup(1) does.
    pub fn through<A: AsRef<OsStr>>(&mut self, starter: impl IntoIterator<Item = A>) -> &mut Self {
        self.through = starter.into_iter().map(|a| a.as_ref().to_owned()).collect();
        self
    }

    /// Runs it all as another user (we have to be root), who gets the directory.
    pub fn as_user(&mut self, uid: u32) -> &mut Self {
        self.uid = Some(uid);
        self
    }

    /// Says how the program shows that it can be used.
    pub fn ready(&mut self, ready: Ready) -> &mut Self {
        self.ready = ready;
        self
    }

    /// Copies a file into the directory, where any user may run it.
    pub fn copy(&self, file: &Path) -> Result<PathBuf, Error> {
        let to = self.dir.path().join(file.file_name().unwrap_or_default());
        binaries::copy_executable(file, &to)?;
        Ok(to)
    }

    /// Starts the unit and waits until it is ready.
    pub fn start(self) -> Result<Unit, Error> {
        let mut ftrun = match binaries::mode()? {
            Mode::Under(path) if self.instead.is_none() => Some(path.clone()),
            Mode::Under(_) | Mode::Bare => None,
        };
        let tool = self.instead.clone().unwrap_or_default();
        if let Some(uid) = self.uid {
            if let Some(path) = &mut ftrun {
                *path = self.copy(path)?;
            }
            for dir in [self.dir.path(), &self.work(), &self.dir.path().join("state")] {
                std::os::unix::fs::chown(dir, Some(uid), Some(uid))?;
            }
        }
        let mut line = self.through.clone();
        match &ftrun {
            None => line.extend(tool.iter().cloned()),
            Some(ftrun) => {
                line.extend([ftrun.into(), "run".into(), "--name".into(), self.name.clone().into()]);
                line.extend(self.options.iter().cloned());
                let more = std::env::var("FTRUN_TEST_OPTIONS").unwrap_or_default();
                let more = format!("{} {more}", OPTIONS.get().copied().unwrap_or_default());
                line.extend(more.split_whitespace().map(OsString::from));
                line.push("--".into());
            }
        }
        line.extend(self.argv.iter().cloned());
        let mut command = Command::new(&line[0]);
        // Cargo's search path for libraries makes hundreds of calls in the loader: they are no part of a scenario.
        command.args(&line[1..]).env_remove("LD_LIBRARY_PATH").envs(self.env.iter().map(|(k, v)| (k, v)));
        command.env("FTRUN_STATE_DIR", self.dir.path().join("state")).current_dir(self.work());
        let (out, err) = (self.dir.path().join("stdout"), self.dir.path().join("stderr"));
        command.stdin(Stdio::null()).stdout(File::create(out)?).stderr(File::create(err)?).process_group(0);
        if let Some(uid) = self.uid {
            command.uid(uid).gid(uid);
        }
        let child = command.spawn().map_err(|e| error!("{}: {e}", command.get_program().display()))?;
        let unit = Unit {
            name: self.name,
            ftrun,
            under_a_tool: !tool.is_empty(),
            uid: self.uid,
            port: match self.ready {
                Ready::Port(port) => port,
                Ready::Line | Ready::AtOnce => 0,
            },
            child: Mutex::new(child),
            dir: Some(self.dir),
            done: AtomicBool::new(false),
            last_killed: AtomicI32::new(0),
        };
        unit.await_ready(self.ready)
    }
}

/// A running unit. Dropped without [`Unit::stop`] or [`Unit::wait`] having gone well, it is killed, and its
/// directory stays and its logs' ends are printed.
#[derive(Debug)]
pub struct Unit {
    /// Its name for `ftrun`.
    pub name: String,
    /// The port it listens at; 0 if it has none.
    pub port: u16,
    ftrun: Option<PathBuf>,
    under_a_tool: bool,
    uid: Option<u32>,
    child: Mutex<Child>,
    dir: Option<tempfile::TempDir>,
    done: AtomicBool,
    pub(crate) last_killed: AtomicI32,
}

impl Unit {
    /// The unit's directory.
    pub fn path(&self) -> &Path {
        self.dir.as_ref().map_or(Path::new("/"), |d| d.path())
    }

    /// The program's working directory.
    pub fn work(&self) -> PathBuf {
        self.path().join("work")
    }

    /// Where `ftrun` keeps what belongs to this unit.
    pub fn stored(&self) -> PathBuf {
        self.path().join("state/units").join(&self.name)
    }

    /// What the program (and ftrun) has printed to stdout.
    pub fn stdout(&self) -> Result<String, Error> {
        Ok(std::fs::read_to_string(self.path().join("stdout"))?)
    }

    /// What the program (and ftrun) has printed to stderr.
    pub fn stderr(&self) -> Result<String, Error> {
        Ok(std::fs::read_to_string(self.path().join("stderr"))?)
    }

    /// Whether ftrun, run by this user, can give a process the number that it had.
    pub fn may_choose_pids(&self) -> bool {
        process::is_root() && self.uid.is_none_or(|uid| uid == 0)
    }

    /// Whether it runs without ftrun.
    pub fn is_bare(&self) -> bool {
        self.ftrun.is_none()
    }

    fn await_ready(mut self, ready: Ready) -> Result<Self, Error> {
        let start = Instant::now();
        loop {
            match ready {
                Ready::AtOnce => return Ok(self),
                Ready::Port(port) if TcpStream::connect(("127.0.0.1", port)).is_ok() => return Ok(self),
                Ready::Port(_) => {}
                Ready::Line => {
                    let text = self.stdout()?;
                    let line = text.lines().find_map(|l| l.strip_prefix("ready "));
                    if let Some(port) = line.filter(|_| text.ends_with('\n')).and_then(|p| p.trim().parse().ok()) {
                        self.port = port;
                        return Ok(self);
                    }
                }
            }
            if let Some(status) = self.child().try_wait()? {
                return Err(error!("{} ended before it was ready: {status}", self.name));
            }
            if start.elapsed() > LIMIT {
                return Err(error!("{} is not ready after {} s", self.name, LIMIT.as_secs()));
            }
            std::thread::sleep(LOOK_AGAIN);
        }
    }

    pub(crate) fn child(&self) -> std::sync::MutexGuard<'_, Child> {
        self.child.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The number of the process that was started: `ftrun run`, or the bare program.
    pub fn started_pid(&self) -> i32 {
        i32::try_from(self.child().id()).unwrap_or(0)
    }

    /// A finished `ftrun ARGS` against this unit's state directory.
    pub fn ftrun<A: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = A>) -> Result<Output, Error> {
        let ftrun = self.ftrun.as_ref().ok_or_else(|| error!("a bare program has no ftrun to ask"))?;
        let mut command = Command::new(ftrun);
        command.args(args).env("FTRUN_STATE_DIR", self.path().join("state")).current_dir(self.work());
        if let Some(uid) = self.uid {
            command.uid(uid).gid(uid);
        }
        Ok(command.stdin(Stdio::null()).output()?)
    }

    /// `ftrun status NAME --json`.
    pub fn status(&self) -> Result<Value, Error> {
        let output = self.ftrun(["status", &self.name, "--json"])?;
        if !output.status.success() {
            return Err(error!("ftrun status: {}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim()));
        }
        serde_json::from_slice(&output.stdout).map_err(|e| error!("ftrun status --json: {e}"))
    }

    /// The number under `key` in the status.
    pub fn status_number(&self, key: &str) -> Result<u64, Error> {
        let status = self.status()?;
        status[key].as_u64().ok_or_else(|| error!("ftrun status --json: no number {key} in {status}"))
    }

    /// A number of what it tells about its stable storage.
    pub fn store_number(&self, key: &str) -> Result<u64, Error> {
        let status = self.status()?;
        status["store"][key]
            .as_u64()
            .ok_or_else(|| error!("ftrun status --json: no number {key} of the store in {status}"))
    }

    /// The unit's state in words.
    pub fn state(&self) -> Result<String, Error> {
        let status = self.status()?;
        Ok(status["state"].as_str().ok_or_else(|| error!("no state in {status}"))?.to_owned())
    }

    /// How often it has been recovered.
    pub fn recoveries(&self) -> Result<u64, Error> {
        self.status_number("recoveries")
    }

    /// Process id of the unit's root process now.
    pub fn pid(&self) -> Result<i32, Error> {
        if self.is_bare() {
            return Ok(self.started_pid());
        }
        let pid = self.status_number("pid")?;
        i32::try_from(pid).map_err(|_| error!("a pid of {pid}"))
    }

    /// Has `ftrun verify` take a checkpoint and replay the events up to it: no divergence may be found.
    pub fn verify(&self) -> Result<String, Error> {
        self.told("verify")
    }

    /// What `ftrun VERB NAME` prints when it succeeds.
    fn told(&self, verb: &str) -> Result<String, Error> {
        let output = self.ftrun([verb, &self.name])?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        if output.status.success() {
            return Ok(text);
        }
        Err(error!("ftrun {verb}: {}: {text}{}", output.status, String::from_utf8_lossy(&output.stderr)))
    }

    fn resume_with(&self, env: &[(&str, &str)], options: &[&str]) -> Result<(), Error> {
        let ftrun = self.ftrun.as_ref().ok_or_else(|| error!("a bare program has no ftrun"))?;
        let append = |name: &str| File::options().append(true).open(self.path().join(name));
        let mut command = Command::new(ftrun);
        command.args(["resume", &self.name]).args(options).env_remove("LD_LIBRARY_PATH").envs(env.iter().copied());
        command.env("FTRUN_STATE_DIR", self.path().join("state")).current_dir("/");
        command.stdin(Stdio::null()).stdout(append("stdout")?).stderr(append("stderr")?).process_group(0);
        *self.child() = command.spawn()?;
        Ok(())
    }

    /// What the unit has in memory that outlives its processes.
    pub fn memory_dir(&self) -> Result<PathBuf, Error> {
        // SAFETY: no arguments.
        let user = Path::new("/dev/shm").join(format!("ftrun-{}", unsafe { libc::geteuid() }));
        // The name is followed by a digest of the state directory.
        let ours = |path: &PathBuf| {
            let name = path.file_name().and_then(OsStr::to_str);
            name.and_then(|n| n.rsplit_once('-')).is_some_and(|(n, _)| n == self.name)
        };
        let found = std::fs::read_dir(user)?.flatten().map(|entry| entry.path()).find(ours);
        found.ok_or_else(|| error!("{} has left nothing in memory", self.name))
    }

    /// Removes what the unit has left in memory, as the loss of its machine would.
    pub fn wipe_memory(&self) -> Result<(), Error> {
        while let Ok(dir) = self.memory_dir() {
            std::fs::remove_dir_all(dir)?;
        }
        Ok(())
    }

    /// `ftrun resume NAME`, with what it prints behind what has been printed; waits until it runs.
    pub fn resume(&self) -> Result<Value, Error> {
        self.resume_as(&[], &[])
    }

    /// The same with variables in ftrun's environment and further options.
    pub fn resume_as(&self, env: &[(&str, &str)], options: &[&str]) -> Result<Value, Error> {
        let before = self.recoveries()?;
        self.resume_with(env, options)?;
        let start = Instant::now();
        loop {
            // One that is being fetched has no directory for an instant.
            let status = self.status().unwrap_or_default();
            if status["state"] == "running" && status["recoveries"].as_u64() > Some(before) {
                return Ok(status);
            }
            if let Some(ended) = self.child().try_wait()? {
                return Err(error!("ftrun resume ended with {ended}: {}", tail(&self.path().join("stderr"), 5)));
            }
            if start.elapsed() > LIMIT {
                return Err(error!("not resumed within {} s: {status}", LIMIT.as_secs()));
            }
            std::thread::sleep(LOOK_AGAIN);
        }
    }

    /// Waits until the unit runs and has been recovered at least `count` times.
    pub fn await_recoveries(&self, count: u64) -> Result<Value, Error> {
        let start = Instant::now();
        loop {
            let status = self.status()?;
            let state = status["state"].as_str().unwrap_or_default();
            // While no supervisor answers there is what one has written, which names no process.
            if state == "running" && status["pid"].is_u64() && status["recoveries"].as_u64() >= Some(count) {
                return Ok(status);
            }
            if state == "failed" || state == "stopped" {
                return Err(error!("the unit is {state}: {status}"));
            }
            if start.elapsed() > LIMIT {
                return Err(error!("no recovery number {count} within {} s: {status}", LIMIT.as_secs()));
            }
            std::thread::sleep(4 * LOOK_AGAIN);
        }
    }

    /// Whether what was started has ended.
    pub fn has_ended(&self) -> Result<bool, Error> {
        Ok(self.child().try_wait()?.is_some())
    }

    /// Waits for the end of what was started, and returns its status.
    pub fn wait(&self) -> Result<ExitStatus, Error> {
        let status = self.wait_quietly()?;
        self.done.store(true, Ordering::Relaxed);
        Ok(status)
    }

    fn wait_quietly(&self) -> Result<ExitStatus, Error> {
        if let Some(status) = self.child().try_wait()? {
            return Ok(status);
        }
        // A child that ends now stays a zombie, with its number, until it is waited for here.
        let process = Process::open(self.started_pid());
        if let Ok(process) = process
            && !process.ended_within(LIMIT)
        {
            return Err(error!("{} has not ended within {} s", self.name, LIMIT.as_secs()));
        }
        Ok(self.child().wait()?)
    }

    /// System calls so far that were slow, and that were fast.
    pub fn calls(&self) -> Result<(u64, u64), Error> {
        let status = self.status()?;
        let number = |key: &str| {
            status["calls"][key].as_u64().ok_or_else(|| error!("ftrun status --json: no calls.{key} in {status}"))
        };
        Ok((number("slow")?, number("fast")?))
    }

    /// The program's own process when it runs without ftrun: the one that was started, or the tool's child.
    fn bare_pid(&self) -> i32 {
        let started = self.started_pid();
        let child = || {
            let children = std::fs::read_to_string(format!("/proc/{started}/task/{started}/children")).ok()?;
            children.split_whitespace().next()?.parse().ok()
        };
        if self.under_a_tool { child().unwrap_or(started) } else { started }
    }

    /// Asks for the end (`ftrun stop`, or SIGTERM for a program without ftrun) and waits for it.
    pub fn stop(&self) -> Result<ExitStatus, Error> {
        if self.is_bare() {
            Process::open(self.bare_pid())?.signal(libc::SIGTERM)?;
        } else {
            let output = self.ftrun(["stop", &self.name])?;
            if !output.status.success() {
                return Err(error!(
                    "ftrun stop: {}: {}",
                    output.status,
                    String::from_utf8_lossy(&output.stderr).trim()
                ));
            }
        }
        self.wait()
    }

    /// Ends a self-checking program by the file that it looks for; it has to say `ok` and leave with 0.
    ///
    /// Returns the number of rounds, each of which has been printed exactly once and in order.
    pub fn finish_rounds(&self) -> Result<u64, Error> {
        File::create(self.work().join("stop"))?;
        let status = self.wait_quietly()?;
        let text = self.stdout()?;
        if status.code() != Some(0) {
            return Err(error!("the program ended with {status}: {}", tail(&self.path().join("stderr"), 3)));
        }
        let mut lines = text.lines();
        if !lines.next().is_some_and(|l| l.starts_with("ready ")) {
            return Err(error!("the output does not begin with the line `ready`"));
        }
        let mut rounds = 0;
        for line in lines.by_ref() {
            if line == format!("ok {rounds}") {
                break;
            }
            rounds += 1;
            if line != format!("round {rounds}") {
                return Err(error!("`{line}` in the output where `round {rounds}` belongs"));
            }
        }
        if let Some(line) = lines.next() {
            return Err(error!("`{line}` in the output after the end"));
        }
        if !text.ends_with(&format!("ok {rounds}\n")) || rounds == 0 {
            return Err(error!("the output ends after round {rounds} without `ok`"));
        }
        self.done.store(true, Ordering::Relaxed);
        Ok(rounds)
    }

    /// Nobody runs it any more here, and that is as it should be.
    pub fn given_up(&self) {
        self.done.store(true, Ordering::Relaxed);
    }

    /// Keeps the directory and shows the logs although everything else went well.
    pub fn failed(&self) {
        self.done.store(false, Ordering::Relaxed);
    }

    fn end_by_force(&self) {
        // The keeper first, or it would start a new supervisor; then the supervisor, which takes the unit along.
        let status = self.status().unwrap_or_default();
        let named = ["keeper_pid", "supervisor_pid", "pid"].map(|key| status[key].as_i64().unwrap_or(0));
        let started = [self.bare_pid(), self.started_pid()].into_iter();
        let pids = started.chain(named.into_iter().filter_map(|pid| i32::try_from(pid).ok()));
        let processes: Vec<_> = pids.filter(|pid| *pid > 1).filter_map(|pid| Process::open(pid).ok()).collect();
        for process in processes {
            let _already_gone = process.signal(libc::SIGKILL);
            process.ended_within(Duration::from_secs(2));
        }
        let _reaped = self.child().wait();
    }
}

impl Drop for Unit {
    fn drop(&mut self) {
        let ended = self.child().try_wait().ok().flatten();
        if self.done.load(Ordering::Relaxed) && !std::thread::panicking() {
            return;
        }
        let status = self.status().map_or_else(|e| e.0, |s| s.to_string());
        if ended.is_none() {
            self.end_by_force();
        }
        // Hundreds of MiB, which other tests may need.
        let _kept = self.wipe_memory();
        let Some(dir) = self.dir.take() else { return };
        let path = dir.keep();
        let ended = ended.map_or("was running".into(), |s| match s.signal() {
            Some(signal) => format!("had died of signal {signal}"),
            None => format!("had ended with {s}"),
        });
        eprintln!("---- {} {ended}; kept in {}\n{status}", self.name, path.display());
        for log in ["stdout", "stderr"] {
            eprintln!("---- end of {log}:\n{}", tail(&path.join(log), 20));
        }
    }
}

/// The last `lines` lines of a file, of which at most 16 KiB are read.
fn tail(path: &Path, lines: usize) -> String {
    let read = || -> std::io::Result<String> {
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(16384)))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    let text = read().unwrap_or_default();
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

/// A port that is free now and that no outgoing connection will be given: below the ephemeral range.
pub fn free_port() -> Result<u16, Error> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    // Processes start at different places, so that tests that run side by side seldom meet.
    let start = std::process::id().wrapping_mul(257);
    for _ in 0..10_000 {
        let n = start.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed)) % 20_000;
        let port = u16::try_from(10_000 + n).unwrap_or(10_000);
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return Ok(port);
        }
    }
    Err(error!("no free port between 10000 and 30000"))
}
