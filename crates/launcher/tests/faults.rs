//! Ranks that die, disagree or stay away, as real processes under the launcher.

#![allow(clippy::print_stderr, reason = "ranks talk to the test by their output")]

mod job;

use std::process::Command;
use std::time::Duration;

use job::{Finished, Job, now_us, trial};
use paceline_runtime::World;
use paceline_runtime::collectives::{Config, Error, ReduceOp};
use paceline_runtime::env::{self, JobEnv};
use paceline_transport::Fabric;
use paceline_transport::shm::Sharing;

/// 64 MiB of f32: killing a rank hits the middle of an operation.
const LARGE: usize = 16 * 1024 * 1024;

/// The contract: every other rank knows within this time.
const AT_ONCE_US: u128 = 1_000_000;

fn main() {
    job::main(rank, || {
        vec![
            trial("sigkill_in_a_large_all_reduce_is_peer_lost_on_every_other_rank_within_1_s", killed),
            trial("a_rank_that_panics_is_the_cause_and_the_others_name_it", panicked),
            trial("a_rank_that_exits_with_0_without_leaving_is_lost", exited),
            trial("another_collective_is_a_mismatch_on_every_rank_within_1_s", mismatched),
            trial("a_rank_that_never_calls_is_named_by_the_others", absent),
            trial("a_rank_that_does_not_come_is_named_at_the_rendezvous", missing),
            trial("ranks_that_want_different_links_are_told_where_they_meet", discordant),
            trial("a_rank_that_dies_before_all_have_met_ends_the_wait_of_the_others", died_early),
            trial("sigterm_to_the_launcher_ends_ranks_in_the_middle_of_an_operation", stopped),
        ]
    });
}

fn killed() {
    let mut job = Job::start(4, &[], "loop", &[]);
    let pids = job.wait_for("looping", 4);
    let victim = pids.iter().find(|line| line.contains("rank 2 ")).expect("each rank says its number");
    let pid = victim.rsplit(' ').next().expect("the line ends with the pid");
    let before = now_us();
    assert!(Command::new("kill").args(["-9", pid]).status().expect("kill runs").success());
    let finished = job.finish();
    assert_eq!(finished.status.code(), Some(128 + 9), "{}", finished.lines.join("\n"));
    let report = finished.report();
    assert!(report.starts_with(&format!("rank 2 (pid {pid}) was killed by signal 9 (SIGKILL)")), "{report}");
    assert_failed(&finished, 3, "lost rank 2 in all_reduce #", before);
}

/// `count` ranks have printed an error with `text`, each within a second after `since_us`.
fn assert_failed(finished: &Finished, count: usize, text: &str, since_us: u128) {
    let errors = finished.lines_with("failed at ");
    assert_eq!(errors.len(), count, "{}", finished.lines.join("\n"));
    for line in errors {
        assert!(line.contains(text), "no `{text}` in: {line}");
        let at = line.split("failed at ").nth(1).and_then(|rest| rest.split(' ').next());
        let at: u128 = at.and_then(|at| at.parse().ok()).expect("the line has the time");
        // A rank may know before the last of those that disagree has called.
        let elapsed_us = at.saturating_sub(since_us);
        assert!(elapsed_us < AT_ONCE_US, "after {elapsed_us} us: {line}");
    }
}

fn panicked() {
    let finished = Job::start(4, &[], "panic", &[]).finish();
    assert_eq!(finished.status.code(), Some(101), "{}", finished.lines.join("\n"));
    assert!(finished.report().starts_with("rank 1 "), "{}", finished.lines.join("\n"));
    assert!(
        finished.lines.iter().any(|line| line.contains("    the answer is wrong")),
        "the last lines of stderr"
    );
    let errors = finished.lines_with("failed at ");
    assert_eq!(errors.len(), 3, "{}", finished.lines.join("\n"));
    assert!(errors.iter().all(|line| line.contains("lost rank 1 in barrier")), "{errors:?}");
}

fn exited() {
    let finished = Job::start(3, &[], "exit", &[]).finish();
    let errors = finished.lines_with("failed at ");
    assert_eq!(errors.len(), 2, "{}", finished.lines.join("\n"));
    assert!(errors.iter().all(|line| line.contains("lost rank 1 in barrier")), "{errors:?}");
}

fn mismatched() {
    let finished = Job::start(4, &[], "mismatch", &[]).finish();
    let calls: Vec<u128> = finished
        .lines_with("calling at ")
        .iter()
        .map(|line| {
            line.rsplit(' ').next().and_then(|at| at.parse().ok()).expect("the line ends with the time")
        })
        .collect();
    let last_call = calls.into_iter().max().expect("four ranks call");
    assert_failed(&finished, 4, "mismatched calls: ", last_call);
    for line in finished.lines_with("failed at ") {
        assert!(line.contains("called broadcast #1") && line.contains("called all_reduce #1"), "{line}");
    }
}

fn absent() {
    let finished = Job::start(4, &["--timeout", "0.5"], "absent", &[]).finish();
    let errors = finished.lines_with("failed at ");
    assert_eq!(errors.len(), 3, "{}", finished.lines.join("\n"));
    assert!(errors.iter().all(|line| line.contains("waiting for rank 3")), "{errors:?}");
}

fn missing() {
    let finished = Job::start(3, &["--rdzv-timeout", "1"], "missing", &[]).finish();
    let errors = finished.lines_with("failed at ");
    assert_eq!(errors.len(), 2, "{}", finished.lines.join("\n"));
    assert!(errors.iter().all(|line| line.contains("timed out waiting for rank 2")), "{errors:?}");
}

fn died_early() {
    let finished = Job::start(3, &["--rdzv-timeout", "60"], "died-early", &[]).finish();
    let errors = finished.lines_with("failed at ");
    assert_eq!(errors.len(), 2, "{}", finished.lines.join("\n"));
    let expected = "rank 2 exited with code 7 before all ranks had met";
    assert!(errors.iter().all(|line| line.contains(expected)), "{errors:?}");
    assert_eq!(finished.status.code(), Some(7));
    assert!(finished.report().starts_with("rank 2 "), "{}", finished.report());
}

fn discordant() {
    let finished = Job::start(2, &["--fabric", "tls"], "discordant", &[]).finish();
    let errors = finished.lines_with("failed at ");
    assert_eq!(errors.len(), 2, "{}", finished.lines.join("\n"));
    let told = |line: &&str| line.contains("the same --fabric or PACELINE_FABRIC");
    let reason = errors.iter().find(|line| told(line)).expect("one of them is refused");
    assert!(reason.contains("`tls`") && reason.contains("`quic`"), "{reason}");
}

fn stopped() {
    let mut job = Job::start(2, &["--grace", "1"], "loop", &[]);
    job.wait_for("looping", 2);
    let pid = job.launcher.id().to_string();
    assert!(Command::new("kill").args(["-TERM", &pid]).status().expect("kill runs").success());
    let finished = job.finish();
    assert_eq!(finished.status.code(), Some(128 + 15), "{}", finished.lines.join("\n"));
}

fn rank(part: &str, _: &[String]) {
    let number: usize = std::env::var("RANK").ok().and_then(|rank| rank.parse().ok()).expect("a rank");
    if (part, number) == ("died-early", 2) {
        std::process::exit(7);
    }
    if (part, number) == ("missing", 2) {
        // Comes to nothing until the others have given up.
        std::thread::sleep(Duration::from_secs(5));
        return;
    }
    if let Err(error) = play(part) {
        eprintln!("rank {number} failed at {} with: {error}", now_us());
        std::process::exit(1);
    }
}

fn play(part: &str) -> Result<(), paceline_runtime::Error> {
    let mut world = if part == "discordant" { join_discordantly()? } else { World::join()? };
    let rank = world.rank();
    if matches!(part, "panic" | "exit") {
        // A rank that dies while others still make their links ends that wait, not a barrier.
        world.communicator().barrier()?;
    }
    match (part, rank) {
        ("loop", _) => looping(&mut world)?,
        ("panic", 1) => panic!("the answer is wrong"),
        ("exit", 1) => std::process::exit(0),
        ("panic" | "exit", _) => world.communicator().barrier()?,
        ("mismatch", _) => {
            eprintln!("rank {rank} calling at {}", now_us());
            let mut buffer = vec![1.0f32; 100_000];
            match rank {
                1 => world.communicator().broadcast(&mut buffer, 0)?,
                _ => world.communicator().all_reduce(&mut buffer, ReduceOp::Sum)?,
            }
        }
        // Long enough to be missed; the launcher ends it.
        ("absent", 3) => std::thread::sleep(Duration::from_secs(5)),
        ("absent", _) => world.communicator().all_reduce(&mut [1.0f32; 2], ReduceOp::Sum)?,
        _ => panic!("no such part: {part}"),
    }
    world.leave()
}

/// Rank 1 wants other links than its launcher says.
fn join_discordantly() -> Result<World, paceline_runtime::Error> {
    let env = JobEnv::from_vars(env::process)?.expect("there is a launcher");
    let fabric = if env.rank == 1 { Fabric::Quic } else { env::fabric(env::process)? };
    World::join_job(&env, Config::default(), Sharing::Auto, fabric)
}

fn looping(world: &mut World) -> Result<(), Error> {
    let rank = world.rank();
    let mut buffer = vec![0.0f32; LARGE];
    for round in 0.. {
        world.communicator().all_reduce(&mut buffer, ReduceOp::Sum)?;
        if round == 0 {
            eprintln!("rank {rank} looping as {}", std::process::id());
        }
    }
    Ok(())
}
