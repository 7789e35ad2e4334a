//! Clients that reconnect: what they were told has to be there after everything was killed.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::Duration;

use crate::rng::Rng;
use crate::unit::{LIMIT, Unit};
use crate::{Error, error};

/// For each client the requests that were answered, those of which nobody knows whether they were served, and the highest
/// count that it was told.
pub type Counts = BTreeMap<usize, (u64, u64, u64)>;

/// One client of a server that counts: it reconnects when its connection breaks. `ask` makes one request and returns
/// the count that it is told.
struct Counting<A> {
    connection: Option<BufReader<TcpStream>>,
    port: u16,
    ask: A,
    answered: u64,
    open: u64,
    highest: u64,
}

impl<A: FnMut(&mut BufReader<TcpStream>) -> std::io::Result<u64>> Counting<A> {
    fn new(port: u16, ask: A) -> Self {
        Self { connection: None, port, ask, answered: 0, open: 0, highest: 0 }
    }

    fn step(&mut self) {
        if self.connection.is_none() {
            let connected = TcpStream::connect(("127.0.0.1", self.port));
            self.connection = connected.ok().map(BufReader::new);
        }
        let Some(connection) = &mut self.connection else {
            std::thread::sleep(Duration::from_millis(2));
            return;
        };
        match (self.ask)(connection) {
            Ok(told) => {
                assert!(told > self.highest, "told {told} after {}", self.highest);
                (self.answered, self.highest) = (self.answered + 1, told);
            }
            Err(_) => {
                self.open += 1;
                self.connection = None;
            }
        }
    }
}

/// One request, and the line that answers it.
pub fn line(connection: &mut BufReader<TcpStream>, request: &[u8]) -> std::io::Result<String> {
    connection.get_ref().set_read_timeout(Some(LIMIT))?;
    connection.get_mut().write_all(request)?;
    let mut reply = String::new();
    connection.read_line(&mut reply)?;
    if reply.ends_with('\n') { Ok(reply) } else { Err(ErrorKind::UnexpectedEof.into()) }
}

/// Four clients count while `kill`, which also brings the unit back, is done so many times at random instants.
pub fn through<A>(
    unit: &Unit,
    kills: u64,
    mut rng: Rng,
    ask: impl Fn(usize) -> A,
    mut kill: impl FnMut(&mut Rng) -> Result<(), Error>,
) -> Result<Counts, Error>
where
    A: FnMut(&mut BufReader<TcpStream>) -> std::io::Result<u64> + Send,
{
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let clients: Vec<_> = (0..4)
            .map(|n| {
                let mut client = Counting::new(unit.port, ask(n));
                let over = &over;
                scope.spawn(move || {
                    while !over.load(SeqCst) {
                        client.step();
                    }
                    (n, (client.answered, client.open, client.highest))
                })
            })
            .collect();
        let mut work = || -> Result<(), Error> {
            for _ in 0..kills {
                std::thread::sleep(Duration::from_millis(rng.within(20..=600)));
                kill(&mut rng)?;
            }
            std::thread::sleep(Duration::from_millis(300));
            Ok(())
        };
        let done = work();
        over.store(true, SeqCst);
        let counts =
            clients.into_iter().map(|c| c.join().map_err(|_| error!("a client saw a count go back"))).collect();
        done.and(counts)
    })
}
