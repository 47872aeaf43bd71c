//! The same bytes over the links that the plugin uses, without the plugin: what it is measured against.

use std::io::IoSlice;
use std::time::Instant;

use paceline_runtime::{env, renewal};
use paceline_transport::pair::Port;
use paceline_transport::{Fabric, Forming, IoThread, Transport};

use crate::Failed;
use crate::ends::{PATIENCE, Took, compare, pattern, poll, print_line, read_lines};
use crate::options::Options;

/// A link and the buffers of its messages.
struct Link {
    transport: Box<dyn Transport>,
    peer: usize,
    buffers: Vec<Vec<u8>>,
    message: usize,
    moved: usize,
}

fn port(io: &IoThread) -> Result<(Port, String), Failed> {
    let path = env::identity(env::process).ok_or("PACELINE_IDENTITY is not set")?;
    let identity = renewal::read(&path)?;
    let fabric: Fabric = env::fabric(env::process)?;
    let ip = match env::interface(env::process)? {
        Some(selection) => selection.choose_here()?,
        None => std::net::Ipv4Addr::LOCALHOST.into(),
    };
    Ok((Port::open(&io.handle(), (ip, 0).into(), &identity, fabric)?, identity.member().to_owned()))
}

pub fn receive(options: &Options) -> Result<(), Failed> {
    let io = IoThread::start()?;
    let (port, member) = port(&io)?;
    let mut listeners = Vec::new();
    for _ in 0..options.connections {
        let listener = port.listen()?;
        print_line(&format!("handle {member} {} {}", port.local_addr(), listener.number()))?;
        listeners.push(listener);
    }
    let mut links = Vec::new();
    for listener in &mut listeners {
        let (_, transport) = poll("accept", || Ok(listener.take()))?;
        links.push(Link::new(transport, 1, options));
    }
    print_line("connected")?;
    let took = Took::begin()?;
    run(options, &mut links, |link| {
        let buffer = link.message % link.buffers.len();
        let got = link.transport.try_recv(link.peer, &mut link.buffers[buffer][link.moved..])?;
        if link.advance(got, options) {
            compare(&mut link.buffers[buffer], link.message - 1, buffer)?;
        }
        link.transport.drive();
        Ok(got > 0)
    })?;
    took.report(options)?;
    leave(links)
}

pub fn send(options: &Options) -> Result<(), Failed> {
    let io = IoThread::start()?;
    let (port, _) = port(&io)?;
    let mut links = Vec::new();
    for line in read_lines(options.connections)? {
        let words: Vec<&str> = line.split(' ').collect();
        let ["handle", member, addr, number] = words[..] else { return Err("a bad handle".into()) };
        let mut forming: Forming =
            port.dial(addr.parse()?, member, number.parse()?, Instant::now() + PATIENCE);
        let transport = poll("connect", || Ok(forming.take().transpose()?))?;
        links.push(Link::new(transport, 0, options));
    }
    print_line("connected")?;
    let took = Took::begin()?;
    run(options, &mut links, |link| {
        let at = link.message % link.buffers.len();
        if link.moved == 0 {
            link.buffers[at][..8].copy_from_slice(&(link.message as u64).to_le_bytes());
        }
        let sent = link.transport.try_send(link.peer, &[IoSlice::new(&link.buffers[at][link.moved..])])?;
        link.advance(sent, options);
        link.transport.drive();
        Ok(sent > 0)
    })?;
    took.report(options)?;
    leave(links)
}

impl Link {
    fn new(transport: Box<dyn Transport>, peer: usize, options: &Options) -> Self {
        let buffers = (0..options.in_flight).map(|at| pattern(at, options.message)).collect();
        Self { transport, peer, buffers, message: 0, moved: 0 }
    }

    /// Notes bytes; whether they complete a message.
    fn advance(&mut self, bytes: usize, options: &Options) -> bool {
        self.moved += bytes;
        let complete = self.moved == options.message;
        if complete {
            (self.message, self.moved) = (self.message + 1, 0);
        }
        complete
    }
}

fn run(
    options: &Options,
    links: &mut [Link],
    mut drive: impl FnMut(&mut Link) -> Result<bool, Failed>,
) -> Result<(), Failed> {
    let mut moved_at = Instant::now();
    while links.iter().any(|link| link.message < options.messages()) {
        let mut moved = false;
        for link in links.iter_mut().filter(|link| link.message < options.messages()) {
            moved |= drive(link)?;
        }
        if moved {
            moved_at = Instant::now();
        } else if moved_at.elapsed() > PATIENCE {
            return Err("nothing moves".into());
        } else {
            std::thread::yield_now();
        }
    }
    Ok(())
}

fn leave(links: Vec<Link>) -> Result<(), Failed> {
    for mut link in links {
        link.transport.leave(Instant::now() + PATIENCE)?;
    }
    Ok(())
}
