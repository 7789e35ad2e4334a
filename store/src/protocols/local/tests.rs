//! Publishing through failures.

use super::*;
use crate::protocols::sim::{Bounds, Crash, Plan, Victim, explore, race, run, run_failing_after_output, small, sweep};

fn plan(seed: u64) -> Plan<Options> {
    let mut plan: Plan<Options> = Plan::random(seed, 4, true);
    plan.options.checkpoint_every = [0, 2, 8][(seed % 3) as usize];
    plan
}

/// Any number of failures, of units and of the recorder, with loss, repetition and reordering.
#[test]
fn survives_any_failures() {
    let report = sweep::<Node>(0..2_000, plan).unwrap_or_else(|failing| panic!("{}", failing.explain::<Node>()));
    assert!(report.steps > 2_500_000 && report.crashes > 1_000 && report.messages > 10_000, "{report:?}");
}

/// What was shown is recoverable at that moment, whoever fails then.
#[test]
fn what_was_shown_is_recoverable() {
    let shown = |seed| {
        run_failing_after_output::<Node>(&plan(seed)).unwrap_or_else(|violation| panic!("seed {seed}: {violation}"))
    };
    assert!((0..300).map(shown).sum::<u64>() > 400);
}

/// A plan with a bug must break this invariant within so many seeds.
fn caught(bug: Bug, by: &str) {
    let buggy = |seed| {
        let mut plan = plan(seed);
        plan.options.bug = Some(bug);
        if bug == Bug::DiscardEarly {
            // The recorder and a unit, while a checkpoint is being written.
            plan.options.checkpoint_every = 2;
            plan.costs.disk = 20_000;
            let after_step = 40 + seed % 200;
            plan.crashes =
                [plan.workload.units, 0, 1].map(|node| Crash { after_step, victim: Victim::Node(node) }).to_vec();
        }
        plan
    };
    let violation = sweep::<Node>(0..400, buggy).expect_err("the checks see it").violation;
    assert!(violation.to_string().contains(by), "{violation}");
}

#[test]
fn forwarding_before_storing_is_caught() {
    caught(Bug::ForwardBeforeStoring, "shown early");
}

#[test]
fn showing_again_is_caught() {
    caught(Bug::ShowAgain, "shown twice");
}

#[test]
fn discarding_before_the_checkpoint_is_stored_is_caught() {
    caught(Bug::DiscardEarly, "is not live");
}

#[test]
fn replaying_one_less_is_caught() {
    caught(Bug::ReplayOneLess, "went back");
}

/// The same plan gives the same run.
#[test]
fn runs_are_reproducible() {
    for seed in 0..20 {
        assert_eq!(run::<Node>(&plan(seed)), run::<Node>(&plan(seed)));
    }
}

/// Three processes, four messages, two failures, of the recorder too: every order that there is.
#[test]
fn every_order_of_a_small_system() {
    for workload in [small(3, 4), race()] {
        let plan = Plan { workload, options: Options { checkpoint_every: 0, bug: None }, ..plan(0) };
        let explored =
            explore::<Node>(&plan, Bounds { crashes: 2, nodes: 4, delays: None, reduce: false, states: usize::MAX })
                .unwrap_or_else(|found| panic!("{found}"));
        assert!(explored.complete && explored.states > 70_000 && explored.ends > 0, "{explored:?}");
    }
}

/// The search finds what the sweeps find, and says how it comes about.
#[test]
fn the_search_finds_mistakes() {
    let options = Options { checkpoint_every: 0, bug: Some(Bug::ForwardBeforeStoring) };
    let plan = Plan { workload: small(3, 4), options, ..plan(0) };
    let found =
        explore::<Node>(&plan, Bounds { crashes: 1, nodes: 4, delays: None, reduce: false, states: usize::MAX })
            .expect_err("the mistake is found");
    assert!(found.timeline.iter().any(|line| line.contains("SHOWS")), "{found}");
}

/// A processor does one thing after the other, and what it sends leaves when it is done.
#[test]
fn processors_take_their_time() {
    let (mut at_once, mut slow) = (0, 0);
    for seed in 0..20 {
        let mut plan = Plan { crashes: Vec::new(), loss: 0, repeat: 0, ..plan(seed) };
        plan.costs.jitter = 0;
        at_once += run::<Node>(&plan).expect("no violation").time;
        plan.costs.processor = 50;
        let report = run::<Node>(&plan).expect("no violation");
        let nodes = plan.workload.units as u64 + 1;
        assert!(report.time * nodes >= (report.steps - nodes) * 50, "{report:?}");
        slow += report.time;
    }
    assert!(slow > at_once, "{slow} {at_once}");
}
