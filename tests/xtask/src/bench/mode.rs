//! The ways in which a program is run when they are compared.

use ftrun_tests::binaries::{installed, is_bare};
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
            Self::Strace => "strace",
        }
    }

    /// Whether ftrun runs the program.
    pub(crate) fn has_ftrun(self) -> bool {
        matches!(self, Self::Slow | Self::Shim | Self::Supervisor)
    }

    /// Has a launch go this way.
    pub(crate) fn apply(self, launch: &mut Launch) {
        match self {
            Self::Bare => launch.without_ftrun([] as [&str; 0]),
            Self::Slow => launch.options(["--no-shim"]),
            Self::Shim => launch,
            Self::Supervisor => launch.options(["--durability", "supervisor"]),
            Self::Strace => launch.without_ftrun(["strace", "-f", "-o", "/dev/null"]),
        };
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
