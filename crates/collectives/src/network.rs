//! What the network between ranks costs, and which schedule that speaks for.
//!
//! The model is Hockney's: a message of S bytes takes a + S b. With n ranks and S bytes in all:
//!
//! | schedule | cost |
//! |---|---|
//! | one-shot all_reduce | a + (n-1) S b + n S c |
//! | direct all_reduce | 2 a + 2 (n-1)/n S b + S c |
//! | ring all_reduce | 2 (n-1) a + 2 (n-1)/n S b + S c |
//! | halving all_reduce, n a power of two | 2 log2 n a + 2 (n-1)/n S b + 2 S c |
//! | halving all_reduce, any other n, with m the power of two below | (2 log2 m + 2) a + 2 ((m-1)/m + 1) S b + 3 S c |
//! | direct broadcast | a + (n-1) S b |
//! | tree broadcast, pipelined | ceil(log2 n) (a + s b) + k S b, for segments of s and the k children of the root |
//! | chain broadcast, pipelined | (n-1) (a + s b) + S b |
//!
//! where c is what a byte takes to be summed. Neither a ring nor halving has anything over a direct exchange
//! in this model, which knows no congestion and no cost of a message but its latency: they run when they are
//! asked for.
//!
//! Rank 0 decides for all (`Communicator::tune`): were the numbers each rank's own, two ranks could go
//! different ways and wait for each other for ever.

use std::time::Duration;

/// What links cost, by measurement or by default.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Network {
    /// Nanoseconds from a rank to another for no bytes at all.
    latency: f64,
    /// Nanoseconds for each byte more.
    per_byte: f64,
    /// The order in which a ring goes through the ranks; in rank order while nothing is known.
    pub(crate) ring: Vec<usize>,
    measured: bool,
}

/// What one rank has measured of its links, by peer; `None` for itself and for links it has not measured.
pub(crate) type Links = Vec<Option<Link>>;

/// What one link costs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Link {
    /// Half of a round trip.
    pub(crate) latency: Duration,
    /// Nanoseconds for each byte beyond the first ones.
    pub(crate) per_byte: f64,
}

impl Link {
    /// As numbers that travel.
    pub(crate) fn to_words(link: Option<Self>) -> [u64; 2] {
        link.map_or([u64::MAX, 0], |link| [link.latency.as_nanos() as u64, link.per_byte.to_bits()])
    }

    /// What [`to_words`](Self::to_words) gave.
    pub(crate) fn from_words([nanos, per_byte]: [u64; 2]) -> Option<Self> {
        let per_byte = f64::from_bits(per_byte);
        let sound = nanos != u64::MAX && per_byte.is_finite() && per_byte >= 0.0;
        sound.then_some(Self { latency: Duration::from_nanos(nanos), per_byte })
    }
}

/// Nanoseconds to sum a byte: 10 GB/s, what a core of the last years reads from memory.
const SUM_PER_BYTE: f64 = 0.1;

/// Nanoseconds of one more meeting of the ranks of a host: ten times what it takes where each has a processor
/// of its own, since the others may have something else to do.
const MEETING: f64 = 1_000.0;

/// A link that is not measured: a fast local network.
const DEFAULT_LATENCY: f64 = 30_000.0;
const DEFAULT_PER_BYTE: f64 = 1.0;

/// How much slower than the median a link must be to be reported.
const SLOW: f64 = 2.0;

/// Links measured by one rank at most: a larger group is a sample, in bounded time.
pub(crate) const PARTNERS_LIMIT: usize = 15;

impl Network {
    /// What is assumed of the links of `world_size` ranks before anything was measured.
    pub(crate) fn unmeasured(world_size: usize) -> Self {
        let ring = (0..world_size).collect();
        Self { latency: DEFAULT_LATENCY, per_byte: DEFAULT_PER_BYTE, ring, measured: false }
    }

    /// The model of links of which each rank has measured some. A collective ends with its slowest link, but
    /// one bad link should not decide for all: the upper quartile counts.
    pub(crate) fn of(rows: &[Links]) -> Self {
        let links = || rows.iter().flatten().flatten();
        let mut latencies: Vec<f64> = links().map(|link| link.latency.as_nanos() as f64).collect();
        let mut rates: Vec<f64> = links().map(|link| link.per_byte).collect();
        let (Some(latency), Some(per_byte)) = (upper_quartile(&mut latencies), upper_quartile(&mut rates))
        else {
            return Self::unmeasured(rows.len());
        };
        Self {
            latency: latency.max(1.0),
            per_byte: per_byte.max(0.0),
            ring: ring_order(rows),
            measured: true,
        }
    }

    /// Whether an all_reduce of `bytes` bytes among `ranks` ranks is better done in one step.
    pub(crate) fn one_shot_pays(&self, ranks: usize, bytes: usize) -> bool {
        self.one_shot(ranks, bytes) <= self.direct(ranks, bytes)
    }

    /// Which broadcast of `bytes` bytes in segments of `segment_bytes` ends first.
    pub(crate) fn broadcast(&self, ranks: usize, bytes: usize, segment_bytes: usize) -> Broadcast {
        let (n, s) = (ranks as f64, bytes as f64);
        let segment = bytes.min(segment_bytes) as f64 * self.per_byte;
        let depth = f64::from(ranks.next_power_of_two().trailing_zeros());
        let direct = self.latency + (n - 1.0) * s * self.per_byte;
        let tree = depth * (self.latency + segment) + depth * s * self.per_byte;
        let chain = (n - 1.0) * (self.latency + segment) + s * self.per_byte;
        match () {
            () if direct <= tree && direct <= chain => Broadcast::Direct,
            () if tree <= chain => Broadcast::Tree,
            () => Broadcast::Chain,
        }
    }

    /// Whether a broadcast of `bytes` bytes between hosts of `ranks` ranks is better carried by all ranks of
    /// the root's host, a slice each, than by the root alone. It takes one more pass through the memory of a
    /// host, and saves a link the time of all slices but one, once or more often.
    pub(crate) fn slices_pay(&self, ranks: usize, bytes: usize) -> bool {
        let (all, slice) = (bytes as f64, bytes.div_ceil(ranks) as f64);
        (all - slice) * self.per_byte > all * SUM_PER_BYTE + MEETING
    }

    /// The microseconds that an all_reduce should take in one step, and by owners.
    pub(crate) fn all_reduce_micros(&self, ranks: usize, bytes: usize) -> [f64; 2] {
        [self.one_shot(ranks, bytes) / 1000.0, self.direct(ranks, bytes) / 1000.0]
    }

    /// The same by recursive halving and doubling.
    pub(crate) fn halving_micros(&self, ranks: usize, bytes: usize) -> f64 {
        let (seats, s) = (1usize << ranks.max(1).ilog2(), bytes as f64);
        let (m, folded) = (seats as f64, f64::from(seats < ranks));
        let latencies = 2.0 * m.log2() + 2.0 * folded;
        let wholes = 2.0 * ((m - 1.0) / m + folded);
        let sums = (2.0 + folded) * s * SUM_PER_BYTE;
        (latencies * self.latency + wholes * s * self.per_byte + sums) / 1000.0
    }

    /// The model in words, for `--explain`.
    pub(crate) fn describe(&self) -> String {
        let (micros, rate) = (self.latency / 1000.0, 1.0 / self.per_byte.max(1e-3));
        let how = if self.measured { "measured at the start" } else { "assumed" };
        format!("{micros:.0} us and {rate:.2} GB/s per link, {how}")
    }

    fn one_shot(&self, ranks: usize, bytes: usize) -> f64 {
        let (n, s) = (ranks as f64, bytes as f64);
        self.latency + (n - 1.0) * s * self.per_byte + n * s * SUM_PER_BYTE
    }

    fn direct(&self, ranks: usize, bytes: usize) -> f64 {
        let (n, s) = (ranks as f64, bytes as f64);
        2.0 * self.latency + 2.0 * (n - 1.0) / n * s * self.per_byte + s * SUM_PER_BYTE
    }

    /// As numbers that travel: two, and the ring.
    pub(crate) fn to_words(&self) -> Vec<u64> {
        let numbers = [self.latency.to_bits(), self.per_byte.to_bits(), u64::from(self.measured)];
        numbers.into_iter().chain(self.ring.iter().map(|&rank| rank as u64)).collect()
    }

    /// What [`to_words`](Self::to_words) gave; `None` for anything that is not a model of `world_size` ranks.
    pub(crate) fn from_words(words: &[u64], world_size: usize) -> Option<Self> {
        let (&[latency, per_byte, measured], ring) = words.split_first_chunk::<3>()?;
        let ring: Vec<usize> = ring.iter().map(|&rank| rank as usize).collect();
        let mut sorted = ring.clone();
        sorted.sort_unstable();
        let (latency, per_byte) = (f64::from_bits(latency), f64::from_bits(per_byte));
        let sound = sorted.into_iter().eq(0..world_size) && latency >= 1.0 && per_byte >= 0.0;
        (sound && latency.is_finite() && per_byte.is_finite()).then_some(Self {
            latency,
            per_byte,
            ring,
            measured: measured == 1,
        })
    }
}

/// How a broadcast goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Broadcast {
    Direct,
    Tree,
    Chain,
}

/// A partner for each rank in round number `round`; `None` for a rank that has none. The circle method of
/// round-robin tournaments: in `world_size - 1` rounds (as many as ranks, when that is odd) everybody meets
/// everybody once.
pub(crate) fn partner(rank: usize, world_size: usize, round: usize) -> Option<usize> {
    // The last of an even number stays where it is, the others turn; of an odd number it is nobody.
    let seats = world_size.next_multiple_of(2);
    let turning = seats - 1;
    let partner = if rank == turning {
        // Whoever meets itself on the circle meets the one who stays. Twice its number is `round`.
        (0..turning).find(|seat| 2 * seat % turning == round % turning)?
    } else {
        match (round % turning + turning - rank) % turning {
            opposite if opposite == rank => turning,
            opposite => opposite,
        }
    };
    (partner < world_size).then_some(partner)
}

/// The rounds in which ranks measure their links.
pub(crate) fn rounds(world_size: usize) -> usize {
    (world_size.next_multiple_of(2) - 1).min(PARTNERS_LIMIT)
}

/// The links that are much slower than most, slowest first: both ranks, and the latency or the rate.
pub(crate) fn slow_links(rows: &[Links]) -> Vec<(usize, usize, Link)> {
    let all = || {
        rows.iter().enumerate().flat_map(|(from, row)| {
            row.iter().enumerate().filter_map(move |(to, link)| Some((from, to, (*link)?)))
        })
    };
    let mut latencies: Vec<f64> = all().map(|(.., link)| link.latency.as_nanos() as f64).collect();
    let mut rates: Vec<f64> = all().map(|(.., link)| link.per_byte).collect();
    let (Some(latency), Some(rate)) = (median(&mut latencies), median(&mut rates)) else { return Vec::new() };
    let excess =
        |link: &Link| (link.latency.as_nanos() as f64 / latency.max(1.0)).max(link.per_byte / rate.max(1e-6));
    // Each link was measured from both ends; the lower rank's word counts.
    let mut slow: Vec<_> = all().filter(|(from, to, link)| from < to && excess(link) > SLOW).collect();
    slow.sort_by(|a, b| excess(&b.2).total_cmp(&excess(&a.2)));
    slow
}

/// A ring through all ranks that goes on to the nearest rank that is left, from rank 0. Links that nobody has
/// measured are the farthest.
fn ring_order(rows: &[Links]) -> Vec<usize> {
    let mut left: Vec<usize> = (1..rows.len()).collect();
    let mut ring = vec![0];
    while !left.is_empty() {
        let last = ring[ring.len() - 1];
        let distance = |rank: usize| rows[last][rank].map_or(Duration::MAX, |link| link.latency);
        let nearest = (0..left.len()).min_by_key(|&at| (distance(left[at]), left[at])).unwrap_or(0);
        ring.push(left.remove(nearest));
    }
    ring
}

fn upper_quartile(numbers: &mut [f64]) -> Option<f64> {
    numbers.sort_by(f64::total_cmp);
    numbers.get(numbers.len() * 3 / 4).or(numbers.last()).copied()
}

fn median(numbers: &mut [f64]) -> Option<f64> {
    numbers.sort_by(f64::total_cmp);
    numbers.get(numbers.len() / 2).copied()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn link(micros: u64, per_byte: f64) -> Option<Link> {
        Some(Link { latency: Duration::from_micros(micros), per_byte })
    }

    /// All links alike.
    fn rows(world_size: usize, micros: u64, per_byte: f64) -> Vec<Links> {
        let row =
            |rank| (0..world_size).map(move |peer| if peer == rank { None } else { link(micros, per_byte) });
        (0..world_size).map(|rank| row(rank).collect()).collect()
    }

    #[test]
    fn everybody_meets_everybody_once_and_is_met_by_whom_it_meets() {
        for world_size in 2usize..=17 {
            let rounds = world_size.next_multiple_of(2) - 1;
            for rank in 0..world_size {
                let met: Vec<Option<usize>> =
                    (0..rounds).map(|round| partner(rank, world_size, round)).collect();
                for (round, met) in met.iter().enumerate() {
                    if let Some(peer) = *met {
                        assert_ne!(peer, rank);
                        assert_eq!(partner(peer, world_size, round), Some(rank), "{world_size} {round}");
                    }
                }
                let mut peers: Vec<usize> = met.into_iter().flatten().collect();
                peers.sort_unstable();
                assert!(peers.into_iter().eq((0..world_size).filter(|&peer| peer != rank)), "{world_size}");
            }
        }
    }

    #[test]
    fn long_latencies_speak_for_one_step_and_many_ranks_against_it() {
        let (lan, wan) = (Network::of(&rows(4, 10, 1.0)), Network::of(&rows(4, 50_000, 1.0)));
        assert!(lan.one_shot_pays(4, 64) && wan.one_shot_pays(4, 64));
        assert!(!lan.one_shot_pays(4, 1 << 20) && wan.one_shot_pays(4, 1 << 20));
        assert!(lan.one_shot_pays(2, 60_000), "two ranks send the same bytes either way");
        assert!(!lan.one_shot_pays(16, 60_000));
    }

    #[test]
    fn halving_costs_more_latencies_than_a_direct_exchange_and_the_bytes_of_a_fold() {
        let network = Network::of(&rows(8, 10, 1.0));
        let [_, direct] = network.all_reduce_micros(8, 0);
        assert_eq!([direct, network.halving_micros(8, 0)], [20.0, 60.0]);
        let [_, direct] = network.all_reduce_micros(8, 1 << 20);
        let halving = network.halving_micros(8, 1 << 20);
        assert!(direct < halving && halving < 1.2 * direct, "{direct} {halving}");
        assert!(network.halving_micros(9, 1 << 20) > 1.9 * halving, "nine ranks fold one");
        assert!(network.halving_micros(1, 0) == 0.0);
    }

    #[test]
    fn a_broadcast_is_direct_for_few_a_tree_for_many_and_a_chain_for_long_ones() {
        let network = Network::of(&rows(32, 30, 1.0));
        let segment = 256 * 1024;
        assert_eq!(network.broadcast(2, 1 << 26, segment), Broadcast::Direct);
        assert_eq!(network.broadcast(32, 100, segment), Broadcast::Direct);
        assert_eq!(network.broadcast(32, 100_000, segment), Broadcast::Tree);
        assert_eq!(network.broadcast(32, 1 << 28, segment), Broadcast::Chain);
    }

    #[test]
    fn long_broadcasts_are_carried_by_all_ranks_of_a_host() {
        let network = Network::of(&rows(4, 30, 1.0));
        assert!(!network.slices_pay(2, 100) && network.slices_pay(2, 1 << 20));
        let fast = Network::of(&rows(4, 30, 0.01));
        assert!(!fast.slices_pay(2, 1 << 20), "memory is no faster than this network");
    }

    #[test]
    fn the_model_survives_its_journey_and_nonsense_does_not_arrive() {
        let network = Network::of(&rows(3, 10, 0.5));
        let words = network.to_words();
        assert_eq!(Network::from_words(&words, 3), Some(network));
        assert_eq!(Network::from_words(&words, 4), None);
        for (at, value) in [(0, f64::NAN.to_bits()), (1, (-1.0f64).to_bits()), (3, 7), (4, words[3])] {
            let mut wrong = words.clone();
            wrong[at] = value;
            assert_eq!(Network::from_words(&wrong, 3), None, "word {at}");
        }
        assert_eq!(Network::from_words(&[], 0), None);
    }

    #[test]
    fn a_ring_goes_to_the_nearest_rank_that_is_left() {
        // Ranks 0 and 2 are near each other, and 1 and 3.
        let mut rows = rows(4, 100, 1.0);
        for (a, b) in [(0, 2), (1, 3)] {
            (rows[a][b], rows[b][a]) = (link(1, 1.0), link(1, 1.0));
        }
        assert_eq!(Network::of(&rows).ring, [0, 2, 1, 3]);
        assert_eq!(Network::of(&vec![vec![None; 3]; 3]), Network::unmeasured(3));
    }

    #[test]
    fn a_link_much_slower_than_the_others_is_reported_once() {
        let mut rows = rows(4, 100, 1.0);
        (rows[1][3], rows[3][1]) = (link(900, 1.0), link(950, 1.0));
        (rows[0][2], rows[2][0]) = (link(100, 2.5), link(100, 2.5));
        let slow: Vec<_> = slow_links(&rows).into_iter().map(|(from, to, _)| (from, to)).collect();
        assert_eq!(slow, [(1, 3), (0, 2)]);
    }

    proptest! {
        #[test]
        fn any_numbers_are_a_model_of_this_world_or_none(
            words in prop::collection::vec(prop_oneof![0..5_u64, any::<u64>()], 0..8), world_size in 1..5_usize,
        ) {
            if let Some(network) = Network::from_words(&words, world_size) {
                prop_assert_eq!(network.ring.len(), world_size);
                prop_assert!(network.ring.iter().all(|&rank| rank < world_size));
                prop_assert!(network.latency.is_finite() && network.per_byte.is_finite());
            }
        }

        #[test]
        fn any_numbers_are_a_link_or_none(words: [u64; 2]) {
            let sound = |link: Link| link.per_byte.is_finite() && link.per_byte >= 0.0;
            prop_assert!(Link::from_words(words).is_none_or(sound));
        }
    }
}
