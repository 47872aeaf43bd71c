//! What launchers and workers say to each other, and its form on the wire.

use std::collections::BTreeSet;
use std::ops::Range;

use paceline_transport::wire::{self, WireError};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::progress::{Progress, Report, Resolution, Step};
use super::view::{Epoch, Incarnation, MAX_LAUNCHERS, MAX_WORKERS, View, Voter};

/// The most sources that a resolution names. A newcomer pulls from a few; more would not fit a message.
pub const MAX_SOURCES: usize = 16;

/// The number of an attempt to decide an epoch; attempts of two launchers never have the same one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Ballot {
    /// Higher than every round that the leader knew of; 0 is no ballot.
    pub round: u32,
    /// The leader's index among the voters.
    pub leader: u32,
}

/// What an epoch's consensus decides: the next view and where it begins.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Decision {
    /// The members of the next epoch.
    pub view: View,
    /// The state they begin from.
    pub resolution: Resolution,
}

impl Decision {
    /// The epoch that it begins.
    pub fn epoch(&self) -> Epoch {
        self.view.epoch
    }

    /// Whether it makes sense, whoever sent it.
    ///
    /// # Errors
    /// One line that says what is wrong.
    pub fn check(&self) -> Result<(), String> {
        self.view.check()?;
        let sources = &self.resolution.sources;
        if sources.is_empty() || sources.len() > MAX_SOURCES {
            return Err(format!("a state with {} sources", sources.len()));
        }
        match sources.iter().find(|&&source| self.view.member(source).is_none()) {
            Some(source) => Err(format!("source {source} is not a member")),
            None => Ok(()),
        }
    }
}

/// Why somebody should be removed, from what was certain to what was guessed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Evidence {
    /// Its launcher has its exit status.
    Died,
    /// A process with another incarnation has its seat.
    Replaced,
    /// It asks to leave.
    Leaving,
    /// It closed a link and said why.
    Closed,
    /// A link to it was lost and did not come back within the grace.
    LinkLost,
    /// It has not been heard.
    Silent,
    /// It is heard, but its operation does not move.
    NoProgress,
}

/// From a launcher to another one.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Message {
    /// I am alive and a member of that epoch. Whoever knows a later one answers with it.
    Beat {
        /// The sender's epoch.
        epoch: Epoch,
    },
    /// I am a member of nothing. A member answers with its view.
    Seek {
        /// Whether all of its workers are there, so that a job could be founded.
        complete: bool,
    },
    /// Will you be a founding member of that epoch? From the launcher of the lowest seat.
    Invite {
        /// An epoch that nobody has used.
        epoch: Epoch,
    },
    /// Yes, and I shall never enter an earlier one.
    Attend {
        /// The epoch of the invitation.
        epoch: Epoch,
        /// The sender's workers, each with the state that it has loaded.
        workers: Vec<Report>,
    },
    /// These workers of mine, outside of that epoch's view, want to enter.
    Ready {
        /// The epoch that they are not in.
        epoch: Epoch,
        /// Their incarnations.
        workers: Vec<Incarnation>,
    },
    /// Somebody should be removed.
    Suspect {
        /// The epoch in which it is a member.
        epoch: Epoch,
        /// A worker or a launcher.
        target: Incarnation,
        /// Why.
        evidence: Evidence,
    },
    /// Stop your workers in that epoch and promise not to follow lower ballots. Paxos's message 1a.
    Wedge {
        /// The epoch that ends.
        epoch: Epoch,
        /// The leader's attempt.
        ballot: Ballot,
    },
    /// Done. Paxos's message 1b.
    Promise {
        /// The epoch that ends.
        epoch: Epoch,
        /// The ballot of the Wedge.
        ballot: Ballot,
        /// What the sender's workers have said after they stopped.
        reports: Vec<Report>,
        /// Whether they all have.
        complete: bool,
        /// What the sender has accepted in this epoch.
        accepted: Option<(Ballot, Decision)>,
        /// The newest stable step that its workers have known of: no view may begin before it.
        stable: Step,
    },
    /// Your ballot is too low.
    Reject {
        /// The epoch of the refused message.
        epoch: Epoch,
        /// The ballot that the sender has promised to follow.
        promised: Ballot,
    },
    /// Accept this. Paxos's message 2a.
    Propose {
        /// The epoch that ends.
        epoch: Epoch,
        /// The leader's attempt.
        ballot: Ballot,
        /// What the next epoch should be.
        decision: Decision,
    },
    /// Accepted. Paxos's message 2b.
    Accepted {
        /// The epoch that ends.
        epoch: Epoch,
        /// The ballot of the Propose.
        ballot: Ballot,
    },
    /// This has been decided. Also the answer to any message of an earlier epoch: the sender is fenced.
    Install(Decision),
}

/// A message with its sender, which the link has authenticated.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Envelope {
    /// Who says so.
    pub from: Voter,
    /// What.
    pub message: Message,
}

/// From a launcher to a worker of its own. These two see the other's end at once, and nothing is lost or
/// reordered between them.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum ToWorker {
    /// Stop the data plane of that epoch for good, and report.
    Wedge {
        /// The epoch that ends.
        epoch: Epoch,
    },
    /// A new view, whether the worker is in it or not.
    Install(Decision),
    /// The worker may have been in a view that is over, without having heard of it: its incarnation is not used any more.
    Retire,
}

/// From a worker to its launcher.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum FromWorker {
    /// The worker is there, or has drawn a new incarnation.
    Hello(Report),
    /// Its progress thread runs.
    Beat {
        /// The newest stable step it knows of.
        stable: Step,
    },
    /// It has stopped.
    Report {
        /// The epoch in which it has.
        epoch: Epoch,
        /// What it has to say.
        report: Report,
    },
    /// A member of the view has told it to enter.
    Ready {
        /// The epoch of the view that it is not in.
        epoch: Epoch,
    },
    /// Somebody should be removed.
    Suspect {
        /// The epoch in which it is a member.
        epoch: Epoch,
        /// The worker.
        target: Incarnation,
        /// Why.
        evidence: Evidence,
    },
    /// It wants to leave. Said once in an epoch, when all members have its state.
    Leave,
}

/// From a worker to another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum PeerMessage {
    /// From a member to a source of its view: send what I lack.
    Fetch {
        /// The epoch of the view.
        epoch: Epoch,
        /// The state that the sender has; `None` also where it asks for a part of a whole one.
        have: Option<Progress>,
        /// Which part of it.
        stripe: Stripe,
    },
    /// From a newcomer: send the next stable state, or what came after mine, and then every stable step.
    Pull {
        /// The state that the sender has.
        have: Option<Progress>,
    },
    /// From a newcomer: I have got this far.
    Pulled {
        /// The state that the sender has now.
        have: Progress,
    },
    /// To whoever has asked for a state: it will come, ask nobody else.
    Soon,
    /// To a newcomer: ask to enter. It is one step behind at most, would not come nearer by what it is sent, or is to take over
    /// the state that its first view begins with.
    Enter {
        /// The epoch of the view that it should enter from.
        epoch: Epoch,
    },
}

/// The description of bytes that one worker sends another; the bytes are the caller's, and so is the check of
/// their digests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Transfer {
    /// The reduced result of the step that leads from one state to the next.
    Result {
        /// The state to which it is applied.
        before: Progress,
        /// The state that comes out.
        after: Progress,
    },
    /// A whole state.
    State {
        /// Which.
        state: Progress,
    },
}

impl Transfer {
    /// The state that whoever receives it has then.
    pub fn reaches(&self) -> Progress {
        match *self {
            Self::Result { after, .. } => after,
            Self::State { state } => state,
        }
    }
}

/// The most parts that a state comes in.
pub const MAX_STRIPES: usize = 8;

/// A part of a transfer, which is as long as each other one but for a byte. Members have the same state, so parts of it may come
/// from several of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Stripe {
    /// Its number, from 0.
    pub index: u16,
    /// How many there are.
    pub of: u16,
}

impl Stripe {
    /// All of it.
    pub const WHOLE: Self = Self { index: 0, of: 1 };

    /// Whether there can be such a part.
    pub fn is_valid(self) -> bool {
        self.index < self.of && usize::from(self.of) <= MAX_STRIPES
    }

    /// Where it is in `len` bytes.
    pub fn range(self, len: usize) -> Range<usize> {
        let start = |index: u16| (len as u128 * u128::from(index) / u128::from(self.of)) as usize;
        start(self.index)..start(self.index + 1)
    }
}

/// What can be sent: its limits beyond those of the encoding.
pub trait Checked: Serialize + DeserializeOwned {
    /// Whether a message of a peer makes sense by itself.
    ///
    /// # Errors
    /// One line that says what is wrong.
    fn check(&self) -> Result<(), String>;
}

impl Checked for Envelope {
    fn check(&self) -> Result<(), String> {
        let few = |count: usize| match count {
            0..=MAX_WORKERS => Ok(()),
            _ => Err(format!("{count} workers of one launcher")),
        };
        match &self.message {
            Message::Attend { workers, .. } => few(workers.len()),
            Message::Ready { workers, .. } => few(workers.len()),
            Message::Promise { reports, accepted, .. } => {
                few(reports.len())?;
                let workers: BTreeSet<_> = reports.iter().map(|report| report.worker).collect();
                if workers.len() != reports.len() {
                    return Err("a worker that reports twice".into());
                }
                accepted.as_ref().map_or(Ok(()), |(_, decision)| decision.check())
            }
            Message::Wedge { ballot, .. } | Message::Accepted { ballot, .. } => check_ballot(*ballot),
            Message::Propose { epoch, ballot, decision } => {
                check_ballot(*ballot)?;
                if decision.epoch() != epoch.next() {
                    return Err(format!("{} proposed to follow {epoch}", decision.epoch()));
                }
                decision.check()
            }
            Message::Install(decision) => decision.check(),
            Message::Beat { .. } | Message::Seek { .. } | Message::Invite { .. } => Ok(()),
            Message::Suspect { .. } | Message::Reject { .. } => Ok(()),
        }
    }
}

fn check_ballot(ballot: Ballot) -> Result<(), String> {
    match ballot.round > 0 && (ballot.leader as usize) < MAX_LAUNCHERS {
        true => Ok(()),
        false => Err(format!("ballot {}.{}", ballot.round, ballot.leader)),
    }
}

impl Checked for ToWorker {
    fn check(&self) -> Result<(), String> {
        match self {
            Self::Wedge { .. } | Self::Retire => Ok(()),
            Self::Install(decision) => decision.check(),
        }
    }
}

impl Checked for FromWorker {
    fn check(&self) -> Result<(), String> {
        Ok(())
    }
}

impl Checked for PeerMessage {
    fn check(&self) -> Result<(), String> {
        Ok(())
    }
}

/// Encodes a message of the membership.
///
/// # Errors
/// [`WireError::TooLong`] beyond [`wire::MESSAGE_LIMIT`], which views within the limits stay below.
pub fn encode<T: Checked>(message: &T) -> Result<Vec<u8>, WireError> {
    wire::encode(message)
}

/// Decodes a message of the membership that fills `bytes` exactly, and checks it.
///
/// # Errors
/// [`WireError`] for anything else. Arbitrary bytes neither panic nor allocate more than
/// [`wire::DECODE_MEMORY_LIMIT`].
pub fn decode<T: Checked>(bytes: &[u8]) -> Result<T, WireError> {
    let message: T = wire::decode(bytes)?;
    message.check().map_err(|reason| WireError::Malformed { what: "membership message", reason })?;
    Ok(message)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;
    use crate::membership::launcher::{Child, Launcher, LauncherAction, LauncherEvent};
    use crate::membership::settings::{CatchUp, Fence, Job, Timing};
    use crate::membership::view::{MAX_SLOTS, Member, Mode, Seat, Slot};
    use crate::membership::worker::{Worker, WorkerEvent};

    fn decision(voters: usize, workers: usize, slots: usize) -> Decision {
        let incarnation = |i: usize| Incarnation(u128::MAX - i as u128);
        let voters: Vec<Voter> =
            (0..voters).map(|i| Voter { seat: Seat(i as u32), incarnation: incarnation(i) }).collect();
        let members: Vec<Member> = (0..workers)
            .map(|rank| Member {
                incarnation: incarnation(voters.len() + rank),
                launcher: voters[rank % voters.len()].incarnation,
                slots: (rank..slots).step_by(workers).map(|slot| slot as Slot).collect(),
            })
            .collect();
        let sources = members.iter().take(MAX_SOURCES).map(|member| member.incarnation).collect();
        let resolution = Resolution { applied: Step(u64::MAX), lineage: u64::MAX, sources };
        Decision { view: View { epoch: Epoch(u64::MAX), voters, members }, resolution }
    }

    fn envelope(message: Message) -> Envelope {
        Envelope { from: Voter { seat: Seat(1), incarnation: Incarnation(7) }, message }
    }

    #[test]
    fn the_largest_view_fits_a_message_and_one_more_of_anything_is_refused() {
        let install = |voters, workers, slots| envelope(Message::Install(decision(voters, workers, slots)));
        let bytes = encode(&install(MAX_LAUNCHERS, MAX_WORKERS, MAX_SLOTS)).expect("it fits");
        assert_eq!(decode(&bytes), Ok(install(MAX_LAUNCHERS, MAX_WORKERS, MAX_SLOTS)));
        for (voters, workers, slots) in
            [(MAX_LAUNCHERS + 1, 4, 4), (2, MAX_WORKERS + 1, 4), (2, 4, MAX_SLOTS + 1)]
        {
            let bytes = encode(&install(voters, workers, slots)).expect("it fits");
            assert!(decode::<Envelope>(&bytes).is_err(), "{voters} {workers} {slots}");
        }
    }

    #[test]
    fn views_that_contradict_themselves_are_refused() {
        let good = decision(2, 3, 3);
        assert_eq!(good.check(), Ok(()));
        let breaks: [fn(&mut Decision); 8] = [
            |d| d.view.epoch = Epoch(0),
            |d| d.view.voters.clear(),
            |d| d.view.voters.reverse(),
            |d| d.view.members[1].incarnation = d.view.members[0].incarnation,
            |d| d.view.members[1].launcher = Incarnation(5),
            |d| d.view.members[1].slots = d.view.members[0].slots.clone(),
            |d| d.resolution.sources.clear(),
            |d| d.resolution.sources = vec![Incarnation(5)],
        ];
        for (index, spoil) in breaks.iter().enumerate() {
            let mut bad = good.clone();
            spoil(&mut bad);
            assert!(bad.check().is_err(), "{index}");
        }
    }

    fn some_message() -> impl Strategy<Value = Message> {
        let epoch = || any::<u64>().prop_map(Epoch);
        let ballot =
            || (1u32.., 0..MAX_LAUNCHERS as u32).prop_map(|(round, leader)| Ballot { round, leader });
        let value = || (1usize..4, 1usize..5, 0usize..9).prop_map(|(v, w, s)| decision(v, w, s));
        let report = |worker: u128| Report { worker: Incarnation(worker), progress: None, holds: true };
        let reports = move || {
            prop::collection::btree_set(any::<u128>(), 0..9)
                .prop_map(move |w| w.into_iter().map(report).collect())
        };
        prop_oneof![
            epoch().prop_map(|epoch| Message::Beat { epoch }),
            any::<bool>().prop_map(|complete| Message::Seek { complete }),
            (epoch(), reports()).prop_map(|(epoch, workers)| Message::Attend { epoch, workers }),
            (epoch(), ballot()).prop_map(|(epoch, ballot)| Message::Wedge { epoch, ballot }),
            (epoch(), ballot(), reports(), prop::option::of((ballot(), value()))).prop_map(
                |(epoch, ballot, reports, accepted)| {
                    let stable = Step(3);
                    Message::Promise { epoch, ballot, reports, complete: true, accepted, stable }
                }
            ),
            value().prop_map(Message::Install),
        ]
    }

    /// Messages of a few epochs, ballots and members, so that many of them mean something to a launcher.
    fn plausible_message() -> impl Strategy<Value = Message> {
        let epoch = || (0u64..4).prop_map(Epoch);
        let ballot = || (1u32..4, 0u32..4).prop_map(|(round, leader)| Ballot { round, leader });
        let who = || prop::sample::select((0..7).map(|i| Incarnation(u128::MAX - i)).collect::<Vec<_>>());
        let value = || {
            (0u64..4, 1usize..4, 0usize..5).prop_map(|(epoch, voters, workers)| {
                let mut decision = decision(voters, workers, 4);
                decision.view.epoch = Epoch(epoch);
                decision.resolution.applied = Step(epoch);
                decision
            })
        };
        let report = || {
            (who(), any::<bool>()).prop_map(|(worker, holds)| Report {
                worker,
                progress: Some(Progress::START),
                holds,
            })
        };
        let evidence = || prop::sample::select(vec![Evidence::Died, Evidence::Silent, Evidence::Replaced]);
        prop_oneof![
            epoch().prop_map(|epoch| Message::Beat { epoch }),
            any::<bool>().prop_map(|complete| Message::Seek { complete }),
            epoch().prop_map(|epoch| Message::Invite { epoch }),
            (epoch(), prop::collection::vec(report(), 0..3))
                .prop_map(|(epoch, workers)| Message::Attend { epoch, workers }),
            (epoch(), prop::collection::vec(who(), 0..3))
                .prop_map(|(epoch, workers)| Message::Ready { epoch, workers }),
            (epoch(), who(), evidence()).prop_map(|(epoch, target, evidence)| Message::Suspect {
                epoch,
                target,
                evidence
            }),
            (epoch(), ballot()).prop_map(|(epoch, ballot)| Message::Wedge { epoch, ballot }),
            (epoch(), ballot(), prop::collection::vec(report(), 0..3), prop::option::of((ballot(), value())))
                .prop_map(|(epoch, ballot, reports, accepted)| Message::Promise {
                    epoch,
                    ballot,
                    reports,
                    complete: true,
                    accepted,
                    stable: Step(1)
                }),
            (epoch(), ballot()).prop_map(|(epoch, promised)| Message::Reject { epoch, promised }),
            (epoch(), ballot(), value()).prop_map(|(epoch, ballot, decision)| Message::Propose {
                epoch,
                ballot,
                decision
            }),
            (epoch(), ballot()).prop_map(|(epoch, ballot)| Message::Accepted { epoch, ballot }),
            value().prop_map(Message::Install),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(500))]

        #[test]
        fn arbitrary_bytes_never_panic(bytes: Vec<u8>) {
            let _ = decode::<Envelope>(&bytes);
            let _ = decode::<ToWorker>(&bytes);
            let _ = decode::<FromWorker>(&bytes);
            let _ = decode::<PeerMessage>(&bytes);
        }

        #[test]
        fn a_message_survives_and_a_damaged_one_never_panics(
            message in some_message(), at: prop::sample::Index, value: u8, cut: prop::sample::Index,
        ) {
            let sent = envelope(message);
            let mut bytes = encode(&sent).expect("it fits");
            prop_assert_eq!(decode::<Envelope>(&bytes), Ok(sent));
            let index = at.index(bytes.len());
            bytes[index] = value;
            bytes.truncate(cut.index(bytes.len()) + 1);
            let _ = decode::<Envelope>(&bytes);
        }

        #[test]
        fn whatever_launchers_say_nobody_panics_and_what_is_answered_can_be_sent(
            said in prop::collection::vec((0u32..4, 0u64..400, plausible_message()), 1..60),
        ) {
            let timing = Timing::default();
            let (mode, fence) = (Mode::Slots, Fence::Majority);
            let (spares, catch_up) = (0, CatchUp::Results);
            let job = Job { seats: 3, workers_per_launcher: 1, slots: 4, spares, mode, catch_up, fence, timing };
            let voter = |seat: u32| Voter { seat: Seat(seat), incarnation: Incarnation(u128::MAX - u128::from(seat)) };
            let mut launcher = Launcher::new(job, voter(0), Duration::ZERO);
            let (mut worker, _) = Worker::new(job, Incarnation(u128::MAX - 3), None, Duration::ZERO);
            let hello = Report { worker: worker.incarnation(), progress: Some(Progress::START), holds: true };
            let message = FromWorker::Hello(hello);
            launcher.handle(Duration::ZERO, LauncherEvent::Worker { child: Child(0), message });
            let mut now = Duration::ZERO;
            for (seat, wait, message) in said {
                now += Duration::from_millis(wait);
                let envelope = Envelope { from: voter(seat), message };
                if envelope.check().is_err() {
                    continue;
                }
                let event = LauncherEvent::Message(envelope);
                for action in launcher.handle(now, event) {
                    match action {
                        LauncherAction::Send { message, .. } => {
                            let bytes = encode(&Envelope { from: launcher.voter(), message }).expect("it fits");
                            prop_assert!(decode::<Envelope>(&bytes).is_ok());
                        }
                        LauncherAction::Worker { message, .. } => {
                            worker.handle(now, WorkerEvent::Launcher(message));
                        }
                        _ => {}
                    }
                }
                prop_assert!(launcher.deadline() <= now + timing.heartbeat);
            }
        }
    }
}
