//! What the ranks of a group have, and which way their collectives on device memory go.
//!
//! NCCL works for all ranks of a group or for none. So before a group is used each rank tells all others what it
//! has, over the host's links, and all decide alike by a function of what was told. The choice holds as long as the
//! group: nobody falls back in the middle of an operation.

use std::fmt;

use crate::communicator::Communicator;
use crate::error::Error;

/// The oldest NCCL that is used with others, as its version code: `ncclCommInitRankConfig` and what it takes.
const OLDEST_NCCL: u32 = 21_700;

/// The words in which a rank is told: an offer is as long.
const WORDS: usize = 4;

/// What a rank has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offer {
    /// The version code of its NCCL, as 22809 for 2.28.9; `None` if it has none.
    pub nccl: Option<u32>,
    /// The newest version of CUDA that its driver supports, as 12080; `None` without a driver or a GPU.
    pub driver: Option<u32>,
    /// Its GPU: a number that no two GPUs have in common, such as half of its UUID; 0 without one.
    pub gpu: u64,
    /// Its host: a number that no two hosts have in common.
    pub host: u64,
}

/// What is wanted: `PACELINE_BACKEND`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Wanted {
    /// NCCL where all ranks can use it.
    #[default]
    Auto,
    /// NCCL, or an error that says why not.
    Nccl,
    /// The way through the host.
    Fallback,
    /// NCCL inside each host and the way through the host between them, or an error that says why not.
    Hierarchy,
}

impl Wanted {
    /// The names that `PACELINE_BACKEND` takes.
    pub const NAMES: [(&'static str, Self); 4] = [
        ("auto", Self::Auto),
        ("nccl", Self::Nccl),
        ("fallback", Self::Fallback),
        ("hierarchy", Self::Hierarchy),
    ];
}

/// Which way collectives on device memory go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// Through NCCL.
    Nccl,
    /// Through pinned memory of the host.
    Fallback,
    /// Through NCCL inside each host, and through pinned memory between them.
    Hierarchy,
}

/// A choice, the same on all ranks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Agreement {
    /// Which way.
    pub backend: Backend,
    /// Why, in words.
    pub reason: String,
}

impl fmt::Display for Agreement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let way = match self.backend {
            Backend::Nccl => "NCCL",
            Backend::Fallback => "the host",
            Backend::Hierarchy => "NCCL inside each host and through the host between them",
        };
        write!(f, "collectives on device memory go through {way}: {}", self.reason)
    }
}

/// Tells all ranks what this one has and wants, and agrees with them on a way. Every rank calls it, as a collective;
/// rank 0 logs the choice. Blocks.
///
/// # Errors
/// [`Error::Usage`], on every rank, when ranks want different things, or NCCL and one of them cannot; otherwise fatal
/// ones.
pub fn agree(communicator: &mut Communicator, offer: Offer, wanted: Wanted) -> Result<Agreement, Error> {
    let agreement = settle(&survey(communicator, offer, wanted)?)?;
    agreement.log(communicator);
    Ok(agreement)
}

/// What all ranks have and want.
pub(super) fn survey(
    communicator: &mut Communicator,
    offer: Offer,
    wanted: Wanted,
) -> Result<Vec<(Offer, Wanted)>, Error> {
    let mine = offer.to_words(wanted);
    let mut told = vec![0; WORDS * communicator.world_size()];
    communicator.all_gather(&mine, &mut told)?;
    Ok(told.as_chunks().0.iter().map(|words| Offer::from_words(*words)).collect())
}

/// What follows from what all ranks have told.
pub(super) fn settle(told: &[(Offer, Wanted)]) -> Result<Agreement, Error> {
    choose(told).map_err(|reason| Error::Usage { operation: "agree", reason })
}

impl Agreement {
    /// One line, from rank 0.
    pub(super) fn log(&self, communicator: &Communicator) {
        if communicator.rank() == 0 {
            let (backend, reason) = (self.backend, &self.reason);
            tracing::info!(?backend, reason, "agreed on the way of collectives on device memory");
        }
    }
}

/// The choice, by what each rank has and wants.
fn choose(told: &[(Offer, Wanted)]) -> Result<Agreement, String> {
    let wanted = told.first().map_or(Wanted::Auto, |(_, wanted)| *wanted);
    if let Some(rank) = told.iter().position(|(_, other)| *other != wanted) {
        let other = told[rank].1;
        return Err(format!(
            "rank 0 wants {} and rank {rank} {}; give all ranks the same PACELINE_BACKEND",
            wanted.name(),
            other.name()
        ));
    }
    let all: Vec<Member> = told.iter().map(|(offer, _)| *offer).enumerate().collect();
    let choice = |backend, reason: String| Ok(Agreement { backend, reason });
    match (wanted, obstacle(&all)) {
        (Wanted::Fallback, _) => choice(Backend::Fallback, "PACELINE_BACKEND wants it".to_owned()),
        (Wanted::Hierarchy, _) => match obstacle_inside_hosts(&all) {
            Some(obstacle) => Err(format!("PACELINE_BACKEND wants hierarchy, but {obstacle}")),
            None => choice(Backend::Hierarchy, "PACELINE_BACKEND wants it".to_owned()),
        },
        (Wanted::Nccl, Some(obstacle)) => Err(format!("PACELINE_BACKEND wants nccl, but {obstacle}")),
        (Wanted::Auto, Some(obstacle)) if obstacle_inside_hosts(&all).is_none() => {
            choice(Backend::Hierarchy, obstacle)
        }
        (Wanted::Auto, Some(obstacle)) => choice(Backend::Fallback, obstacle),
        (Wanted::Nccl | Wanted::Auto, None) => {
            let version = told.first().and_then(|(offer, _)| offer.nccl).unwrap_or(0);
            choice(Backend::Nccl, format!("all ranks have a GPU of their own and NCCL {}", Version(version)))
        }
    }
}

/// A rank and what it has.
type Member = (usize, Offer);

/// The ranks of each host, in the order of their first ones.
pub(super) fn hosts(told: impl IntoIterator<Item = Member>) -> Vec<Vec<Member>> {
    let mut hosts: Vec<Vec<Member>> = Vec::new();
    for member in told {
        match hosts.iter_mut().find(|host| host[0].1.host == member.1.host) {
            Some(host) => host.push(member),
            None => hosts.push(vec![member]),
        }
    }
    hosts
}

/// Why NCCL cannot be used inside each of several hosts, if it cannot.
fn obstacle_inside_hosts(all: &[Member]) -> Option<String> {
    let hosts = hosts(all.iter().copied());
    let first = hosts.first()?;
    if hosts.len() < 2 || first.len() < 2 {
        let (ranks, hosts) = (first.len(), hosts.len());
        return Some(format!("there are {hosts} hosts, the first with {ranks} ranks; it takes 2 of each"));
    }
    if let Some(host) = hosts.iter().find(|host| host.len() != first.len()) {
        let (rank, len) = (host[0].0, host.len());
        return Some(format!("rank 0's host has {} ranks and rank {rank}'s {len}", first.len()));
    }
    hosts.iter().find_map(|host| obstacle(host))
}

/// Why NCCL cannot be used by these ranks, if it cannot: the first thing that some rank lacks.
fn obstacle(members: &[Member]) -> Option<String> {
    for (rank, offer) in members {
        match (offer.driver, offer.nccl) {
            (None, _) => return Some(format!("rank {rank} has no GPU or no driver of CUDA")),
            (_, None) => return Some(format!("rank {rank} has no NCCL")),
            (_, Some(version)) if version < OLDEST_NCCL => {
                return Some(format!("rank {rank} has NCCL {}, which is too old", Version(version)));
            }
            _ => {}
        }
    }
    let (first_rank, first) = members.first()?;
    for (index, (rank, offer)) in members.iter().enumerate() {
        // Ranks of one group must run one release: NCCL's own protocol between them is not stable.
        if offer.nccl != first.nccl {
            let [one, other] = [first, offer].map(|offer| Version(offer.nccl.unwrap_or(0)));
            return Some(format!("rank {first_rank} has NCCL {one} and rank {rank} {other}"));
        }
        let place = (offer.host, offer.gpu);
        let twin = members[..index].iter().find(|(_, other)| (other.host, other.gpu) == place);
        if let Some((other, _)) = twin {
            return Some(format!("ranks {other} and {rank} share one GPU"));
        }
    }
    None
}

impl Wanted {
    fn name(self) -> &'static str {
        let found = Self::NAMES.into_iter().find(|(_, wanted)| *wanted == self);
        found.map_or("", |(name, _)| name)
    }
}

impl Offer {
    fn to_words(self, wanted: Wanted) -> [u64; WORDS] {
        let code = Wanted::NAMES.iter().position(|(_, other)| *other == wanted).unwrap_or(0) as u64;
        let versions = u64::from(self.nccl.unwrap_or(0)) << 32 | u64::from(self.driver.unwrap_or(0));
        [versions, self.gpu, self.host, code]
    }

    /// What a rank has told; a code that this release does not know is taken for no wish.
    fn from_words([versions, gpu, host, code]: [u64; WORDS]) -> (Self, Wanted) {
        let version = |code: u64| Some(code as u32).filter(|&code| code > 0);
        let offer =
            Self { nccl: version(versions >> 32), driver: version(versions & 0xffff_ffff), gpu, host };
        let wanted = usize::try_from(code).ok().and_then(|code| Wanted::NAMES.get(code));
        (offer, wanted.map_or(Wanted::Auto, |(_, wanted)| *wanted))
    }
}

/// NCCL's version code in the usual form.
struct Version(u32);

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(code) = self;
        write!(f, "{}.{}.{}", code / 10_000, code / 100 % 100, code % 100)
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use paceline_transport::mem;

    use super::*;
    use crate::communicator::Config;

    /// Rank `gpu` of a host with a GPU for each.
    fn able(gpu: u64) -> Offer {
        Offer { nccl: Some(22_809), driver: Some(13_000), gpu, host: 1 }
    }

    fn chosen(wanted: Wanted, offers: &[Offer]) -> Result<(Backend, String), String> {
        let told: Vec<(Offer, Wanted)> = offers.iter().map(|&offer| (offer, wanted)).collect();
        choose(&told).map(|agreement| (agreement.backend, agreement.reason))
    }

    #[test]
    fn nccl_is_chosen_where_every_rank_can_use_it() {
        let reason = "all ranks have a GPU of their own and NCCL 2.28.9".to_owned();
        for wanted in [Wanted::Auto, Wanted::Nccl] {
            assert_eq!(chosen(wanted, &[able(1), able(2)]), Ok((Backend::Nccl, reason.clone())));
        }
        let elsewhere = Offer { host: 2, ..able(1) };
        assert_eq!(
            chosen(Wanted::Auto, &[able(1), elsewhere]),
            Ok((Backend::Nccl, reason)),
            "another host's first GPU"
        );
        let wish = "PACELINE_BACKEND wants it".to_owned();
        assert_eq!(chosen(Wanted::Fallback, &[able(1), able(2)]), Ok((Backend::Fallback, wish)));
    }

    #[test]
    fn what_one_rank_lacks_is_the_reason_on_all() {
        for (other, reason) in [
            (Offer { driver: None, ..able(2) }, "rank 1 has no GPU or no driver of CUDA"),
            (Offer { nccl: None, ..able(2) }, "rank 1 has no NCCL"),
            (Offer { nccl: Some(21_604), ..able(2) }, "rank 1 has NCCL 2.16.4, which is too old"),
            (Offer { nccl: Some(23_203), ..able(2) }, "rank 0 has NCCL 2.28.9 and rank 1 2.32.3"),
            (able(1), "ranks 0 and 1 share one GPU"),
        ] {
            let offers = [able(1), other];
            assert_eq!(chosen(Wanted::Auto, &offers), Ok((Backend::Fallback, reason.to_owned())));
            let refused = format!("PACELINE_BACKEND wants nccl, but {reason}");
            assert_eq!(chosen(Wanted::Nccl, &offers), Err(refused));
        }
    }

    #[test]
    fn hosts_that_can_use_nccl_inside_only_do_so() {
        let on = |host, gpu, nccl| Offer { host, nccl: Some(nccl), ..able(gpu) };
        let pair = |host, nccl| [on(host, 1, nccl), on(host, 2, nccl)];
        let differ = [pair(1, 22_809), pair(2, 23_203)].concat();
        let reason = "rank 0 has NCCL 2.28.9 and rank 2 2.32.3".to_owned();
        assert_eq!(chosen(Wanted::Auto, &differ), Ok((Backend::Hierarchy, reason)));
        let alike = [pair(1, 22_809), pair(2, 22_809)].concat();
        let wish = "PACELINE_BACKEND wants it".to_owned();
        assert_eq!(chosen(Wanted::Hierarchy, &alike), Ok((Backend::Hierarchy, wish)));
        let uneven = [pair(1, 22_809).as_slice(), &[on(2, 1, 22_809)]].concat();
        for (offers, obstacle) in [
            (&uneven[..], "rank 0's host has 2 ranks and rank 2's 1"),
            (&alike[..2], "there are 1 hosts, the first with 2 ranks; it takes 2 of each"),
            (&[alike[0], alike[2]], "there are 2 hosts, the first with 1 ranks; it takes 2 of each"),
            (&[alike[0], alike[0], alike[2], alike[3]], "ranks 0 and 1 share one GPU"),
        ] {
            let refused = format!("PACELINE_BACKEND wants hierarchy, but {obstacle}");
            assert_eq!(chosen(Wanted::Hierarchy, offers), Err(refused));
        }
    }

    #[test]
    fn all_ranks_agree_over_their_links() {
        let agreed = |offers: [Offer; 3], wanted: [Wanted; 3]| {
            let group = mem::group(3, 1, mem::DEFAULT_WINDOW_BYTES).into_iter();
            let ranks: Vec<_> = group
                .zip(offers.into_iter().zip(wanted))
                .map(|(transport, (offer, wanted))| {
                    thread::spawn(move || {
                        let communicator = Communicator::new(Box::new(transport), Config::default());
                        let mut communicator = communicator.expect("the configuration is right");
                        let agreement = agree(&mut communicator, offer, wanted);
                        communicator.leave().expect("all do");
                        agreement
                    })
                })
                .collect();
            let mut agreements = ranks.into_iter().map(|rank| rank.join().expect("no rank panics"));
            let first = agreements.next().expect("there are three");
            assert!(agreements.all(|agreement| agreement == first), "all have the same");
            first
        };
        let three = [able(1), able(2), able(3)];
        let nccl = agreed(three, [Wanted::Auto; 3]).expect("they can");
        assert_eq!(nccl.backend, Backend::Nccl);
        let fallback = agreed([able(1), able(2), Offer::default()], [Wanted::Auto; 3]).expect("they can");
        assert_eq!(
            fallback.to_string(),
            "collectives on device memory go through the host: rank 2 has no GPU or no driver of CUDA"
        );
        let error = agreed(three, [Wanted::Auto, Wanted::Auto, Wanted::Nccl]).expect_err("they differ");
        assert!(error.to_string().contains("rank 0 wants auto and rank 2 nccl"), "{error}");
    }

    #[test]
    fn an_offer_is_what_was_told() {
        for offer in [able(7), Offer::default(), Offer { host: u64::MAX, gpu: u64::MAX, ..able(0) }] {
            for (_, wanted) in Wanted::NAMES {
                assert_eq!(Offer::from_words(offer.to_words(wanted)), (offer, wanted));
            }
        }
        assert_eq!(Offer::from_words([0, 0, 0, 99]).1, Wanted::Auto);
    }
}
