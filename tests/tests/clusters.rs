//! Durability `node` with a store in a cluster of three NATS servers, of which one at a time is killed.
//!
//! To break it on purpose: count a group as stored when it was sent (`store/src/nats/log.rs`), or take the failure of a
//! condition for success.

use std::io::BufReader;
use std::net::TcpStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use ftrun_store::nats::servers::{Servers, program};
use ftrun_tests::Error;
use ftrun_tests::binaries::is_bare;
use ftrun_tests::counting::line;
use ftrun_tests::load::{Load, Report, Store};
use ftrun_tests::scenarios::{echo_server, guest_launch, redis_launch, redis_with};
use ftrun_tests::unit::{Launch, Ready, free_port, start_all_with};

const LEVEL: &str = "--durability node --stable disk";

/// Three servers, and which of them is down.
#[derive(Debug)]
struct Cluster(Mutex<(Servers, Option<usize>)>);

impl Store for Cluster {
    fn kill(&self, n: u64) -> Result<(), Error> {
        let mut cluster = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let victim = (n % 3) as usize;
        cluster.0.kill(victim)?;
        cluster.1 = Some(victim);
        Ok(())
    }

    fn restart(&self) -> Result<(), Error> {
        let mut cluster = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let victim = cluster.1.take();
        victim.map_or(Ok(()), |victim| Ok(cluster.0.restart(victim)?))
    }
}

/// Checking clients go on while unit, supervisor, both or one server are killed, at random and in the midst of each other.
fn any_victim(
    launch: impl FnOnce() -> Result<Launch, Error>,
    run: impl FnOnce(&Load, Launch) -> Result<Report, Error>,
) -> Result<(), Error> {
    if is_bare() {
        return Ok(());
    }
    start_all_with(LEVEL);
    let dir = tempfile::tempdir()?;
    let servers = Servers::start(&program(), dir.path(), 3)?;
    let mut launch = launch()?;
    launch.options(["--store", &servers.url("s")]);
    let load = Load { clients: 4, at_least: Duration::from_secs(4), ..Load::from_env() };
    let kills = load.kills.min(12);
    println!("{}", run(&load.kills(kills).any_victim_and(Arc::new(Cluster(Mutex::new((servers, None))))), launch)?);
    Ok(())
}

#[test]
fn any_process_is_killed_and_any_server() -> Result<(), Error> {
    any_victim(|| guest_launch("epoll_echo"), echo_server)
}

#[test]
fn any_process_is_killed_and_any_server_of_redis() -> Result<(), Error> {
    any_victim(|| redis_launch(&["--save", ""]), |load, launch| redis_with(launch, load))
}

/// The machine is lost, and with it one server: the others have all that was answered.
///
/// Break it: have every server answer before a unit is opened (`store/src/nats/monitor.rs`), or leave the events behind the newest checkpoint in
/// the store (`retrieve::fetch`).
#[test]
fn a_unit_is_fetched_from_a_cluster_that_has_lost_a_server() -> Result<(), Error> {
    if is_bare() {
        return Ok(());
    }
    start_all_with(LEVEL);
    let dir = tempfile::tempdir()?;
    let mut servers = Servers::start(&program(), dir.path(), 3)?;
    let url = servers.url("s");
    let mut launch = guest_launch("epoll_echo")?;
    launch.options(["--store", &url]).ready(Ready::Line).add_args([free_port()?.to_string()]);
    let unit = launch.start()?;
    let mut answered = 0;
    let mut count_to = |last: u64| -> Result<(), Error> {
        let mut c = BufReader::new(TcpStream::connect(("127.0.0.1", unit.port))?);
        while answered < last {
            answered += 1;
            let reply = line(&mut c, b"text\n")?;
            assert_eq!(reply.split(' ').nth(1), Some(&*answered.to_string()), "{reply}");
        }
        Ok(())
    };
    for victim in 0..3 {
        count_to(40 * (victim + 1))?;
        servers.kill(victim as usize)?;
        unit.kill9_all(victim)?;
        unit.wipe_memory()?;
        unit.resume_as(&[], &["--store", &url])?;
        count_to(40 * (victim + 1) + 10)?;
        servers.restart(victim as usize)?;
    }
    unit.stop()?;
    Ok(())
}
