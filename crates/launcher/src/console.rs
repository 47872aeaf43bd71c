//! Prints what the ranks write: each line whole, with its rank in front, on the stream it was written to.
//!
//! One thread writes, from one queue. So lines cannot interleave, stdout and stderr keep their order where they end
//! in the same place, and a reader that stops reading blocks that thread only: the supervisor goes on to watch the
//! ranks, and stops reading their pipes while [`Console::is_backed_up`], which makes the ranks wait for the reader as
//! they would without a launcher. If the reader goes away (`| head`), the ranks go on and what they print is dropped:
//! a training job is worth more than its log.
//!
//! A line that its program redraws with carriage returns is redrawn in place if the stream is a terminal; there is
//! one such line at a time, and it stays below the others.

use std::fmt::Debug;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::termios::isatty;

use crate::lines::{Lines, Tail};

/// Queued output above which the ranks' pipes are left alone. Enough for one read of every pipe of an 8-rank host.
const BACKED_UP_BYTES: usize = 1024 * 1024;

/// How long the launcher waits at its end for a reader that takes nothing at all. Long enough for a busy log
/// collector, short against the 30 s that Kubernetes gives a pod.
const PATIENCE: Duration = Duration::from_secs(5);

/// The most that is written in one system call, so that a slow reader is seen to make progress.
const WRITE_BYTES: usize = 16 * 1024;

/// Back to the first column, and erase what is there.
const ERASE: &[u8] = b"\r\x1b[K";

/// One of the two output streams of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// Standard output.
    Out,
    /// Standard error.
    Err,
}

/// Whose output it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Source {
    /// The rank.
    pub rank: u32,
    /// The stream of the rank, and of the launcher.
    pub stream: Stream,
}

/// The launcher's stdout and stderr. Clones share them.
#[derive(Debug, Clone)]
pub struct Console {
    queue: Sender<Message>,
    progress: Arc<Progress>,
    terminals: Terminals,
    colours: bool,
}

#[derive(Debug)]
enum Message {
    /// Whole lines; `source` is `None` for the launcher's own.
    Text { stream: Stream, source: Option<Source>, bytes: Vec<u8> },
    /// The state of a line that is redrawn in place; sent for terminals only.
    Live { source: Source, bytes: Vec<u8> },
    /// Answered when all that was queued before it has been written.
    Flush(Sender<()>),
}

/// What the writing thread tells the others.
#[derive(Debug, Default)]
struct Progress {
    queued_bytes: AtomicUsize,
    written_bytes: AtomicU64,
}

#[derive(Debug, Clone, Copy)]
struct Terminals {
    out: bool,
    err: bool,
}

impl Terminals {
    fn is_terminal(self, stream: Stream) -> bool {
        match stream {
            Stream::Out => self.out,
            Stream::Err => self.err,
        }
    }
}

impl Console {
    /// Starts the thread that writes to this process's stdout and stderr.
    pub fn start() -> Self {
        let (queue, messages) = channel();
        let progress = Arc::new(Progress::default());
        let terminals = Terminals { out: isatty(Stream::Out.fd()), err: isatty(Stream::Err.fd()) };
        let writer = Writer { progress: progress.clone(), screen: Screen { terminals, live: None } };
        thread::spawn(move || writer.run(&messages));
        // https://no-color.org: set and not empty.
        let colours = std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        Console { queue, progress, terminals, colours }
    }

    /// Whether the stream is a terminal.
    pub fn is_terminal(&self, stream: Stream) -> bool {
        self.terminals.is_terminal(stream)
    }

    /// Whether colours are wanted on the stream.
    pub fn is_coloured(&self, stream: Stream) -> bool {
        self.colours && self.is_terminal(stream)
    }

    /// Whether so much waits to be written that the ranks should wait too.
    pub fn is_backed_up(&self) -> bool {
        self.progress.queued_bytes.load(Ordering::Relaxed) > BACKED_UP_BYTES
    }

    /// Queues whole lines of the launcher's own. Does not block.
    pub fn print(&self, stream: Stream, bytes: Vec<u8>) {
        self.send(Message::Text { stream, source: None, bytes });
    }

    /// A writer for log lines: each `write` is one or more whole lines for stderr.
    pub fn log_writer(&self) -> LogWriter {
        LogWriter(self.clone())
    }

    /// Where the bytes that one rank writes to one stream go.
    pub fn rank_output(&self, source: Source, route: Route) -> RankOutput {
        let text = route.prefix.clone().unwrap_or_else(|| format!("[{}]: ", source.rank));
        RankOutput {
            prefix: prefix(&text, source.rank, self.is_coloured(source.stream)),
            plain: text.into_bytes(),
            source,
            route,
            lines: Lines::default(),
            tail: Tail::default(),
            console: self.clone(),
        }
    }

    /// Waits until everything queued is written, then writes `last_words` to stderr. Gives up after 5 s without any
    /// progress, and says so: the job is over, and its end must not depend on who reads its output.
    pub fn finish(&self, last_words: &str) {
        let mut last_words = last_words.to_owned();
        let (written, all_written) = channel();
        self.send(Message::Flush(written));
        if !self.wait_for(&all_written) {
            let lost = self.progress.queued_bytes.load(Ordering::Relaxed);
            last_words += &format!("paceline: nobody reads the output; its last {lost} bytes are lost\n");
        }
        // Not through the queue: stdout may be stuck while stderr is not, and this is what must be seen.
        let (written, all_written) = channel();
        let progress = self.progress.clone();
        thread::spawn(move || {
            write_all(Stream::Err, last_words.as_bytes(), &progress);
            let _ = written.send(());
        });
        self.wait_for(&all_written);
    }

    /// Whether the answer came before the writing stood still for too long.
    fn wait_for(&self, all_written: &Receiver<()>) -> bool {
        let mut before = self.progress.written_bytes.load(Ordering::Relaxed);
        while let Err(RecvTimeoutError::Timeout) = all_written.recv_timeout(PATIENCE) {
            let now = self.progress.written_bytes.load(Ordering::Relaxed);
            if now == before {
                return false;
            }
            before = now;
        }
        true
    }

    fn send(&self, message: Message) {
        self.progress.queued_bytes.fetch_add(message.size(), Ordering::Relaxed);
        // The thread that receives ends only with the process, so there is nobody to tell if it is gone.
        let _ = self.queue.send(message);
    }
}

/// Logs through the [`Console`].
pub struct LogWriter(Console);

impl io::Write for LogWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.print(Stream::Err, bytes.to_vec());
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Where one stream of one rank goes.
#[derive(Debug, Default)]
pub struct Route {
    /// What stands in front of each line; `None` for `[rank]: `.
    pub prefix: Option<String>,
    /// Whether it is printed.
    pub to_console: bool,
    /// The log file, which gets the bytes as they are.
    pub file: Option<File>,
    /// One more file, for some of the lines.
    pub copied: Option<Copied>,
}

/// A file for lines that contain one of the words, each with its prefix. Ranks share it.
#[derive(Debug)]
pub struct Copied {
    /// The file.
    pub file: Arc<File>,
    /// The words.
    pub words: Vec<String>,
}

impl Route {
    /// Writes to the log file. A disk that is full must not end the job: it goes on without a log.
    fn log(&mut self, bytes: &[u8]) {
        if let Some(file) = &mut self.file
            && let Err(e) = file.write_all(bytes)
        {
            tracing::warn!(error = %e, "cannot write a log file any more");
            self.file = None;
        }
    }
}

impl Copied {
    fn add(&self, prefix: &[u8], line: &[u8]) {
        let has = |word: &String| line.windows(word.len().max(1)).any(|part| part == word.as_bytes());
        if self.words.iter().any(has) {
            // As with the log: the job goes on without.
            let _ = (&*self.file).write_all(&[prefix, line, b"\n"].concat());
        }
    }
}

/// One stream of one rank: cuts it into lines, puts the rank in front, and remembers the last ones.
#[derive(Debug)]
pub struct RankOutput {
    source: Source,
    route: Route,
    prefix: Vec<u8>,
    /// The same without colours.
    plain: Vec<u8>,
    lines: Lines,
    tail: Tail,
    console: Console,
}

impl RankOutput {
    /// Takes bytes as they come from the rank. Does not block.
    pub fn push(&mut self, bytes: &[u8]) {
        self.route.log(bytes);
        let mut text = Vec::with_capacity(bytes.len() + bytes.len() / 8);
        let copied = self.route.copied.as_ref();
        self.lines.push(bytes, |line| {
            add_line(&mut text, &mut self.tail, &self.prefix, line);
            copied.into_iter().for_each(|copied| copied.add(&self.plain, line));
        });
        self.print(text);
        if let Some(live) = self.lines.live()
            && self.route.to_console
            && self.console.is_terminal(self.source.stream)
        {
            let bytes = [&self.prefix, live].concat();
            self.console.send(Message::Live { source: self.source, bytes });
        }
    }

    /// Prints what the rank wrote last without an end of line.
    pub fn finish(&mut self) {
        let mut text = Vec::new();
        let copied = self.route.copied.as_ref();
        self.lines.finish(|line| {
            add_line(&mut text, &mut self.tail, &self.prefix, line);
            copied.into_iter().for_each(|copied| copied.add(&self.plain, line));
        });
        self.print(text);
    }

    /// The last lines that came.
    pub fn tail(&self) -> &Tail {
        &self.tail
    }

    fn print(&self, bytes: Vec<u8>) {
        if !bytes.is_empty() && self.route.to_console {
            let source = Some(self.source);
            self.console.send(Message::Text { stream: self.source.stream, source, bytes });
        }
    }
}

fn add_line(text: &mut Vec<u8>, tail: &mut Tail, prefix: &[u8], line: &[u8]) {
    text.extend_from_slice(prefix);
    text.extend_from_slice(line);
    text.push(b'\n');
    tail.push(line);
}

/// What stands in front of a line, in a colour of the rank's own if `coloured`. Red is left out: it would look like an
/// error.
fn prefix(plain: &str, rank: u32, coloured: bool) -> Vec<u8> {
    const COLOURS: [u8; 5] = [36, 33, 32, 35, 34];
    if !coloured {
        return plain.as_bytes().to_vec();
    }
    format!("\x1b[{}m{plain}\x1b[0m", COLOURS[rank as usize % COLOURS.len()]).into_bytes()
}

/// What the terminal shows besides finished lines, and so what must be sent to it to show the next thing.
#[derive(Debug)]
struct Screen {
    terminals: Terminals,
    /// The line that stands unfinished at the bottom.
    live: Option<(Source, Vec<u8>)>,
}

impl Screen {
    fn text(&mut self, stream: Stream, source: Option<Source>, bytes: Vec<u8>) -> Vec<u8> {
        // A source that finishes a line has finished its live line: that is the line it was in the middle of.
        let ended = self.live.take_if(|(owner, _)| source == Some(*owner)).is_some();
        if !self.terminals.is_terminal(stream) || (self.live.is_none() && !ended) {
            return bytes;
        }
        let below = self.live.as_ref().map(|(_, line)| draw_live(line)).unwrap_or_default();
        [ERASE, &bytes, &below].concat()
    }

    fn live(&mut self, source: Source, bytes: Vec<u8>) -> Vec<u8> {
        let drawn = draw_live(&bytes);
        self.live = Some((source, bytes));
        drawn
    }
}

/// Draws a line in place. Wrapping is switched off meanwhile: a line wider than the terminal could not be erased.
fn draw_live(line: &[u8]) -> Vec<u8> {
    [ERASE, b"\x1b[?7l", line, b"\x1b[0m\x1b[?7h"].concat()
}

/// The thread that writes.
struct Writer {
    progress: Arc<Progress>,
    screen: Screen,
}

impl Writer {
    fn run(mut self, messages: &Receiver<Message>) {
        for message in messages {
            let size = message.size();
            match message {
                Message::Text { stream, source, bytes } => {
                    write_all(stream, &self.screen.text(stream, source, bytes), &self.progress);
                }
                Message::Live { source, bytes } => {
                    write_all(source.stream, &self.screen.live(source, bytes), &self.progress);
                }
                Message::Flush(written) => {
                    let _ = written.send(());
                }
            }
            self.progress.queued_bytes.fetch_sub(size, Ordering::Relaxed);
        }
    }
}

impl Message {
    fn size(&self) -> usize {
        match self {
            Message::Text { bytes, .. } | Message::Live { bytes, .. } => bytes.len(),
            Message::Flush(_) => 0,
        }
    }
}

impl Stream {
    fn fd(self) -> BorrowedFd<'static> {
        match self {
            Stream::Out => rustix::stdio::stdout(),
            Stream::Err => rustix::stdio::stderr(),
        }
    }
}

/// Writes to the descriptor itself, since `std`'s stdout gives up half-way where somebody has made the terminal
/// non-blocking (it belongs to the open file, so any program that shares the terminal can do that).
fn write_all(stream: Stream, mut bytes: &[u8], progress: &Progress) {
    while !bytes.is_empty() {
        match rustix::io::write(stream.fd(), &bytes[..bytes.len().min(WRITE_BYTES)]) {
            Ok(written) => {
                progress.written_bytes.fetch_add(written as u64, Ordering::Relaxed);
                bytes = &bytes[written..];
            }
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => {
                let _ = poll(&mut [PollFd::from_borrowed_fd(stream.fd(), PollFlags::OUT)], None);
            }
            // The reader is gone: see the module's documentation.
            Err(_) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BAR: Source = Source { rank: 0, stream: Stream::Err };
    const OTHER: Source = Source { rank: 1, stream: Stream::Out };

    fn screen(out: bool, err: bool) -> Screen {
        Screen { terminals: Terminals { out, err }, live: None }
    }

    #[test]
    fn without_a_live_line_text_is_passed_on_as_it_is() {
        let mut screen = screen(true, true);
        assert_eq!(screen.text(Stream::Out, Some(OTHER), b"[1]: a\n".to_vec()), b"[1]: a\n");
    }

    #[test]
    fn a_live_line_stays_below_the_lines_of_others() {
        let mut screen = screen(true, true);
        assert_eq!(screen.live(BAR, b"10%".to_vec()), b"\r\x1b[K\x1b[?7l10%\x1b[0m\x1b[?7h");
        let around = b"\r\x1b[K[1]: a\n\r\x1b[K\x1b[?7l10%\x1b[0m\x1b[?7h";
        assert_eq!(screen.text(Stream::Out, Some(OTHER), b"[1]: a\n".to_vec()), around);
    }

    #[test]
    fn a_live_line_ends_with_a_line_of_its_own_source() {
        let mut screen = screen(true, true);
        screen.live(BAR, b"10%".to_vec());
        assert_eq!(screen.text(Stream::Err, Some(BAR), b"100%\n".to_vec()), b"\r\x1b[K100%\n");
        assert_eq!(screen.text(Stream::Err, Some(BAR), b"next\n".to_vec()), b"next\n");
    }

    #[test]
    fn what_is_not_a_terminal_gets_no_escape_sequences() {
        let mut screen = screen(false, true);
        screen.live(BAR, b"10%".to_vec());
        assert_eq!(screen.text(Stream::Out, Some(OTHER), b"[1]: a\n".to_vec()), b"[1]: a\n");
    }

    #[test]
    fn prefixes_have_the_rank_and_a_colour_only_if_wanted() {
        assert_eq!(prefix("[12]: ", 12, false), b"[12]: ");
        assert_eq!(prefix("[1]: ", 1, true), b"\x1b[33m[1]: \x1b[0m");
        assert_ne!(prefix("", 0, true)[..5], prefix("", 1, true)[..5]);
    }
}
