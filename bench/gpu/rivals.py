"""What the fused losses are compared with: plain PyTorch, and other packages where they import."""

import functools
import importlib
from collections.abc import Callable, Iterator

import torch

from bench.gpu.checks import EAGER, SCALE, check_large, check_large_sigmoid, each, gradients, pair
from bench.harness import Case, Contender
from gapkern import contrastive_loss, sigmoid_loss


def eager(x, y, scale):
    logits = scale * (x @ y.T).float()
    labels = torch.arange(len(x), device=x.device)
    return (torch.nn.functional.cross_entropy(logits, labels) + torch.nn.functional.cross_entropy(logits.T, labels)) / 2


def eager_sigmoid(x, y, scale, bias):
    logits = (scale * (x @ y.T) + bias).float()
    signs = 2 * torch.eye(len(x), device=x.device) - 1
    return -torch.nn.functional.logsigmoid(signs * logits).sum() / len(x)


def sigmoid_of_open_clip(*inputs):
    return importlib.import_module("open_clip.loss").SigLipLoss()(*inputs)


def others(compiled: bool) -> Iterator[tuple[str, Callable]]:
    """Softmax losses by name; `compiled`: PyTorch's through Inductor too."""
    yield EAGER, eager
    if compiled:
        yield "torch.compile", torch.compile(eager)
    for name in ("open_clip", "inf_cl"):
        try:
            module = importlib.import_module(name)
        except ImportError:
            print(f"{name} is not installed: left out", flush=True)
            continue
        if name == "open_clip":
            yield name, module.ClipLoss()
        else:  # cal_inf_loss(q, k, labels=None, scale=None, head_dim=256): one direction's mean
            yield name, lambda x, y, s, m=module: (m.cal_inf_loss(x, y, scale=s) + m.cal_inf_loss(y, x, scale=s)) / 2


def _of_memeff(x, y, scale):
    # Its temperature is a number of its own, the gradient by it not among its results.
    loss = importlib.import_module("memeff").MemoryEfficientCLIPLoss(1 / SCALE, normalized_inputs=True, stable=False)
    return loss(x, y)


def _of_siglip_kernel(x, y, scale, bias):
    return importlib.import_module("siglip_kernel").fused_siglip_loss(x, y, scale.log(), bias)


def fused(device: str, quick: bool) -> Iterator[Case]:
    """The published fused losses, from their wheels where they import."""
    n, d = (64, 32) if quick else (65536, 768)
    inputs = pair(n, d, device, torch.bfloat16)
    contenders = [
        Contender("memeff", gradients(_of_memeff, inputs), "baseline"),
        Contender("gapkern, recompute", gradients(functools.partial(contrastive_loss, memory="recompute"), inputs)),
    ]
    about = {"operation": "softmax", "N": n, "D": d, "dtype": "bfloat16"}
    yield Case(
        {**about, "operations": 8 * n * n * d},
        contenders,
        lambda results: each(results, check_large, inputs),
        "memeff",
    )
    pairs = [*inputs[:2], *(torch.tensor(v, device=device) for v in (10.0, -10.0))]
    contenders = [
        Contender("siglip-kernel", gradients(_of_siglip_kernel, pairs), "baseline"),
        Contender("gapkern", gradients(sigmoid_loss, pairs)),
    ]
    about["operation"] = "sigmoid"
    yield Case(
        {**about, "operations": 6 * n * n * d},
        contenders,
        lambda results: each(results, check_large_sigmoid, pairs),
        "siglip-kernel",
    )
