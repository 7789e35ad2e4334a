//! Checkpoints: packs of pages and tables, each a message of `NAME-state`.
//!
//! A *pack* holds up to [`PACK_PAGES`] pages: their number (u32, little endian) and what [`crate::table::pack`] makes of them. Its
//! subject is the hash of their keys, so pages that come together again, in whatever unit, are not stored again. A page that the
//! parent's tables name is not stored again, either. A *table* is the hash of what follows, and a [`Parts`] with its packs; it is
//! cut into as many messages as the servers' limit wants, each preceded by their number (u32, little endian).

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tokio::task::JoinHandle;

use super::cluster::{AT_A_TIME, Cluster, PATIENCE, token};
use super::entry::{decode, encode};
use crate::bytes::u32_at;
use crate::table::{Key, PACK_PAGES, TableBody, pack, unpack};
use crate::{Error, NewCheckpoint, PAGE_BYTES, Page, UnitName};

/// The hash of the keys of a pack's pages.
pub(super) type PackName = [u8; 32];

/// Where a page is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    pack: PackName,
    slot: u8,
}

/// A table as it is stored.
#[derive(Debug, Serialize, Deserialize)]
struct Parts {
    table: Vec<u8>,
    packs: Vec<PackName>,
    /// For each page of the table its pack, of `packs`, and which page of it.
    places: Vec<(u32, u8)>,
}

/// A table, and where its pages are.
#[derive(Debug)]
pub(super) struct Table {
    pub(super) body: TableBody,
    /// Every pack that it needs.
    pub(super) packs: Vec<PackName>,
    places: Vec<(u32, u8)>,
}

pub(super) fn pack_subject(store: &str, name: &PackName) -> String {
    let hex: String = name.iter().map(|b| format!("{b:02x}")).collect();
    format!("{store}.pack.{hex}")
}

fn table_subject(cluster: &Cluster, unit: &UnitName, id: u64, part: usize) -> String {
    format!("{}.table.{}.{id:x}.{part}", cluster.store, token(unit))
}

/// The start of the subjects of a table's messages.
pub(super) fn table_prefix(store: &str, token: &str, id: u64) -> String {
    format!("{store}.table.{token}.{id:x}.")
}

fn damaged(file: String, what: &str) -> Error {
    Error::Damaged { file, offset: 0, what: what.to_owned() }
}

impl Table {
    /// Reads a table.
    pub(super) async fn load(cluster: &Cluster, unit: &UnitName, id: u64) -> Result<Self, Error> {
        let (mut all, mut part, mut parts) = (Vec::new(), 0, 1);
        while part < parts {
            let subject = table_subject(cluster, unit, id, part);
            let message = cluster.constant(&subject).await?.ok_or_else(|| damaged(subject.clone(), "it is missing"))?;
            let Some((_, rest)) = message.payload.split_at_checked(4) else {
                return Err(damaged(subject, "it is too short"));
            };
            parts = u32_at(&message.payload, 0) as usize;
            all.extend_from_slice(rest);
            part += 1;
        }
        let subject = table_subject(cluster, unit, id, 0);
        let (hash, bytes) = all.split_at_checked(32).ok_or_else(|| damaged(subject.clone(), "it is too short"))?;
        if blake3::hash(bytes).as_bytes() != hash {
            return Err(damaged(subject, "it does not have its hash"));
        }
        let Parts { table, packs, places } = decode(&subject, bytes)?;
        let body = TableBody::decode(&table).filter(|body| body.pages.len() == places.len());
        let body = body.filter(|_| places.iter().all(|(pack, _)| (*pack as usize) < packs.len()));
        let body = body.ok_or_else(|| damaged(subject, "its lengths"))?;
        Ok(Self { body, packs, places })
    }

    fn places(&self) -> impl Iterator<Item = (Key, Place)> {
        let place = |(pack, slot): &(u32, u8)| Place { pack: self.packs[*pack as usize], slot: *slot };
        self.body.pages.iter().zip(&self.places).map(move |((_, key), at)| (*key, place(at)))
    }
}

/// A checkpoint that is read: its table and those that it changes, newest first.
#[derive(Debug, Default)]
pub(super) struct Lineage(pub(super) Vec<Arc<Table>>);

impl Lineage {
    fn places(&self) -> HashMap<Key, Place> {
        self.0.iter().rev().flat_map(|table| table.places()).collect()
    }

    fn pages(&self, range: &Range<u64>) -> BTreeMap<u64, Option<Key>> {
        let mut all = BTreeMap::new();
        for table in self.0.iter().rev() {
            table.body.apply(range, &mut all);
        }
        all
    }

    /// Calls `each` with the pages in `range`.
    pub(super) fn read(
        &self,
        cluster: &Cluster,
        range: &Range<u64>,
        each: &mut crate::EachPage<'_>,
    ) -> Result<(), Error> {
        let (places, mut packs) = (self.places(), Packs::default());
        for (address, key) in self.pages(range) {
            let page = key.map(|key| packs.page(cluster, &key, places[&key])).transpose()?;
            each(address, page.as_ref())?;
        }
        Ok(())
    }
}

/// The packs that were read last: neighbours in memory are often neighbours there.
#[derive(Debug, Default)]
struct Packs(VecDeque<(PackName, Vec<u8>)>);

const PACKS_KEPT: usize = 64;

impl Packs {
    fn page(&mut self, cluster: &Cluster, key: &Key, place: Place) -> Result<Page, Error> {
        let subject = pack_subject(&cluster.store, &place.pack);
        if !self.0.iter().any(|(name, _)| *name == place.pack) {
            let message = cluster.block_on(cluster.constant(&subject))?;
            let message = message.ok_or_else(|| damaged(subject.clone(), "it is missing"))?;
            let pages = message
                .payload
                .split_at_checked(4)
                .and_then(|(count, packed)| unpack((u32_at(count, 0) as usize).min(PACK_PAGES), packed));
            let pages = pages.ok_or_else(|| damaged(subject.clone(), "its compression"))?;
            if self.0.len() == PACKS_KEPT {
                self.0.pop_front();
            }
            self.0.push_back((place.pack, pages));
        }
        let pages = self.0.iter().find(|(name, _)| *name == place.pack).map(|(_, pages)| &pages[..]);
        let page = pages.and_then(|p| p.get(usize::from(place.slot) * PAGE_BYTES..)).and_then(<[u8]>::first_chunk);
        let page = page.filter(|page: &&Page| blake3::hash(&page[..]).as_bytes() == key);
        page.copied().ok_or_else(|| damaged(subject, "a page does not have its key"))
    }
}

/// A checkpoint on its way into the store.
pub(super) struct Upload<'a> {
    cluster: &'a Arc<Cluster>,
    /// Packs that are there already stay there; without it they are stored anew.
    sure: bool,
    body: TableBody,
    places: HashMap<Key, Place>,
    pending: Vec<(Key, Page)>,
    under_way: VecDeque<JoinHandle<Result<u64, Error>>>,
    bytes: u64,
}

/// What is published: see [`crate::state::Table`].
#[derive(Debug)]
pub(super) struct Uploaded {
    pub(super) table: Arc<Table>,
    pub(super) bytes: u64,
}

impl<'a> Upload<'a> {
    /// Stores the pages of a checkpoint that changes `below`, or everything if it is `whole`, and its table.
    pub(super) fn run(
        cluster: &'a Arc<Cluster>,
        sure: bool,
        new: &NewCheckpoint<'_>,
        below: &Lineage,
        parent: Option<u64>,
        table: (&UnitName, u64),
    ) -> Result<Uploaded, Error> {
        let (places, pending) = (below.places(), Vec::new());
        let body = TableBody::new(new);
        let mut upload = Self { cluster, sure, body, places, pending, under_way: VecDeque::new(), bytes: 0 };
        new.pages.each(&mut |address, page| upload.put(address, page))?;
        upload.body.finish()?;
        upload.body.parent = parent;
        if parent.is_none() {
            if new.parent.is_some() {
                upload.body.make_whole(below.pages(&(0..u64::MAX)));
                upload.gather()?;
            } else {
                upload.body.gone.clear();
            }
        }
        upload.flush()?;
        let (name, id) = table;
        let table = upload.store_table(name, id)?;
        while !upload.under_way.is_empty() {
            upload.wait()?;
        }
        Ok(Uploaded { table: Arc::new(table), bytes: upload.bytes })
    }

    fn put(&mut self, address: u64, page: &Page) -> Result<(), Error> {
        let Some(key) = self.body.put(address, page)? else { return Ok(()) };
        if self.places.contains_key(&key) || self.pending.iter().any(|(k, _)| *k == key) {
            return Ok(());
        }
        self.pending.push((key, *page));
        if self.pending.len() == PACK_PAGES { self.flush() } else { Ok(()) }
    }

    /// Stores the pages once more that are in packs most of which nobody needs.
    fn gather(&mut self) -> Result<(), Error> {
        let mut needed: HashMap<PackName, Vec<Key>> = HashMap::new();
        for key in self.body.pages.iter().map(|(_, key)| *key).collect::<std::collections::BTreeSet<_>>() {
            if let Some(place) = self.places.get(&key) {
                needed.entry(place.pack).or_default().push(key);
            }
        }
        let mut packs = Packs::default();
        for key in needed.into_values().filter(|keys| keys.len() < PACK_PAGES / 2).flatten() {
            let page = packs.page(self.cluster, &key, self.places[&key])?;
            self.pending.push((key, page));
            if self.pending.len() == PACK_PAGES {
                self.flush()?;
            }
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), Error> {
        if self.pending.is_empty() {
            return Ok(());
        }
        let keys: Vec<u8> = self.pending.iter().flat_map(|(key, _)| key).copied().collect();
        let name: PackName = *blake3::hash(&keys).as_bytes();
        let mut contents = u32::try_from(self.pending.len()).expect("few").to_le_bytes().to_vec();
        let packed = pack(&self.pending).map_err(|e| Error::io("compress", "pages", &e))?;
        contents.extend(packed);
        for (slot, (key, _)) in (0..).zip(self.pending.drain(..)) {
            self.places.insert(key, Place { pack: name, slot });
        }
        self.send(pack_subject(&self.cluster.store, &name), contents, self.sure)
    }

    fn send(&mut self, subject: String, contents: Vec<u8>, only_new: bool) -> Result<(), Error> {
        if self.under_way.len() == AT_A_TIME {
            self.wait()?;
        }
        let (cluster, len) = (Arc::clone(self.cluster), contents.len() as u64);
        self.under_way.push_back(self.cluster.spawn(async move {
            let after = only_new.then_some(0);
            let stored = cluster.publish(&subject, "", contents, after, PATIENCE).await?;
            Ok(stored.map_or(0, |_| len))
        }));
        Ok(())
    }

    fn wait(&mut self) -> Result<(), Error> {
        let Some(oldest) = self.under_way.pop_front() else { return Ok(()) };
        let closed = |_| Error::Closed { store: self.cluster.name.clone() };
        self.bytes += self.cluster.block_on(oldest).map_err(closed)??;
        Ok(())
    }

    fn store_table(&mut self, name: &UnitName, id: u64) -> Result<Table, Error> {
        let (mut packs, mut places) = (Vec::new(), Vec::with_capacity(self.body.pages.len()));
        let mut numbers = HashMap::new();
        for (_, key) in &self.body.pages {
            let place = self.places[key];
            let number = *numbers.entry(place.pack).or_insert_with(|| {
                packs.push(place.pack);
                u32::try_from(packs.len() - 1).expect("fewer than pages")
            });
            places.push((number, place.slot));
        }
        let parts = Parts { table: self.body.encode()?, packs, places };
        let bytes = encode(&parts);
        let all: Vec<u8> = blake3::hash(&bytes).as_bytes().iter().chain(&bytes).copied().collect();
        let chunks = all.chunks(self.cluster.part_bytes() - 4);
        let count = u32::try_from(chunks.len()).expect("a table is bounded").to_le_bytes();
        for (part, chunk) in chunks.enumerate() {
            let contents = count.iter().chain(chunk).copied().collect();
            self.send(table_subject(self.cluster, name, id, part), contents, false)?;
        }
        let Parts { packs, places, .. } = parts;
        Ok(Table { body: std::mem::take(&mut self.body), packs, places })
    }
}
