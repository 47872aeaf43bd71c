//! all_reduce of two ranks in one process, over each transport; every result is checked.

use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput};
use paceline_benches::{Pair, over_mem, over_quic};
use paceline_collectives::{Communicator, ReduceOp};

/// f32 elements: 4 B to 4 MiB.
const LENS: [usize; 4] = [1, 1024, 64 * 1024, 1024 * 1024];

fn main() {
    let mut criterion =
        Criterion::default().sample_size(20).measurement_time(Duration::from_secs(3)).configure_from_args();
    bench(&mut criterion, "mem", over_mem);
    let mut io_threads = Vec::new();
    bench(&mut criterion, "quic", || {
        let (communicators, io) = over_quic();
        io_threads.push(io);
        communicators
    });
    criterion.final_summary();
}

fn bench(criterion: &mut Criterion, transport: &str, mut form: impl FnMut() -> [Communicator; 2]) {
    let mut group = criterion.benchmark_group(format!("all_reduce_f32_avg_2_ranks_{transport}"));
    for len in LENS {
        group.throughput(Throughput::Bytes(4 * len as u64));
        // The average of equal vectors is the vector itself, so any number of rounds keeps it exact.
        let vector: Vec<f32> = (0..len).map(|i| i as f32).collect();
        let mut pair = Pair::new(form(), vector.clone(), |communicator, buffer| {
            communicator.all_reduce(buffer, ReduceOp::Avg)
        });
        group.bench_function(BenchmarkId::from_parameter(4 * len), |bencher| {
            bencher.iter_custom(|count| pair.run(count));
        });
        assert!(*pair.state() == vector, "a result is wrong");
    }
    group.finish();
}
