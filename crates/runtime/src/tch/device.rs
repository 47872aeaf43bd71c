//! Data-parallel training of tch's models on a GPU, through the group of the ranks' devices.
//!
//! Gradients are copied into buckets on the device, averaged there on torch's current stream, and copied back, all without
//! waiting for the device when the group is NCCL's. On the CPU the same code runs through the host, with the host's memory
//! as the device.

use paceline_collectives::device::{Accelerator, DeviceBuffer, DeviceGroup, Host, Stream};
use paceline_collectives::{DType, ReduceOp};
use tch::nn::VarStore;
use tch::{Device, Kind, Tensor};

use super::cuda::{self, TorchCuda};
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
        Ok(Self { parameters, buckets })
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
        check_place(group, device)?;
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
        check_place(group, device)?;
        // In loops of their own: on the device each all_reduce waits for what is before it on the stream.
        for bucket in &mut self.buckets {
            bucket.fill(|number| gradient_of(&self.parameters[number]))?;
        }
        for bucket in &mut self.buckets {
            let buffer = bucket.buffer();
            group.all_reduce(buffer, buffer, ReduceOp::Avg, device.stream()?)?;
        }
        for bucket in &mut self.buckets {
            bucket.hand_out(|number| gradient_of(&self.parameters[number]))?;
        }
        Ok(())
    }
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
            let tensor = of(number)?;
            let copied = tch::no_grad(|| match &tensor {
                Some(tensor) => view.f_copy_(tensor),
                None => view.f_zero_().map(drop),
            });
            copied.map_err(libtorch)?;
        }
        Ok(())
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
        // SAFETY: the tensor is contiguous, on the group's device, and lives as long as the bucket. All that uses it is on the
        // stream of the call; if the bucket is dropped before, torch gives its memory to later work on that stream only.
        unsafe { DeviceBuffer::from_raw(self.flat.data_ptr() as u64, self.flat.numel(), self.dtype) }
    }
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
            let gradients: Vec<Vec<f32>> =
                store.trainable_variables().iter().map(|parameter| values(&parameter.grad())).collect();
            let parameters: Vec<Vec<f32>> = store.trainable_variables().iter().map(values).collect();
            group.leave().expect("both do");
            (gradients, parameters)
        });
        assert_eq!(first, second, "the parameters too, which began as different random numbers");
        assert!(first.0.iter().flatten().all(|&mean| mean == 1.5 || mean == 1.0), "{first:?}");
    }
}
