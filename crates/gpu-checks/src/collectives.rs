//! Every collective on every dtype, element by element against the host back end.
//!
//! Contributions are small whole numbers, of which sums and products are exact in every order and dtype.

use anyhow::{Context, Result, ensure};
use paceline_collectives::device::{Accelerator, DeviceBuffer, DeviceGroup, Stream};
use paceline_collectives::dtype::{bf16, f16};
use paceline_collectives::{Communicator, Element, Error, ReduceOp};

/// An element type, made of whole numbers.
pub trait Number: Element + PartialEq {
    /// The number in this type.
    fn of(number: u8) -> Self;
}

macro_rules! numbers {
    ($($ty:ty: $of:expr;)*) => {$(
        impl Number for $ty {
            fn of(number: u8) -> Self {
                $of(number)
            }
        }
    )*};
}

numbers! {
    f32: f32::from;
    f64: f64::from;
    f16: |number: u8| f16::from_f32(f32::from(number));
    bf16: |number: u8| bf16::from_f32(f32::from(number));
    i8: |number: u8| (number & 0x7f) as i8;
    u8: u8::from;
    i32: i32::from;
    i64: i64::from;
    u64: u64::from;
}

/// A rank's means.
pub struct Checker<'a> {
    pub communicator: &'a mut Communicator,
    pub group: &'a mut DeviceGroup,
    pub accelerator: &'a Accelerator,
    pub stream: Stream,
    calls: usize,
}

impl<'a> Checker<'a> {
    pub fn new(
        communicator: &'a mut Communicator,
        group: &'a mut DeviceGroup,
        accelerator: &'a Accelerator,
    ) -> Result<Self> {
        let stream = accelerator.new_stream()?;
        Ok(Self { communicator, group, accelerator, stream, calls: 0 })
    }

    /// Runs all, on buffers of these lengths. The number of calls.
    ///
    /// # Errors
    /// A call fails, or an element is wrong.
    pub fn everything(mut self, lens: &[usize]) -> Result<usize> {
        for &len in lens {
            self.of_type::<f32>(len)?;
            self.of_type::<f64>(len)?;
            self.of_type::<f16>(len)?;
            self.of_type::<bf16>(len)?;
            self.of_type::<i8>(len)?;
            self.of_type::<u8>(len)?;
            self.of_type::<i32>(len)?;
            self.of_type::<i64>(len)?;
            self.of_type::<u64>(len)?;
        }
        Ok(self.calls)
    }

    fn of_type<T: Number>(&mut self, len: usize) -> Result<()> {
        self.reductions::<T>(len)?;
        self.copies::<T>(len)?;
        self.uneven::<T>(len)?;
        self.messages::<T>(len)
    }

    fn reductions<T: Number>(&mut self, len: usize) -> Result<()> {
        let ranks = self.communicator.world_size();
        for op in ReduceOp::ALL {
            // NCCL multiplies by 1/n, which is exact for powers of two only.
            if op == ReduceOp::Avg && !ranks.is_power_of_two() {
                continue;
            }
            let input = self.numbers::<T>(len, op);
            let mut expected = input.clone();
            self.communicator.all_reduce(&mut expected, op)?;
            self.check("all_reduce", &input, &expected, |group, input, output, stream| {
                group.all_reduce(input, output, op, stream)
            })?;
            let root = ranks - 1;
            let is_root = self.communicator.rank() == root;
            let untouched = vec![T::of(99); len];
            let of_root = if is_root { &expected } else { &untouched };
            self.check("reduce", &input, of_root, |group, input, output, stream| {
                group.reduce(input, output, op, root, stream)
            })?;
            let input = self.numbers::<T>(len * ranks, op);
            let mut expected = vec![T::default(); len];
            self.communicator.reduce_scatter(&input, &mut expected, op)?;
            self.check("reduce_scatter", &input, &expected, |group, input, output, stream| {
                group.reduce_scatter(input, output, op, stream)
            })?;
        }
        Ok(())
    }

    fn copies<T: Number>(&mut self, len: usize) -> Result<()> {
        let (rank, ranks) = (self.communicator.rank(), self.communicator.world_size());
        let root = ranks - 1;
        let input = self.numbers::<T>(len, ReduceOp::Sum);
        let mut all = vec![T::default(); len * ranks];
        self.communicator.all_gather(&input, &mut all)?;
        self.check("all_gather", &input, &all, |group, input, output, stream| {
            group.all_gather(input, output, stream)
        })?;
        let untouched = vec![T::of(99); len * ranks];
        let of_root = if rank == root { &all } else { &untouched };
        self.check("gather", &input, of_root, |group, input, output, stream| {
            group.gather(input, output, root, stream)
        })?;
        let input = self.numbers::<T>(len * ranks, ReduceOp::Sum);
        let mut expected = vec![T::default(); len];
        self.communicator.scatter(&input, &mut expected, root)?;
        self.check("scatter", &input, &expected, |group, input, output, stream| {
            group.scatter(input, output, root, stream)
        })?;
        let mut expected = vec![T::default(); len * ranks];
        self.communicator.all_to_all(&input, &mut expected)?;
        self.check("all_to_all", &input, &expected, |group, input, output, stream| {
            group.all_to_all(input, output, stream)
        })?;
        let mut expected = if rank == root { vec![T::of(99); len] } else { vec![T::default(); len] };
        self.communicator.broadcast(&mut expected, root)?;
        self.check("broadcast", &[], &expected, |group, _, output, stream| {
            group.broadcast(output, root, stream)
        })
    }

    fn uneven<T: Number>(&mut self, len: usize) -> Result<()> {
        let (rank, ranks) = (self.communicator.rank(), self.communicator.world_size());
        let counts: Vec<usize> = (0..ranks).map(|rank| len * rank / ranks).collect();
        let total = counts.iter().sum();
        let input = self.numbers::<T>(counts[rank], ReduceOp::Sum);
        let mut expected = vec![T::default(); total];
        self.communicator.all_gather_v(&input, &mut expected, &counts)?;
        self.check("all_gather_v", &input, &expected, |group, input, output, stream| {
            group.all_gather_v(input, output, &counts, stream)
        })?;
        let input = self.numbers::<T>(total, ReduceOp::Sum);
        let mut expected = vec![T::default(); counts[rank]];
        self.communicator.reduce_scatter_v(&input, &mut expected, &counts, ReduceOp::Sum)?;
        self.check("reduce_scatter_v", &input, &expected, |group, input, output, stream| {
            group.reduce_scatter_v(input, output, &counts, ReduceOp::Sum, stream)
        })?;
        // Each rank sends as much to each other as that one gathers above.
        let received = vec![counts[rank]; ranks];
        let mut expected = vec![T::default(); counts[rank] * ranks];
        self.communicator.all_to_all_v(&input, &counts, &mut expected, &received)?;
        self.check("all_to_all_v", &input, &expected, |group, input, output, stream| {
            group.all_to_all_v(input, &counts, output, &received, stream)
        })
    }

    /// A message around the ring.
    fn messages<T: Number>(&mut self, len: usize) -> Result<()> {
        let (rank, ranks) = (self.communicator.rank(), self.communicator.world_size());
        if ranks == 1 {
            return Ok(());
        }
        let input = self.numbers::<T>(len, ReduceOp::Sum);
        let mut all = vec![T::default(); len * ranks];
        self.communicator.all_gather(&input, &mut all)?;
        let (next, previous) = ((rank + 1) % ranks, (rank + ranks - 1) % ranks);
        let expected = all[previous * len..][..len].to_vec();
        self.check("send and recv", &input, &expected, |group, input, output, stream| {
            if rank.is_multiple_of(2) {
                group.send(input, next, stream)?;
                group.recv(output, previous, stream)
            } else {
                group.recv(output, previous, stream)?;
                group.send(input, next, stream)
            }
        })
    }

    /// A rank's contribution, which differs from call to call.
    fn numbers<T: Number>(&self, len: usize, op: ReduceOp) -> Vec<T> {
        let limit = if op == ReduceOp::Prod { 2 } else { 30 };
        let first = self.communicator.rank() * 7 + self.calls * 3;
        (0..len).map(|index| T::of(1 + ((first + index) * 5 % 31) as u8 % limit)).collect()
    }

    /// Runs one call on the device and compares what is in the output afterwards.
    fn check<T: Number>(
        &mut self,
        name: &str,
        input: &[T],
        expected: &[T],
        call: impl FnOnce(&mut DeviceGroup, DeviceBuffer, DeviceBuffer, Stream) -> Result<(), Error>,
    ) -> Result<()> {
        let context = || format!("{name} of {} {}", expected.len(), T::DTYPE);
        let mut given = self.accelerator.alloc(input.len(), T::DTYPE)?;
        let mut taken = self.accelerator.alloc(expected.len(), T::DTYPE)?;
        given.write(bytemuck::cast_slice(input))?;
        taken.write(bytemuck::cast_slice(&vec![T::of(99); expected.len()]))?;
        // SAFETY: both are kept until the stream is synchronized, or the process ends with the error.
        let (from, to) = unsafe { (given.buffer(0..input.len()), taken.buffer(0..expected.len())) };
        let called = call(self.group, from, to, self.stream).with_context(context);
        let ran = self.accelerator.synchronize(self.stream).with_context(context);
        if let Err(error) = called.and(ran) {
            // The device may still use them.
            std::mem::forget((given, taken));
            return Err(error);
        }
        let mut found = vec![T::default(); expected.len()];
        taken.read(bytemuck::cast_slice_mut(&mut found))?;
        let wrong = found.iter().zip(expected).filter(|(found, expected)| found != expected).count();
        let rank = self.communicator.rank();
        ensure!(wrong == 0, "rank {rank}: {wrong} elements are wrong in {}", context());
        self.calls += 1;
        Ok(())
    }
}
