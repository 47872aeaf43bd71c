//! The command line: what was asked for, or one line that says what is wrong with it.
//!
//! clap's own messages take up to nine lines; in a pod's log they would be cut apart. Here they become one.

use std::ffi::OsString;
use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Args, Parser, Subcommand};
use paceline_runtime::nodes::Layout;
use paceline_transport::Fabric;

use crate::bench::args::{BenchArgs, Flags as BenchFlags};
use crate::binding::Binding;
use crate::error::Error;

/// What the command line asks for.
#[derive(Debug)]
pub enum Request {
    /// Print this text, the help or the version, and exit with 0.
    Print(String),
    /// Run a job.
    Run(RunArgs),
    /// Measure the collectives.
    Bench(BenchArgs),
    /// Be one rank of a measurement.
    BenchRank {
        /// What is measured.
        args: BenchArgs,
        /// The socket for results.
        report: PathBuf,
    },
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
    /// From SIGTERM to SIGKILL.
    pub grace: Duration,
    /// How long one collective of the program may take; `None` leaves it to the library.
    pub timeout: Option<Duration>,
    /// How long the ranks wait for each other at the start.
    pub rendezvous_timeout: Duration,
    /// Which processors the ranks run on.
    pub binding: Binding,
    /// The kind of links between the ranks; `None` leaves it to PACELINE_FABRIC.
    pub fabric: Option<Fabric>,
    /// The program as it was written; not empty.
    pub program: OsString,
    /// Its arguments.
    pub program_args: Vec<OsString>,
}

/// This machine's place in a job on several machines.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeArgs {
    /// How many nodes; at least two.
    pub count: u32,
    /// The number of this one.
    pub rank: u32,
    /// The file with the job secret; none where all have certificates made by others.
    pub secret: Option<PathBuf>,
}

impl RunArgs {
    /// The number of this node; 0 on one machine.
    pub fn node(&self) -> u32 {
        self.nodes.as_ref().map_or(0, |nodes| nodes.rank)
    }

    /// The first rank of this machine.
    pub fn first_rank(&self) -> u32 {
        self.node() * self.ranks
    }

    /// How the ranks are spread.
    pub fn layout(&self) -> Layout {
        let nodes = self.nodes.as_ref().map_or(1, |nodes| nodes.count);
        Layout { nodes: nodes as usize, ranks_per_node: self.ranks as usize }
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
}

/// HOST:PORT.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// A name or an address, without brackets.
    pub host: String,
    /// 0 lets the system choose.
    pub port: u16,
}

/// An endpoint as it is written: the port may be left out.
#[derive(Debug, Clone, PartialEq, Eq)]
struct HostAndPort {
    host: String,
    port: Option<u16>,
}

/// The most ranks of a job: they are checked against the library's limit by each of them.
const RANKS_MOST: u64 = 65_536;

/// The port of the rendezvous between machines, torchrun's.
const DEFAULT_PORT: u16 = 29_400;

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
    #[command(after_help = RUN_HELP)]
    Run(RunFlags),
    /// Measure a collective on N ranks of this machine, in the columns of nccl-tests
    #[command(after_help = BENCH_HELP)]
    Bench(BenchFlags),
    /// One rank of `paceline bench`
    #[command(hide = true)]
    BenchRank(BenchRankFlags),
}

const RUN_HELP: &str = "\
When a rank fails, the others are told, get SIGTERM after 2 s and SIGKILL after the grace; the exit code is the
failed rank's, or 128 + the signal that killed it. SIGTERM, SIGINT, SIGHUP and SIGQUIT are passed on to the ranks.

Example:  paceline run -n 4 -- python train.py --epochs 3

On several machines, the same on each but for the node rank; the secret file comes from openssl rand -hex 32:
          paceline run --nnodes 2 --node-rank 0 -n 4 --rdzv-endpoint 10.0.0.1 --job-secret FILE -- python train.py";

const BENCH_HELP: &str = "\
A size is that of the larger buffer in bytes; algbw is size / time, busbw is algbw times what the collective makes of
it (nccl-tests, doc/PERFORMANCE.md), and #wrong counts wrong elements of all ranks. PACELINE_ALGORITHM and the like
apply as to any job. The exit code is 1 if an element was wrong.

Example:  paceline bench all_reduce --ranks 1..4 -b 4 -e 64M";

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
    #[arg(long, value_name = "N", default_value = "1", value_parser = nodes)]
    nnodes: u32,
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
    /// How many ranks to start on this machine
    #[arg(short, long, alias = "nproc_per_node", value_name = "N", default_value = "1", value_parser = ranks)]
    nproc_per_node: u32,
    /// Where the ranks meet: an address of machine 0, the port 29400 or PACELINE_PORT unless given [default on one
    /// machine: a free port of 127.0.0.1]
    #[arg(long, alias = "rdzv_endpoint", value_name = "HOST:PORT")]
    rdzv_endpoint: Option<HostAndPort>,
    /// How long a rank that was told to end may take before it is killed
    #[arg(long, value_name = "SECONDS", default_value = "20", value_parser = seconds)]
    grace: Duration,
    /// How long one collective may take before it fails [default: the program's choice, else 600]
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    timeout: Option<Duration>,
    /// How long the ranks wait for each other at the start
    #[arg(long, alias = "rdzv_timeout", value_name = "SECONDS", default_value = "600", value_parser = seconds)]
    rdzv_timeout: Duration,
    /// Which processors the ranks run on: an equal share each if there are enough, or all
    #[arg(long, value_name = "auto|none", default_value = "auto", hide_possible_values = true)]
    bind: Binding,
    /// The links between ranks that share no memory: QUIC, TLS over TCP, or whichever is faster [default:
    /// PACELINE_FABRIC, else auto]
    #[arg(long, value_name = "auto|quic|tls", value_parser = fabric)]
    fabric: Option<Fabric>,
    /// The program and its arguments
    #[arg(required = true, trailing_var_arg = true, value_name = "PROGRAM")]
    program: Vec<OsString>,
}

/// Reads the command line `args`, whose first element is the launcher's own name. `variables` count where no flag
/// is given.
///
/// # Errors
/// [`Error::Usage`] with what is wrong and what to do.
pub fn parse(args: impl IntoIterator<Item = OsString>, variables: Variables) -> Result<Request, Error> {
    let args: Vec<OsString> = args.into_iter().collect();
    let command = match Cli::try_parse_from(&args) {
        Ok(Cli { command }) => command,
        Err(e) if matches!(e.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) => {
            return Ok(Request::Print(e.to_string()));
        }
        Err(e) => return Err(Error::Usage(in_one_line(&e, &args))),
    };
    match command {
        Subcommands::Run(flags) => run_args(flags, variables).map(Request::Run),
        Subcommands::Bench(flags) => flags.into_args(args[2..].to_vec()).map(Request::Bench),
        Subcommands::BenchRank(BenchRankFlags { report, bench }) => {
            bench.into_args(Vec::new()).map(|args| Request::BenchRank { args, report })
        }
    }
}

fn run_args(flags: RunFlags, variables: Variables) -> Result<RunArgs, Error> {
    let Variables { port, job_secret_file, certificate_life } = variables;
    let secret = flags.job_secret.or(job_secret_file.filter(|file| !file.is_empty()).map(PathBuf::from));
    let secret = secret.filter(|_| flags.identity.is_none());
    let trusts = secret.is_some() || flags.identity.is_some();
    let nodes = node_args(flags.nnodes, flags.node_rank, flags.nproc_per_node, secret)?;
    if nodes.is_some() && !trusts {
        return Err(Error::Usage(
            "a job of several nodes needs a job secret: openssl rand -hex 32 > FILE; chmod 600 FILE; \
             and on every node --job-secret FILE or PACELINE_JOB_SECRET_FILE"
                .to_owned(),
        ));
    }
    let mut program = flags.program.into_iter();
    Ok(RunArgs {
        ranks: flags.nproc_per_node,
        rendezvous: endpoint(flags.rdzv_endpoint, port, nodes.as_ref())?,
        nodes,
        identity: flags.identity,
        certificate_life: life(certificate_life)?,
        grace: flags.grace,
        timeout: flags.timeout,
        rendezvous_timeout: flags.rdzv_timeout,
        binding: flags.bind,
        fabric: flags.fabric,
        program: program.next().filter(|name| !name.is_empty()).ok_or_else(no_program)?,
        program_args: program.collect(),
    })
}

/// The place of this machine, if there are several.
fn node_args(
    count: u32,
    rank: Option<u32>,
    ranks: u32,
    secret: Option<PathBuf>,
) -> Result<Option<NodeArgs>, Error> {
    let last = count - 1;
    let wrong = |text: String| Err(Error::Usage(text));
    match rank {
        None if count > 1 => {
            return wrong(format!("--nnodes {count} needs --node-rank too, from 0 to {last}"));
        }
        Some(rank) if rank > last => {
            return wrong(format!(
                "--node-rank {rank} is out of range: with --nnodes {count} it is 0 to {last}"
            ));
        }
        _ => {}
    }
    if count == 1 {
        return Ok(None);
    }
    let world_size = u64::from(count) * u64::from(ranks);
    if world_size > RANKS_MOST {
        return wrong(format!(
            "{count} nodes of {ranks} ranks are {world_size}; a job has {RANKS_MOST} at most"
        ));
    }
    Ok(Some(NodeArgs { count, rank: rank.unwrap_or(0), secret }))
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

fn ranks(text: &str) -> Result<u32, String> {
    text.parse()
        .ok()
        .filter(|&n| n >= 1)
        .ok_or_else(|| "give a number of ranks from 1 on, such as 4".to_owned())
}

/// The kind of links called `text`.
pub fn fabric(text: &str) -> Result<Fabric, String> {
    let named = Fabric::NAMES.into_iter().find(|(name, _)| *name == text);
    named.map(|(_, fabric)| fabric).ok_or_else(|| "choose auto, quic or tls".to_owned())
}

fn nodes(text: &str) -> Result<u32, String> {
    text.parse().ok().filter(|&n| n >= 1).ok_or_else(|| "give a number of machines from 1 on".to_owned())
}

fn seconds(text: &str) -> Result<Duration, String> {
    let number = text.parse().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    // A year is longer than any wait that is meant, and far from where adding it to the clock would overflow.
    let year = Duration::from_secs(365 * 24 * 3600);
    number.filter(|&d| d <= year).ok_or_else(|| "give a number of seconds, such as 20 or 0.5".to_owned())
}

impl FromStr for HostAndPort {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || "give HOST:PORT, such as 127.0.0.1:29400 or [::1]:29400".to_owned();
        let (host, port) = match text.rsplit_once(':') {
            // The last colon may be inside the brackets.
            Some((host, port)) if !port.ends_with(']') => (host, Some(port)),
            _ => (text, None),
        };
        let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        // An IPv6 address needs its brackets: without them its last group reads as a port.
        let host = bare.or((!host.contains([':', '[', ']'])).then_some(host)).filter(|host| !host.is_empty());
        let port = port.map(|port| port.parse().map_err(|_| wrong())).transpose()?;
        Ok(HostAndPort { host: host.ok_or_else(wrong)?.to_owned(), port })
    }
}

/// With a port: the ranks of a benchmark meet where it says.
impl FromStr for Endpoint {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let HostAndPort { host, port } = text.parse()?;
        let port = port.ok_or("give HOST:PORT, such as 127.0.0.1:29400 or [::1]:29400")?;
        Ok(Self { host, port })
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Endpoint { host, port } = self;
        if host.contains(':') { write!(f, "[{host}]:{port}") } else { write!(f, "{host}:{port}") }
    }
}

fn in_one_line(error: &clap::Error, args: &[OsString]) -> String {
    let subcommand = match args.get(1).and_then(|word| word.to_str()) {
        Some("bench" | "bench-rank") => "bench",
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
                Some(near) => format!("unknown flag {flag}; did you mean {near}?"),
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

    fn parse_line(line: &str) -> Result<Request, Error> {
        parse(line.split_whitespace().map(OsString::from), Variables::default())
    }

    fn run_args(line: &str) -> RunArgs {
        match parse_line(line) {
            Ok(Request::Run(args)) => args,
            other => panic!("{line}: {other:?}"),
        }
    }

    #[test]
    fn flags_are_documented_consistently() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn defaults_are_those_of_the_laptop_form() {
        let args = run_args("paceline run train");
        let expected = RunArgs {
            ranks: 1,
            nodes: None,
            identity: None,
            certificate_life: Duration::from_secs(86400),
            rendezvous: Endpoint { host: "127.0.0.1".to_owned(), port: 0 },
            grace: Duration::from_secs(20),
            timeout: None,
            rendezvous_timeout: Duration::from_secs(600),
            binding: Binding::Auto,
            fabric: None,
            program: "train".into(),
            program_args: Vec::new(),
        };
        assert_eq!(args, expected);
    }

    #[test]
    fn the_kind_of_links_is_one_that_there_is() {
        assert_eq!(run_args("paceline run --fabric tls train").fabric, Some(Fabric::Tls));
        let error = parse_line("paceline run --fabric tcp train").expect_err("nonsense").to_string();
        assert!(error.contains("choose auto, quic or tls"), "{error}");
    }

    #[test]
    fn what_follows_the_program_is_its_own() {
        for line in
            ["paceline run -n 4 -- train -n 9 --help", "paceline run --nproc_per_node=4 train -n 9 --help"]
        {
            let args = run_args(line);
            assert_eq!((args.ranks, args.program.to_str()), (4, Some("train")), "{line}");
            assert_eq!(args.program_args, ["-n", "9", "--help"], "{line}");
        }
    }

    #[test]
    fn endpoints_are_host_and_port() {
        for (text, host, port) in [
            ("127.0.0.1:29400", "127.0.0.1", Some(29400)),
            ("[::1]:1", "::1", Some(1)),
            ("localhost:0", "localhost", Some(0)),
            ("node-0.job", "node-0.job", None),
            ("[fd00::1]", "fd00::1", None),
        ] {
            let endpoint: HostAndPort = text.parse().expect(text);
            assert_eq!((endpoint.host.as_str(), endpoint.port), (host, port));
            if let Some(port) = port {
                assert_eq!(Endpoint { host: endpoint.host, port }.to_string(), text);
            }
        }
        for text in ["", ":", "host:", ":29400", "host:65536", "host:x", "::1:29400", "[]:1", "[]", "a]"] {
            assert!(text.parse::<HostAndPort>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn the_flag_goes_before_the_environment() {
        let flag = |port| Some(HostAndPort { host: "host".to_owned(), port });
        let at = |host: &str, port| Ok(Endpoint { host: host.to_owned(), port });
        let nodes = NodeArgs { count: 2, rank: 0, secret: Some("s".into()) };
        assert_eq!(endpoint(flag(Some(1)), Some("2".into()), None), at("host", 1));
        assert_eq!(endpoint(flag(None), Some("2".into()), None), at("host", 2));
        assert_eq!(endpoint(None, Some("2".into()), None), at("127.0.0.1", 2));
        assert_eq!(endpoint(None, None, None), at("127.0.0.1", 0));
        assert_eq!(endpoint(flag(None), None, Some(&nodes)), at("host", 29400));
        assert_eq!(endpoint(flag(None), Some("2".into()), Some(&nodes)), at("host", 2));
        assert!(endpoint(None, Some("two".into()), None).is_err());
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
            ("--nnodes 1:4", "give a number of machines"),
            ("--job-secret s --identity i", "cannot be used with"),
        ] {
            let text = wrong(flags);
            assert!(text.contains(expected) && !text.contains('\n'), "{text}");
        }
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
    fn seconds_may_have_decimals_but_not_be_endless() {
        assert_eq!(seconds("0.5"), Ok(Duration::from_millis(500)));
        for text in ["", "x", "-1", "inf", "NaN", "1e300", "20s"] {
            assert!(seconds(text).is_err(), "{text:?}");
        }
    }
}
