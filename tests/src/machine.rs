//! A real systemd: the first process of namespaces of its own, with a network, a `/tmp`, `/run` and `/var` of its own.
//!
//! Processes in there are run by nsenter(1). A thread that has called [`Machine::enter_network`] connects to servers there.

use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use crate::binaries::{Mode, copy_executable, installed, mode};
use crate::process::{Process, is_root};
use crate::unit::LIMIT;
use crate::{Error, error};

/// Between two looks at something that cannot be awaited.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// A machine with a running systemd. Dropped, it and everything in it is killed.
#[derive(Debug)]
pub struct Machine {
    starter: Child,
    /// The first process of the machine, and its number outside.
    init: Process,
    cgroup: PathBuf,
    share: tempfile::TempDir,
    done: bool,
}

impl Machine {
    /// Starts a machine; `None`, with a message, where that cannot be: without root, systemd or namespaces.
    ///
    /// # Errors
    /// It could be, and does not start.
    pub fn start() -> Result<Option<Self>, Error> {
        let Mode::Under(ftrun) = mode()? else { return Ok(None) };
        let skip = |why: &str| {
            eprintln!("skipped: no systemd can be started here: {why}");
            Ok(None)
        };
        if !is_root() {
            return skip("namespaces of this kind need root");
        }
        if !Path::new("/lib/systemd/systemd").exists() || installed("nsenter").is_none() || installed("ip").is_none() {
            return skip("systemd, util-linux or iproute2 is not installed; `cargo xtask test` as root installs them");
        }
        let namespaces = ["--pid", "--mount", "--cgroup", "--net", "--ipc", "--uts", "--fork"];
        if !Command::new("unshare").args(namespaces).arg("true").output()?.status.success() {
            return skip("unshare(1) may not make namespaces");
        }
        let Some(parent) = own_cgroup()? else { return skip("there is no cgroup2 file system") };
        let share = tempfile::Builder::new().prefix("ftrun-machine-").tempdir()?;
        // Other users run programs from there.
        std::fs::set_permissions(share.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
        let name = share.path().file_name().unwrap_or_default().to_owned();
        let cgroup = parent.join(name);
        if let Err(e) = std::fs::create_dir(&cgroup) {
            return skip(&format!("{}: {e}", cgroup.display()));
        }
        copy_executable(ftrun, &share.path().join("ftrun"))?;
        let script = share.path().join("machine.sh");
        std::fs::write(&script, include_str!("machine.sh"))?;
        let mut command = Command::new("/bin/sh");
        command.args(["-c", r#"echo $$ > "$1/cgroup.procs"; shift; exec "$@""#, "sh"]).arg(&cgroup);
        command.arg("unshare").args(namespaces).args(["--kill-child", "/bin/sh"]).arg(&script).arg(share.path());
        let log = File::create(share.path().join("start.log"))?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let with_us = || {
            // SAFETY: changes an attribute of the process: it ends with the thread that has started it, whatever ends that.
            let set = unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
            if set == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
        };
        // SAFETY: it makes one call, which may be made between fork and exec.
        unsafe { command.pre_exec(with_us) };
        let mut starter = command.spawn()?;
        let init = first_child(&mut starter);
        let init = init.map_err(|e| error!("{e}: {}", read(&share.path().join("start.log"))))?;
        let machine = Self { starter, init, cgroup, share, done: false };
        machine.await_true("the start of systemd", || {
            Ok(machine.run(["systemctl", "is-active", "basic.target"])?.status.success())
        })?;
        Ok(Some(machine))
    }

    /// The directory that is `/mnt/share` in there.
    pub fn share(&self) -> &Path {
        self.share.path()
    }

    /// Copies a program to where units find it; returns its path in there.
    pub fn give(&self, program: &Path) -> Result<String, Error> {
        let name = program.file_name().unwrap_or_default();
        copy_executable(program, &self.share().join(name))?;
        Ok(format!("/mnt/share/{}", name.display()))
    }

    /// The end of a command that is run in there.
    pub fn run<A: AsRef<OsStr>>(&self, words: impl IntoIterator<Item = A>) -> Result<Output, Error> {
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.init.pid.to_string()]);
        command.args(["--mount", "--pid", "--net", "--cgroup", "--ipc", "--uts", "--wd=/", "--"]);
        command.args(words).env_remove("LD_LIBRARY_PATH").env("SYSTEMD_UNIT_PATH", "/etc/systemd/system");
        Ok(command.env("SYSTEMD_PAGER", "").env("PATH", "/mnt/share:/usr/sbin:/usr/bin:/sbin:/bin").output()?)
    }

    /// What a command prints that has to succeed.
    pub fn ok<A: AsRef<OsStr>>(&self, words: impl IntoIterator<Item = A>) -> Result<String, Error> {
        let words: Vec<_> = words.into_iter().map(|w| w.as_ref().to_owned()).collect();
        let output = self.run(&words)?;
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        if output.status.success() {
            return Ok(out.into_owned());
        }
        Err(error!("{words:?}: {}: {out}{err}", output.status))
    }

    /// A property of a unit.
    pub fn property(&self, unit: &str, name: &str) -> Result<String, Error> {
        Ok(self.ok(["systemctl", "show", "--property", name, "--value", unit])?.trim().to_owned())
    }

    /// Waits until a property of a unit is as wanted, and returns it.
    pub fn await_property(&self, unit: &str, name: &str, wanted: impl Fn(&str) -> bool) -> Result<String, Error> {
        let end = Instant::now() + LIMIT;
        loop {
            let value = self.property(unit, name)?;
            if wanted(&value) {
                return Ok(value);
            }
            if Instant::now() > end {
                return Err(error!("{name} of {unit} is {value:?} after {} s", LIMIT.as_secs()));
            }
            std::thread::sleep(LOOK_AGAIN);
        }
    }

    /// Waits for something.
    pub fn await_true(&self, what: &str, mut holds: impl FnMut() -> Result<bool, Error>) -> Result<(), Error> {
        let end = Instant::now() + LIMIT;
        while !holds()? {
            if Instant::now() > end || self.init.ended_within(Duration::ZERO) {
                return Err(error!("not within {} s: {what}", LIMIT.as_secs()));
            }
            std::thread::sleep(LOOK_AGAIN);
        }
        Ok(())
    }

    /// Has the calling thread use the network of the machine from now on.
    pub fn enter_network(&self) -> Result<(), Error> {
        let network = File::open(format!("/proc/{}/ns/net", self.init.pid))?;
        // SAFETY: concerns this thread alone.
        match unsafe { libc::setns(network.as_raw_fd(), libc::CLONE_NEWNET) } {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error().into()),
        }
    }

    /// All has gone well: nothing of it is kept.
    pub fn done(mut self) {
        self.done = true;
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if !self.done {
            for log in ["start.log", "console", "err"] {
                eprintln!("---- {log} of the machine:\n{}", read(&self.share().join(log)));
            }
        }
        // With the first process of its namespace everything ends.
        let _already_gone = self.init.signal(libc::SIGKILL);
        let _reaped = self.starter.wait();
        // A process may leave its group a little after it has been reported.
        let end = Instant::now() + LIMIT;
        while remove_cgroups(&self.cgroup).is_err() && Instant::now() < end {
            std::thread::sleep(LOOK_AGAIN);
        }
    }
}

fn read(path: &Path) -> String {
    String::from_utf8_lossy(&std::fs::read(path).unwrap_or_default()).into_owned()
}

fn remove_cgroups(group: &Path) -> std::io::Result<()> {
    for entry in std::fs::read_dir(group)?.flatten() {
        if entry.file_type()?.is_dir() {
            remove_cgroups(&entry.path())?;
        }
    }
    std::fs::remove_dir(group)
}

/// The control group of this process in the cgroup2 file system, where that is mounted.
fn own_cgroup() -> Result<Option<PathBuf>, Error> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
    // proc_pid_mountinfo(5): the mount point is the fifth field, the type the first behind ` - `.
    let found = mounts.lines().find(|l| l.split_once(" - ").is_some_and(|(_, rest)| rest.starts_with("cgroup2 ")));
    let Some(root) = found.and_then(|l| l.split(' ').nth(4)) else { return Ok(None) };
    let own = std::fs::read_to_string("/proc/self/cgroup")?;
    let own = own.lines().find_map(|l| l.strip_prefix("0::/")).unwrap_or_default();
    Ok(Some(Path::new(root).join(own)))
}

/// The process that `unshare` has forked.
fn first_child(starter: &mut Child) -> Result<Process, Error> {
    let end = Instant::now() + LIMIT;
    let children = format!("/proc/{0}/task/{0}/children", starter.id());
    loop {
        let pid = std::fs::read_to_string(&children).unwrap_or_default();
        if let Some(pid) = pid.split_whitespace().next().and_then(|pid| pid.parse().ok()) {
            return Ok(Process::open(pid)?);
        }
        if let Some(status) = starter.try_wait()? {
            return Err(error!("the machine has not started: {status}"));
        }
        if Instant::now() > end {
            return Err(error!("unshare has no child after {} s", LIMIT.as_secs()));
        }
        std::thread::sleep(LOOK_AGAIN);
    }
}
