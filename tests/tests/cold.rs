//! Cold recovery: keeper, supervisor and program are killed, and with them goes every kernel object; `ftrun resume`
//! makes them again. Nothing that a client has been told may be missing.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use ftrun_tests::binaries::is_bare;
use ftrun_tests::counting::{self, Counts, line};
use ftrun_tests::load::Load;
use ftrun_tests::rng::Rng;
use ftrun_tests::scenarios::{guest_launch, redis_launch};
use ftrun_tests::unit::{LIMIT, Launch, Ready, Unit, free_port, start_all_with};
use ftrun_tests::{Error, error};

const OPTIONS: &str = "--durability supervisor";

/// Kills in each test.
fn kills() -> u64 {
    Load::from_env().kills / 4 + 1
}

fn rng() -> Rng {
    let seed = Load::from_env().seed;
    println!("seed {seed}");
    Rng::new(seed)
}

/// Clients count while everything is killed.
fn count_through_kills<A>(unit: &Unit, ask: impl Fn(usize) -> A) -> Result<Counts, Error>
where
    A: FnMut(&mut BufReader<TcpStream>) -> std::io::Result<u64> + Send,
{
    counting::through(unit, kills(), rng(), ask, |rng| {
        unit.kill9_all(rng.within(0..=5))?;
        unit.resume().map(drop)
    })
}

/// Waits until the program has printed a line.
fn await_line(unit: &Unit, line: &str) -> Result<(), Error> {
    let start = Instant::now();
    while !unit.stdout()?.lines().any(|l| l == line) {
        if unit.has_ended()? || start.elapsed() > LIMIT {
            return Err(error!("the program does not say `{line}`: {}{}", unit.stdout()?, unit.stderr()?));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

/// Descriptors in the table of the unit.
fn open_descriptors(unit: &Unit) -> Result<Vec<String>, Error> {
    let listed = std::fs::read_dir(format!("/proc/{}/fd", unit.pid()?))?;
    let mut numbers: Vec<_> = listed.flatten().map(|e| e.file_name().to_string_lossy().into_owned()).collect();
    numbers.sort();
    Ok(numbers)
}

/// One descriptor of every kind is held through a cold recovery, and looked at afterwards; `settle` is done before.
fn kinds(options: &[&str], settle: impl Fn(&Unit) -> Result<(), Error>, faults: &str) -> Result<(), Error> {
    start_all_with(OPTIONS);
    if is_bare() {
        return Ok(());
    }
    let mut launch = guest_launch("kinds")?;
    launch.ready(Ready::Line).options(options).add_args([free_port()?.to_string()]);
    let unit = launch.start()?;
    let mut client = TcpStream::connect(("127.0.0.1", unit.port))?;
    client.write_all(b"hello")?;
    await_line(&unit, "holds them all")?;
    settle(&unit)?;
    let before = open_descriptors(&unit)?;
    unit.kill9_all(0)?;
    let mut gone = [0; 1];
    assert!(!matches!(client.read(&mut gone), Ok(1..)), "the connection lives on");
    unit.resume_as(&[("FTRUN_FAULT", faults)], &[])?;
    // Struck after it was there again, it is away once more for a moment.
    let start = Instant::now();
    while open_descriptors(&unit).ok().as_ref() != Some(&before) {
        assert!(start.elapsed() < LIMIT, "{:?} instead of {before:?}", open_descriptors(&unit));
        std::thread::sleep(Duration::from_millis(5));
    }
    std::fs::File::create(unit.work().join("check"))?;
    let status = unit.wait()?;
    let (out, err) = (unit.stdout()?, unit.stderr()?);
    assert!(status.success() && out.ends_with("all is there\n"), "{status}: {out}{err}");
    assert!(!err.contains("not as it was"), "{err}");
    Ok(())
}

/// What the descriptors are is in the checkpoint.
///
/// Break it: leave any kind out of `look`, or any descriptor that has changed since the checkpoint before.
#[test]
fn every_kind_from_a_checkpoint() -> Result<(), Error> {
    kinds(&[], |unit| unit.ftrun(["checkpoint", &unit.name]).map(drop), "")
}

/// What the descriptors are is told by the events alone.
///
/// Break it: take the effect from any row of the table of calls.
#[test]
fn every_kind_from_the_events() -> Result<(), Error> {
    kinds(&["--checkpoint-every", "1h", "--recover-within", "1h"], |_| Ok(()), "")
}

/// Program and supervisor are killed again in the middle of a cold recovery.
///
/// Break it: forget on the desk that the descriptors have not been made yet, or where the standard ones were set aside.
#[test]
fn killed_again_at_every_seam() -> Result<(), Error> {
    for point in ["restore-end", "replay-begin", "replay-event:40", "replay-end", "thaw-begin", "thaw-end"] {
        for who in ["", "supervisor@"] {
            println!("{who}{point}");
            let fault = format!("{who}{point}");
            kinds(&["--checkpoint-every", "1h", "--recover-within", "1h"], |_| Ok(()), &fault)?;
        }
    }
    Ok(())
}

/// A program that checks itself in rounds is killed with all of ftrun, again and again.
fn rounds(name: &str, check: impl FnOnce(&Unit, u64) -> Result<(), Error>) -> Result<(), Error> {
    start_all_with(OPTIONS);
    if is_bare() {
        return Ok(());
    }
    let mut rng = rng();
    let mut launch = guest_launch(name)?;
    launch.ready(Ready::Line);
    let unit = launch.start()?;
    for _ in 0..kills() {
        std::thread::sleep(Duration::from_millis(rng.within(5..=400)));
        unit.kill9_all(rng.within(0..=5))?;
        unit.resume()?;
    }
    let count = unit.finish_rounds()?;
    check(&unit, count)
}

/// Files and directories: what the hands had begun is found done, or done, but not twice.
///
/// Break it: make a call in doubt again without a look at what became of it (`Unit::judge`).
#[test]
fn files() -> Result<(), Error> {
    rounds("files", |unit, count| {
        let want: String = (1..=count).map(|n| format!("round {n}\n")).collect();
        assert_eq!(std::fs::read_to_string(unit.work().join("appended"))?, want);
        Ok(())
    })
}

/// Break it: leave the deadlines of timers, or signals that wait, to the desk of the keeper that was killed.
#[test]
fn timers() -> Result<(), Error> {
    rounds("timers", |_, _| Ok(()))
}

/// Break it: begin the output of the program anew at each recovery.
#[test]
fn compute() -> Result<(), Error> {
    rounds("compute", |unit, count| {
        let lines = std::fs::read_to_string(unit.work().join("results.txt"))?;
        assert_eq!(lines.lines().count() as u64, count);
        Ok(())
    })
}

#[test]
fn memory() -> Result<(), Error> {
    rounds("memory", |_, _| Ok(()))
}

/// Break it: keep the names of the unit's files in proc(5) as the kernel tells them.
#[test]
fn itself() -> Result<(), Error> {
    rounds("itself", |_, _| Ok(()))
}

/// redis: each client has a counter of its own, which holds every increment that was answered, and none that was not
/// asked for.
///
/// Break it: have the log begin at the newest checkpoint that was begun rather than at the one that is complete.
#[test]
fn redis_counts() -> Result<(), Error> {
    start_all_with(OPTIONS);
    if is_bare() {
        return Ok(());
    }
    let unit = redis_launch(&["--save", ""])?.start()?;
    let counts = count_through_kills(&unit, |n| {
        let request = format!("INCR counter{n}\r\n").into_bytes();
        move |c: &mut BufReader<TcpStream>| {
            let reply = line(c, &request)?;
            reply.trim().trim_start_matches(':').parse().map_err(|_| std::io::Error::other(reply))
        }
    })?;
    for (n, (answered, open, _)) in counts {
        let mut c = BufReader::new(TcpStream::connect(("127.0.0.1", unit.port))?);
        line(&mut c, format!("GET counter{n}\r\n").as_bytes())?;
        let mut value = String::new();
        c.read_line(&mut value)?;
        let value: u64 = value.trim().parse().map_err(|_| error!("counter {n} is {value:?}"))?;
        assert!(answered > 0 && (answered..=answered + open).contains(&value), "{value}, {answered} and {open}");
    }
    unit.stop()?;
    Ok(())
}

/// The echo server with epoll counts the lines of all.
#[test]
fn echo_counts() -> Result<(), Error> {
    start_all_with(OPTIONS);
    if is_bare() {
        return Ok(());
    }
    let mut launch = guest_launch("epoll_echo")?;
    launch.ready(Ready::Line).add_args([free_port()?.to_string()]);
    let unit = launch.start()?;
    let counts = count_through_kills(&unit, |_| {
        |c: &mut BufReader<TcpStream>| {
            let reply = line(c, b"text\n")?;
            reply.split(' ').nth(1).and_then(|n| n.parse().ok()).ok_or_else(|| std::io::Error::other(reply))
        }
    })?;
    let mut c = BufReader::new(TcpStream::connect(("127.0.0.1", unit.port))?);
    let reply = line(&mut c, b"last\n")?;
    let total: u64 = reply.split(' ').nth(1).and_then(|n| n.parse().ok()).ok_or_else(|| error!("{reply}"))?;
    let (answered, open) = counts.values().fold((0, 0), |(a, o), c| (a + c.0, o + c.1));
    assert!((answered + 1..=answered + open + 1).contains(&total), "{total}, {answered} and {open}");
    unit.stop()?;
    Ok(())
}

fn echo() -> Result<Launch, Error> {
    start_all_with(OPTIONS);
    let mut launch = guest_launch("epoll_echo")?;
    launch.ready(Ready::Line).add_args([free_port()?.to_string()]);
    Ok(launch)
}

/// `ftrun run` does not wipe what can be gone on with, and says what to do; `rm` gives it up.
///
/// Break it: begin the unit without a look at what remains of one.
#[test]
fn run_names_resume() -> Result<(), Error> {
    let launch = echo()?;
    if is_bare() {
        return Ok(());
    }
    let unit = launch.start()?;
    let output = unit.ftrun(["resume", &unit.name])?;
    assert!(String::from_utf8_lossy(&output.stderr).contains("already running"), "{output:?}");
    unit.kill9_all(0)?;
    let output = unit.ftrun(["status", &unit.name])?;
    assert!(String::from_utf8_lossy(&output.stdout).contains("ftrun resume"), "{output:?}");
    let output = unit.ftrun(["run", "--name", &unit.name, "--", "/bin/true"])?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && text.contains(&format!("ftrun resume {}", unit.name)), "{text}");
    unit.resume()?;
    unit.stop()?;
    let output = unit.ftrun(["resume", &unit.name])?;
    assert!(String::from_utf8_lossy(&output.stderr).contains("nothing to go on with"), "{output:?}");
    let output = unit.ftrun(["run", "--name", &unit.name, "--", "/bin/true"])?;
    assert!(output.status.success(), "{output:?}");
    let output = unit.ftrun(["resume", "nobody"])?;
    assert!(String::from_utf8_lossy(&output.stderr).contains("no unit named nobody"), "{output:?}");
    Ok(())
}

/// Somebody has taken the port: an error that names it, and nothing is lost by it.
///
/// Break it: go on without the socket, or wipe what remains when the recovery fails.
#[test]
fn the_port_is_taken() -> Result<(), Error> {
    let launch = echo()?;
    if is_bare() {
        return Ok(());
    }
    let unit = launch.start()?;
    let mut c = BufReader::new(TcpStream::connect(("127.0.0.1", unit.port))?);
    line(&mut c, b"one\n")?;
    unit.kill9_all(0)?;
    drop(c);
    let thief = TcpListener::bind(("127.0.0.1", unit.port))?;
    let failed = unit.resume().expect_err("the port is taken");
    assert!(failed.0.contains(&format!("127.0.0.1:{} cannot be", unit.port)), "{failed}");
    drop(thief);
    unit.resume()?;
    let mut c = BufReader::new(TcpStream::connect(("127.0.0.1", unit.port))?);
    assert_eq!(line(&mut c, b"two\n")?, "1 2 two\n");
    unit.stop()?;
    Ok(())
}

/// What cannot be made again is refused by its number, and nothing is lost by that; `--lossy` goes on without.
///
/// Break it: make something else in its place without a word.
#[test]
fn what_cannot_be_made_again_is_named() -> Result<(), Error> {
    start_all_with(OPTIONS);
    if is_bare() {
        return Ok(());
    }
    const SCRIPT: &str = "import ctypes, os, time\n\
        fd = ctypes.CDLL(None).inotify_init()\n\
        print('ready', fd, flush=True)\n\
        while not os.path.exists('stop'): time.sleep(0.01)\n\
        print('read', os.read(fd, 100), flush=True)\n";
    let mut launch = Launch::new("inotify")?;
    launch.run(ftrun_tests::binaries::need("python3")?, ["-c", SCRIPT]).ready(Ready::Line);
    let unit = launch.start()?;
    unit.kill9_all(0)?;
    let failed = unit.resume().expect_err("there is an inotify");
    assert!(failed.0.contains(&format!("descriptor {}: ", unit.port)) && failed.0.contains("--lossy"), "{failed}");
    unit.resume_as(&[], &["--lossy"])?;
    std::fs::File::create(unit.work().join("stop"))?;
    assert!(unit.wait()?.success(), "{}", unit.stderr()?);
    assert!(unit.stdout()?.ends_with("read b''\n") && unit.stderr()?.contains("not as it was"), "{}", unit.stderr()?);
    Ok(())
}

/// A full memory file system is an error at the start, and no SIGBUS later.
///
/// Break it: make the file of the log as long as it is to be without giving it memory.
#[test]
fn files_have_their_memory_from_the_start() -> Result<(), Error> {
    let launch = echo()?;
    if is_bare() {
        return Ok(());
    }
    let unit = launch.start()?;
    let dir = unit.memory_dir()?;
    for name in ["log", "desk", "spec"] {
        use std::os::unix::fs::MetadataExt;
        let meta = std::fs::metadata(dir.join(name))?;
        assert_eq!(meta.mode() & 0o777, 0o600, "{name}");
        if name == "log" {
            assert!(meta.blocks() * 512 >= meta.len(), "{name}: {} of {} bytes", meta.blocks() * 512, meta.len());
        }
    }
    unit.stop()?;
    assert!(!dir.exists());
    Ok(())
}
