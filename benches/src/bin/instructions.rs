//! What `cargo xtask instructions` has callgrind count: one case per run, named by the argument; without an
//! argument, the names.
//!
//! Two ranks that wait for each other never take the same number of instructions twice. Here one thread does
//! everything, and the other rank of a collective is its mirror image (see [`shm::mirrored`]), which has always
//! come already. So what is counted is the path without any wait.
#![allow(clippy::print_stdout, reason = "the list of names is for xtask")]

use std::hint::black_box;

use paceline_benches::{Buffer, sum_of};
use paceline_collectives::kernels_for_benches::{Level, Reduction, Stores};
use paceline_collectives::{Communicator, Config, DType, ReduceOp};
use paceline_transport::mem::{self, MemTransport};
use paceline_transport::shm;

/// Long enough that what a call costs beside the loop is less than 1 %, short enough to count in a second.
const BYTES: usize = 64 * 1024;

/// Counted calls of a case; xtask divides by it.
const CALLS: u32 = 10;

/// Calls before those that count: all that grows has grown then.
const FIRST_CALLS: u32 = 100;

fn main() {
    let cases = cases();
    match std::env::args().nth(1) {
        None => cases.iter().for_each(|(name, _)| println!("{name}")),
        Some(wanted) => {
            let (_, run) = cases.into_iter().find(|(name, _)| *name == wanted).expect("a case has that name");
            run();
        }
    }
}

type Case = (String, Box<dyn FnOnce()>);

fn cases() -> Vec<Case> {
    let mut cases: Vec<Case> = vec![
        ("all_reduce_4_bytes".to_owned(), Box::new(all_reduce)),
        ("barrier".to_owned(), Box::new(barrier)),
    ];
    // callgrind does not know AVX-512, and shows the program a CPU without it.
    for level in Level::available().into_iter().filter(|level| level.name() != "avx512") {
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            if dtype == DType::F16 && level.name() == "portable" {
                // `half` chooses how it converts by the processor: 9 % fewer on Zen 4 than on Zen 3.
                continue;
            }
            for world_size in [2, 4] {
                let name = format!("{dtype}_sum_of_{world_size}_{}", level.name());
                cases.push((name, Box::new(move || sum(level, dtype, world_size))));
            }
        }
    }
    cases
}

fn sum(level: Level, dtype: DType, world_size: usize) {
    let (sources, expected) = sum_of(dtype, world_size, BYTES);
    let sources: Vec<&[u8]> = sources.iter().map(Buffer::bytes).collect();
    let mut output = Buffer::new(BYTES, |_| 0);
    let mut reduction = Reduction::new(level, dtype, ReduceOp::Sum, world_size);
    let mut reduce = || reduction.reduce(&sources, output.bytes_mut(), Stores::Cached);
    (0..CALLS).for_each(|_| counted_call(&mut reduce));
    assert!(output.bytes() == expected.bytes(), "a sum is wrong");
}

fn all_reduce() {
    let (mut communicator, _others) = mirrored();
    let mut sum = [1.0f32];
    let mut all_reduce = || communicator.all_reduce(&mut sum, ReduceOp::Sum).expect("a mirror image agrees");
    // The sum doubles with every call, exactly: f32 goes up to 2^127.
    (0..FIRST_CALLS).for_each(|_| all_reduce());
    (0..CALLS).for_each(|_| counted_call(&mut all_reduce));
    assert_eq!(sum, [2f32.powi((FIRST_CALLS + CALLS) as i32)], "a sum is wrong");
}

fn barrier() {
    let (mut communicator, _others) = mirrored();
    let mut barrier = || communicator.barrier().expect("a mirror image comes");
    (0..FIRST_CALLS).for_each(|_| barrier());
    (0..CALLS).for_each(|_| counted_call(&mut barrier));
}

/// Rank 0 of two, and the links of the other, which must outlive it.
fn mirrored() -> (Communicator, Vec<MemTransport>) {
    let mut group = mem::group(2, 1, mem::DEFAULT_WINDOW_BYTES);
    let links = shm::mirrored(Box::new(group.remove(0))).expect("a segment can be mapped");
    (Communicator::new(links, Config::default()).expect("the defaults are right"), group)
}

/// What callgrind counts: it is told this function's name, which therefore is in no other symbol.
#[inline(never)]
fn counted_call(call: &mut dyn FnMut()) {
    call();
    // Nothing comes after it in the source, but a call in the last place is compiled to a jump.
    black_box(());
}
