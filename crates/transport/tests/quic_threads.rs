//! Which threads wake up for packets. Alone in its process, all of whose threads it counts.

mod common;

use std::io::IoSlice;
use std::thread;

use common::*;
use paceline_transport::Transport;
use paceline_transport::quic::QuicTransport;

/// How often the threads called "paceline-io" of this process have gone to sleep.
fn io_sleeps() -> u64 {
    let tasks = std::fs::read_dir("/proc/self/task").expect("Linux").flatten();
    let of = |path: std::path::PathBuf| {
        let name = std::fs::read_to_string(path.join("comm")).unwrap_or_default();
        let status = std::fs::read_to_string(path.join("status")).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"))?;
        (name.trim() == "paceline-io").then(|| line.trim().parse::<u64>().ok())?
    };
    tasks.filter_map(|task| of(task.path())).sum()
}

#[test]
fn a_driving_caller_does_not_wake_the_io_thread_for_packets() {
    const TRIPS: usize = 2000;
    let (_group, mut zero, mut one) = pair::<Quic>("quiet");
    let ping = |transport: &mut QuicTransport, first: bool| {
        let peer = 1 - transport.rank();
        let mut byte = [0];
        for trip in 0..TRIPS {
            if first || trip > 0 {
                assert_eq!(transport.try_send(peer, &[IoSlice::new(&[7])]), Ok(1));
            }
            while transport.try_recv(peer, &mut byte).expect("the link is up") == 0 {
                if !transport.spin() {
                    transport.wait(deadline());
                }
            }
        }
        let _ = transport.try_send(peer, &[IoSlice::new(&[7])]);
    };
    let before = io_sleeps();
    thread::scope(|scope| {
        scope.spawn(|| ping(&mut zero, true));
        ping(&mut one, false);
    });
    let sleeps = io_sleeps() - before;
    // Two threads, at least a packet per trip each.
    assert!(sleeps < TRIPS as u64 / 2, "{sleeps} sleeps in {TRIPS} round trips");
}
