//! The pages of the newest checkpoint, in memory.

use crate::anon::Anon;
use crate::runs::{self, PageRun};
use crate::state::PAGE_BYTES;
use std::collections::{BTreeMap, BTreeSet};
use std::io;

/// One page.
pub type Page = [u8; PAGE_BYTES as usize];

/// A page of zeros.
pub static ZERO_PAGE: Page = [0; PAGE_BYTES as usize];

/// True when all bytes are zero.
pub fn is_zero(page: &Page) -> bool {
    let (blocks, _) = page.as_chunks::<64>();
    blocks.iter().all(|b| b.iter().fold(0, |acc, byte| acc | byte) == 0)
}

/// Pages copied out of a target and not yet committed: addresses and bytes.
#[derive(Debug, Default)]
pub struct StagedPages {
    pub(crate) addrs: Vec<u64>,
    pub(crate) buf: Option<Anon>,
    pub(crate) unreadable: Vec<u64>,
}

impl StagedPages {
    /// An empty stage.
    pub fn new() -> Self {
        Self::default()
    }

    /// Forgets the pages and keeps the memory for the next use.
    pub fn clear(&mut self) {
        self.addrs.clear();
        self.unreadable.clear();
    }

    /// Number of pages.
    pub fn len(&self) -> usize {
        self.addrs.len()
    }

    /// True when it holds no page.
    pub fn is_empty(&self) -> bool {
        self.addrs.is_empty()
    }

    /// Bytes of its pages.
    pub fn bytes(&self) -> u64 {
        self.addrs.len() as u64 * PAGE_BYTES
    }

    /// Addresses, in the order they were put in (ascending after [`crate::copy::copy_in`]).
    pub fn addrs(&self) -> &[u64] {
        &self.addrs
    }

    /// Pages that could not be read at all (a guard region, a file page after the end of the file).
    /// They are not among the staged ones.
    pub fn unreadable(&self) -> &[u64] {
        &self.unreadable
    }

    /// Addresses and contents.
    pub fn iter(&self) -> impl Iterator<Item = (u64, &Page)> {
        let bytes = self.buf.as_ref().map_or(&[][..], Anon::bytes);
        let (pages, _) = bytes.as_chunks();
        self.addrs.iter().copied().zip(pages)
    }

    /// Adds a page.
    pub fn push(&mut self, addr: u64, page: &Page) -> io::Result<()> {
        let at = self.addrs.len() * page.len();
        self.reserve(self.addrs.len() + 1)?;
        if let Some(buf) = &mut self.buf {
            buf.bytes_mut()[at..at + page.len()].copy_from_slice(page);
            self.addrs.push(addr);
        }
        Ok(())
    }

    /// Makes room for `pages` pages and brings the memory in: what is done here before the target
    /// is stopped need not be done while it stands.
    ///
    /// # Errors
    /// No memory.
    pub fn prepare(&mut self, pages: usize) -> io::Result<()> {
        self.reserve(pages)?;
        if let Some(buf) = &self.buf {
            buf.populate(pages * PAGE_BYTES as usize);
        }
        Ok(())
    }

    /// Makes room for `pages` pages in all; those already there stay.
    pub(crate) fn reserve(&mut self, pages: usize) -> io::Result<()> {
        let want = pages * PAGE_BYTES as usize;
        let have = self.buf.as_ref().map_or(0, |b| b.bytes().len());
        if want <= have {
            return Ok(());
        }
        let used = self.addrs.len() * PAGE_BYTES as usize;
        // Growing page by page doubles; a known total into an empty stage is taken as it is.
        let mut new = Anon::new(if used == 0 { want } else { want.max(have * 2) })?;
        if let Some(old) = &self.buf {
            new.bytes_mut()[..used].copy_from_slice(&old.bytes()[..used]);
        }
        self.buf = Some(new);
        Ok(())
    }
}

const REGION_PAGES: usize = 512;
const REGION_BYTES: u64 = REGION_PAGES as u64 * PAGE_BYTES;
const CHUNK_PAGES: usize = 4096;
const ZERO_SLOT: u32 = u32::MAX;

/// Index of 2 MiB of address space.
#[derive(Debug)]
struct Region {
    /// Which pages are stored.
    bits: [u64; REGION_PAGES / 64],
    /// Where: chunk and page in it, or [`ZERO_SLOT`].
    slots: [u32; REGION_PAGES],
}

/// 16 MiB of page memory.
#[derive(Debug)]
struct Chunk {
    mem: Anon,
    free: Vec<u16>,
}

/// Page address to contents. Zero pages take no memory; the others live in arenas that a fork of
/// the supervisor does not copy.
#[derive(Debug, Default)]
pub struct PageStore {
    regions: BTreeMap<u64, Box<Region>>,
    chunks: Vec<Option<Chunk>>,
    /// Chunks with a free page.
    roomy: BTreeSet<u32>,
    len: usize,
    zeros: usize,
}

fn page_of(addr: u64) -> usize {
    (addr % REGION_BYTES / PAGE_BYTES) as usize
}

impl PageStore {
    /// An empty store.
    pub fn new() -> Self {
        Self::default()
    }

    /// Number of pages, zero pages included.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True when it holds no page.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes of page memory in use (zero pages count nothing).
    pub fn bytes(&self) -> u64 {
        (self.len - self.zeros) as u64 * PAGE_BYTES
    }

    /// Takes the staged pages over; a page that is already there is replaced.
    ///
    /// # Errors
    /// No memory. The pages before the failure are committed.
    pub fn commit(&mut self, staged: &StagedPages) -> io::Result<()> {
        staged.iter().try_for_each(|(addr, page)| self.put(addr, page))
    }

    /// Stores one page.
    ///
    /// # Errors
    /// No memory.
    ///
    /// # Panics
    /// When the address is not page aligned.
    pub fn put(&mut self, addr: u64, page: &Page) -> io::Result<()> {
        assert_eq!(addr % PAGE_BYTES, 0, "page address {addr:#x}");
        let old = self.slot(addr);
        if is_zero(page) {
            if old != Some(ZERO_SLOT) {
                self.remove(addr);
                self.set_slot(addr, ZERO_SLOT);
                self.zeros += 1;
            }
            return Ok(());
        }
        let slot = match old {
            Some(slot) if slot != ZERO_SLOT => slot,
            _ => {
                let slot = self.alloc()?;
                self.remove(addr);
                self.set_slot(addr, slot);
                slot
            }
        };
        if let Some(chunk) = &mut self.chunks[slot as usize / CHUNK_PAGES] {
            let (pages, _) = chunk.mem.bytes_mut().as_chunks_mut();
            pages[slot as usize % CHUNK_PAGES] = *page;
        }
        Ok(())
    }

    /// Contents of a page.
    pub fn get(&self, addr: u64) -> Option<&Page> {
        self.slot(addr).map(|slot| self.page(slot))
    }

    /// True when the page is there and not zero.
    pub fn is_stored(&self, addr: u64) -> bool {
        self.slot(addr).is_some_and(|slot| slot != ZERO_SLOT)
    }

    /// Forgets every page whose address `keep` refuses.
    pub fn retain(&mut self, mut keep: impl FnMut(u64) -> bool) {
        let drop: Vec<u64> = self.runs(0, u64::MAX).flat_map(|r| r.addrs()).filter(|addr| !keep(*addr)).collect();
        for addr in drop {
            self.remove(addr);
        }
    }

    /// Forgets the pages in `start..end`.
    pub fn drop_range(&mut self, start: u64, end: u64) {
        let runs: Vec<PageRun> = self.runs(start, end).collect();
        for addr in runs.iter().flat_map(PageRun::addrs) {
            self.remove(addr);
        }
    }

    /// Forgets the pages of these runs.
    pub fn drop_runs(&mut self, runs: &[PageRun]) {
        for run in runs {
            self.drop_range(run.start, run.end());
        }
    }

    /// All pages in address order.
    pub fn iter(&self) -> impl Iterator<Item = (u64, &Page)> {
        self.iter_range(0, u64::MAX)
    }

    /// Pages in `start..end`, in address order.
    pub fn iter_range(&self, start: u64, end: u64) -> impl Iterator<Item = (u64, &Page)> {
        self.pages_in(start, end).map(|(addr, slot)| (addr, self.page(slot)))
    }

    /// Runs of stored pages in `start..end`, in address order. Runs that touch where two index
    /// regions meet are not joined.
    pub fn runs(&self, start: u64, end: u64) -> impl Iterator<Item = PageRun> {
        self.regions_in(start, end).flat_map(move |(base, region)| {
            let mut out = Vec::new();
            for (word, &bits) in region.bits.iter().enumerate() {
                let mut bits = bits;
                while bits != 0 {
                    let low = bits.trailing_zeros();
                    let ones = (bits >> low).trailing_ones();
                    let from = base + (word as u64 * 64 + u64::from(low)) * PAGE_BYTES;
                    let to = from + u64::from(ones) * PAGE_BYTES;
                    runs::push(&mut out, from.max(start), to.min(end));
                    bits &= u64::MAX.checked_shl(low + ones).unwrap_or(0);
                }
            }
            out
        })
    }

    fn pages_in(&self, start: u64, end: u64) -> impl Iterator<Item = (u64, u32)> {
        self.regions_in(start, end).flat_map(move |(base, region)| {
            (0..REGION_PAGES)
                .filter(|i| region.bits[i / 64] >> (i % 64) & 1 == 1)
                .map(move |i| (base + i as u64 * PAGE_BYTES, region.slots[i]))
                .filter(move |(addr, _)| (start..end).contains(addr))
        })
    }

    fn regions_in(&self, start: u64, end: u64) -> impl Iterator<Item = (u64, &Region)> {
        let first = start / REGION_BYTES;
        self.regions
            .range(first..end.div_ceil(REGION_BYTES).max(first))
            .map(|(key, region)| (key * REGION_BYTES, &**region))
    }

    fn slot(&self, addr: u64) -> Option<u32> {
        let region = self.regions.get(&(addr / REGION_BYTES))?;
        let i = page_of(addr);
        (region.bits[i / 64] >> (i % 64) & 1 == 1).then(|| region.slots[i])
    }

    fn set_slot(&mut self, addr: u64, slot: u32) {
        let region = self
            .regions
            .entry(addr / REGION_BYTES)
            .or_insert_with(|| Box::new(Region { bits: [0; REGION_PAGES / 64], slots: [0; REGION_PAGES] }));
        let i = page_of(addr);
        region.bits[i / 64] |= 1 << (i % 64);
        region.slots[i] = slot;
        self.len += 1;
    }

    fn page(&self, slot: u32) -> &Page {
        if slot == ZERO_SLOT {
            return &ZERO_PAGE;
        }
        match &self.chunks[slot as usize / CHUNK_PAGES] {
            Some(chunk) => &chunk.mem.bytes().as_chunks().0[slot as usize % CHUNK_PAGES],
            None => unreachable!("a page in use in a chunk given back"),
        }
    }

    fn alloc(&mut self) -> io::Result<u32> {
        let index = match self.roomy.first() {
            Some(&index) => index,
            None => {
                let chunk = Chunk {
                    mem: Anon::new(CHUNK_PAGES * PAGE_BYTES as usize)?,
                    free: (0..CHUNK_PAGES as u16).rev().collect(),
                };
                let index = self.chunks.iter().position(Option::is_none);
                let index = index.unwrap_or_else(|| {
                    self.chunks.push(None);
                    self.chunks.len() - 1
                });
                self.chunks[index] = Some(chunk);
                self.roomy.insert(index as u32);
                index as u32
            }
        };
        let page = self.chunks[index as usize].as_mut().and_then(|chunk| {
            let page = chunk.free.pop();
            if chunk.free.is_empty() {
                self.roomy.remove(&index);
            }
            page
        });
        match page {
            Some(page) => Ok(index * CHUNK_PAGES as u32 + u32::from(page)),
            None => unreachable!("a roomy chunk has a free page"),
        }
    }

    /// Forgets one page and gives its memory back.
    fn remove(&mut self, addr: u64) {
        let key = addr / REGION_BYTES;
        let Some(slot) = self.slot(addr) else { return };
        if let Some(region) = self.regions.get_mut(&key) {
            let i = page_of(addr);
            region.bits[i / 64] &= !(1 << (i % 64));
            if region.bits == [0; REGION_PAGES / 64] {
                self.regions.remove(&key);
            }
        }
        self.len -= 1;
        if slot == ZERO_SLOT {
            self.zeros -= 1;
            return;
        }
        let index = slot as usize / CHUNK_PAGES;
        if let Some(chunk) = &mut self.chunks[index] {
            chunk.free.push((slot as usize % CHUNK_PAGES) as u16);
            self.roomy.insert(index as u32);
            // One empty chunk is kept, so that a page that comes and goes does not map and unmap.
            if chunk.free.len() == CHUNK_PAGES && self.roomy.len() > 1 {
                self.chunks[index] = None;
                self.roomy.remove(&(index as u32));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn page(tag: u8) -> Page {
        let mut page = ZERO_PAGE;
        page[17] = tag;
        page
    }

    proptest! {
        #[test]
        fn behaves_like_a_map(ops in prop::collection::vec((0u8..4, 0u64..1500, 0u8..5), 1..200)) {
            let mut store = PageStore::new();
            let mut model: BTreeMap<u64, u8> = BTreeMap::new();
            for (op, at, tag) in ops {
                let addr = at * PAGE_BYTES;
                match op {
                    0 | 1 => {
                        store.put(addr, &page(tag)).unwrap();
                        model.insert(addr, tag);
                    }
                    2 => {
                        let end = addr + u64::from(tag) * 100 * PAGE_BYTES;
                        store.drop_range(addr, end);
                        model.retain(|a, _| !(addr..end).contains(a));
                    }
                    _ => {
                        store.retain(|a| a % (2 * PAGE_BYTES) == 0 || a > addr);
                        model.retain(|a, _| a % (2 * PAGE_BYTES) == 0 || *a > addr);
                    }
                }
                let end = addr + 600 * PAGE_BYTES;
                let got: Vec<_> = store.iter_range(addr, end).map(|(a, p)| (a, p[17])).collect();
                let want: Vec<_> = model.range(addr..end).map(|(a, t)| (*a, *t)).collect();
                prop_assert_eq!(&got, &want);
                let by_run: Vec<_> = store.runs(addr, end).flat_map(|r| r.addrs()).collect();
                prop_assert_eq!(by_run, want.iter().map(|w| w.0).collect::<Vec<_>>());
                prop_assert_eq!(store.len(), model.len());
                let live = model.values().filter(|t| **t != 0).count() as u64;
                prop_assert_eq!(store.bytes(), live * PAGE_BYTES);
            }
        }
    }

    #[test]
    fn memory_is_given_back() {
        let mut store = PageStore::new();
        let pages = 3 * CHUNK_PAGES as u64;
        for i in 0..pages {
            store.put(i * PAGE_BYTES, &page(1)).unwrap();
        }
        store.drop_range(0, u64::MAX);
        assert!(store.is_empty() && store.regions.is_empty());
        assert_eq!(store.chunks.iter().flatten().count(), 1);
        for i in 0..pages {
            store.put(i * PAGE_BYTES, &page(2)).unwrap();
        }
        assert_eq!(store.chunks.len(), 3);
        assert!(store.iter().all(|(_, p)| p[17] == 2));
    }

    #[test]
    fn staging_grows() {
        let mut staged = StagedPages::new();
        for i in 0..2000u64 {
            staged.push(i * PAGE_BYTES, &page(i as u8)).unwrap();
        }
        assert!(staged.iter().all(|(a, p)| p[17] == (a / PAGE_BYTES) as u8));
        assert_eq!(staged.bytes(), 2000 * PAGE_BYTES);
    }

    #[test]
    fn commit_is_fast() {
        let mut staged = StagedPages::new();
        staged.reserve(131_072).unwrap();
        for i in 0..131_072u64 {
            staged.push(i * PAGE_BYTES, &page(1)).unwrap();
        }
        let mut store = PageStore::new();
        let mut best = std::time::Duration::MAX;
        for _ in 0..3 {
            let t = std::time::Instant::now();
            store.commit(&staged).unwrap();
            best = best.min(t.elapsed());
        }
        eprintln!("131072 pages committed in {best:?}");
        assert_eq!(store.len(), 131_072);
    }
}
