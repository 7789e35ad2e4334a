//! `ftstore simulate`.

use std::fmt::Write as _;
use std::path::Path;

use serde_json::{Value, json};

use super::{Answer, presets, recovery_state};
use crate::protocols::machine::Machine;
use crate::protocols::process::{Pattern, Workload};
use crate::protocols::rng::{Rng, scatter};
use crate::protocols::sim::{Costs, Crash, Failing, Plan, Report, Violation, run, shrink, timeline};
use crate::protocols::{family, local, optimistic, sender};

/// Options of `ftstore simulate`.
#[derive(Debug, clap::Args)]
pub(super) struct Simulate {
    /// Which protocol
    #[arg(long, value_enum, default_value_t = Protocol::Local)]
    protocol: Protocol,
    /// Units that talk to each other
    #[arg(long, default_value_t = 4)]
    units: usize,
    /// nqueens, tsp, gauss, random, ring, or a JSON file with units, first, hops, forks, outputs, bytes, pattern
    #[arg(long, default_value = "random")]
    workload: String,
    /// Failures in each run, one or more at a time as the protocol tolerates
    #[arg(long, default_value_t = 0)]
    crashes: usize,
    /// For family: how many failures at a time are tolerated
    #[arg(long, default_value_t = 1)]
    failures: usize,
    /// Checkpoint a unit after so many messages; 0 is never
    #[arg(long, default_value_t = 8)]
    checkpoint_every: u64,
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
}

impl Simulate {
    pub(super) fn run(&self) -> Result<Answer, String> {
        if self.bench_recovery_state {
            return Ok(recovery_state::measure(self.intervals, self.seed));
        }
        if let Some(preset) = self.preset {
            return Ok(preset.run(self.seed));
        }
        match self.protocol {
            Protocol::Local => {
                let options = local::Options { checkpoint_every: self.checkpoint_every, ..Default::default() };
                self.simulate::<local::Node>(options, usize::MAX, true)
            }
            Protocol::Sender => {
                let options = sender::Options { checkpoint_every: self.checkpoint_every, ..Default::default() };
                self.simulate::<sender::Unit>(options, 1, false)
            }
            Protocol::Optimistic => {
                let options = optimistic::Options { checkpoint_every: self.checkpoint_every, ..Default::default() };
                self.simulate::<optimistic::Node>(options, usize::MAX, true)
            }
            Protocol::Family => {
                let (failures, checkpoint_every) = (self.failures, self.checkpoint_every);
                let options = family::Options { failures, checkpoint_every, ..Default::default() };
                self.simulate::<family::Node>(options, failures, false)
            }
        }
    }

    fn simulate<M: Machine>(&self, options: M::Options, down_at_most: usize, store: bool) -> Result<Answer, String> {
        let workload = self.workload()?;
        if !(1..=workload.units).contains(&self.failures) {
            return Err(format!(
                "--failures is {}; it must be from 1 to the number of units ({})",
                self.failures, workload.units
            ));
        }
        let mut sum = Report::default();
        let mut slowest = 0;
        for index in 0..self.runs {
            let plan = self.plan::<M>(workload, &options, down_at_most, store, scatter(self.seed).wrapping_add(index));
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

    fn plan<M: Machine>(
        &self,
        workload: Workload,
        options: &M::Options,
        down_at_most: usize,
        store: bool,
        seed: u64,
    ) -> Plan<M::Options> {
        if self.vary {
            let plan = Plan::random(seed, 4, store);
            let down_at_most = down_at_most.min(plan.workload.units);
            return Plan { options: options.clone(), down_at_most: down_at_most.max(1), ..plan };
        }
        let mut rng = Rng::new(seed);
        let nodes = workload.units + usize::from(store);
        let crash = |_| Crash { after_step: 20 + rng.below(600), node: rng.index(nodes) };
        let crashes = (0..self.crashes).map(crash).collect();
        Plan {
            seed,
            workload: Workload { seed, ..workload },
            options: options.clone(),
            crashes,
            down_at_most,
            must_recover: true,
            loss: self.loss,
            repeat: self.repeat,
            costs: Costs { link: self.link_us, jitter: self.jitter_us, disk: self.disk_us, ..Costs::default() },
            steps_max: 5_000_000,
        }
    }

    fn workload(&self) -> Result<Workload, String> {
        let mut workload = match named_workload(&self.workload, self.units) {
            Some(workload) => workload,
            None => workload_from_file(Path::new(&self.workload), self.units)?,
        };
        workload.seed = self.seed;
        if !(2..=63).contains(&workload.units) {
            return Err(format!("the workload has {} units; it must have from 2 to 63", workload.units));
        }
        Ok(workload)
    }

    fn figures(&self, sum: &Report, slowest: u64) -> Answer {
        let per = |total: u64| total as f64 / self.runs.max(1) as f64;
        let rows: [(&str, u64, &str); 14] = [
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

/// A run that broke an invariant: the smallest plan that does, and what happens in it.
fn failed<M: Machine>(plan: &Plan<M::Options>, violation: Violation) -> Answer {
    let plan = shrink::<M>(plan);
    let violation = run::<M>(&plan).err().unwrap_or(violation);
    let json = json!({ "violation": violation.to_string(), "plan": format!("{plan:?}") });
    Answer { text: Failing { plan, violation }.explain::<M>(), json, bad: true }
}

/// The communication patterns of Johnson's programs (§3.4.4), and two plain ones.
pub(super) fn named_workload(name: &str, units: usize) -> Option<Workload> {
    let base =
        Workload { units, first: 2, hops: 8, forks: 50, outputs: 100, bytes: 100, pattern: Pattern::Random, seed: 0 };
    Some(match name {
        "random" => base,
        "ring" => Workload { pattern: Pattern::Ring, ..base },
        // Work is handed out once and answered once.
        "nqueens" => Workload { pattern: Pattern::Main, first: 32, hops: 1, forks: 0, outputs: 0, bytes: 240, ..base },
        // Each answer is answered with more work.
        "tsp" => Workload { pattern: Pattern::Main, first: 14, hops: 24, forks: 0, outputs: 0, bytes: 130, ..base },
        // Rows to everybody, pivots back and forth.
        "gauss" => {
            Workload { pattern: Pattern::Exchange, first: 16, hops: 30, forks: 0, outputs: 0, bytes: 190, ..base }
        }
        _ => return None,
    })
}

fn workload_from_file(path: &Path, units: usize) -> Result<Workload, String> {
    let text = std::fs::read_to_string(path).map_err(|error| {
        format!(
            "--workload {}: neither a known name (nqueens, tsp, gauss, random, ring) nor readable: {error}",
            path.display()
        )
    })?;
    let value: Value = serde_json::from_str(&text).map_err(|error| format!("{}: {error}", path.display()))?;
    let number = |name: &str, default: u64| match &value[name] {
        Value::Null => Ok(default),
        given => given
            .as_u64()
            .filter(|&n| n <= 1_000_000)
            .ok_or_else(|| format!("{}: {name} is {given}; it must be a number from 0 to 1000000", path.display())),
    };
    let pattern = match value["pattern"].as_str().unwrap_or("random") {
        "random" => Pattern::Random,
        "main" => Pattern::Main,
        "exchange" => Pattern::Exchange,
        "ring" => Pattern::Ring,
        other => return Err(format!("{}: pattern {other:?}; known are random, main, exchange, ring", path.display())),
    };
    let narrow = |n: u64| u32::try_from(n).expect("bounded above");
    Ok(Workload {
        units: usize::try_from(number("units", units as u64)?).expect("bounded above"),
        first: narrow(number("first", 2)?),
        hops: narrow(number("hops", 8)?),
        forks: narrow(number("forks", 50)?),
        outputs: narrow(number("outputs", 100)?),
        bytes: narrow(number("bytes", 100)?),
        pattern,
        seed: 0,
    })
}
