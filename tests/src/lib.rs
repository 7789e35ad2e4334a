//! Harness of the end-to-end tests: runs real programs as units, kills them, and checks every reply.
//!
//! - [`binaries`] finds or builds what a test runs: `ftrun`, the programs of `tests/programs`, Python.
//! - [`mod@unit`] starts one unit in a directory of its own, stops it, shows its logs on failure; [`kills`] are its kills.
//! - [`wire`] is one checked connection; [`clients`] speak the protocols and keep a model of what must be so.
//! - [`generator`] loads a server as fast as it answers, for benchmarks.
//! - [`manager`] listens as a service manager does; [`machine`] is a real one, systemd in namespaces of its own, and [`installed`] a service there.
//! - [`counting`] are clients that reconnect, and keep what they were told.
//! - [`load`] drives many clients while a killer strikes, and reports what they saw.
//! - [`scenarios`] puts these together, one function for each program; tests, demo and soak share them.
//!
//! The harness drives programs bare, without ftrun and without kills, when `FTRUN_TEST_BARE=1`: a checker
//! that complains then is wrong. It never falls back to bare by itself.

pub mod binaries;
pub mod clients;
pub mod counting;
pub mod generator;
pub mod installed;
pub mod kills;
pub mod load;
pub mod machine;
pub mod manager;
pub mod process;
pub mod rng;
pub mod scenarios;
pub mod service;
pub mod unit;
pub mod wire;

/// What goes wrong in the harness itself or in a scenario, as text for people.
pub struct Error(pub String);

/// A test that returns an error is reported with its `Debug` form: that has to be readable too.
impl std::fmt::Debug for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Error {}

impl From<std::io::Error> for Error {
    fn from(e: std::io::Error) -> Self {
        Self(e.to_string())
    }
}

impl From<wire::Fault> for Error {
    fn from(f: wire::Fault) -> Self {
        Self(f.to_string())
    }
}

/// Shorthand for an [`Error`] made from a format string.
#[macro_export]
macro_rules! error {
    ($($part:tt)*) => { $crate::Error(format!($($part)*)) };
}

/// A test for each of these [`scenarios`], under the load that the expression gives.
#[macro_export]
macro_rules! survives {
    ($load:expr; $($(#[$note:meta])* $name:ident;)*) => {$(
        $(#[$note])*
        #[test]
        fn $name() -> Result<(), $crate::Error> {
            let report = $crate::scenarios::$name(&$load)?;
            println!("{report}");
            Ok(())
        }
    )*};
}
