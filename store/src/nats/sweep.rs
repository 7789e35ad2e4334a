//! Giving back the space of packs and tables that nobody names.
//!
//! Units may name a pack that is stored already, so one may be named while it is about to be dropped. What forbids
//! that, without a lock that checkpoints would have to wait for:
//!
//! 1. A sweep has a number and announces itself: message `A` on `NAME.sweep`.
//! 2. It stores the entry of every unit anew, with its number. A checkpoint that was begun before is thereby refused, since it
//!    is published only behind the entry that it began with; it is stored again.
//! 3. A writer whose entry says that the sweep has come by does not rely on stored packs before the sweep has ended: it
//!    stores them anew, which gives them numbers behind `A`. So does one that was opened while a sweep was under way: opening
//!    stores the announcement anew, unchanged, so that it knows the current one.
//! 4. The sweep drops messages before `A` alone, and of them those that no table names which the entries name as they are after 2.
//!
//! Only one sweep is under way: it says regularly that it lives, and the next one begins when it has not for long.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::checkpoint::{Table, pack_subject, table_prefix};
use super::cluster::{AT_A_TIME, Cluster, PATIENCE, Stored, unit_of};
use super::entry;
use crate::{Error, Reclaimed};

/// A sweep that has not been heard of for so long is taken for dead. It drops nothing when it has not said for
/// [`PATIENCE`] that it lives, and a message is tried to be dropped for no longer than that.
const DEAD: Duration = Duration::from_secs(3 * PATIENCE.as_secs());

/// The newest sweep.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Sweep {
    number: u64,
    running: bool,
    /// Grows while it lives.
    beat: u64,
}

fn subject(cluster: &Cluster) -> String {
    format!("{}.sweep", cluster.store)
}

async fn newest(cluster: &Cluster) -> Result<(Sweep, u64), Error> {
    let subject = subject(cluster);
    let Some(message) = cluster.last(&subject).await? else { return Ok((Sweep::default(), 0)) };
    Ok((entry::decode(&subject, &message.payload)?, message.sequence))
}

async fn announce(cluster: &Cluster, sweep: Sweep, after: u64) -> Result<Option<u64>, Error> {
    cluster.publish(&subject(cluster), "", entry::encode(&sweep), Some(after), PATIENCE).await
}

/// The number of the sweep that is under way for all that a writer knows that is just being opened; 0 if there is none.
pub(super) async fn under_way(cluster: &Cluster) -> Result<u64, Error> {
    loop {
        let (sweep, sequence) = newest(cluster).await?;
        if announce(cluster, sweep, sequence).await?.is_some() {
            return Ok(if sweep.running { sweep.number } else { 0 });
        }
    }
}

/// Whether a sweep has surely ended.
pub(super) async fn has_ended(cluster: &Cluster, number: u64) -> Result<bool, Error> {
    let (sweep, _) = newest(cluster).await?;
    Ok(sweep.number > number || !sweep.running)
}

/// One sweep, while it is under way.
struct Running<'a> {
    cluster: &'a Arc<Cluster>,
    sweep: Sweep,
    sequence: u64,
    heard: Instant,
}

/// Sweeps, unless somebody else does.
pub(super) async fn run(cluster: &Arc<Cluster>) -> Result<Reclaimed, Error> {
    let (mut old, mut sequence) = newest(cluster).await?;
    if old.running {
        tokio::time::sleep(DEAD).await;
        let before = old;
        (old, sequence) = newest(cluster).await?;
        if old != before {
            // It lives.
            return Ok(Reclaimed::default());
        }
    }
    let sweep = Sweep { number: old.number + 1, running: true, beat: 0 };
    let heard = Instant::now();
    let Some(announced) = announce(cluster, sweep, sequence).await? else { return Ok(Reclaimed::default()) };
    let mut running = Running { cluster, sweep, sequence: announced, heard };
    let live = running.live().await?;
    let mut garbage = Vec::new();
    let mut take = |stored: Stored| {
        let kind = stored.subject[cluster.store.len()..].split('.').nth(1);
        if stored.sequence < announced && matches!(kind, Some("pack" | "table")) && !live.named(&stored.subject) {
            garbage.push((stored.sequence, stored.bytes));
        }
    };
    let last = running.beat().await?;
    cluster.scan(&cluster.state, &format!("{}.>", cluster.store), 1, last, &mut take).await?;
    let mut reclaimed = Reclaimed::default();
    for some in garbage.chunks(AT_A_TIME) {
        running.keep().await?;
        futures_util::future::try_join_all(some.iter().map(|(sequence, _)| cluster.delete(*sequence))).await?;
        reclaimed.segments += some.len() as u64;
        reclaimed.bytes += some.iter().map(|(_, bytes)| bytes).sum::<u64>();
    }
    running.end().await?;
    Ok(reclaimed)
}

/// What tables and entries name.
#[derive(Debug, Default)]
struct Live {
    packs: HashSet<String>,
    tables: HashSet<String>,
}

impl Live {
    fn named(&self, subject: &str) -> bool {
        let table = subject.rfind('.').map(|dot| &subject[..=dot]);
        self.packs.contains(subject) || table.is_some_and(|prefix| self.tables.contains(prefix))
    }
}

impl Running<'_> {
    async fn say(&mut self, running: bool) -> Result<u64, Error> {
        loop {
            let now = Instant::now();
            self.sweep = Sweep { running, beat: self.sweep.beat + 1, ..self.sweep };
            if let Some(sequence) = announce(self.cluster, self.sweep, self.sequence).await? {
                (self.sequence, self.heard) = (sequence, now);
                return Ok(sequence);
            }
            let (sweep, sequence) = newest(self.cluster).await?;
            if sweep.number != self.sweep.number || self.heard.elapsed() > PATIENCE {
                return Err(Error::Closed { store: "a sweep that was taken for dead".into() });
            }
            // Somebody who opens a unit has stored it anew.
            self.sequence = sequence;
        }
    }

    async fn beat(&mut self) -> Result<u64, Error> {
        self.say(true).await
    }

    async fn end(&mut self) -> Result<(), Error> {
        self.say(false).await.map(drop)
    }

    /// Says that it lives, if it has not for some time.
    async fn keep(&mut self) -> Result<(), Error> {
        if self.heard.elapsed() > PATIENCE / 4 { self.beat().await.map(drop) } else { Ok(()) }
    }

    /// Comes by every unit.
    async fn live(&mut self) -> Result<Live, Error> {
        let cluster = self.cluster;
        let mut live = Live::default();
        for token in cluster.tokens().await? {
            let name = unit_of(&token)?;
            let known = loop {
                let Some(mut known) = entry::load(cluster, &name).await? else { break None };
                known.entry.swept = self.sweep.number;
                if entry::store(cluster, &name, &known.entry, known.sequence).await?.is_some() {
                    break Some(known);
                }
            };
            for id in known.iter().flat_map(|known| known.entry.unit.tables.keys()) {
                let table = Table::load(cluster, &name, *id).await?;
                live.packs.extend(table.packs.iter().map(|pack| pack_subject(&cluster.store, pack)));
                live.tables.insert(table_prefix(&cluster.store, &token, *id));
                self.keep().await?;
            }
        }
        Ok(live)
    }
}
