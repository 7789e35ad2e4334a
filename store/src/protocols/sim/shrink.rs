//! Making a failing plan small enough to read.

use super::subject::Subject;
use super::{Plan, Victim, Violation, run};

/// A plan that breaks an invariant, and which.
#[derive(Clone, Debug)]
pub struct Failing<O> {
    /// The plan.
    pub plan: Plan<O>,
    /// What it breaks.
    pub violation: Violation,
}

impl<O: Clone + std::fmt::Debug> Failing<O> {
    /// A smaller plan that fails, not necessarily in the same way, and what happens in it line by line.
    pub fn shrunk<M: Subject<Options = O>>(&self) -> (Self, Vec<String>) {
        let plan = shrink::<M>(&self.plan);
        let (lines, result) = super::timeline::<M>(&plan);
        let violation = result.err().unwrap_or_else(|| self.violation.clone());
        (Self { plan, violation }, lines)
    }

    /// That, to read.
    pub fn explain<M: Subject<Options = O>>(&self) -> String {
        let (Self { plan, violation }, lines) = self.shrunk::<M>();
        format!("{}\n{violation}\n\n{plan:#?}\n", lines.join("\n"))
    }
}

/// A smaller plan that still breaks an invariant.
fn shrink<M: Subject>(plan: &Plan<M::Options>) -> Plan<M::Options> {
    let mut plan = plan.clone();
    let fails = |candidate: &Plan<M::Options>| run::<M>(candidate).is_err();
    loop {
        let smaller = candidates(&plan).into_iter().find(fails);
        match smaller {
            Some(smaller) => plan = smaller,
            None => return plan,
        }
    }
}

/// Plans with one thing less, the biggest things first.
fn candidates<O: Clone>(plan: &Plan<O>) -> Vec<Plan<O>> {
    let mut all = Vec::new();
    let mut with = |change: &dyn Fn(&mut Plan<O>)| {
        let mut candidate = plan.clone();
        change(&mut candidate);
        all.push(candidate);
    };
    for k in 0..plan.crashes.len() {
        with(&|p| {
            p.crashes.remove(k);
        });
    }
    for k in 0..plan.partitions.len() {
        with(&|p| {
            p.partitions.remove(k);
        });
    }
    if plan.loss > 0 {
        with(&|p| p.loss = 0);
    }
    if plan.repeat > 0 {
        with(&|p| p.repeat = 0);
    }
    if plan.costs.jitter > 0 {
        with(&|p| p.costs.jitter /= 2);
    }
    // The last unit, or the store behind it.
    let last = |victim| matches!(victim, Victim::Node(node) if node + 1 >= plan.workload.units);
    if plan.workload.units > 2 && plan.crashes.iter().all(|crash| !last(crash.victim)) {
        with(&|p| {
            p.workload.units -= 1;
            // Where not all may be down, still not all may be.
            if p.down_at_most == p.workload.units {
                p.down_at_most -= 1;
            }
        });
    }
    if plan.workload.first > 1 {
        with(&|p| p.workload.first -= 1);
    }
    if plan.workload.hops > 0 {
        with(&|p| p.workload.hops -= 1);
    }
    if plan.workload.forks > 0 {
        with(&|p| p.workload.forks = 0);
    }
    for k in 0..plan.crashes.len() {
        for less in [plan.crashes[k].after_step / 2, 1] {
            if (1..plan.crashes[k].after_step).contains(&less) {
                with(&|p| p.crashes[k].after_step -= less);
            }
        }
    }
    all
}

/// Runs the plans of many seeds, up to the first that fails.
pub fn sweep<M: Subject>(
    seeds: std::ops::Range<u64>,
    plan: impl Fn(u64) -> Plan<M::Options>,
) -> Result<super::Report, Box<Failing<M::Options>>> {
    let mut sum = super::Report::default();
    for seed in seeds {
        match run::<M>(&plan(seed)) {
            Ok(report) => sum.add(&report),
            Err(violation) => return Err(Box::new(Failing { plan: plan(seed), violation })),
        }
    }
    Ok(sum)
}
