"""Large work space is found again by the next step, never shared by two results, and bounded in all."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from gapkern import contrastive_loss

linux = pytest.mark.skipif(sys.platform != "linux", reason="page faults and /proc are Linux's")

_SETUP = """
import resource, torch, gapkern

x = torch.nn.functional.normalize(torch.randn(5184, 64), dim=1)

def forward(n):
    return torch.ops.gapkern.contrastive_lse(x[:n], x[:n], torch.tensor(20.0), "dot", 0, "highest", 4 * n * n)

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def resident():
    with open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith("VmRSS")).split()[1]) / 1024
forward(1024)
"""


def printed(code: str) -> list[float]:
    done = subprocess.run([sys.executable, "-c", _SETUP + code], capture_output=True, text=True, check=True)
    return [float(v) for v in done.stdout.split()]


def pairs(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(n, 64, generator=generator) for _ in range(2))
    return x.requires_grad_(), y.requires_grad_()


@linux
def test_the_next_step_finds_the_memory_of_the_kept_logits():
    first, then, moved = printed("""
counts, places = [], []
for _ in range(2):
    before = faults()
    result = forward(4096)
    counts.append(faults() - before)
    places.append(result[5].data_ptr())
    del result
print(*counts, places[1] - places[0])
""")
    assert moved == 0
    assert first > 32  # of 2 MiB each, at least
    assert then < 32


@linux
def test_what_is_held_is_at_most_half_again_what_was_in_use():
    (held,) = printed("""
before = resident()
for n in (1024, 1536, 2304, 3456, 5184):
    forward(n)
print(resident() - before)
""")
    logits = 5184**2 * 4 / 2**20
    assert held < 1.5 * (logits + 8)


def test_results_that_live_do_not_share_memory():
    x, y = pairs(1500, 0)
    loss = contrastive_loss(x, y, 20.0, memory="keep")
    first = torch.autograd.grad(loss, (x, y), retain_graph=True)
    kept = [g.clone() for g in first]
    for seed in (1, 2):
        other = pairs(1500, seed)
        torch.autograd.grad(contrastive_loss(*other, 20.0, memory="keep"), other)
    again = torch.autograd.grad(loss, (x, y))
    for a, b, c in zip(first, kept, again, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(b, c)


def test_threads_that_step_at_once_get_what_each_would_alone():
    def step(seed):
        inputs = pairs(1200, seed)
        return torch.autograd.grad(contrastive_loss(*inputs, 20.0, memory="keep"), inputs)

    expected = [step(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(step, [0, 1, 2, 3] * 3))
    for i, gradients in enumerate(found):
        assert all(torch.equal(a, b) for a, b in zip(gradients, expected[i % 4], strict=True))
