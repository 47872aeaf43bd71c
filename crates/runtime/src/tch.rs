//! Data-parallel training of models made with [tch](https://docs.rs/tch) (libtorch).
//!
//! [`TchDataParallel`] is [`DataParallel`] for tensors: it knows where the parameters and gradients are, and nothing else
//! about the model. Between `loss.backward()` and `optimizer.step()` it replaces every gradient by its mean over the
//! ranks; its own [`backward`](TchDataParallel::backward) does so while the pass goes on, with hooks that tch has not
//! (`hooks.cpp`).
//!
//! [`TchDeviceParallel`] is the same for models on a GPU. [`TchDataParallel`] refuses, before anything is sent, tensors on
//! one, kinds other than f32 and f64, and sparse gradients.
//!
//! Gradients are copied out of libtorch into the buckets and back, through one buffer on each way. Slices of libtorch's own
//! memory would save that buffer, and would need proof that no other tensor shares it.

mod cuda;
mod device;
mod hooks;

use paceline_collectives::{Communicator, Element};
use tch::nn::VarStore;
use tch::{Device, Kind, TchError, Tensor};

pub use device::{TchDevice, TchDeviceParallel};

use crate::Error;
use crate::data_parallel::{Config, DataParallel};
use crate::digest::Digest;
use hooks::GradientHooks;

/// Keeps the replicas of one model equal on all ranks (PyTorch: `DistributedDataParallel`).
///
/// All ranks make it from the same parameters in the same order, and call the same methods in the same order. It holds
/// handles of the tensors, not copies: the optimizer and the model see what it changes.
///
/// ```no_run
/// use paceline_runtime::{World, data_parallel::Config, tch::TchDataParallel};
/// use tch::{Device, Kind, Tensor, nn, nn::{Module, OptimizerConfig}};
///
/// let mut world = World::join()?;
/// let store = nn::VarStore::new(Device::Cpu);
/// let model = nn::linear(store.root(), 64, 10, Default::default());
/// let mut optimizer = nn::Adam::default().build(&store, 1e-3)?;
/// let mut parallel = TchDataParallel::from_var_store(&store, Config::default())?;
/// parallel.broadcast_parameters(world.communicator(), 0)?;
///
/// // This rank's share of the batch.
/// let (images, labels) = (Tensor::rand([32, 64], (Kind::Float, Device::Cpu)), Tensor::zeros([32], (Kind::Int64, Device::Cpu)));
/// let loss = model.forward(&images).cross_entropy_for_logits(&labels);
/// optimizer.zero_grad();
/// parallel.backward(world.communicator(), &loss)?;
/// optimizer.step();
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct TchDataParallel {
    /// In the caller's order.
    parameters: Vec<Tensor>,
    floats: Group<f32>,
    doubles: Group<f64>,
}

impl TchDataParallel {
    /// For these parameters. One that does not require a gradient takes part in the broadcast only.
    ///
    /// # Errors
    /// [`Error::Usage`] when a parameter is not on the CPU, or neither f32 nor f64.
    pub fn new(parameters: &[Tensor], config: Config) -> Result<Self, Error> {
        for (number, parameter) in parameters.iter().enumerate() {
            check_place(parameter, || format!("parameter {number}"))?;
            let kind = parameter.f_kind().map_err(libtorch)?;
            if !matches!(kind, Kind::Float | Kind::Double) {
                return usage(format!(
                    "parameter {number} is {kind:?}; only Float and Double can be averaged"
                ));
            }
        }
        Ok(Self {
            parameters: parameters.iter().map(Tensor::shallow_clone).collect(),
            floats: Group::new(parameters, config)?,
            doubles: Group::new(parameters, config)?,
        })
    }

    /// For the trainable variables of a store, in the order in which the model made them.
    ///
    /// Other variables, such as the running means of a batch normalisation, are left alone: they stay each rank's own.
    ///
    /// # Errors
    /// See [`new`](Self::new).
    pub fn from_var_store(store: &VarStore, config: Config) -> Result<Self, Error> {
        Self::new(&store.trainable_variables(), config)
    }

    /// Replaces the parameters on every rank by those of `root`. All ranks call it, usually once before the first step.
    /// Blocks.
    ///
    /// # Errors
    /// The broadcast's; the parameters are then unchanged on this rank.
    pub fn broadcast_parameters(
        &mut self,
        communicator: &mut Communicator,
        root: usize,
    ) -> Result<(), Error> {
        self.floats.broadcast_parameters(communicator, root)?;
        self.doubles.broadcast_parameters(communicator, root)
    }

    /// Replaces the gradients on every rank by their mean over the ranks. All ranks call it once per step, after
    /// `backward` and before the optimizer's step. Blocks; the result has the same bits on all ranks.
    ///
    /// A parameter that has no gradient on this rank, because the loss did not depend on it, counts as zeros and has a
    /// gradient afterwards. With losses that are means over equal shares of the batch, the mean is the gradient of the
    /// whole batch.
    ///
    /// # Errors
    /// [`Error::Usage`] for a gradient that is sparse, not on the CPU or of another kind than its parameter, before
    /// anything is sent; else the all-reduce's, and the gradients are then unspecified.
    pub fn average_gradients(&mut self, communicator: &mut Communicator) -> Result<(), Error> {
        self.floats.check_gradients()?;
        self.doubles.check_gradients()?;
        self.floats.average_gradients(communicator)?;
        self.doubles.average_gradients(communicator)
    }

    /// Computes the gradients of `loss`, and replaces every one by its mean over the ranks: `loss.backward()` and
    /// [`average_gradients`](Self::average_gradients) in one, with the same bits, in which the all-reduce of a bucket starts
    /// as soon as the pass has its gradients and runs while it computes those of earlier layers (Li et al., *PyTorch
    /// Distributed*, VLDB 2020, §3.2). Of a model with parameters of both kinds that holds for those of f32.
    ///
    /// All ranks call it once per step, or all call the other two. Gradients are added to those that are there, as by any
    /// pass, so shares of a batch can go through `loss.backward()` first and the last one through this. Blocks.
    ///
    /// # Errors
    /// [`Error::Usage`] when libtorch cannot run the pass, and for a gradient that is sparse or of another kind than its
    /// parameter; else the all-reduce's. Some gradients may be on their way already, so this replica can then do no further
    /// step, and the other ranks wait for it until they time out or it ends.
    pub fn backward(&mut self, communicator: &mut Communicator, loss: &Tensor) -> Result<(), Error> {
        // Of two kinds one goes after the other, as the order of collectives must be that of all ranks.
        if self.floats.parameters.is_empty() {
            return self.doubles.backward(communicator, loss);
        }
        self.floats.backward(communicator, loss)?;
        self.doubles.check_gradients()?;
        self.doubles.average_gradients(communicator)
    }

    /// The digest of the parameters, in the order given at the start: equal on two ranks if their replicas are. Needs as
    /// much memory again as the parameters.
    ///
    /// # Errors
    /// [`Error::Usage`] when libtorch cannot read a parameter.
    pub fn parameter_digest(&self) -> Result<Digest, Error> {
        let bytes: Vec<Vec<u8>> = self.parameters.iter().map(bytes_of).collect::<Result<_, _>>()?;
        Ok(Digest::of(bytes.iter().map(Vec::as_slice)))
    }
}

/// The parameters of one kind. libtorch models are nearly always of one kind, and the other group is then empty.
#[derive(Debug)]
struct Group<T> {
    parameters: Vec<Tensor>,
    /// Room for one gradient on its way between libtorch and the buckets.
    host: Vec<T>,
    parallel: DataParallel<T>,
    /// Made by the first pass that needs them.
    hooks: Option<GradientHooks>,
}

impl<T: Element + tch::kind::Element> Group<T> {
    /// Those of the parameters that are of this kind.
    fn new(parameters: &[Tensor], config: Config) -> Result<Self, Error> {
        let of_this_kind = parameters.iter().filter(|parameter| parameter.kind() == T::KIND);
        let parameters: Vec<Tensor> = of_this_kind.map(Tensor::shallow_clone).collect();
        let lens: Vec<usize> = parameters.iter().map(Tensor::numel).collect();
        let host = vec![T::default(); lens.iter().copied().max().unwrap_or(0)];
        Ok(Self { parameters, host, parallel: DataParallel::new(&lens, config)?, hooks: None })
    }

    fn broadcast_parameters(&mut self, communicator: &mut Communicator, root: usize) -> Result<(), Error> {
        let read = |parameter: &Tensor| {
            let mut elements = vec![T::default(); parameter.numel()];
            parameter.f_copy_data(&mut elements, parameter.numel()).map(|()| elements).map_err(libtorch)
        };
        let mut elements: Vec<Vec<T>> = self.parameters.iter().map(read).collect::<Result<_, _>>()?;
        let mut slices: Vec<&mut [T]> = elements.iter_mut().map(Vec::as_mut_slice).collect();
        self.parallel.broadcast_parameters(communicator, &mut slices, root)?;
        self.parameters
            .iter_mut()
            .zip(&elements)
            .try_for_each(|(parameter, elements)| write(parameter, elements))
    }

    fn check_gradients(&self) -> Result<(), Error> {
        (0..self.parameters.len()).try_for_each(|number| self.check_gradient(number))
    }

    fn check_gradient(&self, number: usize) -> Result<(), Error> {
        let parameter = &self.parameters[number];
        let gradient = parameter.f_grad().map_err(libtorch)?;
        if !gradient.defined() {
            return Ok(());
        }
        let name = || format!("the gradient of a parameter of shape {:?}", parameter.size());
        check_place(&gradient, name)?;
        if gradient.is_sparse() || gradient.kind() != T::KIND {
            return usage(format!("{} is sparse or not {:?}; make it dense", name(), T::KIND));
        }
        Ok(())
    }

    fn average_gradients(&mut self, communicator: &mut Communicator) -> Result<(), Error> {
        self.give_the_others(communicator)?;
        self.finish()
    }

    /// Runs the backward pass, gives the gradients as it completes them, and has all averaged.
    fn backward(&mut self, communicator: &mut Communicator, loss: &Tensor) -> Result<(), Error> {
        let mut hooks = match self.hooks.take() {
            Some(hooks) => hooks,
            None => GradientHooks::new(&self.parameters)?,
        };
        let mut given = Ok(());
        let mut ready = |number: usize| {
            if given.is_ok() {
                given = self.check_gradient(number).and_then(|()| self.give(communicator, number));
            }
        };
        let passed = hooks.during(&mut ready, || loss.f_backward());
        self.hooks = Some(hooks);
        // What failed first may have ended the pass.
        given.and(passed.map_err(libtorch))?;
        self.check_gradients()?;
        self.average_gradients(communicator)
    }

    /// Gives one gradient to the buckets.
    fn give(&mut self, communicator: &mut Communicator, number: usize) -> Result<(), Error> {
        let parameter = &self.parameters[number];
        let host = &mut self.host[..parameter.numel()];
        let gradient = parameter.f_grad().map_err(libtorch)?;
        // None is made here if there is none: that takes a pass, and one may be running.
        match gradient.defined() {
            true => gradient.f_copy_data(host, host.len()).map_err(libtorch)?,
            false => host.fill(T::default()),
        }
        self.parallel.gradient_ready(communicator, number, host)
    }

    /// Gives all that have not been given. The last layer's come first, in the order of the buckets.
    fn give_the_others(&mut self, communicator: &mut Communicator) -> Result<(), Error> {
        for number in (0..self.parameters.len()).rev() {
            if !self.parallel.was_given(number) {
                self.give(communicator, number)?;
            }
        }
        Ok(())
    }

    /// Waits for the means, and writes them where the gradients are.
    fn finish(&mut self) -> Result<(), Error> {
        let mut written = Ok(());
        self.parallel.finish_step(|number, mean| {
            let gradient = gradient_of(&self.parameters[number]);
            let write_mean =
                |gradient: Option<Tensor>| gradient.map_or(Ok(()), |mut gradient| write(&mut gradient, mean));
            if written.is_ok() {
                written = gradient.and_then(write_mean);
            }
        })?;
        written
    }
}

/// The gradient of a parameter, made of zeros if there is none yet; `None` for a parameter that requires none.
fn gradient_of(parameter: &Tensor) -> Result<Option<Tensor>, Error> {
    if !parameter.requires_grad() {
        return Ok(None);
    }
    let gradient = parameter.f_grad().map_err(libtorch)?;
    if gradient.defined() {
        return Ok(Some(gradient));
    }
    // tch cannot set a gradient. One backward pass through zero times the parameter makes one: zeros, of the right shape
    // and layout, whatever the parameter's values.
    tch::with_grad(|| parameter.f_sum(parameter.kind())?.f_mul_scalar(0.0)?.f_backward())
        .map_err(libtorch)?;
    parameter.f_grad().map(Some).map_err(libtorch)
}

/// Copies elements into a tensor of any shape, without a trace in the autograd graph.
fn write<T: tch::kind::Element>(tensor: &mut Tensor, elements: &[T]) -> Result<(), Error> {
    let copy = || {
        let elements = Tensor::f_from_slice(elements)?.f_view(tensor.size().as_slice())?;
        tensor.f_copy_(&elements)
    };
    tch::no_grad(copy).map_err(libtorch)
}

fn bytes_of(tensor: &Tensor) -> Result<Vec<u8>, Error> {
    let mut bytes = vec![0; tensor.numel() * tensor.kind().elt_size_in_bytes()];
    tensor.f_copy_data_u8(&mut bytes, tensor.numel()).map_err(libtorch)?;
    Ok(bytes)
}

fn check_place(tensor: &Tensor, name: impl Fn() -> String) -> Result<(), Error> {
    match tensor.device() {
        Device::Cpu => Ok(()),
        device => usage(format!("{} is on {device:?}; TchDeviceParallel is for those", name())),
    }
}

fn usage<T>(reason: String) -> Result<T, Error> {
    Err(Error::Usage { reason })
}

/// What libtorch refuses is a call that does not fit the tensors.
fn libtorch(error: TchError) -> Error {
    Error::Usage { reason: format!("libtorch: {error}") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use paceline_transport::mem;

    const ON_CPU: (Kind, Device) = (Kind::Float, Device::Cpu);

    /// Runs `part` on two ranks as threads and returns what they computed.
    pub(super) fn on_two_ranks<T: Send + 'static>(part: fn(usize, &mut Communicator) -> T) -> [T; 2] {
        let ranks = mem::group(2, 1, 1024).into_iter().enumerate().map(|(rank, transport)| {
            std::thread::spawn(move || {
                let mut communicator = Communicator::new(Box::new(transport), Default::default())
                    .expect("the defaults are right");
                let result = part(rank, &mut communicator);
                communicator.leave().expect("both leave");
                result
            })
        });
        let ranks: Vec<_> = ranks.collect();
        let results: Vec<T> = ranks.into_iter().map(|rank| rank.join().expect("no rank panics")).collect();
        results.try_into().ok().expect("there are two")
    }

    fn parameter(values: &[f32]) -> Tensor {
        Tensor::from_slice(values).set_requires_grad(true)
    }

    fn values(tensor: &Tensor) -> Vec<f64> {
        Vec::try_from(tensor.to_kind(Kind::Double)).expect("the tensor has one dimension")
    }

    #[test]
    fn replicas_are_equal_after_a_broadcast() {
        let [first, second] = on_two_ranks(|rank, communicator| {
            let parameters = [
                Tensor::full([2, 3], rank as f64, ON_CPU),
                Tensor::full([4], rank as f64, (Kind::Double, Device::Cpu)),
                parameter(&[rank as f32 + 0.5]),
            ];
            let mut parallel = TchDataParallel::new(&parameters, Config::default()).expect("CPU floats");
            let before = parallel.parameter_digest().expect("they can be read");
            parallel.broadcast_parameters(communicator, 1).expect("both call it");
            assert_eq!(values(&parameters[1]), [1.0; 4]);
            assert_eq!(values(&parameters[2]), [1.5]);
            (before, parallel.parameter_digest().expect("they can be read"))
        });
        assert_ne!(first.0, second.0);
        assert_eq!(first.1, second.1);
        assert_eq!(second.0, second.1, "the root keeps its own");
    }

    #[test]
    fn gradients_are_averaged_and_missing_ones_count_as_zeros() {
        on_two_ranks(|rank, communicator| {
            let both = parameter(&[1.0, 2.0]);
            let only_on_rank_1 = parameter(&[f32::NAN]);
            let on_none = parameter(&[3.0]);
            let frozen = Tensor::from_slice(&[4.0f32]);
            let double = Tensor::from_slice(&[5.0f64]).set_requires_grad(true);
            let all = [&both, &only_on_rank_1, &on_none, &frozen, &double].map(Tensor::shallow_clone);
            let mut parallel = TchDataParallel::new(&all, Config::default()).expect("CPU floats");
            for step in 0..3 {
                all.iter().for_each(|parameter| parameter.shallow_clone().zero_grad());
                let scale = (rank + step) as f64;
                (&both * scale).sum(Kind::Float).backward();
                (&double * (2.0 * scale)).sum(Kind::Double).backward();
                if rank == 1 {
                    (&only_on_rank_1 * 6.0).sum(Kind::Float).backward();
                }
                parallel.average_gradients(communicator).expect("both call it");
                let mean = step as f64 + 0.5;
                assert_eq!(values(&both.grad()), [mean, mean]);
                assert_eq!(values(&double.grad()), [2.0 * mean]);
                assert_eq!(values(&only_on_rank_1.grad()), [3.0]);
                assert_eq!(values(&on_none.grad()), [0.0]);
                assert!(!frozen.grad().defined());
            }
        });
    }

    #[test]
    fn averaging_during_the_backward_pass_gives_the_same_bits() {
        let [first, second] = on_two_ranks(|rank, communicator| {
            // Small buckets, so that there are many. Each rank has an order of its layers of its own, and rank 1 alone needs the last
            // parameter.
            let config = Config { first_bucket_bytes: 64, bucket_bytes: 128 };
            tch::manual_seed(7 + rank as i64);
            let layers = [(4, 8), (8, 8), (8, 8), (8, 1)];
            let make = |(rows, columns)| Tensor::randn([rows, columns], ON_CPU).set_requires_grad(true);
            let mut parameters: Vec<Tensor> = layers.map(make).into();
            parameters.push(Tensor::ones([3], (Kind::Double, Device::Cpu)).set_requires_grad(true));
            parameters.push(parameter(&[1.0, 2.0]));
            let mut parallel = TchDataParallel::new(&parameters, config).expect("CPU floats");
            parallel.broadcast_parameters(communicator, 0).expect("both call it");
            let mut means = Vec::new();
            for step in 0..3 {
                let [during, after]: [Vec<f64>; 2] = [true, false].map(|during| {
                    parameters.iter().for_each(|parameter| parameter.shallow_clone().zero_grad());
                    let input = Tensor::from_slice(&[rank as f32, 1.0, 2.0, step as f32]).view([1, 4]);
                    let order = if rank == 0 { [0, 1, 2, 3] } else { [0, 2, 1, 3] };
                    let hidden = order
                        .into_iter()
                        .fold(input, |hidden, layer| hidden.matmul(&parameters[layer]).tanh());
                    let mut loss = hidden.sum(Kind::Double) + parameters[4].sum(Kind::Double) * rank as f64;
                    if rank == 1 {
                        loss += parameters[5].sum(Kind::Double);
                    }
                    match during {
                        true => parallel.backward(communicator, &loss).expect("both call it"),
                        false => {
                            loss.backward();
                            parallel.average_gradients(communicator).expect("both call it");
                        }
                    }
                    parameters.iter().flat_map(|parameter| values(&parameter.grad().flatten(0, -1))).collect()
                });
                assert_eq!(during, after, "step {step}");
                means.push(after);
            }
            means
        });
        assert_eq!(first, second, "on both ranks");
        assert_ne!(first[0], first[1], "steps differ");
    }

    #[test]
    fn what_cannot_be_averaged_is_refused() {
        let integer = Tensor::from_slice(&[1i64]);
        let error = TchDataParallel::new(&[integer], Config::default()).expect_err("an integer");
        assert_eq!(error.to_string(), "parameter 0 is Int64; only Float and Double can be averaged");
    }
}
