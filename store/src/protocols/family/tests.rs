//! Family-based logging through failures.

use super::*;
use crate::protocols::sim::{Bounds, Plan, explore, race, run, run_failing_after_output, small, sweep};

fn plan(seed: u64) -> Plan<Options> {
    let mut plan: Plan<Options> = Plan::random(seed, 5, false);
    let failures = 1 + (seed / 2) as usize % plan.workload.units;
    plan.options.failures = failures;
    plan.options.checkpoint_every = [0, 3, 8][(seed % 3) as usize];
    plan.options.blocking = seed.is_multiple_of(5);
    plan.down_at_most = failures;
    plan
}

/// As many failures at a time as the member of the family tolerates, with either recovery.
#[test]
fn survives_f_failures() {
    let report = sweep::<Node>(0..4_200, plan).unwrap_or_else(|failing| panic!("{}", failing.explain::<Node>()));
    assert!(
        report.steps > 1_900_000 && report.crashes > 1_000 && report.messages > 10_000 && report.held > 100,
        "{report:?}"
    );
}

/// Three processes, four messages, one failure, also where two messages race: every order that there is, but for
/// those that can't be told from others. With two failures at a time: those in which little is put off.
#[test]
fn orders_of_a_small_system() {
    for (workload, failures, delays, states) in [
        (small(3, 4), 1, None, 1_000_000),
        (small(3, 4), 2, Some(2), 40_000),
        (race(), 1, None, 1_000_000),
        (race(), 2, Some(1), 5_000),
    ] {
        let options = Options { checkpoint_every: 0, failures, ..Options::default() };
        let plan = Plan { workload, options, down_at_most: failures, ..plan(0) };
        let bounds = Bounds { crashes: failures, nodes: 3, delays, reduce: delays.is_none(), states: usize::MAX };
        let explored = explore::<Node>(&plan, bounds).unwrap_or_else(|found| panic!("{found}"));
        assert!(explored.complete && explored.states > states && explored.ends > 0, "{explored:?}");
    }
}

/// What was shown is recoverable at that moment, whoever fails then.
#[test]
fn what_was_shown_is_recoverable() {
    let shown = |seed| {
        run_failing_after_output::<Node>(&plan(seed)).unwrap_or_else(|violation| panic!("seed {seed}: {violation}"))
    };
    assert!((0..300).map(shown).sum::<u64>() > 400);
}

/// Elnozahy's recovery does not block live processes; the other one does (§5).
#[test]
fn only_the_blocking_recovery_blocks() {
    let blocked = |blocking: bool| -> u64 {
        let plan = |seed| {
            let mut plan = plan(seed);
            plan.options.blocking = blocking;
            plan
        };
        (0..200).map(|seed| run::<Node>(&plan(seed)).expect("no violation").blocked).sum()
    };
    assert_eq!(blocked(false), 0);
    assert!(blocked(true) > 100_000);
}

/// The checks see a mistake within so many seeds, and say this of it.
fn caught(bug: Bug, by: &str) {
    let buggy = |seed| {
        let mut plan = plan(seed);
        plan.options.bug = Some(bug);
        if matches!(bug, Bug::AcceptStale | Bug::IncarnationFromCheckpoint) {
            // Packets that are on their way for longer than a recovery takes.
            plan.costs.jitter = 60_000;
        }
        plan
    };
    let violation = sweep::<Node>(0..1_500, buggy).expect_err("the checks see it").violation;
    assert!(violation.to_string().contains(by), "{violation}");
}

#[test]
fn not_passing_receipt_orders_on_is_caught() {
    caught(Bug::NoPiggyback, "orphan");
}

#[test]
fn output_at_once_is_caught() {
    caught(Bug::OutputAtOnce, "shown but undone");
}

#[test]
fn accepting_stale_messages_is_caught() {
    caught(Bug::AcceptStale, "stuck");
}

#[test]
fn missing_one_reply_is_caught() {
    caught(Bug::MissOneReply, "shown but undone");
}

#[test]
fn an_incarnation_that_is_not_on_stable_storage_is_caught() {
    caught(Bug::IncarnationFromCheckpoint, "is not live");
}

/// As the paper has it (§3.4): what only the checkpoint of a process that failed, too, holds is lost.
#[test]
fn gathering_from_live_processes_only_is_caught() {
    let printed = |seed| {
        let mut plan: Plan<Options> = Plan::random(seed, 4, false);
        let failures = plan.workload.units;
        plan.options = Options { failures, checkpoint_every: 3, bug: Some(Bug::OnlyLiveAnswer), ..Options::default() };
        plan.down_at_most = failures;
        plan
    };
    sweep::<Node>(2_940..12_000, printed).expect_err("it happens");
}
