//! ABCAST (CBCAST, §4.3.1).

use std::collections::{BTreeMap, BTreeSet};

use super::{Broadcast, Bug, Cut, Entry, Frame, Id, Kind, LABELS, Member, Payload, Priority, Site};

/// How far a message in a priority queue is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Tag {
    Undeliverable,
    /// It has its final priority, but others may not have it yet ([`super::Options::safe`]).
    Final,
    Deliverable,
}

#[derive(Clone, Debug, Hash)]
pub(super) struct Queued {
    pub(super) message: Broadcast,
    dests: Vec<Site>,
    priority: Priority,
    pub(super) tag: Tag,
    pub(super) coordinator: Site,
}

/// A GBCAST in the priority queues: it has the same priority in all of them.
#[derive(Clone, Debug, Hash)]
pub(super) struct QueuedCut {
    pub(super) priority: Priority,
    pub(super) is_final: bool,
    /// Where and to which attempt it is to be said that it has reached the heads.
    pub(super) asked: Option<(Site, u64)>,
}

/// A message that was delivered.
#[derive(Clone, Debug, Hash)]
pub(super) struct Done {
    priority: Priority,
    coordinator: Site,
    pub(super) dests: Vec<Site>,
}

/// A coordinator's state of one ABCAST.
#[derive(Clone, Debug, Hash)]
struct Collecting {
    message: Broadcast,
    dests: Vec<Site>,
    attempt: u64,
    /// Whose proposal is missing; then, who has not got the final priority.
    waiting: BTreeSet<Site>,
    highest: Priority,
    found: Option<Priority>,
    is_final: bool,
    /// Priorities are given anew.
    anew: bool,
}

/// The priority queues.
#[derive(Clone, Debug, Default, Hash)]
pub(super) struct Ordered {
    number: u64,
    pub(super) queue: BTreeMap<Id, Queued>,
    pub(super) cuts: BTreeMap<Cut, QueuedCut>,
    /// The greatest priority seen.
    highest: u64,
    /// Delivered, until they are forgotten.
    pub(super) done: BTreeMap<Id, Done>,
    collecting: BTreeMap<Id, Collecting>,
}

impl Ordered {
    /// A priority greater than any seen.
    pub(super) fn propose(&mut self, node: usize) -> Priority {
        self.highest += 1;
        (self.highest, node)
    }

    pub(super) fn see(&mut self, priority: Priority) {
        self.highest = self.highest.max(priority.0);
    }

    /// What is at the head of a label's queue.
    fn head(&self, label: u8) -> Option<Result<Id, Cut>> {
        let messages = self.queue.iter().filter(|(id, _)| id.kind == Kind::Ordered(label));
        let message = messages.map(|(&id, queued)| (queued.priority, Ok(id)));
        let cut = self.cuts.iter().map(|(&cut, queued)| (queued.priority, Err(cut)));
        message.chain(cut).min_by_key(|&(priority, _)| priority).map(|(_, what)| what)
    }

    /// The GBCAST that is at the head of all queues with its final priority.
    pub(super) fn cut_at_heads(&self) -> Option<Cut> {
        let heads: BTreeSet<_> = (0..LABELS).map(|label| self.head(label)).collect();
        match heads.first() {
            Some(Some(Err(cut))) if heads.len() == 1 && self.cuts[cut].is_final => Some(*cut),
            _ => None,
        }
    }

    /// GBCASTs that a new member has to know of: with their priorities, and whether these are final.
    pub(super) fn pending_cuts(&self) -> Vec<(Cut, Priority, bool)> {
        self.cuts.iter().map(|(&cut, queued)| (cut, queued.priority, queued.is_final)).collect()
    }

    pub(super) fn join(&mut self, pending: Vec<(Cut, Priority, bool)>) {
        for (cut, priority, is_final) in pending {
            self.see(priority);
            self.cuts.entry(cut).or_insert(QueuedCut { priority, is_final, asked: None });
        }
    }

    /// No ABCAST is under way here.
    pub(super) fn is_quiet(&self) -> bool {
        self.queue.is_empty() && self.collecting.values().all(|collecting| collecting.is_final)
    }

    pub(super) fn is_idle(&self) -> bool {
        self.queue.is_empty() && self.cuts.is_empty() && self.collecting.is_empty() && self.done.is_empty()
    }
}

impl Member {
    /// Sends an ABCAST.
    pub(super) fn abcast(&mut self, label: u8, payload: Payload) {
        let Some(replica) = &self.replica else { return };
        let (dests, clabel) = (replica.members.clone(), replica.causal.clone());
        self.ordered.number += 1;
        let id = Id { from: self.me, kind: Kind::Ordered(label), number: self.ordered.number };
        self.collect_priorities(Broadcast { id, payload, clabel }, dests, true);
    }

    pub(super) fn ordered_count(&self) -> u64 {
        self.ordered.number
    }

    /// Step 1; not anew, also the interrogation of one that takes over: those that have the message answer
    /// with the priority and the tag, and keep it at its place until all have.
    fn collect_priorities(&mut self, message: Broadcast, dests: Vec<Site>, anew: bool) {
        self.attempts += 1;
        let attempt = self.attempts;
        let waiting: BTreeSet<Site> = dests.iter().copied().filter(|&site| !self.is_out(site)).collect();
        for &site in &waiting {
            // What causally precedes goes first (§3.4: a sender that fails must not leave a gap).
            self.transmit_to(site);
            self.send(site, Frame::Ordered { message: message.clone(), dests: dests.clone(), attempt, anew });
        }
        let (highest, found, is_final) = ((0, 0), None, false);
        let id = message.id;
        let collecting = Collecting { message, dests, attempt, waiting, highest, found, is_final, anew };
        self.ordered.collecting.insert(id, collecting);
    }

    /// Step 2.
    pub(super) fn ordered_arrived(
        &mut self,
        from: Site,
        message: Broadcast,
        dests: Vec<Site>,
        attempt: u64,
        anew: bool,
    ) {
        let id = message.id;
        if let Some(&Done { priority, .. }) = self.ordered.done.get(&id) {
            self.send(from, Frame::Proposed { id, attempt, priority, is_final: true });
            return;
        }
        let node = self.me.node;
        let known = self.ordered.queue.get(&id).map(|queued| (queued.priority, queued.tag));
        let (priority, tag) = match known {
            Some((_, Tag::Undeliverable)) if self.options.safe && anew => {
                (self.ordered.propose(node), Tag::Undeliverable)
            }
            Some(known) => known,
            None => (self.ordered.propose(node), Tag::Undeliverable),
        };
        let early = self.options.bug == Some(Bug::DeliverProposed);
        let tag_here = if early { Tag::Deliverable } else { tag };
        let queued = Queued { message, dests, priority, tag: tag_here, coordinator: from };
        self.ordered.queue.insert(id, queued);
        self.send(from, Frame::Proposed { id, attempt, priority, is_final: tag != Tag::Undeliverable });
    }

    /// Step 3.
    pub(super) fn priority_proposed(&mut self, from: Site, id: Id, attempt: u64, priority: Priority, is_final: bool) {
        let Some(collecting) = self.ordered.collecting.get_mut(&id) else { return };
        if collecting.attempt != attempt || collecting.is_final {
            return;
        }
        collecting.waiting.remove(&from);
        collecting.highest = collecting.highest.max(priority);
        if is_final {
            collecting.found = Some(priority);
        }
        self.maybe_final(id);
    }

    fn maybe_final(&mut self, id: Id) {
        let Some(collecting) = self.ordered.collecting.get(&id) else { return };
        if collecting.is_final || !collecting.waiting.is_empty() {
            return;
        }
        if self.options.safe && !collecting.anew && collecting.found.is_none() {
            let (message, dests) = (collecting.message.clone(), collecting.dests.clone());
            self.collect_priorities(message, dests, true);
            return;
        }
        let priority = collecting.found.unwrap_or(collecting.highest);
        let dests = collecting.dests.clone();
        let to: Vec<Site> = dests.into_iter().filter(|&site| !self.is_out(site)).collect();
        let waiting: BTreeSet<Site> = to.iter().copied().filter(|&site| site != self.me).collect();
        for site in to {
            self.send(site, Frame::Final { id, priority });
        }
        let collecting = self.ordered.collecting.get_mut(&id).expect("it is there");
        (collecting.is_final, collecting.waiting) = (true, waiting);
        self.maybe_everywhere(id);
    }

    /// Step 4.
    pub(super) fn priority_final(&mut self, id: Id, priority: Priority) {
        self.ordered.see(priority);
        if let Some(queued) = self.ordered.queue.get_mut(&id) {
            queued.priority = priority;
            queued.tag = queued.tag.max(if self.options.safe { Tag::Final } else { Tag::Deliverable });
        }
    }

    /// The channel says that somebody has a final priority.
    pub(super) fn final_sent(&mut self, id: Id, to: Site) {
        if let Some(collecting) = self.ordered.collecting.get_mut(&id)
            && collecting.is_final
        {
            collecting.waiting.remove(&to);
            self.maybe_everywhere(id);
        }
    }

    /// Everybody has the final priority: the id is disposable, and in the additional phase the message
    /// is delivered.
    fn maybe_everywhere(&mut self, id: Id) {
        let Some(collecting) = self.ordered.collecting.get(&id) else { return };
        if !collecting.is_final || !collecting.waiting.is_empty() {
            return;
        }
        // What is out of the view is sent nothing.
        for site in collecting.dests.clone().into_iter().filter(|_| self.options.safe).collect::<Vec<_>>() {
            self.send(site, Frame::Deliver { id });
        }
        self.ordered.collecting.remove(&id);
        self.causal.over.entry(id).or_default();
    }

    pub(super) fn may_deliver(&mut self, id: Id) {
        if let Some(queued) = self.ordered.queue.get_mut(&id) {
            queued.tag = Tag::Deliverable;
        }
    }

    /// Delivers from the heads of the queues while that is possible.
    pub(super) fn deliver_ordered(&mut self) {
        if self.replica.is_none() {
            return; // What is pending in the group comes with its state.
        }
        for label in 0..LABELS {
            while let Some(Ok(id)) = self.ordered.head(label) {
                if self.ordered.queue[&id].tag != Tag::Deliverable {
                    break;
                }
                let Queued { message, priority, coordinator, dests, .. } =
                    self.ordered.queue.remove(&id).expect("it is at the head");
                self.ordered.done.insert(id, Done { priority, coordinator, dests });
                self.deliver(Entry::Message(message));
            }
        }
    }

    /// ABCASTs from a site, or left by a coordinator, that is out of the view, not final here.
    pub(super) fn has_stranded(&self) -> bool {
        let left = |queued: &Queued| self.is_out(queued.coordinator) || self.is_out(queued.message.id.from);
        let stranded = |queued: &Queued| left(queued) && queued.tag == Tag::Undeliverable;
        self.ordered.queue.values().any(stranded)
    }

    /// Somebody failed.
    pub(super) fn ordered_views_changed(&mut self) {
        let ids: Vec<Id> = self.ordered.collecting.keys().copied().collect();
        for id in ids {
            let collecting = &self.ordered.collecting[&id];
            let out: Vec<Site> = collecting.waiting.iter().copied().filter(|&site| self.is_out(site)).collect();
            if out.is_empty() {
                continue;
            }
            let anew = collecting.anew;
            let (again, message, dests) =
                (self.options.safe && !collecting.is_final, collecting.message.clone(), collecting.dests.clone());
            if again {
                // Its proposal may be greater than those of the others, and it may have acted on it.
                self.collect_priorities(message, dests, anew);
            } else {
                let collecting = self.ordered.collecting.get_mut(&id).expect("just listed");
                collecting.waiting.retain(|site| !out.contains(site));
                self.maybe_final(id);
                self.maybe_everywhere(id);
            }
        }
    }

    /// What its coordinator has left behind is given to the oldest site.
    pub(super) fn hand_over_stranded(&mut self) {
        let Some(oldest) = self.oldest() else { return };
        let stranded = self.ordered.queue.values().filter(|queued| queued.tag != Tag::Deliverable);
        let stranded = stranded.filter(|queued| self.is_out(queued.coordinator));
        let frames: Vec<Frame> = stranded
            .map(|queued| Frame::Stranded { message: queued.message.clone(), dests: queued.dests.clone() })
            .collect();
        for frame in frames {
            self.send(oldest, frame);
        }
        // All that is left of a failed coordinator's has been delivered everywhere once its failure has.
        let Some(replica) = &self.replica else { return };
        let settled = |site: Site| self.is_out(site) && !replica.members.contains(&site);
        let over = self.ordered.done.iter().filter(|(_, done)| settled(done.coordinator));
        let over: Vec<Id> = over.map(|(&id, _)| id).collect();
        let mine = self.oldest() == Some(self.me);
        for id in over.into_iter().filter(|_| mine) {
            self.causal.over.entry(id).or_default();
        }
    }

    pub(super) fn take_over(&mut self, from: Site, message: Broadcast, dests: Vec<Site>) {
        let id = message.id;
        if self.ordered.collecting.contains_key(&id) || self.oldest() != Some(self.me) {
            return;
        }
        match self.ordered.done.get(&id) {
            // It was delivered here, so everybody has it; and with the additional phase, its priority.
            Some(&Done { priority, .. }) => {
                self.send(from, Frame::Final { id, priority });
                if self.options.safe {
                    self.send(from, Frame::Deliver { id });
                }
            }
            None => self.collect_priorities(message, dests, false),
        }
    }
}
