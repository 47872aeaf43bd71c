use super::*;
use crate::membership::progress::Resolution;
use crate::membership::settings::{Fence, Timing};
use crate::membership::view::{Mode, Seat, Voter};

const MS: Duration = Duration::from_millis(1);
const NEWCOMER: Incarnation = Incarnation(9);

/// A view of workers 1 to 3 under one launcher, which begins after the fourth step.
fn decision() -> Decision {
    let launcher = Incarnation(99);
    let member =
        |worker: u128| Member { incarnation: Incarnation(worker), launcher, slots: vec![worker as Slot - 1] };
    let view = View {
        epoch: Epoch(1),
        voters: vec![Voter { seat: Seat(0), incarnation: launcher }],
        members: (1..4).map(member).collect(),
    };
    let sources = (1..4).map(Incarnation).collect();
    Decision { view, resolution: Resolution { applied: Step(4), lineage: 7, sources } }
}

/// A worker without a state that has just heard of the view, and whom it has asked.
fn newcomer() -> (Worker, Incarnation) {
    let (mode, fence, timing) = (Mode::Slots, Fence::Majority, Timing::default());
    let job = Job { seats: 1, workers_per_launcher: 4, slots: 3, mode, fence, timing };
    let (mut worker, _) = Worker::new(job, NEWCOMER, None, Duration::ZERO);
    let asked = asks(worker.handle(Duration::ZERO, WorkerEvent::Launcher(ToWorker::Install(decision()))));
    (worker, asked.expect("it wants the state"))
}

/// Whom these actions ask for a state.
fn asks(actions: Vec<WorkerAction>) -> Option<Incarnation> {
    actions.into_iter().find_map(|action| match action {
        WorkerAction::Peer { to, message: PeerMessage::Pull { .. } } => Some(to),
        _ => None,
    })
}

fn soon(from: Incarnation) -> WorkerEvent {
    WorkerEvent::Peer { from, message: PeerMessage::Soon }
}

#[test]
fn a_newcomer_asks_nobody_else_while_the_one_that_it_asked_says_that_it_will_answer() {
    let (mut worker, asked) = newcomer();
    worker.handle(400 * MS, soon(asked));
    assert_eq!(asks(worker.handle(600 * MS, WorkerEvent::Tick)), None);
    assert_eq!(asks(worker.handle(900 * MS, WorkerEvent::Tick)), Some(asked), "whether it still lives");
    worker.handle(901 * MS, soon(asked));
    assert_eq!(asks(worker.handle(1401 * MS, WorkerEvent::Tick)), Some(asked));
}

#[test]
fn a_newcomer_asks_the_next_one_when_the_first_says_nothing() {
    let (mut worker, asked) = newcomer();
    let next = asks(worker.handle(500 * MS, WorkerEvent::Tick)).expect("it still wants the state");
    assert_ne!(next, asked);
    worker.handle(600 * MS, soon(next));
    assert_eq!(asks(worker.handle(1100 * MS, WorkerEvent::Tick)), Some(next));
    assert_ne!(asks(worker.handle(1600 * MS, WorkerEvent::Tick)), Some(next));
}
