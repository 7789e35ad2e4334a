//! Finding out what is stored. Nothing is changed here; opening a store and `fsck` both begin with it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::ops::Range;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::frame::{self, HEAD_BYTES, Head, Kind, MOVED};
use super::stream::{Bodies, Item, Opening, Place, Which, scan};
use crate::disk::{Disk, DiskFile};
use crate::state::{Control, State};
use crate::table::Key;
use crate::{Error, Finding};

/// The file in which a clean close notes where both streams end.
pub(super) const CLEAN: &str = "clean";
/// The same while it is written.
pub(super) const CLEAN_NEW: &str = "clean-new";

/// Where both streams end: segment and offset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Ends {
    pub(super) log: (u64, u64),
    pub(super) pack: (u64, u64),
}

impl Ends {
    pub(super) fn encode(self) -> Vec<u8> {
        let mut bytes = postcard::to_stdvec(&self).expect("plain data can be encoded");
        let crc = crc32fast::hash(&bytes);
        bytes.extend(crc.to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let (body, crc) = bytes.split_last_chunk::<4>()?;
        (u32::from_le_bytes(*crc) == crc32fast::hash(body)).then(|| postcard::from_bytes(body).ok()).flatten()
    }
}

/// Where a batch is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Loc {
    pub(super) place: Place,
    /// Bytes of the frame.
    pub(super) bytes: u32,
    /// SII behind the last record that counts; the batch may have more.
    pub(super) next: u64,
}

/// Batches of a unit by their first SII. They do not overlap.
pub(super) type Index = BTreeMap<u64, Loc>;

/// Puts a batch that was written later than all others there; gives out what it takes the place of.
pub(super) fn insert(index: &mut Index, first: u64, loc: Loc) -> Vec<Loc> {
    let mut replaced = Vec::new();
    let overlapping: Vec<u64> =
        index.range(..loc.next).rev().take_while(|(_, l)| l.next > first).map(|(f, _)| *f).collect();
    for f in overlapping {
        if f < first {
            if let Some(old) = index.get_mut(&f) {
                old.next = first;
            }
        } else {
            replaced.extend(index.remove(&f));
        }
    }
    index.insert(first, loc);
    replaced
}

/// Where a page is.
#[derive(Clone, Copy, Debug)]
pub(super) struct PagePlace {
    pub(super) place: Place,
    /// Which of the frame's pages.
    pub(super) slot: u16,
    /// Its part of the frame's bytes.
    pub(super) share: u32,
    /// Entries of tables that name it.
    pub(super) refs: u32,
}

/// Where segments end, as far as others say so.
type KnownEnds = BTreeMap<u64, Option<u64>>;

/// One stream as it was found.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// The segments that count: file and end of what is proven.
    pub(super) segments: BTreeMap<u64, (Option<Arc<dyn DiskFile>>, u64)>,
    /// No number up to this one may be used.
    pub(super) highest: u64,
    /// What is behind the proven end of the last segment: offsets and headers. To be written again.
    pub(super) tail: Vec<(u64, Head)>,
    /// Files that do not count.
    pub(super) stray: Vec<String>,
}

/// What is stored.
#[derive(Debug, Default)]
pub(super) struct Loaded {
    pub(super) log: Found,
    pub(super) pack: Found,
    pub(super) state: State,
    /// The control state where the tail of the log begins.
    pub(super) proven_state: State,
    pub(super) index: HashMap<u64, Index>,
    /// Records that cannot be read, by unit.
    pub(super) lost: HashMap<u64, Vec<Range<u64>>>,
    pub(super) keys: HashMap<Key, PagePlace>,
    /// Places of tables and bytes of their frames, by number.
    pub(super) tables: HashMap<u64, (Place, u32)>,
    pub(super) findings: Vec<Finding>,
    /// Why the control state is not to be relied on. It is among the findings.
    pub(super) refused: Option<Finding>,
    pub(super) bytes: u64,
    pub(super) records: u64,
}

fn finding(number: u64, offset: u64, what: &str, lost: String) -> Finding {
    Finding { file: Which::file_name(number), offset, what: what.to_owned(), lost }
}

/// Reads a store. `ends` is known of one that is being written; otherwise the note of a clean close is looked at.
pub(super) fn load(disk: &dyn Disk, ends: Option<Ends>, bodies: Bodies) -> Result<Loaded, Error> {
    let io = |e: io::Error| Error::io("read", disk.name(), &e);
    let mut loaded = Loaded::default();
    let names = disk.list().map_err(io)?;
    let mut ends = ends;
    if ends.is_none() && names.iter().any(|n| n == CLEAN) {
        let file = disk.open(CLEAN).map_err(io)?;
        let mut bytes = vec![0; usize::try_from(file.len().map_err(io)?.min(4096)).expect("small")];
        file.read_at(&mut bytes, 0).map_err(io)?;
        ends = Ends::decode(&bytes);
        if ends.is_none() {
            let what = "the note of a clean close is damaged".to_owned();
            loaded.findings.push(Finding { file: CLEAN.to_owned(), offset: 0, what, lost: String::new() });
        }
    }
    loaded.log(disk, &names, ends.map(|e| e.log)).map_err(io)??;
    loaded.pack(disk, &names, ends.map(|e| e.pack), bodies).map_err(io)??;
    Ok(loaded)
}

/// The first frame of a segment.
fn opening(file: &dyn DiskFile, number: u64) -> io::Result<Option<(Opening, u64)>> {
    let mut found = None;
    let mut head = [0; HEAD_BYTES];
    let got = file.read_at(&mut head, 0)?;
    if let Some(head) = Head::decode(&head[..got], number).filter(|h| h.kind == Kind::Segment) {
        let limit = (head.frame_bytes() as u64).min(file.len()?);
        scan(file, number, limit, Bodies::All, &mut |item| {
            if let Item::Frame { body, .. } = &item
                && let Ok(opening) = postcard::from_bytes(body)
            {
                found = Some((opening, item.to()));
            }
        })?;
    }
    Ok(found)
}

/// What a segment holds, with the end of what is proven if nobody else knows it.
struct Contents {
    items: Vec<Item>,
    proven: u64,
    /// Behind this offset nothing counts.
    end: u64,
}

fn contents(file: &dyn DiskFile, number: u64, known: Option<u64>, bodies: Bodies) -> io::Result<Contents> {
    let len = file.len()?;
    let limit = known.unwrap_or(len).min(len);
    let mut items = Vec::new();
    scan(file, number, limit, if known.is_some() { bodies } else { Bodies::All }, &mut |item| items.push(item))?;
    let mut proven = known.unwrap_or(0);
    for item in &items {
        if let Item::Frame { at, head, .. } = item
            && head.durable <= *at
        {
            proven = proven.max(head.durable);
        }
    }
    // What is not proven counts as far as it is whole.
    let torn = items.iter().find(|i| matches!(i, Item::Bad { .. }) && i.to() > proven);
    let end = torn.map_or(u64::MAX, |bad| bad.at().max(proven));
    let reached = items.last().map_or(0, Item::to);
    if reached < proven {
        items.push(Item::Bad { at: reached, to: proven, head: None });
    }
    items.retain(|item| item.at() < end);
    Ok(Contents { items, proven, end })
}

impl Found {
    /// Which segments there are; those that count are in `segments`, with the ends that are known.
    fn list(
        disk: &dyn Disk,
        which: Which,
        names: &[String],
        end: Option<(u64, u64)>,
    ) -> io::Result<Result<(Self, KnownEnds), Error>> {
        let mut found = Self { highest: which.first_number() - 2, ..Self::default() };
        let mut numbers: BTreeSet<u64> = names.iter().filter_map(|n| which.number(n)).collect();
        found.highest = numbers.last().copied().unwrap_or(found.highest);
        let mut ends = BTreeMap::new();
        while let Some(number) = numbers.pop_last() {
            let file = disk.open(&Which::file_name(number))?;
            let opening = opening(&*file, number)?;
            if let Some((opening, to)) = opening {
                if opening.format != frame::FORMAT {
                    let what = Which::file_name(number);
                    return Ok(Err(Error::Version { what, found: opening.format, known: frame::FORMAT }));
                }
                let known = end.filter(|e| e.0 == number).map(|e| e.1);
                let proven = match known {
                    Some(end) => end,
                    None if opening.again > 0 => contents(&*file, number, None, Bodies::All)?.proven,
                    None => to,
                };
                if proven >= to.saturating_add(opening.again) {
                    ends.insert(number, known);
                    found.segments.insert(number, (Some(file), 0));
                    for (earlier, end) in opening.earlier {
                        if numbers.remove(&earlier) {
                            let file = disk.open(&Which::file_name(earlier))?;
                            ends.insert(earlier, Some(end));
                            found.segments.insert(earlier, (Some(file), 0));
                        }
                    }
                    break;
                }
            } else if contents(&*file, number, end.filter(|e| e.0 == number).map(|e| e.1), Bodies::All)?.proven > 0 {
                // It did count: its opening is damaged, and an older one says what there was before.
                ends.insert(number, end.filter(|e| e.0 == number).map(|e| e.1));
                found.segments.insert(number, (Some(file), 0));
                continue;
            }
            found.stray.push(Which::file_name(number));
        }
        found.stray.extend(numbers.into_iter().map(Which::file_name));
        if let Some((number, _)) = end.filter(|(n, _)| !found.segments.contains_key(n)) {
            // Reported by whoever goes through the segments.
            found.segments.insert(number, (None, 0));
        }
        Ok(Ok((found, ends)))
    }
}

impl Loaded {
    fn log(&mut self, disk: &dyn Disk, names: &[String], end: Option<(u64, u64)>) -> io::Result<Result<(), Error>> {
        let (mut found, ends) = match Found::list(disk, Which::Log, names, end)? {
            Ok(found) => found,
            Err(e) => return Ok(Err(e)),
        };
        let last = found.segments.keys().next_back().copied();
        let mut doubt = Doubt::default();
        if last.is_none() && names.iter().any(|n| n == CLEAN) {
            // A log that was closed had begun.
            doubt.unknown = Some(finding(found.highest, 0, "the log has no beginning", UNITS.into()));
        }
        let mut before = Which::Log.first_number() - 2;
        for (number, (file, proven_end)) in &mut found.segments {
            let Some(file) = file else {
                self.findings.push(finding(*number, 0, "the file is missing", "what was in it is lost".into()));
                (doubt.nameless, doubt.damaged) = (true, true);
                continue;
            };
            // What the segment before it said is lost with that one, unless this one says it again.
            if *number != before + 2 {
                doubt.unknown = Some(finding(*number, 0, "the control state is missing", UNITS.into()));
            }
            before = *number;
            let contents = contents(&**file, *number, ends.get(number).copied().flatten(), Bodies::All)?;
            *proven_end = contents.proven;
            let mut in_tail = false;
            for item in contents.items {
                self.bytes = self.bytes.saturating_add(item.to().saturating_sub(item.at()));
                // The opening says again what is known; it belongs to neither part.
                let opening = matches!(&item, Item::Frame { head, .. } if head.kind == Kind::Segment);
                if item.at() >= contents.proven && !in_tail && !opening {
                    in_tail = true;
                    if Some(*number) == last {
                        self.proven_state = self.state.clone();
                    }
                }
                if let Item::Frame { at, head, .. } = &item
                    && in_tail
                    && Some(*number) == last
                {
                    found.tail.push((*at, *head));
                }
                self.log_item(*number, item, &mut doubt);
            }
            if !in_tail && Some(*number) == last {
                self.proven_state = self.state.clone();
            }
            debug_assert!(contents.end >= contents.proven);
        }
        // Frames of a recovery that was not finished, or of a mark, are no news.
        found.tail.retain(|(_, head)| matches!(head.kind, Kind::Batch | Kind::Control));
        self.log = found;
        if let Some(unknown) = doubt.unknown.take() {
            self.refuse(unknown);
        } else if let (None, Err(what)) = (&self.refused, self.state.check()) {
            self.refuse(finding(before, 0, &what, UNITS.into()));
        }
        self.settle(&doubt);
        Ok(Ok(()))
    }

    /// Has the store not be opened.
    fn refuse(&mut self, finding: Finding) {
        self.findings.push(finding.clone());
        self.refused.get_or_insert(finding);
    }

    /// Takes note of a frame that is whole and contradicts what is known. After damage it may be right for all that; without
    /// any, nothing that is known is to be relied on.
    fn contradicts(&mut self, number: u64, at: u64, what: &str, doubt: &Doubt) {
        match doubt.damaged {
            true => self.findings.push(finding(number, at, what, "its effect".into())),
            false => self.refuse(finding(number, at, what, UNITS.into())),
        }
    }

    fn log_item(&mut self, number: u64, item: Item, doubt: &mut Doubt) {
        match item {
            Item::Frame { at, head, body } => match head.kind {
                Kind::Segment => match postcard::from_bytes(&body) {
                    Ok(Opening { state: Some(state), .. }) => {
                        if let Err(what) = state.check() {
                            self.refuse(finding(number, at, &what, UNITS.into()));
                        }
                        self.state = state;
                        *doubt = Doubt::default();
                    }
                    _ => self.refuse(finding(number, at, "not a control state", UNITS.into())),
                },
                Kind::Batch => {
                    if head.flags & MOVED == 0
                        && let Err(what) = self.state.admits_batch(head.unit, head.first, head.count)
                    {
                        self.contradicts(number, at, &what, doubt);
                    }
                    let next = head.first.saturating_add(u64::from(head.count));
                    let index = self.index.entry(head.unit).or_default();
                    if head.flags & MOVED == 0 {
                        // Whatever was there from here on had been dropped.
                        index.split_off(&head.first);
                        self.state.batch(head.unit, head.first, next);
                        doubt.seen.insert(head.unit);
                    }
                    let place = Place { segment: number, at };
                    let bytes = u32::try_from(head.frame_bytes()).expect("as its length");
                    insert(index, head.first, Loc { place, bytes, next });
                    self.records += u64::from(head.count);
                }
                Kind::Control => match postcard::from_bytes::<Control>(&body) {
                    Ok(control) => match self.state.admits(&control) {
                        Ok(()) => {
                            self.state.apply(&control);
                            if let Control::Create { unit, .. } | Control::Remove { unit } = control {
                                self.index.remove(&unit);
                            }
                        }
                        Err(what) => self.contradicts(number, at, &what, doubt),
                    },
                    Err(_) => self.contradicts(number, at, "not a control record", doubt),
                },
                Kind::Mark => {
                    // It is empty after a recovery, where nothing is in doubt.
                    let ends = if body.is_empty() { Ok(Vec::new()) } else { postcard::from_bytes(&body) };
                    if ends.is_err() {
                        self.contradicts(number, at, "not a mark", doubt);
                    }
                    for (unit, next) in ends.unwrap_or_default() {
                        let known: Option<&mut crate::state::Unit> = self.state.units.get_mut(&unit);
                        let Some(unit) = known.filter(|unit| unit.next != next) else { continue };
                        let what = format!("the log of unit {:?} ends at {}, not at {next}", unit.name, unit.next);
                        unit.next = unit.next.max(next);
                        self.contradicts(number, at, &what, doubt);
                    }
                    *doubt = Doubt { damaged: doubt.damaged, unknown: doubt.unknown.take(), ..Doubt::default() };
                }
                Kind::Pages | Kind::Table => {
                    let what = "a frame of the other stream";
                    self.findings.push(finding(number, at, what, String::new()));
                }
            },
            Item::Bad { at, head: Some(head), .. } if head.kind == Kind::Batch => {
                doubt.damaged = true;
                let next = head.first.saturating_add(u64::from(head.count));
                if head.flags & MOVED == 0 {
                    self.state.batch(head.unit, head.first, next);
                    doubt.seen.insert(head.unit);
                }
                let name = self.state.units.get(&head.unit).map_or("of an unknown number", |u| &u.name);
                let lost = format!("events {} to {} of unit {name}, if they were still needed", head.first, next - 1);
                self.findings.push(finding(number, at, "checksum of a batch", lost));
            }
            Item::Bad { at, head, .. } => {
                let (what, lost) = match head.map(|h| h.kind) {
                    Some(Kind::Segment) => ("checksum of the control state", String::new()),
                    Some(Kind::Mark) => ("checksum of a mark", String::new()),
                    Some(_) => ("checksum of a control record", "a change of its unit, if it was still needed".into()),
                    None => ("not a frame", "what was there, if it was still needed".to_owned()),
                };
                self.findings.push(finding(number, at, what, lost));
                doubt.damaged = true;
                // An opening only repeats what is known.
                if at > 0 && head.is_none() {
                    doubt.nameless = true;
                    doubt.seen.clear();
                }
            }
        }
    }

    /// Compares what is there with what must be.
    fn settle(&mut self, doubt: &Doubt) {
        self.index.retain(|unit, _| self.state.units.contains_key(unit));
        for (number, unit) in &self.state.units {
            let index = self.index.entry(*number).or_default();
            index.retain(|first, loc| *first < unit.next && loc.next > unit.first);
            let mut at = unit.first;
            let mut lost = Vec::new();
            for (first, loc) in index.iter_mut() {
                loc.next = loc.next.min(unit.next);
                if *first > at {
                    lost.push(at..*first);
                }
                at = loc.next;
            }
            if at < unit.next {
                lost.push(at..unit.next);
            }
            if doubt.nameless && !doubt.seen.contains(number) {
                lost.push(unit.next..u64::MAX);
            }
            for range in &lost {
                let to = if range.end == u64::MAX {
                    "the end, if there were any,".into()
                } else {
                    (range.end - 1).to_string()
                };
                let what = format!("the log of unit {} is not whole", unit.name);
                let lost = format!("events {} to {to} are lost", range.start);
                self.findings.push(Finding { file: String::new(), offset: 0, what, lost });
            }
            if !lost.is_empty() {
                self.lost.insert(*number, lost);
            }
        }
    }

    fn pack(
        &mut self,
        disk: &dyn Disk,
        names: &[String],
        end: Option<(u64, u64)>,
        bodies: Bodies,
    ) -> io::Result<Result<(), Error>> {
        let (mut found, ends) = match Found::list(disk, Which::Pack, names, end)? {
            Ok(found) => found,
            Err(e) => return Ok(Err(e)),
        };
        let last = found.segments.keys().next_back().copied();
        for (number, (file, proven_end)) in &mut found.segments {
            let Some(file) = file else {
                self.findings.push(finding(*number, 0, "the file is missing", "pages that were in it".into()));
                continue;
            };
            let contents = contents(&**file, *number, ends.get(number).copied().flatten(), bodies)?;
            *proven_end = contents.proven;
            for item in contents.items {
                self.bytes = self.bytes.saturating_add(item.to().saturating_sub(item.at()));
                match item {
                    Item::Frame { at, head, body } => {
                        if at >= contents.proven && Some(*number) == last {
                            found.tail.push((at, head));
                        }
                        self.pack_frame(Place { segment: *number, at }, &head, &body);
                    }
                    Item::Bad { at, head, .. } => {
                        let (what, lost) = match head.map(|h| h.kind) {
                            Some(Kind::Segment | Kind::Mark) => ("checksum of a header", String::new()),
                            _ => ("checksum of pages", "checkpoints that need them, if any do".to_owned()),
                        };
                        self.findings.push(finding(*number, at, what, lost));
                    }
                }
            }
        }
        found.tail.retain(|(_, head)| matches!(head.kind, Kind::Pages | Kind::Table));
        self.pack = found;
        Ok(Ok(()))
    }

    fn pack_frame(&mut self, place: Place, head: &Head, body: &[u8]) {
        let bytes = u32::try_from(head.frame_bytes()).expect("as its length");
        match head.kind {
            Kind::Table => {
                self.tables.insert(head.first, (place, bytes));
            }
            Kind::Pages => {
                let share = bytes / head.count.max(1);
                for (slot, key) in body.as_chunks::<32>().0.iter().enumerate() {
                    let slot = u16::try_from(slot).unwrap_or(u16::MAX);
                    self.keys.insert(*key, PagePlace { place, slot, share, refs: 0 });
                }
            }
            Kind::Segment | Kind::Batch | Kind::Control | Kind::Mark => {}
        }
    }
}

/// What the control state says.
const UNITS: &str = "which units there are, and where their logs and checkpoints are";

/// What damage since the last full account of the units leaves open.
#[derive(Debug, Default)]
struct Doubt {
    /// Something was damaged, so that what follows may contradict what is known.
    damaged: bool,
    /// The control state is not known at all.
    unknown: Option<Finding>,
    /// Frames of unknown units are gone.
    nameless: bool,
    /// Units with a batch behind that.
    seen: BTreeSet<u64>,
}
