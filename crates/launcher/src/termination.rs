//! The termination message: one line for whoever looks at the pod, not at its log.
//!
//! Kubernetes makes the file before the container starts and shows its first 4 KiB as the reason of its end. Where there is no such file
//! nobody looks.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::Path;

use serde::Serialize;

/// Kubernetes's default terminationMessagePath.
pub const FILE: &str = "/dev/termination-log";

/// Of the cause and of the message, in characters: with six bytes each (an escape) they stay below Kubernetes's limit.
const LONGEST: usize = 300;

/// Why the job has ended.
#[derive(Debug, Serialize)]
pub struct Message {
    /// `rank 2 on node 1 was killed by signal 9 (SIGKILL)`.
    pub cause: String,
    /// What the rank itself has said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// The launcher's exit code.
    pub exit_code: u8,
    /// This machine's number.
    pub node: u32,
    /// How often the job had started again.
    pub restarts: u32,
}

/// Writes the message to `file` if there is one.
pub fn write(file: &Path, message: &Message) {
    let Ok(mut opened) = OpenOptions::new().write(true).truncate(true).open(file) else { return };
    if let Err(e) = opened.write_all(line(message).as_bytes()) {
        tracing::warn!(file = %file.display(), error = %e, "cannot write the termination message");
    }
}

fn line(message: &Message) -> String {
    let short = |text: &String| text.chars().take(LONGEST).collect::<String>();
    let message =
        Message { cause: short(&message.cause), message: message.message.as_ref().map(short), ..*message };
    serde_json::to_string(&message).expect("strings and numbers") + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(cause: &str, message: Option<String>) -> Message {
        Message { cause: cause.to_owned(), message, exit_code: 137, node: 1, restarts: 2 }
    }

    #[test]
    fn the_message_is_one_line_and_fits() {
        let text = line(&message("rank 2 was killed", Some("line\nline".to_owned())));
        let expected =
            r#"{"cause":"rank 2 was killed","message":"line\nline","exit_code":137,"node":1,"restarts":2}"#;
        assert_eq!(text, format!("{expected}\n"));
        let long = line(&message(&"\u{1f984}".repeat(5000), Some("\u{1f984}".repeat(5000))));
        assert!(long.len() < 4096 && long.matches('\n').count() == 1, "{}", long.len());
    }

    #[test]
    fn only_a_file_that_is_there_is_written() {
        let folder = tempfile::tempdir().expect("a temporary directory");
        let file = folder.path().join("termination-log");
        write(&file, &message("x", None));
        assert!(!file.exists());
        std::fs::write(&file, "old and much longer than what follows".repeat(9)).expect("written");
        write(&file, &message("x", None));
        let found = std::fs::read_to_string(&file).expect("read");
        assert_eq!(found, "{\"cause\":\"x\",\"exit_code\":137,\"node\":1,\"restarts\":2}\n");
    }
}
