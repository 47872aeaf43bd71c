//! What this process's environment says about the plugin.

use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;

use paceline_runtime::interface::Selection;
use paceline_runtime::{env, renewal};
use paceline_transport::Fabric;
use paceline_transport::identity::{Identity, JobAuthority};
use paceline_transport::secret::JobSecret;

/// How this process takes part.
#[derive(Debug)]
pub struct Settings {
    /// Who it is.
    pub identity: Identity,
    /// Where that is read again when it is renewed; `None` for one that everybody can have.
    pub source: Option<PathBuf>,
    /// Never [`Fabric::Auto`].
    pub fabric: Fabric,
    /// The addresses at which it is reached, each a device of NCCL's. At least one.
    pub addresses: Vec<IpAddr>,
}

/// The interfaces that are used where none is named: as NCCL itself does, none of Docker's, and loopback only where there
/// is nothing else.
const USUAL_INTERFACES: &str = "!docker*,ipv4,ipv6";

/// The name of the job of those who go without credentials.
const OPEN_JOB: &str = "without-credentials";

/// How long their certificates are valid: longer than any process.
const OPEN_LIFE: std::time::Duration = std::time::Duration::from_secs(365 * 24 * 3600);

/// What to do about missing credentials, on one line.
const NO_CREDENTIALS: &str = "no credentials: put `paceline run` in front of the program, or name this rank's \
     certificate in PACELINE_IDENTITY (docs/security.md); PACELINE_INSECURE=1 goes without, and then anybody who \
     reaches these hosts can take part";

impl Settings {
    /// Reads variables, files and this host's interfaces. `lookup` has the variables.
    ///
    /// # Errors
    /// In words, on one line: what is missing or makes no sense, and what to do.
    pub fn read(lookup: impl Fn(&str) -> Option<String>) -> Result<Self, String> {
        let fabric = match env::fabric(&lookup).map_err(|error| error.to_string())? {
            Fabric::Auto => Fabric::Tls,
            fabric => fabric,
        };
        let addresses = addresses(&lookup)?;
        if let Some(source) = env::identity(&lookup) {
            let identity = renewal::read(&source)
                .map_err(|reason| format!("the identity {}: {reason}", source.display()))?;
            return Ok(Self { identity, source: Some(source), fabric, addresses });
        }
        if !env::insecure(&lookup).map_err(|error| error.to_string())? {
            return Err(NO_CREDENTIALS.to_owned());
        }
        Ok(Self { identity: open_identity()?, source: None, fabric, addresses })
    }
}

/// A member of the job that anybody can join.
fn open_identity() -> Result<Identity, String> {
    let authority = JobAuthority::of_secret(OPEN_JOB, &JobSecret::known_to_all());
    let issued = authority.and_then(|authority| authority.issue("anybody", OPEN_LIFE));
    issued.map_err(|error| error.to_string())
}

fn addresses(lookup: &impl Fn(&str) -> Option<String>) -> Result<Vec<IpAddr>, String> {
    match env::interface(lookup).map_err(|error| error.to_string())? {
        Some(selection) => selection.choose_all_here(),
        None => {
            let usual: Selection = USUAL_INTERFACES.parse()?;
            Ok(vec![usual.choose_here().unwrap_or(Ipv4Addr::LOCALHOST.into())])
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn read(variables: &[(&str, &str)]) -> Result<Settings, String> {
        let find = |name: &str| variables.iter().find(|(known, _)| *known == name);
        Settings::read(|name| find(name).map(|(_, value)| (*value).to_owned()))
    }

    #[test]
    fn without_credentials_it_refuses_in_one_line_that_says_what_to_do() {
        let reason = read(&[]).expect_err("no credentials");
        assert!(reason.contains("PACELINE_IDENTITY") && reason.contains("PACELINE_INSECURE=1"), "{reason}");
        assert!(!reason.contains('\n') && !reason.contains("  "), "{reason}");
        let reason = read(&[("PACELINE_IDENTITY", "/nonexistent/tls")]).expect_err("no such file");
        assert!(reason.contains("/nonexistent/tls"), "{reason}");
        let reason = read(&[("PACELINE_FABRIC", "tcp"), ("PACELINE_IDENTITY", "x")]).expect_err("insecure");
        assert!(reason.contains("PACELINE_INSECURE"), "{reason}");
    }

    #[test]
    fn a_certificate_is_read_and_the_fastest_protected_links_are_the_default() {
        let authority = JobAuthority::new("job").expect("a name");
        let identity = authority.issue("worker-1", Duration::from_secs(60)).expect("a name");
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), identity.to_pem()).expect("written");
        let path = file.path().to_str().expect("a plain path");
        let settings =
            read(&[("PACELINE_IDENTITY", path), ("PACELINE_INTERFACE", "127.0.0.1")]).expect("good");
        assert_eq!((settings.identity.member(), settings.fabric), ("worker-1", Fabric::Tls));
        assert_eq!(settings.addresses, [IpAddr::from(Ipv4Addr::LOCALHOST)]);
        let quic = read(&[("PACELINE_IDENTITY", path), ("PACELINE_FABRIC", "quic")]).expect("good");
        assert_eq!(quic.fabric, Fabric::Quic);
    }

    #[test]
    fn those_who_go_without_credentials_on_purpose_are_all_of_one_job() {
        let one = read(&[("PACELINE_INSECURE", "1")]).expect("allowed");
        assert_eq!((one.identity.job(), one.source), (OPEN_JOB, None));
    }
}
