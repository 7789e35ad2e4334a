//! The replicated process: what it has been delivered is its state.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{Hash, Hasher};

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
#[derive(Clone, Debug, PartialEq, Eq)]
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

/// Two logs that differ in the order of CBCASTs that a member need not keep, are the same to all that follows:
/// between two GBCASTs, it is which CBCASTs were delivered, and which ABCASTs of each label in which order, that
/// matters.
impl Hash for Replica {
    fn hash<H: Hasher>(&self, hasher: &mut H) {
        for part in self.log.split_inclusive(|entry| matches!(entry, Entry::Cut(_))) {
            let mut part: Vec<_> = part.iter().enumerate().map(|(at, entry)| (entry.place(at), entry)).collect();
            part.sort_unstable_by_key(|&(place, _)| place);
            part.iter().for_each(|(_, entry)| entry.hash(hasher));
        }
        let Self { log: _, members, causal, digests, requests, early_replies, joining } = self;
        (members, causal, digests, requests, early_replies, joining).hash(hasher);
    }
}

impl Entry {
    /// In the order of the hash, when it is at this place of a log: CBCASTs, ABCASTs by label, the GBCAST.
    fn place(&self, at: usize) -> (Kind, Option<Id>, usize) {
        match self {
            Self::Message(message) if message.id.kind == Kind::Causal => (Kind::Causal, Some(message.id), 0),
            Self::Message(message) => (message.id.kind, None, at),
            Self::Cut(_) => (Kind::Cut, None, at),
        }
    }
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
                        *coordinator = coordinate(&self.members, *id);
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
                let (number, data) = (output_number(message.id), met(message, self.digests[0]));
                let output = Output { unit: from.node, number, made_in: 0, data };
                self.requests.insert(message.id, (coordinate(&self.members, message.id), output));
            }
            Payload::Reply(id) => {
                let is_it = |entry: &Entry| matches!(entry, Entry::Message(request) if request.id == id);
                if self.requests.remove(&id).is_none() && !self.log.iter().any(is_it) {
                    self.early_replies.insert(id);
                }
            }
            Payload::Transferred(site) => self.joining.retain(|&joining| joining != site),
            Payload::Work(_) => {}
        }
    }
}

/// Who does a request: "the coordinator resides at the same site as the caller if possible, and otherwise in a way
/// that will balance load" (ISIS, §3). The caller of one that came by ABCAST stands for a client that is
/// no member.
fn coordinate(members: &[Site], request: Id) -> Site {
    let local = |site: &Site| *site == request.from && request.kind == Kind::Causal;
    members.iter().copied().find(local).unwrap_or_else(|| choose(members, request))
}

/// The state that a request meets, which what is shown is a function of: what precedes it if it came by
/// CBCAST; by ABCAST, also all that the order puts before it, of which this is the digest.
pub(in crate::protocols) fn met(request: &Broadcast, ordered: u64) -> u64 {
    match request.id.kind {
        Kind::Causal => request.clabel.iter().fold(0, |digest, (site, &count)| {
            let id = Id { from: *site, kind: Kind::Causal, number: count };
            scatter(digest ^ digest_of(id))
        }),
        _ => ordered,
    }
}

/// The number of the output of a request.
pub(in crate::protocols) fn output_number(request: Id) -> u64 {
    let causal = u64::from(request.kind == Kind::Causal) << 31;
    u64::from(request.from.incarnation) << 32 | causal | request.number
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
