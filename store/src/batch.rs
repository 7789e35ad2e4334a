//! Batches of records: what is appended, sent, stored and read back as one.

use crate::Error;

/// A batch holds no more than this, bytes.
pub const BATCH_BYTES_MAX: usize = 64 << 20;

/// Records of consecutive state intervals.
///
/// The body is the records one after the other, each preceded by its length (u32, little endian). It is made
/// once, by the writer, and goes through the network and onto the disk as it is, under one checksum.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    first: u64,
    count: u32,
    body: Vec<u8>,
}

impl Batch {
    /// An empty batch whose first record will be that of state interval `first`.
    pub fn new(first: u64) -> Self {
        Self { first, count: 0, body: Vec::new() }
    }

    /// A batch of these records.
    pub fn of<R: AsRef<[u8]>>(first: u64, records: impl IntoIterator<Item = R>) -> Self {
        let mut batch = Self::new(first);
        for record in records {
            batch.push(record.as_ref());
        }
        batch
    }

    /// Adds the record of the next state interval.
    ///
    /// # Panics
    /// The record is longer than 4 GiB.
    pub fn push(&mut self, record: &[u8]) {
        let len = u32::try_from(record.len()).expect("a record is shorter than 4 GiB");
        self.body.extend_from_slice(&len.to_le_bytes());
        self.body.extend_from_slice(record);
        self.count += 1;
    }

    /// Takes apart what [`Batch::body`] gave.
    ///
    /// # Errors
    /// It is not the body of `count` records.
    pub fn parse(first: u64, count: u32, body: Vec<u8>) -> Result<Self, Error> {
        let batch = Self { first, count, body };
        let mut records = batch.records();
        let whole = records.by_ref().count() == count as usize && records.rest.is_empty();
        if !whole || count == 0 || first.checked_add(u64::from(count)).is_none() {
            return Err(Error::invalid("a batch of records", "its lengths do not fit its size"));
        }
        Ok(batch)
    }

    /// SII of the first record.
    pub fn first(&self) -> u64 {
        self.first
    }

    /// SII after the last record.
    pub fn next(&self) -> u64 {
        self.first + u64::from(self.count)
    }

    /// Number of records.
    pub fn count(&self) -> u32 {
        self.count
    }

    /// Whether there are no records.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// The records with their lengths.
    pub fn body(&self) -> &[u8] {
        &self.body
    }

    /// The records with their SIIs.
    pub fn records(&self) -> Records<'_> {
        Records { sii: self.first, rest: &self.body }
    }

    /// # Errors
    /// It is larger than [`BATCH_BYTES_MAX`].
    pub(crate) fn check_size(&self) -> Result<(), Error> {
        if self.body.len() > BATCH_BYTES_MAX {
            let why = format!("{} bytes, and at most {BATCH_BYTES_MAX} go into one; make several", self.body.len());
            return Err(Error::invalid("a batch of records", why));
        }
        Ok(())
    }

    /// Drops the records from `sii` on.
    pub(crate) fn cut(&mut self, sii: u64) {
        if sii >= self.next() {
            return;
        }
        let keep = sii.saturating_sub(self.first);
        let bytes: usize = self.records().take_while(|(s, _)| *s < sii).map(|(_, r)| 4 + r.len()).sum();
        self.body.truncate(bytes);
        self.count = u32::try_from(keep).expect("no more than there were");
    }
}

/// The records of a batch.
#[derive(Clone, Debug)]
pub struct Records<'a> {
    sii: u64,
    rest: &'a [u8],
}

impl<'a> Iterator for Records<'a> {
    type Item = (u64, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let (len, rest) = self.rest.split_first_chunk::<4>()?;
        let (record, rest) = rest.split_at_checked(u32::from_le_bytes(*len) as usize)?;
        let sii = self.sii;
        // A batch made from untrusted parts has been checked not to reach the last number.
        self.sii = sii.wrapping_add(1);
        self.rest = rest;
        Some((sii, record))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn records_come_back(first in 0..u64::MAX / 2, records in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 1..20), cut in 0u64..25) {
            let mut batch = Batch::of(first, &records);
            let again = Batch::parse(first, batch.count(), batch.body().to_vec()).unwrap();
            prop_assert_eq!(&again, &batch);
            let got: Vec<_> = again.records().map(|(sii, r)| (sii - first, r.to_vec())).collect();
            prop_assert_eq!(got, records.iter().cloned().enumerate().map(|(i, r)| (i as u64, r)).collect::<Vec<_>>());
            batch.cut(first + cut);
            prop_assert_eq!(batch, Batch::of(first, records.iter().take(cut as usize)));
        }

        #[test]
        fn any_body_is_judged(first: u64, count in 0u32..9, body in prop::collection::vec(any::<u8>(), 0..60)) {
            if let Ok(batch) = Batch::parse(first, count, body) {
                prop_assert_eq!(batch.records().count(), count as usize);
            }
        }
    }
}
