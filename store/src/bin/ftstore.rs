//! The store's command line; see [`ftrun_store::cli`].

fn main() -> std::process::ExitCode {
    ftrun_store::cli::main()
}
