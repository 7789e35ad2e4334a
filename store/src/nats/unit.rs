//! The handle of a unit in a cluster.

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::{StreamExt, TryStreamExt};

use super::checkpoint::{Lineage, Table as Placed, Upload};
use super::cluster::{AT_A_TIME, Cluster};
use super::entry::{self, Entry, Known};
use super::log::{Group, Index, batches};
use super::writer::Writer;
use super::{Shared, lock, sweep};
use crate::state::{Table, effective};
use crate::table::DEPTH_MAX;
use crate::{Batch, CheckpointInfo, Collected, EachPage, Error, NewCheckpoint, UnitName, UnitStore};

/// A unit that is open.
pub(super) struct Handle {
    pub(super) shared: Arc<Shared>,
    pub(super) name: UnitName,
    /// `None` for one that only reads.
    pub(super) writing: Option<Writing>,
    /// What a reader has seen of the log.
    pub(super) seen: Mutex<Index>,
    /// Tables that were read or stored.
    pub(super) tables: Mutex<HashMap<u64, Arc<Placed>>>,
}

/// What a writer has beside what a reader has.
pub(super) struct Writing {
    pub(super) epoch: u64,
    pub(super) writer: Arc<Writer>,
    /// The entry as this writer has stored it last.
    pub(super) known: Mutex<Known>,
    /// The newest sweep that may be under way without the entry saying so; 0 for none.
    pub(super) sweep: u64,
    /// The newest sweep that is known to have ended, and the number of the last table. Held while a checkpoint is stored.
    pub(super) storing: Mutex<(u64, u32)>,
    /// Held from checking the order of an append until it is queued.
    pub(super) sending: Mutex<()>,
}

impl fmt::Debug for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Handle({}, epoch {})", self.name, self.epoch())
    }
}

impl Writing {
    /// Changes the entry. `change` is asked again if it was changed by a sweep, the only one who may.
    fn change<T>(
        &self,
        cluster: &Cluster,
        name: &UnitName,
        mut change: impl FnMut(&mut Entry) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let mut known = lock(&self.known);
        loop {
            let mut entry = known.entry.clone();
            let result = change(&mut entry)?;
            if let Some(sequence) = cluster.block_on(entry::store(cluster, name, &entry, known.sequence))? {
                *known = Known { entry, sequence, time: 0 };
                return Ok(result);
            }
            let now = cluster.block_on(entry::load(cluster, name))?;
            let now = now.ok_or_else(|| Error::NoUnit { unit: name.to_string() })?;
            let current = now.entry.unit.epoch;
            if current != self.epoch {
                return Err(Error::Fenced { unit: name.to_string(), epoch: self.epoch, current });
            }
            *known = now;
        }
    }
}

impl Handle {
    fn cluster(&self) -> &Arc<Cluster> {
        &self.shared.cluster
    }

    fn writing(&self) -> Result<&Writing, Error> {
        self.writing.as_ref().ok_or_else(|| Error::ReadOnly { unit: self.name.to_string() })
    }

    fn change<T>(&self, change: impl FnMut(&mut Entry) -> Result<T, Error>) -> Result<T, Error> {
        self.writing()?.change(self.cluster(), &self.name, change)
    }

    /// The entry as it is now.
    fn entry(&self) -> Result<Entry, Error> {
        let known = self.cluster().block_on(entry::load(self.cluster(), &self.name))?;
        known.map(|known| known.entry).ok_or_else(|| Error::NoUnit { unit: self.name.to_string() })
    }

    /// What is stored of the log. A writer knows, once all that it has queued is stored.
    pub(super) fn index(&self) -> Result<Index, Error> {
        if let Some(writing) = &self.writing {
            writing.writer.settle()?;
            return Ok(lock(&writing.writer.index).clone());
        }
        self.shared.settle(&self.name);
        let mut index = lock(&self.seen);
        self.cluster().block_on(index.refresh(self.cluster(), &self.name))?;
        Ok(index.clone())
    }

    /// Has the cluster forget the events below the start of the log.
    fn purge(&self, first: u64) -> Result<(), Error> {
        let needed = lock(&self.writing()?.writer.index).below(first);
        let subject = self.cluster().subject("log", &self.name);
        self.cluster().block_on(self.cluster().purge(&subject, needed))
    }

    /// The batches of a group. Those that are above its end have been cut off.
    fn read_group(&self, group: &Group) -> Result<Vec<Batch>, Error> {
        let (cluster, lost) =
            (self.cluster(), || Error::Lost { unit: self.name.to_string(), from: group.first, to: group.next - 1 });
        let parts = group.parts.iter().map(|(sequence, crc)| async move {
            let message = cluster.numbered(&cluster.log, *sequence).await?;
            Ok::<_, Error>(message.filter(|m| crc32fast::hash(&m.payload) == *crc))
        });
        let parts = futures_util::stream::iter(parts).buffered(AT_A_TIME).try_collect::<Vec<_>>();
        let mut bytes = Vec::new();
        for part in cluster.block_on(parts)? {
            bytes.extend_from_slice(&part.ok_or_else(lost)?.payload);
        }
        let mut batches = batches(group.first, &bytes).ok_or_else(lost)?;
        batches.retain_mut(|batch| {
            batch.cut(group.next.max(batch.first()));
            !batch.is_empty()
        });
        Ok(batches)
    }

    fn table(&self, id: u64) -> Result<Arc<Placed>, Error> {
        if let Some(table) = lock(&self.tables).get(&id) {
            return Ok(Arc::clone(table));
        }
        let table = Arc::new(self.cluster().block_on(Placed::load(self.cluster(), &self.name, id))?);
        lock(&self.tables).insert(id, Arc::clone(&table));
        Ok(table)
    }

    /// A checkpoint: its number, its entry, and the tables.
    fn lineage(&self, entry: &Entry, sii: u64) -> Result<(u64, u32, Lineage), Error> {
        let found = entry.unit.checkpoints().get(&sii).map(|(id, table)| (*id, table.depth));
        let (id, depth) = found.ok_or_else(|| Error::NoCheckpoint { unit: self.name.to_string(), sii })?;
        let tables = entry.unit.lineage(id).into_iter().map(|id| self.table(id)).collect::<Result<_, _>>()?;
        Ok((id, depth, Lineage(tables)))
    }

    /// Whether what is stored now stays stored until a checkpoint is published behind `entry`.
    fn is_sure(&self, writing: &Writing, entry: &Entry, ended: &mut u64) -> Result<bool, Error> {
        let number = entry.swept.max(writing.sweep);
        if number > *ended && self.cluster().block_on(sweep::has_ended(self.cluster(), number))? {
            *ended = number;
        }
        Ok(number <= *ended)
    }

    /// Stores a checkpoint; `None` if a sweep has come by meanwhile.
    fn put(&self, writing: &Writing, storing: &mut (u64, u32), new: &NewCheckpoint<'_>) -> Result<Option<()>, Error> {
        // Those who write the unit no more are told before they store anything.
        let entry = writing.change(self.cluster(), &self.name, |entry| Ok(entry.clone()))?;
        let sure = self.is_sure(writing, &entry, &mut storing.0)?;
        let below = new.parent.map(|sii| self.lineage(&entry, sii)).transpose()?;
        // The numbers of a writer's tables are its own.
        storing.1 += 1;
        let id = (writing.epoch << 32) | u64::from(storing.1);
        let (below_id, depth, lineage) = below.unwrap_or_default();
        let changed = (new.parent.is_some() && depth < DEPTH_MAX - 1).then_some(below_id);
        let uploaded = Upload::run(self.cluster(), sure, new, &lineage, changed, (&self.name, id))?;
        let table = Table {
            sii: new.sii,
            parent: changed,
            depth: changed.map_or(0, |_| depth + 1),
            hidden: false,
            pages: uploaded.table.body.page_count(),
            bytes: uploaded.bytes,
        };
        // What was appended before is stored before the checkpoint is.
        writing.writer.settle()?;
        let published = self.change(|now| {
            if now.swept != entry.swept {
                return Ok(false);
            }
            if let Some(sii) = new.parent
                && !now.unit.tables.contains_key(&below_id)
            {
                return Err(Error::NoCheckpoint { unit: self.name.to_string(), sii });
            }
            now.unit.publish(id, table.clone());
            Ok(true)
        })?;
        let mut tables = lock(&self.tables);
        tables.insert(id, uploaded.table);
        let known = lock(&writing.known);
        tables.retain(|id, _| known.entry.unit.tables.contains_key(id));
        Ok(published.then_some(()))
    }
}

impl UnitStore for Handle {
    fn epoch(&self) -> u64 {
        self.writing.as_ref().map_or(0, |writing| writing.epoch)
    }

    fn log(&self) -> Result<Range<u64>, Error> {
        let index = self.index()?;
        let first = match &self.writing {
            Some(writing) => lock(&writing.known).entry.unit.first,
            None => self.entry()?.unit.first,
        };
        Ok(index.log(first))
    }

    fn append(&self, batch: Batch) -> Result<(), Error> {
        if batch.is_empty() {
            return Ok(());
        }
        let writing = self.writing()?;
        batch.check_size()?;
        let _sending = lock(&writing.sending);
        writing.writer.tell()?;
        writing.writer.watch.admit(&self.name, &batch, &|| self.log())?;
        writing.writer.append(batch);
        Ok(())
    }

    fn acknowledged(&self) -> Result<u64, Error> {
        let writer = &self.writing()?.writer;
        writer.watch.acknowledged(&|| writer.tell())
    }

    fn wait(&self, sii: u64, timeout: Duration) -> Result<(), Error> {
        let writer = &self.writing()?.writer;
        writer.watch.wait(&self.name, sii, timeout, &|| writer.tell())
    }

    fn notify(&self, call: Box<dyn Fn() + Send + Sync>) {
        if let Some(writing) = &self.writing {
            writing.writer.watch.notify(call);
        }
    }

    fn read(&self, from: u64, bytes_max: usize) -> Result<Vec<Batch>, Error> {
        let first = self.entry()?.unit.first;
        let index = self.index()?;
        let log = index.log(first);
        let (mut read, mut bytes, mut at) = (Vec::<Batch>::new(), 0, from);
        while at != log.end && (read.is_empty() || bytes < bytes_max) {
            let group = index.find(at).filter(|_| log.contains(&at));
            let group =
                group.ok_or_else(|| Error::NotStored { unit: self.name.to_string(), wanted: at, first: log.start });
            let batches = match group.and_then(|group| self.read_group(group)) {
                Ok(batches) => batches,
                // What comes before the damage can be read.
                Err(_) if !read.is_empty() => break,
                Err(e) => return Err(e),
            };
            for batch in batches {
                if batch.next() > at && (read.is_empty() || bytes < bytes_max) {
                    bytes += batch.body().len();
                    at = batch.next();
                    read.push(batch);
                }
            }
        }
        Ok(read)
    }

    fn truncate_below(&self, sii: u64) -> Result<(), Error> {
        self.change(|entry| {
            entry.unit.below(sii);
            Ok(())
        })?;
        self.writing()?.writer.watch.skip_to(sii);
        self.purge(sii)
    }

    fn truncate_from(&self, sii: u64) -> Result<(), Error> {
        let writing = self.writing()?;
        let _sending = lock(&writing.sending);
        writing.writer.settle()?;
        let first = lock(&writing.known).entry.unit.first;
        self.cluster().block_on(writing.writer.cut(first, sii))
    }

    fn collect(&self, recovery: u64, spare: usize) -> Result<Collected, Error> {
        let next = self.writing()?.writer.watch.next();
        let before = self.log()?;
        let (collected, dropped, first) = self.change(|entry| {
            let checkpoints: Vec<u64> = entry.unit.checkpoints().into_keys().collect();
            let Some((effective, oldest)) = effective(&checkpoints, recovery, spare) else {
                return Ok((Collected::default(), 0, before.start));
            };
            let of = |tables: &std::collections::BTreeMap<u64, Table>| tables.values().map(|t| t.bytes).sum::<u64>();
            let stored = of(&entry.unit.tables);
            entry.unit.hide(oldest);
            // Event s begins interval s: those up to the checkpoint's interval are in it.
            let first = oldest.saturating_add(1).min(next).max(before.start);
            entry.unit.below(first);
            let left = entry.unit.checkpoints().len();
            let collected = Collected {
                effective: Some(effective),
                checkpoints: (checkpoints.len() - left) as u64,
                records: first - before.start,
            };
            Ok((collected, stored - of(&entry.unit.tables), first))
        })?;
        self.purge(first)?;
        self.shared.dropped(dropped)?;
        Ok(collected)
    }

    fn put_checkpoint(&self, new: &NewCheckpoint<'_>) -> Result<(), Error> {
        let writing = self.writing()?;
        if let Some(sii) = new.parent.filter(|sii| *sii >= new.sii) {
            return Err(Error::invalid(format!("checkpoint {sii} as parent"), "a parent is an earlier checkpoint"));
        }
        let mut storing = lock(&writing.storing);
        while self.put(writing, &mut storing, new)?.is_none() {}
        Ok(())
    }

    fn checkpoints(&self) -> Result<Vec<CheckpointInfo>, Error> {
        let entry = self.entry()?;
        let info =
            |(sii, (_, table)): (u64, (u64, &Table))| CheckpointInfo { sii, pages: table.pages, bytes: table.bytes };
        Ok(entry.unit.checkpoints().into_iter().map(info).collect())
    }

    fn manifest(&self, sii: u64) -> Result<Vec<u8>, Error> {
        let (_, _, lineage) = self.lineage(&self.entry()?, sii)?;
        Ok(lineage.0.first().map(|table| table.body.manifest.clone()).unwrap_or_default())
    }

    fn pages(&self, sii: u64, range: Range<u64>, each: &mut EachPage<'_>) -> Result<(), Error> {
        let (_, _, lineage) = self.lineage(&self.entry()?, sii)?;
        lineage.read(self.cluster(), &range, each)
    }

    fn renew(&self) -> Result<(), Error> {
        self.change(|_| Ok(()))
    }

    fn release(&self) -> Result<(), Error> {
        self.writing()?.writer.settle()?;
        self.change(|entry| {
            entry.unit.holder = None;
            Ok(())
        })
    }
}
