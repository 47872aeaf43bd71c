use std::net::{Ipv4Addr, SocketAddr};
use std::sync::mpsc::channel;

use paceline_runtime::membership::{CatchUp, Mode, Progress, Report};

use super::*;
use crate::health::Pulse;
use crate::news::News;

const WISH: Wish =
    Wish { mode: Mode::Slots, slots: None, spares: 0, catch_up: CatchUp::Results, checkpoint_every: None };

/// A job of two ranks on one machine, and what its workers are told.
struct Rig {
    membership: Membership,
    told: BTreeMap<Child, Receiver<ToChild>>,
}

impl Rig {
    fn new() -> Self {
        let (patience, listen) = (Duration::from_secs(60), IpAddr::V4(Ipv4Addr::LOCALHOST));
        let setting = Setting { ranks: 2, node: 0, nodes: (1, 1), refusal: None, patience, listen };
        let news = News::new().expect("a descriptor");
        let shared = Shared { state: Default::default(), news, pulse: Pulse::new(2) };
        let membership = Membership::new(setting, Arc::new(shared), None, (None, None));
        Self { membership, told: BTreeMap::new() }
    }

    /// A worker comes, under its number as its incarnation.
    fn attach(&mut self, child: u32) {
        let (to_worker, told) = channel();
        self.told.insert(Child(child), told);
        self.membership.hear(Input::Attached { child: Child(child), wish: WISH, to_worker });
        let incarnation = Incarnation(child.into());
        let addr = SocketAddr::from(([127, 0, 0, 1], 1));
        let member = worker(child as usize);
        self.say(child, FromChild::Contact(Contact { incarnation, member, links: addr, exchange: addr }));
        let begins = (child == 1).then_some(Progress::START);
        let hello = Report { worker: incarnation, progress: begins, holds: begins.is_some() };
        self.say(child, FromChild::Says(FromWorker::Hello(hello)));
    }

    fn say(&mut self, child: u32, message: FromChild) {
        self.membership.hear(Input::Said { child: Child(child), message });
    }

    fn members(&self) -> usize {
        let view = self.membership.job.as_ref().and_then(|(_, core)| core.view());
        view.map_or(0, |view| view.members.len())
    }

    /// Lets time pass until there are so many members.
    fn until_members(&mut self, count: usize) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while self.members() != count {
            assert!(Instant::now() < deadline, "there are {} members", self.members());
            thread::sleep(Duration::from_millis(5));
            self.membership.tell_core(LauncherEvent::Tick);
        }
    }

    fn is_released(&self, child: u32) -> bool {
        self.told[&Child(child)].try_iter().any(|message| message == ToChild::Finished)
    }
}

/// What a worker that asks for that is refused with, after one that asks for [`WISH`] has come.
fn refusal_of(wish: Wish) -> Option<String> {
    let mut rig = Rig::new();
    rig.attach(1);
    let (to_worker, told) = channel();
    rig.membership.hear(Input::Attached { child: Child(2), wish, to_worker });
    told.try_iter().find_map(|message| match message {
        ToChild::Refused { reason } => Some(reason),
        _ => None,
    })
}

#[test]
fn a_worker_that_asks_for_another_membership_than_the_first_is_refused_in_a_line() {
    assert_eq!(refusal_of(WISH), None);
    for other in [Wish { spares: 1, ..WISH }, Wish { catch_up: CatchUp::State, ..WISH }] {
        let reason = refusal_of(other).expect("it is refused");
        assert!(reason.ends_with("start the same program on all workers"), "{reason}");
    }
    let reason = refusal_of(Wish { spares: 2, ..WISH }).expect("it is refused");
    assert_eq!(reason, "2 spares of 2 workers leave none to compute; ask for fewer");
}

#[test]
fn whoever_comes_too_late_for_the_last_step_holds_nobody_up() {
    let mut rig = Rig::new();
    rig.attach(1);
    rig.attach(2);
    rig.until_members(2);
    let epoch = rig.membership.job.as_ref().map(|(_, core)| core.epoch()).expect("there is a job");
    rig.membership.hear(Input::Died(Child(2)));
    let report = Report { worker: Incarnation(1), progress: Some(Progress::START), holds: true };
    rig.say(1, FromChild::Says(FromWorker::Report { epoch, report }));
    rig.until_members(1);
    rig.attach(3);
    rig.membership.release_when_complete();
    assert!(!rig.is_released(1), "the training is not complete");
    rig.say(1, FromChild::Finished);
    rig.membership.release_when_complete();
    assert!(rig.is_released(1) && rig.is_released(3));
    rig.attach(4);
    assert!(rig.is_released(4), "nor has it anybody to wait for");
}

#[test]
fn nobody_is_let_go_while_a_state_is_taken_over_however_long_that_takes() {
    let mut rig = Rig::new();
    rig.attach(1);
    rig.attach(2);
    rig.until_members(2);
    rig.say(1, FromChild::Finished);
    let long_ago =
        Instant::now().checked_sub(2 * COMPLETION_LIMIT).expect("the machine runs for long enough");
    rig.membership.completed = Some(long_ago);
    rig.say(2, FromChild::Moving);
    rig.membership.release_when_complete();
    assert!(!rig.is_released(1), "the other still takes the last state over");
    rig.membership.moved = Some(long_ago);
    rig.membership.release_when_complete();
    assert!(rig.is_released(1), "nothing has moved for long");
}

#[test]
fn workers_that_went_while_there_was_no_connection_are_forgotten_on_the_next_one() {
    let mut rig = Rig::new();
    rig.attach(1);
    let addr = SocketAddr::from(([127, 0, 0, 1], 1));
    let contact = |number: u32| Contact {
        incarnation: Incarnation(number.into()),
        member: worker(number as usize),
        links: addr,
        exchange: addr,
    };
    let mut hear = |word| rig.membership.hear(Input::Launcher { node: 1, heard: Heard::Word(word) });
    hear(Word::Contact(contact(2)));
    hear(Word::Contact(contact(3)));
    hear(Word::Workers(vec![Incarnation(3)]));
    let forgotten = |message: &ToChild| matches!(message, ToChild::Forget(_));
    let told: Vec<_> = rig.told[&Child(1)].try_iter().filter(forgotten).collect();
    assert_eq!(told, [ToChild::Forget(Incarnation(2))]);
}

#[test]
fn a_job_of_several_nodes_that_is_founded_again_counts_on_from_a_later_epoch() {
    let first = claim(Epoch(0), true);
    assert!(claim(first, true) > first && claim(Epoch(0), true) >= first);
    assert_eq!(claim(Epoch(0), false), Epoch(1));
}
