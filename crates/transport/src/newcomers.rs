//! How many handshakes an address is given in a second.
//!
//! A handshake costs this side an exchange of keys and a signature, about a third of a millisecond, before it can
//! know who asks. Somebody without a certificate who asks thousands of times in a second would take a processor for
//! himself. So an address of another host has a budget, and whoever is over it is hung up on; a member that
//! shares the address dials again. Addresses of this host have none: who is here can take the processor anyway.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

/// Handshakes that an address has at once: the links of 64 ranks, with splits and several interfaces.
const BURST: u32 = 1024;

/// And then in a second: about a thirtieth of a processor.
const PER_SECOND: u32 = 100;

/// How long an address that has used its budget up takes to have all of it again.
const REFILL: Duration = Duration::from_secs((BURST / PER_SECOND + 1) as u64);

/// Addresses that are remembered. Those beyond share one budget.
const ADDRESSES_LIMIT: usize = 4096;

/// The budgets of addresses that have dialled lately.
#[derive(Debug)]
pub(crate) struct Newcomers {
    by_address: HashMap<IpAddr, Budget>,
    of_others: Budget,
}

#[derive(Debug)]
struct Budget {
    left: u32,
    since: Instant,
}

impl Newcomers {
    pub(crate) fn new(now: Instant) -> Self {
        Self { by_address: HashMap::new(), of_others: Budget::full(now) }
    }

    /// Whether somebody at `address` is given a handshake now.
    pub(crate) fn admit(&mut self, address: IpAddr, now: Instant) -> bool {
        if address.is_loopback() {
            return true;
        }
        if self.by_address.len() >= ADDRESSES_LIMIT && !self.by_address.contains_key(&address) {
            self.by_address.retain(|_, budget| now.saturating_duration_since(budget.since) < REFILL);
            if self.by_address.len() >= ADDRESSES_LIMIT {
                return self.of_others.take(now);
            }
        }
        self.by_address.entry(address).or_insert_with(|| Budget::full(now)).take(now)
    }
}

impl Budget {
    fn full(now: Instant) -> Self {
        Self { left: BURST, since: now }
    }

    fn take(&mut self, now: Instant) -> bool {
        let earned = now.saturating_duration_since(self.since).as_secs_f64() * f64::from(PER_SECOND);
        if earned >= 1.0 {
            // As small as the most that is taken of it.
            self.left = (self.left + earned.min(f64::from(BURST)) as u32).min(BURST);
            self.since = now;
        }
        let has_some = self.left > 0;
        self.left = self.left.saturating_sub(1);
        has_some
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(number: u32) -> IpAddr {
        std::net::Ipv4Addr::from(0x0a00_0000 + number).into()
    }

    /// How many of that many are admitted.
    fn admitted(newcomers: &mut Newcomers, from: IpAddr, count: u32, now: Instant) -> u32 {
        (0..count).map(|_| u32::from(newcomers.admit(from, now))).sum()
    }

    #[test]
    fn an_address_has_a_burst_and_then_so_many_in_a_second() {
        let start = Instant::now();
        let mut newcomers = Newcomers::new(start);
        assert_eq!(admitted(&mut newcomers, address(1), 10_000, start), BURST);
        assert_eq!(admitted(&mut newcomers, address(2), 10_000, start), BURST, "another one has its own");
        // Asked often and in small steps, as in a flood.
        let mut later = 0;
        for millisecond in 0..3000 {
            let now = start + Duration::from_millis(millisecond);
            later += admitted(&mut newcomers, address(1), 10, now);
        }
        assert!((3 * PER_SECOND - 5..=3 * PER_SECOND).contains(&later), "{later}");
        assert_eq!(admitted(&mut newcomers, address(1), 10_000, start + Duration::from_secs(3600)), BURST);
        let here = std::net::Ipv4Addr::LOCALHOST.into();
        assert_eq!(admitted(&mut newcomers, here, 10_000, start), 10_000);
    }

    #[test]
    fn more_addresses_than_are_remembered_share_a_budget() {
        let start = Instant::now();
        let mut newcomers = Newcomers::new(start);
        let limit = ADDRESSES_LIMIT as u32;
        assert_eq!(
            (0..limit).filter(|&number| newcomers.admit(address(number), start)).count(),
            ADDRESSES_LIMIT
        );
        let others =
            (limit..limit + 10_000).filter(|&number| newcomers.admit(address(number), start)).count();
        assert_eq!(others, BURST as usize);
        assert_eq!(newcomers.by_address.len(), ADDRESSES_LIMIT);
        let later = start + REFILL;
        assert!(newcomers.admit(address(limit), later), "those that have not come again are forgotten");
        assert_eq!(newcomers.by_address.len(), 1);
    }
}
