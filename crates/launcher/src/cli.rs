//! The command line: what was asked for, or one line that says what is wrong with it.
//!
//! clap's own messages take up to nine lines; in a pod's log they would be cut apart. Here they become one.

use std::ffi::OsString;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Args, Parser, Subcommand};
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

/// A job to run on this machine.
#[derive(Debug, Clone, PartialEq)]
pub struct RunArgs {
    /// How many ranks; at least one.
    pub ranks: u32,
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

/// HOST:PORT.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// A name or an address, without brackets.
    pub host: String,
    /// 0 lets the system choose.
    pub port: u16,
}

#[derive(Parser)]
#[command(name = "paceline", version, about = "Starts the ranks of a training job and looks after them")]
#[command(disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    command: Subcommands,
}

#[derive(Subcommand)]
enum Subcommands {
    /// Run a program as N ranks on this machine
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

Example:  paceline run -n 4 -- python train.py --epochs 3";

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
    /// How many ranks to start
    #[arg(short, long, alias = "nproc_per_node", value_name = "N", default_value = "1", value_parser = ranks)]
    nproc_per_node: u32,
    /// Where the ranks meet; PACELINE_PORT sets the port alone [default: a free port of 127.0.0.1]
    #[arg(long, alias = "rdzv_endpoint", value_name = "HOST:PORT")]
    rdzv_endpoint: Option<Endpoint>,
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

/// Reads the command line `args`, whose first element is the launcher's own name. `port` is the value of
/// PACELINE_PORT, used where no endpoint is given.
///
/// # Errors
/// [`Error::Usage`] with what is wrong and what to do.
pub fn parse(args: impl IntoIterator<Item = OsString>, port: Option<OsString>) -> Result<Request, Error> {
    let args: Vec<OsString> = args.into_iter().collect();
    let command = match Cli::try_parse_from(&args) {
        Ok(Cli { command }) => command,
        Err(e) if matches!(e.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) => {
            return Ok(Request::Print(e.to_string()));
        }
        Err(e) => return Err(Error::Usage(in_one_line(&e, &args))),
    };
    match command {
        Subcommands::Run(flags) => run_args(flags, port).map(Request::Run),
        Subcommands::Bench(flags) => flags.into_args(args[2..].to_vec()).map(Request::Bench),
        Subcommands::BenchRank(BenchRankFlags { report, bench }) => {
            bench.into_args(Vec::new()).map(|args| Request::BenchRank { args, report })
        }
    }
}

fn run_args(flags: RunFlags, port: Option<OsString>) -> Result<RunArgs, Error> {
    let mut program = flags.program.into_iter();
    Ok(RunArgs {
        ranks: flags.nproc_per_node,
        rendezvous: endpoint(flags.rdzv_endpoint, port)?,
        grace: flags.grace,
        timeout: flags.timeout,
        rendezvous_timeout: flags.rdzv_timeout,
        binding: flags.bind,
        fabric: flags.fabric,
        program: program.next().filter(|name| !name.is_empty()).ok_or_else(no_program)?,
        program_args: program.collect(),
    })
}

/// The flag, else PACELINE_PORT on the loopback interface, else a free port there.
fn endpoint(flag: Option<Endpoint>, port: Option<OsString>) -> Result<Endpoint, Error> {
    if let Some(endpoint) = flag {
        return Ok(endpoint);
    }
    let local = |port| Endpoint { host: "127.0.0.1".to_owned(), port };
    let Some(port) = port.filter(|value| !value.is_empty()) else { return Ok(local(0)) };
    let number = port.to_str().and_then(|text| text.parse().ok());
    let wrong =
        || Error::Usage(format!("PACELINE_PORT is {port:?}; set it to a port, such as 29400, or unset it"));
    number.map(local).ok_or_else(wrong)
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

fn seconds(text: &str) -> Result<Duration, String> {
    let number = text.parse().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    // A year is longer than any wait that is meant, and far from where adding it to the clock would overflow.
    let year = Duration::from_secs(365 * 24 * 3600);
    number.filter(|&d| d <= year).ok_or_else(|| "give a number of seconds, such as 20 or 0.5".to_owned())
}

impl FromStr for Endpoint {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || "give HOST:PORT, such as 127.0.0.1:29400 or [::1]:29400".to_owned();
        let (host, port) = text.rsplit_once(':').ok_or_else(wrong)?;
        let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        // An IPv6 address needs its brackets: without them its last group reads as a port.
        let host = bare.or((!host.contains([':', '[', ']'])).then_some(host)).filter(|host| !host.is_empty());
        let port = port.parse().map_err(|_| wrong())?;
        Ok(Endpoint { host: host.ok_or_else(wrong)?.to_owned(), port })
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
        parse(line.split_whitespace().map(OsString::from), None)
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
        for (text, host, port) in
            [("127.0.0.1:29400", "127.0.0.1", 29400), ("[::1]:1", "::1", 1), ("localhost:0", "localhost", 0)]
        {
            let endpoint: Endpoint = text.parse().expect(text);
            assert_eq!((endpoint.host.as_str(), endpoint.port), (host, port));
            assert_eq!(endpoint.to_string(), text);
        }
        for text in ["", ":", "host", "host:", ":29400", "host:65536", "host:x", "::1:29400", "[]:1", "[::1]"]
        {
            assert!(text.parse::<Endpoint>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn the_flag_goes_before_the_environment() {
        let flag = Endpoint { host: "host".to_owned(), port: 1 };
        assert_eq!(endpoint(Some(flag.clone()), Some("2".into())), Ok(flag));
        assert_eq!(endpoint(None, Some("2".into())), Ok(Endpoint { host: "127.0.0.1".to_owned(), port: 2 }));
        assert!(endpoint(None, Some("two".into())).is_err());
    }

    #[test]
    fn seconds_may_have_decimals_but_not_be_endless() {
        assert_eq!(seconds("0.5"), Ok(Duration::from_millis(500)));
        for text in ["", "x", "-1", "inf", "NaN", "1e300", "20s"] {
            assert!(seconds(text).is_err(), "{text:?}");
        }
    }
}
