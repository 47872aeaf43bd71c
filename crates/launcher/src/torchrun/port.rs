//! A port for the program's own rendezvous (MASTER_PORT): another one for each generation of the job.

use std::net::TcpListener;
use std::ops::RangeInclusive;

/// Ports that anybody may listen at and that need no thought of who usually does.
const LOWEST: u16 = 15_000;

/// How many ports are tried. On a machine with so many in use the system's choice is no worse.
const TRIES: usize = 64;

/// A port where nobody listens on this machine. `random` chooses.
///
/// It is one that the system gives to nobody who does not ask for it: between this look and the program's own use some seconds
/// may pass, and an outgoing connection of any process could take a port of the system's own range meanwhile.
pub fn free(mut random: impl FnMut() -> u64) -> Option<u16> {
    let systems = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range");
    let ports = outside(&systems.unwrap_or_default());
    let tried =
        (0..TRIES).map(|_| ports.start() + (random() % u64::from(ports.end() - ports.start() + 1)) as u16);
    let is_free = |port: &u16| ["0.0.0.0", "::"].iter().all(|any| can_listen(any, *port));
    tried.into_iter().find(is_free).or_else(any)
}

/// What the system does not give out by itself, below its own range.
fn outside(systems: &str) -> RangeInclusive<u16> {
    let first = systems.split_whitespace().next().and_then(|first| first.parse().ok()).unwrap_or(32_768);
    if first > LOWEST + 1000 { LOWEST..=first - 1 } else { LOWEST..=32_767 }
}

/// A family that the machine does not have is no hindrance.
fn can_listen(host: &str, port: u16) -> bool {
    match TcpListener::bind((host, port)) {
        Ok(_) => true,
        Err(e) => !matches!(e.kind(), std::io::ErrorKind::AddrInUse | std::io::ErrorKind::PermissionDenied),
    }
}

fn any() -> Option<u16> {
    TcpListener::bind(("0.0.0.0", 0)).and_then(|listener| listener.local_addr()).ok().map(|addr| addr.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_that_the_system_gives_out_are_left_to_it() {
        assert_eq!(outside("32768\t60999\n"), 15_000..=32_767);
        assert_eq!(outside("20000 60999"), 15_000..=19_999);
        assert_eq!(outside("1024 65535"), 15_000..=32_767, "there is nothing else");
        assert_eq!(outside(""), 15_000..=32_767);
    }

    #[test]
    fn a_port_in_use_is_passed_over() {
        let mut listeners = (0..50).filter_map(|offset| TcpListener::bind(("0.0.0.0", 21_000 + offset)).ok());
        let taken = listeners.next().expect("one of fifty is free");
        let port = taken.local_addr().expect("bound").port();
        let ports =
            outside(&std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default());
        let mut random = u64::from(port - ports.start())..;
        let free = free(|| random.next().expect("endless")).expect("a port");
        assert_ne!(free, port);
    }
}
