"""TensorFlow's MultiWorkerMirroredStrategy with a training loop of its own: nothing in here knows who has started it.

Usage: workers.py <folder> [hold]. It saves its state after each step and goes on from there when it is started again. With
`hold`, worker 1 stops once in the middle, says so, and waits to be killed.
"""

import os
import shutil
import sys
import time

import numpy as np
import tensorflow as tf

STEPS = 12
folder, holds = sys.argv[1], sys.argv[2:] == ["hold"]

strategy = tf.distribute.MultiWorkerMirroredStrategy()
task = strategy.cluster_resolver.task_id


def variable(values):
    # In a replica, what is assigned is the mean of what all replicas assign.
    return tf.Variable(values, aggregation=tf.VariableAggregation.MEAN)


with strategy.scope():
    random = np.random.default_rng(0)
    first = variable(random.normal(0, 0.3, (8, 16)).astype("float32"))
    second = variable(random.normal(0, 0.3, (16, 1)).astype("float32"))
    step = tf.Variable(0, dtype=tf.int64, aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA)


@tf.function
def train(inputs):
    def replica(inputs):
        with tf.GradientTape() as tape:
            outputs = tf.matmul(tf.tanh(tf.matmul(inputs, first)), second)
            loss = tf.reduce_mean((outputs - tf.reduce_sum(inputs, 1, keepdims=True)) ** 2)
        for weights, gradient in zip([first, second], tape.gradient(loss, [first, second])):
            weights.assign_sub(0.05 * gradient)
        return loss

    return strategy.reduce(tf.distribute.ReduceOp.MEAN, strategy.run(replica, args=(inputs,)), axis=None)


# As TensorFlow's guide has it: all workers save, and what the first one has saved counts.
checkpoint = tf.train.Checkpoint(first=first, second=second, step=step)
own = os.path.join(folder, "state" if task == 0 else f"state-of-{task}")
manager = tf.train.CheckpointManager(checkpoint, own, max_to_keep=2)
checkpoint.restore(tf.train.latest_checkpoint(os.path.join(folder, "state")))
print(f"worker {task} begins with step {step.numpy()} as {os.getpid()}")

held = os.path.join(folder, "held")
while step.numpy() < STEPS:
    number = int(step.numpy())
    if holds and task == 1 and number == STEPS // 2 and not os.path.exists(held):
        open(held, "w").close()
        print(f"worker {task} holds as {os.getpid()}")
        time.sleep(1000)
    inputs = np.random.default_rng([number, task]).normal(size=(32, 8)).astype("float32")
    loss = train(tf.constant(inputs))
    step.assign_add(1)
    manager.save()
if task != 0:
    shutil.rmtree(own)
print(f"worker {task} has the loss {loss.numpy():.9f}")
