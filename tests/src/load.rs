//! Many checking clients, each on one connection for the whole run, while a killer strikes.

use std::collections::BTreeSet;
use std::fmt;
use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use crate::binaries;
use crate::kills::Killed;
use crate::rng::Rng;
use crate::unit::Unit;
use crate::wire::{Fault, Kind};

/// What a run consists of.
#[derive(Debug, Clone)]
pub struct Load {
    /// How many clients.
    pub clients: usize,
    /// How many times SIGKILL is sent.
    pub kills: u64,
    /// How long the run lasts at least.
    pub at_least: Duration,
    /// Milliseconds between a recovery and the next kill.
    pub gap_ms: RangeInclusive<u64>,
    /// Whom the kills may strike; each draws one.
    pub victims: &'static [Victim],
    /// The unit's store: one more victim, if there is one.
    pub store: Option<Arc<dyn Store>>,
    /// Everything random follows from it.
    pub seed: u64,
}

/// Whom a kill strikes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Victim {
    /// The unit's root process.
    Unit,
    /// The supervisor.
    Supervisor,
    /// Both, one right after the other.
    Both,
}

/// A store that can be struck, or one of the servers that it consists of.
pub trait Store: fmt::Debug + Send + Sync {
    /// Kills it with SIGKILL. Where it is several servers `n` says which of them is killed.
    fn kill(&self, n: u64) -> Result<(), crate::Error>;

    /// Starts what was killed again, and waits until it serves.
    fn restart(&self) -> Result<(), crate::Error>;
}

impl Load {
    /// 8 clients and as many kills as `FTRUN_TEST_KILLS` says (20 by default); `FTRUN_TEST_SEED` repeats a run.
    pub fn from_env() -> Self {
        let number = |key: &str| std::env::var(key).ok().and_then(|v| v.parse::<u64>().ok());
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let clock = u64::try_from(now.as_nanos() & 0xffff_ffff).unwrap_or(0);
        Self {
            clients: 8,
            kills: if binaries::is_bare() { 0 } else { number("FTRUN_TEST_KILLS").unwrap_or(20) },
            at_least: Duration::from_millis(500),
            gap_ms: 5..=300,
            victims: &[Victim::Unit],
            store: None,
            seed: number("FTRUN_TEST_SEED").unwrap_or(clock),
        }
    }

    /// The same with any of ftrun's processes but the keeper for victims; `FTRUN_TEST_VICTIM` chooses one.
    pub fn any_victim(mut self) -> Self {
        self.victims = match std::env::var("FTRUN_TEST_VICTIM").as_deref() {
            Ok("unit") => &[Victim::Unit],
            Ok("supervisor") => &[Victim::Supervisor],
            Ok("both") => &[Victim::Both],
            _ => &[Victim::Unit, Victim::Supervisor, Victim::Both],
        };
        self
    }

    /// The same with any of ftrun's processes but the keeper and a store for victims.
    pub fn any_victim_and(mut self, store: Arc<dyn Store>) -> Self {
        self.store = Some(store);
        self.any_victim()
    }

    /// The same with another number of kills (none when programs run bare).
    pub fn kills(mut self, kills: u64) -> Self {
        self.kills = if binaries::is_bare() { 0 } else { kills };
        self
    }
}

/// How far a run has come; clients may look at it.
#[derive(Debug, Default)]
pub struct Progress {
    /// Kills that are about to be carried out or have been.
    begun: AtomicU64,
    /// Kills whose victim is gone.
    gone: AtomicU64,
    /// Kills from which the unit has been recovered.
    settled: AtomicU64,
    over: Mutex<Over>,
    changed: Condvar,
}

#[derive(Debug, Default, Clone, Copy)]
struct Over {
    stop: bool,
    failed: bool,
}

impl Progress {
    /// None from just before a kill until the recovery; otherwise the number of kills so far.
    pub fn calm(&self) -> Option<u64> {
        let settled = self.settled.load(Ordering::SeqCst);
        (self.begun.load(Ordering::SeqCst) == settled).then_some(settled)
    }

    fn over(&self) -> std::sync::MutexGuard<'_, Over> {
        self.over.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, stop: bool, failed: bool) {
        let mut over = self.over();
        over.stop |= stop;
        over.failed |= failed;
        self.changed.notify_all();
    }

    /// Lets time pass; returns at once, and true, when a client has failed.
    fn failed_within(&self, time: Duration) -> bool {
        let waited = self.changed.wait_timeout_while(self.over(), time, |over| !over.failed);
        waited.map_or(true, |(over, _)| over.failed)
    }
}

/// A client that checks what it is told.
pub trait Client: Send {
    /// Makes one request or a few, and checks the replies; returns how many it has checked.
    fn step(&mut self, progress: &Progress) -> Result<u64, Fault>;

    /// Checks at the end everything that can be checked; returns how many more requests that were.
    fn finish(&mut self) -> Result<u64, Fault> {
        Ok(0)
    }

    /// What it knows of a count that all clients of the run share: how much of it is its own doing, and the
    /// highest value that it was told.
    fn shared(&self) -> Option<(u64, u64)> {
        None
    }
}

/// What the clients and the killer saw.
#[derive(Debug, Default)]
pub struct Report {
    /// Requests whose replies were checked.
    pub requests: u64,
    /// Faults of kind lost.
    pub lost: u64,
    /// Faults of kind doubled.
    pub doubled: u64,
    /// Connections that broke.
    pub resets: u64,
    /// Other faults, of clients, killer or unit.
    pub errors: u64,
    /// Each fault in words: when, who, what.
    pub faults: Vec<String>,
    /// Time of each step, sorted, in microseconds.
    pub latencies_us: Vec<u64>,
    /// For each kill the time from SIGKILL to the next reply (median over the clients), sorted, in milliseconds.
    pub recovery_ms: Vec<f64>,
    /// Kills that were carried out.
    pub kills: u64,
    /// Recoveries that ftrun counted.
    pub recoveries: u64,
    /// Supervisors that the unit had.
    pub supervisors: u64,
    /// Process ids that the unit had.
    pub pids: BTreeSet<i32>,
    /// How long the run took.
    pub seconds: f64,
    /// The seed to repeat it.
    pub seed: u64,
}

impl Report {
    /// Whether nobody has seen anything.
    pub fn is_clean(&self) -> bool {
        self.faults.is_empty()
    }

    /// Adds a fault of the run as a whole.
    pub fn fault(&mut self, who: &str, fault: &Fault) {
        match fault.kind {
            Kind::Lost => self.lost += 1,
            Kind::Doubled => self.doubled += 1,
            Kind::Reset => self.resets += 1,
            Kind::Error => self.errors += 1,
        }
        self.faults.push(format!("{who}: {fault}"));
    }
}

/// The value below which `share` of the sorted values lie; 0 if there are none.
pub fn quantile<T: Copy + Default>(sorted: &[T], share: f64) -> T {
    let last = sorted.len().saturating_sub(1);
    let at = (last as f64 * share).round() as usize;
    sorted.get(at).copied().unwrap_or_default()
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "kills                 {:>10}   (recoveries counted: {})", self.kills, self.recoveries)?;
        writeln!(f, "requests checked      {:>10}   in {:.1} s, seed {}", self.requests, self.seconds, self.seed)?;
        writeln!(f, "lost                  {:>10}", self.lost)?;
        writeln!(f, "doubled               {:>10}", self.doubled)?;
        writeln!(f, "resets seen           {:>10}", self.resets)?;
        writeln!(f, "other errors          {:>10}", self.errors)?;
        let ms = |share| quantile(&self.latencies_us, share) as f64 / 1000.0;
        writeln!(f, "reply time            {:>10.2} ms median, {:.1} ms worst", ms(0.5), ms(1.0))?;
        if self.recovery_ms.is_empty() {
            write!(f, "recovery time                  -   (no kill was followed by a reply)")?;
        } else {
            let of = |share| quantile(&self.recovery_ms, share);
            write!(f, "recovery time         {:>10.1} ms median, {:.1} ms worst", of(0.5), of(1.0))?;
        }
        for fault in self.faults.iter().take(10) {
            write!(f, "\n  {fault}")?;
        }
        Ok(())
    }
}

/// What one client brings home.
#[derive(Default)]
struct Tally {
    requests: u64,
    latencies_us: Vec<u64>,
    /// When the first reply after each kill came.
    replies: Vec<(u64, Instant)>,
    fault: Option<(Instant, Fault)>,
    shared: Option<(u64, u64)>,
}

fn drive(client: &mut dyn Client, progress: &Progress) -> Tally {
    let mut tally = Tally::default();
    let mut seen = progress.gone.load(Ordering::SeqCst);
    let result = loop {
        if progress.over().stop {
            break client.finish().map(|n| tally.requests += n);
        }
        let start = Instant::now();
        match client.step(progress) {
            Ok(n) => tally.requests += n,
            Err(fault) => break Err(fault),
        }
        let now = Instant::now();
        tally.latencies_us.push(u64::try_from((now - start).as_micros()).unwrap_or(u64::MAX));
        let gone = progress.gone.load(Ordering::SeqCst);
        if gone != seen {
            seen = gone;
            tally.replies.push((gone, now));
        }
    };
    if let Err(fault) = result {
        tally.fault = Some((Instant::now(), fault));
        progress.set(false, true);
    }
    tally.shared = client.shared();
    tally
}

/// The killer of one run.
struct Killer<'a> {
    load: &'a Load,
    unit: &'a Unit,
    progress: &'a Progress,
    rng: Rng,
    kills: Vec<Killed>,
    /// Recoveries when nobody was being recovered last.
    settled: u64,
    /// Whether the unit has been struck since then.
    struck: bool,
}

impl Killer<'_> {
    /// Kills until enough is done.
    fn work(&mut self) -> Result<(), crate::Error> {
        let (load, start) = (self.load, Instant::now());
        self.settled = if load.kills > 0 { self.unit.recoveries()? } else { 0 };
        let mut again = false;
        while (self.kills.len() as u64) < load.kills {
            // One kill in six falls into the recovery from the one before.
            let gap = if again { self.rng.within(0..=15) } else { self.rng.within(load.gap_ms.clone()) };
            if self.progress.failed_within(Duration::from_millis(gap)) {
                return Ok(());
            }
            let victim = self.rng.within(0..=(load.victims.len() + usize::from(load.store.is_some())) as u64 - 1);
            match (&load.store, load.victims.get(victim as usize)) {
                (_, Some(victim)) => self.strike_unit(*victim)?,
                (Some(store), None) => self.strike_store(&**store)?,
                (None, None) => {}
            }
            again = self.rng.one_in(6);
            if !again || self.kills.len() as u64 >= load.kills {
                // A recovery that was struck by the next kill may or may not have been counted.
                let status = self.unit.await_recoveries(self.settled + u64::from(self.struck))?;
                self.settled = status["recoveries"].as_u64().unwrap_or(self.settled);
                self.struck = false;
                self.progress.settled.store(self.kills.len() as u64, Ordering::SeqCst);
            }
        }
        self.progress.failed_within(load.at_least.saturating_sub(start.elapsed()));
        Ok(())
    }

    fn note(&mut self, kill: impl FnOnce() -> Result<Killed, crate::Error>) -> Result<(), crate::Error> {
        self.progress.begun.fetch_add(1, Ordering::SeqCst);
        let killed = kill();
        self.progress.gone.fetch_add(1, Ordering::SeqCst);
        self.kills.push(killed?);
        Ok(())
    }

    fn strike_unit(&mut self, victim: Victim) -> Result<(), crate::Error> {
        let unit = self.unit;
        self.struck = true;
        self.note(|| unit.kill9_victim(victim))
    }

    /// The store is away for a while, and the unit waits; every other time it is killed meanwhile, too. Not when it is just being
    /// recovered: its next supervisor waits for the store, so there might be nobody to kill.
    fn strike_store(&mut self, store: &dyn Store) -> Result<(), crate::Error> {
        let n = self.rng.within(0..=u64::from(u32::MAX));
        self.note(|| {
            let sent = Instant::now();
            store.kill(n)?;
            Ok(Killed { pid: 0, sent, gone: Instant::now() })
        })?;
        self.progress.failed_within(Duration::from_millis(self.rng.within(self.load.gap_ms.clone())));
        if self.rng.one_in(2) && !self.struck && !self.load.victims.is_empty() {
            let victim = self.rng.within(0..=self.load.victims.len() as u64 - 1);
            self.strike_unit(self.load.victims[victim as usize])?;
        }
        store.restart()
    }
}

/// Kills until enough is done; returns the kills, and what went wrong.
fn strike(load: &Load, unit: &Unit, progress: &Progress) -> (Vec<Killed>, Option<Fault>) {
    let (rng, kills) = (Rng::part(load.seed, 1 << 32), Vec::new());
    let mut killer = Killer { load, unit, progress, rng, kills, settled: 0, struck: false };
    let fault = killer.work().err().map(|e| Fault::error(e.0));
    progress.set(true, fault.is_some());
    (killer.kills, fault)
}

/// Connects the clients, then runs them while the killer strikes.
///
/// `connect` makes client number n. Without clients there are only the kills: for programs that check
/// themselves.
pub fn run(load: &Load, unit: &Unit, mut connect: impl FnMut(usize, Rng) -> Result<Box<dyn Client>, Fault>) -> Report {
    let mut report = Report { seed: load.seed, ..Report::default() };
    let mut clients = Vec::new();
    for n in 0..load.clients {
        match connect(n, Rng::part(load.seed, n as u64)) {
            Ok(client) => clients.push(client),
            Err(fault) => report.fault(&format!("client {n} connecting"), &fault),
        }
    }
    if !report.is_clean() {
        return report;
    }
    let progress = Progress::default();
    let start = Instant::now();
    let (tallies, (kills, fault)) = std::thread::scope(|scope| {
        let drivers: Vec<_> =
            clients.iter_mut().map(|client| scope.spawn(|| drive(client.as_mut(), &progress))).collect();
        let killed = strike(load, unit, &progress);
        let tallies: Vec<_> = drivers.into_iter().map(|d| d.join().unwrap_or_default()).collect();
        (tallies, killed)
    });
    report.seconds = start.elapsed().as_secs_f64();
    report.kills = kills.len() as u64;
    report.pids = kills.iter().map(|k| k.pid).filter(|pid| *pid > 0).collect();
    for (n, tally) in tallies.iter().enumerate() {
        report.requests += tally.requests;
        report.latencies_us.extend(&tally.latencies_us);
        if let Some((at, fault)) = &tally.fault {
            let at = (*at - start).as_secs_f64();
            let kill = kills.iter().filter(|k| k.sent - start < Duration::from_secs_f64(at)).count();
            report.fault(&format!("client {n} at {at:.3} s, after kill {kill}"), fault);
        }
    }
    if let Some(fault) = fault {
        report.fault("killer", &fault);
    }
    check_shared(&tallies, &mut report);
    report.latencies_us.sort_unstable();
    report.recovery_ms = recovery_times(&kills, &tallies);
    if !unit.is_bare() && report.is_clean() {
        check_unit(unit, &mut report);
    }
    report
}

/// The count that the clients share has to be the sum of what each has done.
fn check_shared(tallies: &[Tally], report: &mut Report) {
    let known: Vec<(u64, u64)> = tallies.iter().filter_map(|t| t.shared).collect();
    if known.is_empty() || !report.is_clean() {
        return;
    }
    let (done, highest) = known.iter().fold((0, 0), |(sum, top), (own, seen)| (sum + own, top.max(*seen)));
    if done != highest {
        report.fault("all clients", &Fault::count("the count that they share", done, highest));
    }
}

fn recovery_times(kills: &[Killed], tallies: &[Tally]) -> Vec<f64> {
    let mut times = Vec::new();
    for (n, kill) in kills.iter().enumerate() {
        let mut of_clients: Vec<f64> = tallies
            .iter()
            .flat_map(|t| t.replies.iter().find(|(gone, at)| *gone == n as u64 + 1 && *at >= kill.gone))
            .map(|(_, at)| (*at - kill.sent).as_secs_f64() * 1000.0)
            .collect();
        of_clients.sort_by(f64::total_cmp);
        if !of_clients.is_empty() {
            times.push(quantile(&of_clients, 0.5));
        }
    }
    times.sort_by(f64::total_cmp);
    times
}

/// After the last kill the unit runs, under the number that it always had where the user may choose numbers.
fn check_unit(unit: &Unit, report: &mut Report) {
    // A supervisor that kills itself, at a fault point, may just be replaced.
    match unit.await_recoveries(0) {
        Ok(status) => {
            report.recoveries = status["recoveries"].as_u64().unwrap_or(0);
            report.supervisors = status["supervisors"].as_u64().unwrap_or(1);
            report.pids.extend(status["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok()));
        }
        Err(e) => report.fault("unit", &Fault::error(e.0)),
    }
    if unit.may_choose_pids() && report.pids.len() != 1 {
        report.fault("unit", &Fault::error(format!("the pid changed: {:?}", report.pids)));
    }
    if let Err(e) = unit.verify() {
        report.fault("verify", &Fault::error(e.0));
    }
}
