//! `unsafe` occurs only in the files that ARCHITECTURE.md lists, and the list names no other file.
//!
//! The list stands between two comment lines; each of its lines begins with a path in backticks:
//! `<!-- unsafe: begin -->`, then ``- `crates/x/src/y.rs`: why``, then `<!-- unsafe: end -->`.

use super::Text;
use super::lex::{code_only, is_word};

const BEGIN: &str = "<!-- unsafe: begin -->";
const END: &str = "<!-- unsafe: end -->";

pub fn complaints(sources: &[Text], architecture: &str) -> Vec<String> {
    let Some(listed) = listed_files(architecture) else {
        return vec![format!("ARCHITECTURE.md has no list between `{BEGIN}` and `{END}`")];
    };
    let mut complaints = Vec::new();
    for Text { path, text } in sources {
        let is_listed = listed.contains(&path.as_str());
        match first_unsafe_line(text) {
            Some(line) if !is_listed => {
                complaints
                    .push(format!("{path}:{line}: `unsafe` in a file that ARCHITECTURE.md does not list"));
            }
            None if is_listed => {
                complaints.push(format!("ARCHITECTURE.md lists {path}, which has no `unsafe`"))
            }
            _ => {}
        }
    }
    let is_missing = |path: &&&str| !sources.iter().any(|source| source.path == **path);
    complaints.extend(
        listed.iter().filter(is_missing).map(|path| format!("ARCHITECTURE.md lists {path}: no such file")),
    );
    complaints
}

/// The first backticked word of each line of the list.
fn listed_files(architecture: &str) -> Option<Vec<&str>> {
    let (_, after) = architecture.split_once(BEGIN)?;
    let (list, _) = after.split_once(END)?;
    Some(list.lines().filter_map(|line| line.split('`').nth(1)).collect())
}

fn first_unsafe_line(source: &str) -> Option<usize> {
    let code = code_only(source);
    let has_unsafe = |line: &str| line.split(|c| !is_word(c)).any(|word| word == "unsafe");
    code.lines().position(has_unsafe).map(|line| line + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(path: &str, text: &str) -> Text {
        Text { path: path.to_owned(), text: text.to_owned() }
    }

    const LIST: &str =
        "# Code map\n<!-- unsafe: begin -->\n- `a.rs`: reads `memory`\n<!-- unsafe: end -->\n- `b.rs`\n";

    #[test]
    fn the_list_and_the_sources_agree() {
        let sources = [source("a.rs", "unsafe fn f() {}"), source("b.rs", "// unsafe\nfn unsafe_free() {}")];
        assert_eq!(complaints(&sources, LIST), [""; 0]);
    }

    #[test]
    fn an_unlisted_block_is_found_with_its_line() {
        let sources = [source("a.rs", "unsafe {}"), source("b.rs", "\n#[unsafe(no_mangle)]\nfn f() {}")];
        assert_eq!(
            complaints(&sources, LIST),
            ["b.rs:2: `unsafe` in a file that ARCHITECTURE.md does not list"]
        );
    }

    #[test]
    fn the_list_names_no_file_without_need() {
        assert_eq!(
            complaints(&[source("a.rs", "")], LIST),
            ["ARCHITECTURE.md lists a.rs, which has no `unsafe`"]
        );
        assert_eq!(complaints(&[], LIST), ["ARCHITECTURE.md lists a.rs: no such file"]);
        assert_eq!(complaints(&[], "no markers").len(), 1);
    }
}
