//! Writing the log: what has been queued while one group was written and synced is the next one.
//!
//! One at a time commits: a thread that does nothing else, or somebody who queued something when all was idle and waits for it,
//! or for whom somebody waits.

use std::collections::BTreeSet;
use std::sync::MutexGuard;
use std::time::{Duration, Instant};

use super::frame::{self, Head, Kind};
use super::live::Use;
use super::queue::{Call, Group, Inner, What, wait, wait_for};
use super::stream::{Place, Stream};
use super::{Failure, Shared, gc, lock};
use crate::state::State;
use crate::{Durability, Error};

/// How often a group that found no space is tried again.
const AGAIN: Duration = Duration::from_millis(50);
/// Who waits for a record does not commit it after a group that took longer.
const QUICK: Duration = Duration::from_millis(20);

/// What whoever commits works with.
#[derive(Debug)]
pub(super) struct Committer {
    stream: Stream,
    /// The control state at the end of what is written.
    state: State,
    /// Units with batches since the segment began.
    touched: BTreeSet<u64>,
}

/// What there is to do for the thread.
enum Work {
    Group(Group, u64),
    /// The log is idle.
    Mark,
    End,
}

impl Shared {
    /// Commits what nobody commits who waits for it, and marks an idle log, until the end.
    pub(super) fn commit_in_background(&self) {
        loop {
            match self.next() {
                Work::Group(group, number) => self.commit(group, number),
                Work::Mark => self.mark(),
                Work::End => break,
            }
        }
        let mut committer = lock(&self.committer);
        // A clean close says that all there is was synced, marks included.
        let closing = self.queue.lock().failed.is_none();
        if closing
            && !committer.stream.is_durable()
            && let Err(failure) = committer.stream.sync()
        {
            self.queue.fail(failure.poison(&self.name));
        }
        self.queue.lock().end = (committer.stream.number(), committer.stream.end());
    }

    /// Waits for work, and takes over the commit.
    fn next(&self) -> Work {
        let queue = &self.queue;
        let mut inner = queue.lock();
        loop {
            if !inner.committing {
                if inner.failed.is_some() {
                    return Work::End;
                }
                if !inner.pending.entries.is_empty() {
                    inner.idle = false;
                    let (group, number) = queue.take(&mut inner);
                    return Work::Group(group, number);
                }
                if inner.closing {
                    return Work::End;
                }
            }
            (inner.idle, inner.timed) = (true, !inner.marked);
            if inner.marked {
                inner = wait(&queue.work, inner);
                continue;
            }
            let group = inner.group;
            inner = wait_for(&queue.work, inner, self.options.idle);
            let quiet = inner.group == group && inner.pending.entries.is_empty() && !inner.committing;
            if quiet && inner.idle && !inner.closing && inner.failed.is_none() {
                (inner.committing, inner.marked) = (true, true);
                return Work::Mark;
            }
        }
    }

    /// Writes and syncs a group that was taken from the queue, and says so to all who wait.
    fn commit(&self, mut group: Group, number: u64) {
        let mut calls = Vec::new();
        let began = Instant::now();
        let written = lock(&self.committer).write(self, &mut group, &mut calls);
        if let Err(failure) = written {
            return self.failed(&failure);
        }
        let mut inner = self.queue.lock();
        inner.acknowledge(&group.entries, |_| true, &mut calls);
        inner.done = number + 1;
        inner.took = began.elapsed();
        self.queue.committed(inner);
        self.queue.finish(number);
        self.queue.call(&mut calls);
        self.queue.give_back(group);
    }

    /// Waits until a unit's record of `sii` is acknowledged, or the time is over (false).
    pub(super) fn wait_acknowledged(&self, unit: u64, sii: u64, end: Option<Instant>) -> Result<bool, Error> {
        let queue = &self.queue;
        loop {
            let mut inner = queue.lock();
            let Some(live) = inner.live.get(&unit) else { return Err(queue.closed()) };
            if live.acknowledged > sii {
                return Ok(true);
            }
            if let Some((_, group)) = live.queued.iter().find(|(next, _)| *next > sii) {
                let group = *group;
                return self.await_group(inner, group, end);
            }
            queue.not_stopped(&inner)?;
            if is_over(end) {
                return Ok(false);
            }
            // It may come with any group.
            queue.wake(&mut inner);
            let (group, alarms) = (inner.group, inner.alarms);
            drop(inner);
            queue.wait_done(group, alarms, end);
        }
    }

    /// Waits until a group is done, or the time is over (false). One that is queued while nobody commits, and which the
    /// thread was not woken for, is committed here: that saves waking the thread, and being woken by it.
    pub(super) fn await_group<'a>(
        &'a self,
        mut inner: MutexGuard<'a, Inner>,
        group: u64,
        end: Option<Instant>,
    ) -> Result<bool, Error> {
        let queue = &self.queue;
        loop {
            if inner.done > group {
                return Ok(true);
            }
            queue.not_stopped(&inner)?;
            if inner.group == group && may_commit_here(&inner) {
                let (group, number) = queue.take(&mut inner);
                drop(inner);
                self.commit(group, number);
            } else {
                queue.wake(&mut inner);
                let alarms = inner.alarms;
                drop(inner);
                if queue.wait_done(group, alarms, end) {
                    return Ok(true);
                }
                if is_over(end) {
                    return Ok(false);
                }
            }
            inner = queue.lock();
        }
    }

    /// Has what is queued committed: here, if nobody does and it is quick.
    #[cfg(feature = "service")]
    pub(super) fn have_committed(&self) {
        let queue = &self.queue;
        let mut inner = queue.lock();
        if !inner.pending.entries.is_empty() && may_commit_here(&inner) {
            let (group, number) = queue.take(&mut inner);
            drop(inner);
            self.commit(group, number);
        } else {
            queue.wake(&mut inner);
        }
    }

    fn mark(&self) {
        let mut committer = lock(&self.committer);
        if let Err(failure) = committer.mark() {
            return self.failed(&failure);
        }
        let mut inner = self.queue.lock();
        inner.end = (committer.stream.number(), committer.stream.end());
        self.queue.committed(inner);
    }

    fn failed(&self, failure: &Failure) {
        self.queue.fail(failure.poison(&self.name));
        self.queue.committed(self.queue.lock());
    }
}

/// Nobody commits, and the thread was not woken for it. A disk that may take longer than the caller has is for the thread, and
/// so is a new segment.
fn may_commit_here(inner: &Inner) -> bool {
    let fits = inner.end.1 + inner.pending.bytes.len() as u64 <= inner.current_size;
    inner.idle && !inner.committing && !inner.closing && fits && inner.took < QUICK
}

fn is_over(end: Option<Instant>) -> bool {
    end.is_some_and(|end| Instant::now() >= end)
}

impl Committer {
    pub(super) fn new(stream: Stream, state: State) -> Self {
        Self { stream, state, touched: BTreeSet::new() }
    }

    /// Says that all before is durable, and where the units' logs end.
    fn mark(&mut self) -> Result<(), Failure> {
        if !self.stream.is_durable() {
            self.stream.sync()?;
        }
        let ends: Vec<(u64, u64)> =
            self.touched.iter().filter_map(|unit| Some((*unit, self.state.units.get(unit)?.next))).collect();
        let body = postcard::to_stdvec(&ends).expect("plain data can be encoded");
        let mut bytes = Vec::new();
        frame::put(&mut bytes, &Head::new(Kind::Mark, &body), &body);
        if self.stream.fits(bytes.len()) {
            self.stream.write(&mut bytes)?;
        }
        Ok(())
    }

    /// Writes a group, and syncs it if that is wanted.
    fn write(&mut self, shared: &Shared, group: &mut Group, calls: &mut Vec<Call>) -> Result<(), Failure> {
        let queue = &shared.queue;
        if !self.stream.fits(group.bytes.len()) {
            self.rotate(shared, group.bytes.len())?;
        }
        self.stream.write(&mut group.bytes)?;
        let base = self.stream.end() - group.bytes.len() as u64;
        let segment = self.stream.number();
        for entry in &group.entries {
            match &entry.what {
                What::Batch { first, next, moved: None } => {
                    self.state.batch(entry.unit, *first, *next);
                    self.touched.insert(entry.unit);
                }
                What::Batch { .. } => {}
                What::Control(control) => drop(self.state.apply(control)),
            }
        }
        {
            let mut inner = queue.lock();
            for entry in &group.entries {
                inner.written(entry, Place { segment, at: base + entry.at as u64 });
            }
            inner.end = (segment, self.stream.end());
            inner.marked = false;
            inner.current_size = self.stream.size();
            inner.written_bytes += group.bytes.len() as u64;
            if group.sync {
                inner.acknowledge(&group.entries, |d| d != Durability::Disk, calls);
            }
        }
        if group.sync {
            queue.call(calls);
            self.stream.sync()?;
        }
        Ok(())
    }

    /// Begins the next segment; waits for space if there is none.
    fn rotate(&mut self, shared: &Shared, bytes: usize) -> Result<(), Failure> {
        let queue = &shared.queue;
        loop {
            match self.stream.rotate(Some(self.state.clone()), bytes) {
                Err(failure) if failure.full => {
                    let mut inner = queue.lock();
                    inner.full = true;
                    queue.alarm(&mut inner);
                    queue.room.notify_all();
                    let mut calls: Vec<Call> = inner.live.values().filter_map(|l| l.notify.clone()).collect();
                    if inner.closing {
                        return Err(failure);
                    }
                    drop(inner);
                    queue.call(&mut calls);
                    let inner = queue.lock();
                    drop(wait_for(&queue.work, inner, AGAIN));
                }
                other => {
                    other?;
                    break;
                }
            }
        }
        self.touched.clear();
        let mut inner = queue.lock();
        inner.full = false;
        let (number, bytes) = (self.stream.number(), self.stream.size());
        inner.uses.insert(number, Use { bytes, live: 0 });
        if shared.options.background && gc::crowded(&inner.uses, shared.options.segment_bytes_max) {
            inner.crowded = true;
        }
        drop(inner);
        shared.gc_wanted.ask();
        Ok(())
    }
}
