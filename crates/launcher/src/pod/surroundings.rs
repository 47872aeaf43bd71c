//! What reading a pod's environment looks at, as a value.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;

use super::Count;

/// The most pods of a job: no list of them is longer, whatever a variable says.
pub const PODS_MOST: u32 = 65_536;

/// What is around a process.
#[derive(Debug, Clone, Default)]
pub struct Surroundings {
    variables: BTreeMap<String, String>,
    hostname: String,
    /// The text of /etc/hosts, in which Kubernetes tells a pod its full name.
    hosts: String,
    /// What `--nnodes` says.
    nnodes: Option<u32>,
}

impl Surroundings {
    /// Those of this process.
    pub fn here() -> Self {
        let variables = std::env::vars_os().filter_map(as_text).collect();
        // Container runtimes set the variable, also where the pod shares its host's name.
        let hostname = std::env::var("HOSTNAME").ok().filter(|name| !name.is_empty());
        let uname = || rustix::system::uname().nodename().to_string_lossy().into_owned();
        let hostname = hostname.unwrap_or_else(uname);
        let hosts = fs::read_to_string("/etc/hosts").unwrap_or_default();
        Self { variables, hostname, hosts, nnodes: None }
    }

    /// With the number of pods that the command line says.
    pub fn with_nnodes(mut self, nnodes: Option<u32>) -> Self {
        self.nnodes = nnodes;
        self
    }

    /// The value of a variable, without blanks around it. An empty one counts as none: that is how manifests unset one.
    pub fn variable(&self, name: &str) -> Option<&str> {
        self.variables.get(name).map(|value| value.trim()).filter(|value| !value.is_empty())
    }

    /// A variable that holds a number.
    ///
    /// # Errors
    /// One line if it holds something else.
    pub fn number(&self, name: &str) -> Result<Option<u32>, String> {
        let parse = |text: &str| {
            text.parse()
                .map_err(|_| format!("{name} is `{text}`, which is no number from 0 on; set it to one"))
        };
        self.variable(name).map(parse).transpose()
    }

    /// The first of these variables that is set to a number, and its name.
    ///
    /// # Errors
    /// As [`Surroundings::number`].
    pub fn first_number<'a>(&self, names: &[&'a str]) -> Result<Option<(&'a str, u32)>, String> {
        for name in names {
            if let Some(number) = self.number(name)? {
                return Ok(Some((name, number)));
            }
        }
        Ok(None)
    }

    /// How many pods there are by `--nnodes`, or else by PET_NNODES, which may be MIN:MAX, and which of them says so.
    ///
    /// # Errors
    /// One line for a value that makes no sense.
    pub fn nnodes(&self) -> Result<Option<(&'static str, Count)>, String> {
        if let Some(nnodes) = self.nnodes {
            return Ok(Some(("--nnodes", Count::exactly(nnodes))));
        }
        let Some(text) = self.variable("PET_NNODES") else { return Ok(None) };
        let (least, most) = text.split_once(':').unwrap_or((text, text));
        match (least.parse(), most.parse()) {
            (Ok(least), Ok(most)) if 1 <= least && least <= most && most <= PODS_MOST => {
                Ok(Some(("PET_NNODES", Count { least, most })))
            }
            _ => Err(format!("PET_NNODES is `{text}`; set it to a number of pods, such as 4, or to MIN:MAX")),
        }
    }

    /// This machine's name, without a domain.
    pub fn hostname(&self) -> &str {
        self.hostname.split('.').next().unwrap_or_default()
    }

    /// The pod's name and number where its name ends with one: `("job-worker", 3)`.
    pub fn ordinal(&self) -> Option<(&str, u32)> {
        let (name, ordinal) = self.hostname().rsplit_once('-')?;
        Some((name, ordinal.parse().ok()?))
    }

    /// The domain of this pod in a headless service, `trainers.default.svc.cluster.local`: the kubelet writes the full
    /// name of a pod that has one into /etc/hosts.
    pub fn service(&self) -> Option<&str> {
        let without_comment = |line: &'_ str| line.split('#').next().unwrap_or_default().len();
        let lines = self.hosts.lines().map(|line| &line[..without_comment(line)]);
        let names = lines.flat_map(|line| line.split_whitespace().skip(1));
        let domains = names.filter_map(|name| name.strip_prefix(self.hostname())?.strip_prefix('.'));
        domains.into_iter().find(|domain| domain.contains(".svc"))
    }
}

/// A variable that is not text says nothing to us.
fn as_text((name, value): (OsString, OsString)) -> Option<(String, String)> {
    Some((name.into_string().ok()?, value.into_string().ok()?))
}

#[cfg(test)]
impl Surroundings {
    /// Made up or recorded: `NAME=value` lines.
    pub fn of(hostname: &str, variables: &str) -> Self {
        let variables = variables.lines().filter_map(|line| line.trim().split_once('='));
        let variables = variables.map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
        Self { variables, hostname: hostname.to_owned(), ..Self::default() }
    }

    /// With this text as /etc/hosts.
    pub fn with_hosts(mut self, hosts: &str) -> Self {
        self.hosts = hosts.to_owned();
        self
    }
}
