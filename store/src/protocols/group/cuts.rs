//! GBCAST (CBCAST, §4.3.3).

use std::collections::{BTreeMap, BTreeSet};

use super::ordered::QueuedCut;
use super::{Broadcast, Bug, Cut, Entry, Frame, Id, Kind, Member, Priority, Site};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Part {
    /// Part 1; also locks the view for a join.
    Flushing,
    /// Part 2, until all have given a priority.
    Ordering,
    /// Part 3, until it is at the head of all queues of all.
    Heading,
    /// Part 4, until all have it.
    Closing,
}

/// The coordinator's state of one GBCAST.
#[derive(Clone, Debug, Hash)]
struct Run {
    part: Part,
    attempt: u64,
    waiting: BTreeSet<Site>,
    highest: Priority,
    found: Option<Priority>,
    /// A final priority that was found may be raised: a member has joined that it was not ordered by.
    anew: bool,
    before: BTreeSet<Id>,
    /// A list that has been used already.
    used: Option<BTreeSet<Id>>,
}

/// GBCASTs here.
#[derive(Clone, Debug, Default, Hash)]
pub(super) struct Cuts {
    runs: BTreeMap<Cut, Run>,
    /// Part 1, to be acknowledged when it is done.
    flushing: BTreeMap<Cut, (Site, u64)>,
    /// Who is being joined: nothing new is broadcast (§4.3.3, "locking process group views").
    locks: BTreeSet<Cut>,
    /// Delivered, with what was before, until everybody has.
    pub(super) done: BTreeMap<Cut, BTreeSet<Id>>,
    number: u64,
    /// This site's own, until they are delivered.
    pub(super) wanted: BTreeSet<Cut>,
}

impl Member {
    /// Sends a GBCAST that changes no view.
    pub(super) fn gbcast(&mut self) {
        self.cuts.number += 1;
        let id = Id { from: self.me, kind: Kind::Cut, number: self.cuts.number };
        self.cuts.wanted.insert(Cut::Update(id));
        self.ask_for_cuts();
    }

    pub(super) fn is_locked(&self) -> bool {
        !self.cuts.locks.is_empty() && self.options.bug != Some(Bug::NoLock)
    }

    /// Has the oldest site carry out what is wanted here or was left unfinished.
    pub(super) fn ask_for_cuts(&mut self) {
        let Some(oldest) = self.oldest() else { return };
        let wanted = self.cuts.wanted.iter().chain(self.ordered.cuts.keys()).chain(&self.cuts.locks);
        let wanted = wanted.chain(self.cuts.done.keys());
        let cuts: BTreeSet<Cut> = wanted.copied().collect();
        for cut in cuts {
            let queued = self.ordered.cuts.contains_key(&cut);
            self.send(oldest, Frame::Wanted { cut, queued });
        }
    }

    pub(super) fn cut_wanted(&mut self, from: Site, cut: Cut, queued: bool) {
        if self.oldest() != Some(self.me) {
            return;
        }
        if let Some(ids) = self.cuts.done.get(&cut).filter(|_| !self.cuts.runs.contains_key(&cut)) {
            self.send(from, Frame::Before { cut, ids: ids.clone() });
            return;
        }
        if self.was_delivered(cut) && !self.cuts.done.contains_key(&cut) {
            // An earlier coordinator has said here that everybody delivered it, but not there.
            self.send(from, Frame::Over { cut });
            return;
        }
        let joins = |cut: &Cut| matches!(cut, Cut::Joined(_));
        if self.is_joining() || self.was_delivered(cut) {
            // It is over, or has to wait.
        } else if queued && joins(&cut) {
            // An earlier coordinator was through with part 1: all are quiet and locked. Other GBCASTs wait
            // for this one where it is queued, so it must not wait for them.
            self.begin_at(cut, Part::Ordering);
        } else if !self.cuts.runs.keys().any(|run| *run == cut || joins(&cut) && joins(run)) {
            self.begin(cut);
        }
    }

    /// A member more: GBCASTs under way that will be delivered after it joined are for it, too. Nobody has
    /// delivered them, since no list has been sent.
    pub(super) fn cuts_joined(&mut self) {
        let again = self.cuts.runs.iter().filter(|(cut, run)| run.part < Part::Closing && !self.was_delivered(**cut));
        for cut in again.map(|(&cut, _)| cut).collect::<Vec<_>>() {
            self.cuts.runs.get_mut(&cut).expect("just listed").anew = self.options.bug != Some(Bug::KeepCutPriority);
            self.begin(cut);
        }
    }

    fn was_delivered(&self, cut: Cut) -> bool {
        self.replica.as_ref().is_some_and(|replica| replica.log.contains(&Entry::Cut(cut)))
    }

    /// A site is being joined and part 1 of that is over.
    fn is_joining(&self) -> bool {
        self.cuts.runs.iter().any(|(cut, run)| matches!(cut, Cut::Joined(_)) && run.part > Part::Flushing)
    }

    /// The oldest site brings the group view up to the site view.
    pub(super) fn manage_group(&mut self) {
        let Some(replica) = &self.replica else { return };
        if self.oldest() != Some(self.me) {
            return;
        }
        let (members, view) = (replica.members.clone(), self.views.current());
        let run_for = |member: &Member, cut: Cut| member.cuts.runs.contains_key(&cut);
        if !self.is_joining() {
            for &site in members.iter().filter(|site| !view.contains(site)) {
                if !run_for(self, Cut::Failed(site)) {
                    self.begin(Cut::Failed(site));
                }
            }
        }
        let next = view.iter().copied().find(|site| !members.contains(site) && !self.is_out(*site));
        if let Some(site) = next.filter(|_| self.cuts.runs.is_empty() && self.ordered.cuts.is_empty()) {
            self.begin(Cut::Joined(site));
        }
        // What an earlier coordinator may not have told everybody.
        let left: Vec<Cut> = self.cuts.done.keys().copied().filter(|cut| !run_for(self, *cut)).collect();
        for cut in left {
            self.close(cut, self.cuts.done[&cut].clone());
        }
    }

    fn participants(&self) -> BTreeSet<Site> {
        let members = self.replica.as_ref().map(|replica| replica.members.clone()).unwrap_or_default();
        members.into_iter().filter(|&site| !self.is_out(site)).collect()
    }

    fn begin(&mut self, cut: Cut) {
        let update = matches!(cut, Cut::Update(_));
        self.begin_at(cut, if update { Part::Ordering } else { Part::Flushing });
    }

    fn begin_at(&mut self, cut: Cut, part: Part) {
        self.attempts += 1;
        let attempt = self.attempts;
        let waiting = self.participants();
        let anew = self.cuts.runs.get(&cut).is_some_and(|run| run.anew);
        let (highest, found, before, used) = ((0, 0), None, BTreeSet::new(), None);
        self.cuts.runs.insert(cut, Run { part, attempt, waiting, highest, found, anew, before, used });
        let flush = part == Part::Flushing;
        let frame = if flush { Frame::Begin { cut, attempt } } else { Frame::Order { cut, attempt } };
        self.tell_participants(cut, frame);
    }

    fn tell_participants(&mut self, cut: Cut, frame: Frame) {
        for site in self.cuts.runs[&cut].waiting.clone() {
            self.send(site, frame.clone());
        }
    }

    /// Steps 1.1 and 1.2.
    pub(super) fn cut_begun(&mut self, from: Site, cut: Cut, attempt: u64) {
        self.cuts.flushing.insert(cut, (from, attempt));
        if matches!(cut, Cut::Joined(_)) && !self.was_delivered(cut) {
            self.cuts.locks.insert(cut);
        }
        self.transmit_all();
    }

    /// Steps 1.3 and 1.4: acknowledges part 1 where it is over.
    fn check_flushes(&mut self) {
        let over = |cut: &Cut| match *cut {
            _ if self.cuts.done.contains_key(cut) || self.was_delivered(*cut) => true,
            _ if self.options.bug == Some(Bug::NoFlush) => true,
            Cut::Failed(site) => {
                let from = self.causal.copies.values().filter(|copy| copy.message.id.from == site);
                let mut updates = self.ordered.cuts.keys();
                let update = updates.any(|other| matches!(other, Cut::Update(id) if id.from == site));
                from.into_iter().all(|copy| copy.remaining.is_empty()) && !self.has_stranded() && !update
            }
            Cut::Joined(_) => {
                let others = self.ordered.cuts.keys().chain(&self.cuts.wanted).any(|other| other != cut);
                self.is_flushed() && self.ordered.is_quiet() && !others
            }
            Cut::Update(_) => true,
        };
        let ready: Vec<Cut> = self.cuts.flushing.keys().copied().filter(over).collect();
        for cut in ready {
            let (to, attempt) = self.cuts.flushing.remove(&cut).expect("just listed");
            self.send(to, Frame::Flushed { cut, attempt });
        }
    }

    pub(super) fn cut_flushed(&mut self, from: Site, cut: Cut, attempt: u64) {
        if let Some(run) = self.run(cut, attempt, Part::Flushing) {
            run.waiting.remove(&from);
        }
    }

    fn run(&mut self, cut: Cut, attempt: u64, part: Part) -> Option<&mut Run> {
        self.cuts.runs.get_mut(&cut).filter(|run| run.attempt == attempt && run.part == part)
    }

    /// Steps 2.1 and 2.2.
    pub(super) fn cut_ordered(&mut self, from: Site, cut: Cut, attempt: u64) {
        if self.cuts.done.contains_key(&cut) || self.was_delivered(cut) {
            self.send(from, Frame::CutProposed { cut, attempt, priority: (0, 0), is_final: false });
            return;
        }
        if !self.ordered.cuts.contains_key(&cut) {
            let priority = self.ordered.propose(self.me.node);
            self.ordered.cuts.insert(cut, QueuedCut { priority, is_final: false, asked: None });
        }
        let QueuedCut { priority, is_final, .. } = self.ordered.cuts[&cut];
        self.send(from, Frame::CutProposed { cut, attempt, priority, is_final });
    }

    /// Step 2.3.
    pub(super) fn cut_proposed(&mut self, from: Site, cut: Cut, attempt: u64, priority: Priority, is_final: bool) {
        if let Some(run) = self.run(cut, attempt, Part::Ordering) {
            run.waiting.remove(&from);
            run.highest = run.highest.max(priority);
            if is_final && !run.anew {
                run.found = run.found.max(Some(priority));
            }
        }
    }

    pub(super) fn cut_final(&mut self, from: Site, cut: Cut, attempt: u64, priority: Priority) {
        self.ordered.see(priority);
        if let Some(ids) = self.cuts.done.get(&cut) {
            let ids = ids.clone();
            self.send(from, Frame::AtHead { cut, attempt, ids, done: true });
        } else if let Some(queued) = self.ordered.cuts.get_mut(&cut) {
            (queued.priority, queued.is_final) = (priority, true);
            queued.asked = Some((from, attempt));
        }
    }

    /// Steps 2.4, 3.2 and 3.3.
    fn check_heads(&mut self) {
        let Some(cut) = self.ordered.cut_at_heads().filter(|_| self.replica.is_some()) else { return };
        if self.options.bug == Some(Bug::NoBeforeList) {
            self.cut_before(cut, BTreeSet::new());
            return;
        }
        if self.causal.waiting.is_none() {
            self.causal.waiting = Some(Vec::new());
            self.transmit_all();
        }
        let Some((to, attempt)) = self.ordered.cuts[&cut].asked else { return };
        let waiting: BTreeSet<Id> = self.causal.waiting.iter().flatten().map(|message| message.id).collect();
        let delivered = self.causal.copies.values().filter(|copy| !waiting.contains(&copy.message.id));
        if delivered.clone().all(|copy| copy.remaining.is_empty()) {
            let ids = delivered.map(|copy| copy.message.id).collect();
            self.ordered.cuts.get_mut(&cut).expect("it is at the head").asked = None;
            self.send(to, Frame::AtHead { cut, attempt, ids, done: false });
        } else {
            self.transmit_all();
        }
    }

    /// Step 3.4.
    pub(super) fn cut_at_head(&mut self, from: Site, cut: Cut, attempt: u64, ids: BTreeSet<Id>, done: bool) {
        if let Some(run) = self.run(cut, attempt, Part::Heading) {
            run.waiting.remove(&from);
            if done {
                run.used = Some(ids);
            } else {
                run.before.extend(ids);
            }
        }
    }

    /// Goes on with GBCASTs whose part is over.
    fn check_runs(&mut self) {
        let ready: Vec<Cut> =
            self.cuts.runs.iter().filter(|(_, run)| run.waiting.is_empty()).map(|(&cut, _)| cut).collect();
        for cut in ready {
            let others = self.cuts.runs.keys().any(|other| !matches!(other, Cut::Joined(_)));
            let participants = self.participants();
            let run = self.cuts.runs.get_mut(&cut).expect("just listed");
            let attempt = run.attempt;
            let frame = match run.part {
                Part::Flushing if matches!(cut, Cut::Joined(_)) && others => continue,
                Part::Flushing => {
                    run.part = Part::Ordering;
                    Frame::Order { cut, attempt }
                }
                Part::Ordering => {
                    run.part = Part::Heading;
                    Frame::CutFinal { cut, attempt, priority: run.found.unwrap_or(run.highest) }
                }
                Part::Heading => {
                    let ids = run.used.clone().unwrap_or_else(|| run.before.clone());
                    self.close(cut, ids);
                    continue;
                }
                Part::Closing => {
                    self.cuts.runs.remove(&cut);
                    self.cut_over(cut);
                    for site in participants {
                        self.send(site, Frame::Over { cut });
                    }
                    continue;
                }
            };
            run.waiting = participants;
            self.tell_participants(cut, frame);
        }
    }

    fn close(&mut self, cut: Cut, ids: BTreeSet<Id>) {
        let waiting = self.participants();
        self.attempts += 1;
        let run = Run {
            part: Part::Closing,
            attempt: self.attempts,
            waiting,
            highest: (0, 0),
            found: None,
            anew: false,
            before: BTreeSet::new(),
            used: None,
        };
        self.cuts.runs.insert(cut, run);
        self.tell_participants(cut, Frame::Before { cut, ids });
    }

    /// The channel says that somebody has the list.
    pub(super) fn before_sent(&mut self, cut: Cut, to: Site) {
        if let Some(run) = self.cuts.runs.get_mut(&cut).filter(|run| run.part == Part::Closing) {
            run.waiting.remove(&to);
        }
    }

    /// Part 4.
    pub(super) fn cut_before(&mut self, cut: Cut, ids: BTreeSet<Id>) {
        if let Some(run) = self.cuts.runs.get_mut(&cut).filter(|run| run.part == Part::Closing) {
            run.waiting.remove(&self.me);
        }
        if self.ordered.cut_at_heads() != Some(cut) {
            return;
        }
        let waiting = self.causal.waiting.take().unwrap_or_default();
        let precedes = |message: &Broadcast, other: &Broadcast| {
            other.clabel.get(&message.id.from).is_some_and(|&number| number >= message.id.number)
                || other.id.from == message.id.from && other.id.number > message.id.number
        };
        let listed = |message: &Broadcast| {
            ids.contains(&message.id)
                || waiting.iter().any(|other| ids.contains(&other.id) && precedes(message, other))
                || matches!(cut, Cut::Failed(site) if message.id.from == site)
        };
        let (before, after): (Vec<_>, Vec<_>) = waiting.iter().cloned().partition(listed);
        before.into_iter().for_each(|message| self.deliver(Entry::Message(message)));
        self.ordered.cuts.remove(&cut);
        self.cuts.done.insert(cut, ids);
        self.cuts.wanted.remove(&cut);
        self.cuts.locks.remove(&cut);
        if let Cut::Joined(site) = cut {
            self.causal_joined(site, &after);
        }
        self.deliver(Entry::Cut(cut));
        after.into_iter().for_each(|message| self.deliver(Entry::Message(message)));
    }

    pub(super) fn cut_over(&mut self, cut: Cut) {
        self.cuts.done.remove(&cut);
        self.cuts.flushing.remove(&cut);
    }

    /// Somebody failed: part 1 is begun again, as what it had sent to one may not have reached others.
    pub(super) fn cuts_views_changed(&mut self) {
        let cuts: Vec<Cut> = self.cuts.runs.keys().copied().collect();
        for cut in cuts {
            let run = &self.cuts.runs[&cut];
            let out: Vec<Site> = run.waiting.iter().copied().filter(|&site| self.is_out(site)).collect();
            if run.part == Part::Flushing && !out.is_empty() {
                self.begin(cut);
            } else {
                let run = self.cuts.runs.get_mut(&cut).expect("just listed");
                run.waiting.retain(|site| !out.contains(site));
            }
        }
        // What a coordinator that is out of the view has begun, the next begins again. A lock stays until
        // then: the join may be under way elsewhere.
        let gone: Vec<Cut> =
            self.cuts.flushing.iter().filter(|(_, (by, _))| self.is_out(*by)).map(|(&cut, _)| cut).collect();
        for cut in gone {
            self.cuts.flushing.remove(&cut);
        }
    }

    pub(super) fn check_cuts(&mut self) {
        self.check_flushes();
        self.check_heads();
        self.check_runs();
    }

    pub(super) fn cuts_idle(&self) -> bool {
        self.cuts.runs.is_empty() && self.cuts.wanted.is_empty() && self.cuts.done.is_empty()
    }
}
