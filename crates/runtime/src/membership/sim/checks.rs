//! The invariants, checked from outside: nothing here uses the core's own rules to judge the core.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::super::launcher::Launcher;
use super::super::message::{Ballot, Decision, Transfer};
use super::super::progress::Step;
use super::super::settings::{CatchUp, Fence, Job};
use super::super::view::{Epoch, Incarnation, Mode, Slot, View};
use super::super::worker::Worker;
use super::data::{Complete, Program};
use super::world::{Store, World};
use super::{Inputs, Model};

pub(super) struct Checks {
    job: Job,
    pub(super) violation: Option<String>,
    /// The faults have ended.
    pub(super) peace: bool,
    pub(super) decisions: BTreeMap<Epoch, Decision>,
    accepted: BTreeMap<(Epoch, Ballot), (Decision, BTreeSet<Incarnation>)>,
    claimed: BTreeSet<Epoch>,
    removed: BTreeSet<Incarnation>,
    epochs: BTreeMap<Incarnation, Epoch>,
    /// Stable steps: in which epoch the first worker knew, and the state after them.
    pub(super) stable: BTreeMap<u64, (Epoch, u64)>,
    /// The states from which workers have run the next step, by epoch and step.
    states: BTreeMap<(Epoch, u64), u64>,
    applied_ever: BTreeMap<Incarnation, u64>,
    /// Which batches made which state, and which batches are in stable steps.
    outcomes: HashMap<u64, Vec<u64>>,
    in_flight: Vec<u64>,
    batches: BTreeMap<u64, u64>,
    reference: Model,
    stable_in: BTreeMap<(Epoch, Incarnation), u32>,
    pub(super) foundings: u32,
}

impl Checks {
    pub(super) fn new(job: Job) -> Self {
        Self {
            job,
            violation: None,
            peace: false,
            decisions: BTreeMap::new(),
            accepted: BTreeMap::new(),
            claimed: BTreeSet::new(),
            removed: BTreeSet::new(),
            epochs: BTreeMap::new(),
            stable: BTreeMap::new(),
            states: BTreeMap::new(),
            applied_ever: BTreeMap::new(),
            outcomes: HashMap::new(),
            in_flight: Vec::new(),
            batches: BTreeMap::new(),
            reference: Model::new(job.slots),
            stable_in: BTreeMap::new(),
            foundings: 0,
        }
    }

    pub(super) fn fail(&mut self, reason: impl FnOnce() -> String) {
        self.violation.get_or_insert_with(reason);
    }

    fn ensure(&mut self, holds: bool, reason: impl FnOnce() -> String) {
        if !holds {
            self.fail(reason);
        }
    }

    // ---- views: I1, I2, I3, I5 ----

    pub(super) fn claimed(&mut self, epoch: Epoch) {
        self.claimed.insert(epoch);
    }

    pub(super) fn on_launcher(&mut self, core: &mut Launcher, store: &Store) {
        let me = core.voter().incarnation;
        for (epoch, ballot, decision) in std::mem::take(&mut core.accepted_ever) {
            let (value, voters) =
                self.accepted.entry((epoch, ballot)).or_insert_with(|| (decision.clone(), BTreeSet::new()));
            let same = *value == decision;
            voters.insert(me);
            self.ensure(same, || format!("I1: two values in {epoch} at {ballot:?}"));
        }
        let Some(decision) = core.decision() else { return };
        let last = self.epochs.insert(me, decision.epoch()).unwrap_or_default();
        if last != decision.epoch() {
            self.ensure(last < decision.epoch(), || format!("I1: launcher {me} went back from {last}"));
            self.on_decision(decision, store);
        }
    }

    fn on_decision(&mut self, decision: &Decision, store: &Store) {
        let epoch = decision.epoch();
        if let Some(known) = self.decisions.get(&epoch) {
            let same = known == decision;
            self.ensure(same, || format!("I1: two decisions for {epoch}"));
            return;
        }
        if let Err(reason) = decision.check() {
            self.fail(|| format!("I1: {epoch} has {reason}"));
        }
        self.check_contributors(&decision.view);
        if self.claimed.contains(&epoch) || self.decisions.is_empty() {
            self.on_founding(decision, store);
        } else {
            self.on_change(decision);
        }
        self.decisions.insert(epoch, decision.clone());
    }

    /// Spares have no slots, and as many others have some as can.
    fn check_contributors(&mut self, view: &View) {
        let workers = self.job.seats as usize * usize::from(self.job.workers_per_launcher);
        let most = (workers - usize::from(self.job.spares)).min(self.job.slots.into());
        let (members, with_slots) = (view.members.len(), view.members.iter().filter(|m| !m.slots.is_empty()));
        let contributors = with_slots.count();
        self.ensure(contributors == members.min(most), || {
            format!("I7: {contributors} of {members} members contribute in {}", view.epoch)
        });
    }

    /// A job that begins again begins from its newest checkpoint or later; what was stable after that is lost.
    fn on_founding(&mut self, decision: &Decision, store: &Store) {
        self.foundings += 1;
        let (epoch, applied) = (decision.epoch(), decision.resolution.applied);
        let checkpoint = store.checkpoint.as_ref().map_or(Step(0), |checkpoint| checkpoint.progress.applied);
        self.ensure(applied >= checkpoint, || {
            format!("I5: {epoch} founded at {applied}, before {checkpoint}")
        });
        let later = self.decisions.keys().any(|&known| known >= epoch);
        self.ensure(!later, || format!("I1: {epoch} founded after a later one"));
        self.stable.retain(|&step, _| step <= applied.0);
        self.batches.retain(|_, step| *step <= applied.0);
    }

    fn on_change(&mut self, decision: &Decision) {
        let epoch = decision.epoch();
        let Some(before) = self.decisions.get(&Epoch(epoch.0 - 1)).map(|before| before.view.clone()) else {
            self.fail(|| format!("I2: {epoch} without the epoch before"));
            return;
        };
        if self.job.fence == Fence::Majority {
            let mut ballots = self.accepted.range((before.epoch, Ballot::default())..);
            let same_epoch = |((of, _), _): &(&(Epoch, Ballot), _)| *of == before.epoch;
            let enough = ballots
                .by_ref()
                .take_while(same_epoch)
                .any(|(_, (value, voters))| value == decision && is_quorum(&before, voters));
            self.ensure(enough, || format!("I2: {epoch} was not accepted by a quorum of the epoch before"));
        }
        let all = |view: &View| -> BTreeSet<Incarnation> {
            let members = view.members.iter().map(|member| member.incarnation);
            members.chain(view.voters.iter().map(|voter| voter.incarnation)).collect()
        };
        let present = all(&decision.view);
        self.removed.extend(all(&before).difference(&present));
        if let Some(back) = present.intersection(&self.removed).next().copied() {
            self.fail(|| format!("I3: {back} was removed and is in {epoch} again"));
        }
        let applied = decision.resolution.applied;
        if let Some((&lost, _)) = self.stable.range(applied.0 + 1..).next() {
            self.fail(|| format!("I5: {epoch} begins after {applied}, but step {lost} is stable"));
        }
    }

    // ---- steps: I3 to I10, I16 ----

    pub(super) fn runs(
        &mut self,
        core: &Worker,
        program: &Program,
        epoch: Epoch,
        step: Step,
        slots: &[Slot],
    ) {
        let (me, model) = (core.incarnation(), &program.model);
        let applied = step.0 - 1;
        self.applied_ever.entry(me).and_modify(|most| *most = (*most).max(applied)).or_insert(applied);
        self.ensure(model.applied() == applied, || {
            format!("I6: {me} runs {step} in {epoch} from the state after step {}", model.applied())
        });
        let state = *self.states.entry((epoch, applied)).or_insert(model.state());
        self.ensure(state == model.state(), || format!("I6: two states run {step} in {epoch}"));
        let of_chain = self.stable.iter().rev().find(|(_, (known_in, _))| *known_in <= epoch);
        if let Some((&newest, _)) = of_chain
            && newest > applied
        {
            self.fail(|| format!("I5: {me} runs {step} in {epoch}, but step {newest} is stable"));
        }
        // A worker that has been left behind may still run what it has; only its own epochs bind it.
        let mut known = self.stable.range(..=applied).rev();
        if let Some((&newest, &(_, state))) = known.find(|(_, (known_in, _))| *known_in <= epoch) {
            let mine = model.history.get(newest as usize) == Some(&state);
            self.ensure(mine, || format!("I4: {me} runs {step} in {epoch} with another step {newest}"));
        }
        for &slot in slots {
            let kept = program.kept.get(&slot) == Some(&model.input(slot));
            self.ensure(kept, || format!("I8: the input of slot {slot} of {step} was changed at {me}"));
        }
    }

    /// What a complete collective amounts to.
    pub(super) fn reduced(&mut self, core: &Worker, model: &Model, complete: &Complete) -> Inputs {
        let epoch = core.epoch();
        let view = core.decision().map(|decision| decision.view.clone());
        let mut result = Inputs::new();
        for (from, frame) in &complete.frames {
            let member = view.as_ref().and_then(|view| view.member(*from));
            let fenced = frame.epoch == epoch && member.is_some();
            self.ensure(fenced, || format!("I3: a frame of {from} in {} counts in {epoch}", frame.epoch));
            let named: Vec<Slot> = frame.inputs.keys().copied().collect();
            let right = member.is_some_and(|member| member.slots == named);
            self.ensure(right, || format!("I7: {from} contributes slots {named:?} in {epoch}"));
            for (&slot, &value) in &frame.inputs {
                let once = result.insert(slot, value).is_none();
                self.ensure(once, || format!("I7: slot {slot} counts twice in {epoch}"));
            }
        }
        let all = self.job.mode != Mode::Slots || result.len() == usize::from(self.job.slots);
        self.ensure(all, || format!("I7: slots {:?} alone count in {epoch}", result.keys()));
        self.in_flight = result.keys().map(|&slot| model.ledger.batch(slot)).collect();
        result
    }

    pub(super) fn applied(&mut self, core: &Worker, model: &Model, step: Step) {
        let me = core.incarnation();
        self.ensure(model.applied() == step.0, || format!("I6: {me} applied another step than {step}"));
        self.applied_ever.entry(me).and_modify(|most| *most = (*most).max(step.0)).or_insert(step.0);
        self.outcomes.insert(model.state(), std::mem::take(&mut self.in_flight));
        self.compare(core, model);
    }

    pub(super) fn adopted(&mut self, core: &Worker, model: &Model, transfer: Transfer) {
        let me = core.incarnation();
        let replays = matches!(transfer, Transfer::Result { .. });
        self.ensure(!replays || self.job.catch_up == CatchUp::Results, || {
            format!("I11: {me} applies a result of which others have the state")
        });
        self.compare(core, model);
    }

    fn compare(&mut self, core: &Worker, model: &Model) {
        if self.job.mode != Mode::Slots || self.job.catch_up == CatchUp::State {
            return;
        }
        while self.reference.applied() < model.applied() {
            let inputs = (0..self.job.slots).map(|slot| (slot, self.reference.input(slot))).collect();
            self.reference.apply(&inputs, 0);
        }
        let same = self.reference.history[model.applied() as usize] == model.state();
        let me = core.incarnation();
        self.ensure(same, || format!("I16: {me} differs from the undisturbed run after {}", model.applied()));
    }

    pub(super) fn stable(&mut self, core: &Worker, model: &Model, step: Step) {
        let (me, epoch) = (core.incarnation(), core.epoch());
        *self.stable_in.entry((epoch, me)).or_default() += 1;
        let Some(&state) = model.history.get(step.0 as usize) else {
            self.fail(|| format!("I10: {me} shows {step}, which it has not applied"));
            return;
        };
        let members = core.decision().map_or(Vec::new(), |decision| decision.view.members.clone());
        for member in members {
            let has = self.applied_ever.get(&member.incarnation).is_some_and(|&most| most >= step.0);
            self.ensure(has, || {
                format!("I10: {me} shows {step} in {epoch}, but {} lacks it", member.incarnation)
            });
        }
        let later = self.decisions.range(epoch.next()..).find(|(_, later)| later.resolution.applied < step);
        if let Some((&later, _)) = later {
            self.fail(|| format!("I5: {step} is stable in {epoch}, but {later} begins before it"));
        }
        match self.stable.get(&step.0) {
            Some(&(_, known)) => {
                self.ensure(known == state, || format!("I4: two outcomes of {step} are stable"))
            }
            None => {
                self.stable.insert(step.0, (epoch, state));
                self.count_batches(step, state);
            }
        }
        let is_newest = self.stable.last_key_value().is_some_and(|(&newest, _)| newest == step.0);
        if model.applied() == step.0 && is_newest {
            let committed = (self.batches.len() + model.ledger.redo().count()) as u64;
            let dealt = model.ledger.dealt();
            self.ensure(committed == dealt, || {
                format!("I9: {dealt} batches dealt up to {step}, {committed} done or to be done again")
            });
        }
    }

    fn count_batches(&mut self, step: Step, state: u64) {
        for batch in self.outcomes.get(&state).cloned().unwrap_or_default() {
            let other = self.batches.insert(batch, step.0);
            self.ensure(other.is_none(), || format!("I9: batch {batch} is in {step} and in step {other:?}"));
        }
    }
}

/// The rule as PROTOCOL has it, counted by hand.
fn is_quorum(view: &View, voters: &BTreeSet<Incarnation>) -> bool {
    let (mut with, mut without) = (0, 0);
    view.voters.iter().for_each(|v| if voters.contains(&v.incarnation) { with += 1 } else { without += 1 });
    with > without || (with == without && voters.contains(&view.voters[0].incarnation))
}

impl World {
    /// Whether all launchers and workers are in one view and have shown steps in it; if not, why not.
    pub(super) fn whole(&self) -> Result<(), String> {
        let newest = self.checks.decisions.keys().next_back().copied().unwrap_or_default();
        for (seat, site) in self.sites.iter().enumerate() {
            let Some(process) = &site.launcher else { return Err(format!("launcher {seat} is not there")) };
            let Some(view) = process.core.view().filter(|view| view.epoch == newest) else {
                return Err(format!("launcher {seat} is not a member of {newest}"));
            };
            if view.voters.len() != self.sites.len() {
                return Err(format!("{newest} has {} launchers", view.voters.len()));
            }
            if site.workers.len() != usize::from(self.job.workers_per_launcher) {
                return Err(format!("launcher {seat} has {} workers", site.workers.len()));
            }
            for process in site.workers.values() {
                let me = process.core.incarnation();
                let steps = self.checks.stable_in.get(&(newest, me)).copied().unwrap_or(0);
                if view.member(me).is_none() || steps < 3 {
                    return Err(format!("worker {me} of launcher {seat} made {steps} steps in {newest}"));
                }
            }
        }
        Ok(())
    }
}
