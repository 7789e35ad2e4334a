//! Reading a log.

use std::path::Path;

use super::LogError;
use super::format::{Scan, Segment, list};

/// A log as it was when it was opened. A writer may go on meanwhile: records that it completes
/// later may or may not be seen.
#[derive(Debug)]
pub struct LogReader {
    segments: Vec<Segment>,
}

impl LogReader {
    /// Opens the log in `dir`.
    pub fn open(dir: &Path) -> Result<Self, LogError> {
        Ok(Self { segments: list(dir)? })
    }

    /// SII of the first record that the log keeps, `None` when it has no segment.
    pub fn first_sii(&self) -> Option<u64> {
        self.segments.first().map(|s| s.first)
    }

    /// SII of the last whole record; reads the last segment.
    pub fn last_sii(&self) -> Result<Option<u64>, LogError> {
        let Some(last) = self.segments.last() else {
            return Ok(None);
        };
        let mut scan = Scan::open(last.clone(), None)?;
        while scan.next()?.is_some() {}
        if scan.next_sii() == last.first && self.segments.len() == 1 {
            return Ok(None);
        }
        Ok(scan.next_sii().checked_sub(1))
    }

    /// The records from `from_sii` on, in order. The iterator ends after the first error.
    pub fn records(&self, from_sii: u64) -> Records<'_> {
        let at = self.segments.partition_point(|s| s.first <= from_sii);
        Records {
            segments: &self.segments,
            // Without a segment that can hold it, the first `next` reports that.
            next_segment: at.saturating_sub(1),
            too_early: at == 0 && !self.segments.is_empty(),
            from: from_sii,
            scan: None,
            done: false,
        }
    }
}

/// Iterator over the records of a log.
#[derive(Debug)]
pub struct Records<'a> {
    segments: &'a [Segment],
    next_segment: usize,
    too_early: bool,
    from: u64,
    scan: Option<Scan>,
    done: bool,
}

impl Records<'_> {
    fn step(&mut self) -> Result<Option<(u64, Vec<u8>)>, LogError> {
        if self.too_early {
            return Err(LogError::NotStored { wanted: self.from, first: self.segments[0].first });
        }
        loop {
            if let Some(scan) = &mut self.scan {
                while let Some((sii, record)) = scan.next()? {
                    if sii >= self.from {
                        return Ok(Some((sii, record)));
                    }
                }
            }
            let Some(segment) = self.segments.get(self.next_segment) else {
                return Ok(None);
            };
            self.next_segment += 1;
            let after = self.segments.get(self.next_segment).map(|s| s.first);
            self.scan = Some(Scan::open(segment.clone(), after)?);
        }
    }
}

impl Iterator for Records<'_> {
    type Item = Result<(u64, Vec<u8>), LogError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.done {
            return None;
        }
        let item = self.step().transpose();
        self.done = !matches!(item, Some(Ok(_)));
        item
    }
}
