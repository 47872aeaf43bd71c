//! Which of this host's addresses its ranks are reached at.
//!
//! By default the one that the system sends from towards the rendezvous, which is right where there is one
//! network. A host with a fast one beside it says so: `PACELINE_INTERFACE=eth1`, or the same by its addresses,
//! which have the same form on all hosts where interfaces have other names: `10.1.0.0/16`.

use std::net::IpAddr;

/// An address of an interface of this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    /// The interface's name.
    pub interface: String,
    /// One of its addresses.
    pub ip: IpAddr,
}

/// What an entry of the list asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Wanted<'a> {
    Interface(&'a str),
    Network { ip: IpAddr, bits: u32 },
    V4,
    V6,
}

/// The first of `addresses` that fits the first entry of `list` that any fits.
///
/// The list has names of interfaces, networks (`10.1.0.0/16`, `fd00::/8`), single addresses, `ipv4` and `ipv6`,
/// separated by commas. Loopback and link-local addresses are taken only where an entry names them: nobody on
/// another host reaches them, or only with a scope.
///
/// # Errors
/// In words: an entry that is none of these, or what this host has instead.
pub fn choose(list: &str, addresses: &[Address]) -> Result<IpAddr, String> {
    let entries = list.split(',').map(str::trim).filter(|entry| !entry.is_empty());
    let wanted: Vec<Wanted<'_>> = entries.map(Wanted::parse).collect::<Result<_, _>>()?;
    if wanted.is_empty() {
        return Err("it is empty; name an interface or a network, or leave it unset".to_owned());
    }
    let found = wanted.iter().find_map(|wanted| addresses.iter().find(|address| wanted.takes(address)));
    found.map(|address| address.ip).ok_or_else(|| {
        let here: Vec<String> =
            addresses.iter().map(|address| format!("{} ({})", address.ip, address.interface)).collect();
        format!("`{list}` fits none of this host's addresses: {}", here.join(", "))
    })
}

impl<'a> Wanted<'a> {
    fn parse(entry: &'a str) -> Result<Self, String> {
        let bad = |what: &str| Err(format!("`{entry}` {what}"));
        match entry {
            "ipv4" => return Ok(Self::V4),
            "ipv6" => return Ok(Self::V6),
            _ => {}
        }
        let (address, bits) = match entry.split_once('/') {
            Some((address, bits)) => (address, Some(bits)),
            None => (entry, None),
        };
        let Ok(ip) = address.parse::<IpAddr>() else {
            return if bits.is_some() { bad("is not a network: a.b.c.d/n") } else { Ok(Self::Interface(entry)) };
        };
        let longest = if ip.is_ipv4() { 32 } else { 128 };
        match bits.map_or(Ok(longest), str::parse) {
            Ok(bits) if bits <= longest => Ok(Self::Network { ip, bits }),
            _ => bad(&format!("has no length from 0 to {longest}")),
        }
    }

    fn takes(&self, address: &Address) -> bool {
        let far = is_far_reaching(address.ip);
        match self {
            Self::Interface(name) => address.interface == *name && (far || address.ip.is_loopback()),
            Self::Network { ip, bits } => is_in(address.ip, *ip, *bits),
            Self::V4 => address.ip.is_ipv4() && far,
            Self::V6 => address.ip.is_ipv6() && far,
        }
    }
}

/// Whether other hosts can reach an address that is told to them as it is.
fn is_far_reaching(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => !ip.is_loopback() && !ip.is_link_local(),
        IpAddr::V6(ip) => !ip.is_loopback() && !ip.is_unicast_link_local(),
    }
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

/// The addresses of this host.
///
/// # Errors
/// The operating system's.
pub fn of_this_host() -> std::io::Result<Vec<Address>> {
    let interfaces = if_addrs::get_if_addrs()?;
    Ok(interfaces.into_iter().map(|it| Address { ip: it.ip(), interface: it.name }).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn here() -> Vec<Address> {
        [
            ("lo", "127.0.0.1"),
            ("lo", "::1"),
            ("eth0", "fe80::1"),
            ("eth0", "192.168.1.7"),
            ("eth1", "10.1.2.3"),
            ("eth1", "fd00::3"),
        ]
        .map(|(interface, ip)| Address { interface: interface.to_owned(), ip: ip.parse().expect("an address") })
        .to_vec()
    }

    #[test]
    fn an_address_is_chosen_by_interface_network_or_family_in_the_order_of_the_list() {
        for (list, expected) in [
            ("eth0", "192.168.1.7"),
            ("eth1", "10.1.2.3"),
            ("10.1.0.0/16", "10.1.2.3"),
            ("10.9.0.0/16, fd00::/8", "fd00::3"),
            ("ib0,eth1", "10.1.2.3"),
            ("ipv4", "192.168.1.7"),
            ("ipv6", "fd00::3"),
            ("192.168.1.7", "192.168.1.7"),
            ("lo", "127.0.0.1"),
            ("::1", "::1"),
            ("0.0.0.0/0", "127.0.0.1"),
        ] {
            assert_eq!(choose(list, &here()).map(|ip| ip.to_string()), Ok(expected.to_owned()), "{list}");
        }
    }

    #[test]
    fn what_fits_nothing_or_makes_no_sense_is_said() {
        for (list, reason) in [
            ("ib0", "fits none of this host's addresses: 127.0.0.1 (lo)"),
            ("10.1.0.0/33", "has no length from 0 to 32"),
            ("10.1.0.0/x", "has no length"),
            ("eth0/8", "is not a network"),
            (" , ", "is empty"),
        ] {
            let error = choose(list, &here()).expect_err("nothing fits");
            assert!(error.contains(reason), "{list}: {error}");
        }
    }

    #[test]
    fn this_host_has_a_loopback_interface() {
        let found = of_this_host().expect("the system says");
        assert!(found.iter().any(|address| address.ip.is_loopback()), "{found:?}");
    }
}
