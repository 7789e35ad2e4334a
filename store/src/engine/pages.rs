//! Pages and tables: checkpoints in the pack stream.
//!
//! A *pages* frame holds up to [`FRAME_PAGES`] pages as one zstd frame, preceded by their keys (blake3). A page that is
//! stored is not stored again, whoever has it; one of zeros is not stored at all. A *table* frame is a checkpoint:
//!
//! | bytes | |
//! |---|---|
//! | 8 | number of the table that this one changes, 0 for none |
//! | 4, 4, 4, 4 | number of ranges gone, of ranges of zeros, of pages; bytes of the manifest |
//! | 16 each | ranges gone: first address, address behind |
//! | 16 each | ranges of zeros |
//! | 40 each | pages, ascending: address, key |
//! | | the manifest |

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::ops::Range;
use std::sync::{Arc, Mutex};

use super::commit::Use;
use super::frame::{self, Head, Kind, u32_at, u64_at};
use super::recover::{Key, Loaded, PagePlace};
use super::state::{Control, Needless, Table, Unit};
use super::stream::{Bad, Files, Place, Stream, Which, read_body};
use super::{Failure, Shared, lock};
use crate::{Durability, EachPage, Error, NewCheckpoint, PAGE_BYTES, Page, UnitName};

/// Pages compressed together.
pub(super) const FRAME_PAGES: usize = 16;
/// Changes of changes; the table after that is whole.
pub(super) const DEPTH_MAX: u32 = 32;
/// Level of zstd: the disk is to be slower than the compression.
const ZSTD_LEVEL: i32 = 1;
const PAGE: u64 = PAGE_BYTES as u64;
/// Pages of zeros in a table: 64 GiB. They are ranges there, but not in memory.
const ZERO_PAGES_MAX: u64 = 1 << 24;

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

/// What a table frame holds.
#[derive(Debug, Default)]
pub(super) struct TableBody {
    pub(super) parent: Option<u64>,
    pub(super) gone: Vec<Range<u64>>,
    pub(super) zero: Vec<Range<u64>>,
    pub(super) pages: Vec<(u64, Key)>,
    pub(super) manifest: Vec<u8>,
}

impl TableBody {
    pub(super) fn encode(&self) -> Result<Vec<u8>, Error> {
        let count =
            |n: usize| u32::try_from(n).map_err(|_| Error::invalid("a checkpoint", "more than 4 GiB of one thing"));
        let mut out = self.parent.unwrap_or(0).to_le_bytes().to_vec();
        for n in [self.gone.len(), self.zero.len(), self.pages.len(), self.manifest.len()] {
            out.extend(count(n)?.to_le_bytes());
        }
        for range in self.gone.iter().chain(&self.zero) {
            out.extend(range.start.to_le_bytes());
            out.extend(range.end.to_le_bytes());
        }
        for (address, key) in &self.pages {
            out.extend(address.to_le_bytes());
            out.extend(key);
        }
        out.extend(&self.manifest);
        count(out.len())?;
        Ok(out)
    }

    /// Judges any bytes.
    pub(super) fn decode(b: &[u8]) -> Option<Self> {
        if b.len() < 24 {
            return None;
        }
        let [gone, zero, pages, manifest] = [8, 12, 16, 20].map(|at| u32_at(b, at) as usize);
        let (ranges, rest) = b[24..].split_at_checked(gone.checked_add(zero)?.checked_mul(16)?)?;
        let (table, rest) = rest.split_at_checked(pages.checked_mul(40)?)?;
        if rest.len() != manifest {
            return None;
        }
        let mut all = ranges.as_chunks::<16>().0.iter().map(|r| u64_at(r, 0)..u64_at(r, 8));
        let zero_pages = ranges[gone * 16..]
            .as_chunks::<16>()
            .0
            .iter()
            .try_fold(0u64, |sum, r| sum.checked_add(u64_at(r, 8).checked_sub(u64_at(r, 0))? / PAGE))?;
        if zero_pages > ZERO_PAGES_MAX {
            return None;
        }
        let pages = table.as_chunks::<40>().0.iter().map(|e| (u64_at(e, 0), e[8..].try_into().expect("32 bytes")));
        Some(Self {
            parent: Some(u64_at(b, 0)).filter(|id| *id != 0),
            gone: all.by_ref().take(gone).collect(),
            zero: all.collect(),
            pages: pages.collect(),
            manifest: rest.to_vec(),
        })
    }

    /// Applies this table to what it changes; `None` is a page of zeros.
    pub(super) fn apply(&self, range: &Range<u64>, to: &mut BTreeMap<u64, Option<Key>>) {
        let clip = |r: &Range<u64>| r.start.max(range.start)..r.end.min(range.end);
        for gone in self.gone.iter().map(clip).filter(|r| r.start < r.end) {
            let mut tail = to.split_off(&gone.start);
            to.append(&mut tail.split_off(&gone.end));
        }
        for zero in self.zero.iter().map(clip).filter(|r| r.start < r.end) {
            to.extend((zero.start.div_ceil(PAGE)..zero.end.div_ceil(PAGE)).map(|n| (n * PAGE, None)));
        }
        let from = self.pages.partition_point(|(a, _)| *a < range.start);
        to.extend(self.pages[from..].iter().take_while(|(a, _)| *a < range.end).map(|(a, key)| (*a, Some(*key))));
    }
}

/// Adds an address to ranges that ascend.
fn push_range(ranges: &mut Vec<Range<u64>>, address: u64) {
    match ranges.last_mut() {
        Some(last) if last.end == address => last.end += PAGE,
        _ => ranges.push(address..address + PAGE),
    }
}

/// The pages of a frame's body.
pub(super) fn unpack(head: &Head, body: &[u8]) -> Option<Vec<u8>> {
    let count = head.count as usize;
    let (_, data) = body.split_at_checked(count.checked_mul(32)?)?;
    let bytes = zstd::bulk::decompress(data, count.checked_mul(PAGE_BYTES)?).ok()?;
    (bytes.len() == count * PAGE_BYTES).then_some(bytes)
}

/// A frame of pages.
fn pack(pages: &[(Key, Page)]) -> std::io::Result<Vec<u8>> {
    let raw: Vec<u8> = pages.iter().flat_map(|(_, page)| page).copied().collect();
    let mut body: Vec<u8> = pages.iter().flat_map(|(key, _)| key).copied().collect();
    let keys_crc = frame::body_crc(&body);
    body.extend(zstd::bulk::compress(&raw, ZSTD_LEVEL)?);
    let mut head = Head::new(Kind::Pages, &body);
    head.count = u32::try_from(pages.len()).expect("few");
    head.keys_crc = keys_crc;
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
        let pages = if head.kind == Kind::Pages { unpack(&head, &body) } else { None };
        let what = "the compression of pages".to_owned();
        pages.ok_or_else(|| Error::Damaged { file: Which::file_name(place.segment), offset: place.at, what })
    }

    /// Writes one frame.
    pub(super) fn write(&self, mut frame: Vec<u8>) -> Result<Place, Failure> {
        let mut stream = lock(&self.stream);
        if !stream.fits(frame.len()) {
            stream.rotate(None, frame.len())?;
            let (number, bytes) = (stream.number(), stream.size());
            lock(&self.index).uses.insert(number, Use { bytes, live: 0 });
        }
        let at = stream.write(&mut frame)?;
        Ok(Place { segment: stream.number(), at: at[0] })
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
        let frame = pack(pages).map_err(|e| Failure::new("compress", "pages", &e))?;
        let bytes = frame.len() as u64;
        let place = self.write(frame)?;
        let mut index = lock(&self.index);
        let share = u32::try_from(bytes / pages.len().max(1) as u64).expect("a frame is small");
        for (slot, (key, _)) in pages.iter().enumerate() {
            let slot = u16::try_from(slot).expect("few");
            // Somebody else may have stored it meanwhile.
            index.keys.entry(*key).or_insert(PagePlace { place, slot, share, refs: 0 });
            index.hold(key);
        }
        Ok(bytes)
    }

    /// Writes pages again that are stored elsewhere, and has them found here.
    pub(super) fn move_pages(&self, pages: &[(Key, Page)], from: u64) -> Result<u64, Failure> {
        let frame = pack(pages).map_err(|e| Failure::new("compress", "pages", &e))?;
        let bytes = frame.len() as u64;
        let place = self.write(frame)?;
        let index = &mut *lock(&self.index);
        let share = u32::try_from(bytes / pages.len().max(1) as u64).expect("a frame is small");
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
        Ok(bytes)
    }
}

/// Pages on their way into the pack.
struct Writer<'a> {
    shared: &'a Shared,
    table: TableBody,
    pending: Vec<(Key, Page)>,
    /// References taken, to be given back if the checkpoint is not published.
    held: Vec<Key>,
    bytes: u64,
}

impl Writer<'_> {
    fn put(&mut self, address: u64, page: &Page) -> Result<(), Error> {
        if !address.is_multiple_of(PAGE) || address.checked_add(PAGE).is_none() {
            return Err(Error::invalid(format!("page address {address:#x}"), "it must be a multiple of 4096"));
        }
        if page.iter().all(|b| *b == 0) {
            if self.table.zero.len() as u64 == ZERO_PAGES_MAX {
                let why = "more than 64 GiB of zero pages; leave out what was never written";
                return Err(Error::invalid("a checkpoint", why));
            }
            self.table.zero.push(address..address + PAGE);
            return Ok(());
        }
        let key: Key = *blake3::hash(page).as_bytes();
        self.table.pages.push((address, key));
        if self.pending.iter().any(|(k, _)| *k == key) {
            self.flush()?;
        }
        if lock(&self.shared.pack.index).hold(&key) {
            self.held.push(key);
            return Ok(());
        }
        self.pending.push((key, *page));
        if self.pending.len() == FRAME_PAGES { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<(), Error> {
        if self.pending.is_empty() {
            return Ok(());
        }
        self.bytes += self.shared.pack.write_pages(&self.pending).map_err(|f| self.shared.pack_failed(&f))?;
        self.held.extend(self.pending.drain(..).map(|(key, _)| key));
        Ok(())
    }
}

impl Drop for Writer<'_> {
    fn drop(&mut self) {
        let mut index = lock(&self.shared.pack.index);
        for key in self.held.drain(..) {
            index.let_go(&key);
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
        let table = TableBody { manifest: new.manifest.to_vec(), gone: new.gone.to_vec(), ..TableBody::default() };
        let mut writer = Writer { shared: self, table, pending: Vec::new(), held: Vec::new(), bytes: 0 };
        new.pages.each(&mut |address, page| writer.put(address, page))?;
        writer.flush()?;
        writer.table.pages.sort_unstable_by_key(|(address, _)| *address);
        let mut zero: Vec<u64> = writer.table.zero.drain(..).map(|r| r.start).collect();
        zero.sort_unstable();
        for address in zero {
            push_range(&mut writer.table.zero, address);
        }
        let twice = writer.table.pages.windows(2).any(|two| two[0].0 == two[1].0);
        if twice {
            return Err(Error::invalid("the pages of a checkpoint", "one address is there twice"));
        }
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
        let everything = 0..u64::MAX;
        let mut all = BTreeMap::new();
        for id in lineage.iter().rev() {
            self.pack.table(*id)?.apply(&everything, &mut all);
        }
        writer.table.apply(&everything, &mut all);
        let own: HashSet<u64> = writer.table.pages.iter().map(|(address, _)| *address).collect();
        writer.table.gone.clear();
        writer.table.zero.clear();
        writer.table.pages.clear();
        let mut index = lock(&self.pack.index);
        for (address, key) in all {
            match key {
                None => push_range(&mut writer.table.zero, address),
                Some(key) => {
                    writer.table.pages.push((address, key));
                    if !own.contains(&address) && index.hold(&key) {
                        writer.held.push(key);
                    }
                }
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
        let place = self.pack.write(frame).map_err(|f| self.pack_failed(&f))?;
        if durability == Durability::Disk {
            self.pack.sync().map_err(|f| self.pack_failed(&f))?;
        }
        let stored = writer.bytes + u64::from(bytes);
        let table = Table {
            sii,
            parent: writer.table.parent,
            depth,
            hidden: false,
            pages: writer.table.pages.len() as u64 + zeros(&writer.table.zero),
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
        let (used, limit) = (inner.stored(number), self.options.quota_bytes);
        if limit > 0 && used + stored > limit {
            return Err(Error::Quota { unit: name.to_string(), used, limit });
        }
        lock(&self.pack.index).put_table(id, place, bytes);
        let publication = Control::Publish { unit: number, id, table };
        let (group, needless) = self.queue.control(&mut inner, publication, durability.max(Durability::Cache));
        // From here on it may be published, whatever is reported: its references stay.
        writer.held.clear();
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

fn zeros(ranges: &[Range<u64>]) -> u64 {
    ranges.iter().map(|r| (r.end - r.start) / PAGE).sum()
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_table_is_judged(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Some(table) = TableBody::decode(&bytes) {
                prop_assert_eq!(table.encode().unwrap(), bytes);
            }
        }

        #[test]
        fn tables_come_back(parent in 1u64.., gone in prop::collection::vec(any::<(u64, u64)>(), 0..3), pages in prop::collection::vec(any::<(u64, Key)>(), 0..5), manifest: Vec<u8>) {
            let table = TableBody { parent: Some(parent), gone: gone.iter().map(|(a, b)| *a..*b).collect(), zero: Vec::from_iter(Some(0..8192)), pages, manifest };
            let again = TableBody::decode(&table.encode().unwrap()).unwrap();
            prop_assert_eq!(format!("{table:?}"), format!("{again:?}"));
        }
    }
}
