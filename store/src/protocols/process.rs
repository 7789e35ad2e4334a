//! The processes that the protocols carry: deterministic between the messages that they receive
//! (Publishing, §2.1; Johnson, §1.2).
//!
//! A process is its state; a clone of it is a checkpoint. What it does is a function of its digest,
//! which covers every message that it received in order, so two processes with the same digest went
//! through the same history. That makes orphans and lost messages visible to the checks.

use std::fmt;

use super::model::{DependencyVector, Sii};
use super::rng::scatter;

/// What a process does when it receives a message; a small copy of it is in every process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Workload {
    /// How many processes there are.
    pub units: usize,
    /// Messages that each process sends when it is created.
    pub first: u32,
    /// How many times a message leads to a next one.
    pub hops: u32,
    /// In thousandths: how often a message leads to a second next one.
    pub forks: u32,
    /// In thousandths: how often a process shows something to the world outside.
    pub outputs: u32,
    /// Bytes of data in a message.
    pub bytes: u32,
    /// Whom messages go to.
    pub pattern: Pattern,
    /// Microseconds that a process computes, on average, where its pattern has it compute. Only
    /// sender-based logging gives it this time.
    pub computing: u32,
    /// Distinguishes runs.
    pub seed: u64,
}

/// Whom a process sends to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Pattern {
    /// Anybody.
    Random,
    /// A main process asks, the others answer (Johnson, §3.4.4: nqueens and tsp).
    Main,
    /// Back to where the message came from, most times; else to anybody (gauss: rows and pivots).
    Exchange,
    /// The next process.
    Ring,
    /// The next process, and only the first begins.
    Chain,
    /// The others ask a main process, which answers at once; they compute on each answer (Johnson,
    /// §3.4.4: nqueens). How long is uniform.
    Ask,
    /// The same, as a branch-and-bound search asks: after anything from some 100 µs to the longest, each
    /// doubling of the time being as frequent (tsp).
    Search,
    /// Elimination with a pivot in each step (gauss). The others send candidates to the main process; when all
    /// have come it tells them whose row it is; that one sends its row to each, after the answer
    /// of the one before; who has it computes and sends the next candidate. Four hops are a step.
    Eliminate,
}

/// A message between processes.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Message {
    /// Sender.
    pub from: usize,
    /// Receiver.
    pub to: usize,
    /// Send sequence number: counts messages from this sender to this receiver, from 1 (Johnson, §1.2;
    /// there one number serves all receivers).
    pub ssn: u64,
    /// State interval of the sender that it was sent in.
    pub sent_in: Sii,
    /// How many more messages it leads to.
    pub hops: u32,
    /// Bytes of data.
    pub bytes: u32,
    /// Digest of the sender's state that it was sent in. It stands for the data: a process that acts on
    /// it acts on all that the sender had seen.
    pub data: u64,
}

impl fmt::Display for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "message {} of {}→{} (sent in interval {})", self.ssn, self.from, self.to, self.sent_in)
    }
}

/// Something that the world outside sees.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Output {
    /// By which process.
    pub unit: usize,
    /// Counts the outputs of this process, from 0.
    pub number: u64,
    /// State interval that it was made in.
    pub made_in: Sii,
    /// Digest of that state; it stands for the data.
    pub data: u64,
}

impl fmt::Display for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "output {} of unit {} (made in interval {})", self.number, self.unit, self.made_in)
    }
}

/// What a process does in a state interval.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Effect {
    /// Send a message.
    Send(Message),
    /// Show something to the world outside.
    Show(Output),
}

/// One state interval, as the checks want to know it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Interval {
    /// Sender of the message that began it.
    pub from: usize,
    /// That message's number.
    pub ssn: u64,
    /// Interval that it was sent in.
    pub sent_in: Sii,
    /// Digest of the sender in that interval.
    pub sender: u64,
    /// Digest of this process in the interval begun.
    pub digest: u64,
}

/// A process.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Process {
    /// Which one.
    pub id: usize,
    workload: Workload,
    started: bool,
    digest: u64,
    /// Messages sent to each process so far.
    pub sent: Vec<u64>,
    /// Messages received from each process so far: the table for duplicate detection (Johnson, §1.2).
    pub received: Vec<u64>,
    /// Outputs made so far.
    pub outputs: u64,
    /// Dependencies (Johnson, §2.1.1).
    pub depends_on: DependencyVector,
    /// Every interval but the first.
    pub history: Vec<Interval>,
}

impl Process {
    /// A process that has not begun to run.
    pub fn new(id: usize, workload: Workload) -> Self {
        let units = workload.units;
        Self {
            id,
            workload,
            started: false,
            digest: scatter(workload.seed ^ scatter(id as u64)),
            sent: vec![0; units],
            received: vec![0; units],
            outputs: 0,
            depends_on: DependencyVector::created(id, units),
            history: Vec::new(),
        }
    }

    /// The current state interval index.
    pub fn sii(&self) -> Sii {
        self.history.len() as Sii
    }

    /// Whether interval 0 has been run.
    pub fn has_started(&self) -> bool {
        self.started
    }

    /// The digest in interval `sii`, if it was reached.
    pub fn digest_in(&self, sii: Sii) -> Option<u64> {
        match sii {
            0 => Some(scatter(self.workload.seed ^ scatter(self.id as u64))),
            _ => self.history.get(sii as usize - 1).map(|interval| interval.digest),
        }
    }

    /// Bytes that a checkpoint takes.
    pub fn checkpoint_bytes(&self) -> u64 {
        4096
    }

    /// Runs interval 0, unless that is done already.
    pub fn start(&mut self) -> Vec<Effect> {
        if std::mem::replace(&mut self.started, true) {
            return Vec::new();
        }
        let waits = match self.workload.pattern {
            Pattern::Main | Pattern::Chain => self.id != 0,
            Pattern::Ask | Pattern::Search | Pattern::Eliminate => self.id == 0,
            Pattern::Random | Pattern::Exchange | Pattern::Ring => false,
        };
        let first = if waits { 0 } else { self.workload.first };
        (0..first).map(|k| self.send(self.id, scatter(self.digest ^ u64::from(k)), self.workload.hops)).collect()
    }

    /// Whether this is the next message of its sender; one that is not is a duplicate or early.
    pub fn is_next(&self, message: &Message) -> bool {
        message.ssn == self.received[message.from] + 1
    }

    /// Whether this message was received before.
    pub fn is_duplicate(&self, message: &Message) -> bool {
        message.ssn <= self.received[message.from]
    }

    /// Receives a message: begins the next state interval and runs it.
    pub fn receive(&mut self, message: &Message) -> Vec<Effect> {
        debug_assert!(self.started && message.to == self.id);
        self.received[message.from] = message.ssn;
        self.depends_on.receive(self.id, message.from, message.sent_in);
        self.digest = scatter(self.digest ^ scatter(message.data ^ scatter(message.from as u64 ^ message.ssn << 32)));
        self.history.push(Interval {
            from: message.from,
            ssn: message.ssn,
            sent_in: message.sent_in,
            sender: message.data,
            digest: self.digest,
        });
        let choice = scatter(self.digest);
        let mut effects = Vec::new();
        if self.workload.pattern == Pattern::Eliminate {
            effects = self.eliminate(message);
        } else if message.hops > 0 {
            effects.push(self.send(message.from, choice, message.hops - 1));
            if choice >> 20 & 1023 < u64::from(self.workload.forks) {
                effects.push(self.send(message.from, scatter(choice), message.hops - 1));
            }
        }
        if choice >> 40 & 1023 < u64::from(self.workload.outputs) {
            effects.push(Effect::Show(Output {
                unit: self.id,
                number: self.outputs,
                made_in: self.sii(),
                data: self.digest,
            }));
            self.outputs += 1;
        }
        effects
    }

    /// What follows from a message of [`Pattern::Eliminate`]; its hops say what it is.
    fn eliminate(&mut self, message: &Message) -> Vec<Effect> {
        let others = self.workload.units - 1;
        let after = |unit: usize| unit % others + 1;
        let hops = message.hops;
        // Whom the owner of the pivot's row has to send it to now; itself when all have it.
        let next = match hops % 4 {
            // A candidate.
            0 if self.sii().is_multiple_of(others as u64) => {
                return (1..=others).map(|to| self.send_to(to, hops - 1)).collect();
            }
            // Everybody sees the same owner in the main process's decision.
            3 if 1 + message.data as usize % others == self.id => after(self.id),
            0 | 3 => return Vec::new(),
            // The row.
            2 => {
                let answer = self.send_to(message.from, hops - 1);
                return [answer].into_iter().chain(self.candidate(hops / 4 * 4)).collect();
            }
            // The answer to it.
            _ => after(message.from),
        };
        let step = hops / 4 * 4;
        if next == self.id { self.candidate(step).into_iter().collect() } else { vec![self.send_to(next, step + 2)] }
    }

    fn candidate(&mut self, hops: u32) -> Option<Effect> {
        (hops > 0).then(|| self.send_to(0, hops))
    }

    /// Microseconds that this process computes before it sends a message of its own.
    pub fn computes_before(&self, message: &Message) -> u64 {
        let Workload { pattern, computing, .. } = self.workload;
        let mean = u64::from(computing);
        let choice = scatter(message.data ^ message.ssn);
        match pattern {
            _ if mean == 0 || self.id == 0 || message.sent_in == 0 => 0,
            Pattern::Eliminate if !message.hops.is_multiple_of(4) => 0,
            Pattern::Ask | Pattern::Eliminate => choice % (2 * mean),
            Pattern::Search => {
                // Halves of the longest: their mean is two times that by their number.
                let halves = u64::from((mean / 8).max(1).ilog2()) + 1;
                (mean * halves / 2) >> (choice % halves)
            }
            _ => 0,
        }
    }

    fn send(&mut self, came_from: usize, choice: u64, hops: u32) -> Effect {
        let n = self.workload.units;
        let anybody = (self.id + 1 + choice as usize % (n - 1)) % n;
        let to = match self.workload.pattern {
            Pattern::Random => anybody,
            Pattern::Main | Pattern::Ask | Pattern::Search | Pattern::Eliminate if self.id != 0 => 0,
            Pattern::Main | Pattern::Ask | Pattern::Search | Pattern::Eliminate if came_from != 0 => came_from,
            Pattern::Main | Pattern::Ask | Pattern::Search | Pattern::Eliminate => anybody,
            Pattern::Exchange if came_from != self.id && choice >> 50 & 3 != 0 => came_from,
            Pattern::Exchange => anybody,
            Pattern::Ring | Pattern::Chain => (self.id + 1) % n,
        };
        self.send_to(to, hops)
    }

    fn send_to(&mut self, to: usize, hops: u32) -> Effect {
        self.sent[to] += 1;
        Effect::Send(Message {
            from: self.id,
            to,
            ssn: self.sent[to],
            sent_in: self.sii(),
            hops,
            bytes: self.workload.bytes,
            data: self.digest,
        })
    }
}

/// Messages sent and not yet known to be safe without the sender: what is retransmitted, and in
/// sender-based protocols the message log.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Outbox {
    to: Vec<std::collections::BTreeMap<u64, Message>>,
    /// Up to which number each receiver has said that it received.
    received: Vec<u64>,
}

impl Outbox {
    /// Nothing sent to anybody.
    pub fn new(units: usize) -> Self {
        Self { to: vec![Default::default(); units], received: vec![0; units] }
    }

    /// Keeps a message.
    pub fn keep(&mut self, message: Message) {
        self.to[message.to].insert(message.ssn, message);
    }

    /// `to` says that it received everything up to `ssn`; it needs no retransmission now.
    pub fn received(&mut self, to: usize, ssn: u64) {
        self.received[to] = self.received[to].max(ssn);
    }

    /// `to` was rolled back and has received everything up to `ssn` only.
    pub fn received_only(&mut self, to: usize, ssn: u64) {
        self.received[to] = ssn;
    }

    /// Messages up to `ssn` are not needed any more.
    pub fn safe(&mut self, to: usize, ssn: u64) {
        self.received(to, ssn);
        self.to[to] = self.to[to].split_off(&(ssn + 1));
    }

    /// What may not have arrived.
    pub fn unreceived(&self) -> impl Iterator<Item = &Message> {
        self.to.iter().zip(&self.received).flat_map(|(kept, &ssn)| kept.range(ssn + 1..).map(|(_, message)| message))
    }

    /// What may not have arrived at `to`.
    pub fn unreceived_by(&self, to: usize) -> impl Iterator<Item = &Message> {
        self.to[to].range(self.received[to] + 1..).map(|(_, message)| message)
    }

    /// A kept message.
    pub fn get(&self, to: usize, ssn: u64) -> Option<&Message> {
        self.to[to].get(&ssn)
    }

    /// Everything kept for `to` above `ssn`.
    pub fn above(&self, to: usize, ssn: u64) -> impl Iterator<Item = &Message> {
        self.to[to].range(ssn + 1..).map(|(_, message)| message)
    }

    /// Bytes of the messages kept.
    pub fn bytes(&self) -> u64 {
        self.to.iter().flat_map(|kept| kept.values()).map(|message| u64::from(message.bytes)).sum()
    }

    /// How many messages are kept.
    pub fn len(&self) -> usize {
        self.to.iter().map(|kept| kept.len()).sum()
    }

    /// Nothing is kept.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
