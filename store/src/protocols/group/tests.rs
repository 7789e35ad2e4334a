//! Groups through failures.

use super::*;
use crate::protocols::sim::{Plan, Violation, sweep};

fn plan(seed: u64) -> Plan<Options> {
    let mut plan: Plan<Options> = Plan::random(seed, 4, false);
    plan.workload.first = 1 + (seed % 6) as u32;
    plan.workload.hops = (seed / 2 % 3) as u32;
    plan.down_at_most = plan.workload.units - 1;
    plan.costs.jitter = [2_000, 12_000, 300][(seed % 3) as usize];
    plan
}

/// Any number of failures as long as one member has the state.
#[test]
fn survives_any_failures_but_of_all() {
    let report = sweep::<Member>(0..4_000, plan).unwrap_or_else(|failing| panic!("{}", failing.explain::<Member>()));
    assert!(report.crashes > 100 && report.messages > 5_000 && report.outputs > 100, "{report:?}");
}

fn caught(bug: Bug) -> Violation {
    let buggy = |seed| {
        let mut plan = plan(seed);
        plan.options.bug = Some(bug);
        plan
    };
    sweep::<Member>(0..600, buggy).expect_err("the checks see it").violation
}
