//! What must hold whatever happens, and the test that holds it (durability level `process`).
//!
//! | invariant | held by | to break it on purpose |
//! |---|---|---|
//! | **Output commit.** Nothing leaves the unit that cannot be rebuilt. | `fault_points::killed_around_a_call` (a kill between a call and its event, and between the event and the program's knowing), `programs::*`; for what cannot be logged `fault_points::killed_between_an_unloggable_call_and_its_checkpoint` | in `Unit::complete` let the thread go on before `append`; leave out the checkpoint after an unloggable call |
//! | **Replay is exact.** | every test of `programs` verifies its log at the end; [`one_changed_result_is_a_divergence`], [`a_changed_log_never_harms_verify`] | leave out the comparison of digests in `Unit::apply_call` |
//! | **Exactly once.** | `programs::*` (every reply carries counts), `fault_points::killed_around_a_call`, `storms::*` | append an event twice, or forget `Begun::done` of a write that blocked |
//! | **Never wrong, only slower.** | `fault_points::killed_between_an_unloggable_call_and_its_checkpoint`, `programs::spin` and `alarm_spin` (preemption) | leave out `EventLog::drop_unloggable` |
//! | **The store is atomic.** | [`what_is_stored_is_whole_when_the_supervisor_is_killed`], `damage::*`, `full_disk::*`, the unit tests of `store::log` and `ckpt::image` | write a checkpoint under its own name instead of renaming it; write it before the records that it follows |
//! | **Bad input is an error, not a crash.** | `damage::*`, `full_disk::*`, `cli::*`, [`a_changed_log_never_harms_verify`] | unwrap anything that comes from a file |

use std::path::Path;
use std::process::Output;
use std::time::{Duration, Instant};

use ftrun_abi::record::{Kind, Record, RecordBuf};
use ftrun_store::{LogReader, LogWriter};
use ftrun_tests::binaries::is_bare;
use ftrun_tests::clients::Echo;
use ftrun_tests::load::Load;
use ftrun_tests::process::Process;
use ftrun_tests::rng::Rng;
use ftrun_tests::scenarios::guest_launch;
use ftrun_tests::unit::{Ready, Unit};
use ftrun_tests::{Error, error};

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn verify(unit: &Unit) -> Result<Output, Error> {
    unit.ftrun(["verify", &unit.name])
}

/// A unit that has answered some lines, and is stopped; its log follows its newest checkpoint.
fn stopped() -> Result<Unit, Error> {
    let mut launch = guest_launch("epoll_echo")?;
    launch.ready(Ready::Line).options(["--checkpoint-every", "1h"]);
    let unit = launch.start()?;
    let mut client = Echo::connect(unit.port, Rng::new(1), true)?;
    for n in 0..5 {
        client.ask(format!("secret {n}").as_bytes())?;
    }
    unit.verify()?;
    for n in 5..10 {
        client.ask(format!("secret {n}").as_bytes())?;
    }
    unit.stop()?;
    let output = verify(&unit)?;
    assert!(output.status.success(), "{}", text(&output.stdout));
    Ok(unit)
}

/// An event of a log, taken apart.
#[derive(Clone)]
struct Event {
    sii: u64,
    record: Vec<u8>,
    call: Option<(u16, i64)>,
    outputs: Vec<(u64, Vec<u8>)>,
}

fn events(log: &Path) -> Result<Vec<Event>, Error> {
    let of = |e: ftrun_store::LogError| error!("{e}");
    let reader = LogReader::open(log).map_err(of)?;
    let mut events = Vec::new();
    for item in reader.records(reader.first_sii().unwrap_or(1)) {
        let (sii, record) = item.map_err(of)?;
        let (parsed, _) = Record::parse(&record).map_err(|e| error!("event {sii}: {e:?}"))?;
        let call = (parsed.kind == Kind::Call).then_some((parsed.header.nr, parsed.header.result));
        let outputs = parsed.outputs().map(|(addr, bytes)| (addr, bytes.to_vec())).collect();
        events.push(Event { sii, record, call, outputs });
    }
    Ok(events)
}

/// Writes the log again, with right checksums, as if `changed` had been recorded.
fn rewrite(log: &Path, events: &[Event], changed: &Event) -> Result<(), Error> {
    std::fs::remove_dir_all(log)?;
    let of = |e: ftrun_store::LogError| error!("{e}");
    let mut writer = LogWriter::open(log).map_err(of)?;
    for event in events {
        let event = if event.sii == changed.sii { changed } else { event };
        writer.append(event.sii, &event.record).map_err(of)?;
    }
    writer.flush().map_err(of)
}

/// The event with another result and other outputs.
fn remade(event: &Event, result: i64, outputs: &[(u64, Vec<u8>)]) -> Result<Event, Error> {
    let (record, _) = Record::parse(&event.record).map_err(|e| error!("{e:?}"))?;
    let h = record.header;
    let mut made = RecordBuf::new(record.kind);
    made.tid(h.tid).nr(h.nr).flags(h.flags).sii(h.sii).result(result).digest(h.digest);
    for (addr, bytes) in outputs {
        made.push_output(*addr, bytes).map_err(|_| error!("an output is too long"))?;
    }
    Ok(Event { record: made.finish().to_vec(), ..event.clone() })
}

#[test]
fn one_changed_result_is_a_divergence() -> Result<(), Error> {
    if is_bare() {
        return Ok(());
    }
    let unit = stopped()?;
    let log = unit.stored().join("log");
    let events = events(&log)?;
    let recv = |e: &&Event| e.call.is_some_and(|(nr, _)| i64::from(nr) == libc::SYS_recvfrom);
    let read = |e: &Event, what: &str| e.outputs.iter().any(|(_, b)| text(b).contains(what));
    let find = |what: &str| events.iter().filter(recv).find(|e| read(e, what)).ok_or_else(|| error!("no {what}"));
    // In the interval between two checkpoints, and in the one after the last. One letter of what was
    // received is another, or a letter less was received.
    for what in ["secret 3", "secret 7"] {
        let event = find(what)?;
        let result = event.call.map_or(0, |c| c.1);
        let mut other = event.outputs.clone();
        other[0].1[0] ^= 1;
        let mut less = event.outputs.clone();
        less[0].1.pop();
        for changed in [remade(event, result, &other)?, remade(event, result - 1, &less)?] {
            rewrite(&log, &events, &changed)?;
            let output = verify(&unit)?;
            let said = text(&output.stdout);
            assert_eq!(output.status.code(), Some(1), "{said}{}", text(&output.stderr));
            // The answer differs, and its call is the next event but those that say that it may be sent.
            let next = events
                .iter()
                .find(|e| e.sii > event.sii && e.call.is_some_and(|(nr, _)| i64::from(nr) == libc::SYS_sendto));
            let at = format!("replay diverged at event {}", next.map_or(0, |e| e.sii));
            let short = result - 1 == changed.call.map_or(0, |c| c.1);
            assert!(short || said.contains(&at), "`{at}` is not said:\n{said}");
            for part in ["replay diverged at event", "logged:   sendto(", "replayed: ", "verification failed"] {
                assert!(said.contains(part), "`{part}` is not said:\n{said}");
            }
            assert!(said.lines().count() <= 20, "{said}");
            assert!(!said.contains("no divergence"), "{said}");
        }
    }
    rewrite(&log, &events, &events[0])?;
    assert!(verify(&unit)?.status.success(), "rewritten as it was");
    Ok(())
}

/// A log whose checksums are right and whose content is not: whatever comes of it, verify says it in order.
#[test]
fn a_changed_log_never_harms_verify() -> Result<(), Error> {
    const CHANGES: u64 = 40;
    if is_bare() {
        return Ok(());
    }
    let unit = stopped()?;
    let seed = Load::from_env().seed;
    let mut rng = Rng::part(seed, 5);
    let log = unit.stored().join("log");
    let events = events(&log)?;
    let mut different = 0;
    for n in 0..CHANGES {
        let newest = events.len() as u64 * 2 / 3;
        let event = &events[rng.within(newest..=events.len() as u64 - 1) as usize];
        let result = event.call.map_or(0, |c| c.1);
        let mut outputs = event.outputs.clone();
        let changed = match rng.within(0..=3) {
            0 => remade(event, rng.next() as i64, &outputs)?,
            1 => remade(event, -(rng.within(1..=200) as i64), &[])?,
            2 if outputs.iter().any(|o| !o.1.is_empty()) => {
                let (_, bytes) = outputs.iter_mut().find(|o| !o.1.is_empty()).ok_or_else(|| error!("none"))?;
                let at = rng.within(0..=bytes.len() as u64 - 1) as usize;
                bytes[at] ^= 1 << rng.within(0..=7);
                remade(event, result, &outputs)?
            }
            _ => {
                // As long as it was, and full of other numbers.
                let mut record = event.record.clone();
                let at = rng.within(4..=record.len() as u64 - 1) as usize;
                record[at] = rng.next() as u8;
                Event { record, ..event.clone() }
            }
        };
        rewrite(&log, &events, &changed)?;
        let start = Instant::now();
        let output = verify(&unit)?;
        let said = format!("{}{}", text(&output.stdout), text(&output.stderr));
        let what = format!("seed {seed}, change {n} to event {}: {:?}\n{said}", event.sii, output.status);
        assert!(output.status.code().is_some() && !said.contains("panicked"), "{what}");
        assert!(start.elapsed() < Duration::from_secs(30), "{what}");
        different += u64::from(!output.status.success());
        assert_eq!(output.status.success(), text(&output.stdout).contains("no divergence"), "{what}");
    }
    println!("{different} of {CHANGES} changes were noticed");
    assert!(different > CHANGES / 4, "{different}");
    Ok(())
}

/// Large checkpoints are taken and events written all the time, and the supervisor is killed in the midst of it:
/// what was acknowledged is there, and what is there is whole.
#[test]
fn what_is_stored_is_whole_when_the_supervisor_is_killed() -> Result<(), Error> {
    if is_bare() {
        return Ok(());
    }
    let seed = Load::from_env().seed;
    let mut rng = Rng::part(seed, 6);
    for round in 0..12 {
        let mut launch = guest_launch("epoll_echo")?;
        launch.ready(Ready::Line).options(["--journal", "--checkpoint-every", "3ms"]);
        let unit = launch.start()?;
        let acknowledged = unit.ftrun(["checkpoint", &unit.name])?;
        assert!(acknowledged.status.success(), "{}", text(&acknowledged.stderr));
        let port = unit.port;
        let client = std::thread::spawn(move || -> Option<()> {
            let mut client = Echo::connect(port, Rng::new(1), false).ok()?;
            let line = Rng::new(2).text(1 << 20);
            // Until the connection breaks.
            while client.ask(&line).is_ok() {}
            Some(())
        });
        std::thread::sleep(Duration::from_micros(rng.within(1_000..=80_000)));
        let status = unit.status()?;
        let supervisor = status["supervisor_pid"].as_i64().and_then(|pid| i32::try_from(pid).ok()).unwrap_or(0);
        Process::open(supervisor)?.signal(libc::SIGKILL)?;
        assert_eq!(unit.wait()?.code(), Some(125), "{}", unit.stderr()?);
        assert!(matches!(client.join(), Ok(Some(()))), "the client connected");
        let output = verify(&unit)?;
        let said = format!("seed {seed}, round {round}: {}{}", text(&output.stdout), text(&output.stderr));
        assert!(output.status.success() && said.contains("no divergence"), "{said}");
        let stored = std::fs::read_dir(unit.stored().join("ckpt"))?.flatten();
        let sound = stored.filter(|e| e.file_name().to_string_lossy().starts_with("ckpt-")).count();
        assert!(sound >= 2, "{sound} checkpoints after the first and an acknowledged one");
        assert_eq!(unit.state()?, "stopped");
    }
    Ok(())
}

/// Recovery at level `process` uses memory, so the disk is left alone until somebody asks.
///
/// Break it: store checkpoints without being asked (`Journal::checkpoint`), or forget that one was not stored.
#[test]
fn a_running_unit_leaves_the_disk_alone() -> Result<(), Error> {
    if is_bare() {
        return Ok(());
    }
    let mut launch = guest_launch("epoll_echo")?;
    launch.ready(Ready::Line).options(["--checkpoint-every", "20ms"]);
    let unit = launch.start()?;
    let mut client = Echo::connect(unit.port, Rng::new(1), true)?;
    let written = |unit: &Unit| -> Result<u64, Error> {
        let mut bytes = 0;
        for dir in ["log", "ckpt"] {
            for file in std::fs::read_dir(unit.stored().join(dir))?.flatten() {
                bytes += file.metadata()?.len();
            }
        }
        Ok(bytes)
    };
    let mut before = written(&unit)?;
    for round in 0..3 {
        let stored = unit.status()?["stored_checkpoint"].clone();
        let line = Rng::new(2).text(1 << 20);
        for _ in 0..20 {
            client.ask(&line)?;
        }
        if round == 1 {
            unit.kill9()?;
            client.ask(&line)?;
        }
        std::thread::sleep(Duration::from_millis(50));
        let status = unit.status()?;
        assert!(status["last_checkpoint"]["sii"].as_u64() > stored.as_u64(), "checkpoints are taken: {status}");
        assert_eq!(status["stored_checkpoint"], stored);
        assert_eq!(written(&unit)?, before, "round {round}");
        let verdict = unit.verify()?;
        assert!(verdict.contains("no divergence"), "{verdict}");
        let newer = unit.status()?["stored_checkpoint"].clone();
        assert!(newer.as_u64() > stored.as_u64(), "{stored} {newer}");
        before = written(&unit)?;
    }
    unit.stop()?;
    Ok(())
}
