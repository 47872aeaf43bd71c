//! Just enough of Rust's grammar to tell code from comments and literals.

/// The source with comments and the contents of string and character literals replaced by spaces; line breaks stay.
pub fn code_only(source: &str) -> String {
    let mut code = String::with_capacity(source.len());
    let mut rest = source;
    let mut previous = ' ';
    while let Some(c) = rest.chars().next() {
        let skipped = skipped_len(rest, previous);
        let taken = skipped.unwrap_or(c.len_utf8());
        let (token, after) = rest.split_at(taken);
        match skipped {
            Some(_) => code.extend(token.chars().map(|c| if c == '\n' { '\n' } else { ' ' })),
            None => code.push(c),
        }
        previous = token.chars().next_back().unwrap_or(' ');
        rest = after;
    }
    code
}

/// The length in bytes of the comment or literal that `rest` begins with.
fn skipped_len(rest: &str, previous: char) -> Option<usize> {
    let first = rest.chars().next()?;
    match first {
        '/' if rest.starts_with("//") => Some(rest.find('\n').unwrap_or(rest.len())),
        '/' if rest.starts_with("/*") => Some(block_comment_len(rest)),
        '"' => Some(quoted_len(rest, '"')),
        '\'' => character_len(rest),
        // r"…", br#"…"#, cr"…": the prefix is a word of its own, not the end of another one
        'r' | 'b' | 'c' if !is_word(previous) => raw_string_len(rest),
        _ => None,
    }
}

fn block_comment_len(rest: &str) -> usize {
    let (mut depth, mut at) = (0, 0);
    while at < rest.len() {
        let step = match rest.as_bytes()[at..] {
            [b'/', b'*', ..] => {
                depth += 1;
                2
            }
            [b'*', b'/', ..] => {
                depth -= 1;
                2
            }
            _ => 1,
        };
        at += step;
        if depth == 0 {
            return at;
        }
    }
    rest.len()
}

/// From an opening quote to behind the closing one; a backslash hides the next character.
fn quoted_len(rest: &str, quote: char) -> usize {
    let mut hidden = false;
    for (at, c) in rest.char_indices().skip(1) {
        match c {
            _ if hidden => hidden = false,
            '\\' => hidden = true,
            c if c == quote => return at + c.len_utf8(),
            _ => {}
        }
    }
    rest.len()
}

/// `'x'` and `'\n'` are characters, `'a` is a lifetime.
fn character_len(rest: &str) -> Option<usize> {
    let mut characters = rest.chars().skip(1);
    let first = characters.next()?;
    (first == '\\' || characters.next() == Some('\'')).then(|| quoted_len(rest, '\''))
}

fn raw_string_len(rest: &str) -> Option<usize> {
    let after_prefix = ["br", "cr", "r"].iter().find_map(|prefix| rest.strip_prefix(prefix))?;
    let hashes = after_prefix.len() - after_prefix.trim_start_matches('#').len();
    let body = after_prefix[hashes..].strip_prefix('"')?;
    let end = format!("\"{}", "#".repeat(hashes));
    let body_len = body.find(&end).map_or(body.len(), |at| at + end.len());
    Some(rest.len() - body.len() + body_len)
}

/// Is this a character of names and keywords?
pub fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(source: &str) -> Vec<String> {
        let code = code_only(source);
        code.split(|c| !is_word(c)).filter(|word| !word.is_empty()).map(str::to_owned).collect()
    }

    #[test]
    fn comments_and_literals_are_no_code() {
        assert_eq!(words("a // b\nc"), ["a", "c"]);
        assert_eq!(words("a /* b /* c */ d */ e"), ["a", "e"]);
        assert_eq!(words(r#"a "b \" c" d"#), ["a", "d"]);
        assert_eq!(words(r##"a r#"b " c"# d br"e\" f"##), ["a", "d", "f"]);
        assert_eq!(words("a b\"c\" d"), ["a", "b", "d"]);
        assert_eq!(words(r"a 'b' '\'' '\\' c"), ["a", "c"]);
        assert_eq!(words("f<'a>(x: &'a str, y: '_)"), ["f", "a", "x", "a", "str", "y", "_"]);
        assert_eq!(words("bar\"x\" r#match"), ["bar", "r", "match"]);
        assert_eq!(words("/* never closed"), [""; 0]);
        assert_eq!(words("\"ü\" ü '→' z"), ["ü", "z"]);
    }

    #[test]
    fn line_numbers_stay() {
        let source = "a\n/* b\n c */ \"d\ne\"\nf";
        assert_eq!(code_only(source).lines().count(), source.lines().count());
    }
}
