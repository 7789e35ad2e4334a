//! Groups through failures.

use super::*;
use crate::protocols::sim::{Bounds, Partition, Plan, explore, run_failing_after_output, small, sweep};

fn plan(seed: u64) -> Plan<Options> {
    let mut plan: Plan<Options> = Plan::random(seed, 4, false);
    plan.workload.first = 1 + (seed % 6) as u32;
    plan.workload.hops = (seed / 2 % 3) as u32;
    plan.down_at_most = plan.workload.units - 1;
    plan.costs.jitter = [2_000, 12_000, 300][(seed % 3) as usize];
    plan
}

/// What was shown is recoverable at that moment, whoever fails then.
#[test]
fn what_was_shown_is_recoverable() {
    let shown = |seed| {
        run_failing_after_output::<Member>(&plan(seed)).unwrap_or_else(|violation| panic!("seed {seed}: {violation}"))
    };
    assert!((0..300).map(shown).sum::<u64>() > 400);
}

/// Any number of failures as long as one member has the state.
#[test]
fn survives_any_failures_but_of_all() {
    let report = sweep::<Member>(0..1_600, plan).unwrap_or_else(|failing| panic!("{}", failing.explain::<Member>()));
    assert!(
        report.steps > 2_400_000 && report.crashes > 100 && report.messages > 5_000 && report.outputs > 100,
        "{report:?}"
    );
}

/// A network that falls into two parts, for longer than it takes to suspect what is silent.
fn apart(seed: u64) -> Plan<Options> {
    let mut plan = plan(seed);
    plan.workload.units = plan.workload.units.max(3);
    plan.crashes.clear();
    plan.options.quorum = true;
    let side = 1 + seed % ((1 << plan.workload.units) - 2);
    plan.partitions = vec![Partition { from: seed % 30_000, until: 400_000, side }];
    plan
}

/// A minority stops, the majority goes on without it, and takes it in again afterwards.
#[test]
fn a_minority_does_not_go_on() {
    let report = sweep::<Member>(0..150, apart).unwrap_or_else(|failing| panic!("{}", failing.explain::<Member>()));
    assert!(report.crashes > 100, "those of the minority are killed and come back: {report:?}");
}

/// The papers leave partitions out; without a quorum both parts go on, and contradict each other.
#[test]
fn without_a_quorum_both_parts_go_on() {
    let both = |seed| {
        let mut plan = apart(seed);
        plan.options.quorum = false;
        plan
    };
    let failing = sweep::<Member>(0..150, both).expect_err("both go on");
    assert!(failing.violation.to_string().contains("gone on without"), "{}", failing.violation);
}

/// The checks see a mistake within so many seeds, and say this of it.
fn caught(bug: Bug, by: &str) {
    let buggy = |seed| {
        let mut plan = plan(seed);
        plan.options.bug = Some(bug);
        plan.options.safe = bug != Bug::DeliverProposed;
        plan
    };
    let violation = sweep::<Member>(0..4_000, buggy).expect_err("the checks see it").violation;
    assert!(violation.to_string().contains(by), "{violation}");
}

/// An ABCAST is delivered before its final priority.
#[test]
fn delivering_by_proposed_priority_is_caught() {
    caught(Bug::DeliverProposed, "where the other has");
}

#[test]
fn not_sending_what_came_before_is_caught() {
    caught(Bug::NoPiggyback, "which precedes it");
}

#[test]
fn not_flushing_what_a_failed_site_sent_is_caught() {
    caught(Bug::NoFlush, "after the failure of its sender");
}

#[test]
fn a_gbcast_without_a_list_of_what_is_before_is_caught() {
    caught(Bug::NoBeforeList, "stuck");
}

#[test]
fn accepting_frames_of_the_dead_is_caught() {
    caught(Bug::AcceptDead, "delivered twice");
}

#[test]
fn committing_views_in_one_phase_is_caught() {
    caught(Bug::OnePhaseViews, "stuck");
}

/// No seed is known that does this: a site has joined at one that fails then, and broadcasts, while another
/// goes on with a GBCAST that the new one was not asked about.
#[test]
fn keeping_a_priority_that_a_new_member_was_not_asked_for_is_found() {
    let workload = Workload { first: 1, hops: 0, ..small(3, 4) };
    let options = Options { bug: Some(Bug::KeepCutPriority), ..Options::default() };
    let plan = Plan { workload, options, down_at_most: 2, ..plan(0) };
    let bounds = Bounds { crashes: 2, nodes: 3, delays: Some(1), reduce: false, states: usize::MAX };
    let found = explore::<Member>(&plan, bounds).expect_err("it is found");
    assert!(found.violation.to_string().contains("not the same was delivered before"), "{found}");
}

#[test]
fn forgetting_ids_without_asking_is_caught() {
    caught(Bug::ForgetEarly, "delivered twice");
}

#[test]
fn forgetting_ids_that_wait_is_caught() {
    caught(Bug::ForgetWhileWaiting, "not the same was delivered before");
}

#[test]
fn output_before_the_flush_is_caught() {
    caught(Bug::OutputBeforeFlush, "and is lost");
}

#[test]
fn broadcasting_while_the_view_is_locked_is_caught() {
    caught(Bug::NoLock, "not the same was delivered before");
}

/// CBCAST, §3.2: with ABCAST as printed, what a site has delivered, and shown, right before it fails may
/// be ordered otherwise by those that remain.
#[test]
fn the_printed_abcast_shows_what_is_not_so() {
    let printed = |seed| {
        let mut plan = plan(seed);
        plan.options.safe = false;
        plan
    };
    let failing = sweep::<Member>(8_000..8_500, printed).expect_err("it happens");
    // What had been asked for met another state at another site.
    assert!(failing.violation.to_string().contains("met another state"), "{}", failing.violation);
}

/// A site that was wrongly taken for failed is killed and comes back (CBCAST, §4.2).
#[test]
fn a_wrongly_suspected_site_is_killed() {
    let wrong = |seed| {
        let mut plan = plan(seed);
        plan.workload.units = plan.workload.units.max(3);
        plan.crashes.clear();
        plan.options.wrong_suspicion = 2;
        plan
    };
    let report = sweep::<Member>(0..200, wrong).unwrap_or_else(|failing| panic!("{}", failing.explain::<Member>()));
    assert!(report.crashes >= 200, "{report:?}");
}

/// Three sites, each of which makes two broadcasts: every order that there is. One broadcast and a failure:
/// every order, but for those that can't be told from others. With two failures at a time: those in which
/// nothing is put off. (`ftstore simulate` goes through all of these where only who comes back broadcasts.)
#[test]
fn orders_of_a_small_group() {
    let plan = Plan { workload: small(3, 4), options: Options::default(), down_at_most: 2, ..plan(0) };
    for (first, crashes, delays, states) in [(2, 0, None, 4_000), (1, 1, None, 300_000), (1, 2, Some(0), 300_000)] {
        let workload = Workload { first, hops: u32::from(crashes == 0), ..plan.workload };
        let bounds = Bounds { crashes, nodes: 3, delays, reduce: crashes == 1, states: usize::MAX };
        let explored = explore::<Member>(&Plan { workload, ..plan.clone() }, bounds);
        let explored = explored.unwrap_or_else(|found| panic!("{found}"));
        assert!(explored.complete && explored.states > states && explored.ends > 0, "{explored:?}");
    }
}

/// ISIS, §7: "3 inter-site messages are sent" before an ABCAST is delivered; "CBCAST sends 1 inter-site
/// message, and GBCAST sends 3 or 5".
#[test]
fn primitives_cost_what_the_paper_says() {
    let deep = |primitive| cost(primitive, 4, false).deep;
    assert_eq!([Primitive::Cbcast, Primitive::Abcast, Primitive::Gbcast].map(deep), [1, 3, 5]);
    // Figure 2: while nothing is waited for, the sender is busy, and seven others have little to do.
    let handled = |primitive| (cost(primitive, 8, false).sender, cost(primitive, 8, false).other);
    assert_eq!((handled(Primitive::Cbcast), handled(Primitive::Abcast)), ((7, 1), (21, 3)));
}

/// ISIS, table I, for what ours has of the toolkit.
#[test]
fn routines_take_the_broadcasts_that_the_paper_says() {
    let counted = |routine| {
        let Broadcasts { cbcasts, abcasts, gbcasts, transfers } = broadcasts(routine, 4);
        assert_eq!(broadcasts(routine, 8), broadcasts(routine, 4), "it does not depend on the size of the group");
        (cbcasts, abcasts, gbcasts, transfers)
    };
    assert_eq!(counted(Routine::Update(Primitive::Cbcast)), (1, 0, 0, 0));
    assert_eq!(counted(Routine::Update(Primitive::Abcast)), (0, 1, 0, 0));
    assert_eq!(counted(Routine::CoordinatorCohort), (2, 0, 0, 0));
    assert_eq!(counted(Routine::Configuration), (0, 0, 1, 0));
    assert_eq!(counted(Routine::Leave), (0, 0, 1, 0));
    // That the state has come is told by a CBCAST of ours.
    assert_eq!(counted(Routine::Join), (1, 0, 1, 1));
}
