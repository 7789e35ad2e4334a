//! CBCAST, flush, and the forgetting of message ids (CBCAST, §4.3.2, §4.4, §4.5).

use std::collections::{BTreeMap, BTreeSet};

use super::{Broadcast, Bug, Entry, Frame, Id, Kind, Member, Payload, Site};

/// A message in BUF with what the associative store has about its id.
#[derive(Clone, Debug, Hash)]
pub(super) struct Copy {
    pub(super) message: Broadcast,
    /// REM_DESTS.
    pub(super) remaining: BTreeSet<Site>,
    /// SENT_TO, the third optimisation of §4.3.2.
    sent_to: BTreeSet<Site>,
    disposable: bool,
    dont_send: BTreeSet<Site>,
    /// Rounds of the timer that it has been here.
    rounds: u32,
}

/// Rounds after which a copy that came from another site is passed on in any case.
const PASS_ON_AFTER: u32 = 6;
/// Rounds between collections of ids.
const COLLECT_EVERY: u32 = 4;

/// A collection that this site runs.
#[derive(Clone, Debug, Default, Hash)]
pub(super) struct Collection {
    round: u64,
    ids: Vec<Id>,
    waiting: BTreeSet<Site>,
}

/// BUF, and what belongs to it.
#[derive(Clone, Debug, Default, Hash)]
pub(super) struct Causal {
    pub(super) copies: BTreeMap<Id, Copy>,
    /// Own CBCASTs.
    number: u64,
    /// The wait queue (§4.3.3, step 3.2); `None` when there is none.
    pub(super) waiting: Option<Vec<Broadcast>>,
    collection: Collection,
    /// Ids of ABCASTs that may be forgotten, and who said so.
    pub(super) over: BTreeMap<Id, BTreeSet<Site>>,
    /// Collections of others that are acknowledged when these are off the wait queue.
    owed: Vec<(Site, u64, Vec<Id>)>,
}

impl Member {
    /// Sends a CBCAST. It is delivered here at once.
    pub(super) fn cbcast(&mut self, payload: Payload) {
        let Some(replica) = &self.replica else { return };
        let clabel = replica.causal.clone();
        let remaining: BTreeSet<Site> = replica.members.iter().copied().filter(|&site| site != self.me).collect();
        self.causal.number += 1;
        let id = Id { from: self.me, kind: Kind::Causal, number: self.causal.number };
        let message = Broadcast { id, payload, clabel };
        self.keep(message.clone(), remaining.clone(), None);
        self.place(message);
        for site in remaining {
            if self.options.bug == Some(Bug::NoPiggyback) {
                self.transmit_one(id, site);
            } else {
                self.transmit_to(site);
            }
        }
    }

    fn keep(&mut self, message: Broadcast, remaining: BTreeSet<Site>, from: Option<Site>) {
        let sent_to = from.into_iter().chain([message.id.from]).collect();
        let remaining: BTreeSet<Site> = remaining.into_iter().filter(|&site| !self.is_out(site)).collect();
        let dont_send = BTreeSet::new();
        let disposable = remaining.is_empty();
        let copy = Copy { remaining, sent_to, disposable, dont_send, rounds: 0, message };
        self.causal.copies.insert(copy.message.id, copy);
    }

    /// The transfer packet: everything that site `to` lacks as far as is known here, in an order that
    /// agrees with the causal one.
    pub(super) fn transmit_to(&mut self, to: Site) {
        let lacks = |copy: &&Copy| copy.remaining.contains(&to) && !copy.dont_send.contains(&to);
        let lacking = self.causal.copies.values().filter(lacks).filter(|copy| !copy.sent_to.contains(&to));
        let mut ids: Vec<(u64, Id)> = lacking.map(|copy| (copy.message.depth(), copy.message.id)).collect();
        ids.sort_unstable();
        for (_, id) in ids {
            self.transmit_one(id, to);
        }
    }

    fn transmit_one(&mut self, id: Id, to: Site) {
        let Some(copy) = self.causal.copies.get_mut(&id) else { return };
        copy.sent_to.insert(to);
        let frame = Frame::Causal { message: copy.message.clone(), remaining: copy.remaining.clone() };
        self.send(to, frame);
    }

    /// Schedules all that is in BUF for transmission (§4.5).
    pub(super) fn transmit_all(&mut self) {
        for site in self.views.operational() {
            if site != self.me {
                self.transmit_to(site);
            }
        }
    }

    pub(super) fn causal_count(&self) -> u64 {
        self.causal.number
    }

    /// Everything that passed here has reached everybody.
    pub(super) fn is_flushed(&self) -> bool {
        self.causal.copies.values().all(|copy| copy.remaining.is_empty())
    }

    pub(super) fn causal_arrived(&mut self, from: Site, message: Broadcast, mut remaining: BTreeSet<Site>) {
        if self.causal.copies.contains_key(&message.id) {
            return;
        }
        remaining.remove(&self.me);
        self.keep(message.clone(), remaining, Some(from));
        self.place(message);
    }

    /// On the delivery queue, or the wait queue if there is one.
    fn place(&mut self, message: Broadcast) {
        match &mut self.causal.waiting {
            Some(waiting) => waiting.push(message),
            None => self.deliver(Entry::Message(message)),
        }
    }

    /// The channel says that it has been sent.
    pub(super) fn causal_sent(&mut self, id: Id, to: Site) {
        if let Some(copy) = self.causal.copies.get_mut(&id) {
            copy.remaining.remove(&to);
            copy.disposable |= copy.remaining.is_empty();
        }
    }

    /// Nothing is owed to sites that are out of the view.
    pub(super) fn causal_views_changed(&mut self) {
        let out: BTreeSet<Site> = self
            .causal
            .copies
            .values()
            .flat_map(|copy| copy.remaining.iter().copied())
            .filter(|&site| self.is_out(site))
            .collect();
        for copy in self.causal.copies.values_mut() {
            copy.remaining.retain(|site| !out.contains(site));
            copy.disposable |= copy.remaining.is_empty();
        }
        let waiting = std::mem::take(&mut self.causal.collection.waiting);
        self.causal.collection.waiting = waiting.into_iter().filter(|&site| !self.is_out(site)).collect();
        self.maybe_forget();
    }

    pub(super) fn causal_round(&mut self) {
        let mut old = false;
        for copy in self.causal.copies.values_mut() {
            copy.rounds = (copy.rounds + 1).min(PASS_ON_AFTER);
            old |= copy.rounds >= PASS_ON_AFTER && !copy.remaining.is_empty();
        }
        if old {
            self.transmit_all();
        }
        self.rounds = (self.rounds + 1) % COLLECT_EVERY;
        if self.rounds == 0 {
            self.collect();
        }
    }

    /// Step 1 of the collection. One round at a time.
    fn collect(&mut self) {
        let disposable = self.causal.copies.values().filter(|copy| copy.disposable);
        let waits = |id: &Id| self.causal.waiting.as_ref().is_some_and(|w| w.iter().any(|m| m.id == *id));
        let ids = disposable.map(|copy| copy.message.id).filter(|id| !waits(id));
        let queued = |id: &&Id| self.ordered.queue.contains_key(*id);
        let ids: Vec<Id> = ids.chain(self.causal.over.keys().filter(|id| !queued(id)).copied()).collect();
        let running = !self.causal.collection.ids.is_empty();
        let Some(replica) = &self.replica else { return };
        if running || ids.is_empty() {
            return;
        }
        let members = replica.members.iter().copied();
        let waiting: BTreeSet<Site> = members.filter(|&site| site != self.me && !self.is_out(site)).collect();
        let round = self.causal.collection.round + 1;
        for &site in &waiting {
            let knows = |id: &Id| {
                let noted = self.causal.copies.get(id).is_some_and(|copy| copy.dont_send.contains(&site));
                let over = self.causal.over.get(id).is_some_and(|by| by.contains(&site));
                // A site that joined later never had it.
                let had = self.ordered.done.get(id).is_some_and(|done| done.dests.contains(&site));
                noted || id.kind != Kind::Causal && (over || !had)
            };
            let ids: Vec<Id> = ids.iter().copied().filter(|id| !knows(id)).collect();
            self.send(site, Frame::Disposable { ids, round });
        }
        self.causal.collection = Collection { round, ids, waiting };
        if self.options.bug == Some(Bug::ForgetEarly) {
            self.causal.collection.waiting.clear();
        }
        self.maybe_forget();
    }

    /// Step 2.
    pub(super) fn disposable(&mut self, from: Site, ids: Vec<Id>, round: u64) {
        for &id in &ids {
            if id.kind == Kind::Causal {
                let unknown = || Copy {
                    message: Broadcast { id, payload: Payload::Work(0), clabel: BTreeMap::new() },
                    remaining: BTreeSet::new(),
                    sent_to: BTreeSet::new(),
                    disposable: true,
                    dont_send: BTreeSet::new(),
                    rounds: 0,
                };
                let copy = self.causal.copies.entry(id).or_insert_with(unknown);
                copy.remaining.clear();
                copy.disposable = true;
                copy.dont_send.insert(from);
            } else {
                self.causal.over.entry(id).or_default().insert(from);
            }
        }
        self.causal.owed.push((from, round, ids));
        self.pay();
    }

    /// A new member never had what was before, and nobody will send it (the view was locked).
    pub(super) fn causal_joined(&mut self, site: Site, after: &[Broadcast]) {
        let before = |copy: &&mut Copy| after.iter().all(|message| message.id != copy.message.id);
        for copy in self.causal.copies.values_mut().filter(before) {
            copy.dont_send.insert(site);
        }
    }

    /// Acknowledges collections of others, unless one of the messages waits here. (An ABCAST, too: if its
    /// coordinator fails now, who takes over must find that others have delivered it.)
    pub(super) fn pay(&mut self) {
        let waiting = self.causal.waiting.clone().unwrap_or_default();
        let early = self.options.bug == Some(Bug::ForgetWhileWaiting);
        let queue = &self.ordered.queue;
        let waits_here = |id: &Id| queue.contains_key(id) || waiting.iter().any(|message| message.id == *id);
        let waits = |ids: &[Id]| !early && ids.iter().any(waits_here);
        let (owed, now): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.causal.owed).into_iter().partition(|(_, _, ids)| waits(ids));
        self.causal.owed = owed;
        for (to, round, _) in now {
            self.send(to, Frame::Disposed { round });
        }
    }

    /// Step 3.
    pub(super) fn disposed(&mut self, from: Site, round: u64) {
        if round == self.causal.collection.round {
            self.causal.collection.waiting.remove(&from);
            self.maybe_forget();
        }
    }

    fn maybe_forget(&mut self) {
        if self.causal.collection.waiting.is_empty() {
            for id in std::mem::take(&mut self.causal.collection.ids) {
                self.causal.copies.remove(&id);
                self.causal.over.remove(&id);
                self.ordered.done.remove(&id);
            }
        }
    }
}
