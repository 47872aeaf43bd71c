//! What the paths to other machines are like, and what that means.

use std::net::IpAddr;
use std::time::Duration;

use super::finding::Finding;
use crate::discovery::Wanted;
use crate::discovery::search::Seen;
use crate::pod::Pod;

/// How wrong the time may be before certificates of the job are not yet valid elsewhere: they begin so much early.
const CLOCK_FAILS: Duration = Duration::from_secs(300);

/// From here on logs of several machines are hard to read together.
const CLOCK_WARNS: Duration = Duration::from_millis(500);

/// The shortest packet that every path must carry for QUIC (RFC 9000, section 14), with the headers of IPv6.
const PACKET_LEAST: u32 = 1280;

/// What was measured about another machine.
#[derive(Debug, Clone, PartialEq)]
pub enum Path {
    /// It was not reached.
    Missing(Seen),
    /// Something answers over TCP that is no doctor: a launcher, most likely.
    NoDoctor(IpAddr),
    /// A doctor answers.
    Doctor(Measured),
}

/// What two doctors have measured.
#[derive(Debug, Clone, PartialEq)]
pub struct Measured {
    /// The other's address.
    pub ip: IpAddr,
    /// The answer to a small datagram, if one came.
    pub udp: Option<Exchange>,
    /// The longest packet that arrived, in bytes with its headers; `None` without UDP.
    pub packet_bytes: Option<u32>,
    /// What the interface here can send.
    pub mtu: Option<u32>,
}

/// The quickest of several exchanges.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Exchange {
    /// There and back.
    pub round_trip: Duration,
    /// How much later it is there than here, in microseconds.
    pub later_us: i64,
}

impl Exchange {
    /// Of the times here when the question was sent and the answer came, and there when it was given, all in microseconds.
    pub fn of(sent_us: u64, given_us: u64, came_us: u64) -> Self {
        let round_trip = Duration::from_micros(came_us.saturating_sub(sent_us));
        // The answer is taken to be given half way.
        let half_way = sent_us + round_trip.as_micros() as u64 / 2;
        Self { round_trip, later_us: given_us as i64 - half_way as i64 }
    }
}

/// Whom to look for: the other pods, and those that were named.
pub fn wanted(pod: Option<&Pod>, named: &[String]) -> Vec<Wanted> {
    let own = pod.and_then(|pod| pod.index.as_ref()).map(|index| index.value as usize);
    let peers = pod.map(|pod| pod.peers.as_slice()).unwrap_or_default();
    let others = peers.iter().enumerate().filter(|&(number, _)| Some(number) != own);
    let others = others
        .map(|(_, peer)| Wanted { name: format!("{} {}", peer.role, peer.index), host: peer.host.clone() });
    others.chain(named.iter().map(|host| Wanted { name: host.clone(), host: Some(host.clone()) })).collect()
}

/// What was measured, in findings.
pub fn judge(name: &str, path: &Path) -> Vec<Finding> {
    let what = |what: &str| format!("{what} {name}");
    match path {
        Path::Missing(seen) => vec![Finding::failed(what("TCP to"), seen.to_string(), advice(seen))],
        Path::NoDoctor(ip) => vec![
            Finding::ok(what("TCP to"), format!("{ip} answers")),
            Finding::warning(
                what("UDP to"),
                "not measured: what answers there is no doctor".to_owned(),
                "run paceline doctor there at the same time",
            ),
        ],
        Path::Doctor(measured) => {
            let mut findings = vec![Finding::ok(what("TCP to"), format!("{} answers", measured.ip))];
            findings.push(udp(what("UDP to"), measured));
            findings
                .extend(measured.packet_bytes.map(|bytes| packets(what("packets to"), bytes, measured.mtu)));
            findings.extend(measured.udp.map(|exchange| clock(what("clock of"), exchange)));
            findings
        }
    }
}

fn advice(seen: &Seen) -> &'static str {
    match seen {
        Seen::NoName | Seen::Nameless => {
            "see whether its pod exists; its headless service should have publishNotReadyAddresses: true"
        }
        Seen::NoDns(_) => "see whether the cluster's DNS runs and a network policy allows port 53",
        Seen::Refused => "start paceline doctor or run there; it listens at the port 29400 or PACELINE_PORT",
        Seen::Unreachable(_) | Seen::Listens => {
            "see whether a network policy or firewall drops TCP to this port"
        }
    }
}

fn udp(what: String, measured: &Measured) -> Finding {
    match measured.udp {
        Some(Exchange { round_trip, .. }) => {
            Finding::ok(what, format!("answered in {} µs", round_trip.as_micros()))
        }
        None => Finding::warning(
            what,
            "no datagram was answered".to_owned(),
            "jobs go over TLS on TCP, which PACELINE_FABRIC=tls says at once; or allow UDP in network policies",
        ),
    }
}

fn packets(what: String, bytes: u32, mtu: Option<u32>) -> Finding {
    match mtu {
        _ if bytes < PACKET_LEAST => Finding::failed(
            what,
            format!("none of more than {bytes} bytes arrives, and QUIC needs {PACKET_LEAST}"),
            "raise the MTU along the path, or PACELINE_FABRIC=tls",
        ),
        Some(mtu) if bytes < mtu => Finding::warning(
            what,
            format!("up to {bytes} bytes arrive, though the interface here says {mtu}"),
            "set the interface's MTU to what the path carries, or raise the path's",
        ),
        _ => Finding::ok(what, format!("up to {bytes} bytes arrive")),
    }
}

fn clock(what: String, exchange: Exchange) -> Finding {
    let (off, uncertain) = (Duration::from_micros(exchange.later_us.unsigned_abs()), exchange.round_trip / 2);
    let direction = if exchange.later_us < 0 { "behind" } else { "ahead" };
    let said = format!("{:.3} s {direction}, ± {:.3} s", off.as_secs_f64(), uncertain.as_secs_f64());
    let certainly = off.saturating_sub(uncertain);
    if certainly > CLOCK_FAILS {
        Finding::failed(what, said, "set the clocks (NTP): certificates of the job are not valid there yet")
    } else if certainly > CLOCK_WARNS {
        Finding::warning(what, said, "set the clocks (NTP): logs of the machines do not fit together")
    } else {
        Finding::ok(what, said)
    }
}

#[cfg(test)]
mod tests {
    use super::super::finding::Verdict;
    use super::*;

    fn measured(udp: Option<Exchange>, packet_bytes: Option<u32>) -> Path {
        Path::Doctor(Measured { ip: [10, 0, 0, 2].into(), udp, packet_bytes, mtu: Some(1500) })
    }

    fn verdicts(path: &Path) -> Vec<Verdict> {
        judge("worker 1", path).iter().map(|finding| finding.verdict).collect()
    }

    #[test]
    fn a_sound_path_is_four_lines_without_advice() {
        let exchange = Exchange::of(1_000_000, 1_000_150, 1_000_200);
        let findings = judge("worker 1", &measured(Some(exchange), Some(1500)));
        let said: Vec<String> =
            findings.iter().map(|finding| format!("{}: {}", finding.what, finding.said)).collect();
        assert_eq!(
            said,
            [
                "TCP to worker 1: 10.0.0.2 answers",
                "UDP to worker 1: answered in 200 µs",
                "packets to worker 1: up to 1500 bytes arrive",
                "clock of worker 1: 0.000 s ahead, ± 0.000 s",
            ]
        );
        assert!(findings.iter().all(|finding| finding.verdict == Verdict::Ok && finding.advice.is_none()));
    }

    #[test]
    fn what_a_path_lacks_is_a_warning_and_what_a_job_needs_is_a_failure() {
        use Verdict::{Failed, Ok, Warning};
        let quick = |later_us| Some(Exchange { round_trip: Duration::from_micros(200), later_us });
        assert_eq!(verdicts(&measured(None, None)), [Ok, Warning]);
        assert_eq!(verdicts(&measured(quick(0), Some(1400))), [Ok, Ok, Warning, Ok]);
        assert_eq!(verdicts(&measured(quick(0), Some(1200))), [Ok, Ok, Failed, Ok]);
        assert_eq!(verdicts(&measured(quick(-2_000_000), Some(1500))), [Ok, Ok, Ok, Warning]);
        assert_eq!(verdicts(&measured(quick(400_000_000), Some(1500))), [Ok, Ok, Ok, Failed]);
        let slow = Some(Exchange { round_trip: Duration::from_secs(2), later_us: 900_000 });
        assert_eq!(verdicts(&measured(slow, Some(1500))), [Ok, Ok, Ok, Ok], "it cannot be told");
        assert_eq!(verdicts(&Path::NoDoctor([10, 0, 0, 2].into())), [Ok, Warning]);
        for seen in
            [Seen::NoName, Seen::Refused, Seen::NoDns("x".to_owned()), Seen::Unreachable("x".to_owned())]
        {
            assert_eq!(verdicts(&Path::Missing(seen)), [Failed]);
        }
    }
}
