//! The system's own tools, whose complaints become one line.

use std::process::{Command, Stdio};

use crate::Error;

/// Runs a command of words and returns what it printed.
///
/// # Errors
/// [`Error::Command`] with the first line of its complaint.
pub(crate) fn run(line: &str) -> Result<String, Error> {
    let failed = |reason: String| Error::Command { words: line.to_owned(), reason };
    let mut words = line.split_whitespace();
    let program = words.next().ok_or_else(|| failed("no command".to_owned()))?;
    let output = Command::new(program).args(words).stdin(Stdio::null()).output();
    let output = output.map_err(|error| failed(error.to_string()))?;
    if !output.status.success() {
        let complaint = String::from_utf8_lossy(&output.stderr);
        let first = complaint.lines().find(|line| !line.trim().is_empty());
        return Err(failed(first.map_or_else(|| output.status.to_string(), |line| line.trim().to_owned())));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_that_fails_is_one_line() {
        let error = run("ls --no-such-flag").expect_err("there is no such flag").to_string();
        assert!(error.starts_with("`ls --no-such-flag`: ") && error.lines().count() == 1, "{error}");
        assert!(run("no-such-program-as-this").is_err());
        assert_eq!(run("echo one two").as_deref(), Ok("one two\n"));
    }
}
