use super::*;
use crate::membership::progress::Resolution;
use crate::membership::settings::{CatchUp, Fence, Timing};
use crate::membership::view::{Mode, Seat, Voter};

const MS: Duration = Duration::from_millis(1);
const NEWCOMER: Incarnation = Incarnation(9);
const WHOLE: Stripe = Stripe::WHOLE;

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

fn job(catch_up: CatchUp) -> Job {
    let (mode, fence, timing) = (Mode::Slots, Fence::Majority, Timing::default());
    Job { seats: 1, workers_per_launcher: 4, slots: 3, spares: 0, mode, catch_up, fence, timing }
}

/// A worker without a state that has just heard of the view, and whom it has asked.
fn newcomer() -> (Worker, Incarnation) {
    let (mut worker, _) = Worker::new(job(CatchUp::Results), NEWCOMER, None, Duration::ZERO);
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

#[test]
fn what_a_worker_has_loaded_itself_counts_for_nothing_in_a_job_that_goes_on() {
    let loaded = Progress { applied: Step(400), lineage: 3 };
    let (mut worker, _) = Worker::new(job(CatchUp::Results), NEWCOMER, Some(loaded), Duration::ZERO);
    let said = worker.handle(Duration::ZERO, WorkerEvent::Tick);
    let beat = WorkerAction::Launcher(FromWorker::Beat { stable: Step(0) });
    assert!(said.contains(&beat), "no view of this job is to wait for that step: {said:?}");
    let actions = worker.handle(Duration::ZERO, WorkerEvent::Launcher(ToWorker::Install(decision())));
    assert_eq!(worker.progress(), None);
    let asked = asks(actions).expect("it wants the state");
    let state = decision().resolution.state();
    let transfer = Transfer::State { state };
    worker.handle(Duration::ZERO, WorkerEvent::Received { from: asked, transfer, stripe: WHOLE });
    assert_eq!(worker.progress(), Some(state), "though it is of an earlier step");
}

/// A member that has made no step in its view yet, and to which a state is worth so many results.
fn member(state_worth: u64) -> Worker {
    member_of(job(CatchUp::Results), state_worth)
}

fn member_of(job: Job, state_worth: u64) -> Worker {
    let state = decision().resolution.state();
    let (worker, _) = Worker::new(job, Incarnation(1), Some(state), Duration::ZERO);
    let mut worker = worker.with_state_worth(state_worth);
    worker.handle(Duration::ZERO, WorkerEvent::Launcher(ToWorker::Install(decision())));
    worker
}

/// What it sends and says to the newcomer in the next step, in which the state before it becomes stable.
fn step(worker: &mut Worker) -> Vec<WorkerAction> {
    step_at(worker, Duration::ZERO)
}

fn step_at(worker: &mut Worker, now: Duration) -> Vec<WorkerAction> {
    let from = worker.progress().expect("a member has a state");
    let (epoch, step) = (Epoch(1), from.applied.next());
    worker.handle(now, WorkerEvent::Submitted { from, slots: vec![0] });
    let actions = worker.handle(now, WorkerEvent::FirstReduced { epoch, step });
    worker.handle(now, WorkerEvent::Reduced { epoch, step });
    let to_newcomer = |action: &WorkerAction| matches!(action, WorkerAction::Send { to, .. } | WorkerAction::Peer { to, .. } if *to == NEWCOMER);
    actions.into_iter().filter(to_newcomer).collect()
}

fn pull(have: Option<Progress>) -> WorkerEvent {
    WorkerEvent::Peer { from: NEWCOMER, message: PeerMessage::Pull { have } }
}

fn enter() -> WorkerAction {
    WorkerAction::Peer { to: NEWCOMER, message: PeerMessage::Enter { epoch: Epoch(1) } }
}

fn is_promised() -> WorkerAction {
    WorkerAction::Peer { to: NEWCOMER, message: PeerMessage::Soon }
}

fn has_state(actions: &[WorkerAction]) -> bool {
    matches!(actions, [WorkerAction::Send { transfer: Transfer::State { .. }, .. }])
}

fn has_result(actions: &[WorkerAction]) -> bool {
    matches!(actions, [WorkerAction::Send { transfer: Transfer::Result { .. }, .. }])
}

#[test]
fn a_newcomer_to_which_more_results_are_on_their_way_than_a_state_is_worth_is_to_enter() {
    let mut worker = member(2);
    step(&mut worker);
    worker.handle(Duration::ZERO, pull(None));
    assert!(has_state(&step(&mut worker)));
    assert!(has_result(&step(&mut worker)));
    assert!(has_result(&step(&mut worker)));
    assert_eq!(step(&mut worker), [enter()]);
    assert_eq!(step(&mut worker), [], "it is told once");
    let again = worker.handle(Duration::ZERO, pull(None));
    assert_eq!(again, [enter()], "the word was lost");
    assert_eq!(step(&mut worker), [], "a state would be of no use");
}

#[test]
fn a_newcomer_that_says_what_it_has_is_sent_results_until_it_is_near() {
    let mut worker = member(2);
    step(&mut worker);
    worker.handle(Duration::ZERO, pull(None));
    assert!(has_state(&step(&mut worker)));
    for _ in 0..5 {
        let have = worker.progress().expect("a member has a state");
        assert!(has_result(&step(&mut worker)));
        let said = worker.handle(
            Duration::ZERO,
            WorkerEvent::Peer { from: NEWCOMER, message: PeerMessage::Pulled { have } },
        );
        assert_eq!(said, [enter()]);
    }
}

/// A member that has just made a step, for which it took 100 ms, at that time.
fn member_with_long_steps(catch_up: CatchUp) -> (Worker, Duration) {
    let mut worker = member_of(job(catch_up), 2);
    for round in 1..=3 {
        step_at(&mut worker, 100 * round * MS);
    }
    (worker, 300 * MS)
}

#[test]
fn a_newcomer_that_is_sent_nothing_enters_with_the_beginning_of_the_next_step() {
    let (mut worker, at) = member_with_long_steps(CatchUp::State);
    assert_eq!(worker.handle(at + 60 * MS, pull(None)), [is_promised()]);
    assert_eq!(step_at(&mut worker, at + 100 * MS), [enter()]);
    assert_eq!(step_at(&mut worker, at + 200 * MS), [], "it has been told");

    let (mut worker, at) = member_with_long_steps(CatchUp::Results);
    let have = worker.progress();
    assert_eq!(
        worker.handle(at + 60 * MS, pull(have)),
        [is_promised()],
        "one that comes back, and lacks nothing"
    );
    assert_eq!(step_at(&mut worker, at + 100 * MS), [enter()]);
    assert_eq!(worker.handle(at + 110 * MS, pull(worker.progress())), [enter()], "the step has just begun");

    let (mut worker, at) = member_with_long_steps(CatchUp::Results);
    worker.handle(at + 10 * MS, pull(None));
    assert!(has_state(&step_at(&mut worker, at + 100 * MS)));
    let message = PeerMessage::Pulled { have: worker.previous.expect("a step was made") };
    let said = worker.handle(at + 160 * MS, WorkerEvent::Peer { from: NEWCOMER, message });
    assert_eq!(said, [enter()], "with the next result it would be as late");
}

#[test]
fn where_states_are_taken_over_a_newcomer_is_to_enter_at_once_and_a_member_that_is_behind_gets_the_state() {
    let mut worker = member_of(job(CatchUp::State), 2);
    let before = worker.progress();
    assert_eq!(worker.handle(Duration::ZERO, pull(None)), [enter()]);
    assert_eq!(step(&mut worker), [], "what it were sent now would be of no use");
    let mut next = decision();
    next.view.epoch = Epoch(2);
    next.view.members[2].incarnation = NEWCOMER;
    let state = worker.progress().expect("a member has a state");
    next.resolution =
        Resolution { applied: state.applied, lineage: state.lineage, sources: vec![Incarnation(1)] };
    worker.handle(Duration::ZERO, WorkerEvent::Launcher(ToWorker::Install(next.clone())));
    let message = PeerMessage::Fetch { epoch: Epoch(2), have: before, stripe: WHOLE };
    let actions = worker.handle(Duration::ZERO, WorkerEvent::Peer { from: NEWCOMER, message });
    let transfer = Transfer::State { state };
    assert!(actions.contains(&WorkerAction::Send { to: NEWCOMER, transfer, stripe: WHOLE }), "{actions:?}");

    let (mut outside, _) = Worker::new(job(CatchUp::State), NEWCOMER, None, Duration::ZERO);
    outside.handle(Duration::ZERO, WorkerEvent::Launcher(ToWorker::Install(decision())));
    let state = decision().resolution.state();
    let from = Incarnation(1);
    outside.handle(MS, WorkerEvent::Received { from, transfer: Transfer::State { state }, stripe: WHOLE });
    let transfer = Transfer::Result { before: state, after: state.after(Epoch(1)) };
    assert_eq!(
        outside.handle(MS, WorkerEvent::Received { from, transfer, stripe: WHOLE }),
        [],
        "a result is not applied"
    );
}

#[test]
fn a_newcomer_without_a_state_asks_to_enter_when_it_is_told_to() {
    let (mut worker, asked) = newcomer();
    let said = |actions: Vec<WorkerAction>| {
        actions.contains(&WorkerAction::Launcher(FromWorker::Ready { epoch: Epoch(1) }))
    };
    let message = |epoch| WorkerEvent::Peer { from: asked, message: PeerMessage::Enter { epoch } };
    assert!(!said(worker.handle(MS, message(Epoch(0)))), "of a view that is over");
    assert!(said(worker.handle(2 * MS, message(Epoch(1)))));
}

#[test]
fn whoever_asks_between_two_views_is_answered_in_the_next_one() {
    let mut worker = member(2);
    worker.handle(Duration::ZERO, WorkerEvent::Launcher(ToWorker::Wedge { epoch: Epoch(1) }));
    assert_eq!(worker.handle(Duration::ZERO, pull(None)), []);
    let mut next = decision();
    next.view.epoch = Epoch(2);
    let actions = worker.handle(Duration::ZERO, WorkerEvent::Launcher(ToWorker::Install(next)));
    let soon = WorkerAction::Peer { to: NEWCOMER, message: PeerMessage::Soon };
    assert!(actions.contains(&soon), "{actions:?}");
}

#[test]
fn a_newcomer_keeps_a_newer_state_when_a_slower_source_sends_an_older_one() {
    let (mut worker, asked) = newcomer();
    let state = |step| Progress { applied: Step(step), lineage: step };
    let send = |worker: &mut Worker, from, step| {
        let transfer = Transfer::State { state: state(step) };
        worker.handle(MS, WorkerEvent::Received { from, transfer, stripe: WHOLE });
        worker.progress()
    };
    assert_eq!(send(&mut worker, asked, 6), Some(state(6)));
    assert_eq!(send(&mut worker, Incarnation(3), 5), Some(state(6)));
    assert_eq!(send(&mut worker, Incarnation(3), 7), Some(state(7)));
}

/// A worker that is a member of the view without its state, and what it asks for.
fn behind(stripes: usize, have: Option<Progress>, catch_up: CatchUp) -> (Worker, Vec<(Incarnation, Stripe)>) {
    let (worker, _) = Worker::new(job(catch_up), NEWCOMER, None, Duration::ZERO);
    let mut worker = worker.with_stripes(stripes);
    worker.current = have;
    let mut entered = decision();
    entered.view.members.push(Member { incarnation: NEWCOMER, launcher: Incarnation(99), slots: vec![] });
    let actions = worker.handle(Duration::ZERO, WorkerEvent::Launcher(ToWorker::Install(entered)));
    (worker, fetched(&actions))
}

/// Which parts these actions ask for, and whom.
fn fetched(actions: &[WorkerAction]) -> Vec<(Incarnation, Stripe)> {
    let fetch = |action: &WorkerAction| match *action {
        WorkerAction::Peer { to, message: PeerMessage::Fetch { stripe, .. } } => Some((to, stripe)),
        _ => None,
    };
    actions.iter().filter_map(fetch).collect()
}

fn adopts(actions: &[WorkerAction]) -> bool {
    actions.iter().any(|action| matches!(action, WorkerAction::Adopt(_)))
}

#[test]
fn a_member_that_is_behind_asks_each_source_for_a_part_of_the_state_and_has_it_when_all_have_come() {
    let (mut worker, asked) = behind(8, None, CatchUp::Results);
    let indices: Vec<u16> = asked.iter().map(|(_, stripe)| stripe.index).collect();
    let whom: BTreeSet<Incarnation> = asked.iter().map(|(to, _)| *to).collect();
    assert_eq!((indices, whom.len()), (vec![0, 1, 2], 3), "{asked:?}");
    let transfer = Transfer::State { state: decision().resolution.state() };
    for &(from, stripe) in &asked[..2] {
        assert!(!adopts(&worker.handle(MS, WorkerEvent::Received { from, transfer, stripe })));
        assert!(
            !adopts(&worker.handle(MS, WorkerEvent::Received { from, transfer, stripe })),
            "once is not twice"
        );
    }
    let odd = Stripe { index: 2, of: 5 };
    assert!(!worker.wants(transfer, odd), "of another division");
    assert!(!adopts(&worker.handle(MS, WorkerEvent::Received { from: asked[2].0, transfer, stripe: odd })));
    let (from, stripe) = asked[2];
    assert!(adopts(&worker.handle(MS, WorkerEvent::Received { from, transfer, stripe })));
    assert_eq!(worker.progress(), Some(decision().resolution.state()));
    assert!(!worker.wants(transfer, stripe), "it has all");
}

#[test]
fn only_the_part_that_has_not_come_is_asked_of_another_source() {
    let (mut worker, asked) = behind(2, None, CatchUp::Results);
    let [(first, one), (second, other)] = asked[..] else { panic!("{asked:?}") };
    let transfer = Transfer::State { state: decision().resolution.state() };
    worker.handle(MS, WorkerEvent::Received { from: first, transfer, stripe: one });
    worker.handle(2 * MS, soon(second));
    assert_eq!(
        fetched(&worker.handle(502 * MS, WorkerEvent::Tick)),
        [(second, other)],
        "it has said that it will"
    );
    let again = fetched(&worker.handle(1002 * MS, WorkerEvent::Tick));
    assert!(matches!(again[..], [(to, stripe)] if to != second && stripe == other), "{again:?}");
    let (from, stripe) = again[0];
    assert!(adopts(&worker.handle(1003 * MS, WorkerEvent::Received { from, transfer, stripe })));
}

#[test]
fn a_state_comes_whole_where_parts_of_it_would_be_of_different_ones_or_a_result_is_enough() {
    let state = decision().resolution.state();
    let before = Progress { applied: Step(state.applied.0 - 1), lineage: 3 };
    for (have, catch_up) in [(None, CatchUp::State), (Some(before), CatchUp::Results)] {
        let (mut worker, asked) = behind(8, have, catch_up);
        assert!(matches!(asked[..], [(_, Stripe::WHOLE)]), "{asked:?}");
        let (from, transfer) = (asked[0].0, Transfer::State { state });
        assert!(adopts(&worker.handle(MS, WorkerEvent::Received { from, transfer, stripe: WHOLE })));
    }
    let (mut worker, asked) = behind(8, None, CatchUp::Results);
    let (from, transfer) = (asked[0].0, Transfer::State { state });
    assert!(
        adopts(&worker.handle(MS, WorkerEvent::Received { from, transfer, stripe: WHOLE })),
        "what was on its way"
    );
}

#[test]
fn parts_are_all_there_is_and_no_byte_twice() {
    for (len, of) in [(0, 1), (1, 3), (7, 3), (1000, 8), (usize::MAX, 8)] {
        let mut next = 0;
        for index in 0..of {
            let range = Stripe { index, of }.range(len);
            assert_eq!(range.start, next);
            assert!(range.len() <= len / usize::from(of) + 1);
            next = range.end;
        }
        assert_eq!(next, len);
    }
    assert!(!Stripe { index: 1, of: 1 }.is_valid() && !Stripe { index: 0, of: 0 }.is_valid());
    assert!(!Stripe { index: 0, of: MAX_STRIPES as u16 + 1 }.is_valid());
}
