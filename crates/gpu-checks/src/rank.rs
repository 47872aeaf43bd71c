//! What a rank of a check does. It fails by an error, and says on a line with `note:` what the table shows.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use paceline_collectives::device::{Accelerator, Backend, DeviceGroup, Host, Wanted};
use paceline_collectives::{Communicator, Config, ReduceOp};
use paceline_runtime::{World, env};
use paceline_transport::mem;

use crate::collectives::Checker;
use crate::{speed, waits};

/// How long a survivor may take to hear of a death and to give up NCCL's operations.
const UNTIL_ABORTED: Duration = Duration::from_secs(60);

/// How often the launcher has started the job again, as torchrun has it.
const RESTARTS: &str = "TORCHELASTIC_RESTART_COUNT";

/// How much is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scale {
    /// The lengths of buffers whose every element is checked.
    pub lens: &'static [usize],
    /// Elements of the buffer whose way is timed.
    pub timed_len: usize,
    /// Calls that are timed.
    pub calls: u32,
    /// For how long streams are held, so that what does not wait for them is too early: longer than the host needs to enqueue
    /// a call, also when it does not run for a while.
    pub held: Duration,
    /// How often a wait is left out: more often than the fallback has buffers, each of which is allocated in a call, since a
    /// driver may wait for all streams then.
    pub tries: u32,
}

const FULL: Scale = Scale {
    lens: &[1, 1021, 1_000_003],
    timed_len: 64 << 20,
    calls: 2000,
    held: Duration::from_millis(50),
    tries: 5,
};
const SMOKE: Scale =
    Scale { lens: &[1, 300], timed_len: 300_000, calls: 20, held: Duration::from_millis(30), tries: 4 };

/// Plays a part.
///
/// # Errors
/// What is not as it should be.
pub fn run(part: &str, smoke: bool) -> Result<()> {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "warn".into());
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    let scale = if smoke { SMOKE } else { FULL };
    match part {
        "collectives" => with_group(|world, accelerator, group| everything(world, accelerator, group, scale)),
        "mixed" => mixed(scale),
        "hierarchy" => hierarchy(scale),
        "killed" => killed(scale),
        "waits-fallback" => waits::of_fallback(scale),
        "waits-nccl" => waits::of_nccl(scale),
        "pipeline" => speed::pipeline(scale),
        "overhead" => with_group(|_, accelerator, group| speed::overhead(accelerator, group, scale)),
        other => bail!("there is no part {other}"),
    }
}

/// Joins the job, forms the group of devices and leaves both.
fn with_group(part: impl FnOnce(&mut World, &Accelerator, &mut DeviceGroup) -> Result<String>) -> Result<()> {
    let mut world = World::join()?;
    let accelerator = world.accelerator();
    let mut group = world.device_group(&accelerator)?;
    let note = part(&mut world, &accelerator, &mut group)?;
    group.leave()?;
    say(&world, &note);
    Ok(world.leave()?)
}

fn say(world: &World, note: &str) {
    if world.rank() == 0 {
        println!("note: {note}");
    }
}

fn everything(
    world: &mut World,
    accelerator: &Accelerator,
    group: &mut DeviceGroup,
    scale: Scale,
) -> Result<String> {
    let calls = Checker::new(world.communicator(), group, accelerator)?.everything(scale.lens)?;
    Ok(format!("{calls} calls; {}", group.agreement().reason))
}

/// Rank 1 has no GPU.
fn mixed(scale: Scale) -> Result<()> {
    let mut world = World::join()?;
    let accelerator = if world.rank() == 1 { Accelerator::Host(Host) } else { world.accelerator() };
    let mut group = world.device_group(&accelerator)?;
    let note = everything(&mut world, &accelerator, &mut group, scale)?;
    same_bits(&mut world, &accelerator, &mut group)?;
    group.leave()?;
    say(&world, &format!("{note}; the bits of the host back end over {}", world.links()));
    Ok(world.leave()?)
}

/// Sums of floats whose order matters have the host back end's bits.
fn same_bits(world: &mut World, accelerator: &Accelerator, group: &mut DeviceGroup) -> Result<()> {
    let len = 700_001;
    let rank = world.rank() as u32;
    let number =
        |index: u32| f32::from_bits(0x3000_0000 + (index.wrapping_mul(2_654_435_761) ^ rank) % 0x1000_0000);
    let numbers: Vec<f32> = (0..len).map(number).collect();
    let mut expected = numbers.clone();
    world.communicator().all_reduce(&mut expected, ReduceOp::Sum)?;
    let (mut memory, stream) =
        (accelerator.alloc(numbers.len(), paceline_collectives::DType::F32)?, accelerator.new_stream()?);
    memory.write(bytemuck::cast_slice(&numbers))?;
    // SAFETY: it is kept until the stream is synchronized.
    let buffer = unsafe { memory.buffer(0..numbers.len()) };
    group.all_reduce(buffer, buffer, ReduceOp::Sum, stream)?;
    accelerator.synchronize(stream)?;
    let mut found = vec![0f32; numbers.len()];
    memory.read(bytemuck::cast_slice_mut(&mut found))?;
    let same = found.iter().zip(&expected).all(|(found, expected)| found.to_bits() == expected.to_bits());
    ensure!(same, "the bits of a sum are not those of the host back end");
    Ok(())
}

/// Each two ranks are a host, whatever GPUs they have.
fn hierarchy(scale: Scale) -> Result<()> {
    let mut world = World::join()?;
    let rank = world.rank() as u64;
    let accelerator = world.accelerator();
    let mut setup = env::device_setup(env::process)?;
    (setup.wanted, setup.host) = (Wanted::Hierarchy, rank / 2);
    let mut seat = accelerator.seat()?;
    // On a machine with one GPU both would be refused.
    seat.gpu.as_mut().context("a GPU")?.id = rank;
    let communicator = world.communicator().split(Some(0), 0)?.context("a color was given")?;
    let mut group = DeviceGroup::form(communicator, seat, &setup)?;
    ensure!(group.agreement().backend == Backend::Hierarchy, "{}", group.agreement());
    let note = everything(&mut world, &accelerator, &mut group, scale)?;
    group.leave()?;
    say(&world, &note);
    Ok(world.leave()?)
}

/// What the survivor of a killed rank says at the end.
pub const SURVIVED: &str = "calls in a new group";

/// Rank 1 is killed in the middle. Rank 0 hears of it, gives up what NCCL is at, and forms a group of its own. Then the
/// launcher starts both again, and they form a group.
fn killed(scale: Scale) -> Result<()> {
    if std::env::var(RESTARTS).is_ok_and(|restarts| restarts != "0") {
        return with_group(|world, accelerator, group| everything(world, accelerator, group, scale));
    }
    // The launcher asks survivors to end.
    signal_hook::flag::register(signal_hook::consts::SIGTERM, Arc::new(AtomicBool::new(false)))?;
    let mut world = World::join()?;
    let accelerator = world.accelerator();
    let mut group = world.device_group(&accelerator)?;
    ensure!(group.agreement().backend == Backend::Nccl, "{}", group.agreement());
    Checker::new(world.communicator(), &mut group, &accelerator)?.everything(&[16])?;
    if world.rank() == 1 {
        let status =
            std::process::Command::new("kill").args(["-9", &std::process::id().to_string()]).status();
        bail!("still alive after kill -9: {status:?}");
    }
    let memory = accelerator.alloc(16, paceline_collectives::DType::F32)?;
    let stream = accelerator.new_stream()?;
    // SAFETY: the memory is never freed.
    let buffer = unsafe { memory.buffer(0..16) };
    std::mem::forget(memory);
    // NCCL may have noticed by now.
    let mut called = group.all_reduce(buffer, buffer, ReduceOp::Sum, stream);
    let start = Instant::now();
    let error = loop {
        match std::mem::replace(&mut called, Ok(())).and_then(|()| group.check()) {
            Err(error) => break error,
            Ok(()) if start.elapsed() < UNTIL_ABORTED => thread::sleep(Duration::from_millis(1)),
            Ok(()) => bail!("nobody has noticed that rank 1 is dead"),
        }
    };
    drop(group);
    let transport = mem::group(1, 1, mem::DEFAULT_WINDOW_BYTES).remove(0);
    let alone = Communicator::new(Box::new(transport), Config::default())?;
    let mut setup = env::device_setup(env::process)?;
    setup.wanted = Wanted::Nccl;
    let mut group = DeviceGroup::form(alone, accelerator.seat()?, &setup)?;
    let transport = mem::group(1, 1, mem::DEFAULT_WINDOW_BYTES).remove(0);
    let mut reference = Communicator::new(Box::new(transport), Config::default())?;
    let calls = Checker::new(&mut reference, &mut group, &accelerator)?.everything(&[16])?;
    group.leave()?;
    println!("note: {error}; then {calls} {SURVIVED}");
    Ok(())
}
