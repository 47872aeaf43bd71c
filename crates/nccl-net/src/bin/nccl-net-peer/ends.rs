//! The two ends, over the plugin.

use std::collections::VecDeque;
use std::io::{BufRead, Write};
use std::time::{Duration, Instant};

use crate::options::{Options, Through};
use crate::table::{Handle, Opaque, Plugin};
use crate::{Failed, bare};

/// How long nothing may move.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// One connection and its buffers, of which `in_flight` groups are used in turn.
struct Connection {
    comm: Opaque,
    registrations: Vec<Opaque>,
    groups: Vec<Vec<Vec<u8>>>,
    /// Requests, in the order in which they were accepted, each with its messages.
    requests: VecDeque<Opaque>,
    /// Messages that were accepted, and that are done.
    accepted: usize,
    done: usize,
}

/// Receives, compares, and says how long that took from the first message on.
pub fn receive(options: &Options) -> Result<(), Failed> {
    if options.through == Through::Bare {
        return bare::receive(options);
    }
    let plugin = Plugin::open(&options.plugin, options.through)?;
    if plugin.devices()? < 1 {
        return Err("no device".into());
    }
    let mut listeners = Vec::new();
    for _ in 0..options.connections {
        let (handle, listener) = plugin.listen()?;
        print_line(&format!("handle {}", hex(&handle)))?;
        listeners.push(listener);
    }
    let mut connections = Vec::new();
    for listener in listeners {
        let comm = poll("accept", || plugin.accept(listener))?;
        plugin.close_listen(listener)?;
        connections.push(Connection::new(&plugin, comm, options)?);
    }
    print_line("connected")?;
    run(options, &mut connections, |connection| connection.receive(&plugin, options))?;
    for connection in connections {
        connection.deregister(&plugin)?;
        plugin.close_recv(connection.comm)?;
    }
    plugin.finalize()
}

/// Sends.
pub fn send(options: &Options) -> Result<(), Failed> {
    if options.through == Through::Bare {
        return bare::send(options);
    }
    let plugin = Plugin::open(&options.plugin, options.through)?;
    let mut handles: Vec<Handle> = read_lines(options.connections)?
        .iter()
        .map(|line| unhex(line.strip_prefix("handle ").unwrap_or(line)))
        .collect::<Result<_, _>>()?;
    let mut connections = Vec::new();
    for handle in &mut handles {
        let comm = poll("connect", || plugin.connect(handle))?;
        connections.push(Connection::new(&plugin, comm, options)?);
    }
    print_line("connected")?;
    run(options, &mut connections, |connection| connection.send(&plugin, options))?;
    for connection in connections {
        connection.deregister(&plugin)?;
        plugin.close_send(connection.comm)?;
    }
    plugin.finalize()
}

/// Drives all connections until each has all of its messages, as a proxy thread does.
fn run(
    options: &Options,
    connections: &mut [Connection],
    mut drive: impl FnMut(&mut Connection) -> Result<bool, Failed>,
) -> Result<(), Failed> {
    let (took, mut moved_at) = (Took::begin()?, Instant::now());
    let limit = options.stall_after.unwrap_or(usize::MAX);
    while connections.iter().any(|connection| connection.done < options.messages().min(limit)) {
        let mut moved = false;
        for connection in &mut *connections {
            moved |= drive(connection)?;
        }
        let now = Instant::now();
        if moved {
            moved_at = now;
        } else if now - moved_at > PATIENCE {
            return Err("nothing moves".into());
        } else {
            std::thread::yield_now();
        }
    }
    if options.stall_after.is_some() {
        print_line("stalled")?;
        loop {
            std::thread::park();
        }
    }
    took.report(options)
}

/// What moving the bytes takes.
pub struct Took {
    start: Instant,
    processor: Duration,
}

impl Took {
    /// From now on.
    pub fn begin() -> Result<Self, Failed> {
        Ok(Self { processor: processor_time()?, start: Instant::now() })
    }

    /// Prints the bytes, the seconds, and those in which this thread had a processor.
    pub fn report(&self, options: &Options) -> Result<(), Failed> {
        let bytes = options.messages() * options.message * options.connections;
        let processor = processor_time()? - self.processor;
        let (seconds, processor) = (self.start.elapsed().as_secs_f64(), processor.as_secs_f64());
        print_line(&format!("done {bytes} {seconds:.6} {processor:.6}"))
    }
}

/// How long this thread has had a processor.
fn processor_time() -> Result<Duration, Failed> {
    let statistics = std::fs::read_to_string("/proc/thread-self/schedstat")?;
    let nanoseconds = statistics.split(' ').next().ok_or("an empty schedstat")?;
    Ok(Duration::from_nanos(nanoseconds.parse()?))
}

impl Connection {
    fn new(plugin: &Plugin, comm: Opaque, options: &Options) -> Result<Self, Failed> {
        let buffer = |number: usize| pattern(number, options.message);
        let group = |at: usize| (at * options.group..(at + 1) * options.group).map(buffer).collect();
        let mut groups: Vec<Vec<Vec<u8>>> = (0..options.in_flight).map(group).collect();
        let all = groups.iter_mut().flatten();
        let registrations = all.map(|buffer| plugin.register(comm, buffer)).collect::<Result<_, _>>()?;
        Ok(Self { comm, registrations, groups, requests: VecDeque::new(), accepted: 0, done: 0 })
    }

    fn deregister(&self, plugin: &Plugin) -> Result<(), Failed> {
        self.registrations.iter().try_for_each(|&registration| plugin.deregister(self.comm, registration))
    }

    /// The slot's buffer of a message, and its tag.
    fn place(&self, message: usize) -> (usize, usize, i32) {
        let groups = self.groups.len();
        let slots = self.groups[0].len();
        // The last slot first, so that the order within a group is not that of the receiver.
        let slot = slots - 1 - message % slots;
        (message / slots % groups, slot, slot as i32 + 100)
    }

    /// One turn; whether anything moved.
    fn send(&mut self, plugin: &Plugin, options: &Options) -> Result<bool, Failed> {
        let mut moved = false;
        let last = options.messages().min(options.stall_after.unwrap_or(usize::MAX));
        while self.accepted < last && self.requests.len() < options.in_flight * options.group {
            let (group, slot, tag) = self.place(self.accepted);
            let buffer = &mut self.groups[group][slot];
            buffer[..8].copy_from_slice(&(self.accepted as u64).to_le_bytes());
            let Some(request) = plugin.isend(self.comm, buffer, tag)? else { break };
            self.requests.push_back(request);
            self.accepted += 1;
            moved = true;
        }
        while let Some(&request) = self.requests.front()
            && let Some(sizes) = plugin.test(request, 1)?
        {
            must_be(sizes[0] as usize, options.message, "bytes sent")?;
            self.requests.pop_front();
            self.done += 1;
            moved = true;
        }
        Ok(moved)
    }

    /// One turn; whether anything moved.
    fn receive(&mut self, plugin: &Plugin, options: &Options) -> Result<bool, Failed> {
        let mut moved = false;
        let slots = options.group;
        while self.accepted < options.messages() && self.requests.len() < options.in_flight {
            let group = self.accepted / slots % self.groups.len();
            let tags: Vec<i32> = (0..slots).map(|slot| slot as i32 + 100).collect();
            let Some(request) = plugin.irecv(self.comm, &mut self.groups[group], &tags)? else { break };
            self.requests.push_back(request);
            self.accepted += slots;
            moved = true;
        }
        while let Some(&request) = self.requests.front()
            && let Some(sizes) = plugin.test(request, slots)?
        {
            for size in sizes {
                must_be(size as usize, options.message, "bytes received")?;
            }
            self.requests.pop_front();
            for _ in 0..slots {
                let (group, slot, _) = self.place(self.done);
                compare(&mut self.groups[group][slot], self.done, group * slots + slot)?;
                self.done += 1;
            }
            moved = true;
        }
        Ok(moved)
    }
}

/// What the buffer of a number holds behind the first 8 bytes, which are the number of the message.
pub fn pattern(buffer: usize, len: usize) -> Vec<u8> {
    (0..len).map(|at| (at * 7 + at / 251 + buffer * 13) as u8).collect()
}

/// Compares a message with what was sent, and spoils it, so that it is not taken for the next one.
pub fn compare(received: &mut [u8], message: usize, buffer: usize) -> Result<(), Failed> {
    thread_local! {
        static EXPECTED: std::cell::RefCell<Vec<Vec<u8>>> = const { std::cell::RefCell::new(Vec::new()) };
    }
    must_be(u64::from_le_bytes(received[..8].try_into()?) as usize, message, "the message's number")?;
    let equal = EXPECTED.with_borrow_mut(|expected| {
        while expected.len() <= buffer {
            expected.push(pattern(expected.len(), received.len()));
        }
        received[8..] == expected[buffer][8..]
    });
    if !equal {
        return Err(format!("wrong bytes in message {message}").into());
    }
    received[..8].fill(0xff);
    let last = received.len() - 1;
    received[last] ^= 0xff;
    Ok(())
}

fn must_be(found: usize, expected: usize, what: &str) -> Result<(), Failed> {
    if found == expected { Ok(()) } else { Err(format!("{what}: {found}, expected {expected}").into()) }
}

/// Calls until there is something, as NCCL does.
pub fn poll<T>(what: &str, mut call: impl FnMut() -> Result<Option<T>, Failed>) -> Result<T, Failed> {
    let start = Instant::now();
    loop {
        if let Some(found) = call()? {
            return Ok(found);
        }
        if start.elapsed() > 2 * PATIENCE {
            return Err(format!("{what} does not come to an end").into());
        }
        std::thread::yield_now();
    }
}

/// A line on stdout, at once.
pub fn print_line(line: &str) -> Result<(), Failed> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}")?;
    Ok(out.flush()?)
}

/// So many lines of stdin.
pub fn read_lines(count: usize) -> Result<Vec<String>, Failed> {
    let lines: Vec<String> = std::io::stdin().lock().lines().take(count).collect::<Result<_, _>>()?;
    if lines.len() < count {
        return Err("too few handles".into());
    }
    Ok(lines)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Result<Handle, Failed> {
    let byte = |at: usize| u8::from_str_radix(text.get(2 * at..2 * at + 2)?, 16).ok();
    let bytes: Option<Vec<u8>> = (0..std::mem::size_of::<Handle>()).map(byte).collect();
    Ok(bytes.ok_or("a handle is 256 hexadecimal digits")?.try_into().map_err(|_| "128 bytes")?)
}
