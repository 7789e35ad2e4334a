//! The thread that writes the log: what has been queued while one group was written and synced is the next one.

use std::collections::BTreeSet;
use std::sync::{Arc, Condvar};
use std::time::Duration;

use super::frame::{self, Head, Kind};
use super::live::Use;
use super::queue::{Call, Group, What, call, wait, wait_for};
use super::stream::{Place, Stream};
use super::{Failure, Shared, gc};
use crate::Durability;
use crate::state::State;

/// How often a group that found no space is tried again.
const AGAIN: Duration = Duration::from_millis(50);

/// The thread that writes the log.
#[derive(Debug)]
pub(super) struct Committer {
    shared: Arc<Shared>,
    stream: Stream,
    /// The control state at the end of what is written.
    state: State,
    /// Units with batches since the segment began.
    touched: BTreeSet<u64>,
    marked: bool,
    spare: Group,
}

impl Committer {
    pub(super) fn new(shared: Arc<Shared>, stream: Stream, state: State) -> Self {
        Self { shared, stream, state, touched: BTreeSet::new(), marked: true, spare: Group::default() }
    }

    pub(super) fn run(mut self) {
        while let Some((group, number)) = self.next() {
            match self.commit(group, number) {
                Ok(()) => {}
                Err(failure) => {
                    self.fail(&failure);
                    break;
                }
            }
        }
        // A clean close says that all there is was synced, marks included.
        let closing = self.shared.queue.lock().failed.is_none();
        if closing
            && !self.stream.is_durable()
            && let Err(failure) = self.stream.sync()
        {
            self.fail(&failure);
        }
        let mut inner = self.shared.queue.lock();
        inner.end = (self.stream.number(), self.stream.end());
    }

    /// The next group, when there is one; meanwhile an idle log is marked.
    fn next(&mut self) -> Option<(Group, u64)> {
        let shared = Arc::clone(&self.shared);
        let queue = &shared.queue;
        let mut inner = queue.lock();
        loop {
            if !inner.pending.entries.is_empty() && inner.failed.is_none() {
                inner.idle = false;
                let number = inner.group;
                inner.group += 1;
                let group = std::mem::replace(&mut inner.pending, std::mem::take(&mut self.spare));
                if inner.waiting_for_room > 0 {
                    queue.room.notify_all();
                }
                return Some((group, number));
            }
            if inner.closing || inner.failed.is_some() {
                return None;
            }
            inner.idle = true;
            if self.marked {
                inner = wait(&queue.work, inner);
            } else {
                inner = wait_for(&queue.work, inner, shared.options.idle);
                if inner.idle && inner.pending.entries.is_empty() && !inner.closing {
                    drop(inner);
                    if let Err(failure) = self.mark() {
                        self.fail(&failure);
                        return None;
                    }
                    inner = queue.lock();
                    inner.end = (self.stream.number(), self.stream.end());
                }
            }
        }
    }

    /// Says that all before is durable, and where the units' logs end.
    fn mark(&mut self) -> Result<(), Failure> {
        self.marked = true;
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

    fn commit(&mut self, mut group: Group, number: u64) -> Result<(), Failure> {
        let shared = Arc::clone(&self.shared);
        let queue = &shared.queue;
        if !self.stream.fits(group.bytes.len()) {
            self.rotate(group.bytes.len())?;
        }
        self.stream.write(&mut group.bytes)?;
        self.marked = false;
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
        let mut calls = Vec::new();
        {
            let mut inner = queue.lock();
            for entry in &group.entries {
                inner.written(entry, Place { segment, at: base + entry.at as u64 });
            }
            inner.end = (segment, self.stream.end());
            inner.current_size = self.stream.size();
            inner.written_bytes += group.bytes.len() as u64;
            if group.sync {
                inner.acknowledge(&group.entries, |d| d != Durability::Disk, &mut calls);
            }
        }
        if group.sync {
            call(&mut calls);
            self.stream.sync()?;
        }
        {
            let mut inner = queue.lock();
            inner.acknowledge(&group.entries, |_| true, &mut calls);
            inner.done = number + 1;
        }
        queue.done[(number % 2) as usize].notify_all();
        call(&mut calls);
        group.entries.clear();
        group.bytes.clear();
        if group.bytes.capacity() > 2 * queue.bytes_max {
            group.bytes = Vec::new();
        }
        group.sync = false;
        self.spare = group;
        Ok(())
    }

    /// Begins the next segment; waits for space if there is none.
    fn rotate(&mut self, bytes: usize) -> Result<(), Failure> {
        let shared = Arc::clone(&self.shared);
        let queue = &shared.queue;
        loop {
            match self.stream.rotate(Some(self.state.clone()), bytes) {
                Err(failure) if failure.full => {
                    let mut inner = queue.lock();
                    inner.full = true;
                    queue.done.iter().for_each(Condvar::notify_all);
                    queue.room.notify_all();
                    let mut calls: Vec<Call> = inner.live.values().filter_map(|l| l.notify.clone()).collect();
                    if inner.closing {
                        return Err(failure);
                    }
                    drop(inner);
                    call(&mut calls);
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

    fn fail(&mut self, failure: &Failure) {
        self.shared.queue.fail(failure.poison(&self.shared.name));
    }
}
