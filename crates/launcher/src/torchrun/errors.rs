//! Error files: what a worker under `torch.distributed.elastic.multiprocessing.errors.record` writes when it fails.
//!
//! ```json
//! {"message": {"message": "ValueError: no", "extraInfo": {"py_callstack": "Traceback …", "timestamp": "1700000000"}}}
//! ```
//! What a worker writes there is its own affair: it is read with a limit, and shown if it is text.

use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

use serde_json::Value;

/// No traceback is longer.
const LIMIT: u64 = 1024 * 1024;

/// Why a worker failed, in its own words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recorded {
    /// One line: `ValueError: no`.
    pub summary: String,
    /// The call stack, if there is one.
    pub stack: Option<String>,
}

/// What the worker has written to `file`, if that is an error file.
pub fn read(file: &Path) -> Option<Recorded> {
    let message = content(file)?.get("message")?.clone();
    if let Value::String(text) = message {
        return Some(Recorded { summary: first_line(&text), stack: None });
    }
    let text = |value: Option<&Value>| value.and_then(Value::as_str).map(str::to_owned);
    let stack = text(message.get("extraInfo").and_then(|info| info.get("py_callstack")));
    let summary = text(message.get("message")).or_else(|| stack.clone())?;
    Some(Recorded { summary: first_line(&summary), stack })
}

/// Writes what is in `file` to `own`, the error file of the launcher itself, with the exit code, as torchrun
/// does for whoever has started it. Nothing is written if there is nothing.
pub fn pass_on(file: &Path, own: &Path, exit_code: i32) {
    let Some(mut content) = content(file) else { return };
    if let Some(message) = content.get_mut("message").and_then(Value::as_object_mut) {
        message.insert("errorCode".to_owned(), exit_code.into());
    }
    if let Err(e) = fs::write(own, content.to_string()) {
        tracing::warn!(file = %own.display(), error = %e, "cannot write the error file");
    }
}

fn content(file: &Path) -> Option<Value> {
    let mut bytes = Vec::new();
    File::open(file).ok()?.take(LIMIT).read_to_end(&mut bytes).ok()?;
    serde_json::from_slice(&bytes).ok()
}

fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(text: &str) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().expect("a temporary file");
        fs::write(file.path(), text).expect("written");
        file
    }

    const ERROR: &str = r#"{"message": {"message": "ValueError: no\nmore", "extraInfo": {"py_callstack": "Traceback\n  x", "timestamp": "1"}}}"#;

    #[test]
    fn both_forms_of_an_error_file_are_read() {
        let read = |text: &str| read(written(text).path()).map(|recorded| (recorded.summary, recorded.stack));
        assert_eq!(read(ERROR), Some(("ValueError: no".to_owned(), Some("Traceback\n  x".to_owned()))));
        assert_eq!(read(r#"{"message": "short", "timestamp": 1}"#), Some(("short".to_owned(), None)));
        for text in ["", "[]", "{}", r#"{"message": 7}"#, "\u{0}", r#"{"message": {"extraInfo": []}}"#] {
            assert_eq!(read(text), None, "{text:?}");
        }
        assert_eq!(super::read(Path::new("")), None);
    }

    #[test]
    fn an_error_is_passed_on_with_the_exit_code() {
        let (file, own) = (written(ERROR), written("old"));
        pass_on(file.path(), own.path(), -9);
        let content = content(own.path()).expect("json");
        assert_eq!(content["message"]["errorCode"], -9);
        assert_eq!(content["message"]["extraInfo"]["timestamp"], "1");
        pass_on(Path::new("/nonexistent"), own.path(), 1);
        assert_eq!(super::content(own.path()), Some(content), "there was nothing to write");
    }
}
