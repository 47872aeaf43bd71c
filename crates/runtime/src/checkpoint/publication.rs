//! When shards become a checkpoint: rank 0's decisions, without I/O and without a clock.
//!
//! Every rank makes its shard durable and then says so, in a receipt. Rank 0 writes the manifest when it has a receipt
//! of every rank, all of one model and one step, and gives up when one has failed or is late. So a checkpoint holds the
//! state of every rank at that step, and each of them has applied it.

use serde::{Deserialize, Serialize};

use super::layout::Layout;
use super::manifest::{Manifest, Notes, ShardRecord};

/// What a rank says when it is done with its shard.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
pub enum Receipt {
    /// The shard is durable.
    Durable {
        /// The file.
        shard: ShardRecord,
        /// [`Layout::digest`] of what it has written.
        layout: u64,
    },
    /// There will be no shard.
    Failed(String),
}

/// A checkpoint that is waiting for its shards.
#[derive(Debug)]
pub struct Publication {
    step: u64,
    run: u64,
    layout: u64,
    shards: Vec<Option<ShardRecord>>,
    failed: Option<String>,
}

/// What rank 0 does next.
#[derive(Debug, PartialEq, Eq)]
pub enum Turn {
    /// Look for the receipts of these ranks again.
    Wait(Vec<usize>),
    /// Write the manifest.
    Commit,
    /// Remove all.
    GiveUp(String),
}

impl Publication {
    /// Nothing has been heard of any of `shards` ranks.
    pub fn new(step: u64, run: u64, layout: &Layout, shards: usize) -> Self {
        Self { step, run, layout: layout.digest(), shards: vec![None; shards], failed: None }
    }

    /// A rank says this. Ranks out of range are not asked; one that says something twice has said the first.
    pub fn hear(&mut self, rank: usize, receipt: Receipt) {
        match receipt {
            Receipt::Failed(reason) => self.fail(format!("rank {rank} could not write its shard: {reason}")),
            Receipt::Durable { layout, .. } if layout != self.layout => {
                self.fail(format!("rank {rank} has other tensors than rank 0"));
            }
            Receipt::Durable { shard, .. } => {
                self.shards[rank].get_or_insert(shard);
            }
        }
    }

    /// What to do; `late` when the deadline has passed.
    pub fn turn(&self, late: bool) -> Turn {
        let missing: Vec<usize> =
            (0..self.shards.len()).filter(|&rank| self.shards[rank].is_none()).collect();
        match &self.failed {
            Some(reason) => Turn::GiveUp(reason.clone()),
            None if missing.is_empty() => Turn::Commit,
            None if late => Turn::GiveUp(too_late(&missing)),
            None => Turn::Wait(missing),
        }
    }

    /// The manifest, once it is time to [commit](Turn::Commit); `None` before.
    pub fn manifest(&self, layout: &Layout, notes: Notes) -> Option<Manifest> {
        let shards = self.shards.iter().copied().collect::<Option<Vec<_>>>()?;
        let committed = self.failed.is_none();
        committed.then(|| Manifest { step: self.step, run: self.run, layout: layout.clone(), shards, notes })
    }

    fn fail(&mut self, reason: String) {
        self.failed.get_or_insert(reason);
    }
}

fn too_late(missing: &[usize]) -> String {
    let named: Vec<String> = missing.iter().take(8).map(usize::to_string).collect();
    let more = if missing.len() > named.len() { ", …" } else { "" };
    format!(
        "no shard of rank {}{more} by the deadline; is the folder one that all hosts share?",
        named.join(", ")
    )
}

#[cfg(test)]
mod tests {
    use super::super::layout::Tensor;
    use super::super::manifest::Sha256;
    use super::*;

    fn layout() -> Layout {
        Layout::of(&[Tensor::new("w", &[2], &[0f32; 2])]).expect("two elements")
    }

    fn durable(layout: &Layout) -> Receipt {
        Receipt::Durable { shard: ShardRecord { bytes: 1, sha256: Sha256::of(b"") }, layout: layout.digest() }
    }

    #[test]
    fn a_manifest_exists_only_when_every_shard_is_durable() {
        let layout = layout();
        let mut publication = Publication::new(5, 1, &layout, 3);
        for (rank, missing) in [(2, vec![0, 1]), (0, vec![1])] {
            publication.hear(rank, durable(&layout));
            assert_eq!(publication.turn(false), Turn::Wait(missing));
            assert_eq!(publication.manifest(&layout, Notes::default()), None);
        }
        publication.hear(1, durable(&layout));
        assert_eq!(publication.turn(true), Turn::Commit, "all are there, so nobody is late");
        assert_eq!(publication.manifest(&layout, Notes::default()).expect("all are there").shards.len(), 3);
    }

    #[test]
    fn a_rank_that_fails_is_late_or_has_another_model_ends_it_and_is_named() {
        let layout = layout();
        let given_up = |receipts: Vec<(usize, Receipt)>, late| {
            let mut publication = Publication::new(5, 1, &layout, 2);
            receipts.into_iter().for_each(|(rank, receipt)| publication.hear(rank, receipt));
            assert_eq!(publication.manifest(&layout, Notes::default()), None);
            match publication.turn(late) {
                Turn::GiveUp(reason) => reason,
                other => panic!("{other:?}"),
            }
        };
        let failed =
            given_up(vec![(1, Receipt::Failed("disk full".to_owned())), (0, durable(&layout))], false);
        assert_eq!(failed, "rank 1 could not write its shard: disk full");
        assert!(given_up(vec![(0, durable(&layout))], true).contains("no shard of rank 1 by the deadline"));
        let other = Layout::of(&[Tensor::new("v", &[2], &[0f32; 2])]).expect("two elements");
        let other = given_up(vec![(0, durable(&layout)), (1, durable(&other))], false);
        assert!(other.contains("rank 1 has other tensors"), "{other}");
    }
}
