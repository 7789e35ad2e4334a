//! The machine is lost: keeper, supervisor and program are killed, `/dev/shm` is wiped, and `ftrun resume --store` goes on from the
//! store. Nothing that a client has been told may be missing.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use ftrun_tests::binaries::is_bare;
use ftrun_tests::counting::{self, Counts, line};
use ftrun_tests::load::Load;
use ftrun_tests::process::Process;
use ftrun_tests::rng::Rng;
use ftrun_tests::scenarios::{guest_launch, memcached_launch, nginx_launch, redis_launch};
use ftrun_tests::service::Service;
use ftrun_tests::unit::{LIMIT, Launch, Ready, Unit, free_port, start_all_with};
use ftrun_tests::{Error, error};

const LEVEL: &str = "--durability node --stable cache";

type Connection = BufReader<TcpStream>;
/// Who asked, and the number of the request.
type Request = (usize, u64);

/// Kills in each test.
fn kills() -> u64 {
    Load::from_env().kills / 4 + 1
}

fn resume(unit: &Unit, service: &Service) -> Result<(), Error> {
    unit.resume_as(&[], &["--store", &service.url(), "--stable", "cache"]).map(drop)
}

/// The numbers of a client's requests, each of which `ask` makes; those that were answered go onto the list.
fn numbered<'a>(
    n: usize,
    answered: &'a Mutex<Vec<Request>>,
    ask: impl Fn(&mut Connection, Request) -> std::io::Result<bool> + Send + 'a,
) -> impl FnMut(&mut Connection) -> std::io::Result<u64> + Send + 'a {
    let mut number = 0;
    move |connection| {
        number += 1;
        if !ask(connection, (n, number))? {
            return Err(std::io::Error::other("not the answer that it should be"));
        }
        answered.lock().map_err(|_| std::io::Error::other("a client panicked"))?.push((n, number));
        Ok(number)
    }
}

/// Four clients ask while the machine is lost again and again; what was answered.
fn asked(
    unit: &Unit,
    service: &Service,
    ask: impl Fn(&mut Connection, Request) -> std::io::Result<bool> + Send + Sync,
) -> Result<(Vec<Request>, Counts), Error> {
    let seed = Load::from_env().seed;
    println!("seed {seed}");
    let answered = Mutex::new(Vec::new());
    let counts = counting::through(
        unit,
        kills(),
        Rng::new(seed),
        |n| numbered(n, &answered, &ask),
        |rng| {
            unit.kill9_all(rng.within(0..=5))?;
            unit.wipe_memory()?;
            resume(unit, service)
        },
    )?;
    let answered = answered.into_inner().map_err(|_| error!("a client panicked"))?;
    assert!(answered.len() as u64 > kills(), "only {} requests were answered", answered.len());
    println!("{} requests answered, {} without an answer", answered.len(), counts.values().map(|c| c.1).sum::<u64>());
    Ok((answered, counts))
}

fn started(launch: Result<Launch, Error>) -> Result<Option<(Unit, Service)>, Error> {
    start_all_with(LEVEL);
    if is_bare() {
        return Ok(None);
    }
    let (mut launch, service) = (launch?, Service::new()?);
    launch.options(["--store", &service.url()]);
    Ok(Some((launch.start()?, service)))
}

fn connect(unit: &Unit) -> Result<Connection, Error> {
    Ok(BufReader::new(TcpStream::connect(("127.0.0.1", unit.port))?))
}

fn read_line(c: &mut Connection) -> Result<String, Error> {
    let mut line = String::new();
    c.read_line(&mut line)?;
    Ok(line.trim_end().to_owned())
}

/// Asks for all that was answered, many at a time, and looks at each reply.
fn check_all(
    unit: &Unit,
    answered: &[Request],
    ask: impl Fn(Request) -> String,
    look: impl Fn(&mut Connection, Request) -> Result<(), Error>,
) -> Result<(), Error> {
    let mut c = connect(unit)?;
    for some in answered.chunks(100) {
        let requests: String = some.iter().map(|request| ask(*request)).collect();
        c.get_mut().write_all(requests.as_bytes())?;
        some.iter().try_for_each(|request| look(&mut c, *request))?;
    }
    Ok(())
}

/// Every SET that was acknowledged is there.
///
/// Break it: leave the events behind the newest checkpoint in the store (`retrieve::fetch`). That outputs wait for these is shown in `nodes.rs`,
/// where the store stands still.
#[test]
fn redis_keeps_what_it_acknowledged() -> Result<(), Error> {
    let Some((unit, service)) = started(redis_launch(&["--save", ""]))? else { return Ok(()) };
    let (answered, _) = asked(&unit, &service, |c, (n, number)| {
        Ok(line(c, format!("SET key:{n}:{number} value:{n}:{number}\r\n").as_bytes())? == "+OK\r\n")
    })?;
    check_all(
        &unit,
        &answered,
        |(n, number)| format!("GET key:{n}:{number}\r\n"),
        |c, (n, number)| {
            let found = read_line(c)?;
            assert_ne!(found, "$-1", "key:{n}:{number} was acknowledged and is not there");
            assert_eq!(read_line(c)?, format!("value:{n}:{number}"));
            Ok(())
        },
    )?;
    unit.stop()?;
    Ok(())
}

/// Every value that was stored is there, with threads that take turns.
///
/// Break it: leave the events behind the newest checkpoint in the store (`retrieve::fetch`).
#[test]
fn memcached_keeps_what_it_acknowledged() -> Result<(), Error> {
    let Some((unit, service)) = started(memcached_launch("4"))? else { return Ok(()) };
    let (answered, _) = asked(&unit, &service, |c, (n, number)| {
        let value = format!("value:{n}:{number}");
        let request = format!("set key:{n}:{number} 0 0 {}\r\n{value}\r\n", value.len());
        Ok(line(c, request.as_bytes())? == "STORED\r\n")
    })?;
    check_all(
        &unit,
        &answered,
        |(n, number)| format!("get key:{n}:{number}\r\n"),
        |c, (n, number)| {
            let found = read_line(c)?;
            assert!(found.starts_with("VALUE "), "key:{n}:{number} was acknowledged and is not there: {found}");
            assert_eq!((read_line(c)?, &*read_line(c)?), (format!("value:{n}:{number}"), "END"));
            Ok(())
        },
    )?;
    unit.stop()?;
    Ok(())
}

/// Every request that was answered is in the access log, of which nginx has the last lines in its memory when the machine is lost.
///
/// Break it: leave the events behind the newest checkpoint in the store (`retrieve::fetch`).
#[test]
fn nginx_logs_what_it_answered() -> Result<(), Error> {
    let launch = || {
        let launch = nginx_launch("access_log access.log combined buffer=1m;", "")?;
        std::fs::write(launch.work().join("page"), "0123456789")?;
        Ok(launch)
    };
    let Some((unit, service)) = started(launch())? else { return Ok(()) };
    let (answered, _) = asked(&unit, &service, |c, (n, number)| {
        let status = line(c, format!("GET /page?{n}-{number}- HTTP/1.1\r\nHost: test\r\n\r\n").as_bytes())?;
        let mut head = String::new();
        while head != "\r\n" {
            head.clear();
            if c.read_line(&mut head)? == 0 {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
        }
        let mut body = [0; 10];
        c.read_exact(&mut body)?;
        Ok(status.starts_with("HTTP/1.1 200 ") && body == *b"0123456789")
    })?;
    // It writes what it has when it is to open its files anew.
    Process::open(unit.pid()?)?.signal(libc::SIGUSR1)?;
    let begin = Instant::now();
    loop {
        let log = std::fs::read_to_string(unit.work().join("access.log"))?;
        let logged: std::collections::HashSet<&str> =
            log.lines().filter_map(|l| l.split_once("GET /page?")?.1.split_once(' ').map(|(id, _)| id)).collect();
        let missing = answered.iter().find(|(n, number)| !logged.contains(&*format!("{n}-{number}-")));
        let Some((n, number)) = missing else { break };
        assert!(begin.elapsed() < LIMIT, "request {n}-{number} was answered and is not in the log");
        std::thread::sleep(Duration::from_millis(20));
    }
    unit.stop()?;
    Ok(())
}

/// Files, pipes and duplicates: every line that was acknowledged is in the file. What was being written when the machine was lost may stand
/// there twice.
///
/// Break it: leave the events behind the newest checkpoint in the store (`retrieve::fetch`).
#[test]
fn a_ledger_keeps_what_it_acknowledged() -> Result<(), Error> {
    let launch = || {
        let mut launch = guest_launch("ledger")?;
        launch.ready(Ready::Line).add_args([free_port()?.to_string()]);
        Ok(launch)
    };
    let Some((unit, service)) = started(launch())? else { return Ok(()) };
    let (answered, counts) = asked(&unit, &service, |c, (n, number)| {
        let told = line(c, format!("{n}-{number}\n").as_bytes())?;
        Ok(told.trim().parse::<u64>().is_ok())
    })?;
    let told: u64 = line(&mut connect(&unit)?, b"last\n")?.trim().parse().map_err(|_| error!("no count"))?;
    let open: u64 = counts.values().map(|c| c.1).sum();
    let least = answered.len() as u64 + 1;
    assert!((least..=least + open).contains(&told), "{told} lines were counted, {least} acknowledged, {open} not");
    assert_eq!(std::fs::read_to_string(unit.work().join("count"))?, format!("{told:020}\n"));
    let text = std::fs::read_to_string(unit.work().join("ledger"))?;
    let mut times = BTreeMap::new();
    for line in text.lines() {
        *times.entry(line).or_insert(0u64) += 1;
    }
    for (n, number) in answered {
        assert!(times.contains_key(&*format!("{n}-{number}")), "{n}-{number} was acknowledged and is not in the file");
    }
    // A loss leaves at most one write undecided.
    let twice = text.lines().count() - times.len();
    assert!(twice as u64 <= kills(), "{twice} lines stand in the file twice after {} losses", kills());
    assert_eq!(times.len() as u64, told, "as many lines as were counted");
    unit.stop()?;
    Ok(())
}

/// The echo server, with a fault; the service that it stores its events in.
fn faulty(fault: &str) -> Result<(Unit, Service), Error> {
    start_all_with(LEVEL);
    let service = Service::new()?;
    let mut launch = guest_launch("epoll_echo")?;
    launch.options(["--store", &service.url(), "--checkpoint-every", "100ms"]).env("FTRUN_FAULT", fault);
    launch.ready(Ready::Line).add_args([free_port()?.to_string()]);
    Ok((launch.start()?, service))
}

fn count(c: &mut Connection) -> std::io::Result<u64> {
    let reply = line(c, b"text\n")?;
    reply.split(' ').nth(1).and_then(|n| n.parse().ok()).ok_or_else(|| std::io::Error::other(reply))
}

/// Everything is killed at each seam between a unit and its store, and the machine is lost.
///
/// Break it: leave the events behind the newest checkpoint in the store (`retrieve::fetch`), or collect before the checkpoint is there
/// (`Common::put`).
#[test]
fn lost_at_every_seam_of_the_recorder() -> Result<(), Error> {
    if is_bare() {
        return Ok(());
    }
    // The start itself has three groups and a checkpoint.
    let groups = [7, 31, 150];
    let seams = ["record-grouped", "record-acknowledged"].into_iter().flat_map(|s| groups.map(|n| (s, n)));
    for (seam, pass) in seams.chain([2, 3, 6].map(|n| ("record-put", n))) {
        let (unit, service) = faulty(&format!("all@{seam}:{pass}"))?;
        let mut c = connect(&unit)?;
        let mut answered = 0;
        while let Ok(told) = count(&mut c) {
            answered += 1;
            assert_eq!(told, answered);
        }
        unit.await_nobody()?;
        unit.wipe_memory()?;
        resume(&unit, &service)?;
        let told = count(&mut connect(&unit)?)?;
        println!("{seam}:{pass}: {answered} answered, {} known", told - 1);
        assert!((answered + 1..=answered + 2).contains(&told), "{seam}:{pass}: {told} after {answered}");
        unit.stop()?;
    }
    Ok(())
}

/// A checkpoint is in the store before events that it stands for, since nobody waits for these, and everything is lost right then.
///
/// Break it: read the log from behind the checkpoint on although it does not reach that far (`retrieve::fetch`).
#[test]
fn lost_when_the_log_has_not_come_to_the_checkpoint() -> Result<(), Error> {
    start_all_with(LEVEL);
    if is_bare() {
        return Ok(());
    }
    // Many events, and nothing that others see.
    const SCRIPT: &str = "import os\n\
        print('ready 0', flush=True)\n\
        n = 0\n\
        while not os.path.exists('stop'): n += 1\n\
        print('looked', n > 1000, flush=True)\n";
    for pass in [3, 4, 5] {
        let service = Service::new()?;
        let mut launch = Launch::new("looks")?;
        launch.run(ftrun_tests::binaries::need("python3")?, ["-c", SCRIPT]).ready(Ready::Line);
        launch.options(["--store", &service.url(), "--checkpoint-every", "100ms"]);
        launch.env("FTRUN_FAULT", format!("all@record-put:{pass}"));
        let unit = launch.start()?;
        unit.await_nobody()?;
        unit.wipe_memory()?;
        resume(&unit, &service)?;
        std::fs::File::create(unit.work().join("stop"))?;
        assert!(unit.wait()?.success(), "{}", unit.stderr()?);
        assert!(unit.stdout()?.ends_with("looked True\n"), "{}", unit.stdout()?);
    }
    Ok(())
}

/// Whoever fetches a unit is killed while it does, with its keeper or without: it can be fetched again.
///
/// Break it: let go of the events in the store when they have been laid out.
#[test]
fn lost_while_it_is_fetched() -> Result<(), Error> {
    if is_bare() {
        return Ok(());
    }
    let (unit, service) = faulty("")?;
    let mut answered = 0;
    for (n, seam) in ["retrieve-opened", "retrieve-laid"].into_iter().enumerate() {
        for (m, victim) in ["supervisor", "all"].into_iter().enumerate() {
            let mut c = connect(&unit)?;
            for _ in 0..20 {
                answered += 1;
                assert_eq!(count(&mut c)?, answered, "before {victim}@{seam}");
            }
            unit.kill9_all((n * 2 + m) as u64)?;
            unit.wipe_memory()?;
            let fault = format!("{victim}@{seam}");
            let options = ["--store", &service.url(), "--stable", "cache"];
            let failed = unit.resume_as(&[("FTRUN_FAULT", &fault)], &options).expect_err("it was killed");
            assert!(failed.0.contains(if victim == "all" { "signal: 9" } else { "was not fetched" }), "{failed}");
            resume(&unit, &service)?;
        }
    }
    assert_eq!(count(&mut connect(&unit)?)?, answered + 1);
    unit.stop()?;
    Ok(())
}
