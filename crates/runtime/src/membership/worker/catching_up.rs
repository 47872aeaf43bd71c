//! How a worker gets the steps that others have made without it, and how it gives them.
//!
//! Of a member that is behind each other one waits. It asks several sources at once, if what it lacks is a whole state: all
//! have the one that the view begins with, so each sends a stripe of it. A newcomer that is not in the view yet, for which
//! nobody waits, asks one member, since what another one has at another moment is another state.

use super::{Standing, Worker, WorkerAction};
use crate::membership::message::{Decision, FromWorker, PeerMessage, Stripe, Transfer};
use crate::membership::progress::Progress;
use crate::membership::settings::CatchUp;
use crate::membership::view::{Epoch, Incarnation, MAX_WORKERS};

/// A part of what a worker asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Part {
    /// Who was asked for it.
    source: Option<Incarnation>,
    /// Whether that one has said that it will answer.
    promised: bool,
    /// Whether it has come, in a view that this worker is behind in.
    has_come: bool,
}

impl Worker {
    /// Whether these bytes are a part of what this worker lacks.
    pub fn wants(&self, transfer: Transfer, stripe: Stripe) -> bool {
        let asks =
            stripe.is_valid() && (stripe == Stripe::WHOLE || usize::from(stripe.of) == self.parts.len());
        asks && self.can_use(transfer)
            && (stripe == Stripe::WHOLE || matches!(transfer, Transfer::State { .. }))
    }

    fn can_use(&self, transfer: Transfer) -> bool {
        let state = transfer.reaches();
        let leads_on = match (self.standing, transfer) {
            (Standing::Behind | Standing::Outside, Transfer::Result { before, .. }) => {
                self.replays() && self.current == Some(before)
            }
            (Standing::Behind, Transfer::State { .. }) => true,
            // Of two sources the slower one has the older state.
            (Standing::Outside, Transfer::State { .. }) => {
                self.current != Some(state) && state.applied >= self.stable
            }
            _ => false,
        };
        let target = self.decision.as_ref().map(|decision| decision.resolution.state());
        leads_on && (self.standing != Standing::Behind || target == Some(state))
    }

    /// Has the next question go to the one that answered the last one from outside, if the view can be asked of it.
    pub(super) fn prefer_whom_it_has_asked(&mut self) {
        let sources = self.decision.iter().flat_map(|decision| &decision.resolution.sources);
        let asked = self.asked.take();
        if let Some(place) = sources.copied().position(|source| Some(source) == asked) {
            self.source = place.wrapping_sub(1);
        }
    }

    /// Asks for what it lacks: a member that is behind for the state its view begins with, a newcomer for the next stable one.
    /// Each part is asked of the next source, or of the same one again if that has said that it will answer.
    pub(super) fn ask(&mut self) {
        self.ask_at = None;
        let Some(decision) = &self.decision else { return };
        let (behind, epoch) = (self.standing == Standing::Behind, self.epoch());
        let sources: Vec<Incarnation> = match self.standing {
            Standing::Behind => decision.resolution.sources.clone(),
            Standing::Outside => decision.view.members.iter().map(|member| member.incarnation).collect(),
            _ => return,
        };
        if sources.is_empty() {
            return;
        }
        if self.parts.is_empty() {
            let stripes = if behind && self.lacks_a_whole_state(decision) { self.stripes_limit } else { 1 };
            self.parts = vec![Part::default(); stripes.min(sources.len())];
        }
        self.ask_at = Some(self.now + self.job.timing.suspect);
        let of = self.parts.len() as u16;
        for index in 0..of {
            let mut part = self.parts[usize::from(index)];
            if part.has_come {
                continue;
            }
            let again =
                part.source.filter(|source| std::mem::take(&mut part.promised) && sources.contains(source));
            let to = again.unwrap_or_else(|| {
                self.source = self.source.wrapping_add(1);
                sources[self.source % sources.len()]
            });
            part.source = Some(to);
            self.parts[usize::from(index)] = part;
            self.asked = (!behind).then_some(to);
            let have = self.current.filter(|_| of == 1);
            let message = match behind {
                true => PeerMessage::Fetch { epoch, have, stripe: Stripe { index, of } },
                false => PeerMessage::Pull { have },
            };
            self.act(WorkerAction::Peer { to, message });
        }
    }

    /// Whether no result is of use to it, and all members have the same bits.
    fn lacks_a_whole_state(&self, decision: &Decision) -> bool {
        let is_near = self.current.is_some_and(|mine| mine.applied.next() == decision.resolution.applied);
        self.replays() && !is_near
    }

    pub(super) fn on_received(&mut self, from: Incarnation, transfer: Transfer, stripe: Stripe) {
        if !self.wants(transfer, stripe) {
            return;
        }
        if stripe != Stripe::WHOLE {
            let part = &mut self.parts[usize::from(stripe.index)];
            (part.has_come, part.promised) = (true, false);
            if !self.parts.iter().all(|part| part.has_come) {
                return;
            }
        }
        let before = match transfer {
            Transfer::Result { before, .. } => Some(before),
            Transfer::State { .. } => None,
        };
        let state = transfer.reaches();
        self.parts.iter_mut().for_each(|part| part.promised = false);
        self.move_to(before, state);
        self.act(WorkerAction::Adopt(transfer));
        if self.standing == Standing::Behind {
            self.ask_at = None;
            self.settle();
        } else {
            // Only stable states are given to newcomers.
            self.stable = state.applied;
            self.ask_at = Some(self.now + self.job.timing.suspect);
            self.act(WorkerAction::Peer { to: from, message: PeerMessage::Pulled { have: state } });
        }
    }

    pub(super) fn on_peer(&mut self, from: Incarnation, message: PeerMessage) {
        match message {
            PeerMessage::Fetch { epoch, have, stripe } if stripe.is_valid() => {
                self.on_fetch(from, epoch, have, stripe);
            }
            PeerMessage::Pull { have } => match self.standing {
                Standing::Going => self.on_pull(from, have),
                Standing::Behind | Standing::Stopped if self.pulls.len() < MAX_WORKERS => {
                    self.pulls.insert(from, have);
                }
                _ => {}
            },
            PeerMessage::Pulled { have } => self.on_pulled(from, have),
            PeerMessage::Enter { epoch } => self.on_enter(epoch),
            PeerMessage::Soon if self.ask_at.is_some() => {
                let its = self.parts.iter_mut().filter(|part| part.source == Some(from));
                its.for_each(|part| part.promised = true);
                self.ask_at = Some(self.now + self.job.timing.suspect);
            }
            _ => {}
        }
    }

    fn on_enter(&mut self, epoch: Epoch) {
        let enters = self.standing == Standing::Outside && !self.leaving;
        if enters && epoch == self.epoch() {
            self.asked_to_enter = Some(epoch);
            self.act(WorkerAction::Launcher(FromWorker::Ready { epoch }));
        }
    }

    /// Whether whoever lacks a step applies its result.
    pub(super) fn replays(&self) -> bool {
        self.job.catch_up == CatchUp::Results
    }

    fn on_fetch(&mut self, from: Incarnation, epoch: Epoch, have: Option<Progress>, stripe: Stripe) {
        if epoch > self.epoch() && (self.early.len() < MAX_WORKERS || self.early.contains_key(&from)) {
            self.early.insert(from, (epoch, have, stripe));
        } else if epoch == self.epoch() {
            self.serve(from, have, stripe);
        }
    }

    pub(super) fn serve_early(&mut self) {
        let epoch = self.epoch();
        self.early.retain(|_, (of, ..)| *of >= epoch);
        for (from, (of, have, stripe)) in self.early.clone() {
            if of == epoch {
                self.early.remove(&from);
                self.serve(from, have, stripe);
            }
        }
    }

    /// Answers a member of this view that is behind. Nobody gets past the state that a view begins with
    /// before all have it, so that is the present one.
    fn serve(&mut self, to: Incarnation, have: Option<Progress>, stripe: Stripe) {
        let of_this_view = self.decision.as_ref().is_some_and(|decision| decision.view.member(to).is_some());
        let (Standing::Going, Some(state), true) = (self.standing, self.current, of_this_view) else {
            return;
        };
        let is_kept = |&before: &Progress| have == Some(before) && self.stable < state.applied;
        let kept = self.previous.filter(is_kept).filter(|_| self.replays());
        let transfer = match kept {
            Some(before) => Transfer::Result { before, after: state },
            None => Transfer::State { state },
        };
        let stripe = if kept.is_some() { Stripe::WHOLE } else { stripe };
        // The copy is made when the program comes to it.
        self.act(WorkerAction::Peer { to, message: PeerMessage::Soon });
        self.act(WorkerAction::Send { to, transfer, stripe });
    }
}
