//! `ftstore import`.

use std::cell::RefCell;
use std::fs::File;
use std::io::Read;
use std::path::PathBuf;
use std::time::Duration;

use super::export::{FORMAT, Item};
use super::{Answer, At};
use crate::net::{FRAME_BYTES_MAX, Incoming};
use crate::{Batch, Durability, Error, NewCheckpoint, OpenOptions, PAGE_BYTES, Page, Pages, UnitName, UnitStore};

/// Options.
#[derive(Debug, clap::Args)]
pub(super) struct Import {
    #[command(flatten)]
    at: At,
    /// The file
    file: PathBuf,
    /// Under another name
    #[arg(long, value_name = "NAME")]
    unit: Option<String>,
}

/// Items of a file, with one to be put back.
struct Items {
    path: PathBuf,
    file: File,
    incoming: Incoming,
    back: Option<(Item, Vec<u8>)>,
}

impl Items {
    fn damaged(&self, why: impl std::fmt::Display) -> Error {
        Error::invalid(self.path.display().to_string(), format!("not what `ftstore export` writes: {why}"))
    }

    fn next(&mut self) -> Result<(Item, Vec<u8>), Error> {
        if let Some(item) = self.back.take() {
            return Ok(item);
        }
        let mut buffer = vec![0; 1 << 20];
        loop {
            match self.incoming.next::<Item>(FRAME_BYTES_MAX) {
                Ok(Some(item)) => return Ok(item),
                Ok(None) => {}
                Err(why) => return Err(self.damaged(why)),
            }
            let n = self.file.read(&mut buffer).map_err(|e| Error::io("read", &self.path, &e))?;
            if n == 0 {
                return Err(self.damaged("it ends too early"));
            }
            self.incoming.push(&buffer[..n]);
        }
    }
}

/// The pages that come next in the file.
struct FromFile<'a>(RefCell<&'a mut Items>);

impl Pages for FromFile<'_> {
    fn each(&self, put: &mut dyn FnMut(u64, &Page) -> Result<(), Error>) -> Result<(), Error> {
        let mut items = self.0.borrow_mut();
        loop {
            match items.next()? {
                (Item::Pages(pages), bytes) => {
                    let mut contents = bytes.as_chunks::<PAGE_BYTES>().0.iter();
                    for (address, stored) in pages {
                        let zero = [0; PAGE_BYTES];
                        let page = if stored { contents.next() } else { Some(&zero) };
                        put(address, page.ok_or_else(|| items.damaged("pages are missing"))?)?;
                    }
                }
                other => {
                    items.back = Some(other);
                    return Ok(());
                }
            }
        }
    }
}

impl Import {
    pub(super) fn run(&self) -> Result<Answer, Error> {
        let file = File::open(&self.file).map_err(|e| Error::io("open", &self.file, &e))?;
        let mut items = Items { path: self.file.clone(), file, incoming: Incoming::default(), back: None };
        let (Item::Begin { format, unit }, _) = items.next()? else { return Err(items.damaged("it has no beginning")) };
        if format != FORMAT {
            return Err(Error::Version { what: self.file.display().to_string(), found: format, known: FORMAT });
        }
        let name = self.unit.as_ref().map_or(Ok(unit), UnitName::new)?;
        let store = self.at.store.open()?;
        if store.units()?.iter().any(|u| u.name == name) {
            let why = "the store has it already; remove it with `ftstore rm`, or import it under another name (--unit)";
            return Err(Error::invalid(format!("unit {name}"), why));
        }
        let options =
            OpenOptions { holder: "import".into(), ttl: Duration::from_secs(60), durability: Durability::Disk };
        let unit = store.open(&name, &options)?;
        let stored = fill(&*unit, &mut items);
        unit.release()?;
        if let Err(e) = stored {
            // A part of a unit is of no use.
            store.remove(&name)?;
            return Err(e);
        }
        Ok(Answer { text: format!("{name}: stored\n"), json: serde_json::Value::Null, bad: false })
    }
}

fn fill(unit: &dyn UnitStore, items: &mut Items) -> Result<(), Error> {
    let mut parent = None;
    loop {
        match items.next()? {
            (Item::Checkpoint { sii }, manifest) => {
                let pages = FromFile(RefCell::new(items));
                // Pages that an earlier one has are stored once all the same.
                let new = NewCheckpoint { sii, parent: None, manifest: &manifest, gone: &[], pages: &pages };
                if parent.is_some_and(|p| p >= sii) {
                    return Err(pages.0.borrow().damaged("checkpoints out of order"));
                }
                parent = Some(sii);
                unit.put_checkpoint(&new)?;
            }
            (Item::Batch { first, count }, body) => unit.append(Batch::parse(first, count, body)?)?,
            (Item::End { log }, _) => {
                if log.is_empty() {
                    return unit.truncate_below(log.end);
                }
                return unit.truncate_below(log.start).and_then(|()| unit.wait(log.end - 1, Duration::from_secs(600)));
            }
            (Item::Begin { .. } | Item::Pages(_), _) => return Err(items.damaged("items out of order")),
        }
    }
}
