//! `paceline bench`: how fast the collectives are on this machine, in the columns of nccl-tests.
//!
//! The launcher starts N ranks of itself exactly as it starts a program (`paceline bench-rank`, through [`mod@crate::run`]: the
//! same supervisor, rendezvous and environment), so what is measured is what a job gets. Each rank times its own calls,
//! checks every element of its results against a scalar reference, and reports to the launcher through [`inbox`]; the
//! launcher alone prints. It refuses to judge: no thresholds, no history.
//!
//! | module | what it is |
//! |---|---|
//! | [`args`] | the flags, and the rows that follow from them |
//! | [`collective`] | the table of what can be measured |
//! | [`measure`], [`rank`] | a rank: the loops, and the process around them |
//! | [`device`] | its device, where buffers are in one's memory |
//! | [`reference`](mod@reference) | what the elements must be |
//! | [`inbox`], [`report`] | from the ranks' results to rows |
//! | [`table`], [`document`], [`plot`] | rows as text, as JSON, as a picture |
//! | [`machine`] | the conditions |

pub mod args;
mod collective;
mod device;
mod document;
mod inbox;
mod machine;
mod measure;
mod plot;
pub mod rank;
mod reference;
mod report;
mod table;

use std::ffi::OsString;
use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use paceline_runtime::collectives::device::Wanted;
use paceline_runtime::env;
use paceline_transport::Fabric;

use self::args::{Backend, BenchArgs, Output};
#[cfg(not(target_feature = "crt-static"))]
pub use self::device::missing_for_nccl;
use self::document::Document;
use self::inbox::{Inbox, News};
use self::machine::Machine;
use self::rank::Message;
use self::report::{Collector, Row, Run};
use crate::binding::Binding;
use crate::cli::{CERTIFICATE_LIFE, RunArgs};
use crate::console::{Console, Stream};
use crate::endpoint::Endpoint;
use crate::error::Error;
use crate::pod::Place;
use crate::run;
use crate::torchrun::Settings;

/// Where a person waits for JSON, a line this often says how far it is.
const PROGRESS: Duration = Duration::from_secs(5);

/// Processes on one machine find each other within a second; this is for a machine that swaps.
const RENDEZVOUS_TIMEOUT: Duration = Duration::from_secs(60);

/// A rank has nothing to save.
const GRACE: Duration = Duration::from_secs(2);

/// Measures, and prints what came out. Returns the launcher's exit code, 1 if an element was wrong, and what is to be
/// told last on stderr.
///
/// # Errors
/// If the ranks could not be started, or their results could not be read.
pub fn run(args: &BenchArgs, console: &Console) -> Result<(u8, String), Error> {
    if let Backend::Device(Wanted::Nccl | Wanted::Hierarchy) = args.backend
        && let Some(why) = device::missing_for_nccl()
    {
        return Err(Error::Usage(format!("NCCL cannot be used here: {why}")));
    }
    check_memory(args.needed_bytes(), machine::available_bytes())?;
    let machine = Machine::look();
    let print = |text: String| console.print(Stream::Out, text.into_bytes());
    let mut runs = Vec::new();
    for ranks in args.ranks.clone() {
        if args.output != Output::Json {
            print(table::head(args, ranks, &machine));
        }
        let run = match run_ranks(args, ranks, console)? {
            Ended::Well(run) => run,
            Ended::Badly { exit_code, report } => return Ok((exit_code, report)),
        };
        if args.output == Output::Table {
            print(table::foot(&run));
        }
        runs.push(run);
    }
    match args.output {
        Output::Table => print(table::scaling(args, &runs)),
        Output::Json => print(Document::new(args, &machine, &runs).to_text()),
        Output::Explain => {}
    }
    let wrong: u64 = runs.iter().filter_map(Run::wrong).sum();
    let mut last_words = String::new();
    if let Some(file) = &args.plot {
        fs::write(file, plot::svg(args, &runs, &machine)).map_err(|e| Error::System {
            what: format!("cannot write {}", file.display()),
            why: e.to_string(),
        })?;
        last_words += &format!("paceline: the plot is in {}\n", file.display());
    }
    if wrong > 0 {
        last_words += &format!("paceline: {wrong} elements are wrong\n");
    }
    Ok((u8::from(wrong > 0), last_words))
}

/// How one job of a measurement ended.
enum Ended {
    Well(Run),
    Badly { exit_code: u8, report: String },
}

/// Runs the job of one number of ranks, and prints its rows as they come in.
fn run_ranks(args: &BenchArgs, ranks: u32, console: &Console) -> Result<Ended, Error> {
    let inbox = Inbox::open()?;
    let job = job(args, ranks, &inbox)?;
    thread::scope(|scope| {
        let results = scope.spawn(|| collect(args, ranks, &inbox, console));
        // On this thread: the kernel kills the ranks when the thread that started them ends.
        let outcome = run::run(&job, console);
        inbox.end()?;
        let results = results.join().expect("the collector has no panics");
        match outcome? {
            (0, _) => {
                let (links, backend, rows) = results?;
                let expected = args.rows(ranks).len();
                if rows.len() != expected {
                    let why = format!("{} of {expected} sizes came", rows.len());
                    return Err(Error::System {
                        what: "the ranks ended without all results".to_owned(),
                        why,
                    });
                }
                Ok(Ended::Well(Run { ranks, links, backend, rows }))
            }
            (exit_code, report) => Ok(Ended::Badly { exit_code, report }),
        }
    })
}

/// The job: this program again, as ranks, directly or through the shell command that was given.
fn job(args: &BenchArgs, ranks: u32, inbox: &Inbox) -> Result<RunArgs, Error> {
    let program = std::env::current_exe().map_err(|e| Error::System {
        what: "cannot find this program's own file".to_owned(),
        why: e.to_string(),
    })?;
    let shell = args.through.iter().flat_map(|script| ["sh", "-c", script, "paceline-bench"]);
    let own = [program.into(), OsString::from("bench-rank"), "--report".into(), inbox.path().into()];
    let mut words = shell.map(OsString::from).chain(own).chain(args.words.iter().cloned());
    let local = Endpoint { host: "127.0.0.1".to_owned(), port: 0 };
    let wrong = |e: paceline_runtime::Error| Error::Usage(e.to_string());
    let insecure = env::insecure(env::process).map_err(wrong)?;
    let fabric = match args.fabric {
        Some(Fabric::Tcp) if !insecure => {
            let why = format!("{}; where that is meant, PACELINE_INSECURE=1 allows it", env::PLAIN_TCP);
            return Err(Error::Usage(why));
        }
        Some(fabric) => Some(fabric),
        // The ranks read the variable; of plain TCP the launcher has to warn.
        None => Some(env::fabric(env::process).map_err(wrong)?).filter(|fabric| *fabric == Fabric::Tcp),
    };
    Ok(RunArgs {
        ranks,
        nodes: None,
        health: None,
        identity: None,
        certificate_life: CERTIFICATE_LIFE,
        rendezvous: args.rendezvous.clone().unwrap_or(local),
        rendezvous_given: true,
        // The ranks, which may be elsewhere, read PACELINE_INTERFACE themselves.
        interface: None,
        grace: GRACE,
        max_restarts: 0,
        timeout: None,
        rendezvous_timeout: RENDEZVOUS_TIMEOUT,
        binding: Binding::Auto,
        fabric,
        insecure,
        flight_recorder: None,
        pod: Place::default(),
        torchrun: Settings::default(),
        program: words.next().expect("this program's own name is among them"),
        program_args: words.collect(),
    })
}

/// Makes rows of what the ranks report, until the job is over. After an error it goes on to take messages, for the ranks
/// wait until theirs are taken.
fn collect(
    args: &BenchArgs,
    ranks: u32,
    inbox: &Inbox,
    console: &Console,
) -> Result<(String, Option<String>, Vec<Row>), Error> {
    let mut collector = Collector::new(args, ranks);
    let mut progress = Progress::new(args, ranks, console);
    let mut rows = Vec::new();
    let (mut links, mut backend) = (String::new(), None);
    let mut failure = None;
    loop {
        let row = match inbox.next() {
            Ok(News::Message(Message::Joined { links: kind, backend: way })) => {
                if args.output != Output::Json {
                    console.print(Stream::Out, table::links(&kind, way.as_deref()).into_bytes());
                }
                (links, backend) = (kind, way);
                None
            }
            Ok(News::Message(Message::Measured(measured))) => collector.add(measured),
            Ok(News::Message(Message::Explained { row, schedule })) => {
                collector.explain(row, schedule);
                (args.output == Output::Explain).then(|| collector.row(row))
            }
            Ok(News::Silence) => None,
            Ok(News::End) => break,
            Err(e) => {
                failure.get_or_insert(e);
                continue;
            }
        };
        if let Some(row) = row {
            if args.output != Output::Json {
                console.print(Stream::Out, table::row(args, &row).into_bytes());
                progress.seen();
            }
            rows.push(row);
        }
        progress.tell(rows.len(), &collector);
    }
    failure.map_or(Ok((links, backend, rows)), Err)
}

/// Says on stderr how far it is, where the table does not show it.
struct Progress<'a> {
    what: String,
    start: Instant,
    last_sign: Instant,
    console: &'a Console,
}

impl<'a> Progress<'a> {
    fn new(args: &BenchArgs, ranks: u32, console: &'a Console) -> Self {
        let now = Instant::now();
        Progress { what: format!("{}, {ranks} ranks", args.collective), start: now, last_sign: now, console }
    }

    fn seen(&mut self) {
        self.last_sign = Instant::now();
    }

    fn tell(&mut self, done: usize, collector: &Collector) {
        let Some(bytes) = collector.bytes(done).filter(|_| self.last_sign.elapsed() >= PROGRESS) else {
            return;
        };
        self.seen();
        let (what, seconds) = (&self.what, self.start.elapsed().as_secs());
        let line = format!(
            "paceline: {what}: {done} of {} sizes done after {seconds} s, now {bytes} B\n",
            collector.len()
        );
        self.console.print(Stream::Err, line.into_bytes());
    }
}

/// A machine that runs out of memory kills whatever is largest, which may be something else.
fn check_memory(needed: u64, available: Option<u64>) -> Result<(), Error> {
    match available {
        Some(available) if needed > available => Err(Error::Usage(format!(
            "the buffers of all ranks need {:.1} GB and {:.1} GB are free; take a smaller -e or fewer ranks",
            needed as f64 / 1e9,
            available as f64 / 1e9
        ))),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_memory_than_there_is_is_refused_before_anything_starts() {
        assert_eq!(check_memory(10, Some(10)), Ok(()));
        assert_eq!(check_memory(10, None), Ok(()));
        let refused = check_memory(30_000_000_000, Some(20_000_000_000)).expect_err("too much").to_string();
        assert!(
            refused.starts_with("the buffers of all ranks need 30.0 GB and 20.0 GB are free"),
            "{refused}"
        );
    }
}
