//! The state directory is on a disk that is full: at the start, and later.
//!
//! The disk is a small tmpfs that only the test sees: the test starts itself again in a mount namespace of
//! its own. That takes root; others skip it and say so.

use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use ftrun_tests::binaries::is_bare;
use ftrun_tests::clients::{Echo, Redis};
use ftrun_tests::process::is_root;
use ftrun_tests::rng::Rng;
use ftrun_tests::scenarios::{guest_launch, redis_launch};
use ftrun_tests::unit::{Launch, Ready, Unit};
use ftrun_tests::{Error, error};

const INSIDE: &str = "FTRUN_TEST_INSIDE";
/// What is said once when something cannot be stored.
const WARNING: &str = "does not take what is written";

/// True inside a mount namespace of our own. Outside it runs test `name` again inside one, which decides.
fn inside(name: &str) -> Result<bool, Error> {
    if std::env::var_os(INSIDE).is_some() {
        return Ok(true);
    }
    if is_bare() {
        return Ok(false);
    }
    let unshare = || {
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private"]);
        command
    };
    let may = || unshare().args(["mount", "-t", "tmpfs", "tmpfs", "/mnt"]).output().is_ok_and(|o| o.status.success());
    if !is_root() || !may() {
        println!("{name} is skipped: it has to mount a small disk, which takes root");
        return Ok(false);
    }
    let output =
        unshare().arg(std::env::current_exe()?).args(["--exact", name, "--nocapture"]).env(INSIDE, "1").output()?;
    if output.status.success() {
        return Ok(false);
    }
    Err(error!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr)))
}

/// A small disk, unmounted when it is dropped.
struct Disk(PathBuf);

impl Disk {
    fn mount(at: &Path, kib: u64) -> Result<Self, Error> {
        let size = format!("size={kib}k");
        let status = Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(at).status()?;
        if status.success() { Ok(Self(at.into())) } else { Err(error!("mount: {status}")) }
    }

    /// Gives it another size.
    fn resize(&self, kib: u64) -> Result<(), Error> {
        let size = format!("remount,size={kib}k");
        let status = Command::new("mount").args(["-o", &size]).arg(&self.0).status()?;
        if status.success() { Ok(()) } else { Err(error!("mount -o {size}: {status}")) }
    }

    /// Fills it but for `spare` KiB.
    fn fill(&self, spare: usize) -> Result<(), Error> {
        let path = self.0.join("ballast");
        let mut ballast = std::fs::File::create(&path)?;
        loop {
            match ballast.write_all(&[7; 4096]) {
                Ok(()) => {}
                Err(e) if e.kind() == ErrorKind::StorageFull => break,
                Err(e) => return Err(e.into()),
            }
        }
        let length = ballast.metadata()?.len();
        Ok(ballast.set_len(length.saturating_sub(spare as u64 * 1024))?)
    }

    fn clear(&self) -> Result<(), Error> {
        Ok(std::fs::remove_file(self.0.join("ballast"))?)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _gone_with_the_namespace = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

/// Break it: start the program before the first checkpoint is stored, or go on without one
/// (`Unit::adopt_image`).
#[test]
fn a_start_on_a_full_disk_is_refused() -> Result<(), Error> {
    if !inside("a_start_on_a_full_disk_is_refused")? {
        return Ok(());
    }
    // Full from the beginning, and full at each of the steps that a start takes.
    for spare in [0, 4, 8, 12] {
        let mut launch = Launch::new("full")?;
        let (state, started) = (launch.state_dir(), launch.work().join("started"));
        let disk = Disk::mount(&state, 256)?;
        disk.fill(spare)?;
        launch.run("/usr/bin/touch", [&started]).ready(Ready::AtOnce);
        let unit = launch.start()?;
        let status = unit.wait()?;
        let err = unit.stderr()?;
        assert_eq!(status.code(), Some(125), "{spare} KiB: {err}");
        for part in [&*state.to_string_lossy(), "No space left on device", "free some space", "--state-dir"] {
            assert!(err.contains(part), "{spare} KiB: `{part}` is not in the message: {err}");
        }
        assert!(!started.exists(), "{spare} KiB: the program was started");
        // With room the same command works.
        disk.clear()?;
        let touch = ["run", "--name", &unit.name, "--", "/usr/bin/touch", &*started.to_string_lossy()];
        let output = unit.ftrun(touch)?;
        assert!(output.status.success(), "{spare} KiB: {}", String::from_utf8_lossy(&output.stderr));
        assert!(started.exists());
        drop(disk);
    }
    Ok(())
}

fn await_warning(unit: &Unit, ask: &mut dyn FnMut() -> Result<(), Error>) -> Result<(), Error> {
    let start = Instant::now();
    while !unit.stderr()?.contains(WARNING) {
        ask()?;
        if start.elapsed() > Duration::from_secs(20) {
            return Err(error!("nobody says that the disk is full"));
        }
    }
    Ok(())
}

/// Break it: end the unit when the journal fails; take deltas to a checkpoint that was not stored; keep the
/// checkpoints whose events are lost (`Disk::begin_anew`).
#[test]
fn a_unit_outlives_a_full_disk() -> Result<(), Error> {
    if !inside("a_unit_outlives_a_full_disk")? {
        return Ok(());
    }
    let mut launch = guest_launch("epoll_echo")?;
    launch.ready(Ready::Line).options(["--journal", "--checkpoint-every", "50ms"]);
    let disk = Disk::mount(&launch.state_dir(), 4096)?;
    let unit = launch.start()?;
    let mut client = Echo::connect(unit.port, Rng::new(1), true)?;
    let mut n = 0;
    let mut ask = move || -> Result<(), Error> {
        n += 1;
        client.ask(format!("line {n}").as_bytes())?;
        Ok(())
    };
    for time in 1..=2 {
        (0..50).try_for_each(|_| ask())?;
        // A little room: records still fit now and then, checkpoints do not.
        disk.fill(if time == 1 { 0 } else { 8 })?;
        await_warning(&unit, &mut ask)?;
        let recoveries = unit.recoveries()?;
        for kill in 1..=3 {
            unit.kill9()?;
            ask()?;
            unit.await_recoveries(recoveries + kill)?;
            std::thread::sleep(Duration::from_millis(120));
            (0..20).try_for_each(|_| ask())?;
        }
        let err = unit.stderr()?;
        assert_eq!(err.matches(WARNING).count(), time, "one warning each time: {err}");
        disk.clear()?;
        unit.verify()?;
        (0..20).try_for_each(|_| ask())?;
        let verdict = unit.verify()?;
        assert!(verdict.ends_with("no divergence\n"), "{verdict}");
        assert_eq!(unit.stderr()?.matches("is written again").count(), time);
    }
    unit.stop()?;
    let output = unit.ftrun(["verify", &unit.name])?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    drop(disk);
    Ok(())
}

/// Break it: take the checkpoint for stored when it is in memory only (`Control::checkpoint`).
#[test]
fn a_checkpoint_that_the_disk_does_not_take_is_not_acknowledged() -> Result<(), Error> {
    if !inside("a_checkpoint_that_the_disk_does_not_take_is_not_acknowledged")? {
        return Ok(());
    }
    let mut launch = guest_launch("epoll_echo")?;
    launch.ready(Ready::Line);
    let disk = Disk::mount(&launch.state_dir(), 4096)?;
    let unit = launch.start()?;
    let mut client = Echo::connect(unit.port, Rng::new(1), true)?;
    for _ in 0..2 {
        disk.fill(0)?;
        client.ask(b"while it is full")?;
        for verb in ["checkpoint", "verify", "log"] {
            let output = unit.ftrun([verb, &unit.name])?;
            let err = String::from_utf8_lossy(&output.stderr).into_owned();
            assert_eq!(output.status.code(), Some(125), "{verb}: {err}");
            assert!(err.contains("not in the state directory") && err.contains("No space left"), "{verb}: {err}");
        }
        unit.kill9()?;
        client.ask(b"and recovery needs no disk")?;
        disk.clear()?;
        let verdict = unit.verify()?;
        assert!(verdict.contains("equal the next checkpoint"), "{verdict}");
    }
    unit.stop()?;
    drop(disk);
    Ok(())
}

/// What the event log and the desk of a unit take of `/dev/shm` from the start.
const LOG_KIB: u64 = 260 << 10;

/// Checkpoints for the next supervisor find no room: the unit goes on, the user is told, and its death is survived as
/// long as the log reaches back to a checkpoint that is there; afterwards it is whole again.
///
/// Break it: give events back to the log though the checkpoint behind them could not be written.
#[test]
fn memory_that_outlives_the_supervisor_is_full() -> Result<(), Error> {
    if !inside("memory_that_outlives_the_supervisor_is_full")? {
        return Ok(());
    }
    const TOLD: &str = "does not take a checkpoint";
    let disk = Disk::mount(Path::new("/dev/shm"), LOG_KIB + (12 << 10))?;
    let mut launch = redis_launch(&["--save", ""])?;
    launch.options(["--durability", "supervisor", "--checkpoint-every", "200ms"]);
    let unit = launch.start()?;
    let mut client = Redis::connect(unit.port, 0, Rng::new(1))?;
    client.fill(24)?;
    let start = Instant::now();
    while !unit.stderr()?.contains(TOLD) {
        assert!(start.elapsed() < Duration::from_secs(20), "nobody was told: {}", unit.stderr()?);
        std::thread::sleep(Duration::from_millis(20));
    }
    for count in 1..=2 {
        unit.kill9_supervisor()?;
        client.verify()?;
        unit.await_recoveries(count)?;
    }
    client.ask(&["FLUSHALL"])?;
    // Beside the last checkpoint that is there, which is needed until there is another.
    disk.resize(LOG_KIB + (64 << 10))?;
    let start = Instant::now();
    while !unit.stderr()?.contains("outlive the supervisor again") {
        assert!(start.elapsed() < Duration::from_secs(20), "it is not whole again: {}", unit.stderr()?);
        client.ask(&["SET", "a", "b"])?;
        std::thread::sleep(Duration::from_millis(20));
    }
    unit.kill9_supervisor()?;
    assert_eq!(client.ask(&["GET", "a"])?, "b");
    unit.stop()?;
    Ok(())
}

/// As above, with checkpoints that no replay can stand in for.
///
/// Break it: end the unit when such a checkpoint finds no room.
#[test]
fn a_unit_outlives_full_memory_for_irregular_checkpoints() -> Result<(), Error> {
    if !inside("a_unit_outlives_full_memory_for_irregular_checkpoints")? {
        return Ok(());
    }
    let disk = Disk::mount(Path::new("/dev/shm"), LOG_KIB + (12 << 10))?;
    let mut launch = guest_launch("unlogged")?;
    launch.ready(Ready::Line).options(["--durability", "supervisor"]);
    let unit = launch.start()?;
    disk.fill(0)?;
    let start = Instant::now();
    while !unit.stderr()?.contains("does not take a checkpoint") {
        assert!(start.elapsed() < Duration::from_secs(20), "nobody was told: {}", unit.stderr()?);
        std::thread::sleep(Duration::from_millis(20));
    }
    unit.kill9()?;
    unit.await_recoveries(1)?;
    unit.finish_rounds()?;
    Ok(())
}
