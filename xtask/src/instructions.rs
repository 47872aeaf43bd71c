//! `cargo xtask instructions`: how many instructions the hot path takes, beside how many it should.
//!
//! Times mean something on a quiet machine only; counts are the same on a busy one, so CI can compare them. What is
//! counted is in `benches/src/bin/instructions.rs`, what is expected in `benches/instructions.json`. A count does not
//! see caches, waits or the kernel: criterion's suites and `paceline bench` are for those.

use crate::process::{self, Watch};
use crate::step::{Budget, Report};
use crate::system::{self, Tool};
use crate::workspace::{self, root, target};
use anyhow::{Context, Result, anyhow, bail};
use serde_json::{Map, Value, json};
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// callgrind is a part of it.
const VALGRIND: Tool = Tool { what: "valgrind", package: "valgrind", probe: &["valgrind", "--version"] };

/// Counted calls in one run of a case: `CALLS` of the program.
const CALLS: u64 = 10;

/// The one function whose instructions count, in callgrind's wildcards.
const COUNTED: &str = "--toggle-collect=*counted_call*";

/// What another compiler may change without anybody's fault. Beyond that somebody should know.
const TOLERANCE_PERCENT_OF_ANOTHER_RUSTC: f64 = 10.0;

/// What any case may take more. Which short functions are inlined changes with other code of their crate: a change
/// elsewhere has moved 28 instructions of a call.
const TOLERANCE_INSTRUCTIONS: u64 = 40;

#[derive(clap::Args, Default)]
/// What may be asked of the count.
pub struct Options {
    /// Write what was counted to benches/instructions.json instead of comparing
    #[arg(long)]
    write: bool,
}

/// Counts, and compares or writes.
///
/// # Errors
/// A count is not what it should be; the table says which.
pub fn run(options: &Options) -> Result<()> {
    let mut report = Report::new("instructions");
    let outcome = steps(options, &mut report);
    report.close(outcome)
}

/// The steps, for a report of their own or as part of a longer one.
///
/// # Errors
/// See [`run`].
pub fn steps(options: &Options, report: &mut Report) -> Result<()> {
    report.step("instructions: compile", Budget::minutes(6.0), |limit| {
        process::run(workspace::release(&["--bin", "instructions"]), limit)
    })?;
    report.step("instructions", Budget::minutes(2.0), |limit| {
        system::ensure(&[VALGRIND])?;
        let file = root().join("benches/instructions.json");
        let rustc = lines(rustc(), limit)?.concat();
        let mut expected = Expected::read(&file)?;
        let counted = count_all(limit)?;
        if options.write {
            expected.rustc = rustc;
            expected.per_call = counted;
            return expected.write(&file);
        }
        compare(&counted, &expected, &rustc)
    })
}

/// Instructions per call of each case, in the program's order.
type Counts = Vec<(String, u64)>;

fn count_all(limit: Duration) -> Result<Counts> {
    let program = target().join("release/instructions");
    let names = lines(Command::new(&program), limit)?;
    names.into_iter().map(|name| Ok((name.clone(), count(&program, &name, limit)?))).collect()
}

fn count(program: &Path, case: &str, limit: Duration) -> Result<u64> {
    let file = target().join("callgrind.out");
    let mut command = Command::new("valgrind");
    command.args(["--quiet", "--tool=callgrind", COUNTED]);
    command.arg(format!("--callgrind-out-file={}", file.display())).arg(program).arg(case);
    process::run(command, limit)?;
    let text = fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
    match total(&text) {
        Some(total) if total > 0 => Ok(total / CALLS),
        _ => bail!("callgrind has counted nothing for {case}"),
    }
}

/// Reads the line `totals: 1234` of callgrind's file.
fn total(text: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix("totals: ")?.trim().parse().ok())
}

fn rustc() -> Command {
    let mut command = Command::new(std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()));
    command.arg("--version").current_dir(root());
    command
}

fn lines(command: Command, limit: Duration) -> Result<Vec<String>> {
    let words = process::shown(&command);
    let mut lines = Vec::new();
    let status = process::listen(command, Watch::Stdout, limit, &mut |line| lines.push(line.to_owned()))?;
    process::must_succeed(status, &words)?;
    Ok(lines)
}

/// What benches/instructions.json says.
struct Expected {
    /// The compiler whose code was counted.
    rustc: String,
    tolerance_percent: f64,
    per_call: Counts,
}

impl Expected {
    fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        let wrong = || anyhow!("{} is not in order", path.display());
        let json: Value = serde_json::from_str(&text).with_context(wrong)?;
        let per_call = json["per_call"].as_object().with_context(wrong)?;
        let per_call = per_call.iter().map(|(name, count)| Some((name.clone(), count.as_u64()?)));
        Ok(Self {
            rustc: json["rustc"].as_str().with_context(wrong)?.to_owned(),
            tolerance_percent: json["tolerance_percent"].as_f64().with_context(wrong)?,
            per_call: per_call.collect::<Option<_>>().with_context(wrong)?,
        })
    }

    fn write(&self, path: &Path) -> Result<()> {
        let per_call: Map<String, Value> =
            self.per_call.iter().map(|(name, count)| (name.clone(), json!(count))).collect();
        let Self { rustc, tolerance_percent, .. } = self;
        let json = json!({ "rustc": rustc, "tolerance_percent": tolerance_percent, "per_call": per_call });
        fs::write(path, format!("{json:#}\n")).with_context(|| format!("cannot write {}", path.display()))?;
        println!("{} counts are in {}", self.per_call.len(), path.display());
        Ok(())
    }
}

/// Prints the table; fails when a case is missing on either side, or takes more than the tolerance allows.
fn compare(counted: &Counts, expected: &Expected, rustc: &str) -> Result<()> {
    let tolerance_percent = if rustc == expected.rustc {
        expected.tolerance_percent
    } else {
        println!("The expected counts are those of {}, this is {rustc}: more may differ.", expected.rustc);
        TOLERANCE_PERCENT_OF_ANOTHER_RUSTC
    };
    let rows = rows(counted, &expected.per_call, tolerance_percent);
    print!("{}", table(&rows));
    println!("Instructions per call; up to {tolerance_percent} %, or {TOLERANCE_INSTRUCTIONS}, may differ.");
    let wrong = rows.iter().filter(|row| !matches!(row.verdict, Verdict::Ok | Verdict::Faster)).count();
    if wrong > 0 {
        bail!(
            "{wrong} counts are not as expected; if they should be as they are: cargo xtask instructions --write"
        );
    }
    Ok(())
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Ok,
    Slower,
    /// Good news that the file should hold, or the next loss goes unnoticed. No failure.
    Faster,
    NotExpected,
    /// By this CPU, or no longer.
    NotCounted,
}

struct Row {
    name: String,
    counted: Option<u64>,
    expected: Option<u64>,
    verdict: Verdict,
}

impl Row {
    fn new(name: &str, counted: Option<u64>, expected: Option<u64>, tolerance_percent: f64) -> Self {
        let verdict = match (counted, expected) {
            (None, _) => Verdict::NotCounted,
            (_, None) => Verdict::NotExpected,
            (Some(counted), Some(expected)) if counted.abs_diff(expected) <= TOLERANCE_INSTRUCTIONS => {
                Verdict::Ok
            }
            (Some(counted), Some(expected)) => match difference_percent(counted, expected) {
                more if more > tolerance_percent => Verdict::Slower,
                less if less < -tolerance_percent => Verdict::Faster,
                _ => Verdict::Ok,
            },
        };
        Self { name: name.to_owned(), counted, expected, verdict }
    }
}

fn difference_percent(counted: u64, expected: u64) -> f64 {
    (counted as f64 - expected as f64) * 100.0 / expected as f64
}

fn rows(counted: &Counts, expected: &Counts, tolerance_percent: f64) -> Vec<Row> {
    let find = |counts: &Counts, wanted: &str| {
        counts.iter().find(|(name, _)| name == wanted).map(|&(_, count)| count)
    };
    let new = |name: &String| Row::new(name, find(counted, name), find(expected, name), tolerance_percent);
    let gone = expected.iter().filter(|(name, _)| find(counted, name).is_none());
    counted.iter().chain(gone).map(|(name, _)| new(name)).collect()
}

fn table(rows: &[Row]) -> String {
    let width = rows.iter().map(|row| row.name.len()).max().unwrap_or(0);
    let mut table = format!("{:<width$}  {:>10}  {:>10}  difference\n", "case", "counted", "expected");
    for Row { name, counted, expected, verdict } in rows {
        let shown = |count: &Option<u64>| count.map_or("-".to_owned(), |count| count.to_string());
        let difference =
            counted.zip(*expected).map(|(counted, expected)| difference_percent(counted, expected));
        let difference = difference.map_or("-".to_owned(), |percent| format!("{percent:+.2} %"));
        let verdict = match verdict {
            Verdict::Ok => "ok",
            Verdict::Slower => "MORE",
            Verdict::Faster => "LESS: write it down",
            Verdict::NotExpected => "NEW: write it down",
            Verdict::NotCounted => "NOT COUNTED",
        };
        let (counted, expected) = (shown(counted), shown(expected));
        table += &format!("{name:<width$}  {counted:>10}  {expected:>10}  {difference:>10}  {verdict}\n");
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(counts: &[(&str, u64)]) -> Counts {
        counts.iter().map(|&(name, count)| (name.to_owned(), count)).collect()
    }

    #[test]
    fn more_and_less_than_the_tolerance_and_what_is_missing_are_told() {
        let counted = counts(&[
            ("same", 10_000),
            ("near", 10_200),
            ("more", 10_300),
            ("less", 9700),
            ("few more", 140),
            ("many more", 141),
            ("new", 1),
        ]);
        let expected = counts(&[
            ("few more", 100),
            ("gone", 5),
            ("less", 10_000),
            ("many more", 100),
            ("more", 10_000),
            ("near", 10_000),
            ("same", 10_000),
        ]);
        let rows = rows(&counted, &expected, 2.0);
        let verdicts: Vec<_> = rows.iter().map(|row| (row.name.as_str(), row.verdict)).collect();
        use Verdict::{Faster, NotCounted, NotExpected, Ok, Slower};
        let wanted = [
            ("same", Ok),
            ("near", Ok),
            ("more", Slower),
            ("less", Faster),
            ("few more", Ok),
            ("many more", Slower),
            ("new", NotExpected),
            ("gone", NotCounted),
        ];
        assert_eq!(verdicts, wanted);
        assert!(
            table(&rows).contains("more            10300       10000     +3.00 %  MORE\n"),
            "{}",
            table(&rows)
        );
    }

    #[test]
    fn counts_of_another_compiler_may_differ_by_more() {
        let expected =
            Expected { rustc: "1".to_owned(), tolerance_percent: 2.0, per_call: counts(&[("a", 10_000)]) };
        assert!(compare(&counts(&[("a", 10_500)]), &expected, "1").is_err());
        assert!(compare(&counts(&[("a", 10_500)]), &expected, "2").is_ok());
        assert!(compare(&counts(&[("a", 11_100)]), &expected, "2").is_err());
        assert!(compare(&counts(&[("a", 9_000)]), &expected, "1").is_ok(), "fewer are no failure");
    }

    #[test]
    fn callgrinds_total_is_read() {
        assert_eq!(total("version: 1\nevents: Ir\nfn=(1) a\n0 7\n\ntotals: 1234\n"), Some(1234));
        assert_eq!(total("events: Ir\n"), None);
    }
}
