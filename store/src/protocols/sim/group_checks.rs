//! What must hold of every group: virtual synchrony (CBCAST, §3; ISIS, §2).

use std::borrow::Borrow;
use std::collections::{BTreeMap, BTreeSet};
use std::hash::{Hash, Hasher};

use super::Violation;
use super::subject::Subject;
use crate::protocols::group::{
    Broadcast, Cut, Entry, Id, Kind, LABELS, Member, Payload, Replica, Site, digest_of, met, output_number,
};
use crate::protocols::process::Output;
use crate::protocols::rng::scatter;

/// What has been seen of a group.
#[derive(Clone, Debug)]
pub(super) struct GroupChecks {
    /// How much of each member's log has been checked.
    checked: Vec<usize>,
    shown: BTreeMap<(usize, u64), Output>,
    /// How many CBCASTs of each site had been delivered to those that showed something.
    told: BTreeMap<Site, u64>,
}

/// What later checks depend on, but for what is a function of the nodes.
impl Hash for GroupChecks {
    fn hash<H: Hasher>(&self, hasher: &mut H) {
        (&self.shown, &self.told).hash(hasher);
    }
}

impl GroupChecks {
    pub(super) fn new(members: usize) -> Self {
        Self { checked: vec![0; members], shown: BTreeMap::new(), told: BTreeMap::new() }
    }

    pub(super) fn crashed(&mut self, node: usize) {
        if let Some(checked) = self.checked.get_mut(node) {
            *checked = 0;
        }
    }

    /// The world outside takes an output a second time for what it is, if it is the same.
    pub(super) fn show(&mut self, output: &Output, by: Option<&Member>) -> Result<(), Violation> {
        for (&site, &count) in by.iter().flat_map(|member| member.told()) {
            let told = self.told.entry(site).or_insert(0);
            *told = count.max(*told);
        }
        match self.shown.insert((output.unit, output.number), output.clone()) {
            Some(before) if before != *output => Err(Violation::ShownTwice(output.clone())),
            _ => Ok(()),
        }
    }

    /// After a step of `node`.
    pub(super) fn stepped<M: Subject, B: Borrow<M>>(
        &mut self,
        node: usize,
        machines: &[B],
        up: &[bool],
    ) -> Result<(), Violation> {
        let Some(replica) = machines[node].borrow().member().and_then(Member::replica) else { return Ok(()) };
        if !up[node] || replica.log.len() == self.checked[node] {
            return Ok(());
        }
        self.checked[node] = replica.log.len();
        self.member(node, replica)?;
        let me = machines[node].borrow().member().expect("it has a replica");
        for other in (0..machines.len()).filter(|&other| other != node && up[other]) {
            if let Some(them) = machines[other].borrow().member() {
                members(me, them)?;
            }
        }
        Ok(())
    }

    /// A member that has the group's state.
    pub(super) fn member(&self, node: usize, replica: &Replica) -> Result<(), Violation> {
        self.alone(replica).map_err(|what| Violation::Broken(format!("site {node}: {what}")))
    }

    /// One log: nothing twice, causal order, nothing from a site after its failure, and the state that a
    /// request met is the one that was shown.
    fn alone(&self, replica: &Replica) -> Result<(), String> {
        let mut seen: BTreeSet<Id> = BTreeSet::new();
        let mut cuts = BTreeSet::new();
        let mut causal = BTreeMap::new();
        let mut digest = 0;
        for entry in &replica.log {
            let message = match entry {
                Entry::Message(message) => message,
                Entry::Cut(cut) if !cuts.insert(*cut) => return Err(format!("{cut:?} twice")),
                Entry::Cut(Cut::Failed(site)) if self.told.get(site) > causal.get(site) => {
                    return Err(format!("a CBCAST of {site:?} was delivered where something was shown, and is lost"));
                }
                Entry::Cut(_) => continue,
            };
            let id = message.id;
            if !seen.insert(id) {
                return Err(format!("{id:?} was delivered twice"));
            }
            if cuts.contains(&Cut::Failed(id.from)) {
                return Err(format!("{id:?} was delivered after the failure of its sender"));
            }
            match id.kind {
                Kind::Causal => causal_order(message, &mut causal)?,
                Kind::Ordered(label) => {
                    if label == 0 {
                        digest = scatter(digest ^ scatter(digest_of(id)));
                    }
                }
                Kind::Cut => return Err(format!("{id:?} is no message")),
            }
            if message.payload == Payload::Request {
                let shown = self.shown.get(&(id.from.node, output_number(id)));
                if shown.is_some_and(|shown| shown.data != met(message, digest)) {
                    return Err(format!("{id:?} met another state than the one that was shown"));
                }
            }
        }
        Ok(())
    }

    /// Why the run is not at its end; `None` when everybody is, with the same state.
    pub(super) fn missing<M: Subject, B: Borrow<M>>(&self, machines: &[B], up: &[bool]) -> Option<String> {
        let mut first: Option<BTreeSet<String>> = None;
        for (node, machine) in machines.iter().enumerate() {
            let member = machine.borrow().member()?;
            if !up[node] {
                return Some(format!("site {node} is down"));
            }
            if let Some(why) = member.unfinished() {
                return Some(format!("site {node} {why}"));
            }
            let replica = member.replica()?;
            if replica.members.len() != machines.len() {
                return Some(format!("site {node} is in a group of {}", replica.members.len()));
            }
            let all: BTreeSet<String> = replica.log.iter().map(|entry| format!("{entry:?}")).collect();
            if first.as_ref().is_some_and(|first| *first != all) {
                return Some(format!("site {node} was delivered something else than site 0"));
            }
            first = Some(all);
        }
        None
    }
}

/// Two members that are up.
pub(super) fn members(me: &Member, them: &Member) -> Result<(), Violation> {
    let (Some(replica), Some(theirs)) = (me.replica(), them.replica()) else { return Ok(()) };
    let (node, other) = (me.site().node, them.site().node);
    let broken = |what: String| Err(Violation::Broken(format!("site {node}: {what}")));
    // One that was left behind by a network in two parts does not know yet, and shows nothing.
    match (me.has_excluded(them.site()), them.has_excluded(me.site())) {
        (true, true) => broken(format!("site {other} has gone on without it, and it without site {other}")),
        (false, false) => together(replica, theirs).or_else(|what| broken(format!("against site {other}: {what}"))),
        _ => Ok(()),
    }
}

fn causal_order(message: &Broadcast, delivered: &mut BTreeMap<Site, u64>) -> Result<(), String> {
    let Id { from, number, .. } = message.id;
    let before = delivered.insert(from, number).unwrap_or(0);
    if before + 1 != number {
        return Err(format!("{:?} was delivered after number {before}", message.id));
    }
    for (site, count) in message.clabel.iter().filter(|(site, _)| **site != from) {
        if delivered.get(site).is_none_or(|have| have < count) {
            return Err(format!("{:?} was delivered before number {count} of {site:?}, which precedes it", message.id));
        }
    }
    Ok(())
}

/// Two logs: GBCASTs in the same order with the same before them, and ABCASTs in the same order.
fn together(a: &Replica, b: &Replica) -> Result<(), String> {
    same_order(a, b)?;
    let (a, b) = (cut_up(a), cut_up(b));
    for ((cut, before), (other, theirs)) in a.iter().zip(&b) {
        // The last part is still growing on both sides.
        let (Some(cut), Some(other)) = (cut, other) else { break };
        if cut != other {
            return Err(format!("{cut:?} where the other has {other:?}"));
        }
        if before != theirs {
            let difference: Vec<_> = before.symmetric_difference(theirs).collect();
            return Err(format!("not the same was delivered before {cut:?}: {difference:?}"));
        }
    }
    Ok(())
}

type Part = (Option<Cut>, BTreeSet<Id>);

fn cut_up(replica: &Replica) -> Vec<Part> {
    let mut parts = Vec::new();
    let mut part = BTreeSet::new();
    for entry in &replica.log {
        match entry {
            Entry::Message(message) => {
                part.insert(message.id);
            }
            Entry::Cut(cut) => parts.push((Some(*cut), std::mem::take(&mut part))),
        }
    }
    parts.push((None, part));
    parts
}

/// The ABCASTs of a label, in order.
fn of_label(replica: &Replica, label: u8) -> impl Iterator<Item = Id> + '_ {
    replica.log.iter().filter_map(move |entry| match entry {
        Entry::Message(message) if message.id.kind == Kind::Ordered(label) => Some(message.id),
        _ => None,
    })
}

/// One of the two orders begins with the other, for each label.
fn same_order(a: &Replica, b: &Replica) -> Result<(), String> {
    for label in 0..LABELS {
        if let Some((x, y)) = of_label(a, label).zip(of_label(b, label)).find(|(x, y)| x != y) {
            return Err(format!("{x:?} where the other has {y:?}"));
        }
    }
    Ok(())
}
