//! The directory of a unit: `STATE/units/NAME`.
//!
//! | name | what |
//! |---|---|
//! | `lock` | locked as long as a process of ftrun runs the unit; holds the keeper's pid |
//! | `format` | format version; a directory without it holds no unit |
//! | `status.json` | the last written [`Status`] |
//! | `ctl.sock` | where a running unit takes commands |
//! | `log/` | the event log |
//! | `ckpt/` | checkpoints |
//! | `store/` | stable storage, at durability `node` without another store |
//!
//! The lock is an open file description lock (fcntl(2)): children of the process that took it keep
//! it, it ends with the last of them, and others can ask for it without taking it.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};

use crate::report::Error;
use crate::status::{State, Status};

/// Version of the directory's format.
pub const UNIT_FORMAT: u32 = 1;
/// Longest name of a unit.
pub const NAME_BYTES_MAX: usize = 64;

const UNITS: &str = "units";
const STORE: &str = "store";
const FORMAT_PREFIX: &str = "ftrun unit ";

/// Checks the name of a unit.
pub fn check_name(name: &str) -> Result<(), String> {
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if name.is_empty() || name.len() > NAME_BYTES_MAX || !name.chars().all(good) {
        return Err(format!("a name has 1 to {NAME_BYTES_MAX} letters, digits, dots, underscores and hyphens"));
    }
    if matches!(name, "." | "..") {
        return Err("this name has a meaning for directories".into());
    }
    Ok(())
}

/// The directory of one unit.
#[derive(Debug)]
pub struct UnitDir {
    name: String,
    path: PathBuf,
    /// Locked, when the unit is ours to run.
    lock: Option<File>,
    /// The directory was made for us and holds nothing yet.
    fresh: bool,
}

impl UnitDir {
    /// Takes the lock of a unit to run it, and makes its directory if it is missing. What a stopped
    /// unit of that name left is still there: [`UnitDir::begin`] wipes it. Dropped before that, a
    /// directory that was made here is removed again, so do not fork in between.
    pub fn create(state_dir: &Path, name: &str) -> Result<Self, Error> {
        check_name(name).map_err(|e| Error::environment(format!("bad unit name {name:?}: {e}"), ""))?;
        let path = state_dir.join(UNITS).join(name);
        loop {
            let fresh = !path.exists();
            let mut dir = DirBuilder::new();
            let made = dir.recursive(true).mode(0o700).create(&path);
            made.map_err(Error::state("create", &path))?;
            let lock_path = path.join("lock");
            let err = |op| Error::state(op, &lock_path);
            let opened =
                OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(&lock_path);
            let lock = match opened {
                // Somebody removed the directory meanwhile.
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                opened => opened.map_err(err("open"))?,
            };
            let mut unit = Self { name: name.to_owned(), path: path.clone(), lock: None, fresh: false };
            match fcntl(&lock, FcntlArg::F_OFD_SETLK(&whole_file(libc::F_WRLCK))) {
                Ok(_) => {}
                Err(Errno::EAGAIN | Errno::EACCES) => return Err(unit.already_running()),
                Err(e) => return Err(err("lock")(e.into())),
            }
            // The lock counts only if the file is still the one with that name.
            let same =
                fs::metadata(&lock_path).and_then(|named| Ok(named.ino() == lock.metadata()?.ino())).unwrap_or(false);
            if !same {
                continue;
            }
            unit.check_format()?;
            unit.refuse_failed()?;
            unit.fresh = fresh && !path.join("format").exists();
            let mut lock: &File = unit.lock.insert(lock);
            lock.set_len(0).map_err(err("write"))?;
            writeln!(lock, "{}", process::id()).map_err(err("write"))?;
            return Ok(unit);
        }
    }

    /// The directory of an existing unit, to look at it.
    pub fn open(state_dir: &Path, name: &str) -> Result<Self, Error> {
        let path = state_dir.join(UNITS).join(name);
        let unit = Self { name: name.to_owned(), path, lock: None, fresh: false };
        if check_name(name).is_err() || !unit.check_format()? {
            return Err(Error::environment(
                format!("there is no unit named {name} in {}", state_dir.display()),
                "`ftrun ls` lists them; --state-dir or FTRUN_STATE_DIR looks elsewhere",
            ));
        }
        Ok(unit)
    }

    /// Names of the units in a state directory, sorted; none if it does not exist.
    pub fn list(state_dir: &Path) -> Result<Vec<String>, Error> {
        let units = state_dir.join(UNITS);
        let entries = match fs::read_dir(&units) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(Error::state("list", &units))?,
        };
        let mut names = Vec::new();
        for entry in entries {
            let name = entry.map_err(Error::state("list", &units))?.file_name();
            if let Ok(name) = name.into_string()
                && check_name(&name).is_ok()
                && units.join(&name).join("format").exists()
            {
                names.push(name);
            }
        }
        names.sort();
        Ok(names)
    }

    /// Wipes what an earlier unit of this name left and lays the directory out. Call it once nothing
    /// of the run can be refused any more.
    pub fn begin(&mut self) -> Result<(), Error> {
        assert!(self.lock.is_some(), "only the holder of the lock begins a unit");
        self.fresh = false;
        self.wipe()?;
        self.forget_memory();
        for dir in [self.log_dir(), self.ckpt_dir()] {
            let made = DirBuilder::new().mode(0o700).create(&dir);
            made.map_err(Error::state("create", &dir))?;
        }
        let text = format!("{FORMAT_PREFIX}{UNIT_FORMAT}\n");
        self.write_atomically("format", text.as_bytes())
    }

    /// Another process has begun the unit in our name.
    pub fn begun(&mut self) {
        self.fresh = false;
    }

    /// Removes everything but the lock and the store, which says itself what it has. `format` goes first: without it there is no unit.
    fn wipe(&self) -> Result<(), Error> {
        let err = Error::state;
        let format = self.path.join("format");
        match fs::remove_file(&format) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(err("remove", &format)(e)),
            _ => {}
        }
        for entry in fs::read_dir(&self.path).map_err(err("list", &self.path))? {
            let entry = entry.map_err(err("list", &self.path))?;
            if entry.file_name() == "lock" || entry.file_name() == STORE {
                continue;
            }
            let path = entry.path();
            let removed = if entry.file_type().is_ok_and(|t| t.is_dir()) {
                fs::remove_dir_all(&path)
            } else {
                fs::remove_file(&path)
            };
            removed.map_err(err("remove", &path))?;
        }
        Ok(())
    }

    /// Name of the unit.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Directory of the event log.
    pub fn log_dir(&self) -> PathBuf {
        self.path.join("log")
    }

    /// Directory of the checkpoints.
    pub fn ckpt_dir(&self) -> PathBuf {
        self.path.join("ckpt")
    }

    /// Makes the unit's directory of what outlives its supervisor in memory, or finds it.
    ///
    /// # Errors
    /// There is no memory file system, or it is not ours to use.
    pub fn memory_dir(&self) -> Result<PathBuf, Error> {
        let dir = self.memory_path();
        self.check_memory(&dir, true)?;
        Ok(dir)
    }

    /// Where its events and checkpoints go at durability `node`, unless a store is named.
    pub fn store_dir(&self) -> PathBuf {
        self.path.join(STORE)
    }

    /// That directory, if it is there and ours.
    pub fn found_memory(&self) -> Option<PathBuf> {
        let dir = self.memory_path();
        self.check_memory(&dir, false).ok().map(|()| dir)
    }

    fn check_memory(&self, dir: &Path, make: bool) -> Result<(), Error> {
        let refused = |what: &dyn std::fmt::Display| {
            let hint = "mount a tmpfs on /dev/shm, or use --durability process";
            Error::environment(format!("{}: {what}", dir.display()), hint)
        };
        if make {
            DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(|e| refused(&e))?;
        }
        // Everybody may make directories there, and what we write is the program's memory.
        for path in dir.ancestors().take(2) {
            let meta = fs::symlink_metadata(path).map_err(|e| refused(&e))?;
            if !meta.is_dir() || meta.uid() != nix::unistd::geteuid().as_raw() || meta.mode() & 0o77 != 0 {
                return Err(refused(&format!("{} is somebody else's, or open to others", path.display())));
            }
        }
        Ok(())
    }

    /// Removes that directory.
    pub fn forget_memory(&self) {
        if let Err(e) = fs::remove_dir_all(self.memory_path())
            && e.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!("{}: {e}", self.memory_path().display());
        }
    }

    /// Of the user and of this directory's path: other state directories may have units of the same name.
    fn memory_path(&self) -> PathBuf {
        let mut path = ftrun_abi::record::Digest::new();
        path.add_bytes(self.path.as_os_str().as_encoded_bytes());
        let uid = nix::unistd::geteuid();
        PathBuf::from(format!("/dev/shm/ftrun-{uid}/{}-{:016x}", self.name, path.finish()))
    }

    /// Number of the descriptor that holds the lock: it must not get into the program.
    pub fn lock_fd(&self) -> Option<i32> {
        self.lock.as_ref().map(AsRawFd::as_raw_fd)
    }

    /// True when a process of ftrun runs the unit.
    pub fn is_running(&self) -> bool {
        let Ok(lock) = OpenOptions::new().read(true).write(true).open(self.path.join("lock")) else {
            return false;
        };
        let mut query = whole_file(libc::F_WRLCK);
        let asked = fcntl(&lock, FcntlArg::F_OFD_GETLK(&mut query));
        asked.is_ok() && i32::from(query.l_type) != libc::F_UNLCK
    }

    /// Removes a unit that does not run.
    pub fn remove(self) -> Result<(), Error> {
        let lock_path = self.path.join("lock");
        let opened = OpenOptions::new().write(true).create(true).truncate(false).open(&lock_path);
        let lock = opened.map_err(Error::state("open", &lock_path))?;
        if fcntl(&lock, FcntlArg::F_OFD_SETLK(&whole_file(libc::F_WRLCK))).is_err() {
            return Err(Error::environment(
                format!("the unit {} is running", self.name),
                format!("stop it first: ftrun stop {}", self.name),
            ));
        }
        self.wipe()?;
        self.forget_memory();
        // The lock file goes while it is locked: who waits for it finds out that it is stale.
        fs::remove_dir_all(&self.path).map_err(Error::state("remove", &self.path))
    }

    /// Replaces `status.json`.
    pub fn write_status(&self, status: &Status) -> Result<(), Error> {
        let json = serde_json::to_vec_pretty(status)
            .map_err(|e| Error::bug(format!("a status cannot be written as JSON: {e}")))?;
        self.write_atomically("status.json", &json)
    }

    /// The last written status, corrected when nobody runs the unit any more.
    pub fn read_status(&self) -> Result<Status, Error> {
        let status = self.read_status_as_is()?;
        if self.is_running() {
            return Ok(status);
        }
        let mut status = status.without_supervisor();
        if status.note.as_deref() == Some("lost") && self.found_memory().is_some_and(|m| m.join("log").exists()) {
            status.note = Some("killed".into());
        }
        Ok(status)
    }

    fn read_status_as_is(&self) -> Result<Status, Error> {
        let path = self.path.join("status.json");
        let bytes = match fs::read(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                return Ok(Status { name: self.name.clone(), ..Status::default() });
            }
            bytes => bytes.map_err(Error::state("read", &path))?,
        };
        serde_json::from_slice(&bytes).map_err(|e| {
            Error::environment(
                format!("{} is damaged: {e}", path.display()),
                format!("nothing else of the unit is; `ftrun rm {}` removes it", self.name),
            )
        })
    }

    /// Replaces a file of the directory: it has the old or the new content at every instant.
    pub fn write_atomically(&self, name: &str, content: &[u8]) -> Result<(), Error> {
        let path = self.path.join(name);
        let temporary = self.path.join(format!("{name}.{}.tmp", process::id()));
        let written = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)
            .and_then(|mut f| f.write_all(content))
            .and_then(|()| fs::rename(&temporary, &path));
        written.map_err(|e| {
            drop(fs::remove_file(&temporary));
            Error::state("write", &path)(e)
        })
    }

    /// Makes the socket for commands, in place of what an earlier supervisor left.
    pub fn bind_control(&self) -> Result<UnixListener, Error> {
        let path = self.path.join("ctl.sock");
        match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                return Err(Error::state("remove", &path)(e));
            }
            _ => {}
        }
        self.by_short_path(|short| UnixListener::bind(short)).map_err(Error::state("bind a socket to", &path))
    }

    /// Connects to the unit's supervisor.
    pub fn connect_control(&self) -> io::Result<UnixStream> {
        self.by_short_path(|short| UnixStream::connect(short))
    }

    /// The path of a socket has 107 bytes at most, so it goes by way of a descriptor.
    fn by_short_path<T>(&self, f: impl FnOnce(&Path) -> io::Result<T>) -> io::Result<T> {
        let dir = File::open(&self.path)?;
        // Not /proc/self: that is the main thread's table, which need not be ours.
        f(Path::new(&format!("/proc/thread-self/fd/{}/ctl.sock", dir.as_raw_fd())))
    }

    /// False when the directory holds no unit; an error when its format is not ours.
    fn check_format(&self) -> Result<bool, Error> {
        let path = self.path.join("format");
        let text = match fs::read_to_string(&path) {
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                return Ok(false);
            }
            text => text.map_err(Error::state("read", &path))?,
        };
        let found = text.trim_end().strip_prefix(FORMAT_PREFIX);
        if found == Some(UNIT_FORMAT.to_string().as_str()) {
            return Ok(true);
        }
        let found = found.map_or_else(|| format!("{:?}", text.trim_end()), str::to_owned);
        Err(Error::environment(
            format!("the unit in {} has format {found}, this ftrun writes format {UNIT_FORMAT}", self.path.display()),
            "use the ftrun that made it, another --name or --state-dir, or delete the directory",
        ))
    }

    fn refuse_failed(&self) -> Result<(), Error> {
        if !self.path.join("format").exists() {
            return Ok(());
        }
        match self.read_status_as_is() {
            Ok(status) if status.state == State::Failed => Err(Error::environment(
                format!("the last unit named {} failed, and what it left is kept for inspection", self.name),
                format!("remove it with `ftrun rm {}`, or choose another --name", self.name),
            )),
            _ => Ok(()),
        }
    }

    fn already_running(&self) -> Error {
        let recorded = self.read_status_as_is().ok().and_then(|s| s.supervisor_pid);
        let locker = || fs::read_to_string(self.path.join("lock")).ok()?.trim().parse().ok();
        let pid = recorded.or_else(locker).map_or_else(|| "?".into(), |p: i32| p.to_string());
        let name = &self.name;
        Error::environment(
            format!("a unit named {name} is already running (supervisor pid {pid})"),
            format!("choose another --name or `ftrun stop {name}`"),
        )
    }
}

impl Drop for UnitDir {
    fn drop(&mut self) {
        if self.fresh && self.lock.is_some() {
            // Nothing was run: leave no trace.
            drop(fs::remove_dir_all(&self.path));
        }
    }
}

/// A lock request on a whole file.
fn whole_file(kind: i32) -> libc::flock {
    libc::flock { l_type: kind as i16, l_whence: libc::SEEK_SET as i16, l_start: 0, l_len: 0, l_pid: 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn begun(state: &Path, name: &str) -> UnitDir {
        let mut unit = UnitDir::create(state, name).unwrap();
        unit.begin().unwrap();
        unit
    }

    fn message(e: &Error) -> String {
        let mut out = Vec::new();
        e.print(&mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn names() {
        for good in ["a", "redis-server-12", "A.b_c-1", "...", &"x".repeat(64)] {
            assert!(check_name(good).is_ok(), "{good}");
        }
        for bad in ["", ".", "..", "a/b", "a b", "ü", "a\n", &"x".repeat(65)] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
    }

    /// Break it: skip the `F_OFD_SETLK` in `create`.
    #[test]
    fn one_name_runs_once() {
        let state = tempfile::tempdir().unwrap();
        let unit = begun(state.path(), "one");
        assert!(unit.is_running());
        let status = Status { supervisor_pid: Some(4711), ..Status::default() };
        unit.write_status(&status).unwrap();
        let text = message(&UnitDir::create(state.path(), "one").unwrap_err());
        assert!(text.contains("a unit named one is already running (supervisor pid 4711)"), "{text}");
        assert!(text.contains("ftrun stop one"), "{text}");
        let text = message(&UnitDir::open(state.path(), "one").unwrap().remove().unwrap_err());
        assert!(text.contains("running"), "{text}");
        drop(begun(state.path(), "two"));
        drop(unit);
        let seen = UnitDir::open(state.path(), "one").unwrap();
        assert!(!seen.is_running());
        assert_eq!(seen.read_status().unwrap().note.as_deref(), Some("lost"));
        assert_eq!(UnitDir::list(state.path()).unwrap(), ["one", "two"]);
        seen.remove().unwrap();
        assert_eq!(UnitDir::list(state.path()).unwrap(), ["two"]);
        let text = message(&UnitDir::open(state.path(), "one").unwrap_err());
        assert!(text.contains("no unit named one") && text.contains("ftrun ls"), "{text}");
    }

    #[test]
    fn a_new_run_replaces_a_stopped_unit_and_not_a_failed_one() {
        let state = tempfile::tempdir().unwrap();
        let unit = begun(state.path(), "u");
        fs::write(unit.log_dir().join("old"), "").unwrap();
        let mut status = Status { state: State::Stopped, ..Status::default() };
        unit.write_status(&status).unwrap();
        drop(unit);

        let refused = UnitDir::create(state.path(), "u").unwrap();
        assert!(refused.log_dir().join("old").exists(), "a run that is refused later wipes nothing");
        drop(refused);
        assert!(state.path().join("units/u/log/old").exists());

        let unit = begun(state.path(), "u");
        assert!(!unit.log_dir().join("old").exists());
        status.state = State::Failed;
        unit.write_status(&status).unwrap();
        drop(unit);
        let text = message(&UnitDir::create(state.path(), "u").unwrap_err());
        assert!(text.contains("ftrun rm u"), "{text}");
        assert!(UnitDir::open(state.path(), "u").unwrap().read_status().is_ok());
    }

    #[test]
    fn a_run_that_never_began_leaves_nothing() {
        let state = tempfile::tempdir().unwrap();
        drop(UnitDir::create(state.path(), "u").unwrap());
        assert!(!state.path().join("units/u").exists());
    }

    #[test]
    fn another_format_names_both_versions() {
        let state = tempfile::tempdir().unwrap();
        drop(begun(state.path(), "u"));
        fs::write(state.path().join("units/u/format"), "ftrun unit 7\n").unwrap();
        for e in [UnitDir::create(state.path(), "u"), UnitDir::open(state.path(), "u")] {
            let text = message(&e.unwrap_err());
            assert!(text.contains("format 7") && text.contains("format 1"), "{text}");
        }
    }

    #[test]
    fn an_unusable_state_directory_is_named_with_the_remedy() {
        for state in ["/proc/ftrun", "/dev/null/x"] {
            let text = message(&UnitDir::create(Path::new(state), "u").unwrap_err());
            assert!(text.contains(state) && text.contains("--state-dir"), "{text}");
        }
    }

    #[test]
    fn a_damaged_status_is_an_error() {
        let state = tempfile::tempdir().unwrap();
        let unit = begun(state.path(), "u");
        fs::write(unit.path().join("status.json"), "{").unwrap();
        let text = message(&unit.read_status().unwrap_err());
        assert!(text.contains("status.json is damaged"), "{text}");
    }

    #[test]
    fn sockets_below_long_paths() {
        let state = tempfile::tempdir().unwrap();
        let long = state.path().join("d".repeat(120)).join("e".repeat(120));
        let unit = begun(&long, &"n".repeat(64));
        assert!(unit.connect_control().is_err());
        for _ in 0..2 {
            let listener = unit.bind_control().unwrap();
            let _client = unit.connect_control().unwrap();
            listener.accept().unwrap();
        }
    }
}
