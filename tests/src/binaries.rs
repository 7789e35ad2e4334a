//! What the tests run: `ftrun` itself, the programs of `tests/programs`, and installed servers.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, OnceLock};
use std::time::SystemTime;

use crate::{Error, error};

/// How programs are run.
#[derive(Debug)]
pub enum Mode {
    /// Without ftrun and without kills, to try the checkers themselves.
    Bare,
    /// Under this `ftrun`.
    Under(PathBuf),
}

/// The mode of this run: bare if `FTRUN_TEST_BARE` is set, else under `FTRUN_BIN`, which is built when it
/// is not given.
pub fn mode() -> Result<&'static Mode, Error> {
    static MODE: OnceLock<Result<Mode, String>> = OnceLock::new();
    let mode = MODE.get_or_init(|| {
        if std::env::var_os("FTRUN_TEST_BARE").is_some() {
            return Ok(Mode::Bare);
        }
        if let Some(path) = std::env::var_os("FTRUN_BIN") {
            let path = PathBuf::from(path);
            return if path.is_file() {
                Ok(Mode::Under(path))
            } else {
                Err(format!("FTRUN_BIN: no {}", path.display()))
            };
        }
        build_ftrun().map(Mode::Under).map_err(|e| e.0)
    });
    mode.as_ref().map_err(|e| Error(e.clone()))
}

/// Whether programs run without ftrun.
pub fn is_bare() -> bool {
    matches!(mode(), Ok(Mode::Bare))
}

/// Top of the workspace.
pub fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("/"))
}

/// Cargo's target directory: the one that holds the running executable.
pub fn target_dir() -> Result<PathBuf, Error> {
    let exe = std::env::current_exe()?;
    // <target>/<profile>/xtask, or <target>/<profile>/deps/<test>
    let dir = exe.ancestors().find(|d| d.join("CACHEDIR.TAG").is_file() || d.join(".rustc_info.json").is_file());
    dir.map(Path::to_owned).ok_or_else(|| error!("{} is not in a cargo target directory", exe.display()))
}

/// What the programs are built with wherever tests run them: one set, so that nothing is built twice.
pub const FEATURES: &str = "ftrun-supervisor/nats,ftrun-store/nats,ftrun-tests/nats";

/// A cargo for this workspace.
///
/// It is not told for which package we run: build scripts (ring's) look at these variables, and with other values everything
/// behind them would be built again.
pub fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    for (key, _) in std::env::vars_os() {
        let name = key.to_string_lossy();
        if name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_") {
            command.env_remove(&key);
        }
    }
    command.current_dir(workspace());
    command
}

/// Builds the workspace's programs in release mode; returns the path of `ftrun`.
pub fn build_ftrun() -> Result<PathBuf, Error> {
    let target = target_dir()?;
    let mut command = cargo();
    command.args(["build", "--quiet", "--workspace", "--bins", "--release", "--features", FEATURES, "--target-dir"]);
    let status = command.arg(&target).status()?;
    if !status.success() {
        return Err(error!("cargo build --workspace --bins --release: {status}"));
    }
    let path = target.join("release/ftrun");
    if path.is_file() { Ok(path) } else { Err(error!("the build made no {}", path.display())) }
}

/// A file of `tests/programs`.
pub fn program_source(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("programs").join(name)
}

/// Compiles `tests/programs/NAME.c` unless that is done already; returns the executable.
pub fn guest(name: &str) -> Result<PathBuf, Error> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _guard = ONE_AT_A_TIME.lock().map_err(|_| error!("another compilation panicked"))?;
    let dir = target_dir()?.join("guests");
    std::fs::create_dir_all(&dir)?;
    let (source, header, built) = (program_source(&format!("{name}.c")), program_source("guest.h"), dir.join(name));
    let newest = modified(&source)?.max(modified(&header)?);
    if modified(&built).is_ok_and(|at| at > newest) {
        return Ok(built);
    }
    // Two test processes may compile at once: each into a file of its own, the rename decides.
    let fresh = dir.join(format!("{name}.{}", std::process::id()));
    let output = Command::new("cc")
        .args(["-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread", "-o"])
        .args([&fresh, &source])
        .output()
        .map_err(|e| error!("cc: {e}; install gcc"))?;
    if !output.status.success() {
        return Err(error!("cc {}:\n{}", source.display(), String::from_utf8_lossy(&output.stderr)));
    }
    std::fs::rename(&fresh, &built)?;
    Ok(built)
}

/// Copies a program to where any user may run it.
///
/// Another process does it: while we had the copy open for writing, a test beside us might fork, and its
/// child's duplicate of that descriptor would make running the copy fail with ETXTBSY.
pub fn copy_executable(from: &Path, to: &Path) -> Result<(), Error> {
    let output = Command::new("install").args(["-m", "755"]).args([from, to]).output()?;
    if output.status.success() { Ok(()) } else { Err(Error(String::from_utf8_lossy(&output.stderr).into_owned())) }
}

fn modified(path: &Path) -> Result<SystemTime, Error> {
    std::fs::metadata(path).and_then(|m| m.modified()).map_err(|e| error!("{}: {e}", path.display()))
}

/// A program of this package: cargo builds it beside the tests, and beside `ftrun`.
pub fn own(name: &str) -> Result<PathBuf, Error> {
    let target = target_dir()?;
    let found = ["debug", "release"].map(|profile| target.join(profile).join(name)).into_iter().find(|p| p.is_file());
    found.ok_or_else(|| error!("no {name} in {}; run cargo build --workspace --bins", target.display()))
}

/// A program of this package in release mode, for what is timed.
pub fn own_release(name: &str) -> Result<PathBuf, Error> {
    static BUILT: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    let built = BUILT.get_or_init(|| build_ftrun().map_err(|e| e.0));
    let ftrun = built.as_ref().map_err(|e| Error(e.clone()))?;
    let path = ftrun.with_file_name(name);
    if path.is_file() { Ok(path) } else { Err(error!("the build made no {}", path.display())) }
}

/// An installed program, looked for in PATH and in the directories of administrators' programs.
///
/// The system's own directories come first: what a version manager puts into PATH before them is often a
/// shell script in a home directory, which other users cannot run.
pub fn installed(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let fixed = ["/usr/bin", "/usr/sbin", "/bin", "/sbin"].map(PathBuf::from);
    fixed.into_iter().chain(std::env::split_paths(&path)).map(|dir| dir.join(name)).find(|p| p.is_file())
}

/// An installed program, or an error that says what to do.
pub fn need(name: &str) -> Result<PathBuf, Error> {
    installed(name).ok_or_else(|| error!("{name} is not installed; `cargo xtask test` as root installs it"))
}
