//! The checkers notice what they are there for: servers that are wrong on purpose, or meddled with.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;

use ftrun_tests::Error;
use ftrun_tests::clients::{Echo, Redis};
use ftrun_tests::load::{Client, Progress};
use ftrun_tests::rng::Rng;
use ftrun_tests::scenarios::redis_launch;
use ftrun_tests::wire::{Fault, Kind};

/// Serves one connection; `answer` makes the whole answer to line `n` (from 1), None hangs up.
fn server(answer: impl Fn(u64, &str) -> Option<String> + Send + 'static) -> std::io::Result<u16> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let port = listener.local_addr()?.port();
    std::thread::spawn(move || -> std::io::Result<()> {
        let (mut stream, _) = listener.accept()?;
        stream.set_nodelay(true)?;
        let read = BufReader::new(stream.try_clone()?);
        for (n, line) in (1..).zip(read.lines()) {
            let Some(text) = answer(n, &line?) else { break };
            stream.write_all(text.as_bytes())?;
        }
        Ok(())
    });
    Ok(port)
}

/// The first fault of a client that goes on for long enough to meet one.
fn first_fault(client: &mut dyn Client) -> Option<Fault> {
    let progress = Progress::default();
    (0..2000).find_map(|_| client.step(&progress).err())
}

fn echo_fault(answer: impl Fn(u64, &str) -> Option<String> + Send + 'static) -> Result<Option<Kind>, Error> {
    let port = server(answer)?;
    let mut client = Echo::connect(port, Rng::new(1), false)?;
    Ok(first_fault(&mut client).map(|f| f.kind))
}

#[test]
fn a_good_server_is_not_blamed() -> Result<(), Error> {
    assert_eq!(echo_fault(|n, line| Some(format!("{n} {n} {line}\n")))?, None);
    Ok(())
}

#[test]
fn a_count_too_high_is_doubled_and_one_too_low_is_lost() -> Result<(), Error> {
    let skip = |n, line: &str| Some(format!("{} {n} {line}\n", if n > 50 { n + 1 } else { n }));
    assert_eq!(echo_fault(skip)?, Some(Kind::Doubled));
    let forget = |n, line: &str| Some(format!("{} {n} {line}\n", if n > 50 { n - 1 } else { n }));
    assert_eq!(echo_fault(forget)?, Some(Kind::Lost));
    let forget_total = |n, line: &str| Some(format!("{n} {} {line}\n", if n > 50 { n - 1 } else { n }));
    assert_eq!(echo_fault(forget_total)?, Some(Kind::Lost));
    Ok(())
}

#[test]
fn an_answer_sent_twice_is_noticed() -> Result<(), Error> {
    let twice = |n, line: &str| {
        let one = format!("{n} {n} {line}\n");
        Some(if n == 50 { one.repeat(2) } else { one })
    };
    // It comes as bytes too many, or as an old answer in the place of the next.
    let kind = echo_fault(twice)?;
    assert!(matches!(kind, Some(Kind::Doubled | Kind::Lost)), "{kind:?}");
    Ok(())
}

#[test]
fn a_wrong_byte_and_a_hangup_are_noticed() -> Result<(), Error> {
    let wrong =
        |n, line: &str| Some(format!("{n} {n} {}\n", if n == 50 { line.replace(':', ";") } else { line.into() }));
    assert_eq!(echo_fault(wrong)?, Some(Kind::Error));
    assert_eq!(echo_fault(|n, line| (n < 50).then(|| format!("{n} {n} {line}\n")))?, Some(Kind::Reset));
    Ok(())
}

#[test]
fn the_redis_model_notices_meddling() -> Result<(), Error> {
    let unit = redis_launch(&[])?.start()?;
    let mut meddler = Redis::connect(unit.port, 99, Rng::new(2))?;
    let meddlings: [(&[&str], Kind); 4] = [
        (&["INCR", "client0:counter:0"], Kind::Doubled),
        (&["DECR", "client1:counter:0"], Kind::Lost),
        (&["LPUSH", "client2:list", "again"], Kind::Doubled),
        (&["SET", "shared", "0"], Kind::Lost),
    ];
    for (n, (command, kind)) in meddlings.into_iter().enumerate() {
        let mut client = Redis::connect(unit.port, n, Rng::new(n as u64))?;
        // Until every kind of key is there.
        for _ in 0..200 {
            client.step(&Progress::default())?;
        }
        client.verify()?;
        meddler.ask(command)?;
        let fault = first_fault(&mut client).or_else(|| client.verify().err());
        assert_eq!(fault.as_ref().map(|f| f.kind), Some(kind), "{command:?}: {fault:?}");
    }
    unit.stop()?;
    Ok(())
}
