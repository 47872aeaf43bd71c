//! What a member does for newcomers: it sends them stable steps, and says when they are to enter.

use std::time::Duration;

use super::{Worker, WorkerAction};
use crate::membership::message::{PeerMessage, Stripe, Transfer};
use crate::membership::progress::{Progress, Step};
use crate::membership::view::{Incarnation, MAX_WORKERS};

/// A newcomer that is sent stable steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Follower {
    /// The last state sent to it, or that it had when it came.
    sent: Option<Progress>,
    /// The last step that it has said it has; until it says so, that of the whole state that it was sent.
    has: Step,
    since: Duration,
    /// It does not keep up: more results than a state is worth were on their way to it; or it is to apply none. It is sent
    /// nothing any more, enters with what it has, and fetches a whole state while the others wait, which is one transfer
    /// however far behind it is.
    late: bool,
    /// It is to enter when the next step has begun.
    due: bool,
}

/// After how many times [`Timing::suspect`](crate::membership::Timing::suspect) a newcomer counts as late that has kept up
/// without coming within a step.
const FOLLOWING_LIMIT: u32 = 4;

/// Which part of a step is its beginning. Whoever enters has still to compute, and the others wait for it: later than that, one
/// that could enter at any time had better come with the next step.
const BEGINNING: u32 = 4;

impl Worker {
    pub(super) fn on_pull(&mut self, from: Incarnation, have: Option<Progress>) {
        if !self.is_newcomer(from) {
            return;
        }
        let sent = have.filter(|_| self.is_near(have));
        let has = sent.map_or(Step(0), |state| state.applied);
        let (since, late) = (self.now, !self.replays());
        let fresh = Follower { sent: None, has, since, late, due: false };
        let (is_near, begins) = (self.is_near(have), self.is_at_the_beginning());
        let limit = self.following_limit();
        let follower = self.followers.entry(from).or_insert(fresh);
        (follower.sent, follower.has) = (sent, has);
        let is_late = follower.late || have.is_some() && self.now >= follower.since + limit;
        let may_enter = is_near || is_late;
        follower.due = may_enter && !begins;
        if may_enter && begins {
            self.have_enter(from);
        } else {
            self.act(WorkerAction::Peer { to: from, message: PeerMessage::Soon });
        }
    }

    /// It has what it was sent when the present step began: there is nothing to wait for, unless it lacks more than that.
    pub(super) fn on_pulled(&mut self, from: Incarnation, have: Progress) {
        let (is_near, limit) = (self.is_near(Some(have)), self.following_limit());
        let Some(follower) = self.followers.get_mut(&from) else { return };
        follower.has = follower.has.max(have.applied);
        if is_near || follower.late || self.now >= follower.since + limit {
            follower.due = false;
            self.have_enter(from);
        }
    }

    fn following_limit(&self) -> Duration {
        self.job.timing.suspect * FOLLOWING_LIMIT
    }

    fn is_newcomer(&self, from: Incarnation) -> bool {
        let outside = self.decision.as_ref().is_some_and(|decision| decision.view.member(from).is_none());
        outside && (self.followers.len() < MAX_WORKERS || self.followers.contains_key(&from))
    }

    fn is_near(&self, have: Option<Progress>) -> bool {
        have.is_some() && (have == self.current || have == self.previous)
    }

    /// Whether the present step has just begun, as far as steps take as long as the one before.
    fn is_at_the_beginning(&self) -> bool {
        self.step_took.is_zero() || self.now - self.step_began <= self.step_took / BEGINNING
    }

    fn have_enter(&mut self, newcomer: Incarnation) {
        let message = PeerMessage::Enter { epoch: self.epoch() };
        self.act(WorkerAction::Peer { to: newcomer, message });
    }

    /// A step has become stable, and with that the next one begins.
    pub(super) fn serve_followers(&mut self, state: Progress) {
        let previous = self.previous;
        for (to, mut follower) in std::mem::take(&mut self.followers) {
            let was_late = follower.late;
            let sent = follower.sent.replace(state);
            let transfer = match (sent, previous) {
                _ if follower.late || sent == Some(state) => None,
                (Some(_), _) if state.applied.0.saturating_sub(follower.has.0) > self.state_worth => {
                    follower.late = true;
                    None
                }
                (Some(sent), Some(before)) if sent == before => {
                    Some(Transfer::Result { before, after: state })
                }
                _ => {
                    follower.has = state.applied;
                    Some(Transfer::State { state })
                }
            };
            // Whoever is sent something says when it has that.
            let enters = transfer.is_none() && (follower.due || follower.late && !was_late);
            follower.due &= !enters;
            self.followers.insert(to, follower);
            match transfer {
                Some(transfer) => self.act(WorkerAction::Send { to, transfer, stripe: Stripe::WHOLE }),
                None if enters => self.have_enter(to),
                None => {}
            }
        }
    }
}
