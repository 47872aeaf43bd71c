//! Relative links in the documents lead to files that exist and to headings that they have.

use super::Text;

/// `exists` says whether there is a file or folder at a path from the workspace's root.
pub fn complaints(documents: &[Text], exists: impl Fn(&str) -> bool) -> Vec<String> {
    let mut complaints = Vec::new();
    for document in documents {
        for target in targets(&document.text).into_iter().filter(|target| is_relative(target)) {
            let (file, anchor) = target.split_once('#').unwrap_or((&target, ""));
            let path = if file.is_empty() { document.path.clone() } else { resolve(&document.path, file) };
            if !exists(&path) {
                complaints.push(format!("{}: link to {target}: no such file", document.path));
                continue;
            }
            let headings =
                documents.iter().find(|other| other.path == path).map(|other| headings(&other.text));
            if let Some(headings) =
                headings.filter(|headings| !anchor.is_empty() && !headings.iter().any(|h| h == anchor))
            {
                let known = headings.join(", ");
                complaints
                    .push(format!("{}: link to {target}: no such heading among {known}", document.path));
            }
        }
    }
    complaints
}

/// The targets of `[text](target)`, `[text](target "title")` and `[label]: target`.
fn targets(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    for line in prose_lines(text) {
        let pieces = line.match_indices("](").map(|(at, opening)| &line[at + opening.len()..]);
        let inline = pieces.filter_map(|rest| rest.split([')', ' ']).next());
        let definition = line.trim_start().strip_prefix('[').and_then(|rest| rest.split_once("]: "));
        let definition = definition.and_then(|(_, target)| target.split_whitespace().next());
        found.extend(inline.chain(definition).filter(|target| !target.is_empty()).map(str::to_owned));
    }
    found
}

/// The lines outside of fenced code, without their `inline code`.
fn prose_lines(text: &str) -> impl Iterator<Item = String> {
    let mut in_code = false;
    let is_prose = move |line: &&str| {
        let is_fence = line.trim_start().starts_with("```");
        in_code ^= is_fence;
        !in_code && !is_fence
    };
    text.lines().filter(is_prose).map(|line| line.split('`').step_by(2).collect())
}

fn is_relative(target: &str) -> bool {
    !target.contains("://") && !target.starts_with("mailto:")
}

/// `../b.md` seen from `docs/a.md` is `b.md`.
fn resolve(from: &str, target: &str) -> String {
    let mut folders: Vec<&str> = from.split('/').collect();
    folders.pop();
    for part in target.split('/') {
        match part {
            "" | "." => {}
            // Beyond the root the path keeps its "..": no document of ours is there.
            ".." if folders.last().is_some_and(|last| *last != "..") => {
                folders.pop();
            }
            part => folders.push(part),
        }
    }
    folders.join("/")
}

/// The anchors that GitHub makes of a document's headings.
fn headings(text: &str) -> Vec<String> {
    let mut in_code = false;
    let lines = text.lines().filter(|line| {
        in_code ^= line.starts_with("```");
        !in_code && line.starts_with('#')
    });
    lines.map(|line| anchor(line.trim_start_matches('#').trim())).collect()
}

fn anchor(heading: &str) -> String {
    let kept = heading.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
    kept.collect::<String>().to_lowercase().replace(' ', "-")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn document(path: &str, text: &str) -> Text {
        Text { path: path.to_owned(), text: text.to_owned() }
    }

    #[test]
    fn links_are_seen_from_their_document() {
        let documents = [
            document(
                "README.md",
                "[a](docs/a.md#two-words) [b](docs/) [w](https://x.y/z) [c](#top)\n# Top\n",
            ),
            document(
                "docs/a.md",
                "# `Two` words!\n[up](../README.md) [gone](README.md)\n[label]: ../gone.md\n",
            ),
        ];
        let exists = |path: &str| ["README.md", "docs/a.md", "docs"].contains(&path);
        let expected =
            ["docs/a.md: link to README.md: no such file", "docs/a.md: link to ../gone.md: no such file"];
        assert_eq!(complaints(&documents, exists), expected);
    }

    #[test]
    fn a_heading_that_was_renamed_is_found() {
        let documents = [document("a.md", "# New\n[x](a.md#old)")];
        assert_eq!(complaints(&documents, |_| true), ["a.md: link to a.md#old: no such heading among new"]);
    }

    #[test]
    fn code_has_no_links() {
        assert_eq!(targets("`[a](b)` x\n```\n[c](d)\n```\n[e](f \"title\")"), ["f"]);
    }
}
