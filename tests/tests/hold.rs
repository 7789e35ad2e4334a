//! Keeper, supervisor and program are killed, all at once, and the service manager, a real systemd, has their descriptors
//! (`--hold-descriptors`): no client notices, whatever the instant.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::time::Duration;

use ftrun_tests::binaries::installed;
use ftrun_tests::clients::{Echo, Redis};
use ftrun_tests::installed::{ALL, NO_LIMIT, PORT, Service};
use ftrun_tests::load::{Client, Load, Progress};
use ftrun_tests::machine::Machine;
use ftrun_tests::rng::Rng;
use ftrun_tests::service::Service as Store;
use ftrun_tests::{Error, error};

const OPTIONS: &[&str] = &["--durability", "supervisor"];
/// Kills in each test: `FTRUN_TEST_KILLS` is for those of one process.
fn kills() -> u64 {
    Load::from_env().kills / 2 + 1
}

fn rng() -> Rng {
    let seed = Load::from_env().seed;
    println!("seed {seed}");
    Rng::new(seed)
}

macro_rules! service {
    ($name:expr, $options:expr, $more:expr) => {
        match Service::echo($name, $options, $more)? {
            Some(service) => service,
            None => return Ok(()),
        }
    };
}

/// Clients that check every reply, each on its one connection, while `strike` does what it likes; requests in all.
fn under_load(
    service: &Service,
    clients: Vec<Box<dyn Client>>,
    strike: impl FnOnce() -> Result<(), Error>,
) -> Result<u64, Error> {
    let (over, requests) = (AtomicBool::new(false), AtomicU64::new(0));
    let (over, requests) = (&over, &requests);
    std::thread::scope(|scope| {
        let threads: Vec<_> = clients
            .into_iter()
            .map(|mut client| {
                scope.spawn(move || -> Result<(), Error> {
                    let progress = Progress::default();
                    while !over.load(SeqCst) {
                        requests.fetch_add(client.step(&progress)?, SeqCst);
                    }
                    client.finish()?;
                    Ok(())
                })
            })
            .collect();
        let struck = strike();
        over.store(true, SeqCst);
        let results: Vec<_> = threads.into_iter().map(|t| t.join().map_err(|_| error!("a client panics"))).collect();
        results
            .into_iter()
            .try_for_each(|r| r?)
            .map_err(|e| error!("{e}\n{}", service.errors().unwrap_or_default()))?;
        struck
    })?;
    Ok(requests.load(SeqCst))
}

/// Clients of the echo server, which knows them all.
fn echoes(count: u64) -> Result<Vec<Box<dyn Client>>, Error> {
    let connect = |i| -> Result<Box<dyn Client>, Error> {
        let mut echo = Echo::connect(PORT, Rng::new(i), true)?;
        echo.ask(b"hello")?;
        Ok(Box::new(echo))
    };
    (0..count).map(connect).collect()
}

/// Break it: have `Hold::put` send nothing, put the numbers back without their flags for `execve`, or start with them one
/// place further.
#[test]
fn everything_is_killed_and_no_client_notices() -> Result<(), Error> {
    let service = service!("shop", OPTIONS, NO_LIMIT);
    service.systemctl("start")?;
    assert_eq!(service.get("NFileDescriptorStore")?, "1");
    let mut rng = rng();
    let mut restarts = 0;
    let requests = under_load(&service, echoes(6)?, || {
        for i in 0..kills() {
            std::thread::sleep(Duration::from_millis(rng.within(0..=300)));
            let whom = match i % 5 {
                0 => &ALL[..1],
                1 => &ALL[..2],
                2 => &["keeper_pid", "pid"],
                _ => ALL,
            };
            service.kill(whom)?;
            restarts = service.await_restart(restarts)?;
        }
        Ok(())
    })?;
    println!("{requests} requests, {restarts} restarts");
    assert_eq!(service.complaints()?, [""; 0]);
    assert_eq!(service.status()?["recoveries"].as_u64().map(|n| n >= restarts), Some(true));
    service.stop()?;
    service.done();
    Ok(())
}

/// The same of redis, whose clients have a model of all that they have stored.
///
/// Break it: take a call of the hands that was begun for one that was not (`returned::Settle::begun`).
#[test]
fn redis_is_killed_with_everything() -> Result<(), Error> {
    let Some(redis) = installed("redis-server") else { return Ok(()) };
    let command = |_: &Machine| {
        let words = [&redis.to_string_lossy(), "--port", "7000", "--save", "", "--appendonly", "no", "--dir", "/tmp"];
        Ok(words.map(str::to_owned).to_vec())
    };
    let Some(service) = Service::install("cache", OPTIONS, command, NO_LIMIT)? else { return Ok(()) };
    service.systemctl("start")?;
    let mut rng = rng();
    service.machine.await_true("the port", || Ok(TcpStream::connect(("127.0.0.1", PORT)).is_ok()))?;
    let connect = |i: usize| -> Result<Box<dyn Client>, Error> {
        let mut redis = Redis::connect(PORT, i, Rng::new(i as u64))?;
        redis.ask(&["PING"])?;
        Ok(Box::new(redis))
    };
    let clients = (0..4).map(connect).collect::<Result<Vec<_>, Error>>()?;
    let mut restarts = 0;
    let requests = under_load(&service, clients, || {
        for _ in 0..kills() {
            std::thread::sleep(Duration::from_millis(rng.within(0..=300)));
            service.kill(ALL)?;
            restarts = service.await_restart(restarts)?;
        }
        Ok(())
    })?;
    println!("{requests} requests, {restarts} restarts");
    service.stop()?;
    service.done();
    Ok(())
}

/// What is closed is closed: nothing holds it any longer.
///
/// Break it: leave what no number leads to in its slot (`Hold::leave`).
#[test]
fn what_the_program_closes_ends_at_once() -> Result<(), Error> {
    let service = service!("shop", OPTIONS, NO_LIMIT);
    service.systemctl("start")?;
    for round in 0..4 {
        let mut streams: Vec<_> = (0..20).map(|_| TcpStream::connect(("127.0.0.1", PORT))).collect::<Result<_, _>>()?;
        for stream in &mut streams {
            stream.set_read_timeout(Some(Duration::from_secs(20)))?;
            stream.write_all(b"hello\n")?;
            assert!(stream.read(&mut [0; 100])? > 0);
        }
        if round % 2 == 1 {
            service.kill_all()?;
        }
        for stream in &mut streams {
            // The server finds the end, and closes its own.
            stream.shutdown(Shutdown::Write)?;
            assert_eq!(stream.read(&mut [0; 100])?, 0);
        }
    }
    service.stop()?;
    service.done();
    Ok(())
}

/// What is taken from systemd's keeping is lost, and is made again: the connection is reset, and nothing else is lost.
///
/// Break it: take what has come back for what was held, whether it is all there or not.
#[test]
fn without_what_was_held_the_unit_is_recovered_cold() -> Result<(), Error> {
    let service = service!("shop", OPTIONS, NO_LIMIT);
    let machine = &service.machine;
    service.systemctl("start")?;
    for empty in [false, true] {
        let mut echo = service.client()?;
        let total = echo.told(b"before")?;
        let main = service.get("MainPID")?;
        if empty {
            // In the name of the main process, which alone may say so.
            let text = "FDSTOREREMOVE=1\nFDNAME=ftrun-hold\n";
            let say = "import os, socket, sys; s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM); \
                       s.sendmsg([sys.argv[2].encode()], [(socket.SOL_SOCKET, 2, __import__('struct').pack('3i', int(sys.argv[1]), 0, 0))], 0, '/run/systemd/notify')";
            machine.ok(["/usr/bin/python3", "-c", say, &main, text])?;
            machine.await_property(&service.unit, "NFileDescriptorStore", |n| n == "0")?;
        }
        service.kill_all()?;
        if !empty {
            assert!(echo.told(b"after")? > total);
            continue;
        }
        let lost = echo.told(b"after");
        assert!(lost.is_err(), "{lost:?}");
        // The count goes on: it is the same program.
        assert!(service.client()?.told(b"new")? > total);
        let errors = service.errors()?;
        assert!(errors.contains("the service manager has not passed what holds them; they are made again"), "{errors}");
        machine.await_property(&service.unit, "NFileDescriptorStore", |n| n == "1")?;
    }
    // It is held again.
    let mut echo = service.client()?;
    echo.told(b"held")?;
    service.kill_all()?;
    echo.told(b"still")?;
    // A restart that is asked for is one.
    service.systemctl("restart")?;
    assert_eq!(service.get("NFileDescriptorStore")?, "1");
    assert!(echo.told(b"gone").is_err());
    assert_eq!(service.client()?.told(b"first")?, 1);
    service.stop()?;
    service.done();
    Ok(())
}

/// Where systemd takes no descriptors nothing is held, and the user is told.
///
/// Break it: believe that what was sent there was taken (`Notifier::leave`).
#[test]
fn a_service_without_a_store_is_recovered_cold() -> Result<(), Error> {
    let service = service!("shop", OPTIONS, "FileDescriptorStoreMax=0\n");
    service.systemctl("start")?;
    let mut echo = service.client()?;
    let total = echo.told(b"before")?;
    assert!(service.errors()?.contains("takes no descriptors (FileDescriptorStoreMax=)"), "{}", service.errors()?);
    service.kill_all()?;
    assert!(echo.told(b"after").is_err());
    let mut new = service.client()?;
    assert!(new.told(b"new")? > total);
    service.stop()?;
    service.done();
    Ok(())
}

/// Everything is killed at each seam of holding and letting go, again and again: each time that a connection comes there. One
/// that nobody has had an answer on may be reset; any other ends as it should.
///
/// Break it: note in `Hold::put` that a descriptor is held before it is sent, or forget in `returned::Settle::made` that what
/// a call made may be gone.
#[test]
fn everything_is_killed_at_every_seam() -> Result<(), Error> {
    // Until it is ready the program passes each point less often than that: a service must not fail to start.
    const FIRST: u64 = 24;
    for point in ["sending", "sent", "noted", "closed", "forgotten"] {
        let faults = format!("Environment=FTRUN_FAULT=all@hold-{point}:{FIRST}\n{NO_LIMIT}");
        let service = service!("shop", OPTIONS, &faults);
        service.systemctl("start")?;
        let mut lasting = service.client()?;
        let mut resets = 0;
        lasting.ask(b"first")?;
        for _ in 0..3 * FIRST {
            let (mut echo, mut answered) = (service.client()?, false);
            for _ in 0..2 {
                match echo.ask(b"once") {
                    Ok(_) => answered = true,
                    Err(e) if answered => return Err(error!("{point}: {e}: {}", service.errors()?)),
                    Err(_) => {
                        resets += 1;
                        break;
                    }
                }
            }
            drop(echo);
            lasting.ask(b"more")?;
        }
        let restarts: u64 = service.get("NRestarts")?.parse().map_err(|e| error!("{e}"))?;
        println!("{point}: {restarts} restarts, {resets} connections were reset before an answer");
        assert!(restarts >= 2, "{point}");
        assert!(resets <= restarts, "{point}");
        assert!(resets == 0 || matches!(point, "sending" | "sent"), "{point}: {resets} of {restarts}");
        assert_eq!(service.complaints()?, [""; 0], "{point}");
        // Those that come and go are gone.
        let open = service.machine.ok(["sh", "-c", &format!("ls /proc/{}/fd | wc -l", service.pid("pid")?)])?;
        assert!(open.trim().parse::<u64>().is_ok_and(|n| n <= 8), "{point}: {open}");
        service.stop()?;
        service.done();
    }
    Ok(())
}

const AT_NODE: &[&str] = &["--durability", "node"];

/// At `node` replies wait in the unit's queue for the store when everything is killed: none is lost, and none is sent twice.
///
/// Break it: begin the queue anew when descriptors have come back (`Unit::begin_outputs`), or take what was leaving for something that is still to leave
/// (`outputs::settle`).
#[test]
fn everything_is_killed_at_node() -> Result<(), Error> {
    let service = service!("shop", AT_NODE, NO_LIMIT);
    service.systemctl("start")?;
    let mut rng = rng();
    let mut restarts = 0;
    let requests = under_load(&service, echoes(6)?, || {
        for i in 0..kills() {
            std::thread::sleep(Duration::from_millis(rng.within(0..=300)));
            service.kill(if i % 4 == 0 { &["keeper_pid"] } else { ALL })?;
            restarts = service.await_restart(restarts)?;
        }
        Ok(())
    })?;
    println!("{requests} requests, {restarts} restarts");
    assert_eq!(service.complaints()?, [""; 0]);
    service.stop()?;
    service.done();
    Ok(())
}

/// Everything is killed at each seam between the unit, its queue and its store, again and again.
///
/// Break it: as above.
#[test]
fn everything_is_killed_at_every_seam_of_node() -> Result<(), Error> {
    // The start itself has some groups and a checkpoint.
    for (point, first) in [
        ("record-grouped", 40),
        ("record-acknowledged", 40),
        ("record-put", 3),
        ("output-leaving", 2),
        ("output-left", 2),
    ] {
        let faults = format!("Environment=FTRUN_FAULT=all@{point}:{first}\n{NO_LIMIT}");
        let options = [AT_NODE, &["--checkpoint-every", "100ms"]].concat();
        let service = service!("shop", &options, &faults);
        service.systemctl("start")?;
        let over = || Ok::<_, Error>(service.get("NRestarts")?.parse::<u64>().is_ok_and(|n| n >= 3));
        let requests = under_load(&service, echoes(3)?, || service.machine.await_true("three restarts", over))?;
        println!("{point}: {requests} requests");
        assert_eq!(service.complaints()?, [""; 0], "{point}");
        service.stop()?;
        service.done();
    }
    Ok(())
}

/// Replies that were still in the queue when everything was killed, since the store stood still, leave when it has what led to them,
/// once.
///
/// Break it: as above.
#[test]
fn what_is_queued_outlives_everything() -> Result<(), Error> {
    let service = service!("shop", &["--durability", "node", "--store", "unix:/mnt/share/store/socket"], NO_LIMIT);
    let share = service.machine.share();
    let store = Store::within(share)?;
    store.link(&share.join("store"))?;
    service.systemctl("start")?;
    let connect = |_| -> Result<_, Error> {
        let stream = TcpStream::connect(("127.0.0.1", PORT))?;
        stream.set_read_timeout(Some(Duration::from_secs(20)))?;
        Ok(BufReader::new(stream))
    };
    let mut clients = (0..8).map(connect).collect::<Result<Vec<_>, _>>()?;
    let hear = |client: &mut BufReader<TcpStream>, want: &str| -> Result<(), Error> {
        let mut line = String::new();
        client.read_line(&mut line)?;
        let words: Vec<_> = line.trim_end().split(' ').collect();
        if [words[0], words[2]].join(" ") == want { Ok(()) } else { Err(error!("{line:?} instead of {want:?}")) }
    };
    for round in 0..3 {
        for client in &mut clients {
            client.get_mut().write_all(b"before\n")?;
            hear(client, &format!("{} before", 2 * round + 1))?;
        }
        store.stop()?;
        for client in &mut clients {
            client.get_mut().write_all(b"meanwhile\n")?;
        }
        let answers = (clients.len() * "1 1 meanwhile\n".len()) as u64;
        let queued = || Ok::<_, Error>(service.status()?["store"]["queued"].as_u64().is_some_and(|n| n >= answers));
        service.machine.await_true("answers in the queue", queued)?;
        let before = service.get("NRestarts")?.parse().map_err(|e| error!("{e}"))?;
        service.kill(ALL)?;
        store.go_on()?;
        service.await_restart(before)?;
        for client in &mut clients {
            hear(client, &format!("{} meanwhile", 2 * round + 2))?;
        }
    }
    assert_eq!(service.complaints()?, [""; 0]);
    service.stop()?;
    service.done();
    Ok(())
}
