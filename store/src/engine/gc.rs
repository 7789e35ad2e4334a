//! Giving space back.
//!
//! A segment without live bytes goes at once. Beyond that files may be twice as large as what is live in them, and two
//! segments more; then what is live in the emptiest segment is written again at the end. What made bytes dead is
//! durable before the segment goes, and what was written again is, too.

use std::collections::BTreeMap;
use std::sync::{Condvar, Mutex, PoisonError};

use super::commit::Use;
use super::pages::FrameCache;
use super::recover::Loc;
use super::stream::{Place, Stream};
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

/// The segment to give back next: one that is dead, or, when there is too much, the emptiest.
fn candidate(uses: &BTreeMap<u64, Use>, keep: u64, excluded: &[u64], segment_max: u64, eager: bool) -> Option<u64> {
    let (bytes, live) = uses.values().fold((0, 0), |(b, l), u| (b + u.bytes, l + u.live));
    let others = uses.iter().filter(|(n, _)| **n != keep && !excluded.contains(n));
    // What is dead in proportion; two never compare as unordered.
    let emptiest = others.min_by(|(_, a), (_, b)| {
        (u128::from(a.live) * u128::from(b.bytes.max(1))).cmp(&(u128::from(b.live) * u128::from(a.bytes.max(1))))
    });
    let (number, used) = emptiest?;
    let much = bytes > 2 * live + 2 * segment_max && used.live * 4 < used.bytes * 3;
    (used.live == 0 || much || (eager && used.live * 2 < used.bytes)).then_some(*number)
}

impl Shared {
    pub(super) fn collect_in_background(&self) {
        while self.gc_wanted.wait() {
            // What keeps it from giving space back is met, and told, by those who write.
            let _ = self.collect_garbage(false);
        }
    }

    pub(super) fn space(&self) -> (u64, u64) {
        let log = self.queue.lock().uses.values().fold((0, 0), |(b, l), u| (b + u.bytes, l + u.live));
        let pack = lock(&self.pack.index).uses.values().fold((0, 0), |(b, l), u| (b + u.bytes, l + u.live));
        (log.0 + pack.0, log.1 + pack.1)
    }

    /// Gives back what can be; `eager` moves what is in half-empty segments.
    pub(super) fn collect_garbage(&self, eager: bool) -> Result<Reclaimed, Error> {
        let _gc = lock(&self.gc);
        let mut reclaimed = Reclaimed::default();
        // A segment whose live bytes cannot be read stays.
        let mut excluded = Vec::new();
        let max = self.options.segment_bytes_max;
        // Each segment there is now is looked at once, so that this ends.
        let newest = self.queue.end().0.max(lock(&self.pack.stream).number());
        loop {
            let stopped = self.gc_wanted.stopped();
            let log = {
                let inner = self.queue.lock();
                candidate(&inner.uses, self.queue_segment(&inner), &excluded, max, eager)
            };
            let pack = {
                let current = lock(&self.pack.stream).number();
                candidate(&lock(&self.pack.index).uses, current, &excluded, max, eager)
            };
            let Some(number) = log.or(pack).filter(|n| !stopped && *n <= newest) else { return Ok(reclaimed) };
            let is_log = log == Some(number);
            let moved = if is_log { self.empty_log(number)? } else { self.empty_pack(number)? };
            self.queue.barrier(Durability::Disk)?;
            let freed = if moved.is_some() { self.free(number, is_log)? } else { None };
            let Some(bytes) = freed else {
                excluded.push(number);
                continue;
            };
            reclaimed.moved += moved.unwrap_or(0);
            reclaimed.bytes += bytes;
            reclaimed.segments += 1;
        }
    }

    fn queue_segment(&self, inner: &super::commit::Inner) -> u64 {
        inner.uses.keys().next_back().copied().unwrap_or(0)
    }

    /// Gives a segment back, unless somebody came to need something in it.
    fn free(&self, number: u64, is_log: bool) -> Result<Option<u64>, Error> {
        let files = if is_log {
            let mut inner = self.queue.lock();
            if inner.uses.get(&number).is_some_and(|u| u.live > 0) {
                return Ok(None);
            }
            inner.uses.remove(&number);
            &self.log_files
        } else {
            let mut index = lock(&self.pack.index);
            if index.keys.values().any(|p| p.place.segment == number && p.refs > 0) {
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
            let to = self.pack.write(bytes).map_err(failed)?;
            let mut index = lock(&self.pack.index);
            if index.tables.contains_key(&id) {
                index.put_table(id, to, len);
                moved += u64::from(len);
            }
        }
        self.pack.sync().map_err(failed)?;
        Ok(Some(moved))
    }
}
