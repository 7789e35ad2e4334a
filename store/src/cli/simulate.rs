//! `ftstore simulate`.

use std::fmt::Write as _;
use std::path::Path;

use serde_json::{Value, json};

use super::{Answer, presets, recovery_state, workloads};
use crate::Error;
use crate::protocols::process::Workload;
use crate::protocols::rng::{Rng, scatter};
use crate::protocols::sim::{
    Bounds, Costs, Crash, Explored, Failing, Partition, Plan, Report, Subject, Victim, Violation,
};
use crate::protocols::sim::{explore, race, run, small, timeline};
use crate::protocols::{family, group, local, optimistic, sender};

/// Options of `ftstore simulate`.
#[derive(Debug, clap::Args)]
pub(super) struct Simulate {
    /// Which protocol
    #[arg(long, value_enum, default_value_t = Protocol::Local)]
    protocol: Protocol,
    /// Units that talk to each other
    #[arg(long, default_value_t = 4)]
    units: usize,
    /// nqueens, tsp, gauss, random, ring, or a JSON file with units, first, hops, forks, outputs, bytes,
    /// computing_us, pattern
    #[arg(long, default_value = "random")]
    workload: String,
    /// Failures in each run, one or more at a time as the protocol tolerates
    #[arg(long, default_value_t = 0)]
    crashes: usize,
    /// For family: how many failures at a time are tolerated
    #[arg(long, default_value_t = 1)]
    failures: usize,
    /// For family: the recovery in which live units block
    #[arg(long)]
    blocking: bool,
    /// For sender: what is done about more failures than one at a time; nothing is shown to the world then
    #[arg(long, value_enum)]
    extension: Option<Extension>,
    /// For sender: units also log what they receive in the store, waiting for nothing
    #[arg(long)]
    hybrid: bool,
    /// A rule as the paper has it, where that does not suffice; to see what happens
    #[arg(long, value_enum)]
    as_printed: Option<Printed>,
    /// Search every order of events of 3 units, 4 messages and so many failures, in up to this many states
    #[arg(long, value_name = "STATES")]
    exhaustive: Option<usize>,
    /// With --exhaustive: only the orders in which something is put off at most so many times
    #[arg(long, value_name = "N")]
    delays: Option<usize>,
    /// With --exhaustive: leave out orders that can't be told from others; for sender, family and group
    #[arg(long, conflicts_with = "delays")]
    reduce: bool,
    /// Checkpoint a unit after so many messages; 0 is never
    #[arg(long, default_value_t = 8)]
    checkpoint_every: u64,
    /// For group: so many times the network falls apart; a minority stops until it is whole again
    #[arg(long, default_value_t = 0)]
    partitions: u64,
    /// Packets lost, in thousandths
    #[arg(long, default_value_t = 0)]
    loss: u64,
    /// Packets repeated, in thousandths
    #[arg(long, default_value_t = 0)]
    repeat: u64,
    /// Microseconds a packet takes
    #[arg(long, default_value_t = 100)]
    link_us: u64,
    /// Microseconds a packet takes more, at random
    #[arg(long, default_value_t = 2_000)]
    jitter_us: u64,
    /// Microseconds a write to stable storage takes
    #[arg(long, default_value_t = 500)]
    disk_us: u64,
    /// Microseconds a unit's or the store's processor takes for each packet sent or received
    #[arg(long, default_value_t = 0)]
    processor_us: u64,
    /// Choose schedules with this seed
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// How many runs
    #[arg(long, default_value_t = 100)]
    runs: u64,
    /// Random systems instead of the one described: sizes, workloads, failures, losses from the seed
    #[arg(long)]
    vary: bool,
    /// Tell what happens in the first run, line by line
    #[arg(long)]
    timeline: bool,
    /// An experiment of one of the papers
    #[arg(long, value_enum)]
    preset: Option<presets::Preset>,
    /// Measure the recovery state algorithm: cost per interval that becomes stable
    #[arg(long)]
    bench_recovery_state: bool,
    /// With --bench-recovery-state: how many intervals
    #[arg(long, default_value_t = 1_000_000)]
    intervals: usize,
    /// Print JSON
    #[arg(long)]
    pub(super) json: bool,
}

/// The protocols.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Protocol {
    /// Messages are stored before their receiver gets them (Publishing)
    Local,
    /// Messages are logged by their senders (Johnson, ch. 3)
    Sender,
    /// Messages are logged later, orphans rolled back (Johnson, ch. 4)
    Optimistic,
    /// Receipt orders are kept by f + 1 hosts (Elnozahy)
    Family,
    /// A virtually synchronous group (CBCAST, ISIS)
    Group,
}

/// The extensions of sender-based logging (Johnson, §3.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Extension {
    /// What depends on what was lost is rolled back to its last checkpoint, if that does not
    RollBack,
    /// All checkpoints are kept, so that one is always old enough
    AllCheckpoints,
}

/// Rules that do not suffice as they are printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Printed {
    /// Group: ABCAST in three phases (CBCAST, §4.3.1)
    Abcast,
    /// Group: ids are forgotten whatever is on a wait queue (CBCAST, §4.4)
    Ids,
    /// Family: only live processes are asked for receipt orders (Elnozahy, §3.4)
    Gathering,
    /// Family: the incarnation is restored with the checkpoint (Elnozahy, §3.4)
    Incarnation,
}

impl Simulate {
    pub(super) fn run(&self) -> Result<Answer, Error> {
        if self.bench_recovery_state {
            return Ok(recovery_state::measure(self.intervals, self.seed));
        }
        if let Some(preset) = self.preset {
            return Ok(preset.run(self.seed));
        }
        // With --vary, what varies in the tests varies here.
        let often = |seed: u64, choices: [u64; 3]| match self.vary {
            true => choices[(seed % 3) as usize],
            false => self.checkpoint_every,
        };
        match self.protocol {
            Protocol::Local => self.simulate::<local::Node>(true, |plan| {
                plan.options.checkpoint_every = often(plan.seed, [0, 2, 8]);
            }),
            Protocol::Sender => self.simulate::<sender::Unit>(false, |plan| {
                plan.options.checkpoint_every = often(plan.seed, [0, 2, 8]);
                plan.options.log_behind = self.hybrid;
                plan.down_at_most = 1;
                if let Some(extension) = self.extension {
                    plan.options.extension = match extension {
                        Extension::RollBack => sender::Extension::RollBack,
                        Extension::AllCheckpoints => sender::Extension::AllCheckpoints,
                    };
                    plan.down_at_most = usize::MAX;
                    plan.must_recover = extension == Extension::AllCheckpoints;
                    plan.workload.outputs = 0;
                }
            }),
            Protocol::Optimistic => self.simulate::<optimistic::Node>(true, |plan| {
                plan.options.checkpoint_every = often(plan.seed, [0, 3, 16]);
            }),
            Protocol::Family => self.simulate::<family::Node>(false, |plan| {
                let failures = if self.vary { 1 + (plan.seed / 3) as usize } else { self.failures };
                plan.options.failures = failures.clamp(1, plan.workload.units);
                plan.options.checkpoint_every = often(plan.seed, [0, 3, 8]);
                plan.options.blocking = self.blocking;
                plan.options.bug = match self.as_printed {
                    Some(Printed::Gathering) => Some(family::Bug::OnlyLiveAnswer),
                    Some(Printed::Incarnation) => Some(family::Bug::IncarnationFromCheckpoint),
                    _ => None,
                };
                if plan.options.bug == Some(family::Bug::IncarnationFromCheckpoint) {
                    // Packets that are on their way for longer than a recovery takes.
                    plan.costs.jitter = 60_000;
                }
                plan.down_at_most = plan.options.failures;
            }),
            Protocol::Group => self.simulate::<group::Member>(false, |plan| {
                if self.vary {
                    plan.workload.first = 1 + (plan.seed % 6) as u32;
                    plan.workload.hops = (plan.seed / 2 % 3) as u32;
                    plan.costs.jitter = [2_000, 12_000, 300][(plan.seed % 3) as usize];
                }
                plan.options.quorum = self.partitions > 0;
                plan.options.safe = self.as_printed != Some(Printed::Abcast);
                let ids = self.as_printed == Some(Printed::Ids);
                plan.options.bug = ids.then_some(group::Bug::ForgetWhileWaiting);
                plan.down_at_most = plan.workload.units - 1;
            }),
        }
    }

    fn simulate<M: Subject>(&self, store: bool, choose: impl Fn(&mut Plan<M::Options>)) -> Result<Answer, Error> {
        let workload = self.workload()?;
        if self.reduce && matches!(self.protocol, Protocol::Local | Protocol::Optimistic) {
            return Err(Error::invalid(
                "--reduce",
                "is not for protocols with a store: its state is compared with outputs",
            ));
        }
        if let Some(states) = self.exhaustive {
            let nodes = 3 + usize::from(store);
            let bounds = Bounds { crashes: self.crashes, nodes, delays: self.delays, reduce: self.reduce, states };
            // A member that was joined again makes a broadcast in any case.
            let makes = |first| Workload { first, hops: 0, ..small(3, 4) };
            let systems = match self.protocol {
                Protocol::Group => [("a broadcast of each", makes(1)), ("broadcasts of who comes back", makes(0))],
                _ => [("a chain of messages", small(3, 4)), ("two that race", race())],
            };
            let (mut text, mut rows, mut bad) = (String::new(), Vec::new(), false);
            for (system, workload) in systems {
                let mut plan = self.plan::<M>(workload, store, 1);
                choose(&mut plan);
                let answer = explored::<M>(system, &plan, bounds);
                text += &answer.text;
                rows.push(answer.json);
                bad |= answer.bad;
            }
            return Ok(Answer { text, json: Value::Array(rows), bad });
        }
        if self.partitions > 0 && !matches!(self.protocol, Protocol::Group) {
            return Err(Error::invalid(
                "--partitions",
                "is for group: the other protocols wait until the network is whole",
            ));
        }
        if !(1..=workload.units).contains(&self.failures) {
            let why = format!("is {}; it must be from 1 to the number of units ({})", self.failures, workload.units);
            return Err(Error::invalid("--failures", why));
        }
        let mut sum = Report::default();
        let mut slowest = 0;
        for index in 0..self.runs {
            // A seed that --vary has reported is a seed that it takes.
            let seed = if self.vary { self.seed + index } else { scatter(self.seed).wrapping_add(index) };
            let mut plan = self.plan::<M>(workload, store, seed);
            choose(&mut plan);
            if self.timeline && index == 0 {
                let (lines, result) = timeline::<M>(&plan);
                let end = result.map_or_else(|violation| violation.to_string(), |_| "everything delivered".to_owned());
                let text = format!("{}\n{end}\n", lines.join("\n"));
                return Ok(Answer { text, json: json!({ "timeline": lines, "end": end }), bad: false });
            }
            match run::<M>(&plan) {
                Ok(report) => {
                    slowest = slowest.max(report.time);
                    sum.add(&report);
                }
                Err(violation) => return Ok(failed::<M>(&plan, violation)),
            }
        }
        Ok(self.figures(&sum, slowest))
    }

    fn plan<M: Subject>(&self, workload: Workload, store: bool, seed: u64) -> Plan<M::Options> {
        if self.vary {
            return Plan::random(seed, 4, store);
        }
        let mut rng = Rng::new(seed);
        let nodes = workload.units + usize::from(store);
        let crash = |_| Crash { after_step: 20 + rng.below(600), victim: Victim::Node(rng.index(nodes)) };
        let crashes = (0..self.crashes).map(crash).collect();
        Plan {
            seed,
            workload: Workload { seed, ..workload },
            options: M::Options::default(),
            crashes,
            partitions: self.partitions(&mut rng, workload.units),
            down_at_most: usize::MAX,
            must_recover: true,
            loss: self.loss,
            repeat: self.repeat,
            costs: Costs {
                link: self.link_us,
                jitter: self.jitter_us,
                disk: self.disk_us,
                processor: self.processor_us,
                ..Costs::default()
            },
            steps_max: 5_000_000,
        }
    }

    /// As many as were asked for, one after the other, each longer than it takes to suspect a silent site.
    fn partitions(&self, rng: &mut Rng, units: usize) -> Vec<Partition> {
        let apart = |at: u64, rng: &mut Rng| Partition {
            from: at + rng.below(20_000),
            until: at + 300_000 + rng.below(100_000),
            side: 1 + rng.below((1 << units) - 2),
        };
        (0..self.partitions).map(|k| apart(k * 1_000_000, rng)).collect()
    }

    fn workload(&self) -> Result<Workload, Error> {
        let mut workload = match workloads::named(&self.workload, self.units) {
            Some(workload) => workload,
            None => workloads::from_file(Path::new(&self.workload), self.units)?,
        };
        workload.seed = self.seed;
        if !(2..=63).contains(&workload.units) {
            return Err(Error::invalid("--units", format!("is {}; it must be from 2 to 63", workload.units)));
        }
        Ok(workload)
    }

    fn figures(&self, sum: &Report, slowest: u64) -> Answer {
        let per = |total: u64| total as f64 / self.runs.max(1) as f64;
        let rows: [(&str, u64, &str); 15] = [
            ("steps", sum.steps, "simulated steps"),
            ("messages", sum.messages, "messages received"),
            ("packets", sum.packets, "packets sent"),
            ("bytes", sum.bytes, "bytes sent"),
            ("stable_writes", sum.writes, "accesses to stable storage"),
            ("stable_bytes", sum.written, "bytes written there"),
            ("outputs", sum.outputs, "outputs shown"),
            ("held", sum.held, "sends and outputs held"),
            ("log_bytes", sum.log_bytes, "bytes of log in memory at the end"),
            ("crashes", sum.crashes, "failures"),
            ("given_up", sum.given_up, "given up: failures that are not tolerated were noticed"),
            ("recovering_us", sum.recovering, "µs from failures to live again"),
            ("blocked_us", sum.blocked, "µs that units that did not fail were blocked"),
            ("virtual_us", sum.time, "µs of virtual time"),
            ("slowest_us", slowest, "µs of the slowest run"),
        ];
        let mut text = format!("{:?}, {} runs; per run:\n", self.protocol, self.runs);
        for (name, total, what) in rows {
            let value = if name == "slowest_us" { total as f64 } else { per(total) };
            let _ = writeln!(text, "{value:>14.1}  {what}");
        }
        let mut json: serde_json::Map<String, Value> =
            rows.iter().map(|&(name, n, _)| (name.to_owned(), json!(n))).collect();
        json.insert("runs".to_owned(), json!(self.runs));
        json.insert("protocol".to_owned(), json!(format!("{:?}", self.protocol).to_lowercase()));
        Answer { text, json: Value::Object(json), bad: false }
    }
}

fn explored<M: Subject>(system: &str, plan: &Plan<M::Options>, bounds: Bounds) -> Answer {
    let begun = std::time::Instant::now();
    match explore::<M>(plan, bounds) {
        Ok(Explored { states, steps, ends, complete }) => {
            let seconds = begun.elapsed().as_secs_f64();
            let all = if complete { "all there are" } else { "not all there are" };
            let text = format!(
                "{system}: {states} states ({all}), {steps} steps, {ends} ends with everything delivered; no violation; {seconds:.1} s\n"
            );
            let json = json!({ "system": system, "states": states, "steps": steps, "ends": ends, "complete": complete, "seconds": seconds });
            Answer { text, json, bad: false }
        }
        Err(found) => {
            let json =
                json!({ "system": system, "violation": found.violation.to_string(), "timeline": found.timeline });
            Answer { text: format!("{system}: {found}\n"), json, bad: true }
        }
    }
}

/// A run that broke an invariant: the smallest plan that does, and what happens in it.
fn failed<M: Subject>(plan: &Plan<M::Options>, violation: Violation) -> Answer {
    let (failing, timeline) = Failing { plan: plan.clone(), violation }.shrunk::<M>();
    let Failing { plan, violation } = failing;
    let text = format!("{}\n{violation}\n\n{plan:#?}\n", timeline.join("\n"));
    let json = json!({ "violation": violation.to_string(), "plan": format!("{plan:?}"), "timeline": timeline });
    Answer { text, json, bad: true }
}
