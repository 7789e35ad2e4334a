//! `ftrun`: runs an unmodified program so that its death costs its users nothing.

use std::process::ExitCode;

fn main() -> ExitCode {
    ftrun_supervisor::cli::main()
}
