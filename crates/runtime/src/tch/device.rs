//! Data-parallel training of tch's models on a GPU, through the group of the ranks' devices.
//!
//! Gradients are copied into buckets on the device, averaged there, and copied back, all without waiting for the device
//! when the group is NCCL's. The averages of [`TchDeviceParallel::backward`] are on a stream of their own, beside the kernels
//! of earlier layers; where they go through the host, so that a call takes its time, they are on a thread of their own too.
//! On the CPU the same code runs with the host's memory as the device.

use std::fmt;
use std::ops::Range;
use std::panic;
use std::sync::mpsc;
use std::thread;

use paceline_collectives::device::{
    self, Accelerator, Backend, DeviceBuffer, DeviceGroup, Event, Host, Stream,
};
use paceline_collectives::{DType, ReduceOp};
use tch::nn::VarStore;
use tch::{Device, Kind, Tensor};

use super::cuda::{self, TorchCuda};
use super::hooks::GradientHooks;
use super::{gradient_of, libtorch, usage};
use crate::data_parallel::{Config, partition};
use crate::{Error, World};

/// What a rank trains on, for torch and for the collectives alike.
pub struct TchDevice {
    accelerator: Accelerator,
    device: Device,
    torch: Option<&'static TorchCuda>,
}

impl TchDevice {
    /// The GPU of this process's number on its host, or the CPU where there is none or libtorch cannot use it.
    ///
    /// To be called before anything that asks libtorch about CUDA, [`tch::Cuda::is_available`] among them: see the module's
    /// reason. Several processes share a GPU where there are fewer.
    pub fn new(world: &World) -> Self {
        let torch = cuda::load();
        let gpus = usize::try_from(tch::Cuda::device_count()).unwrap_or(0);
        if torch.is_none() || gpus == 0 {
            return Self { accelerator: Accelerator::Host(Host), device: Device::Cpu, torch: None };
        }
        match world.accelerator() {
            cuda @ Accelerator::Cuda(_) => {
                Self { accelerator: cuda, device: Device::Cuda(world.local_rank() % gpus), torch }
            }
            host @ Accelerator::Host(_) => Self { accelerator: host, device: Device::Cpu, torch: None },
        }
    }

    /// Where tensors are made.
    pub fn device(&self) -> Device {
        self.device
    }

    /// For [`World::device_group`].
    pub fn accelerator(&self) -> &Accelerator {
        &self.accelerator
    }

    /// The stream on which torch enqueues its work now, on this thread.
    ///
    /// # Errors
    /// [`Error::Usage`] when torch does not tell it.
    pub fn stream(&self) -> Result<Stream, Error> {
        match (self.torch, self.device) {
            (Some(torch), Device::Cuda(number)) => torch.current_stream(number),
            // SAFETY: the host runs everything in the call, whatever its stream is called.
            _ => Ok(unsafe { Stream::from_handle(0) }),
        }
    }
}

/// Keeps the replicas of one model equal on all ranks, on their devices ([`TchDataParallel`](super::TchDataParallel) on
/// a GPU).
///
/// All ranks make it from the same parameters in the same order, and call the same methods in the same order. Parameters are
/// f32, f64, f16 or bf16, all on the rank's device.
#[derive(Debug)]
pub struct TchDeviceParallel {
    parameters: Vec<Tensor>,
    buckets: Vec<Bucket>,
    turn: Turn,
    /// Made by the first backward pass that needs them.
    aside: Option<Aside>,
    /// Why a pass that averaged meanwhile has failed: the ranks may have begun different buckets.
    broken: Option<String>,
}

/// Which gradients of a step are in their buckets, and how many buckets are on their way.
#[derive(Debug)]
struct Turn {
    /// The bucket of each parameter.
    places: Vec<usize>,
    given: Vec<bool>,
    /// For each bucket, how many gradients it lacks.
    missing: Vec<usize>,
    started: usize,
}

/// What a backward pass that averages meanwhile needs.
struct Aside {
    hooks: GradientHooks,
    device: Box<dyn device::Device>,
    /// Where the averages are, so that the pass does not wait for them.
    stream: Stream,
    /// For each bucket: its gradients are in it.
    ready: Vec<Event>,
    done: Event,
}

/// Parameters whose gradients travel together.
#[derive(Debug)]
struct Bucket {
    /// Their numbers, descending.
    parameters: Vec<usize>,
    flat: Tensor,
    /// A view of `flat` for each, in its shape.
    views: Vec<Tensor>,
    dtype: DType,
}

impl TchDeviceParallel {
    /// For the trainable variables of a store, in the order in which the model made them. Takes as much memory on the device
    /// again as they do.
    ///
    /// # Errors
    /// [`Error::Usage`] when a parameter is on another device or of a kind that cannot be averaged.
    pub fn from_var_store(store: &VarStore, device: &TchDevice, config: Config) -> Result<Self, Error> {
        let parameters = store.trainable_variables();
        let mut kinds: Vec<(Kind, Vec<usize>)> = Vec::new();
        for (number, parameter) in parameters.iter().enumerate() {
            let (kind, place) = (parameter.f_kind().map_err(libtorch)?, parameter.device());
            if place != device.device {
                return usage(format!("parameter {number} is on {place:?}, not on {:?}", device.device));
            }
            match kinds.iter_mut().find(|(other, _)| *other == kind) {
                Some((_, numbers)) => numbers.push(number),
                None => kinds.push((kind, vec![number])),
            }
        }
        let mut buckets = Vec::new();
        for (kind, numbers) in kinds {
            let Some(dtype) = dtype_of(kind) else {
                return usage(format!("parameters of {kind:?} cannot be averaged"));
            };
            let lens: Vec<usize> = numbers.iter().map(|&number| parameters[number].numel()).collect();
            for part in partition(&lens, dtype.size(), config) {
                let numbers: Vec<usize> = part.into_iter().map(|index| numbers[index]).collect();
                buckets.push(Bucket::new(numbers, &parameters, (kind, dtype), device)?);
            }
        }
        let turn = Turn::new(&buckets, parameters.len());
        Ok(Self { parameters, buckets, turn, aside: None, broken: None })
    }

    /// Replaces the parameters on every rank by those of `root`. All ranks call it, usually once before the first step.
    ///
    /// # Errors
    /// [`Error::Usage`] for a group that is not on the parameters' device; else the broadcast's.
    pub fn broadcast_parameters(
        &mut self,
        group: &mut DeviceGroup,
        device: &TchDevice,
        root: usize,
    ) -> Result<(), Error> {
        self.check(group, device)?;
        for bucket in &mut self.buckets {
            bucket.fill(|number| Ok(Some(self.parameters[number].shallow_clone())))?;
            group.broadcast(bucket.buffer(), root, device.stream()?)?;
            bucket.hand_out(|number| Ok(Some(self.parameters[number].shallow_clone())))?;
        }
        Ok(())
    }

    /// Replaces the gradients on every rank by their mean over the ranks. All ranks call it once per step, after `backward`
    /// and before the optimizer's step, on one thread, whose current stream of torch orders it with both.
    ///
    /// A parameter without a gradient counts as zeros and has one afterwards.
    ///
    /// # Errors
    /// [`Error::Usage`] for a gradient that cannot be read, or a group that is not on the parameters' device; else the
    /// all_reduce's. An error of the device may come with a later call, when gradients were used that are not the mean:
    /// [`DeviceGroup::check`] after the device has been waited for says whether all until then were.
    pub fn average_gradients(&mut self, group: &mut DeviceGroup, device: &TchDevice) -> Result<(), Error> {
        self.check(group, device)?;
        // In loops of their own: on the device each all_reduce waits for what is before it on the stream.
        for bucket in &mut self.buckets {
            bucket.fill(|number| gradient_of(&self.parameters[number]))?;
        }
        for bucket in &mut self.buckets {
            let buffer = bucket.buffer();
            group.all_reduce(buffer, buffer, ReduceOp::Avg, device.stream()?)?;
        }
        self.hand_out()
    }

    /// Computes the gradients of `loss`, and replaces every one by its mean over the ranks: `loss.backward()` and
    /// [`average_gradients`](Self::average_gradients) in one. The all_reduce of a bucket begins as soon as the pass has enqueued
    /// its gradients, on a stream of its own, so that it runs beside the kernels of earlier layers; torch's current stream waits
    /// for all at the end. What goes through the host has a thread of its own meanwhile, which this call waits for.
    ///
    /// All ranks call it once per step, or all call the other two, with the same device each time. The model's work is on one
    /// stream of torch's, as always with tch. Gradients are added to those that are there, as by any pass. Parameters that
    /// required no gradient at the first call are averaged after the pass.
    ///
    /// # Errors
    /// As [`average_gradients`](Self::average_gradients), and [`Error::Usage`] when libtorch cannot run the pass. Some
    /// gradients may be on their way already, so this replica can then do no further step, and says so.
    pub fn backward(
        &mut self,
        group: &mut DeviceGroup,
        device: &TchDevice,
        loss: &Tensor,
    ) -> Result<(), Error> {
        self.check(group, device)?;
        let mut aside = match self.aside.take() {
            Some(aside) => aside,
            None => Aside::new(&self.parameters, self.buckets.len(), device)?,
        };
        let averaged = self.average_during(group, device, loss, &mut aside);
        // Also after a failure: what is on its way uses the buckets.
        let joined = aside.join(device);
        self.aside = Some(aside);
        let outcome = averaged.and(joined).and_then(|()| self.hand_out());
        self.broken = outcome.as_ref().err().map(Error::to_string);
        outcome
    }

    fn check(&self, group: &DeviceGroup, device: &TchDevice) -> Result<(), Error> {
        match &self.broken {
            Some(reason) => usage(format!("an earlier backward pass has failed: {reason}")),
            None => check_place(group, device),
        }
    }

    fn average_during(
        &mut self,
        group: &mut DeviceGroup,
        device: &TchDevice,
        loss: &Tensor,
        aside: &mut Aside,
    ) -> Result<(), Error> {
        self.turn.begin(&self.buckets);
        let Aside { hooks, device: gpu, stream, ready, .. } = aside;
        let in_no_time = group.agreement().backend == Backend::Nccl;
        let mut averages = Averages { group, gpu: gpu.share(), stream: *stream };
        let mut pass = |way: Way<'_, '_>| {
            let mut lane = Lane { device, gpu, ready, way };
            self.give_during(hooks, loss, &mut lane)
        };
        if in_no_time {
            return pass(Way::Here(&mut averages));
        }
        thread::scope(|scope| {
            let (sender, complete) = mpsc::channel();
            let averager = thread::Builder::new()
                .name("averages".to_owned())
                .spawn_scoped(scope, move || {
                    complete.into_iter().try_for_each(|task| averages.average(&task))
                })
                .map_err(|error| Error::Usage { reason: format!("no thread for the averages: {error}") })?;
            let passed = pass(Way::Apart(sender));
            // Its reason goes first: that it has ended is all that the pass knows.
            averager.join().unwrap_or_else(|payload| panic::resume_unwind(payload)).and(passed)
        })
    }

    /// Runs the pass, and gives each bucket to the lane when it is complete.
    fn give_during(
        &mut self,
        hooks: &mut GradientHooks,
        loss: &Tensor,
        lane: &mut Lane<'_, '_>,
    ) -> Result<(), Error> {
        let mut given = Ok(());
        let mut heard = |number: usize| {
            if given.is_ok() {
                given = self.give(number, lane);
            }
        };
        let passed = hooks.during(&mut heard, || loss.f_backward());
        // What failed first may have ended the pass.
        given.and(passed.map_err(libtorch))?;
        for number in (0..self.parameters.len()).rev() {
            if !self.turn.given[number] {
                self.give(number, lane)?;
            }
        }
        Ok(())
    }

    /// Copies one gradient into its bucket, and starts the buckets that are complete with it.
    fn give(&mut self, number: usize, lane: &mut Lane<'_, '_>) -> Result<(), Error> {
        let complete = self.turn.give(number)?;
        let bucket = &mut self.buckets[self.turn.places[number]];
        let gradient = self.parameters[number].f_grad().map_err(libtorch)?;
        // None is made here if there is none: that takes a pass, and one may be running.
        bucket.take(number, Some(gradient).filter(Tensor::defined))?;
        complete.into_iter().try_for_each(|place| lane.average(place, self.buckets[place].buffer()))
    }

    fn hand_out(&mut self) -> Result<(), Error> {
        for bucket in &mut self.buckets {
            bucket.hand_out(|number| gradient_of(&self.parameters[number]))?;
        }
        Ok(())
    }
}

/// Where the buckets of a pass go.
struct Lane<'a, 'group> {
    device: &'a TchDevice,
    gpu: &'a mut Box<dyn device::Device>,
    ready: &'a [Event],
    way: Way<'a, 'group>,
}

enum Way<'a, 'group> {
    /// At once: NCCL's calls return when the work is enqueued.
    Here(&'a mut Averages<'group>),
    /// On another thread, for as long as the host is busy with them.
    Apart(mpsc::Sender<Task>),
}

/// A bucket whose gradients are in it once the event has come.
struct Task {
    buffer: DeviceBuffer,
    ready: Event,
}

struct Averages<'a> {
    group: &'a mut DeviceGroup,
    gpu: Box<dyn device::Device>,
    stream: Stream,
}

impl Lane<'_, '_> {
    /// Averages what torch's current stream has put into the bucket of this place by now.
    fn average(&mut self, place: usize, buffer: DeviceBuffer) -> Result<(), Error> {
        let task = Task { buffer, ready: self.ready[place] };
        self.gpu.record(task.ready, self.device.stream()?).map_err(failed)?;
        match &mut self.way {
            Way::Here(averages) => averages.average(&task),
            Way::Apart(averager) => {
                averager.send(task).map_err(|_| Error::Usage { reason: "the averages have ended".to_owned() })
            }
        }
    }
}

impl Averages<'_> {
    fn average(&mut self, task: &Task) -> Result<(), Error> {
        self.gpu.wait(self.stream, task.ready).map_err(failed)?;
        Ok(self.group.all_reduce(task.buffer, task.buffer, ReduceOp::Avg, self.stream)?)
    }
}

impl Turn {
    fn new(buckets: &[Bucket], parameters: usize) -> Self {
        let mut places = vec![0; parameters];
        for (place, bucket) in buckets.iter().enumerate() {
            bucket.parameters.iter().for_each(|&number| places[number] = place);
        }
        Self { places, given: vec![false; parameters], missing: vec![0; buckets.len()], started: 0 }
    }

    fn begin(&mut self, buckets: &[Bucket]) {
        self.given.fill(false);
        self.missing = buckets.iter().map(|bucket| bucket.parameters.len()).collect();
        self.started = 0;
    }

    /// Notes a gradient. Gives the buckets that can be started once it is in its own: in order, so that all ranks start them
    /// alike.
    fn give(&mut self, number: usize) -> Result<Range<usize>, Error> {
        if std::mem::replace(&mut self.given[number], true) {
            return usage(format!("the gradient of parameter {number} was complete twice in one pass"));
        }
        self.missing[self.places[number]] -= 1;
        let first = self.started;
        self.started += self.missing[first..].iter().take_while(|missing| **missing == 0).count();
        Ok(first..self.started)
    }
}

impl Aside {
    fn new(parameters: &[Tensor], buckets: usize, device: &TchDevice) -> Result<Self, Error> {
        let hooks = GradientHooks::new(parameters)?;
        let make = || {
            let device = device.accelerator.seat()?.device;
            let ready = (0..buckets).map(|_| device.new_event()).collect::<Result<Vec<_>, _>>()?;
            let (stream, done) = (device.new_stream()?, device.new_event()?);
            Ok::<_, device::DeviceError>((device, stream, ready, done))
        };
        let (device, stream, ready, done) = make().map_err(failed)?;
        Ok(Self { hooks, device, stream, ready, done })
    }

    /// Has torch's current stream wait for all that is on the own one.
    fn join(&self, device: &TchDevice) -> Result<(), Error> {
        let stream = device.stream()?;
        let waits =
            self.device.record(self.done, self.stream).and_then(|()| self.device.wait(stream, self.done));
        waits.map_err(failed)
    }
}

impl fmt::Debug for Aside {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Aside").field("stream", &self.stream).finish_non_exhaustive()
    }
}

fn failed(error: device::DeviceError) -> Error {
    Error::Usage { reason: error.to_string() }
}

impl Bucket {
    fn new(
        parameters: Vec<usize>,
        all: &[Tensor],
        (kind, dtype): (Kind, DType),
        device: &TchDevice,
    ) -> Result<Self, Error> {
        let lens: Vec<i64> = parameters.iter().map(|&number| all[number].numel() as i64).collect();
        let flat = Tensor::f_zeros([lens.iter().sum::<i64>()], (kind, device.device)).map_err(libtorch)?;
        let (mut views, mut start) = (Vec::new(), 0);
        for (&number, len) in parameters.iter().zip(lens) {
            let view =
                flat.f_narrow(0, start, len).and_then(|part| part.f_view(all[number].size().as_slice()));
            views.push(view.map_err(libtorch)?);
            start += len;
        }
        Ok(Self { parameters, flat, views, dtype })
    }

    /// Copies a tensor for each parameter into the bucket; zeros where there is none.
    fn fill(&mut self, of: impl Fn(usize) -> Result<Option<Tensor>, Error>) -> Result<(), Error> {
        for (&number, view) in self.parameters.iter().zip(&mut self.views) {
            copy(view, of(number)?)?;
        }
        Ok(())
    }

    /// The same for one parameter, which is one of the bucket's.
    fn take(&mut self, number: usize, tensor: Option<Tensor>) -> Result<(), Error> {
        let place = self.parameters.iter().position(|&own| own == number).expect("it is in its bucket");
        copy(&mut self.views[place], tensor)
    }

    fn hand_out(&self, of: impl Fn(usize) -> Result<Option<Tensor>, Error>) -> Result<(), Error> {
        for (&number, view) in self.parameters.iter().zip(&self.views) {
            if let Some(mut tensor) = of(number)? {
                tch::no_grad(|| tensor.f_copy_(view)).map_err(libtorch)?;
            }
        }
        Ok(())
    }

    fn buffer(&self) -> DeviceBuffer {
        // SAFETY: the tensor is contiguous, on the group's device, and lives as long as the bucket. All that uses it is on
        // torch's stream, or on one for which that is made to wait; if the bucket is dropped before, torch gives its memory to
        // later work on its own stream only.
        unsafe { DeviceBuffer::from_raw(self.flat.data_ptr() as u64, self.flat.numel(), self.dtype) }
    }
}

fn copy(view: &mut Tensor, tensor: Option<Tensor>) -> Result<(), Error> {
    let copied = tch::no_grad(|| match &tensor {
        Some(tensor) => view.f_copy_(tensor),
        None => view.f_zero_().map(drop),
    });
    copied.map_err(libtorch)
}

/// The group must take addresses of the memory in which the buckets are.
fn check_place(group: &DeviceGroup, device: &TchDevice) -> Result<(), Error> {
    let on_gpu = device.device != Device::Cpu;
    if group.is_on_gpu() == on_gpu {
        return Ok(());
    }
    let of = if group.is_on_gpu() { "a GPU's memory" } else { "the host's memory" };
    let reason = format!(
        "the group is for buffers in {of} and the parameters are on {:?}; form it with the accelerator of that device",
        device.device
    );
    usage(reason)
}

fn dtype_of(kind: Kind) -> Option<DType> {
    match kind {
        Kind::Float => Some(DType::F32),
        Kind::Double => Some(DType::F64),
        Kind::Half => Some(DType::F16),
        Kind::BFloat16 => Some(DType::BF16),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tch::tests::on_two_ranks;
    use paceline_collectives::device::{Setup, Wanted};
    use tch::nn::{self, Module};

    #[test]
    fn gradients_on_devices_are_the_means_and_parameters_the_roots() {
        let [first, second] = on_two_ranks(|rank, communicator| {
            let device = TchDevice { accelerator: Accelerator::Host(Host), device: Device::Cpu, torch: None };
            let store = nn::VarStore::new(device.device());
            let model = nn::linear(store.root(), 3, 2, nn::LinearConfig::default());
            let config = Config { first_bucket_bytes: 4, bucket_bytes: 8 };
            let mut parallel =
                TchDeviceParallel::from_var_store(&store, &device, config).expect("floats on the CPU");
            let split = communicator.split(Some(0), 0).expect("both call it").expect("a color was given");
            let setup = Setup::new(Wanted::Fallback, 0);
            let mut group = DeviceGroup::form(split, Host::seat(), &setup).expect("both call it");
            parallel.broadcast_parameters(&mut group, &device, 0).expect("both call it");
            let input = Tensor::full([1, 3], rank as f64 + 1.0, (Kind::Float, Device::Cpu));
            model.forward(&input).sum(Kind::Float).backward();
            parallel.average_gradients(&mut group, &device).expect("both call it");
            let values =
                |tensor: &Tensor| Vec::<f32>::try_from(tensor.flatten(0, -1)).expect("one dimension");
            let gradients = || -> Vec<Vec<f32>> {
                store.trainable_variables().iter().map(|parameter| values(&parameter.grad())).collect()
            };
            let first = gradients();
            store.trainable_variables().iter_mut().for_each(Tensor::zero_grad);
            let loss = model.forward(&input).sum(Kind::Float);
            parallel.backward(&mut group, &device, &loss).expect("both call it");
            let gradients = gradients();
            assert_eq!(first, gradients, "by backward alone");
            let parameters: Vec<Vec<f32>> = store.trainable_variables().iter().map(values).collect();
            group.leave().expect("both do");
            (gradients, parameters)
        });
        assert_eq!(first, second, "the parameters too, which began as different random numbers");
        assert!(first.0.iter().flatten().all(|&mean| mean == 1.5 || mean == 1.0), "{first:?}");
    }

    /// Through the host, whose streams run everything at once: what it shows is which buckets go when, and with what.
    #[test]
    fn averaging_during_the_pass_gives_the_same_bits_whatever_the_order_of_the_layers() {
        let [first, second] = on_two_ranks(|rank, communicator| {
            let device = TchDevice { accelerator: Accelerator::Host(Host), device: Device::Cpu, torch: None };
            let store = nn::VarStore::new(device.device());
            let layers: Vec<Tensor> =
                ["a", "b", "c"].map(|name| store.root().randn(name, &[4, 4], 0.0, 1.0)).into();
            let unused = store.root().ones("unused", &[3]);
            let config = Config { first_bucket_bytes: 64, bucket_bytes: 128 };
            let mut parallel =
                TchDeviceParallel::from_var_store(&store, &device, config).expect("floats on the CPU");
            let split = communicator.split(Some(0), 0).expect("both call it").expect("a color was given");
            let mut group = DeviceGroup::form(split, Host::seat(), &Setup::new(Wanted::Fallback, 0))
                .expect("both call it");
            parallel.broadcast_parameters(&mut group, &device, 0).expect("both call it");
            let input = Tensor::full([1, 4], rank as f64 + 0.5, (Kind::Float, Device::Cpu));
            let order = if rank == 0 { [0, 1, 2] } else { [1, 0, 2] };
            let loss = || {
                let fold = |hidden: Tensor, layer: usize| hidden.matmul(&layers[layer]).tanh();
                let sum = order.into_iter().fold(input.shallow_clone(), fold).sum(Kind::Float);
                if rank == 1 { sum + unused.sum(Kind::Float) } else { sum }
            };
            let mut passes = Vec::new();
            for during in [true, false, true] {
                store.trainable_variables().iter_mut().for_each(Tensor::zero_grad);
                if during {
                    parallel.backward(&mut group, &device, &loss()).expect("both call it");
                } else {
                    loss().backward();
                    parallel.average_gradients(&mut group, &device).expect("both call it");
                }
                let parameters = store.trainable_variables();
                let gradients = parameters.iter().map(|parameter| {
                    Vec::<f32>::try_from(parameter.grad().flatten(0, -1)).expect("one dimension")
                });
                passes.push(gradients.collect::<Vec<_>>());
            }
            assert!(passes.iter().all(|pass| *pass == passes[0]), "{passes:?}");

            // A pass that fails leaves the ranks at different buckets: nothing goes on from there.
            let frozen = Tensor::ones([1], (Kind::Float, Device::Cpu));
            parallel.backward(&mut group, &device, &frozen).expect_err("it requires no gradient");
            let error =
                parallel.backward(&mut group, &device, &loss()).expect_err("it is broken").to_string();
            assert!(error.starts_with("an earlier backward pass has failed: libtorch: "), "{error}");
            group.leave().expect("both do");
            passes.swap_remove(0)
        });
        assert_eq!(first, second);
    }

    #[test]
    fn buckets_start_when_they_are_complete_and_in_order() {
        let bucket = |parameters: &[usize]| Bucket {
            parameters: parameters.to_vec(),
            flat: Tensor::zeros([0], (Kind::Float, Device::Cpu)),
            views: Vec::new(),
            dtype: DType::F32,
        };
        let buckets = [bucket(&[4]), bucket(&[3, 2]), bucket(&[1]), bucket(&[0])];
        let mut turn = Turn::new(&buckets, 5);
        for _ in 0..2 {
            turn.begin(&buckets);
            let order = [2, 0, 4, 1, 3].map(|number| turn.give(number).expect("each once"));
            assert_eq!(order, [0..0, 0..0, 0..1, 1..1, 1..4]);
        }
        let twice = turn.give(3).expect_err("it was given");
        assert_eq!(twice.to_string(), "the gradient of parameter 3 was complete twice in one pass");
    }
}
