//! The side of a launcher other than launcher 0: comes, stays connected, hears what becomes of the job.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use paceline_transport::IoHandle;
use paceline_transport::boot::Claim;
use paceline_transport::tls::{Connection, Dialler, MessageReceiver, MessageSender};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use super::{BEAT, Failure, Generation, LOST_NODE, Order, Past, Report, SILENCE, arrival, completion, quote};
use crate::Error;
use crate::rendezvous::{LAUNCHER, dial};

/// The pause between two attempts at a place that is taken.
const TAKEN_PAUSE: Duration = Duration::from_secs(1);

/// What is called when there is news for the launcher. Must not block.
pub type OnChange = Arc<dyn Fn() + Send + Sync>;

/// A launcher's connection to launcher 0.
pub struct Attendance {
    reports: UnboundedSender<Report>,
    heard: Arc<Heard>,
    task: tokio::task::JoinHandle<()>,
}

struct Heard {
    /// This node.
    node: u32,
    state: Mutex<HeardState>,
    on_change: OnChange,
}

struct HeardState {
    /// The last one that has started.
    generation: Generation,
    failure: Option<Failure>,
    /// The node that has come, with which all ranks start again.
    came: Option<u32>,
    /// The answer to [`Report::Ended`].
    verdict: Option<Option<Failure>>,
    /// The connection has ended without one.
    lost: bool,
}

impl HeardState {
    /// Nothing was said about this generation.
    fn of(generation: Generation) -> Self {
        Self { generation: generation.quoted(), failure: None, came: None, verdict: None, lost: false }
    }
}

impl Heard {
    fn order(&self, order: Order) {
        match order {
            Order::Failed(failure) => self.update(|state| {
                state.failure.get_or_insert(failure.quoted());
            }),
            Order::Verdict { cause } => {
                self.update(|state| state.verdict = Some(cause.map(Failure::quoted)));
            }
            Order::Start(generation) if generation.place(self.node).is_none() => {
                self.update(|state| lost(state, LEFT_OUT));
            }
            Order::Start(generation) => self.update(|state| {
                *state = HeardState::of(generation);
            }),
            // The nodes have not met again.
            Order::Refused { reason, .. } => self.update(|state| lost(state, &reason)),
            Order::Completed { rank } => self.update(|state| {
                state.failure.get_or_insert(completion(rank));
            }),
            Order::Changes { node } => self.update(|state| {
                state.came.get_or_insert(node);
            }),
            Order::Waiting { .. } | Order::Beat => {}
        }
    }

    fn update(&self, change: impl FnOnce(&mut HeardState)) {
        change(&mut self.lock());
        (self.on_change)();
    }

    fn lock(&self) -> MutexGuard<'_, HeardState> {
        // Fields are replaced whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Said of a start that does not count on this launcher, which had come.
const LEFT_OUT: &str = "it has started the job without this node";

/// A launcher that comes to launcher 0.
#[derive(Clone, Debug)]
pub struct Comer {
    /// Who it is.
    pub claim: Claim,
    /// The generation that it has been part of, if it has lost launcher 0 since.
    pub after: Option<Past>,
    /// Until when it waits for the others.
    pub deadline: Instant,
    /// How long it waits for its place to become free.
    pub patience: Duration,
}

impl Attendance {
    /// Connects to launcher 0 at `server`, says who this is, and waits until all nodes have come. `waiting` is
    /// called with the nodes that are missing whenever that changes. Blocks.
    ///
    /// # Errors
    /// [`Error::Rendezvous`] with who is missing, or why this launcher was refused; [`Error::Transport`] when the
    /// connection has ended before the start: launcher 0 may be replaced.
    pub fn begin(
        io: &IoHandle,
        dialler: Dialler,
        server: &str,
        comer: Comer,
        waiting: impl Fn(&[u32]) + Send + 'static,
        on_change: OnChange,
    ) -> Result<Self, Error> {
        let (reports, outgoing) = unbounded_channel();
        let node = comer.claim.node;
        let attending = attend_in_the_end(dialler, server.to_owned(), comer, waiting);
        let (lane, first) = io.block_on(attending)??;
        let heard = Arc::new(Heard { node, state: Mutex::new(HeardState::of(first)), on_change });
        let task = io.spawn(follow(lane, outgoing, heard.clone()));
        Ok(Self { reports, heard, task })
    }

    /// Tells all others that a rank of this node is dead. Does not block.
    pub fn announce_death(&self, rank: usize, cause: &str, exit_code: u8, by_itself: bool) {
        let (rank, cause) = (rank as u32, cause.to_owned());
        self.report(Report::Died { rank, cause, exit_code, by_itself });
    }

    /// Tells all others that a rank of this node has exited with code 0. Does not block.
    pub fn announce_exit(&self, rank: usize) {
        self.report(Report::Exited { rank: rank as u32 });
    }

    /// Says that no rank runs here any more; the [`verdict`](Self::verdict) is the answer. Does not block.
    pub fn announce_end(&self) {
        self.report(Report::Ended);
    }

    /// Has all ranks of the job write what they did last. Does not block.
    pub fn ask_for_traces(&self) {
        self.report(Report::AskForTraces);
    }

    /// Says that no rank runs here any more and that this launcher goes: it does not take part in another generation.
    /// Does not block.
    pub fn announce_leave(&self) {
        self.report(Report::Left);
    }

    /// The generation that has started last.
    pub fn generation(&self) -> Generation {
        self.heard.lock().generation.clone()
    }

    /// What ends the ranks of all nodes: the first failure of the job, on whichever node, or the loss of launcher 0; that another
    /// node has come; or, with an exit code of 0, that a rank has finished which decides for all.
    pub fn failure(&self) -> Option<Failure> {
        let state = self.heard.lock();
        state.failure.clone().or_else(|| state.came.map(arrival))
    }

    /// What the job has failed of, if it has; `None` before launcher 0 has said so.
    pub fn verdict(&self) -> Option<Option<Failure>> {
        self.heard.lock().verdict.clone()
    }

    /// Whether launcher 0 was lost before it had said how the job ends: another one may take its place.
    pub fn is_lost(&self) -> bool {
        self.heard.lock().lost
    }

    fn report(&self, report: Report) {
        // The task ends with the connection, and then nobody wants to know.
        let _ = self.reports.send(report);
    }
}

impl Drop for Attendance {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct Lane {
    _connection: Connection,
    sender: MessageSender,
    receiver: MessageReceiver,
}

/// Attends, and tries again for a while when the place is not free yet.
async fn attend_in_the_end(
    dialler: Dialler,
    server: String,
    comer: Comer,
    mut waiting: impl Fn(&[u32]),
) -> Result<(Lane, Generation), Error> {
    let until = comer.deadline.min(Instant::now() + comer.patience);
    loop {
        match attend(&dialler, &server, comer.clone(), &mut waiting).await? {
            Answered::Start(lane, generation) => return Ok((lane, generation)),
            Answered::NotNow(reason) if Instant::now() + TAKEN_PAUSE >= until => {
                return Err(Error::Rendezvous { endpoint: server, reason });
            }
            Answered::NotNow(reason) => {
                tracing::debug!(server, reason, "refused for now");
                tokio::time::sleep(TAKEN_PAUSE).await;
            }
        }
    }
}

/// What launcher 0 has said to a launcher that has come.
enum Answered {
    Start(Lane, Generation),
    NotNow(String),
}

async fn attend(
    dialler: &Dialler,
    server: &str,
    Comer { claim, after, deadline, .. }: Comer,
    waiting: &mut impl Fn(&[u32]),
) -> Result<Answered, Error> {
    let failed = |reason: String| Error::Rendezvous { endpoint: server.to_owned(), reason };
    let node = claim.node;
    let connection = dial(dialler, server, deadline).await.map_err(&failed)?;
    let (mut sender, mut receiver) = connection.open_messages().await?;
    sender.send(&Report::Attend { claim, after }).await?;
    let mut beat = tokio::time::interval(BEAT);
    let mut missing = Vec::new();
    let mut last = Instant::now();
    // Launcher 0 gives up first, and says who is missing.
    let deadline = deadline + SILENCE;
    loop {
        let order = tokio::select! {
            order = receiver.recv::<Order>() => order?,
            _ = beat.tick() => {
                if last.elapsed() > SILENCE || Instant::now() > deadline {
                    let (what, elapsed) = (format!("a word of {LAUNCHER}"), last.elapsed());
                    return Err(paceline_transport::Error::TimedOut { what, ranks: Vec::new(), elapsed }.into());
                }
                sender.send(&Report::Beat).await?;
                continue;
            }
        };
        last = Instant::now();
        match order {
            Some(Order::Start(generation)) if generation.place(node).is_none() => {
                return Err(failed(format!("{LAUNCHER}: {LEFT_OUT}")));
            }
            Some(Order::Verdict { cause }) => return Err(Error::Over { cause: cause.map(Failure::quoted) }),
            Some(Order::Start(generation)) => {
                let lane = Lane { _connection: connection, sender, receiver };
                return Ok(Answered::Start(lane, generation));
            }
            Some(Order::Refused { reason, for_now: true }) => return Ok(Answered::NotNow(quote(&reason))),
            Some(Order::Refused { reason, for_now: false }) => return Err(failed(reason)),
            Some(Order::Waiting { missing: nodes }) => {
                // When none is missing, the answer is waited for.
                sender.send(&Report::Beat).await?;
                if nodes != missing {
                    waiting(&nodes);
                    missing = nodes;
                }
            }
            Some(_) => {}
            None => {
                let what = "the start of the job".to_owned();
                let reason = format!("{LAUNCHER} closed the connection");
                return Err(paceline_transport::Error::GaveUp { what, reason }.into());
            }
        }
    }
}

/// Keeps the connection to launcher 0 from the start on.
async fn follow(mut lane: Lane, mut reports: UnboundedReceiver<Report>, heard: Arc<Heard>) {
    let mut beat = tokio::time::interval(BEAT);
    let silence = tokio::time::sleep(SILENCE);
    tokio::pin!(silence);
    let reason = loop {
        let sent = tokio::select! {
            order = lane.receiver.recv::<Order>() => {
                silence.as_mut().reset((Instant::now() + SILENCE).into());
                match order {
                    // Launcher 0 waits for a sign of life.
                    Ok(Some(Order::Waiting { .. })) => {
                        if let Err(error) = lane.sender.send(&Report::Beat).await {
                            break reason_of(error);
                        }
                    }
                    Ok(Some(order)) => heard.order(order),
                    Ok(None) => break "it closed the connection".to_owned(),
                    Err(error) => break reason_of(error),
                }
                Ok(())
            }
            report = reports.recv() => match report {
                Some(report) => lane.sender.send(&report).await,
                None => return,
            },
            _ = beat.tick() => lane.sender.send(&Report::Beat).await,
            () = &mut silence => break format!("it has said nothing for {} s", SILENCE.as_secs()),
        };
        if let Err(error) = sent {
            break reason_of(error);
        }
    };
    heard.update(|state| {
        state.lost = state.verdict.is_none();
        lost(state, &reason);
    });
}

/// The reason alone: the address of launcher 0 is known.
pub(crate) fn reason_of(error: paceline_transport::Error) -> String {
    match error {
        paceline_transport::Error::Refused { reason, .. } => reason,
        error => error.to_string(),
    }
}

/// Launcher 0 is lost. If the job had failed before, that stays the reason.
fn lost(state: &mut HeardState, reason: &str) {
    if state.verdict.is_some() {
        return;
    }
    let cause = format!("was lost: {}", quote(reason));
    state.failure.get_or_insert(Failure { node: 0, rank: None, cause, exit_code: LOST_NODE });
    state.verdict = Some(state.failure.clone());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn generation(number: u32, master_port: u16) -> Generation {
        let (master_addr, nodes) = ("host".to_owned(), vec![0, 1, 2]);
        Generation { number, changes: 0, max_restarts: 5, nodes, master_addr, master_port }
    }

    #[test]
    fn a_launcher_0_that_is_lost_while_a_node_comes_is_what_the_job_fails_of() {
        let heard = Heard {
            node: 1,
            state: Mutex::new(HeardState::of(generation(0, 1))),
            on_change: Arc::new(|| {}),
        };
        heard.order(Order::Changes { node: 2 });
        heard.update(|state| lost(state, "it closed the connection"));
        let verdict = heard.lock().verdict.clone().flatten().expect("there is one").to_string();
        assert_eq!(verdict, "the launcher of node 0 was lost: it closed the connection");
    }
}
