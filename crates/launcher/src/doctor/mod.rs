//! `paceline doctor`: what would go wrong before it does.
//!
//! Measuring and judging are apart: what was measured is a value, and what it means ([`finding`]) a pure function of it.
//! Doctors on several machines answer each other ([`beacon`]) while they run, so that paths between pods are measured
//! before any job is. It changes nothing, and reads no secret but to see whether it can be read.

mod beacon;
mod finding;
mod machine;
mod peers;
mod probe;

use std::path::Path;
use std::time::Duration;

use paceline_transport::IoThread;

use crate::cli::Format;
use crate::console::{Console, Stream};
use crate::error::Error;
use crate::pod::{Pod, Surroundings, read};
use crate::secret;
use finding::{Finding, Verdict, report};

/// What is to be examined.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DoctorArgs {
    /// How the report is printed.
    pub format: Format,
    /// How long to look for others, and to answer them.
    pub wait: Duration,
    /// The launchers' port.
    pub port: u16,
    /// Machines to look for besides the pods of the job.
    pub peers: Vec<String>,
    /// The file with the job secret, if one is named.
    pub secret: Option<std::path::PathBuf>,
}

/// Examines this machine and its paths to the others, and prints what was found. Returns the exit code, 1 if something
/// has failed, and what is to be told last on stderr.
///
/// # Errors
/// If the operating system refuses what it takes to examine anything.
pub fn run(args: &DoctorArgs, around: &Surroundings, console: &Console) -> Result<(u8, String), Error> {
    let pod = read(around);
    let mut findings = vec![environment(&pod)];
    let pod = pod.ok().flatten();
    findings.extend(job_secret(pod.as_ref(), args.secret.as_deref()));
    findings.extend(machine::examine());
    let wanted = peers::wanted(pod.as_ref(), &args.peers);
    let io = IoThread::start().map_err(|e| system("cannot start the I/O thread", &e))?;
    let examined = probe::examine(&io.handle(), wanted, args, console)?;
    findings.extend(examined.findings());
    let text = match args.format {
        Format::Text => report(&findings),
        Format::Json => format!("{:#}\n", finding::as_json(&findings)),
    };
    console.print(Stream::Out, text.into_bytes());
    examined.answer_others();
    let failed = findings.iter().any(|finding| finding.verdict == Verdict::Failed);
    Ok((u8::from(failed), String::new()))
}

fn environment(pod: &Result<Option<Pod>, String>) -> Finding {
    match pod {
        Err(why) => {
            Finding::failed("environment", why.clone(), "make the variables agree; paceline env shows them")
        }
        Ok(None) => Finding::ok("environment", "not in the pod of a job".to_owned()),
        Ok(Some(pod)) => {
            let number = match (&pod.index, &pod.pods) {
                (Some(index), Some(pods)) => format!(", pod {} of {}", index.value, pods.value),
                _ => String::new(),
            };
            let said = format!("{}{number}", pod.in_words());
            match pod.remarks.first() {
                Some(remark) => Finding::warning(
                    "environment",
                    format!("{said}: {remark}"),
                    "paceline env shows what was read",
                ),
                None => Finding::ok("environment", said),
            }
        }
    }
}

/// A job of several pods needs one.
fn job_secret(pod: Option<&Pod>, file: Option<&Path>) -> Option<Finding> {
    let several = pod.and_then(|pod| pod.pods.as_ref()).is_some_and(|pods| pods.value.most > 1);
    match file {
        Some(file) => Some(match secret::read(file) {
            Ok(_) => Finding::ok("job secret", file.display().to_string()),
            Err(error) => {
                Finding::failed("job secret", error.to_string(), "mount the same secret in all pods")
            }
        }),
        None => several.then(|| {
            let advice = "mount one secret in all pods and name its file in PACELINE_JOB_SECRET_FILE";
            Finding::warning(
                "job secret",
                "no file is named, so the pods will not let each other in".to_owned(),
                advice,
            )
        }),
    }
}

fn system(what: &str, why: &dyn std::fmt::Display) -> Error {
    Error::System { what: what.to_owned(), why: why.to_string() }
}
