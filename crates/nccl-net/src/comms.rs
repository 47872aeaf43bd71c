//! What NCCL's opaque pointers stand for.
//!
//! They are numbers and not addresses. One that was closed, or never given out, is found to be nothing, and a call with it
//! is an error instead of a crash. A request carries the number of its connection in its upper half.

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, RwLock};
use std::time::{Duration, Instant};

use paceline_transport::pair::Listener;
use paceline_transport::{Error, Forming};

use crate::failure::Failure;
use crate::log;
use crate::receiver::Receiver;
use crate::sender::Sender;

const _: () = assert!(size_of::<usize>() == 8, "a request has two numbers in one pointer");

static COMMS: LazyLock<Table> = LazyLock::new(Table::default);

/// How long dialling goes on. The listener was there before its handle was, so this is for networks that come up late.
pub const DIAL_LIMIT: Duration = Duration::from_secs(60);

/// How long the end of an attempt to dial is kept for an NCCL that does not come back for it.
const FORGOTTEN: Duration = Duration::from_secs(60);

/// How long a close waits until what was sent has arrived.
const CLOSE_LIMIT: Duration = Duration::from_secs(5);

/// The same once a close has waited in vain: NCCL closes one connection after the other, and the rest will be as silent.
const CLOSE_LIMIT_AFTER_SILENCE: Duration = Duration::from_millis(100);

/// Whether a close has waited in vain.
static SILENCE: AtomicBool = AtomicBool::new(false);

/// One of NCCL's objects.
#[derive(Debug)]
pub enum Comm {
    /// Of `listen`.
    Listening(Listener),
    /// Of a `connect` that has not come to an end.
    Dialling(Dialling),
    /// Of `connect`.
    Sending(Box<Sender>),
    /// Of `accept`.
    Receiving(Receiver),
}

/// An attempt to reach a listener.
#[derive(Debug)]
pub struct Dialling {
    forming: Forming,
    listener: u64,
    /// The other side, for the log.
    peer: String,
    started: Instant,
}

#[derive(Debug, Default)]
struct Table {
    last: AtomicU32,
    by_number: RwLock<HashMap<u32, Arc<Mutex<Comm>>>>,
}

/// The number of an object, as NCCL has it.
pub fn number(pointer: *mut c_void) -> u32 {
    // Larger ones are requests or nonsense: no object has the number 0.
    u32::try_from(pointer.addr()).unwrap_or(0)
}

/// What NCCL is given for an object.
pub fn pointer(number: u32) -> *mut c_void {
    std::ptr::without_provenance_mut(number as usize)
}

/// The connection and the number of a request, as NCCL has it.
pub fn request(pointer: *mut c_void) -> (u32, u32) {
    ((pointer.addr() >> 32) as u32, pointer.addr() as u32)
}

/// What NCCL is given for a request; null for none.
pub fn request_pointer(comm: u32, request: Option<u32>) -> *mut c_void {
    let both = |request: u32| (comm as usize) << 32 | request as usize;
    std::ptr::without_provenance_mut(request.map_or(0, both))
}

/// Gives an object a number.
///
/// # Errors
/// After 2^32 objects.
pub fn insert(comm: Comm) -> Result<u32, Failure> {
    let next = |last: u32| last.checked_add(1);
    let last = COMMS.last.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next);
    let number = last.map_err(|_| Failure::internal("no numbers are left for connections"))? + 1;
    let mut table = COMMS.by_number.write().map_err(|_| panicked())?;
    table.retain(|_, comm| !is_forgotten(comm));
    table.insert(number, Arc::new(Mutex::new(comm)));
    Ok(number)
}

/// Does something with an object. `wanted` takes it for what it should be.
///
/// # Errors
/// That there is none, that it is something else, or what `act` answers.
pub fn with<C, T>(
    number: u32,
    wanted: impl FnOnce(&mut Comm) -> Option<&mut C>,
    act: impl FnOnce(&mut C) -> Result<T, Failure>,
) -> Result<T, Failure> {
    let comm = COMMS.by_number.read().map_err(|_| panicked())?.get(&number).cloned();
    let comm = comm.ok_or_else(unknown)?;
    let mut comm = lock(&comm)?;
    act(wanted(&mut comm).ok_or_else(unknown)?)
}

/// Takes an object out.
///
/// # Errors
/// That there is none, or that it is not `wanted`, and then it stays.
pub fn remove(number: u32, wanted: impl FnOnce(&Comm) -> bool) -> Result<Comm, Failure> {
    let mut table = COMMS.by_number.write().map_err(|_| panicked())?;
    let comm = table.get(&number).ok_or_else(unknown)?;
    if !wanted(&*lock(comm)?) {
        return Err(unknown());
    }
    let comm = table.remove(&number).ok_or_else(unknown)?;
    drop(table);
    let only = |_| Failure::usage("a connection is closed while another thread uses it");
    let comm = Arc::try_unwrap(comm).map_err(only)?;
    comm.into_inner().map_err(|_| panicked())
}

/// Closes a connection. Waits, not for long, until what was sent has arrived.
pub fn close(comm: Comm) {
    let limit = if SILENCE.load(Ordering::Relaxed) { CLOSE_LIMIT_AFTER_SILENCE } else { CLOSE_LIMIT };
    let deadline = Instant::now() + limit;
    let has_peer = matches!(comm, Comm::Sending(_) | Comm::Receiving(_));
    let closed = match comm {
        Comm::Sending(sender) => sender.close(deadline),
        Comm::Receiving(receiver) => receiver.close(deadline),
        Comm::Listening(_) | Comm::Dialling(_) => Ok(()),
    };
    if has_peer && closed.is_ok() {
        SILENCE.store(false, Ordering::Relaxed);
    }
    if let Err(Error::TimedOut { .. }) = closed
        && !SILENCE.swap(true, Ordering::Relaxed)
    {
        log::warn("closed a connection before the other end had confirmed what was sent");
    }
}

impl Dialling {
    /// An attempt that has begun.
    pub fn new(forming: Forming, listener: u64, peer: String) -> Self {
        Self { forming, listener, peer, started: Instant::now() }
    }

    /// The connection to `listener`; `None` while there is none.
    ///
    /// # Errors
    /// Why there is none, or that this attempt is to reach somebody else.
    pub fn take(&mut self, listener: u64) -> Result<Option<Sender>, Failure> {
        if listener != self.listener {
            return Err(Failure::argument("a handle with the attempt to reach another one"));
        }
        let peer = &self.peer;
        match self.forming.take() {
            None => Ok(None),
            Some(Ok(transport)) => Ok(Some(Sender::new(transport, peer.clone()))),
            Some(Err(error)) => Err(Failure::remote(format!("cannot connect to {peer}: {error}"))),
        }
    }
}

fn is_forgotten(comm: &Arc<Mutex<Comm>>) -> bool {
    let Ok(comm) = comm.try_lock() else { return false };
    matches!(&*comm, Comm::Dialling(dialling) if dialling.started.elapsed() > DIAL_LIMIT + FORGOTTEN)
}

fn lock(comm: &Mutex<Comm>) -> Result<MutexGuard<'_, Comm>, Failure> {
    comm.lock().map_err(|_| panicked())
}

fn unknown() -> Failure {
    Failure::argument("no such connection, or it is closed")
}

fn panicked() -> Failure {
    Failure::internal("an earlier call on this connection has panicked")
}
