//! As `programs.rs`, at durability `supervisor`: the victims are the program, the supervisor, or both, at random.
//!
//! To break it on purpose: let the hands forget the result of a call, keep the events since the newest checkpoint
//! in the supervisor's own memory, or look at what a call did before its process is gone.

use ftrun_tests::load::Load;
use ftrun_tests::scenarios;
use ftrun_tests::unit::start_all_with;

macro_rules! survives {
    ($($(#[$note:meta])* $name:ident;)*) => {$(
        $(#[$note])*
        #[test]
        fn $name() -> Result<(), ftrun_tests::Error> {
            start_all_with("--durability supervisor");
            let report = scenarios::$name(&Load::from_env().any_victim())?;
            println!("{report}");
            Ok(())
        }
    )*};
}

survives! {
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
    descriptors;
    spin;
    alarm_spin;
}
