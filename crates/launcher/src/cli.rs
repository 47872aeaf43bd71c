//! The command line: what was asked for, or one line that says what is wrong with it.
//!
//! clap's own messages take up to nine lines; in a pod's log they would be cut apart. Here they become one.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::parser::ValueSource;
use clap::{ArgMatches, Args, CommandFactory, Parser, Subcommand};
use paceline_runtime::env::PLAIN_TCP;
use paceline_runtime::interface::Selection;
use paceline_runtime::nodes::{Generation, Layout, Terms};
use paceline_transport::Fabric;

use crate::bench::args::{BenchArgs, Flags as BenchFlags};
use crate::binding::Binding;
use crate::checkpoint::Question;
use crate::doctor::DoctorArgs;
use crate::endpoint::{Endpoint, HostAndPort};
use crate::error::Error;
use crate::local::{self, LocalArgs};
use crate::pod::{Given, Place, Surroundings};
use crate::torchrun::flags::{Backend, Form, Machine, Processes, from_variables};
use crate::torchrun::{self, Settings};

/// What the command line asks for.
#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "there is one in a process")]
pub enum Request {
    /// Print this text, the help or the version, and exit with 0.
    Print(String),
    /// Run a job.
    Run(Box<RunArgs>),
    /// Say what the environment tells of the job.
    Env(Format),
    /// Say what would go wrong.
    Doctor(DoctorArgs),
    /// Run a manifest on this machine.
    Local(LocalArgs),
    /// Measure the collectives.
    Bench(BenchArgs),
    /// Be one rank of a measurement.
    BenchRank {
        /// What is measured.
        args: BenchArgs,
        /// The socket for results.
        report: PathBuf,
    },
    /// Say what is in a folder of checkpoints.
    Checkpoint(Question),
}

/// A job to run on this machine, or this machine's part of one.
#[derive(Debug, Clone, PartialEq)]
pub struct RunArgs {
    /// How many ranks on this machine; at least one.
    pub ranks: u32,
    /// The nodes of a job on several machines; `None` for one.
    pub nodes: Option<NodeArgs>,
    /// The folder with the certificates of this machine's members, made by others; `None` for an authority of the
    /// job's own.
    pub identity: Option<PathBuf>,
    /// How long certificates are valid; new ones are issued before.
    pub certificate_life: Duration,
    /// Where the rendezvous listens.
    pub rendezvous: Endpoint,
    /// Whether somebody has said so; otherwise it may listen wherever this machine's ranks reach it.
    pub rendezvous_given: bool,
    /// Which of this machine's addresses its ranks are reached at; `None` leaves it to the system.
    pub interface: Option<Selection>,
    /// Where probes and numbers are served; `None` for nowhere.
    pub health: Option<SocketAddr>,
    /// From SIGTERM to SIGKILL.
    pub grace: Duration,
    /// How often the job may start again after a failure.
    pub max_restarts: u32,
    /// How long one collective of the program may take; `None` leaves it to the library.
    pub timeout: Option<Duration>,
    /// How long the ranks wait for each other at the start.
    pub rendezvous_timeout: Duration,
    /// Which processors the ranks run on.
    pub binding: Binding,
    /// The kind of links between the ranks; `None` leaves it to PACELINE_FABRIC.
    pub fabric: Option<Fabric>,
    /// Whether the job may go without protection where it is told to.
    pub insecure: bool,
    /// Where ranks write what they did last; `None` leaves it to PACELINE_FLIGHT_RECORDER.
    pub flight_recorder: Option<PathBuf>,
    /// What the pod has added to the flags, and tells the program.
    pub pod: Place,
    /// What torchrun's flags and variables ask for.
    pub torchrun: Settings,
    /// The program as it was written; not empty.
    pub program: OsString,
    /// Its arguments.
    pub program_args: Vec<OsString>,
}

/// This machine's place in a job on several machines.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeArgs {
    /// How many nodes; the most of them is at least two.
    pub count: Nodes,
    /// The number of this one.
    pub rank: u32,
    /// Whether somebody has said so.
    pub seating: Seating,
    /// The file with the job secret; none where all have certificates made by others, and in an insecure job.
    pub secret: Option<PathBuf>,
    /// What becomes of the job when nodes come and go.
    pub changes: Changes,
    /// The file that decides which part of a job that has fallen apart goes on; none where launchers vote.
    pub lease: Option<PathBuf>,
}

/// What becomes of a job whose nodes come and go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Changes {
    /// It has one number of nodes.
    None,
    /// All ranks start again on those that are there, as under torchrun.
    StartAgain {
        /// How long others are waited for when enough have come.
        last_call: Duration,
    },
    /// The launchers vote on who takes part, and programs that train with `runtime::elastic` go on.
    Vote,
}

/// What keeps a part of the job that was cut off from going on beside the rest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum FenceFlag {
    /// More than half of the launchers must reach each other.
    Majority,
    /// Whoever gets the lease goes on, be it alone.
    Lease,
    /// Nothing: for a job on one machine.
    None,
}

/// Where a node's number comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seating {
    /// It was given.
    Given,
    /// Whoever holds the endpoint is node 0, or who is told so; the others take what is free.
    Any {
        /// Whether this one holds it, if that was said.
        is_host: Option<bool>,
    },
}

/// How many machines run a job: N, or from MIN to MAX.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Nodes {
    /// With fewer the job does not go on; at least one.
    pub min: u32,
    /// More do not take part; at least `min`.
    pub max: u32,
}

impl RunArgs {
    /// The number of this node; 0 on one machine.
    pub fn node(&self) -> u32 {
        self.nodes.as_ref().map_or(0, |nodes| nodes.rank)
    }

    /// This job as node `rank` of it.
    pub fn at(&self, rank: u32) -> Self {
        let nodes = self.nodes.clone().map(|nodes| NodeArgs { rank, ..nodes });
        Self { nodes, ..self.clone() }
    }

    /// This job with the number that this node has got.
    pub fn seated(&self) -> Self {
        let nodes = self.nodes.clone().map(|nodes| NodeArgs { seating: Seating::Given, ..nodes });
        Self { nodes, ..self.clone() }
    }

    /// What becomes of the job when nodes come and go.
    pub fn changes(&self) -> Changes {
        self.nodes.as_ref().map_or(Changes::None, |nodes| nodes.changes)
    }

    /// Whether the ranks of a generation may be followed by those of another one.
    pub fn may_start_again(&self, generation: &Generation) -> bool {
        generation.max_restarts > 0 || matches!(self.changes(), Changes::StartAgain { .. })
    }

    /// This machine's part of a generation: of its numbers the ranks of that are made.
    pub fn within(&self, generation: &Generation) -> Self {
        let count = generation.nodes.len() as u32;
        let nodes = self.nodes.clone().map(|nodes| NodeArgs {
            count: Nodes { min: count, max: count },
            rank: generation.place(nodes.rank).unwrap_or(nodes.rank),
            ..nodes
        });
        Self { nodes, ..self.clone() }
    }

    /// The first rank of this machine.
    pub fn first_rank(&self) -> u32 {
        self.node() * self.ranks
    }

    /// How the ranks are spread.
    pub fn layout(&self) -> Layout {
        let nodes = self.nodes.as_ref().map_or(1, |nodes| nodes.count.max);
        Layout { nodes: nodes as usize, ranks_per_node: self.ranks as usize }
    }

    /// What all launchers of the job must agree on.
    pub fn terms(&self) -> Terms {
        let (layout, run_id) = (self.layout(), self.torchrun.run_id.clone());
        let (least_nodes, last_call) = match self.changes() {
            Changes::StartAgain { last_call } => (self.least_nodes() as usize, last_call),
            Changes::None | Changes::Vote => (layout.nodes, Duration::ZERO),
        };
        Terms { layout, least_nodes, last_call, run_id }
    }

    /// With how many nodes the job runs too.
    pub fn least_nodes(&self) -> u32 {
        self.nodes.as_ref().map_or(1, |nodes| nodes.count.min)
    }
}

/// The environment variables that configure the launcher.
#[derive(Debug, Default)]
pub struct Variables {
    /// PACELINE_PORT: the rendezvous's port, where the flag gives none.
    pub port: Option<OsString>,
    /// PACELINE_JOB_SECRET_FILE.
    pub job_secret_file: Option<OsString>,
    /// PACELINE_CERTIFICATE_LIFE, for tests of what takes a day otherwise.
    pub certificate_life: Option<OsString>,
    /// PACELINE_INTERFACE.
    pub interface: Option<OsString>,
    /// PACELINE_HEALTH_ADDR.
    pub health_addr: Option<OsString>,
    /// PACELINE_INSECURE.
    pub insecure: Option<OsString>,
    /// PACELINE_FABRIC, which is the ranks' to read, but for one value.
    pub fabric: Option<OsString>,
    /// PACELINE_FENCE.
    pub fence: Option<OsString>,
    /// PACELINE_LEASE.
    pub lease: Option<OsString>,
    /// Everything by which a pod knows its job.
    pub surroundings: Surroundings,
    /// Those that torchrun reads.
    pub torchrun: torchrun::Variables,
}

/// How a report is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// Lines for a person.
    Text,
    /// One JSON document.
    Json,
}

/// The most ranks of a job: they are checked against the library's limit by each of them.
const RANKS_MOST: u64 = 65_536;

/// The port of the rendezvous between machines, torchrun's.
const DEFAULT_PORT: u16 = 29_400;

/// How long launchers, and then ranks, wait for each other.
const RENDEZVOUS_TIMEOUT: Duration = Duration::from_secs(600);

/// How long other nodes are waited for when enough have come, as torchrun waits.
const LAST_CALL: Duration = Duration::from_secs(30);

/// How long certificates are valid. They are renewed after two thirds of it.
pub const CERTIFICATE_LIFE: Duration = Duration::from_secs(24 * 3600);

#[derive(Parser)]
#[command(name = "paceline", version, about = "Starts the ranks of a training job and looks after them")]
#[command(disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    command: Subcommands,
}

#[derive(Subcommand)]
enum Subcommands {
    /// Run a program as N ranks on this machine, or on each of several
    #[command(after_help = RUN_HELP, args_override_self = true)]
    Run(Box<RunFlags>),
    /// Print what this pod's environment tells of its job, and which variables say so
    Env(ReportFlags),
    /// Run a TFJob or PyTorchJob on this machine, without a cluster
    Local(LocalFlags),
    /// Examine this machine and its paths to the job's others: say what would go wrong, and what to do
    Doctor(DoctorFlags),
    /// Measure a collective on N ranks of this machine, in the columns of nccl-tests
    #[command(after_help = BENCH_HELP)]
    Bench(BenchFlags),
    /// One rank of `paceline bench`
    #[command(hide = true)]
    BenchRank(BenchRankFlags),
    /// List or verify the checkpoints of a program
    #[command(subcommand)]
    Checkpoint(Question),
}

const RUN_HELP: &str = "\
When a rank fails, the others are told, get SIGTERM after 2 s and SIGKILL after the grace; the exit code is the
failed rank's, or 128 + the signal that killed it. SIGTERM, SIGINT, SIGHUP and SIGQUIT are passed on to the ranks;
SIGUSR1 has all ranks write what they did last, with --flight-recorder.

Example:  paceline run -n 4 -- python train.py --epochs 3

On several machines, the same on each but for the node rank; the secret file comes from openssl rand -hex 32:
          paceline run --nnodes 2 --node-rank 0 -n 4 --rdzv-endpoint 10.0.0.1 --job-secret FILE -- python train.py";

const BENCH_HELP: &str = "\
A size is that of the larger buffer in bytes; algbw is size / time, busbw is algbw times what the collective makes of
it (nccl-tests, doc/PERFORMANCE.md), and #wrong counts wrong elements of all ranks. PACELINE_ALGORITHM and the like
apply as to any job. The exit code is 1 if an element was wrong.

Example:  paceline bench all_reduce --ranks 1..4 -b 4 -e 64M";

#[derive(Args)]
struct ReportFlags {
    /// Print a JSON document
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct LocalFlags {
    /// What joins the pods: a host of its own for each (as root), or the loopback interface of this machine for all
    #[arg(long, value_name = "auto|hosts|loopback", default_value = "auto", hide_possible_values = true)]
    network: local::Choice,
    /// What runs in containers that have no command, words with blanks between them: "python train.py"
    #[arg(long, value_name = "WORDS", default_value = "")]
    entrypoint: String,
    /// How long a pod that was told to end may take before it is killed
    #[arg(long, value_name = "SECONDS", default_value = "20", value_parser = seconds)]
    grace: Duration,
    /// The manifest
    #[arg(value_name = "FILE")]
    manifest: PathBuf,
}

#[derive(Args)]
struct DoctorFlags {
    #[command(flatten)]
    report: ReportFlags,
    /// How long to look for the others, and to answer their doctors
    #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = seconds)]
    wait: Duration,
    /// The launchers' port [default: PACELINE_PORT, else 29400]
    #[arg(long, value_name = "PORT")]
    port: Option<u16>,
    /// The file with the job secret [env: PACELINE_JOB_SECRET_FILE]
    #[arg(long, value_name = "FILE")]
    job_secret: Option<PathBuf>,
    /// Machines to look for, besides the pods of the job
    #[arg(value_name = "HOST")]
    hosts: Vec<String>,
}

#[derive(Args)]
struct BenchRankFlags {
    #[arg(long)]
    report: PathBuf,
    #[command(flatten)]
    bench: BenchFlags,
}

#[derive(Args)]
struct RunFlags {
    /// How many machines run the job
    #[arg(long, value_name = "N|MIN:MAX", default_value = "1")]
    nnodes: Nodes,
    /// The number of this machine among them, from 0; the one with 0 is where the others meet
    #[arg(long, alias = "node_rank", value_name = "R")]
    node_rank: Option<u32>,
    /// The file with the job secret, the same on all machines [env: PACELINE_JOB_SECRET_FILE]
    #[arg(long, alias = "job_secret", value_name = "FILE")]
    job_secret: Option<PathBuf>,
    /// In place of a job secret: a folder with a folder for launcher-R and each worker-K of this machine, which holds
    /// tls.crt, tls.key and ca.crt
    #[arg(long, value_name = "FOLDER", conflicts_with = "job_secret")]
    identity: Option<PathBuf>,
    /// How many ranks to start on this machine: a number, or as many as it has GPUs, processors, or (auto) GPUs and else
    /// processors
    #[arg(short, long, alias = "nproc_per_node", value_name = "N|auto|cpu|gpu", default_value = "1")]
    nproc_per_node: Processes,
    /// Where the ranks meet: an address of machine 0, the port 29400 or PACELINE_PORT unless given [default on one
    /// machine: a free port of 127.0.0.1]
    #[arg(long, alias = "rdzv_endpoint", value_name = "HOST:PORT")]
    rdzv_endpoint: Option<HostAndPort>,
    /// Which of this machine's addresses the ranks listen on, tell each other and dial from: eth1, 10.1.0.0/16, ipv6,
    /// !docker0, or several with commas, the most wanted first [env: PACELINE_INTERFACE]
    #[arg(long, value_name = "LIST", value_parser = Selection::from_str)]
    interface: Option<Selection>,
    /// Where to answer probes (/startupz, /healthz, /readyz) and Prometheus (/metrics) over HTTP, to anybody: 0.0.0.0:9400
    /// [env: PACELINE_HEALTH_ADDR]
    #[arg(long, value_name = "IP:PORT")]
    health_addr: Option<SocketAddr>,
    /// How long a rank that was told to end may take before it is killed
    #[arg(long, value_name = "SECONDS", default_value = "20", value_parser = seconds)]
    grace: Duration,
    /// How often the whole job may start again after a failure
    #[arg(long, alias = "max_restarts", value_name = "N", default_value = "0")]
    max_restarts: u32,
    /// How long one collective may take before it fails [default: the program's choice, else 600]
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    timeout: Option<Duration>,
    /// How long the ranks wait for each other at the start [default: 600]
    #[arg(long, alias = "rdzv_timeout", value_name = "SECONDS", value_parser = seconds)]
    rdzv_timeout: Option<Duration>,
    /// Which processors the ranks run on: an equal share each if there are enough, or all
    #[arg(long, value_name = "auto|none", default_value = "auto", hide_possible_values = true)]
    bind: Binding,
    /// The links between ranks that share no memory: QUIC, TLS over TCP, or whichever is faster [default:
    /// PACELINE_FABRIC, else auto]
    #[arg(long, value_name = "auto|quic|tls", value_parser = fabric)]
    fabric: Option<Fabric>,
    /// Which part of a job goes on when its machines lose each other: more than half of them (with --nnodes MIN:MAX), or
    /// whichever gets the lease, be it one machine [default: lease with --lease, else majority] [env: PACELINE_FENCE]
    #[arg(long, value_name = "majority|lease", hide_possible_values = true)]
    fence: Option<FenceFlag>,
    /// The file that is the lease, on a file system that all machines see; it is made if there is none [env:
    /// PACELINE_LEASE]
    #[arg(long, value_name = "FILE")]
    lease: Option<PathBuf>,
    /// Allow a job on several machines without a secret, which anybody who reaches it can join, and --fabric tcp, which
    /// neither encrypts nor protects what the ranks send each other [env: PACELINE_INSECURE=1]
    #[arg(long)]
    insecure: bool,
    /// A folder in which each rank writes what it did last: when a rank fails, and on SIGUSR1; for torchfrtrace [env:
    /// PACELINE_FLIGHT_RECORDER]
    #[arg(long, value_name = "FOLDER")]
    flight_recorder: Option<PathBuf>,
    #[command(flatten)]
    torchrun: torchrun::flags::Flags,
    /// A Python script and its arguments; behind --, any program and its arguments
    #[arg(required = true, trailing_var_arg = true, value_name = "PROGRAM")]
    program: Vec<OsString>,
}

/// Reads the command line `args`, whose first element is the launcher's own name. `variables` count where no flag
/// is given.
///
/// # Errors
/// [`Error::Usage`] with what is wrong and what to do.
pub fn parse(args: impl IntoIterator<Item = OsString>, mut variables: Variables) -> Result<Request, Error> {
    let args: Vec<OsString> = args.into_iter().collect();
    let place = match Cli::command().try_get_matches_from(&args) {
        Ok(matches) => {
            if is_alone(&matches) {
                variables.torchrun.pet.retain(|(name, _)| !OF_SEVERAL.contains(&name.as_str()));
            }
            place(&matches, &variables.surroundings)?
        }
        Err(_) => Place::default(),
    };
    // The last of several counts: the pod's flags stand behind those of torchrun's variables, and these behind a person's.
    let args = with_flags(with_variables(args, &variables.torchrun.pet)?, &place);
    let command = match Cli::try_parse_from(&args) {
        Ok(Cli { command }) => command,
        Err(e) if matches!(e.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) => {
            return Ok(Request::Print(e.to_string()));
        }
        Err(e) => return Err(Error::Usage(in_one_line(&e, &args))),
    };
    match command {
        Subcommands::Run(flags) => {
            let form = if is_behind_dashes(&flags.program, &args) { Form::Program } else { Form::Script };
            let run = run_args(*flags, form, variables)?;
            Ok(Request::Run(Box::new(RunArgs { pod: place, ..run })))
        }
        Subcommands::Env(flags) => Ok(Request::Env(flags.format())),
        Subcommands::Local(LocalFlags { network, entrypoint, grace, manifest }) => {
            let entrypoint = entrypoint.split_whitespace().map(str::to_owned).collect();
            Ok(Request::Local(LocalArgs { manifest, entrypoint, network, grace }))
        }
        Subcommands::Doctor(flags) => doctor_args(flags, variables).map(Request::Doctor),
        Subcommands::Bench(flags) => flags.into_args(args[2..].to_vec()).map(Request::Bench),
        Subcommands::BenchRank(BenchRankFlags { report, bench }) => {
            bench.into_args(Vec::new()).map(|args| Request::BenchRank { args, report })
        }
        Subcommands::Checkpoint(question) => Ok(Request::Checkpoint(question)),
    }
}

/// The variables of torchrun by which a pod knows its place among several.
const OF_SEVERAL: [&str; 3] = ["PET_NODE_RANK", "PET_RDZV_ENDPOINT", "PET_MASTER_ADDR"];

/// Whether the command line says that this machine is a job of its own, whatever its pod belongs to.
fn is_alone(matches: &ArgMatches) -> bool {
    let Some(("run", run)) = matches.subcommand() else { return false };
    let is_given = |id| run.value_source(id) == Some(ValueSource::CommandLine);
    let one = Nodes { min: 1, max: 1 };
    is_given("nnodes") && run.get_one::<Nodes>("nnodes") == Some(&one) && !is_given("node_rank")
}

/// What the pod adds to a command line of `paceline run`.
fn place(matches: &ArgMatches, around: &Surroundings) -> Result<Place, Error> {
    let Some(("run", run)) = matches.subcommand() else { return Ok(Place::default()) };
    let given = |id| (run.value_source(id) == Some(ValueSource::CommandLine)).then_some(());
    let nnodes = run.get_raw("nnodes").and_then(|mut values| values.next());
    // With c10d that is the program's alone.
    let is_meeting = run.get_one::<Backend>("rdzv_backend") != Some(&Backend::C10d);
    let given = Given {
        nnodes: given("nnodes").and(nnodes).map(|text| text.to_string_lossy().into_owned()),
        node_rank: given("node_rank"),
        rdzv_endpoint: given("rdzv_endpoint").or(given("master_addr").filter(|()| is_meeting)),
        nproc_per_node: given("nproc_per_node"),
        standalone: given("standalone"),
    };
    Place::of(around, &given).map_err(Error::Usage)
}

/// The command line with the flags of the pod, which stand before all others.
fn with_flags(mut args: Vec<OsString>, place: &Place) -> Vec<OsString> {
    if !place.flags.is_empty() {
        args.splice(2..2, place.flags.iter().map(OsString::from));
    }
    args
}

fn doctor_args(flags: DoctorFlags, variables: Variables) -> Result<DoctorArgs, Error> {
    let secret = variables.job_secret_file.filter(|file| !file.is_empty()).map(PathBuf::from);
    Ok(DoctorArgs {
        format: flags.report.format(),
        wait: flags.wait,
        port: flags
            .port
            .map_or_else(|| port_variable(variables.port), |port| Ok(Some(port)))?
            .unwrap_or(DEFAULT_PORT),
        peers: flags.hosts,
        secret: flags.job_secret.or(secret),
    })
}

impl ReportFlags {
    fn format(&self) -> Format {
        if self.json { Format::Json } else { Format::Text }
    }
}

/// The command line with what PET_ variables say in front of the other flags of `run`, which win over them.
fn with_variables(mut args: Vec<OsString>, pet: &[(String, OsString)]) -> Result<Vec<OsString>, Error> {
    if args.get(1).is_none_or(|command| command != "run") {
        return Ok(args);
    }
    let flags = from_variables(pet)?;
    for (variable, flag) in &flags {
        let alone = ["paceline".into(), "run".into(), flag.clone(), "x".into()];
        Cli::try_parse_from(&alone)
            .map_err(|e| Error::Usage(format!("{variable}: {}", in_one_line(&e, &alone))))?;
    }
    args.splice(2..2, flags.into_iter().map(|(_, flag)| flag));
    Ok(args)
}

/// Whether `--` stands in front of the program, whose words are the last of `args`.
fn is_behind_dashes(program: &[OsString], args: &[OsString]) -> bool {
    let before = args.len().checked_sub(program.len() + 1);
    before.is_some_and(|before| args[before] == "--")
}

fn run_args(flags: RunFlags, form: Form, variables: Variables) -> Result<RunArgs, Error> {
    let Variables {
        port,
        job_secret_file,
        certificate_life,
        health_addr,
        interface,
        insecure,
        fabric,
        fence,
        lease,
        torchrun,
        ..
    } = variables;
    let health = flags.health_addr.map_or_else(|| health_variable(health_addr), |addr| Ok(Some(addr)))?;
    flags.torchrun.check()?;
    let settings = flags.torchrun.settings(&flags.program, form, &torchrun);
    let ranks = flags.nproc_per_node.count(Machine::here)?;
    let conf = &flags.torchrun.rdzv_conf;
    let timeout = flags.rdzv_timeout.or(conf.timeout).unwrap_or(RENDEZVOUS_TIMEOUT);
    let (nnodes, node_rank, agreed) = seating(&flags)?;
    let given = if flags.torchrun.standalone { None } else { flags.rdzv_endpoint };
    let rendezvous_given = given.is_some();
    let insecure = flags.insecure || insecure_variable(insecure)?;
    let fabric = flags.fabric.or((fabric.as_deref() == Some(OsStr::new("tcp"))).then_some(Fabric::Tcp));
    if fabric == Some(Fabric::Tcp) && !insecure {
        return Err(Error::Usage(format!("{PLAIN_TCP}; where that is meant, --insecure allows it")));
    }
    let secret = flags.job_secret.or(job_secret_file.filter(|file| !file.is_empty()).map(PathBuf::from));
    let secret = secret.filter(|_| flags.identity.is_none());
    let trusts = secret.is_some() || flags.identity.is_some();
    let last_call = conf.last_call.unwrap_or(LAST_CALL);
    let nodes = node_args(nnodes, (node_rank, agreed), (ranks, last_call), secret)?;
    let fence = flags.fence.map_or_else(|| fence_variable(fence), |fence| Ok(Some(fence)))?;
    let nodes = fenced(nodes, fence, (flags.lease, lease))?;
    // torchrun's nodes meet at the program's own address; ours at another port of it.
    let meeting =
        given.or_else(|| flags.torchrun.meeting_host().filter(|_| nodes.is_some()).map(HostAndPort::of_host));
    if flags.identity.is_some() && nodes.as_ref().is_some_and(|nodes| nodes.seating != Seating::Given) {
        return Err(Error::Usage(
            "with --identity each machine needs --node-rank, for its certificates have it".to_owned(),
        ));
    }
    if nodes.is_some() && !trusts && !insecure {
        return Err(Error::Usage(
            "a job of several nodes needs a job secret: openssl rand -hex 32 > FILE; chmod 600 FILE; \
             and on every node --job-secret FILE or PACELINE_JOB_SECRET_FILE"
                .to_owned(),
        ));
    }
    if flags.program.first().is_none_or(|program| program.is_empty()) {
        return Err(no_program());
    }
    let command = flags.torchrun.command(flags.program, form, torchrun.python);
    Ok(RunArgs {
        ranks,
        rendezvous_given,
        interface: flags.interface.map_or_else(|| interface_variable(interface), |list| Ok(Some(list)))?,
        rendezvous: endpoint(meeting, port, nodes.as_ref())?,
        nodes,
        health,
        identity: flags.identity,
        certificate_life: life(certificate_life)?,
        grace: flags.grace,
        max_restarts: flags.max_restarts,
        timeout: flags.timeout,
        rendezvous_timeout: timeout,
        binding: flags.bind,
        fabric,
        insecure,
        flight_recorder: flags.flight_recorder.map(absolute).transpose()?,
        pod: Place::default(),
        torchrun: settings,
        program: command.program,
        program_args: command.args,
    })
}

/// The same folder for ranks that work in another one.
fn absolute(folder: PathBuf) -> Result<PathBuf, Error> {
    std::path::absolute(&folder)
        .map_err(|e| Error::Usage(format!("--flight-recorder {}: {e}", folder.display())))
}

/// How many nodes there are, which this one is, and how that is settled if nobody has said so.
fn seating(flags: &RunFlags) -> Result<(Nodes, Option<u32>, Option<Seating>), Error> {
    let torchrun = &flags.torchrun;
    if !torchrun.standalone {
        let is_host = torchrun.rdzv_conf.is_host;
        let agreed = (torchrun.rdzv_backend == Backend::C10d).then_some(Seating::Any { is_host });
        return Ok((flags.nnodes, flags.node_rank, agreed));
    }
    match flags.nnodes.min {
        1 => Ok((Nodes { min: 1, max: 1 }, None, None)),
        _ => Err(Error::Usage(format!(
            "--standalone is a job on this machine; --nnodes {} is not",
            flags.nnodes
        ))),
    }
}

/// The place of this machine, if there are several.
fn node_args(
    count: Nodes,
    (rank, agreed): (Option<u32>, Option<Seating>),
    (ranks, last_call): (u32, Duration),
    secret: Option<PathBuf>,
) -> Result<Option<NodeArgs>, Error> {
    let last = count.max - 1;
    let wrong = |text: String| Err(Error::Usage(text));
    match rank {
        None if count.min < count.max && agreed.is_none() => {
            return wrong(format!(
                "--nnodes {count}: each node needs its --node-rank, from 0 to {last}, for programs that go on when the \
                 number changes; or --rdzv-backend c10d, for those that start again"
            ));
        }
        None if count.max > 1 && agreed.is_none() => {
            return wrong(format!(
                "--nnodes {count} needs --node-rank too, from 0 to {last}, or --rdzv-backend c10d, which needs none"
            ));
        }
        Some(rank) if rank > last => {
            return wrong(format!(
                "--node-rank {rank} is out of range: with --nnodes {count} it is 0 to {last}"
            ));
        }
        _ => {}
    }
    if count.max == 1 {
        return Ok(None);
    }
    let world_size = u64::from(count.max) * u64::from(ranks);
    if world_size > RANKS_MOST {
        return wrong(format!(
            "{count} nodes of {ranks} ranks are {world_size}; a job has {RANKS_MOST} at most"
        ));
    }
    let seating = agreed.filter(|_| rank.is_none()).unwrap_or(Seating::Given);
    let changes = match agreed {
        _ if count.min == count.max => Changes::None,
        Some(_) => Changes::StartAgain { last_call },
        None => Changes::Vote,
    };
    Ok(Some(NodeArgs { count, rank: rank.unwrap_or(0), seating, secret, changes, lease: None }))
}

/// The nodes with the lease that decides, if one does: that of the flag, or of the variable.
fn fenced(
    nodes: Option<NodeArgs>,
    fence: Option<FenceFlag>,
    (flag, variable): (Option<PathBuf>, Option<OsString>),
) -> Result<Option<NodeArgs>, Error> {
    let wrong = |text: String| Err(Error::Usage(text));
    let is_flag = flag.is_some();
    let lease = flag.or(variable.filter(|file| !file.is_empty()).map(PathBuf::from));
    match (fence, &lease, &nodes) {
        (Some(FenceFlag::None), _, Some(nodes)) => wrong(format!(
            "--fence none with --nnodes {}: machines that lose each other would all go on, each with a model of its \
             own; choose majority, or lease with --lease FILE",
            nodes.count
        )),
        (Some(FenceFlag::Majority | FenceFlag::None), Some(file), _) if is_flag => {
            wrong(format!("--lease {} is for --fence lease; leave one of the two out", file.display()))
        }
        (Some(FenceFlag::Majority | FenceFlag::None), ..) => Ok(nodes),
        (Some(FenceFlag::Lease), None, _) => wrong(
            "--fence lease needs --lease FILE, or PACELINE_LEASE: a file that all machines see".to_owned(),
        ),
        (_, Some(file), Some(_)) => {
            let file = std::path::absolute(file);
            let file = file.map_err(|e| Error::Usage(format!("the lease: {e}")))?;
            Ok(nodes.map(|nodes| NodeArgs { lease: Some(file), ..nodes }))
        }
        // One machine has nobody to lose.
        _ => Ok(nodes),
    }
}

fn fence_variable(value: Option<OsString>) -> Result<Option<FenceFlag>, Error> {
    use clap::ValueEnum;
    let Some(text) = value.filter(|text| !text.is_empty()) else { return Ok(None) };
    let fence = text.to_str().and_then(|text| FenceFlag::from_str(text, false).ok());
    let wrong =
        || Error::Usage(format!("PACELINE_FENCE is {text:?}; set it to majority or lease, or unset it"));
    fence.map(Some).ok_or_else(wrong)
}

/// The flag, its port or else PACELINE_PORT. Without a flag, the loopback interface of one machine.
fn endpoint(
    flag: Option<HostAndPort>,
    port: Option<OsString>,
    nodes: Option<&NodeArgs>,
) -> Result<Endpoint, Error> {
    let HostAndPort { host, port: given } = match (flag, nodes) {
        (Some(flag), _) => flag,
        (None, None) => HostAndPort { host: "127.0.0.1".to_owned(), port: None },
        (None, Some(nodes)) => {
            return Err(Error::Usage(format!(
                "--nnodes {} needs --rdzv-endpoint HOST:PORT, the address at which the others reach node 0",
                nodes.count
            )));
        }
    };
    // 0 lets the system choose, where nobody else has to know.
    let default = if nodes.is_some() { DEFAULT_PORT } else { 0 };
    let port = match given {
        Some(port) => port,
        None => port_variable(port)?.unwrap_or(default),
    };
    let unspecified = host.parse().is_ok_and(|ip: IpAddr| ip.is_unspecified());
    if nodes.is_some() && (unspecified || port == 0) {
        return Err(Error::Usage(format!(
            "--rdzv-endpoint {} is no address at which other nodes reach node 0; give its own, such as 10.0.0.1:29400",
            Endpoint { host, port }
        )));
    }
    Ok(Endpoint { host, port })
}

fn port_variable(port: Option<OsString>) -> Result<Option<u16>, Error> {
    let Some(port) = port.filter(|value| !value.is_empty()) else { return Ok(None) };
    let number = port.to_str().and_then(|text| text.parse().ok());
    let wrong =
        || Error::Usage(format!("PACELINE_PORT is {port:?}; set it to a port, such as 29400, or unset it"));
    number.map(Some).ok_or_else(wrong)
}

fn interface_variable(list: Option<OsString>) -> Result<Option<Selection>, Error> {
    let parse = |list: OsString| list.to_string_lossy().parse();
    list.map(parse).transpose().map_err(|reason| Error::Usage(format!("PACELINE_INTERFACE: {reason}")))
}

fn health_variable(address: Option<OsString>) -> Result<Option<SocketAddr>, Error> {
    let Some(text) = address.filter(|text| !text.is_empty()) else { return Ok(None) };
    let wrong =
        || Error::Usage(format!("PACELINE_HEALTH_ADDR is {text:?}; set it to IP:PORT, such as 0.0.0.0:9400"));
    text.to_str().and_then(|text| text.parse().ok()).map(Some).ok_or_else(wrong)
}

fn insecure_variable(value: Option<OsString>) -> Result<bool, Error> {
    match value.as_ref().map(|value| value.to_str()) {
        None | Some(Some("0")) => Ok(false),
        Some(Some("1")) => Ok(true),
        Some(_) => Err(Error::Usage("PACELINE_INSECURE is neither 1 nor 0; unset it".to_owned())),
    }
}

fn life(variable: Option<OsString>) -> Result<Duration, Error> {
    let Some(text) = variable.filter(|value| !value.is_empty()) else { return Ok(CERTIFICATE_LIFE) };
    let life = text.to_str().and_then(|text| seconds(text).ok()).filter(|life| !life.is_zero());
    life.ok_or_else(|| {
        Error::Usage(format!("PACELINE_CERTIFICATE_LIFE is {text:?}; set it to seconds, such as 86400"))
    })
}

fn no_program() -> Error {
    Error::Usage("no program to run; put it after the flags: paceline run -n 4 -- program args".to_owned())
}

/// The kind of links called `text`.
pub fn fabric(text: &str) -> Result<Fabric, String> {
    let named = Fabric::NAMES.into_iter().find(|(name, _)| *name == text);
    named.map(|(_, fabric)| fabric).ok_or_else(|| "choose auto, quic or tls".to_owned())
}

/// A time in seconds, which may have decimals.
pub fn seconds(text: &str) -> Result<Duration, String> {
    let number = text.parse().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    // A year is longer than any wait that is meant, and far from where adding it to the clock would overflow.
    let year = Duration::from_secs(365 * 24 * 3600);
    number.filter(|&d| d <= year).ok_or_else(|| "give a number of seconds, such as 20 or 0.5".to_owned())
}

impl FromStr for Nodes {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || "give a number of machines from 1 on, such as 4, or MIN:MAX, such as 2:4".to_owned();
        let (min, max) = text.split_once(':').unwrap_or((text, text));
        let number = |text: &str| text.parse().map_err(|_| wrong());
        let nodes = Nodes { min: number(min)?, max: number(max)? };
        if (1..=nodes.max).contains(&nodes.min) { Ok(nodes) } else { Err(wrong()) }
    }
}

impl fmt::Display for Nodes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Nodes { min, max } = self;
        if min == max { write!(f, "{max}") } else { write!(f, "{min}:{max}") }
    }
}

fn in_one_line(error: &clap::Error, args: &[OsString]) -> String {
    let subcommand = match args.get(1).and_then(|word| word.to_str()) {
        Some("bench" | "bench-rank") => "bench",
        Some("env") => "env",
        Some("doctor") => "doctor",
        Some("local") => "local",
        _ => "run",
    };
    let context = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.clone()),
        Some(ContextValue::Strings(texts)) => texts.first().cloned(),
        _ => None,
    };
    match error.kind() {
        ErrorKind::MissingRequiredArgument if subcommand == "bench" => {
            "nothing to measure; say for instance: paceline bench all_reduce --ranks 2".to_owned()
        }
        ErrorKind::MissingRequiredArgument if subcommand == "local" => {
            "no manifest; say for instance: paceline local job.yaml".to_owned()
        }
        ErrorKind::MissingRequiredArgument => match no_program() {
            Error::Usage(text) => text,
            other => other.to_string(),
        },
        ErrorKind::MissingSubcommand | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            "nothing to do; say for instance: paceline run -n 4 -- program args".to_owned()
        }
        ErrorKind::UnknownArgument => {
            let flag = context(ContextKind::InvalidArg).unwrap_or_default();
            match context(ContextKind::SuggestedArg) {
                // torchrun's other way of writing flags is understood, and not advised.
                Some(near) => format!("unknown flag {flag}; did you mean {}?", near.replace('_', "-")),
                None => format!("unknown flag {flag}; see paceline {subcommand} --help"),
            }
        }
        // "error: invalid value 'abc' for '--grace <SECONDS>': reason", then a blank line and advice to read the help.
        _ => {
            let text = error.to_string();
            let first = text.split("\n\n").next().unwrap_or_default();
            let words: Vec<&str> = first.trim_start_matches("error: ").split_whitespace().collect();
            words.join(" ")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::torchrun::LogSettings;
    use crate::torchrun::flags::SignalList;

    fn parse_line(line: &str) -> Result<Request, Error> {
        parse(line.split_whitespace().map(OsString::from), Variables::default())
    }

    fn run_args(line: &str) -> RunArgs {
        match parse_line(line) {
            Ok(Request::Run(args)) => *args,
            other => panic!("{line}: {other:?}"),
        }
    }

    #[test]
    fn flags_are_documented_consistently() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn a_lease_decides_where_nodes_may_be_lost_and_nothing_is_no_fence_for_several() {
        let parse = |flags: &str, fence: &str, lease: &str| {
            let line = format!("paceline run --rdzv-endpoint a:1 --job-secret s {flags} -- train");
            let (fence, lease) = (Some(fence.into()), Some(lease.into()));
            let variables = Variables { fence, lease, ..Variables::default() };
            match parse(line.split_whitespace().map(OsString::from), variables) {
                Ok(Request::Run(args)) => Ok(args.nodes.and_then(|nodes| nodes.lease)),
                Ok(other) => panic!("{other:?}"),
                Err(error) => Err(error.to_string()),
            }
        };
        let file = Ok(Some(PathBuf::from("/shared/lease")));
        let two = |more: &str| format!("--nnodes 1:2 --node-rank 0 {more}");
        assert_eq!(parse(&two(""), "", ""), Ok(None));
        assert_eq!(parse(&two("--fence majority"), "lease", "/shared/lease"), Ok(None), "the flag counts");
        for more in ["--lease /shared/lease", "--fence lease --lease /shared/lease"] {
            assert_eq!(parse(&two(more), "", "/other"), file);
        }
        assert_eq!(parse(&two(""), "", "/shared/lease"), file);
        assert_eq!(parse(&two("--fence lease"), "", "/shared/lease"), file);
        assert_eq!(parse("--fence none", "", "/shared/lease"), Ok(None));
        let refused = |flags: &str, fence: &str, lease: &str, why: &str| {
            let error = parse(flags, fence, lease).expect_err(flags);
            assert!(error.contains(why) && error.lines().count() == 1, "{flags}: {error}");
        };
        refused(&two("--fence none"), "", "", "each with a model of its own");
        refused(&two(""), "none", "", "each with a model of its own");
        refused(&two("--fence lease"), "", "", "needs --lease FILE");
        refused(&two("--fence majority --lease /l"), "", "", "is for --fence lease");
        refused(&two("--fence half"), "", "", "half");
        refused(&two(""), "half", "", "PACELINE_FENCE is \"half\"");
        for all_start_again in ["--nnodes 2 --node-rank 0", "--nnodes 1:2 --rdzv-backend c10d"] {
            assert_eq!(parse(&format!("{all_start_again} --lease /shared/lease"), "", ""), file);
        }
    }

    #[test]
    fn defaults_are_those_of_the_laptop_form() {
        let args = run_args("paceline run -- train");
        let expected = RunArgs {
            ranks: 1,
            nodes: None,
            identity: None,
            certificate_life: Duration::from_secs(86400),
            rendezvous: Endpoint { host: "127.0.0.1".to_owned(), port: 0 },
            rendezvous_given: false,
            interface: None,
            health: None,
            grace: Duration::from_secs(20),
            max_restarts: 0,
            timeout: None,
            rendezvous_timeout: Duration::from_secs(600),
            binding: Binding::Auto,
            fabric: None,
            insecure: false,
            flight_recorder: None,
            pod: Place::default(),
            torchrun: Settings {
                run_id: "none".to_owned(),
                role: "default".to_owned(),
                signals: SignalList { names: "SIGTERM,SIGINT,SIGHUP,SIGQUIT".to_owned(), more: Vec::new() },
                logs: LogSettings { role: "default".to_owned(), ..LogSettings::default() },
                ..Settings::default()
            },
            program: "train".into(),
            program_args: Vec::new(),
        };
        assert_eq!(args, expected);
    }

    #[test]
    fn the_kind_of_links_is_one_that_there_is() {
        assert_eq!(run_args("paceline run --fabric tls train").fabric, Some(Fabric::Tls));
        let error = parse_line("paceline run --fabric udp train").expect_err("nonsense").to_string();
        assert!(error.contains("choose auto, quic or tls"), "{error}");
    }

    #[test]
    fn what_protects_nobody_has_to_be_allowed() {
        let asked = |flags: &str, fabric: Option<&str>, insecure: Option<&str>| {
            let line = format!("paceline run {flags} train");
            let [fabric, insecure] = [fabric, insecure].map(|value| value.map(OsString::from));
            let variables = Variables { fabric, insecure, ..Variables::default() };
            match parse(line.split_whitespace().map(OsString::from), variables) {
                Ok(Request::Run(args)) => Ok((args.fabric, args.insecure)),
                Err(error) => Err(error.to_string()),
                Ok(other) => panic!("{other:?}"),
            }
        };
        let tcp = Ok((Some(Fabric::Tcp), true));
        assert_eq!(asked("--fabric tcp --insecure", None, None), tcp);
        assert_eq!(asked("--fabric tcp", None, Some("1")), tcp);
        assert_eq!(asked("--insecure", Some("tcp"), None), tcp);
        assert_eq!(asked("--fabric tls", Some("tcp"), None), Ok((Some(Fabric::Tls), false)));
        assert_eq!(asked("", Some("quic"), Some("0")), Ok((None, false)), "the ranks read it");
        for refused in [asked("--fabric tcp", None, None), asked("", Some("tcp"), Some("0"))] {
            assert!(refused.expect_err("it is not allowed").contains("--insecure allows it"));
        }
        assert!(asked("", None, Some("yes")).expect_err("nonsense").contains("neither 1 nor 0"));
        let several = "--nnodes 2 --node-rank 0 --rdzv-endpoint h";
        assert!(asked(several, None, None).expect_err("no secret").contains("needs a job secret"));
        assert_eq!(asked(&format!("{several} --insecure"), None, None), Ok((None, true)));
    }

    #[test]
    fn the_flag_goes_before_the_environment() {
        let flag = |port| Some(HostAndPort { host: "host".to_owned(), port });
        let at = |host: &str, port| Ok(Endpoint { host: host.to_owned(), port });
        let count = Nodes { min: 2, max: 2 };
        let nodes = NodeArgs {
            count,
            rank: 0,
            seating: Seating::Given,
            secret: Some("s".into()),
            changes: Changes::None,
            lease: None,
        };
        assert_eq!(endpoint(flag(Some(1)), Some("2".into()), None), at("host", 1));
        assert_eq!(endpoint(flag(None), Some("2".into()), None), at("host", 2));
        assert_eq!(endpoint(None, Some("2".into()), None), at("127.0.0.1", 2));
        assert_eq!(endpoint(None, None, None), at("127.0.0.1", 0));
        assert_eq!(endpoint(flag(None), None, Some(&nodes)), at("host", 29400));
        assert_eq!(endpoint(flag(None), Some("2".into()), Some(&nodes)), at("host", 2));
        assert!(endpoint(None, Some("two".into()), None).is_err());
    }

    #[test]
    fn an_interface_is_chosen_by_flag_or_else_by_variable() {
        let chosen = |flags: &str, variable: Option<&str>| {
            let line = format!("paceline run {flags} train");
            let variables = Variables { interface: variable.map(OsString::from), ..Variables::default() };
            match parse(line.split_whitespace().map(OsString::from), variables) {
                Ok(Request::Run(args)) => Ok(args.interface.map(|list| list.to_string())),
                Err(error) => Err(error.to_string()),
                Ok(other) => panic!("{other:?}"),
            }
        };
        assert_eq!(chosen("", None), Ok(None));
        assert_eq!(chosen("", Some("eth1")), Ok(Some("eth1".to_owned())));
        assert_eq!(chosen("--interface ipv6,!eth0", Some("eth1")), Ok(Some("ipv6,!eth0".to_owned())));
        let error = chosen("", Some("10.0.0.0/33")).expect_err("no such network");
        assert_eq!(
            error,
            "PACELINE_INTERFACE: `10.0.0.0/33`: the length of a network's prefix is a number from 0 to 32"
        );
        let error = chosen("--interface eth0/8", None).expect_err("no such network");
        assert!(error.contains("--interface") && error.contains("`eth0/8` is no network"), "{error}");
    }

    #[test]
    fn a_job_of_several_nodes_says_what_it_lacks() {
        let wrong = |flags: &str| match parse_line(&format!("paceline run {flags} train")) {
            Err(Error::Usage(text)) => text,
            other => panic!("{flags}: {other:?}"),
        };
        for (flags, expected) in [
            ("--nnodes 2", "needs --node-rank too, from 0 to 1"),
            ("--nnodes 2 --node-rank 2", "--node-rank 2 is out of range: with --nnodes 2 it is 0 to 1"),
            ("--node-rank 1", "--node-rank 1 is out of range: with --nnodes 1 it is 0 to 0"),
            ("--nnodes 2 --node-rank 1", "openssl rand -hex 32"),
            ("--nnodes 2 --node-rank 1 --job-secret s", "needs --rdzv-endpoint"),
            ("--nnodes 2 --node-rank 0 --job-secret s --rdzv-endpoint 0.0.0.0:1", "is no address"),
            ("--nnodes 2 --node-rank 0 --job-secret s --rdzv-endpoint h:0", "is no address"),
            ("--nnodes 70000 --node-rank 0 --job-secret s --rdzv-endpoint h", "65536 at most"),
            ("--nnodes 0", "give a number of machines from 1 on"),
            ("--nnodes 4:1", "give a number of machines from 1 on"),
            ("--nnodes 1:x", "or MIN:MAX, such as 2:4"),
            ("--nnodes 1:4 --node-rank 0", "openssl rand -hex 32"),
            ("--nnodes 1:4", "each node needs its --node-rank, from 0 to 3"),
            ("--max-restarts x", "invalid value 'x' for '--max-restarts <N>'"),
            ("--job-secret s --identity i", "cannot be used with"),
        ] {
            let text = wrong(flags);
            assert!(text.contains(expected) && !text.contains('\n'), "{text}");
        }
    }

    #[test]
    fn one_machine_by_flag_is_a_job_of_its_own_in_a_pod_of_several() {
        let pet = [("PET_NNODES", "3"), ("PET_NODE_RANK", "2"), ("PET_RDZV_ENDPOINT", "j-worker-0:29400")];
        let parsed = |line: &str| {
            let pet = pet.iter().map(|(name, value)| ((*name).to_owned(), OsString::from(value))).collect();
            let torchrun = torchrun::Variables { pet, ..Default::default() };
            let variables = Variables { torchrun, ..Variables::default() };
            parse(line.split_whitespace().map(OsString::from), variables)
        };
        match parsed("paceline run --nnodes 1 -- train") {
            Ok(Request::Run(args)) => assert_eq!((args.nodes, args.rendezvous_given), (None, false)),
            other => panic!("{other:?}"),
        }
        let error = parsed("paceline run --nnodes 1 --node-rank 2 -- train").expect_err("a contradiction");
        assert!(error.to_string().contains("--node-rank 2 is out of range"), "{error}");
    }

    #[test]
    fn a_node_has_its_share_of_the_ranks() {
        let args = run_args(
            "paceline run --nnodes=3 --node_rank=2 --nproc_per_node=4 --job-secret s --rdzv-endpoint h train",
        );
        assert_eq!((args.node(), args.first_rank(), args.layout().world_size()), (2, 8, 12));
        assert_eq!(args.rendezvous.to_string(), "h:29400");
        let args = run_args("paceline run -n 4 train");
        assert_eq!((args.node(), args.first_rank(), args.layout().world_size()), (0, 0, 4));
    }

    #[test]
    fn machines_are_a_number_or_a_range() {
        assert_eq!("4".parse(), Ok(Nodes { min: 4, max: 4 }));
        assert_eq!("2:4".parse(), Ok(Nodes { min: 2, max: 4 }));
        for text in ["", ":", "0", "0:2", "3:2", "1:", ":2", "1:2:3", "-1"] {
            assert!(text.parse::<Nodes>().is_err(), "{text:?}");
        }
        for text in ["4", "2:4"] {
            assert_eq!(text.parse::<Nodes>().expect("nodes").to_string(), text);
        }
    }

    #[test]
    fn seconds_may_have_decimals_but_not_be_endless() {
        assert_eq!(seconds("0.5"), Ok(Duration::from_millis(500)));
        for text in ["", "x", "-1", "inf", "NaN", "1e300", "20s"] {
            assert!(seconds(text).is_err(), "{text:?}");
        }
    }
}
