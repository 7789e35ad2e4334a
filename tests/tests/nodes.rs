//! Durability `node`: nothing leaves a unit before what led to it is in the store, and the store may stand still, be killed
//! and come back.
//!
//! To break it on purpose: let `table::is_seen` pass a write, or say that events are committed before the store has
//! acknowledged them (`recorder.rs`).

use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::net::TcpStream;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ftrun_store::{Location, UnitName, each_record};
use ftrun_tests::binaries::is_bare;
use ftrun_tests::load::{Load, Report};
use ftrun_tests::scenarios::{echo_server, guest_launch, nginx_files, nginx_launch, redis_launch, redis_with};
use ftrun_tests::service::Service;
use ftrun_tests::unit::{LIMIT, Launch, Ready, start_all_with};
use ftrun_tests::{Error, error, survives};

/// Where an event counts as stable here: a disk takes milliseconds, and what is killed is no machine.
const LEVEL: &str = "--durability node --stable cache";

fn load() -> Load {
    start_all_with(LEVEL);
    Load::from_env().any_victim()
}

survives! {
    load();
    redis;
    redis_aof;
    memcached_t4;
    nginx;
    python_threads;
    epoll_echo;
    thread_echo;
    waits_echo;
    exec_chain;
    tokio_echo;
    udp_echo;
    signals;
    timers;
    files;
    descriptors;
    spin;
}

fn echo_launch(service: &Service) -> Result<Launch, Error> {
    start_all_with(LEVEL);
    let mut launch = guest_launch("epoll_echo")?;
    launch.options(["--store", &service.url()]).ready(Ready::Line);
    Ok(launch)
}

/// A client that says something and hears it again.
struct Talk {
    reader: BufReader<TcpStream>,
}

impl Talk {
    fn to(port: u16) -> Result<Self, Error> {
        Ok(Self { reader: BufReader::new(TcpStream::connect(("127.0.0.1", port))?) })
    }

    fn say(&mut self, text: &str) -> Result<(), Error> {
        Ok(self.reader.get_mut().write_all(format!("{text}\n").as_bytes())?)
    }

    /// The answer, if it comes in time.
    fn hear(&mut self, limit: Duration) -> Result<Option<String>, Error> {
        self.reader.get_mut().set_read_timeout(Some(limit))?;
        let mut line = String::new();
        match self.reader.read_line(&mut line) {
            Ok(0) => Err(error!("the connection was closed")),
            Ok(_) => Ok(Some(line.trim().to_owned())),
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }
}

/// Invariant 1. While the store stands still nothing that came in since can have an answer.
///
/// Break it: have the shim make sends without waiting (`stable::serve`).
#[test]
fn an_answer_waits_for_the_store() -> Result<(), Error> {
    if is_bare() {
        return Ok(());
    }
    let service = Service::new()?;
    for options in [&[][..], &["--no-shim"]] {
        let mut launch = echo_launch(&service)?;
        launch.options(options);
        let unit = launch.start()?;
        let mut talk = Talk::to(unit.port)?;
        for n in 0..20 {
            talk.say(&format!("before {n}"))?;
            assert!(talk.hear(LIMIT)?.is_some_and(|a| a.ends_with(&format!("before {n}"))));
        }
        for n in 0..5 {
            service.stop()?;
            talk.say(&format!("meanwhile {n}"))?;
            let early = talk.hear(Duration::from_millis(200))?;
            service.go_on()?;
            assert_eq!(early, None, "an answer that the store does not know of");
            assert!(talk.hear(LIMIT)?.is_some_and(|a| a.ends_with(&format!("meanwhile {n}"))));
        }
        unit.stop()?;
    }
    Ok(())
}

/// Checking clients go on while unit, supervisor, both or the store service are killed, at random and in the midst of each other.
///
/// Break it: say that events are committed before the store has acknowledged them (`recorder.rs`), or give a store that
/// answers again its events from the wrong place on.
fn any_victim(run: impl FnOnce(&Load, &str) -> Result<Report, Error>) -> Result<(), Error> {
    if is_bare() {
        return Ok(());
    }
    start_all_with(LEVEL);
    let service = Service::new()?;
    let url = service.url();
    let load =
        Load { at_least: Duration::from_secs(4), ..Load::from_env() }.any_victim_and(Arc::new(Mutex::new(service)));
    println!("{}", run(&load, &url)?);
    Ok(())
}

#[test]
fn any_process_is_killed_and_the_store_service() -> Result<(), Error> {
    any_victim(|load, url| {
        let mut launch = guest_launch("epoll_echo")?;
        launch.options(["--store", url]);
        echo_server(load, launch)
    })
}

#[test]
fn any_process_is_killed_and_the_store_service_of_redis() -> Result<(), Error> {
    any_victim(|load, url| {
        let mut launch = redis_launch(&["--save", ""])?;
        launch.options(["--store", url]);
        redis_with(launch, load)
    })
}

/// While the store stands still the unit goes on: it takes what other clients say, and answers them all later.
///
/// Break it: have `outputs::queue` in the shim queue nothing, or forget in `take_over` whose the sockets are (`FD_PRIVATE`).
#[test]
fn the_unit_goes_on_while_the_store_stands_still() -> Result<(), Error> {
    if is_bare() {
        return Ok(());
    }
    const CLIENTS: usize = 8;
    let service = Service::new()?;
    let mut launch = echo_launch(&service)?;
    launch.options(["--checkpoint-every", "1h", "--recover-within", "1h"]);
    let unit = launch.start()?;
    let mut talks = (0..CLIENTS).map(|_| Talk::to(unit.port)).collect::<Result<Vec<_>, _>>()?;
    for n in 0..20 {
        for talk in &mut talks {
            talk.say(&format!("before {n}"))?;
            assert!(talk.hear(LIMIT)?.is_some());
        }
    }
    let queued = || unit.store_number("queued");
    let wait_for = |what: &dyn Fn(u64) -> bool| -> Result<u64, Error> {
        let begin = Instant::now();
        loop {
            let bytes = queued()?;
            if what(bytes) || begin.elapsed() > LIMIT {
                return Ok(bytes);
            }
            std::thread::yield_now();
        }
    };
    // The next supervisor still knows that the connections are the unit's alone.
    unit.kill9_supervisor()?;
    for _ in 0..2 {
        for talk in &mut talks {
            talk.say("another supervisor")?;
            assert!(talk.hear(LIMIT)?.is_some());
        }
    }
    assert_eq!(wait_for(&|bytes| bytes == 0)?, 0, "all that was heard has left");
    service.stop()?;
    for talk in &mut talks {
        talk.say("meanwhile")?;
    }
    let answers = CLIENTS as u64 * "meanwhile".len() as u64;
    let bytes = wait_for(&|bytes| bytes >= answers)?;
    let early = talks[0].hear(Duration::from_millis(50))?;
    service.go_on()?;
    assert_eq!(early, None, "an answer that the store does not know of");
    for talk in &mut talks {
        assert!(talk.hear(LIMIT)?.is_some_and(|a| a.ends_with("meanwhile")));
    }
    assert!(bytes >= answers, "{bytes} bytes of answers were queued while the store stood still");
    assert_eq!(wait_for(&|bytes| bytes == 0)?, 0);
    unit.stop()?;
    Ok(())
}

/// The unit is killed at each seam of an output that is queued, and of one that leaves; the supervisor, too, where it lets
/// one leave itself.
///
/// Break it: have `outcome` in `settle.rs` say that what was put into the queue was not, or leave out `take_up`.
#[test]
fn killed_while_outputs_are_queued_and_leave() -> Result<(), Error> {
    if is_bare() {
        return Ok(());
    }
    // Behind the start: one seam after the other, some rounds of taking, queueing and leaving.
    for pass in 200..224 {
        let service = Service::new()?;
        let mut launch = echo_launch(&service)?;
        launch.env("FTRUN_FAULT", format!("shim-seam:{pass}"));
        let load = Load { clients: 4, at_least: Duration::from_millis(300), ..load().kills(0) };
        let report = echo_server(&load, launch)?;
        assert!(report.recoveries > 0, "seam {pass}: the unit was not killed:\n{report}");
    }
    Ok(())
}

/// The same with what is taken from files (`sendfile`), and options between (`TCP_CORK`).
///
/// Break it: have `outcome` in `settle.rs` tell no position, or `files::FilePiece::copy_to` begin at 0.
#[test]
fn killed_while_files_are_queued() -> Result<(), Error> {
    if is_bare() {
        return Ok(());
    }
    // One seam after the other, behind the start.
    for pass in 300..330 {
        let service = Service::new()?;
        let mut launch = echo_launch(&service)?;
        let alphabet = launch.work().join("alphabet");
        launch.env("FTRUN_FAULT", format!("shim-seam:{pass}")).env("ALPHABET", alphabet.display().to_string());
        let load = Load { clients: 2, at_least: Duration::from_millis(200), ..load().kills(0) };
        let report = echo_server(&load, launch)?;
        assert!(report.recoveries > 0, "seam {pass}: the unit was not killed:\n{report}");
    }
    for pass in [600, 607, 614, 621] {
        let service = Service::new()?;
        let mut launch = nginx_launch("access_log off; sendfile on; tcp_nopush on;", "")?;
        launch.options(["--store", &service.url()]).env("FTRUN_FAULT", format!("shim-seam:{pass}"));
        let load = Load { clients: 2, at_least: Duration::from_millis(200), ..load().kills(0) };
        let report = nginx_files(&load, launch)?;
        assert!(report.recoveries > 0, "seam {pass}: the unit was not killed:\n{report}");
    }
    Ok(())
}

/// The supervisor is killed when a call of the unit has been made for it and is not in the log, right behind the event that
/// says whose turn it is: the call is not made again.
///
/// Break it: leave the order with the number of events before that one (`Unit::may_leave`).
#[test]
fn the_supervisor_is_killed_behind_a_turn_and_a_call() -> Result<(), Error> {
    if is_bare() {
        return Ok(());
    }
    // Behind the calls of the start.
    for pass in (0..12).map(|n| 200 + 3 * n) {
        let service = Service::new()?;
        let mut launch = guest_launch("waits_echo")?;
        launch.options(["--store", &service.url(), "--no-shim"]);
        launch.env("FTRUN_FAULT", format!("supervisor@hands-made:{pass}"));
        let load = Load { clients: 4, at_least: Duration::from_millis(500), ..load().kills(0) };
        let report = echo_server(&load, launch)?;
        assert!(report.recoveries > 0, "pass {pass}: the supervisor was not killed:\n{report}");
    }
    Ok(())
}

/// The machine is lost: everything is killed and its memory wiped. `ftrun resume` fetches the unit from the store, and all that
/// had an answer is there.
///
/// Break it: leave the events behind the newest checkpoint in the store (`retrieve::lay`).
#[test]
fn a_unit_is_fetched_from_its_store() -> Result<(), Error> {
    if is_bare() {
        return Ok(());
    }
    for stop in [false, true] {
        let service = Service::new()?;
        let mut launch = echo_launch(&service)?;
        launch.options(["--checkpoint-every", if stop { "100ms" } else { "1h" }]);
        let unit = launch.start()?;
        let mut count = 0;
        for life in 0..4u64 {
            // Two clients, so that each life has connections to lose.
            let mut talks = [Talk::to(unit.port)?, Talk::to(unit.port)?];
            for n in 0..50 + 20 * life {
                let text = format!("life {life} request {n}");
                let talk = &mut talks[n as usize % 2];
                talk.say(&text)?;
                count += 1;
                let answer = talk.hear(LIMIT)?.unwrap_or_default();
                // COUNT of the connection, TOTAL of the server.
                let total = answer.split(' ').nth(1).and_then(|t| t.parse::<u64>().ok());
                assert!(answer.ends_with(&text) && total == Some(count), "`{answer}` is answer {count} to `{text}`");
            }
            unit.kill9_all(life)?;
            unit.wipe_memory()?;
            unit.resume_as(&[], &["--store", &service.url(), "--stable", "cache"])?;
        }
        unit.stop()?;
    }
    Ok(())
}

/// Everything is killed at once, the service too: whatever had an answer is in the log that the store gives back.
///
/// Break it: have the recorder say that events are committed when it has only appended them, and not synced
/// (`--stable memory`).
#[test]
fn what_was_answered_is_in_the_store() -> Result<(), Error> {
    if is_bare() {
        return Ok(());
    }
    for round in 0..4u64 {
        let service = Service::new()?;
        let mut launch = echo_launch(&service)?;
        launch.options(["--checkpoint-every", "1h", "--recover-within", "1h"]);
        let unit = launch.start()?;
        let mut talk = Talk::to(unit.port)?;
        let mut answered = Vec::new();
        for n in 0..40 + 37 * round {
            let text = format!("request {round} {n} ends");
            talk.say(&text)?;
            assert!(talk.hear(LIMIT)?.is_some_and(|a| a.ends_with(&text)), "{text}");
            answered.push(text);
        }
        let (store, name) = (service.store(), unit.name.clone());
        unit.kill9_all(round)?;
        let mut service = service;
        service.kill()?;
        let opened = Location::File(store).open().map_err(|e| error!("{e}"))?;
        let name = UnitName::new(name).map_err(|e| error!("{e}"))?;
        let unit = opened.view(&name).map_err(|e| error!("{e}"))?;
        let mut stored = Vec::new();
        let first = unit.log().map_err(|e| error!("{e}"))?.start;
        each_record(&*unit, first, &mut |_, record| {
            stored.extend_from_slice(record);
            Ok(())
        })
        .map_err(|e| error!("{e}"))?;
        let text = String::from_utf8_lossy(&stored);
        for request in answered {
            assert!(text.contains(&request), "`{request}` had an answer and is not stored");
        }
    }
    Ok(())
}
