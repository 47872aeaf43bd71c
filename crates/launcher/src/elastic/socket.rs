//! The Unix socket to which workers come, with two threads for each: one reads, one writes, so that a worker that does not
//! read holds nobody up.
//!
//! Whoever can connect is this user, since the socket is in a folder with mode 0700.

use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::thread;
use std::time::Duration;

use paceline_runtime::elastic::pipe::{self, FromChild, ToChild};
use paceline_runtime::membership::Child;

use super::membership::Input;

/// How long somebody who connects may take to say which process it is.
const ATTACH_LIMIT: Duration = Duration::from_secs(10);

/// The pause after a connection that could not be accepted: what is short then, files for instance, may be there soon.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Nobody is heard any more once it is dropped.
pub struct Listener(UnixListener);

impl Drop for Listener {
    fn drop(&mut self) {
        // Wakes the thread that accepts. It cannot fail for a socket that listens.
        let _ = rustix::net::shutdown(&self.0, rustix::net::Shutdown::Both);
    }
}

/// Listens at `path`, and tells the membership what it hears.
pub fn listen(path: &Path, inputs: Sender<Input>) -> io::Result<Listener> {
    let listener = UnixListener::bind(path)?;
    let accepting = listener.try_clone()?;
    let accept = move || accept_all(&accepting, &inputs);
    thread::Builder::new().name("elastic-socket".to_owned()).spawn(accept)?;
    Ok(Listener(listener))
}

fn accept_all(listener: &UnixListener, inputs: &Sender<Input>) {
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                let inputs = inputs.clone();
                // Without a thread for it the worker's wait for its welcome ends in an error that it tells.
                let served = thread::Builder::new().name("elastic-worker".to_owned());
                let _ = served.spawn(move || serve(&stream, &inputs));
            }
            // It was shut down (accept(2)).
            Err(e) if e.kind() == io::ErrorKind::InvalidInput => return,
            Err(_) => thread::sleep(ACCEPT_PAUSE),
        }
    }
}

fn serve(stream: &UnixStream, inputs: &Sender<Input>) {
    if let Err(error) = follow(stream, inputs) {
        tracing::debug!(%error, "a worker's connection ended");
    }
}

fn follow(stream: &UnixStream, inputs: &Sender<Input>) -> io::Result<()> {
    stream.set_read_timeout(Some(ATTACH_LIMIT))?;
    let Some(FromChild::Attach { version, child, wish }) = pipe::receive::<FromChild>(stream)? else {
        return Err(io::Error::other("the first message must say which process it is"));
    };
    if version != pipe::VERSION {
        let reason = format!("the program speaks version {version} and the launcher {}", pipe::VERSION);
        return pipe::send(stream, &ToChild::Refused { reason });
    }
    stream.set_read_timeout(None)?;
    let child = Child(child);
    let (to_worker, outgoing) = channel::<ToChild>();
    let writer = Arc::new(stream.try_clone()?);
    thread::Builder::new().name("elastic-writer".to_owned()).spawn(move || {
        for message in outgoing {
            if pipe::send(&writer, &message).is_err() {
                return;
            }
        }
    })?;
    let gone = || io::Error::other("the membership has ended");
    inputs.send(Input::Attached { child, wish, to_worker }).map_err(|_| gone())?;
    while let Some(message) = pipe::receive::<FromChild>(stream)? {
        inputs.send(Input::Said { child, message }).map_err(|_| gone())?;
    }
    Ok(())
}
