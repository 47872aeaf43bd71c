//! A rank of a measurement: `paceline bench-rank`, which the launcher starts as it starts any program.

use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};

use paceline_runtime::World;
use paceline_runtime::collectives::dtype::{bf16, f16};
use paceline_runtime::collectives::{Communicator, DType, Error as CollectivesError};
use serde::{Deserialize, Serialize};

use super::args::{Backend, BenchArgs, Output};
use super::device::DeviceSide;
use super::measure::Bench;
use super::reference::Value;
use super::report::{Measured, Schedule};
use crate::error::Error;

/// One datagram to the launcher, as JSON.
#[derive(Debug, Serialize, Deserialize)]
pub enum Message {
    /// The ranks are connected; from rank 0 alone.
    Joined {
        /// The kind of links between them: `shm`, `quic`, `tls`, or memory and one of both.
        links: String,
        /// The way of collectives on device memory and why, if they are measured.
        backend: Option<String>,
    },
    /// Which schedule runs a row; from rank 0 alone.
    Explained {
        /// The index of the row.
        row: usize,
        /// What runs it.
        schedule: Schedule,
    },
    /// A result.
    Measured(Measured),
}

/// The launcher's socket.
struct Launcher {
    socket: UnixDatagram,
    path: PathBuf,
}

impl Launcher {
    fn tell(&self, message: &Message) -> Result<(), Error> {
        let text = serde_json::to_vec(message).map_err(|e| failed("writing a result as JSON", &e))?;
        self.socket.send_to(&text, &self.path).map_err(|e| failed("telling the launcher a result", &e))?;
        Ok(())
    }
}

/// Takes this process's place in the job, measures, and tells the launcher at the socket `report`.
///
/// # Errors
/// [`Error::System`] with what failed.
pub fn run(args: &BenchArgs, report: &Path) -> Result<(), Error> {
    let socket = UnixDatagram::unbound().map_err(|e| failed("making a socket", &e))?;
    let launcher = Launcher { socket, path: report.to_owned() };
    let mut world = World::join().map_err(|e| failed("joining the job", &e))?;
    let device = match args.backend {
        Backend::Host => None,
        Backend::Device(wanted) => Some(DeviceSide::new(&mut world, args, wanted)?),
    };
    if world.rank() == 0 {
        let (links, backend) = (world.links().to_owned(), world.backend().map(ToString::to_string));
        launcher.tell(&Message::Joined { links, backend })?;
        explain(world.communicator(), args, &launcher)?;
    }
    if args.output != Output::Explain {
        measure_as(args.dtype, (world.communicator(), device), args, &launcher)?;
    }
    world.leave().map_err(|e| failed("leaving the job", &e))
}

fn explain(communicator: &mut Communicator, args: &BenchArgs, launcher: &Launcher) -> Result<(), Error> {
    let kind = args.collective.kind(args.op, args.root);
    for (row, shape) in args.rows(communicator.world_size() as u32).iter().enumerate() {
        let (name, reason) = communicator
            .explain(kind, args.dtype, shape.count)
            .map_err(|e| failed("choosing a schedule", &e))?;
        launcher.tell(&Message::Explained { row, schedule: Schedule { name, reason } })?;
    }
    Ok(())
}

fn measure_as(
    dtype: DType,
    through: (&mut Communicator, Option<DeviceSide>),
    args: &BenchArgs,
    launcher: &Launcher,
) -> Result<(), Error> {
    match dtype {
        DType::F64 => measure::<f64>(through, args, launcher),
        DType::F16 => measure::<f16>(through, args, launcher),
        DType::BF16 => measure::<bf16>(through, args, launcher),
        DType::I8 => measure::<i8>(through, args, launcher),
        DType::U8 => measure::<u8>(through, args, launcher),
        DType::I32 => measure::<i32>(through, args, launcher),
        DType::I64 => measure::<i64>(through, args, launcher),
        DType::U64 => measure::<u64>(through, args, launcher),
        DType::F32 => measure::<f32>(through, args, launcher),
        other => Err(failed("measuring", &format!("the reference does not know {other} yet"))),
    }
}

fn measure<T: Value>(
    (communicator, device): (&mut Communicator, Option<DeviceSide>),
    args: &BenchArgs,
    launcher: &Launcher,
) -> Result<(), Error> {
    Bench::<T>::new(communicator, device, args)?.run(|measured| launcher.tell(&Message::Measured(measured)))
}

impl From<CollectivesError> for Error {
    fn from(e: CollectivesError) -> Self {
        failed("measuring", &e)
    }
}

fn failed(what: &str, why: &dyn std::fmt::Display) -> Error {
    Error::System { what: what.to_owned(), why: why.to_string() }
}
