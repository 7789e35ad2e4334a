//! Damage to what is stored is found and named, wherever it is, and never replayed.
//!
//! A unit is run and stopped; then its files are damaged one by one, and `ftrun verify` is asked. Every byte
//! of a checkpoint and of a log segment is under a checksum, so there is no position at which a flip may
//! pass. To break it on purpose: leave out a comparison in `Reader::load` (`ckpt::image`) or in
//! `Scan::frame` (`store::log`), or the comparison with the status in `verify::read_end`.

use std::path::{Path, PathBuf};
use std::process::Output;

use ftrun_tests::binaries::is_bare;
use ftrun_tests::clients::Echo;
use ftrun_tests::load::Load;
use ftrun_tests::rng::Rng;
use ftrun_tests::scenarios::guest_launch;
use ftrun_tests::unit::{Ready, Unit};
use ftrun_tests::{Error, error};

/// Positions at random in each file, and lengths to which each file is cut.
const SAMPLES: usize = 24;
/// Bytes of the head of a checkpoint and of a log segment, all of which are tried.
const CHECKPOINT_HEAD: usize = 48;
const SEGMENT_HEAD: usize = 24;
/// Bytes of a frame of the log before its record.
const FRAME_HEAD: usize = 20;

/// A unit that has run, with three checkpoints behind it and events after each, and is stopped.
fn stopped() -> Result<Unit, Error> {
    let mut launch = guest_launch("epoll_echo")?;
    launch.ready(Ready::Line).options(["--checkpoint-every", "1h"]);
    let unit = launch.start()?;
    let mut client = Echo::connect(unit.port, Rng::new(1), true)?;
    for round in 0..3 {
        for n in 0..10 {
            client.ask(format!("round {round} line {n}").as_bytes())?;
        }
        if round < 2 {
            let output = unit.ftrun(["checkpoint", &unit.name])?;
            assert!(output.status.success(), "{}", text(&output.stderr));
        }
    }
    unit.stop()?;
    let output = verify(&unit)?;
    assert!(output.status.success(), "{}{}", text(&output.stdout), text(&output.stderr));
    assert!(text(&output.stdout).ends_with("no divergence\n"), "{}", text(&output.stdout));
    Ok(unit)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn verify(unit: &Unit) -> Result<Output, Error> {
    unit.ftrun(["verify", &unit.name])
}

/// The files of a directory of the unit, sorted by name, which is by age.
fn files(unit: &Unit, kind: &str) -> Result<Vec<PathBuf>, Error> {
    let mut files: Vec<_> = std::fs::read_dir(unit.stored().join(kind))?.flatten().map(|e| e.path()).collect();
    files.sort();
    if files.is_empty() { Err(error!("no files in {kind}")) } else { Ok(files) }
}

fn name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// Verify must have failed in an orderly manner, and have said each of `parts`.
fn noticed(output: &Output, what: &str, parts: &[&str]) -> Result<(), Error> {
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    let whole = format!("{what}: {:?}\n{out}{err}", output.status);
    if output.status.code().is_none_or(|c| c == 0) || out.contains("no divergence") || err.contains("panicked") {
        return Err(Error(whole));
    }
    match parts.iter().find(|part| !out.contains(**part) && !err.contains(**part)) {
        Some(part) => Err(error!("`{part}` is not said: {whole}")),
        None => Ok(()),
    }
}

/// Runs `check` while `path` holds other bytes.
fn with<T>(path: &Path, bytes: &[u8], check: impl FnOnce() -> Result<T, Error>) -> Result<T, Error> {
    let good = std::fs::read(path)?;
    std::fs::write(path, bytes)?;
    let result = check();
    std::fs::write(path, good)?;
    result
}

/// Starts of the frames of a log segment, and its end.
fn frames(segment: &[u8]) -> Vec<usize> {
    let mut at = SEGMENT_HEAD;
    let mut starts = vec![at];
    while let Some(length) = segment.get(at..at + 4) {
        at += FRAME_HEAD + u32::from_le_bytes([length[0], length[1], length[2], length[3]]) as usize;
        starts.push(at);
    }
    starts
}

#[test]
fn a_flipped_bit_is_found_wherever_it_is() -> Result<(), Error> {
    if is_bare() {
        return Ok(());
    }
    let unit = stopped()?;
    let mut rng = Rng::part(Load::from_env().seed, 1);
    let mut tried = 0;
    for (kind, head) in [("ckpt", CHECKPOINT_HEAD), ("log", SEGMENT_HEAD)] {
        for path in files(&unit, kind)? {
            let good = std::fs::read(&path)?;
            let last = good.len() as u64 - 1;
            let mut positions: Vec<usize> = (0..head).chain([good.len() - 1]).collect();
            if kind == "ckpt" {
                // The heads of the first section and of the last.
                positions.extend((head..head + 24).step_by(5).chain(good.len() - 36..good.len() - 12));
            } else {
                let starts = frames(&good);
                let frame = starts[rng.within(0..=starts.len() as u64 - 2) as usize];
                positions.extend(frame..frame + FRAME_HEAD);
            }
            positions.extend((0..SAMPLES).map(|_| rng.within(head as u64..=last) as usize));
            for at in positions {
                let mut bad = good.clone();
                bad[at] ^= 1 << rng.within(0..=7);
                let what = format!("{} byte {at} of {}", name(&path), good.len());
                // Another version is another version, though it is one flipped bit away.
                let version = kind == "ckpt" && (8..12).contains(&at);
                let place = match kind {
                    _ if version => "format",
                    "ckpt" => "damaged at byte",
                    _ => "damaged at offset",
                };
                with(&path, &bad, || noticed(&verify(&unit)?, &what, &[&name(&path), place]))?;
                tried += 1;
            }
        }
    }
    println!("{tried} flipped bits");
    assert!(tried > 200, "{tried}");
    assert!(verify(&unit)?.status.success(), "undamaged again");
    Ok(())
}

#[test]
fn a_file_that_is_cut_is_noticed() -> Result<(), Error> {
    if is_bare() {
        return Ok(());
    }
    let unit = stopped()?;
    let mut rng = Rng::part(Load::from_env().seed, 2);
    for path in files(&unit, "ckpt")? {
        let good = std::fs::read(&path)?;
        let mut lengths = vec![0, 1, CHECKPOINT_HEAD - 1, CHECKPOINT_HEAD, good.len() - 36, good.len() - 1];
        lengths.extend((0..SAMPLES / 2).map(|_| rng.within(0..=good.len() as u64 - 1) as usize));
        for length in lengths {
            let what = format!("{} cut to {length} of {}", name(&path), good.len());
            let parts = [name(&path), "damaged at byte".into()];
            let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
            with(&path, &good[..length], || noticed(&verify(&unit)?, &what, &parts))?;
        }
    }
    // The end of the log may be torn, that is how a log ends whose writer was killed; but here a checkpoint,
    // or the status, knows of events that are not there.
    let path = files(&unit, "log")?.pop().unwrap_or_default();
    let good = std::fs::read(&path)?;
    let starts = frames(&good);
    assert_eq!(starts.last(), Some(&good.len()), "the log ends with a whole record");
    let mut lengths = vec![0, 7, SEGMENT_HEAD - 1, SEGMENT_HEAD, good.len() - 1];
    lengths.extend(starts[..starts.len() - 1].iter().rev().take(4));
    lengths.extend((0..SAMPLES).map(|n| {
        let frame = starts[rng.within(0..=starts.len() as u64 - 2) as usize];
        if n % 2 == 0 { frame } else { frame + rng.within(1..=FRAME_HEAD as u64) as usize }
    }));
    for length in lengths {
        let what = format!("{} cut to {length} of {}", name(&path), good.len());
        with(&path, &good[..length], || noticed(&verify(&unit)?, &what, &["the log"]))?;
    }
    std::fs::remove_file(&path)?;
    noticed(&verify(&unit)?, "without the log", &["the log"])
}

#[test]
fn log_prints_what_is_sound_and_then_the_error() -> Result<(), Error> {
    if is_bare() {
        return Ok(());
    }
    let unit = stopped()?;
    let log = || unit.ftrun(["log", &unit.name]);
    let whole = text(&log()?.stdout);
    let path = files(&unit, "log")?.pop().unwrap_or_default();
    let mut bad = std::fs::read(&path)?;
    let starts = frames(&bad);
    let sound = starts.len() / 2;
    bad[starts[sound] + FRAME_HEAD] ^= 4;
    let output = with(&path, &bad, log)?;
    let want: String = whole.split_inclusive('\n').take(sound).collect();
    assert_eq!(text(&output.stdout), want, "the events before the damaged one");
    let place = format!("offset {}", starts[sound]);
    noticed(&output, "ftrun log", &[&name(&path), &place, "hint:"])
}

#[test]
fn the_older_checkpoint_and_the_log_stand_in_for_a_damaged_one() -> Result<(), Error> {
    if is_bare() {
        return Ok(());
    }
    let unit = stopped()?;
    let newest = files(&unit, "ckpt")?.pop().unwrap_or_default();
    let hex = name(&newest).replace("ckpt-", "");
    let sii = u64::from_str_radix(&hex, 16).map_err(|e| error!("{hex}: {e}"))?;
    let good = std::fs::read(&newest)?;
    // In its body, which is read when it is loaded; in its head, which is read when it is looked for.
    for at in [good.len() / 2, 20] {
        let mut bad = good.clone();
        bad[at] ^= 1;
        let output = with(&newest, &bad, || verify(&unit))?;
        let over = format!("over the damaged checkpoint at event {sii}: replayed");
        noticed(&output, "verify", &[&name(&newest), &over])?;
        assert!(!text(&output.stdout).contains("DIFFERENT"), "{}", text(&output.stdout));
    }
    Ok(())
}

#[test]
fn another_format_is_refused_with_the_remedy() -> Result<(), Error> {
    if is_bare() {
        return Ok(());
    }
    let unit = stopped()?;
    std::fs::write(unit.stored().join("format"), "ftrun unit 99\n")?;
    let run = ["run", "--name", &unit.name, "--", "/bin/true"];
    let commands: [&[&str]; 5] =
        [&["verify", &unit.name], &["log", &unit.name], &["status", &unit.name], &["rm", &unit.name], &run];
    for command in commands {
        noticed(&unit.ftrun(command)?, &command.join(" "), &["format 99", "format 1", "hint: use the ftrun that"])?;
    }
    assert!(files(&unit, "ckpt")?.len() + files(&unit, "log")?.len() >= 3, "nothing was removed");
    std::fs::write(unit.stored().join("format"), "ftrun unit 1\n")?;
    assert!(verify(&unit)?.status.success());
    Ok(())
}
