//! One stream of frames: segment files that are filled one after the other.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};

use super::frame::{self, HEAD_BYTES, Head, Kind};
use super::spares::Spares;
use super::{Failure, lock};
use crate::disk::{Disk, DiskFile};
use crate::state::State;

/// Which stream. Numbers of log segments are even, those of pack segments odd: no number is used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Which {
    Log,
    Pack,
}

impl Which {
    /// The file of a segment.
    pub(super) fn file_name(number: u64) -> String {
        let prefix = if number.is_multiple_of(2) { "log" } else { "pack" };
        format!("{prefix}-{number:016x}")
    }

    /// The number that a file name says, if it is one of this stream.
    pub(super) fn number(self, name: &str) -> Option<u64> {
        let (prefix, odd) = match self {
            Self::Log => ("log-", 0),
            Self::Pack => ("pack-", 1),
        };
        let hex = name.strip_prefix(prefix).filter(|hex| hex.len() == 16)?;
        u64::from_str_radix(hex, 16).ok().filter(|n| n % 2 == odd)
    }

    /// Whether a segment is of this stream.
    pub(super) fn has(self, number: u64) -> bool {
        number.is_multiple_of(2) == (self == Self::Log)
    }

    pub(super) fn first_number(self) -> u64 {
        match self {
            Self::Log => 2,
            Self::Pack => 3,
        }
    }
}

/// The body of a segment's first frame.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Opening {
    pub(super) format: u32,
    /// The earlier segments that there are, ascending, and where each ends. They had been synced up to there.
    pub(super) earlier: Vec<(u64, u64)>,
    /// Bytes of frames behind this one that were written again by a recovery. The segment counts only if it holds
    /// a frame that knows them synced.
    pub(super) again: u64,
    /// Control state at the beginning of a log segment, before what is written again.
    pub(super) state: Option<State>,
}

/// Where a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Place {
    pub(super) segment: u64,
    pub(super) at: u64,
}

/// A stream's segments: file, and where the frames end. The last one's end is where it was when it was begun.
pub(super) type Files = Arc<Mutex<BTreeMap<u64, (Arc<dyn DiskFile>, u64)>>>;

/// The end of a stream that is written.
#[derive(Debug)]
pub(super) struct Stream {
    disk: Arc<dyn Disk>,
    pub(super) files: Files,
    spares: Arc<Spares>,
    number: u64,
    file: Arc<dyn DiskFile>,
    /// Frames end here.
    end: u64,
    /// Synced up to here.
    durable: u64,
    size: u64,
    next_size: u64,
}

fn fail<'a>(op: &'static str, name: &'a str) -> impl Fn(io::Error) -> Failure + 'a {
    move |e| Failure::new(op, name, &e)
}

impl Stream {
    /// Begins segment `number` behind those in `files`, with `again` (whole frames) written again. Says where those are.
    pub(super) fn begin(
        spares: &Arc<Spares>,
        files: Files,
        number: u64,
        state: Option<State>,
        mut again: Vec<u8>,
    ) -> Result<(Self, Vec<u64>), Failure> {
        let earlier = lock(&files).iter().map(|(n, (_, end))| (*n, *end)).collect();
        let opening = Opening { format: frame::FORMAT, earlier, again: again.len() as u64, state };
        let mut bytes = opening_frame(&opening);
        let start = bytes.len();
        bytes.append(&mut again);
        let size = spares.first_size();
        let (file, size) = spares.take(number, size.max(bytes.len() as u64 * 2))?;
        let disk = Arc::clone(spares.disk());
        let next_size = (size * 2).min(spares.size_max()).max(spares.first_size());
        let mut stream =
            Self { disk, files, spares: Arc::clone(spares), number, file, end: 0, durable: 0, size, next_size };
        let at = stream.write(&mut bytes)?;
        stream.sync()?;
        if bytes.len() > start {
            let mut mark = Vec::new();
            frame::put(&mut mark, &Head::new(Kind::Mark, &[]), &[]);
            stream.write(&mut mark)?;
        }
        stream.publish();
        Ok((stream, at.into_iter().skip(1).collect()))
    }

    fn publish(&self) {
        lock(&self.files).insert(self.number, (Arc::clone(&self.file), self.end));
    }

    pub(super) fn number(&self) -> u64 {
        self.number
    }

    pub(super) fn end(&self) -> u64 {
        self.end
    }

    pub(super) fn size(&self) -> u64 {
        self.size
    }

    pub(super) fn is_durable(&self) -> bool {
        self.durable == self.end
    }

    /// Whether so many bytes go into the current segment.
    pub(super) fn fits(&self, bytes: usize) -> bool {
        self.end + bytes as u64 <= self.size
    }

    /// Begins the next segment, in which `bytes` will fit. The current one is synced first.
    pub(super) fn rotate(&mut self, state: Option<State>, bytes: usize) -> Result<(), Failure> {
        if !self.is_durable() {
            self.sync()?;
        }
        let earlier = {
            let mut files = lock(&self.files);
            if let Some((_, end)) = files.get_mut(&self.number) {
                *end = self.end;
            }
            files.iter().map(|(n, (_, end))| (*n, *end)).collect()
        };
        let opening = Opening { format: frame::FORMAT, earlier, again: 0, state };
        let mut first = opening_frame(&opening);
        let number = self.number + 2;
        let needed = (first.len() + bytes) as u64;
        // The state at its beginning is to be a small part of a segment.
        let size = self.next_size.max(needed).max(16 * first.len() as u64);
        let (file, size) = self.spares.take(number, size)?;
        self.next_size = (self.next_size * 2).min(self.spares.size_max());
        (self.number, self.file, self.size) = (number, file, size);
        (self.end, self.durable) = (0, 0);
        self.write(&mut first)?;
        self.publish();
        self.spares.ask(self.next_size);
        Ok(())
    }

    /// Writes whole frames, which fit; says where each is. They get the segment's number and what is known durable.
    pub(super) fn write(&mut self, frames: &mut [u8]) -> Result<Vec<u64>, Failure> {
        let mut places = Vec::new();
        let mut at = 0;
        while at < frames.len() {
            places.push(self.end + at as u64);
            at += frame::place(&mut frames[at..], self.number, self.durable);
        }
        let name = Which::file_name(self.number);
        self.file.write_at(frames, self.end).map_err(fail("write", &name))?;
        self.end += frames.len() as u64;
        Ok(places)
    }

    /// Makes all that was written durable. After an error nobody knows what is.
    pub(super) fn sync(&mut self) -> Result<(), Failure> {
        let name = Which::file_name(self.number);
        self.file.sync().map_err(fail("sync", &name))?;
        self.durable = self.end;
        Ok(())
    }

    /// Gives a segment back that holds nothing that is needed.
    pub(super) fn free(disk: &dyn Disk, spares: &Spares, files: &Files, number: u64) -> Result<u64, Failure> {
        let file = lock(files).remove(&number);
        let bytes = file.and_then(|(f, _)| f.len().ok()).unwrap_or(0);
        spares.give_back(disk, number, bytes)?;
        Ok(bytes)
    }

    pub(super) fn disk(&self) -> &Arc<dyn Disk> {
        &self.disk
    }
}

fn opening_frame(opening: &Opening) -> Vec<u8> {
    let body = postcard::to_stdvec(opening).expect("plain data can be encoded");
    let mut bytes = Vec::new();
    frame::put(&mut bytes, &Head::new(Kind::Segment, &body), &body);
    bytes
}

/// Reads a frame's body.
pub(super) fn read_body(file: &dyn DiskFile, place: Place) -> Result<(Head, Vec<u8>), Bad> {
    let mut first = [0; HEAD_BYTES];
    let got = file.read_at(&mut first, place.at).map_err(Bad::Io)?;
    let head = Head::decode(&first[..got], place.segment).ok_or(Bad::Damaged("checksum of a frame's header"))?;
    let mut body = vec![0; head.padded()];
    let got = file.read_at(&mut body, place.at + HEAD_BYTES as u64).map_err(Bad::Io)?;
    if !head.fits(&body[..got]) {
        return Err(Bad::Damaged("checksum of a frame's body"));
    }
    body.truncate(head.len as usize);
    Ok((head, body))
}

/// Why a frame cannot be read.
#[derive(Debug)]
pub(super) enum Bad {
    Io(io::Error),
    Damaged(&'static str),
}

/// What is at a place of a segment.
#[derive(Debug)]
pub(super) enum Item {
    /// A frame. The body has been checked if the scan was to do that; those of batches and tables are not given, and
    /// of pages the keys.
    Frame { at: u64, head: Head, body: Vec<u8> },
    /// No frame, up to the next one. The header is known if only the body is damaged.
    Bad { at: u64, to: u64, head: Option<Head> },
}

impl Item {
    pub(super) fn at(&self) -> u64 {
        match self {
            Self::Frame { at, .. } | Self::Bad { at, .. } => *at,
        }
    }

    pub(super) fn to(&self) -> u64 {
        match self {
            Self::Frame { at, head, .. } => at + head.frame_bytes() as u64,
            Self::Bad { to, .. } => *to,
        }
    }
}

/// Which bodies a scan reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Bodies {
    /// All.
    All,
    /// The keys of page frames, and nothing of tables.
    Keys,
}

/// Goes through the first `limit` bytes of a segment: frames, and what lies between frames. What is behind the last frame
/// is not told.
pub(super) fn scan(
    file: &dyn DiskFile,
    number: u64,
    limit: u64,
    bodies: Bodies,
    each: &mut dyn FnMut(Item),
) -> io::Result<()> {
    let mut window = Window { file, limit, from: 0, bytes: Vec::new() };
    let mut at = 0;
    while at < limit {
        let head = Head::decode(window.get(at, HEAD_BYTES)?, number);
        let Some(head) = head.filter(|h| at + h.frame_bytes() as u64 <= limit) else {
            let Some(next) = window.find(at + 8, number)? else { return Ok(()) };
            each(Item::Bad { at, to: next, head: None });
            at = next;
            continue;
        };
        let to = at + head.frame_bytes() as u64;
        let body_at = at + HEAD_BYTES as u64;
        let (whole, body) = match (bodies, head.kind) {
            (Bodies::Keys, Kind::Pages) => {
                let keys = window.get(body_at, (head.count as usize * 32).min(head.padded()))?;
                (frame::body_crc(keys) == head.keys_crc, keys.to_vec())
            }
            (Bodies::Keys, Kind::Table) => (true, Vec::new()),
            _ => {
                let padded = window.get(body_at, head.padded())?;
                let kept = match head.kind {
                    Kind::Batch | Kind::Table => 0,
                    Kind::Pages => (head.count as usize).saturating_mul(32),
                    Kind::Segment | Kind::Control | Kind::Mark => head.len as usize,
                };
                (head.fits(padded), padded[..padded.len().min(kept)].to_vec())
            }
        };
        each(if whole { Item::Frame { at, head, body } } else { Item::Bad { at, to, head: Some(head) } });
        at = to;
    }
    Ok(())
}

/// A part of a file in memory.
struct Window<'a> {
    file: &'a dyn DiskFile,
    limit: u64,
    from: u64,
    bytes: Vec<u8>,
}

impl Window<'_> {
    /// Bytes at a place, fewer at the end.
    fn get(&mut self, at: u64, len: usize) -> io::Result<&[u8]> {
        const READ: usize = 1 << 20;
        let len = len.min(usize::try_from(self.limit.saturating_sub(at)).unwrap_or(usize::MAX));
        let inside = at >= self.from && at + len as u64 <= self.from + self.bytes.len() as u64;
        if !inside {
            let want = len.max(READ).min(usize::try_from(self.limit - at).unwrap_or(usize::MAX));
            self.bytes.resize(want, 0);
            let got = self.file.read_at(&mut self.bytes, at)?;
            self.bytes.truncate(got);
            self.from = at;
        }
        let from = usize::try_from(at - self.from).expect("in memory").min(self.bytes.len());
        Ok(&self.bytes[from..(from + len).min(self.bytes.len())])
    }

    /// The next place from `at` on with an intact header.
    fn find(&mut self, mut at: u64, number: u64) -> io::Result<Option<u64>> {
        while at + (HEAD_BYTES as u64) <= self.limit {
            let bytes = self.get(at, 1 << 20)?;
            if bytes.len() < HEAD_BYTES {
                return Ok(None);
            }
            let places = (0..=bytes.len() - HEAD_BYTES).step_by(8);
            let found = places.clone().find(|&i| Head::decode(&bytes[i..], number).is_some());
            match found {
                Some(i) => return Ok(Some(at + i as u64)),
                None => at += places.last().unwrap_or(0) as u64 + 8,
            }
        }
        Ok(None)
    }
}
