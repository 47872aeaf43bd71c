//! Checkpoints of a training whose members may change: which states are saved, by whom, and what a job goes on from that
//! is founded anew.
//!
//! The state after step s is saved when step s + 1 has been reduced, before it is applied. Then each member of the view
//! is known to have applied s, and its program still has that state: there is nothing to keep a second time, and nothing
//! that is saved is ever undone. Members agree with one small all-reduce, behind the sum of step s + 1, whether all can:
//! one that is still writing makes all leave this one out, so no member waits for a shard that does not come.
//!
//! Where members need not have the same bits, rank 0 saves the whole state; the others agree with it all the same.
//!
//! Who saves together is one view, and a view saves under a number of its own. When it ends, what its members are writing
//! is given up; what is left of that is removed when the next view saves.

use std::path::PathBuf;

use paceline_collectives::Communicator;
use serde::{Deserialize, Serialize};

use super::{Config, Tensor};
use crate::Error;
use crate::checkpoint::{
    self, Checkpointer, Error as CheckpointError, Group, Layout, Notes, Settings, StableStep, TensorMut,
};
use crate::digest::Digest;
use crate::membership::{CatchUp, Incarnation, Ledger, Step, View};
use crate::sampler::SamplerState;

/// Whether the state before a step is saved with it. What is due is the same on all members.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Saving {
    NotDue,
    /// It is due, and this member can.
    Ready,
    /// It is due, and this member cannot, or knows that it is saved already.
    Declined,
}

impl Saving {
    /// Agrees with all others of the view whether the state before this step is saved, which has just been reduced.
    pub(super) fn agree(
        self,
        communicator: &mut Communicator,
        step: Step,
    ) -> Result<Option<StableStep>, Error> {
        match self {
            Self::NotDue => Ok(None),
            Self::Ready | Self::Declined => checkpoint::agree(communicator, step.0 - 1, self == Self::Ready),
        }
    }
}

/// What is saved beside the program's tensors.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Position {
    /// The chain of epochs that led to the state.
    pub(super) lineage: u64,
    pub(super) ledger: Ledger,
    /// What the ledger's batches are batches of.
    pub(super) data: SamplerState,
}

/// The names of the notes in a checkpoint.
const LINEAGE: &str = "lineage";
const LEDGER: &str = "ledger";
const DATA: &str = "sampler";

impl Position {
    fn to_notes(&self) -> Result<Notes, CheckpointError> {
        let mut notes = Notes::default();
        notes.put(LINEAGE, &self.lineage)?;
        notes.put(LEDGER, &self.ledger)?;
        notes.put(DATA, &self.data)?;
        Ok(notes)
    }

    fn from_notes(notes: &Notes) -> Result<Self, CheckpointError> {
        Ok(Self { lineage: note(notes, LINEAGE)?, ledger: note(notes, LEDGER)?, data: note(notes, DATA)? })
    }
}

fn note<T: for<'de> Deserialize<'de> + Serialize>(notes: &Notes, name: &str) -> Result<T, CheckpointError> {
    notes.get(name)?.ok_or_else(|| CheckpointError::Usage {
        reason: format!(
            "the checkpoint has no note {name}: it is not one of a training with runtime::elastic"
        ),
    })
}

/// A process's part in saving.
pub(super) struct Saver {
    folder: PathBuf,
    every: u64,
    settings: Settings,
    layout: Layout,
    /// Since the first state that was saved from here.
    checkpointer: Option<Checkpointer>,
    /// The newest step that is known to be saved.
    newest: u64,
}

impl Saver {
    /// For a program with these tensors; none without a folder.
    ///
    /// # Errors
    /// [`CheckpointError::Usage`] for names that a checkpoint cannot have.
    pub(super) fn new(config: &Config, state: Vec<Tensor<'_>>) -> Result<Option<Self>, Error> {
        let Some(folder) = config.checkpoint.clone() else { return Ok(None) };
        let layout = with_tensors(&state, Layout::of)?;
        let (every, settings) = (config.checkpoint_every, config.checkpoint_settings);
        Ok(Some(Self { folder, every, settings, layout, checkpointer: None, newest: 0 }))
    }

    /// Loads the newest checkpoint that is whole, and says of which step it is; none if there is none yet.
    ///
    /// # Errors
    /// Those of [`checkpoint::resume_alone`], and [`CheckpointError::Disk`] when there can be no folder. The state is
    /// unspecified then.
    pub(super) fn resume(&mut self, mut state: Vec<Tensor<'_>>) -> Result<Option<(u64, Position)>, Error> {
        checkpoint::make_folder(&self.folder)?;
        let shapes = shapes(&state);
        let mut tensors: Vec<TensorMut<'_>> = state
            .iter_mut()
            .zip(&shapes)
            .map(|(tensor, shape)| TensorMut::from_bytes(tensor.name, tensor.dtype, shape, tensor.bytes))
            .collect();
        let Some(resumed) = checkpoint::resume_alone(&self.folder, &mut tensors)? else { return Ok(None) };
        self.newest = resumed.step;
        Ok(Some((resumed.step, Position::from_notes(&resumed.notes)?)))
    }

    /// Whether the state after a step is to be saved; `is_last`: no step follows that changes it, and so it is worth waiting
    /// for the one that is still being written.
    pub(super) fn turn(&mut self, after: Step, is_last: bool) -> Saving {
        let step = after.0;
        if step == 0 || !(step.is_multiple_of(self.every) || is_last) {
            return Saving::NotDue;
        }
        self.look();
        if step <= self.newest {
            return Saving::Declined;
        }
        let can = match &mut self.checkpointer {
            Some(checkpointer) => {
                let is_busy = match is_last {
                    true => checkpointer.wait().is_err(),
                    false => checkpointer.is_busy(),
                };
                if is_busy {
                    checkpointer.skip(step);
                }
                !is_busy
            }
            None => checkpoint::make_folder(&self.folder).map_err(|error| say(step, &error)).is_ok(),
        };
        if can { Saving::Ready } else { Saving::Declined }
    }

    /// Copies this member's share of the state; the rest happens in the background. What fails is said in the log.
    pub(super) fn save(
        &mut self,
        stable: StableStep,
        group: Group,
        state: Vec<Tensor<'_>>,
        position: &Position,
    ) {
        let step = stable.step();
        let saved = with_tensors(&state, |tensors| {
            let notes = position.to_notes()?;
            self.checkpointer_of(group)?.save(stable, tensors, notes)
        });
        let _ = saved.map_err(|error| say(step, &error));
    }

    /// The checkpointer, for this group. Nothing is being written: the members have agreed on that.
    fn checkpointer_of(&mut self, group: Group) -> Result<&mut Checkpointer, CheckpointError> {
        let checkpointer = match self.checkpointer.take() {
            Some(mut checkpointer) => {
                if checkpointer.group() != group {
                    checkpointer.regroup(group)?;
                }
                checkpointer
            }
            None => Checkpointer::open(&self.folder, group, self.layout.clone(), self.settings)?,
        };
        Ok(self.checkpointer.insert(checkpointer))
    }

    /// Gives up what is being written, without waiting.
    pub(super) fn stop(&self) {
        self.checkpointer.iter().for_each(Checkpointer::cancel);
    }

    /// Waits for what is being written.
    pub(super) fn finish(self) {
        let finished = self.checkpointer.map_or(Ok(None), Checkpointer::finish);
        let _ = finished.map_err(|error| tracing::error!(%error, "the last checkpoint"));
    }

    /// Learns what has become of the last one. Only the member of rank 0 knows when it has been made.
    fn look(&mut self) {
        let outcome = self.checkpointer.as_mut().and_then(Checkpointer::outcome);
        if let Some(made) = outcome.filter(|outcome| matches!(outcome.result, Ok(Some(_)))) {
            self.newest = self.newest.max(made.step);
        }
    }
}

/// The members of a view, as those who save together; the first one alone where their states may differ, since a shard of one
/// and a shard of another are no state. None if this one is not among them. No other view, of whichever job, has their number:
/// incarnations are drawn at random.
pub(super) fn group(view: &View, me: Incarnation, catch_up: CatchUp) -> Option<Group> {
    let rank = view.members.iter().position(|member| member.incarnation == me)?;
    let words = |incarnation: Incarnation| [incarnation.0 as u64, (incarnation.0 >> 64) as u64];
    let members = view.members.iter().flat_map(|member| words(member.incarnation));
    let all: Vec<u64> = std::iter::once(view.epoch.0).chain(members).collect();
    let run = u64::from_le_bytes(Digest::of([&all[..]]).0);
    let world_size = match catch_up {
        CatchUp::Results => view.members.len(),
        CatchUp::State => 1,
    };
    (rank < world_size).then_some(Group { rank, world_size, run })
}

/// As vectors: a program does not say which shapes its tensors have.
fn shapes(state: &[Tensor<'_>]) -> Vec<[usize; 1]> {
    state.iter().map(|tensor| [tensor.bytes.len() / tensor.dtype.size()]).collect()
}

fn with_tensors<R>(state: &[Tensor<'_>], use_them: impl FnOnce(&[checkpoint::Tensor<'_>]) -> R) -> R {
    let shapes = shapes(state);
    let tensors: Vec<checkpoint::Tensor<'_>> = state
        .iter()
        .zip(&shapes)
        .map(|(tensor, shape)| checkpoint::Tensor::from_bytes(tensor.name, tensor.dtype, shape, tensor.bytes))
        .collect();
    use_them(&tensors)
}

fn say(step: u64, error: &CheckpointError) {
    tracing::error!(step, %error, "no checkpoint; training goes on without it");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::membership::{Epoch, Member};

    fn view(epoch: u64, members: &[u128]) -> View {
        let member = |&number: &u128| Member {
            incarnation: Incarnation(number),
            launcher: Incarnation(1 << 100),
            slots: Vec::new(),
        };
        View { epoch: Epoch(epoch), voters: Vec::new(), members: members.iter().map(member).collect() }
    }

    #[test]
    fn no_two_views_save_under_one_number_and_their_members_all_do() {
        let of =
            |epoch, members: &[u128], me| group(&view(epoch, members), Incarnation(me), CatchUp::Results);
        let first = of(3, &[7, 8 << 64], 7).expect("a member");
        assert_eq!((first.rank, first.world_size), (0, 2));
        assert_eq!(of(3, &[7, 8 << 64], 8 << 64), Some(Group { rank: 1, ..first }));
        let others = [of(4, &[7, 8 << 64], 7), of(3, &[7, 9 << 64], 7), of(3, &[7], 7)];
        for other in others {
            assert_ne!(other.expect("a member").run, first.run);
        }
        assert_eq!(of(3, &[7], 8), None);
    }

    #[test]
    fn where_states_may_differ_the_first_member_saves_alone() {
        let of = |me| group(&view(3, &[7, 8]), Incarnation(me), CatchUp::State);
        assert_eq!(of(7).map(|group| (group.rank, group.world_size)), Some((0, 1)));
        assert_eq!(of(8), None);
    }

    fn saver(folder: &std::path::Path, weights: &mut [f64]) -> Saver {
        let mut config = Config::new(4, 4);
        (config.checkpoint, config.checkpoint_every) = (Some(folder.to_owned()), 10);
        let saver = Saver::new(&config, vec![Tensor::new("weights", weights)]);
        saver.expect("the names will do").expect("there is a folder")
    }

    fn position() -> Position {
        let data = crate::sampler::Sampler::new(4, 4, 0).expect("it fits").state(0, 0);
        Position { lineage: u64::MAX - 1, ledger: Ledger::new(3), data }
    }

    #[test]
    fn each_step_is_saved_once_and_the_last_one_whatever_its_number() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut weights = [1.5f64, 2.5];
        let mut saver = saver(folder.path(), &mut weights);
        let turns = |saver: &mut Saver, steps: &[u64]| -> Vec<Saving> {
            steps.iter().map(|&step| saver.turn(Step(step), false)).collect()
        };
        assert_eq!(turns(&mut saver, &[0, 9, 10]), [Saving::NotDue, Saving::NotDue, Saving::Ready]);
        assert_eq!(saver.turn(Step(0), true), Saving::NotDue, "nothing has been trained");
        assert_eq!(saver.turn(Step(9), true), Saving::Ready);
        let group = group(&view(1, &[7]), Incarnation(7), CatchUp::Results).expect("a member");
        saver.save(StableStep::of_one(10), group, vec![Tensor::new("weights", &mut weights)], &position());
        saver.checkpointer.as_mut().expect("it has saved").wait().expect("the disk answers");
        assert_eq!(turns(&mut saver, &[10, 20]), [Saving::Declined, Saving::Ready]);
        let mut other = [0f64; 2];
        let mut again = self::saver(folder.path(), &mut other);
        let resumed = again.resume(vec![Tensor::new("weights", &mut other)]).expect("it is whole");
        assert_eq!(resumed, Some((10, position())));
        assert_eq!(other, weights);
        assert_eq!(turns(&mut again, &[10, 20]), [Saving::Declined, Saving::Ready], "it is there");
    }

    #[test]
    fn where_there_can_be_no_folder_a_job_does_not_begin_and_one_that_runs_goes_on() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("file");
        std::fs::write(&file, "in the way").expect("it can be written");
        let mut weights = [0f64; 2];
        let mut saver = saver(&file, &mut weights);
        let resumed = saver.resume(vec![Tensor::new("weights", &mut weights)]);
        assert!(matches!(resumed, Err(Error::Checkpoint(CheckpointError::Disk { .. }))), "{resumed:?}");
        assert_eq!(saver.turn(Step(10), false), Saving::Declined);
    }

    #[test]
    fn a_checkpoint_of_another_kind_of_program_is_refused() {
        let notes = Notes::default();
        let error = Position::from_notes(&notes).expect_err("there are no notes");
        assert!(error.to_string().contains("no note lineage"), "{error}");
    }
}
