//! What happens to one packet on its way from one host to another, as a function of faults, time and chance.

use std::time::{Duration, Instant};

/// By how much a packet that is to be overtaken is late: hundreds of packets of a fast link, and still below the
/// milliseconds after which a transport gives a packet up by its clock.
const HELD_BACK: Duration = Duration::from_millis(1);

/// What a path holds at most: 100 ms at 1.3 Gbit/s. Further packets are dropped, as by a switch whose memory is full.
const HELD_BYTES: usize = 16 << 20;

/// A slow link's queue, by time: what would wait longer is dropped, so that a sender notices.
const LONGEST_QUEUE: Duration = Duration::from_millis(50);

/// What is wrong with the way from one host to another. By default nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Faults {
    /// How long a packet takes.
    pub delay: Duration,
    /// The share of packets that get lost, from 0 to 1.
    pub loss: f64,
    /// The share of packets that arrive a millisecond after their time, so that others overtake them.
    pub reorder: f64,
    /// The share of packets that arrive twice.
    pub duplicate: f64,
    /// Bits per second; `None` for as many as the relay can carry.
    pub rate: Option<u64>,
    /// Nothing arrives.
    pub cut: bool,
    /// The longest IP packet, in bytes, that arrives; longer ones vanish without a word (RFC 2923's black hole).
    pub largest: Option<usize>,
}

/// What becomes of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// It is gone.
    Dropped(Reason),
    /// It arrives at this time, and, if it was duplicated, at another.
    Arrives { at: Instant, again: Option<Instant>, late: bool },
}

/// Why it is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reason {
    Cut,
    Lost,
    TooLarge,
    Overflow,
}

/// The way from one host to another, as it is now.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Path {
    /// When the last packet will have been sent, at the rate of the path.
    busy_until: Option<Instant>,
    /// Of packets that have not arrived yet.
    held_bytes: usize,
}

impl Path {
    /// Decides about a packet of so many bytes that is sent now. `chance` gives numbers from 0 up to 1.
    pub(crate) fn send(
        &mut self,
        faults: &Faults,
        bytes: usize,
        now: Instant,
        chance: &mut impl FnMut() -> f64,
    ) -> Fate {
        if faults.cut {
            return Fate::Dropped(Reason::Cut);
        }
        if faults.largest.is_some_and(|largest| bytes > largest) {
            return Fate::Dropped(Reason::TooLarge);
        }
        if chance() < faults.loss {
            return Fate::Dropped(Reason::Lost);
        }
        let copies = if chance() < faults.duplicate { 2 } else { 1 };
        let start = self.busy_until.unwrap_or(now).max(now);
        if start - now > LONGEST_QUEUE || self.held_bytes + copies * bytes > HELD_BYTES {
            return Fate::Dropped(Reason::Overflow);
        }
        let sent = |from: Instant| match faults.rate {
            Some(rate) => from + Duration::from_secs_f64(bytes as f64 * 8.0 / rate as f64),
            None => from,
        };
        let mut end = sent(start);
        let late = chance() < faults.reorder;
        let at = end + faults.delay + if late { HELD_BACK } else { Duration::ZERO };
        let again = (copies == 2).then(|| {
            end = sent(end);
            end + faults.delay
        });
        self.busy_until = Some(end);
        self.held_bytes += copies * bytes;
        Fate::Arrives { at, again, late }
    }

    /// A packet of so many bytes has arrived.
    pub(crate) fn arrived(&mut self, bytes: usize) {
        self.held_bytes -= bytes;
    }

    /// Whether there are packets on the way, which a new one must not overtake.
    pub(crate) fn is_empty(&self) -> bool {
        self.held_bytes == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLEAN: Faults = Faults {
        delay: Duration::ZERO,
        loss: 0.0,
        reorder: 0.0,
        duplicate: 0.0,
        rate: None,
        cut: false,
        largest: None,
    };

    fn send(path: &mut Path, faults: &Faults, bytes: usize, now: Instant, numbers: &[f64]) -> Fate {
        let mut numbers = numbers.iter().copied();
        path.send(faults, bytes, now, &mut || numbers.next().unwrap_or(0.999))
    }

    #[test]
    fn without_faults_a_packet_arrives_at_once() {
        let now = Instant::now();
        let fate = send(&mut Path::default(), &CLEAN, 1500, now, &[0.0, 0.0, 0.0]);
        assert_eq!(fate, Fate::Arrives { at: now, again: None, late: false });
        assert_eq!(CLEAN, Faults::default());
    }

    #[test]
    fn each_fault_does_what_it_says() {
        let now = Instant::now();
        let fate = |faults, numbers: &[f64]| send(&mut Path::default(), &faults, 1500, now, numbers);
        let ms = Duration::from_millis;
        assert_eq!(fate(Faults { cut: true, ..CLEAN }, &[]), Fate::Dropped(Reason::Cut));
        assert_eq!(fate(Faults { largest: Some(1499), ..CLEAN }, &[]), Fate::Dropped(Reason::TooLarge));
        assert!(matches!(fate(Faults { largest: Some(1500), ..CLEAN }, &[]), Fate::Arrives { .. }));
        assert_eq!(fate(Faults { loss: 0.01, ..CLEAN }, &[0.009]), Fate::Dropped(Reason::Lost));
        assert!(matches!(fate(Faults { loss: 0.01, ..CLEAN }, &[0.01]), Fate::Arrives { .. }));
        let delayed = Faults { delay: ms(50), reorder: 0.1, duplicate: 0.1, ..CLEAN };
        let arrives = |at, again, late| Fate::Arrives { at: now + at, again, late };
        assert_eq!(fate(delayed, &[0.5, 0.5, 0.5]), arrives(ms(50), None, false));
        assert_eq!(fate(delayed, &[0.5, 0.5, 0.0]), arrives(ms(51), None, true));
        assert_eq!(fate(delayed, &[0.5, 0.0, 0.5]), arrives(ms(50), Some(now + ms(50)), false));
    }

    #[test]
    fn a_rate_sends_one_packet_after_the_other_until_the_queue_is_too_long() {
        let now = Instant::now();
        let mut path = Path::default();
        // 1000 bytes take a millisecond.
        let slow = Faults { rate: Some(8_000_000), delay: Duration::from_millis(5), ..CLEAN };
        for packet in 1..=51 {
            let at = now + Duration::from_millis(packet + 5);
            assert_eq!(
                send(&mut path, &slow, 1000, now, &[]),
                Fate::Arrives { at, again: None, late: false }
            );
        }
        assert_eq!(send(&mut path, &slow, 1000, now, &[]), Fate::Dropped(Reason::Overflow));
        let later = now + Duration::from_secs(1);
        let at = later + Duration::from_millis(6);
        assert_eq!(send(&mut path, &slow, 1000, later, &[]), Fate::Arrives { at, again: None, late: false });
    }

    #[test]
    fn a_path_holds_a_bounded_number_of_bytes() {
        let now = Instant::now();
        let mut path = Path::default();
        let far = Faults { delay: Duration::from_secs(1), ..CLEAN };
        let packets = HELD_BYTES / 65_536;
        for _ in 0..packets {
            assert!(matches!(send(&mut path, &far, 65_536, now, &[]), Fate::Arrives { .. }));
        }
        assert_eq!(send(&mut path, &far, 1, now, &[]), Fate::Dropped(Reason::Overflow));
        (0..packets).for_each(|_| path.arrived(65_536));
        assert!(path.is_empty());
    }
}
