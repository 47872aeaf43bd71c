//! What things take. Printed and not judged.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use paceline_collectives::device::{
    Accelerator, CopySpan, Device, DeviceError, DeviceGroup, DeviceMemory, FallbackConfig, Host, Pinned,
    Stream, Transfer,
};
use paceline_collectives::{DType, ReduceOp};
use paceline_runtime::World;

use crate::rank::Scale;
use crate::raw::RawNccl;

/// Each is timed as often, and the fastest counts.
const ROUNDS: usize = 3;

/// The fallback on a GPU and a rank without one, and each of its stages by itself.
///
/// # Errors
/// The device's, or the group's.
pub fn pipeline(scale: Scale) -> Result<()> {
    let mut world = World::join()?;
    let accelerator = if world.rank() == 1 { Accelerator::Host(Host) } else { world.accelerator() };
    let mut group = world.device_group(&accelerator)?;
    let mut memory = accelerator.alloc(scale.timed_len, DType::F32)?;
    let mut elements = vec![world.rank() as f32 + 1.0; scale.timed_len];
    memory.write(bytemuck::cast_slice(&elements))?;
    let stream = accelerator.new_stream()?;
    // SAFETY: the memory is kept until the stream is synchronized, each time; where a call fails before, freeing it waits
    // for the GPU, and calls on the host's memory have run when they return.
    let buffer = unsafe { memory.buffer(0..scale.timed_len) };
    let mut whole = Duration::MAX;
    for _ in 0..ROUNDS {
        world.communicator().barrier()?;
        let start = Instant::now();
        group.all_reduce(buffer, buffer, ReduceOp::Sum, stream)?;
        accelerator.synchronize(stream)?;
        whole = whole.min(start.elapsed());
    }
    memory.read(bytemuck::cast_slice_mut(&mut elements))?;
    // Of n ranks, the first sum is 1 + ... + n, and each further one n times the one before.
    let ranks = world.world_size() as f32;
    let expected = ranks * (ranks + 1.0) / 2.0 * ranks.powi(ROUNDS as i32 - 1);
    let wrong = elements.iter().filter(|element| **element != expected).count();
    ensure!(wrong == 0, "{wrong} of {} sums are not {expected}", elements.len());
    let host = on_host(&mut world, scale)?;
    let device = accelerator.seat()?.device;
    let [down, up] = [Way::Down, Way::Up].map(|way| copies(&*device, &memory, stream, way));
    let (down, up) = (down?, up?);
    let slowest = host.max(down).max(up);
    let rate = |time: Duration| scale.timed_len as f64 * 4.0 / time.as_secs_f64() / 1e9;
    if world.rank() == 0 {
        println!(
            "note: GB/s down {:.2}, on the host {:.2}, up {:.2}, together {:.2}: {:.0} % of the slowest",
            rate(down),
            rate(host),
            rate(up),
            rate(whole),
            100.0 * slowest.as_secs_f64() / whole.as_secs_f64()
        );
    }
    group.leave()?;
    Ok(world.leave()?)
}

/// The collectives of the pieces alone.
fn on_host(world: &mut World, scale: Scale) -> Result<Duration> {
    let piece = FallbackConfig::default().buffer_bytes / 4;
    let mut elements = vec![0f32; scale.timed_len];
    let mut best = Duration::MAX;
    for _ in 0..ROUNDS {
        world.communicator().barrier()?;
        let start = Instant::now();
        for piece in elements.chunks_mut(piece) {
            world.communicator().all_reduce(piece, ReduceOp::Sum)?;
        }
        best = best.min(start.elapsed());
    }
    Ok(best)
}

#[derive(Clone, Copy)]
enum Way {
    Down,
    Up,
}

/// The copies of the pieces alone, one way, with two buffers in turn.
fn copies(device: &dyn Device, memory: &DeviceMemory, stream: Stream, way: Way) -> Result<Duration> {
    let piece = FallbackConfig::default().buffer_bytes / 4;
    let mut buffers: Vec<Box<dyn Pinned>> = Vec::new();
    for _ in 0..2 {
        buffers.push(device.alloc_pinned(piece * 4)?);
    }
    let start = Instant::now();
    let mut under_way: Vec<Box<dyn Transfer>> = Vec::new();
    for first in (0..memory.len()).step_by(piece) {
        let buffer = match buffers.pop() {
            Some(buffer) => buffer,
            None => under_way.remove(0).finish(),
        };
        // SAFETY: the memory outlives the copies, all of which are waited for below, or, where one fails, when the caller
        // frees the memory.
        let part = unsafe { memory.buffer(first..memory.len().min(first + piece)) };
        under_way.push(copy(device, vec![CopySpan::of(part, 0)], buffer, stream, way)?);
    }
    under_way.into_iter().for_each(|transfer| drop(transfer.finish()));
    Ok(start.elapsed())
}

fn copy(
    device: &dyn Device,
    spans: Vec<CopySpan>,
    buffer: Box<dyn Pinned>,
    stream: Stream,
    way: Way,
) -> Result<Box<dyn Transfer>, DeviceError> {
    match way {
        Way::Down => device.copy_to_host(spans, buffer, stream),
        Way::Up => device.copy_to_device(buffer, spans, stream),
    }
}

/// A call through the group, and one of NCCL's own functions on the calling thread.
///
/// # Errors
/// The device's, the group's or NCCL's.
pub fn overhead(accelerator: &Accelerator, group: &mut DeviceGroup, scale: Scale) -> Result<String> {
    let (memory, stream) = (accelerator.alloc(1, DType::F32)?, accelerator.new_stream()?);
    // SAFETY: the memory is kept until the stream is synchronized; where a call fails before, freeing it waits for the GPU.
    let buffer = unsafe { memory.buffer(0..1) };
    let ours = per_call(accelerator, stream, scale, || {
        Ok(group.all_reduce(buffer, buffer, ReduceOp::Sum, stream)?)
    })?;
    let gpu = accelerator.seat()?.gpu.context("a GPU")?;
    (gpu.prepare)().map_err(anyhow::Error::msg)?;
    let raw = RawNccl::open()?;
    let raw = per_call(accelerator, stream, scale, || raw.all_reduce(buffer, stream))?;
    Ok(format!("{ours:.2} us, raw {raw:.2} us, {:.2} us more", ours - raw))
}

/// Microseconds of a call until it returns, of which a batch at a time is then waited for.
fn per_call(
    accelerator: &Accelerator,
    stream: Stream,
    scale: Scale,
    mut call: impl FnMut() -> Result<()>,
) -> Result<f64> {
    // So few that the device's queue never makes a call wait.
    const BATCH: u32 = 20;
    let mut in_calls = Duration::ZERO;
    for _ in 0..scale.calls / BATCH {
        let start = Instant::now();
        for _ in 0..BATCH {
            call()?;
        }
        in_calls += start.elapsed();
        accelerator.synchronize(stream)?;
    }
    Ok(in_calls.as_secs_f64() * 1e6 / f64::from(scale.calls / BATCH * BATCH))
}
