//! Recovery of a failed process (Johnson, §3.2.4), and of those that depend on what several failures
//! have lost (§3.5).

use std::collections::{BTreeMap, BTreeSet};

use super::storage::{Checkpoint, Record};
use super::unit::{Action, Unit};
use super::{Body, Bug, Extension, Message, Rsn, Sii};
use crate::protocols::process::Effect;

/// How far the recovery of a unit is.
#[derive(Clone, Debug, Hash)]
pub(super) enum Recovery {
    /// It has not failed.
    NotNeeded,
    /// It waits for the logs of all others.
    Gathering {
        /// These have answered.
        answers: BTreeMap<usize, Answer>,
        /// The process, and its life, because of which this one was rolled back.
        because_of: Option<(usize, u32)>,
    },
    /// It has been replayed.
    Replayed(Replayed),
}

/// What another process has logged, and knows.
#[derive(Clone, Debug, Hash)]
pub(super) struct Answer {
    /// Which life of the other process answers.
    life: u32,
    /// If that one has been replayed: up to which interval, and how many messages of ours it had received.
    replayed: Option<(Sii, u64)>,
    /// What it has fully logged, with the RSNs and the lives that these are from.
    messages: Vec<(u32, Rsn, Message)>,
    /// The interval of ours that it depends on.
    depends_on: Option<Sii>,
}

/// How a replay ended.
#[derive(Clone, Debug, Hash)]
pub(super) struct Replayed {
    /// In which interval.
    sii: Sii,
    /// With how many messages of each other process received.
    received: Vec<u64>,
    /// That is on stable storage, if it has to be.
    stored: bool,
    /// Who may not know.
    untold: BTreeSet<usize>,
    /// Who depended on later intervals. They are told, and have to be rolled back, one at a time.
    orphans: BTreeSet<usize>,
    /// As in [`Recovery::Gathering`].
    because_of: Option<(usize, u32)>,
}

impl Unit {
    /// Waiting for logs: "not allowed to receive any other messages" (§3.2.4).
    pub(super) fn is_gathering(&self) -> bool {
        matches!(self.recovery, Recovery::Gathering { .. })
    }

    /// Everybody knows how far the replay went.
    pub(super) fn has_told(&self) -> bool {
        match &self.recovery {
            Recovery::NotNeeded => true,
            Recovery::Gathering { .. } => false,
            Recovery::Replayed(replayed) => replayed.untold.is_empty(),
        }
    }

    pub(super) fn gather(&mut self, because_of: Option<(usize, u32)>, actions: &mut Vec<Action>) {
        self.recovery = Recovery::Gathering { answers: BTreeMap::new(), because_of };
        self.want_logs(actions);
        self.maybe_replay(actions);
    }

    pub(super) fn want_logs(&mut self, actions: &mut Vec<Action>) {
        let (life, sii) = (self.disk.life, self.process.sii());
        let Recovery::Gathering { answers, .. } = &self.recovery else { return };
        let silent: Vec<usize> = self.others().filter(|other| !answers.contains_key(other)).collect();
        silent.into_iter().for_each(|other| self.send(other, Body::WantLog { life, sii }, actions));
    }

    pub(super) fn give_log(&mut self, to: usize, life: u32, sii: Sii, actions: &mut Vec<Action>) {
        let replayed = match &self.recovery {
            Recovery::Replayed(replayed) if replayed.stored => Some((replayed.sii, replayed.received[to])),
            _ => None,
        };
        let messages = self.log.fully_logged(to, sii);
        let depends_on = self.process.depends_on.get(to);
        self.send(to, Body::Log { life, sii, messages, depends_on, replayed }, actions);
    }

    /// A log arrives, if `body` is one for this replay.
    pub(super) fn log_arrived(&mut self, from: usize, of_life: u32, body: Body, actions: &mut Vec<Action>) {
        let Body::Log { life, sii, messages, depends_on, replayed } = body else { return };
        if let Recovery::Gathering { answers, .. } = &mut self.recovery
            && (life, sii) == (self.disk.life, self.process.sii())
        {
            answers.insert(from, Answer { life: of_life, replayed, messages, depends_on });
            self.maybe_replay(actions);
        }
    }

    /// When all logs are in: replays the sequence of fully logged messages (§3.2.4).
    fn maybe_replay(&mut self, actions: &mut Vec<Action>) {
        let Recovery::Gathering { answers, because_of } = &self.recovery else { return };
        if answers.len() < self.others().count() {
            return;
        }
        let (answers, because_of) = (answers.clone(), *because_of);
        let usable = |checkpoint: &&Checkpoint| self.is_usable(checkpoint, &answers);
        let Some(checkpoint) = self.disk.checkpoints.iter().rev().find(usable).cloned() else {
            // "Recovery of a consistent system state using this method is not possible" (§3.5).
            actions.push(Action::Unrecoverable);
            return;
        };
        if checkpoint.process.sii() != self.process.sii() {
            // The logs from there on are needed.
            (self.process, self.log) = (checkpoint.process, checkpoint.log);
            self.gather(because_of, actions);
            return;
        }
        self.replay(&answers, checkpoint.outputs.into_iter().map(Effect::Show).collect(), actions);
        let sii = self.process.sii();
        let orphans: BTreeSet<usize> =
            answers.iter().filter(|(_, answer)| answer.depends_on > Some(sii)).map(|(&other, _)| other).collect();
        if !orphans.is_empty() && self.options.extension == Extension::None {
            // "Then the system cannot be recovered to a consistent state (Definition 2.4)" (§3.2.4).
            actions.push(Action::Unrecoverable);
        }
        let stored = self.options.extension == Extension::None;
        let (received, untold) = (self.process.received.clone(), self.others().collect());
        self.recovery = Recovery::Replayed(Replayed { sii, received, stored, untold, orphans, because_of });
        let partially = |to: usize| self.log.partially_logged(to).map(move |message| (to, message.ssn));
        self.unrestored = self.others().flat_map(partially).collect();
        if stored {
            self.say_replayed_to_all(actions);
        } else {
            self.write(Record::Replayed { from: checkpoint.process.sii(), to: sii }, 64, actions);
        }
    }

    /// Whether a checkpoint depends on nothing that another process has lost. What that other one told an
    /// earlier life of this process was heeded then.
    fn is_usable(&self, checkpoint: &Checkpoint, answers: &BTreeMap<usize, Answer>) -> bool {
        let orphan = |(&other, answer): (&usize, &Answer)| {
            let lost = |(sii, _)| checkpoint.process.depends_on.get(other) > Some(sii);
            answer.life > checkpoint.log.last_replay(other) && answer.replayed.is_some_and(lost)
        };
        let any = self.options.extension == Extension::None || self.options.bug == Some(Bug::LastCheckpoint);
        any || !answers.iter().any(orphan)
    }

    fn replay(&mut self, answers: &BTreeMap<usize, Answer>, shown_later: Vec<Effect>, actions: &mut Vec<Action>) {
        let mut messages = BTreeMap::new();
        for (&other, answer) in answers {
            if let Some((_, received)) = answer.replayed {
                self.note(other, answer.life, received);
            }
            let logged = answer.messages.iter().filter(|&&(life, rsn, _)| self.disk.is_of_this_history(life, rsn));
            messages.extend(logged.map(|(_, rsn, message)| (*rsn, message.clone())));
        }
        let lost = |life: u32, message: &Message| {
            let Answer { life: last, replayed, .. } = &answers[&message.from];
            life < *last && replayed.is_some_and(|(sii, _)| message.sent_in > sii)
        };
        let on_disk = self.disk.received.iter().filter(|(_, (life, message))| !lost(*life, message));
        messages.extend(on_disk.map(|(&rsn, (_, message))| (rsn, message.clone())));
        self.carry_out(shown_later, actions);
        let effects = self.process.start();
        self.carry_out(effects, actions);
        while let Some(message) = messages.get(&(self.process.sii() + 1)) {
            if !self.process.is_next(message) {
                break;
            }
            let effects = self.process.receive(message);
            self.history[message.from].insert(message.ssn, self.process.sii());
            self.carry_out(effects, actions);
        }
    }

    /// Another process was replayed: what it has received beyond is only partially logged now.
    fn note(&mut self, other: usize, life: u32, received: u64) {
        let received = if self.options.bug == Some(Bug::KeepBeyondGap) { u64::MAX } else { received };
        self.log.replayed(other, life, received);
    }

    /// What the replay ended with is on stable storage.
    pub(super) fn replay_stored(&mut self, actions: &mut Vec<Action>) {
        if let Recovery::Replayed(replayed) = &mut self.recovery {
            replayed.stored = true;
        }
        self.say_replayed_to_all(actions);
    }

    fn say_replayed_to_all(&mut self, actions: &mut Vec<Action>) {
        self.others().for_each(|other| self.say_replayed(other, actions));
    }

    /// As long as somebody may not know how far the replay went, or its effects have not come back.
    pub(super) fn say_replayed_again(&mut self, other: usize, actions: &mut Vec<Action>) {
        let Recovery::Replayed(replayed) = &self.recovery else { return };
        if !self.unrestored.is_empty() || replayed.untold.contains(&other) {
            self.say_replayed(other, actions);
        }
    }

    /// Tells another process how far the replay went; or, while it is not its turn, that it is over.
    fn say_replayed(&mut self, other: usize, actions: &mut Vec<Action>) {
        let Recovery::Replayed(replayed) = &self.recovery else { return };
        // "Each of these processes must be rolled back one at a time after the reexecution of the original
        // failed processes is completed" (§3.5).
        let is_next = replayed.orphans.first() == Some(&other) && self.replaying.is_empty();
        let at_once = !replayed.orphans.contains(&other) || self.options.bug == Some(Bug::AllAtOnce);
        let body = match replayed.stored && (at_once || is_next) {
            true => {
                let (life, sii, received) = (self.disk.life, replayed.sii, replayed.received[other]);
                Body::Replayed { life, sii, received }
            }
            false => Body::Nothing,
        };
        self.send(other, body, actions);
    }

    /// Another process says how far its replay went.
    pub(super) fn other_replayed(
        &mut self,
        from: usize,
        life: u32,
        sii: Sii,
        received: u64,
        actions: &mut Vec<Action>,
    ) {
        // In each of these cases it will say so again. Who was rolled back because of it answers when all
        // are that had to be rolled back in turn: or those that go on again could receive messages of some
        // that have still to be rolled back, and so on for ever.
        let may_answer = match &self.recovery {
            Recovery::NotNeeded => true,
            Recovery::Gathering { .. } => false,
            Recovery::Replayed(replayed) => {
                replayed.stored && (replayed.because_of != Some((from, life)) || replayed.untold.is_empty())
            }
        };
        if !may_answer {
            return;
        }
        let news = life > self.log.last_replay(from) && self.options.extension != Extension::None;
        let orphan = news && self.process.depends_on.get(from) > Some(sii);
        if orphan && self.options.bug != Some(Bug::KeepOrphans) {
            // "Each process X can be rolled back by forcing it to fail and recovering it" (§3.5).
            self.roll_back();
            self.gather(Some((from, life)), actions);
            return;
        }
        self.send(from, Body::Noted { life }, actions);
        self.note(from, life, received);
        let again: Vec<Message> = self.sendable(from);
        again.into_iter().for_each(|message| self.send(from, Body::Message(message), actions));
    }

    pub(super) fn noted(&mut self, from: usize, life: u32, actions: &mut Vec<Action>) {
        if life != self.disk.life {
            return;
        }
        let Recovery::Replayed(replayed) = &mut self.recovery else { return };
        replayed.untold.remove(&from);
        replayed.orphans.remove(&from);
        if let Some(&next) = replayed.orphans.first() {
            self.say_replayed(next, actions);
        }
    }
}
