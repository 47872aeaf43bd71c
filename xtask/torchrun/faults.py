"""A training that torchrun restarts: all-reduces 25 MiB and applies the result, and says when.

It ends by itself some steps after a restart."""

import os
import time

import torch
import torch.distributed as dist

ELEMENTS = 25 * 1024 * 1024 // 4

dist.init_process_group("gloo")
attempt, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), dist.get_rank()
gradient, weights = torch.ones(ELEMENTS), torch.zeros(ELEMENTS)
step = 0
while attempt == 0 or step < 5:
    dist.all_reduce(gradient)
    gradient /= dist.get_world_size()
    weights += gradient
    step += 1
    at = time.time_ns() // 1000
    print(f"applied {step} attempt {attempt} rank {rank} pid {os.getpid()} at {at}", flush=True)
dist.barrier()
