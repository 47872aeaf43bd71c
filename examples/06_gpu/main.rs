//! Data-parallel training on GPUs: what `TchDeviceParallel` and a group of devices do. Without a GPU the same program trains
//! on the CPU, through the host. `cargo xtask torch-env` prints what building it needs.
//!
//! `paceline run -n 2 -- target/release/examples/06_gpu`
#![allow(clippy::print_stdout, reason = "an example talks to its terminal")]

use anyhow::{Result, ensure};
use paceline_runtime::World;
use paceline_runtime::collectives::ReduceOp;
use paceline_runtime::data_parallel::Config;
use paceline_runtime::tch::{TchDevice, TchDeviceParallel};
use tch::nn::{self, Module, OptimizerConfig};
use tch::{Kind, Tensor};

const STEPS: usize = 100;
const BATCH: i64 = 64;

fn main() -> Result<()> {
    tracing_subscriber::fmt().with_max_level(tracing_subscriber::filter::LevelFilter::WARN).init();
    let mut world = World::join()?;
    // Before anything else asks libtorch about CUDA.
    let device = TchDevice::new(&world);
    let mut group = world.device_group(device.accelerator())?;
    if world.rank() == 0 {
        println!("{} ranks on {}; {}", world.world_size(), device.accelerator().name(), group.agreement());
    }

    // Every rank has other samples of one function, and begins with the parameters of rank 0.
    tch::manual_seed(world.rank() as i64);
    let store = nn::VarStore::new(device.device());
    let model = nn::seq()
        .add(nn::linear(store.root() / "hidden", 8, 32, nn::LinearConfig::default()))
        .add_fn(|hidden| hidden.tanh())
        .add(nn::linear(store.root() / "out", 32, 1, nn::LinearConfig::default()));
    let mut optimizer = nn::Adam::default().build(&store, 1e-2)?;
    let mut parallel = TchDeviceParallel::from_var_store(&store, &device, Config::default())?;
    parallel.broadcast_parameters(&mut group, &device, 0)?;

    let mut losses = Vec::new();
    for _ in 0..STEPS {
        let inputs = Tensor::randn([BATCH, 8], (Kind::Float, device.device()));
        let targets = (&inputs * &inputs).sum_dim_intlist(1, true, Kind::Float).sqrt();
        let loss = model.forward(&inputs).mse_loss(&targets, tch::Reduction::Mean);
        optimizer.zero_grad();
        parallel.backward(&mut group, &device, &loss)?;
        optimizer.step();
        losses.push(loss.double_value(&[]));
    }

    // Replicas that began equal and took equal steps are equal: the sum of squares has the same bits on all ranks.
    let norm: f64 = store
        .trainable_variables()
        .iter()
        .map(|tensor| tensor.square().sum(Kind::Double).double_value(&[]))
        .sum();
    let mut extremes = [norm, -norm];
    world.communicator().all_reduce(&mut extremes, ReduceOp::Max)?;
    ensure!(extremes[0] == -extremes[1], "the replicas differ");
    ensure!(losses[STEPS - 1] < losses[0] / 2.0, "nothing was learnt: {losses:?}");
    if world.rank() == 0 {
        println!(
            "loss {:.4} at the first step, {:.4} at the last; all replicas are equal",
            losses[0],
            losses[STEPS - 1]
        );
    }
    group.leave()?;
    Ok(world.leave()?)
}
