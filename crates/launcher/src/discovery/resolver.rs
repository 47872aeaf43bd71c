//! Names to addresses.

use std::fmt;
use std::fs;
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hickory_resolver::TokioResolver;
use hickory_resolver::config::ResolverConfig;
use hickory_resolver::net::runtime::TokioRuntimeProvider;

use tokio::time::timeout;

use super::search::Seen;

/// How long one server is given for one question. The next look asks again.
const QUESTION: Duration = Duration::from_secs(2);

/// What says how names are resolved.
const FILES: [&str; 3] = ["/etc/resolv.conf", "/etc/hosts", "/etc/nsswitch.conf"];

/// Asks the servers of /etc/resolv.conf each time anew: what a cluster answers now may be wrong in a second. The files are
/// read again when they have changed: a container's are written when its network comes. To be used on one I/O thread.
#[derive(Debug, Default)]
pub struct Resolver(Mutex<Option<Known>>);

/// What the files have said.
#[derive(Debug, Clone)]
struct Known {
    files: [Stamp; 3],
    /// By /etc/hosts and the DNS.
    direct: TokioResolver,
    /// Why there is no server to ask.
    no_server: Option<String>,
    others: Others,
}

/// Whether a name that /etc/hosts and the DNS do not know may be known to the system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Others {
    No,
    /// /etc/nsswitch.conf names more: mDNS, a directory, systemd's resolver.
    AskSystem,
}

/// By which a file that has changed is known: its number, size, and when it was changed; `None` for one that is missing.
type Stamp = Option<(u64, u64, i64, i64)>;

/// Why a name has no address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NoAddress {
    /// There is no such name, or it has no address.
    NoName,
    /// The question has not been answered; why.
    NoAnswer(String),
}

impl Resolver {
    /// The addresses of a host now, IPv4 first; an address is its own.
    ///
    /// # Errors
    /// [`NoAddress`]; asking again may help.
    pub async fn addresses(&self, host: &str) -> Result<Vec<IpAddr>, NoAddress> {
        if let Ok(ip) = host.parse() {
            return Ok(vec![ip]);
        }
        let known = self.known().map_err(NoAddress::NoAnswer)?;
        let mut addresses = match known.ask(host).await {
            Err(why) if known.others == Others::AskSystem => ask_system(host).await.ok_or(why)?,
            answer => answer?,
        };
        addresses.sort_by_key(|ip| ip.is_ipv6());
        if addresses.is_empty() { Err(NoAddress::NoName) } else { Ok(addresses) }
    }

    /// By the files as they are now.
    fn known(&self) -> Result<Known, String> {
        let files = FILES.map(|file| stamp(file.as_ref()));
        let mut known = self.lock();
        if let Some(known) = known.as_ref().filter(|known| known.files == files) {
            return Ok(known.clone());
        }
        let read = Known::read(files)?;
        *known = Some(read.clone());
        Ok(read)
    }

    fn lock(&self) -> MutexGuard<'_, Option<Known>> {
        // Replaced whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Known {
    /// Without a memory for answers.
    fn read(files: [Stamp; 3]) -> Result<Self, String> {
        let (mut builder, no_server) = match TokioResolver::builder_tokio() {
            Ok(builder) => (builder, None),
            Err(e) => {
                // There may be names in /etc/hosts.
                let nobody = ResolverConfig::from_parts(None, Vec::new(), Vec::new());
                let builder = TokioResolver::builder_with_config(nobody, TokioRuntimeProvider::default());
                (builder, Some(format!("{}: {e}", FILES[0])))
            }
        };
        let options = builder.options_mut();
        options.cache_size = 0;
        options.positive_max_ttl = Some(Duration::ZERO);
        options.negative_max_ttl = Some(Duration::ZERO);
        options.timeout = QUESTION;
        options.attempts = 1;
        let direct = builder.build().map_err(|e| e.to_string())?;
        let others = others(&fs::read_to_string(FILES[2]).unwrap_or_default());
        Ok(Self { files, direct, no_server, others })
    }

    async fn ask(&self, host: &str) -> Result<Vec<IpAddr>, NoAddress> {
        match self.direct.lookup_ip(host).await {
            Ok(found) => Ok(found.iter().collect()),
            Err(error) if error.is_no_records_found() => Err(NoAddress::NoName),
            Err(error) => {
                Err(NoAddress::NoAnswer(self.no_server.clone().unwrap_or_else(|| error.to_string())))
            }
        }
    }
}

/// By the C library and whatever /etc/nsswitch.conf has it load.
async fn ask_system(host: &str) -> Option<Vec<IpAddr>> {
    // It has time limits of its own, which the system's configuration sets.
    let found = timeout(QUESTION, tokio::net::lookup_host((host, 0))).await.ok()?.ok()?;
    let mut addresses: Vec<IpAddr> = found.map(|address| address.ip()).collect();
    addresses.dedup();
    Some(addresses)
}

/// What the text of nsswitch.conf says of hosts: `hosts: files mdns4_minimal [NOTFOUND=return] dns`.
fn others(nsswitch: &str) -> Others {
    // A C library that is linked statically loads nothing.
    if cfg!(target_feature = "crt-static") {
        return Others::No;
    }
    let line = nsswitch.lines().find_map(|line| line.trim_start().strip_prefix("hosts:"));
    let line = line.map_or("", |line| line.split('#').next().unwrap_or_default());
    let mut services = line.split_whitespace().filter(|word| !word.starts_with('[') && !word.ends_with(']'));
    if services.all(|service| ["files", "dns"].contains(&service)) { Others::No } else { Others::AskSystem }
}

fn stamp(file: &Path) -> Stamp {
    let found = fs::metadata(file).ok()?;
    Some((found.ino(), found.size(), found.mtime(), found.mtime_nsec()))
}

impl From<NoAddress> for Seen {
    fn from(why: NoAddress) -> Self {
        match why {
            NoAddress::NoName => Seen::NoName,
            NoAddress::NoAnswer(why) => Seen::NoDns(why),
        }
    }
}

impl fmt::Display for NoAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Seen::from(self.clone()).fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_system_is_asked_where_it_knows_more_than_the_hosts_file_and_the_dns() {
        for text in [
            "",
            "hosts: files dns",
            "passwd: files ldap\n hosts:\tfiles dns # mdns4",
            "hosts: dns [!UNAVAIL=return] files",
        ] {
            assert_eq!(others(text), Others::No, "{text}");
        }
        for text in [
            "hosts: files mdns4_minimal [NOTFOUND=return] dns",
            "hosts: resolve files\n",
            "hosts: files ldap",
        ] {
            assert_eq!(others(text), Others::AskSystem, "{text}");
        }
    }

    #[test]
    fn a_file_that_was_written_or_replaced_is_another_one() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("hosts");
        assert_eq!(stamp(&file), None);
        fs::write(&file, "one").expect("written");
        let first = stamp(&file);
        assert_eq!(stamp(&file), first);
        fs::write(&file, "three").expect("written");
        assert_ne!(stamp(&file), first);
        let second = stamp(&file);
        fs::write(folder.path().join("new"), "seven").expect("written");
        fs::rename(folder.path().join("new"), &file).expect("renamed");
        assert_ne!(stamp(&file), second);
    }
}
