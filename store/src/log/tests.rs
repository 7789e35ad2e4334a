use std::fs::{self, OpenOptions};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::Command;

use proptest::prelude::*;

use super::format::header_with_version;
use super::*;

const SEGMENT: u64 = 600;

fn record(sii: u64) -> Vec<u8> {
    (0..sii % 61).map(|i| (i * 7 + sii + 1) as u8).collect()
}

fn write(dir: &Path, siis: impl Iterator<Item = u64>) -> LogWriter {
    let mut w = LogWriter::open_with(dir, SEGMENT).unwrap();
    for sii in siis {
        w.append(sii, &record(sii)).unwrap();
    }
    w.flush().unwrap();
    w
}

fn read(dir: &Path, from: u64) -> Result<Vec<(u64, Vec<u8>)>, LogError> {
    LogReader::open(dir)?.records(from).collect()
}

fn files(dir: &Path) -> Vec<std::path::PathBuf> {
    let mut files: Vec<_> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).collect();
    files.sort();
    files
}

fn siis(records: &[(u64, Vec<u8>)]) -> Vec<u64> {
    records.iter().map(|r| r.0).collect()
}

#[test]
fn round_trip_over_segments_and_reopen() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), 1..=50);
    let mut w = write(dir.path(), 51..=100);
    assert_eq!(w.last_sii(), Some(100));
    assert!(files(dir.path()).len() > 4, "the log rotates");
    for f in files(dir.path()) {
        assert!(fs::metadata(f).unwrap().len() <= SEGMENT);
    }
    for from in [1, 2, 37, 100, 101, 500] {
        let got = read(dir.path(), from).unwrap();
        assert_eq!(siis(&got), (from..=100).collect::<Vec<_>>());
        assert!(got.iter().all(|(sii, r)| *r == record(*sii)));
    }
    let reader = LogReader::open(dir.path()).unwrap();
    assert_eq!(reader.first_sii(), Some(1));
    assert_eq!(reader.last_sii().unwrap(), Some(100));
    w.sync().unwrap();
    let total: u64 = files(dir.path()).iter().map(|f| fs::metadata(f).unwrap().len()).sum();
    assert_eq!(w.bytes(), total);
}

#[test]
fn an_empty_log() {
    let dir = tempfile::tempdir().unwrap();
    let mut w = LogWriter::open(dir.path()).unwrap();
    assert_eq!(w.last_sii(), None);
    w.flush().unwrap();
    w.sync().unwrap();
    assert!(read(dir.path(), 1).unwrap().is_empty());
    let reader = LogReader::open(dir.path()).unwrap();
    assert_eq!(reader.first_sii(), None);
    assert_eq!(reader.last_sii().unwrap(), None);
    let missing = LogReader::open(&dir.path().join("none")).unwrap_err();
    assert!(matches!(missing, LogError::Io { op: "list", .. }));
}

#[test]
fn records_larger_than_a_segment_and_larger_than_the_buffer() {
    let dir = tempfile::tempdir().unwrap();
    let big = vec![9; 3 << 20];
    let mut w = LogWriter::open_with(dir.path(), SEGMENT).unwrap();
    w.append(7, &big).unwrap();
    w.append(8, b"x").unwrap();
    w.append(9, &big).unwrap();
    w.flush().unwrap();
    let got = read(dir.path(), 7).unwrap();
    assert_eq!(siis(&got), [7, 8, 9]);
    assert_eq!(got[2].1, big);
    assert_eq!(files(dir.path()).len(), 3);
}

#[test]
fn appends_must_be_consecutive() {
    let dir = tempfile::tempdir().unwrap();
    let mut w = write(dir.path(), 10..=12);
    for got in [12, 14, 0] {
        let e = w.append(got, b"").unwrap_err();
        assert!(matches!(e, LogError::OutOfOrder { expected: 13, got: g } if g == got));
    }
    w.append(13, b"").unwrap();
}

/// Cutting the last segment anywhere leaves the records before the cut, and the writer goes on.
/// Break it: make `Scan::tail` return an error always, or drop the `set_len` in `activate`.
#[test]
fn truncation_at_every_byte_of_the_last_segment_is_a_torn_tail() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), 1..=55);
    let last = files(dir.path()).pop().unwrap();
    let whole = fs::read(&last).unwrap();
    let before = read(dir.path(), 1).unwrap();
    let saved: Vec<_> = files(dir.path()).into_iter().map(|f| (fs::read(&f).unwrap(), f)).collect();
    let mut seen = std::collections::BTreeSet::new();
    for cut in 0..whole.len() {
        fs::write(&last, &whole[..cut]).unwrap();
        let got = read(dir.path(), 1).unwrap();
        assert!(got.len() < before.len(), "cut at {cut}");
        assert_eq!(got[..], before[..got.len()]);
        let mut w = LogWriter::open_with(dir.path(), SEGMENT).unwrap();
        let next = got.len() as u64 + 1;
        assert_eq!(w.last_sii(), Some(next - 1));
        w.append(next, b"new").unwrap();
        w.flush().unwrap();
        let again = read(dir.path(), 1).unwrap();
        assert_eq!(again[..got.len()], got[..]);
        assert_eq!(again.last().unwrap(), &(next, b"new".to_vec()));
        seen.insert(got.len());
        for f in files(dir.path()) {
            fs::remove_file(f).unwrap();
        }
        for (bytes, f) in &saved {
            fs::write(f, bytes).unwrap();
        }
    }
    assert!(seen.len() > 5, "the last segment held several records");
}

#[test]
fn truncation_of_an_earlier_segment_is_damage() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), 1..=60);
    let first = files(dir.path()).remove(0);
    let whole = fs::read(&first).unwrap();
    for cut in 0..whole.len() {
        fs::write(&first, &whole[..cut]).unwrap();
        let e = read(dir.path(), 1).unwrap_err();
        assert!(matches!(e, LogError::Corrupt { .. } | LogError::Gap { .. }), "cut at {cut}: {e}");
    }
}

/// Break it: leave any field out of one of the three checksums.
#[test]
fn a_flip_of_any_byte_is_found() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), 1..=45);
    for file in files(dir.path()) {
        let whole = fs::read(&file).unwrap();
        for at in 0..whole.len() {
            for bit in [0x01, 0x80, 0xff] {
                let mut bad = whole.clone();
                bad[at] ^= bit;
                fs::write(&file, &bad).unwrap();
                let e = read(dir.path(), 1).unwrap_err();
                let LogError::Corrupt { segment, offset, lost, .. } = &e else {
                    panic!("byte {at} of {}: {e}", file.display());
                };
                assert_eq!(*segment, file);
                assert!(*offset <= at as u64);
                let good = LogReader::open(dir.path()).unwrap().records(1).take_while(Result::is_ok).count() as u64;
                assert_eq!(lost.from, good + 1, "the error names the first lost event");
            }
        }
        fs::write(&file, &whole).unwrap();
    }
    assert_eq!(read(dir.path(), 1).unwrap().len(), 45);
}

#[test]
fn the_writer_refuses_a_damaged_end() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), 1..=45);
    let last = files(dir.path()).pop().unwrap();
    let mut bytes = fs::read(&last).unwrap();
    bytes[30] ^= 4;
    fs::write(&last, &bytes).unwrap();
    let e = LogWriter::open_with(dir.path(), SEGMENT).unwrap_err();
    assert!(matches!(e, LogError::Corrupt { .. }));
    assert_eq!(fs::read(&last).unwrap(), bytes, "nothing was cut");
}

#[test]
fn errors_say_what_is_lost() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), 1..=60);
    let mut names = files(dir.path());
    let second = names.remove(1);
    let mut bytes = fs::read(&second).unwrap();
    let at = bytes.len() - 1;
    bytes[at] ^= 1;
    fs::write(&second, &bytes).unwrap();
    let e = read(dir.path(), 1).unwrap_err().to_string();
    assert!(e.contains(&second.display().to_string()), "{e}");
    assert!(e.contains("at offset") && e.contains("checksum of an event"), "{e}");
    assert!(e.contains("event ") && e.ends_with(" is lost"), "one event: {e}");

    fs::remove_file(&second).unwrap();
    let e = read(dir.path(), 1).unwrap_err();
    let LogError::Gap { lost, .. } = &e else { panic!("{e}") };
    let first_of = |p: &Path| {
        let name = p.file_name().unwrap().to_str().unwrap();
        u64::from_str_radix(&name[4..], 16).unwrap()
    };
    assert_eq!(lost.from, first_of(&second));
    assert_eq!(lost.to, Some(first_of(&names[1]) - 1));
    assert!(e.to_string().contains("are lost"), "{e}");
}

#[test]
fn zeros_at_the_end_are_a_torn_tail() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), 1..=3);
    let last = files(dir.path()).pop().unwrap();
    let len = fs::metadata(&last).unwrap().len();
    let file = OpenOptions::new().write(true).open(&last).unwrap();
    for extra in [1, 19, 20, 21, 5000] {
        file.set_len(len + extra).unwrap();
        assert_eq!(read(dir.path(), 1).unwrap().len(), 3, "{extra} zeros");
    }
    let w = LogWriter::open_with(dir.path(), SEGMENT).unwrap();
    assert_eq!(w.last_sii(), Some(3));
    assert_eq!(fs::metadata(&last).unwrap().len(), len);
}

#[test]
fn another_version_is_its_own_error() {
    let dir = tempfile::tempdir().unwrap();
    let seg = dir.path().join(format!("seg-{:016x}", 1));
    fs::write(&seg, header_with_version(1, 9)).unwrap();
    let is_version = |e| matches!(e, LogError::Version { found: 9, known: FORMAT_VERSION, .. });
    assert!(is_version(read(dir.path(), 1).unwrap_err()));
    assert!(is_version(LogWriter::open(dir.path()).unwrap_err()));
}

#[test]
fn truncate_below_removes_whole_segments_only() {
    let dir = tempfile::tempdir().unwrap();
    let mut w = write(dir.path(), 1..=100);
    let count = files(dir.path()).len();
    w.truncate_below(1).unwrap();
    assert_eq!(files(dir.path()).len(), count);
    w.truncate_below(50).unwrap();
    let first = LogReader::open(dir.path()).unwrap().first_sii().unwrap();
    assert!(first > 1 && first <= 50, "starts at {first}");
    assert_eq!(siis(&read(dir.path(), 50).unwrap()), (50..=100).collect::<Vec<_>>());
    let e = read(dir.path(), 1).unwrap_err();
    assert!(matches!(e, LogError::NotStored { wanted: 1, first: f } if f == first));
    w.truncate_below(u64::MAX).unwrap();
    assert_eq!(files(dir.path()).len(), 1, "the active segment stays");
    w.append(101, b"").unwrap();
    drop(w);
    let w = LogWriter::open_with(dir.path(), SEGMENT).unwrap();
    assert_eq!(w.last_sii(), Some(100), "the last append was never flushed");
}

#[test]
fn truncate_from_any_event() {
    for from in 0..=62 {
        let dir = tempfile::tempdir().unwrap();
        let mut w = write(dir.path(), 1..=60);
        w.truncate_from(from).unwrap();
        let keep = from.saturating_sub(1).min(60);
        assert_eq!(w.last_sii(), (keep > 0).then_some(keep));
        for sii in keep + 1..=70 {
            w.append(sii, &record(sii + 5)).unwrap();
        }
        w.flush().unwrap();
        let got = read(dir.path(), 1).unwrap();
        assert_eq!(siis(&got), (1..=70).collect::<Vec<_>>());
        for (sii, r) in got {
            let version = if sii <= keep { sii } else { sii + 5 };
            assert_eq!(r, record(version));
        }
    }
}

/// `/dev/full` stands in for a full disk. Break it: empty the buffer when a write fails.
#[test]
fn a_full_disk_is_an_error_and_the_writer_goes_on_later() {
    let dir = tempfile::tempdir().unwrap();
    let mut w = write(dir.path(), 1..=2);
    let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
    let real = std::mem::replace(&mut w.active.as_mut().unwrap().file, full);
    w.append(3, b"three").unwrap();
    for _ in 0..2 {
        let e = w.flush().unwrap_err();
        assert!(e.is_full(), "{e}");
    }
    let e = w.append(4, &[4; 1000]).unwrap_err();
    assert!(e.is_full(), "a new segment needs the old one flushed: {e}");
    assert_eq!(w.last_sii(), Some(3));
    w.active.as_mut().unwrap().file = real;
    w.append(4, &[4; 1000]).unwrap();
    w.flush().unwrap();
    assert_eq!(siis(&read(dir.path(), 1).unwrap()), [1, 2, 3, 4]);
}

/// The same on a real, tiny file system, where a write can also be cut short. Needs root.
#[test]
fn a_full_tmpfs_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let root = Command::new("id").arg("-u").output().unwrap().stdout == b"0\n";
    let mounted = root
        && Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=64k", "tmpfs"])
            .arg(dir.path())
            .status()
            .is_ok_and(|s| s.success());
    if !mounted {
        eprintln!("not root: covered by /dev/full only");
        return;
    }
    let result = std::panic::catch_unwind(|| {
        let ballast = dir.path().join("ballast");
        fs::write(&ballast, vec![0; 30 << 10]).unwrap();
        let log = dir.path().join("log");
        let mut w = LogWriter::open_with(&log, 1 << 20).unwrap();
        let mut sii = 1;
        let e = loop {
            w.append(sii, &[sii as u8; 1500]).unwrap();
            sii += 1;
            if let Err(e) = w.flush() {
                break e;
            }
        };
        assert!(e.is_full(), "{e}");
        fs::remove_file(&ballast).unwrap();
        w.append(sii, b"after").unwrap();
        w.flush().unwrap();
        let got = read(&log, 1).unwrap();
        assert_eq!(siis(&got), (1..=sii).collect::<Vec<_>>());
        assert!(got[..got.len() - 1].iter().all(|(s, r)| *r == [*s as u8; 1500]));
    });
    let unmounted = Command::new("umount").arg(dir.path()).status();
    assert!(unmounted.is_ok_and(|s| s.success()));
    if let Err(panic) = result {
        std::panic::resume_unwind(panic);
    }
}

/// A pipe cannot be synced, so it stands in for a disk that fails. Break it: do not set `poisoned`.
#[test]
fn a_failed_sync_poisons_the_writer() {
    let dir = tempfile::tempdir().unwrap();
    let mut w = write(dir.path(), 1..=2);
    let (_keep, pipe) = std::io::pipe().unwrap();
    let pipe = std::fs::File::from(OwnedFd::from(pipe));
    let real = std::mem::replace(&mut w.active.as_mut().unwrap().file, pipe);
    assert!(matches!(w.sync().unwrap_err(), LogError::Io { op: "sync", .. }));
    w.active.as_mut().unwrap().file = real;
    let poisoned = |r: Result<(), LogError>| matches!(r, Err(LogError::Poisoned { .. }));
    assert!(poisoned(w.sync()));
    assert!(poisoned(w.flush()));
    assert!(poisoned(w.append(3, b"")));
    assert!(poisoned(w.truncate_from(1)));
    drop(w);
    assert_eq!(LogWriter::open(dir.path()).unwrap().last_sii(), Some(2), "reopening works");
}

proptest! {
    #[test]
    fn any_records_come_back(
        first in 0..u64::MAX / 2,
        records in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..400), 0..40),
        from in 0usize..40,
    ) {
        let dir = tempfile::tempdir().unwrap();
        let mut w = LogWriter::open_with(dir.path(), SEGMENT).unwrap();
        for (i, r) in records.iter().enumerate() {
            w.append(first + i as u64, r).unwrap();
        }
        w.flush().unwrap();
        let got = read(dir.path(), first + from as u64).unwrap();
        let want: Vec<_> = records.iter().enumerate().skip(from)
            .map(|(i, r)| (first + i as u64, r.clone())).collect();
        prop_assert_eq!(got, want);
    }

    #[test]
    fn any_bytes_are_read_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let dir = tempfile::tempdir().unwrap();
        let mut file = header_with_version(5, FORMAT_VERSION).to_vec();
        file.extend(&bytes);
        fs::write(dir.path().join(format!("seg-{:016x}", 5)), file).unwrap();
        drop(read(dir.path(), 5));
        drop(LogWriter::open(dir.path()));
    }
}
