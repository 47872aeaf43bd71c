//! What was found, and how it is printed.

use std::fmt;

use serde_json::{Value, json};

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// As it should be.
    Ok,
    /// A job runs, but not as well as it could, or not in all cases.
    Warning,
    /// A job will not run.
    Failed,
}

/// One line of the report.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// What was examined.
    pub what: String,
    /// How bad it is.
    pub verdict: Verdict,
    /// What was found.
    pub said: String,
    /// What to do about it.
    pub advice: Option<String>,
}

impl Finding {
    /// As it should be.
    pub fn ok(what: impl Into<String>, said: String) -> Self {
        Self { what: what.into(), verdict: Verdict::Ok, said, advice: None }
    }

    /// Not as well as it could be.
    pub fn warning(what: impl Into<String>, said: String, advice: &str) -> Self {
        Self { what: what.into(), verdict: Verdict::Warning, said, advice: Some(advice.to_owned()) }
    }

    /// Wrong.
    pub fn failed(what: impl Into<String>, said: String, advice: &str) -> Self {
        Self { what: what.into(), verdict: Verdict::Failed, said, advice: Some(advice.to_owned()) }
    }
}

/// A line for each finding, and one that counts them.
pub fn report(findings: &[Finding]) -> String {
    let width = findings.iter().map(|finding| finding.what.len()).max().unwrap_or(0);
    let line = |finding: &Finding| {
        let Finding { what, verdict, said, advice } = finding;
        let advice = advice.as_ref().map(|advice| format!("; {advice}")).unwrap_or_default();
        format!("{verdict:<7}  {what:<width$}  {said}{advice}\n")
    };
    let count = |verdict| findings.iter().filter(|finding| finding.verdict == verdict).count();
    let (warnings, failed) = (count(Verdict::Warning), count(Verdict::Failed));
    let lines: String = findings.iter().map(line).collect();
    format!("{lines}{} examined, {warnings} warnings, {failed} failed\n", findings.len())
}

/// The same as a document.
pub fn as_json(findings: &[Finding]) -> Value {
    let one = |finding: &Finding| {
        let Finding { what, verdict, said, advice } = finding;
        json!({ "what": what, "verdict": verdict.to_string(), "said": said, "advice": advice })
    };
    json!({ "findings": findings.iter().map(one).collect::<Vec<_>>() })
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Verdict::Ok => "ok",
            Verdict::Warning => "warning",
            Verdict::Failed => "failed",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_finding_is_a_line_with_what_to_do() {
        let findings = [
            Finding::ok("open files", "1048576".to_owned()),
            Finding::warning("shared memory", "64 MiB".to_owned(), "mount more"),
        ];
        let expected = "\
ok       open files     1048576
warning  shared memory  64 MiB; mount more
2 examined, 1 warnings, 0 failed
";
        assert_eq!(report(&findings), expected);
        assert_eq!(as_json(&findings)["findings"][1]["verdict"], "warning");
    }
}
