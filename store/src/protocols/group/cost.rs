//! What a primitive costs (ISIS, §7: figures 2 and 3, table I).

use super::{Cut, Entry, Frame, Kind, Member, Options, Packet, Primitive};
use crate::protocols::machine::{Action, Event, Machine};
use crate::protocols::process::{Pattern, Workload};

/// Messages between sites for one broadcast.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cost {
    /// One after the other, before another site is delivered it.
    pub deep: u32,
    /// Altogether, without acknowledgements of the channels and the forgetting of ids.
    pub messages: u32,
    /// Of these, sent or received by the site that broadcasts.
    pub sender: u32,
    /// And by the one of the others that has most of them.
    pub other: u32,
}

/// One broadcast of the oldest site to a group of so many, on a network that is in step.
pub fn cost(primitive: Primitive, sites: usize, safe: bool) -> Cost {
    let options = Options { safe, only: Some(primitive), ..Options::default() };
    let pattern = Pattern::Random;
    let workload =
        Workload { units: sites, first: 1, hops: 0, forks: 0, outputs: 0, bytes: 100, pattern, computing: 0, seed: 1 };
    let mut members = Member::system(workload, &options);
    let mut coming: Vec<(usize, Event<Packet>)> = vec![(0, Event::Timer(0))];
    let (mut deep, mut messages) = (0, 0);
    let mut handled = vec![0; sites];
    let mut delivered = false;
    for round in 0..20 {
        let mut next = Vec::new();
        for (node, event) in coming {
            let mut actions = Vec::new();
            members[node].step(event, &mut actions);
            for action in actions {
                if let Action::Send { to, packet } = action {
                    let counts = u32::from(counts(&packet));
                    messages += counts;
                    handled[node] += counts;
                    handled[to] += counts;
                    next.push((to, Event::Packet { from: node, packet }));
                }
            }
        }
        coming = next;
        if !delivered && has_it(&members[sites - 1]) {
            (delivered, deep) = (true, round);
        }
    }
    Cost { deep, messages, sender: handled[0], other: handled[1..].iter().copied().max().unwrap_or(0) }
}

fn counts(packet: &Packet) -> bool {
    let Packet::Data { frame, .. } = packet else { return false };
    !matches!(frame, Frame::Disposable { .. } | Frame::Disposed { .. } | Frame::Over { .. } | Frame::Wanted { .. })
}

fn has_it(member: &Member) -> bool {
    let broadcast = |entry: &Entry| matches!(entry, Entry::Message(_) | Entry::Cut(Cut::Update(_)));
    member.replica().is_some_and(|replica| replica.log.iter().any(broadcast))
}

/// Broadcasts that a routine of the toolkit takes (table I).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Broadcasts {
    /// CBCASTs.
    pub cbcasts: usize,
    /// ABCASTs.
    pub abcasts: usize,
    /// GBCASTs.
    pub gbcasts: usize,
    /// Times that the state was sent.
    pub transfers: usize,
}

/// What a group is asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Routine {
    /// `update`: replicated data are changed, in the order of causes (`Cbcast`) or in one order (`Abcast`).
    Update(Primitive),
    /// `coord_cohort`: a request that one of the group does.
    CoordinatorCohort,
    /// `conf_update`: the configuration is changed.
    Configuration,
    /// `pg_leave`: a member is no more.
    Leave,
    /// `join_and_xfer`: one that is back becomes a member, and gets the state.
    Join,
}

/// Counts what a group of so many does for a routine.
pub fn broadcasts(routine: Routine, sites: usize) -> Broadcasts {
    let (only, outputs) = match routine {
        Routine::Update(primitive) => (primitive, 0),
        Routine::CoordinatorCohort => (Primitive::Cbcast, 1024),
        Routine::Configuration | Routine::Leave | Routine::Join => (Primitive::Gbcast, 0),
    };
    let changes = matches!(routine, Routine::Leave | Routine::Join);
    let options = Options { only: Some(only), ..Options::default() };
    let (pattern, first) = (Pattern::Random, u32::from(!changes));
    let workload =
        Workload { units: sites, first, hops: 0, forks: 0, outputs, bytes: 100, pattern, computing: 0, seed: 1 };
    let mut group = Group { members: Member::system(workload, &options), changes, gone: None, transfers: 0 };
    group.goes_on((0..sites).map(|node| (node, Event::Start)).collect());
    let last = sites - 1;
    if changes {
        group.members[last].crash();
        group.gone = Some(last);
        group.goes_on((0..last).map(|node| (node, Event::Down(last))).collect());
    }
    let before = group.counted();
    if routine == Routine::Join {
        group.gone = None;
        group.goes_on(vec![(last, Event::Restarted { shown: 0 })]);
    }
    let after = group.counted();
    let from = if routine == Routine::Join { before } else { Broadcasts::default() };
    Broadcasts {
        cbcasts: after.cbcasts - from.cbcasts,
        abcasts: after.abcasts - from.abcasts,
        gbcasts: after.gbcasts - from.gbcasts,
        transfers: after.transfers - from.transfers,
    }
}

/// A group on a network that is in step.
struct Group {
    members: Vec<Member>,
    /// Members come and go, and nothing else is looked at.
    changes: bool,
    /// Who has failed.
    gone: Option<usize>,
    transfers: usize,
}

impl Group {
    /// What happens, and all that follows from it, with enough rounds of the members' own for that.
    fn goes_on(&mut self, mut coming: Vec<(usize, Event<Packet>)>) {
        for _ in 0..12 {
            while !coming.is_empty() {
                coming = coming.into_iter().flat_map(|(node, event)| self.step(node, event)).collect();
            }
            coming = (0..self.members.len()).map(|node| (node, Event::Timer(0))).collect();
        }
    }

    fn step(&mut self, node: usize, event: Event<Packet>) -> Vec<(usize, Event<Packet>)> {
        if self.gone == Some(node) {
            return Vec::new();
        }
        let mut actions = Vec::new();
        self.members[node].step(event, &mut actions);
        let sent = actions.into_iter().filter_map(|action| match action {
            Action::Send { to, packet } => Some((to, Event::Packet { from: node, packet })),
            _ => None,
        });
        let sent: Vec<_> = sent.collect();
        let is_state = |event: &Event<Packet>| {
            matches!(event, Event::Packet { packet: Packet::Data { frame: Frame::State(_), .. }, .. })
        };
        self.transfers += sent.iter().filter(|(_, event)| is_state(event)).count();
        sent
    }

    /// What the oldest member has been delivered.
    fn counted(&self) -> Broadcasts {
        let mut counted = Broadcasts { transfers: self.transfers, ..Broadcasts::default() };
        for entry in self.members[0].replica().iter().flat_map(|replica| &replica.log) {
            match entry {
                // Who is back has something of its own to say.
                Entry::Cut(Cut::Update(_)) if self.changes => {}
                Entry::Cut(_) => counted.gbcasts += 1,
                Entry::Message(message) if message.id.kind == Kind::Causal => counted.cbcasts += 1,
                Entry::Message(_) => counted.abcasts += 1,
            }
        }
        counted
    }
}
