//! Pages and tables: checkpoints in the pack stream.
//!
//! A *pages* frame holds up to [`PACK_PAGES`] pages. A page that is stored is not stored again, whoever has it; one of
//! zeros is not stored at all. A *table* frame is a checkpoint.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::ops::Range;
use std::sync::{Arc, Mutex};

use super::frame::{self, Head, Kind};
use super::live::Use;
use super::recover::{Loaded, PagePlace};
use super::stream::{Bad, Files, Place, Stream, Which, read_body};
use super::{Failure, Shared, lock};
use crate::state::{Control, Needless, Table, Unit};
use crate::table::{DEPTH_MAX, Key, PACK_PAGES, TableBody, pack, unpack};
use crate::{Durability, EachPage, Error, NewCheckpoint, PAGE_BYTES, Page, UnitName};

/// The pack stream.
#[derive(Debug)]
pub(super) struct Pack {
    pub(super) stream: Mutex<Stream>,
    pub(super) index: Mutex<PackIndex>,
    pub(super) files: Files,
}

/// Where pages and tables are.
#[derive(Debug, Default)]
pub(super) struct PackIndex {
    pub(super) keys: HashMap<Key, PagePlace>,
    pub(super) tables: HashMap<u64, (Place, u32)>,
    pub(super) uses: BTreeMap<u64, Use>,
}

impl PackIndex {
    /// Counts a reference; false if the page is not stored.
    fn hold(&mut self, key: &Key) -> bool {
        let Some(page) = self.keys.get_mut(key) else { return false };
        page.refs += 1;
        if page.refs == 1
            && let Some(used) = self.uses.get_mut(&page.place.segment)
        {
            used.live += u64::from(page.share);
        }
        true
    }

    fn let_go(&mut self, key: &Key) {
        let Some(page) = self.keys.get_mut(key) else { return };
        page.refs = page.refs.saturating_sub(1);
        if page.refs == 0
            && let Some(used) = self.uses.get_mut(&page.place.segment)
        {
            used.live = used.live.saturating_sub(u64::from(page.share));
        }
    }

    pub(super) fn put_table(&mut self, id: u64, place: Place, bytes: u32) {
        if let Some(used) = self.uses.get_mut(&place.segment) {
            used.live += u64::from(bytes);
        }
        self.forget_table(id);
        self.tables.insert(id, (place, bytes));
    }

    fn forget_table(&mut self, id: u64) {
        if let Some((place, bytes)) = self.tables.remove(&id)
            && let Some(used) = self.uses.get_mut(&place.segment)
        {
            used.live = used.live.saturating_sub(u64::from(bytes));
        }
    }
}

/// A frame of pages.
fn pages_frame(pages: &[(Key, Page)]) -> std::io::Result<Vec<u8>> {
    let body = pack(pages)?;
    let mut head = Head::new(Kind::Pages, &body);
    head.count = u32::try_from(pages.len()).expect("few");
    head.keys_crc = frame::body_crc(&body[..pages.len() * 32]);
    let mut out = Vec::new();
    frame::put(&mut out, &head, &body);
    Ok(out)
}

impl Pack {
    pub(super) fn new(stream: Stream, files: Files, loaded: &mut Loaded) -> Self {
        let mut index = PackIndex { keys: std::mem::take(&mut loaded.keys), ..PackIndex::default() };
        for (number, (file, _)) in &*lock(&files) {
            index.uses.insert(*number, Use { bytes: file.len().unwrap_or(0), live: 0 });
        }
        let known: HashSet<u64> = loaded.state.units.values().flat_map(|u| u.tables.keys().copied()).collect();
        for (id, (place, bytes)) in std::mem::take(&mut loaded.tables) {
            if known.contains(&id) {
                index.put_table(id, place, bytes);
            }
        }
        Self { stream: Mutex::new(stream), index: Mutex::new(index), files }
    }

    pub(super) fn read(&self, place: Place) -> Result<(Head, Vec<u8>), Error> {
        let name = Which::file_name(place.segment);
        let damaged = |what: &str| Error::Damaged { file: name.clone(), offset: place.at, what: what.to_owned() };
        let file = lock(&self.files).get(&place.segment).map(|(file, _)| Arc::clone(file));
        read_body(&*file.ok_or_else(|| damaged("the file is missing"))?, place).map_err(|bad| match bad {
            Bad::Io(e) => Error::io("read", name.clone(), &e),
            Bad::Damaged(what) => damaged(what),
        })
    }

    /// A table; it may be moved meanwhile.
    pub(super) fn table(&self, id: u64) -> Result<TableBody, Error> {
        let find = || lock(&self.index).tables.get(&id).map(|(place, _)| *place);
        loop {
            let missing =
                || Error::Damaged { file: "the pack files".into(), offset: 0, what: format!("table {id} is missing") };
            let place = find().ok_or_else(missing)?;
            match self.read(place) {
                Ok((head, body)) if head.kind == Kind::Table && head.first == id => {
                    let damaged = || Error::Damaged {
                        file: Which::file_name(place.segment),
                        offset: place.at,
                        what: "the lengths in a table".into(),
                    };
                    return TableBody::decode(&body).ok_or_else(damaged);
                }
                _ if find() != Some(place) => {}
                Ok(_) => return Err(missing()),
                Err(e) => return Err(e),
            }
        }
    }

    /// The pages of a frame.
    fn frame(&self, place: Place) -> Result<Vec<u8>, Error> {
        let (head, body) = self.read(place)?;
        let pages = if head.kind == Kind::Pages { unpack(head.count as usize, &body) } else { None };
        let what = "the compression of pages".to_owned();
        pages.ok_or_else(|| Error::Damaged { file: Which::file_name(place.segment), offset: place.at, what })
    }

    /// Writes one frame and puts it into the index. No other is written in between: a segment that is full has nothing in it
    /// that the index does not know.
    pub(super) fn write(&self, mut frame: Vec<u8>, put: impl FnOnce(&mut PackIndex, Place)) -> Result<(), Failure> {
        let mut stream = lock(&self.stream);
        if !stream.fits(frame.len()) {
            stream.rotate(None, frame.len())?;
            let (number, bytes) = (stream.number(), stream.size());
            lock(&self.index).uses.insert(number, Use { bytes, live: 0 });
        }
        let at = stream.write(&mut frame)?;
        put(&mut lock(&self.index), Place { segment: stream.number(), at: at[0] });
        Ok(())
    }

    pub(super) fn sync(&self) -> Result<(), Failure> {
        let mut stream = lock(&self.stream);
        if stream.is_durable() { Ok(()) } else { stream.sync() }
    }

    /// Syncs, and says where the stream ends.
    pub(super) fn close(&self) -> Result<(u64, u64), Error> {
        self.sync().map_err(|f| f.error("the store"))?;
        let stream = lock(&self.stream);
        Ok((stream.number(), stream.end()))
    }

    /// Writes pages that are not stored, and takes a reference to each.
    pub(super) fn write_pages(&self, pages: &[(Key, Page)]) -> Result<u64, Failure> {
        let frame = pages_frame(pages).map_err(|e| Failure::new("compress", "pages", &e))?;
        let bytes = frame.len() as u64;
        let share = u32::try_from(bytes / pages.len().max(1) as u64).expect("a frame is small");
        self.write(frame, |index, place| {
            for (slot, (key, _)) in pages.iter().enumerate() {
                let slot = u16::try_from(slot).expect("few");
                // Somebody else may have stored it meanwhile.
                index.keys.entry(*key).or_insert(PagePlace { place, slot, share, refs: 0 });
                index.hold(key);
            }
        })?;
        Ok(bytes)
    }

    /// Writes pages again that are stored elsewhere, and has them found here.
    pub(super) fn move_pages(&self, pages: &[(Key, Page)], from: u64) -> Result<u64, Failure> {
        let frame = pages_frame(pages).map_err(|e| Failure::new("compress", "pages", &e))?;
        let bytes = frame.len() as u64;
        let share = u32::try_from(bytes / pages.len().max(1) as u64).expect("a frame is small");
        self.write(frame, |index, place| {
            for (slot, (key, _)) in pages.iter().enumerate() {
                let Some(page) = index.keys.get_mut(key).filter(|p| p.place.segment == from) else { continue };
                if page.refs > 0 {
                    if let Some(used) = index.uses.get_mut(&from) {
                        used.live = used.live.saturating_sub(u64::from(page.share));
                    }
                    if let Some(used) = index.uses.get_mut(&place.segment) {
                        used.live += u64::from(share);
                    }
                }
                *page = PagePlace { place, slot: u16::try_from(slot).expect("few"), share, refs: page.refs };
            }
        })?;
        Ok(bytes)
    }
}

/// Pages on their way into the pack.
struct Writer<'a> {
    shared: &'a Shared,
    unit: u64,
    name: &'a UnitName,
    table: TableBody,
    pending: Vec<(Key, Page)>,
    /// References taken, to be given back if the checkpoint is not published.
    held: Vec<Key>,
    /// The table, once it is written; to be forgotten likewise.
    written: Option<u64>,
    bytes: u64,
}

impl Writer<'_> {
    fn put(&mut self, address: u64, page: &Page) -> Result<(), Error> {
        let Some(key) = self.table.put(address, page)? else { return Ok(()) };
        if self.pending.iter().any(|(k, _)| *k == key) {
            self.flush()?;
        }
        if lock(&self.shared.pack.index).hold(&key) {
            self.held.push(key);
            return Ok(());
        }
        self.pending.push((key, *page));
        if self.pending.len() == PACK_PAGES { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<(), Error> {
        if self.pending.is_empty() {
            return Ok(());
        }
        self.bytes += self.shared.pack.write_pages(&self.pending).map_err(|f| self.shared.pack_failed(&f))?;
        self.held.extend(self.pending.drain(..).map(|(key, _)| key));
        // Not only when it is whole: until then it takes the space of others.
        let limit = self.shared.options.quota_bytes;
        self.shared.queue.lock().within(self.unit, self.name, self.bytes, limit)
    }
}

impl Drop for Writer<'_> {
    fn drop(&mut self) {
        let mut index = lock(&self.shared.pack.index);
        for key in self.held.drain(..) {
            index.let_go(&key);
        }
        if let Some(id) = self.written {
            index.forget_table(id);
        }
    }
}

impl Shared {
    /// A full disk is said; after anything else nothing is written any more.
    pub(super) fn pack_failed(&self, failure: &Failure) -> Error {
        if failure.full {
            return failure.error(&self.name);
        }
        let error = failure.poison(&self.name);
        self.queue.fail(error.clone());
        error
    }

    fn unit<T>(
        &self,
        number: u64,
        name: &UnitName,
        ask: impl FnOnce(&Unit) -> Option<T>,
        sii: u64,
    ) -> Result<T, Error> {
        let inner = self.queue.lock();
        let unit = inner.state.units.get(&number).ok_or_else(|| Error::NoUnit { unit: name.to_string() })?;
        ask(unit).ok_or_else(|| Error::NoCheckpoint { unit: name.to_string(), sii })
    }

    pub(super) fn put_checkpoint(
        &self,
        number: u64,
        name: &UnitName,
        epoch: u64,
        durability: Durability,
        new: &NewCheckpoint<'_>,
    ) -> Result<(), Error> {
        let mut parent = None;
        if let Some(sii) = new.parent {
            if sii >= new.sii {
                return Err(Error::invalid(
                    format!("checkpoint {} as parent", sii),
                    "a parent is an earlier checkpoint",
                ));
            }
            let find = |u: &Unit| u.checkpoints().get(&sii).map(|(id, table)| (*id, table.depth, u.lineage(*id)));
            parent = Some(self.unit(number, name, find, sii)?);
        }
        let table = TableBody::new(new);
        let mut writer = Writer {
            shared: self,
            unit: number,
            name,
            table,
            pending: Vec::new(),
            held: Vec::new(),
            written: None,
            bytes: 0,
        };
        new.pages.each(&mut |address, page| writer.put(address, page))?;
        writer.flush()?;
        writer.table.finish()?;
        let mut depth = 0;
        let mut parent_id = None;
        match parent {
            Some((id, below, _)) if below < DEPTH_MAX - 1 => {
                writer.table.parent = Some(id);
                (depth, parent_id) = (below + 1, Some(id));
            }
            Some((id, _, lineage)) => {
                self.make_whole(&mut writer, &lineage)?;
                parent_id = Some(id);
            }
            None => writer.table.gone.clear(),
        }
        self.publish(writer, number, name, epoch, durability, new.sii, parent_id, depth)
    }

    /// Makes a table whole that changes the first of `lineage`.
    fn make_whole(&self, writer: &mut Writer<'_>, lineage: &[u64]) -> Result<(), Error> {
        let mut all = BTreeMap::new();
        for id in lineage.iter().rev() {
            self.pack.table(*id)?.apply(&(0..u64::MAX), &mut all);
        }
        let own: HashSet<u64> = writer.table.pages.iter().map(|(address, _)| *address).collect();
        writer.table.make_whole(all);
        let mut index = lock(&self.pack.index);
        for (address, key) in &writer.table.pages {
            if !own.contains(address) && index.hold(key) {
                writer.held.push(*key);
            }
        }
        Ok(())
    }

    #[expect(clippy::too_many_arguments, reason = "the last step of one function")]
    fn publish(
        &self,
        mut writer: Writer<'_>,
        number: u64,
        name: &UnitName,
        epoch: u64,
        durability: Durability,
        sii: u64,
        parent: Option<u64>,
        depth: u32,
    ) -> Result<(), Error> {
        let body = writer.table.encode()?;
        let id = {
            let mut inner = self.queue.lock();
            inner.state.next_id = inner.state.next_id.max(1) + 1;
            inner.state.next_id - 1
        };
        let mut head = Head::new(Kind::Table, &body);
        (head.unit, head.first) = (number, id);
        let mut frame = Vec::new();
        frame::put(&mut frame, &head, &body);
        let bytes =
            u32::try_from(frame.len()).map_err(|_| Error::invalid("a checkpoint", "its table exceeds 4 GiB"))?;
        let written = self.pack.write(frame, |index, place| index.put_table(id, place, bytes));
        written.map_err(|f| self.pack_failed(&f))?;
        writer.written = Some(id);
        if durability == Durability::Disk {
            self.pack.sync().map_err(|f| self.pack_failed(&f))?;
        }
        let stored = writer.bytes + u64::from(bytes);
        let table = Table {
            sii,
            parent: writer.table.parent,
            depth,
            hidden: false,
            pages: writer.table.page_count(),
            bytes: stored,
        };
        let mut inner = self.queue.room(0)?;
        inner.fence(number, name, epoch)?;
        let unit = inner.state.units.get(&number).ok_or_else(|| Error::NoUnit { unit: name.to_string() })?;
        if let Some(id) = parent
            && !unit.tables.contains_key(&id)
        {
            return Err(Error::NoCheckpoint { unit: name.to_string(), sii });
        }
        inner.within(number, name, stored, self.options.quota_bytes)?;
        let publication = Control::Publish { unit: number, id, table };
        let (group, needless) = self.queue.control(&mut inner, publication, durability.max(Durability::Cache));
        // From here on it may be published, whatever is reported: its references stay.
        writer.held.clear();
        writer.written = None;
        let result = self.queue.wait_group(inner, group).map(drop);
        self.forget_tables(&needless);
        result
    }

    /// Gives back the references of tables that are gone.
    pub(super) fn forget_tables(&self, needless: &Needless) {
        for (_, id) in &needless.tables {
            // One that cannot be read keeps its pages; the next opening counts anew.
            let table = self.pack.table(*id);
            let mut index = lock(&self.pack.index);
            for (_, key) in table.iter().flat_map(|t| &t.pages) {
                index.let_go(key);
            }
            index.forget_table(*id);
        }
    }

    /// Counts the references of all tables; the store has just been opened.
    pub(super) fn count_references(&self) -> Result<(), Error> {
        let tables: Vec<u64> = self.queue.lock().state.units.values().flat_map(|u| u.tables.keys().copied()).collect();
        for id in tables {
            // Damage is met by whoever reads it, and by fsck.
            if let Ok(table) = self.pack.table(id) {
                let mut index = lock(&self.pack.index);
                for (_, key) in &table.pages {
                    index.hold(key);
                }
            }
        }
        Ok(())
    }

    pub(super) fn manifest(&self, number: u64, name: &UnitName, sii: u64) -> Result<Vec<u8>, Error> {
        let id = self.unit(number, name, |u| u.checkpoints().get(&sii).map(|(id, _)| *id), sii)?;
        Ok(self.pack.table(id)?.manifest)
    }

    pub(super) fn pages(
        &self,
        number: u64,
        name: &UnitName,
        sii: u64,
        range: Range<u64>,
        each: &mut EachPage<'_>,
    ) -> Result<(), Error> {
        let lineage = self.unit(number, name, |u| u.checkpoints().get(&sii).map(|(id, _)| u.lineage(*id)), sii)?;
        let mut all = BTreeMap::new();
        for id in lineage.iter().rev() {
            self.pack.table(*id)?.apply(&range, &mut all);
        }
        let mut cache = FrameCache::default();
        for (address, key) in all {
            let page = key.map(|key| self.pack.page(&key, &mut cache)).transpose()?;
            each(address, page.as_ref())?;
        }
        Ok(())
    }
}

/// The frames that were read last: neighbours in memory are often neighbours there.
#[derive(Debug, Default)]
pub(super) struct FrameCache {
    frames: HashMap<Place, Vec<u8>>,
    order: VecDeque<Place>,
}

const CACHED_FRAMES: usize = 64;

impl Pack {
    /// A page by its key. It is compared with the key.
    pub(super) fn page(&self, key: &Key, cache: &mut FrameCache) -> Result<Page, Error> {
        loop {
            let find = || lock(&self.index).keys.get(key).copied();
            let missing =
                || Error::Damaged { file: "the pack files".into(), offset: 0, what: "a page is missing".into() };
            let place = find().ok_or_else(missing)?;
            if !cache.frames.contains_key(&place.place) {
                let frame = match self.frame(place.place) {
                    Ok(frame) => frame,
                    Err(_) if find().is_some_and(|now| now.place != place.place) => continue,
                    Err(e) => return Err(e),
                };
                if cache.order.len() == CACHED_FRAMES
                    && let Some(oldest) = cache.order.pop_front()
                {
                    cache.frames.remove(&oldest);
                }
                cache.order.push_back(place.place);
                cache.frames.insert(place.place, frame);
            }
            let from = usize::from(place.slot) * PAGE_BYTES;
            let page = cache.frames[&place.place].get(from..).and_then(|f| f.first_chunk::<PAGE_BYTES>());
            if let Some(page) = page.filter(|page| blake3::hash(&page[..]).as_bytes() == key) {
                return Ok(*page);
            }
            if find().is_none_or(|now| now.place == place.place) {
                let (file, offset) = (Which::file_name(place.place.segment), place.place.at);
                return Err(Error::Damaged { file, offset, what: "a page does not have its key".into() });
            }
        }
    }
}
