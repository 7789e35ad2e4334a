//! The search, and its reduction against the search without it.

use super::*;
use crate::protocols::process::Workload;
use crate::protocols::sim::{race, small};
use crate::protocols::{family, group, sender};

fn searched<M: Subject>(plan: &Plan<M::Options>, crashes: usize, reduce: bool) -> Result<Explored, Violation> {
    let nodes = plan.workload.units;
    let bounds = Bounds { crashes, nodes, delays: None, reduce, states: usize::MAX };
    explore::<M>(plan, bounds).map_err(|found| found.violation)
}

fn plan<O: Default>(messages: u32, down_at_most: usize, options: O) -> Plan<O> {
    Plan { workload: small(3, messages), options, down_at_most, ..Plan::random(0, 0, false) }
}

/// Nothing is found in correct protocols either way, and less is looked at. (Reduced at a node to which a
/// lane is empty, `family` can't reach its end.)
#[test]
fn the_reduction_leaves_states_out() {
    let options = family::Options { checkpoint_every: 0, ..family::Options::default() };
    let family = plan(2, 1, options);
    let [all, some] = [false, true].map(|reduce| searched::<family::Node>(&family, 1, reduce).expect("no violation"));
    assert!(all.complete && some.complete && some.states * 4 < all.states * 3, "{all:?} {some:?}");
    let mut group = plan(4, 2, group::Options::default());
    (group.workload.first, group.workload.hops) = (1, 0);
    let [all, some] = [false, true].map(|reduce| searched::<group::Member>(&group, 0, reduce).expect("no violation"));
    assert!(all.complete && some.complete && some.states < all.states, "{all:?} {some:?}");
}

/// What breaks a protocol in the search without the reduction breaks it with it, and nothing else does.
#[test]
fn mistakes_are_found_with_the_reduction_too() {
    let mut found = 0;
    let mut compare = |name: String, all: Result<Explored, Violation>, some: Result<Explored, Violation>| {
        found += usize::from(all.is_err());
        assert_eq!(all.is_err(), some.is_err(), "{name}: {all:?} {some:?}");
    };
    use family::Bug as F;
    for bug in [F::NoPiggyback, F::OutputAtOnce, F::AcceptStale, F::MissOneReply, F::OnlyLiveAnswer] {
        let options = family::Options { checkpoint_every: 0, bug: Some(bug), ..family::Options::default() };
        let plan = plan(2, 1, options);
        let [all, some] = [false, true].map(|reduce| searched::<family::Node>(&plan, 1, reduce));
        compare(format!("{bug:?}"), all, some);
    }
    use sender::Bug as S;
    for bug in [S::NoHold, S::DropRsn, S::ForgetEarly, S::NewRsnForDuplicate, S::KeepBeyondGap] {
        for workload in [small(3, 4), race()] {
            let options = sender::Options { checkpoint_every: 0, bug: Some(bug), ..sender::Options::default() };
            let plan = Plan { workload, ..plan(4, 1, options) };
            let [all, some] = [false, true].map(|reduce| searched::<sender::Unit>(&plan, 2, reduce));
            compare(format!("{bug:?}"), all, some);
        }
    }
    // Of a group, too: three sites, and two of which one fails.
    use group::Bug as G;
    for bug in [G::NoPiggyback, G::DeliverProposed, G::NoFlush] {
        let options = group::Options { safe: bug != G::DeliverProposed, bug: Some(bug), ..group::Options::default() };
        for (units, hops, crashes) in [(3, 1, 0), (2, 0, 1)] {
            let workload = Workload { first: 2, hops, ..small(units, 4) };
            let plan = Plan { workload, ..plan(4, units - 1, options) };
            let [all, some] = [false, true].map(|reduce| searched::<group::Member>(&plan, crashes, reduce));
            compare(format!("{bug:?}"), all, some);
        }
    }
    assert!(found >= 6, "{found}");
}

/// A packet that is said to make no difference to a member makes none: before or after anything else that may happen
/// to it next, and if it fails, the same comes of it, but for what is said to the dead.
#[test]
fn inert_packets_make_no_difference() {
    let mut plan = plan(4, 2, group::Options::default());
    (plan.workload.first, plan.workload.hops) = (1, 0);
    let bounds = Bounds { crashes: 1, nodes: 3, delays: Some(1), reduce: false, states: usize::MAX };
    let (mut system, started) = System::<group::Member>::started(&plan, bounds, false).expect("it starts");
    let (mut found, mut compared) = (Table::new(true), 0);
    let mut left = vec![Visit::new(&mut system, started.clone(), started.fingerprint(), None, 1, bounds)];
    while let Some(mut visit) = left.pop() {
        while let Some((step, delays)) = visit.left.pop() {
            compared += system.inert_commutes(&visit.state, step);
            let mut next = visit.state.clone();
            system.take(&mut next, step).expect("no violation");
            let fingerprint = next.fingerprint();
            if found.add(fingerprint, delays) != Seen::Enough {
                left.push(Visit::new(&mut system, next, fingerprint, Some(step), delays, bounds));
            }
        }
    }
    assert!(compared > 10_000, "{compared}");
}
