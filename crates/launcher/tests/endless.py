"""PyTorch's own data parallel training over gloo, until somebody stops it: nothing in here knows its launcher.

Usage: endless.py <folder>. In the folder it keeps its state, and for each rank its process and when that had done its
first step: whoever kills it looks there. It ends when there is a file `stop`.
"""

import os
import sys
import time

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


def write(name, text):
    with open(name + ".new", "w") as file:
        file.write(text)
    os.replace(name + ".new", name)


folder = sys.argv[1]
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
model = DistributedDataParallel(torch.nn.Linear(8, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
state, step, stop = os.path.join(folder, "state"), 0, torch.zeros(1)
if os.path.exists(state):
    saved = torch.load(state)
    model.load_state_dict(saved["model"])
    step = saved["step"]

first = step
while not stop.item():
    inputs = torch.randn(16, 8, generator=torch.Generator().manual_seed(1000 * step + rank))
    loss = ((model(inputs) - inputs.sum(1, keepdim=True)) ** 2).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    step += 1
    if step == first + 1:
        write(os.path.join(folder, f"first.{rank}"), f"{os.getpid()} {time.time()} {first}\n")
    if rank == 0 and step % 10 == 0:
        torch.save({"model": model.state_dict(), "step": step}, state + ".new")
        os.replace(state + ".new", state)
    stop[0] = os.path.exists(os.path.join(folder, "stop"))
    dist.all_reduce(stop, op=dist.ReduceOp.MAX)
    time.sleep(0.02)
print(f"rank {rank} has done {step} steps")
dist.destroy_process_group()
