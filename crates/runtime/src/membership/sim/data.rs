//! A worker's buffers and its data plane: contributions that come in until a collective is complete.

use std::collections::BTreeMap;

use super::super::message::{Stripe, Transfer};
use super::super::mutation::Mutation;
use super::super::progress::Step;
use super::super::view::{Epoch, Incarnation, View};
use super::{Inputs, Model};

/// The collectives of a step.
pub(super) const OPS: u8 = 2;

/// What one worker contributes to one collective.
#[derive(Clone, Debug)]
pub(super) struct Frame {
    pub(super) from: Incarnation,
    pub(super) epoch: Epoch,
    pub(super) step: Step,
    pub(super) op: u8,
    pub(super) inputs: Inputs,
}

/// Bytes that follow a [`Transfer`].
#[derive(Clone, Debug)]
pub(super) enum Bytes {
    Result(Inputs),
    State(Box<Model>),
}

/// The program's side of a worker.
#[derive(Clone, Debug)]
pub(super) struct Program {
    pub(super) model: Model,
    /// The inputs of the next step, kept.
    pub(super) kept: Inputs,
    /// The result of the last step.
    pub(super) result: Option<Inputs>,
    view: Option<View>,
    arrived: BTreeMap<(Epoch, Step, u8), BTreeMap<Incarnation, Frame>>,
    /// Frames of an epoch that this worker has not entered: the sender's connection waits to be accepted.
    early: Vec<Frame>,
    /// What came of a transfer that the core has not adopted yet.
    incoming: BTreeMap<Stripe, Bytes>,
    pub(super) mutation: Mutation,
    /// See [`Model::apply`].
    salt: u64,
}

/// A collective that is complete here.
pub(super) struct Complete {
    pub(super) frames: BTreeMap<Incarnation, Frame>,
}

impl Program {
    pub(super) fn new(model: Model, mutation: Mutation, salt: u64) -> Self {
        Self {
            model,
            kept: Inputs::new(),
            result: None,
            view: None,
            arrived: BTreeMap::new(),
            early: Vec::new(),
            incoming: BTreeMap::new(),
            mutation,
            salt,
        }
    }

    fn key(&self, frame: &Frame) -> (Epoch, Step, u8) {
        let shared = self.mutation == Mutation::SharedNamespace;
        (if shared { Epoch(0) } else { frame.epoch }, frame.step, frame.op)
    }

    pub(super) fn open(&mut self, view: View) -> Vec<Frame> {
        let epoch = view.epoch;
        self.view = Some(view);
        self.incoming.clear();
        self.early.retain(|frame| frame.epoch >= epoch);
        let (now, later) =
            std::mem::take(&mut self.early).into_iter().partition(|f: &Frame| f.epoch == epoch);
        self.early = later;
        now
    }

    pub(super) fn close(&mut self) {
        if self.mutation != Mutation::SharedNamespace {
            self.arrived.clear();
        }
    }

    pub(super) fn hold_back(&mut self, frame: Frame) {
        self.early.push(frame);
    }

    pub(super) fn arrive(&mut self, frame: Frame, own: bool) {
        if self.mutation == Mutation::InputInPlace && !own && frame.op + 1 == OPS {
            for (slot, value) in &mut self.kept {
                *value = value.wrapping_add(frame.inputs.values().sum::<u64>() ^ u64::from(*slot));
            }
        }
        self.arrived.entry(self.key(&frame)).or_default().insert(frame.from, frame);
    }

    pub(super) fn complete(&self, epoch: Epoch, step: Step, op: u8) -> Option<Complete> {
        let probe = Frame { from: Incarnation(0), epoch, step, op, inputs: Inputs::new() };
        let view = self.view.as_ref().filter(|view| view.epoch == epoch)?;
        let arrived = self.arrived.get(&self.key(&probe))?;
        let of_view = |member: &Incarnation| arrived.get(member).cloned().map(|frame| (*member, frame));
        let frames: Option<BTreeMap<_, _>> = view.members.iter().map(|m| of_view(&m.incarnation)).collect();
        frames.map(|frames| Complete { frames })
    }

    pub(super) fn expect(&mut self, stripe: Stripe, bytes: Bytes) {
        self.incoming.insert(stripe, bytes);
    }

    /// Whether what is to be adopted has come in parts.
    pub(super) fn has_parts(&self) -> bool {
        !self.incoming.is_empty() && !self.incoming.contains_key(&Stripe::WHOLE)
    }

    /// The bytes of a transfer that the core wants to have adopted. Says whether its parts are of one state.
    #[must_use]
    pub(super) fn adopt(&mut self, transfer: Transfer) -> bool {
        let mut parts = std::mem::take(&mut self.incoming);
        let whole = parts.remove(&Stripe::WHOLE);
        let is_whole = |parts: &BTreeMap<Stripe, Bytes>| {
            let of = parts.keys().next().map_or(0, |stripe| usize::from(stripe.of));
            parts.len() == of && parts.keys().all(|stripe| usize::from(stripe.of) == of)
        };
        match (whole, transfer) {
            (Some(Bytes::Result(result)), Transfer::Result { .. }) => self.apply(result),
            (Some(Bytes::State(model)), Transfer::State { .. }) => self.load(*model),
            (None, Transfer::State { .. }) if is_whole(&parts) => {
                let mut models = parts.into_values().map(|part| match part {
                    Bytes::State(model) => *model,
                    Bytes::Result(_) => unreachable!("a part of a result"),
                });
                let Some(model) = models.next() else {
                    unreachable!("{transfer:?} adopted of which nothing came")
                };
                let agree = models.all(|other| other == model);
                self.load(model);
                return agree;
            }
            (whole, _) => unreachable!("{transfer:?} adopted with {whole:?} and {parts:?}"),
        }
        true
    }

    fn load(&mut self, model: Model) {
        self.model = model;
        self.result = None;
        self.kept.clear();
    }

    pub(super) fn apply(&mut self, result: Inputs) {
        self.model.apply(&result, self.salt);
        self.result = Some(result);
        self.kept.clear();
        let applied = self.model.applied();
        self.arrived.retain(|(_, step, _), _| step.0 > applied);
    }
}
