//! Checking everything that is stored.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use super::recover::{Ends, Loaded, load};
use super::stream::{Bad, Bodies, Place, Which, read_body};
use super::{Shared, lock};
use crate::disk::{Disk, DiskFile};
use crate::table::{Key, TableBody, unpack};
use crate::{Durability, Error, Finding, Fsck, PAGE_BYTES};

/// Checks what is on a disk, up to `ends` if it is being written.
pub(super) fn check(disk: &dyn Disk, ends: Option<Ends>) -> Result<Fsck, Error> {
    let mut loaded = load(disk, ends, Bodies::All)?;
    let mut report = Fsck { bytes: loaded.bytes, records: loaded.records, ..Fsck::default() };
    report.findings = std::mem::take(&mut loaded.findings);
    let whole = check_pages(&loaded, &mut report)?;
    for unit in loaded.state.units.values() {
        for (sii, (id, _)) in unit.checkpoints() {
            let mut broken = None;
            for id in unit.lineage(id) {
                match table(&loaded, id) {
                    Ok(table) => {
                        let missing = table.pages.iter().filter(|(_, key)| !whole.contains(key)).count();
                        if missing > 0 {
                            broken = Some(format!("{missing} pages are missing"));
                        }
                    }
                    Err(what) => broken = Some(what),
                }
            }
            match broken {
                None => report.checkpoints += 1,
                Some(what) => report.findings.push(Finding {
                    file: String::new(),
                    offset: 0,
                    what,
                    lost: format!("checkpoint {sii} of unit {}", unit.name),
                }),
            }
        }
    }
    Ok(report)
}

fn file(loaded: &Loaded, place: Place) -> Option<&Arc<dyn DiskFile>> {
    loaded.pack.segments.get(&place.segment).and_then(|(file, _)| file.as_ref())
}

fn table(loaded: &Loaded, id: u64) -> Result<TableBody, String> {
    let place = loaded.tables.get(&id).map(|(place, _)| *place);
    let place = place.ok_or_else(|| format!("table {id} is missing"))?;
    let file = file(loaded, place).ok_or_else(|| format!("table {id} is missing"))?;
    let Ok((_, body)) = read_body(&**file, place) else { return Err(format!("table {id} is damaged")) };
    TableBody::decode(&body).ok_or_else(|| format!("table {id} is damaged"))
}

/// The keys whose pages are there and right.
fn check_pages(loaded: &Loaded, report: &mut Fsck) -> Result<HashSet<Key>, Error> {
    let mut frames: HashMap<Place, Vec<(u16, Key)>> = HashMap::new();
    for (key, page) in &loaded.keys {
        frames.entry(page.place).or_default().push((page.slot, *key));
    }
    let mut frames: Vec<_> = frames.into_iter().collect();
    frames.sort_unstable_by_key(|(place, _)| *place);
    let mut whole = HashSet::new();
    for (place, keys) in frames {
        let name = Which::file_name(place.segment);
        let read = file(loaded, place).map(|file| read_body(&**file, place));
        let raw = match read {
            Some(Ok((head, body))) => unpack(head.count as usize, &body),
            Some(Err(Bad::Io(e))) => return Err(Error::io("read", name, &e)),
            Some(Err(Bad::Damaged(_))) | None => None,
        };
        let mut bad = raw.is_none();
        for (slot, key) in keys {
            let from = usize::from(slot) * PAGE_BYTES;
            let page = raw.as_ref().and_then(|raw| raw.get(from..from + PAGE_BYTES));
            if page.is_some_and(|page| blake3::hash(page).as_bytes() == &key) {
                whole.insert(key);
                report.pages += 1;
            } else {
                bad = true;
            }
        }
        if bad {
            let what = "pages are not what their keys say".to_owned();
            report.findings.push(Finding { file: name, offset: place.at, what, lost: "those pages".to_owned() });
        }
    }
    Ok(whole)
}

impl Shared {
    /// Checks the store while it is used: what is in the files when this begins.
    pub(super) fn fsck(&self) -> Result<Fsck, Error> {
        let _gc = lock(&self.gc);
        // Where the log ends every frame is whole; so is every page that a control record before it names.
        self.queue.barrier(Durability::Cache)?;
        let log = self.queue.end();
        let pack = {
            let stream = lock(&self.pack.stream);
            (stream.number(), stream.end())
        };
        check(&*self.disk, Some(Ends { log, pack }))
    }
}
