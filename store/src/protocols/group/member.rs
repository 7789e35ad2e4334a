//! A site with its member of the group.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::app::{Entry, Replica, choose};
use super::causal::Causal;
use super::cuts::Cuts;
use super::link::Links;
use super::ordered::Ordered;
use super::views::Views;
use super::{
    Broadcast, Bug, Counters, Cut, Event, Frame, Id, Kind, LABELS, Options, Packet, Payload, Primitive, Site, State,
};
use crate::protocols::process::Workload;
use crate::protocols::rng::scatter;

type Action = super::Action<Packet>;

const ROUND: u64 = 0;
/// Microseconds between retransmissions and signs of life.
const ROUND_EVERY: u64 = 4_000;
/// Rounds without a sign of life after which a site is taken for failed.
const SILENT_ROUNDS: u32 = 40;

/// Something that the process wants broadcast when that is possible.
#[derive(Clone, Copy, Debug, Hash)]
enum Wish {
    Cbcast(Payload),
    Abcast(u8, Payload),
    Gbcast,
}

/// One site.
#[derive(Clone, Debug, Hash)]
pub struct Member {
    pub(super) me: Site,
    pub(super) options: Options,
    workload: Workload,
    pub(super) links: Links,
    pub(super) views: Views,
    pub(super) views_changed: bool,
    pub(super) causal: Causal,
    pub(super) ordered: Ordered,
    pub(super) cuts: Cuts,
    /// `None` until the group's state has been transferred.
    pub(super) replica: Option<Replica>,
    /// Deliveries that wait for that.
    delayed: Vec<Entry>,
    /// The states that members were joined at, until they have them; and to whom this site sent one.
    snapshots: BTreeMap<Site, State>,
    state_sent: BTreeSet<Site>,
    pub(super) attempts: u64,
    /// Rounds of the timer since ids were last collected.
    pub(super) rounds: u32,
    /// Frames to itself.
    local: VecDeque<Frame>,
    out: Vec<Action>,
    wishes: VecDeque<Wish>,
    /// Broadcasts that the process will make of its own accord.
    left: u32,
    dead: bool,
    counters: Counters,
    /// CBCASTs that had been delivered here when something was last shown.
    told: BTreeMap<Site, u64>,
}

impl Member {
    pub(super) fn created(node: usize, workload: Workload, options: Options) -> Self {
        let mut member = Self::recovering(Site { node, incarnation: 0 }, workload, options);
        member.views = Views::created(workload.units);
        member.replica = Some(Replica::created(member.views.current()));
        member.left = match options.only {
            Some(_) if node > 0 => 0,
            _ => workload.first,
        };
        member
    }

    fn recovering(me: Site, workload: Workload, options: Options) -> Self {
        Self {
            me,
            options,
            workload,
            links: Links::new(me),
            views: Views::default(),
            views_changed: false,
            causal: Causal::default(),
            ordered: Ordered::default(),
            cuts: Cuts::default(),
            replica: None,
            delayed: Vec::new(),
            snapshots: BTreeMap::new(),
            state_sent: BTreeSet::new(),
            attempts: 0,
            rounds: 0,
            local: VecDeque::new(),
            out: Vec::new(),
            wishes: VecDeque::new(),
            left: 1,
            dead: false,
            counters: Counters::default(),
            told: BTreeMap::new(),
        }
    }

    /// "A site incarnation number is incremented each time a site recovers" (§4.1).
    pub(super) fn fail(&mut self) {
        let me = Site { incarnation: self.me.incarnation + 1, ..self.me };
        *self = Self::recovering(me, self.workload, self.options);
    }

    /// The group's state here, if it is known.
    pub fn replica(&self) -> Option<&Replica> {
        self.replica.as_ref()
    }

    /// Which site this is.
    pub fn site(&self) -> Site {
        self.me
    }

    /// Whether it is in a view without that site, which it knows to be committed.
    pub fn has_excluded(&self, site: Site) -> bool {
        self.views.has_excluded(site)
    }

    pub(super) fn is_out(&self, site: Site) -> bool {
        self.views.failed(site)
    }

    /// The oldest operational site: it manages views and coordinates GBCASTs.
    pub(super) fn oldest(&self) -> Option<Site> {
        self.views.operational().first().copied()
    }

    /// Forced to undergo recovery (§4.2).
    pub(super) fn die(&mut self) {
        if !self.dead {
            self.dead = true;
            self.out.push(Action::Restart(self.me.node));
        }
    }

    pub(super) fn send(&mut self, to: Site, frame: Frame) {
        if to == self.me {
            self.local.push_back(frame);
        } else if !self.is_out(to) {
            self.links.send(to, frame, &mut self.out);
        }
    }

    pub(super) fn happen(&mut self, event: Event<Packet>, actions: &mut Vec<Action>) {
        if !self.dead {
            match event {
                Event::Start | Event::Restarted { .. } => self.next_round(),
                Event::Timer(_) => {
                    self.round();
                    self.next_round();
                }
                Event::Packet { packet, .. } => self.packet(packet),
                Event::Down(node) => self.is_down(node),
                Event::Written(_) => {}
            }
            self.settle();
        }
        actions.append(&mut self.out);
    }

    fn next_round(&mut self) {
        self.out.push(Action::Timer { timer: ROUND, after: ROUND_EVERY });
        // Until it is in a committed view: who has proposed to take it in may fail.
        if !self.views.current().contains(&self.me) {
            for to in (0..self.workload.units).filter(|&to| to != self.me.node) {
                self.out.push(Action::Send { to, packet: Packet::TakeIn { from: self.me } });
            }
        }
    }

    fn round(&mut self) {
        let peers = match self.views.changes.is_empty() {
            true => self.links.peers(),
            false => self
                .views
                .current()
                .into_iter()
                .chain(self.views.proposed())
                .collect::<BTreeSet<_>>()
                .into_iter()
                .collect(),
        };
        let peers: Vec<Site> = peers.into_iter().filter(|&site| !self.is_out(site)).collect();
        self.links.again(&peers, &mut self.out);
        // When the network falls apart not all fall silent in the same round, nor are all heard again in the
        // same round when it is whole.
        if self.may_go_on_without(&self.links.silent_for(SILENT_ROUNDS / 2)) {
            self.links.silent_for(SILENT_ROUNDS).into_iter().for_each(|site| self.suspect(site));
        } else {
            self.links.count_anew();
        }
        if self.options.wrong_suspicion > 0 && self.me == (Site { node: 0, incarnation: 0 }) {
            self.options.wrong_suspicion -= 1;
            if self.options.wrong_suspicion == 0 {
                self.suspect(Site { node: 1, incarnation: 0 });
            }
        }
        if self.replica.is_some() && self.left > 0 {
            self.left -= 1;
            let Site { node, incarnation } = self.me;
            let own = (node as u64) << 48 | u64::from(incarnation) << 32 | u64::from(self.left);
            let choice = scatter(self.workload.seed ^ scatter(own));
            self.wish(choice, self.workload.hops);
        }
        self.causal_round();
        self.hand_over_stranded();
        self.ask_for_cuts();
    }

    fn wish(&mut self, choice: u64, hops: u32) {
        let label = (choice >> 8) as u8 % LABELS;
        let asks = choice >> 16 & 1023 < u64::from(self.workload.outputs);
        let wish = match (self.options.only, choice % 8) {
            (Some(Primitive::Cbcast), _) if asks => Wish::Cbcast(Payload::Request),
            (None, 0..=3) if asks && choice >> 26 & 3 == 3 => Wish::Cbcast(Payload::Request),
            (Some(Primitive::Cbcast), _) | (None, 0..=3) => Wish::Cbcast(Payload::Work(hops)),
            (Some(Primitive::Gbcast), _) | (None, 7) => Wish::Gbcast,
            _ if asks => Wish::Abcast(0, Payload::Request),
            _ => Wish::Abcast(label, Payload::Work(hops)),
        };
        self.wishes.push_back(wish);
    }

    fn packet(&mut self, packet: Packet) {
        let from = match &packet {
            Packet::Data { from, .. } | Packet::Acknowledged { from, .. } => *from,
            Packet::Hello { from } | Packet::TakeIn { from } => *from,
            Packet::Dead { to } => {
                if *to == self.me {
                    self.die();
                }
                return;
            }
        };
        if self.is_out(from) && self.options.bug != Some(Bug::AcceptDead) {
            self.out.push(Action::Send { to: from.node, packet: Packet::Dead { to: from } });
            return;
        }
        let known = self.views.changes.is_empty()
            || self.views.proposed().contains(&from)
            || self.options.bug == Some(Bug::AcceptDead);
        match packet {
            Packet::TakeIn { from } => self.wants_in(from),
            _ if !known || self.links.is_old(from) => {}
            Packet::Data { from, to, number, frame } if to == self.me => {
                let (frames, acknowledgement) = self.links.arrived(from, number, frame);
                for frame in frames {
                    self.frame(from, frame);
                }
                self.out.push(Action::Send { to: from.node, packet: acknowledgement });
            }
            Packet::Acknowledged { from, to, below } if to == self.me => {
                for frame in self.links.acknowledged(from, below) {
                    match frame {
                        Frame::Causal { message, .. } => self.causal_sent(message.id, from),
                        Frame::Final { id, .. } => self.final_sent(id, from),
                        Frame::Before { cut, .. } => self.before_sent(cut, from),
                        _ => {}
                    }
                }
            }
            Packet::Hello { from } => self.links.heard(from),
            _ => {}
        }
    }

    /// What concerns an incarnation of this site that is over; what only says that frames have arrived whose
    /// arrival nobody waits for. (Who is answered that it is dead is.)
    pub(super) fn is_unmoved_by(&self, packet: &Packet) -> bool {
        match packet {
            Packet::Data { to, .. } | Packet::Acknowledged { to, .. } | Packet::Dead { to } if *to != self.me => true,
            Packet::Acknowledged { from, below, .. } => {
                let waited_for =
                    |frame: &Frame| matches!(frame, Frame::Causal { .. } | Frame::Final { .. } | Frame::Before { .. });
                self.knows(*from) && self.links.outstanding(*from, *below).is_some_and(|mut of| !of.any(waited_for))
            }
            Packet::Hello { from } => !self.is_out(*from),
            _ => false,
        }
    }

    /// What comes from there is heeded.
    fn knows(&self, site: Site) -> bool {
        let known = self.views.changes.is_empty() || self.views.proposed().contains(&site);
        known && !self.is_out(site)
    }

    fn frame(&mut self, from: Site, frame: Frame) {
        match frame {
            Frame::Propose { changes, committed } => self.view_proposed(from, changes, committed),
            Frame::ViewAcknowledged { length, missing } => self.view_acknowledged(from, length, missing),
            Frame::Commit { changes } => self.view_committed(changes),
            Frame::Causal { message, remaining } => self.causal_arrived(from, message, remaining),
            Frame::Ordered { message, dests, attempt, anew } => {
                self.ordered_arrived(from, message, dests, attempt, anew);
            }
            Frame::Proposed { id, attempt, priority, is_final } => {
                self.priority_proposed(from, id, attempt, priority, is_final);
            }
            Frame::Final { id, priority } => self.priority_final(id, priority),
            Frame::Deliver { id } => self.may_deliver(id),
            Frame::Stranded { message, dests } => self.take_over(from, message, dests),
            Frame::Begin { cut, attempt } => self.cut_begun(from, cut, attempt),
            Frame::Flushed { cut, attempt } => self.cut_flushed(from, cut, attempt),
            Frame::Order { cut, attempt } => self.cut_ordered(from, cut, attempt),
            Frame::CutProposed { cut, attempt, priority, is_final } => {
                self.cut_proposed(from, cut, attempt, priority, is_final);
            }
            Frame::CutFinal { cut, attempt, priority } => self.cut_final(from, cut, attempt, priority),
            Frame::AtHead { cut, attempt, ids, done } => self.cut_at_head(from, cut, attempt, ids, done),
            Frame::Before { cut, ids } => self.cut_before(cut, ids),
            Frame::Over { cut } => self.cut_over(cut),
            Frame::Wanted { cut, queued } => self.cut_wanted(from, cut, queued),
            Frame::State(state) => self.state_arrived(*state),
            Frame::Disposable { ids, round } => self.disposable(from, ids, round),
            Frame::Disposed { round } => self.disposed(from, round),
        }
        self.deliver_ordered();
    }

    /// Does all that has become possible.
    fn settle(&mut self) {
        loop {
            if self.dead {
                return;
            }
            if let Some(frame) = self.local.pop_front() {
                self.frame(self.me, frame);
                continue;
            }
            if std::mem::take(&mut self.views_changed) {
                let views = &self.views;
                self.links.close(|site| views.failed(site));
                self.causal_views_changed();
                self.ordered_views_changed();
                self.cuts_views_changed();
                continue;
            }
            self.deliver_ordered();
            self.check_cuts();
            self.pay();
            self.manage_view();
            self.manage_group();
            self.transfer_states();
            self.do_requests();
            self.fulfil();
            if self.local.is_empty() && !self.views_changed {
                return;
            }
        }
    }

    /// Places something on the delivery queue, from which the process takes at once if it can.
    pub(super) fn deliver(&mut self, entry: Entry) {
        if self.replica.is_none() {
            self.delayed.push(entry);
            return;
        }
        let replica = self.replica.as_mut().expect("checked");
        replica.apply(entry.clone());
        match entry {
            Entry::Message(Broadcast { id, payload: Payload::Work(hops), .. })
                if hops > 0 && choose(&replica.members, id) == self.me =>
            {
                self.wish(scatter(super::app::digest_of(id)), hops - 1);
            }
            Entry::Message(Broadcast { payload: Payload::Transferred(site), .. }) | Entry::Cut(Cut::Failed(site)) => {
                self.snapshots.remove(&site);
            }
            Entry::Cut(Cut::Joined(site)) => {
                let cuts = self.ordered.pending_cuts();
                self.snapshots.insert(site, State { replica: replica.clone(), cuts });
                self.cuts_joined();
            }
            _ => {}
        }
    }

    /// The oldest member sends new ones the state that they were joined at; if it fails the next does
    /// (§3.7: "one then takes over").
    fn transfer_states(&mut self) {
        if self.oldest() == Some(self.me) {
            let to: Vec<Site> = self.snapshots.keys().filter(|site| !self.state_sent.contains(site)).copied().collect();
            for site in to {
                self.state_sent.insert(site);
                let state = Box::new(self.snapshots[&site].clone());
                self.send(site, Frame::State(state));
            }
        }
    }

    fn state_arrived(&mut self, state: State) {
        if self.replica.is_none() {
            self.replica = Some(state.replica);
            self.ordered.join(state.cuts);
            for entry in std::mem::take(&mut self.delayed) {
                self.deliver(entry);
            }
            self.wishes.push_back(Wish::Cbcast(Payload::Transferred(self.me)));
        }
    }

    /// Nothing new may be broadcast while the view is locked, or a GBCAST is being delivered.
    fn may_broadcast(&self) -> bool {
        self.replica.is_some() && !self.is_locked() && self.causal.waiting.is_none()
    }

    fn fulfil(&mut self) {
        while self.may_broadcast() {
            match self.wishes.pop_front() {
                Some(Wish::Cbcast(payload)) => self.cbcast(payload),
                Some(Wish::Abcast(label, payload)) => self.abcast(label, payload),
                Some(Wish::Gbcast) => self.gbcast(),
                None => return,
            }
        }
    }

    /// What this site is the coordinator for: flushes, shows, and replies with copies to the cohorts
    /// (ISIS, §6; CBCAST, §3.4: "a process that is about to take some action that may leave an
    /// externally visible side effect").
    fn do_requests(&mut self) {
        let Some(replica) = self.replica.as_ref().filter(|_| self.may_broadcast()) else { return };
        let mine: Vec<Id> = replica.requests.iter().filter(|(_, (by, _))| *by == self.me).map(|(&id, _)| id).collect();
        for id in mine {
            if !self.is_flushed() && self.options.bug != Some(Bug::OutputBeforeFlush) {
                self.counters.held += 1;
                self.transmit_all();
                return;
            }
            let replica = self.replica.as_ref().expect("checked");
            let (_, output) = replica.requests[&id].clone();
            self.told = replica.causal.clone();
            self.out.push(Action::Show(output));
            self.cbcast(Payload::Reply(id));
        }
    }

    /// How many CBCASTs of each site had been delivered here when something was last shown.
    pub fn told(&self) -> &BTreeMap<Site, u64> {
        &self.told
    }

    /// Why this member is not at rest; `None` when it is.
    pub fn unfinished(&self) -> Option<&'static str> {
        let Some(replica) = &self.replica else { return Some("has no state") };
        let own = |kinds: fn(Kind) -> bool| {
            let own = |entry: &&Entry| match entry {
                Entry::Message(message) => message.id.from == self.me && kinds(message.id.kind),
                Entry::Cut(Cut::Update(id)) => id.from == self.me && kinds(id.kind),
                Entry::Cut(_) => false,
            };
            replica.log.iter().filter(own).count() as u64
        };
        Some(match () {
            () if self.left > 0 || !self.wishes.is_empty() => "has something to broadcast",
            () if !replica.requests.is_empty() || !replica.early_replies.is_empty() => {
                "has requests that nobody has done"
            }
            () if !replica.joining.is_empty() || !self.snapshots.is_empty() => "has a member that lacks the state",
            () if !self.causal.copies.is_empty() => "has CBCASTs that it can't forget",
            () if !self.causal.over.is_empty() => "has ids that it can't forget",
            () if !self.ordered.is_idle() => "has ABCASTs under way",
            () if !self.cuts_idle() => "has GBCASTs under way",
            () if own(|kind| kind == Kind::Causal) != self.causal_count() => "misses one of its own CBCASTs",
            () if own(|kind| matches!(kind, Kind::Ordered(_))) != self.ordered_count() => "misses an own ABCAST",
            () => return None,
        })
    }

    pub(super) fn figures(&self) -> Counters {
        let log_messages = self.causal.copies.len() as u64;
        Counters { log_messages, log_bytes: 100 * log_messages, ..self.counters }
    }
}
