//! The queue of what is to be written to the log.
//!
//! Whatever is queued while a group is written and synced becomes the next group. One lock orders everything: the
//! order in which frames are queued is their order in the log.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use super::frame::{self, Head, Kind, MOVED};
use super::live::{Live, Use};
use super::recover::Loaded;
use super::stream::{Place, Stream};
use super::{Options, lease_end, lock};
use crate::state::{Control, Needless, State};
use crate::{Batch, Durability, Error, UnitInfo, UnitName};

pub(super) type Call = Arc<dyn Fn() + Send + Sync>;

/// What room in the queue is wanted for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Purpose {
    Write,
    /// A control record that makes a unit smaller.
    Shrink,
    /// What garbage collection writes again.
    Move,
}

#[derive(Debug)]
pub(super) enum What {
    Batch { first: u64, next: u64, moved: Option<Place> },
    Control(Control),
}

#[derive(Debug)]
pub(super) struct Entry {
    pub(super) unit: u64,
    /// Where its frame begins in the group.
    pub(super) at: usize,
    pub(super) bytes: u32,
    pub(super) durability: Durability,
    pub(super) what: What,
}

/// What is written together.
#[derive(Debug, Default)]
pub(super) struct Group {
    pub(super) bytes: Vec<u8>,
    pub(super) entries: Vec<Entry>,
    pub(super) sync: bool,
}

#[derive(Debug)]
pub(super) struct Inner {
    /// The control state with everything queued.
    pub(super) state: State,
    pub(super) names: HashMap<String, u64>,
    pub(super) live: HashMap<u64, Live>,
    pub(super) uses: BTreeMap<u64, Use>,
    pub(super) pending: Group,
    /// Number of the pending group.
    pub(super) group: u64,
    /// Groups below are done.
    pub(super) done: u64,
    /// Somebody writes and syncs a group.
    pub(super) committing: bool,
    /// The thread waits and has not been woken.
    pub(super) idle: bool,
    /// It will look by itself whether the log is idle.
    pub(super) timed: bool,
    /// The end of the log is marked.
    pub(super) marked: bool,
    /// Times that something happened which those who wait for a group must look at.
    pub(super) alarms: u64,
    /// How long the last group took.
    pub(super) took: Duration,
    /// Buffers for the next group.
    spare: Group,
    /// Nothing is written any more.
    pub(super) failed: Option<Error>,
    /// The group that is being written found no space.
    pub(super) full: bool,
    pub(super) closing: bool,
    /// Threads in [`Queue::room`].
    pub(super) waiting_for_room: usize,
    /// The files are far larger than what is live: who writes waits for the end of the next pass of garbage collection,
    /// which has been asked for.
    pub(super) crowded: bool,
    pub(super) end: (u64, u64),
    pub(super) current_size: u64,
    pub(super) written_bytes: u64,
}

/// The queue.
pub(super) struct Queue {
    name: String,
    pub(super) bytes_max: usize,
    inner: Mutex<Inner>,
    /// There is something to write.
    pub(super) work: Condvar,
    pub(super) room: Condvar,
    /// Called after the calls of a group.
    pub(super) behind: OnceLock<Box<dyn Fn() + Send + Sync>>,
    /// For those who wait for a group: they need not all take the other lock when it is done.
    finished: Mutex<Finished>,
    /// A group of even or of odd number is done.
    done: [Condvar; 2],
}

impl fmt::Debug for Queue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Queue({})", self.name)
    }
}

#[derive(Debug)]
struct Finished {
    /// As in [`Inner`].
    done: u64,
    alarms: u64,
}

pub(super) fn wait<'a, T>(condvar: &Condvar, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
    condvar.wait(guard).unwrap_or_else(PoisonError::into_inner)
}

pub(super) fn wait_for<'a, T>(condvar: &Condvar, guard: MutexGuard<'a, T>, time: Duration) -> MutexGuard<'a, T> {
    condvar.wait_timeout(guard, time).unwrap_or_else(PoisonError::into_inner).0
}

impl Inner {
    pub(super) fn named(&self, name: &UnitName) -> Result<u64, Error> {
        self.names.get(name.as_str()).copied().ok_or_else(|| Error::NoUnit { unit: name.to_string() })
    }

    /// Refuses a writer whose epoch is over.
    pub(super) fn fence(&self, number: u64, name: &UnitName, epoch: u64) -> Result<(), Error> {
        let unit = self.state.units.get(&number).ok_or_else(|| Error::NoUnit { unit: name.to_string() })?;
        if unit.epoch != epoch {
            return Err(Error::Fenced { unit: unit.name.clone(), epoch, current: unit.epoch });
        }
        Ok(())
    }

    /// Refuses while a lease of anybody but `holder` lasts.
    pub(super) fn held(&self, number: u64, holder: Option<&str>) -> Result<(), Error> {
        let Some(unit) = self.state.units.get(&number) else { return Ok(()) };
        let end = self.live.get(&number).and_then(|l| l.lease_end);
        let remaining = end.map_or(Duration::ZERO, |end| end.saturating_duration_since(Instant::now()));
        match &unit.holder {
            Some(other) if Some(other.as_str()) != holder && !remaining.is_zero() => Err(Error::Held {
                unit: unit.name.clone(),
                holder: other.clone(),
                remaining_ms: u64::try_from(remaining.as_millis()).unwrap_or(u64::MAX).max(1),
            }),
            _ => Ok(()),
        }
    }
}

impl Queue {
    pub(super) fn new(loaded: &mut Loaded, stream: &Stream, options: &Options) -> Self {
        let state = loaded.state.clone();
        let names = state.units.iter().map(|(n, u)| (u.name.clone(), *n)).collect();
        let mut inner = Inner {
            names,
            live: HashMap::new(),
            uses: BTreeMap::new(),
            pending: Group::default(),
            group: 1,
            done: 1,
            committing: false,
            idle: false,
            timed: false,
            marked: true,
            alarms: 0,
            took: Duration::ZERO,
            spare: Group::default(),
            failed: None,
            full: false,
            closing: false,
            waiting_for_room: 0,
            crowded: false,
            end: (stream.number(), stream.end()),
            current_size: stream.size(),
            written_bytes: 0,
            state,
        };
        for (number, (file, _)) in &*lock(&stream.files) {
            let bytes = file.len().unwrap_or(0);
            inner.uses.insert(*number, Use { bytes, live: 0 });
        }
        for (number, unit) in &inner.state.units {
            let index = loaded.index.remove(number).unwrap_or_default();
            let mut log_bytes = 0;
            for loc in index.values() {
                log_bytes += u64::from(loc.bytes);
                if let Some(used) = inner.uses.get_mut(&loc.place.segment) {
                    used.live += u64::from(loc.bytes);
                }
            }
            let lease = options.keep_leases && unit.holder.is_some();
            let live = Live {
                index,
                lost: loaded.lost.remove(number).unwrap_or_default(),
                lease_end: lease.then(|| lease_end(Duration::from_millis(unit.ttl_ms))),
                acknowledged: unit.next,
                log_bytes,
                ..Live::default()
            };
            inner.live.insert(*number, live);
        }
        Self {
            name: stream.disk().name(),
            bytes_max: options.queue_bytes_max,
            inner: Mutex::new(inner),
            work: Condvar::new(),
            room: Condvar::new(),
            behind: OnceLock::new(),
            finished: Mutex::new(Finished { done: 1, alarms: 0 }),
            done: [Condvar::new(), Condvar::new()],
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Inner> {
        lock(&self.inner)
    }

    pub(super) fn closed(&self) -> Error {
        Error::Closed { store: self.name.clone() }
    }

    pub(super) fn usable_now(&self, inner: &Inner) -> Result<(), Error> {
        match &inner.failed {
            Some(e) => Err(e.clone()),
            None if inner.closing => Err(self.closed()),
            None => Ok(()),
        }
    }

    pub(super) fn check(&self) -> Result<(), Error> {
        self.usable_now(&self.lock())
    }

    /// Whether everything has been written, also when nothing more is taken.
    pub(super) fn not_failed(&self) -> Result<(), Error> {
        self.lock().failed.clone().map_or(Ok(()), Err)
    }

    pub(super) fn commits(&self) -> (u64, u64) {
        let inner = self.lock();
        (inner.done, inner.written_bytes)
    }

    pub(super) fn end(&self) -> (u64, u64) {
        self.lock().end
    }

    pub(super) fn full(&self) -> Error {
        Error::Full { store: self.name.clone() }
    }

    /// Waits until there is room for so many bytes, and while garbage collection is far behind.
    pub(super) fn room(&self, bytes: usize) -> Result<MutexGuard<'_, Inner>, Error> {
        self.room_for(Purpose::Write, bytes)
    }

    /// Waits until there is room for a control record that makes a unit smaller. On a full disk there is, up to the
    /// queue's limit.
    pub(super) fn room_to_shrink(&self) -> Result<MutexGuard<'_, Inner>, Error> {
        self.room_for(Purpose::Shrink, 0)
    }

    fn room_for(&self, purpose: Purpose, bytes: usize) -> Result<MutexGuard<'_, Inner>, Error> {
        let mut inner = self.lock();
        loop {
            self.usable_now(&inner)?;
            let fits = self.fits(&inner, bytes);
            if inner.full && (purpose != Purpose::Shrink || !fits) {
                return Err(self.full());
            }
            if fits && (!inner.crowded || purpose == Purpose::Move) {
                return Ok(inner);
            }
            inner.waiting_for_room += 1;
            inner = wait(&self.room, inner);
            inner.waiting_for_room -= 1;
        }
    }

    /// Whether the queue takes so many bytes now.
    fn fits(&self, inner: &Inner, bytes: usize) -> bool {
        let queued = inner.pending.bytes.len();
        queued == 0 || queued + bytes <= self.bytes_max
    }

    /// Lets those write who have waited for garbage collection.
    pub(super) fn uncrowd(&self) {
        self.lock().crowded = false;
        self.room.notify_all();
    }

    /// Bytes that can be queued before another segment is needed.
    pub(super) fn left(inner: &Inner) -> u64 {
        inner.current_size.saturating_sub(inner.end.1 + inner.pending.bytes.len() as u64)
    }

    fn push(&self, inner: &mut Inner, head: &Head, body: &[u8], durability: Durability, what: What) -> u64 {
        let at = inner.pending.bytes.len();
        frame::put(&mut inner.pending.bytes, head, body);
        let bytes = u32::try_from(head.frame_bytes()).expect("as its length");
        inner.pending.sync |= durability == Durability::Disk;
        inner.pending.entries.push(Entry { unit: head.unit, at, bytes, durability, what });
        inner.group
    }

    /// Has the thread commit what is queued, if nobody does. Whoever commits looks again afterwards.
    pub(super) fn wake(&self, inner: &mut Inner) {
        if inner.idle && !inner.committing && !inner.pending.entries.is_empty() {
            inner.idle = false;
            self.work.notify_one();
        }
    }

    /// Takes what is queued, to commit it.
    pub(super) fn take(&self, inner: &mut Inner) -> (Group, u64) {
        let number = inner.group;
        inner.group += 1;
        inner.committing = true;
        if inner.waiting_for_room > 0 {
            self.room.notify_all();
        }
        let spare = std::mem::take(&mut inner.spare);
        (std::mem::replace(&mut inner.pending, spare), number)
    }

    /// Whoever has committed does so no more. The thread goes on with what has come meanwhile; if it sleeps for good it is
    /// told that there is something to be marked.
    pub(super) fn committed(&self, mut inner: MutexGuard<'_, Inner>) {
        inner.committing = false;
        let more = !inner.pending.entries.is_empty() || inner.closing || inner.failed.is_some();
        if inner.idle && (more || !inner.timed) {
            inner.idle = false;
            self.work.notify_one();
        }
    }

    /// Keeps the buffers of a group that was committed.
    pub(super) fn give_back(&self, mut group: Group) {
        group.entries.clear();
        group.bytes.clear();
        group.sync = false;
        if group.bytes.capacity() <= 2 * self.bytes_max {
            self.lock().spare = group;
        }
    }

    /// Queues a batch behind what is queued, and says in which group; the caller has checked everything, and sees to it that
    /// somebody commits it.
    pub(super) fn append(
        &self,
        inner: &mut Inner,
        number: u64,
        batch: &Batch,
        crc: u32,
        durability: Durability,
    ) -> u64 {
        let head = Head {
            unit: number,
            first: batch.first(),
            count: batch.count(),
            body_crc: crc,
            ..Head::unchecked(Kind::Batch, batch.body().len())
        };
        let (first, next) = (batch.first(), batch.next());
        let group = self.push(inner, &head, batch.body(), durability, What::Batch { first, next, moved: None });
        inner.state.batch(number, first, next);
        if let Some(live) = inner.live.get_mut(&number) {
            live.log_bytes += head.frame_bytes() as u64;
            live.queued.push_back((next, group));
            if durability == Durability::Memory {
                live.acknowledged = next;
            }
        }
        group
    }

    /// Queues a batch that is at `from` to be written again, if it is still there.
    pub(super) fn move_batch(&self, number: u64, first: u64, from: Place, mut batch: Batch) -> Result<bool, Error> {
        let mut inner = self.room_for(Purpose::Move, batch.body().len())?;
        let loc = inner.live.get(&number).and_then(|l| l.index.get(&first)).copied();
        let Some(loc) = loc.filter(|l| l.place == from) else { return Ok(false) };
        batch.cut(loc.next);
        let mut head = Head::new(Kind::Batch, batch.body());
        (head.flags, head.unit, head.first, head.count) = (MOVED, number, first, batch.count());
        let what = What::Batch { first, next: loc.next, moved: Some(from) };
        self.push(&mut inner, &head, batch.body(), Durability::Cache, what);
        self.wake(&mut inner);
        Ok(true)
    }

    /// Queues a control record and applies it.
    pub(super) fn control(&self, inner: &mut Inner, control: Control, durability: Durability) -> (u64, Needless) {
        let body = postcard::to_stdvec(&control).expect("plain data can be encoded");
        let needless = inner.state.apply(&control);
        let group = self.push(inner, &Head::new(Kind::Control, &body), &body, durability, What::Control(control));
        self.wake(inner);
        (group, needless)
    }

    /// Drops from the index what the control state says is no longer in the log.
    pub(super) fn clip(&self, inner: &mut Inner, unit: u64) {
        inner.clip(unit);
    }

    /// Refuses to wait for what is queued when nothing is written any more, or for now.
    pub(super) fn not_stopped(&self, inner: &Inner) -> Result<(), Error> {
        match &inner.failed {
            Some(e) => Err(e.clone()),
            None if inner.full => Err(self.full()),
            None => Ok(()),
        }
    }

    /// Waits until a group has been written, and synced if it was to be.
    pub(super) fn wait_group<'a>(
        &'a self,
        mut inner: MutexGuard<'a, Inner>,
        group: u64,
    ) -> Result<MutexGuard<'a, Inner>, Error> {
        loop {
            if inner.done > group {
                return Ok(inner);
            }
            self.not_stopped(&inner)?;
            self.wake(&mut inner);
            let alarms = inner.alarms;
            drop(inner);
            self.wait_done(group, alarms, None);
            inner = self.lock();
        }
    }

    /// Waits until a group is done (true), there are more alarms, or the time is over.
    pub(super) fn wait_done(&self, group: u64, alarms: u64, end: Option<Instant>) -> bool {
        let condvar = &self.done[(group % 2) as usize];
        let mut finished = lock(&self.finished);
        loop {
            if finished.done > group {
                return true;
            }
            let left = end.map(|end| end.saturating_duration_since(Instant::now()));
            if finished.alarms != alarms || left.is_some_and(|left| left.is_zero()) {
                return false;
            }
            finished = match left {
                None => wait(condvar, finished),
                Some(left) => wait_for(condvar, finished, left),
            };
        }
    }

    /// Wakes those who wait for a group that is done.
    pub(super) fn finish(&self, group: u64) {
        lock(&self.finished).done = group + 1;
        self.done[(group % 2) as usize].notify_all();
    }

    /// Has all who wait for a group look at what has happened.
    pub(super) fn alarm(&self, inner: &mut Inner) {
        inner.alarms += 1;
        lock(&self.finished).alarms = inner.alarms;
        self.done.iter().for_each(Condvar::notify_all);
    }

    /// Waits until all that is queued has been written, or synced.
    pub(super) fn barrier(&self, durability: Durability) -> Result<(), Error> {
        let mut inner = self.lock();
        self.usable_now(&inner)?;
        let (group, _) = self.control(&mut inner, Control::Nothing, durability);
        self.wait_group(inner, group).map(drop)
    }

    /// Waits until the batches of a unit that are queued now have been written.
    pub(super) fn settle<'a>(
        &'a self,
        mut inner: MutexGuard<'a, Inner>,
        unit: u64,
    ) -> Result<MutexGuard<'a, Inner>, Error> {
        while let Some(&(_, group)) = inner.live.get(&unit).and_then(|l| l.queued.back()) {
            inner = self.wait_group(inner, group)?;
        }
        Ok(inner)
    }

    /// Lets the thread end when it has written what is queued.
    pub(super) fn close(&self) {
        self.lock().closing = true;
        self.work.notify_all();
        self.room.notify_all();
    }

    pub(super) fn units(&self) -> Result<Vec<UnitInfo>, Error> {
        let inner = self.lock();
        let mut infos: Vec<UnitInfo> = inner
            .state
            .units
            .iter()
            .filter_map(|(number, unit)| {
                Some(UnitInfo {
                    name: UnitName::new(unit.name.clone()).ok()?,
                    log: unit.first..unit.next,
                    bytes: inner.stored(*number),
                    checkpoints: unit.checkpoints().into_keys().collect(),
                    epoch: unit.epoch,
                    holder: unit.holder.clone(),
                })
            })
            .collect();
        infos.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(infos)
    }
}

impl Queue {
    /// Calls those who want to know of acknowledgements.
    pub(super) fn call(&self, calls: &mut Vec<Call>) {
        if calls.is_empty() {
            return;
        }
        calls.drain(..).for_each(|call| call());
        if let Some(behind) = self.behind.get() {
            behind();
        }
    }

    /// Nothing is written any more.
    pub(super) fn fail(&self, error: Error) {
        let mut inner = self.lock();
        inner.failed.get_or_insert(error);
        let mut calls: Vec<Call> = inner.live.values().filter_map(|l| l.notify.clone()).collect();
        self.alarm(&mut inner);
        drop(inner);
        self.room.notify_all();
        self.work.notify_all();
        self.call(&mut calls);
    }
}

#[cfg(feature = "service")]
impl Queue {
    pub(super) fn has_room(&self, bytes: usize) -> bool {
        let inner = self.lock();
        !inner.crowded && self.fits(&inner, bytes)
    }
}
