//! Tables: which pages a checkpoint has. Every engine stores them in this form; where the pages are is each one's own.
//!
//! | bytes | |
//! |---|---|
//! | 8 | number of the table that this one changes, 0 for none |
//! | 4, 4, 4, 4 | number of ranges gone, of ranges of zeros, of pages; bytes of the manifest |
//! | 16 each | ranges gone: first address, address behind |
//! | 16 each | ranges of zeros |
//! | 40 each | pages, ascending: address, key |
//! | | the manifest |

use std::collections::BTreeMap;
use std::ops::Range;

use crate::bytes::{u32_at, u64_at};
use crate::{Error, NewCheckpoint, PAGE_BYTES, Page};

/// The blake3 hash of a page.
pub(crate) type Key = [u8; 32];

/// Pages compressed together.
pub(crate) const PACK_PAGES: usize = 16;
/// Changes of changes; the table after that is whole.
pub(crate) const DEPTH_MAX: u32 = 32;
/// Level of zstd: the disk is to be slower than the compression.
const ZSTD_LEVEL: i32 = 1;
const PAGE: u64 = PAGE_BYTES as u64;
/// Pages of zeros in a table: 64 GiB. They are ranges there, but not in memory.
const ZERO_PAGES_MAX: u64 = 1 << 24;

/// A table.
#[derive(Debug, Default)]
pub(crate) struct TableBody {
    pub(crate) parent: Option<u64>,
    pub(crate) gone: Vec<Range<u64>>,
    pub(crate) zero: Vec<Range<u64>>,
    pub(crate) pages: Vec<(u64, Key)>,
    pub(crate) manifest: Vec<u8>,
}

impl TableBody {
    /// The table of a checkpoint whose pages are still to be put.
    pub(crate) fn new(new: &NewCheckpoint<'_>) -> Self {
        Self { manifest: new.manifest.to_vec(), gone: new.gone.to_vec(), ..Self::default() }
    }

    /// Takes a page; gives its key, unless it is one of zeros, which is not stored.
    ///
    /// # Errors
    /// The address is none of a page; too many pages of zeros.
    pub(crate) fn put(&mut self, address: u64, page: &Page) -> Result<Option<Key>, Error> {
        if !address.is_multiple_of(PAGE) || address.checked_add(PAGE).is_none() {
            return Err(Error::invalid(format!("page address {address:#x}"), "it must be a multiple of 4096"));
        }
        if page.iter().all(|b| *b == 0) {
            if self.zero.len() as u64 == ZERO_PAGES_MAX {
                let why = "more than 64 GiB of zero pages; leave out what was never written";
                return Err(Error::invalid("a checkpoint", why));
            }
            self.zero.push(address..address + PAGE);
            return Ok(None);
        }
        let key = *blake3::hash(page).as_bytes();
        self.pages.push((address, key));
        Ok(Some(key))
    }

    /// Orders what was put.
    ///
    /// # Errors
    /// One address is there twice.
    pub(crate) fn finish(&mut self) -> Result<(), Error> {
        self.pages.sort_unstable_by_key(|(address, _)| *address);
        if self.pages.windows(2).any(|two| two[0].0 == two[1].0) {
            return Err(Error::invalid("the pages of a checkpoint", "one address is there twice"));
        }
        let mut zero: Vec<u64> = self.zero.drain(..).map(|r| r.start).collect();
        zero.sort_unstable();
        for address in zero {
            push_range(&mut self.zero, address);
        }
        Ok(())
    }

    /// Makes it a table of everything, with the pages `all` that are there before it is applied.
    pub(crate) fn make_whole(&mut self, mut all: BTreeMap<u64, Option<Key>>) {
        self.apply(&(0..u64::MAX), &mut all);
        self.gone.clear();
        self.zero.clear();
        self.pages.clear();
        for (address, key) in all {
            match key {
                None => push_range(&mut self.zero, address),
                Some(key) => self.pages.push((address, key)),
            }
        }
    }

    /// Number of pages that it names.
    pub(crate) fn page_count(&self) -> u64 {
        self.pages.len() as u64 + self.zero.iter().map(|r| (r.end - r.start) / PAGE).sum::<u64>()
    }

    pub(crate) fn encode(&self) -> Result<Vec<u8>, Error> {
        let count =
            |n: usize| u32::try_from(n).map_err(|_| Error::invalid("a checkpoint", "more than 4 GiB of one thing"));
        let mut out = self.parent.unwrap_or(0).to_le_bytes().to_vec();
        for n in [self.gone.len(), self.zero.len(), self.pages.len(), self.manifest.len()] {
            out.extend(count(n)?.to_le_bytes());
        }
        for range in self.gone.iter().chain(&self.zero) {
            out.extend(range.start.to_le_bytes());
            out.extend(range.end.to_le_bytes());
        }
        for (address, key) in &self.pages {
            out.extend(address.to_le_bytes());
            out.extend(key);
        }
        out.extend(&self.manifest);
        count(out.len())?;
        Ok(out)
    }

    /// Judges any bytes.
    pub(crate) fn decode(b: &[u8]) -> Option<Self> {
        if b.len() < 24 {
            return None;
        }
        let [gone, zero, pages, manifest] = [8, 12, 16, 20].map(|at| u32_at(b, at) as usize);
        let (ranges, rest) = b[24..].split_at_checked(gone.checked_add(zero)?.checked_mul(16)?)?;
        let (table, rest) = rest.split_at_checked(pages.checked_mul(40)?)?;
        if rest.len() != manifest {
            return None;
        }
        let mut all = ranges.as_chunks::<16>().0.iter().map(|r| u64_at(r, 0)..u64_at(r, 8));
        let zero_pages = ranges[gone * 16..]
            .as_chunks::<16>()
            .0
            .iter()
            .try_fold(0u64, |sum, r| sum.checked_add(u64_at(r, 8).checked_sub(u64_at(r, 0))? / PAGE))?;
        if zero_pages > ZERO_PAGES_MAX {
            return None;
        }
        let pages = table.as_chunks::<40>().0.iter().map(|e| (u64_at(e, 0), e[8..].try_into().expect("32 bytes")));
        Some(Self {
            parent: Some(u64_at(b, 0)).filter(|id| *id != 0),
            gone: all.by_ref().take(gone).collect(),
            zero: all.collect(),
            pages: pages.collect(),
            manifest: rest.to_vec(),
        })
    }

    /// Applies this table to what it changes; `None` is a page of zeros.
    pub(crate) fn apply(&self, range: &Range<u64>, to: &mut BTreeMap<u64, Option<Key>>) {
        let clip = |r: &Range<u64>| r.start.max(range.start)..r.end.min(range.end);
        for gone in self.gone.iter().map(clip).filter(|r| r.start < r.end) {
            let mut tail = to.split_off(&gone.start);
            to.append(&mut tail.split_off(&gone.end));
        }
        for zero in self.zero.iter().map(clip).filter(|r| r.start < r.end) {
            to.extend((zero.start.div_ceil(PAGE)..zero.end.div_ceil(PAGE)).map(|n| (n * PAGE, None)));
        }
        let from = self.pages.partition_point(|(a, _)| *a < range.start);
        to.extend(self.pages[from..].iter().take_while(|(a, _)| *a < range.end).map(|(a, key)| (*a, Some(*key))));
    }
}

/// Adds an address to ranges that ascend.
fn push_range(ranges: &mut Vec<Range<u64>>, address: u64) {
    match ranges.last_mut() {
        Some(last) if last.end == address => last.end += PAGE,
        _ => ranges.push(address..address + PAGE),
    }
}

/// Pages as they are stored: their keys, and one zstd frame.
pub(crate) fn pack(pages: &[(Key, Page)]) -> std::io::Result<Vec<u8>> {
    let raw: Vec<u8> = pages.iter().flat_map(|(_, page)| page).copied().collect();
    let mut packed: Vec<u8> = pages.iter().flat_map(|(key, _)| key).copied().collect();
    packed.extend(zstd::bulk::compress(&raw, ZSTD_LEVEL)?);
    Ok(packed)
}

/// The contents of so many pages that [`pack`] has packed; judges any bytes.
pub(crate) fn unpack(count: usize, packed: &[u8]) -> Option<Vec<u8>> {
    let (_, data) = packed.split_at_checked(count.checked_mul(32)?)?;
    let bytes = zstd::bulk::decompress(data, count.checked_mul(PAGE_BYTES)?).ok()?;
    (bytes.len() == count * PAGE_BYTES).then_some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_table_is_judged(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Some(table) = TableBody::decode(&bytes) {
                prop_assert_eq!(table.encode().unwrap(), bytes);
            }
        }

        #[test]
        fn tables_come_back(parent in 1u64.., gone in prop::collection::vec(any::<(u64, u64)>(), 0..3), pages in prop::collection::vec(any::<(u64, Key)>(), 0..5), manifest: Vec<u8>) {
            let table = TableBody { parent: Some(parent), gone: gone.iter().map(|(a, b)| *a..*b).collect(), zero: Vec::from_iter(Some(0..8192)), pages, manifest };
            let again = TableBody::decode(&table.encode().unwrap()).unwrap();
            prop_assert_eq!(format!("{table:?}"), format!("{again:?}"));
        }
    }
}
