//! Which kind of links the ranks of several hosts use, when they are to find out by themselves.
//!
//! QUIC and TLS over TCP carry the same bytes with the same certificates, and which one is faster depends on
//! the network between the hosts: on what it does with UDP, on its packet size, on the network card. So rank 0
//! measures both, decides, and tells all others. Choices that ranks make for themselves would deadlock them.
//!
//! ```text
//! rank 0                     others, over the TLS links that exist
//! Plan                ─────▶                          keep them, or form QUIC links as well
//!                     ◀───── whether they have formed
//! Plan                ─────▶                          one of both, or wait for a measurement
//! (measures with one other rank, over both)
//! Plan                ─────▶                          one of both
//! ```

use std::fmt;
use std::io::IoSlice;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::tls::{self, TlsTransport};
use crate::{Error, Roster, Transport};

/// How long QUIC links may take to form. All ranks are there; a lost packet is sent again after 0.1 s, and two
/// seconds without an answer mean that UDP does not pass.
const QUIC_PATIENCE: Duration = Duration::from_secs(2);

/// What each link adds to that, for the handshakes of many ranks on one processor.
const PATIENCE_PER_RANK: Duration = Duration::from_millis(10);

/// How long the links that were not chosen may take to be left in order.
const LEAVE_PATIENCE: Duration = Duration::from_secs(2);

/// How often a wait looks whether it has become pointless.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);

/// Round trips that are measured, and when to stop before that.
const ROUND_TRIPS: u32 = 20;
const ROUND_TRIPS_LIMIT: Duration = Duration::from_millis(20);

/// Bytes of a block. The first opens the congestion window and is not counted, unless it took so long that one
/// more would hold the ranks up.
const BLOCK_BYTES: usize = 2 * 1024 * 1024;
const BLOCKS: u32 = 4;
const BLOCKS_LIMIT: Duration = Duration::from_millis(30);

/// The message that the choice is made for, in bytes: a segment or two of a gradient bucket.
const TYPICAL_BYTES: f64 = (1024 * 1024) as f64;

/// How much faster TLS must be for it to be chosen: below that it is noise.
const CLEARLY: f64 = 1.1;

/// Which kind of links.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Fabric {
    /// What is faster between the hosts of the job, measured when the links are formed; TLS where UDP does not
    /// pass, and where all ranks share memory anyhow.
    #[default]
    Auto,
    /// QUIC, over UDP.
    Quic,
    /// TLS over TCP.
    Tls,
    /// TCP without TLS: **anybody on the way can read and change what ranks send each other.** Never chosen by
    /// [`Auto`](Fabric::Auto).
    Tcp,
}

impl Fabric {
    /// All of them with their names, the default first.
    pub const NAMES: [(&'static str, Fabric); 4] =
        [("auto", Fabric::Auto), ("quic", Fabric::Quic), ("tls", Fabric::Tls), ("tcp", Fabric::Tcp)];

    /// The name.
    pub fn name(self) -> &'static str {
        match self {
            Fabric::Auto => "auto",
            Fabric::Quic => "quic",
            Fabric::Tls => "tls",
            Fabric::Tcp => "tcp",
        }
    }
}

impl fmt::Display for Fabric {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What rank 0 has all others do next, as one byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Plan {
    UseTls = 0,
    UseQuic = 1,
    FormQuic = 2,
    /// Wait for the next plan; whoever this says it to measures with rank 0.
    Wait = 3,
    Measure = 4,
}

/// What was measured over one kind of links.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Measured {
    round_trip: Duration,
    bytes_per_second: f64,
}

/// Chooses between TLS links that exist and QUIC links that `form_quic` makes by a deadline, and leaves the
/// others in order. Every rank calls it, before anything else is sent. Blocks; where both can be formed it
/// takes about a tenth of a second, and two seconds where UDP does not pass.
///
/// On rank 0 `one_host` says that all ranks share memory, so that nothing is measured and no QUIC is formed, and
/// `probe` is the rank to measure with. The choice is logged there, at level info.
///
/// # Errors
/// [`Error::GaveUp`] with what `give_up` says, [`Error::TimedOut`]; the links are then gone. A link that is lost
/// meanwhile is for the first operation to report.
pub fn choose(
    mut tls: Box<dyn Transport>,
    form_quic: impl FnOnce(Instant) -> Result<Box<dyn Transport>, Error>,
    (one_host, probe): (bool, usize),
    deadline: Instant,
    give_up: &dyn Fn() -> Option<String>,
) -> Result<Box<dyn Transport>, Error> {
    if tls.world_size() == 1 {
        return Ok(tls);
    }
    let mut quic = None;
    let patience = Patience { deadline, give_up };
    let chosen = match tls.rank() {
        0 => lead(&mut *tls, &mut quic, form_quic, (one_host, probe), &patience),
        _ => follow(&mut *tls, &mut quic, form_quic, &patience),
    };
    let (chosen, other) = match (chosen, quic) {
        (Ok(Plan::UseQuic), Some(quic)) => (quic, Some(tls)),
        (Ok(_), quic) => (tls, quic),
        // Whoever is not done finds that out at its first operation, which names it, and hears why.
        (Err(Error::Lost { .. } | Error::Left { .. }), quic) => (tls, quic),
        (Err(error), _) => return Err(error),
    };
    if let Some(mut other) = other {
        // Whoever does not confirm is lost on these links alone.
        let _ = other.leave(deadline.min(Instant::now() + LEAVE_PATIENCE));
    }
    Ok(chosen)
}

/// Tells all other ranks where this rank's further `doors` are, and hears about theirs: the rosters of links
/// [beside](TlsTransport::connect_beside) `first`, one for each interface that every rank has, in order. Every rank calls
/// it, before anything else is sent over `first`, whose roster is `roster`. Blocks.
///
/// Ranks that have more interfaces than others leave some unused, and say so.
///
/// # Errors
/// [`Error::GaveUp`] with what `give_up` says, [`Error::TimedOut`], [`Error::Lost`].
pub fn rosters_beside(
    first: &mut TlsTransport,
    doors: &[tls::Endpoint],
    roster: &Roster,
    deadline: Instant,
    give_up: &dyn Fn() -> Option<String>,
) -> Result<Vec<Roster>, Error> {
    let patience = Patience { deadline, give_up };
    let here: Vec<SocketAddr> = doors.iter().map(tls::Endpoint::local_addr).collect();
    let others: Vec<usize> = (0..roster.members.len()).filter(|&rank| rank != roster.rank).collect();
    for &rank in &others {
        patience.say(first, rank, &told(&here))?;
    }
    let mut addresses = vec![here.clone(); roster.members.len()];
    for &rank in &others {
        let mut bytes = [0; TOLD_BYTES];
        patience.hear(first, rank, &mut bytes)?;
        addresses[rank] = heard(&bytes).ok_or_else(|| nonsense(rank))?;
    }
    let common = addresses.iter().map(Vec::len).min().unwrap_or(0);
    if common < here.len() {
        let fewest = addresses.iter().position(|addresses| addresses.len() == common).unwrap_or(0);
        let (has, uses) = (here.len() + 1, common + 1);
        tracing::warn!(rank = roster.rank, has, uses, fewest, "a rank has fewer interfaces than this one");
    }
    let beside = |at: usize| {
        let mut roster = roster.clone();
        for (member, addresses) in roster.members.iter_mut().zip(&addresses) {
            member.addr = addresses[at];
        }
        roster
    };
    Ok((0..common).map(beside).collect())
}

/// The most further interfaces of a rank.
const DOORS_LIMIT: usize = 7;

/// A number of addresses, and room for as many: 16 bytes of an IPv6 address, IPv4's as those that stand for them
/// (RFC 4291, 2.5.5.2), and a port.
const TOLD_BYTES: usize = 1 + DOORS_LIMIT * ADDRESS_BYTES;
const ADDRESS_BYTES: usize = 18;

/// A rank's further addresses, as it tells them the others.
fn told(addresses: &[SocketAddr]) -> [u8; TOLD_BYTES] {
    let mut bytes = [0; TOLD_BYTES];
    let addresses = &addresses[..addresses.len().min(DOORS_LIMIT)];
    // As small as the limit.
    bytes[0] = addresses.len() as u8;
    for (room, addr) in bytes[1..].chunks_exact_mut(ADDRESS_BYTES).zip(addresses) {
        let ip = match addr.ip() {
            IpAddr::V4(ip) => ip.to_ipv6_mapped(),
            IpAddr::V6(ip) => ip,
        };
        room[..16].copy_from_slice(&ip.octets());
        room[16..].copy_from_slice(&addr.port().to_le_bytes());
    }
    bytes
}

/// What another rank has told; `None` when that makes no sense.
fn heard(bytes: &[u8; TOLD_BYTES]) -> Option<Vec<SocketAddr>> {
    let count = usize::from(bytes[0]);
    if count > DOORS_LIMIT {
        return None;
    }
    let parse = |bytes: &[u8]| {
        let mut ip = [0; 16];
        ip.copy_from_slice(&bytes[..16]);
        let port = u16::from_le_bytes([bytes[16], bytes[17]]);
        SocketAddr::new(Ipv6Addr::from(ip).to_canonical(), port)
    };
    Some(bytes[1..].chunks_exact(ADDRESS_BYTES).take(count).map(parse).collect())
}

/// Rank 0's part: decides.
fn lead(
    tls: &mut dyn Transport,
    quic: &mut Option<Box<dyn Transport>>,
    form_quic: impl FnOnce(Instant) -> Result<Box<dyn Transport>, Error>,
    (one_host, probe): (bool, usize),
    patience: &Patience<'_>,
) -> Result<Plan, Error> {
    let others = 1..tls.world_size();
    let tell_all = |tls: &mut dyn Transport, plan: Plan| {
        others.clone().try_for_each(|rank| patience.say(tls, rank, &[plan as u8]))
    };
    if one_host {
        tell_all(tls, Plan::UseTls)?;
        return Ok(Plan::UseTls);
    }
    tell_all(tls, Plan::FormQuic)?;
    form(tls, quic, form_quic);
    let mut without = quic.is_none().then_some(0);
    for rank in others.clone() {
        let mut formed = [0];
        patience.hear(tls, rank, &mut formed)?;
        if formed != [1] {
            without.get_or_insert(rank);
        }
    }
    let Some(quic) = quic.as_mut().filter(|_| without.is_none()) else {
        let rank = without.unwrap_or(0);
        tracing::info!(fabric = "tls", reason = format!("rank {rank} has no QUIC links"), "chose the links");
        tell_all(tls, Plan::UseTls)?;
        return Ok(Plan::UseTls);
    };
    for rank in others.clone() {
        let plan = if rank == probe { Plan::Measure } else { Plan::Wait };
        patience.say(tls, rank, &[plan as u8])?;
    }
    let by_tls = measure(tls, probe, patience)?;
    let by_quic = measure(&mut **quic, probe, patience)?;
    let plan = decide(by_quic, by_tls);
    tracing::info!(
        fabric = if plan == Plan::UseQuic { "quic" } else { "tls" },
        probe,
        quic_round_trip_us = by_quic.round_trip.as_micros() as u64,
        quic_mb_per_s = (by_quic.bytes_per_second / 1e6) as u64,
        tls_round_trip_us = by_tls.round_trip.as_micros() as u64,
        tls_mb_per_s = (by_tls.bytes_per_second / 1e6) as u64,
        reason = "it takes less time for 1 MiB; QUIC if both are alike",
        "chose the links"
    );
    tell_all(tls, plan)?;
    Ok(plan)
}

/// The part of every other rank: does as it is told.
fn follow(
    tls: &mut dyn Transport,
    quic: &mut Option<Box<dyn Transport>>,
    form_quic: impl FnOnce(Instant) -> Result<Box<dyn Transport>, Error>,
    patience: &Patience<'_>,
) -> Result<Plan, Error> {
    let mut form_quic = Some(form_quic);
    loop {
        let mut byte = [0];
        patience.hear(tls, 0, &mut byte)?;
        match (Plan::from_byte(byte[0]), form_quic.take(), quic.as_mut()) {
            (Some(plan @ Plan::UseTls), ..) => return Ok(plan),
            (Some(plan @ Plan::UseQuic), _, Some(_)) => return Ok(plan),
            (Some(Plan::FormQuic), Some(form_quic), _) => {
                form(tls, quic, form_quic);
                patience.say(tls, 0, &[u8::from(quic.is_some())])?;
            }
            (Some(Plan::Wait), _, Some(_)) => {}
            (Some(Plan::Measure), _, Some(quic)) => {
                answer(tls, patience)?;
                answer(&mut **quic, patience)?;
            }
            _ => return Err(nonsense(0)),
        }
    }
}

/// Tries to form QUIC links beside the TLS links.
fn form(
    tls: &dyn Transport,
    quic: &mut Option<Box<dyn Transport>>,
    form_quic: impl FnOnce(Instant) -> Result<Box<dyn Transport>, Error>,
) {
    let ranks = u32::try_from(tls.world_size()).unwrap_or(u32::MAX);
    match form_quic(Instant::now() + QUIC_PATIENCE + PATIENCE_PER_RANK.saturating_mul(ranks)) {
        Ok(links) => *quic = Some(links),
        Err(error) => tracing::info!(rank = tls.rank(), %error, "no QUIC links"),
    }
}

/// Whether QUIC's or TLS's links take less time for a typical message.
fn decide(quic: Measured, tls: Measured) -> Plan {
    let seconds = |it: Measured| it.round_trip.as_secs_f64() / 2.0 + TYPICAL_BYTES / it.bytes_per_second;
    if seconds(quic) > CLEARLY * seconds(tls) { Plan::UseTls } else { Plan::UseQuic }
}

/// A question of the measurement: eight bytes come back when a block of this many has arrived.
fn question(block_bytes: usize) -> [u8; 8] {
    (block_bytes as u64).to_le_bytes()
}

/// In the place of a number of bytes: that was the last question.
const NO_MORE: u64 = u64::MAX;

/// Measures the links to `probe`, which answers.
fn measure(links: &mut dyn Transport, probe: usize, patience: &Patience<'_>) -> Result<Measured, Error> {
    let block = vec![0x5a; BLOCK_BYTES];
    let ask = |links: &mut dyn Transport, block: &[u8]| {
        let asked = Instant::now();
        patience.say(links, probe, &question(block.len()))?;
        patience.say(links, probe, block)?;
        patience.hear(links, probe, &mut [0; 8])?;
        Ok::<Duration, Error>(asked.elapsed())
    };
    let started = Instant::now();
    let mut round_trip = ask(links, &[])?;
    for _ in 0..ROUND_TRIPS {
        round_trip = round_trip.min(ask(links, &[])?);
        if started.elapsed() > ROUND_TRIPS_LIMIT {
            break;
        }
    }
    let started = Instant::now();
    let mut block_time = ask(links, &block)?;
    for _ in 0..BLOCKS {
        if started.elapsed() > BLOCKS_LIMIT {
            break;
        }
        block_time = block_time.min(ask(links, &block)?);
    }
    patience.say(links, probe, &NO_MORE.to_le_bytes())?;
    let block_time = block_time.saturating_sub(round_trip).max(Duration::from_micros(1));
    Ok(Measured { round_trip, bytes_per_second: BLOCK_BYTES as f64 / block_time.as_secs_f64() })
}

/// Answers rank 0's questions.
fn answer(links: &mut dyn Transport, patience: &Patience<'_>) -> Result<(), Error> {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let mut question = [0; 8];
        patience.hear(links, 0, &mut question)?;
        let asked = u64::from_le_bytes(question);
        if asked == NO_MORE {
            return Ok(());
        }
        let mut left = usize::try_from(asked).ok().filter(|&len| len <= BLOCK_BYTES).ok_or(nonsense(0))?;
        while left > 0 {
            let part = left.min(buffer.len());
            patience.hear(links, 0, &mut buffer[..part])?;
            left -= part;
        }
        patience.say(links, 0, &question)?;
    }
}

fn nonsense(peer: usize) -> Error {
    Error::Lost { peer, reason: "it sent nonsense while the links were chosen".to_owned() }
}

impl Plan {
    fn from_byte(byte: u8) -> Option<Self> {
        let all = [Plan::UseTls, Plan::UseQuic, Plan::FormQuic, Plan::Wait, Plan::Measure];
        all.into_iter().find(|&plan| plan as u8 == byte)
    }
}

/// How long to wait for another rank.
struct Patience<'a> {
    deadline: Instant,
    give_up: &'a dyn Fn() -> Option<String>,
}

impl Patience<'_> {
    /// Sends all of `bytes`.
    fn say(&self, links: &mut dyn Transport, to: usize, mut bytes: &[u8]) -> Result<(), Error> {
        while !bytes.is_empty() {
            match links.try_send(to, &[IoSlice::new(bytes)])? {
                0 => self.wait(links, to)?,
                count => bytes = &bytes[count..],
            }
        }
        Ok(())
    }

    /// Receives until `into` is full.
    fn hear(&self, links: &mut dyn Transport, from: usize, into: &mut [u8]) -> Result<(), Error> {
        let mut filled = 0;
        while filled < into.len() {
            match links.try_recv(from, &mut into[filled..])? {
                0 => self.wait(links, from)?,
                count => filled += count,
            }
        }
        Ok(())
    }

    fn wait(&self, links: &mut dyn Transport, peer: usize) -> Result<(), Error> {
        if links.spin() {
            return Ok(());
        }
        let what = || format!("rank {peer} to choose the links");
        if let Some(reason) = (self.give_up)() {
            return Err(Error::GaveUp { what: what(), reason });
        }
        let now = Instant::now();
        if now >= self.deadline {
            return Err(Error::TimedOut { what: what(), ranks: vec![peer], elapsed: Duration::ZERO });
        }
        links.wait(self.deadline.min(now + LOOK_INTERVAL));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::mem;

    const PATIENCE: Duration = Duration::from_secs(60);

    /// What each rank of a group of three gets, by the epoch of the links: 1 stands for TLS, 2 for QUIC.
    fn chosen(one_host: bool, quic_on: [bool; 3]) -> Vec<u64> {
        let tls = mem::group(3, 1, 4096);
        let quic = mem::group(3, 2, 4096);
        let ranks = tls.into_iter().zip(quic).zip(quic_on).map(|((tls, quic), forms)| {
            std::thread::spawn(move || {
                let form = |_| match forms {
                    true => Ok(Box::new(quic) as Box<dyn Transport>),
                    false => Err(Error::Usage { reason: "UDP does not pass".to_owned() }),
                };
                let deadline = Instant::now() + PATIENCE;
                let mut links = choose(Box::new(tls), form, (one_host, 2), deadline, &|| None)?;
                let epoch = links.epoch();
                links.leave(deadline)?;
                Ok(epoch)
            })
        });
        let ranks: Vec<_> = ranks.collect();
        let outcome = |rank: std::thread::JoinHandle<Result<u64, Error>>| rank.join().expect("no panic");
        ranks.into_iter().map(|rank| outcome(rank).expect("all ranks are there")).collect()
    }

    #[test]
    fn addresses_of_further_interfaces_are_heard_as_they_are_told() {
        let all: Vec<SocketAddr> = (0..9_u16)
            .map(|at| match at % 2 {
                0 => SocketAddr::new([10, 0, 0, at as u8].into(), 4000 + at),
                _ => SocketAddr::new([0xfd00, 0, 0, 0, 0, 0, 0, at].into(), 4000 + at),
            })
            .collect();
        for count in 0..=DOORS_LIMIT {
            assert_eq!(heard(&told(&all[..count])), Some(all[..count].to_vec()));
        }
        assert_eq!(heard(&told(&all)), Some(all[..DOORS_LIMIT].to_vec()));
        let mut nonsense = told(&all);
        nonsense[0] = 200;
        assert_eq!(heard(&nonsense), None);
    }

    #[test]
    fn all_ranks_use_the_same_links() {
        let measured = chosen(false, [true; 3]);
        assert!(measured == [1; 3] || measured == [2; 3], "{measured:?}");
    }

    #[test]
    fn where_one_rank_has_no_quic_nobody_uses_it() {
        for without in 0..3 {
            let mut quic_on = [true; 3];
            quic_on[without] = false;
            assert_eq!(chosen(false, quic_on), [1; 3]);
        }
    }

    #[test]
    fn ranks_that_share_memory_do_not_form_quic() {
        assert_eq!(chosen(true, [true; 3]), [1; 3]);
    }

    #[test]
    fn the_faster_links_are_chosen_and_quic_when_both_are_alike() {
        let of = |round_trip_us, gb_per_s: f64| Measured {
            round_trip: Duration::from_micros(round_trip_us),
            bytes_per_second: gb_per_s * 1e9,
        };
        assert_eq!(decide(of(50, 1.0), of(50, 1.05)), Plan::UseQuic);
        assert_eq!(decide(of(50, 1.0), of(50, 3.0)), Plan::UseTls);
        assert_eq!(decide(of(50, 3.0), of(50, 1.0)), Plan::UseQuic);
        assert_eq!(decide(of(10, 1.0), of(40_000, 1.05)), Plan::UseQuic);
    }

    #[test]
    fn a_rank_that_will_not_come_ends_the_choice_with_the_reason() {
        let mut links = mem::group(2, 1, 4096).into_iter();
        let (zero, _one) = (links.next().expect("two"), links.next().expect("two"));
        let never = |_| Err(Error::Usage { reason: "not needed".to_owned() });
        let give_up = || Some("rank 1 was killed".to_owned());
        let deadline = Instant::now() + PATIENCE;
        let error = choose(Box::new(zero), never, (false, 1), deadline, &give_up).expect_err("no answer");
        assert!(matches!(&error, Error::GaveUp { reason, .. } if reason == "rank 1 was killed"), "{error}");
    }

    #[test]
    fn any_byte_is_a_plan_or_none() {
        let plans = (0..=u8::MAX).filter_map(|byte| Some((byte, Plan::from_byte(byte)?)));
        let plans: Vec<(u8, Plan)> = plans.collect();
        assert_eq!(plans.len(), 5);
        assert!(plans.into_iter().all(|(byte, plan)| plan as u8 == byte));
    }

    proptest! {
        #[test]
        fn any_question_of_rank_0_is_answered_or_ends_the_choice(questions: Vec<u64>, in_range in 0..200_000_u64) {
            let mut group = mem::group(2, 1, 1 << 22).into_iter();
            let (mut zero, mut one) = (group.next().expect("two"), group.next().expect("two"));
            let patience = Patience { deadline: Instant::now() + PATIENCE, give_up: &|| None };
            let mut expected = 0;
            for question in questions.into_iter().take(3).chain([in_range, NO_MORE]) {
                patience.say(&mut zero, 1, &question.to_le_bytes()).expect("there is room");
                if question == NO_MORE {
                    break;
                }
                if question > BLOCK_BYTES as u64 {
                    expected = question;
                    break;
                }
                patience.say(&mut zero, 1, &vec![0; question as usize]).expect("there is room");
            }
            let answered = answer(&mut one, &patience);
            prop_assert_eq!(answered.is_err(), expected > BLOCK_BYTES as u64, "{:?}", answered);
        }
    }
}
