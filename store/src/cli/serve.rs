//! `ftstore serve`.

use std::io::IsTerminal;
use std::path::PathBuf;

use super::Answer;
use crate::Error;
use crate::service::{config::Config, serve};

/// Options.
#[derive(Debug, clap::Args)]
pub(super) struct Serve {
    /// Configuration, see ftstore(8)
    #[arg(long, value_name = "FILE", default_value = "/etc/ftrun/ftstore.toml")]
    config: PathBuf,
    /// Read the configuration, say what is wrong with it, and end
    #[arg(long)]
    check: bool,
}

impl Serve {
    pub(super) fn run(&self) -> Result<Answer, Error> {
        let filter = tracing_subscriber::EnvFilter::try_from_env("FTSTORE_LOG");
        let filter = filter.unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
        let colours = std::io::stderr().is_terminal();
        tracing_subscriber::fmt().with_env_filter(filter).with_ansi(colours).with_writer(std::io::stderr).init();
        let config = Config::read(&self.config)?;
        if !self.check {
            serve(&config)?;
        }
        Ok(Answer { text: String::new(), json: serde_json::Value::Null, bad: false })
    }
}
