//! How much of what was written to a TCP socket has not arrived yet.
#![allow(unsafe_code)]

use std::ffi::c_int;
use std::os::fd::BorrowedFd;

use rustix::ioctl::{Getter, Opcode, ioctl};

/// `SIOCOUTQ` of tcp(7): the bytes of a socket's send queue, those on their way included.
const SIOCOUTQ: Opcode = 0x5411;

/// `SIOCOUTQNSD` of Linux's sockios.h: those of them that are not on their way.
const SIOCOUTQNSD: Opcode = 0x894b;

/// The bytes that were written to `socket`, of TCP, and that the other side's operating system has not
/// acknowledged.
pub(super) fn unacknowledged(socket: BorrowedFd<'_>) -> rustix::io::Result<usize> {
    // SAFETY: this request writes one int and reads nothing (tcp(7)), whatever the descriptor is; other files
    // refuse it.
    let count = unsafe { ioctl(socket, Getter::<SIOCOUTQ, c_int>::new()) }?;
    // It is never negative.
    Ok(usize::try_from(count).unwrap_or(0))
}

/// Those of the [`unacknowledged`] bytes that have not been sent either, for want of the other side's room or
/// of the network's.
pub(super) fn unsent(socket: BorrowedFd<'_>) -> rustix::io::Result<usize> {
    // SAFETY: as above.
    let count = unsafe { ioctl(socket, Getter::<SIOCOUTQNSD, c_int>::new()) }?;
    Ok(usize::try_from(count).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd;
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn what_the_other_side_has_no_room_for_is_not_on_its_way() {
        let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a free port");
        let mut one = TcpStream::connect(listener.local_addr().expect("it is bound")).expect("it listens");
        let (mut other, _) = listener.accept().expect("it has dialled");
        one.set_nonblocking(true).expect("set");
        let mut written = 0;
        while let Ok(count) = one.write(&[0; 65_536]) {
            written += count;
        }
        let until = Instant::now() + Duration::from_secs(30);
        let (mut waiting, mut queued) = (0, 1);
        while waiting != queued {
            assert!(Instant::now() < until, "{waiting} of {queued} bytes are not on their way");
            queued = unacknowledged(one.as_fd()).expect("of TCP");
            waiting = unsent(one.as_fd()).expect("of TCP");
        }
        assert!((1..=written).contains(&queued), "{queued} of {written} bytes");
        other.read_exact(&mut vec![0; written]).expect("all of it comes");
        while unacknowledged(one.as_fd()).expect("of TCP") > 0 {
            assert!(Instant::now() < until, "all has been read");
        }
    }
}
