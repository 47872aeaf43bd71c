//! The receiving end of a connection: offers room, and takes what comes for it.

use std::collections::{BTreeMap, VecDeque};
use std::io::IoSlice;
use std::time::Instant;

use paceline_transport::{Error, Transport};

use crate::failure::Failure;
use crate::memory::Sink;
use crate::message::{self, GROUP_LIMIT, HEAD_BYTES, Head, Slot};
use crate::sender::TURN_BYTES;

/// The rank of the other end: diallers, who send, are rank 1 of a pair.
const PEER: usize = 1;

/// Receives that may be posted and not filled: NCCL's own limit of requests for a connection, twice.
pub const POSTED_LIMIT: usize = 64;

/// The receiving end of a connection.
#[derive(Debug)]
pub struct Receiver {
    transport: Box<dyn Transport>,
    peer: String,
    /// What was offered and is not filled, in the order in which senders fill it.
    posted: VecDeque<Posted>,
    /// Offers that the link has not taken yet.
    offers: Vec<u8>,
    next_offer: u64,
    head: [u8; HEAD_BYTES],
    /// How much of `head` has come.
    have: usize,
    /// The slot of the first of `posted` that is being filled, with what.
    filling: Option<Filling>,
    /// Sizes of what has come, until NCCL hears.
    done: BTreeMap<u32, Sizes>,
    last_request: u32,
    fault: Option<Failure>,
}

/// A buffer for a message with this tag.
#[derive(Debug)]
pub struct Room {
    /// Which message fits.
    pub tag: i32,
    /// Where it goes.
    pub sink: Sink,
}

/// How many bytes have come for each buffer of a receive, in their order.
pub type Sizes = Vec<usize>;

/// A receive that is not complete.
#[derive(Debug)]
struct Posted {
    request: u32,
    offer: u64,
    rooms: Vec<Room>,
    /// What has come for each, if it has.
    sizes: Vec<Option<usize>>,
}

/// A message that is coming.
#[derive(Debug)]
struct Filling {
    slot: usize,
    size: usize,
    got: usize,
}

impl Receiver {
    /// Over a link to `peer`, as it is called in the log.
    pub fn new(transport: Box<dyn Transport>, peer: String) -> Self {
        Self {
            transport,
            peer,
            posted: VecDeque::new(),
            offers: Vec::new(),
            next_offer: 0,
            head: [0; HEAD_BYTES],
            have: 0,
            filling: None,
            done: BTreeMap::new(),
            last_request: 0,
            fault: None,
        }
    }

    /// Posts a receive into 1 to [`GROUP_LIMIT`] buffers and returns its request, or `None` when there are too many.
    ///
    /// # Errors
    /// That the connection is gone, or another number of buffers.
    pub fn receive(&mut self, rooms: Vec<Room>) -> Result<Option<u32>, Failure> {
        if !(1..=GROUP_LIMIT).contains(&rooms.len()) {
            let reason = format!("a receive into {} buffers; 1 to {GROUP_LIMIT} are possible", rooms.len());
            return Err(Failure::argument(reason));
        }
        self.check()?;
        if self.posted.len() + self.done.len() >= POSTED_LIMIT {
            return Ok(None);
        }
        let slots = rooms.iter().map(|room| Slot { tag: room.tag, size: room.sink.len() as u64 });
        message::write_offer(&mut self.offers, self.next_offer, slots);
        self.last_request = self.last_request.checked_add(1).unwrap_or(1);
        let (request, offer, sizes) = (self.last_request, self.next_offer, vec![None; rooms.len()]);
        self.posted.push_back(Posted { request, offer, rooms, sizes });
        self.next_offer += 1;
        self.send_offers();
        self.check()?;
        Ok(Some(request))
    }

    /// The sizes of what has come, once all of it has, after which the request is forgotten; `None` while not.
    ///
    /// # Errors
    /// That there is no such request, or that the connection is gone.
    pub fn test(&mut self, request: u32) -> Result<Option<Sizes>, Failure> {
        if let Some(sizes) = self.done.remove(&request) {
            return Ok(Some(sizes));
        }
        self.check()?;
        if !self.posted.iter().any(|posted| posted.request == request) {
            return Err(Failure::argument("test of a request that does not exist (any more)"));
        }
        self.send_offers();
        self.advance();
        // What came before the end of the connection has come.
        let sizes = self.done.remove(&request);
        if sizes.is_none() {
            self.check()?;
        }
        Ok(sizes)
    }

    /// Closes the connection: in order if nothing is awaited, which is waited for until `deadline`; else as broken off.
    ///
    /// # Errors
    /// That the other end did not confirm by then.
    pub fn close(mut self, deadline: Instant) -> Result<(), Error> {
        let is_idle = self.fault.is_none() && self.posted.is_empty();
        if is_idle { self.transport.leave(deadline) } else { Ok(()) }
    }

    /// Why the connection is of no use any more, if so; in words once.
    fn check(&mut self) -> Result<(), Failure> {
        self.fault.as_mut().map_or(Ok(()), |fault| Err(fault.tell()))
    }

    fn fail(&mut self, failure: Failure) {
        self.posted.clear();
        self.filling = None;
        self.fault.get_or_insert(failure);
    }

    /// How many bytes have moved: none when the link is gone, which fails the connection.
    fn moved(&mut self, moved: Result<usize, Error>) -> usize {
        moved.unwrap_or_else(|error| {
            self.fail(Failure::of_link(&self.peer, &error));
            0
        })
    }

    /// Sends as much of the offers as the link takes now.
    fn send_offers(&mut self) {
        let mut sent = 0;
        while sent < self.offers.len() {
            let moved = self.transport.try_send(PEER, &[IoSlice::new(&self.offers[sent..])]);
            match self.moved(moved) {
                0 => break,
                count => sent += count,
            }
        }
        self.offers.drain(..sent);
        self.transport.drive();
        if sent > 0 {
            // NCCL may not come back before the message is there.
            self.transport.pause();
        }
    }

    /// Takes what has come for what is posted, within one turn.
    fn advance(&mut self) {
        let mut budget = TURN_BYTES;
        while budget > 0 && !self.posted.is_empty() {
            let moved = match (&mut self.filling, self.posted.front_mut()) {
                (Some(filling), Some(posted)) => {
                    let room = posted.rooms[filling.slot].sink.room();
                    let until = filling.size.min(filling.got + budget);
                    let got = self.transport.try_recv(PEER, &mut room[filling.got..until]);
                    filling.got += *got.as_ref().unwrap_or(&0);
                    got
                }
                _ => self.read_head(),
            };
            let moved = self.moved(moved);
            if moved == 0 {
                break;
            }
            budget = budget.saturating_sub(moved);
            self.complete();
        }
    }

    /// Reads more of the next head, and returns how much.
    fn read_head(&mut self) -> Result<usize, Error> {
        let got = self.transport.try_recv(PEER, &mut self.head[self.have..])?;
        self.have += got;
        if self.have == HEAD_BYTES {
            self.have = 0;
            match Head::from_bytes(&self.head).and_then(|head| self.admit(head)) {
                Ok(filling) => self.filling = Some(filling),
                Err(reason) => {
                    self.fail(Failure::remote(format!("{} broke the protocol: {reason}", self.peer)));
                }
            }
        }
        Ok(got)
    }

    /// Finds the room that a message was offered.
    fn admit(&self, head: Head) -> Result<Filling, String> {
        let posted = self.posted.front().ok_or("it sends a message that was offered no room")?;
        if posted.offer != head.offer {
            return Err(format!("it fills offer {} and {} is due", head.offer, posted.offer));
        }
        let slot = usize::try_from(head.slot).ok().filter(|&slot| posted.sizes.get(slot) == Some(&None));
        let slot = slot.ok_or_else(|| format!("it fills slot {} twice, or there is none", head.slot))?;
        let room = posted.rooms[slot].sink.len();
        let size = usize::try_from(head.size).ok().filter(|&size| size <= room);
        let size =
            size.ok_or_else(|| format!("it sends {} bytes where there is room for {room}", head.size))?;
        Ok(Filling { slot, size, got: 0 })
    }

    /// Notes the message that is complete, if one is, and with the last one its receive.
    fn complete(&mut self) {
        let Some(Filling { slot, size, .. }) = self.filling.take_if(|filling| filling.got == filling.size)
        else {
            return;
        };
        let posted = self.posted.front_mut().expect("one of its slots was filled");
        posted.sizes[slot] = Some(size);
        if posted.sizes.iter().all(Option::is_some) {
            let Posted { request, sizes, .. } = self.posted.pop_front().expect("it was there just now");
            self.done.insert(request, sizes.into_iter().flatten().collect());
        }
    }
}
