//! What one rank does: warms up, times each row, and checks every element once.

use std::hint::black_box;
use std::ops::{Deref, DerefMut};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use paceline_runtime::collectives::{Communicator, Error as CollectivesError, SharedBuffer};

use super::args::{BenchArgs, Output, RowShape, Timing};
use super::collective::{Member, Place, Shape};
use super::device::DeviceSide;
use super::reference::{Reference, Value, count_wrong, left_early};
use super::report::{Measured, Samples};

/// How late the late rank comes to a barrier under test: far above what a clock step or a busy machine hides.
const LATE: Duration = Duration::from_millis(3);

/// One rank's measurements. Every rank makes the same calls in the same order.
pub struct Bench<'a, T> {
    communicator: &'a mut Communicator,
    /// Where the calls go that are measured, if not through the communicator.
    device: Option<DeviceSide>,
    args: &'a BenchArgs,
    member: Member,
    input: Buffer<T>,
    output: Buffer<T>,
}

/// The elements of all rows, in memory of this process or of all ranks.
enum Buffer<T> {
    Private(Vec<T>),
    Registered(SharedBuffer<T>),
}

impl<T: Value> Deref for Buffer<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        match self {
            Buffer::Private(elements) => elements,
            Buffer::Registered(elements) => elements,
        }
    }
}

impl<T: Value> DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        match self {
            Buffer::Private(elements) => elements,
            Buffer::Registered(elements) => elements,
        }
    }
}

impl<'a, T: Value> Bench<'a, T> {
    /// Takes memory for the largest row and touches all of it.
    ///
    /// # Errors
    /// The communicator's, when registered memory is asked for.
    pub fn new(
        communicator: &'a mut Communicator,
        device: Option<DeviceSide>,
        args: &'a BenchArgs,
    ) -> Result<Self, CollectivesError> {
        let member = Member { rank: communicator.rank(), ranks: communicator.world_size() };
        let rows = args.rows(member.ranks as u32);
        let input_len = rows.iter().map(|row| row.input_len).max().unwrap_or(0);
        let output_len = rows.iter().map(|row| args.output_room(row)).max().unwrap_or(0);
        let mut buffer = |len| match args.registered {
            true => communicator.alloc(len).map(Buffer::Registered),
            // Not vec![zero; len]: that is memory which the kernel hands out page by page, under the clock.
            false => Ok(Buffer::Private(vec![T::wrapped(1); len])),
        };
        let (input, output) = (buffer(input_len)?, buffer(output_len)?);
        Ok(Bench { communicator, device, args, member, input, output })
    }

    /// Measures all rows, in order, and passes on each result.
    ///
    /// # Errors
    /// The communicator's, or that of `report`.
    pub fn run<E: From<CollectivesError>>(
        mut self,
        mut report: impl FnMut(Measured) -> Result<(), E>,
    ) -> Result<(), E> {
        let rows = self.args.rows(self.member.ranks as u32);
        if self.args.timing == Timing::BackToBack {
            for row in &rows {
                for &place in self.args.places() {
                    self.repeat(place, row, self.args.iterations(row).untimed)?;
                }
            }
        }
        for (index, row) in rows.iter().enumerate() {
            for &place in self.args.places() {
                report(self.measure(index, row, place)?)?;
            }
        }
        Ok(self.device.map_or(Ok(()), DeviceSide::leave)?)
    }

    fn measure(&mut self, index: usize, row: &RowShape, place: Place) -> Result<Measured, CollectivesError> {
        let iterations = self.args.iterations(row);
        // Sums in place grow with every call; of zeros they stay zeros, and no float becomes slow or infinite.
        let room = self.args.output_room(row);
        self.output[..room].fill(T::default());
        self.upload(row)?;
        self.communicator.barrier()?;
        let (mean_us, samples) = match self.args.timing {
            Timing::BackToBack => {
                let start = Instant::now();
                self.repeat(place, row, iterations.timed)?;
                let mean_us = micros(start.elapsed()) / f64::from(iterations.timed);
                // A loop of its own: a clock reading per call would be in the mean of a call of 0.1 µs. Only where it
                // is shown: it takes as long again.
                let times = if self.args.output == Output::Json { iterations.timed } else { 0 };
                self.communicator.barrier()?;
                (mean_us, self.sample(place, row, times, |_| Ok(()))?)
            }
            Timing::Separated => {
                self.sample(place, row, iterations.untimed, Communicator::barrier)?;
                let samples = self.sample(place, row, iterations.timed, Communicator::barrier)?;
                (samples.iter().sum::<f64>() / samples.len() as f64, samples)
            }
        };
        // Another seed for every check: what an earlier one left in the output is wrong.
        let seed = ((index as u64 + 1) << 40) ^ ((place as u64) << 39);
        let reference = Reference { op: self.args.op, ranks: self.member.ranks, seed };
        let wrong =
            if self.args.check { Some(self.check(place, row, &reference, &reference)?) } else { None };
        Ok(Measured {
            rank: self.member.rank,
            row: index,
            place,
            mean_us,
            iterations: iterations.timed,
            wrong,
            samples: Samples::of(samples),
        })
    }

    /// Calls back to back.
    fn repeat(&mut self, place: Place, row: &RowShape, times: u32) -> Result<(), CollectivesError> {
        (0..times).try_for_each(|_| self.call(place, row))?;
        self.settle()
    }

    /// Calls one by one, with `between` after each; the microseconds of each.
    fn sample(
        &mut self,
        place: Place,
        row: &RowShape,
        times: u32,
        between: fn(&mut Communicator) -> Result<(), CollectivesError>,
    ) -> Result<Vec<f64>, CollectivesError> {
        let mut samples = Vec::with_capacity(times as usize);
        for _ in 0..times {
            let start = Instant::now();
            self.call(place, row)?;
            self.settle()?;
            samples.push(micros(start.elapsed()));
            between(self.communicator)?;
        }
        Ok(samples)
    }

    /// Waits until the device has run what was called.
    fn settle(&self) -> Result<(), CollectivesError> {
        self.device.as_ref().map_or(Ok(()), DeviceSide::settle)
    }

    /// Gives the device what is in the buffers.
    fn upload(&mut self, row: &RowShape) -> Result<(), CollectivesError> {
        let Some(device) = &mut self.device else { return Ok(()) };
        device.upload(&self.input[..row.input_len], &self.output[..self.args.output_room(row)])
    }

    fn call(&mut self, place: Place, row: &RowShape) -> Result<(), CollectivesError> {
        if let Some(device) = &mut self.device {
            return device.call(self.args, place, row);
        }
        let output_len = match place {
            Place::OutOfPlace => row.output_len,
            Place::InPlace => self.args.output_room(row),
        };
        let input = black_box(&self.input[..row.input_len]);
        let output = black_box(&mut self.output[..output_len]);
        let how = (self.args.op, self.args.root);
        self.args.collective.call(self.communicator, place, how, input, output)
    }

    /// Calls once on the inputs of `filled` and counts the elements that are not as `expected` says. They are the same,
    /// but for the test which shows that a difference is found.
    fn check(
        &mut self,
        place: Place,
        row: &RowShape,
        filled: &Reference,
        expected: &Reference,
    ) -> Result<u64, CollectivesError> {
        if self.args.collective.traits().shape == Shape::Empty {
            return self.check_barrier();
        }
        let (member, collective) = (self.member, self.args.collective);
        for (element, value) in self.input[..row.input_len].iter_mut().enumerate() {
            *value = filled.contribution(member.rank, element);
        }
        let has_input = collective.has_input(member, self.args.root);
        let (input_start, output_start) = match place {
            Place::OutOfPlace => (0, 0),
            Place::InPlace => collective.traits().shape.starts_in_place(row.count, member),
        };
        // No contribution and no reduction of contributions is negative, or in wrapped types likely to be this.
        let room = self.args.output_room(row);
        self.output[..room].fill(T::wrapped(-3));
        if place == Place::InPlace && has_input {
            self.output[input_start..][..row.input_len].copy_from_slice(&self.input[..row.input_len]);
        }
        let before = self.output[output_start..][..row.output_len].to_vec();
        self.upload(row)?;
        self.call(place, row)?;
        self.settle()?;
        if let Some(device) = &self.device {
            device.download(&mut self.output[..room])?;
        }
        let value = |index| match collective.expected(member, row.count, self.args.root, index) {
            Some(source) => expected.value(source),
            None => before[index],
        };
        Ok(count_wrong(&self.output[output_start..][..row.output_len], value))
    }

    /// Has one rank after the other come late to a barrier, and counts the times that this rank left too early.
    fn check_barrier(&mut self) -> Result<u64, CollectivesError> {
        let Member { rank, ranks } = self.member;
        let mut wrong = 0;
        // With more ranks than this the check would take longer than the measurement.
        for late in 0..ranks.min(8) {
            if rank == late {
                thread::sleep(LATE);
            }
            let mut entered = vec![0; ranks];
            let own = [now_nanos()];
            self.communicator.barrier()?;
            let left = now_nanos();
            self.communicator.all_gather(&own, &mut entered)?;
            wrong += u64::from(left_early(self.member, &entered, left));
        }
        Ok(wrong)
    }
}

/// The time on a clock that all ranks of a machine share.
fn now_nanos() -> u64 {
    SystemTime::UNIX_EPOCH.elapsed().map_or(0, |since| since.as_nanos() as u64)
}

fn micros(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e6
}

#[cfg(test)]
mod tests {
    use paceline_runtime::collectives::{Config, ReduceOp};
    use paceline_transport::mem;

    use super::*;
    use crate::bench::collective::Collective;
    use crate::cli::{Request, Variables, parse};

    fn args(line: &str) -> BenchArgs {
        match parse(format!("paceline bench {line}").split_whitespace().map(Into::into), Variables::default())
        {
            Ok(Request::Bench(args)) => args,
            other => panic!("{line}: {other:?}"),
        }
    }

    /// Runs `work` as every rank of a group of threads.
    fn on_ranks<R: Send>(args: &BenchArgs, work: impl Fn(Bench<'_, f32>) -> R + Sync) -> Vec<R> {
        let group = mem::group(*args.ranks.end() as usize, 1, mem::DEFAULT_WINDOW_BYTES);
        thread::scope(|scope| {
            let start = |transport| {
                let work = &work;
                scope.spawn(move || {
                    let mut communicator =
                        Communicator::new(Box::new(transport), Config::default()).expect("the defaults");
                    let bench = Bench::new(&mut communicator, None, args).expect("there is memory");
                    let result = work(bench);
                    communicator.leave().expect("everybody leaves");
                    result
                })
            };
            let ranks: Vec<_> = group.into_iter().map(start).collect();
            ranks.into_iter().map(|rank| rank.join().expect("no rank panics")).collect()
        })
    }

    #[test]
    fn every_collective_is_measured_and_is_right() {
        for collective in Collective::all() {
            for ranks in [collective.traits().least_ranks, 2, 3] {
                let line = format!("{collective} --ranks {ranks} -b 1 -e 9K -f 3 -n 2");
                let args = args(&line);
                let results = on_ranks(&args, |bench| {
                    let mut results = Vec::new();
                    let outcome = bench.run::<CollectivesError>(|measured| {
                        results.push(measured);
                        Ok(())
                    });
                    outcome.map(|()| results).expect("it works")
                });
                let expected = args.rows(ranks).len() * args.places().len();
                for measured in &results {
                    assert_eq!(measured.len(), expected, "{line}");
                    let wrong: Vec<_> = measured.iter().map(|m| m.wrong).collect();
                    assert_eq!(wrong, vec![Some(0); expected], "{line}");
                }
            }
        }
    }

    #[test]
    fn a_reference_that_differs_from_what_was_put_in_makes_elements_wrong() {
        let same_everywhere =
            ["all_reduce", "reduce_scatter", "all_gather", "broadcast", "scatter", "alltoall", "sendrecv"];
        for line in same_everywhere.into_iter().chain(["reduce", "gather"]) {
            let args = args(&format!("{line} --ranks 2 -b 4K -e 4K"));
            let filled = Reference { op: ReduceOp::Sum, ranks: 2, seed: 1 << 40 };
            let expected = Reference { seed: 2 << 40, ..filled };
            let row = args.rows(2)[0];
            let wrong = on_ranks(&args, |mut bench| {
                bench.check(args.places()[0], &row, &filled, &expected).expect("it works")
            });
            // Where only the root, rank 0, gets something, the others' elements stay as they were.
            let receivers = if same_everywhere.contains(&line) { 2 } else { 1 };
            assert!(
                wrong[..receivers].iter().all(|&wrong| wrong > row.output_len as u64 / 2),
                "{line}: {wrong:?}"
            );
            assert!(wrong[receivers..].iter().all(|&wrong| wrong == 0), "{line}: {wrong:?}");
        }
    }

    #[test]
    fn another_operator_in_the_reference_makes_elements_wrong() {
        let args = args("all_reduce --ranks 2 -b 4K -e 4K");
        let filled = Reference { op: ReduceOp::Sum, ranks: 2, seed: 1 << 40 };
        let expected = Reference { op: ReduceOp::Max, ..filled };
        let row = args.rows(2)[0];
        let wrong = on_ranks(&args, |mut bench| {
            bench.check(Place::InPlace, &row, &filled, &expected).expect("it works")
        });
        assert!(wrong.iter().all(|&wrong| wrong > 900), "{wrong:?}");
    }
}
