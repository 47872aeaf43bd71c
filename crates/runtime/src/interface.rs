//! Which of this host's addresses its ranks listen on, tell the others, and dial from.
//!
//! By default the system decides: ranks listen on all interfaces and are dialled at the address from which they
//! have reached the rendezvous, which is right where there is one network. A host with a faster one beside it says
//! so, by the interface's name (`eth1`) or, where hosts have other names for it, by its network (`10.1.0.0/16`).
//!
//! What is chosen is a function of the words and of a list of addresses; [`of_this_host`] alone asks the system.

use std::fmt;
use std::io;
use std::net::IpAddr;
use std::str::FromStr;

/// An address of an interface of this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    /// The interface's name.
    pub interface: String,
    /// One of its addresses.
    pub ip: IpAddr,
    /// Whether the interface is in operation.
    pub up: bool,
}

/// Which addresses are wanted: a list of entries, the most wanted first, separated by commas. Several lists with `+`
/// between them want an address each, for links over all of them at the same time: `eth1+eth2`.
///
/// | entry | what it wants |
/// |---|---|
/// | `eth1`, `ib*` | the addresses of the interface, or of all whose names begin so; IPv4 before IPv6 |
/// | `eth1:ipv6`, `ib*:ipv4` | those of one family |
/// | `10.1.0.0/16`, `fd00::/8` | the addresses in a network |
/// | `10.1.2.3`, `::1` | one address |
/// | `ipv4`, `ipv6` | any address of the family |
/// | `!docker0`, `!10.9.0.0/16` | none of these, whatever other entries say; alone: any other |
///
/// Loopback addresses, and IPv4's link-local ones, are taken only by an entry that names them or their interface.
/// IPv6's link-local ones are never taken: they mean nothing without the number that the interface has on this host.
/// An interface that is down is the last choice of each entry: it may just be coming up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Selection {
    text: String,
    wanted: Vec<Wanted>,
    unwanted: Vec<Wanted>,
    /// The further lists.
    beside: Vec<Selection>,
}

/// What an entry of the list is about.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Wanted {
    Interface {
        name: Name,
        family: Option<Family>,
    },
    Network {
        ip: IpAddr,
        bits: u32,
    },
    Family(Family),
    /// What is left when other entries have taken something away.
    Any,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Name {
    Is(String),
    Begins(String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Family {
    V4,
    V6,
}

/// The most interfaces whose links are used at a time.
const STRIPES_LIMIT: usize = 8;

/// Addresses that an error lists. A host with many containers has hundreds.
const LISTED_LIMIT: usize = 16;

impl FromStr for Selection {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.contains('+') {
            let mut lists = text.split('+').map(Self::from_str).collect::<Result<Vec<_>, _>>()?;
            if lists.len() > STRIPES_LIMIT {
                return Err(format!(
                    "it wants {} interfaces at a time, and {STRIPES_LIMIT} is the most",
                    lists.len()
                ));
            }
            let beside = lists.split_off(1);
            let first = lists.pop().expect("there is text on both sides of a plus");
            return Ok(Self { text: text.to_owned(), beside, ..first });
        }
        let entries = text.split(',').map(str::trim).filter(|entry| !entry.is_empty());
        let (mut wanted, mut unwanted) = (Vec::new(), Vec::new());
        for entry in entries {
            match entry.strip_prefix('!') {
                Some(entry) => unwanted.push(Wanted::parse(entry.trim_start())?),
                None => wanted.push(Wanted::parse(entry)?),
            }
        }
        match (wanted.is_empty(), unwanted.is_empty()) {
            (true, true) => {
                Err("it names no interface, network or address; leave it unset for none".to_owned())
            }
            (true, false) => {
                Ok(Self { text: text.to_owned(), wanted: vec![Wanted::Any], unwanted, beside: Vec::new() })
            }
            (false, _) => Ok(Self { text: text.to_owned(), wanted, unwanted, beside: Vec::new() }),
        }
    }
}

impl fmt::Display for Selection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Selection {
    /// The first of `addresses` that fits the first entry that any of them fits.
    ///
    /// # Errors
    /// In words, on one line: which addresses there are instead.
    pub fn choose(&self, addresses: &[Address]) -> Result<IpAddr, String> {
        let mut all: Vec<Address> = addresses.to_vec();
        all.extend(self.further_loopback(addresses));
        let allowed = |address: &&Address| {
            is_usable(address.ip) && !self.unwanted.iter().any(|unwanted| unwanted.covers(address))
        };
        let mut allowed: Vec<&Address> = all.iter().filter(allowed).collect();
        allowed.sort_by_key(|address| !address.up);
        let found =
            self.wanted.iter().find_map(|wanted| allowed.iter().find(|address| wanted.takes(address)));
        found.map(|address| address.ip).ok_or_else(|| self.fits_none(addresses))
    }

    /// What each of the lists [chooses](Self::choose), in order.
    ///
    /// # Errors
    /// As [`choose`](Self::choose); also that two lists choose the same address.
    pub fn choose_all(&self, addresses: &[Address]) -> Result<Vec<IpAddr>, String> {
        let mut chosen: Vec<IpAddr> = vec![self.choose(addresses)?];
        for list in &self.beside {
            let ip = list.choose(addresses)?;
            if chosen.contains(&ip) {
                return Err(format!(
                    "`{self}` takes the address {ip} twice; name an interface for each part"
                ));
            }
            chosen.push(ip);
        }
        Ok(chosen)
    }

    /// [`choose_all`](Self::choose_all) among the addresses of this host, as they are now.
    ///
    /// # Errors
    /// As [`choose_all`](Self::choose_all); also the operating system's.
    pub fn choose_all_here(&self) -> Result<Vec<IpAddr>, String> {
        let addresses =
            of_this_host().map_err(|error| format!("cannot list this host's interfaces: {error}"))?;
        self.choose_all(&addresses)
    }

    /// [`choose`](Self::choose) among the addresses of this host, as they are now.
    ///
    /// # Errors
    /// As [`choose`](Self::choose); also the operating system's.
    pub fn choose_here(&self) -> Result<IpAddr, String> {
        let addresses =
            of_this_host().map_err(|error| format!("cannot list this host's interfaces: {error}"))?;
        self.choose(&addresses)
    }

    /// Addresses of 127.0.0.0/8 that entries name. All of them are this host's, though the interface has one.
    fn further_loopback(&self, addresses: &[Address]) -> Vec<Address> {
        let Some(loopback) =
            addresses.iter().find(|address| address.ip.is_loopback() && address.ip.is_ipv4())
        else {
            return Vec::new();
        };
        let named = self.wanted.iter().filter_map(|wanted| match wanted {
            Wanted::Network { ip, bits: 32 } if ip.is_ipv4() && ip.is_loopback() => Some(*ip),
            _ => None,
        });
        named.map(|ip| Address { ip, ..loopback.clone() }).collect()
    }

    fn fits_none(&self, addresses: &[Address]) -> String {
        let usable: Vec<&Address> = addresses.iter().filter(|address| is_usable(address.ip)).collect();
        let listed: Vec<String> =
            usable.iter().take(LISTED_LIMIT).map(|address| address.in_words()).collect();
        let more = match usable.len().saturating_sub(LISTED_LIMIT) {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        format!("`{self}` fits none of this host's addresses, which are {}{more}", listed.join(", "))
    }
}

impl Address {
    fn in_words(&self) -> String {
        let Self { interface, ip, up } = self;
        if *up { format!("{ip} ({interface})") } else { format!("{ip} ({interface}, which is down)") }
    }
}

impl Wanted {
    fn parse(entry: &str) -> Result<Self, String> {
        if let Some(family) = Family::named(entry) {
            return Ok(Self::Family(family));
        }
        let (address, bits) = match entry.split_once('/') {
            Some((address, bits)) => (address, Some(bits)),
            None => (entry, None),
        };
        match (address.parse::<IpAddr>(), bits) {
            (Ok(ip), bits) => Self::network(entry, ip, bits),
            (Err(_), Some(_)) => Err(format!("`{entry}` is no network, such as 10.1.0.0/16 or fd00::/8")),
            (Err(_), None) => Self::interface(entry),
        }
    }

    fn network(entry: &str, ip: IpAddr, bits: Option<&str>) -> Result<Self, String> {
        let longest = if ip.is_ipv4() { 32 } else { 128 };
        match bits.map_or(Ok(longest), str::parse) {
            Ok(bits) if bits <= longest => Ok(Self::Network { ip, bits }),
            _ => Err(format!("`{entry}`: the length of a network's prefix is a number from 0 to {longest}")),
        }
    }

    fn interface(entry: &str) -> Result<Self, String> {
        let (name, family) = match entry.rsplit_once(':') {
            // Names may have colons of their own: `eth0:1`.
            Some((name, family)) if Family::named(family).is_some() => (name, Family::named(family)),
            _ => (entry, None),
        };
        let name = match name.strip_suffix('*') {
            Some(beginning) => Name::Begins(beginning.to_owned()),
            None if name.is_empty() => {
                return Err(format!("`{entry}` names no interface; say for instance eth0 or eth0:ipv6"));
            }
            None => Name::Is(name.to_owned()),
        };
        Ok(Self::Interface { name, family })
    }

    /// Whether this entry asks for the address.
    fn takes(&self, address: &Address) -> bool {
        let ip = address.ip;
        let asked_for = match self {
            Self::Interface { name: Name::Is(_), .. } => is_far_reaching(ip) || ip.is_loopback(),
            Self::Network { ip: network, bits } => is_far_reaching(ip) || names_the_near(*network, *bits),
            Self::Interface { name: Name::Begins(_), .. } | Self::Family(_) | Self::Any => {
                is_far_reaching(ip)
            }
        };
        asked_for && self.covers(address)
    }

    /// Whether the address is one of those that this entry is about.
    fn covers(&self, address: &Address) -> bool {
        match self {
            Self::Interface { name, family } => {
                name.fits(&address.interface) && family.is_none_or(|family| family.has(address.ip))
            }
            Self::Network { ip, bits } => is_in(address.ip, *ip, *bits),
            Self::Family(family) => family.has(address.ip),
            Self::Any => true,
        }
    }
}

impl Name {
    fn fits(&self, interface: &str) -> bool {
        match self {
            Self::Is(name) => interface == name,
            Self::Begins(beginning) => interface.starts_with(beginning.as_str()),
        }
    }
}

impl Family {
    fn named(text: &str) -> Option<Self> {
        match text {
            "ipv4" => Some(Self::V4),
            "ipv6" => Some(Self::V6),
            _ => None,
        }
    }

    fn has(self, ip: IpAddr) -> bool {
        ip.is_ipv4() == (self == Self::V4)
    }
}

/// Whether an address means something without the number of an interface of this host.
fn is_usable(ip: IpAddr) -> bool {
    !matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local())
}

/// Whether other hosts can reach an address that is told to them.
fn is_far_reaching(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => !ip.is_loopback() && !ip.is_link_local(),
        IpAddr::V6(ip) => !ip.is_loopback() && !ip.is_unicast_link_local(),
    }
}

/// Whether a network is one of loopback or link-local addresses, so that whoever names it means those.
fn names_the_near(network: IpAddr, bits: u32) -> bool {
    !is_far_reaching(network) && bits >= if network.is_loopback() { 8 } else { 16 }
}

/// Whether the first `bits` bits are those of `network`.
fn is_in(ip: IpAddr, network: IpAddr, bits: u32) -> bool {
    match (ip, network) {
        (IpAddr::V4(ip), IpAddr::V4(network)) => {
            bits == 0 || (ip.to_bits() ^ network.to_bits()) >> (32 - bits) == 0
        }
        (IpAddr::V6(ip), IpAddr::V6(network)) => {
            bits == 0 || (ip.to_bits() ^ network.to_bits()) >> (128 - bits) == 0
        }
        _ => false,
    }
}

/// The addresses of this host, in the system's order but for IPv4 before IPv6.
///
/// # Errors
/// The operating system's.
pub fn of_this_host() -> io::Result<Vec<Address>> {
    let interfaces = if_addrs::get_if_addrs()?;
    let address = |it: if_addrs::Interface| Address { ip: it.ip(), up: it.is_oper_up(), interface: it.name };
    let mut addresses: Vec<Address> = interfaces.into_iter().map(address).collect();
    addresses.sort_by_key(|address| address.ip.is_ipv6());
    Ok(addresses)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn here() -> Vec<Address> {
        let up = [
            ("lo", "127.0.0.1"),
            ("docker0", "172.17.0.1"),
            ("eth0", "192.168.1.7"),
            ("eth0", "169.254.9.9"),
            ("eth1", "10.1.2.3"),
            ("lo", "::1"),
            ("eth0", "fe80::1"),
            ("eth1", "fd00::3"),
        ];
        let address = |interface: &str, ip: &str, up| Address {
            interface: interface.to_owned(),
            ip: ip.parse().expect("an address"),
            up,
        };
        let up = up.iter().map(|(interface, ip)| address(interface, ip, true));
        let down = ("eth2", "10.2.0.1");
        [address(down.0, down.1, false)].into_iter().chain(up).collect()
    }

    fn chosen(list: &str) -> Result<String, String> {
        list.parse::<Selection>()?.choose(&here()).map(|ip| ip.to_string())
    }

    #[test]
    fn an_address_is_chosen_by_interface_network_or_family_in_the_order_of_the_list() {
        for (list, expected) in [
            ("eth0", "192.168.1.7"),
            ("eth1", "10.1.2.3"),
            ("eth1:ipv6", "fd00::3"),
            ("eth1:ipv4", "10.1.2.3"),
            ("eth*:ipv6", "fd00::3"),
            ("eth*", "192.168.1.7"),
            ("10.1.0.0/16", "10.1.2.3"),
            ("10.9.0.0/16, fd00::/8", "fd00::3"),
            ("ib0,eth1", "10.1.2.3"),
            ("ipv4", "172.17.0.1"),
            ("ipv6", "fd00::3"),
            ("192.168.1.7", "192.168.1.7"),
        ] {
            assert_eq!(chosen(list).as_deref(), Ok(expected), "{list}");
        }
    }

    #[test]
    fn an_interface_that_is_down_is_the_last_choice_of_its_entry() {
        for (list, expected) in
            [("10.0.0.0/8", "10.1.2.3"), ("eth2", "10.2.0.1"), ("10.2.0.0/16,eth1", "10.2.0.1")]
        {
            assert_eq!(chosen(list).as_deref(), Ok(expected), "{list}");
        }
    }

    #[test]
    fn what_is_excluded_is_never_chosen() {
        for (list, expected) in [
            ("!docker0", "192.168.1.7"),
            ("!docker*,ipv4", "192.168.1.7"),
            ("ipv4, !docker0, !192.168.0.0/16", "10.1.2.3"),
            ("!ipv4", "fd00::3"),
            ("!eth0,!docker0,!eth1:ipv4", "fd00::3"),
        ] {
            assert_eq!(chosen(list).as_deref(), Ok(expected), "{list}");
        }
        assert!(chosen("eth1,!10.0.0.0/8,!fd00::/8").is_err());
    }

    #[test]
    fn addresses_that_others_cannot_reach_are_chosen_by_name_alone() {
        for (list, expected) in [
            ("lo", "127.0.0.1"),
            ("lo:ipv6", "::1"),
            ("::1", "::1"),
            ("127.0.0.0/8", "127.0.0.1"),
            ("127.0.0.5", "127.0.0.5"),
            ("169.254.0.0/16", "169.254.9.9"),
            ("0.0.0.0/0", "172.17.0.1"),
            ("::/0", "fd00::3"),
        ] {
            assert_eq!(chosen(list).as_deref(), Ok(expected), "{list}");
        }
        for list in ["l*", "eth0:ipv6", "fe80::/10", "fe80::1"] {
            assert!(chosen(list).is_err(), "{list}");
        }
    }

    #[test]
    fn what_fits_nothing_is_answered_by_what_there_is() {
        for list in ["ib0", "10.9.0.0/16"] {
            let error = chosen(list).expect_err("nothing fits");
            assert!(
                error.starts_with(&format!("`{list}` fits none of this host's addresses, which are ")),
                "{error}"
            );
            for part in ["127.0.0.1 (lo)", "fd00::3 (eth1)", "10.2.0.1 (eth2, which is down)"] {
                assert!(error.contains(part) && !error.contains("fe80") && !error.contains('\n'), "{error}");
            }
        }
        let many: Vec<Address> = (0..100).map(|_| here()[1].clone()).collect();
        let error =
            "eth0".parse::<Selection>().and_then(|list| list.choose(&many)).expect_err("nothing fits");
        assert!(error.ends_with("127.0.0.1 (lo) and 84 more"), "{error}");
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for (list, reason) in [
            ("", "names no interface"),
            (" , ", "names no interface"),
            ("10.1.0.0/33", "a number from 0 to 32"),
            ("fd00::/129", "a number from 0 to 128"),
            ("10.1.0.0/x", "a number from 0 to 32"),
            ("eth0/8", "is no network"),
            ("!", "names no interface"),
            (":ipv6", "names no interface"),
        ] {
            let error = list.parse::<Selection>().expect_err("it makes no sense");
            assert!(error.contains(reason), "{list}: {error}");
        }
    }

    #[test]
    fn this_host_has_a_loopback_interface() {
        let found = of_this_host().expect("the system says");
        assert!(found.iter().any(|address| address.ip.is_loopback() && address.up), "{found:?}");
        assert_eq!(
            "127.0.0.9".parse::<Selection>().and_then(|list| list.choose_here()),
            Ok([127, 0, 0, 9].into())
        );
    }
}
