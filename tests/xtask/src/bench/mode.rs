//! The ways in which a program is run when they are compared.

use std::sync::{Mutex, OnceLock, PoisonError};

use ftrun_tests::binaries::{installed, is_bare};
use ftrun_tests::manager::Store;
use ftrun_tests::service::Service;
use ftrun_tests::unit::Launch;
use ftrun_tests::{Error, error};

/// One way to run a program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    /// As it is.
    Bare,
    /// Under `ftrun --no-shim`: each call is a stop.
    Slow,
    /// Under `ftrun`.
    Shim,
    /// Under `ftrun --durability supervisor`.
    Supervisor,
    /// The same with `--hold-descriptors`.
    Held,
    /// Under `ftrun --durability node` with a store in a directory: each commit is an `fdatasync`.
    NodeFile,
    /// Under `ftrun --durability node --stable memory` with an `ftstore serve` at a port of loopback.
    NodeTcp,
    /// Under `strace -f -o /dev/null`, whose cost is widely known.
    Strace,
}

impl Mode {
    /// Its name in tables and in JSON.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Bare => "bare",
            Self::Slow => "no-shim",
            Self::Shim => "ftrun",
            Self::Supervisor => "supervisor",
            Self::Held => "held",
            Self::NodeFile => "node-file",
            Self::NodeTcp => "node-tcp",
            Self::Strace => "strace",
        }
    }

    /// Whether ftrun runs the program.
    pub(crate) fn has_ftrun(self) -> bool {
        matches!(self, Self::Slow | Self::Shim | Self::Supervisor | Self::Held | Self::NodeFile | Self::NodeTcp)
    }

    /// Has a launch go this way.
    pub(crate) fn apply(self, launch: &mut Launch) -> Result<(), Error> {
        match self {
            Self::Bare => launch.without_ftrun([] as [&str; 0]),
            Self::Slow => launch.options(["--no-shim"]),
            Self::Shim => launch,
            Self::Supervisor => launch.options(["--durability", "supervisor"]),
            Self::Held => {
                let manager = HOLDER.get_or_init(|| Store::start().map_err(|e| e.0));
                let manager = manager.as_ref().map_err(|e| Error(e.clone()))?;
                let options = ["--durability", "supervisor", "--hold-descriptors"];
                launch.options(options).env("NOTIFY_SOCKET", manager.address())
            }
            Self::NodeFile => launch.options(["--durability", "node"]),
            Self::NodeTcp => launch.options(["--durability", "node", "--stable", "memory", "--store", &store_url()?]),
            Self::Strace => launch.without_ftrun(["strace", "-f", "-o", "/dev/null"]),
        };
        Ok(())
    }
}

/// Who holds the root of [`Mode::Held`].
static HOLDER: OnceLock<Result<Store, String>> = OnceLock::new();

/// The store service of [`Mode::NodeTcp`]: started when it is needed, and ended with this.
#[derive(Debug)]
pub(crate) struct StoreService;

static SERVICE: Mutex<Option<Service>> = Mutex::new(None);

impl Drop for StoreService {
    fn drop(&mut self) {
        drop(SERVICE.lock().unwrap_or_else(PoisonError::into_inner).take());
    }
}

fn store_url() -> Result<String, Error> {
    let mut service = SERVICE.lock().unwrap_or_else(PoisonError::into_inner);
    match &*service {
        Some(service) => Ok(service.tcp_url()),
        None => Ok(service.insert(Service::new()?).tcp_url()),
    }
}

/// Those of these modes that can be had; says which cannot, and why.
pub(crate) fn available(modes: &[Mode]) -> Result<Vec<Mode>, Error> {
    if is_bare() {
        return Err(error!("FTRUN_TEST_BARE is set: there is nothing to compare with"));
    }
    let mut modes = modes.to_vec();
    if modes.contains(&Mode::Strace) && installed("strace").is_none() {
        eprintln!("xtask: skipping strace: it is not installed");
        modes.retain(|m| *m != Mode::Strace);
    }
    Ok(modes)
}

/// The order in which round `n` takes the modes: each round begins with another one.
pub(crate) fn order(modes: &[Mode], n: usize) -> Vec<Mode> {
    let mut modes = modes.to_vec();
    let by = n % modes.len().max(1);
    modes.rotate_left(by);
    modes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_round_has_every_mode_and_begins_with_another() {
        let all = [Mode::Bare, Mode::Slow, Mode::Shim];
        assert_eq!(order(&all, 0), all);
        assert_eq!(order(&all, 1), [Mode::Slow, Mode::Shim, Mode::Bare]);
        assert_eq!(order(&all, 5), [Mode::Shim, Mode::Bare, Mode::Slow]);
        assert_eq!(order(&[], 3), []);
    }
}
