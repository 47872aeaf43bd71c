//! `cargo xtask peers`: Paceline beside OpenMPI, MPICH and Gloo on this machine, or [`between`] two hosts.
//!
//! Rounds are interleaved: in each, every library runs once over all sizes, and the order rotates, so that what else the
//! machine does hits all alike. One loop times all of them (peers/bench.c for the peers, `paceline bench` for us: the
//! same loop), and each measurement checks every element of a result. A round of 5 calls per size comes first: it fills
//! caches and says how many calls fit into the time of a row; its times are not reported.
//!
//! It refuses to tune the peers beyond what their documentation says for one host; which words they get is in
//! [`library`], with reasons.

mod between;
mod faults;
mod library;
pub mod machine;
mod measurement;
mod streams;
pub mod summary;
mod workload;

use crate::process::{self, Watch, cargo};
use crate::step::{Budget, Report};
use crate::workspace;
use anyhow::{Context, Result, bail};
use clap::Args;
use library::{Library, Ready};
use machine::Machine;
use measurement::Measurement;
use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;
use workload::{Case, Row};

/// The document with the generated section.
const DOCUMENT: &str = "docs/benchmarks.md";

/// A library that takes longer for its rows has hung: [`workload::ROW`] bounds each of them to seconds.
const RUN_LIMIT: Duration = Duration::from_secs(5 * 60);

#[derive(Args)]
pub struct Options {
    /// How often every library runs over all sizes
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// One round of fewer sizes: shows that everything works, its times mean little
    #[arg(long, conflicts_with_all = ["rounds", "write"])]
    quick: bool,
    /// Between two hosts (network namespaces, which takes root) instead of on this one: Gloo and OpenMPI over TCP
    #[arg(long)]
    between_hosts: bool,
    /// What lost ranks cost, with Paceline, torchrun and torchft; the result is for docs/fault-tolerance.md
    #[arg(long, conflicts_with = "between_hosts")]
    faults: bool,
    /// Go on without a peer that cannot be installed
    #[arg(long)]
    skip_missing: bool,
    /// Put the result into docs/benchmarks.md, or where it belongs
    #[arg(long)]
    write: bool,
}

impl Options {
    fn rounds(&self) -> u32 {
        if self.quick { 1 } else { self.rounds }
    }

    /// The words that repeat this run.
    fn command(&self) -> String {
        let flags = [
            (self.between_hosts, "--between-hosts"),
            (self.faults, "--faults"),
            (self.quick, "--quick"),
            (self.skip_missing, "--skip-missing"),
            (self.write, "--write"),
        ];
        let given = flags.into_iter().filter(|(given, _)| *given).map(|(_, flag)| flag.to_owned());
        let rounds = (!self.quick).then(|| format!("--rounds {}", self.rounds));
        let words = ["cargo xtask peers".to_owned()].into_iter().chain(rounds).chain(given);
        words.collect::<Vec<_>>().join(" ")
    }
}

/// Sets everything up, measures, and prints the tables.
///
/// # Errors
/// A peer cannot be installed, a library fails, or an element is wrong.
pub fn run(options: &Options) -> Result<()> {
    let mut report = Report::new("peers");
    let mut result = None;
    let outcome = steps(options, &mut report, &mut result);
    if let Some(result) = &result {
        println!("\n{result}");
    }
    report.close(outcome)
}

fn steps(options: &Options, report: &mut Report, result: &mut Option<String>) -> Result<()> {
    if options.faults {
        faults::measure(options, report, result)?;
        return match result {
            Some(text) if options.write => write_to(faults::DOCUMENT, &faults::SECTION, text),
            _ => Ok(()),
        };
    }
    report.step("peers: build Paceline", Budget::minutes(6.0), |limit| {
        process::run(cargo(&["build", "--release", "--locked", "--package", "paceline"]), limit)
    })?;
    if options.between_hosts {
        between::measure(options, report, result)?;
        return match result {
            Some(text) if options.write => write(&summary::BETWEEN, text),
            _ => Ok(()),
        };
    }
    let mut libraries = Vec::new();
    report.step("peers: set up", Budget::minutes(5.0), |limit| {
        libraries = set_up(Library::ALL, options, limit)?;
        Ok(())
    })?;
    let cases = workload::cases(options.quick);
    let before = Machine::look();
    let mut run = Run::new(libraries);
    // Two places, a second each at most, for a dozen sizes and five libraries.
    let budget = Budget::minutes(2.5 * f64::from(options.rounds() + 1));
    report.step("peers: measure", budget, |_| {
        run.calibrate(&cases);
        (0..options.rounds()).for_each(|round| run.round(&cases, round, options.rounds()));
        Ok(())
    })?;
    let table = summary::tables(&cases, &run.libraries_measured(), &run.measurements);
    let conditions = machine::conditions(&before, &options.command(), options.rounds(), &run.versions());
    let text = format!("{conditions}\n{table}");
    *result = Some(text.clone());
    run.must_be_in_order()?;
    if options.write {
        write(&summary::HERE, &text)?;
    }
    Ok(())
}

/// Installs and builds what can be had.
fn set_up(
    libraries: impl IntoIterator<Item = Library>,
    options: &Options,
    limit: Duration,
) -> Result<Vec<Ready>> {
    let mut ready = Vec::new();
    for library in libraries {
        match library.set_up(limit) {
            Ok(Some(one)) => ready.push(one),
            Ok(None) => eprintln!("{library}: this build of Paceline has no such thing; left out"),
            Err(error) if options.skip_missing => eprintln!("{library} is left out: {error:#}"),
            Err(error) => return Err(error.context(format!("{library} is missing (--skip-missing goes on)"))),
        }
    }
    Ok(ready)
}

/// What has been measured so far.
struct Run {
    libraries: Vec<Ready>,
    /// How long a call takes: the shortest mean so far. Of five calls on a busy machine one can take a thousand times as
    /// long as the others, and then a row of it would be far too short in all rounds.
    estimates_us: BTreeMap<(Library, Case), f64>,
    measurements: Vec<Measurement>,
    /// Why a library takes no part any more.
    failures: BTreeMap<Library, String>,
}

impl Run {
    fn new(libraries: Vec<Ready>) -> Self {
        let (estimates_us, measurements, failures) = Default::default();
        Self { libraries, estimates_us, measurements, failures }
    }

    /// The short round. Its times are estimates; wrong elements count as in any other.
    fn calibrate(&mut self, cases: &[Case]) {
        eprintln!("Calibrating: a few calls of each size");
        let rows = |_: &Self, _, case| Row { case, iterations: workload::FEWEST };
        for measurement in self.pass(cases, 0, &rows) {
            // Its library takes no further part, so that no time of this round gets into a median.
            if measurement.wrong > 0 {
                self.measurements.push(measurement);
            }
        }
    }

    fn round(&mut self, cases: &[Case], round: u32, rounds: u32) {
        let rows = |run: &Self, library, case| Row {
            case,
            iterations: workload::iterations(case, run.estimates_us.get(&(library, case)).copied()),
        };
        eprintln!("Round {} of {rounds}, load {}", round + 1, machine::load_average());
        let measurements = self.pass(cases, round, &rows);
        self.measurements.extend(measurements);
    }

    /// Every library once over all sizes. One that fails or is wrong takes no further part; the others go on, for their
    /// times are as good as before.
    fn pass(
        &mut self,
        cases: &[Case],
        round: u32,
        row: &dyn Fn(&Self, Library, Case) -> Row,
    ) -> Vec<Measurement> {
        let mut measurements = Vec::new();
        for index in workload::order(round, self.libraries.len()) {
            let library = self.libraries[index].library;
            for ranks in workload::worlds(cases) {
                if self.failures.contains_key(&library) {
                    continue;
                }
                let of_world = cases.iter().filter(|case| case.ranks == ranks && library.runs(**case));
                let rows: Vec<Row> = of_world.map(|&case| row(self, library, case)).collect();
                let failure = match self.libraries[index].measure(ranks, &rows) {
                    Ok(mut measured) => {
                        for Measurement { case, mean_us, .. } in &measured {
                            let estimate = self.estimates_us.entry((library, *case)).or_insert(*mean_us);
                            *estimate = estimate.min(*mean_us);
                        }
                        eprintln!("  {library}, {ranks} ranks: {}", summary::line(&measured));
                        let failure = summary::wrong_elements(&measured);
                        measurements.append(&mut measured);
                        failure
                    }
                    Err(error) => Some(format!("{error:#}")),
                };
                if let Some(why) = failure {
                    let why = format!("{library} failed with {ranks} ranks: {why}");
                    eprintln!("  {why}; it takes no further part");
                    self.failures.insert(library, why);
                }
            }
        }
        measurements
    }

    fn libraries_measured(&self) -> Vec<Library> {
        self.libraries.iter().map(|ready| ready.library).collect()
    }

    fn versions(&self) -> Vec<&str> {
        self.libraries.iter().map(|ready| ready.version.as_str()).collect()
    }

    fn must_be_in_order(&self) -> Result<()> {
        if !self.failures.is_empty() {
            bail!("{}", self.failures.values().cloned().collect::<Vec<_>>().join("\n"));
        }
        Ok(())
    }
}

/// Runs a program to its end and returns what it wrote on standard output; its standard error is ours.
fn output_of(command: std::process::Command, limit: Duration) -> Result<(std::process::ExitStatus, String)> {
    let mut text = String::new();
    let status = process::listen(command, Watch::Stdout, limit, &mut |line| {
        text.push_str(line);
        text.push('\n');
    })?;
    Ok((status, text))
}

fn write(markers: &summary::Markers, section: &str) -> Result<()> {
    write_to(DOCUMENT, markers, section)
}

fn write_to(document: &str, markers: &summary::Markers, section: &str) -> Result<()> {
    let path = workspace::root().join(document);
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {document}"))?;
    let text = summary::with_section(&text, markers, section)
        .with_context(|| format!("{document} has no `{}` and `{}`", markers.begin, markers.end))?;
    fs::write(&path, text).with_context(|| format!("cannot write {document}"))?;
    eprintln!("The result is in {document}");
    Ok(())
}
