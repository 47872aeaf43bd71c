//! Collectives on the memory of several GPUs on each of several hosts: NCCL inside, the host's links between.
//!
//! ```text
//! all_reduce on 2 hosts with 2 GPUs each    a, b, c, d: the sums of the ranks' halves
//!   NCCL, inside      reduce_scatter   rank 0: a0+a1   rank 1: b0+b1  │  rank 2: a2+a3   rank 3: b2+b3
//!   Fallback, between all_reduce       ranks 0 and 2: a               │  ranks 1 and 3: b
//!   NCCL, inside      all_gather       a b on all
//! ```
//! A byte crosses PCIe and the network 1/g as often as without, on hosts with g GPUs, and what crosses the network is
//! encrypted, which NCCL's own sockets are not. Every rank of a host takes part in the traffic between hosts.
//!
//! Only all_reduce is cut like this. Other collectives, and averages of integers, which two roundings would change, go
//! through the host among all ranks. Sums of floats are those of the hosts' sums, which are in NCCL's order.

use std::ops::Range;

use super::checks::check;
use super::fallback::{Fallback, FallbackConfig};
use super::group::{Formed, abort_in_background};
use super::nccl::NcclGroup;
use super::{Device, DeviceBuffer, Stream};
use crate::communicator::Communicator;
use crate::dtype::{DType, ReduceOp};
use crate::error::Error;

/// Collectives through NCCL inside each host and through the host between them.
///
/// Called as a [`DeviceGroup`](super::DeviceGroup), with the same errors.
pub(crate) struct Hierarchy {
    pub(super) inside: NcclGroup,
    /// The ranks of all hosts that have the same number on theirs.
    between: Fallback,
    pub(super) whole: Fallback,
}

impl Hierarchy {
    /// Takes over a communicator of all ranks, and NCCL's of this host's, in which they have the same order. Every host has
    /// as many. All ranks call it.
    pub(super) fn form(
        mut communicator: Communicator,
        formed: Formed,
        device: Box<dyn Device>,
        config: FallbackConfig,
    ) -> Result<Self, Error> {
        let number = u32::try_from(formed.nccl.rank()).expect("NCCL's ranks are 32-bit integers");
        let between = communicator.split(Some(number), 0)?.expect("a color was given");
        let inside = NcclGroup::recorded(formed, device.share(), communicator.config().timeout)?;
        let aborter = inside.aborter();
        // Whoever dies on another host keeps a rank here from the all_gather, for which the others wait.
        communicator
            .on_loss(move |rank, reason| abort_in_background(&aborter, format!("rank {rank} {reason}")));
        let between = Fallback::new(between, device.share(), config)?.fed_by(Box::new(inside.checker()));
        let whole = Fallback::new(communicator, device, config)?;
        Ok(Self { inside, between, whole })
    }

    /// The communicator of all ranks.
    pub(super) fn communicator(&self) -> &Communicator {
        self.whole.on_host()
    }

    pub(super) fn check(&self) -> Result<(), Error> {
        self.inside.check()
    }

    pub(super) fn leave(mut self) -> Result<(), Error> {
        self.inside.check()?;
        self.whole.communicator().barrier()?;
        self.whole.communicator().on_loss(|_, _| ());
        self.inside.leave()?;
        self.between.into_communicator().leave()?;
        self.whole.into_communicator().leave()
    }

    /// Every rank gets the reduction of all inputs; `output` may be `input`.
    ///
    /// # Errors
    /// See [the type](Self).
    pub fn all_reduce(
        &mut self,
        input: DeviceBuffer,
        output: DeviceBuffer,
        op: ReduceOp,
        stream: Stream,
    ) -> Result<(), Error> {
        check("all_reduce", "output", output, (input.len(), input.dtype()))?;
        let rounds_twice = op == ReduceOp::Avg
            && !matches!(input.dtype(), DType::F32 | DType::F64 | DType::F16 | DType::BF16);
        if rounds_twice {
            return self.whole.all_reduce(input, output, op, stream);
        }
        let outcome = self.all_reduce_in_parts(input, output, op, stream);
        if let Err(error) = &outcome {
            // Whoever is in one of the steps would wait for this rank in vain.
            let reason = error.to_string();
            self.between.give_up(&reason);
            self.whole.give_up(&reason);
            abort_in_background(&self.inside.aborter(), reason);
        }
        outcome
    }

    fn all_reduce_in_parts(
        &mut self,
        input: DeviceBuffer,
        output: DeviceBuffer,
        op: ReduceOp,
        stream: Stream,
    ) -> Result<(), Error> {
        let ranks = self.inside.world_size();
        let counts: Vec<usize> = (0..ranks).map(|rank| share(input.len(), ranks, rank).len()).collect();
        let own = output.part(share(input.len(), ranks, self.inside.rank()));
        let even = input.len().is_multiple_of(ranks);
        match even {
            true => self.inside.reduce_scatter(input, own, op, stream)?,
            false => self.inside.reduce_scatter_v(input, own, &counts, op, stream)?,
        }
        self.between.all_reduce(own, own, op, stream)?;
        match even {
            true => self.inside.all_gather(own, output, stream),
            false => self.inside.all_gather_v(own, output, &counts, stream),
        }
    }
}

/// A rank's share of `len` elements: the first ranks have one more where it does not come out even.
fn share(len: usize, ranks: usize, rank: usize) -> Range<usize> {
    let (each, more) = (len / ranks, len % ranks);
    let start = rank * each + rank.min(more);
    start..start + each + usize::from(rank < more)
}
