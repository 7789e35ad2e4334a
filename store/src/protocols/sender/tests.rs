//! Sender-based logging through failures.

use super::*;
use crate::protocols::process::Pattern;
use crate::protocols::sim::{
    Bounds, Crash, Failing, Plan, Victim, explore, race, run, run_failing_after_output, small, sweep,
};

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

/// The programs of §3.4.4 fail while they compute, too.
#[test]
fn programs_that_compute_survive() {
    for pattern in [Pattern::Ask, Pattern::Search, Pattern::Eliminate] {
        let plan = |seed| {
            let mut plan = plan(seed);
            plan.workload = Workload { pattern, first: 1, hops: 12, computing: 3_000, ..plan.workload };
            plan
        };
        let report = sweep::<Unit>(0..300, plan).unwrap_or_else(|failing| panic!("{}", failing.explain::<Unit>()));
        assert!(report.crashes > 100 && report.messages > 3_000, "{pattern:?} {report:?}");
    }
}

/// Table 3.7: what is asked after a computation finds its RSNs acknowledged; answers carry those of their
/// questions, unless another question has come meanwhile. And in each step of an elimination seven candidates, decisions,
/// and six rows and answers are sent, about half of which have to wait.
#[test]
fn programs_send_as_theirs_did() {
    let sent = |pattern, hops| {
        let mut plan = Plan { crashes: Vec::new(), loss: 0, repeat: 0, ..plan(0) };
        plan.options.checkpoint_every = 0;
        plan.costs.jitter = 0;
        plan.workload =
            Workload { units: 8, first: 1, hops, forks: 0, outputs: 0, pattern, computing: 100_000, ..plan.workload };
        run::<Unit>(&plan).expect("no violation")
    };
    let asked = sent(Pattern::Ask, 7);
    assert_eq!((asked.sent_free, asked.sent_piggybacked + asked.held), (28, 28), "{asked:?}");
    assert!(asked.sent_piggybacked > asked.held, "{asked:?}");
    let eliminated = sent(Pattern::Eliminate, 40);
    assert_eq!(eliminated.messages, 260);
    assert!((100..160).contains(&eliminated.held) && eliminated.sent_free > 50, "{eliminated:?}");
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

/// Any failures, and nothing shown to the world, which could be undone (§3.5 does not speak of it).
fn any_failures(extension: Extension) -> impl Fn(u64) -> Plan<Options> {
    move |seed| {
        let mut plan = plan(seed);
        plan.options.extension = extension;
        plan.options.log_behind = (seed / 5).is_multiple_of(3);
        plan.down_at_most = usize::MAX;
        plan.must_recover = extension == Extension::AllCheckpoints;
        plan.workload.outputs = 0;
        plan
    }
}

/// How many of the runs were recovered, and in how many it was noticed that they could not be.
fn recovered_or_noticed(seeds: std::ops::Range<u64>, plan: impl Fn(u64) -> Plan<Options>) -> (u64, u64) {
    let (mut recovered, mut noticed) = (0, 0);
    for seed in seeds {
        match run::<Unit>(&plan(seed)) {
            Ok(report) if report.given_up > 0 => noticed += 1,
            Ok(_) => recovered += 1,
            Err(violation) => {
                panic!("{}", Failing { plan: plan(seed), violation }.explain::<Unit>());
            }
        }
    }
    (recovered, noticed)
}

/// Several failures at once: either a consistent state is recovered, or that it can't be is noticed
/// (§3.2.4). With the first extension it can be more often, with the second always (§3.5).
#[test]
fn more_failures_than_one_are_recovered_or_noticed() {
    let [none, roll_back, all_checkpoints] = [Extension::None, Extension::RollBack, Extension::AllCheckpoints]
        .map(|extension| recovered_or_noticed(0..1_000, any_failures(extension)));
    assert!(none.0 > 100 && none.1 > 10, "{none:?}");
    assert!(roll_back.1 < none.1 / 2 && roll_back.1 > 0, "{roll_back:?} {none:?}");
    assert_eq!(all_checkpoints, (1_000, 0));
}

/// Whether they are rolled back one at a time makes no difference to what can be recovered.
#[test]
fn rolling_back_all_at_once_recovers_about_as_often() {
    let [one, all] = [None, Some(Bug::AllAtOnce)].map(|bug| {
        let plan = any_failures(Extension::RollBack);
        let plan = |seed| Plan { options: Options { bug, ..plan(seed).options }, ..plan(seed) };
        recovered_or_noticed(0..2_000, plan)
    });
    assert!(one != all && one.1.abs_diff(all.1) < 10, "{one:?} {all:?}");
}

/// What was shown is recoverable at that moment, whoever fails then.
#[test]
fn what_was_shown_is_recoverable() {
    let shown = |seed| {
        run_failing_after_output::<Unit>(&plan(seed)).unwrap_or_else(|violation| panic!("seed {seed}: {violation}"))
    };
    assert!((0..300).map(shown).sum::<u64>() > 400);
}

/// Three processes, four messages, two failures one after the other: every order that there is. With the
/// second extension, at a time, too.
#[test]
fn every_order_of_a_small_system() {
    for (piggyback, workload) in [(false, small(3, 4)), (true, small(3, 4)), (false, race()), (true, race())] {
        let options = Options { checkpoint_every: 0, piggyback, ..Options::default() };
        let one = Plan { workload, options, ..plan(0) };
        let options = Options { extension: Extension::AllCheckpoints, ..options };
        let workload = Workload { outputs: 0, ..one.workload };
        let any = Plan { options, workload, down_at_most: usize::MAX, ..one.clone() };
        for plan in [one, any] {
            let explored = explore::<Unit>(
                &plan,
                Bounds { crashes: 2, nodes: 3, delays: None, reduce: false, states: usize::MAX },
            )
            .unwrap_or_else(|found| panic!("{found}"));
            assert!(explored.complete && explored.states > 5_000 && explored.ends > 0, "{explored:?}");
        }
    }
}

/// The checks see a mistake within so many seeds, and say this of it.
fn caught(bug: Bug, by: &str) {
    let buggy = |seed| {
        let mut plan = match bug {
            Bug::KeepOrphans => any_failures(Extension::RollBack)(seed),
            Bug::HearOrphans | Bug::LastCheckpoint => any_failures(Extension::AllCheckpoints)(seed),
            _ => plan(seed),
        };
        plan.options.bug = Some(bug);
        if bug == Bug::KeepBeyondGap {
            // Gaps come from RSNs that were lost.
            plan.loss = 350;
            plan.options.checkpoint_every = 0;
            plan.workload.units = 4;
            plan.workload.first = 4;
            plan.crashes = vec![Crash { after_step: 10 + seed % 50, victim: Victim::Node(0) }];
        }
        plan
    };
    let violation = sweep::<Unit>(0..600, buggy).expect_err("the checks see it").violation;
    assert!(violation.to_string().contains(by), "{violation}");
}

#[test]
fn not_holding_sends_is_caught() {
    caught(Bug::NoHold, "gave up");
}

#[test]
fn dropping_one_rsn_is_caught() {
    caught(Bug::DropRsn, "gave up");
}

#[test]
fn forgetting_messages_early_is_caught() {
    caught(Bug::ForgetEarly, "gave up");
}

#[test]
fn a_new_rsn_for_a_duplicate_is_caught() {
    caught(Bug::NewRsnForDuplicate, "gave up");
}

#[test]
fn keeping_rsns_beyond_a_gap_is_caught() {
    caught(Bug::KeepBeyondGap, "stuck");
}

#[test]
fn keeping_what_depends_on_the_lost_is_caught() {
    caught(Bug::KeepOrphans, "orphan");
}

#[test]
fn hearing_those_to_be_rolled_back_is_caught() {
    caught(Bug::HearOrphans, "orphan");
}

#[test]
fn using_a_checkpoint_that_depends_on_the_lost_is_caught() {
    caught(Bug::LastCheckpoint, "orphan");
}
