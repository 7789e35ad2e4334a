//! Errors as the user sees them: what failed, what to do about it, and the exit status.

use std::ffi::OsString;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use ftrun_store::LogError;

/// Exit status of `ftrun run` when the program does not exist.
pub const EXIT_NOT_FOUND: u8 = 127;
/// Exit status of `ftrun run` when the program cannot be executed.
pub const EXIT_NOT_EXECUTABLE: u8 = 126;
/// Exit status when ftrun itself fails.
pub const EXIT_FAILURE: u8 = 125;

/// Who has to act on an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// The user, or who runs the machine: something can be put right.
    Environment,
    /// Nobody here: the program needs what ftrun does not do.
    Unsupported,
    /// We: please report it.
    Bug,
}

/// An error at the edge of the program.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The program does not exist.
    #[error("{}: no such program", program.display())]
    NotFound {
        /// As the user wrote it.
        program: OsString,
    },
    /// The program exists and cannot be executed, or not by us.
    #[error("{}: cannot be executed: {reason}", program.display())]
    NotExecutable {
        /// As the user wrote it.
        program: OsString,
        /// Why.
        reason: String,
        /// The remedy, or empty.
        hint: String,
    },
    /// The machine, the user or the state directory lacks something.
    #[error("{what}")]
    Environment {
        /// What is wrong.
        what: String,
        /// The remedy, or empty.
        hint: String,
    },
    /// The program needs something that is not supported.
    #[error("{what}")]
    Unsupported {
        /// What it is.
        what: String,
        /// A way round, or empty.
        hint: String,
    },
    /// The program of the unit fails in the same place each time.
    #[error("{what}")]
    UnitFailed {
        /// Unit.
        what: String,
        /// Where to look, or empty.
        hint: String,
    },
    /// A file of the state directory.
    #[error("cannot {op} {}: {source}", path.display())]
    State {
        /// What was tried.
        op: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// The event log.
    #[error("{0}")]
    Log(#[from] LogError),
    /// Writing to standard output.
    #[error("cannot write the answer: {0}")]
    Output(io::Error),
    /// Something that cannot be if ftrun is right.
    #[error("internal error: {what}")]
    Bug {
        /// What was found.
        what: String,
    },
}

/// Remedy for a state directory that cannot be used.
const OTHER_DIR: &str = "choose another directory with --state-dir DIR or FTRUN_STATE_DIR";

impl Error {
    /// An [`Error::Environment`].
    pub fn environment(what: impl Into<String>, hint: impl Into<String>) -> Self {
        let (what, hint) = (what.into(), hint.into());
        Self::Environment { what, hint }
    }

    /// An [`Error::Unsupported`].
    pub fn unsupported(what: impl Into<String>, hint: impl Into<String>) -> Self {
        let (what, hint) = (what.into(), hint.into());
        Self::Unsupported { what, hint }
    }

    /// An [`Error::Bug`].
    pub fn bug(what: impl Into<String>) -> Self {
        Self::Bug { what: what.into() }
    }

    /// For `map_err`: an [`Error::State`] about `path`.
    pub fn state(op: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self + use<> {
        let path = path.to_owned();
        move |source| Self::State { op, path, source }
    }

    /// Who has to act.
    pub fn class(&self) -> Class {
        match self {
            Self::NotFound { .. }
            | Self::NotExecutable { .. }
            | Self::Environment { .. }
            | Self::UnitFailed { .. }
            | Self::State { .. }
            | Self::Log(_)
            | Self::Output(_) => Class::Environment,
            Self::Unsupported { .. } => Class::Unsupported,
            Self::Bug { .. } => Class::Bug,
        }
    }

    /// Exit status of ftrun.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::NotFound { .. } => EXIT_NOT_FOUND,
            Self::NotExecutable { .. } => EXIT_NOT_EXECUTABLE,
            _ => EXIT_FAILURE,
        }
    }

    /// What to do about it, if there is something to say.
    pub fn hint(&self) -> Option<String> {
        let hint = match self {
            Self::NotFound { program } if program.as_encoded_bytes().contains(&b'/') => "check the path".into(),
            Self::NotFound { .. } => "it is in no directory of PATH: give its full path".into(),
            Self::NotExecutable { hint, .. }
            | Self::Environment { hint, .. }
            | Self::Unsupported { hint, .. }
            | Self::UnitFailed { hint, .. } => hint.clone(),
            Self::State { source, .. } => match source.kind() {
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                    format!("the disk is full: free some space, or {OTHER_DIR}")
                }
                io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                    format!("it must be writable: {OTHER_DIR}")
                }
                _ => OTHER_DIR.into(),
            },
            Self::Log(e) if e.is_full() => "the disk is full: free some space".into(),
            Self::Log(LogError::Version { .. }) => {
                "use the version of ftrun that wrote it, or remove the unit with `ftrun rm`".into()
            }
            Self::Log(LogError::Corrupt { .. } | LogError::Gap { .. }) => {
                "everything before it is sound; `ftrun verify` says what else is damaged, `ftrun rm` removes the unit"
                    .into()
            }
            Self::Log(_) | Self::Output(_) => String::new(),
            Self::Bug { .. } => "this is a bug in ftrun: please report it with the output of `ftrun doctor`".into(),
        };
        (!hint.is_empty()).then_some(hint)
    }

    /// Prints the error and its hint to `out`.
    pub fn print(&self, out: &mut dyn Write) -> io::Result<()> {
        writeln!(out, "ftrun: {self}")?;
        if let Some(hint) = self.hint() {
            writeln!(out, "hint: {hint}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(e: &Error) -> String {
        let mut out = Vec::new();
        e.print(&mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn messages_name_the_thing_and_the_remedy() {
        let e = Error::NotFound { program: "nosuch".into() };
        assert_eq!(
            text(&e),
            "ftrun: nosuch: no such program\nhint: it is in no directory of PATH: give its full path\n"
        );
        assert_eq!(e.exit_code(), 127);

        let full = io::Error::from_raw_os_error(libc::ENOSPC);
        let e = Error::state("write", Path::new("/s/units/a/status.json"))(full);
        let text = text(&e);
        assert!(text.contains("/s/units/a/status.json"), "{text}");
        assert!(text.contains("FTRUN_STATE_DIR"), "{text}");
        assert_eq!((e.class(), e.exit_code()), (Class::Environment, 125));
        assert_eq!(Error::bug("x").class(), Class::Bug);
    }
}
