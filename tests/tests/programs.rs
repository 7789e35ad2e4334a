//! Each program survives its kills, and its clients, or the program itself, notice nothing.
//!
//! 8 clients check every reply on one connection each; `FTRUN_TEST_KILLS` says how many kills (20).
//! To break it on purpose: let the supervisor drop one event of the log, send one twice, or restore a
//! descriptor to another number; each is a lost, doubled or wrong reply here.

use ftrun_tests::load::Load;
use ftrun_tests::{scenarios, survives};

survives! {
    Load::from_env();
    redis;
    redis_aof;
    redis_bgsave;
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
    forks;
    files;
    memory;
    itself;
    mmsg;
    descriptors;
    spin;
    alarm_spin;
}

#[test]
fn every_scenario_has_a_test() {
    let source = include_str!("programs.rs");
    for (name, _) in scenarios::ALL {
        let line = format!("\n    {};\n", name.replace('-', "_"));
        assert!(source.contains(&line), "scenario {name} has no test");
    }
}
