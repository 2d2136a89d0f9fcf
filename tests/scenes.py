"""What several files of tests evaluate and search, and how they start processes."""

import contextlib
import json
import os
import signal
import subprocess
import sys

import torch

from gapkern.models import zero_shot_classifier

HANGS = 1200  # seconds after which a process that a test waits for is taken to hang; no bound on how long it works


def unit(x):
    return torch.nn.functional.normalize(x, dim=-1)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def scene():
    """Images (90, 24) of 12 classes around 4 prompts each, a gap away; labels; the prompts (4, 12, 24)."""
    prompts = draw(4, 12, 24, seed=1) + 2 * draw(1, 12, 24, seed=2)
    labels = torch.randint(12, (90,), generator=torch.Generator().manual_seed(3))
    images = prompts.mean(0)[labels] + 2.2 * draw(90, 24, seed=4)
    images[:, 0] += 8
    return images, labels, prompts


def classes(prompts):
    """Class vectors (C, D) of prompts (T, C, D)."""
    return zero_shot_classifier(prompts.transpose(0, 1))


class Batches(list):
    """Batches of a data set of some classes, as CLIP_benchmark reads them."""

    def __init__(self, batches, classes):
        super().__init__(batches)
        self.dataset = type("Dataset", (), {"classes": classes})()


def strict(text):
    """The one JSON document of a text, without NaN and Infinity."""

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def truth(queries, gallery, metric="l2"):
    """All gallery rows by float64 cost, equal ones by number; and the costs."""
    q, g = queries.double(), gallery.double()
    cost = torch.stack([-(g * x).sum(1) if metric == "ip" else (g - x).square().sum(1) for x in q])
    return cost.argsort(dim=1, stable=True), cost


def searched(kind: str, seed: int = 0):
    """Queries (150, 16) and a gallery (600, 16): spread out, on a grid of ties, all equal, or far from 0."""
    torch.manual_seed(seed)
    queries, gallery = torch.randn(150, 16), torch.randn(600, 16)
    if kind == "grid":
        return (queries / 1.5).round(), (gallery / 1.5).round()
    if kind == "equal":
        return queries, gallery[:1].repeat(600, 1)
    if kind == "far":
        return queries + 300, gallery + 300
    return queries, gallery


def cloud(queries=40, gallery=15, dims=32, spread=0.1, noise=0.03, offset=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = spread * torch.randn(gallery, dims, generator=generator)
    y = x[torch.randint(gallery, (queries,), generator=generator)] + noise * torch.randn(
        queries, dims, generator=generator
    )
    y[:, -1] += offset
    return y, x


_FORKS = """
import json, os, sys
import {modules}
from gapkern.cli import main
for line in sys.stdin:
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(main(json.loads(line)))
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Forks:
    """Runs command lines of `gapkern`, each in a process forked from one that has imported `modules` already.

    Within `with`: `start` gives a process's number, `status` waits for its end, `kill` kills it before. What a command
    prints is lost.
    """

    def __init__(self, modules: str, **environment: str):
        command = [sys.executable, "-c", _FORKS.format(modules=modules)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen(command, env=os.environ | environment, **pipes)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._process.stdin.close()
        self._process.kill() if exception[0] else self._process.wait(HANGS)
        self._process.stdout.close()
        self._process.wait(HANGS)

    def start(self, arguments) -> int:
        self._process.stdin.write(json.dumps([str(a) for a in arguments]) + "\n")
        self._process.stdin.flush()
        return self._number()

    def status(self) -> int:
        return self._number()

    def kill(self, process: int) -> bool:
        """Whether it was still running."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
        return self.status() == -signal.SIGKILL

    def _number(self) -> int:
        return int(self._process.stdout.readline())
