//! `ftstore fsck`.

use std::fmt::Write as _;

use serde_json::json;

use super::{Answer, At};
use crate::disk::RealDisk;
use crate::{Engine, Error, Location};

/// Options.
#[derive(Debug, clap::Args)]
pub(super) struct Fsck {
    #[command(flatten)]
    at: At,
    /// Print JSON
    #[arg(long)]
    pub(super) json: bool,
}

impl Fsck {
    pub(super) fn run(&self) -> Result<Answer, Error> {
        self.at.must_be_there()?;
        let report = match &self.at.store {
            // What is damaged must not be written to before it has been looked at.
            Location::File(path) => Engine::fsck_on(&RealDisk::open(path)?)?,
            service => service.open()?.fsck()?,
        };
        let mut text = String::new();
        for finding in &report.findings {
            let _ = writeln!(text, "{finding}");
        }
        let _ = writeln!(
            text,
            "{} bytes read; {} records, {} pages and {} checkpoints are whole; {} findings",
            report.bytes,
            report.records,
            report.pages,
            report.checkpoints,
            report.findings.len()
        );
        Ok(Answer { text, bad: !report.findings.is_empty(), json: json!(report) })
    }
}
