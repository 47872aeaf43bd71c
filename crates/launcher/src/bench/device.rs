//! The side of a rank that measures collectives on device memory: on a GPU, or on the host's memory through the same code.

use paceline_runtime::World;
use paceline_runtime::collectives::Error as CollectivesError;
use paceline_runtime::collectives::device::{
    Accelerator, DeviceBuffer, DeviceError, DeviceGroup, DeviceMemory, Stream, Wanted,
};
use paceline_runtime::env;

use super::args::{BenchArgs, RowShape};
use super::collective::{Collective, Member, Place};
use super::reference::Value;
use crate::error::Error;

/// A rank's device, its buffers there, and the group of all ranks.
pub struct DeviceSide {
    accelerator: Accelerator,
    group: DeviceGroup,
    stream: Stream,
    // After the group: its operations may use them until it has ended.
    input: DeviceMemory,
    output: DeviceMemory,
}

/// What keeps NCCL from working on this machine, in one line: the driver, the device or the library.
pub fn missing_for_nccl() -> Option<String> {
    if let (Accelerator::Host(_), why) = Accelerator::find(0, env::cuda_driver(env::process).as_deref()) {
        return why;
    }
    let library = paceline_nccl::Library::open(&paceline_nccl::Search::from_environment());
    library.err().map(|error| error.to_string())
}

impl DeviceSide {
    /// Forms the group of all ranks' devices, with memory for the largest row.
    ///
    /// # Errors
    /// What the ranks cannot agree on, or the device refuses.
    pub fn new(world: &mut World, args: &BenchArgs, wanted: Wanted) -> Result<Self, Error> {
        let failed = |what: &str, why: &dyn std::fmt::Display| Error::System {
            what: what.to_owned(),
            why: why.to_string(),
        };
        let on_device = |error: DeviceError| failed("using the device", &error);
        let accelerator = world.accelerator();
        let mut setup = env::device_setup(env::process).map_err(|e| failed("reading the environment", &e))?;
        setup.wanted = wanted;
        let rows = args.rows(world.world_size() as u32);
        let input = rows.iter().map(|row| row.input_len).max().unwrap_or(0);
        let output = rows.iter().map(|row| args.output_room(row)).max().unwrap_or(0);
        let input = accelerator.alloc(input, args.dtype).map_err(on_device)?;
        let output = accelerator.alloc(output, args.dtype).map_err(on_device)?;
        let stream = accelerator.new_stream().map_err(on_device)?;
        let group = world.device_group_with(&accelerator, &setup);
        let group = group.map_err(|e| failed("forming the group of devices", &e))?;
        Ok(Self { accelerator, group, stream, input, output })
    }

    /// Runs a collective once; see [`Collective::call`]. Returns when it is enqueued.
    ///
    /// # Errors
    /// The group's.
    pub fn call(&mut self, args: &BenchArgs, place: Place, row: &RowShape) -> Result<(), CollectivesError> {
        let (collective, op, root) = (args.collective, args.op, args.root);
        let member = Member { rank: self.group.rank(), ranks: self.group.world_size() };
        let (input, output) = self.buffers(collective, place, row, member);
        let (group, stream) = (&mut self.group, self.stream);
        match collective {
            Collective::AllReduce => group.all_reduce(input, output, op, stream),
            Collective::ReduceScatter => group.reduce_scatter(input, output, op, stream),
            Collective::AllGather => group.all_gather(input, output, stream),
            Collective::Broadcast => group.broadcast(output, root, stream),
            Collective::Reduce => group.reduce(input, output, op, root, stream),
            Collective::Gather => group.gather(input, output, root, stream),
            Collective::Scatter => group.scatter(input, output, root, stream),
            Collective::AllToAll => group.all_to_all(input, output, stream),
            Collective::SendRecv if member.rank.is_multiple_of(2) => {
                group.send(input, member.next(), stream)?;
                group.recv(output, member.previous(), stream)
            }
            Collective::SendRecv => {
                group.recv(output, member.previous(), stream)?;
                group.send(input, member.next(), stream)
            }
            Collective::Barrier => unreachable!("refused with the arguments"),
        }
    }

    /// Input and output of a call. In place, both are in the output's memory.
    fn buffers(
        &self,
        collective: Collective,
        place: Place,
        row: &RowShape,
        member: Member,
    ) -> (DeviceBuffer, DeviceBuffer) {
        let (input, (input_start, output_start)) = match place {
            Place::OutOfPlace => (&self.input, (0, 0)),
            Place::InPlace => (&self.output, collective.traits().shape.starts_in_place(row.count, member)),
        };
        // SAFETY: both memories are read and written on the host when the stream is settled only. They live as long as
        // the group; where a call fails and all is dropped, freeing device memory waits for the GPU, and calls on the
        // host's memory have run when they return.
        unsafe {
            (
                input.buffer(input_start..input_start + row.input_len),
                self.output.buffer(output_start..output_start + row.output_len),
            )
        }
    }

    /// Blocks until all that was called has run.
    ///
    /// # Errors
    /// What the device has failed of.
    pub fn settle(&self) -> Result<(), CollectivesError> {
        self.accelerator.synchronize(self.stream).map_err(device)
    }

    /// Puts elements into the device's buffers. All that was called has run.
    ///
    /// # Errors
    /// The device's.
    pub fn upload<T: Value>(&mut self, input: &[T], output: &[T]) -> Result<(), CollectivesError> {
        self.input.write(bytemuck::cast_slice(input)).map_err(device)?;
        self.output.write(bytemuck::cast_slice(output)).map_err(device)
    }

    /// Takes elements from the device's output. All that was called has run.
    ///
    /// # Errors
    /// The device's.
    pub fn download<T: Value>(&self, output: &mut [T]) -> Result<(), CollectivesError> {
        self.output.read(bytemuck::cast_slice_mut(output)).map_err(device)
    }

    /// Leaves the group.
    ///
    /// # Errors
    /// The group's.
    pub fn leave(self) -> Result<(), CollectivesError> {
        self.settle()?;
        self.group.leave()
    }
}

fn device(error: DeviceError) -> CollectivesError {
    CollectivesError::Usage { operation: "device", reason: error.to_string() }
}
