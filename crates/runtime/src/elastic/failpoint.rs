//! Faults at chosen points of a training, for tests: this worker kills or stops itself where `PACELINE_FAILPOINT` says.
//!
//! Chaos finds what is likely. A death between the end of a reduction and the optimizer's step lasts microseconds, and is
//! met once in thousands of kills; here it is met each time, as in rabit's mock engine (Chen et al. 2015). Always compiled
//! in, so that what is tested is what runs: without the variable a point is one look at an empty list, once in a step and
//! never within a loop over elements.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::process::{Signal, getpid, kill_process};

use crate::membership::Step;

/// Where in a training a worker may fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Point {
    /// It has the inputs of a step, and none of the others has anything of them.
    Contribute,
    /// In the middle of the reduction of a step, before the round of that number: with rounds of a segment each the others
    /// have some of its inputs, or of its sums.
    ReduceScatter,
    /// It has the result of a step and has not applied it.
    Reduced,
    /// It has applied a step, and has contributed nothing to the next one.
    Applied,
    /// While it takes a state over: so many pieces of it have come. It is at no step then.
    Pull,
    /// While it sends a part of a state to a member that is behind: so many pieces of it have gone out. All others wait then.
    Stripe,
    /// A member has told it to enter, and it has not passed that on. The step is that of its state.
    Ready,
    /// It has heard that it is a member. The step is that of the state which the view begins from.
    Install,
    /// Its share of a checkpoint has been copied, and is being written. The step is that of the state.
    Checkpoint,
}

impl Point {
    const NAMES: [(&'static str, Self); 9] = [
        ("contribute", Self::Contribute),
        ("reduce_scatter", Self::ReduceScatter),
        ("reduced", Self::Reduced),
        ("applied", Self::Applied),
        ("pull", Self::Pull),
        ("stripe", Self::Stripe),
        ("ready", Self::Ready),
        ("install", Self::Install),
        ("checkpoint", Self::Checkpoint),
    ];

    /// Whether a pass has a number within its step.
    fn has_segments(self) -> bool {
        matches!(self, Self::ReduceScatter | Self::Pull | Self::Stripe)
    }

    /// Whether what passes is at no step.
    fn is_of_no_step(self) -> bool {
        matches!(self, Self::Pull | Self::Stripe)
    }
}

/// What a worker does to itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Act {
    /// SIGKILL: nothing of the process runs any more.
    Kill,
    /// SIGSTOP, until somebody sends SIGCONT.
    Stop,
}

/// One fault: at which point, of which process, at which step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failpoint {
    rank: usize,
    /// Which process of the rank; all if that is not said.
    life: Option<u32>,
    point: Point,
    /// Any if that is not said.
    step: Option<u64>,
    segment: u64,
    act: Act,
}

impl FromStr for Failpoint {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (mut rank, mut point, mut life, mut step, mut segment, mut act) =
            (None, None, None, None, None, Act::Kill);
        let mut seen = Vec::new();
        for pair in text.split(',') {
            let (name, value) =
                pair.split_once('=').ok_or_else(|| format!("`{pair}` is not of the form NAME=VALUE"))?;
            let (name, value) = (name.trim(), value.trim());
            if seen.contains(&name) {
                return Err(format!("`{name}` is there twice"));
            }
            seen.push(name);
            match name {
                "rank" => rank = Some(number(name, value)?),
                "life" => life = Some(number(name, value)?),
                "step" => step = Some(number(name, value)?),
                "segment" => segment = Some(number(name, value)?),
                "op" => point = Some(choice(name, value, &Point::NAMES)?),
                "action" => act = choice(name, value, &[("kill", Act::Kill), ("stop", Act::Stop)])?,
                _ => return Err(format!("`{name}` is none of rank, life, step, op, segment, action")),
            }
        }
        let (Some(rank), Some(point)) = (rank, point) else {
            return Err(format!("`{text}` must say rank=… and op=…"));
        };
        if !point.has_segments() && segment.is_some() {
            return Err("segment= is for op=reduce_scatter, op=pull and op=stripe".to_owned());
        }
        if point.is_of_no_step() && step.is_some() {
            return Err("step= is not for op=pull and op=stripe: a state on its way is at no step".to_owned());
        }
        Ok(Self { rank, life, point, step, segment: segment.unwrap_or(0), act })
    }
}

fn number<T: FromStr>(name: &str, value: &str) -> Result<T, String> {
    value.parse().map_err(|_| format!("`{value}` is no number, for {name}="))
}

fn choice<T: Copy>(name: &str, value: &str, choices: &[(&str, T)]) -> Result<T, String> {
    let found = choices.iter().find(|(known, _)| *known == value).map(|&(_, choice)| choice);
    found.ok_or_else(|| {
        let names: Vec<&str> = choices.iter().map(|(name, _)| *name).collect();
        format!("`{value}` is none of {}, for {name}=", names.join(", "))
    })
}

/// Reads a list of failpoints with semicolons between them.
///
/// # Errors
/// One line that says what is wrong with the first that makes no sense.
pub(crate) fn parse(list: &str) -> Result<Vec<Failpoint>, String> {
    list.split(';').map(str::trim).filter(|text| !text.is_empty()).map(Failpoint::from_str).collect()
}

/// Those of this process. Clones have the same position.
#[derive(Clone)]
pub(super) struct Failpoints {
    armed: Arc<[Failpoint]>,
    position: Arc<Position>,
}

/// Where the data plane is, for points that do not know it.
#[derive(Default)]
struct Position {
    step: AtomicU64,
    taken: AtomicU64,
    given: AtomicU64,
}

impl Failpoints {
    /// Of all that are wanted, those of this process.
    pub(super) fn of(wanted: Vec<Failpoint>, rank: usize, life: u32) -> Self {
        let mine = |failpoint: &Failpoint| {
            failpoint.rank == rank && failpoint.life.is_none_or(|wanted| wanted == life)
        };
        let armed: Arc<[Failpoint]> = wanted.into_iter().filter(mine).collect();
        if !armed.is_empty() {
            tracing::warn!(rank, life, ?armed, "this process will fail where PACELINE_FAILPOINT says");
        }
        Self { armed, position: Arc::default() }
    }

    /// Passes a point of a step, where this process may end.
    #[inline]
    pub(super) fn pass(&self, point: Point, step: Step) {
        if !self.armed.is_empty() {
            self.look(point, step.0, 0);
        }
    }

    /// The reduction of a step begins.
    #[inline]
    pub(super) fn begin_step(&self, step: Step) {
        if !self.armed.is_empty() {
            self.position.step.store(step.0, Ordering::Relaxed);
        }
    }

    /// What to call before each round of a reduction; nothing where no failpoint is within one.
    pub(super) fn between_rounds(&self) -> Option<impl Fn(usize) + Send + Sync + use<>> {
        let is_within = |failpoint: &Failpoint| failpoint.point == Point::ReduceScatter;
        let failpoints = self.clone();
        self.armed.iter().any(is_within).then_some(move |round: usize| {
            let step = failpoints.position.step.load(Ordering::Relaxed);
            failpoints.look(Point::ReduceScatter, step, round as u64);
        })
    }

    /// Another piece of a state is coming in; the announcement before the first one counts as one.
    #[inline]
    pub(super) fn take_piece(&self) {
        self.pass_piece(Point::Pull, &self.position.taken);
    }

    /// Another piece of a part of a state is going out, counted in the same way.
    #[inline]
    pub(super) fn give_piece(&self) {
        self.pass_piece(Point::Stripe, &self.position.given);
    }

    #[inline]
    fn pass_piece(&self, point: Point, pieces: &AtomicU64) {
        if !self.armed.is_empty() {
            let piece = pieces.fetch_add(1, Ordering::Relaxed);
            let is_here = |failpoint: &&Failpoint| failpoint.point == point && failpoint.segment == piece;
            self.armed.iter().find(is_here).into_iter().for_each(|failpoint| fail(failpoint.act));
        }
    }

    #[cold]
    fn look(&self, point: Point, step: u64, segment: u64) {
        let is_here = |failpoint: &&Failpoint| {
            failpoint.point == point
                && failpoint.step.is_none_or(|wanted| wanted == step)
                && failpoint.segment == segment
        };
        self.armed.iter().find(is_here).into_iter().for_each(|failpoint| fail(failpoint.act));
    }
}

impl fmt::Debug for Failpoints {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Failpoints").field(&self.armed).finish()
    }
}

fn fail(act: Act) {
    let signal = match act {
        Act::Kill => Signal::KILL,
        Act::Stop => Signal::STOP,
    };
    // A process may always send itself a signal. One that was killed does not come back from here.
    let _ = kill_process(getpid(), signal);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failpoint_says_who_where_and_when() {
        let read = parse("rank=2,step=7,op=reduce_scatter,segment=3,life=0; rank=1, op=ready, action=stop;");
        let first = Failpoint {
            rank: 2,
            life: Some(0),
            point: Point::ReduceScatter,
            step: Some(7),
            segment: 3,
            act: Act::Kill,
        };
        let second =
            Failpoint { rank: 1, life: None, point: Point::Ready, step: None, segment: 0, act: Act::Stop };
        assert_eq!(read, Ok(vec![first, second]));
        assert_eq!(parse(""), Ok(Vec::new()));
    }

    #[test]
    fn what_makes_no_sense_is_refused_in_a_line_that_says_what_would() {
        for (text, expect) in [
            ("rank=2", "must say rank=… and op=…"),
            ("op=ready", "must say rank=… and op=…"),
            ("rank=2,op", "`op` is not of the form NAME=VALUE"),
            ("rank=-1,op=ready", "`-1` is no number, for rank="),
            ("rank=2,op=sleep", "`sleep` is none of contribute, reduce_scatter, reduced"),
            ("rank=2,op=ready,action=exit", "`exit` is none of kill, stop, for action="),
            ("rank=2,op=ready,slot=3", "`slot` is none of rank, life"),
            ("rank=2,op=ready,rank=3", "`rank` is there twice"),
            ("rank=2,op=applied,segment=1", "segment= is for op=reduce_scatter"),
            ("rank=2,op=pull,step=1", "step= is not for op=pull"),
            ("rank=2,op=stripe,step=1", "step= is not for op=pull and op=stripe"),
        ] {
            let error = parse(text).expect_err(text);
            assert!(error.contains(expect) && !error.contains('\n'), "{text}: {error}");
        }
    }

    #[test]
    fn a_process_has_those_of_its_rank_and_life_alone() {
        let wanted =
            parse("rank=2,op=applied,life=0;rank=2,op=reduced;rank=1,op=applied").expect("they are right");
        let of = |rank, life| Failpoints::of(wanted.clone(), rank, life).armed.len();
        assert_eq!((of(2, 0), of(2, 1), of(1, 4), of(0, 0)), (2, 1, 1, 0));
        let none = Failpoints::of(wanted, 0, 0);
        none.pass(Point::Applied, Step(1));
        none.take_piece();
        none.give_piece();
        assert!(none.between_rounds().is_none());
    }
}
