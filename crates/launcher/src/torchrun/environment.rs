//! The environment that torchrun gives a worker, and the arguments it makes for it. Pure: what is set already comes in.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

use paceline_runtime::nodes::Generation;

use super::{LocalRank, Macros, Settings};
use crate::cli::RunArgs;

/// What a worker is told beside its place among the ranks.
pub struct Worker<'a> {
    /// Its number on this machine.
    pub local_rank: u32,
    /// Which start of the job it is, and where its rank 0 serves the store.
    pub generation: &'a Generation,
    /// Where it may write why it failed; an empty path for nowhere.
    pub error_file: &'a Path,
}

/// torchrun's variables for a worker. `variable` is the launcher's own environment.
pub fn of_worker(
    args: &RunArgs,
    worker: &Worker<'_>,
    variable: impl Fn(&str) -> Option<OsString>,
) -> Vec<(&'static str, OsString)> {
    let Settings { role, run_id, .. } = &args.torchrun;
    let args = &args.within(worker.generation);
    let layout = args.layout();
    let rank = args.first_rank() + worker.local_rank;
    let number = |value: u64| OsString::from(value.to_string());
    // All nodes have the same role, so a rank's number in it is its rank.
    let mut variables = vec![
        ("GROUP_RANK", number(args.node().into())),
        ("GROUP_WORLD_SIZE", number(layout.nodes as u64)),
        ("ROLE_NAME", role.into()),
        ("ROLE_RANK", number(rank.into())),
        ("ROLE_WORLD_SIZE", number(layout.world_size() as u64)),
        ("MASTER_ADDR", (&worker.generation.master_addr).into()),
        ("MASTER_PORT", number(worker.generation.master_port.into())),
        ("TORCHELASTIC_RESTART_COUNT", number(worker.generation.restarts().into())),
        ("TORCHELASTIC_MAX_RESTARTS", number(worker.generation.max_restarts.into())),
        ("TORCHELASTIC_RUN_ID", run_id.into()),
        // Rank 0 serves the store.
        ("TORCHELASTIC_USE_AGENT_STORE", "False".into()),
        ("TORCHELASTIC_SIGNALS_TO_HANDLE", (&args.torchrun.signals.names).into()),
        ("TORCHELASTIC_ERROR_FILE", worker.error_file.into()),
    ];
    if variable("TORCH_NCCL_ASYNC_ERROR_HANDLING").is_none() {
        variables.push(("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1".into()));
    }
    if args.torchrun.local_rank == LocalRank::Virtual {
        variables.push(("LOCAL_RANK", "0".into()));
        variables
            .push(("CUDA_VISIBLE_DEVICES", one_gpu(worker.local_rank, variable("CUDA_VISIBLE_DEVICES"))));
    }
    variables
}

/// The GPU of this rank among those that the launcher may use; none if there are fewer.
fn one_gpu(local_rank: u32, visible: Option<OsString>) -> OsString {
    let Some(visible) = visible else { return local_rank.to_string().into() };
    let of_rank = visible.as_bytes().split(|&byte| byte == b',').nth(local_rank as usize);
    OsString::from_vec(of_rank.unwrap_or_default().trim_ascii().to_vec())
}

/// An argument of the program as this rank gets it.
pub fn argument(argument: &OsStr, macros: Macros, local_rank: u32) -> OsString {
    const MACRO: &str = "${local_rank}";
    match (macros, argument.to_str()) {
        (Macros::Replaced, Some(text)) => text.replace(MACRO, &local_rank.to_string()).into(),
        _ => argument.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_rank_gets_one_of_the_gpus_that_the_launcher_may_use() {
        let gpu = |rank, visible: Option<&str>| one_gpu(rank, visible.map(OsString::from));
        assert_eq!(gpu(2, None), "2");
        assert_eq!([gpu(0, Some("4, 7")), gpu(1, Some("4, 7")), gpu(2, Some("4, 7"))], ["4", "7", ""]);
    }

    #[test]
    fn the_local_rank_stands_where_the_macro_was() {
        let replaced = |text: &str, macros| argument(OsStr::new(text), macros, 3);
        assert_eq!(replaced("--device=${local_rank}/${local_rank}", Macros::Replaced), "--device=3/3");
        assert_eq!(replaced("$local_rank $$", Macros::Replaced), "$local_rank $$");
        assert_eq!(replaced("${local_rank}", Macros::Left), "${local_rank}");
    }
}
