//! Launcher 0's side: certifies the keys of whoever proves that it knows the secret.
//!
//! At most [`CONVERSATIONS_LIMIT`] conversations run at a time. One more ends the oldest: a node needs a few
//! round trips, while those who hold a place without speaking are the oldest soon. So nobody can keep the
//! nodes of the job out by holding connections open.

use std::collections::VecDeque;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;

use super::channel::{self, Binding};
use super::greeting::{GREETING_SIZE, Greeting};
use super::{Answer, Ask, Claim};
use crate::Error;
use crate::identity::{CertificateRequest, JobAuthority};
use crate::io::IoHandle;
use crate::secret::JobSecret;
use crate::tls;

/// Conversations at a time: some 2 MiB of TLS buffers, and as many open files.
pub const CONVERSATIONS_LIMIT: usize = 64;

/// How long one conversation may take, with a certificate for each rank of a large node.
const CONVERSATION: Duration = Duration::from_secs(10);

/// How long whoever gave a wrong proof waits for the answer, so that guessing is slow.
const WRONG_PROOF_PAUSE: Duration = Duration::from_secs(1);

/// The pause after the system has refused to accept: it is out of files, which takes a moment to pass.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Refusals are logged once in this time, with the number of those in between.
const LOG_INTERVAL: Duration = Duration::from_secs(1);

/// Decides which nodes are let in and whose certificates they get. Called on the I/O thread: must not block.
pub trait Registrar: Send + Sync + 'static {
    /// Decides about a node that knows the secret.
    fn admit(&self, claim: &Claim, remote: SocketAddr) -> Verdict;

    /// Whether a node that was admitted may have a certificate for this member.
    fn may_certify(&self, claim: &Claim, member: &str) -> bool;
}

/// The answer to a node's claim.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It may have certificates.
    Admitted,
    /// It may not, and asking again will not help.
    Refused(String),
    /// It may not at this moment.
    NotNow(String),
}

/// Somebody who has dialled.
type Arrival = (TcpStream, SocketAddr);

/// Certifies keys, until it is dropped.
#[derive(Debug)]
pub struct BootServer {
    local_addr: SocketAddr,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

/// What all conversations share.
struct Shared {
    acceptor: TlsAcceptor,
    secret: JobSecret,
    authority: Arc<JobAuthority>,
    valid_for: Duration,
    registrar: Arc<dyn Registrar>,
}

impl BootServer {
    /// Listens on the TCP address `addr`, on the I/O thread of `io`, for nodes that know `secret`; `authority`
    /// signs what `registrar` allows, for `valid_for`.
    ///
    /// # Errors
    /// [`Error::Bind`] with the operating system's reason, [`Error::Identity`] when TLS cannot use the secret.
    pub fn bind(
        io: &IoHandle,
        addr: SocketAddr,
        secret: JobSecret,
        authority: Arc<JobAuthority>,
        valid_for: Duration,
        registrar: Arc<dyn Registrar>,
    ) -> Result<Self, Error> {
        let failed =
            |error: std::io::Error| Error::Bind { addr, reason: error.to_string(), kind: error.kind() };
        let listener = TcpListener::bind(addr).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        let local_addr = listener.local_addr().map_err(failed)?;
        let shared = Shared::new(secret, authority, valid_for, registrar)?;
        let (arrived, arrivals) = mpsc::channel(CONVERSATIONS_LIMIT);
        let tasks = vec![io.spawn(listen(listener, arrived)), io.spawn(converse_with_all(arrivals, shared))];
        Ok(Self { local_addr, tasks })
    }

    /// Serves those who dial `endpoint` for this protocol, on the port where it serves members of the job.
    ///
    /// # Errors
    /// [`Error::Identity`] when TLS cannot use the secret; [`Error::Usage`] when the endpoint serves another
    /// protocol beside its own already.
    pub fn beside(
        io: &IoHandle,
        endpoint: &tls::Endpoint,
        secret: JobSecret,
        authority: Arc<JobAuthority>,
        valid_for: Duration,
        registrar: Arc<dyn Registrar>,
    ) -> Result<Self, Error> {
        let shared = Shared::new(secret, authority, valid_for, registrar)?;
        let (arrived, arrivals) = mpsc::channel(CONVERSATIONS_LIMIT);
        endpoint.divert(channel::ALPN, arrived)?;
        let tasks = vec![io.spawn(converse_with_all(arrivals, shared))];
        Ok(Self { local_addr: endpoint.local_addr(), tasks })
    }

    /// Where it listens, with the port that was chosen.
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }
}

impl Drop for BootServer {
    fn drop(&mut self) {
        self.tasks.iter().for_each(tokio::task::JoinHandle::abort);
    }
}

/// Hands everybody who dials on.
async fn listen(listener: TcpListener, arrived: mpsc::Sender<Arrival>) {
    let listener = match tokio::net::TcpListener::from_std(listener) {
        Ok(listener) => listener,
        Err(error) => return tracing::error!(%error, "cannot serve the bootstrap"),
    };
    loop {
        match listener.accept().await {
            Ok(arrival) => {
                if arrived.send(arrival).await.is_err() {
                    return;
                }
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn converse_with_all(mut arrivals: mpsc::Receiver<Arrival>, shared: Arc<Shared>) {
    // Dropped with this task, which ends all conversations.
    let mut conversations: JoinSet<(SocketAddr, Result<(), String>)> = JoinSet::new();
    let mut oldest: VecDeque<AbortHandle> = VecDeque::new();
    let mut refusals = Refusals::default();
    loop {
        tokio::select! {
            arrived = arrivals.recv() => {
                let Some((stream, remote)) = arrived else { return };
                if oldest.len() >= CONVERSATIONS_LIMIT && let Some(one) = oldest.pop_front() {
                    one.abort();
                }
                let conversation = converse(stream, remote, shared.clone());
                oldest.push_back(conversations.spawn(async move { (remote, conversation.await) }));
            }
            Some(ended) = conversations.join_next() => {
                oldest.retain(|conversation| !conversation.is_finished());
                match ended {
                    Ok((_, Ok(()))) => {}
                    Ok((remote, Err(reason))) => refusals.add(remote, &reason),
                    // Ended for a newer one; a panic would be our own defect and has been printed.
                    Err(_) => refusals.count += 1,
                }
            }
        }
    }
}

/// What is logged about those who were turned away: not a line for each, or they could fill a disk.
#[derive(Default)]
struct Refusals {
    count: u64,
    logged: Option<Instant>,
}

impl Refusals {
    fn add(&mut self, remote: SocketAddr, reason: &str) {
        if self.logged.is_some_and(|at| at.elapsed() < LOG_INTERVAL) {
            self.count += 1;
            return;
        }
        let others = std::mem::take(&mut self.count);
        self.logged = Some(Instant::now());
        tracing::warn!(%remote, reason, others, "refused a launcher");
    }
}

async fn converse(stream: TcpStream, remote: SocketAddr, shared: Arc<Shared>) -> Result<(), String> {
    let remote = SocketAddr::new(remote.ip().to_canonical(), remote.port());
    let limit = CONVERSATION.as_secs();
    let served = timeout(CONVERSATION, shared.serve(stream, remote)).await;
    served.unwrap_or_else(|_| Err(format!("it took longer than {limit} s")))
}

impl Shared {
    fn new(
        secret: JobSecret,
        authority: Arc<JobAuthority>,
        valid_for: Duration,
        registrar: Arc<dyn Registrar>,
    ) -> Result<Arc<Self>, Error> {
        let acceptor = TlsAcceptor::from(Arc::new(channel::server_config(&secret)?));
        Ok(Arc::new(Self { acceptor, secret, authority, valid_for, registrar }))
    }

    async fn serve(&self, stream: TcpStream, remote: SocketAddr) -> Result<(), String> {
        // Fails on a socket that is closed, which the next line finds out.
        let _ = stream.set_nodelay(true);
        let handshake = self.acceptor.accept(stream).await;
        let mut stream = handshake.map_err(|error| format!("no TLS channel: {error}"))?;
        let binding = Binding::of(stream.get_ref().1)?;

        let mut theirs = [0; GREETING_SIZE];
        stream.read_exact(&mut theirs).await.map_err(|error| error.to_string())?;
        let ours = Greeting::ours();
        stream.write_all(&ours.encode()).await.map_err(|error| error.to_string())?;
        stream.flush().await.map_err(|error| error.to_string())?;
        let theirs = Greeting::decode(&theirs).ok_or("it did not greet as a launcher does")?;
        // There is one version so far. The dialler comes to the same result from our greeting.
        ours.agree(&theirs)?;

        let Some(Ask::Join { claim, proof }) = channel::receive(&mut stream).await? else {
            return Err("it did not say which node it is".to_owned());
        };
        let refusal = if binding.check(&self.secret, &claim, &proof) {
            match self.registrar.admit(&claim, remote) {
                Verdict::Admitted => None,
                Verdict::Refused(reason) => Some((reason, false)),
                Verdict::NotNow(reason) => Some((reason, true)),
            }
        } else {
            sleep(WRONG_PROOF_PAUSE).await;
            Some(("it does not know the job secret".to_owned(), false))
        };
        if let Some((reason, for_now)) = refusal {
            return self.refuse(stream, reason, for_now).await;
        }
        let welcome = Answer::Welcome {
            job: self.authority.job().to_owned(),
            authority: self.authority.certificate().to_vec(),
            valid_for_ms: u64::try_from(self.valid_for.as_millis()).unwrap_or(u64::MAX),
        };
        channel::send(&mut stream, &welcome).await?;
        loop {
            let request = match channel::receive(&mut stream).await? {
                Some(Ask::Certify(request)) => request,
                Some(Ask::Join { .. }) => return Err("it joined twice".to_owned()),
                None => return Ok(()),
            };
            match self.certify(&claim, &request) {
                Ok(leaf) => channel::send(&mut stream, &Answer::Certified { leaf }).await?,
                Err(reason) => return self.refuse(stream, reason, false).await,
            }
        }
    }

    fn certify(&self, claim: &Claim, request: &CertificateRequest) -> Result<Vec<u8>, String> {
        let member = request.member();
        if !self.registrar.may_certify(claim, member) {
            // Not what it wrote: a name may have any length and any characters until it is checked.
            return Err(format!("node {} asked for a certificate that is not of that node", claim.node));
        }
        let certified = self.authority.certify(request, SystemTime::now(), self.valid_for);
        let leaf = certified.map_err(|error| error.to_string())?;
        tracing::debug!(node = claim.node, member, "certified");
        Ok(leaf.to_vec())
    }

    /// Tells the other side why, and returns the reason for the log.
    async fn refuse(
        &self,
        mut stream: tokio_rustls::server::TlsStream<TcpStream>,
        reason: String,
        for_now: bool,
    ) -> Result<(), String> {
        // Whoever has gone needs no reasons.
        let _ = channel::send(&mut stream, &Answer::Refused { reason: reason.clone(), for_now }).await;
        let _ = stream.shutdown().await;
        Err(reason)
    }
}

#[cfg(test)]
mod tests {
    use rustls::pki_types::ServerName;
    use tokio_rustls::TlsConnector;
    use tokio_rustls::client::TlsStream;

    use super::*;
    use crate::identity::KeyRequest;
    use crate::io::IoThread;

    /// Lets everybody in who gets that far.
    struct OpenDoor;

    impl Registrar for OpenDoor {
        fn admit(&self, _: &Claim, _: SocketAddr) -> Verdict {
            Verdict::Admitted
        }

        fn may_certify(&self, _: &Claim, _: &str) -> bool {
            true
        }
    }

    fn secret() -> JobSecret {
        JobSecret::new(b"0123456789abcdef").expect("long enough")
    }

    fn claim() -> Claim {
        Claim {
            node: 1,
            nodes: 2,
            least_nodes: 2,
            ranks_per_node: 1,
            run_id: "run".to_owned(),
            incarnation: 1,
        }
    }

    /// Runs one conversation of a client that may break the protocol from the handshake on.
    fn converse<T: Send + 'static, F: Future<Output = T> + Send>(
        client: impl FnOnce(TlsStream<TcpStream>) -> F + Send + 'static,
    ) -> T {
        let io = IoThread::start().expect("a thread");
        let authority = Arc::new(JobAuthority::new("job").expect("a name"));
        let (addr, life) = (([127, 0, 0, 1], 0).into(), Duration::from_secs(60));
        let server = BootServer::bind(&io.handle(), addr, secret(), authority, life, Arc::new(OpenDoor));
        let server = server.expect("a free port");
        let addr = server.local_addr();
        let conversation = async move {
            let config = channel::client_config(&secret()).expect("settings");
            let name = ServerName::try_from("launcher-0.paceline.internal").expect("a name");
            let stream = TcpStream::connect(addr).await.expect("it listens");
            client(TlsConnector::from(Arc::new(config)).connect(name, stream).await.expect("a channel")).await
        };
        let limited = async move { timeout(2 * CONVERSATION, conversation).await.expect("an end") };
        io.handle().block_on(limited).expect("io runs")
    }

    async fn greet(stream: &mut TlsStream<TcpStream>, greeting: &Greeting) -> Greeting {
        stream.write_all(&greeting.encode()).await.expect("sent");
        stream.flush().await.expect("sent");
        let mut theirs = [0; GREETING_SIZE];
        stream.read_exact(&mut theirs).await.expect("an answer");
        Greeting::decode(&theirs).expect("a greeting")
    }

    #[test]
    fn a_release_that_speaks_nothing_in_common_learns_both_versions_and_no_more() {
        let (theirs, rest) = converse(|mut stream| async move {
            let mut later = Greeting::ours().encode();
            later[8..12].copy_from_slice(&[9, 0, 9, 0]);
            let later = Greeting::decode(&later).expect("a greeting");
            let theirs = greet(&mut stream, &later).await;
            let mut rest = Vec::new();
            let _ = stream.read_to_end(&mut rest).await;
            (later.agree(&theirs), rest)
        });
        let reason = theirs.expect_err("nothing in common");
        assert!(reason.contains("(bootstrap 1, ") && reason.contains("(bootstrap 9, "), "{reason}");
        assert!(rest.is_empty());
    }

    #[test]
    fn whoever_cannot_prove_the_secret_is_refused_and_has_to_wait() {
        // It knows the server's key by heart, but not the secret.
        for proof in [vec![0; 32], Vec::new()] {
            let before = Instant::now();
            let answer = converse(|mut stream| async move {
                greet(&mut stream, &Greeting::ours()).await;
                channel::send(&mut stream, &Ask::Join { claim: claim(), proof }).await.expect("sent");
                channel::receive::<Answer>(&mut stream).await
            });
            let reason = "it does not know the job secret".to_owned();
            assert_eq!(answer, Ok(Some(Answer::Refused { reason, for_now: false })));
            assert!(before.elapsed() >= WRONG_PROOF_PAUSE);
        }
    }

    #[test]
    fn nothing_is_certified_before_the_proof_nor_for_a_key_that_the_node_does_not_have() {
        let before = converse(|mut stream| async move {
            greet(&mut stream, &Greeting::ours()).await;
            let request = KeyRequest::new("worker-1").and_then(|key| key.request()).expect("a request");
            channel::send(&mut stream, &Ask::Certify(request)).await.expect("sent");
            channel::receive::<Answer>(&mut stream).await
        });
        assert!(!matches!(before, Ok(Some(_))), "{before:?}");
        let stolen = converse(|mut stream| async move {
            let binding = Binding::of(stream.get_ref().1).expect("a channel");
            greet(&mut stream, &Greeting::ours()).await;
            let proof = binding.prove(&secret(), &claim()).expect("a short claim");
            channel::send(&mut stream, &Ask::Join { claim: claim(), proof }).await.expect("sent");
            let welcome = channel::receive::<Answer>(&mut stream).await;
            assert!(matches!(welcome, Ok(Some(Answer::Welcome { .. }))), "{welcome:?}");
            let request = KeyRequest::new("worker-1").and_then(|key| key.request()).expect("a request");
            let request = request.for_another_member("worker-2");
            channel::send(&mut stream, &Ask::Certify(request)).await.expect("sent");
            channel::receive::<Answer>(&mut stream).await
        });
        let Ok(Some(Answer::Refused { reason, .. })) = stolen else { panic!("{stolen:?}") };
        assert!(reason.contains("the request of worker-2 is not signed with its key"), "{reason}");
    }
}
