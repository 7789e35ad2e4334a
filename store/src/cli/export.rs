//! `ftstore export`.
//!
//! The file is a sequence of the frames that the network protocol has, with these messages; it ends with [`Item::End`].

use std::fs::File;
use std::io::{BufWriter, Write};
use std::ops::Range;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{Answer, At};
use crate::net::encode;
use crate::{Error, PAGE_BYTES, UnitName, UnitStore};

/// Options.
#[derive(Debug, clap::Args)]
pub(super) struct Export {
    #[command(flatten)]
    at: At,
    /// The unit
    unit: String,
    /// The file; it must not exist
    file: PathBuf,
}

/// A part of an exported unit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Item {
    /// First: the format, and the unit's name.
    Begin { format: u32, unit: UnitName },
    /// A checkpoint with all its pages; the manifest follows.
    Checkpoint { sii: u64 },
    /// Addresses of pages of the checkpoint before, and whether there is something other than zeros; that follows.
    Pages(Vec<(u64, bool)>),
    /// A batch; its body follows.
    Batch { first: u64, count: u32 },
    /// Last: the events that there are.
    End { log: Range<u64> },
}

/// The format that this program writes.
pub(super) const FORMAT: u32 = 1;
const PAGES_IN_ITEM: usize = 256;

impl Export {
    pub(super) fn run(&self) -> Result<Answer, Error> {
        let name = UnitName::new(&self.unit[..])?;
        let store = self.at.open()?;
        let unit = store.view(&name)?;
        let io = |e: std::io::Error| Error::io("write", &self.file, &e);
        let mut out = BufWriter::new(File::create_new(&self.file).map_err(io)?);
        let written = self.write(&name, &*unit, &mut out);
        if written.is_err() {
            // A part of a unit is of no use, and is in the way of the next attempt.
            let _ = std::fs::remove_file(&self.file);
        }
        written
    }

    fn write(&self, name: &UnitName, unit: &dyn UnitStore, out: &mut BufWriter<File>) -> Result<Answer, Error> {
        let io = |e: std::io::Error| Error::io("write", &self.file, &e);
        let mut put = |item: &Item, bytes: &[u8]| {
            let mut frame = Vec::new();
            encode(&mut frame, item, bytes);
            out.write_all(&frame).map_err(io)
        };
        put(&Item::Begin { format: FORMAT, unit: name.clone() }, &[])?;
        let checkpoints = unit.checkpoints()?;
        for info in &checkpoints {
            put(&Item::Checkpoint { sii: info.sii }, &unit.manifest(info.sii)?)?;
            let (mut pages, mut bytes) = (Vec::new(), Vec::new());
            unit.pages(info.sii, 0..u64::MAX, &mut |address, page| {
                pages.push((address, page.is_some()));
                bytes.extend(page.into_iter().flatten());
                if pages.len() == PAGES_IN_ITEM {
                    put(&Item::Pages(std::mem::take(&mut pages)), &bytes)?;
                    bytes.clear();
                }
                Ok(())
            })?;
            debug_assert!(bytes.len().is_multiple_of(PAGE_BYTES));
            put(&Item::Pages(pages), &bytes)?;
        }
        let log = unit.log()?;
        let mut at = log.start;
        while at < log.end {
            let batches = unit.read(at, 1 << 20)?;
            if batches.is_empty() {
                // Its writer has taken back what was behind.
                break;
            }
            for batch in batches {
                at = batch.next();
                put(&Item::Batch { first: batch.first(), count: batch.count() }, batch.body())?;
            }
        }
        put(&Item::End { log: log.start..at }, &[])?;
        out.flush().map_err(io)?;
        out.get_ref().sync_all().map_err(io)?;
        let text = format!("{name}: events {}..{at}, {} checkpoints\n", log.start, checkpoints.len());
        Ok(Answer { text, json: serde_json::Value::Null, bad: false })
    }
}
