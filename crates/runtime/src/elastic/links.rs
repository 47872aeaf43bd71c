//! The data plane of a worker: forms the communicator of each view and runs the collectives of its steps, on a thread of
//! its own. A communicator belongs to one epoch; when that is closed, whatever runs or is being formed ends at once.

use std::sync::mpsc::{Receiver, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use paceline_collectives::{Communicator, Config, Error as CollectivesError, Interrupter};
use paceline_transport::quic::{self, QuicTransport};
use paceline_transport::shm::{self, Sharing};
use paceline_transport::tls::{self, TlsTransport};
use paceline_transport::{Error as TransportError, Member, Roster, Transport, mem};
use tokio::sync::watch;

use super::book::Book;
use super::failpoint::{Failpoints, Point};
use super::pool::Pool;
use super::program::Gradient;
use super::saver::Saving;
use super::sum::{self, Shares};
use crate::Error;
use crate::checkpoint::StableStep;
use crate::membership::{Epoch, Evidence, Incarnation, Step, View};

/// How long the links of a view may take. Members learn of it within milliseconds of each other, and links take tens of
/// them; while a newcomer cannot be reached, all others stand still so long.
const FORMING_LIMIT: Duration = Duration::from_secs(5);

/// What the data plane is to do.
pub(super) enum Order<G> {
    Open { view: View, me: Incarnation },
    Run { epoch: Epoch, step: Step, shares: Shares, inputs: Vec<Arc<Vec<G>>>, saving: Saving },
}

/// What has become of it.
pub(super) enum News<G> {
    Reduced {
        epoch: Epoch,
        step: Step,
        mean: Vec<G>,
        /// The step before, if all members save the state after it.
        saved: Option<StableStep>,
    },
    /// Not all links of that epoch could be made; `missing` are those to whom, as far as is known.
    Unformed { epoch: Epoch, missing: Vec<Incarnation>, reason: String },
    /// The communicator of that epoch has failed; `lost` are those whose fault it seems to be.
    Failed { epoch: Epoch, lost: Vec<(Incarnation, Evidence)>, reason: String },
}

/// Where a worker's links are made.
pub(super) enum Door {
    Tls(tls::Endpoint),
    Quic(quic::Endpoint),
}

/// How another thread ends an epoch's operations.
#[derive(Debug)]
pub(super) struct Fence {
    closed: watch::Sender<Epoch>,
    running: Mutex<Option<(Epoch, Interrupter)>>,
}

impl Fence {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self { closed: watch::Sender::new(Epoch(0)), running: Mutex::new(None) })
    }

    /// Ends the operations of this epoch and of those before it. Does not block.
    pub(super) fn close(&self, epoch: Epoch) {
        self.closed.send_if_modified(|closed| {
            let later = epoch > *closed;
            *closed = epoch.max(*closed);
            later
        });
        if let Some((running, interrupter)) = &*self.running()
            && *running <= epoch
        {
            interrupter.interrupt("the membership has changed");
        }
    }

    fn is_closed(&self, epoch: Epoch) -> bool {
        *self.closed.borrow() >= epoch
    }

    /// From now on `close` reaches this communicator; also when it came before.
    fn guard(&self, epoch: Epoch, communicator: &Communicator) {
        *self.running() = Some((epoch, communicator.interrupter()));
        if self.is_closed(epoch) {
            self.close(epoch);
        }
    }

    fn running(&self) -> MutexGuard<'_, Option<(Epoch, Interrupter)>> {
        // Replaced whole.
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the data plane works with.
pub(super) struct Links {
    pub(super) door: Door,
    pub(super) job: String,
    pub(super) book: Arc<Book>,
    pub(super) fence: Arc<Fence>,
    pub(super) config: Config,
    pub(super) sharing: Sharing,
    pub(super) failpoints: Failpoints,
}

impl Links {
    /// Does what is ordered until nobody orders any more.
    pub(super) fn run<G: Gradient>(
        self,
        orders: &Receiver<Order<G>>,
        news: &Sender<News<G>>,
        pool: &Pool<G>,
    ) {
        let mut open: Option<(View, Communicator)> = None;
        while let Ok(order) = orders.recv() {
            let told = match order {
                Order::Open { view, me } => {
                    open = None;
                    match self.form(&view, me) {
                        Ok(communicator) => {
                            open = Some((view, communicator));
                            continue;
                        }
                        Err(error) => unformed(&view, &error),
                    }
                }
                Order::Run { epoch, step, shares, inputs, saving } => {
                    let Some((view, communicator)) = open.as_mut().filter(|(view, _)| view.epoch == epoch)
                    else {
                        continue;
                    };
                    self.failpoints.begin_step(step);
                    self.failpoints.pass(Point::Contribute, step);
                    let mut mean = pool.take();
                    let reduced = sum::mean(communicator, &shares, &inputs, &mut mean)
                        .map_err(Error::from)
                        .and_then(|()| saving.agree(communicator, step));
                    match reduced {
                        Ok(saved) => News::Reduced { epoch, step, mean, saved },
                        Err(error) => {
                            pool.give(Arc::new(mean));
                            failed(view, &error)
                        }
                    }
                }
            };
            let over = |epoch: &Epoch| self.fence.is_closed(*epoch);
            if matches!(&told, News::Failed { epoch, .. } | News::Unformed { epoch, .. } if over(epoch)) {
                continue;
            }
            if news.send(told).is_err() {
                return;
            }
        }
    }

    fn form(&self, view: &View, me: Incarnation) -> Result<Communicator, Error> {
        let (deadline, epoch) = (Instant::now() + FORMING_LIMIT, view.epoch);
        let started = Instant::now();
        let transport = self.link(view, me, deadline)?;
        let linked = started.elapsed();
        let fence = &self.fence;
        let gave_up = || fence.is_closed(epoch).then(|| "the membership has changed".to_owned());
        let transport = shm::upgrade(transport, self.sharing, deadline, &gave_up)?;
        let links = transport.name();
        let mut communicator = Communicator::new(transport, self.config.clone())?;
        if let Some(observer) = self.failpoints.between_rounds() {
            communicator.on_round(observer);
        }
        self.fence.guard(epoch, &communicator);
        let (elapsed_us, connecting_us) = (started.elapsed().as_micros() as u64, linked.as_micros() as u64);
        tracing::info!(
            epoch = epoch.0,
            members = view.members.len(),
            links,
            connecting_us,
            elapsed_us,
            "members are connected"
        );
        Ok(communicator)
    }

    fn link(&self, view: &View, me: Incarnation, deadline: Instant) -> Result<Box<dyn Transport>, Error> {
        let epoch = view.epoch;
        if view.members.len() == 1 {
            return Ok(Box::new(mem::group(1, epoch.0, mem::DEFAULT_WINDOW_BYTES).remove(0)));
        }
        let usage = |reason| Error::Usage { reason };
        let contacts = self.book.members(view, deadline, || self.fence.is_closed(epoch)).map_err(usage)?;
        let rank = view.members.iter().position(|member| member.incarnation == me);
        let rank = rank.ok_or_else(|| usage(format!("this worker is not in the view of {epoch}")))?;
        let members = contacts.into_iter().map(|c| Member { name: c.member, addr: c.links }).collect();
        let roster = Roster { job: self.job.clone(), epoch: epoch.0, rank, members };
        let mut closed = self.fence.closed.subscribe();
        let give_up = async move {
            // The sender lives as long as the fence, which this worker keeps.
            let _ = closed.wait_for(|closed| *closed >= epoch).await;
            "the membership has changed".to_owned()
        };
        Ok(match &self.door {
            Door::Tls(door) => Box::new(TlsTransport::connect_unless(door, roster, deadline, give_up)?),
            Door::Quic(door) => Box::new(QuicTransport::connect_unless(door, roster, deadline, give_up)?),
        })
    }
}

fn unformed<G>(view: &View, error: &Error) -> News<G> {
    let ranks = match error {
        Error::Transport(TransportError::TimedOut { ranks, .. }) => &ranks[..],
        _ => &[],
    };
    let missing = ranks.iter().filter_map(|&rank| view.members.get(rank));
    let missing = missing.map(|member| member.incarnation).collect();
    News::Unformed { epoch: view.epoch, missing, reason: error.to_string() }
}

fn failed<G>(view: &View, error: &Error) -> News<G> {
    let (lost, evidence): (Vec<usize>, Evidence) = match error {
        Error::Collectives(
            CollectivesError::PeerLost { rank, .. } | CollectivesError::PeerLeft { rank, .. },
        ) => (vec![*rank], Evidence::LinkLost),
        // Those who do not wait for anybody themselves: their programs hang, or take too long for this timeout.
        Error::Collectives(CollectivesError::TimedOut { waiting_for, .. }) => {
            (waiting_for.clone(), Evidence::NoProgress)
        }
        _ => (Vec::new(), Evidence::LinkLost),
    };
    let members = lost.into_iter().filter_map(|rank| view.members.get(rank));
    let lost = members.map(|member| (member.incarnation, evidence)).collect();
    News::Failed { epoch: view.epoch, lost, reason: error.to_string() }
}
