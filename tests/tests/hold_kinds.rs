//! Keeper, supervisor and program are killed, all at once, as in `hold.rs`: what there is beside connections. Locks, descriptors in
//! messages, limits, children, `execve`.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use ftrun_tests::binaries::guest;
use ftrun_tests::clients::{Echo, Rights};
use ftrun_tests::installed::{ALL, NO_LIMIT, PORT, Service};
use ftrun_tests::load::Load;
use ftrun_tests::machine::Machine;
use ftrun_tests::rng::Rng;
use ftrun_tests::wire::Kind;
use ftrun_tests::{Error, error};

const OPTIONS: &[&str] = &["--durability", "supervisor", "--ready", "program"];

/// Kills in each test: `FTRUN_TEST_KILLS` is for those of one process.
fn kills() -> u64 {
    Load::from_env().kills / 4 + 1
}

/// A service of a program with these arguments, started; what is in `more` goes into a drop-in.
fn start(program: &str, args: &[&str], more: &str) -> Result<Option<Service>, Error> {
    let path = guest(program)?;
    let command = |machine: &Machine| {
        Ok([machine.give(&path)?].into_iter().chain(args.iter().map(|a| (*a).to_owned())).collect())
    };
    let Some(service) = Service::install("shop", OPTIONS, command, &format!("{more}{NO_LIMIT}"))? else {
        return Ok(None);
    };
    service.systemctl("start")?;
    Ok(Some(service))
}

macro_rules! service {
    ($program:expr, $args:expr, $more:expr) => {
        match start($program, $args, $more)? {
            Some(service) => service,
            None => return Ok(()),
        }
    };
}

/// What the program says of a line, behind it.
fn said(echo: &mut Echo, line: &str) -> Result<String, Error> {
    Ok(String::from_utf8_lossy(&echo.ask(line.as_bytes())?).trim().to_owned())
}

/// Whether somebody has a record lock on these bytes.
fn is_locked(file: &File, range: std::ops::Range<i64>) -> Result<bool, Error> {
    let (start, len) = (range.start, range.end - range.start);
    let mut lock = libc::flock {
        l_type: libc::F_WRLCK as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: start,
        l_len: len,
        l_pid: 0,
    };
    // SAFETY: a structure that outlives the call.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut lock) } {
        0 => Ok(lock.l_type != libc::F_UNLCK as i16),
        _ => Err(std::io::Error::last_os_error().into()),
    }
}

/// Whether somebody has a lock on the whole file (flock(2)).
fn is_locked_whole(path: &Path) -> Result<bool, Error> {
    Ok(File::options().write(true).open(path)?.try_lock().is_err())
}

/// Locks on records and on whole files, of the process and of the open file, are the unit's after everything was killed as they were
/// before, and after its process alone was, no matter how they were taken and what else has been done with the file.
///
/// Break it: take no record locks again (`Objects::take_records`), or forget what another descriptor of the file has done to them.
#[test]
fn locks_are_as_they_were() -> Result<(), Error> {
    let service = service!("keeps", &["7000"], "");
    let share = service.machine.share();
    let file = |name: &str| -> Result<File, Error> {
        std::fs::write(share.join(name), [b'x'; 4096])?;
        Ok(File::options().read(true).write(true).open(share.join(name))?)
    };
    let (records, open, lost, end) = (file("records")?, file("open")?, file("lost")?, file("end")?);
    file("whole")?;
    let mut echo = service.client()?;
    for line in [
        "lock posix /mnt/share/records 10 30",
        "unlock posix /mnt/share/records 20 10",
        "lock ofd /mnt/share/open 5 5",
        "lock posix /mnt/share/lost 0 10",
        "lock end /mnt/share/end -16 16",
        "lock whole /mnt/share/whole 0 0",
    ] {
        assert_eq!(said(&mut echo, line)?, "ok", "{line}");
    }
    // It is closed by another descriptor.
    said(&mut echo, "twin /mnt/share/lost")?;
    let as_they_were = |what: &str| -> Result<(), Error> {
        for (name, file, range, locked) in [
            ("records", &records, 10..20, true),
            ("records", &records, 20..30, false),
            ("records", &records, 30..40, true),
            ("records", &records, 40..4096, false),
            ("open", &open, 5..10, true),
            ("lost", &lost, 0..10, false),
            ("end", &end, 4080..4096, true),
            ("end", &end, 0..4080, false),
        ] {
            assert_eq!(is_locked(file, range.clone())?, locked, "{what}: {name}, {range:?}");
        }
        assert!(is_locked_whole(&share.join("whole"))?, "{what}");
        Ok(())
    };
    as_they_were("before")?;
    for round in 0..3 {
        service.kill_all()?;
        said(&mut echo, "all")?;
        as_they_were(&format!("all were killed, {round}"))?;
        service.kill(&["pid"])?;
        said(&mut echo, "one")?;
        as_they_were(&format!("the program was killed, {round}"))?;
        service.kill(&["supervisor_pid"])?;
        said(&mut echo, "supervisor")?;
        as_they_were(&format!("the supervisor was killed, {round}"))?;
    }
    for line in
        ["unlock posix /mnt/share/records 0 0", "unlock ofd /mnt/share/open 0 0", "unlock end /mnt/share/end -16 16"]
    {
        assert_eq!(said(&mut echo, line)?, "ok", "{line}");
    }
    assert_eq!(said(&mut echo, "unlock whole /mnt/share/whole 0 0")?, "ok");
    service.kill_all()?;
    said(&mut echo, "unlocked")?;
    for (file, name) in [(&records, "records"), (&open, "open"), (&end, "end")] {
        assert!(!is_locked(file, 0..4096)?, "{name}");
    }
    assert!(!is_locked_whole(&share.join("whole"))?);
    assert_eq!(service.complaints()?, [""; 0]);
    service.stop()?;
    service.done();
    Ok(())
}

/// Who else wants a lock gets it while nobody runs: the unit does not go on as if it had it still, and does when it can be had again.
///
/// Break it: go on without a lock that somebody else has.
#[test]
fn who_got_between_keeps_the_lock() -> Result<(), Error> {
    let service = service!("keeps", &["7000"], "");
    let path = service.machine.share().join("records");
    std::fs::write(&path, [b'x'; 4096])?;
    let mut echo = service.client()?;
    assert_eq!(said(&mut echo, "lock posix /mnt/share/records 0 10")?, "ok");
    let rival = File::options().read(true).write(true).open(&path)?;
    let mut lock = libc::flock { l_type: libc::F_WRLCK as i16, l_whence: 0, l_start: 0, l_len: 10, l_pid: 0 };
    let taken = std::thread::scope(|scope| -> Result<(), Error> {
        let wait = scope.spawn(|| {
            // SAFETY: a structure that outlives the call.
            match unsafe { libc::fcntl(rival.as_raw_fd(), libc::F_OFD_SETLKW, &raw mut lock) } {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            }
        });
        service.kill(ALL)?;
        wait.join().map_err(|_| error!("who waits panics"))?.map_err(Error::from)
    });
    taken?;
    service.machine.await_true("a refusal", || Ok(service.errors()?.contains("is somebody else's now")))?;
    assert!(is_locked(&File::options().write(true).open(&path)?, 0..10)?);
    drop(rival);
    service.machine.await_property(&service.unit, "ActiveState", |s| s == "active")?;
    assert_eq!(said(&mut echo, "after")?, "");
    assert!(is_locked(&File::options().write(true).open(&path)?, 0..10)?);
    service.stop()?;
    service.done();
    Ok(())
}

/// Kills these processes of the unit; where the keeper is among them, waits until the service runs again.
fn strike(service: &Service, keys: &[&str]) -> Result<(), Error> {
    if keys == ALL { service.kill_all() } else { service.kill(keys) }
}

/// Both ends of something: ours, and the one that the unit is given.
type Given = (Box<dyn Read>, OwnedFd);

fn given() -> Result<Vec<Given>, Error> {
    let (pipe, into) = std::io::pipe()?;
    let (pair, other) = UnixStream::pair()?;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let tcp = TcpStream::connect(listener.local_addr()?)?;
    let accepted = listener.accept()?.0;
    pair.set_read_timeout(Some(Duration::from_secs(20)))?;
    tcp.set_read_timeout(Some(Duration::from_secs(20)))?;
    Ok(vec![(Box::new(pipe), into.into()), (Box::new(pair), other.into()), (Box::new(tcp), accepted.into())])
}

fn expect(from: &mut Box<dyn Read>, text: &str) -> Result<(), Error> {
    let mut got = vec![0; text.len()];
    from.read_exact(&mut got)?;
    assert_eq!(String::from_utf8_lossy(&got), text);
    Ok(())
}

/// What others have passed to the unit is its own afterwards; so is what the unit has in flight, with nobody else to hold it, in a
/// pair of sockets. What it closes then ends.
///
/// Break it: do not look for what has come with a message (`Change::of`), or forget one end of a pair (`returned::put_back`).
#[test]
fn descriptors_in_messages_are_kept() -> Result<(), Error> {
    let service = service!("unix_rights", &["/mnt/share/socket"], "");
    let mut client = Rights::connect(&service.machine.share().join("socket"), Rng::new(7))?;
    let mut kept = given()?;
    let mut posted = given()?;
    for (i, (_, theirs)) in kept.iter().enumerate() {
        client.ask(&format!("keep {i}"), Some(theirs))?;
    }
    for (i, (_, theirs)) in posted.iter().enumerate() {
        client.ask(&format!("post {i}"), Some(theirs))?;
    }
    let mut kept: Vec<_> = kept.drain(..).map(|(ours, _)| ours).collect();
    let mut posted: Vec<_> = posted.drain(..).map(|(ours, _)| ours).collect();
    for round in 0..3 {
        service.kill_all()?;
        client.ask(&format!("tell {round}"), None)?;
        for ours in &mut kept {
            expect(ours, &format!("told {round}\n"))?;
        }
        client.ask(&format!("fetch {round}"), None)?;
        let mut fetched = posted.remove(0);
        expect(&mut fetched, &format!("fetched {round}\n"))?;
        assert_eq!(fetched.read(&mut [0])?, 0, "it was closed");
    }
    assert_eq!(service.complaints()?, [""; 0]);
    service.stop()?;
    for mut ours in kept {
        assert_eq!(ours.read(&mut [0])?, 0, "nobody has it any more");
    }
    service.done();
    Ok(())
}

/// Everything is killed at each seam of holding what a message has brought, again and again. It is held, or the unit is recovered
/// cold and says so; it never takes a message for one that brought nothing.
///
/// Break it: take what came with a message for held whether it is or not (`returned::Settle::made`).
#[test]
fn killed_while_descriptors_arrive() -> Result<(), Error> {
    // Until it is ready the program passes each point less often than that.
    const FIRST: u64 = 24;
    for point in ["sending", "sent", "noted"] {
        let faults = format!("Environment=FTRUN_FAULT=all@hold-{point}:{FIRST}\n");
        let service = service!("unix_rights", &["/mnt/share/socket"], &faults);
        let path = service.machine.share().join("socket");
        let mut client = Rights::connect(&path, Rng::new(0))?;
        let mut told = 0;
        for i in 0..4 * FIRST {
            let (mut ours, theirs) = std::io::pipe()?;
            let theirs = theirs.into();
            let asked = client.ask(&format!("take {i}"), Some(&theirs));
            drop(theirs);
            let mut got = String::new();
            ours.read_to_string(&mut got)?;
            let errors = service.errors()?;
            match asked {
                Ok(()) => assert_eq!(got, format!("took {i}\n"), "{point}: {errors}"),
                Err(e) => {
                    assert_eq!(got, "", "{point}: {e}: {errors}");
                    let before = told;
                    told = errors.matches("descriptors that came with a message are lost; they are made again").count();
                    assert!(told > before, "{point}: {e}: {errors}");
                    service.machine.await_property(&service.unit, "ActiveState", |s| s == "active")?;
                    client = Rights::connect(&path, Rng::new(i))?;
                }
            }
        }
        let restarts: usize = service.get("NRestarts")?.parse().map_err(|e| error!("{e}"))?;
        println!("{point}: {restarts} restarts, {told} of them cold");
        assert!(restarts >= 2 && (point != "noted" || told == 0), "{point}: {restarts}, {told}");
        service.stop()?;
        service.done();
    }
    Ok(())
}

/// A unit that has as many descriptors as it may, with a limit that it has set itself, has them afterwards, and no more may be opened; whoever is killed.
///
/// Break it: start a supervisor within the unit's limit (`keeper::work`), or leave the keeper with the limit that it needs for that
/// (`Unit::run_once`).
#[test]
fn at_the_units_own_limit() -> Result<(), Error> {
    let service = service!("keeps", &["7000"], "LimitNOFILE=1024:4096\n");
    let mut echo = service.client()?;
    said(&mut echo, "limit 300")?;
    assert_eq!(said(&mut echo, "make 400")?, "Too many open files");
    let full = said(&mut echo, "count")?;
    let count: u64 = full.parse().map_err(|e| error!("{e}: {full}"))?;
    assert!((280..300).contains(&count), "{count}");
    let mut same = |what: &str| -> Result<(), Error> {
        assert_eq!(said(&mut echo, "count")?, full, "{what}");
        assert_eq!(said(&mut echo, "make 1")?, "Too many open files", "{what}");
        Ok(())
    };
    for _ in 0..2 {
        for keys in [ALL, &["supervisor_pid"], &["pid"], &["supervisor_pid", "pid"]] {
            strike(&service, keys)?;
            same(&keys.join(", "))?;
        }
    }
    assert_eq!(service.complaints()?, [""; 0]);
    service.stop()?;
    service.done();
    Ok(())
}

/// More descriptors than the supervisor is allowed by default are held, and come back, also to a supervisor that takes over.
///
/// Break it: as above, or raise no limit when there is no room for one more (`Unit::hold_changes`).
#[test]
fn beyond_the_soft_limit_of_the_service() -> Result<(), Error> {
    let service = service!("keeps", &["7000"], "LimitNOFILE=300:4096\n");
    let mut echo = service.client()?;
    assert_eq!(said(&mut echo, "make 280")?, "ok");
    for keys in [&["supervisor_pid"], ALL, &["supervisor_pid"], ALL] {
        strike(&service, keys)?;
        assert_eq!(said(&mut echo, "count")?, "280", "{keys:?}");
        assert_eq!(said(&mut echo, "fill")?, "299", "{keys:?}");
    }
    assert_eq!(service.complaints()?, [""; 0]);
    service.stop()?;
    service.done();
    Ok(())
}

/// Waits until the user has been told so often that not all descriptors can be held.
fn await_not_held(service: &Service, times: usize) -> Result<(), Error> {
    let told = || Ok(service.errors()?.matches("the unit's descriptors cannot all be held").count() == times);
    service.machine.await_true("a warning", told)
}

/// Where limits do not let all descriptors be held, none is, and the user is told at once; then after all was killed the
/// unit is recovered cold, connections are reset, and nothing else is lost. Less is held again.
///
/// Break it: hold what there is room for (`Unit::hold_changes`).
#[test]
fn beyond_what_may_be_held() -> Result<(), Error> {
    // Of an ordinary user what is in flight is limited.
    let service = service!("keeps", &["7000"], "LimitNOFILE=300:300\nUser=nobody\n");
    let mut echo = service.client()?;
    assert_eq!(said(&mut echo, "make 60")?, "ok");
    service.kill_all()?;
    assert_eq!(said(&mut echo, "count")?, "60");
    assert_eq!(service.complaints()?, [""; 0]);
    assert_eq!(said(&mut echo, "make 190")?, "ok");
    await_not_held(&service, 1)?;
    for _ in 0..2 {
        service.kill(&["supervisor_pid"])?;
        assert_eq!(said(&mut echo, "count")?, "250");
    }
    service.kill_all()?;
    assert!(echo.ask(b"lost").is_err());
    assert!(service.errors()?.contains("not all of them were held; they are made again"), "{}", service.errors()?);
    let mut echo = service.client()?;
    assert_eq!(said(&mut echo, "count")?, "250");
    await_not_held(&service, 2)?;
    said(&mut echo, "drop")?;
    service.kill_all()?;
    assert!(echo.ask(b"lost").is_err());
    let mut echo = service.client()?;
    said(&mut echo, "held")?;
    service.kill_all()?;
    said(&mut echo, "still")?;
    service.stop()?;
    service.done();
    Ok(())
}

/// A unit that has every number which the hard limit allows leaves no room for anybody else: nothing is held, it is told so, and
/// it is not gone on with before the limit is raised. Nothing is lost by that.
///
/// Break it: make again what there is room for (`objects::build`), or give up what cannot be made again now.
#[test]
fn at_the_hard_limit() -> Result<(), Error> {
    let service = service!("keeps", &["7000"], "LimitNOFILE=300:300\n");
    let mut echo = service.client()?;
    assert_eq!(said(&mut echo, "make 400")?, "Too many open files");
    let full = said(&mut echo, "count")?;
    await_not_held(&service, 1)?;
    service.kill(ALL)?;
    let machine = &service.machine;
    machine.await_true("a refusal", || Ok(service.errors()?.contains("open descriptors (ulimit -n) are needed")))?;
    let more = format!("/etc/systemd/system/{}.d/zzz.conf", service.unit);
    machine.ok([
        "sh",
        "-c",
        &format!("printf '[Service]\\nLimitNOFILE=300:800\\n' > {more}; systemctl daemon-reload"),
    ])?;
    machine.await_property(&service.unit, "ActiveState", |s| s == "active")?;
    let mut echo = service.client()?;
    assert_eq!(said(&mut echo, "count")?, full);
    service.kill_all()?;
    assert_eq!(said(&mut echo, "count")?, full);
    assert!(!service.errors()?.contains("cannot be kept"), "{}", service.errors()?);
    service.stop()?;
    service.done();
    Ok(())
}

/// One descriptor is all that the service manager has to take.
///
/// Break it: leave the root there before the pipe that shows whether it takes any (`Notifier::leave`).
#[test]
fn one_descriptor_is_left() -> Result<(), Error> {
    let service = service!("keeps", &["7000"], "FileDescriptorStoreMax=1\n");
    assert_eq!(service.get("NFileDescriptorStore")?, "1");
    let mut echo = service.client()?;
    assert_eq!(said(&mut echo, "make 5")?, "ok");
    for _ in 0..2 {
        service.kill_all()?;
        assert_eq!(said(&mut echo, "count")?, "5");
    }
    assert_eq!(service.complaints()?, [""; 0]);
    service.stop()?;
    service.done();
    Ok(())
}

/// A server with workers: its own connections go on, it hears that its workers were killed, and starts others; who waits to be
/// accepted is served by these. What a worker had accepted ends with it, and nobody is told anything wrong.
///
/// Break it: forget that children have ended with the supervisor (`Outside::from_bytes`), or hold what the parent has closed.
#[test]
fn workers_are_started_again() -> Result<(), Error> {
    const WORKERS: u64 = 2;
    let service = service!("prefork", &["7000", "2"], "");
    let mut parent = Echo::connect(PORT + 1, Rng::new(1), true)?;
    for round in 1..=kills().max(4) {
        let mut served = (0..WORKERS).map(|_| service.client()).collect::<Result<Vec<_>, _>>()?;
        for echo in &mut served {
            echo.ask(b"served")?;
        }
        // Nobody accepts that one.
        let mut waits = TcpStream::connect(("127.0.0.1", PORT))?;
        waits.set_read_timeout(Some(Duration::from_secs(20)))?;
        waits.write_all(b"waits\n")?;
        parent.ask(format!("child {round}").as_bytes())?;
        let whom = if round % 4 == 0 { &["supervisor_pid"][..] } else { ALL };
        strike(&service, whom)?;
        let mut answer = [0; 64];
        let n = waits.read(&mut answer)?;
        assert_eq!(String::from_utf8_lossy(&answer[..n]), "1 1 waits\n", "round {round}");
        for mut echo in served {
            let lost = echo.ask(b"lost");
            assert!(lost.as_ref().is_err_and(|e| e.kind == Kind::Reset), "round {round}: {lost:?}");
        }
        assert_eq!(said(&mut parent, "ended")?, format!("{} 0", round * WORKERS), "{}", service.errors()?);
    }
    // What the parent closes ends, workers or not.
    let mut other = TcpStream::connect(("127.0.0.1", PORT + 1))?;
    other.write_all(b"other\n")?;
    assert!(other.read(&mut [0; 64])? > 0);
    service.kill_all()?;
    other.shutdown(Shutdown::Write)?;
    assert_eq!(other.read(&mut [0])?, 0);
    assert_eq!(service.complaints()?, [""; 0]);
    service.stop()?;
    service.done();
    Ok(())
}

/// A program that executes itself keeps what it wants to, and what it does not ends with that, at whatever instant everything is
/// killed.
///
/// Break it: hold what `execve` has closed (`Unit::hold_executed`), or forget which numbers it closes (`returned::put_back`).
#[test]
fn what_execve_closes_ends() -> Result<(), Error> {
    // So often a point is passed before everything is killed; the program is ready before.
    for (point, first) in [("exec-made", 3), ("hold-closed", 24), ("hold-forgotten", 24), ("call-logged", 100)] {
        let faults = format!("Environment=FTRUN_FAULT=all@{point}:{first}\n");
        let service = service!("successor", &["7000"], &faults);
        let mut lasting = service.client()?;
        for i in 0..30 {
            let mut private = service.client()?;
            private.ask(b"private")?;
            lasting.ask(format!("before {i}").as_bytes())?;
            lasting.ask(b"exec")?;
            lasting.ask(b"after")?;
            let ended = private.ask(b"ended");
            assert!(ended.as_ref().is_err_and(|e| e.kind == Kind::Reset), "{point}: {ended:?}");
        }
        println!("{point}: {} restarts", service.get("NRestarts")?);
        assert_ne!(service.get("NRestarts")?, "0", "{point}");
        assert_eq!(service.complaints()?, [""; 0], "{point}");
        let open = service.machine.ok(["sh", "-c", &format!("ls /proc/{}/fd | wc -l", service.pid("pid")?)])?;
        assert!(open.trim().parse::<u64>().is_ok_and(|n| n <= 8), "{point}: {open}");
        service.stop()?;
        service.done();
    }
    Ok(())
}
