//! One process under family-based logging.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::{Body, Bug, Counters, Determinant, Determinants, Event, Message, Options, Outbox, Output, Packet, Phase};
use super::{Process, Receipt, Sii};
use crate::protocols::process::Effect;
use crate::protocols::writes::Writes;

type Action = super::Action<Packet>;

const RETRANSMIT: u64 = 0;
/// Microseconds between retransmissions.
const RETRANSMIT_EVERY: u64 = 4_000;

/// What a checkpoint holds.
#[derive(Clone, Debug, Hash)]
struct Saved {
    process: Process,
    outbox: Outbox,
    depinfo: Determinants,
    outputs: VecDeque<(Output, BTreeSet<Receipt>)>,
    incarnation: u32,
}

/// `state` (Elnozahy, §3.2), with what belongs to it.
#[derive(Clone, Debug, Hash)]
enum State {
    Live,
    /// Until the leader has sent what it gathered. If this is the leader, what it has.
    Recovering(Option<Lead>),
    /// Replaying what was gathered; messages by sender and number.
    Replaying(BTreeMap<(usize, u64), Message>),
}

#[derive(Clone, Debug, Hash)]
struct Lead {
    attempt: u64,
    /// `R`.
    recovering: BTreeSet<usize>,
    answered: BTreeSet<usize>,
    gathered: Determinants,
}

/// A process, what it sent, and what receipt orders it knows of.
#[derive(Clone, Debug, Hash)]
pub struct Unit {
    options: Options,
    units: usize,
    /// Stable storage: the checkpoint, and the incarnation.
    disk: Saved,
    writes: Writes<Saved>,
    process: Process,
    outbox: Outbox,
    depinfo: Determinants,
    /// What was sent along with a message, until it is acknowledged.
    sent_with: BTreeMap<(usize, u64), Vec<Receipt>>,
    /// Output and what it waits for.
    outputs: VecDeque<(Output, BTreeSet<Receipt>)>,
    incarnation: u32,
    incvector: Vec<u32>,
    state: State,
    /// In the blocking variant: asked by a leader, until these are live.
    blocked_by: BTreeSet<usize>,
    /// The registrar knows that this process has what it needs to replay.
    registered: bool,
    attempts: u64,
    shown: u64,
    since_checkpoint: u64,
    counters: Counters,
}

impl Unit {
    pub(super) fn new(process: Process, options: Options) -> Self {
        let outbox = Outbox::new(process.sent.len());
        let depinfo = Determinants::new();
        Self::restored(options, Saved { process, outbox, depinfo, outputs: VecDeque::new(), incarnation: 0 })
    }

    fn restored(options: Options, disk: Saved) -> Self {
        let units = disk.process.sent.len();
        Self {
            options,
            units,
            writes: Writes::new(),
            process: disk.process.clone(),
            outbox: disk.outbox.clone(),
            depinfo: disk.depinfo.clone(),
            sent_with: BTreeMap::new(),
            outputs: disk.outputs.clone(),
            incarnation: disk.incarnation,
            incvector: vec![0; units + 1],
            state: State::Live,
            blocked_by: BTreeSet::new(),
            registered: true,
            attempts: 0,
            shown: 0,
            since_checkpoint: 0,
            counters: Counters::default(),
            disk,
        }
    }

    pub(super) fn crash(&mut self) {
        if self.options.bug != Some(Bug::IncarnationFromCheckpoint) {
            self.disk.incarnation = self.incarnation + 1;
        }
        *self = Self::restored(self.options, self.disk.clone());
        if self.options.bug == Some(Bug::IncarnationFromCheckpoint) {
            self.incarnation += 1;
        }
        let id = self.id();
        self.incvector[id] = self.incarnation;
        self.state = State::Recovering(None);
        self.registered = false;
    }

    fn id(&self) -> usize {
        self.process.id
    }

    fn registrar(&self) -> usize {
        self.units
    }

    fn others(&self) -> impl Iterator<Item = usize> + use<> {
        let id = self.id();
        (0..self.units).filter(move |&other| other != id)
    }

    fn send(&self, to: usize, body: Body, actions: &mut Vec<Action>) {
        actions.push(Action::Send { to, packet: Packet { incarnation: self.incarnation, body } });
    }

    /// Whether a determinant is safe from `f` failures.
    fn enough(&self, holders: u64) -> bool {
        holders >> self.registrar() & 1 == 1 || holders.count_ones() as usize > self.options.failures
    }

    fn stores(&self) -> bool {
        self.options.failures >= self.units
    }

    /// What is not yet held by enough.
    fn loose(&self) -> Determinants {
        self.depinfo.iter().filter(|(_, d)| !self.enough(d.holders)).map(|(&receipt, &d)| (receipt, d)).collect()
    }

    pub(super) fn step(&mut self, event: Event<Packet>, actions: &mut Vec<Action>) {
        match event {
            Event::Start => {
                actions.push(Action::Timer { timer: RETRANSMIT, after: RETRANSMIT_EVERY });
                let effects = self.process.start();
                self.carry_out(effects, actions);
            }
            Event::Restarted { shown } => {
                self.shown = shown;
                self.outputs.retain(|(output, _)| output.number >= shown);
                actions.push(Action::Timer { timer: RETRANSMIT, after: RETRANSMIT_EVERY });
                self.send(self.registrar(), Body::Register, actions);
            }
            Event::Timer(_) => {
                actions.push(Action::Timer { timer: RETRANSMIT, after: RETRANSMIT_EVERY });
                self.again(actions);
            }
            Event::Packet { from, packet } => {
                // "A receiver rejects any message that originates from a previous incarnation" (§3.2).
                if packet.incarnation < self.incvector[from] && self.options.bug != Some(Bug::AcceptStale) {
                    return;
                }
                self.know_incarnation(from, packet.incarnation);
                self.body(from, packet, actions);
                self.release(actions);
            }
            Event::Written(token) => {
                if let Some(saved) = self.writes.done(token) {
                    let sii = saved.process.sii();
                    self.forget(self.id(), sii);
                    for other in self.others().chain([self.registrar()]) {
                        let received = saved.process.received.get(other).copied().unwrap_or(0);
                        self.send(other, Body::Checkpointed(sii, received), actions);
                    }
                    self.release(actions);
                }
            }
            Event::Down(_) => {}
        }
    }

    /// A process has failed since it was last heard of: what it said that it received may be lost.
    fn know_incarnation(&mut self, of: usize, incarnation: u32) {
        if incarnation > self.incvector[of] {
            self.incvector[of] = incarnation;
            if of < self.units && of != self.id() {
                self.outbox.received_only(of, 0);
            }
        }
    }

    fn know_incarnations(&mut self, incvector: Vec<u32>) {
        incvector.into_iter().enumerate().for_each(|(of, incarnation)| self.know_incarnation(of, incarnation));
    }

    fn again(&mut self, actions: &mut Vec<Action>) {
        match &self.state {
            State::Recovering(_) => {
                self.send(self.registrar(), Body::Register, actions);
                return;
            }
            State::Replaying(_) => {
                self.ask_for_messages(actions);
                self.say_gathered(actions);
            }
            // Whom the others waited for may have said that it is live when we did not hear it.
            State::Live if !self.blocked_by.is_empty() => {
                self.blocked_by.iter().for_each(|&other| self.send(other, Body::Register, actions));
            }
            State::Live => self.say_gathered(actions),
        }
        for message in self.outbox.unreceived().cloned().collect::<Vec<_>>() {
            self.transmit(message, actions);
        }
        let loose = self.loose();
        if !loose.is_empty() && !self.outputs.is_empty() {
            self.others().for_each(|other| self.send(other, Body::Hold(loose.clone()), actions));
        }
        if !loose.is_empty() && self.stores() {
            self.send(self.registrar(), Body::Hold(loose), actions);
        }
    }

    /// Gives the lead away. The next leader may have what this process needs for its replay, so the lead
    /// ends with the gathering and not with the recovery.
    fn say_gathered(&self, actions: &mut Vec<Action>) {
        if !self.registered {
            self.send(self.registrar(), Body::Live, actions);
        }
    }

    fn body(&mut self, from: usize, packet: Packet, actions: &mut Vec<Action>) {
        match packet.body {
            Body::Message(message, determinants) => self.message(message, determinants, actions),
            Body::Received(ssn) => {
                self.outbox.received(from, ssn);
                let keys: Vec<_> = self.sent_with.range((from, 0)..=(from, ssn)).map(|(&key, _)| key).collect();
                for key in keys {
                    let receipts = self.sent_with.remove(&key).expect("it is there");
                    self.held_by(from, receipts);
                }
            }
            Body::Hold(determinants) => {
                let held = determinants.keys().copied().collect();
                self.learn(determinants);
                self.send(from, Body::Held(held), actions);
            }
            Body::Held(receipts) => self.held_by(from, receipts),
            Body::Checkpointed(sii, received) => {
                self.outbox.safe(from, received);
                self.forget(from, sii);
            }
            Body::Recovering(list) => self.lead(list, actions),
            Body::Ask(attempt, incvector) => {
                // "Each live process sends a reply containing its depinfo and updates its incvector" (§3.3).
                self.know_incarnations(incvector);
                if self.options.blocking && matches!(self.state, State::Live) {
                    self.blocked_by.insert(from);
                }
                let restored = matches!(self.state, State::Recovering(_));
                let nothing = restored && self.options.bug == Some(Bug::OnlyLiveAnswer);
                let depinfo = if nothing { Determinants::new() } else { self.depinfo.clone() };
                self.send(from, Body::Answer(attempt, depinfo), actions);
            }
            Body::Answer(attempt, determinants) => {
                if let State::Recovering(Some(lead)) = &mut self.state
                    && lead.attempt == attempt
                {
                    lead.answered.insert(from);
                    merge(&mut lead.gathered, determinants);
                    self.maybe_gathered(actions);
                }
            }
            Body::Gathered(determinants, incvector) => {
                if matches!(self.state, State::Recovering(_)) && incvector[self.id()] == self.incarnation {
                    self.replay(determinants, incvector, actions);
                }
            }
            Body::Replaying(received) => {
                self.outbox.received_only(from, received);
                for message in self.outbox.unreceived_by(from).cloned().collect::<Vec<_>>() {
                    self.transmit(message, actions);
                }
            }
            Body::Live if from == self.registrar() => self.registered = true,
            Body::Live => {
                self.blocked_by.remove(&from);
            }
            Body::Register if matches!(self.state, State::Live) => self.send(from, Body::Live, actions),
            Body::Register => {}
        }
    }

    fn message(&mut self, message: Message, determinants: Determinants, actions: &mut Vec<Action>) {
        let from = message.from;
        match &mut self.state {
            State::Recovering(_) => return,
            State::Replaying(pool) => {
                if !self.process.is_duplicate(&message) {
                    pool.insert((from, message.ssn), message);
                }
                self.learn(determinants);
                self.replay_on(actions);
                return;
            }
            State::Live if !self.blocked_by.is_empty() => return,
            State::Live => {}
        }
        if self.process.is_next(&message) {
            self.learn(determinants);
            self.receive(&message, actions);
        } else if self.process.is_duplicate(&message) {
            self.learn(determinants);
        }
        self.send(from, Body::Received(self.process.received[from]), actions);
    }

    fn receive(&mut self, message: &Message, actions: &mut Vec<Action>) {
        let effects = self.process.receive(message);
        let receipt = Receipt { unit: self.id(), sii: self.process.sii() };
        let holders = 1 << self.id();
        self.depinfo.entry(receipt).or_insert(Determinant { from: message.from, ssn: message.ssn, holders }).holders |=
            holders;
        self.since_checkpoint += 1;
        self.carry_out(effects, actions);
        let due = self.options.checkpoint_every > 0 && self.since_checkpoint >= self.options.checkpoint_every;
        if due && matches!(self.state, State::Live) {
            self.since_checkpoint = 0;
            let saved = Saved {
                process: self.process.clone(),
                outbox: self.outbox.clone(),
                depinfo: self.depinfo.clone(),
                outputs: self.outputs.clone(),
                incarnation: self.incarnation,
            };
            let bytes = saved.process.checkpoint_bytes() + saved.outbox.bytes();
            self.writes.begin(saved, bytes, actions);
        }
    }

    /// Takes over determinants, as one that holds them now.
    fn learn(&mut self, determinants: Determinants) {
        let me = 1 << self.id();
        let mut determinants = determinants;
        determinants.values_mut().for_each(|determinant| determinant.holders |= me);
        merge(&mut self.depinfo, determinants);
    }

    fn held_by(&mut self, node: usize, receipts: Vec<Receipt>) {
        for receipt in receipts {
            if let Some(determinant) = self.depinfo.get_mut(&receipt) {
                determinant.holders |= 1 << node;
            }
        }
    }

    /// A checkpointed process needs no receipt orders from before.
    fn forget(&mut self, unit: usize, sii: Sii) {
        self.depinfo.retain(|receipt, _| receipt.unit != unit || receipt.sii > sii);
    }

    fn carry_out(&mut self, effects: Vec<Effect>, actions: &mut Vec<Action>) {
        for effect in effects {
            match effect {
                Effect::Send(message) => {
                    self.outbox.keep(message.clone());
                    self.transmit(message, actions);
                }
                Effect::Show(output) if output.number < self.shown => {}
                Effect::Show(output) => {
                    let waits_for = self.loose().into_keys().collect();
                    self.counters.held += 1;
                    self.outputs.push_back((output, waits_for));
                    let loose = self.loose();
                    self.others().for_each(|other| self.send(other, Body::Hold(loose.clone()), actions));
                    if self.stores() {
                        self.send(self.registrar(), Body::Hold(loose), actions);
                    }
                }
            }
        }
        self.release(actions);
    }

    /// Sends a message with all determinants that are not held by enough. "Propagation of the receipt
    /// order of a certain message stops as soon as it has been recorded in f+1 hosts" (§2.1).
    fn transmit(&mut self, message: Message, actions: &mut Vec<Action>) {
        let loose = if self.options.bug == Some(Bug::NoPiggyback) { Determinants::new() } else { self.loose() };
        let with = if loose.is_empty() { &mut self.counters.sent_free } else { &mut self.counters.sent_piggybacked };
        *with += 1;
        // Only what goes with every copy of the message is known to have arrived with it.
        let receipts: Vec<Receipt> = loose.keys().copied().collect();
        let with = self.sent_with.entry((message.to, message.ssn)).or_insert_with(|| receipts.clone());
        with.retain(|receipt| receipts.contains(receipt));
        self.send(message.to, Body::Message(message, loose), actions);
    }

    fn release(&mut self, actions: &mut Vec<Action>) {
        if !matches!(self.state, State::Live) {
            return;
        }
        let loose = self.loose();
        let at_once = self.options.bug == Some(Bug::OutputAtOnce);
        while let Some((output, waits_for)) = self.outputs.front() {
            if !at_once && waits_for.iter().any(|receipt| loose.contains_key(receipt)) {
                return;
            }
            if output.number >= self.shown {
                self.shown = output.number + 1;
                actions.push(Action::Show(output.clone()));
            }
            self.outputs.pop_front();
        }
    }

    /// The list of recovering processes: whoever has the lowest ordinal leads (§3.3).
    fn lead(&mut self, list: Vec<(u64, usize, u32)>, actions: &mut Vec<Action>) {
        if !matches!(self.state, State::Recovering(_)) {
            return;
        }
        // Step 4, with the incarnations that they registered.
        for &(_, unit, incarnation) in &list {
            self.know_incarnation(unit, incarnation);
        }
        let State::Recovering(lead) = &mut self.state else { return };
        if list.first().is_none_or(|&(_, unit, _)| unit != self.process.id) {
            *lead = None;
            return;
        }
        let recovering: BTreeSet<usize> = list.iter().map(|&(_, unit, _)| unit).collect();
        // Step 5: "if q failed then goto 4".
        let restart = match lead {
            None => true,
            Some(lead) => recovering.difference(&lead.recovering).any(|unit| !lead.answered.contains(unit)),
        };
        if restart {
            self.attempts += 1;
            let attempt = u64::from(self.incarnation) << 32 | self.attempts;
            let gathered = match self.options.bug {
                Some(Bug::OnlyLiveAnswer) => Determinants::new(),
                _ => self.depinfo.clone(),
            };
            *lead = Some(Lead { attempt, recovering, answered: BTreeSet::new(), gathered });
        }
        let State::Recovering(Some(lead)) = &self.state else { return };
        for node in self.unanswered(lead) {
            self.send(node, Body::Ask(lead.attempt, self.incvector.clone()), actions);
        }
        self.maybe_gathered(actions);
    }

    /// `L` and `R` but for the leader, and stable storage.
    fn unanswered(&self, lead: &Lead) -> Vec<usize> {
        let printed = self.options.bug == Some(Bug::OnlyLiveAnswer);
        let asked = self.others().filter(|other| !printed || !lead.recovering.contains(other));
        let asked = asked.chain(self.stores().then_some(self.registrar()));
        asked.filter(|node| !lead.answered.contains(node)).collect()
    }

    fn maybe_gathered(&mut self, actions: &mut Vec<Action>) {
        let State::Recovering(Some(lead)) = &self.state else { return };
        if self.unanswered(lead).len() > usize::from(self.options.bug == Some(Bug::MissOneReply)) {
            return;
        }
        let (gathered, recovering) = (lead.gathered.clone(), lead.recovering.clone());
        let incvector = self.incvector[..self.units].to_vec();
        for other in recovering.into_iter().filter(|&unit| unit != self.id()) {
            self.send(other, Body::Gathered(gathered.clone(), incvector.clone()), actions);
        }
        self.replay(gathered, incvector, actions);
    }

    fn replay(&mut self, determinants: Determinants, incvector: Vec<u32>, actions: &mut Vec<Action>) {
        self.know_incarnations(incvector);
        self.state = State::Replaying(BTreeMap::new());
        self.learn(determinants);
        let effects = self.process.start();
        self.carry_out(effects, actions);
        self.say_gathered(actions);
        self.ask_for_messages(actions);
        self.replay_on(actions);
    }

    fn ask_for_messages(&self, actions: &mut Vec<Action>) {
        self.others().for_each(|other| self.send(other, Body::Replaying(self.process.received[other]), actions));
    }

    /// Receives again, in the order that is known; the last one of it ends the recovery.
    fn replay_on(&mut self, actions: &mut Vec<Action>) {
        loop {
            let next = Receipt { unit: self.id(), sii: self.process.sii() + 1 };
            let State::Replaying(pool) = &mut self.state else { return };
            match self.depinfo.get(&next) {
                None => break,
                Some(determinant) => match pool.remove(&(determinant.from, determinant.ssn)) {
                    None => return,
                    Some(message) => self.receive(&message, actions),
                },
            }
        }
        // Determinants go with what depends on them, so none is missing below one that is known.
        let last = self.depinfo.range(..=Receipt { unit: self.id(), sii: Sii::MAX }).next_back();
        if last.is_some_and(|(receipt, _)| receipt.unit == self.id() && receipt.sii > self.process.sii()) {
            actions.push(Action::Unrecoverable);
        }
        self.state = State::Live;
        self.release(actions);
        for other in self.others() {
            self.send(other, Body::Live, actions);
            self.send(other, Body::Received(self.process.received[other]), actions);
        }
    }

    pub(super) fn persist(&mut self, token: u64) {
        if let Some(saved) = self.writes.get(token) {
            self.disk = Saved { incarnation: self.disk.incarnation.max(saved.incarnation), ..saved.clone() };
        }
    }

    pub(super) fn process(&self) -> &Process {
        &self.process
    }

    pub(super) fn phase(&self) -> Phase {
        if matches!(self.state, State::Live) { Phase::Live } else { Phase::Recovering }
    }

    pub(super) fn blocked(&self) -> bool {
        !self.blocked_by.is_empty() || self.phase() == Phase::Recovering
    }

    pub(super) fn counters(&self) -> Counters {
        Counters { log_bytes: self.outbox.bytes(), log_messages: self.outbox.len() as u64, ..self.counters }
    }
}

/// Joins what two know. Where they differ about a receipt, one is of a history that is gone; the newer
/// message number of the same sender, or else what was known last, is of the present one.
fn merge(known: &mut Determinants, more: Determinants) {
    for (receipt, determinant) in more {
        let entry = known.entry(receipt).or_insert(determinant);
        if (entry.from, entry.ssn) == (determinant.from, determinant.ssn) {
            entry.holders |= determinant.holders;
        } else {
            *entry = determinant;
        }
    }
}
