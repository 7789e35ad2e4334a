//! Optimistic logging through failures.

use super::*;
use crate::protocols::sim::{Bounds, Plan, explore, race, run_failing_after_output, small, sweep};

fn plan(seed: u64) -> Plan<Options> {
    let mut plan: Plan<Options> = Plan::random(seed, 4, true);
    plan.options.checkpoint_every = [0, 3, 16][(seed % 3) as usize];
    plan.options.log_every = [1, 4, 1000][(seed / 3 % 3) as usize];
    plan
}

/// Any number of failures, of units and of the store.
#[test]
fn survives_any_failures() {
    let report = sweep::<Node>(0..2_500, plan).unwrap_or_else(|failing| panic!("{}", failing.explain::<Node>()));
    assert!(
        report.steps > 1_900_000 && report.crashes > 1_000 && report.messages > 10_000 && report.held > 100,
        "{report:?}"
    );
}

/// What was shown is recoverable at that moment, whoever fails then.
#[test]
fn what_was_shown_is_recoverable() {
    let shown = |seed| {
        run_failing_after_output::<Node>(&plan(seed)).unwrap_or_else(|violation| panic!("seed {seed}: {violation}"))
    };
    assert!((0..300).map(shown).sum::<u64>() > 400);
}

/// Three processes, four messages, one failure, of the store too: every order that there is. With two
/// failures, at a time, too, and where two messages race: those in which little is put off.
#[test]
fn orders_of_a_small_system() {
    let options = Options { checkpoint_every: 0, ..Options::default() };
    for (workload, crashes, delays, states) in [
        (small(3, 4), 1, None, 300_000),
        (small(3, 4), 2, Some(1), 60_000),
        (race(), 1, Some(3), 10_000),
        (race(), 2, Some(0), 10_000),
    ] {
        let plan = Plan { workload, options, ..plan(0) };
        let bounds = Bounds { crashes, nodes: 4, delays, reduce: false, states: usize::MAX };
        let explored = explore::<Node>(&plan, bounds).unwrap_or_else(|found| panic!("{found}"));
        assert!(explored.complete && explored.states > states && explored.ends > 0, "{explored:?}");
    }
}

/// The checks see a mistake within so many seeds, and say this of it.
fn caught(bug: Bug, by: &str) {
    let buggy = |seed| {
        let mut plan = plan(seed);
        plan.options.bug = Some(bug);
        if bug == Bug::OldRounds {
            // Packets that are on their way for longer than a recovery takes.
            plan.costs.jitter = 80_000;
        }
        plan
    };
    let violation = sweep::<Node>(0..600, buggy).expect_err("the checks see it").violation;
    assert!(violation.to_string().contains(by), "{violation}");
}

#[test]
fn output_before_it_is_recoverable_is_caught() {
    caught(Bug::OutputAtOnce, "shown early");
}

#[test]
fn keeping_orphans_is_caught() {
    caught(Bug::KeepOrphans, "orphan");
}

#[test]
fn receiving_what_was_sent_before_a_rollback_is_caught() {
    caught(Bug::OldRounds, "orphan");
}

#[test]
fn acknowledging_before_storing_is_caught() {
    caught(Bug::AcknowledgeEarly, "stuck");
}

#[test]
fn collecting_the_effective_checkpoint_is_caught() {
    caught(Bug::CollectTooMuch, "gave up");
}
