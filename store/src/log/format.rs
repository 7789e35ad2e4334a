//! The bytes of a segment, and the one place that checks them.

use std::fs::{self, File};
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use super::{LogError, Lost};

/// Version of the segment format.
pub const FORMAT_VERSION: u32 = 1;
/// A segment is closed before it grows beyond this; only a single larger record exceeds it.
pub const SEGMENT_BYTES: u64 = 16 << 20;
/// Largest record.
pub const RECORD_BYTES_MAX: usize = 1 << 30;

pub(super) const HEADER_BYTES: usize = 24;
pub(super) const FRAME_BYTES: usize = 20;
const MAGIC: &[u8; 8] = b"FTRUNSEG";

/// A segment file and the first SII that its name gives.
#[derive(Clone, Debug)]
pub(super) struct Segment {
    pub(super) first: u64,
    pub(super) path: PathBuf,
}

impl Segment {
    pub(super) fn new(dir: &Path, first: u64) -> Self {
        Self { first, path: dir.join(format!("seg-{first:016x}")) }
    }
}

/// The segments in `dir`, ascending. Files with other names are not ours and are left alone.
pub(super) fn list(dir: &Path) -> Result<Vec<Segment>, LogError> {
    let err = |e| LogError::io("list", dir, e);
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).map_err(err)? {
        let name = entry.map_err(err)?.file_name();
        let first = name
            .to_str()
            .and_then(|n| n.strip_prefix("seg-"))
            .filter(|hex| hex.len() == 16)
            .and_then(|hex| u64::from_str_radix(hex, 16).ok());
        if let Some(first) = first {
            found.push(Segment { first, path: dir.join(name) });
        }
    }
    found.sort_by_key(|s| s.first);
    Ok(found)
}

fn u32_at(b: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(b[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(b: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(b[at..at + 8].try_into().expect("eight bytes"))
}

/// Header of a segment whose first record is `first`.
pub(super) fn header(first: u64) -> [u8; HEADER_BYTES] {
    header_with_version(first, FORMAT_VERSION)
}

pub(super) fn header_with_version(first: u64, version: u32) -> [u8; HEADER_BYTES] {
    let mut h = [0; HEADER_BYTES];
    h[..8].copy_from_slice(MAGIC);
    h[8..12].copy_from_slice(&version.to_le_bytes());
    h[12..20].copy_from_slice(&first.to_le_bytes());
    let crc = crc32fast::hash(&h[..20]);
    h[20..].copy_from_slice(&crc.to_le_bytes());
    h
}

/// Appends the frame of a record to `out`. `record` is no longer than [`RECORD_BYTES_MAX`].
pub(super) fn put_frame(out: &mut Vec<u8>, sii: u64, record: &[u8]) {
    let len = u32::try_from(record.len()).expect("record length was checked");
    let mut h = [0; FRAME_BYTES];
    h[..4].copy_from_slice(&len.to_le_bytes());
    h[8..16].copy_from_slice(&sii.to_le_bytes());
    let crc = body_crc(sii, record);
    h[4..8].copy_from_slice(&crc.to_le_bytes());
    let crc = crc32fast::hash(&h[..16]);
    h[16..].copy_from_slice(&crc.to_le_bytes());
    out.extend_from_slice(&h);
    out.extend_from_slice(record);
}

fn body_crc(sii: u64, record: &[u8]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(&sii.to_le_bytes());
    crc.update(record);
    crc.finalize()
}

/// Reads one segment front to back and checks every byte of it.
#[derive(Debug)]
pub(super) struct Scan {
    segment: Segment,
    /// First SII of the segment after this one; `None` for the last segment.
    next_first: Option<u64>,
    file: BufReader<File>,
    len: u64,
    offset: u64,
    next_sii: u64,
    done: bool,
}

impl Scan {
    /// Opens a segment and checks its header. A torn header leaves an empty scan.
    pub(super) fn open(segment: Segment, next_first: Option<u64>) -> Result<Self, LogError> {
        let file = File::open(&segment.path).map_err(|e| LogError::io("open", &segment.path, e))?;
        let len = file.metadata().map_err(|e| LogError::io("stat", &segment.path, e))?.len();
        let next_sii = segment.first;
        let mut scan = Self {
            segment,
            next_first,
            file: BufReader::with_capacity(1 << 18, file),
            len,
            offset: 0,
            next_sii,
            done: false,
        };
        scan.check_header()?;
        Ok(scan)
    }

    fn check_header(&mut self) -> Result<(), LogError> {
        let have = self.len.min(HEADER_BYTES as u64);
        let mut h = [0; HEADER_BYTES];
        let got = &mut h[..usize::try_from(have).expect("at most a header")];
        self.file.read_exact(got).map_err(|e| LogError::io("read", &self.segment.path, e))?;
        let torn = header(self.segment.first).starts_with(got) || got.iter().all(|&b| b == 0);
        if have < HEADER_BYTES as u64 {
            return self.tail(torn, "the header is incomplete");
        }
        if h.iter().all(|&b| b == 0) {
            let zeros = self.rest_is_zero()?;
            return self.tail(zeros, "the header is empty");
        }
        if h[..8] != *MAGIC {
            return Err(self.corrupt("not the magic number of a log segment", None));
        }
        if u32_at(&h, 20) != crc32fast::hash(&h[..20]) {
            return Err(self.corrupt("checksum of the header", None));
        }
        let found = u32_at(&h, 8);
        if found != FORMAT_VERSION {
            return Err(LogError::Version { segment: self.segment.path.clone(), found, known: FORMAT_VERSION });
        }
        if u64_at(&h, 12) != self.segment.first {
            return Err(self.corrupt("the header names another first event", None));
        }
        self.offset = HEADER_BYTES as u64;
        Ok(())
    }

    /// The next record, or `None` at the end or at a torn tail.
    pub(super) fn next(&mut self) -> Result<Option<(u64, Vec<u8>)>, LogError> {
        if self.done {
            return Ok(None);
        }
        let result = self.frame();
        if !matches!(result, Ok(Some(_))) {
            self.done = true;
        }
        result
    }

    fn frame(&mut self) -> Result<Option<(u64, Vec<u8>)>, LogError> {
        let rest = self.len - self.offset;
        if rest == 0 {
            return self.end();
        }
        let mut h = [0; FRAME_BYTES];
        if rest < FRAME_BYTES as u64 {
            return self.tail(true, "incomplete frame").map(|()| None);
        }
        self.read(&mut h)?;
        if u32_at(&h, 16) != crc32fast::hash(&h[..16]) {
            let zeros = h.iter().all(|&b| b == 0) && self.rest_is_zero()?;
            if zeros {
                return self.tail(true, "zeros in place of a frame").map(|()| None);
            }
            return Err(self.corrupt("checksum of a frame header", None));
        }
        let len = u64::from(u32_at(&h, 0));
        let sii = u64_at(&h, 8);
        if sii != self.next_sii {
            return Err(self.jump(sii));
        }
        if len > rest - FRAME_BYTES as u64 {
            return self.tail(true, "incomplete frame").map(|()| None);
        }
        let mut record = vec![0; usize::try_from(len).expect("64-bit machine")];
        self.read(&mut record)?;
        if u32_at(&h, 4) != body_crc(sii, &record) {
            return Err(self.corrupt("checksum of an event", Some(sii)));
        }
        self.offset += FRAME_BYTES as u64 + len;
        self.next_sii = sii.saturating_add(1);
        Ok(Some((sii, record)))
    }

    /// Offset behind the last whole frame that was read.
    pub(super) fn offset(&self) -> u64 {
        self.offset
    }

    /// The SII after the last record that was read.
    pub(super) fn next_sii(&self) -> u64 {
        self.next_sii
    }

    /// Checks that the next segment continues this one.
    fn end(&self) -> Result<Option<(u64, Vec<u8>)>, LogError> {
        match self.next_first {
            Some(next) if next != self.next_sii => Err(self.jump(next)),
            _ => Ok(None),
        }
    }

    /// An incomplete end: fine in the last segment (if `torn`), damage elsewhere.
    fn tail(&mut self, torn: bool, what: &'static str) -> Result<(), LogError> {
        self.done = true;
        if torn && self.next_first.is_none() {
            return Ok(());
        }
        Err(self.corrupt(what, None))
    }

    fn read(&mut self, buf: &mut [u8]) -> Result<(), LogError> {
        self.file.read_exact(buf).map_err(|e| LogError::io("read", &self.segment.path, e))
    }

    /// Reads to the end.
    fn rest_is_zero(&mut self) -> Result<bool, LogError> {
        let err = |e| LogError::io("read", &self.segment.path, e);
        let mut chunk = [0; 4096];
        loop {
            let n = self.file.read(&mut chunk).map_err(err)?;
            if n == 0 {
                return Ok(true);
            }
            if chunk[..n].iter().any(|&b| b != 0) {
                return Ok(false);
            }
        }
    }

    fn lost_to_end(&self) -> Lost {
        Lost {
            from: self.next_sii,
            to: self.next_first.and_then(|n| n.checked_sub(1)).filter(|&to| to >= self.next_sii),
        }
    }

    /// `only` is the one damaged record when the frames after it can still be found.
    fn corrupt(&self, what: &'static str, only: Option<u64>) -> LogError {
        let lost = only.map_or_else(|| self.lost_to_end(), |sii| Lost { from: sii, to: Some(sii) });
        LogError::Corrupt { segment: self.segment.path.clone(), offset: self.offset, what, lost }
    }

    /// `found` stands where `next_sii` should.
    fn jump(&self, found: u64) -> LogError {
        if found < self.next_sii {
            return self.corrupt("the events after it are numbered lower", None);
        }
        LogError::Gap {
            segment: self.segment.path.clone(),
            offset: self.offset,
            lost: Lost { from: self.next_sii, to: Some(found - 1) },
        }
    }
}
