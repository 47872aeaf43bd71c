//! `cargo xtask test`: every test that needs no root, no GPU and no cluster; `cargo xtask root`: those that need root.

use crate::mutant;
use crate::process::{self, Watch, cargo};
use crate::step::{Budget, Report};
use anyhow::{Result, bail};
use std::fmt;
use std::process::{Command, ExitStatus};
use std::time::{Duration, Instant};

/// One suite is one test program (a package's unit tests, or one file below tests/), without its compilation.
const SUITE_MINUTES: f64 = 2.0;

/// All of them together: the promise in CONTRIBUTING.md.
const ALL_SUITES_MINUTES: f64 = 10.0;

/// How many suites that failed are run once more: a machine that many jobs share stops a test for seconds now and then,
/// and more at once are no accident.
const REPEATED: usize = 2;

/// Those that need root: the promise in CONTRIBUTING.md.
const ROOT_MINUTES: f64 = 10.0;

/// Runs the tests.
///
/// # Errors
/// A test fails, or a mutant is not noticed.
pub fn run() -> Result<()> {
    alone("test", steps)
}

/// Does these steps with a report of their own, and says how many tests there were.
///
/// # Errors
/// Those of the steps.
pub fn alone(title: &'static str, steps: impl FnOnce(&mut Report) -> Result<Total>) -> Result<()> {
    let mut report = Report::new(title);
    let outcome = steps(&mut report);
    let total = report.close(outcome)?;
    println!("\n{total}");
    Ok(())
}

/// The tests' steps, for a report of their own or as part of a longer one.
///
/// # Errors
/// See [`run`].
pub fn steps(report: &mut Report) -> Result<Total> {
    report.step("test: compile", Budget::minutes(8.0), |limit| {
        process::run(cargo(&["test", "--workspace", "--locked", "--no-run"]), limit)
    })?;
    // Before the suites: they put the programs that are not broken back in their places.
    mutant::steps(report)?;
    let mut suites = Suites::default();
    let all = report.step("test: all suites", Budget::minutes(ALL_SUITES_MINUTES), |limit| {
        // One run tells about every failure, not only about the first.
        let command = cargo(&["test", "--workspace", "--locked", "--no-fail-fast"]);
        let status =
            process::observe(command, Watch::Both, limit, &mut |line| suites.read(line, Instant::now()))?;
        suites.ended(status)?;
        suites.must_have_run()
    });
    for suite in &suites.finished {
        let name = format!("  {} ({})", suite.name, suite.counts);
        report.note(&name, suite.took, Budget::minutes(SUITE_MINUTES), suite.counts.failed == 0);
    }
    all?;
    suites.repeat(report, &cargo(&[]))?;
    report.step("type-check with tch", Budget::minutes(3.0), |limit| {
        process::run(
            cargo(&["check", "--locked", "--package", "paceline-runtime", "--features", "tch-doc-only"]),
            limit,
        )?;
        let examples = ["--package", "paceline-examples", "--all-targets", "--features", "tch-doc-only"];
        process::run(cargo(&[["check", "--locked"].as_slice(), &examples].concat()), limit)
    })?;
    Ok(Total { counts: suites.counts(), unsteady: suites.failed })
}

/// Runs the tests that need root. Of the whole workspace, as everywhere in CI: with the features of one package alone nearly
/// everything would be compiled once more.
///
/// # Errors
/// A test fails. Where root or namespaces are missing all are skipped, which is said and is no error.
pub fn run_root() -> Result<()> {
    alone("root", root_steps)
}

/// The steps of the tests that need root, for a report of their own or as part of a longer one.
///
/// # Errors
/// See [`run_root`].
pub fn root_steps(report: &mut Report) -> Result<Total> {
    let test =
        ["test", "--locked", "--workspace", "--test", "hosts", "--test", "discovery", "--test", "partitions"];
    report.step("tests that need root: compile", Budget::minutes(4.0), |limit| {
        process::run(cargo(&[test.as_slice(), &["--no-run"]].concat()), limit)
    })?;
    let total = watched(report, "tests that need root", Budget::minutes(ROOT_MINUTES), &|| cargo(&test))?;
    if total.counts.all() == 0 {
        bail!("no test ran, and none was skipped");
    }
    Ok(total)
}

/// One run of suites by themselves, as a step with a row for each; `command` is cargo's for all of them.
///
/// # Errors
/// A test has failed twice.
pub fn watched(
    report: &mut Report,
    name: &str,
    budget: Budget,
    command: &dyn Fn() -> Command,
) -> Result<Total> {
    let mut suites = Suites::default();
    let all = report.step(name, budget, |limit| {
        let status = process::observe(command(), Watch::Both, limit, &mut |line| {
            suites.read(line, Instant::now());
        })?;
        suites.ended(status)
    });
    for suite in &suites.finished {
        let name = format!("  {} ({})", suite.name, suite.counts);
        report.note(&name, suite.took, budget, suite.counts.failed == 0);
    }
    all?;
    suites.repeat(report, &command())?;
    Ok(Total { counts: suites.counts(), unsteady: suites.failed })
}
/// The tests of all suites. Shown as a line of its own that readers of CI logs know.
pub struct Total {
    counts: Counts,
    /// The tests that have failed, and passed when their suites were run once more.
    unsteady: Vec<Failed>,
}

impl Total {
    /// These tests and those.
    pub fn and(mut self, other: Self) -> Self {
        self.counts.add(other.counts);
        self.unsteady.extend(other.unsteady);
        self
    }
}

impl fmt::Display for Total {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for Failed { target, tests } in &self.unsteady {
            let tests = tests.join(", ");
            writeln!(
                f,
                "UNSTEADY: `{target}` has failed ({tests}) and passed when it was run once more: to be mended"
            )?;
        }
        write!(f, "tests: {}", self.counts)
    }
}

/// How many tests ended how.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Counts {
    passed: u64,
    failed: u64,
    skipped: u64,
}

impl Counts {
    fn add(&mut self, more: Self) {
        self.passed += more.passed;
        self.failed += more.failed;
        self.skipped += more.skipped;
    }

    fn all(self) -> u64 {
        self.passed + self.failed + self.skipped
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { passed, failed, skipped } = self;
        write!(f, "{passed} passed, {failed} failed")?;
        if *skipped > 0 { write!(f, ", {skipped} skipped") } else { Ok(()) }
    }
}

/// What cargo's output says about each suite.
#[derive(Default)]
struct Suites {
    running: Option<(String, Instant)>,
    finished: Vec<Suite>,
    /// The tests of the running suite that have failed.
    failing: Vec<String>,
    failed: Vec<Failed>,
}

/// A suite that has failed.
struct Failed {
    /// As cargo is told to run it again, without the package: with that alone, all would be compiled anew.
    target: String,
    tests: Vec<String>,
}

struct Suite {
    name: String,
    took: Duration,
    counts: Counts,
}

impl Suites {
    /// Takes one line that was written at `now`. Suites without a test are left out.
    fn read(&mut self, line: &str, now: Instant) {
        if let Some(name) = suite_name(line) {
            self.close(now);
            self.running = Some((name, now));
        } else if let Some(counts) = test_result(line) {
            let Some((name, start)) = self.running.take().filter(|_| counts.all() > 0) else { return };
            self.finished.push(Suite { name, took: now - start, counts });
        } else if let Some(test) = failed_test(line) {
            self.failing.push(test);
        } else if let Some(target) = failed_target(line) {
            self.failed.push(Failed { target, tests: std::mem::take(&mut self.failing) });
        }
    }

    /// Cargo has ended. That tests have failed is no error yet, where few suites have and may be repeated.
    ///
    /// # Errors
    /// It failed otherwise: a suite has crashed, too many have failed, something did not compile.
    fn ended(&mut self, status: ExitStatus) -> Result<()> {
        self.close(Instant::now());
        let may_be_repeated = (1..=REPEATED).contains(&self.failed.len());
        if may_be_repeated && self.failed.iter().all(|suite| !suite.tests.is_empty()) {
            return Ok(());
        }
        process::must_succeed(status, "cargo test")
    }

    /// Runs the suites that have failed once more, with the environment of the command that ran them, and its words for the tests.
    ///
    /// # Errors
    /// One of them has failed again.
    fn repeat(&mut self, report: &mut Report, first: &Command) -> Result<()> {
        for Failed { target, tests } in &self.failed {
            let name = format!("  {target}, run once more after {}", tests.join(", "));
            let target: Vec<&str> = target.split(' ').collect();
            let arguments = [&["test", "--locked", "--workspace"], &target[..]].concat();
            let mut command = cargo(&arguments);
            command.args(first.get_args().skip_while(|word| *word != "--"));
            for (name, value) in first.get_envs() {
                match value {
                    Some(value) => command.env(name, value),
                    None => command.env_remove(name),
                };
            }
            report.step(&name, Budget::minutes(SUITE_MINUTES), |limit| process::run(command, limit))?;
        }
        for Suite { counts, .. } in &mut self.finished {
            counts.passed += std::mem::take(&mut counts.failed);
        }
        Ok(())
    }

    /// Ends the suite that gave no result: it has crashed, or it has a harness of its own. Cargo's exit code says which.
    fn close(&mut self, now: Instant) {
        if let Some((name, start)) = self.running.take() {
            self.finished.push(Suite { name, took: now - start, counts: Counts::default() });
        }
    }

    fn counts(&self) -> Counts {
        let mut all = Counts::default();
        self.finished.iter().for_each(|suite| all.add(suite.counts));
        all
    }

    fn must_have_run(&self) -> Result<()> {
        if self.counts().passed == 0 {
            bail!("no test ran");
        }
        Ok(())
    }
}

/// Reads `Running unittests src/lib.rs (target/debug/deps/paceline_transport-0a1b)` and `Doc-tests paceline_transport`.
fn suite_name(line: &str) -> Option<String> {
    let line = line.trim_start();
    if let Some(package) = line.strip_prefix("Doc-tests ") {
        return Some(format!("{package}: documentation"));
    }
    let (source, program) = line.strip_prefix("Running ")?.split_once(" (")?;
    let file = program.trim_end_matches(')').rsplit('/').next()?;
    let (crate_name, _) = file.rsplit_once('-')?;
    let source = source.trim_start_matches("unittests ");
    Some(if source.starts_with("tests/") { source.to_owned() } else { format!("{crate_name}: {source}") })
}

/// Reads `test frames::a_test ... FAILED`.
fn failed_test(line: &str) -> Option<String> {
    let name = line.strip_prefix("test ")?.strip_suffix("FAILED")?.trim_end().strip_suffix("...")?;
    Some(name.trim_end().to_owned())
}

/// Reads "error: test failed, to rerun pass `-p paceline-transport --test contract`".
fn failed_target(line: &str) -> Option<String> {
    let (_, arguments) = line.strip_prefix("error: ")?.split_once(", to rerun pass `")?;
    let arguments = arguments.trim_end_matches('`');
    let of_package = arguments.strip_prefix("-p ").and_then(|rest| rest.split_once(' '));
    Some(of_package.map_or(arguments, |(_, target)| target).to_owned())
}

/// Reads `test result: ok. 5 passed; 0 failed; 1 ignored; …`.
fn test_result(line: &str) -> Option<Counts> {
    let (_, counts) = line.strip_prefix("test result: ")?.split_once(". ")?;
    let mut counts = counts.split("; ").map(|count| count.split_once(' '));
    let mut number_of = |what| {
        let (number, name) = counts.next()??;
        number.parse().ok().filter(|_| name == what)
    };
    Some(Counts {
        passed: number_of("passed")?,
        failed: number_of("failed")?,
        skipped: number_of("ignored")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cargos_lines_become_suites_with_times() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut suites = Suites::default();
        suites.read("     Running unittests src/lib.rs (target/debug/deps/paceline_transport-0a1b)", at(0));
        suites.read("test frames::a_test ... ok", at(1));
        suites.read(
            "test result: ok. 5 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 2s",
            at(2),
        );
        suites.read("     Running unittests src/main.rs (target/debug/deps/paceline-77)", at(2));
        suites.read(
            "test result: ok. 0 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0s",
            at(3),
        );
        suites.read("     Running tests/run.rs (target/debug/deps/run-99)", at(3));
        suites.read("     Running tests/data_parallel.rs (target/debug/deps/data_parallel-12)", at(5));
        suites.read("test kills::one   ... FAILED", at(8));
        suites.read("test kills::another ... FAILED", at(8));
        suites.read("test kills::a_third ... ok", at(9));
        suites.read("test result: FAILED. 1 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out", at(9));
        suites.read("error: test failed, to rerun pass `-p paceline --test data_parallel`", at(9));
        suites.read("   Doc-tests paceline_runtime", at(9));
        suites.read("test result: ok. 3 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out", at(10));
        suites.close(at(10));
        let told = |suite: &Suite| format!("{}: {} in {} s", suite.name, suite.counts, suite.took.as_secs());
        let told: Vec<_> = suites.finished.iter().map(told).collect();
        let expected = [
            "paceline_transport: src/lib.rs: 5 passed, 0 failed, 1 skipped in 2 s",
            "tests/run.rs: 0 passed, 0 failed in 2 s",
            "tests/data_parallel.rs: 1 passed, 2 failed in 4 s",
            "paceline_runtime: documentation: 3 passed, 0 failed in 1 s",
        ];
        let total = Total { counts: suites.counts(), unsteady: suites.failed };
        let unsteady = "UNSTEADY: `--test data_parallel` has failed (kills::one, kills::another) and passed when it was run \
                        once more: to be mended";
        assert_eq!(total.to_string(), format!("{unsteady}\ntests: 9 passed, 2 failed, 1 skipped"));
        assert_eq!(told, expected);
    }

    #[test]
    fn few_suites_whose_tests_failed_may_be_repeated_and_nothing_else_is_forgiven() {
        use std::os::unix::process::ExitStatusExt;
        let ended = |lines: &[&str]| {
            let mut suites = Suites::default();
            lines.iter().for_each(|line| suites.read(line, Instant::now()));
            suites.ended(ExitStatus::from_raw(101 << 8))
        };
        let (test, suite) = ("test one ... FAILED", "error: test failed, to rerun pass `-p a --test b`");
        assert!(ended(&[test, suite]).is_ok());
        assert!(ended(&[test, suite, test, suite]).is_ok());
        assert!(ended(&[test, suite, test, suite, test, suite]).is_err(), "too many");
        assert!(ended(&[suite]).is_err(), "it has crashed");
        assert!(ended(&[test, suite, suite]).is_err(), "the second one has crashed");
        assert!(ended(&[]).is_err(), "something else has failed");
    }

    #[test]
    fn a_run_without_a_test_is_an_error() {
        assert!(Suites::default().must_have_run().is_err());
    }
}
