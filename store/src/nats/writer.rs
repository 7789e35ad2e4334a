//! The writer of a unit: one group is under way, what is appended meanwhile becomes the next.
//!
//! Each message is stored only behind the one that this writer knows to be the last of its subject, so nothing of a writer that
//! has been overtaken is ever stored behind the mark of the one that came after it.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::cluster::{AGAIN, Cluster, PATIENCE};
use super::lock;
use super::log::{Contents, Head, Index};
use crate::watch::Watch;
use crate::{Batch, Error, UnitName};

/// A group that has so many bytes waits for no more.
const GROUP_BYTES: usize = 1 << 20;

/// What a writer has queued, and what is stored.
#[derive(Debug)]
pub(super) struct Writer {
    pub(super) watch: Watch,
    pub(super) index: Mutex<Index>,
    cluster: Arc<Cluster>,
    name: UnitName,
    epoch: u64,
    queue: Mutex<Queue>,
    /// Held while something is stored.
    storing: tokio::sync::Mutex<()>,
}

#[derive(Debug, Default)]
struct Queue {
    batches: VecDeque<Batch>,
    /// Somebody stores them.
    busy: bool,
}

impl Writer {
    /// Begins to write where `index` ends, or at `first` if that is later. Whoever wrote before can do so no more.
    pub(super) async fn start(
        cluster: &Arc<Cluster>,
        name: &UnitName,
        epoch: u64,
        first: u64,
        mut index: Index,
        empty: bool,
    ) -> Result<Self, Error> {
        loop {
            let end = if empty { first } else { index.log(first).end };
            let mark = Head::mark(epoch, end);
            if index.epoch > epoch {
                return Err(Error::Fenced { unit: name.to_string(), epoch, current: index.epoch });
            }
            let subject = cluster.subject("log", name);
            let stored = cluster.publish(&subject, &mark.to_string(), Vec::new(), Some(index.seen), PATIENCE).await?;
            if let Some(sequence) = stored {
                index.take(&mark, sequence, 0);
                let (cluster, name) = (Arc::clone(cluster), name.clone());
                let (watch, index) = (Watch::new(end, end), Mutex::new(index));
                return Ok(Self {
                    watch,
                    index,
                    cluster,
                    name,
                    epoch,
                    queue: Mutex::default(),
                    storing: tokio::sync::Mutex::default(),
                });
            }
            index.refresh(cluster, name).await?;
        }
    }

    /// Queues a batch, which has been admitted.
    pub(super) fn append(self: &Arc<Self>, batch: Batch) {
        let mut queue = lock(&self.queue);
        queue.batches.push_back(batch);
        if !std::mem::replace(&mut queue.busy, true) {
            // It ends by itself when the queue is empty.
            drop(self.cluster.spawn(Arc::clone(self).store_queued()));
        }
    }

    fn next_group(&self) -> Option<Contents> {
        let mut queue = lock(&self.queue);
        let mut contents = Contents::default();
        while let Some(batch) = queue.batches.front()
            && (contents.is_empty() || contents.range().end == batch.first() && contents.len() < GROUP_BYTES)
        {
            contents.push(batch);
            queue.batches.pop_front();
        }
        queue.busy = !contents.is_empty();
        queue.busy.then_some(contents)
    }

    async fn store_queued(self: Arc<Self>) {
        while let Some(contents) = self.next_group() {
            let storing = self.storing.lock().await;
            for (head, part) in contents.parts(self.epoch, self.cluster.part_bytes()) {
                if let Err(error) = self.store(&head, part).await {
                    // Busy for ever: nothing of this writer is stored any more.
                    self.watch.fail(&error, true);
                    return;
                }
            }
            drop(storing);
            self.watch.acknowledge(contents.range().end);
        }
    }

    /// Stores one message, however long that takes.
    async fn store(&self, head: &Head, part: &[u8]) -> Result<(), Error> {
        let subject = self.cluster.subject("log", &self.name);
        loop {
            let after = lock(&self.index).seen;
            match self.cluster.publish(&subject, &head.to_string(), part.to_vec(), Some(after), Duration::MAX).await {
                Ok(Some(sequence)) => {
                    lock(&self.index).take(head, sequence, part.len() as u64);
                    return Ok(());
                }
                Ok(None) => return Err(self.overtaken().await),
                Err(full) if full.is_full() => {
                    self.watch.stuck(&full);
                    tokio::time::sleep(AGAIN).await;
                }
                Err(e) => return Err(e),
            }
        }
    }

    /// Why the last message is not the one that this writer knows.
    async fn overtaken(&self) -> Error {
        match super::entry::load(&self.cluster, &self.name).await {
            Ok(Some(known)) => {
                let (unit, epoch) = (self.name.to_string(), self.epoch);
                Error::Fenced { unit, epoch, current: known.entry.unit.epoch }
            }
            Ok(None) => Error::NoUnit { unit: self.name.to_string() },
            Err(e) => e,
        }
    }

    /// Why nothing can be appended.
    pub(super) fn tell(&self) -> Result<(), Error> {
        self.watch.failure().map_or(Ok(()), |(error, _)| Err(error))
    }

    /// Waits for what is queued.
    pub(super) fn settle(&self) -> Result<(), Error> {
        match self.watch.next() {
            0 => Ok(()),
            next => self.watch.wait(&self.name, next - 1, PATIENCE, &|| self.tell()),
        }
    }

    /// Has the log, of which nothing is queued, end at `end`, if it is longer.
    pub(super) async fn cut(&self, first: u64, end: u64) -> Result<(), Error> {
        let _storing = self.storing.lock().await;
        let log = lock(&self.index).log(first);
        if end < log.end {
            self.store(&Head::mark(self.epoch, end.max(log.start)), &[]).await?;
        }
        self.watch.settled(lock(&self.index).log(first).end);
        Ok(())
    }
}
