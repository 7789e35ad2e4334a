//! A store in a NATS JetStream cluster: `nats://HOST:PORT,…/NAME`.
//!
//! An acknowledged record is on a majority of the replicas of a stream. How messages are laid out, and what makes a writer that
//! was overtaken harmless, is in ARCHITECTURE.md, "Stable storage". The parts:
//!
//! | module | what |
//! |---|---|
//! | `cluster` | storing a message behind a known one, finding messages |
//! | `log` | what the messages of a log say |
//! | `writer` | what is queued, and the group that is under way |
//! | `entry` | what is known of a unit beside its events and pages |
//! | `checkpoint` | packs of pages, tables |
//! | `sweep` | giving back the space of packs and tables |
//! | `unit` | the handle of a unit |
//! | `monitor` | whether the servers sync what they store |

mod checkpoint;
mod cluster;
mod entry;
mod log;
mod monitor;
#[cfg(any(test, feature = "testing"))]
pub mod servers;
mod sweep;
mod unit;
mod writer;

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use cluster::{Cluster, unit_of};
use entry::{Entry, Known};
use log::Index;
use unit::{Handle, Writing};
use writer::Writer;

use crate::{
    Durability, Error, Finding, Fsck, OpenOptions, Reclaimed, StableStore, UnitInfo, UnitName, UnitStore, each_record,
    location,
};

/// Dropped checkpoints of fewer bytes do not make a sweep worth its while.
const SWEEP_BYTES: u64 = 64 << 20;

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A store in a cluster.
#[derive(Debug)]
pub(crate) struct Nats {
    shared: Arc<Shared>,
    at: location::Nats,
    /// Whether the servers sync what they store was asked, and they do.
    syncs: OnceLock<()>,
}

#[derive(Debug)]
struct Shared {
    cluster: Arc<Cluster>,
    /// Bytes of the checkpoints that were dropped here since the last sweep.
    dropped: AtomicU64,
    /// The writers of this connection.
    writers: Mutex<HashMap<UnitName, Weak<Writer>>>,
}

impl Shared {
    /// Waits for what this connection has queued for a unit: it comes before whatever is asked now.
    fn settle(&self, unit: &UnitName) {
        let writer = lock(&self.writers).get(unit).and_then(Weak::upgrade);
        if let Some(writer) = writer {
            // What a writer cannot store is told to its own caller.
            let _ = writer.settle();
        }
    }

    /// Takes note of dropped checkpoints; when they are half of what is stored, a sweep begins.
    fn dropped(&self, bytes: u64) -> Result<(), Error> {
        let dropped = self.dropped.fetch_add(bytes, Ordering::Relaxed) + bytes;
        if dropped < SWEEP_BYTES || dropped < self.cluster.block_on(self.cluster.state_bytes())? / 2 {
            return Ok(());
        }
        self.dropped.store(0, Ordering::Relaxed);
        let cluster = Arc::clone(&self.cluster);
        drop(self.cluster.spawn(async move {
            // What it could not drop is dropped by the next one.
            let _ = sweep::run(&cluster).await;
        }));
        Ok(())
    }
}

impl Nats {
    /// Connects to a cluster, and makes the streams of the store if they are missing.
    ///
    /// # Errors
    /// [`Error::Disconnected`]; a stream has another number of replicas than was asked for.
    pub(crate) fn connect(at: &location::Nats) -> Result<Self, Error> {
        let cluster = Arc::new(Cluster::connect(at)?);
        let shared = Arc::new(Shared { cluster, dropped: AtomicU64::new(0), writers: Mutex::default() });
        Ok(Self { shared, at: at.clone(), syncs: OnceLock::new() })
    }

    fn cluster(&self) -> &Arc<Cluster> {
        &self.shared.cluster
    }

    /// Checks that what the cluster acknowledges is on disk.
    fn check_sync(&self) -> Result<(), Error> {
        if self.syncs.get().is_none() {
            monitor::check_sync(&self.at)?;
            // Another thread may have asked as well.
            let _ = self.syncs.set(());
        }
        Ok(())
    }

    /// Fails while the lease of a holder other than `who` lasts.
    async fn check_lease(&self, name: &UnitName, known: &Known, who: Option<&str>) -> Result<(), Error> {
        let unit = &known.entry.unit;
        let Some(holder) = unit.holder.as_deref().filter(|holder| Some(*holder) != who) else { return Ok(()) };
        let last = self.cluster().last(&self.cluster().subject("log", name)).await?;
        let heard = last.map_or(known.time, |last| known.time.max(last.time.unix_timestamp_nanos()));
        let since = u64::try_from((self.cluster().now().await? - heard) / 1_000_000).unwrap_or(0);
        match unit.ttl_ms.saturating_sub(since) {
            0 => Ok(()),
            remaining_ms => Err(Error::Held { unit: name.to_string(), holder: holder.to_owned(), remaining_ms }),
        }
    }

    /// Makes the opener the unit's writer: from the entry on, and then in its log.
    async fn begin(&self, name: &UnitName, options: &OpenOptions) -> Result<(Writing, Arc<Writer>), Error> {
        let cluster = self.cluster();
        let (known, empty) = loop {
            let old = entry::ever(cluster, name).await?.unwrap_or_default();
            let empty = old.entry.removed || old.sequence == 0;
            let mut entry = old.entry.clone();
            if empty {
                entry = Entry { swept: entry.swept, ..Entry::default() };
                name.as_str().clone_into(&mut entry.unit.name);
            } else {
                self.check_lease(name, &old, Some(&options.holder)).await?;
            }
            entry.unit.epoch = old.entry.unit.epoch + 1;
            entry.unit.holder = Some(options.holder.clone());
            entry.unit.ttl_ms = u64::try_from(options.ttl.as_millis()).unwrap_or(u64::MAX);
            if let Some(sequence) = entry::store(cluster, name, &entry, old.sequence).await? {
                break (Known { entry, sequence, time: 0 }, empty);
            }
        };
        let (epoch, first) = (known.entry.unit.epoch, known.entry.unit.first);
        let mut index = Index::default();
        index.refresh(cluster, name).await?;
        let writer = Arc::new(Writer::start(cluster, name, epoch, first, index, empty).await?);
        let sweep = sweep::under_way(cluster).await?;
        let writing = Writing {
            epoch,
            writer: Arc::clone(&writer),
            known: Mutex::new(known),
            sweep,
            storing: Mutex::default(),
            sending: Mutex::default(),
        };
        Ok((writing, writer))
    }

    fn handle(&self, name: &UnitName, writing: Option<Writing>) -> Handle {
        let (shared, name) = (Arc::clone(&self.shared), name.clone());
        Handle { shared, name, writing, seen: Mutex::default(), tables: Mutex::default() }
    }

    /// The units that are there.
    fn known(&self) -> Result<Vec<(UnitName, Known)>, Error> {
        let cluster = self.cluster();
        let mut units = Vec::new();
        for token in cluster.block_on(cluster.tokens())? {
            let name = unit_of(&token)?;
            if let Some(known) = cluster.block_on(entry::load(cluster, &name))? {
                units.push((name, known));
            }
        }
        units.sort_by(|a, b| a.0.cmp(&b.0));
        Ok(units)
    }

    fn check(&self, name: &UnitName, known: &Known, pages: &mut HashSet<crate::table::Key>, report: &mut Fsck) {
        let view = self.handle(name, None);
        let mut damage = |what: String, lost: String| {
            report.findings.push(Finding { file: self.cluster().subject("unit", name), offset: 0, what, lost });
        };
        let mut from = view.log().map_or(0, |log| log.start);
        let (mut records, mut bytes) = (0, 0);
        loop {
            let read = each_record(&view, from, &mut |sii, record| {
                (records, bytes, from) = (records + 1, bytes + record.len() as u64, sii + 1);
                Ok(())
            });
            match read {
                Ok(()) => break,
                Err(e @ Error::Lost { to, .. }) => {
                    from = to + 1;
                    damage("messages of the log are missing or are not what was stored".into(), e.to_string());
                }
                Err(e) => {
                    damage(e.to_string(), "what is behind it in the log".into());
                    break;
                }
            }
        }
        for sii in known.entry.unit.checkpoints().into_keys() {
            let read = view.pages(sii, 0..u64::MAX, &mut |_, page| {
                if let Some(page) = page
                    && pages.insert(*blake3::hash(page).as_bytes())
                {
                    bytes += page.len() as u64;
                }
                Ok(())
            });
            match read {
                Ok(()) => report.checkpoints += 1,
                Err(e) => damage(e.to_string(), format!("checkpoint {sii} of unit {name}")),
            }
        }
        report.records += records;
        report.bytes += bytes;
    }
}

impl Drop for Nats {
    fn drop(&mut self) {
        // Handles that are left find the store closed.
        self.cluster().close();
    }
}

impl StableStore for Nats {
    fn open(&self, unit: &UnitName, options: &OpenOptions) -> Result<Arc<dyn UnitStore>, Error> {
        options.check()?;
        if options.durability == Durability::Disk {
            self.check_sync()?;
        }
        self.shared.settle(unit);
        let (writing, writer) = self.cluster().block_on(self.begin(unit, options))?;
        let mut writers = lock(&self.shared.writers);
        writers.retain(|_, writer| writer.strong_count() > 0);
        writers.insert(unit.clone(), Arc::downgrade(&writer));
        Ok(Arc::new(self.handle(unit, Some(writing))))
    }

    fn view(&self, unit: &UnitName) -> Result<Arc<dyn UnitStore>, Error> {
        let known = self.cluster().block_on(entry::load(self.cluster(), unit))?;
        known.map_or_else(
            || Err(Error::NoUnit { unit: unit.to_string() }),
            |_| Ok(Arc::new(self.handle(unit, None)) as _),
        )
    }

    fn units(&self) -> Result<Vec<UnitInfo>, Error> {
        let mut infos = Vec::new();
        for (name, known) in self.known()? {
            let unit = &known.entry.unit;
            let index = self.handle(&name, None).index()?;
            infos.push(UnitInfo {
                log: index.log(unit.first),
                bytes: index.bytes() + unit.tables.values().map(|t| t.bytes).sum::<u64>(),
                checkpoints: unit.checkpoints().into_keys().collect(),
                epoch: unit.epoch,
                holder: unit.holder.clone(),
                name,
            });
        }
        Ok(infos)
    }

    fn remove(&self, unit: &UnitName) -> Result<(), Error> {
        let cluster = self.cluster();
        let subject = cluster.subject("log", unit);
        cluster.block_on(async {
            loop {
                let Some(known) = entry::load(cluster, unit).await? else {
                    return Err(Error::NoUnit { unit: unit.to_string() });
                };
                self.check_lease(unit, &known, None).await?;
                let last = cluster.last(&subject).await?;
                let mut entry = Entry { removed: true, swept: known.entry.swept, ..Entry::default() };
                entry.unit.epoch = known.entry.unit.epoch;
                if entry::store(cluster, unit, &entry, known.sequence).await?.is_some() {
                    // Whoever opens it next begins behind this message.
                    let gone = last.map_or(0, |last| last.sequence + 1);
                    return if gone > 0 { cluster.purge(&subject, gone).await } else { Ok(()) };
                }
            }
        })
    }

    fn fsck(&self) -> Result<Fsck, Error> {
        let (mut report, mut pages) = (Fsck::default(), HashSet::new());
        let cluster = self.cluster();
        for token in cluster.block_on(cluster.tokens())? {
            let name = unit_of(&token)?;
            match cluster.block_on(entry::load(cluster, &name)) {
                Ok(Some(known)) => self.check(&name, &known, &mut pages, &mut report),
                Ok(None) => {}
                Err(Error::Damaged { file, offset, what }) => {
                    report.findings.push(Finding { file, offset, what, lost: format!("unit {name}") });
                }
                Err(e) => return Err(e),
            }
        }
        report.pages = pages.len() as u64;
        Ok(report)
    }

    fn gc(&self) -> Result<Reclaimed, Error> {
        self.cluster().block_on(sweep::run(self.cluster()))
    }
}
