//! The ordinal, who is recovering, and stable storage.

use super::{Body, Determinants, Event, Packet};

type Action = super::Action<Packet>;

/// Never fails.
#[derive(Clone, Debug, Default, Hash)]
pub struct Registrar {
    /// `ord` (Elnozahy, §3.2).
    ordinal: u64,
    recovering: Vec<(u64, usize, u32)>,
    /// The last incarnation of each process that got what it needs: a late request of it is not a new recovery.
    live: std::collections::BTreeMap<usize, u32>,
    stored: Determinants,
}

impl Registrar {
    pub(super) fn step(&mut self, event: Event<Packet>, actions: &mut Vec<Action>) {
        match event {
            Event::Packet { from, packet } => self.packet(from, packet, actions),
            // A leader that fails is replaced by the next (§3.3).
            Event::Down(node) => self.recovering.retain(|&(_, unit, _)| unit != node),
            _ => {}
        }
    }

    fn packet(&mut self, from: usize, packet: Packet, actions: &mut Vec<Action>) {
        let mut answer = |body| actions.push(Action::Send { to: from, packet: Packet { incarnation: 0, body } });
        match packet.body {
            Body::Register => {
                let known =
                    |&(_, unit, incarnation): &(u64, usize, u32)| unit == from && incarnation >= packet.incarnation;
                let over = self.live.get(&from).is_some_and(|&live| live >= packet.incarnation);
                if !over && !self.recovering.iter().any(known) {
                    self.recovering.retain(|&(_, unit, _)| unit != from);
                    self.ordinal += 1;
                    self.recovering.push((self.ordinal, from, packet.incarnation));
                }
                answer(Body::Recovering(self.recovering.clone()));
            }
            Body::Live => {
                self.recovering.retain(|&(_, unit, incarnation)| unit != from || incarnation > packet.incarnation);
                let live = self.live.entry(from).or_insert(0);
                *live = packet.incarnation.max(*live);
                answer(Body::Live);
            }
            Body::Hold(determinants) => {
                let held = determinants.keys().copied().collect();
                self.stored.extend(determinants);
                answer(Body::Held(held));
            }
            Body::Checkpointed(sii, _) => self.stored.retain(|receipt, _| receipt.unit != from || receipt.sii > sii),
            Body::Ask(attempt, _) => answer(Body::Answer(attempt, self.stored.clone())),
            _ => {}
        }
    }
}
