//! What is live: where the batches of each unit are, how far they are acknowledged, and how many bytes of each segment are
//! needed.

use std::collections::VecDeque;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use super::queue::{Call, Entry, Inner, What};
use super::recover::{Index, Loc, insert};
use super::stream::Place;
use crate::{Durability, Error, UnitName};

/// What is known of a unit while the store is open, beyond the control state.
#[derive(Default)]
pub(super) struct Live {
    pub(super) index: Index,
    /// Records that damage has taken.
    pub(super) lost: Vec<Range<u64>>,
    pub(super) durability: Option<Durability>,
    pub(super) lease_end: Option<Instant>,
    /// Records below are acknowledged.
    pub(super) acknowledged: u64,
    /// Batches that are queued or being written: SII behind the batch, and group.
    pub(super) queued: VecDeque<(u64, u64)>,
    pub(super) notify: Option<Call>,
    pub(super) log_bytes: u64,
}

impl fmt::Debug for Live {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Live({} batches, acknowledged {})", self.index.len(), self.acknowledged)
    }
}

/// Bytes of a segment, and how many of them are live.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Use {
    pub(super) bytes: u64,
    pub(super) live: u64,
}

impl Inner {
    /// Takes the bytes of batches off their segments.
    pub(super) fn dead(&mut self, unit: u64, locs: impl IntoIterator<Item = Loc>) {
        for loc in locs {
            if let Some(used) = self.uses.get_mut(&loc.place.segment) {
                used.live = used.live.saturating_sub(u64::from(loc.bytes));
            }
            if let Some(live) = self.live.get_mut(&unit) {
                live.log_bytes = live.log_bytes.saturating_sub(u64::from(loc.bytes));
            }
        }
    }

    /// Takes batches that are wholly outside the log out of the index.
    pub(super) fn clip(&mut self, unit: u64) {
        let Some((first, next)) = self.state.units.get(&unit).map(|u| (u.first, u.next)) else { return };
        let Some(live) = self.live.get_mut(&unit) else { return };
        let mut gone = Vec::new();
        while let Some((f, loc)) = live.index.first_key_value().map(|(f, l)| (*f, *l))
            && loc.next <= first
        {
            live.index.remove(&f);
            gone.push(loc);
        }
        while let Some((f, loc)) = live.index.last_key_value().map(|(f, l)| (*f, *l))
            && loc.next > next
        {
            if f >= next {
                live.index.remove(&f);
                gone.push(loc);
            } else if let Some(loc) = live.index.get_mut(&f) {
                loc.next = next;
            }
        }
        live.lost.retain(|lost| lost.end > first);
        self.dead(unit, gone);
    }

    /// Bytes that a unit has stored.
    pub(super) fn stored(&self, unit: u64) -> u64 {
        let tables = self.state.units.get(&unit).map_or(0, |u| u.tables.values().map(|t| t.bytes).sum());
        self.live.get(&unit).map_or(0, |l| l.log_bytes) + tables
    }

    /// Refuses so many bytes more if the unit would then have more than `limit`, which is 0 for none.
    pub(super) fn within(&self, number: u64, name: &UnitName, more: u64, limit: u64) -> Result<(), Error> {
        let used = if limit > 0 { self.stored(number) } else { 0 };
        if limit > 0 && used.saturating_add(more) > limit {
            return Err(Error::Quota { unit: name.to_string(), used, limit });
        }
        Ok(())
    }

    /// Takes note of where a batch is.
    pub(super) fn written(&mut self, entry: &Entry, place: Place) {
        let What::Batch { first, next, moved } = &entry.what else { return };
        let Some(live) = self.live.get_mut(&entry.unit) else { return };
        let loc = Loc { place, bytes: entry.bytes, next: *next };
        let replaced = if let Some(from) = moved {
            let Some(old) = live.index.get_mut(first).filter(|l| l.place == *from) else { return };
            // It may have been cut since it was queued.
            let loc = Loc { next: old.next, ..loc };
            live.log_bytes += u64::from(loc.bytes);
            vec![std::mem::replace(old, loc)]
        } else {
            insert(&mut live.index, *first, loc)
        };
        if let Some(used) = self.uses.get_mut(&place.segment) {
            used.live += u64::from(entry.bytes);
        }
        self.dead(entry.unit, replaced);
        // It may be outside the log by now.
        self.clip(entry.unit);
    }

    pub(super) fn acknowledge(&mut self, entries: &[Entry], which: impl Fn(Durability) -> bool, calls: &mut Vec<Call>) {
        for entry in entries.iter().filter(|e| which(e.durability)) {
            let What::Batch { next, moved: None, .. } = &entry.what else { continue };
            let Some(live) = self.live.get_mut(&entry.unit) else { continue };
            while live.queued.front().is_some_and(|(queued, _)| queued <= next) {
                live.queued.pop_front();
            }
            if live.acknowledged < *next {
                live.acknowledged = *next;
                if let Some(call) = &live.notify
                    && !calls.last().is_some_and(|last| Arc::ptr_eq(last, call))
                {
                    calls.push(Arc::clone(call));
                }
            }
        }
    }
}
