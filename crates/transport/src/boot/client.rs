//! The other launchers' side: one attempt to get certificates.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::{CertificateDer, ServerName};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::channel::{self, Binding};
use super::greeting::{GREETING_SIZE, Greeting};
use super::{Answer, Ask, Claim};
use crate::identity::{Identity, KeyRequest};
use crate::secret::JobSecret;

/// How long one attempt may take.
const ATTEMPT: Duration = Duration::from_secs(10);

/// How long the network may take to answer at all; a packet that was dropped is sent again by the next attempt.
const CONNECT: Duration = Duration::from_secs(3);

/// Certificates that are asked for before the answer to the first is read: some 20 KiB of requests and of answers, which
/// the sockets' buffers hold, so that neither side waits for the other to read.
const ASKED_AT_A_TIME: usize = 32;

/// The name in the handshake. The server is known by its key.
const SERVER_NAME: &str = "launcher-0.paceline.internal";

/// What a node got.
#[derive(Debug)]
pub struct Certified {
    /// One for each member that was asked for, in their order.
    pub identities: Vec<Identity>,
    /// How long they are valid from now.
    pub valid_for: Duration,
}

/// Why a node got no certificates. Each completes the sentence "no certificates from HOST:PORT: …".
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// Nobody of this job is there yet, or the network does not let us through. Trying again may help.
    #[error("{0}")]
    Unreachable(String),
    /// Launcher 0 is there and cannot let this node in at this moment.
    #[error("{0}")]
    NotNow(String),
    /// Trying again will not help: another secret, another release, or a claim that does not fit.
    #[error("{0}")]
    Refused(String),
}

/// Dials `server` (`host:port`) once and has new keys certified for `members`. To be run on an I/O thread.
///
/// # Errors
/// [`Failure`]: nobody answers, the other side does not know the secret, or it refuses the claim.
pub async fn certify(
    server: &str,
    secret: &JobSecret,
    claim: &Claim,
    members: &[String],
) -> Result<Certified, Failure> {
    match timeout(ATTEMPT, attempt(server, secret, claim, members)).await {
        Ok(outcome) => outcome,
        Err(_) => Err(unreachable(format!("no answer within {} s", ATTEMPT.as_secs()))),
    }
}

async fn attempt(
    server: &str,
    secret: &JobSecret,
    claim: &Claim,
    members: &[String],
) -> Result<Certified, Failure> {
    let config = channel::client_config(secret).map_err(|error| refused(error.to_string()))?;
    let stream = match timeout(CONNECT, TcpStream::connect(server)).await {
        Ok(stream) => stream.map_err(|error| unreachable(in_words(&error)))?,
        Err(_) => return Err(unreachable(format!("no answer within {} s", CONNECT.as_secs()))),
    };
    // Fails on a socket that is closed, which the next lines find out.
    let _ = stream.set_nodelay(true);
    let name = ServerName::try_from(SERVER_NAME).expect("the constant is a DNS name");
    let mut stream =
        TlsConnector::from(Arc::new(config)).connect(name, stream).await.map_err(|error| explain(&error))?;
    let binding = Binding::of(stream.get_ref().1).map_err(refused)?;

    let ours = Greeting::ours();
    let mut theirs = [0; GREETING_SIZE];
    stream.write_all(&ours.encode()).await.map_err(lost)?;
    stream.flush().await.map_err(lost)?;
    stream.read_exact(&mut theirs).await.map_err(lost)?;
    let theirs =
        Greeting::decode(&theirs).ok_or_else(|| refused("it did not greet as a launcher does".to_owned()))?;
    ours.agree(&theirs).map_err(refused)?;

    let proof = binding.prove(secret, claim).map_err(|error| refused(error.to_string()))?;
    let join = Ask::Join { claim: claim.clone(), proof };
    let Answer::Welcome { job, authority, valid_for_ms } = ask(&mut stream, &join).await? else {
        return Err(refused("it answered something else than was asked".to_owned()));
    };
    let authority = CertificateDer::from(authority);
    let unusable = |error: crate::Error| refused(error.to_string());
    let mut identities = Vec::with_capacity(members.len());
    // Many at a time, so that many ranks do not take as many round trips.
    for members in members.chunks(ASKED_AT_A_TIME) {
        let mut keys = Vec::with_capacity(members.len());
        for member in members {
            let key = KeyRequest::new(member).map_err(unusable)?;
            let request = Ask::Certify(key.request().map_err(unusable)?);
            channel::send(&mut stream, &request).await.map_err(unreachable)?;
            keys.push((member, key));
        }
        for (member, key) in keys {
            let Answer::Certified { leaf } = answer(&mut stream).await? else {
                return Err(refused("it answered something else than was asked".to_owned()));
            };
            let identity =
                key.into_identity(CertificateDer::from(leaf), authority.clone()).map_err(unusable)?;
            if (identity.job(), identity.member()) != (job.as_str(), member.as_str()) {
                return Err(refused(format!("it certified another name than {member} of {job}")));
            }
            identities.push(identity);
        }
    }
    // All that was asked for has come: the other side may as well have gone.
    let _ = stream.shutdown().await;
    Ok(Certified { identities, valid_for: Duration::from_millis(valid_for_ms) })
}

async fn ask(stream: &mut TlsStream<TcpStream>, ask: &Ask) -> Result<Answer, Failure> {
    channel::send(stream, ask).await.map_err(unreachable)?;
    answer(stream).await
}

async fn answer(stream: &mut TlsStream<TcpStream>) -> Result<Answer, Failure> {
    match channel::receive(stream).await.map_err(unreachable)? {
        Some(Answer::Refused { reason, for_now: true }) => Err(Failure::NotNow(quote(&reason))),
        Some(Answer::Refused { reason, for_now: false }) => Err(Failure::Refused(quote(&reason))),
        Some(answer) => Ok(answer),
        None => Err(unreachable("it ended the conversation".to_owned())),
    }
}

/// Why there is no channel. A wrong secret is final; whatever else answers there may go away.
fn explain(error: &io::Error) -> Failure {
    let tls = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    match tls {
        Some(rustls::Error::InvalidCertificate(_)) => refused(
            "what answers there does not have this job secret; give every node the same secret".to_owned(),
        ),
        Some(tls) => unreachable(format!("what answers there is no launcher of a job ({tls})")),
        None => unreachable(in_words(error)),
    }
}

/// Launcher 0's own words, made fit for one line.
fn quote(reason: &str) -> String {
    reason.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

fn in_words(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => "nothing listens there".to_owned(),
        io::ErrorKind::ConnectionReset | io::ErrorKind::UnexpectedEof => "the connection was cut".to_owned(),
        _ => error.to_string(),
    }
}

fn lost(error: io::Error) -> Failure {
    unreachable(in_words(&error))
}

fn unreachable(reason: String) -> Failure {
    Failure::Unreachable(reason)
}

fn refused(reason: String) -> Failure {
    Failure::Refused(reason)
}
