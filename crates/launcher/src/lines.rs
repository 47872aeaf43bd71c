//! Cuts what a rank writes into lines, with bounded memory, and keeps the last of them.
//!
//! Bytes are bytes: nothing here knows about characters, and what is not UTF-8 passes through.

use std::collections::VecDeque;

/// The longest line that is kept together; what is longer is passed on in pieces of this size, each as a line of
/// its own. 64 KiB is one full pipe, so that a program which never ends its line costs no more than one that does.
pub const MAX_LINE_BYTES: usize = 64 * 1024;

/// How many lines a [`Tail`] keeps: a Python traceback usually fits.
const TAIL_LINES: usize = 20;

/// How much of each line a [`Tail`] keeps, so that it takes at most 20 KiB.
const TAIL_LINE_BYTES: usize = 1024;

/// The line that one stream of one rank is in the middle of.
///
/// A carriage return starts the line over, as it does on a terminal, but what it overwrites is replaced as a whole.
/// So of a progress bar only the last state reaches the line, and `\r\n` ends a line like `\n`.
#[derive(Debug, Default)]
pub struct Lines {
    /// What the line shows so far.
    shown: Vec<u8>,
    /// A carriage return was the last thing seen: the next byte that shows anything replaces `shown`.
    starts_over: bool,
    /// A carriage return was seen on this line.
    in_place: bool,
}

impl Lines {
    /// Takes the next `bytes` and calls `line` with each line that they complete, without its end.
    pub fn push(&mut self, bytes: &[u8], mut line: impl FnMut(&[u8])) {
        for part in bytes.split_inclusive(|byte| matches!(byte, b'\n' | b'\r')) {
            match part.split_last() {
                Some((b'\n', text)) => {
                    self.append(text, &mut line);
                    line(&self.shown);
                    self.clear();
                }
                Some((b'\r', text)) => {
                    self.append(text, &mut line);
                    self.starts_over = true;
                    self.in_place = true;
                }
                _ => self.append(part, &mut line),
            }
        }
    }

    /// Calls `line` with what was written without an end of line, if there is anything.
    pub fn finish(&mut self, mut line: impl FnMut(&[u8])) {
        if !self.shown.is_empty() {
            line(&self.shown);
        }
        self.clear();
    }

    /// The unfinished line, if it is one that its writer redraws in place.
    pub fn live(&self) -> Option<&[u8]> {
        (self.in_place && !self.shown.is_empty()).then_some(&self.shown)
    }

    fn append(&mut self, mut text: &[u8], line: &mut impl FnMut(&[u8])) {
        if text.is_empty() {
            return;
        }
        if std::mem::take(&mut self.starts_over) {
            self.shown.clear();
        }
        while self.shown.len() + text.len() > MAX_LINE_BYTES {
            let (fits, rest) = text.split_at(MAX_LINE_BYTES - self.shown.len());
            self.shown.extend_from_slice(fits);
            line(&self.shown);
            self.shown.clear();
            text = rest;
        }
        self.shown.extend_from_slice(text);
    }

    fn clear(&mut self) {
        self.shown.clear();
        self.starts_over = false;
        self.in_place = false;
    }
}

/// The last lines of a stream.
#[derive(Debug, Default)]
pub struct Tail {
    lines: VecDeque<Vec<u8>>,
}

impl Tail {
    /// Adds a line, dropping the oldest where there are 20 already.
    pub fn push(&mut self, line: &[u8]) {
        // The dropped line's memory is used again: this is called for every line a rank writes.
        let full = self.lines.len() == TAIL_LINES;
        let mut kept = if full { self.lines.pop_front().unwrap_or_default() } else { Vec::new() };
        kept.clear();
        kept.extend_from_slice(&line[..line.len().min(TAIL_LINE_BYTES)]);
        self.lines.push_back(kept);
    }

    /// The lines, oldest first, with what is not UTF-8 replaced.
    pub fn text(&self) -> impl Iterator<Item = String> + '_ {
        self.lines.iter().map(|line| String::from_utf8_lossy(line).into_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The lines of `input` when it arrives in pieces of `step` bytes.
    fn lines_of(input: &[u8], step: usize) -> Vec<Vec<u8>> {
        let mut found = Vec::new();
        let mut lines = Lines::default();
        for piece in input.chunks(step) {
            lines.push(piece, |line| found.push(line.to_vec()));
        }
        lines.finish(|line| found.push(line.to_vec()));
        found
    }

    #[test]
    fn lines_do_not_depend_on_how_the_bytes_arrive() {
        let cases: [(&[u8], &[&[u8]]); 12] = [
            (b"", &[]),
            (b"\n", &[b""]),
            (b"a", &[b"a"]),
            (b"a\nb", &[b"a", b"b"]),
            (b"a\n\nb\n", &[b"a", b"", b"b"]),
            (b"a\r\nb\r\n", &[b"a", b"b"]),
            (b"10%\r20%\r30%\n", &[b"30%"]),
            (b"10%\r20%\r\nend\n", &[b"20%", b"end"]),
            (b"\r10%\r20%", &[b"20%"]),
            (b"10%\r20%\r", &[b"20%"]),
            (b"a long one\rshort\n", &[b"short"]),
            (b"\xff\x00\xfe\n\x80", &[b"\xff\x00\xfe", b"\x80"]),
        ];
        for (input, expected) in cases {
            for step in 1..=input.len().max(1) {
                let text = String::from_utf8_lossy(input);
                assert_eq!(lines_of(input, step), expected, "{text:?} in steps of {step}");
            }
        }
    }

    #[test]
    fn an_endless_line_is_passed_on_in_pieces() {
        for (len, expected) in [
            (MAX_LINE_BYTES, vec![MAX_LINE_BYTES]),
            (MAX_LINE_BYTES + 1, vec![MAX_LINE_BYTES, 1]),
            (3 * MAX_LINE_BYTES, vec![MAX_LINE_BYTES; 3]),
        ] {
            let mut input = vec![b'x'; len];
            input.push(b'\n');
            for step in [4096, 10_000, input.len()] {
                let sizes: Vec<usize> = lines_of(&input, step).iter().map(Vec::len).collect();
                assert_eq!(sizes, expected, "{len} bytes in steps of {step}");
            }
        }
    }

    #[test]
    fn only_a_line_with_a_carriage_return_is_live() {
        let mut lines = Lines::default();
        let ignore = |_: &[u8]| {};
        lines.push(b"plain", ignore);
        assert_eq!(lines.live(), None);
        lines.push(b"\n\r", ignore);
        assert_eq!(lines.live(), None, "there is nothing to show yet");
        lines.push(b" 10%", ignore);
        assert_eq!(lines.live(), Some(b" 10%".as_slice()), "shown before its own carriage return");
        lines.push(b"\r", ignore);
        assert_eq!(lines.live(), Some(b" 10%".as_slice()));
        lines.push(b" 20%\n", ignore);
        assert_eq!(lines.live(), None);
    }

    #[test]
    fn a_tail_keeps_the_last_lines_and_little_of_each() {
        let mut tail = Tail::default();
        for number in 0..TAIL_LINES + 5 {
            tail.push(format!("line {number}").as_bytes());
        }
        tail.push(&vec![b'x'; MAX_LINE_BYTES]);
        let text: Vec<String> = tail.text().collect();
        assert_eq!(text.len(), TAIL_LINES);
        assert_eq!(text[0], "line 6");
        assert_eq!(text[TAIL_LINES - 1].len(), TAIL_LINE_BYTES);
    }
}
