//! What a pod's environment says about the job it belongs to: who this pod is, who the others are, where they meet.
//!
//! Reading is a pure function of variables, names and one file ([`Surroundings`]); each value remembers where it came
//! from, and values that contradict each other are one line that names both. `paceline run` forms the job from it,
//! `paceline env` prints it. It refuses to guess a number of pods that nothing has told.
//!
//! Several things may describe a pod at the same time. The first of these that does counts: TF_CONFIG; the variables
//! of a PyTorchJob or TrainJob; Slurm's; the index of an indexed Job; the ordinal of a StatefulSet.

mod kubernetes;
mod nodelist;
mod place;
mod pytorch;
#[cfg(test)]
mod recorded;
mod show;
mod slurm;
mod surroundings;
mod tf_config;

use std::fmt;

use crate::cli::Format;
use crate::console::{Console, Stream};
use crate::error::Error;

pub use place::{Given, Place};
use show::{as_json, as_text};
pub use surroundings::Surroundings;

/// A pod's place in its job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pod {
    /// What has made the pod.
    pub kind: Told<Kind>,
    /// What this pod is for.
    pub role: Told<Role>,
    /// Its number among those of its role.
    pub role_index: Told<u32>,
    /// Its number among all pods of the job, in the order of [`Pod::peers`]; `None` if it is not one of those that
    /// form the job.
    pub index: Option<Told<u32>>,
    /// How many pods form the job; `None` if nothing says so.
    pub pods: Option<Told<Count>>,
    /// Where launchers meet: pod 0, and the port if one was told.
    pub meeting: Option<Told<Meeting>>,
    /// How many ranks run in each pod, where that was told.
    pub ranks_per_pod: Option<Told<Ranks>>,
    /// All pods of the job that are known, this one included.
    pub peers: Vec<Peer>,
    /// What is odd but no contradiction, each a sentence.
    pub remarks: Vec<String>,
}

/// A value, and where it was found: the names of variables or files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Told<T> {
    /// What was told.
    pub value: T,
    /// By what.
    pub from: String,
}

/// What makes pods.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Kubeflow's TFJob, or whatever else sets TF_CONFIG.
    TfJob,
    /// Kubeflow's PyTorchJob, or whatever else sets torchrun's variables.
    PyTorchJob,
    /// Kubeflow's TrainJob.
    TrainJob,
    /// A step of Slurm.
    Slurm,
    /// A Kubernetes Job with completionMode Indexed.
    IndexedJob,
    /// A StatefulSet with a headless service.
    StatefulSet,
}

/// What a pod is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// TensorFlow's coordinator, which TF_CONFIG may also call master.
    Chief,
    /// PyTorch's pod 0.
    Master,
    /// Trains.
    Worker,
    /// A parameter server.
    Ps,
    /// Evaluates checkpoints beside the training.
    Evaluator,
    /// One of several that are alike.
    Node,
}

/// How many pods form a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Count {
    /// The fewest.
    pub least: u32,
    /// The most; the same where the job is not elastic.
    pub most: u32,
}

/// How many ranks a pod runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ranks {
    /// So many.
    Number(u32),
    /// In torchrun's words, `auto`, `cpu` or `gpu`: as many as there are devices.
    Devices(String),
}

/// Where launchers meet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Meeting {
    /// A name or an address of pod 0.
    pub host: String,
    /// The launchers' port, if it was told. MASTER_PORT is the program's own.
    pub port: Option<u16>,
}

/// A pod of the job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// What it is for.
    pub role: Role,
    /// Its number among those of its role.
    pub index: u32,
    /// Its name, where it has one that others can resolve.
    pub host: Option<String>,
    /// The port of the program in it, where that was told.
    pub port: Option<u16>,
}

/// What the pod's surroundings say; `None` where nothing says that it belongs to a job.
///
/// # Errors
/// One line for the first contradiction or value without sense: what is wrong, in which variable, what to do.
pub fn read(around: &Surroundings) -> Result<Option<Pod>, String> {
    for reader in [tf_config::read, pytorch::read, slurm::read, kubernetes::read] {
        if let Some(pod) = reader(around)? {
            return Ok(Some(pod));
        }
    }
    Ok(None)
}

/// `paceline env`: prints what the surroundings say. Returns the exit code and what is to be told last on stderr.
///
/// # Errors
/// The line of [`read`].
pub fn print(around: &Surroundings, format: Format, console: &Console) -> Result<(u8, String), Error> {
    let mut pod = read(around).map_err(Error::Usage)?;
    pod.iter_mut().for_each(|pod| pod.remarks.extend(overruling(pod, around)));
    let text = match format {
        Format::Text => as_text(pod.as_ref()),
        Format::Json => format!("{:#}\n", as_json(pod.as_ref())),
    };
    console.print(Stream::Out, text.into_bytes());
    Ok((0, String::new()))
}

/// What `paceline run` takes from variables of torchrun instead, if there are any that this pod is not known by.
fn overruling(pod: &Pod, around: &Surroundings) -> Option<String> {
    if place::is_standalone(around) {
        return Some("PET_STANDALONE is set, so paceline run starts a job of this pod alone".to_owned());
    }
    let names = place::overruled(pod, around);
    let from = &pod.kind.from;
    (!names.is_empty())
        .then(|| format!("{} also set, and paceline run takes what they say before {from}", are(&names)))
}

/// `A is`, or `A, B are`.
fn are(names: &[&str]) -> String {
    format!("{} {}", names.join(", "), if names.len() == 1 { "is" } else { "are" })
}

impl Pod {
    /// `worker 3 of a TFJob`.
    pub fn in_words(&self) -> String {
        format!("{} {} of a {}", self.role.value, self.role_index.value, self.kind.value)
    }
}

impl<T> Told<T> {
    fn by(from: impl Into<String>, value: T) -> Self {
        Self { value, from: from.into() }
    }
}

impl Count {
    fn exactly(pods: u32) -> Self {
        Self { least: pods, most: pods }
    }
}

/// torchrun's way to write it: `4`, or `1:4`.
impl fmt::Display for Count {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Count { least, most } = self;
        if least == most { write!(f, "{most}") } else { write!(f, "{least}:{most}") }
    }
}

impl fmt::Display for Ranks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Ranks::Number(number) => write!(f, "{number}"),
            Ranks::Devices(word) => f.write_str(word),
        }
    }
}

impl fmt::Display for Meeting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let host = if self.host.contains(':') { format!("[{}]", self.host) } else { self.host.clone() };
        match self.port {
            Some(port) => write!(f, "{host}:{port}"),
            None => f.write_str(&host),
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::TfJob => "TFJob",
            Kind::PyTorchJob => "PyTorchJob",
            Kind::TrainJob => "TrainJob",
            Kind::Slurm => "Slurm step",
            Kind::IndexedJob => "indexed Job",
            Kind::StatefulSet => "StatefulSet",
        })
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Role::Chief => "chief",
            Role::Master => "master",
            Role::Worker => "worker",
            Role::Ps => "ps",
            Role::Evaluator => "evaluator",
            Role::Node => "node",
        })
    }
}

/// `1 to 3`, or `0 alone`.
fn range(count: usize) -> String {
    match count {
        1 => "0 alone".to_owned(),
        count => format!("0 to {}", count - 1),
    }
}
