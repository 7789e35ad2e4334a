//! Writing a log.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::LogError;
use super::format::{FRAME_BYTES, RECORD_BYTES_MAX, SEGMENT_BYTES, Scan, Segment, header, list, put_frame};

/// Appends buffer this much before they write.
const BUFFER_BYTES: usize = 256 << 10;

/// The segment that is being written.
#[derive(Debug)]
pub(super) struct Active {
    pub(super) file: File,
    /// Bytes of the segment that are in the file; the buffer continues there.
    end: u64,
}

/// The only writer of a log; the caller holds the unit's lock.
///
/// Dropping it does not flush: a process that forked while it held a writer must not write twice.
#[derive(Debug)]
pub struct LogWriter {
    dir: PathBuf,
    /// Ascending; the last one is the active one.
    segments: Vec<Segment>,
    pub(super) active: Option<Active>,
    /// Bytes that belong at the end of the active segment and are not in the file yet.
    buffer: Vec<u8>,
    last: Option<u64>,
    segment_bytes: u64,
    /// A sync was asked for before: segments are synced before the next one begins.
    durable: bool,
    /// Files were made or removed since the directory was last synced.
    dir_dirty: bool,
    poisoned: bool,
}

impl LogWriter {
    /// Opens the log in `dir`, which is made if it is missing, and cuts a torn tail.
    pub fn open(dir: &Path) -> Result<Self, LogError> {
        Self::open_with(dir, SEGMENT_BYTES)
    }

    pub(super) fn open_with(dir: &Path, segment_bytes: u64) -> Result<Self, LogError> {
        fs::create_dir_all(dir).map_err(|e| LogError::io("create", dir, e))?;
        let mut writer = Self {
            dir: dir.to_owned(),
            segments: list(dir)?,
            active: None,
            buffer: Vec::with_capacity(2 * BUFFER_BYTES),
            last: None,
            segment_bytes,
            durable: false,
            dir_dirty: true,
            poisoned: false,
        };
        writer.recover()?;
        Ok(writer)
    }

    /// Makes the last segment with records the active one and cuts what is torn.
    fn recover(&mut self) -> Result<(), LogError> {
        let mut next_first = None;
        while let Some(segment) = self.segments.last().cloned() {
            let mut scan = Scan::open(segment.clone(), next_first)?;
            while scan.next()?.is_some() {}
            if scan.next_sii() > segment.first {
                // A segment that was begun but holds nothing goes only now that the one before it
                // proved complete.
                if let Some(empty) = next_first {
                    self.remove(&Segment::new(&self.dir, empty))?;
                }
                self.last = Some(scan.next_sii() - 1);
                return self.activate(&segment, scan.offset());
            }
            assert!(next_first.is_none(), "only the last segment can be empty");
            next_first = Some(segment.first);
            self.segments.pop();
        }
        if let Some(empty) = next_first {
            self.remove(&Segment::new(&self.dir, empty))?;
        }
        Ok(())
    }

    fn activate(&mut self, segment: &Segment, end: u64) -> Result<(), LogError> {
        let err = |op| move |e| LogError::io(op, segment.path.clone(), e);
        let file = OpenOptions::new().read(true).write(true).open(&segment.path).map_err(err("open"))?;
        file.set_len(end).map_err(err("truncate"))?;
        self.active = Some(Active { file, end });
        Ok(())
    }

    fn remove(&mut self, segment: &Segment) -> Result<(), LogError> {
        self.dir_dirty = true;
        match fs::remove_file(&segment.path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(LogError::io("remove", &segment.path, e)),
            _ => Ok(()),
        }
    }

    /// SII of the last appended record, `None` while the log is empty.
    pub fn last_sii(&self) -> Option<u64> {
        self.last
    }

    /// Adds a record. The first record of an empty log may have any SII, each other one follows the
    /// one before. It is buffered: see [`LogWriter::flush`]. After an error the record is not in
    /// the log and the call can be repeated.
    pub fn append(&mut self, sii: u64, record: &[u8]) -> Result<(), LogError> {
        self.check()?;
        if let Some(last) = self.last
            && last.checked_add(1) != Some(sii)
        {
            return Err(LogError::OutOfOrder { expected: last.saturating_add(1), got: sii });
        }
        if record.len() > RECORD_BYTES_MAX {
            return Err(LogError::TooLarge { sii, bytes: record.len() });
        }
        let size = (FRAME_BYTES + record.len()) as u64;
        let fits = self.active.as_ref().is_some_and(|a| a.end + self.buffer.len() as u64 + size <= self.segment_bytes);
        if !fits {
            self.begin_segment(sii)?;
        } else if self.buffer.len() + record.len() > BUFFER_BYTES {
            self.flush()?;
        }
        put_frame(&mut self.buffer, sii, record);
        self.last = Some(sii);
        Ok(())
    }

    fn begin_segment(&mut self, first: u64) -> Result<(), LogError> {
        if self.durable {
            self.sync()?;
        } else {
            self.flush()?;
        }
        let segment = Segment::new(&self.dir, first);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&segment.path)
            .map_err(|e| LogError::io("create", &segment.path, e))?;
        self.dir_dirty = true;
        self.active = Some(Active { file, end: 0 });
        self.segments.push(segment);
        self.buffer.extend_from_slice(&header(first));
        Ok(())
    }

    /// Hands everything buffered to the kernel: it then survives the death of this process. After
    /// an error (a full disk, say) nothing is lost, and the next call goes on where this one ended.
    pub fn flush(&mut self) -> Result<(), LogError> {
        self.check()?;
        let (Some(active), Some(segment)) = (&mut self.active, self.segments.last()) else {
            return Ok(());
        };
        let mut done = 0;
        let mut result = Ok(());
        while done < self.buffer.len() {
            match active.file.write_at(&self.buffer[done..], active.end) {
                Ok(0) => result = Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => {
                    done += n;
                    active.end += n as u64;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => result = Err(e),
            }
            if result.is_err() {
                break;
            }
        }
        self.buffer.drain(..done);
        if self.buffer.capacity() > 16 * BUFFER_BYTES {
            self.buffer.shrink_to(2 * BUFFER_BYTES);
        }
        result.map_err(|e| LogError::io("write to", &segment.path, e))
    }

    /// Flushes and makes all records survive a power loss. When the disk refuses, this and every
    /// later call fails: only opening the log again tells what it holds.
    pub fn sync(&mut self) -> Result<(), LogError> {
        self.flush()?;
        let result = self.sync_files();
        self.poisoned = result.is_err();
        self.durable = true;
        result
    }

    fn sync_files(&mut self) -> Result<(), LogError> {
        if let Some((segment, older)) = self.segments.split_last() {
            let err = |path: &Path, e| LogError::io("sync", path, e);
            if !self.durable {
                for s in older {
                    let file = File::open(&s.path).map_err(|e| err(&s.path, e))?;
                    file.sync_data().map_err(|e| err(&s.path, e))?;
                }
            }
            if let Some(active) = &self.active {
                let synced = active.file.sync_data();
                synced.map_err(|e| err(&segment.path, e))?;
            }
        }
        if self.dir_dirty {
            let dir = File::open(&self.dir).and_then(|d| d.sync_all());
            dir.map_err(|e| LogError::io("sync", &self.dir, e))?;
            self.dir_dirty = false;
        }
        Ok(())
    }

    /// Removes the segments whose records are all below `sii`. The active segment stays.
    pub fn truncate_below(&mut self, sii: u64) -> Result<(), LogError> {
        self.check()?;
        while self.segments.len() > 1 && self.segments[1].first <= sii {
            // Ascending, so that an interruption leaves a log without gaps.
            let segment = self.segments[0].clone();
            self.remove(&segment)?;
            self.segments.remove(0);
        }
        Ok(())
    }

    /// Drops the records from `sii` on; the next append is `sii`, or any number if none is left.
    pub fn truncate_from(&mut self, sii: u64) -> Result<(), LogError> {
        self.check()?;
        if self.last.is_none_or(|last| last < sii) {
            return Ok(());
        }
        self.flush()?;
        // Descending, so that an interruption leaves a log without gaps.
        while let Some(segment) = self.segments.last().filter(|s| s.first >= sii).cloned() {
            self.remove(&segment)?;
            self.active = None;
            self.segments.pop();
            self.last = segment.first.checked_sub(1);
        }
        let Some(segment) = self.segments.last().cloned() else {
            self.last = None;
            return Ok(());
        };
        let mut scan = Scan::open(segment.clone(), None)?;
        while scan.next_sii() < sii && scan.next()?.is_some() {}
        self.last = Some(scan.next_sii() - 1);
        self.activate(&segment, scan.offset())
    }

    /// Bytes in the segments and in the buffer.
    pub fn bytes(&self) -> u64 {
        let older = self.segments.len().saturating_sub(1);
        let files = self.segments[..older].iter().filter_map(|s| fs::metadata(&s.path).ok());
        files.map(|m| m.len()).sum::<u64>() + self.active.as_ref().map_or(0, |a| a.end) + self.buffer.len() as u64
    }

    fn check(&self) -> Result<(), LogError> {
        if self.poisoned {
            return Err(LogError::Poisoned { dir: self.dir.clone() });
        }
        Ok(())
    }
}
