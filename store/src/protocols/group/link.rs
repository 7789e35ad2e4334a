//! The intersite layer: ordered, lossless channels between incarnations of sites (CBCAST, §4.1).

use std::collections::BTreeMap;

use super::{Frame, Packet, Site};
use crate::protocols::machine::Action;

/// One channel, both ways.
#[derive(Clone, Debug, Hash)]
struct Link {
    peer: Site,
    next: u64,
    unacknowledged: BTreeMap<u64, Frame>,
    expected: u64,
    early: BTreeMap<u64, Frame>,
    /// Rounds of the timer since anything was heard.
    silent: u32,
}

/// All channels of a site.
#[derive(Clone, Debug, Hash)]
pub(super) struct Links {
    me: Site,
    links: BTreeMap<usize, Link>,
}

impl Links {
    pub(super) fn new(me: Site) -> Self {
        Self { me, links: BTreeMap::new() }
    }

    /// Those to whom there are channels.
    pub(super) fn peers(&self) -> Vec<Site> {
        self.links.values().map(|link| link.peer).collect()
    }

    /// It has been heard of a later incarnation.
    pub(super) fn is_old(&self, peer: Site) -> bool {
        self.links.get(&peer.node).is_some_and(|link| link.peer > peer)
    }

    /// The channel to this incarnation; one to an earlier incarnation is closed.
    fn link(&mut self, peer: Site) -> &mut Link {
        let new =
            Link { peer, next: 0, unacknowledged: BTreeMap::new(), expected: 0, early: BTreeMap::new(), silent: 0 };
        let link = self.links.entry(peer.node).or_insert_with(|| new.clone());
        if link.peer != peer {
            *link = new;
        }
        link
    }

    pub(super) fn send(&mut self, to: Site, frame: Frame, out: &mut Vec<Action<Packet>>) {
        let me = self.me;
        let link = self.link(to);
        let number = link.next;
        link.next += 1;
        link.unacknowledged.insert(number, frame.clone());
        out.push(Action::Send { to: to.node, packet: Packet::Data { from: me, to, number, frame } });
    }

    /// What has become deliverable with a packet, and the acknowledgement. It goes out when the step in
    /// which these are handled is over, so what is acknowledged has been handled.
    pub(super) fn arrived(&mut self, from: Site, number: u64, frame: Frame) -> (Vec<Frame>, Packet) {
        let me = self.me;
        let link = self.link(from);
        link.silent = 0;
        let mut ready = Vec::new();
        if number >= link.expected {
            link.early.insert(number, frame);
        }
        while let Some(frame) = link.early.remove(&link.expected) {
            link.expected += 1;
            ready.push(frame);
        }
        (ready, Packet::Acknowledged { from: me, to: from, below: link.expected })
    }

    /// What has been *sent* with this acknowledgement.
    pub(super) fn acknowledged(&mut self, by: Site, below: u64) -> Vec<Frame> {
        let link = self.link(by);
        link.silent = 0;
        let rest = link.unacknowledged.split_off(&below);
        std::mem::replace(&mut link.unacknowledged, rest).into_values().collect()
    }

    /// What would be *sent* with that acknowledgement; `None` without a channel.
    pub(super) fn outstanding(&self, by: Site, below: u64) -> Option<impl Iterator<Item = &Frame>> {
        let link = self.links.get(&by.node).filter(|link| link.peer == by)?;
        Some(link.unacknowledged.range(..below).map(|(_, frame)| frame))
    }

    /// A sign of life from there. It opens no channel.
    pub(super) fn heard(&mut self, from: Site) {
        if let Some(link) = self.links.get_mut(&from.node).filter(|link| link.peer == from) {
            link.silent = 0;
        }
    }

    /// Retransmits to these and closes the channels to all others.
    pub(super) fn again(&mut self, to: &[Site], out: &mut Vec<Action<Packet>>) {
        self.links.retain(|_, link| to.contains(&link.peer));
        let me = self.me;
        for &peer in to.iter().filter(|&&peer| peer != me) {
            let link = self.link(peer);
            link.silent += 1;
            for (&number, frame) in &link.unacknowledged {
                let packet = Packet::Data { from: me, to: peer, number, frame: frame.clone() };
                out.push(Action::Send { to: peer.node, packet });
            }
            // Anything is a sign of life.
            if link.unacknowledged.is_empty() {
                out.push(Action::Send { to: peer.node, packet: Packet::Hello { from: me } });
            }
        }
    }

    /// Closes the channels to these.
    pub(super) fn close(&mut self, to: impl Fn(Site) -> bool) {
        self.links.retain(|_, link| !to(link.peer));
    }

    /// Gives everybody time to be heard of.
    pub(super) fn count_anew(&mut self) {
        self.links.values_mut().for_each(|link| link.silent = 0);
    }

    /// Those that have not been heard of for so many rounds.
    pub(super) fn silent_for(&self, rounds: u32) -> Vec<Site> {
        self.links.values().filter(|link| link.silent >= rounds).map(|link| link.peer).collect()
    }
}
