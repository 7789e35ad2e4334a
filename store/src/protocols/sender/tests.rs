//! Sender-based logging through failures.

use super::*;
use crate::protocols::sim::{Crash, Failing, Plan, Violation, explore, run, run_failing_after_output, small, sweep};

fn plan(seed: u64) -> Plan<Options> {
    let mut plan: Plan<Options> = Plan::random(seed, 4, false);
    plan.options.checkpoint_every = [0, 2, 8][(seed % 3) as usize];
    plan.options.piggyback = seed.is_multiple_of(2);
    plan.options.memory_bytes = [300, 1 << 20][(seed / 2 % 2) as usize];
    plan.down_at_most = 1;
    plan
}

/// One failure at a time, with loss, repetition and reordering.
#[test]
fn survives_one_failure_at_a_time() {
    let report = sweep::<Unit>(0..4_000, plan).unwrap_or_else(|failing| panic!("{}", failing.explain::<Unit>()));
    assert!(
        report.steps > 1_300_000 && report.crashes > 1_000 && report.messages > 10_000 && report.held > 100,
        "{report:?}"
    );
}

/// The hybrid, too; and the optimisations save packets.
#[test]
fn piggybacking_saves_packets_and_the_hybrid_survives() {
    let packets = |piggyback: bool, log_behind: bool| {
        let plan = move |seed| {
            let mut plan = plan(seed);
            plan.options.piggyback = piggyback;
            plan.options.log_behind = log_behind;
            plan
        };
        sweep::<Unit>(0..300, plan).unwrap_or_else(|failing| panic!("{}", failing.explain::<Unit>())).packets
    };
    let (with, without) = (packets(true, false), packets(false, true));
    assert!(with < without, "{with} {without}");
}

/// Several failures at once (§3.2.4): either a consistent state is recovered, or that it can't be is
/// noticed. What was shown to the world may be undone then; nothing is an orphan unnoticed.
#[test]
fn more_failures_than_one_are_recovered_or_noticed() {
    let plan = |seed: u64| {
        let mut plan = plan(seed);
        plan.down_at_most = usize::MAX;
        plan.must_recover = false;
        plan.workload.outputs = 0;
        plan
    };
    let (mut recovered, mut noticed) = (0, 0);
    for seed in 0..1_000 {
        match run::<Unit>(&plan(seed)) {
            Ok(report) if report.unrecoverable => noticed += 1,
            Ok(_) => recovered += 1,
            Err(violation) => {
                panic!("{}", Failing { plan: plan(seed), violation }.explain::<Unit>());
            }
        }
    }
    assert!(recovered > 100 && noticed > 10, "{recovered} {noticed}");
}

/// What was shown is recoverable at that moment, whoever fails then.
#[test]
fn what_was_shown_is_recoverable() {
    let shown = |seed| {
        run_failing_after_output::<Unit>(&plan(seed)).unwrap_or_else(|violation| panic!("seed {seed}: {violation}"))
    };
    assert!((0..300).map(shown).sum::<u64>() > 400);
}

/// Three processes, four messages, two failures one after the other: every order that there is.
#[test]
fn every_order_of_a_small_system() {
    for piggyback in [false, true] {
        let options = Options { checkpoint_every: 0, piggyback, ..Options::default() };
        let plan = Plan { workload: small(3, 4), options, ..plan(0) };
        let explored = explore::<Unit>(&plan, 2, 3, usize::MAX).unwrap_or_else(|found| panic!("{found}"));
        assert!(explored.complete && explored.states > 5_000 && explored.ends > 0, "{explored:?}");
    }
}

fn caught(bug: Bug) -> Violation {
    let buggy = |seed| {
        let mut plan = plan(seed);
        plan.options.bug = Some(bug);
        if bug == Bug::KeepBeyondGap {
            // Gaps come from RSNs that were lost.
            plan.loss = 350;
            plan.options.checkpoint_every = 0;
            plan.workload.units = 4;
            plan.workload.first = 4;
            plan.crashes = vec![Crash { after_step: 10 + seed % 50, node: 0 }];
        }
        plan
    };
    sweep::<Unit>(0..600, buggy).expect_err("the checks see it").violation
}

#[test]
fn not_holding_sends_is_caught() {
    caught(Bug::NoHold);
}

#[test]
fn dropping_one_rsn_is_caught() {
    caught(Bug::DropRsn);
}

#[test]
fn forgetting_messages_early_is_caught() {
    caught(Bug::ForgetEarly);
}

#[test]
fn a_new_rsn_for_a_duplicate_is_caught() {
    caught(Bug::NewRsnForDuplicate);
}

#[test]
fn keeping_rsns_beyond_a_gap_is_caught() {
    caught(Bug::KeepBeyondGap);
}
