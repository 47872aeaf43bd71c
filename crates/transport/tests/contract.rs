//! The contract of `Transport`, kept by every kind of links between ranks in one process.

mod common;

use std::io::IoSlice;
use std::thread;
use std::time::{Duration, Instant};

use common::*;
use paceline_transport::{CONTROL_MESSAGE_LIMIT, Error, Forming, IoThread, Member, Roster, Transport};

/// Sends `outgoing` and receives as much as `incoming` at the same time; checks what comes.
fn exchange(transport: &mut impl Transport, peer: usize, outgoing: &[u8], incoming: &[u8]) {
    let (mut sent, mut got, until) = (0, 0, deadline());
    let mut received = vec![0; incoming.len()];
    while sent < outgoing.len() || got < received.len() {
        let now_sent = match sent < outgoing.len() {
            true => transport.try_send(peer, &[IoSlice::new(&outgoing[sent..])]).expect("the link is up"),
            false => 0,
        };
        let now_got = transport.try_recv(peer, &mut received[got..]).expect("the link is up");
        (sent, got) = (sent + now_sent, got + now_got);
        if now_sent + now_got == 0 {
            transport.wait(until);
        }
        assert!(Instant::now() < until, "sent {sent} and got {got}");
    }
    assert!(received == incoming, "the bytes from {peer} differ");
}

fn large_transfers_in_both_directions_at_once_arrive_intact<K: Kind>() {
    let (_group, mut zero, mut one) = pair::<K>("both-ways");
    let (a, b) = (pattern(1, 24 << 20), pattern(2, 24 << 20));
    thread::scope(|scope| {
        scope.spawn(|| exchange(&mut zero, 1, &a, &b));
        scope.spawn(|| exchange(&mut one, 0, &b, &a));
    });
}

fn four_ranks_exchange_with_everybody<K: Kind>() {
    let group = Group::<K>::bind("four", 4);
    let transports = group.connect(9);
    let bytes = |from: usize, to: usize| pattern((from * 4 + to) as u64, 300_000 + from);
    thread::scope(|scope| {
        for (rank, mut transport) in transports.into_iter().enumerate() {
            scope.spawn(move || {
                assert_eq!((transport.name(), transport.rank()), (K::NAME, rank));
                assert_eq!((transport.world_size(), transport.epoch()), (4, 9));
                for step in 1..4 {
                    let peer = rank ^ step;
                    exchange(&mut transport, peer, &bytes(rank, peer), &bytes(peer, rank));
                }
                transport.leave(deadline()).expect("everybody is there");
            });
        }
    });
}

fn several_parts_and_tiny_reads_keep_the_order<K: Kind>() {
    let (_group, mut zero, mut one) = pair::<K>("tiny");
    let bytes = pattern(3, 1000);
    let parts = [IoSlice::new(&bytes[..7]), IoSlice::new(&[]), IoSlice::new(&bytes[7..])];
    assert_eq!(zero.try_send(1, &parts), Ok(1000), "an empty window takes a short message whole");
    assert_eq!(one.try_recv(0, &mut []), Ok(0));
    for (at, byte) in bytes.iter().enumerate() {
        let mut read = [0];
        recv_exact(&mut one, 0, &mut read).expect("the link is up");
        assert_eq!(read[0], *byte, "at {at}");
    }
    assert_eq!(one.try_recv(0, &mut [0; 8]), Ok(0));
}

/// How long a window that takes nothing counts as full.
const FULL: Duration = Duration::from_millis(300);

/// Sends until the window is full; returns how much went in.
fn fill<K: Kind>(transport: &mut K::Transport, to: usize) -> usize {
    let (bytes, until, mut total, mut moved) = (vec![1; *K::WINDOW.end()], deadline(), 0, Instant::now());
    loop {
        match transport.try_send(to, &[IoSlice::new(&bytes)]).expect("the link is up") {
            0 if total >= *K::WINDOW.start() && moved.elapsed() > FULL => return total,
            0 => transport.wait(moved + FULL),
            sent => (total, moved) = (total + sent, Instant::now()),
        }
        assert!(total <= *K::WINDOW.end(), "the window has no end");
        assert!(Instant::now() < until, "only {total} bytes went in");
    }
}

fn a_full_window_takes_nothing_and_wakes_the_sender_when_there_is_room<K: Kind>() {
    let (_group, mut zero, mut one) = pair::<K>("window");
    let filled = fill::<K>(&mut zero, 1);
    assert_eq!(zero.try_send(1, &[IoSlice::new(&[1])]), Ok(0));
    let reader = thread::spawn(move || {
        recv_exact(&mut one, 0, &mut vec![0; filled]).expect("the link is up");
        one
    });
    send_all(&mut zero, 1, b"there is room").expect("the reader makes room");
    let mut one = reader.join().expect("no panic");
    let mut last = [0; 13];
    recv_exact(&mut one, 0, &mut last).expect("the link is up");
    assert_eq!(&last, b"there is room");
}

fn what_a_link_has_taken_arrives_though_the_sender_does_nothing_more<K: Kind>() {
    let (_group, mut zero, mut one) = pair::<K>("gone-away");
    let filled = fill::<K>(&mut zero, 1);
    recv_exact(&mut one, 0, &mut vec![0; filled]).expect("the link is up");
    // And once more: whatever sends it must have noticed that it is needed again.
    let filled = fill::<K>(&mut zero, 1);
    recv_exact(&mut one, 0, &mut vec![0; filled]).expect("the link is up");
}

fn control_messages_pass_unread_data<K: Kind>() {
    let (_group, mut zero, mut one) = pair::<K>("control");
    fill::<K>(&mut zero, 1);
    for n in 0..100_u8 {
        zero.send_control(1, &[n; 20]).expect("the link is up");
    }
    zero.send_control(1, &[0; CONTROL_MESSAGE_LIMIT]).expect("the longest one");
    let too_long = zero.send_control(1, &[0; CONTROL_MESSAGE_LIMIT + 1]);
    assert!(matches!(too_long, Err(Error::Usage { .. })), "{too_long:?}");
    for n in 0..100_u8 {
        assert_eq!(recv_control(&mut one, 0), Ok(vec![n; 20]));
    }
    assert_eq!(recv_control(&mut one, 0).map(|message| message.len()), Ok(CONTROL_MESSAGE_LIMIT));
    one.send_control(0, b"and back").expect("the link is up");
    assert_eq!(recv_control(&mut zero, 1), Ok(b"and back".to_vec()));
}

fn a_control_lane_that_nobody_reads_ends_the_link_and_not_the_process<K: Kind>() {
    let (_group, mut zero, mut one) = pair::<K>("unread");
    let message = [0; CONTROL_MESSAGE_LIMIT];
    let until = deadline();
    let error = loop {
        if let Err(error) = zero.send_control(1, &message) {
            break error;
        }
        assert!(Instant::now() < until, "unread control messages are not bounded");
    };
    assert_lost(&error, 1, "unread");
    assert_lost(&drain(&mut zero, 1).0, 1, "unread");
    assert_lost(&drain(&mut one, 0).0, 0, "it cut us off");
}

fn what_was_sent_before_a_leave_is_read_before_left<K: Kind>() {
    let (_group, mut zero, mut one) = pair::<K>("leave");
    let bytes = pattern(4, 1 << 20);
    send_all(&mut zero, 1, &bytes).expect("the link is up");
    zero.send_control(1, b"last words").expect("the link is up");
    zero.leave(deadline()).expect("one is there");
    zero.leave(deadline()).expect("leaving twice is leaving");
    let after = zero.try_send(1, &[IoSlice::new(b"more")]);
    assert!(matches!(after, Err(Error::Usage { .. })), "{after:?}");
    drop(zero);
    let mut read = vec![0; bytes.len()];
    recv_exact(&mut one, 0, &mut read).expect("what was delivered stays readable");
    assert!(read == bytes);
    for _ in 0..3 {
        assert_eq!(drain(&mut one, 0), (Error::Left { peer: 0 }, 0));
    }
    assert_eq!(recv_control(&mut one, 0), Ok(b"last words".to_vec()));
    assert_eq!(recv_control(&mut one, 0), Err(Error::Left { peer: 0 }));
    assert_eq!(one.try_send(0, &[IoSlice::new(b"x")]), Err(Error::Left { peer: 0 }));
    assert_eq!(one.send_control(0, b"x"), Err(Error::Left { peer: 0 }));
    one.leave(deadline()).expect("a peer that has left is not waited for");
}

fn leaving_waits_for_the_peer_and_names_who_does_not_confirm<K: Kind>() {
    let (group, mut zero, mut one) = pair::<K>("confirm");
    let freeze = group.freeze(1);
    let filled = fill::<K>(&mut zero, 1);
    let error = zero.leave(Instant::now() + Duration::from_millis(200)).expect_err("one is frozen");
    assert!(matches!(&error, Error::TimedOut { what, .. } if what.contains("rank 1")), "{error}");
    drop(zero);
    drop(freeze);
    // The goodbye overtook the data, but the data is incomplete: that is a loss.
    let (error, total) = drain(&mut one, 0);
    assert!(total < filled, "all {filled} bytes came");
    assert_lost(&error, 0, K::CUT);
}

fn an_end_with_a_full_congestion_window_is_told_all_the_same<K: Kind>() {
    // quinn-proto 0.11.19 by itself does not: see `congestion.rs`.
    let (group, mut zero, mut one) = pair::<K>("congested-drop");
    let freeze = group.freeze(1);
    fill::<K>(&mut zero, 1);
    drop(zero);
    drop(freeze);
    assert_lost(&drain(&mut one, 0).0, 0, "it ended without leaving");

    let (mut group, mut zero, mut one) = pair::<K>("congested-io");
    let freeze = group.freeze(1);
    fill::<K>(&mut zero, 1);
    drop(group.ios.remove(0));
    drop(freeze);
    assert_lost(&drain(&mut one, 0).0, 0, "its process ended");
}

fn ranks_that_leave_at_the_same_time_never_lose_each_other<K: Kind>() {
    for round in 0..10 {
        let (_group, zero, one) = pair::<K>("at-once");
        let leave = |mut transport: K::Transport, peer: usize| {
            let bytes = pattern(round, 100_000);
            send_all(&mut transport, peer, &bytes).expect("the link is up");
            recv_exact(&mut transport, peer, &mut vec![0; bytes.len()]).expect("the link is up");
            transport.leave(deadline()).expect("the peer is there or has left");
            assert_eq!(drain(&mut transport, peer), (Error::Left { peer }, 0));
        };
        thread::scope(|scope| {
            scope.spawn(|| leave(zero, 1));
            scope.spawn(|| leave(one, 0));
        });
    }
}

fn a_peer_dropped_without_leaving_is_lost_at_once_and_wakes_its_peers<K: Kind>() {
    let group = Group::<K>::bind("dropped", 3);
    let mut transports = group.connect(1);
    send_all(&mut transports[2], 0, b"half a message").expect("the link is up");
    let mut waiters: Vec<_> = transports
        .drain(..2)
        .map(|mut transport| {
            thread::spawn(move || {
                let started = Instant::now();
                let (error, _) = drain(&mut transport, 2);
                assert_lost(&error, 2, "it ended without leaving");
                assert_lost(&transport.try_send(2, &[IoSlice::new(b"x")]).expect_err("lost"), 2, "");
                assert_lost(&transport.send_control(2, b"x").expect_err("lost"), 2, "");
                assert_lost(&recv_control(&mut transport, 2).expect_err("lost"), 2, "");
                assert!(started.elapsed() < SOON);
                transport
            })
        })
        .collect();
    drop(transports);
    let one = waiters.pop().expect("two waiters").join().expect("no panic");
    let zero = waiters.pop().expect("two waiters").join().expect("no panic");
    // The other link lives on.
    let (mut zero, mut one) = (zero, one);
    send_all(&mut zero, 1, b"still here").expect("the link is up");
    recv_exact(&mut one, 0, &mut [0; 10]).expect("the link is up");
    zero.leave(deadline()).expect("the lost peer is not waited for");
}

fn a_full_window_towards_a_dropped_peer_wakes_as_lost<K: Kind>() {
    let (_group, mut zero, one) = pair::<K>("full-lost");
    fill::<K>(&mut zero, 1);
    let dropper = thread::spawn(move || drop(one));
    let bytes = vec![0; 64 << 20];
    assert_lost(&send_all(&mut zero, 1, &bytes).expect_err("lost"), 1, "it ended without leaving");
    dropper.join().expect("no panic");
}

fn an_abort_says_why_before_the_link_is_lost<K: Kind>() {
    let (_group, mut zero, mut one) = pair::<K>("abort");
    fill::<K>(&mut zero, 1);
    zero.send_control(1, b"earlier").expect("the link is up");
    let started = Instant::now();
    zero.abort(b"rank 0 ran out of memory", deadline());
    assert!(started.elapsed() < SOON, "unread data must not hold up an abort");
    assert_eq!(recv_control(&mut one, 0), Ok(b"earlier".to_vec()));
    assert_eq!(recv_control(&mut one, 0), Ok(b"rank 0 ran out of memory".to_vec()));
    assert_lost(&recv_control(&mut one, 0).expect_err("lost"), 0, "it gave up");
    assert_lost(&drain(&mut one, 0).0, 0, "it gave up");
    assert!(matches!(zero.send_control(1, b"x"), Err(Error::Usage { .. })));
}

fn missing_ranks_are_named_at_the_deadline<K: Kind>() {
    let group = Group::<K>::bind("missing", 3);
    let (_silence, silent) = K::silence();
    let mut roster = group.roster(1, 5);
    roster.members[0].addr = silent;
    let started = Instant::now();
    let error = K::connect(&group.endpoints[1], roster, started + Duration::from_millis(1500));
    let error = error.expect_err("nobody is there").to_string();
    assert!(started.elapsed() < SOON);
    let addrs = [silent, K::local_addr(&group.endpoints[2])];
    assert!(error.contains(&format!("rank 0 (m0 at {}", addrs[0])), "{error}");
    assert!(error.contains(&format!("rank 2 (m2 at {}: has not dialled us)", addrs[1])), "{error}");
    assert!(error.contains("epoch 5") && !error.contains("rank 1"), "{error}");
}

fn the_group_forms_although_ranks_come_late_and_in_any_order<K: Kind>() {
    let group = Group::<K>::bind("late", 3);
    thread::scope(|scope| {
        let connect = |rank: usize| {
            let (endpoint, roster) = (&group.endpoints[rank], group.roster(rank, 1));
            move || K::connect(endpoint, roster, deadline()).map(drop)
        };
        let two = scope.spawn(connect(2));
        // Rank 0's endpoint lets rank 2 in before there is a transport, and the connection is lost then.
        assert_eq!(K::accept_and_drop(&group.ios[0].handle(), &group.endpoints[0]), "m2");
        let one = scope.spawn(connect(1));
        let zero = scope.spawn(connect(0));
        for rank in [zero, one, two] {
            rank.join().expect("no panic").expect("all are there");
        }
    });
}

fn an_endpoint_that_is_bound_late_is_found<K: Kind>() {
    let authority = authority("bound-late");
    let (io, later_io) = (start_io(), start_io());
    let one = K::bind(&io.handle(), loopback(), &identity(&authority, "m1")).expect("a free port");
    let (reserved, zero_addr) = K::silence();
    let members = vec![
        Member { name: "m0".to_owned(), addr: zero_addr },
        Member { name: "m1".to_owned(), addr: K::local_addr(&one) },
    ];
    let roster =
        |rank: usize| Roster { job: "bound-late".to_owned(), epoch: 1, rank, members: members.clone() };
    thread::scope(|scope| {
        let dialler = scope.spawn(|| K::connect(&one, roster(1), deadline()));
        // The first try is lost to a socket that is no endpoint.
        K::dialled(&reserved);
        drop(reserved);
        let endpoint = K::bind(&later_io.handle(), zero_addr, &identity(&authority, "m0"));
        let endpoint = endpoint.expect("the port is free again");
        let _zero = K::connect(&endpoint, roster(0), deadline()).expect("rank 1 tries again");
        dialler.join().expect("no panic").expect("rank 0 is there");
    });
}

fn start_io() -> IoThread {
    IoThread::start().expect("a thread")
}

fn a_new_epoch_forms_on_the_same_endpoints_while_the_old_one_ends<K: Kind>() {
    let (group, zero, one) = pair::<K>("epochs");
    thread::scope(|scope| {
        let connect = |rank: usize| K::connect(&group.endpoints[rank], group.roster(rank, 2), deadline());
        let next_one = scope.spawn(move || {
            drop(one);
            connect(1)
        });
        let next_zero = scope.spawn(move || {
            let mut zero = zero;
            // Rank 1 is ahead: it dials while this rank still serves epoch 1.
            assert_lost(&drain(&mut zero, 1).0, 1, "");
            drop(zero);
            connect(0)
        });
        let mut zero = next_zero.join().expect("no panic").expect("epoch 2 forms");
        let mut one = next_one.join().expect("no panic").expect("epoch 2 forms");
        send_all(&mut zero, 1, b"epoch 2").expect("the link is up");
        recv_exact(&mut one, 0, &mut [0; 7]).expect("the link is up");
        assert_eq!((zero.epoch(), one.epoch()), (2, 2));
    });
}

/// The links of a new group, which must be there in time.
fn formed(transport: &mut impl Transport, forming: &mut Forming) -> Result<Box<dyn Transport>, Error> {
    let deadline = deadline();
    loop {
        if let Some(result) = forming.take() {
            return result;
        }
        assert!(Instant::now() < deadline, "no result in time");
        transport.wait(deadline);
    }
}

fn a_group_split_from_others_has_links_of_its_own<K: Kind>() {
    let group = Group::<K>::bind("split", 3);
    let mut transports = group.connect(1);
    let (one, rest) = transports.split_at_mut(2);
    let (one, two) = (&mut one[1], &mut rest[0]);
    // Rank 2 becomes rank 0, and is dialled before it has begun.
    let mut forming_one = one.split(&[2, 1], 77, deadline()).expect("a member");
    assert!(forming_one.take().is_none());
    thread::sleep(Duration::from_millis(50));
    let mut forming_two = two.split(&[2, 1], 77, deadline()).expect("a member");
    let mut new_two = formed(two, &mut forming_two).expect("rank 1 has come");
    let mut new_one = formed(one, &mut forming_one).expect("rank 2 has come");
    assert_eq!((new_one.rank(), new_two.rank(), new_one.world_size()), (1, 0, 2));
    assert_eq!(new_one.epoch(), 1);
    send_all(two, 1, b"old").expect("the old link lives");
    assert_eq!(new_two.try_send(1, &[IoSlice::new(b"new")]), Ok(3));
    let mut bytes = [0; 3];
    recv_exact(one, 2, &mut bytes).expect("the old link lives");
    assert_eq!(&bytes, b"old");
    new_two.leave(deadline()).expect("rank 1 has it all");
    while new_one.try_recv(0, &mut bytes) == Ok(0) {
        new_one.wait(deadline());
    }
    assert_eq!(&bytes, b"new");
    let mut again = one.split(&[2, 1], 77, deadline()).expect("a member");
    assert!(matches!(formed(one, &mut again), Err(Error::Usage { .. })), "the id is in use");
}

fn members_that_do_not_split_are_named_at_the_deadline<K: Kind>() {
    let (_group, mut zero, mut one) = pair::<K>("no-split");
    for (members, id) in [(&[1][..], 5), (&[0, 2], 5), (&[0, 1], 0)] {
        assert!(matches!(zero.split(members, id, deadline()), Err(Error::Usage { .. })), "{members:?}");
    }
    let soon = || Instant::now() + Duration::from_millis(300);
    for (transport, absent) in [(&mut zero, "rank 1"), (&mut one, "rank 0")] {
        let mut forming = transport.split(&[0, 1], 5, soon()).expect("a member");
        let error = formed(transport, &mut forming).expect_err("nobody else splits").to_string();
        assert!(error.contains(absent), "{error}");
    }
}

fn a_world_of_one_has_nothing_to_wait_for<K: Kind>() {
    let group = Group::<K>::bind("alone", 1);
    let mut alone = group.connect(1).remove(0);
    alone.leave(Instant::now()).expect("nobody to wait for");
}

fn a_roster_that_does_not_fit_the_endpoint_is_refused<K: Kind>() {
    let group = Group::<K>::bind("roster", 2);
    let refused = |roster: Roster, says: &str| {
        let error = K::connect(&group.endpoints[0], roster, deadline()).expect_err("refused");
        assert!(matches!(&error, Error::Usage { reason } if reason.contains(says)), "{error}");
    };
    refused(Roster { rank: 2, ..group.roster(0, 1) }, "rank 2 is not in a roster of 2");
    refused(group.roster(1, 1), "this endpoint is m0");
    refused(Roster { job: "other".to_owned(), ..group.roster(0, 1) }, "job other");
    let mut twice = group.roster(0, 1);
    twice.members[1].name = "m0".to_owned();
    refused(twice, "m0 is twice");
}

fn the_end_of_the_io_thread_is_seen_by_both_sides_at_once<K: Kind>() {
    let (mut group, mut zero, mut one) = pair::<K>("io-ends");
    let started = Instant::now();
    drop(group.ios.remove(0));
    assert_lost(&drain(&mut one, 0).0, 0, "its process ended");
    assert_lost(&drain(&mut zero, 1).0, 1, "this process closed");
    assert!(matches!(zero.leave(deadline()), Err(Error::Usage { .. })));
    drop(zero);
    assert!(started.elapsed() < SOON);
}

fn a_waker_from_another_thread_ends_the_wait<K: Kind>() {
    let (_group, mut zero, _one) = pair::<K>("waker");
    let waker = zero.waker();
    let helper = thread::spawn(move || waker.wake());
    let started = Instant::now();
    zero.wait(deadline());
    assert!(started.elapsed() < SOON);
    helper.join().expect("no panic");
}

on_every_kind! {
    large_transfers_in_both_directions_at_once_arrive_intact,
    four_ranks_exchange_with_everybody,
    several_parts_and_tiny_reads_keep_the_order,
    a_full_window_takes_nothing_and_wakes_the_sender_when_there_is_room,
    what_a_link_has_taken_arrives_though_the_sender_does_nothing_more,
    control_messages_pass_unread_data,
    a_control_lane_that_nobody_reads_ends_the_link_and_not_the_process,
    what_was_sent_before_a_leave_is_read_before_left,
    leaving_waits_for_the_peer_and_names_who_does_not_confirm,
    an_end_with_a_full_congestion_window_is_told_all_the_same,
    ranks_that_leave_at_the_same_time_never_lose_each_other,
    a_peer_dropped_without_leaving_is_lost_at_once_and_wakes_its_peers,
    a_full_window_towards_a_dropped_peer_wakes_as_lost,
    an_abort_says_why_before_the_link_is_lost,
    missing_ranks_are_named_at_the_deadline,
    the_group_forms_although_ranks_come_late_and_in_any_order,
    an_endpoint_that_is_bound_late_is_found,
    a_new_epoch_forms_on_the_same_endpoints_while_the_old_one_ends,
    a_group_split_from_others_has_links_of_its_own,
    members_that_do_not_split_are_named_at_the_deadline,
    a_world_of_one_has_nothing_to_wait_for,
    a_roster_that_does_not_fit_the_endpoint_is_refused,
    the_end_of_the_io_thread_is_seen_by_both_sides_at_once,
    a_waker_from_another_thread_ends_the_wait,
}
