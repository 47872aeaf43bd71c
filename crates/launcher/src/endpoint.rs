//! HOST:PORT, as it is written on the command line.

use std::fmt;
use std::str::FromStr;

/// HOST:PORT.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// A name or an address, without brackets.
    pub host: String,
    /// 0 lets the system choose.
    pub port: u16,
}

/// An endpoint as it is written: the port may be left out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostAndPort {
    /// A name or an address, without brackets.
    pub host: String,
    /// `None` if it was left out.
    pub port: Option<u16>,
}

impl HostAndPort {
    /// The host alone.
    pub fn of_host(host: String) -> Self {
        Self { host, port: None }
    }
}

impl FromStr for HostAndPort {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || "give HOST:PORT, such as 127.0.0.1:29400 or [::1]:29400".to_owned();
        let (host, port) = match text.rsplit_once(':') {
            // The last colon may be inside the brackets.
            Some((host, port)) if !port.ends_with(']') => (host, Some(port)),
            _ => (text, None),
        };
        let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        // An IPv6 address needs its brackets: without them its last group reads as a port.
        let host = bare.or((!host.contains([':', '[', ']'])).then_some(host)).filter(|host| !host.is_empty());
        let port = port.map(|port| port.parse().map_err(|_| wrong())).transpose()?;
        Ok(HostAndPort { host: host.ok_or_else(wrong)?.to_owned(), port })
    }
}

/// With a port: the ranks of a benchmark meet where it says.
impl FromStr for Endpoint {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let HostAndPort { host, port } = text.parse()?;
        let port = port.ok_or("give HOST:PORT, such as 127.0.0.1:29400 or [::1]:29400")?;
        Ok(Self { host, port })
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Endpoint { host, port } = self;
        if host.contains(':') { write!(f, "[{host}]:{port}") } else { write!(f, "{host}:{port}") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_host_and_port() {
        for (text, host, port) in [
            ("127.0.0.1:29400", "127.0.0.1", Some(29400)),
            ("[::1]:1", "::1", Some(1)),
            ("localhost:0", "localhost", Some(0)),
            ("node-0.job", "node-0.job", None),
            ("[fd00::1]", "fd00::1", None),
        ] {
            let endpoint: HostAndPort = text.parse().expect(text);
            assert_eq!((endpoint.host.as_str(), endpoint.port), (host, port));
            if let Some(port) = port {
                assert_eq!(Endpoint { host: endpoint.host, port }.to_string(), text);
            }
        }
        for text in ["", ":", "host:", ":29400", "host:65536", "host:x", "::1:29400", "[]:1", "[]", "a]"] {
            assert!(text.parse::<HostAndPort>().is_err(), "{text:?}");
        }
    }
}
