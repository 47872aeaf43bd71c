//! A launcher that is in no view: it seeks the job, founds it with the others, or waits to enter.
//!
//! A job is founded by the launcher of seat 0 when every seat has a launcher that is in no view. Then nobody
//! can go on with an earlier view, wherever messages may still be:
//!
//! 1. All seats seek, each under an incarnation that has never been in a view.
//! 2. The founder claims an epoch E that is later than every stored one, and invites.
//! 3. The same incarnations attend, and promise never to enter a view before E. They were in no view in
//!    between, since an incarnation that leaves a view is not used again; so no view was alive when E was
//!    claimed, and no view before E can come alive any more.

use std::collections::BTreeMap;
use std::time::Duration;

use super::{Launcher, LauncherAction};
use crate::membership::message::{Decision, Evidence, Message};
use crate::membership::mutation::Mutation;
use crate::membership::progress::{Report, resolve};
use crate::membership::view::{Epoch, Incarnation, Member, Seat, View, Voter, deal};

/// What matters only outside of a view.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Outside {
    pub(super) seek_at: Duration,
    /// It has promised to enter no view before this epoch.
    pub(super) floor: Epoch,
    /// Whether it has told a founder that it attends, under this incarnation: it may have been in the first view, and
    /// removed before it knew.
    pub(super) attended: bool,
    /// The epoch in which it asked to enter, under this incarnation.
    pub(super) asked_to_enter: Option<Epoch>,
    rest: Rest,
    seekers: BTreeMap<Seat, Seeker>,
    founding: Option<Founding>,
}

/// How long a launcher waits before it asks to enter again. As a rule it does not; but while two members do not hear each
/// other and all others do, one of them is removed each time that both are there, after a silence in which nobody makes a
/// step. So whoever has been removed soon after it came waits, and twice as long the next time.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Rest {
    entered: Duration,
    lasts: Duration,
    until: Duration,
}

/// Removed within so many times [`Timing::suspect`](crate::membership::Timing::suspect) is soon, and the longest rest.
const SOON: u32 = 10;
const LONGEST_REST: u32 = 8;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Seeker {
    voter: Voter,
    complete: bool,
    heard: Duration,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Founding {
    /// Claimed, or about to be.
    epoch: Option<Epoch>,
    guests: BTreeMap<Seat, Voter>,
    attending: BTreeMap<Seat, Vec<Report>>,
}

impl Outside {
    pub(super) fn new(now: Duration) -> Self {
        Self {
            seek_at: now,
            floor: Epoch(0),
            attended: false,
            asked_to_enter: None,
            rest: Rest::default(),
            seekers: BTreeMap::new(),
            founding: None,
        }
    }

    pub(super) fn entered(&mut self, now: Duration) {
        self.rest.entered = now;
    }

    pub(super) fn removed(&mut self, now: Duration, suspect: Duration) {
        let Rest { entered, lasts, .. } = self.rest;
        let was_soon = now < entered + suspect * SOON;
        let lasts =
            if was_soon { (lasts * 2).clamp(suspect, suspect * LONGEST_REST) } else { Duration::ZERO };
        self.rest = Rest { entered, lasts, until: now + lasts };
    }

    pub(super) fn is_resting(&self, now: Duration) -> bool {
        now < self.rest.until
    }

    pub(super) fn reset(&mut self) {
        self.attended = false;
        self.asked_to_enter = None;
        self.seekers.clear();
        self.founding = None;
    }
}

impl Launcher {
    pub(super) fn on_time_outside(&mut self) {
        if self.now < self.outside.seek_at {
            return;
        }
        self.outside.seek_at = self.now + self.job.timing.heartbeat;
        let complete = self.is_complete();
        let me = self.me.seat;
        for seat in (0..self.job.seats).map(Seat).filter(|&seat| seat != me) {
            self.send(seat, Message::Seek { complete });
        }
        if self.decision.is_some() {
            self.announce_ready();
        } else if self.me.seat == Seat(0) {
            self.found();
        }
    }

    fn is_complete(&self) -> bool {
        self.children.len() == usize::from(self.job.workers_per_launcher)
    }

    pub(super) fn on_seek(&mut self, from: Voter, complete: bool) {
        if self.member
            && let Some(decision) = self.decision.clone()
        {
            let seated = decision.view.voters.iter().find(|voter| voter.seat == from.seat);
            if let Some(old) = seated.filter(|voter| **voter != from) {
                self.suspect(old.incarnation, Evidence::Replaced);
            }
            self.send(from.seat, Message::Install(decision));
        } else if from.seat.0 < self.job.seats {
            let seeker = Seeker { voter: from, complete, heard: self.now };
            self.outside.seekers.insert(from.seat, seeker);
        }
    }

    // ---- the founder ----

    fn found(&mut self) {
        let fresh = self.now.saturating_sub(self.job.timing.suspect);
        let mut seekers: BTreeMap<Seat, Voter> = BTreeMap::from([(self.me.seat, self.me)]);
        let present = self.outside.seekers.values().filter(|s| s.complete && s.heard >= fresh);
        seekers.extend(present.map(|seeker| (seeker.voter.seat, seeker.voter)));
        if seekers.len() < self.job.seats as usize || !self.is_complete() {
            return;
        }
        match &self.outside.founding {
            Some(Founding { epoch, guests, .. }) if *guests == seekers => {
                if let Some(epoch) = *epoch {
                    self.invite(epoch);
                }
            }
            _ => {
                let founding = Founding { epoch: None, guests: seekers, attending: BTreeMap::new() };
                self.outside.founding = Some(founding);
                self.act(LauncherAction::Claim);
            }
        }
    }

    pub(super) fn on_claimed(&mut self, epoch: Epoch) {
        let epoch = if self.mutation == Mutation::EpochReset { Epoch(1) } else { epoch };
        let Some(founding) = self.outside.founding.as_mut().filter(|_| !self.member) else { return };
        founding.epoch = Some(epoch);
        self.invite(epoch);
    }

    fn invite(&mut self, epoch: Epoch) {
        let Some(founding) = &self.outside.founding else { return };
        let missing = founding.guests.keys().filter(|seat| !founding.attending.contains_key(seat));
        for seat in missing.copied().collect::<Vec<_>>() {
            self.send(seat, Message::Invite { epoch });
        }
    }

    pub(super) fn on_attend(&mut self, from: Voter, epoch: Epoch, workers: Vec<Report>) {
        let Some(founding) = self.outside.founding.as_mut().filter(|_| !self.member) else { return };
        if founding.epoch != Some(epoch) || founding.guests.get(&from.seat) != Some(&from) {
            return;
        }
        founding.attending.insert(from.seat, workers);
        if founding.attending.len() < founding.guests.len() {
            return;
        }
        if let Some(decision) = self.first_view(epoch) {
            for seat in (0..self.job.seats).map(Seat) {
                self.send(seat, Message::Install(decision.clone()));
            }
        }
    }

    /// The view that a job begins with, from the newest state that any worker has loaded.
    fn first_view(&self, epoch: Epoch) -> Option<Decision> {
        let founding = self.outside.founding.as_ref()?;
        let reports: Vec<Report> = founding.attending.values().flatten().copied().collect();
        let member = |launcher: Incarnation| {
            move |report: &Report| Member { incarnation: report.worker, launcher, slots: Vec::new() }
        };
        let of_seat = |(seat, workers): (&Seat, &Vec<Report>)| {
            let launcher = founding.guests.get(seat).map(|voter| voter.incarnation)?;
            Some(workers.iter().map(member(launcher)).collect::<Vec<_>>())
        };
        let mut members: Vec<Member> = founding.attending.iter().filter_map(of_seat).flatten().collect();
        let had = vec![Vec::new(); members.len()];
        let dealt = deal(self.job.mode, self.job.slots, self.job.contributors(), &had);
        members.iter_mut().zip(dealt).for_each(|(member, slots)| member.slots = slots);
        let voters = founding.guests.values().copied().collect();
        let resolution = resolve(&reports, |_| false, Mutation::None)?;
        let decision = Decision { view: View { epoch, voters, members }, resolution };
        decision.check().is_ok().then_some(decision)
    }

    // ---- the guests ----

    pub(super) fn on_invite(&mut self, from: Voter, epoch: Epoch) {
        let sensible = !self.member && self.decision.is_none() && from.seat == Seat(0);
        if sensible && epoch >= self.outside.floor && self.is_complete() {
            self.outside.floor = epoch;
            self.outside.attended = true;
            self.children.values_mut().for_each(|child| child.named = true);
            let workers = self.children.values().map(|child| child.hello).collect();
            self.send(from.seat, Message::Attend { epoch, workers });
        }
    }
}
