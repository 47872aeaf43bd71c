//! The links over several interfaces of a host at the same time.
//!
//! Each interface has links of its own to all peers. The bytes to a peer go over them in turn, [`STRIPE_BYTES`]
//! at a time, so that both sides know without a word which link the next byte takes. That is as fast as the slowest
//! link times their number: right for interfaces of one kind, which is what hosts with several have.
//!
//! Everything else (control messages, reasons) goes over the first interface.

use std::io::IoSlice;
use std::task::Waker;
use std::time::Instant;

use super::transport::{self, TlsTransport};
use super::waiting::Bell;
use crate::control_lane::GIVEN_UP_GRACE;
use crate::mesh;
use crate::{Error, Forming, Transport};

/// How many bytes go over one link before the next one has its turn. A few records: long enough for few system calls,
/// short enough for the second link to begin early.
const STRIPE_BYTES: u64 = 128 * 1024;

/// One rank's links to all other ranks of an epoch, over several interfaces.
///
/// As [`TlsTransport`], of which it has one for each interface. A peer is lost when one of its links is.
#[derive(Debug)]
pub struct StripedTransport {
    /// They share a bell.
    lanes: Vec<TlsTransport>,
    /// By rank: how many bytes have been sent to it, and received from it.
    sent: Vec<u64>,
    received: Vec<u64>,
}

impl StripedTransport {
    /// Links of the same ranks over several interfaces as one: the first, and those that were made
    /// [beside](TlsTransport::connect_beside) it. All ranks must pass them in the same order, before anything is sent
    /// over any but the first, and when all that was sent over that has been received.
    ///
    /// # Errors
    /// [`Error::Usage`] when there is none, or one is not of the first one's rank, world and epoch, or not beside it.
    pub fn new(lanes: Vec<TlsTransport>) -> Result<Self, Error> {
        let place = |lane: &TlsTransport| (lane.rank(), lane.world_size(), lane.epoch());
        let Some(first) = lanes.first().map(place) else {
            return Err(Error::Usage { reason: "no links to make one of".to_owned() });
        };
        let fits = |lane: &TlsTransport| place(lane) == first && lane.waits_with(&lanes[0]);
        if !lanes.iter().all(fits) {
            let reason =
                "these links are of different ranks, worlds or epochs, or were not made beside the first";
            return Err(Error::Usage { reason: reason.to_owned() });
        }
        let counts = vec![0; first.1];
        Ok(Self { lanes, sent: counts.clone(), received: counts })
    }

    /// How the peer was lost: what its first link says, where reasons arrive, or `error` of this lane when that link
    /// lives on.
    fn reason(&self, peer: usize, lane: usize, error: Error) -> Error {
        match &error {
            Error::Lost { .. } if lane > 0 => {
                self.lanes[0].loss_within(peer, GIVEN_UP_GRACE).unwrap_or(error)
            }
            _ => error,
        }
    }
}

/// Which of `lanes` the byte at `position` takes, and how many follow it there.
fn turn(position: u64, lanes: usize) -> (usize, usize) {
    let lane = (position / STRIPE_BYTES) % lanes as u64;
    let room = STRIPE_BYTES - position % STRIPE_BYTES;
    // Both are as small as a number of interfaces and a stripe.
    (lane as usize, room as usize)
}

impl Transport for StripedTransport {
    fn name(&self) -> &'static str {
        self.lanes[0].name()
    }

    fn rank(&self) -> usize {
        self.lanes[0].rank()
    }

    fn world_size(&self) -> usize {
        self.lanes[0].world_size()
    }

    fn epoch(&self) -> u64 {
        self.lanes[0].epoch()
    }

    fn try_send(&mut self, to: usize, parts: &[IoSlice<'_>]) -> Result<usize, Error> {
        let mut total = 0;
        for part in parts {
            let mut rest: &[u8] = part;
            while !rest.is_empty() {
                let (lane, room) = turn(self.sent[to], self.lanes.len());
                let piece = &rest[..rest.len().min(room)];
                let sent = match self.lanes[lane].try_send(to, &[IoSlice::new(piece)]) {
                    Ok(sent) => sent,
                    // What was sent before is sent; the next call finds the end of the link again.
                    Err(_) if total > 0 => return Ok(total),
                    Err(error) => return Err(self.reason(to, lane, error)),
                };
                self.sent[to] += sent as u64;
                total += sent;
                if sent > 0 {
                    self.lanes[0].wait_is_over();
                }
                if sent < piece.len() {
                    return Ok(total);
                }
                rest = &rest[sent..];
            }
        }
        Ok(total)
    }

    fn try_recv(&mut self, from: usize, into: &mut [u8]) -> Result<usize, Error> {
        let mut total = 0;
        while total < into.len() {
            let (lane, room) = turn(self.received[from], self.lanes.len());
            let end = into.len().min(total + room);
            let got = match self.lanes[lane].try_recv(from, &mut into[total..end]) {
                Ok(got) => got,
                Err(_) if total > 0 => break,
                Err(error) => return Err(self.reason(from, lane, error)),
            };
            self.received[from] += got as u64;
            if got > 0 {
                self.lanes[0].wait_is_over();
            }
            let asked = end - total;
            total += got;
            if got < asked {
                break;
            }
        }
        Ok(total)
    }

    fn send_control(&mut self, to: usize, message: &[u8]) -> Result<(), Error> {
        self.lanes[0].send_control(to, message)
    }

    fn try_recv_control(&mut self, from: usize) -> Result<Option<Vec<u8>>, Error> {
        self.lanes[0].try_recv_control(from)
    }

    fn wait(&mut self, until: Instant) {
        transport::wait(&mut self.lanes, until);
    }

    fn spin(&mut self) -> bool {
        let (first, others) = self.lanes.split_at_mut(1);
        others.iter_mut().for_each(TlsTransport::flush_behind);
        first[0].spin()
    }

    fn wait_is_over(&mut self) {
        self.lanes[0].wait_is_over();
    }

    fn waker(&self) -> Waker {
        self.lanes[0].waker()
    }

    fn give_up(&mut self, peer: usize, reason: &str) {
        self.lanes.iter_mut().for_each(|lane| lane.give_up(peer, reason));
    }

    fn split(&mut self, members: &[usize], id: u64, deadline: Instant) -> Result<Forming, Error> {
        let io = self.lanes[0].io().clone();
        let over = move |meshes: Vec<_>| {
            let bell = Bell::new()?;
            let lanes = meshes.into_iter().map(|mesh| TlsTransport::over(mesh, io.clone(), bell.clone()));
            let striped = Self::new(lanes.collect::<Result<_, Error>>()?)?;
            Ok(Box::new(striped) as Box<dyn Transport>)
        };
        let places: Vec<_> = self.lanes.iter().map(TlsTransport::place).collect();
        mesh::split(&places, (members, id), deadline, self.waker(), over)
    }

    fn abort(&mut self, message: &[u8], deadline: Instant) {
        transport::abort(&mut self.lanes, message, deadline);
    }

    fn leave(&mut self, deadline: Instant) -> Result<(), Error> {
        transport::leave(&mut self.lanes, deadline)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stripes_take_turns() {
        let full = STRIPE_BYTES as usize;
        assert_eq!(turn(0, 2), (0, full));
        assert_eq!(turn(STRIPE_BYTES - 1, 2), (0, 1));
        assert_eq!(turn(STRIPE_BYTES, 2), (1, full));
        assert_eq!(turn(2 * STRIPE_BYTES + 5, 2), (0, full - 5));
        assert_eq!(turn(7 * STRIPE_BYTES, 3), (1, full));
        assert_eq!(turn(3 * STRIPE_BYTES, 1), (0, full));
    }
}
