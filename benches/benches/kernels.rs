//! The reduction kernels of every level that this CPU has, checked against a scalar sum before each is
//! timed. Bytes per second count every byte read and written: world size + 1 buffers.
//!
//! Buffers of up to 1 MiB are stored through the caches, larger ones past them. `copy` is the roof of what
//! memory gives.

use std::time::Duration;

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, BenchmarkId, Criterion, SamplingMode, Throughput};
use paceline_benches::{Buffer, sum_of};
use paceline_collectives::kernels_for_benches::{Level, Reduction, Stores, copy};
use paceline_collectives::{DType, ReduceOp};

const SIZES: [usize; 4] = [4 << 10, 64 << 10, 1 << 20, 16 << 20];
const DTYPES: [DType; 4] = [DType::F32, DType::BF16, DType::F16, DType::I8];
const WORLDS: [usize; 2] = [2, 4];

/// From where on a result is stored past the caches, which the largest size of the suite is to show.
const STREAMING_BYTES: usize = 4 << 20;

fn main() {
    let mut criterion = Criterion::default()
        .without_plots()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(500))
        .configure_from_args();
    for bytes in SIZES {
        let mut group = criterion.benchmark_group(format!("kernels_{bytes}_bytes"));
        // Not the default, which runs the slowest of the suite 55 times for its ten samples.
        group.sampling_mode(SamplingMode::Flat);
        bench_copy(&mut group, bytes);
        for dtype in DTYPES {
            for world_size in WORLDS {
                for level in Level::available() {
                    bench_sum(&mut group, level, dtype, world_size, bytes);
                }
            }
        }
        group.finish();
    }
    criterion.final_summary();
}

fn bench_copy(group: &mut BenchmarkGroup<'_, WallTime>, bytes: usize) {
    let from = Buffer::new(bytes, |i| i as u8);
    let mut to = Buffer::new(bytes, |_| 0);
    copy(from.bytes(), to.bytes_mut(), stores(bytes));
    assert!(to.bytes() == from.bytes(), "a copy is wrong");

    group.throughput(Throughput::Bytes(2 * bytes as u64));
    group.bench_function("copy", |bencher| {
        bencher.iter(|| copy(from.bytes(), to.bytes_mut(), stores(bytes)));
    });
}

fn bench_sum(
    group: &mut BenchmarkGroup<'_, WallTime>,
    level: Level,
    dtype: DType,
    world_size: usize,
    bytes: usize,
) {
    let (sources, expected) = sum_of(dtype, world_size, bytes);
    let sources: Vec<&[u8]> = sources.iter().map(Buffer::bytes).collect();
    let mut output = Buffer::new(bytes, |_| 0);
    let mut reduction = Reduction::new(level, dtype, ReduceOp::Sum, world_size);
    reduction.reduce(&sources, output.bytes_mut(), stores(bytes));
    assert!(output.bytes() == expected.bytes(), "a sum is wrong");

    group.throughput(Throughput::Bytes((world_size as u64 + 1) * bytes as u64));
    let id = BenchmarkId::new(format!("{dtype}_sum_of_{world_size}"), level.name());
    group.bench_function(id, |bencher| {
        bencher.iter(|| reduction.reduce(&sources, output.bytes_mut(), stores(bytes)));
    });
}

fn stores(bytes: usize) -> Stores {
    if bytes < STREAMING_BYTES { Stores::Cached } else { Stores::Streaming }
}
