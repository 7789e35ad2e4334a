//! The handle of a unit.

use std::fmt;
use std::ops::Range;
use std::sync::{Arc, MutexGuard};
use std::time::{Duration, Instant};

use super::live::Live;
use super::queue::{Call, Inner, Queue};
use super::recover::Loc;
use super::stream::{Bad, Which, read_body};
use super::{Shared, frame, lease_end, lock};
use crate::state::{Control, effective};
use crate::{
    Batch, CheckpointInfo, Collected, Durability, EachPage, Error, NewCheckpoint, OpenOptions, UnitName, UnitStore,
};

/// A unit that is open.
pub(crate) struct Handle {
    shared: Arc<Shared>,
    name: UnitName,
    number: u64,
    /// 0 for one that only reads.
    epoch: u64,
    options: Option<OpenOptions>,
}

impl fmt::Debug for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Handle({}, epoch {})", self.name, self.epoch)
    }
}

impl Handle {
    pub(super) fn open(shared: &Arc<Shared>, name: &UnitName, options: &OpenOptions) -> Result<Self, Error> {
        options.check()?;
        let mut inner = shared.queue.room(0)?;
        let durability = options.durability.max(Durability::Cache);
        let number = match inner.names.get(name.as_str()) {
            Some(number) => {
                inner.held(*number, Some(&options.holder))?;
                *number
            }
            None => {
                let unit = inner.state.next_id.max(1);
                shared.queue.control(&mut inner, Control::Create { unit, name: name.clone() }, durability);
                inner.names.insert(name.as_str().to_owned(), unit);
                inner.live.insert(unit, Live::default());
                unit
            }
        };
        let epoch = inner.state.units.get(&number).map_or(0, |u| u.epoch).saturating_add(1);
        let ttl_ms = u64::try_from(options.ttl.as_millis()).unwrap_or(u64::MAX);
        let control = Control::Lease { unit: number, epoch, holder: options.holder.clone(), ttl_ms };
        let (group, _) = shared.queue.control(&mut inner, control, durability);
        if let Some(live) = inner.live.get_mut(&number) {
            live.lease_end = Some(lease_end(options.ttl));
            live.durability = Some(options.durability);
            live.notify = None;
        }
        // What an earlier writer has queued is before what this one will read.
        let inner = shared.queue.wait_group(inner, group)?;
        drop(shared.queue.settle(inner, number)?);
        Ok(Self { shared: Arc::clone(shared), name: name.clone(), number, epoch, options: Some(options.clone()) })
    }

    /// Another handle of the writer with this epoch.
    #[cfg(feature = "service")]
    pub(super) fn join(
        shared: &Arc<Shared>,
        name: &UnitName,
        epoch: u64,
        options: &OpenOptions,
    ) -> Result<Self, Error> {
        let inner = shared.queue.lock();
        let number = inner.named(name)?;
        inner.fence(number, name, epoch)?;
        drop(inner);
        Ok(Self { shared: Arc::clone(shared), name: name.clone(), number, epoch, options: Some(options.clone()) })
    }

    pub(super) fn view(shared: &Arc<Shared>, name: &UnitName) -> Result<Self, Error> {
        let number = shared.queue.lock().named(name)?;
        Ok(Self { shared: Arc::clone(shared), name: name.clone(), number, epoch: 0, options: None })
    }

    fn durability(&self) -> Durability {
        self.options.as_ref().map_or(Durability::Cache, |o| o.durability)
    }

    /// Checks that this handle may write, and takes note that its holder lives.
    fn writer(&self, inner: &mut Inner) -> Result<(), Error> {
        let Some(options) = &self.options else { return Err(Error::ReadOnly { unit: self.name.to_string() }) };
        inner.fence(self.number, &self.name, self.epoch)?;
        if let Some(live) = inner.live.get_mut(&self.number) {
            live.lease_end = Some(lease_end(options.ttl));
        }
        Ok(())
    }

    fn extent(&self, inner: &Inner) -> Result<Range<u64>, Error> {
        let unit = inner.state.units.get(&self.number);
        unit.map(|u| u.first..u.next).ok_or_else(|| Error::NoUnit { unit: self.name.to_string() })
    }

    fn acknowledged_in(&self, inner: &Inner) -> Result<u64, Error> {
        let log = self.extent(inner)?;
        let acknowledged = inner.live.get(&self.number).map_or(log.end, |l| l.acknowledged);
        if acknowledged < log.end {
            self.shared.queue.usable_now(inner)?;
            self.shared.queue.not_stopped(inner)?;
        }
        Ok(acknowledged)
    }

    fn timely(&self, sii: u64, timely: bool) -> Result<(), Error> {
        if timely { Ok(()) } else { Err(Error::Timeout { unit: self.name.to_string(), sii }) }
    }

    /// Queues records, and says in which group. The caller sees to it that somebody commits it.
    fn queue(&self, batch: &Batch) -> Result<(MutexGuard<'_, Inner>, u64), Error> {
        batch.check_size()?;
        let crc = frame::body_crc(batch.body());
        let queue = &self.shared.queue;
        let mut inner = queue.room(batch.body().len())?;
        self.writer(&mut inner)?;
        let log = self.extent(&inner)?;
        let fits = if log.is_empty() { batch.first() >= log.end } else { batch.first() == log.end };
        if !fits {
            return Err(Error::OutOfOrder { unit: self.name.to_string(), expected: log.end, got: batch.first() });
        }
        let endless = |l: &&Range<u64>| l.end == u64::MAX;
        if let Some(lost) = inner.live.get(&self.number).and_then(|l| l.lost.iter().find(endless)) {
            return Err(self.lost(lost));
        }
        let bytes = frame::frame_bytes(batch.body().len()) as u64;
        inner.within(self.number, &self.name, bytes, self.shared.options.quota_bytes)?;
        // The last part of a segment is for control records when there is no next one: truncation must be possible.
        if Queue::left(&inner) < bytes + self.shared.options.segment_bytes_first / 8 && self.shared.spares.is_full() {
            return Err(queue.full());
        }
        let group = queue.append(&mut inner, self.number, batch, crc, self.durability());
        Ok((inner, group))
    }

    fn lost(&self, lost: &Range<u64>) -> Error {
        let to = if lost.end == u64::MAX { u64::MAX } else { lost.end - 1 };
        Error::Lost { unit: self.name.to_string(), from: lost.start, to }
    }

    /// Queues a control record that makes this unit smaller.
    fn shrink(&self, inner: &mut Inner, control: Control) -> crate::state::Needless {
        let (_, needless) = self.shared.queue.control(inner, control, Durability::Cache);
        self.shared.queue.clip(inner, self.number);
        needless
    }

    /// The place of the batch that holds a record.
    fn locate(&self, inner: &Inner, from: u64) -> Result<Option<(u64, Loc)>, Error> {
        let log = self.extent(inner)?;
        let live = inner.live.get(&self.number);
        if let Some(lost) = live.and_then(|l| l.lost.iter().find(|lost| lost.contains(&from))) {
            return Err(self.lost(lost));
        }
        if from == log.end {
            return Ok(None);
        }
        let found = live.and_then(|l| l.index.range(..=from).next_back()).filter(|(_, loc)| loc.next > from);
        match found {
            Some((first, loc)) if log.contains(&from) => Ok(Some((*first, *loc))),
            _ => Err(Error::NotStored { unit: self.name.to_string(), wanted: from, first: log.start }),
        }
    }

    /// Reads a batch; `None` if it is elsewhere by now.
    fn read_at(&self, first: u64, loc: Loc) -> Result<Option<Batch>, Error> {
        match self.shared.read_batch(loc) {
            Ok(mut batch) if batch.first() == first => {
                batch.cut(loc.next);
                Ok(Some(batch))
            }
            other => {
                let inner = self.shared.queue.lock();
                let now = inner.live.get(&self.number).and_then(|l| l.index.get(&first));
                if now.is_none_or(|now| now.place != loc.place) {
                    return Ok(None);
                }
                Err(other.err().unwrap_or_else(|| self.shared.damaged(loc, "the batch is another one")))
            }
        }
    }
}

impl Shared {
    pub(super) fn damaged(&self, loc: Loc, what: &str) -> Error {
        let file = format!("{}/{}", self.name, Which::file_name(loc.place.segment));
        Error::Damaged { file, offset: loc.place.at, what: what.to_owned() }
    }

    pub(super) fn read_batch(&self, loc: Loc) -> Result<Batch, Error> {
        let file = lock(&self.log_files).get(&loc.place.segment).map(|(file, _)| Arc::clone(file));
        let Some(file) = file else { return Err(self.damaged(loc, "the file is missing")) };
        let (head, body) = read_body(&*file, loc.place).map_err(|bad| match bad {
            Bad::Io(e) => Error::io("read", Which::file_name(loc.place.segment), &e),
            Bad::Damaged(what) => self.damaged(loc, what),
        })?;
        Batch::parse(head.first, head.count, body).map_err(|_| self.damaged(loc, "lengths of records"))
    }

    /// Removes a unit.
    pub(super) fn remove(&self, name: &UnitName) -> Result<(), Error> {
        let mut inner = self.queue.room(0)?;
        let number = inner.named(name)?;
        inner.held(number, None)?;
        let (group, needless) = self.queue.control(&mut inner, Control::Remove { unit: number }, Durability::Disk);
        inner.names.remove(name.as_str());
        let mut inner = self.queue.wait_group(inner, group)?;
        let gone: Vec<Loc> = inner.live.get(&number).map(|l| l.index.values().copied().collect()).unwrap_or_default();
        inner.dead(number, gone);
        inner.live.remove(&number);
        drop(inner);
        self.forget_tables(&needless);
        self.gc_wanted.ask();
        Ok(())
    }
}

#[cfg(feature = "service")]
impl Handle {
    /// Appends records; the caller will have them committed by [`Handle::have_committed`].
    pub(crate) fn append_for_later(&self, batch: &Batch) -> Result<(), Error> {
        if batch.is_empty() { Ok(()) } else { self.queue(batch).map(drop) }
    }

    /// Has what is queued in the store committed, on this thread if nobody else does and the disk is quick.
    pub(crate) fn have_committed(&self) {
        self.shared.have_committed();
    }

    /// [`UnitStore::acknowledged`] of many units of one store.
    pub(crate) fn acknowledged_all<'a>(handles: impl IntoIterator<Item = &'a Self>) -> Vec<Result<u64, Error>> {
        let mut handles = handles.into_iter().peekable();
        let Some(first) = handles.peek() else { return Vec::new() };
        let inner = first.shared.queue.lock();
        handles.map(|handle| handle.acknowledged_in(&inner)).collect()
    }
}

impl UnitStore for Handle {
    fn epoch(&self) -> u64 {
        self.epoch
    }

    fn log(&self) -> Result<Range<u64>, Error> {
        self.extent(&self.shared.queue.lock())
    }

    fn append(&self, batch: Batch) -> Result<(), Error> {
        if batch.is_empty() {
            return Ok(());
        }
        self.queue(&batch).map(|(mut inner, _)| self.shared.queue.wake(&mut inner))
    }

    fn commit(&self, batch: Batch, timeout: Duration) -> Result<(), Error> {
        if batch.is_empty() {
            return Ok(());
        }
        let end = Instant::now().checked_add(timeout);
        let (mut inner, group) = self.queue(&batch)?;
        if self.durability() == Durability::Memory {
            self.shared.queue.wake(&mut inner);
            return Ok(());
        }
        self.timely(batch.next() - 1, self.shared.await_group(inner, group, end)?)
    }

    fn acknowledged(&self) -> Result<u64, Error> {
        self.acknowledged_in(&self.shared.queue.lock())
    }

    fn wait(&self, sii: u64, timeout: Duration) -> Result<(), Error> {
        let end = Instant::now().checked_add(timeout);
        self.timely(sii, self.shared.wait_acknowledged(self.number, sii, end)?)
    }

    fn notify(&self, call: Box<dyn Fn() + Send + Sync>) {
        let call: Call = Arc::from(call);
        if let Some(live) = self.shared.queue.lock().live.get_mut(&self.number) {
            live.notify = Some(call);
        }
    }

    fn read(&self, from: u64, bytes_max: usize) -> Result<Vec<Batch>, Error> {
        let inner = self.shared.queue.lock();
        drop(self.shared.queue.settle(inner, self.number)?);
        let (mut batches, mut bytes, mut at) = (Vec::new(), 0, from);
        while bytes < bytes_max.max(1) {
            let located = self.locate(&self.shared.queue.lock(), at);
            let (first, loc) = match located {
                Ok(Some(found)) => found,
                Ok(None) => break,
                // What comes before the damage can be read.
                Err(_) if !batches.is_empty() => break,
                Err(e) => return Err(e),
            };
            match self.read_at(first, loc) {
                Ok(Some(batch)) => {
                    bytes += batch.body().len();
                    at = batch.next();
                    batches.push(batch);
                }
                Ok(None) => {}
                Err(_) if !batches.is_empty() => break,
                Err(e) => return Err(e),
            }
        }
        Ok(batches)
    }

    fn truncate_below(&self, sii: u64) -> Result<(), Error> {
        let mut inner = self.shared.queue.room_to_shrink()?;
        self.writer(&mut inner)?;
        if sii <= self.extent(&inner)?.start {
            return Ok(());
        }
        self.shrink(&mut inner, Control::Below { unit: self.number, sii });
        if let Some(live) = inner.live.get_mut(&self.number) {
            live.acknowledged = live.acknowledged.max(sii);
        }
        drop(inner);
        self.shared.gc_wanted.ask();
        Ok(())
    }

    fn truncate_from(&self, sii: u64) -> Result<(), Error> {
        let queue = &self.shared.queue;
        let mut inner = queue.settle(queue.room_to_shrink()?, self.number)?;
        queue.usable_now(&inner)?;
        self.writer(&mut inner)?;
        self.shrink(&mut inner, Control::From { unit: self.number, sii });
        let next = self.extent(&inner)?.end;
        if let Some(live) = inner.live.get_mut(&self.number) {
            live.acknowledged = next;
            live.lost.retain(|lost| lost.start < sii);
            for lost in &mut live.lost {
                lost.end = lost.end.min(sii);
            }
        }
        drop(inner);
        self.shared.gc_wanted.ask();
        Ok(())
    }

    fn collect(&self, recovery: u64, spare: usize) -> Result<Collected, Error> {
        let mut inner = self.shared.queue.room_to_shrink()?;
        self.writer(&mut inner)?;
        let unit = inner.state.units.get(&self.number).ok_or_else(|| Error::NoUnit { unit: self.name.to_string() })?;
        let before = (unit.checkpoints().len() as u64, unit.next.saturating_sub(unit.first));
        let checkpoints: Vec<u64> = unit.checkpoints().into_keys().collect();
        let Some((effective, oldest)) = effective(&checkpoints, recovery, spare) else {
            return Ok(Collected::default());
        };
        let mut needless = crate::state::Needless::default();
        if checkpoints.first() < Some(&oldest) {
            needless = self.shrink(&mut inner, Control::Hide { unit: self.number, below: oldest });
        }
        // Event s begins interval s: those up to the checkpoint's interval are in it.
        let first = self.extent(&inner)?.start;
        let sii = oldest.saturating_add(1).min(self.extent(&inner)?.end);
        if sii > first {
            self.shrink(&mut inner, Control::Below { unit: self.number, sii });
        }
        let log = self.extent(&inner)?;
        let left = inner.state.units.get(&self.number).map_or(0, |u| u.checkpoints().len() as u64);
        drop(inner);
        self.shared.forget_tables(&needless);
        self.shared.gc_wanted.ask();
        Ok(Collected {
            effective: Some(effective),
            checkpoints: before.0 - left,
            records: before.1.saturating_sub(log.end.saturating_sub(log.start)),
        })
    }

    fn put_checkpoint(&self, new: &NewCheckpoint<'_>) -> Result<(), Error> {
        self.shared.press();
        self.writer(&mut *self.shared.queue.room(0)?)?;
        self.shared.put_checkpoint(self.number, &self.name, self.epoch, self.durability(), new)
    }

    fn checkpoints(&self) -> Result<Vec<CheckpointInfo>, Error> {
        let inner = self.shared.queue.lock();
        let unit = inner.state.units.get(&self.number).ok_or_else(|| Error::NoUnit { unit: self.name.to_string() })?;
        let info = |(sii, (_, table)): (u64, (u64, &crate::state::Table))| CheckpointInfo {
            sii,
            pages: table.pages,
            bytes: table.bytes,
        };
        Ok(unit.checkpoints().into_iter().map(info).collect())
    }

    fn manifest(&self, sii: u64) -> Result<Vec<u8>, Error> {
        self.shared.manifest(self.number, &self.name, sii)
    }

    fn pages(&self, sii: u64, range: Range<u64>, each: &mut EachPage<'_>) -> Result<(), Error> {
        self.shared.pages(self.number, &self.name, sii, range, each)
    }

    fn renew(&self) -> Result<(), Error> {
        self.writer(&mut self.shared.queue.lock())
    }

    fn release(&self) -> Result<(), Error> {
        let mut inner = self.shared.queue.room(0)?;
        self.writer(&mut inner)?;
        let durability = self.durability().max(Durability::Cache);
        let (group, _) = self.shared.queue.control(&mut inner, Control::Release { unit: self.number }, durability);
        if let Some(live) = inner.live.get_mut(&self.number) {
            live.lease_end = None;
        }
        self.shared.queue.wait_group(inner, group).map(drop)
    }
}
