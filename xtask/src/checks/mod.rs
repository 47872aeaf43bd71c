//! Checks of the source tree that no compiler makes. Each is a pure function from texts to complaints.

mod lex;
mod links;
mod unsafe_code;
mod variables;

use crate::workspace::{files, root};
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::Path;

/// Our own Rust sources.
const SOURCES: [&str; 4] = ["crates", "examples", "benches", "xtask"];

/// Runs all checks on this workspace.
///
/// # Errors
/// One line for each complaint.
pub fn run() -> Result<()> {
    let sources = read_all(&SOURCES, "rs")?;
    let documents = read_all(&["."], "md")?;
    let architecture = document("ARCHITECTURE.md")?;
    let configuration = document("docs/configuration.md")?;
    let mut complaints = unsafe_code::complaints(&sources, &architecture);
    complaints.extend(links::complaints(&documents, |path| root().join(path).exists()));
    complaints.extend(variables::complaints(&sources, &configuration));
    if !complaints.is_empty() {
        bail!("{} complaints\n{}", complaints.len(), complaints.join("\n"));
    }
    println!("{} source files and {} documents are in order", sources.len(), documents.len());
    Ok(())
}

/// A file's path from the workspace's root, with forward slashes, and its text.
struct Text {
    path: String,
    text: String,
}

fn read_all(folders: &[&str], extension: &str) -> Result<Vec<Text>> {
    let read = |path: &Path| {
        let text = fs::read_to_string(root().join(path))
            .with_context(|| format!("cannot read {}", path.display()))?;
        let path = path.to_string_lossy().trim_start_matches("./").to_owned();
        Ok(Text { path, text })
    };
    files(folders, extension).iter().map(|path| read(path)).collect()
}

fn document(path: &str) -> Result<String> {
    fs::read_to_string(root().join(path)).with_context(|| format!("cannot read {path}"))
}
