//! Both ends of a connection, over a link of memory with a small window.

use std::collections::HashMap;
use std::io::IoSlice;

use paceline_transport::mem::{self, MemTransport};
use paceline_transport::{Error, Transport};
use proptest::prelude::*;

use crate::abi::{INVALID_ARGUMENT, INVALID_USAGE, REMOTE_ERROR};
use crate::failure::Failure;
use crate::memory::{Sink, Source};
use crate::message::{self, GROUP_LIMIT, Head, Slot};
use crate::receiver::{POSTED_LIMIT, Receiver, Room};
use crate::sender::Sender;

fn links(window: usize) -> (MemTransport, MemTransport) {
    let mut group = mem::group(2, 0, window);
    let dialler = group.pop().expect("two of them");
    (group.pop().expect("two of them"), dialler)
}

fn ends(window: usize) -> (Receiver, Sender) {
    let (listener, dialler) = links(window);
    (Receiver::new(Box::new(listener), "s".to_owned()), Sender::new(Box::new(dialler), "r".to_owned()))
}

fn room(tag: i32, len: usize) -> (Room, impl Fn() -> Vec<u8>) {
    let (sink, look) = Sink::leaked(len);
    (Room { tag, sink }, look)
}

fn message(seed: u64, len: usize) -> Vec<u8> {
    (0..len as u64).map(|at| (at.wrapping_mul(31).wrapping_add(seed * 7)) as u8).collect()
}

/// A receive of messages by tag, and in which order they are sent.
#[derive(Clone, Debug)]
struct Group {
    /// Of each slot: the size of the message, and how much more room there is.
    slots: Vec<(usize, usize)>,
    order: Vec<usize>,
}

fn groups() -> impl Strategy<Value = Vec<Group>> {
    let slots = prop::collection::vec((0..300_usize, 0..50_usize), 1..=GROUP_LIMIT);
    let group = slots.prop_flat_map(|slots| {
        let order = Just((0..slots.len()).collect::<Vec<_>>()).prop_shuffle();
        (Just(slots), order).prop_map(|(slots, order)| Group { slots, order })
    });
    prop::collection::vec(group, 1..12)
}

proptest! {
    #[test]
    fn every_message_arrives_in_the_slot_of_its_tag_whatever_the_order(groups in groups(), window in 13..400_usize) {
        let (mut receiver, mut sender) = ends(window);
        let mut looks = Vec::new();
        let mut receives = Vec::new();
        for (number, group) in groups.iter().enumerate() {
            let rooms = group.slots.iter().enumerate().map(|(slot, (size, more))| {
                let (room, look) = room(slot as i32 * 10, size + more);
                looks.push((message((number * 10 + slot) as u64, *size), look));
                room
            });
            receives.push(receiver.receive(rooms.collect()).expect("the link is up").expect("within the limit"));
        }
        let mut to_send = groups.iter().enumerate().flat_map(|(number, group)| {
            group.order.iter().map(move |&slot| (slot as i32 * 10, message((number * 10 + slot) as u64, group.slots[slot].0)))
        }).collect::<std::collections::VecDeque<_>>();
        let mut sends: HashMap<u32, usize> = HashMap::new();
        let mut received: HashMap<u32, Vec<usize>> = HashMap::new();
        let mut turns = 0;
        while received.len() < receives.len() || !sends.is_empty() || !to_send.is_empty() {
            if let Some((tag, bytes)) = to_send.front()
                && let Some(request) = sender.send(*tag, Source::leaked(bytes.clone())).expect("the link is up")
            {
                sends.insert(request, bytes.len());
                to_send.pop_front();
            }
            for request in sends.keys().copied().collect::<Vec<_>>() {
                if let Some(size) = sender.test(request).expect("the link is up") {
                    prop_assert_eq!(sends.remove(&request), Some(size));
                }
            }
            for &request in receives.iter().filter(|request| !received.contains_key(request)).collect::<Vec<_>>() {
                if let Some(sizes) = receiver.test(request).expect("the link is up") {
                    received.insert(request, sizes);
                }
            }
            turns += 1;
            prop_assert!(turns < 1_000_000, "it hangs");
        }
        for (request, group) in receives.iter().zip(&groups) {
            let sizes: Vec<usize> = group.slots.iter().map(|(size, _)| *size).collect();
            prop_assert_eq!(&received[request], &sizes);
        }
        for (message, look) in looks {
            prop_assert_eq!(&look()[..message.len()], &message[..]);
            prop_assert!(look()[message.len()..].iter().all(|&byte| byte == 0), "beyond the message");
        }
    }

    #[test]
    fn whatever_a_sender_sends_is_taken_or_ends_the_connection(
        bytes in prop::collection::vec(any::<u8>(), 1..200), offer in 0..3_u64, slot in 0..4_u32, size in 0..100_u64, known: bool,
    ) {
        let (listener, mut dialler) = links(10_000);
        let mut receiver = Receiver::new(Box::new(listener), "s".to_owned());
        let rooms = [40, 50].map(|len| room(1, len).0).into_iter().collect();
        let request = receiver.receive(rooms).expect("the link is up").expect("within the limit");
        let head = Head { offer, slot, size }.to_bytes();
        let head = if known { &head[..] } else { &[] };
        dialler.try_send(0, &[IoSlice::new(head), IoSlice::new(&bytes)]).expect("the link is up");
        for _ in 0..10 {
            match receiver.test(request) {
                Ok(None) => {}
                Ok(Some(sizes)) => { prop_assert!(sizes.iter().zip([40, 50]).all(|(&size, room)| size <= room)); break; }
                Err(failure) => { prop_assert_eq!(failure.code, REMOTE_ERROR); break; }
            }
        }
    }

    #[test]
    fn whatever_a_receiver_offers_is_taken_or_ends_the_connection(
        bytes in prop::collection::vec(any::<u8>(), 1..200), count in 0..10_u32, known: bool,
    ) {
        let (mut listener, dialler) = links(10_000);
        let mut sender = Sender::new(Box::new(dialler), "r".to_owned());
        let head = [&b"PNO1"[..], &count.to_le_bytes()].concat();
        let head = if known { &head[..] } else { &[] };
        listener.try_send(1, &[IoSlice::new(head), IoSlice::new(&bytes)]).expect("the link is up");
        for tag in 0..10 {
            match sender.send(tag, Source::leaked(vec![1])) {
                Ok(_) => {}
                Err(failure) => prop_assert!([REMOTE_ERROR, INVALID_USAGE].contains(&failure.code), "{:?}", failure),
            }
        }
    }
}

#[test]
fn a_message_that_fits_no_slot_of_the_first_offer_is_not_accepted_yet() {
    let (mut receiver, mut sender) = ends(10_000);
    let mut send = |tag| sender.send(tag, Source::leaked(vec![9])).expect("the link is up");
    assert_eq!(send(1), None, "nothing is offered");
    receiver.receive(vec![room(1, 1).0, room(2, 1).0]).expect("the link is up");
    receiver.receive(vec![room(3, 1).0]).expect("the link is up");
    assert_eq!(send(3), None, "its offer is the second");
    assert!(send(2).is_some());
    assert_eq!(send(2), None, "its slot is taken");
    assert!(send(1).is_some() && send(3).is_some());
}

#[test]
fn a_message_that_is_longer_than_its_room_is_refused_and_the_connection_goes_on() {
    let (mut receiver, mut sender) = ends(10_000);
    let request = receiver.receive(vec![room(1, 4).0]).expect("up").expect("within the limit");
    let failure = sender.send(1, Source::leaked(vec![0; 5])).expect_err("too long");
    assert_eq!(failure.code, INVALID_USAGE);
    assert!(failure.reason.expect("said for the first time").contains("room for 4"));
    sender.send(1, Source::leaked(vec![7; 4])).expect("up").expect("room");
    assert_eq!(receiver.test(request), Ok(Some(vec![4])));
}

#[test]
fn requests_beyond_the_limit_wait_and_unknown_ones_are_refused() {
    let (mut receiver, mut sender) = ends(100_000);
    for _ in 0..POSTED_LIMIT {
        assert!(receiver.receive(vec![room(0, 1).0]).expect("up").is_some());
    }
    assert_eq!(receiver.receive(vec![room(0, 1).0]), Ok(None));
    for failure in [receiver.test(999).expect_err("unknown"), sender.test(999).expect_err("unknown")] {
        assert_eq!(failure.code, INVALID_ARGUMENT);
    }
    for count in [0, GROUP_LIMIT + 1] {
        let rooms = (0..count).map(|_| room(0, 1).0).collect();
        assert_eq!(receiver.receive(rooms).expect_err("no such group").code, INVALID_ARGUMENT);
    }
}

#[test]
fn a_lost_peer_is_a_remote_error_that_is_told_once_and_stays() {
    let (mut receiver, sender) = ends(10_000);
    let request = receiver.receive(vec![room(1, 4).0]).expect("up").expect("within the limit");
    drop(sender);
    let failure = receiver.test(request).expect_err("the sender is gone");
    assert!(failure.code == REMOTE_ERROR && failure.reason.is_some(), "{failure:?}");
    let again = Failure { reason: None, ..failure };
    assert_eq!(receiver.test(request), Err(again.clone()));
    assert_eq!(receiver.receive(vec![room(1, 4).0]), Err(again));

    let (receiver, mut sender) = ends(10_000);
    drop(receiver);
    assert_eq!(sender.send(1, Source::leaked(vec![1])).expect_err("the receiver is gone").code, REMOTE_ERROR);
}

#[test]
fn offers_are_read_one_at_a_time_however_many_come() {
    let (mut listener, dialler) = links(1_000_000);
    let mut sender = Sender::new(Box::new(dialler), "r".to_owned());
    let mut offers = Vec::new();
    for number in 0..1000 {
        message::write_offer(&mut offers, number, [Slot { tag: 5, size: 1 }].into_iter());
    }
    listener.try_send(1, &[IoSlice::new(&offers)]).expect("the link is up");
    for _ in 0..1000 {
        let request =
            sender.send(5, Source::leaked(vec![1])).expect("the link is up").expect("it was offered");
        assert_eq!(sender.test(request), Ok(Some(1)));
    }
    assert_eq!(sender.send(5, Source::leaked(vec![1])), Ok(None));
}

#[test]
fn a_link_that_ends_in_order_is_told_as_closed() {
    let failure = Failure::of_link("worker-1", &Error::Left { peer: 1 });
    assert_eq!(
        (failure.code, failure.reason.as_deref()),
        (REMOTE_ERROR, Some("worker-1 has closed the connection"))
    );
}
