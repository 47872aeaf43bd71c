//! What the launcher tells a cluster about itself over HTTP: probes, and numbers for Prometheus.
//!
//! A probe of one pod says nothing of others: `/healthz` is whether this launcher's own loop turns, so that a hang elsewhere
//! never restarts a healthy pod. It refuses to serve anything that changes something, to keep connections, and to answer many
//! at a time. Whoever reaches the port may ask; nothing secret is told.

use std::convert::Infallible;
use std::fmt::Write;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::CONTENT_TYPE;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use paceline_runtime::nodes::Generation;
use paceline_transport::IoThread;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use crate::error::Error;

/// The supervisor turns at least once a second; what takes longer than this hangs.
const PULSE: Duration = Duration::from_secs(15);

/// Conversations at a time; more wait in the kernel's queue, which is short.
const CONVERSATIONS: usize = 64;

/// How long one may take: those who hold connections and say nothing delay a probe by no more.
const CONVERSATION: Duration = Duration::from_secs(1);

/// The most that is kept of a request.
const REQUEST_BYTES: usize = 8 * 1024;

/// How far the launcher is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// It waits for other machines.
    Meeting,
    /// Its ranks run.
    Running,
    /// Its ranks have ended, or are about to.
    Ending,
}

/// What is known of this launcher. Clones are the same.
#[derive(Debug, Clone)]
pub struct Pulse(Arc<Known>);

#[derive(Debug)]
struct Known {
    start: Instant,
    started_at: SystemTime,
    /// The last turn of the loop, in milliseconds after the start.
    turned_ms: AtomicU64,
    phase: Mutex<Phase>,
    ranks: u32,
    running: AtomicU32,
    generation: AtomicU32,
    restarts_left: AtomicU32,
    failures: AtomicU64,
    control_messages: AtomicU64,
}

impl Pulse {
    /// Of a launcher of so many ranks that has just started.
    pub fn new(ranks: u32) -> Self {
        Self(Arc::new(Known {
            start: Instant::now(),
            started_at: SystemTime::now(),
            turned_ms: AtomicU64::new(0),
            phase: Mutex::new(Phase::Meeting),
            ranks,
            running: AtomicU32::new(0),
            generation: AtomicU32::new(0),
            restarts_left: AtomicU32::new(0),
            failures: AtomicU64::new(0),
            control_messages: AtomicU64::new(0),
        }))
    }

    /// The loop has turned, and so many ranks run.
    pub fn turns(&self, running: u32, goes_on: bool) {
        self.0.turned_ms.store(self.0.start.elapsed().as_millis() as u64, Ordering::Relaxed);
        self.0.running.store(running, Ordering::Relaxed);
        self.enter(if goes_on { Phase::Running } else { Phase::Ending });
    }

    /// It still waits for other machines.
    pub fn waits(&self) {
        self.0.turned_ms.store(self.0.start.elapsed().as_millis() as u64, Ordering::Relaxed);
    }

    /// The ranks of this generation start.
    pub fn starts(&self, generation: &Generation) {
        self.0.generation.store(generation.number, Ordering::Relaxed);
        self.0.restarts_left.store(generation.restarts_left(), Ordering::Relaxed);
    }

    /// A rank of this machine has failed.
    pub fn failed(&self) {
        self.0.failures.fetch_add(1, Ordering::Relaxed);
    }

    /// A message of the membership other than a heartbeat has been sent, or has come.
    pub fn said(&self) {
        self.0.control_messages.fetch_add(1, Ordering::Relaxed);
    }

    fn enter(&self, phase: Phase) {
        *self.0.phase.lock().unwrap_or_else(PoisonError::into_inner) = phase;
    }

    fn phase(&self) -> Phase {
        *self.0.phase.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn since_turn(&self, now: Instant) -> Duration {
        let turned = Duration::from_millis(self.0.turned_ms.load(Ordering::Relaxed));
        now.saturating_duration_since(self.0.start).saturating_sub(turned)
    }

    /// The answer to a path at a time.
    fn answer(&self, path: &str, now: Instant) -> (StatusCode, String) {
        let probe = |is_well: bool, why: &str| match is_well {
            true => (StatusCode::OK, "ok\n".to_owned()),
            false => (StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")),
        };
        let phase = self.phase();
        match path {
            "/startupz" => probe(true, ""),
            "/healthz" => probe(self.since_turn(now) < PULSE, "the launcher's loop has not turned for 15 s"),
            "/readyz" => probe(
                phase == Phase::Running,
                match phase {
                    Phase::Meeting => "waiting for other machines",
                    Phase::Running | Phase::Ending => "the ranks have ended, or are about to",
                },
            ),
            "/metrics" => (StatusCode::OK, self.metrics(now)),
            _ => (StatusCode::NOT_FOUND, "/startupz, /healthz, /readyz and /metrics are served\n".to_owned()),
        }
    }

    /// In the text format of Prometheus.
    fn metrics(&self, now: Instant) -> String {
        let known = &*self.0;
        let load = |number: &AtomicU32| f64::from(number.load(Ordering::Relaxed));
        let since_1970 = known.started_at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let is_ready = f64::from(u8::from(self.phase() == Phase::Running));
        let mut text = String::new();
        for (name, kind, help, value) in [
            ("ranks", "gauge", "Ranks of this machine.", f64::from(known.ranks)),
            ("ranks_running", "gauge", "Ranks of this machine that run.", load(&known.running)),
            ("ready", "gauge", "Whether the job has started and goes on.", is_ready),
            (
                "generation",
                "gauge",
                "How often all ranks of the job were started before.",
                load(&known.generation),
            ),
            ("restarts_left", "gauge", "How often the job may start again.", load(&known.restarts_left)),
            (
                "rank_failures_total",
                "counter",
                "Ranks of this machine that have failed.",
                known.failures.load(Ordering::Relaxed) as f64,
            ),
            (
                "control_messages_total",
                "counter",
                "Messages of the membership sent and received, but for heartbeats.",
                known.control_messages.load(Ordering::Relaxed) as f64,
            ),
            (
                "loop_age_seconds",
                "gauge",
                "Time since the last turn of the loop.",
                self.since_turn(now).as_secs_f64(),
            ),
            (
                "start_time_seconds",
                "gauge",
                "When the launcher started, since 1970.",
                since_1970.as_secs_f64(),
            ),
        ] {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "# HELP paceline_launcher_{name} {help}");
            let _ =
                writeln!(text, "# TYPE paceline_launcher_{name} {kind}\npaceline_launcher_{name} {value}");
        }
        text
    }
}

/// Serves until it is dropped.
pub struct Health {
    _io: IoThread,
}

impl Health {
    /// Answers at this address, on a thread of its own.
    ///
    /// # Errors
    /// [`Error::Endpoint`] if nothing can listen there.
    pub fn serve(address: SocketAddr, pulse: Pulse) -> Result<Self, Error> {
        let failed = |why: String| Error::Endpoint { endpoint: format!("{address} (--health-addr)"), why };
        let io = IoThread::start().map_err(|e| failed(e.to_string()))?;
        let bound = io.handle().block_on(TcpListener::bind(address)).map_err(|e| failed(e.to_string()))?;
        let listener = bound.map_err(|e| failed(e.to_string()))?;
        io.handle().spawn(accept(listener, pulse));
        Ok(Self { _io: io })
    }
}

async fn accept(listener: TcpListener, pulse: Pulse) {
    let places = Arc::new(Semaphore::new(CONVERSATIONS));
    loop {
        let Ok(place) = places.clone().acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of files, which takes a moment to pass.
                tracing::warn!(%error, "cannot accept a question about health");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let pulse = pulse.clone();
        tokio::spawn(async move {
            let answering = service_fn(|request| {
                let answer = answer(&pulse, &request);
                async move { Ok::<_, Infallible>(answer) }
            });
            let mut http = http1::Builder::new();
            http.timer(TokioTimer::new()).header_read_timeout(CONVERSATION).max_buf_size(REQUEST_BYTES);
            let conversation = http.keep_alive(false).serve_connection(TokioIo::new(stream), answering);
            // Whoever asks badly or slowly gets no answer.
            let _ = tokio::time::timeout(CONVERSATION, conversation).await;
            drop(place);
        });
    }
}

fn answer(pulse: &Pulse, request: &Request<Incoming>) -> Response<Full<Bytes>> {
    let (status, text) = match *request.method() {
        Method::GET | Method::HEAD => pulse.answer(request.uri().path(), Instant::now()),
        _ => (StatusCode::METHOD_NOT_ALLOWED, "only GET is served\n".to_owned()),
    };
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = status;
    let plain = "text/plain; version=0.0.4; charset=utf-8";
    response.headers_mut().insert(CONTENT_TYPE, hyper::header::HeaderValue::from_static(plain));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(pulse: &Pulse, path: &str, later: Duration) -> u16 {
        pulse.answer(path, pulse.0.start + later).0.as_u16()
    }

    #[test]
    fn a_launcher_is_alive_while_it_waits_and_ready_while_its_ranks_run() {
        let pulse = Pulse::new(2);
        let now = Duration::from_millis(10);
        assert_eq!(
            ["/startupz", "/healthz", "/readyz"].map(|path| status(&pulse, path, now)),
            [200, 200, 503]
        );
        pulse.turns(2, true);
        assert_eq!(["/healthz", "/readyz", "/"].map(|path| status(&pulse, path, now)), [200, 200, 404]);
        pulse.turns(1, false);
        assert_eq!(["/healthz", "/readyz"].map(|path| status(&pulse, path, now)), [200, 503]);
        assert_eq!(status(&pulse, "/healthz", 2 * PULSE), 503, "the loop hangs");
    }

    #[test]
    fn numbers_are_in_the_text_format_of_prometheus() {
        let pulse = Pulse::new(2);
        let (nodes, master_addr) = (vec![0], String::new());
        pulse.starts(&Generation {
            number: 1,
            changes: 0,
            max_restarts: 3,
            nodes,
            master_addr,
            master_port: 1,
        });
        pulse.turns(2, true);
        pulse.failed();
        let text = pulse.metrics(Instant::now());
        for line in [
            "# TYPE paceline_launcher_ranks gauge",
            "paceline_launcher_ranks_running 2",
            "paceline_launcher_generation 1",
            "paceline_launcher_restarts_left 2",
            "# TYPE paceline_launcher_rank_failures_total counter",
            "paceline_launcher_rank_failures_total 1",
            "paceline_launcher_ready 1",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} in {text}");
        }
    }
}
