//! Many connections, and kills that do not wait for the recovery from the one before.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use ftrun_tests::binaries::is_bare;
use ftrun_tests::clients::Echo;
use ftrun_tests::load::Load;
use ftrun_tests::process::allow_descriptors;
use ftrun_tests::rng::Rng;
use ftrun_tests::scenarios::guest_launch;
use ftrun_tests::unit::{Ready, Unit};
use ftrun_tests::{Error, error};

fn echo_unit() -> Result<Unit, Error> {
    let mut launch = guest_launch("epoll_echo")?;
    launch.ready(Ready::Line);
    launch.start()
}

/// Break it: close a descriptor of the shared table in a recovery, or restore one to another number; with
/// 1,000 of them in one epoll set somebody is not answered, or gets an answer of another.
#[test]
fn a_thousand_connections_survive() -> Result<(), Error> {
    const CONNECTIONS: usize = 1000;
    allow_descriptors(4096)?;
    let unit = echo_unit()?;
    let mut rng = Rng::part(Load::from_env().seed, 3);
    let mut clients = Vec::new();
    for _ in 0..CONNECTIONS {
        clients.push(Echo::connect(unit.port, Rng::new(rng.next()), true)?);
    }
    let everybody = |clients: &mut Vec<Echo>, round: u64| -> Result<(), Error> {
        for (n, client) in clients.iter_mut().enumerate() {
            let line = format!("round {round} client {n}");
            client.ask(line.as_bytes()).map_err(|f| error!("connection {n}, {line}: {f}"))?;
        }
        Ok(())
    };
    everybody(&mut clients, 0)?;
    let kills = if is_bare() { 0 } else { 10 };
    for kill in 1..=kills {
        unit.kill9()?;
        // One that does not wait, so that its line is there when the program comes back.
        let first = (kill * 97) as usize % CONNECTIONS;
        clients[first].ask(b"first")?;
        everybody(&mut clients, kill)?;
    }
    if !is_bare() {
        assert!(unit.await_recoveries(kills)?["recoveries"].as_u64() >= Some(kills));
        unit.verify()?;
    }
    // The server's count of all lines is each client's floor: what all have asked is what all were answered.
    let asked = (CONNECTIONS as u64 + 1) * kills + CONNECTIONS as u64;
    let mut last = Echo::connect(unit.port, Rng::new(1), false)?;
    assert_eq!(last.told(b"how many")?, asked + 1, "lines in all");
    unit.stop()?;
    Ok(())
}

/// 200 kills in 10 storms, each kill as soon as the process is there again or a moment later, so that they
/// fall anywhere into building, restoring and replaying it. The clients ask all the while.
///
/// Break it: take the death of a process that is being built for an error (`Unit::supervise`); forget in a
/// replay that was broken off what the one before had left (`Unit::restore`).
#[test]
fn kills_that_do_not_wait() -> Result<(), Error> {
    const KILLS: u64 = 200;
    const STORMS: u64 = 10;
    if is_bare() {
        return Ok(());
    }
    let seed = Load::from_env().seed;
    let unit = echo_unit()?;
    let (over, answers) = (AtomicBool::new(false), AtomicU64::new(0));
    let mut rng = Rng::part(seed, 4);
    std::thread::scope(|scope| -> Result<(), Error> {
        let ask = |n: u64| -> Result<(), Error> {
            let mut client = Echo::connect(unit.port, Rng::part(seed, n), true)?;
            for line in 0.. {
                client.ask(format!("client {n} line {line}").as_bytes())?;
                answers.fetch_add(1, Ordering::SeqCst);
                if over.load(Ordering::SeqCst) {
                    break;
                }
            }
            Ok(())
        };
        let clients: Vec<_> = (0..4).map(|n| scope.spawn(move || ask(n))).collect();
        while answers.load(Ordering::SeqCst) < 100 && !clients.iter().any(|c| c.is_finished()) {
            std::thread::sleep(Duration::from_millis(5));
        }
        let mut storm = |recoveries: u64| -> Result<u64, Error> {
            unit.kill_rapidly(KILLS / STORMS, |n| match n % 2 {
                0 => Duration::ZERO,
                _ => Duration::from_micros(rng.within(0..=15_000)),
            })?;
            let status = unit.await_recoveries(recoveries + 1)?;
            std::thread::sleep(Duration::from_millis(rng.within(0..=30)));
            status["recoveries"].as_u64().ok_or_else(|| error!("no recoveries in {status}"))
        };
        let settled = (0..STORMS).try_fold(0, |recoveries, _| storm(recoveries));
        over.store(true, Ordering::SeqCst);
        for client in clients {
            client.join().map_err(|_| error!("a client panicked"))??;
        }
        println!("{KILLS} kills, {} recoveries, {} answers", settled?, answers.load(Ordering::SeqCst));
        Ok(())
    })
    .map_err(|e| error!("seed {seed}: {e}"))?;
    let mut last = Echo::connect(unit.port, Rng::new(1), false)?;
    assert_eq!(last.told(b"how many")?, answers.load(Ordering::SeqCst) + 1, "seed {seed}: lines in all");
    unit.verify()?;
    unit.stop()?;
    Ok(())
}
