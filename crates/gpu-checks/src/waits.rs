//! The negative controls: with each wait left out, some result must be wrong, or the check that passes with it shows
//! nothing. The wait is left out in the device and not in what is checked, which is production code.
//!
//! Little is left to chance: a kernel holds the caller's stream before it makes the input, other streams after they have
//! waited, and copies up, for longer than the host needs to enqueue the rest. So whatever does not wait comes too early.
//!
//! What the host waits for (copies down, and buffers on their way up) is not here: a driver's copy cannot be looked at
//! without waiting for it. The tests on the software device leave those out.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Result, ensure};
use paceline_collectives::device::{
    Accelerator, CopySpan, Device, DeviceError, DeviceGroup, DeviceMemory, Event, Pinned, Seat, Stream,
    Transfer, Wanted,
};
use paceline_collectives::{Communicator, DType, ReduceOp};
use paceline_runtime::{World, env};

use crate::rank::Scale;

/// Elements of what is summed.
const LEN: usize = 50_000;

/// A device that leaves out one of every so many waits of streams, and holds a stream after each other one and before each
/// copy up.
struct Forgetful {
    device: Box<dyn Device>,
    accelerator: Accelerator,
    waits: Arc<AtomicUsize>,
    held: Duration,
    /// The number of waits of a call, and which of them is left out.
    forgotten: (usize, Option<usize>),
}

impl Device for Forgetful {
    fn share(&self) -> Box<dyn Device> {
        let Self { accelerator, waits, held, forgotten, .. } = self;
        let (accelerator, waits) = (accelerator.clone(), waits.clone());
        Box::new(Self { device: self.device.share(), accelerator, waits, held: *held, forgotten: *forgotten })
    }

    fn wait(&self, stream: Stream, event: Event) -> Result<(), DeviceError> {
        let (of, forgotten) = self.forgotten;
        let number = self.waits.fetch_add(1, Ordering::Relaxed) % of;
        if Some(number) == forgotten {
            return Ok(());
        }
        self.device.wait(stream, event)?;
        self.accelerator.hold(stream, self.held)
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
        self.accelerator.hold(stream, self.held)?;
        self.device.copy_to_device(buffer, spans, stream)
    }
}

/// A collective of which each rank has the same result, and makes it in `output` or in `input`.
#[derive(Clone, Copy)]
enum Call {
    AllReduce,
    /// Of rank 0.
    Broadcast,
}

/// A wait: its number among those of a call, what it is for, and a collective that needs it.
type Wait = (usize, &'static str, Call);

/// The three of streams: the copies down wait for what the caller has before, the copies up for the same, and the caller for
/// the copies up. The second shows on a rank that gives nothing to a collective.
///
/// # Errors
/// Something is wrong with all waits, or nothing is without one.
pub fn of_fallback(scale: Scale) -> Result<()> {
    let waits =
        [(0, "input", Call::AllReduce), (1, "output", Call::Broadcast), (2, "result", Call::AllReduce)];
    all(Wanted::Fallback, &waits, scale)
}

/// The two of a group on NCCL: its own stream waits for the caller's, and the caller's for that.
///
/// # Errors
/// Something is wrong with all waits, or nothing is without one.
pub fn of_nccl(scale: Scale) -> Result<()> {
    all(Wanted::Nccl, &[(0, "input", Call::AllReduce), (1, "result", Call::AllReduce)], scale)
}

fn all(wanted: Wanted, waits: &[Wait], scale: Scale) -> Result<()> {
    let mut world = World::join()?;
    let accelerator = world.accelerator();
    let mut notes = Vec::new();
    for &(number, name, call) in waits {
        for forgotten in [None, Some(number)] {
            let communicator = world.communicator().split(Some(0), 0)?.expect("a color was given");
            let forgotten = (waits.len(), forgotten);
            let mut control = Control::new(&accelerator, communicator, wanted, forgotten, scale)?;
            let mut found = [0u64; 2];
            for turn in 0..scale.tries {
                match control.find(turn, call)? {
                    Found::Right => {}
                    Found::Early => found[0] += 1,
                    Found::Other => found[1] += 1,
                }
            }
            control.group.leave()?;
            // Where a rank has nothing to wait for, its results are right in any case.
            world.communicator().all_reduce(&mut found, ReduceOp::Sum)?;
            let [early, other] = found;
            match forgotten.1 {
                None => ensure!(
                    early + other == 0,
                    "{} of {} results are wrong with all waits",
                    early + other,
                    scale.tries
                ),
                Some(_) => {
                    ensure!(
                        early > 0,
                        "no result is too early without the wait for the {name}; {other} are wrong"
                    );
                }
            }
        }
        notes.push(name);
    }
    if world.rank() == 0 {
        println!(
            "note: without the wait for the {} a result is wrong, with all none",
            notes.join(" or for the ")
        );
    }
    Ok(world.leave()?)
}

/// A group on a forgetful device, and what its caller does before and after a call.
struct Control<'a> {
    accelerator: &'a Accelerator,
    group: DeviceGroup,
    stream: Stream,
    held: Duration,
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
        let (waits, held) = (Arc::default(), scale.held);
        let forgetful = Forgetful { device, accelerator: accelerator.clone(), waits, held, forgotten };
        let device: Box<dyn Device> = Box::new(forgetful);
        let mut setup = env::device_setup(env::process)?;
        setup.wanted = wanted;
        let group = DeviceGroup::form(communicator, Seat { device, gpu }, &setup)?;
        let alloc = || accelerator.alloc(LEN, DType::I32);
        Ok(Self {
            accelerator,
            group,
            stream: accelerator.new_stream()?,
            held: scale.held,
            prepared: alloc()?,
            input: alloc()?,
            output: alloc()?,
            kept: alloc()?,
        })
    }

    /// The caller's stream is held, then makes the input; after the call it keeps the result.
    fn find(&mut self, turn: u32, call: Call) -> Result<Found> {
        let (turn, rank, ranks) = (turn as i32, self.group.rank() as i32, self.group.world_size() as i32);
        let own = turn * ranks + rank + 1;
        let sum = |turn: i32| turn * ranks * ranks + ranks * (ranks + 1) / 2;
        // What is there instead: the input and the result of the turn before, or what the caller had in the output.
        let (expected, early) = match call {
            Call::AllReduce => (sum(turn), Some(sum(turn - 1)).filter(|_| turn > 0)),
            Call::Broadcast => (own - rank, Some(own).filter(|_| rank > 0)),
        };
        let hold = match (call, rank) {
            (Call::AllReduce, _) => self.held,
            (Call::Broadcast, 0) => Duration::ZERO,
            // Longer than the root's copies down and this rank's up, which the device holds.
            (Call::Broadcast, _) => 6 * self.held,
        };
        self.prepared.write(bytemuck::cast_slice(&vec![own; LEN]))?;
        self.accelerator.hold(self.stream, hold)?;
        self.input.copy_from(&self.prepared, self.stream)?;
        // SAFETY: both are kept until the stream is synchronized; where a call fails before, freeing them waits for the
        // GPU, and calls on the host's memory have run when they return.
        let (input, output) = unsafe { (self.input.buffer(0..LEN), self.output.buffer(0..LEN)) };
        let result = match call {
            Call::AllReduce => {
                self.group.all_reduce(input, output, ReduceOp::Sum, self.stream)?;
                &self.output
            }
            Call::Broadcast => {
                self.group.broadcast(input, 0, self.stream)?;
                &self.input
            }
        };
        self.kept.copy_from(result, self.stream)?;
        self.accelerator.synchronize(self.stream)?;
        let mut found = vec![0i32; LEN];
        self.kept.read(bytemuck::cast_slice_mut(&mut found))?;
        let all = |wanted: i32| found.iter().all(|&element| element == wanted);
        Ok(match early {
            _ if all(expected) => Found::Right,
            Some(early) if all(early) => Found::Early,
            _ => Found::Other,
        })
    }
}

/// What a call has made.
enum Found {
    Right,
    /// All of it is what was there before.
    Early,
    /// Some of it is, or in the first turn whatever the memory had.
    Other,
}
