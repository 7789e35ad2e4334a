//! Site views: every site goes through the same sequence of them (CBCAST, §4.2).

use std::collections::BTreeSet;

use super::{Bug, Change, Frame, Member, Site};

/// The sequence of site views as one site knows it: each change makes the next view.
#[derive(Clone, Debug, Default, Hash)]
pub(super) struct Views {
    /// Committed and, after them, proposed.
    pub(super) changes: Vec<Change>,
    /// How many of them are committed.
    pub(super) committed: usize,
    /// Incarnations that have failed as far as this site knows, and that asked to be taken in.
    pub(super) suspected: BTreeSet<Site>,
    pub(super) joiners: BTreeSet<Site>,
    /// As view manager: who has acknowledged the proposal of this length.
    proposed: usize,
    acknowledged: BTreeSet<Site>,
}

impl Views {
    pub(super) fn created(sites: usize) -> Self {
        let changes = (0..sites).map(|node| Change::Recovered(Site { node, incarnation: 0 })).collect();
        Self { changes, committed: sites, ..Self::default() }
    }

    /// The view after so many changes, oldest first.
    fn after(&self, changes: usize) -> Vec<Site> {
        let mut view = Vec::new();
        for change in &self.changes[..changes] {
            match *change {
                Change::Recovered(site) => view.push(site),
                Change::Failed(site) => view.retain(|&other| other != site),
            }
        }
        view
    }

    /// The current view.
    pub(super) fn current(&self) -> Vec<Site> {
        self.after(self.committed)
    }

    /// The view that is proposed, or else the current one.
    pub(super) fn proposed(&self) -> Vec<Site> {
        self.after(self.changes.len())
    }

    /// In the current view and in the proposed one: those whose messages are accepted and waited for.
    pub(super) fn operational(&self) -> Vec<Site> {
        let proposed = self.proposed();
        self.current().into_iter().filter(|site| proposed.contains(site)).collect()
    }

    pub(super) fn has_excluded(&self, site: Site) -> bool {
        self.changes[..self.committed].contains(&Change::Failed(site))
    }

    pub(super) fn failed(&self, site: Site) -> bool {
        let over = |change: &Change| match *change {
            Change::Failed(other) => other == site,
            Change::Recovered(other) => other.node == site.node && other.incarnation > site.incarnation,
        };
        self.changes.iter().any(over)
    }

    fn newest(&self, node: usize) -> Option<Site> {
        let all = self.changes.iter().map(|&(Change::Recovered(site) | Change::Failed(site))| site);
        all.chain(self.joiners.iter().copied()).filter(|site| site.node == node).max()
    }
}

impl Member {
    /// A node is down: its newest incarnation that is known has failed.
    pub(super) fn is_down(&mut self, node: usize) {
        if let Some(site) = self.views.newest(node) {
            self.suspect(site);
        }
    }

    /// Sites are not taken for failed because nothing is heard of them when too few would be left: it may
    /// be the network (§4.2, footnote), and they are waited for.
    pub(super) fn may_go_on_without(&self, silent: &[Site]) -> bool {
        let view = self.views.current();
        let there = |site: &&Site| !silent.contains(site) && !self.views.suspected.contains(site);
        !self.options.quorum || 2 * view.iter().filter(there).count() > view.len()
    }

    pub(super) fn suspect(&mut self, site: Site) {
        if site != self.me {
            self.views.joiners.remove(&site);
            self.views.suspected.insert(site);
        }
    }

    /// A site that has recovered asks to be taken in.
    pub(super) fn wants_in(&mut self, site: Site) {
        if self.views.failed(site) || self.views.suspected.contains(&site) {
            return;
        }
        for older in self.views.proposed().into_iter().filter(|o| o.node == site.node && *o < site) {
            self.views.suspected.insert(older);
        }
        if !self.views.changes.contains(&Change::Recovered(site)) {
            self.views.joiners.retain(|other| other.node != site.node);
            self.views.joiners.insert(site);
        }
    }

    /// The oldest site is the view manager, or the next if all older ones have failed. It proposes what
    /// it knows of failures and recoveries.
    pub(super) fn manage_view(&mut self) {
        let view = self.views.current();
        let manages = |site: &&Site| !self.views.suspected.contains(site) && !self.views.failed(**site);
        if view.iter().find(manages) != Some(&self.me) {
            return;
        }
        let majority = |left: usize| 2 * left > view.len();
        let mut proposed = self.views.proposed();
        let mut changes = Vec::new();
        for &site in self.views.suspected.iter().filter(|site| proposed.contains(site)) {
            changes.push(Change::Failed(site));
        }
        proposed.retain(|site| !self.views.suspected.contains(site));
        // One that asked long ago may have been taken in by another manager, and failed since.
        let known = |site: &&Site| self.views.failed(**site) || self.views.changes.contains(&Change::Recovered(**site));
        for &site in self.views.joiners.iter().filter(|site| !known(site)) {
            changes.push(Change::Recovered(site));
        }
        let left = view.iter().filter(|site| proposed.contains(site)).count();
        if self.options.quorum && !majority(left) {
            return; // "Prevented by requiring that sites cease to operate below a quorum" (§4.2, footnote).
        }
        self.views_changed |= !changes.is_empty();
        self.views.changes.extend(changes);
        self.views.joiners.clear();
        let length = self.views.changes.len();
        if length == self.views.committed || length == self.views.proposed {
            return;
        }
        self.views.proposed = length;
        self.views.acknowledged = BTreeSet::from([self.me]);
        let (changes, committed) = (self.views.changes.clone(), self.views.committed);
        for site in self.views.proposed() {
            if site != self.me {
                self.send(site, Frame::Propose { changes: changes.clone(), committed });
            }
        }
        self.maybe_commit();
    }

    /// Step 2.
    pub(super) fn view_proposed(&mut self, from: Site, changes: Vec<Change>, committed: usize) {
        let known = self.views.changes.len().min(self.views.committed);
        let contradicts = changes.iter().zip(&self.views.changes[..known]).any(|(a, b)| a != b);
        if contradicts || !changes.contains(&Change::Recovered(self.me)) {
            self.die();
            return;
        }
        let missing: Vec<Change> =
            self.views.changes.iter().copied().filter(|change| !changes.contains(change)).collect();
        let length = changes.len();
        if missing.is_empty() {
            self.views.changes = changes;
            self.commit(committed);
        }
        self.send(from, Frame::ViewAcknowledged { length, missing });
        if self.options.bug == Some(Bug::OnePhaseViews) {
            self.commit(length);
        }
    }

    /// Step 3.
    pub(super) fn view_acknowledged(&mut self, from: Site, length: usize, missing: Vec<Change>) {
        for change in missing {
            if !self.views.changes.contains(&change) {
                self.views.changes.push(change);
                self.views_changed = true;
            }
        }
        if length == self.views.changes.len() && length == self.views.proposed {
            self.views.acknowledged.insert(from);
            self.maybe_commit();
        }
    }

    fn maybe_commit(&mut self) {
        let view = self.views.proposed();
        if view.iter().all(|site| self.views.acknowledged.contains(site)) {
            let length = self.views.changes.len();
            for site in view {
                if site != self.me {
                    self.send(site, Frame::Commit { changes: self.views.changes.clone() });
                }
            }
            self.commit(length);
        }
    }

    pub(super) fn view_committed(&mut self, changes: Vec<Change>) {
        let length = changes.len();
        if self.views.changes.len() < length || self.views.changes[..length] != changes {
            // Acknowledged before, so it is known, unless it was superseded by a longer one.
            return;
        }
        self.commit(length);
    }

    pub(super) fn commit(&mut self, length: usize) {
        let proposed: Vec<Site> = self.views.proposed();
        self.views.committed = self.views.committed.max(length);
        self.views.suspected.retain(|site| proposed.contains(site));
        self.views_changed = true;
    }
}
