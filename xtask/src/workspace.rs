//! Where things are in this workspace.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

/// The folder with the workspace's Cargo.toml.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask is a folder of the workspace")
}

/// Cargo's target folder.
pub fn target() -> PathBuf {
    match env::var_os("CARGO_TARGET_DIR") {
        Some(folder) => root().join(folder),
        None => root().join("target"),
    }
}

/// The files below `folders` whose name ends with `.extension`, relative to the root, sorted. Build outputs and hidden
/// folders are left out. A folder that does not exist holds no files.
pub fn files(folders: &[&str], extension: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for folder in folders {
        collect(&root().join(folder), extension, &mut found);
    }
    found.sort();
    found
}

fn collect(folder: &Path, extension: &str, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let (path, name) = (entry.path(), entry.file_name());
        let is_hidden = name.to_string_lossy().starts_with('.');
        match entry.file_type() {
            Ok(kind) if kind.is_dir() && !is_hidden && name != "target" => collect(&path, extension, found),
            Ok(kind) if kind.is_file() && path.extension().is_some_and(|e| e == extension) => {
                found.push(path.strip_prefix(root()).expect("the walk began at the root").to_owned());
            }
            _ => {}
        }
    }
}
