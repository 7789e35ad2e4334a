//! Keeper, supervisor and program are killed, all at once, and the service manager, a real systemd, has their descriptors
//! (`--hold-descriptors`): no client notices, whatever the instant.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::time::Duration;

use ftrun_tests::clients::Echo;
use ftrun_tests::installed::{PORT, Service};
use ftrun_tests::load::{Client, Load, Progress};
use ftrun_tests::rng::Rng;
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

/// Kills processes of the unit, by their names in the status, at once.
fn kill(service: &Service, keys: &[&str]) -> Result<(), Error> {
    let status = service.status()?;
    let pids = keys.iter().filter_map(|key| status[key].as_i64()).map(|pid| pid.to_string());
    let words: Vec<_> = ["kill", "-KILL"].into_iter().map(str::to_owned).chain(pids).collect();
    if words.len() > 2 {
        // Who was being replaced may be gone by now.
        service.machine.run(words)?;
    }
    Ok(())
}

const ALL: &[&str] = &["keeper_pid", "supervisor_pid", "pid"];

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
        results.into_iter().try_for_each(|r| r?).map_err(|e| error!("{e}\n{}", service.errors().unwrap_or_default()))?;
        struck
    })?;
    Ok(requests.load(SeqCst))
}

fn echoes(count: u64) -> Result<Vec<Box<dyn Client>>, Error> {
    (0..count).map(|i| Ok(Box::new(Echo::connect(PORT, Rng::new(i), true)?) as Box<dyn Client>)).collect()
}

/// Waits until the service has been restarted more often than that, and runs.
fn await_restart(service: &Service, before: u64) -> Result<u64, Error> {
    let restarts = |n: &str| n.parse().unwrap_or(0u64);
    let now = service.machine.await_property(&service.unit, "NRestarts", |n| restarts(n) > before)?;
    service.machine.await_property(&service.unit, "ActiveState", |s| s == "active")?;
    Ok(restarts(&now))
}

/// The service is stopped, and leaves nothing with systemd.
fn stop(service: &Service) -> Result<(), Error> {
    service.systemctl("stop")?;
    assert_eq!((service.get("ActiveState")?.as_str(), service.get("Result")?.as_str()), ("inactive", "success"));
    assert_eq!(service.get("NFileDescriptorStore")?, "0");
    Ok(())
}

/// Break it: have `Hold::put` send nothing, put the numbers back without their flags for `execve`, or start with them one
/// place further.
#[test]
fn everything_is_killed_and_no_client_notices() -> Result<(), Error> {
    let service = service!("shop", OPTIONS, "");
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
            kill(&service, whom)?;
            restarts = await_restart(&service, restarts)?;
        }
        Ok(())
    })?;
    println!("{requests} requests, {restarts} restarts");
    assert_eq!(service.errors()?, "");
    assert_eq!(service.status()?["recoveries"].as_u64().map(|n| n >= restarts), Some(true));
    stop(&service)?;
    service.done();
    Ok(())
}

/// What is closed is closed: nothing holds it any longer.
///
/// Break it: leave what no number leads to in its slot (`Hold::leave`).
#[test]
fn what_the_program_closes_ends_at_once() -> Result<(), Error> {
    let service = service!("shop", OPTIONS, "");
    service.systemctl("start")?;
    let restarts = |n| -> Result<(), Error> {
        kill(&service, ALL)?;
        await_restart(&service, n).map(drop)
    };
    for round in 0..4 {
        let mut streams: Vec<_> = (0..20).map(|_| TcpStream::connect(("127.0.0.1", PORT))).collect::<Result<_, _>>()?;
        for stream in &mut streams {
            stream.set_read_timeout(Some(Duration::from_secs(20)))?;
            stream.write_all(b"hello\n")?;
            assert!(stream.read(&mut [0; 100])? > 0);
        }
        if round % 2 == 1 {
            restarts(round / 2)?;
        }
        for stream in &mut streams {
            // The server finds the end, and closes its own.
            stream.shutdown(Shutdown::Write)?;
            assert_eq!(stream.read(&mut [0; 100])?, 0);
        }
    }
    stop(&service)?;
    service.done();
    Ok(())
}
