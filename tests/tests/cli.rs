//! The command line: what passes through, what is refused, what the answers look like.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io::Write;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use ftrun_tests::binaries::{Mode, copy_executable, mode, need};
use ftrun_tests::process::{Process, is_root};
use ftrun_tests::scenarios::guest_launch;
use ftrun_tests::unit::{LIMIT, Launch, Ready, Unit};
use ftrun_tests::{Error, error};

/// Nobody, as far as these tests are concerned.
const STRANGER: u32 = 65534;

/// `ftrun` with a state directory of its own; None in bare mode, where there is nothing to test here.
struct Cli {
    ftrun: PathBuf,
    dir: tempfile::TempDir,
}

impl Cli {
    fn new() -> Result<Option<Self>, Error> {
        let Mode::Under(ftrun) = mode()? else { return Ok(None) };
        Ok(Some(Self { ftrun: ftrun.clone(), dir: tempfile::tempdir()? }))
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.ftrun);
        command.env("FTRUN_STATE_DIR", self.dir.path().join("state")).stdin(Stdio::null());
        command
    }

    fn ftrun<A: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = A>) -> Result<Output, Error> {
        Ok(self.command().args(args).output()?)
    }

    fn shell(&self, script: &str) -> Result<Output, Error> {
        self.ftrun(["--", "/bin/sh", "-c", script])
    }
}

macro_rules! cli {
    () => {
        match Cli::new()? {
            Some(cli) => cli,
            None => return Ok(()),
        }
    };
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// The command must have failed with this status and a message that names each of `parts`.
fn refused(output: &Output, status: Option<i32>, parts: &[&str]) {
    let err = text(&output.stderr);
    assert!(!output.status.success(), "it succeeded: {err}");
    assert!(output.status.code().is_some(), "it died: {:?} {err}", output.status);
    if status.is_some() {
        assert_eq!(output.status.code(), status, "{err}");
    }
    for part in parts {
        assert!(err.contains(part), "`{part}` is not in the message: {err}");
    }
    assert!(!err.contains("panicked"), "{err}");
}

/// Break it: leave the program's variables out of what the file gives (`Config::put_env`).
#[test]
fn a_file_says_what_is_run() -> Result<(), Error> {
    let cli = cli!();
    let file = "command = ['/bin/sh', '-c', 'echo $A $B']\n[env]\nA = 'file'\nB = 'file'\n";
    std::fs::write(cli.dir.path().join("run.toml"), file)?;
    let output =
        cli.command().args(["--config", "run.toml", "--env", "B=line"]).current_dir(cli.dir.path()).output()?;
    assert_eq!(text(&output.stdout), "file line\n", "{}", text(&output.stderr));
    // A service finds the file from wherever it is started.
    let words = ["install-unit", "shop", "--print", "--config", "run.toml", "--", "/bin/true"];
    let output = cli.command().args(words).current_dir(cli.dir.path()).output()?;
    let option = format!("--config={}/run.toml", cli.dir.path().display());
    assert!(text(&output.stdout).contains(&option), "{}{}", text(&output.stdout), text(&output.stderr));
    std::fs::write(cli.dir.path().join("run.toml"), "\ndurabilty = 'node'\n")?;
    let output = cli.command().args(words).current_dir(cli.dir.path()).output()?;
    refused(&output, None, &["run.toml:2:1: unknown key `durabilty`"]);
    Ok(())
}

#[test]
fn exit_status_is_the_programs() -> Result<(), Error> {
    let cli = cli!();
    for status in [0, 3, 255] {
        let output = cli.shell(&format!("exit {status}"))?;
        assert_eq!(output.status.code(), Some(status), "{}", text(&output.stderr));
    }
    Ok(())
}

#[test]
fn a_signal_of_its_own_is_128_and_the_number() -> Result<(), Error> {
    let cli = cli!();
    for signal in [libc::SIGTERM, libc::SIGUSR1, libc::SIGABRT] {
        let output = cli.shell(&format!("kill -{signal} $$"))?;
        assert_eq!(output.status.code(), Some(128 + signal), "{}", text(&output.stderr));
    }
    Ok(())
}

#[test]
fn a_program_that_is_not_there_is_127() -> Result<(), Error> {
    let cli = cli!();
    refused(&cli.ftrun(["--", "/no/such/program"])?, Some(127), &["/no/such/program"]);
    refused(&cli.ftrun(["--", "no-such-program-in-path"])?, Some(127), &["no-such-program-in-path"]);
    Ok(())
}

#[test]
fn a_program_that_cannot_be_executed_is_126() -> Result<(), Error> {
    let cli = cli!();
    let file = cli.dir.path().join("plain.txt");
    std::fs::write(&file, "hello\n")?;
    refused(&cli.ftrun([OsStr::new("--"), file.as_os_str()])?, Some(126), &["plain.txt"]);
    refused(&cli.ftrun([OsStr::new("--"), cli.dir.path().as_os_str()])?, Some(126), &[]);
    Ok(())
}

#[test]
fn stdin_stdout_and_stderr_pass_through() -> Result<(), Error> {
    let cli = cli!();
    let mut command = cli.command();
    command.args(["--", "/bin/sh", "-c", "cat; echo to-stderr >&2"]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let mut input = child.stdin.take().ok_or_else(|| error!("no stdin"))?;
    input.write_all(b"line 1\nline 2\n")?;
    drop(input);
    let output = child.wait_with_output()?;
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert_eq!(text(&output.stdout), "line 1\nline 2\n");
    assert_eq!(text(&output.stderr), "to-stderr\n", "quiet by default");
    Ok(())
}

#[test]
fn directory_environment_and_umask_pass_through() -> Result<(), Error> {
    let cli = cli!();
    let work = cli.dir.path().join("work");
    std::fs::create_dir(&work)?;
    let mut command = Command::new("/bin/sh");
    let script = r#"umask 027; ulimit -S -n 333; exec "$0" --env ADDED=two -- /bin/sh -c 'pwd; umask; ulimit -n; echo $GIVEN $ADDED'"#;
    command.args(["-c", script]).arg(&cli.ftrun).current_dir(&work);
    command.env("FTRUN_STATE_DIR", cli.dir.path().join("state")).env("GIVEN", "one");
    let output = command.output()?;
    let want = format!("{}\n0027\n333\none two\n", work.display());
    assert_eq!(text(&output.stdout), want, "{}", text(&output.stderr));

    let (directory, other) = (work.join("other"), cli.dir.path().join("state"));
    std::fs::create_dir(&directory)?;
    let mut command = cli.command();
    command.arg("--state-dir").arg(&other).arg("--cwd").arg(&directory).args(["--", "/bin/pwd"]);
    let output = command.output()?;
    assert_eq!(text(&output.stdout), format!("{}\n", directory.display()), "{}", text(&output.stderr));
    Ok(())
}

#[test]
fn signals_given_to_ftrun_reach_the_program() -> Result<(), Error> {
    let _ = cli!();
    let mut launch = guest_launch("signals")?;
    launch.ready(Ready::Line);
    let unit = launch.start()?;
    Process::open(unit.started_pid())?.signal(libc::SIGTERM)?;
    let status = unit.wait()?;
    assert_eq!(status.code(), Some(9), "{}", unit.stderr()?);
    assert!(unit.stdout()?.ends_with("ended by SIGTERM\n"));
    Ok(())
}

/// Starts its arguments with these signals ignored, as nohup(1) does with SIGHUP.
const IGNORING: [&str; 4] = ["/bin/sh", "-c", "trap '' HUP PIPE CHLD USR2; exec \"$@\"", "sh"];

/// To break it: do not read the dispositions before Rust's runtime starts, or give the first process none.
#[test]
fn signals_that_were_ignored_stay_ignored() -> Result<(), Error> {
    let cli = cli!();
    let script = "for s in HUP PIPE USR2; do kill -$s $$; done; echo alive; exit 3";
    let mut command = Command::new(IGNORING[0]);
    command.args(&IGNORING[1..]).arg(&cli.ftrun).args(["--", "/bin/sh", "-c", script]);
    let output = command.env("FTRUN_STATE_DIR", cli.dir.path().join("state")).output()?;
    assert_eq!(output.status.code(), Some(3), "{}", text(&output.stderr));
    assert_eq!(text(&output.stdout), "alive\n");
    // What was not ignored is not.
    for signal in [libc::SIGPIPE, libc::SIGHUP] {
        // Whoever runs the tests may ignore it.
        let mut command = Command::new("env");
        command.arg(format!("--default-signal={signal}")).arg(&cli.ftrun).args(["--", "/bin/sh", "-c"]);
        command.arg(format!("kill -{signal} $$")).env("FTRUN_STATE_DIR", cli.dir.path().join("state"));
        assert_eq!(command.output()?.status.code(), Some(128 + signal));
    }

    let mut launch = guest_launch("epoll_echo")?;
    launch.ready(Ready::Line).through(IGNORING);
    let unit = launch.start()?;
    let mut client =
        ftrun_tests::clients::Echo::connect(unit.port, ftrun_tests::rng::Rng::new(1), true).map_err(Error::from)?;
    for recoveries in 0..3 {
        for signal in [libc::SIGHUP, libc::SIGPIPE, libc::SIGUSR2] {
            Process::open(unit.await_recoveries(recoveries)?["pid"].as_i64().unwrap_or(0) as i32)?.signal(signal)?;
            client.ask(b"still there")?;
        }
        assert_eq!(unit.recoveries()?, recoveries);
        unit.kill9()?;
        client.ask(b"back")?;
    }
    // The default action of a signal that was not ignored.
    Process::open(unit.await_recoveries(3)?["pid"].as_i64().unwrap_or(0) as i32)?.signal(libc::SIGUSR1)?;
    assert_eq!(unit.wait()?.code(), Some(128 + libc::SIGUSR1), "{}", unit.stderr()?);
    Ok(())
}

#[test]
fn a_request_to_end_is_not_resurrected() -> Result<(), Error> {
    let _ = cli!();
    let mut launch = guest_launch("epoll_echo")?;
    launch.ready(Ready::Line);
    let unit = launch.start()?;
    Process::open(unit.pid()?)?.signal(libc::SIGTERM)?;
    let status = unit.wait()?;
    assert_eq!(status.code(), Some(128 + libc::SIGTERM), "{status:?} {}", unit.stderr()?);
    Ok(())
}

#[test]
fn a_name_in_use_is_refused() -> Result<(), Error> {
    let _ = cli!();
    let mut launch = guest_launch("epoll_echo")?;
    launch.ready(Ready::Line);
    let unit = launch.start()?;
    let output = unit.ftrun(["run", "--name", &unit.name, "--", "/bin/true"])?;
    refused(&output, None, &[&unit.name]);
    assert_eq!(unit.state()?, "running", "the first one runs on");
    unit.stop()?;
    Ok(())
}

#[test]
fn an_unknown_name_is_named() -> Result<(), Error> {
    let cli = cli!();
    for verb in ["status", "stop", "checkpoint", "rm", "log", "verify"] {
        refused(&cli.ftrun([verb, "nobody-has-this-name"])?, None, &["nobody-has-this-name"]);
    }
    Ok(())
}

#[test]
fn status_keeps_its_contract() -> Result<(), Error> {
    let _ = cli!();
    let mut launch = guest_launch("epoll_echo")?;
    launch.ready(Ready::Line);
    let unit = launch.start()?;
    let before = unit.status()?;
    assert_eq!(before["name"], unit.name.as_str());
    assert_eq!(before["state"], "running");
    assert_eq!(before["durability"], "process");
    for key in ["pid", "supervisor_pid", "keeper_pid", "incarnation", "recoveries", "events"] {
        assert!(before[key].is_u64(), "{key} in {before}");
    }
    for key in ["pid", "supervisor_pid", "keeper_pid"] {
        let pid = before[key].as_i64().and_then(|n| i32::try_from(n).ok()).unwrap_or(0);
        assert!(pid > 0 && Process::open(pid).is_ok(), "{key} names no process: {before}");
    }
    assert!(!before["unloggable"].is_null(), "{before}");
    let backend = before["dirty_backend"].as_str().unwrap_or_default();
    assert!(["soft-dirty", "wp-async", "full"].contains(&backend), "{before}");
    assert!(before["calls"]["slow"].as_u64() > Some(0) && before["calls"]["fast"].is_u64(), "{before}");
    assert_eq!(before["recoveries"], 0);

    assert!(unit.ftrun(["checkpoint", &unit.name])?.status.success());
    unit.kill9()?;
    let after = unit.await_recoveries(1)?;
    for key in ["sii", "pause_us", "pages", "bytes", "at"] {
        assert!(!after["last_checkpoint"][key].is_null(), "last_checkpoint.{key} in {after}");
    }
    for key in ["total_ms", "restore_ms", "replay_ms", "events"] {
        assert!(after["last_recovery"][key].is_number(), "last_recovery.{key} in {after}");
    }
    assert!(after["incarnation"].as_u64() > before["incarnation"].as_u64(), "{after}");
    unit.stop()?;
    Ok(())
}

/// Reads what `ftrun top --prometheus` prints: values by metric and labels.
fn scrape(unit: &Unit) -> Result<BTreeMap<String, f64>, Error> {
    let output = unit.ftrun(["top", "--prometheus"])?;
    assert!(output.status.success(), "{}", text(&output.stderr));
    let text = text(&output.stdout);
    assert!(text.ends_with('\n'));
    let mut typed = Vec::new();
    let mut values = BTreeMap::new();
    for line in text.lines() {
        if let Some(kind) = line.strip_prefix("# TYPE ") {
            let (name, kind) = kind.split_once(' ').ok_or_else(|| error!("{line}"))?;
            assert_eq!(kind == "counter", name.ends_with("_total"), "{line}");
            typed.push(name.to_owned());
        } else if !line.starts_with("# HELP ") {
            let (key, value) = line.rsplit_once(' ').ok_or_else(|| error!("{line}"))?;
            let name = key.split('{').next().unwrap_or_default();
            assert_eq!(
                typed.last().map(String::as_str),
                Some(name),
                "a sample of another metric than its type: {line}"
            );
            let value = value.parse().map_err(|e| error!("{line}: {e}"))?;
            assert!(values.insert(key.to_owned(), value).is_none(), "twice: {line}");
        }
    }
    Ok(values)
}

/// What `top` shows is what the unit does: known work between two looks, and a kill.
///
/// Break it: do not count the bytes of checkpoints in `Unit::checkpoint`, or those of events in `Unit::follow_shim`.
#[test]
fn top_shows_what_units_do() -> Result<(), Error> {
    let _ = cli!();
    let mut launch = guest_launch("epoll_echo")?;
    launch.ready(Ready::Line);
    let unit = launch.start()?;
    let mut client =
        ftrun_tests::clients::Echo::connect(unit.port, ftrun_tests::rng::Rng::new(1), true).map_err(Error::from)?;
    let label = |metric: &str| format!("ftrun_{metric}{{unit=\"{}\"}}", unit.name);
    let before = scrape(&unit)?;
    let line = [b'x'; 1000];
    for _ in 0..200 {
        client.ask(&line)?;
    }
    assert!(unit.ftrun(["checkpoint", &unit.name])?.status.success());
    let after = scrape(&unit)?;
    let grown = |metric: &str| after[&label(metric)] - before[&label(metric)];
    // Each answer is a wait, a receive and a send at least, and what was received is in the log.
    assert!(grown("events_total") >= 600.0, "{before:?} {after:?}");
    assert!(grown("log_bytes_total") >= 200_000.0, "{before:?} {after:?}");
    assert!(grown("checkpoints_total") >= 1.0, "{before:?} {after:?}");
    assert!(grown("checkpoint_bytes_total") >= 4096.0, "{before:?} {after:?}");
    assert!(grown("checkpoint_pause_seconds_total") > 0.0, "{before:?} {after:?}");
    assert!(after[&label("log_resident_bytes")] >= 4096.0, "{after:?}");
    assert!(after[&label("last_pause_seconds")] > 0.0, "{after:?}");
    assert_eq!(after[&format!("ftrun_unit_state{{unit=\"{}\",state=\"running\"}}", unit.name)], 1.0);
    assert!(!after.contains_key(&label("last_recovery_seconds")), "{after:?}");
    unit.kill9()?;
    unit.await_recoveries(1)?;
    let recovered = scrape(&unit)?;
    assert_eq!(recovered[&label("recoveries_total")], 1.0);
    assert!(recovered[&label("last_recovery_seconds")] > 0.0);

    // Rates of a unit that is busy, and that all forms show the same units.
    let done = AtomicBool::new(false);
    let output = std::thread::scope(|scope| -> Result<Output, Error> {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                client.ask(&line).map_err(Error::from)?;
            }
            Ok::<(), Error>(())
        });
        let output = unit.ftrun(["top", "--once", "--json", "--interval", "300ms"]);
        done.store(true, Ordering::Relaxed);
        output
    })?;
    let objects = text(&output.stdout);
    assert_eq!(objects.lines().count(), 1, "{objects}{}", text(&output.stderr));
    let object: serde_json::Value = serde_json::from_str(&objects).map_err(|e| error!("{objects}: {e}"))?;
    assert_eq!((&object["name"], &object["state"]), (&unit.name.as_str().into(), &"running".into()));
    assert_eq!(object["pid"].as_i64(), Some(i64::from(unit.pid()?)));
    for rate in ["events_per_second", "log_bytes_per_second"] {
        assert!(object[rate].as_f64() > Some(100.0), "{rate} in {object}");
    }
    let output = unit.ftrun(["top", "--once", "--interval", "100ms"])?;
    let table = text(&output.stdout);
    let mut lines = table.lines();
    assert!(lines.next().is_some_and(|l| l.starts_with("NAME ") && l.ends_with(" PROGRAM")), "{table}");
    assert!(lines.next().is_some_and(|l| l.starts_with(&unit.name) && l.ends_with("/epoll_echo")), "{table}");
    assert_eq!((lines.next(), table.contains('\x1b')), (None, false), "{table}");
    refused(&unit.ftrun(["top", "--interval", "1ms"])?, Some(125), &["100ms"]);
    unit.stop()?;
    Ok(())
}

/// Whoever is killed, a counter of the log that is scraped at any moment is never less than it was: Prometheus would take
/// the unit to have begun anew, and count it all again.
///
/// Break it: show counters in every state, or do not publish them before the state is `running` (`Unit::run_once`).
#[test]
fn counters_do_not_go_back() -> Result<(), Error> {
    let _ = cli!();
    let mut launch = guest_launch("epoll_echo")?;
    launch.ready(Ready::Line).options(["--durability", "supervisor"]);
    let unit = launch.start()?;
    let mut client =
        ftrun_tests::clients::Echo::connect(unit.port, ftrun_tests::rng::Rng::new(1), true).map_err(Error::from)?;
    let mut last = BTreeMap::new();
    let mut look = || -> Result<(), Error> {
        for (key, value) in scrape(&unit)? {
            if ["ftrun_events_total", "ftrun_log_bytes_total", "ftrun_fast_calls_total"]
                .iter()
                .any(|m| key.starts_with(m))
            {
                let before = last.insert(key.clone(), value).unwrap_or(0.0);
                assert!(value >= before, "{key}: {value} after {before}");
            }
        }
        Ok(())
    };
    for kills in 1..=6 {
        (0..50).try_for_each(|_| client.ask(b"line").map(drop))?;
        look()?;
        if kills % 2 == 0 {
            unit.kill9()?
        } else {
            unit.kill9_supervisor()?
        };
        let killed = Instant::now();
        while unit.recoveries()? < kills || unit.state()? != "running" {
            look()?;
            assert!(killed.elapsed() < LIMIT, "{}", unit.status()?);
        }
        look()?;
    }
    assert_eq!(last.len(), 3);
    unit.stop()?;
    Ok(())
}

/// In a terminal the table is drawn over and over in the same place, cut to what fits, until it is interrupted.
#[test]
fn top_redraws_a_terminal() -> Result<(), Error> {
    let _ = cli!();
    let Ok(script) = need("script") else { return Ok(()) };
    let mut launch = guest_launch("epoll_echo")?;
    launch.ready(Ready::Line);
    let unit = launch.start()?;
    let Mode::Under(ftrun) = mode()? else { return Ok(()) };
    let top = format!("stty cols 40 rows 5; exec timeout -s INT 1 {} top --interval 100ms", ftrun.display());
    let mut command = Command::new(script);
    command.args(["-qec", &top, "/dev/null"]).env("FTRUN_STATE_DIR", unit.path().join("state"));
    let output = command.stdin(Stdio::null()).process_group(0).output()?;
    let shown = text(&output.stdout);
    let screens: Vec<&str> = shown.split("\x1b[H").skip(1).collect();
    assert!(screens.len() >= 3, "{shown:?}");
    for screen in &screens[..screens.len() - 1] {
        assert!(screen.starts_with("NAME ") && screen.ends_with("\x1b[J"), "{shown:?}");
        let lines: Vec<&str> = screen.split("\x1b[K").collect();
        assert!(lines.len() == 3 && lines[1].contains(&unit.name), "{shown:?}");
        assert!(lines.iter().all(|l| l.trim().chars().count() <= 40), "{shown:?}");
    }
    unit.stop()?;
    Ok(())
}

#[test]
fn ls_stop_and_rm() -> Result<(), Error> {
    let _ = cli!();
    let mut launch = guest_launch("epoll_echo")?;
    launch.ready(Ready::Line);
    let unit = launch.start()?;
    let list = text(&unit.ftrun(["ls", "--json"])?.stdout);
    assert!(list.contains(&unit.name) && list.contains("running"), "{list}");
    assert!(text(&unit.ftrun(["ls"])?.stdout).contains(&unit.name));
    refused(&unit.ftrun(["rm", &unit.name])?, None, &[&unit.name]);
    assert_eq!(unit.state()?, "running", "rm has not touched a running unit");
    unit.stop()?;
    // Whether the end has cleared the unit away or rm has: then it is gone.
    let _may_be_gone = unit.ftrun(["rm", &unit.name])?;
    let list = text(&unit.ftrun(["ls", "--json"])?.stdout);
    assert!(!list.contains(&unit.name), "{list}");
    Ok(())
}

#[test]
fn two_units_do_not_touch_each_other() -> Result<(), Error> {
    let _ = cli!();
    let start = || -> Result<_, Error> {
        let mut launch = guest_launch("epoll_echo")?;
        launch.ready(Ready::Line);
        launch.start()
    };
    let (one, two) = (start()?, start()?);
    let mut client =
        ftrun_tests::clients::Echo::connect(two.port, ftrun_tests::rng::Rng::new(1), true).map_err(Error::from)?;
    client.ask(b"before")?;
    one.kill9()?;
    one.await_recoveries(1)?;
    client.ask(b"after")?;
    assert_eq!(two.recoveries()?, 0);
    one.stop()?;
    client.ask(b"still")?;
    two.stop()?;
    Ok(())
}

#[test]
fn doctor_says_that_it_would_work() -> Result<(), Error> {
    let cli = cli!();
    let output = cli.ftrun(["doctor"])?;
    assert_eq!(output.status.code(), Some(0), "{}{}", text(&output.stdout), text(&output.stderr));
    let output = cli.ftrun(["doctor", "--json"])?;
    assert_eq!(output.status.code(), Some(0));
    let parsed: Result<serde_json::Value, _> = serde_json::from_slice(&output.stdout);
    assert!(parsed.is_ok(), "{}", text(&output.stdout));
    Ok(())
}

#[test]
fn a_set_uid_program_is_refused() -> Result<(), Error> {
    let _ = cli!();
    let program = need("su")?;
    let mut launch = Launch::new("setuid")?;
    launch.run(&program, ["--version"]).ready(Ready::AtOnce);
    if is_root() {
        launch.as_user(STRANGER);
    }
    let unit = launch.start()?;
    let status = unit.wait()?;
    let err = unit.stderr()?;
    assert!(status.code().is_some_and(|c| c != 0) && status.signal().is_none(), "{status:?} {err}");
    assert!(err.contains(&program.display().to_string()), "{err}");
    Ok(())
}

#[test]
fn a_32_bit_program_is_refused() -> Result<(), Error> {
    let cli = cli!();
    let (image, program) = (cli.dir.path().join("image"), cli.dir.path().join("program32"));
    std::fs::write(&image, elf32_that_exits())?;
    copy_executable(&image, &program)?;
    refused(&cli.ftrun([OsStr::new("--"), program.as_os_str()])?, None, &["program32", "32"]);
    Ok(())
}

/// A whole 32-bit program: its code is `mov eax, 1; xor ebx, ebx; int 0x80`.
fn elf32_that_exits() -> Vec<u8> {
    let code = [0xb8, 1, 0, 0, 0, 0x31, 0xdb, 0xcd, 0x80];
    let mut file = b"\x7fELF\x01\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    let (base, head) = (0x0804_8000u32, 52 + 32);
    for half in [2u16, 3] {
        file.extend(half.to_le_bytes()); // an executable, for the 386
    }
    for word in [1, base + head, 52, 0, 0] {
        file.extend(word.to_le_bytes()); // version, entry, program headers, section headers, flags
    }
    for half in [52u16, 32, 1, 40, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    let size = head + code.len() as u32;
    for word in [1, 0, base, base, size, size, 5, 0x1000] {
        file.extend(word.to_le_bytes());
    }
    file.extend(code);
    file
}

#[test]
fn an_unusable_state_directory_is_named() -> Result<(), Error> {
    let cli = cli!();
    let run = |dir: &Path| -> Result<Output, Error> {
        Ok(cli.command().arg("--state-dir").arg(dir).args(["--", "/bin/true"]).output()?)
    };
    // Nobody, not even root, can make this one.
    refused(&run(Path::new("/proc/ftrun-state"))?, None, &["/proc/ftrun-state"]);
    let file = cli.dir.path().join("a-file");
    std::fs::write(&file, "")?;
    refused(&run(&file)?, None, &["a-file"]);
    Ok(())
}

#[test]
fn a_program_that_crashes_by_itself_fails_with_a_message() -> Result<(), Error> {
    let _ = cli!();
    let mut launch = guest_launch("epoll_echo")?;
    launch.ready(Ready::Line);
    let unit = launch.start()?;
    let mut client =
        ftrun_tests::clients::Echo::connect(unit.port, ftrun_tests::rng::Rng::new(1), true).map_err(Error::from)?;
    client.ask(b"well")?;
    // The same store through a null pointer comes back after each recovery.
    assert!(client.ask(b"crash").is_err());
    let status = unit.wait()?;
    let err = unit.stderr()?;
    assert_eq!(status.code(), Some(128 + libc::SIGSEGV), "{status:?} {err}");
    for part in ["SIGSEGV", "ftrun log", unit.name.as_str()] {
        assert!(err.contains(part), "`{part}` is not in the message: {err}");
    }
    assert_eq!(unit.state()?, "failed", "everything is kept");
    Ok(())
}

#[test]
fn a_terminal_passes_through() -> Result<(), Error> {
    let cli = cli!();
    // script(1) gives the command a terminal; its absence is no fault of ours.
    let Ok(script) = need("script") else { return Ok(()) };
    let inner = format!("{} -- /bin/sh -c 'test -t 0 && test -t 1 && echo it-is-a-terminal'", cli.ftrun.display());
    let mut command = Command::new(script);
    command.args(["-qec", &inner, "/dev/null"]).env("FTRUN_STATE_DIR", cli.dir.path().join("state"));
    let output = command.stdin(Stdio::null()).process_group(0).output()?;
    assert!(text(&output.stdout).contains("it-is-a-terminal"), "{}", text(&output.stdout));
    Ok(())
}
