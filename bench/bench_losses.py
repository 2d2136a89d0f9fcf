"""The losses of docs/losses.md against what a user would take instead: a library's loss, or plain PyTorch's matrices.

Time of a training step, forward and backward, and its peak memory. All give the same values and gradients.
"""

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from bench import harness
from bench.harness import Case, Contender
from gapkern import losses
from gapkern.reference import losses as plain
from gapkern.testing import peak_memory

DIMS = 512
SIZES = {"quick": 1024, "full": 4096, "avx2": 4096}
MEMORY = {"quick": 4096, "full": 16384}
FOUR = ("q-d", "d-q", "q-q", "d-d")
THEIR_FOUR = ("query_to_doc", "doc_to_query", "query_to_query", "doc_to_doc")
PREFIXES = (512, 256, 128, 64, 32)

unit = partial(normalize, dim=-1)
Call = Callable[[], Tensor]


class Batch:
    """N pairs as an encoder gives them, and what losses take beside them."""

    def __init__(self, n: int, d: int = DIMS):
        draw = torch.Generator().manual_seed(0)
        x = torch.randn(n, d, generator=draw)
        y = torch.randn(n, d, generator=draw) + 0.5 * x
        self.x, self.y = (unit(t).requires_grad_() for t in (x, y))
        self.hard = unit(torch.randn(n, d, generator=draw)).requires_grad_()
        self.guides = [unit(torch.randn(n, 64, generator=draw)) for _ in range(2)]
        self.classes = torch.arange(n) % 64
        self.ids = torch.arange(n) // 2


def _ranking(**options: Any) -> Any:
    from sentence_transformers.sentence_transformer.losses.multiple_negatives_ranking import (
        MultipleNegativesRankingLoss,
    )

    return MultipleNegativesRankingLoss(torch.nn.Identity(), **options)


def _both_ways(x: Tensor, y: Tensor, smoothing: float) -> Tensor:
    logits, labels = 10.0 * x @ y.T, torch.arange(len(x))
    return sum(cross_entropy(s, labels, label_smoothing=smoothing) for s in (logits, logits.T)) / 2  # type: ignore


def _clip(b: Batch) -> dict[str, Call]:
    from open_clip import ClipLoss

    return {"open_clip": lambda: ClipLoss()(b.x, b.y, 10.0), "gapkern": lambda: losses.contrastive_loss(b.x, b.y, 10.0)}


def _clip_ids(b: Batch) -> dict[str, Call]:
    return {
        "plain PyTorch": lambda: plain.contrastive_loss(b.x, b.y, 10.0, ids=b.ids),
        "gapkern": lambda: losses.contrastive_loss(b.x, b.y, 10.0, ids=b.ids),
    }


def _clip_smoothed(b: Batch) -> dict[str, Call]:
    return {
        "plain PyTorch": lambda: _both_ways(b.x, b.y, 0.1),
        "gapkern": lambda: losses.contrastive_loss(b.x, b.y, 10.0, label_smoothing=0.1),
    }


def _siglip(b: Batch) -> dict[str, Call]:
    from open_clip.loss import SigLipLoss

    return {
        "open_clip": lambda: SigLipLoss()(b.x, b.y, 10.0, -5.0),
        "gapkern": lambda: losses.sigmoid_loss(b.x, b.y, 10.0, -5.0),
    }


def _siglip_ids(b: Batch) -> dict[str, Call]:
    return {
        "plain PyTorch": lambda: plain.sigmoid_loss(b.x, b.y, 10.0, -5.0, ids=b.ids, positives="mean"),
        "gapkern": lambda: losses.sigmoid_loss(b.x, b.y, 10.0, -5.0, ids=b.ids, positives="mean"),
    }


def _info_nce(b: Batch) -> dict[str, Call]:
    theirs = _ranking()
    return {
        "sentence-transformers": lambda: theirs.compute_loss_from_embeddings([b.x, b.y], None),
        "gapkern": lambda: losses.info_nce_loss(unit(b.x), unit(b.y), 20.0),
    }


def _info_nce_hard(b: Batch) -> dict[str, Call]:
    theirs = _ranking()
    return {
        "sentence-transformers": lambda: theirs.compute_loss_from_embeddings([b.x, b.y, b.hard], None),
        "gapkern": lambda: losses.info_nce_loss(
            unit(b.x), unit(b.y), 20.0, hard_negatives=unit(b.hard)[:, None], share_hard_negatives=True
        ),
    }


def _info_nce_four(b: Batch) -> dict[str, Call]:
    theirs = _ranking(directions=THEIR_FOUR)
    return {
        "sentence-transformers": lambda: theirs.compute_loss_from_embeddings([b.x, b.y], None),
        "gapkern": lambda: losses.info_nce_loss(unit(b.x), unit(b.y), 20.0, directions=FOUR),
    }


def _info_nce_margin(b: Batch) -> dict[str, Call]:
    return {
        "plain PyTorch": lambda: plain.info_nce_loss(b.x, b.y, 20.0, margin=0.1, directions=FOUR),
        "gapkern": lambda: losses.info_nce_loss(b.x, b.y, 20.0, margin=0.1, directions=FOUR),
    }


def _info_nce_debiased(b: Batch) -> dict[str, Call]:
    return {
        "plain PyTorch": lambda: plain.info_nce_loss(b.x, b.y, 20.0, debias=1e-4),
        "gapkern": lambda: losses.info_nce_loss(b.x, b.y, 20.0, debias=1e-4),
    }


def _info_nce_hardness(b: Batch) -> dict[str, Call]:
    theirs = _ranking(hardness_mode="in_batch_negatives", hardness_strength=4.0)
    return {
        "sentence-transformers": lambda: theirs.compute_loss_from_embeddings([b.x, b.y], None),
        "gapkern": lambda: losses.info_nce_loss(unit(b.x), unit(b.y), 20.0, hardness=4.0),
    }


def _ntxent(b: Batch) -> dict[str, Call]:
    from lightly.loss import NTXentLoss

    theirs = NTXentLoss(temperature=0.1)
    return {"lightly": lambda: theirs(b.x, b.y), "gapkern": lambda: losses.ntxent_loss(unit(b.x), unit(b.y), 10.0)}


def _decoupled(b: Batch) -> dict[str, Call]:
    from lightly.loss import DCLLoss

    theirs = DCLLoss(temperature=0.1)
    return {
        "lightly": lambda: theirs(b.x, b.y),
        "gapkern": lambda: losses.ntxent_loss(unit(b.x), unit(b.y), 10.0, decoupled=True),
    }


def _supcon(b: Batch) -> dict[str, Call]:
    from pytorch_metric_learning.losses import SupConLoss

    theirs = SupConLoss(temperature=0.1)
    return {
        "pytorch-metric-learning": lambda: theirs(b.x, b.classes),
        "gapkern": lambda: losses.supcon_loss(unit(b.x), b.classes, 10.0),
    }


def _mil_nce(b: Batch) -> dict[str, Call]:
    def of(loss: Callable[..., Tensor]) -> Call:
        return lambda: loss(b.x, torch.stack([b.y, b.hard], 1), 10.0)

    return {"plain PyTorch": of(plain.mil_nce_loss), "gapkern": of(losses.mil_nce_loss)}


def _gist(b: Batch) -> dict[str, Call]:
    """sentence-transformers forms N x N x D cosines: 34 GB at 4,096 x 512."""
    return {
        "plain PyTorch": lambda: plain.gist_loss(unit(b.x), unit(b.y), 20.0, *b.guides),
        "gapkern": lambda: losses.gist_loss(unit(b.x), unit(b.y), 20.0, *b.guides),
    }


def _uniformity(b: Batch) -> dict[str, Call]:
    return {
        "torch.pdist": lambda: torch.pdist(b.x).pow(2).mul(-2.0).exp().mean().log(),
        "gapkern": lambda: losses.uniformity_loss(b.x),
    }


def _matryoshka(b: Batch) -> dict[str, Call]:
    theirs, ours = _ranking(), losses.Matryoshka(losses.info_nce_loss, PREFIXES)

    def prefixes(loss: Callable[..., Tensor]) -> Call:
        return lambda: sum(loss(*(unit(t[:, :k]) for t in (b.x, b.y))) for k in PREFIXES)  # type: ignore

    return {
        "sentence-transformers": prefixes(lambda x, y: theirs.compute_loss_from_embeddings([x, y], None)),
        "gapkern": lambda: ours(b.x, b.y, 20.0),
        "other: gapkern, a call a prefix": prefixes(lambda x, y: losses.info_nce_loss(x, y, 20.0)),
    }


# As docs/losses.md calls them: which of the batch have gradients, and contenders, the first of them the baseline.
LOSSES: dict[str, tuple[tuple[str, ...], Callable[[Batch], dict[str, Call]]]] = {
    "contrastive_loss": (("x", "y"), _clip),
    "contrastive_loss, ids": (("x", "y"), _clip_ids),
    "contrastive_loss, label smoothing": (("x", "y"), _clip_smoothed),
    "sigmoid_loss": (("x", "y"), _siglip),
    "sigmoid_loss, ids": (("x", "y"), _siglip_ids),
    "info_nce_loss": (("x", "y"), _info_nce),
    "info_nce_loss, hard negatives": (("x", "y", "hard"), _info_nce_hard),
    "info_nce_loss, four directions": (("x", "y"), _info_nce_four),
    "info_nce_loss, four directions, margin": (("x", "y"), _info_nce_margin),
    "info_nce_loss, debias": (("x", "y"), _info_nce_debiased),
    "info_nce_loss, hardness": (("x", "y"), _info_nce_hardness),
    "ntxent_loss": (("x", "y"), _ntxent),
    "ntxent_loss, decoupled": (("x", "y"), _decoupled),
    "supcon_loss": (("x",), _supcon),
    "mil_nce_loss": (("x", "y", "hard"), _mil_nce),
    "gist_loss": (("x", "y"), _gist),
    "uniformity_loss": (("x",), _uniformity),
    "Matryoshka": (("x", "y"), _matryoshka),
}


def steps(name: str, n: int) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """By contender: the loss and its gradients."""
    sides, contenders = LOSSES[name]
    batch = Batch(n)
    leaves = [getattr(batch, side) for side in sides]

    def step(loss: Call) -> tuple[Tensor, ...]:
        value = loss()
        return (value.detach(), *torch.autograd.grad(value, leaves))

    return {who: partial(step, loss) for who, loss in contenders(batch).items()}


def cases(mode: str):
    n = SIZES[mode]
    for name in LOSSES:
        calls = steps(name, n)
        baseline = next(iter(calls))
        roles = {baseline: "baseline"}
        contenders = [Contender(who, call, roles.get(who, "ours")) for who, call in calls.items()]
        check = harness.equal_to(baseline, f"{name}, N={n}")
        yield Case({"loss": name, "N": n, "D": DIMS, "pass": "forward+backward"}, contenders, check, baseline)


_SETUP = """
import sys
sys.path.insert(0, {root!r})
from bench.bench_losses import steps
steps({name!r}, 600)[{who!r}]()
call = steps({name!r}, {n})[{who!r}]
"""


def memory(mode: str) -> list[dict[str, Any]]:
    """MiB above inputs and gradients, each in a process of its own; None for what the machine's memory cannot hold."""
    n, rows = MEMORY[mode], []
    root = str(Path(__file__).resolve().parent.parent)
    for name, (sides, _) in LOSSES.items():
        row: dict[str, Any] = {"loss": name, "N": n, "D": DIMS}
        for who in steps(name, 8):
            setup = _SETUP.format(root=root, name=name, who=who, n=n)
            try:
                peak = peak_memory("kept = call()", setup=setup)
            except subprocess.CalledProcessError as error:
                print(f"{name}, {who}: {error.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
                row[who] = None
                continue
            row[who] = max(0.0, peak - len(sides) * n * DIMS * 4 / 2**20)
        rows.append(row)
        print("peak MiB", row, flush=True)
    return rows


def run(mode: str) -> dict[str, Any]:
    result = harness.run("losses", cases(mode), seconds=2.0 if mode == "quick" else 3.0)
    return result if mode == "avx2" else {**result, "peak_memory_mib": memory(mode)}
