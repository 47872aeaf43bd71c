"""TensorFlow's ParameterServerStrategy with a training loop of its own: nothing in here knows who has started it.

Usage: servers.py <folder> [epoch ...]. The chief saves its state after each epoch and goes on from there when it is started
again. Before each of the epochs that are named it says so once, and trains on until there is a file `go.<epoch>`.
"""

import multiprocessing
import os
import sys

# As TensorFlow's guide has it: the coordinator is to hear of lost workers.
os.environ["GRPC_FAIL_FAST"] = "use_caller"

import numpy as np
import tensorflow as tf

EPOCHS, STEPS = 8, 40
folder, holds = sys.argv[1], [int(epoch) for epoch in sys.argv[2:]]
resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()

if resolver.task_type in ("worker", "ps"):
    config = tf.compat.v1.ConfigProto()
    # Fewer threads than this can leave workers waiting for each other.
    config.inter_op_parallelism_threads = max(multiprocessing.cpu_count(), resolver.cluster_spec().num_tasks("worker") + 1)
    server = tf.distribute.Server(
        resolver.cluster_spec(),
        job_name=resolver.task_type,
        task_index=resolver.task_id,
        config=config,
        protocol=resolver.rpc_layer or "grpc",
        start=True,
    )
    print(f"{resolver.task_type} {resolver.task_id} serves as {os.getpid()}")
    server.join()

strategy = tf.distribute.ParameterServerStrategy(resolver)
coordinator = tf.distribute.coordinator.ClusterCoordinator(strategy)
with strategy.scope():
    weights = tf.Variable(tf.zeros([8, 1]))
    epoch = tf.Variable(0, dtype=tf.int64)


def dataset():
    # Each step sees all of it, so that there is one minimum, to which steps lead in whatever order they come, and though some
    # are done twice because a worker was lost.
    random = np.random.default_rng(0)
    inputs = random.normal(size=(128, 8)).astype("float32")
    outputs = inputs.sum(1, keepdims=True) + random.normal(size=(128, 1)).astype("float32")
    return tf.data.Dataset.from_tensors((inputs, outputs)).repeat()


def loss_of(inputs, outputs):
    return tf.reduce_mean((tf.matmul(inputs, weights) - outputs) ** 2)


@tf.function
def step(batches):
    def replica(inputs, outputs):
        with tf.GradientTape() as tape:
            loss = loss_of(inputs, outputs)
        weights.assign_sub(0.1 * tape.gradient(loss, weights))
        return loss

    return strategy.run(replica, args=next(batches))


batches = iter(coordinator.create_per_worker_dataset(tf.function(dataset)))
checkpoint = tf.train.Checkpoint(weights=weights, epoch=epoch)
manager = tf.train.CheckpointManager(checkpoint, os.path.join(folder, "state"), max_to_keep=2)
checkpoint.restore(manager.latest_checkpoint)
print(f"chief begins with epoch {epoch.numpy()} as {os.getpid()}")


def train():
    for _ in range(STEPS):
        coordinator.schedule(step, args=(batches,))
    coordinator.join()


while epoch.numpy() < EPOCHS:
    number = int(epoch.numpy())
    held, go = [os.path.join(folder, f"{what}.{number}") for what in ("held", "go")]
    if number in holds and not os.path.exists(held):
        open(held, "w").close()
        print(f"chief trains on in epoch {number} as {os.getpid()}")
        while not os.path.exists(go):
            train()
    train()
    epoch.assign_add(1)
    manager.save()
print(f"chief has the loss {loss_of(*next(iter(dataset()))).numpy():.9f}")
