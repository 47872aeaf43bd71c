//! What a program hands over: its state, its gradients and its optimizer.

use paceline_collectives::{DType, Element};

use crate::membership::{Epoch, Step};

/// A model that is trained by whoever is a member at the time.
///
/// The calls are made on the thread that called [`train`](super::train), one at a time. They may take as long as they
/// need; a view change interrupts collectives, never the program.
pub trait Program {
    /// The element of gradients.
    type Gradient: Gradient;

    /// The number of elements of a gradient. Never changes, the same on all workers.
    fn gradient_len(&self) -> usize;

    /// All that the next step depends on, but for the position in the data, which Paceline keeps: parameters and the
    /// optimizer's moments. The same names, dtypes and lengths each time and on all workers. It is copied to newcomers,
    /// and written when this process is one.
    fn state(&mut self) -> Vec<Tensor<'_>>;

    /// Writes the mean gradient of these samples, which are numbers below [`Config::samples`](super::Config::samples),
    /// into `gradient`, whose elements are zero, and returns their mean loss. A function of the state and the samples
    /// alone, and deterministic: which process computes it must not matter.
    fn gradient(&mut self, samples: &[usize], gradient: &mut [Self::Gradient]) -> f64;

    /// Changes the state by the mean of all gradients of a step. Deterministic: every worker calls it with the same
    /// gradient in the same state and must get the same bits, also one that catches up; unless
    /// [`Config::catch_up`](super::Config::catch_up) says otherwise.
    fn apply(&mut self, gradient: &[Self::Gradient]);

    /// A step is stable: all members have applied it, and nothing undoes it. Only such steps should be shown or
    /// written. Comes one step late; each stable step at most once in a process, and none before its first.
    fn stable(&mut self, _step: &Stable) {}
}

/// A step that all members have applied.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Stable {
    /// Its number, from 1.
    pub step: Step,
    /// The epoch in which this is known.
    pub epoch: Epoch,
    /// The members of that epoch.
    pub members: usize,
    /// The members that have slots: all but the spares. The world size of the training.
    pub contributors: usize,
    /// The mean loss over the step's samples; `None` where the process took the step over without its result.
    pub loss: Option<f64>,
    /// The messages of the membership that this process has sent and received so far, but for heartbeats. No step needs
    /// any: the number stays as it is as long as nobody is lost and nobody comes.
    pub control_messages: u64,
}

/// Elements whose sums have an order: f32 and f64.
pub trait Gradient: Element {
    /// The sum of two, rounded once.
    #[must_use]
    fn plus(self, other: Self) -> Self;
    /// One part of so many, rounded once.
    #[must_use]
    fn over(self, count: u16) -> Self;
    /// The nearest one.
    fn from_f64(value: f64) -> Self;
    /// Exactly this one.
    fn to_f64(self) -> f64;
}

impl Gradient for f64 {
    fn plus(self, other: Self) -> Self {
        self + other
    }

    fn over(self, count: u16) -> Self {
        self / Self::from(count)
    }

    fn from_f64(value: f64) -> Self {
        value
    }

    fn to_f64(self) -> f64 {
        self
    }
}

impl Gradient for f32 {
    fn plus(self, other: Self) -> Self {
        self + other
    }

    fn over(self, count: u16) -> Self {
        self / Self::from(count)
    }

    fn from_f64(value: f64) -> Self {
        value as Self
    }

    fn to_f64(self) -> f64 {
        self.into()
    }
}

/// A named part of a state, in place.
#[derive(Debug)]
pub struct Tensor<'a> {
    /// Its name, for people and checkpoints.
    pub name: &'a str,
    /// The type of its elements.
    pub dtype: DType,
    /// Its elements, as bytes of this machine.
    pub bytes: &'a mut [u8],
}

impl<'a> Tensor<'a> {
    /// The tensor with these elements.
    pub fn new<T: Element>(name: &'a str, elements: &'a mut [T]) -> Self {
        Self { name, dtype: T::DTYPE, bytes: bytemuck::cast_slice_mut(elements) }
    }
}
