//! As `programs.rs`, at durability `supervisor`: the victims are the program, the supervisor, or both, at random.
//!
//! To break it on purpose: let the hands forget the result of a call, keep the events since the newest checkpoint
//! in the supervisor's own memory, or look at what a call did before its process is gone.

use ftrun_tests::Error;
use ftrun_tests::binaries::is_bare;
use ftrun_tests::load::Load;
use ftrun_tests::process::Process;
use ftrun_tests::scenarios::guest_launch;
use ftrun_tests::survives;
use ftrun_tests::unit::{Ready, start_all_with};

const LEVEL: &str = "--durability supervisor";

fn load() -> Load {
    start_all_with(LEVEL);
    Load::from_env().any_victim()
}

survives! {
    load();
    redis;
    redis_aof;
    memcached_t1;
    memcached_t4;
    nginx;
    python_asyncio;
    python_threads;
    python_http;
    epoll_echo;
    visitors;
    thread_echo;
    waits_echo;
    exec_chain;
    tokio_echo;
    udp_echo;
    unix_rights;
    signals;
    compute;
    timers;
    files;
    memory;
    itself;
    mmsg;
    descriptors;
    spin;
    alarm_spin;
}

/// A signal for the program that comes while its supervisor is being replaced waits until there is a program again.
///
/// Break it: let the keeper pass signals on to the last process that it knows.
#[test]
fn a_signal_waits_for_the_next_supervisor() -> Result<(), Error> {
    const SIGTERM: i32 = 15;
    start_all_with(LEVEL);
    if is_bare() {
        return Ok(());
    }
    for _ in 0..10 {
        let mut launch = guest_launch("signals")?;
        launch.ready(Ready::Line);
        let unit = launch.start()?;
        unit.kill9_supervisor()?;
        Process::open(unit.started_pid())?.signal(SIGTERM)?;
        let status = unit.wait()?;
        assert_eq!(status.code(), Some(9), "{}", unit.stderr()?);
        assert!(unit.stdout()?.ends_with("ended by SIGTERM\n"));
    }
    Ok(())
}

/// Without its keeper a unit goes on: the supervisor makes its calls itself, and says what is not survived any more.
///
/// Break it: have a call wait for hands that are gone.
#[test]
fn the_keeper_is_killed() -> Result<(), Error> {
    const SIGKILL: i32 = 9;
    start_all_with(LEVEL);
    if is_bare() {
        return Ok(());
    }
    let mut launch = guest_launch("udp_echo")?;
    launch.ready(Ready::Line);
    let unit = launch.start()?;
    let client = std::net::UdpSocket::bind("127.0.0.1:0")?;
    client.connect(("127.0.0.1", unit.port))?;
    client.set_read_timeout(Some(ftrun_tests::unit::LIMIT))?;
    // Datagrams are calls of the supervisor, and so of the hands.
    let ask = |n: u32| -> Result<(), Error> {
        let mut reply = [0; 64];
        client.send(b"line")?;
        let got = client.recv(&mut reply)?;
        assert_eq!(String::from_utf8_lossy(&reply[..got]), format!("{n} {n} line"));
        Ok(())
    };
    ask(1)?;
    // A call that is being made when the keeper dies cannot be judged. The program sleeps when the next one is over.
    let stat = format!("/proc/{}/stat", unit.pid()?);
    while !std::fs::read_to_string(&stat)?.contains(") S ") {
        std::thread::yield_now();
    }
    Process::open(unit.started_pid())?.signal(SIGKILL)?;
    (2..=100).try_for_each(&ask)?;
    unit.kill9()?;
    (101..=200).try_for_each(&ask)?;
    assert!(unit.stderr()?.contains("the keeper was killed"), "{}", unit.stderr()?);
    unit.stop()?;
    Ok(())
}
