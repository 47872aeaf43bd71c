//! The sending end of a connection: sends what the receiver has offered room for.
//!
//! NCCL's order holds: messages fill the offers in the order of these, and the slots of one offer in any order, each by
//! the first message with its tag. A message that fits no free slot of the first offer is not accepted now; NCCL asks
//! again.

use std::collections::{BTreeMap, VecDeque};
use std::io::IoSlice;
use std::time::Instant;

use paceline_transport::{Error, Transport};

use crate::failure::Failure;
use crate::memory::Source;
use crate::message::{self, GROUP_LIMIT, HEAD_BYTES, Head, OFFER_BYTES, SLOT_BYTES, Slot};

/// The rank of the other end: listeners, who receive, are rank 0 of a pair.
const PEER: usize = 0;

/// Messages that are accepted and not yet reported: NCCL's own limit of 32 for each of so many grouped receives.
const REQUESTS_LIMIT: usize = 32 * GROUP_LIMIT;

/// Bytes that one call moves at most, so that other connections have their turn.
pub const TURN_BYTES: usize = 1024 * 1024;

/// The sending end of a connection.
#[derive(Debug)]
pub struct Sender {
    transport: Box<dyn Transport>,
    peer: String,
    /// The room that is being filled. Later offers stay in the link until it is.
    offer: Option<Offer>,
    reading: OfferInPart,
    queue: VecDeque<Outgoing>,
    /// Requests and sizes of messages of which encrypted bytes may not be in the socket yet.
    taken: Vec<(u32, usize)>,
    /// Those of messages that are done, until NCCL hears.
    done: BTreeMap<u32, usize>,
    last_request: u32,
    fault: Option<Failure>,
}

/// Room at the other end.
#[derive(Debug)]
struct Offer {
    number: u64,
    /// Those that no message has filled.
    slots: [Option<Slot>; GROUP_LIMIT],
}

/// A free slot of an offer.
struct Room {
    offer: u64,
    slot: usize,
    size: u64,
}

/// An offer that has come in part.
#[derive(Debug)]
struct OfferInPart {
    bytes: [u8; OFFER_BYTES + GROUP_LIMIT * SLOT_BYTES],
    have: usize,
    need: usize,
}

/// A message that was accepted.
#[derive(Debug)]
struct Outgoing {
    request: u32,
    head: [u8; HEAD_BYTES],
    source: Source,
    sent: usize,
}

impl Sender {
    /// Over a link to `peer`, as it is called in the log.
    pub fn new(transport: Box<dyn Transport>, peer: String) -> Self {
        Self {
            transport,
            peer,
            offer: None,
            reading: OfferInPart::new(),
            queue: VecDeque::new(),
            taken: Vec::new(),
            done: BTreeMap::new(),
            last_request: 0,
            fault: None,
        }
    }

    /// Accepts a message and returns its request, or `None` when there is no room for it now.
    ///
    /// # Errors
    /// That the connection is gone, or that the message is longer than its room, in which case it had no effect.
    pub fn send(&mut self, tag: i32, source: Source) -> Result<Option<u32>, Failure> {
        self.check()?;
        if self.queue.len() + self.taken.len() + self.done.len() >= REQUESTS_LIMIT {
            return Ok(None);
        }
        let Some(Room { offer, slot, size: room }) = self.find_room(tag)? else { return Ok(None) };
        let size = source.bytes().len();
        if size as u64 > room {
            let reason = format!(
                "a message of {size} bytes with tag {tag} to {}, which has room for {room}",
                self.peer
            );
            return Err(Failure::usage(reason));
        }
        self.fill(slot);
        self.last_request = self.last_request.checked_add(1).unwrap_or(1);
        let head = Head { offer, slot: slot as u32, size: size as u64 }.to_bytes();
        self.queue.push_back(Outgoing { request: self.last_request, head, source, sent: 0 });
        self.advance();
        self.check()?;
        Ok(Some(self.last_request))
    }

    /// The size of a message that is done, after which its request is forgotten; `None` while it is not.
    ///
    /// # Errors
    /// That there is no such request, or that the connection is gone.
    pub fn test(&mut self, request: u32) -> Result<Option<usize>, Failure> {
        if let Some(size) = self.done.remove(&request) {
            return Ok(Some(size));
        }
        self.check()?;
        let is_known = self.queue.iter().any(|outgoing| outgoing.request == request)
            || self.taken.iter().any(|&(taken, _)| taken == request);
        if !is_known {
            return Err(Failure::argument("test of a request that does not exist (any more)"));
        }
        self.advance();
        // What was sent before the end of the connection is done.
        let size = self.done.remove(&request);
        if size.is_none() {
            self.check()?;
        }
        Ok(size)
    }

    /// Closes the connection: in order if all messages are done, and then what was sent arrives, which is waited for
    /// until `deadline`; else as broken off.
    ///
    /// # Errors
    /// That the other end did not confirm by then.
    pub fn close(mut self, deadline: Instant) -> Result<(), Error> {
        let is_idle = self.fault.is_none() && self.queue.is_empty();
        if is_idle { self.transport.leave(deadline) } else { Ok(()) }
    }

    /// Why the connection is of no use any more, if so; in words once.
    fn check(&mut self) -> Result<(), Failure> {
        self.fault.as_mut().map_or(Ok(()), |fault| Err(fault.tell()))
    }

    fn fail(&mut self, failure: Failure) {
        self.queue.clear();
        self.fault.get_or_insert(failure);
    }

    /// The first free slot with `tag` of the present offer, or of the next one when none is there.
    fn find_room(&mut self, tag: i32) -> Result<Option<Room>, Failure> {
        if self.offer.is_none() && !self.read_offer()? {
            return Ok(None);
        }
        let Some(Offer { number, slots }) = &self.offer else { return Ok(None) };
        let fits = |slot: &Option<Slot>| slot.is_some_and(|slot| slot.tag == tag);
        let slot = slots.iter().position(fits);
        Ok(slot.and_then(|at| Some(Room { offer: *number, slot: at, size: slots[at]?.size })))
    }

    /// Takes a slot of the present offer, and the offer when it was the last.
    fn fill(&mut self, slot: usize) {
        if let Some(offer) = &mut self.offer {
            offer.slots[slot] = None;
        }
        self.offer.take_if(|offer| offer.slots.iter().all(Option::is_none));
    }

    /// Reads the next offer; `false` when none has come.
    fn read_offer(&mut self) -> Result<bool, Failure> {
        self.transport.drive();
        match self.reading.read(&mut *self.transport) {
            Ok(None) => {}
            Ok(Some(Ok(offer))) => self.offer = Some(offer),
            Ok(Some(Err(reason))) => {
                self.fail(Failure::remote(format!("{} broke the protocol: {reason}", self.peer)));
            }
            Err(error) => self.fail(Failure::of_link(&self.peer, &error)),
        }
        self.check()?;
        Ok(self.offer.is_some())
    }

    /// Sends as much as the link takes now, within one turn.
    fn advance(&mut self) {
        let mut budget = TURN_BYTES;
        while let Some(outgoing) = self.queue.front_mut().filter(|_| budget > 0) {
            let sent = match outgoing.send(&mut *self.transport, budget) {
                Ok(0) => break,
                Ok(sent) => sent,
                Err(error) => return self.fail(Failure::of_link(&self.peer, &error)),
            };
            budget = budget.saturating_sub(sent);
            // The link takes more only when nothing is left of what it took before.
            self.done.extend(self.taken.drain(..));
            if outgoing.is_sent() {
                self.taken.push((outgoing.request, outgoing.source.bytes().len()));
                self.queue.pop_front();
            }
        }
        if self.transport.drive() {
            self.done.extend(self.taken.drain(..));
        }
        if self.queue.is_empty() {
            // NCCL may not come back before the next message.
            self.transport.pause();
        }
    }
}

impl Outgoing {
    fn send(&mut self, transport: &mut dyn Transport, budget: usize) -> Result<usize, Error> {
        let bytes = self.source.bytes();
        let from = self.sent.saturating_sub(HEAD_BYTES);
        let payload = IoSlice::new(&bytes[from..bytes.len().min(from + budget)]);
        let sent = match self.head.get(self.sent..).filter(|head| !head.is_empty()) {
            Some(head) => transport.try_send(PEER, &[IoSlice::new(head), payload])?,
            None => transport.try_send(PEER, &[payload])?,
        };
        self.sent += sent;
        Ok(sent)
    }

    fn is_sent(&self) -> bool {
        self.sent == HEAD_BYTES + self.source.bytes().len()
    }
}

impl OfferInPart {
    fn new() -> Self {
        Self { bytes: [0; OFFER_BYTES + GROUP_LIMIT * SLOT_BYTES], have: 0, need: OFFER_BYTES }
    }

    /// The next offer, once all of it has come; in words what is wrong with it.
    fn read(&mut self, transport: &mut dyn Transport) -> Result<Option<Result<Offer, String>>, Error> {
        loop {
            while self.have < self.need {
                match transport.try_recv(PEER, &mut self.bytes[self.have..self.need])? {
                    0 => return Ok(None),
                    got => self.have += got,
                }
            }
            let begin = self.bytes.first_chunk().expect("it is longer");
            let (number, count) = match message::read_offer(begin) {
                Ok(begin) => begin,
                Err(reason) => return Ok(Some(Err(reason))),
            };
            self.need = OFFER_BYTES + count * SLOT_BYTES;
            if self.have == self.need {
                let offer = Offer::read(number, &self.bytes[OFFER_BYTES..self.need]);
                *self = Self::new();
                return Ok(Some(offer));
            }
        }
    }
}

impl Offer {
    fn read(number: u64, bytes: &[u8]) -> Result<Self, String> {
        let mut slots = [None; GROUP_LIMIT];
        let (read, _) = bytes.as_chunks::<SLOT_BYTES>();
        for (slot, bytes) in slots.iter_mut().zip(read) {
            *slot = Some(message::read_slot(bytes)?);
        }
        Ok(Self { number, slots })
    }
}
