//! Every environment variable of ours that the sources name is in docs/configuration.md, and the reverse.

use super::Text;
use std::collections::{BTreeMap, BTreeSet};

const PREFIX: &str = "PACELINE_";
const DOCUMENT: &str = "docs/configuration.md";

pub fn complaints(sources: &[Text], configuration: &str) -> Vec<String> {
    let mut used = BTreeMap::new();
    for Text { path, text } in sources {
        for name in names(text, PREFIX) {
            used.entry(name).or_insert(path);
        }
    }
    let documented = names(configuration, PREFIX);
    let missing = used.iter().filter(|(name, _)| !documented.contains(*name));
    let stale = documented.iter().filter(|name| !used.contains_key(*name));
    missing
        .map(|(name, path)| format!("{path}: {name} is not in {DOCUMENT}"))
        .chain(stale.map(|name| format!("{DOCUMENT}: no source names {name}")))
        .collect()
}

/// The names that begin with `prefix`. A prefix alone (as in "all variables begin with …") names nothing.
fn names<'a>(text: &'a str, prefix: &str) -> BTreeSet<&'a str> {
    let is_name = |c: char| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_';
    let words = text.split(|c| !is_name(c));
    words.filter(|word| word.starts_with(prefix) && !word.ends_with('_')).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_whole_words() {
        let text = "env(\"OURS_PORT\"), OURS_* and OURS_, YOURS_PORT, `OURS_LINK_GRACE_MS`; OURS_PORT again";
        assert_eq!(Vec::from_iter(names(text, "OURS_")), ["OURS_LINK_GRACE_MS", "OURS_PORT"]);
    }

    #[test]
    fn the_sources_and_the_document_agree() {
        // Put together here, because this file is one of the sources that are checked.
        let [one, two] = ["ONE", "TWO"].map(|name| format!("{PREFIX}{name}"));
        let sources = [Text { path: "a.rs".to_owned(), text: format!("var(\"{one}\")") }];
        assert_eq!(complaints(&sources, &format!("| `{one}` |")), [""; 0]);
        let both =
            [format!("a.rs: {one} is not in {DOCUMENT}"), format!("{DOCUMENT}: no source names {two}")];
        assert_eq!(complaints(&sources, &two), both);
    }
}
