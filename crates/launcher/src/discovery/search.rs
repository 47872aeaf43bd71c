//! What is known of peers that have not come, as a value: no clock, no chance, no network.

use std::fmt;
use std::time::{Duration, Instant};

/// The pause after the first look that failed, and the longest. Doubling: a name that appears is seen within two seconds,
/// and a cluster's DNS gets one question in two seconds from each launcher for each peer.
const PAUSES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));

/// Each pause is this much of itself, at least and at most, by chance: launchers that start together do not ask together.
const JITTER: (f64, f64) = (0.5, 1.5);

/// Looks at the same time: a job of thousands of pods floods neither the DNS nor the network.
const LOOKS_MOST: usize = 32;

/// The first line about who is missing is worth it after this time.
const FIRST_LINE: Duration = Duration::from_secs(1);

/// The least time between two lines that differ, and between two that do not.
const LINES: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(60));

/// Peers that a line names.
const NAMED_MOST: usize = 16;

/// What the last look at a peer found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Seen {
    /// The DNS knows no such name, or no address of it.
    NoName,
    /// The DNS itself does not answer; why.
    NoDns(String),
    /// There is an address, and its machine says that nobody listens.
    Refused,
    /// There is an address, and nobody answers; why.
    Unreachable(String),
    /// Somebody listens, but its launcher has not come.
    Listens,
    /// Nobody has told under which name others find it.
    Nameless,
}

/// The peers of a job, and who of them is missing.
#[derive(Debug)]
pub struct Search {
    start: Instant,
    peers: Vec<Peer>,
    said: Option<(Instant, String)>,
}

#[derive(Debug)]
struct Peer {
    name: String,
    missing: bool,
    seen: Option<Seen>,
    pause: Duration,
    /// When to look again; `None` while somebody looks.
    next: Option<Instant>,
}

impl Search {
    /// A search for peers with these names, all of them missing.
    pub fn new(now: Instant, names: impl IntoIterator<Item = String>) -> Self {
        let peer = |name| Peer { name, missing: true, seen: None, pause: PAUSES.0, next: Some(now) };
        Self { start: now, peers: names.into_iter().map(peer).collect(), said: None }
    }

    /// These are missing, and all others have come. One that is lost again is looked for anew.
    pub fn missing(&mut self, now: Instant, missing: &[usize]) {
        for (number, peer) in self.peers.iter_mut().enumerate() {
            let lost_again = !peer.missing && missing.contains(&number);
            peer.missing = missing.contains(&number);
            if lost_again {
                *peer = Peer {
                    seen: None,
                    pause: PAUSES.0,
                    next: peer.next.and(Some(now)),
                    ..std::mem::take(peer)
                };
            }
        }
    }

    /// Whom to look at now. Each is to be followed by [`Search::saw`].
    pub fn due(&mut self, now: Instant) -> Vec<usize> {
        let looking = self.peers.iter().filter(|peer| peer.next.is_none()).count();
        let due = self.peers.iter_mut().enumerate().filter(|(_, peer)| peer.is_due(now));
        due.take(LOOKS_MOST.saturating_sub(looking))
            .map(|(number, peer)| {
                peer.next = None;
                number
            })
            .collect()
    }

    /// A look has found this. `chance` is from 0 to 1.
    pub fn saw(&mut self, now: Instant, number: usize, seen: Seen, chance: f64) {
        let Some(peer) = self.peers.get_mut(number) else { return };
        // Whoever gets further is looked at again soon.
        let further = peer.seen.as_ref().is_some_and(|before| rank(before) < rank(&seen));
        peer.pause = if further { PAUSES.0 } else { peer.pause };
        peer.next = Some(now + jittered(peer.pause, chance));
        peer.pause = (peer.pause * 2).min(PAUSES.1);
        peer.seen = Some(seen);
    }

    /// When somebody is next to be looked at; `None` if nobody is.
    pub fn next(&self) -> Option<Instant> {
        self.peers.iter().filter(|peer| peer.missing).filter_map(|peer| peer.next).min()
    }

    /// What is to be said now about those who are missing, if anything is.
    pub fn line(&mut self, now: Instant) -> Option<String> {
        if now.saturating_duration_since(self.start) < FIRST_LINE {
            return None;
        }
        let line = self.status()?;
        let quiet = |(at, before): &(Instant, String)| {
            now.saturating_duration_since(*at) < if *before == line { LINES.1 } else { LINES.0 }
        };
        if self.said.as_ref().is_some_and(quiet) {
            return None;
        }
        self.said = Some((now, line.clone()));
        Some(line)
    }

    /// What the last look at a peer has found.
    pub fn seen(&self, number: usize) -> Option<&Seen> {
        self.peers.get(number)?.seen.as_ref()
    }

    /// `2 of 8: job-worker-3 (no DNS name yet), job-worker-5 (connection refused)`; `None` if nobody is missing.
    pub fn status(&self) -> Option<String> {
        let missing: Vec<&Peer> = self.peers.iter().filter(|peer| peer.missing).collect();
        let (count, all) = (missing.len(), self.peers.len());
        let named: Vec<String> = missing.iter().take(NAMED_MOST).map(|peer| peer.in_words()).collect();
        let more =
            if count > NAMED_MOST { format!(" and {} more", count - NAMED_MOST) } else { String::new() };
        (count > 0).then(|| format!("{count} of {all}: {}{more}", named.join(", ")))
    }
}

impl Peer {
    fn is_due(&self, now: Instant) -> bool {
        self.missing && self.next.is_some_and(|at| at <= now)
    }

    fn in_words(&self) -> String {
        match &self.seen {
            Some(seen) => format!("{} ({seen})", self.name),
            None => self.name.clone(),
        }
    }
}

impl Default for Peer {
    fn default() -> Self {
        Self { name: String::new(), missing: true, seen: None, pause: PAUSES.0, next: None }
    }
}

/// How far a peer has come.
fn rank(seen: &Seen) -> u32 {
    match seen {
        Seen::Nameless | Seen::NoDns(_) | Seen::NoName => 0,
        Seen::Unreachable(_) => 1,
        Seen::Refused => 2,
        Seen::Listens => 3,
    }
}

/// The pause, changed by chance, which is from 0 to 1.
pub fn jittered(pause: Duration, chance: f64) -> Duration {
    let (least, most) = JITTER;
    pause.mul_f64(least + (most - least) * chance.clamp(0.0, 1.0))
}

impl fmt::Display for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Seen::NoName => f.write_str("no DNS name yet"),
            Seen::NoDns(why) => write!(f, "the DNS does not answer: {why}"),
            Seen::Refused => f.write_str("connection refused"),
            Seen::Unreachable(why) => f.write_str(why),
            Seen::Listens => f.write_str("answers, but its launcher has not come"),
            Seen::Nameless => f.write_str("has no name to look it up by"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn search(count: usize) -> (Search, Instant) {
        let now = Instant::now();
        (Search::new(now, (0..count).map(|number| format!("job-worker-{number}"))), now)
    }

    fn seconds(start: Instant, seconds: f64) -> Instant {
        start + Duration::from_secs_f64(seconds)
    }

    #[test]
    fn the_line_says_who_is_missing_and_why() {
        let (mut search, start) = search(8);
        assert_eq!(search.due(start).len(), 8);
        search.missing(start, &[3, 5]);
        search.saw(start, 3, Seen::NoName, 0.5);
        search.saw(start, 5, Seen::Refused, 0.5);
        let line = "2 of 8: job-worker-3 (no DNS name yet), job-worker-5 (connection refused)";
        assert_eq!(search.status().as_deref(), Some(line));
        search.missing(start, &[]);
        assert_eq!((search.status(), search.next()), (None, None));
    }

    #[test]
    fn lines_come_when_something_changes_but_not_all_the_time() {
        let (mut search, start) = search(2);
        assert_eq!(search.line(seconds(start, 0.9)), None, "most jobs have met by then");
        assert!(search.line(seconds(start, 1.0)).is_some());
        search.saw(start, 0, Seen::NoName, 0.5);
        assert_eq!(search.line(seconds(start, 2.9)), None, "too soon");
        assert!(search.line(seconds(start, 3.0)).expect("it has changed").contains("no DNS name yet"));
        assert_eq!(search.line(seconds(start, 62.9)), None, "nothing has changed");
        assert!(search.line(seconds(start, 63.0)).is_some(), "a reader of the log sees that it still waits");
    }

    #[test]
    fn pauses_double_with_jitter_up_to_a_limit_and_begin_again_with_progress() {
        let (mut search, start) = search(1);
        let mut pauses = Vec::new();
        for chance in [0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.0, 1.0] {
            search.saw(start, 0, Seen::NoName, chance);
            pauses.push((search.next().expect("missing") - start).as_millis());
        }
        assert_eq!(pauses, [100, 200, 400, 800, 1600, 2000, 1000, 3000]);
        search.saw(start, 0, Seen::Refused, 0.5);
        assert_eq!(search.next(), Some(start + Duration::from_millis(100)), "it is about to come");
        search.saw(start, 0, Seen::NoName, 0.5);
        assert_eq!(search.next(), Some(start + Duration::from_millis(200)));
    }

    #[test]
    fn one_is_looked_at_once_at_a_time_and_not_all_at_the_same_time() {
        let (mut search, start) = search(100);
        let first = search.due(start);
        assert_eq!((first.len(), search.due(start).len()), (LOOKS_MOST, 0));
        search.saw(start, first[0], Seen::NoName, 0.5);
        assert_eq!(search.due(start), [LOOKS_MOST], "one place is free for the next");
        assert!(search.status().expect("all are missing").ends_with("job-worker-15 and 84 more"));
    }

    #[test]
    fn one_that_is_lost_again_is_looked_for_anew() {
        let (mut search, start) = search(1);
        search.due(start);
        search.saw(start, 0, Seen::Listens, 0.5);
        search.missing(start, &[]);
        let later = seconds(start, 60.0);
        search.missing(later, &[0]);
        assert_eq!(search.status().as_deref(), Some("1 of 1: job-worker-0"));
        assert_eq!(search.due(later), [0]);
    }
}
