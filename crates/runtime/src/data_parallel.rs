//! Data-parallel training: every rank has the model, each takes its share of the batch, and the
//! gradients are averaged before the optimizer's step.
//!
//! Gradients are copied into flat buckets, in reverse order of the parameters, since a backward pass
//! produces the last layer's first; a bucket's all-reduce starts when its last gradient has come and
//! runs while the others are computed (Li et al., *PyTorch Distributed*, VLDB 2020, §3.2).

use std::ops::Range;

use paceline_collectives::{Communicator, DType, Element, ReduceOp, Work};

use crate::Error;

/// How gradients are grouped. Equal on all ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Config {
    /// The size at which a bucket is full, in bytes. 25 MiB by default, as in PyTorch: the all-reduce of
    /// larger ones is no faster, and smaller ones would overlap more but pay more latencies.
    pub bucket_bytes: usize,
    /// The size of the first bucket, in bytes: 1 MiB, so that communication starts early.
    pub first_bucket_bytes: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self { bucket_bytes: 25 * 1024 * 1024, first_bucket_bytes: 1024 * 1024 }
    }
}

/// Averages the gradients of one model over the ranks.
///
/// Holds one copy of the gradients (the buckets), allocated once. Parameters are numbered in the order
/// of the lengths given at the start, which is equal on all ranks.
#[derive(Debug)]
pub struct DataParallel<T> {
    lens: Vec<usize>,
    buckets: Vec<Bucket<T>>,
    /// For each parameter: its bucket and its place in it.
    places: Vec<(usize, Range<usize>)>,
    /// Buckets whose all-reduce has started in this step: they start in order, on all ranks alike.
    started: usize,
    ready: Vec<bool>,
}

#[derive(Debug)]
struct Bucket<T> {
    /// Parameter numbers, descending.
    parameters: Vec<usize>,
    missing: usize,
    state: State<T>,
}

#[derive(Debug)]
enum State<T> {
    Filling(Vec<T>),
    Reducing(Work<T>),
    /// After a failed all-reduce, whose buffer is gone.
    Empty,
}

impl<T: Element> DataParallel<T> {
    /// For a model whose parameters have these numbers of elements.
    ///
    /// # Errors
    /// [`Error::Usage`] for integer elements, which have no average worth taking.
    pub fn new(lens: &[usize], config: Config) -> Result<Self, Error> {
        if !matches!(T::DTYPE, DType::F32 | DType::F64 | DType::F16 | DType::BF16) {
            return Err(Error::Usage {
                reason: format!("gradients are floating-point numbers, not {}", T::DTYPE),
            });
        }
        let mut places = vec![(0, 0..0); lens.len()];
        let mut buckets: Vec<Bucket<T>> = Vec::new();
        for parameters in partition(lens, T::DTYPE.size(), config) {
            let mut end = 0;
            for &parameter in &parameters {
                places[parameter] = (buckets.len(), end..end + lens[parameter]);
                end += lens[parameter];
            }
            let missing = parameters.len();
            buckets.push(Bucket { parameters, missing, state: State::Filling(vec![T::default(); end]) });
        }
        Ok(Self { lens: lens.to_vec(), buckets, places, started: 0, ready: vec![false; lens.len()] })
    }

    /// The number of buckets, each of which is one all-reduce per step.
    pub fn buckets(&self) -> usize {
        self.buckets.len()
    }

    /// Replaces the parameters on every rank by those of `root`. All ranks call it, usually once before
    /// the first step. Blocks.
    ///
    /// # Errors
    /// [`Error::Usage`] when the lengths differ from those at the start, else the broadcast's.
    pub fn broadcast_parameters(
        &mut self,
        communicator: &mut Communicator,
        parameters: &mut [&mut [T]],
        root: usize,
    ) -> Result<(), Error> {
        self.check(parameters.iter().map(|parameter| parameter.len()))?;
        for bucket in &mut self.buckets {
            let flat = bucket.state.filling()?;
            for &parameter in &bucket.parameters {
                flat[self.places[parameter].1.clone()].copy_from_slice(parameters[parameter]);
            }
            communicator.broadcast(flat, root)?;
            for &parameter in &bucket.parameters {
                parameters[parameter].copy_from_slice(&flat[self.places[parameter].1.clone()]);
            }
        }
        Ok(())
    }

    /// Replaces the gradients on every rank by their mean over the ranks. All ranks call it once per
    /// step. Blocks until all are averaged; the result has the same bits on all ranks.
    ///
    /// With losses that are means over equal shares of the batch, the mean is the gradient of the whole
    /// batch.
    ///
    /// # Errors
    /// [`Error::Usage`] when the lengths differ from those at the start, else the all-reduce's; the
    /// gradients are then unspecified.
    pub fn average_gradients(
        &mut self,
        communicator: &mut Communicator,
        gradients: &mut [&mut [T]],
    ) -> Result<(), Error> {
        self.check(gradients.iter().map(|gradient| gradient.len()))?;
        for parameter in (0..gradients.len()).rev() {
            self.gradient_ready(communicator, parameter, gradients[parameter])?;
        }
        self.finish_step(|parameter, mean| gradients[parameter].copy_from_slice(mean))
    }

    /// Takes the gradient of one parameter as soon as the backward pass has it; the all-reduce of a
    /// complete bucket starts at once. Every parameter is given once per step, in any order; ranks may
    /// differ in the order. Does not block.
    ///
    /// # Errors
    /// [`Error::Usage`] for a parameter that does not exist, has another length or was given before in
    /// this step; else errors of starting the all-reduce.
    pub fn gradient_ready(
        &mut self,
        communicator: &mut Communicator,
        parameter: usize,
        gradient: &[T],
    ) -> Result<(), Error> {
        let given = self.ready.get(parameter).copied();
        if given != Some(false) || self.lens[parameter] != gradient.len() {
            let count = self.lens.len();
            let reason = match given {
                None => format!("there is no parameter {parameter}; the model has {count}"),
                Some(true) => format!("the gradient of parameter {parameter} was given twice in one step"),
                Some(false) => format!(
                    "the gradient of parameter {parameter} has {} elements instead of {}",
                    gradient.len(),
                    self.lens[parameter]
                ),
            };
            return Err(Error::Usage { reason });
        }
        let (bucket, place) = self.places[parameter].clone();
        let bucket = &mut self.buckets[bucket];
        bucket.state.filling()?[place].copy_from_slice(gradient);
        bucket.missing -= 1;
        self.ready[parameter] = true;
        self.start_complete_buckets(communicator)
    }

    /// Whether this parameter's gradient has been given in this step.
    #[cfg(feature = "tch")]
    pub(crate) fn was_given(&self, parameter: usize) -> bool {
        self.ready[parameter]
    }

    /// Waits for the all-reduces of this step and hands out each parameter's mean gradient.
    ///
    /// # Errors
    /// [`Error::Usage`] when a gradient has not been given in this step, else the all-reduce's.
    pub fn finish_step(&mut self, mut mean: impl FnMut(usize, &[T])) -> Result<(), Error> {
        if let Some(parameter) = self.ready.iter().position(|ready| !ready) {
            let reason = format!("the gradient of parameter {parameter} is missing in this step");
            return Err(Error::Usage { reason });
        }
        for bucket in &mut self.buckets {
            let work = match std::mem::replace(&mut bucket.state, State::Empty) {
                State::Reducing(work) => work,
                State::Filling(_) | State::Empty => unreachable!("a complete bucket has been started"),
            };
            let flat = work.wait()?;
            for &parameter in &bucket.parameters {
                mean(parameter, &flat[self.places[parameter].1.clone()]);
            }
            bucket.missing = bucket.parameters.len();
            bucket.state = State::Filling(flat);
        }
        self.started = 0;
        self.ready.fill(false);
        Ok(())
    }

    /// Starts complete buckets from the first on, so that all ranks issue them in the same order.
    fn start_complete_buckets(&mut self, communicator: &mut Communicator) -> Result<(), Error> {
        while let Some(bucket) = self.buckets.get_mut(self.started).filter(|bucket| bucket.missing == 0) {
            let State::Filling(flat) = std::mem::replace(&mut bucket.state, State::Empty) else {
                unreachable!("a bucket is started once per step")
            };
            bucket.state = State::Reducing(communicator.all_reduce_start(flat, ReduceOp::Avg)?);
            self.started += 1;
        }
        Ok(())
    }

    fn check(&self, lens: impl ExactSizeIterator<Item = usize>) -> Result<(), Error> {
        if lens.len() != self.lens.len() {
            let reason = format!("{} tensors for a model of {} parameters", lens.len(), self.lens.len());
            return Err(Error::Usage { reason });
        }
        match lens.zip(&self.lens).enumerate().find(|(_, (given, expected))| given != *expected) {
            None => Ok(()),
            Some((parameter, (given, expected))) => Err(Error::Usage {
                reason: format!("parameter {parameter} has {given} elements instead of {expected}"),
            }),
        }
    }
}

impl<T> State<T> {
    fn filling(&mut self) -> Result<&mut [T], Error> {
        match self {
            State::Filling(flat) => Ok(flat),
            State::Reducing(_) => {
                Err(Error::Usage { reason: "the step before has not been finished".to_owned() })
            }
            State::Empty => Err(Error::Usage { reason: "an all-reduce has failed before".to_owned() }),
        }
    }
}

/// Parameter numbers by bucket, in reverse order. A parameter larger than a bucket has one to itself.
pub(crate) fn partition(lens: &[usize], element_size: usize, config: Config) -> Vec<Vec<usize>> {
    let mut buckets: Vec<Vec<usize>> = Vec::new();
    let mut room = 0;
    for parameter in (0..lens.len()).rev() {
        let bytes = lens[parameter] * element_size;
        match buckets.last_mut() {
            Some(bucket) if bytes <= room => {
                bucket.push(parameter);
                room -= bytes;
            }
            last => {
                let limit = if last.is_none() { config.first_bucket_bytes } else { config.bucket_bytes };
                buckets.push(vec![parameter]);
                room = limit.saturating_sub(bytes);
            }
        }
    }
    buckets
}

#[cfg(test)]
mod tests {
    use super::*;
    use paceline_transport::mem;

    fn config(first: usize, other: usize) -> Config {
        Config { first_bucket_bytes: first, bucket_bytes: other }
    }

    #[test]
    fn buckets_hold_the_parameters_in_reverse_and_respect_their_size() {
        assert_eq!(partition(&[1, 2, 3, 4], 4, config(16, 20)), [vec![3], vec![2, 1], vec![0]]);
        assert_eq!(partition(&[100, 1], 4, config(4, 8)), [vec![1], vec![0]]);
        assert_eq!(partition(&[1, 1, 1], 4, Config::default()), [vec![2, 1, 0]]);
        assert_eq!(partition(&[], 4, Config::default()), Vec::<Vec<usize>>::new());
    }

    /// Runs `part` on two ranks as threads.
    fn on_two_ranks(part: impl Fn(usize, &mut Communicator) + Copy + Send + 'static) {
        let ranks: Vec<_> = mem::group(2, 1, 1024)
            .into_iter()
            .enumerate()
            .map(|(rank, transport)| {
                std::thread::spawn(move || {
                    let transport = Box::new(transport);
                    let mut communicator =
                        Communicator::new(transport, Default::default()).expect("the defaults are right");
                    part(rank, &mut communicator);
                    communicator.leave().expect("both leave");
                })
            })
            .collect();
        ranks.into_iter().for_each(|rank| rank.join().expect("no rank panics"));
    }

    #[test]
    fn gradients_are_averaged_whatever_the_buckets_and_the_order_in_which_they_come() {
        on_two_ranks(|rank, communicator| {
            for bucket_bytes in [4, 12, 1024] {
                let lens = [3, 1, 5];
                let mut parallel =
                    DataParallel::<f32>::new(&lens, config(4, bucket_bytes)).expect("f32 is a float");
                for step in 0..3 {
                    let gradient =
                        |parameter: usize| vec![(parameter * 10 + rank * 2 + step) as f32; lens[parameter]];
                    let orders = [[0, 1, 2], [2, 0, 1]];
                    for parameter in orders[rank] {
                        parallel
                            .gradient_ready(communicator, parameter, &gradient(parameter))
                            .expect("given once");
                    }
                    let mut seen = vec![];
                    parallel
                        .finish_step(|parameter, mean| {
                            assert_eq!(mean, vec![(parameter * 10 + 1 + step) as f32; lens[parameter]]);
                            seen.push(parameter);
                        })
                        .expect("all were given");
                    seen.sort_unstable();
                    assert_eq!(seen, [0, 1, 2]);
                }
            }
        });
    }

    #[test]
    fn parameters_are_the_roots_after_a_broadcast() {
        on_two_ranks(|rank, communicator| {
            let mut parallel = DataParallel::<f64>::new(&[2, 1], Config::default()).expect("f64 is a float");
            let (mut a, mut b) = ([rank as f64, 5.0 + rank as f64], [7.0 * rank as f64]);
            parallel.broadcast_parameters(communicator, &mut [&mut a, &mut b], 1).expect("both call it");
            assert_eq!((a, b), ([1.0, 6.0], [7.0]));
        });
    }

    #[test]
    fn wrong_calls_say_what_is_wrong_and_change_nothing() {
        on_two_ranks(|_, communicator| {
            let mut parallel = DataParallel::<f32>::new(&[2, 1], Config::default()).expect("f32 is a float");
            let reason = |error: Result<(), Error>, expect: &str| {
                let error = error.expect_err("the call is wrong").to_string();
                assert!(error.contains(expect), "{error}");
            };
            reason(parallel.average_gradients(communicator, &mut [&mut [1.0]]), "1 tensors for a model of 2");
            reason(parallel.gradient_ready(communicator, 2, &[1.0]), "no parameter 2");
            reason(parallel.gradient_ready(communicator, 0, &[1.0]), "1 elements instead of 2");
            parallel.gradient_ready(communicator, 0, &[1.0, 2.0]).expect("the call is right");
            reason(parallel.gradient_ready(communicator, 0, &[1.0, 2.0]), "twice");
            reason(parallel.finish_step(|_, _| ()), "parameter 1 is missing");
            parallel.gradient_ready(communicator, 1, &[3.0]).expect("the call is right");
            parallel.finish_step(|_, _| ()).expect("all were given");
            assert!(DataParallel::<i32>::new(&[1], Config::default()).is_err());
        });
    }
}
