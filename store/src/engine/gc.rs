//! Giving space back.
//!
//! A segment without live bytes goes at once. Beyond that files may be twice as large as what is live in them, and two
//! segments more; then what is live in the emptiest segment is written again at the end. What made bytes dead is
//! durable before the segment goes, and what was written again is, too. Who writes waits when this is far behind: at
//! four segments beyond twice what is live.

use std::collections::BTreeMap;
use std::sync::{Condvar, Mutex, PoisonError};

use super::live::Use;
use super::pages::{FrameCache, PackIndex};
use super::recover::Loc;
use super::stream::{Place, Stream, Which};
use super::{Failure, Shared, frame, lock};
use crate::table::{Key, PACK_PAGES};
use crate::{Durability, Error, Page, Reclaimed};

/// Says that there may be something to give back.
#[derive(Debug, Default)]
pub(super) struct Wanted {
    state: Mutex<(bool, bool)>,
    changed: Condvar,
}

impl Wanted {
    pub(super) fn ask(&self) {
        lock(&self.state).0 = true;
        self.changed.notify_one();
    }

    pub(super) fn stop(&self) {
        lock(&self.state).1 = true;
        self.changed.notify_one();
    }

    /// Waits until it is asked for; false at the end.
    fn wait(&self) -> bool {
        let mut state = lock(&self.state);
        while !state.0 && !state.1 {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.0 = false;
        !state.1
    }

    fn stopped(&self) -> bool {
        lock(&self.state).1
    }
}

fn sum(uses: &BTreeMap<u64, Use>) -> Use {
    uses.values().fold(Use::default(), |sum, u| Use { bytes: sum.bytes + u.bytes, live: sum.live + u.live })
}

/// Whether a stream has so much to give back that writers wait for it.
pub(super) fn crowded(uses: &BTreeMap<u64, Use>, segment_max: u64) -> bool {
    let all = sum(uses);
    all.bytes > 2 * all.live + 4 * segment_max
}

/// What a pass looks for in the segments of a stream.
#[derive(Debug)]
struct Search {
    /// Those that were complete when the pass began: each is looked at once, so that it ends.
    before: u64,
    /// Those whose live bytes cannot be read.
    excluded: Vec<u64>,
    segment_max: u64,
    eager: bool,
}

impl Search {
    fn segments<'a>(&self, uses: &'a BTreeMap<u64, Use>) -> impl Iterator<Item = (&'a u64, &'a Use)> {
        uses.range(..self.before).filter(|(n, _)| !self.excluded.contains(n))
    }

    /// The segments without live bytes.
    fn dead(&self, uses: &BTreeMap<u64, Use>) -> Vec<u64> {
        self.segments(uses).filter(|(_, used)| used.live == 0).map(|(n, _)| *n).collect()
    }

    /// The segment to be emptied when there is too much.
    fn emptiest(&self, uses: &BTreeMap<u64, Use>) -> Option<u64> {
        // What is dead in proportion; two never compare as unordered.
        let (number, used) = self.segments(uses).min_by(|(_, a), (_, b)| {
            (u128::from(a.live) * u128::from(b.bytes.max(1))).cmp(&(u128::from(b.live) * u128::from(a.bytes.max(1))))
        })?;
        let all = sum(uses);
        let much = all.bytes > 2 * all.live + 2 * self.segment_max && used.live * 4 < used.bytes * 3;
        (much || (self.eager && used.live * 2 < used.bytes)).then_some(*number)
    }
}

impl Shared {
    pub(super) fn collect_in_background(&self) {
        while self.gc_wanted.wait() {
            // What keeps it from giving space back is met, and told, by those who write.
            let _ = self.collect_garbage(false);
        }
    }

    pub(super) fn space(&self) -> (u64, u64) {
        let (log, pack) = (sum(&self.queue.lock().uses), sum(&lock(&self.pack.index).uses));
        (log.bytes + pack.bytes, log.live + pack.live)
    }

    /// Has writers wait for garbage collection if the pack stream needs it.
    pub(super) fn press(&self) {
        let crowded = crowded(&lock(&self.pack.index).uses, self.options.segment_bytes_max);
        if crowded && self.options.background {
            self.queue.lock().crowded = true;
            self.gc_wanted.ask();
        }
    }

    /// Gives back what can be; `eager` moves what is in half-empty segments.
    pub(super) fn collect_garbage(&self, eager: bool) -> Result<Reclaimed, Error> {
        let _gc = lock(&self.gc);
        // Whoever waits from here on waits for the next pass: it has been asked for.
        let crowded = self.queue.lock().crowded;
        let result = self.pass(eager);
        if crowded {
            self.queue.uncrowd();
        }
        result
    }

    /// Looks once at each segment that is complete.
    fn pass(&self, eager: bool) -> Result<Reclaimed, Error> {
        let mut reclaimed = Reclaimed::default();
        let search =
            |before| Search { before, excluded: Vec::new(), segment_max: self.options.segment_bytes_max, eager };
        let newest = self.queue.lock().uses.keys().next_back().copied().unwrap_or(0);
        let (mut log, mut pack) = (search(newest), search(lock(&self.pack.stream).number()));
        while !self.gc_wanted.stopped() {
            // One flush is enough for all that are dead: what made them so was queued before.
            let mut numbers = log.dead(&self.queue.lock().uses);
            numbers.extend(pack.dead(&lock(&self.pack.index).uses));
            let mut moved = Some(0);
            if numbers.is_empty() {
                let emptiest = log.emptiest(&self.queue.lock().uses);
                let emptiest = emptiest.or_else(|| pack.emptiest(&lock(&self.pack.index).uses));
                let Some(number) = emptiest else { break };
                moved = if Which::Log.has(number) { self.empty_log(number)? } else { self.empty_pack(number)? };
                numbers.push(number);
            }
            self.queue.barrier(Durability::Disk)?;
            reclaimed.moved += moved.unwrap_or(0);
            for number in numbers {
                let freed = if moved.is_some() { self.free(number)? } else { None };
                match freed {
                    Some(bytes) => {
                        reclaimed.bytes += bytes;
                        reclaimed.segments += 1;
                    }
                    None if Which::Log.has(number) => log.excluded.push(number),
                    None => pack.excluded.push(number),
                }
            }
        }
        Ok(reclaimed)
    }

    /// Gives a segment back, unless somebody came to need something in it.
    fn free(&self, number: u64) -> Result<Option<u64>, Error> {
        let files = if Which::Log.has(number) {
            let mut inner = self.queue.lock();
            if inner.uses.get(&number).is_some_and(|u| u.live > 0) {
                return Ok(None);
            }
            inner.uses.remove(&number);
            &self.log_files
        } else {
            let mut index = lock(&self.pack.index);
            if index.uses.get(&number).is_some_and(|u| u.live > 0) {
                return Ok(None);
            }
            index.uses.remove(&number);
            index.keys.retain(|_, page| page.place.segment != number);
            &self.pack.files
        };
        let freed = Stream::free(&*self.disk, &self.spares, files, number);
        freed.map(Some).map_err(|f: Failure| f.error(&self.name))
    }

    /// Writes the live batches of a log segment again; `None` if one cannot be read.
    fn empty_log(&self, number: u64) -> Result<Option<u64>, Error> {
        let mut batches: Vec<(u64, u64, Loc)> = Vec::new();
        let units: Vec<u64> = {
            let inner = self.queue.lock();
            if inner.uses.get(&number).is_none_or(|used| used.live == 0) {
                return Ok(Some(0));
            }
            inner.live.keys().copied().collect()
        };
        // One unit at a time, so that appending does not wait for long. Nothing new comes into an old segment.
        for unit in units {
            let inner = self.queue.lock();
            let there = inner.live.get(&unit).into_iter().flat_map(|live| &live.index);
            let there = there.filter(|(_, loc)| loc.place.segment == number);
            batches.extend(there.map(|(first, loc)| (unit, *first, *loc)));
        }
        batches.sort_by_key(|(_, _, loc)| loc.place);
        let (mut moved, mut readable) = (0, true);
        for (unit, first, loc) in batches {
            match self.read_batch(loc) {
                Ok(batch) if batch.first() == first => {
                    if self.queue.move_batch(unit, first, loc.place, batch)? {
                        moved += u64::from(loc.bytes);
                    }
                }
                _ => readable = false,
            }
        }
        Ok(readable.then_some(moved))
    }

    /// Writes the live pages and tables of a pack segment again; `None` if one cannot be read.
    fn empty_pack(&self, number: u64) -> Result<Option<u64>, Error> {
        let failed = |f: Failure| self.pack_failed(&f);
        let (mut keys, tables): (Vec<(Place, Key)>, Vec<u64>) = {
            let index = lock(&self.pack.index);
            let keys = index.keys.iter().filter(|(_, p)| p.place.segment == number && p.refs > 0);
            let tables = index.tables.iter().filter(|(_, (place, _))| place.segment == number);
            (keys.map(|(key, p)| (p.place, *key)).collect(), tables.map(|(id, _)| *id).collect())
        };
        keys.sort_unstable();
        let mut moved = 0;
        let mut cache = FrameCache::default();
        for part in keys.chunks(PACK_PAGES) {
            let read = |(_, key): &(Place, Key)| Ok((*key, self.pack.page(key, &mut cache)?));
            let pages: Result<Vec<(Key, Page)>, Error> = part.iter().map(read).collect();
            let Ok(pages) = pages else { return Ok(None) };
            moved += self.pack.move_pages(&pages, number).map_err(failed)?;
        }
        for id in tables {
            let place = lock(&self.pack.index).tables.get(&id).map(|(place, _)| *place);
            let Some(place) = place else { continue };
            let Ok((head, body)) = self.pack.read(place) else { return Ok(None) };
            let mut bytes = Vec::new();
            frame::put(&mut bytes, &head, &body);
            let len = u32::try_from(bytes.len()).expect("as its length");
            let put = |index: &mut PackIndex, to| {
                if index.tables.contains_key(&id) {
                    index.put_table(id, to, len);
                    moved += u64::from(len);
                }
            };
            self.pack.write(bytes, put).map_err(failed)?;
        }
        self.pack.sync().map_err(failed)?;
        Ok(Some(moved))
    }
}
