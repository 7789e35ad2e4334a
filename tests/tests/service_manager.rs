//! What ftrun says to a service manager, and passes on from it, without a real one: the tests are its other end.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use ftrun_tests::Error;
use ftrun_tests::binaries::{guest, is_bare};
use ftrun_tests::clients::Echo;
use ftrun_tests::manager::Manager;
use ftrun_tests::process::{Process, is_root};
use ftrun_tests::rng::Rng;
use ftrun_tests::scenarios::guest_launch;
use ftrun_tests::unit::{Launch, Ready, Unit};

/// What the watchdog of these tests allows.
const WATCHDOG: Duration = Duration::from_secs(4);

/// A unit to be that is told of a service manager, and that.
fn managed(options: &[&str]) -> Result<(Launch, Manager), Error> {
    let mut launch = guest_launch("epoll_echo")?;
    let manager = Manager::listen(&launch.work().join("notify"))?;
    launch.options(options).env("NOTIFY_SOCKET", manager.address()).ready(Ready::Line);
    Ok((launch, manager))
}

fn client(unit: &Unit) -> Result<Echo, Error> {
    Ok(Echo::connect(unit.port, Rng::new(1), true)?)
}

/// Break it: say `READY=1` before there is a program, or let the program's `MAINPID` pass.
#[test]
fn the_manager_is_told_what_the_unit_does() -> Result<(), Error> {
    if is_bare() {
        return Ok(());
    }
    let (launch, mut manager) = managed(&[])?;
    let unit = launch.start()?;
    let main = manager.await_line(|l| l.starts_with("MAINPID="))?;
    assert_eq!(main, format!("MAINPID={}", unit.started_pid()), "the keeper");
    assert!(manager.heard.contains(&"READY=1".to_owned()), "{:?}", manager.heard);
    let mut echo = client(&unit)?;
    echo.ask(b"notify MAINPID=1")?;
    echo.ask(b"notify STATUS=warm")?;
    assert_eq!(manager.await_line(|l| l.contains("warm"))?, "STATUS=running; warm");
    for n in 1..=3 {
        unit.kill9()?;
        echo.ask(b"alive")?;
        let back = format!("brought back {n} time");
        let status = manager.await_line(|l| l.contains(&back))?;
        assert!(status.starts_with("STATUS=running, "), "{status}");
    }
    unit.stop()?;
    manager.await_line(|l| l == "STOPPING=1")?;
    assert_eq!(manager.heard.iter().filter(|l| l.starts_with("MAINPID=")).count(), 1, "{:?}", manager.heard);
    assert_eq!(manager.heard.iter().filter(|l| *l == "READY=1").count(), 1, "{:?}", manager.heard);
    Ok(())
}

/// Break it: take no notice of `--ready`.
#[test]
fn a_program_says_when_it_is_ready() -> Result<(), Error> {
    if is_bare() {
        return Ok(());
    }
    let (launch, mut manager) = managed(&["--ready", "program", "--durability", "supervisor"])?;
    let unit = launch.start()?;
    let mut echo = client(&unit)?;
    echo.ask(b"notify STATUS=warming")?;
    manager.await_line(|l| l.contains("warming"))?;
    unit.kill9()?;
    echo.ask(b"alive")?;
    manager.await_line(|l| l == "STATUS=running, brought back 1 time; warming")?;
    unit.kill9_supervisor()?;
    echo.ask(b"alive")?;
    manager.await_line(|l| l == "STATUS=running, brought back 2 times, supervisor replaced 1 time; warming")?;
    assert!(!manager.heard.contains(&"READY=1".to_owned()), "{:?}", manager.heard);
    echo.ask(b"notify READY=1")?;
    manager.await_line(|l| l == "READY=1")?;
    unit.stop()?;
    Ok(())
}

/// A socket that was handed over stays at its number, and `LISTEN_PID` is the program's own; the program checks that.
///
/// Break it: leave `LISTEN_PID` as it was, or close what ftrun does not know.
fn activation(uid: Option<u32>, durability: &str) -> Result<(), Error> {
    if is_bare() || uid.is_some() && !is_root() {
        return Ok(());
    }
    let mut launch = guest_launch("epoll_echo")?;
    let mut starter: PathBuf = guest("activate")?;
    if let Some(uid) = uid {
        launch.as_user(uid);
        starter = launch.copy(&starter)?;
        let program = launch.copy(&guest("epoll_echo")?)?;
        launch.run(program, [""; 0]);
    }
    launch.through([starter]).options(["--durability", durability]).ready(Ready::Line);
    let unit = launch.start()?;
    let mut echo = client(&unit)?;
    let pid = echo.ask(b"pid")?;
    for _ in 0..3 {
        unit.kill9()?;
        assert_eq!(echo.ask(b"pid")?, pid);
        client(&unit)?.ask(b"another")?;
    }
    println!("{}", unit.verify()?);
    unit.stop()?;
    Ok(())
}

#[test]
fn a_socket_is_handed_over() -> Result<(), Error> {
    activation(None, "process")
}

#[test]
fn a_socket_is_handed_over_and_outlives_supervisors() -> Result<(), Error> {
    activation(None, "supervisor")
}

/// Who may not choose process ids does not know the program's before it is there.
#[test]
fn a_socket_is_handed_to_an_ordinary_user() -> Result<(), Error> {
    activation(Some(65534), "supervisor")
}

/// Listens until `end`; the longest time between two answers to the watchdog.
fn answers(manager: &mut Manager, end: Instant) -> Result<Duration, Error> {
    let (mut last, mut longest) = (Instant::now(), Duration::ZERO);
    while let Some(lines) = manager.hear(end)? {
        if lines.iter().any(|l| l == "WATCHDOG=1") {
            longest = longest.max(last.elapsed());
            last = Instant::now();
        }
    }
    Ok(longest.max(last.elapsed()))
}

/// A supervisor that does nothing any more is replaced before the watchdog would fire.
///
/// Break it: answer the watchdog whatever the supervisor does.
#[test]
fn a_supervisor_that_hangs_is_replaced() -> Result<(), Error> {
    const SIGSTOP: i32 = 19;
    if is_bare() {
        return Ok(());
    }
    let (mut launch, mut manager) = managed(&["--durability", "supervisor"])?;
    launch.env("WATCHDOG_USEC", WATCHDOG.as_micros().to_string());
    let unit = launch.start()?;
    let mut echo = client(&unit)?;
    echo.ask(b"before")?;
    manager.await_line(|l| l == "WATCHDOG=1")?;
    // It rightly waits: for its clients, and because somebody has stopped it.
    assert!(answers(&mut manager, Instant::now() + WATCHDOG)? < WATCHDOG);
    let program = Process::open(unit.pid()?)?;
    program.signal(SIGSTOP)?;
    assert!(answers(&mut manager, Instant::now() + WATCHDOG)? < WATCHDOG);
    program.signal(libc::SIGCONT)?;
    echo.ask(b"continued")?;
    Process::open(i32::try_from(unit.status_number("supervisor_pid")?).unwrap_or(0))?.signal(SIGSTOP)?;
    let longest = answers(&mut manager, Instant::now() + 3 * WATCHDOG / 2)?;
    assert!(longest < WATCHDOG, "no answer for {longest:?}");
    assert!(manager.heard.iter().any(|l| l.contains("supervisor replaced 1 time")), "{:?}", manager.heard);
    echo.ask(b"after")?;
    assert!(unit.stderr()?.contains("no sign of life"), "{}", unit.stderr()?);
    unit.stop()?;
    Ok(())
}

/// Where its death would not be survived, the supervisor is left alone, and the watchdog not answered.
#[test]
fn a_supervisor_that_cannot_be_replaced_is_left_to_the_watchdog() -> Result<(), Error> {
    const SIGSTOP: i32 = 19;
    if is_bare() {
        return Ok(());
    }
    let (mut launch, mut manager) = managed(&["--durability", "process"])?;
    launch.env("WATCHDOG_USEC", WATCHDOG.as_micros().to_string());
    let unit = launch.start()?;
    manager.await_line(|l| l == "WATCHDOG=1")?;
    let supervisor = Process::open(i32::try_from(unit.status_number("supervisor_pid")?).unwrap_or(0))?;
    supervisor.signal(SIGSTOP)?;
    assert!(answers(&mut manager, Instant::now() + 5 * WATCHDOG / 4)? > WATCHDOG, "a watchdog would have fired");
    supervisor.signal(libc::SIGCONT)?;
    manager.await_line(|l| l == "WATCHDOG=1")?;
    unit.stop()?;
    Ok(())
}
