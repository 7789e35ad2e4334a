//! The files that a program's memory is mapped from lose their names, or others are put in their place, as an upgrade does: the
//! unit goes on from what they were.

use std::path::Path;
use std::time::{Duration, Instant};

use ftrun_tests::binaries::{copy_executable, is_bare, need};
use ftrun_tests::load::{Load, Victim};
use ftrun_tests::process::is_root;
use ftrun_tests::rng::Rng;
use ftrun_tests::scenarios::guest_launch;
use ftrun_tests::service::Service;
use ftrun_tests::unit::{LIMIT, Launch, Ready, Unit};
use ftrun_tests::{Error, error};

/// The program, to be started with these options.
fn mapped<const N: usize>(options: [&str; N]) -> Result<Launch, Error> {
    let mut launch = guest_launch("mapped")?;
    launch.ready(Ready::Line).options(options);
    Ok(launch)
}

fn program(unit: &Unit) -> std::path::PathBuf {
    unit.path().join("mapped")
}

/// Puts another file in the place of one.
fn replace(file: &Path, by: &Path) -> Result<(), Error> {
    let new = file.with_extension("new");
    copy_executable(by, &new)?;
    Ok(std::fs::rename(new, file)?)
}

/// The program and its data are replaced by files that make no sense there.
fn replace_both(unit: &Unit) -> Result<(), Error> {
    let other = need("true")?;
    replace(&program(unit), &other)?;
    replace(&unit.work().join("data"), &other)
}

/// Waits for a further round.
fn await_round(unit: &Unit) -> Result<(), Error> {
    let (before, start) = (unit.stdout()?.len(), Instant::now());
    while unit.stdout()?.len() <= before {
        if start.elapsed() > LIMIT {
            return Err(error!("no further round: {}", unit.stderr()?));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

/// Waits until a checkpoint is there that was begun now or later.
fn checkpoint(unit: &Unit) -> Result<(), Error> {
    let output = unit.ftrun(["checkpoint", &unit.name])?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// Waits until the unit has taken a checkpoint by itself. Names are looked at twice a second; that the log is full, which asks for one,
/// too, takes several times as long as this waits.
fn await_checkpoint(unit: &Unit) -> Result<(), Error> {
    const NOTICED: Duration = Duration::from_secs(8);
    let count = || Ok::<_, Error>(unit.status()?["checkpoints"]["count"].as_u64());
    let (before, start) = (count()?, Instant::now());
    while count()? == before {
        assert!(start.elapsed() < NOTICED, "nobody has noticed that the files were replaced");
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// Kills of the program, the supervisor or both.
///
/// Break it: take no checkpoint for a file that has lost its name (`Unit::look_at_files`), leave a mapping of one out of
/// `Files::follow`, or forget at a restore what the pages have of it (`Files::restored`).
#[test]
fn killed_when_they_have_been_replaced() -> Result<(), Error> {
    if is_bare() {
        return Ok(());
    }
    let load = Load::from_env();
    let mut rng = Rng::new(load.seed);
    // Of another user's process only memory shows what a file was.
    const ORDINARY: u32 = 65534;
    let ordinary = is_root().then_some(("supervisor", Some(ORDINARY)));
    for (level, user) in [("process", None), ("supervisor", None)].into_iter().chain(ordinary) {
        // Nothing else asks for a checkpoint.
        let never = ["--durability", level, "--checkpoint-every", "1h", "--recover-within", "1h"];
        let mut launch = mapped(never)?;
        if let Some(user) = user {
            launch.as_user(user);
        }
        let unit = launch.start()?;
        await_round(&unit)?;
        replace_both(&unit)?;
        await_checkpoint(&unit)?;
        for _ in 0..load.kills {
            await_round(&unit)?;
            let victims = [Victim::Unit, Victim::Supervisor, Victim::Both];
            let others = if level == "process" { 0 } else { 2 };
            unit.kill9_victim(victims[rng.within(0..=others) as usize])?;
            if rng.one_in(4) {
                checkpoint(&unit)?;
            }
        }
        await_round(&unit)?;
        println!("{level}, {user:?}: {} rounds", unit.finish_rounds()?);
    }
    Ok(())
}

/// Everything is killed, and the unit resumed from memory.
#[test]
fn resumed_when_they_have_been_replaced() -> Result<(), Error> {
    if is_bare() {
        return Ok(());
    }
    let unit = mapped(["--durability", "supervisor"])?.start()?;
    await_round(&unit)?;
    replace_both(&unit)?;
    checkpoint(&unit)?;
    for n in 0..3 {
        await_round(&unit)?;
        unit.kill9_all(n)?;
        unit.resume()?;
    }
    unit.finish_rounds()?;
    Ok(())
}

/// What the unit was mapped from when it was killed is not there any more: it is said which file that is, and when that is put
/// back the unit goes on. A file with the same content does as well where the store knows it.
///
/// Break it: map whatever has the name (`files::open`), or give up what remains of a unit that lacks something.
#[test]
fn a_file_that_is_missing_is_named() -> Result<(), Error> {
    if is_bare() {
        return Ok(());
    }
    for level in ["supervisor", "node"] {
        let launch = mapped(["--durability", level, "--checkpoint-every", "1h", "--recover-within", "1h"])?;
        let unit = launch.start()?;
        checkpoint(&unit)?;
        await_round(&unit)?;
        unit.kill9_all(0)?;
        let (file, kept) = (program(&unit), unit.path().join("kept"));
        std::fs::rename(&file, &kept)?;
        for other in [None, Some(need("true")?)] {
            other.iter().try_for_each(|other| replace(&file, other))?;
            unit.resume().expect_err("the program is not what it was");
            let told = unit.stderr()?;
            let named = format!("memory of the program is mapped from {}, which", file.display());
            assert!(told.contains(&named) && told.contains("nothing of it has been given up"), "{told}");
        }
        if level == "node" {
            replace(&file, &kept)?;
        } else {
            std::fs::rename(&kept, &file)?;
        }
        unit.resume()?;
        println!("{level}: {} rounds", unit.finish_rounds()?);
    }
    Ok(())
}

/// The machine is lost, and the other one has neither the program nor its data.
///
/// Break it: leave a mapped file's pages out of what is stored.
#[test]
fn a_self_contained_unit_needs_none_of_them() -> Result<(), Error> {
    if is_bare() {
        return Ok(());
    }
    let service = Service::new()?;
    let store = service.url();
    let unit = mapped(["--durability", "node", "--stable", "cache", "--store", &store, "--self-contained"])?.start()?;
    for n in 0..3 {
        await_round(&unit)?;
        unit.kill9_all(n)?;
        unit.wipe_memory()?;
        for file in [program(&unit), unit.work().join("data")] {
            match std::fs::remove_file(file) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e.into()),
                _removed => {}
            }
        }
        unit.resume_as(&[], &["--store", &store, "--stable", "cache"])?;
    }
    std::fs::File::create(unit.work().join("stop"))?;
    let status = unit.wait()?;
    // A line that was being written when the machine was lost may be there twice.
    let mut lines: Vec<String> = unit.stdout()?.lines().map(str::to_owned).collect();
    lines.dedup();
    let rounds = lines.len().saturating_sub(2);
    let want = (1..=rounds).map(|n| format!("round {n}"));
    let want: Vec<String> = ["ready 0".to_owned()].into_iter().chain(want).chain([format!("ok {rounds}")]).collect();
    assert!(status.success() && lines == want, "{status}: {}", unit.stderr()?);
    Ok(())
}
