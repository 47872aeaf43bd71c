//! Which way of several a collective goes, by its size, and why.
//!
//! The choice follows a cost model with a constant and a rate for each way (Hockney's: t = a + S b),
//! fitted to a probe of a few milliseconds on rank 0 and then broadcast: were it made by each rank, two
//! ranks could go different ways and wait for each other for ever. The bits do not depend on it.

use std::time::Duration;

use super::board::STAGED_BYTES;
use crate::kernels::Stores;

/// The sizes at which another way becomes the better one, in bytes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Tuning {
    /// Up to here everybody reduces everything.
    pub(crate) flat_bytes: usize,
    /// The longest slice that a rank reduces in one step.
    pub(crate) slice_bytes: usize,
    /// From here on results go past the caches.
    pub(crate) streaming_bytes: usize,
    /// What the choice is based on, once it was measured.
    pub(crate) costs: Option<Costs>,
}

/// What an all_reduce costs each way.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Costs {
    pub(crate) flat: Line,
    pub(crate) owners: Line,
}

/// a + S b.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Line {
    /// Nanoseconds for no bytes at all.
    constant: f64,
    /// Nanoseconds for each byte more.
    rate: f64,
}

/// A way that the probe measures, and the number of bytes.
pub(crate) const PROBES: [(Way, usize); 4] =
    [(Way::Flat, 16 * 1024), (Way::Flat, STAGED_BYTES), (Way::Owners, 64 * 1024), (Way::Owners, 1024 * 1024)];

/// How an all_reduce can go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    Flat,
    Owners,
}

impl Tuning {
    /// What fits most machines, for ranks that share a last-level cache of `cache_bytes`.
    pub(crate) fn new(world_size: usize, cache_bytes: usize) -> Self {
        // Measured with 2 and 4 ranks on 2 cores of an AMD EPYC (Zen 3, 512 KiB of L2 each), 2026-11-25,
        // `paceline bench all_reduce`: slices of 32, 64 and 128 KiB gave 145, 100 and 80 µs for 1 MiB.
        let flat_bytes = match world_size {
            1 | 2 => STAGED_BYTES,
            3 | 4 => 16 * 1024,
            _ => 4096,
        };
        let streaming_bytes = cache_bytes / 2 / world_size;
        Self { flat_bytes, slice_bytes: 128 * 1024, streaming_bytes, costs: None }
    }

    /// The same with everything up to [`STAGED_BYTES`] going one way.
    pub(crate) fn forced(self, way: Way) -> Self {
        Self { flat_bytes: if way == Way::Flat { STAGED_BYTES } else { 0 }, ..self }
    }

    /// The same with the choice that a probe speaks for.
    pub(crate) fn fitted(self, costs: Costs) -> Self {
        Self { flat_bytes: costs.crossing().min(STAGED_BYTES), costs: Some(costs), ..self }
    }

    /// How the results of a collective of `bytes` bytes are stored. Nothing is gained in place: the lines
    /// that are written have just been read.
    pub(crate) fn stores(&self, bytes: usize, in_place: bool) -> Stores {
        if bytes >= self.streaming_bytes && !in_place { Stores::Streaming } else { Stores::Cached }
    }
}

impl Costs {
    /// Fits the model to the times of [`PROBES`], in their order.
    pub(crate) fn fit(times: [Duration; 4]) -> Self {
        let point = |index: usize| (PROBES[index].1 as f64, times[index].as_nanos() as f64);
        Self { flat: Line::through(point(0), point(1)), owners: Line::through(point(2), point(3)) }
    }

    /// The number of bytes from which owners are the better way.
    fn crossing(&self) -> usize {
        let (constant, rate) = (self.owners.constant - self.flat.constant, self.flat.rate - self.owners.rate);
        match (constant > 0.0, rate > 0.0) {
            // Cheaper in both respects: never, or always.
            (true, false) => usize::MAX,
            (false, true) => 0,
            // Owners begin cheaper and end dearer, which is noise: what is sure is that long messages are
            // not flat beyond what is staged.
            (false, false) => STAGED_BYTES,
            (true, true) => (constant / rate) as usize,
        }
    }

    pub(crate) fn to_words(self) -> [u64; 4] {
        [self.flat.constant, self.flat.rate, self.owners.constant, self.owners.rate].map(f64::to_bits)
    }

    pub(crate) fn from_words(words: [u64; 4]) -> Self {
        let [a, b, c, d] = words.map(f64::from_bits);
        Self { flat: Line { constant: a, rate: b }, owners: Line { constant: c, rate: d } }
    }
}

impl Line {
    fn through((x, y): (f64, f64), (further_x, further_y): (f64, f64)) -> Self {
        let rate = (further_y - y) / (further_x - x);
        Self { constant: y - rate * x, rate }
    }

    /// The microseconds that `bytes` bytes should take.
    pub(crate) fn micros(&self, bytes: usize) -> f64 {
        (self.constant + self.rate * bytes as f64).max(0.0) / 1000.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fit(micros: [u64; 4]) -> Costs {
        Costs::fit(micros.map(Duration::from_micros))
    }

    #[test]
    fn the_model_goes_through_the_points_and_finds_where_they_cross() {
        // Flat: 1 µs + 0.1 ns/B. Owners: 4 µs + 0.05 ns/B. They meet at 60,000 B.
        let line = |constant: f64, rate: f64, bytes: usize| (constant + rate * bytes as f64) as u64;
        let nanos = [
            line(1000.0, 0.1, PROBES[0].1),
            line(1000.0, 0.1, PROBES[1].1),
            line(4000.0, 0.05, PROBES[2].1),
            line(4000.0, 0.05, PROBES[3].1),
        ];
        let costs = Costs::fit(nanos.map(Duration::from_nanos));
        assert!((costs.flat.micros(PROBES[1].1) - nanos[1] as f64 / 1000.0).abs() < 0.01);
        let tuning = Tuning::new(2, 1 << 25).fitted(costs);
        assert!((59_000..61_000).contains(&tuning.flat_bytes), "{tuning:?}");
        assert_eq!(Costs::from_words(costs.to_words()), costs);
    }

    #[test]
    fn a_choice_stays_within_what_can_be_staged_whatever_was_measured() {
        for micros in [[1, 10, 100, 200], [5, 500, 1, 20], [1, 1, 1, 1], [9, 3, 7, 2], [0, 0, 0, 0]] {
            let tuning = Tuning::new(2, 1 << 25).fitted(fit(micros));
            assert!(tuning.flat_bytes <= STAGED_BYTES, "{micros:?}: {tuning:?}");
        }
    }

    #[test]
    fn results_in_place_are_never_streamed() {
        let tuning = Tuning::new(2, 32 << 20);
        assert_eq!(tuning.stores(8 << 20, false), Stores::Streaming);
        assert_eq!(tuning.stores(8 << 20, true), Stores::Cached);
        assert_eq!(tuning.stores((8 << 20) - 1, false), Stores::Cached);
    }
}
