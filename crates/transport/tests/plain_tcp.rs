//! Links over plain TCP: what somebody on the way sees of them, and of those over TLS; and that the one kind is not
//! had by asking for the other.

mod common;

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use common::{Group, Kind, Tcp, Tls, deadline, recv_exact, send_all};
use paceline_transport::{Error, Roster, Transport};

/// Somebody on the way to `to`, who writes down what passes.
struct Listener {
    addr: SocketAddr,
    heard: Arc<Mutex<Vec<u8>>>,
}

impl Listener {
    fn before(to: SocketAddr) -> Self {
        let socket = TcpListener::bind(common::loopback()).expect("a free port");
        let addr = socket.local_addr().expect("bound");
        let heard = Arc::new(Mutex::new(Vec::new()));
        let all = heard.clone();
        std::thread::spawn(move || {
            for near in socket.incoming().map_while(Result::ok) {
                let Ok(far) = TcpStream::connect(to) else { return };
                for (from, to) in [(&near, &far), (&far, &near)] {
                    let [from, to] =
                        [from, to].map(|socket| socket.try_clone().expect("descriptors are left"));
                    let all = all.clone();
                    std::thread::spawn(move || pass_on(from, to, &all));
                }
            }
        });
        Self { addr, heard }
    }

    fn has_heard(&self, words: &[u8]) -> bool {
        self.heard.lock().expect("nobody panics").windows(words.len()).any(|heard| heard == words)
    }
}

fn pass_on(mut from: TcpStream, mut to: TcpStream, heard: &Mutex<Vec<u8>>) {
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        heard.lock().expect("nobody panics").extend_from_slice(&buffer[..count]);
        if to.write_all(&buffer[..count]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Write);
}

const WORDS: &[u8] = b"a gradient that is nobody's business";
const CONTROL: &[u8] = b"a reason that is nobody's business";

/// Two ranks with somebody between them, who have said these words to each other.
fn overheard<K: Kind>() -> Listener {
    let group = Group::<K>::bind("overheard", 2);
    let mut rosters: [Roster; 2] = [0, 1].map(|rank| group.roster(rank, 1));
    let listener = Listener::before(K::local_addr(&group.endpoints[0]));
    rosters[1].members[0].addr = listener.addr;
    let [first, second] = rosters;
    std::thread::scope(|scope| {
        let (zero, one) = (&group.endpoints[0], &group.endpoints[1]);
        let zero = scope.spawn(move || {
            let mut zero = K::connect(zero, first, deadline()).expect("rank 1 dials");
            // The control message first: rank 1 leaves as soon as it has the words.
            zero.send_control(1, CONTROL).expect("rank 1 is there");
            send_all(&mut zero, 1, WORDS).expect("rank 1 is there");
            expect_words(&mut zero, 1);
            zero.leave(deadline()).expect("rank 1 leaves too");
        });
        let mut one = K::connect(one, second, deadline()).expect("rank 0 is there");
        send_all(&mut one, 0, WORDS).expect("rank 0 is there");
        expect_words(&mut one, 0);
        one.leave(deadline()).expect("rank 0 leaves too");
        zero.join().expect("no panic");
    });
    listener
}

fn expect_words(transport: &mut impl Transport, from: usize) {
    let mut got = vec![0; WORDS.len()];
    recv_exact(transport, from, &mut got).expect("it sends as many");
    assert_eq!(got, WORDS);
}

#[test]
fn over_plain_tcp_data_is_overheard_and_control_messages_are_not() {
    let listener = overheard::<Tcp>();
    assert!(listener.has_heard(WORDS));
    assert!(!listener.has_heard(CONTROL));
}

#[test]
fn over_tls_nothing_is_overheard() {
    let listener = overheard::<Tls>();
    assert!(!listener.has_heard(WORDS) && !listener.has_heard(CONTROL));
    assert!(!listener.heard.lock().expect("nobody panics").is_empty(), "it was passed by");
}

#[test]
fn neither_kind_is_had_by_asking_for_the_other() {
    let tls = Group::<Tls>::bind("kinds", 2);
    // m1 with its own certificate, but of the other kind.
    let plain = Tcp::bind(&tls.ios[1].handle(), common::loopback(), tls.endpoints[1].identity());
    let plain = plain.expect("a free port");
    for (io, dialler, member, addr) in [
        (&tls.ios[1], &plain, "m0", tls.endpoints[0].local_addr()),
        (&tls.ios[0], &tls.endpoints[0], "m1", plain.local_addr()),
    ] {
        let (dialler, member) = (dialler.clone(), member.to_owned());
        let dialled = io.handle().block_on(async move { dialler.connect(addr, &member).await });
        let error = dialled.expect("io runs").expect_err("they are of different kinds");
        assert!(matches!(&error, Error::Refused { reason, .. } if reason.contains("(ALPN)")), "{error}");
    }
}
