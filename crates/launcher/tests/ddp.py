"""PyTorch's own data parallel training over gloo: nothing in here knows which launcher has started it.

Usage: ddp.py <state file>. It saves its state after each step and goes on from there when it is started again.
"""

import os
import sys
import time

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

STEPS = 20
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)
model = DistributedDataParallel(torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

state, first = sys.argv[1], 0
if os.path.exists(state):
    saved = torch.load(state)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    first = saved["step"]

for step in range(first, STEPS):
    restarts = (os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["TORCHELASTIC_MAX_RESTARTS"])
    if step == STEPS // 2 and rank == 3 and restarts == ("0", "2"):
        with open(state + ".victim", "w") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(1000)
    inputs = torch.randn(32, 8, generator=torch.Generator().manual_seed(1000 * step + rank))
    loss = ((model(inputs) - inputs.sum(1, keepdim=True)) ** 2).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if rank == 0:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}, state + ".new")
        os.replace(state + ".new", state)

total = loss.detach().clone()
dist.all_reduce(total)
# One write: ranks share the launcher's standard output, and an unbuffered print() writes the end of the line by itself.
sys.stdout.write(f"rank {rank} of {world} loss {total.item() / world:.9f}\n")
dist.destroy_process_group()
