//! A run is a list of steps. Each has a budget, and the run ends with a table of what was done and how long it took.

use anyhow::{Context, Result};
use std::time::{Duration, Instant};

/// A step that takes this many times its budget is stopped: it hangs. Below that a slow machine gets the benefit of the
/// doubt, and the table says by how much the budget was missed.
const PATIENCE: u32 = 3;

/// How long a step may take.
#[derive(Clone, Copy)]
pub struct Budget {
    minutes: f64,
}

impl Budget {
    /// `minutes` on a machine with 2 cores, from nothing compiled unless the step says otherwise.
    pub fn minutes(minutes: f64) -> Self {
        Self { minutes }
    }

    /// When the step is stopped.
    pub fn limit(self) -> Duration {
        Duration::from_secs_f64(self.minutes * 60.0) * PATIENCE
    }
}

/// What was done so far, in order.
pub struct Report {
    title: &'static str,
    rows: Vec<Row>,
}

struct Row {
    name: String,
    took: Duration,
    budget: Budget,
    ok: bool,
}

impl Report {
    pub fn new(title: &'static str) -> Self {
        Self { title, rows: Vec::new() }
    }

    /// Does one step and notes how it went. `work` is told when it has to be done.
    ///
    /// # Errors
    /// The step failed; the error says which one.
    pub fn step(
        &mut self,
        name: &str,
        budget: Budget,
        work: impl FnOnce(Duration) -> Result<()>,
    ) -> Result<()> {
        println!("\n=== {name} (budget {} min)", budget.minutes);
        let start = Instant::now();
        let outcome = work(budget.limit());
        self.note(name, start.elapsed(), budget, outcome.is_ok());
        outcome.with_context(|| format!("step `{name}` failed"))
    }

    /// Notes something that was timed elsewhere.
    pub fn note(&mut self, name: &str, took: Duration, budget: Budget, ok: bool) {
        self.rows.push(Row { name: name.to_owned(), took, budget, ok });
    }

    /// Prints the table and passes the outcome on.
    ///
    /// # Errors
    /// `outcome`, unchanged.
    pub fn close<T>(self, outcome: Result<T>) -> Result<T> {
        print!("\n{}", self.table());
        outcome
    }

    fn table(&self) -> String {
        let width =
            self.rows.iter().map(|row| row.name.chars().count()).max().unwrap_or(0).max(self.title.len());
        let mut table = format!("{:<width$}  {:>8}  {:>7}\n", self.title, "minutes", "budget");
        for Row { name, took, budget, ok } in &self.rows {
            let minutes = took.as_secs_f64() / 60.0;
            let verdict = match ok {
                false => "FAILED",
                true if minutes > budget.minutes => "over budget",
                true => "ok",
            };
            table += &format!("{name:<width$}  {minutes:>8.2}  {:>7}  {verdict}\n", budget.minutes);
        }
        table
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::bail;

    #[test]
    fn the_table_tells_slow_from_failed() {
        let mut report = Report::new("what");
        report.note("a quick one", Duration::from_secs(6), Budget::minutes(1.0), true);
        report.note("a slow one", Duration::from_secs(90), Budget::minutes(1.0), true);
        let failed = report.step("a bad one", Budget::minutes(0.5), |_| bail!("no such thing"));
        assert_eq!(format!("{:#}", failed.unwrap_err()), "step `a bad one` failed: no such thing");
        let expected = "what          minutes   budget\n\
                        a quick one      0.10        1  ok\n\
                        a slow one       1.50        1  over budget\n\
                        a bad one        0.00      0.5  FAILED\n";
        assert_eq!(report.table(), expected);
    }
}
