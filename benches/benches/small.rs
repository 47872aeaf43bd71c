//! What two ranks that share memory do with short messages; every result is checked.

use std::time::Duration;

use criterion::{Criterion, Throughput};
use paceline_benches::{Pair, over_shm};
use paceline_collectives::{Communicator, Error, ReduceOp};

/// f32 elements: 4 B, 4 KiB and 64 KiB.
const LENS: [usize; 3] = [1, 1024, 16 * 1024];

/// f32 elements of each rank: 4 KiB.
const GATHERED_LEN: usize = 1024;

/// One rank's buffers.
#[derive(Clone)]
struct Buffers {
    input: Vec<f32>,
    output: Vec<f32>,
}

fn main() {
    let mut criterion = Criterion::default()
        .without_plots()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(1))
        .configure_from_args();
    let ramp = |len: usize| (0..len).map(|i| i as f32).collect::<Vec<f32>>();
    let buffers =
        |input: &[f32], output_len| Buffers { input: input.to_vec(), output: vec![-1.0; output_len] };

    bench(&mut criterion, "barrier", buffers(&[], 0), &[], |communicator, _| communicator.barrier());
    for len in LENS {
        let (input, name) = (ramp(len), format!("all_reduce_{}_bytes", 4 * len));
        let sum: Vec<f32> = input.iter().map(|element| 2.0 * element).collect();
        bench(
            &mut criterion,
            &name,
            buffers(&input, len),
            &sum,
            |communicator, Buffers { input, output }| {
                communicator.all_reduce_into(input, output, ReduceOp::Sum)
            },
        );
    }
    for len in LENS {
        let (input, name) = (ramp(len), format!("broadcast_{}_bytes", 4 * len));
        // From the other rank, so that what arrives is checked: rank 0 forgets what it had.
        bench(
            &mut criterion,
            &name,
            buffers(&input, len),
            &input,
            |communicator, Buffers { input, output }| {
                let buffer = if communicator.rank() == 1 { input } else { output };
                communicator.broadcast(buffer, 1)
            },
        );
    }
    let input = ramp(GATHERED_LEN);
    let both = [input.as_slice(), &input].concat();
    let name = format!("all_gather_{}_bytes", 4 * GATHERED_LEN);
    bench(&mut criterion, &name, buffers(&input, both.len()), &both, |communicator, buffers| {
        communicator.all_gather(&buffers.input, &mut buffers.output)
    });
    bench(&mut criterion, "round_trip_8_bytes", buffers(&[1.0, 2.0], 2), &[1.0, 2.0], round_trip);
    criterion.final_summary();
}

fn round_trip(communicator: &mut Communicator, Buffers { input, output }: &mut Buffers) -> Result<(), Error> {
    if communicator.rank() == 0 {
        communicator.send(input, 1)?;
        communicator.recv(output, 1)
    } else {
        communicator.recv(output, 0)?;
        communicator.send(output, 0)
    }
}

/// Times `operation` once rank 0 has got `expected` from it.
fn bench(
    criterion: &mut Criterion,
    name: &str,
    buffers: Buffers,
    expected: &[f32],
    operation: fn(&mut Communicator, &mut Buffers) -> Result<(), Error>,
) {
    let bytes = 4 * buffers.input.len() as u64;
    let mut pair = Pair::new(over_shm(), buffers, operation);
    pair.run(1);
    assert!(pair.state().output == expected, "a result is wrong");

    let mut group = criterion.benchmark_group("small_2_ranks_shm");
    if bytes > 0 {
        group.throughput(Throughput::Bytes(bytes));
    }
    group.bench_function(name, |bencher| bencher.iter_custom(|count| pair.run(count)));
    group.finish();
    assert!(pair.state().output == expected, "a result is wrong");
}
