//! The replicated process: what it has been delivered is its state.

use std::collections::{BTreeMap, BTreeSet};

use super::{Broadcast, Cut, Id, Kind, LABELS, Payload, Site};
use crate::protocols::process::Output;
use crate::protocols::rng::scatter;

/// What was delivered.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Entry {
    /// A CBCAST or ABCAST.
    Message(Broadcast),
    /// A GBCAST.
    Cut(Cut),
}

/// A member's copy of the group's state.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Replica {
    /// Everything delivered, in order. A member that joined has what came before from another.
    pub log: Vec<Entry>,
    /// The group view: members, oldest first.
    pub members: Vec<Site>,
    /// CBCASTs delivered, of each site.
    pub causal: BTreeMap<Site, u64>,
    /// Digest of the ABCASTs of each label in order.
    pub digests: [u64; LABELS as usize],
    /// Requests that are not known to be done: who is to do it, and what is to be shown.
    pub requests: BTreeMap<Id, (Site, Output)>,
    /// Replies that came before their requests: an ABCAST and a CBCAST are in no order.
    pub early_replies: BTreeSet<Id>,
    /// Members that have not got the group's state yet.
    pub joining: Vec<Site>,
}

impl Replica {
    pub(super) fn created(members: Vec<Site>) -> Self {
        let (causal, requests) = (BTreeMap::new(), BTreeMap::new());
        let digests = [0; LABELS as usize];
        let (log, joining, early_replies) = (Vec::new(), Vec::new(), BTreeSet::new());
        Self { log, members, causal, digests, requests, early_replies, joining }
    }

    /// Puts it into the state.
    pub(super) fn apply(&mut self, entry: Entry) {
        match &entry {
            Entry::Message(message) => self.message(message),
            Entry::Cut(Cut::Joined(site)) => {
                self.members.push(*site);
                self.joining.push(*site);
            }
            Entry::Cut(Cut::Failed(site)) => {
                self.members.retain(|member| member != site);
                self.joining.retain(|member| member != site);
                // "If the coordinator fails, the cohorts receive a failure GBCAST, and one takes over."
                for (id, (coordinator, _)) in &mut self.requests {
                    if coordinator == site {
                        *coordinator = choose(&self.members, *id);
                    }
                }
            }
            Entry::Cut(Cut::Update(_)) => {}
        }
        self.log.push(entry);
    }

    fn message(&mut self, message: &Broadcast) {
        let Id { from, kind, number } = message.id;
        match kind {
            Kind::Causal => {
                self.causal.insert(from, number);
            }
            Kind::Ordered(label) => {
                let digest = &mut self.digests[usize::from(label)];
                *digest = scatter(*digest ^ scatter(digest_of(message.id)));
            }
            Kind::Cut => {}
        }
        match message.payload {
            Payload::Request if self.early_replies.remove(&message.id) => {}
            Payload::Request => {
                // What is shown is a function of the state that the request met.
                let number = u64::from(from.incarnation) << 32 | number;
                let output = Output { unit: from.node, number, made_in: 0, data: self.digests[0] };
                self.requests.insert(message.id, (choose(&self.members, message.id), output));
            }
            Payload::Reply(id) => {
                let met = |entry: &Entry| matches!(entry, Entry::Message(request) if request.id == id);
                if self.requests.remove(&id).is_none() && !self.log.iter().any(met) {
                    self.early_replies.insert(id);
                }
            }
            Payload::Transferred(site) => self.joining.retain(|&joining| joining != site),
            Payload::Work(_) => {}
        }
    }
}

/// Which member does something: the same choice everywhere.
pub(super) fn choose(members: &[Site], id: Id) -> Site {
    members[digest_of(id) as usize % members.len()]
}

pub(in crate::protocols) fn digest_of(id: Id) -> u64 {
    let Id { from: Site { node, incarnation }, kind, number } = id;
    let kind = match kind {
        Kind::Causal => 0,
        Kind::Ordered(label) => 1 + u64::from(label),
        Kind::Cut => 100,
    };
    scatter(scatter(node as u64 ^ u64::from(incarnation) << 16) ^ kind << 48 ^ number)
}
