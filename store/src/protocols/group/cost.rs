//! What a primitive costs (ISIS, §7: figures 2 and 3, table I).

use super::{Cut, Entry, Frame, Member, Options, Packet, Primitive};
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
