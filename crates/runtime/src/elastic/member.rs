//! A worker of a job: comes to its launcher, starts the threads, and does on the caller's what they want of the program.

use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use paceline_collectives::{Config as CollectivesConfig, Order};
use paceline_transport::identity::Identity;
use paceline_transport::{Fabric, IoThread, quic, tls};

use super::book::Book;
use super::control::{Command, Control, Input, Wires};
use super::exchange::{Arrival, Exchange, Hooks, Limits, QUEUE_LIMIT};
use super::failpoint::{Failpoints, Point};
use super::links::{Door, Fence, Links};
use super::pipe::{self, Contact, FromChild, ToChild, Welcome, Wish};
use super::program::Program;
use super::training::{HEADER_LIMIT, Training};
use super::{Config, End, Stop, draw};
use crate::env::{self, ElasticEnv};
use crate::membership::{Step, Stripe, Transfer, Worker};
use crate::{Error, renewal};

/// How long the launcher may take to answer. It does so at once.
const WELCOME_LIMIT: Duration = Duration::from_secs(30);

/// How long the launcher may take to read what this worker says. It has a thread for that.
const PIPE_LIMIT: Duration = Duration::from_secs(10);

/// A state comes in stripes of at least so many bytes: shorter ones come as soon from one member, since each further member is
/// one more connection to make.
const STRIPE_BYTES: usize = 8 << 20;

/// See [`train`](super::train).
pub(super) fn train<P: Program>(
    env: &ElasticEnv,
    config: &Config,
    program: &mut P,
    stop: &Stop,
) -> Result<End, Error> {
    let checkpoint_every = config.checkpoint.as_ref().map(|_| config.checkpoint_every);
    // The configuration has been checked: there are few spares.
    let (mode, slots, spares, catch_up) = (config.mode, config.slots, config.spares as u16, config.catch_up);
    let wish = Wish { mode, slots, spares, catch_up, checkpoint_every };
    let failpoints = failpoints(env)?;
    let (pipe, welcome) = attach(env, wish)?;
    let pipe = Arc::new(pipe);
    let identity = renewal::read(&env.identity)
        .map_err(|reason| Error::Environment { variable: "PACELINE_IDENTITY", reason })?;
    let io = IoThread::start()?;
    let renewed = io.handle().spawn(renewal::follow(env.identity.clone(), identity.clone()));
    let door = open_door(&io, &identity, &welcome)?;
    let endpoint = tls::Endpoint::bind(&io.handle(), SocketAddr::new(welcome.listen, 0), &identity)?;
    let mut training = Training::new(program, config, welcome.job.slots)?;
    let state = welcome.begins.then(|| training.resume()).transpose()?;

    let me = draw();
    let contact = Contact {
        incarnation: me,
        member: identity.member().to_owned(),
        links: door.local_addr(),
        exchange: endpoint.local_addr(),
    };
    let (book, fence) = (Arc::new(Book::default()), Fence::new());
    book.insert(contact.clone());
    let (inputs, heard) = channel();
    let (commands, commanded) = channel();
    let (orders, ordered) = channel();
    let input_len = training.input_len();
    let result = input_len * size_of::<P::Gradient>();
    let limits = Limits { tensors: training.state_size(), header: HEADER_LIMIT, result };
    let arrivals = inputs.clone();
    let pieces = failpoints.clone();
    let arrived = move |arrival| {
        if matches!(arrival, Arrival::Receiving(Transfer::State { .. })) {
            pieces.take_piece();
        }
        drop(arrivals.send(Input::Peer(arrival)));
    };
    let gives = failpoints.clone();
    let gave = move |stripe| {
        if stripe != Stripe::WHOLE {
            gives.give_piece();
        }
    };
    let hooks = Hooks { arrived: Box::new(arrived), gave: Box::new(gave) };
    let exchange = Exchange::new(io.handle(), endpoint, book.clone(), me, limits, hooks);
    let links = Links {
        door,
        job: identity.job().to_owned(),
        book: book.clone(),
        fence: fence.clone(),
        config: fixed_order(env::collectives_config(env::process)?)?,
        sharing: env::sharing(env::process)?,
        failpoints: failpoints.clone(),
    };

    let (reader, news) = (pipe.clone(), inputs.clone());
    spawn("pipe", move || read(&reader, &news))?;
    let (told, telling) = channel();
    let pool = training.pool().clone();
    spawn("links", move || links.run(&ordered, &told, &pool))?;
    let news = inputs.clone();
    spawn("link-news", move || telling.into_iter().for_each(|told| drop(news.send(Input::Links(told)))))?;
    let start = Instant::now();
    let (core, first) = Worker::new(welcome.job, me, state, Duration::ZERO);
    let size = training.state_size();
    let core = core.with_state_worth(state_worth(size, limits.result)).with_stripes(size / STRIPE_BYTES);
    let core = (core, first);
    let wires = Wires { pipe: pipe.clone(), orders, commands };
    let pool = training.pool().clone();
    let control =
        Control::new(core, start, wires, (book, exchange, fence), contact, pool, failpoints.clone());
    let control = spawn("control", move || control.run(&heard))?;

    let leaving = inputs.clone();
    stop.on_request(move || drop(leaving.send(Input::Leave)));
    let abandon = Abandon(inputs.clone());
    let end = serve(&mut training, &commanded, &inputs, &failpoints);
    drop(abandon);
    if end == Ok(End::Complete) {
        training.finish_saving();
    }
    // It ends by itself once the program is told or does not listen.
    let _ = control.join();
    renewed.abort();
    let _ = pipe.shutdown(std::net::Shutdown::Both);
    end
}

/// Where this process is to fail.
fn failpoints(env: &ElasticEnv) -> Result<Failpoints, Error> {
    let wanted = env::failpoints(env::process)?;
    Ok(Failpoints::of(wanted, env.rank, env.life))
}

/// How many results of a step are as many bytes as the state; no more than may wait to be sent along with one.
fn state_worth(state_size: usize, result_size: usize) -> u64 {
    (state_size / result_size).clamp(1, QUEUE_LIMIT - 2) as u64
}

/// Refuses an order of summation that would depend on which ranks there are.
fn fixed_order(config: CollectivesConfig) -> Result<CollectivesConfig, Error> {
    match config.order {
        Order::Fixed => Ok(config),
        _ => Err(Error::Environment {
            variable: "PACELINE_ORDER",
            reason: "any: a training whose workers change sums in the order of its slots; leave it unset"
                .to_owned(),
        }),
    }
}

/// Tells the control thread when the program's ends, also by a panic.
struct Abandon<G>(Sender<Input<G>>);

impl<G> Drop for Abandon<G> {
    fn drop(&mut self) {
        // Fails when the control thread has ended first.
        let _ = self.0.send(Input::Abandoned);
    }
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<thread::JoinHandle<()>, Error> {
    let spawned = thread::Builder::new().name(format!("paceline-{name}")).spawn(body);
    spawned.map_err(|e| Error::Membership { reason: format!("cannot start the thread {name}: {e}") })
}

/// Comes to the launcher.
fn attach(env: &ElasticEnv, wish: Wish) -> Result<(UnixStream, Welcome), Error> {
    let failed = |reason: String| Error::Membership {
        reason: format!("the launcher at {}: {reason}", env.socket.display()),
    };
    let io = |e: std::io::Error| failed(e.to_string());
    let stream = UnixStream::connect(&env.socket).map_err(io)?;
    stream.set_write_timeout(Some(PIPE_LIMIT)).map_err(io)?;
    stream.set_read_timeout(Some(WELCOME_LIMIT)).map_err(io)?;
    pipe::send(&stream, &FromChild::Attach { version: pipe::VERSION, child: env.child, wish }).map_err(io)?;
    match pipe::receive::<ToChild>(&stream).map_err(io)? {
        Some(ToChild::Welcome(welcome)) => {
            stream.set_read_timeout(None).map_err(io)?;
            Ok((stream, welcome))
        }
        Some(ToChild::Refused { reason }) => Err(failed(reason)),
        Some(_) => Err(failed("it said something else than a welcome".to_owned())),
        None => Err(failed("it has closed the connection".to_owned())),
    }
}

fn open_door(io: &IoThread, identity: &Identity, welcome: &Welcome) -> Result<Door, Error> {
    let (io, addr) = (io.handle(), SocketAddr::new(welcome.listen, 0));
    Ok(match env::fabric(env::process)? {
        Fabric::Quic => Door::Quic(quic::Endpoint::bind(&io, addr, identity)?),
        Fabric::Tcp => Door::Tls(tls::Endpoint::bind_plain(&io, addr, identity)?),
        // The members change: a choice by measurement would be made anew in each view.
        _ => Door::Tls(tls::Endpoint::bind(&io, addr, identity)?),
    })
}

impl Door {
    fn local_addr(&self) -> SocketAddr {
        match self {
            Self::Tls(endpoint) => endpoint.local_addr(),
            Self::Quic(endpoint) => endpoint.local_addr(),
        }
    }
}

/// Passes on what the launcher says.
fn read<G>(pipe: &UnixStream, inputs: &Sender<Input<G>>) {
    loop {
        let input = match pipe::receive::<ToChild>(pipe) {
            Ok(Some(message)) => Input::Launcher(message),
            Ok(None) => Input::LauncherGone("it has closed the connection".to_owned()),
            Err(error) => Input::LauncherGone(error.to_string()),
        };
        let last = matches!(input, Input::LauncherGone(_));
        if inputs.send(input).is_err() || last {
            return;
        }
    }
}

/// Does what is wanted of the program until it is told the end.
fn serve<P: Program>(
    training: &mut Training<'_, P>,
    commands: &Receiver<Command<P::Gradient>>,
    inputs: &Sender<Input<P::Gradient>>,
    failpoints: &Failpoints,
) -> Result<End, Error> {
    // A send fails when the control thread has ended: its last word is in the queue.
    while let Ok(command) = commands.recv() {
        match command {
            Command::Compute { .. } if training.is_closed() => {}
            Command::Compute { from, slots } => {
                let _ =
                    inputs.send(Input::Submitted { from, inputs: training.inputs(from.applied, &slots)? });
            }
            Command::Apply { step, mean, present } => {
                training.apply(&mean, &present);
                failpoints.pass(Point::Applied, step);
            }
            Command::Load(parts) => training.load(&parts)?,
            Command::Save { transfer, stripe } => {
                let _ = inputs.send(Input::Saved { transfer, stripe, copy: training.save(stripe)? });
            }
            Command::Stable(stable) => training.program().stable(&stable),
            Command::Checkpoint { stable, lineage, group } => {
                let step = Step(stable.step());
                training.checkpoint(stable, lineage, group);
                failpoints.pass(Point::Checkpoint, step);
            }
            Command::StopSaving => training.stop_saving(),
            // The others were not waited for any longer, but there is nothing that this one lacks.
            Command::End(Ok(End::Elsewhere)) if training.is_closed() => return Ok(End::Complete),
            Command::End(end) => return end,
        }
        if training.is_closed() {
            let _ = inputs.send(Input::Closed);
        }
    }
    Err(Error::Membership { reason: "the thread of the membership has ended".to_owned() })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::super::program::Tensor;
    use super::*;

    struct Counter(Vec<f64>);

    impl Program for Counter {
        type Gradient = f64;

        fn gradient_len(&self) -> usize {
            1
        }

        fn state(&mut self) -> Vec<Tensor<'_>> {
            vec![Tensor::new("count", &mut self.0)]
        }

        fn gradient(&mut self, _: &[usize], gradient: &mut [f64]) -> f64 {
            gradient[0] = 1.0;
            0.0
        }

        fn apply(&mut self, gradient: &[f64]) {
            self.0[0] += gradient[0];
        }
    }

    /// How a training of one batch ends here that is told so many steps, and then that it is complete elsewhere.
    fn end_after(steps: usize) -> Result<End, Error> {
        let mut program = Counter(vec![0.0]);
        let mut training = Training::new(&mut program, &Config::new(4, 4), 1)?;
        let (inputs, _heard) = channel();
        let (commands, commanded) = channel();
        for step in 1..=steps {
            let (mean, present) = (Arc::new(vec![1.0, 0.0]), BTreeSet::from([0]));
            let step = Step(step as u64);
            commands.send(Command::Apply { step, mean, present }).expect("it is received below");
        }
        commands.send(Command::End(Ok(End::Elsewhere))).expect("it is received below");
        serve(&mut training, &commanded, &inputs, &Failpoints::of(Vec::new(), 0, 0))
    }

    #[test]
    fn a_worker_that_has_all_steps_is_complete_however_late_it_is() {
        assert_eq!(end_after(2), Ok(End::Complete));
        assert_eq!(end_after(1), Ok(End::Elsewhere));
    }
}
