//! The negative controls: with each wait left out, some result must be wrong, or the check that passes with it shows
//! nothing. The wait is left out in the device and not in what is checked, which is production code.
//!
//! What the host waits for (copies down, and buffers on their way up) is not here: a driver's copy cannot be looked at
//! without waiting for it. The tests on the software device leave those out.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Result, ensure};
use paceline_collectives::device::{
    Accelerator, CopySpan, Device, DeviceBuffer, DeviceError, DeviceGroup, DeviceMemory, Event, Pinned, Seat,
    Stream, Transfer, Wanted,
};
use paceline_collectives::{Communicator, DType, Error, ReduceOp};
use paceline_runtime::{World, env};

use crate::rank::Scale;

/// Elements of what is summed.
const LEN: usize = 50_000;

/// A device that leaves out one of every so many waits of streams.
struct Forgetful {
    device: Box<dyn Device>,
    waits: Arc<AtomicUsize>,
    /// The number of waits of a call, and which of them is left out.
    forgotten: (usize, Option<usize>),
}

impl Device for Forgetful {
    fn share(&self) -> Box<dyn Device> {
        let (device, waits) = (self.device.share(), self.waits.clone());
        Box::new(Self { device, waits, forgotten: self.forgotten })
    }

    fn wait(&self, stream: Stream, event: Event) -> Result<(), DeviceError> {
        let (of, forgotten) = self.forgotten;
        let number = self.waits.fetch_add(1, Ordering::Relaxed) % of;
        if Some(number) == forgotten { Ok(()) } else { self.device.wait(stream, event) }
    }

    fn new_stream(&self) -> Result<Stream, DeviceError> {
        self.device.new_stream()
    }

    fn new_event(&self) -> Result<Event, DeviceError> {
        self.device.new_event()
    }

    fn record(&self, event: Event, stream: Stream) -> Result<(), DeviceError> {
        self.device.record(event, stream)
    }

    fn is_done(&self, event: Event) -> Result<bool, DeviceError> {
        self.device.is_done(event)
    }

    fn alloc_pinned(&self, bytes: usize) -> Result<Box<dyn Pinned>, DeviceError> {
        self.device.alloc_pinned(bytes)
    }

    fn copy_to_host(
        &self,
        spans: Vec<CopySpan>,
        buffer: Box<dyn Pinned>,
        stream: Stream,
    ) -> Result<Box<dyn Transfer>, DeviceError> {
        self.device.copy_to_host(spans, buffer, stream)
    }

    fn copy_to_device(
        &self,
        buffer: Box<dyn Pinned>,
        spans: Vec<CopySpan>,
        stream: Stream,
    ) -> Result<Box<dyn Transfer>, DeviceError> {
        self.device.copy_to_device(buffer, spans, stream)
    }
}

type Call = fn(&mut DeviceGroup, DeviceBuffer, DeviceBuffer, Stream) -> Result<(), Error>;

/// Two of the fallback's three: for its input, and the caller's for the result. The third, of what goes up for what the
/// caller has, shows only on a rank that gives nothing to a collective; the tests on the software device leave it out.
///
/// # Errors
/// Something is wrong with all waits, or nothing is without one.
pub fn of_fallback(scale: Scale) -> Result<()> {
    let reduce: Call = |group, input, output, stream| group.all_reduce(input, output, ReduceOp::Sum, stream);
    all(Wanted::Fallback, &[(0, "input", reduce), (2, "result", reduce)], 3, scale)
}

/// The two of a group on NCCL: for its input, and the caller's for the result.
///
/// # Errors
/// Something is wrong with all waits, or nothing is without one.
pub fn of_nccl(scale: Scale) -> Result<()> {
    let reduce: Call = |group, input, output, stream| group.all_reduce(input, output, ReduceOp::Sum, stream);
    all(Wanted::Nccl, &[(0, "input", reduce), (1, "result", reduce)], 2, scale)
}

fn all(wanted: Wanted, waits: &[(usize, &str, Call)], of: usize, scale: Scale) -> Result<()> {
    let mut world = World::join()?;
    let accelerator = world.accelerator();
    let mut notes = Vec::new();
    for &(number, name, call) in waits {
        for forgotten in [None, Some(number)] {
            let communicator = world.communicator().split(Some(0), 0)?.expect("a color was given");
            let mut control = Control::new(&accelerator, communicator, wanted, (of, forgotten), scale)?;
            let mut wrong = 0;
            for turn in 0..scale.tries {
                wrong += u32::from(!control.is_right(turn, call)?);
                if forgotten.is_some() && wrong > 0 {
                    break;
                }
            }
            control.group.leave()?;
            match forgotten {
                None => ensure!(wrong == 0, "{wrong} of {} results are wrong with all waits", scale.tries),
                Some(_) => ensure!(wrong > 0, "no result is wrong without the wait for the {name}"),
            }
        }
        notes.push(name);
    }
    println!(
        "note: without the wait for the {} a result is wrong, with all none",
        notes.join(" or for the ")
    );
    Ok(world.leave()?)
}

/// A group on a forgetful device, and what its caller does before and after a call.
struct Control<'a> {
    accelerator: &'a Accelerator,
    group: DeviceGroup,
    stream: Stream,
    scale: Scale,
    busy: [DeviceMemory; 2],
    prepared: DeviceMemory,
    input: DeviceMemory,
    output: DeviceMemory,
    kept: DeviceMemory,
}

impl<'a> Control<'a> {
    fn new(
        accelerator: &'a Accelerator,
        communicator: Communicator,
        wanted: Wanted,
        forgotten: (usize, Option<usize>),
        scale: Scale,
    ) -> Result<Self> {
        let Seat { device, gpu } = accelerator.seat()?;
        let device: Box<dyn Device> = Box::new(Forgetful { device, waits: Arc::default(), forgotten });
        let mut setup = env::device_setup(env::process)?;
        setup.wanted = wanted;
        let group = DeviceGroup::form(communicator, Seat { device, gpu }, &setup)?;
        let alloc = || accelerator.alloc(LEN, DType::I32);
        let busy = || accelerator.alloc(scale.busy.0, DType::I32);
        Ok(Self {
            accelerator,
            group,
            stream: accelerator.new_stream()?,
            scale,
            busy: [busy()?, busy()?],
            prepared: alloc()?,
            input: alloc()?,
            output: alloc()?,
            kept: alloc()?,
        })
    }

    /// The caller's stream is busy, then makes the input; after the call it keeps the result.
    fn is_right(&mut self, turn: u32, call: Call) -> Result<bool> {
        let numbers = vec![turn as i32 + 1; LEN];
        self.prepared.write(bytemuck::cast_slice(&numbers))?;
        let [from, to] = &mut self.busy;
        for _ in 0..self.scale.busy.1 {
            to.copy_from(from, self.stream)?;
        }
        self.input.copy_from(&self.prepared, self.stream)?;
        // SAFETY: both are kept until the stream is synchronized; where a call fails before, freeing them waits for the
        // GPU, and calls on the host's memory have run when they return.
        let (input, output) = unsafe { (self.input.buffer(0..LEN), self.output.buffer(0..LEN)) };
        call(&mut self.group, input, output, self.stream)?;
        self.kept.copy_from(&self.output, self.stream)?;
        self.accelerator.synchronize(self.stream)?;
        let mut found = vec![0i32; LEN];
        self.kept.read(bytemuck::cast_slice_mut(&mut found))?;
        Ok(found == numbers)
    }
}
