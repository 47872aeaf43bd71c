"""A training of torchft's that goes on when a replica is lost: all-reduces 25 MiB and applies the result, and says when.

With a number it starts a lighthouse and as many replicas, each a process, and waits for these. Not called torchft, which is
the module that it imports."""

import datetime
import os
import subprocess
import sys
import time

LIGHTHOUSE = "TORCHFT_LIGHTHOUSE"
ELEMENTS = 25 * 1024 * 1024 // 4


def job(replicas):
    words = [sys.executable, __file__]
    lighthouse = subprocess.Popen([*words, "lighthouse"], stdout=subprocess.PIPE, text=True)
    port = lighthouse.stdout.readline().strip()
    environment = {**os.environ, LIGHTHOUSE: f"http://127.0.0.1:{port}", "OMP_NUM_THREADS": "1"}
    children = [subprocess.Popen([*words, "replica", str(number)], env=environment) for number in range(replicas)]
    print(f"lighthouse pid {lighthouse.pid}", flush=True)
    # One that a fault has killed is no failure.
    if any(child.wait() > 0 for child in children):
        sys.exit("a replica has failed")


def lighthouse():
    from torchft.coordination import LighthouseServer

    server = LighthouseServer(bind="127.0.0.1:0", min_replicas=2)
    print(server.address().rsplit(":", 1)[1], flush=True)
    while True:
        time.sleep(3600)


def replica(number):
    import torch
    import torch.distributed as dist
    from torchft.manager import Manager
    from torchft.process_group import ProcessGroupGloo

    gradient, state = torch.ones(ELEMENTS), {"weights": torch.zeros(ELEMENTS)}
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    # torchft's own deadlines: 60 s for operations, 5 s for heartbeats.
    manager = Manager(
        pg=ProcessGroupGloo(timeout=datetime.timedelta(seconds=60)),
        load_state_dict=state.update,
        state_dict=lambda: dict(state),
        min_replica_size=2,
        replica_id=f"replica_{number}_",
        store_addr="127.0.0.1",
        store_port=store.port,
        rank=0,
        world_size=1,
    )
    while True:
        manager.start_quorum()
        gradient.fill_(1.0)
        manager.allreduce(gradient).wait()
        if manager.should_commit():
            state["weights"] += gradient
            at = time.time_ns() // 1000
            step = manager.current_step()
            print(f"applied {step} attempt 0 rank {number} pid {os.getpid()} at {at}", flush=True)


match sys.argv[1:]:
    case ["lighthouse"]:
        lighthouse()
    case ["replica", number]:
        replica(int(number))
    case [replicas]:
        job(int(replicas))
