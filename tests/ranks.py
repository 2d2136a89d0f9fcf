"""Processes that form a group: every job runs on every rank, over gloo on the loopback interface."""

import os
import socket
import traceback

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.scenes import HANGS


def _worker(rank, world, port, jobs, queue):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    name = ""
    try:
        for job in jobs:
            name = job.__name__
            job(rank, world)
            queue.put((name, rank, None))
    except BaseException:
        queue.put((name, rank, traceback.format_exc()))
    finally:
        dist.destroy_process_group()


def together(world, *jobs):
    """Runs the functions `jobs` (rank, world) one after the other on `world` ranks; fails with a rank's traceback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["gapkern", "pytest", "torch._dynamo", "torch.distributed"])
    queue = context.Queue()
    ranks = [context.Process(target=_worker, args=(rank, world, port, jobs, queue)) for rank in range(world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=HANGS)
        if process.is_alive():
            for other in ranks:
                other.kill()
            pytest.fail("a rank hangs")
    reports = []
    while not queue.empty():
        reports.append(queue.get(timeout=5))
    failures = [f"rank {rank}, {name}:\n{trace}" for name, rank, trace in reports if trace]
    assert not failures, "\n".join(failures)
    assert sorted((name, rank) for name, rank, _ in reports) == sorted(
        (job.__name__, rank) for job in jobs for rank in range(world)
    )
