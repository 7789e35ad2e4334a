//! Durability `node` with a store in a cluster of three NATS servers, of which one at a time is killed.
//!
//! To break it on purpose: count a group as stored when it was sent (`store/src/nats/log.rs`), or take the failure of a
//! condition for success.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use ftrun_store::nats::servers::{Servers, program};
use ftrun_tests::Error;
use ftrun_tests::binaries::is_bare;
use ftrun_tests::load::{Load, Report, Store};
use ftrun_tests::scenarios::{echo_server, guest_launch, redis_launch, redis_with};
use ftrun_tests::unit::{Launch, start_all_with};

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
    start_all_with("--durability node --stable disk");
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
