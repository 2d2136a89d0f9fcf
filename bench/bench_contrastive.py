"""The contrastive loss against open_clip's class, eager and compiled PyTorch, and the bare matrix products.

The limit of a recomputing implementation is four products of 2 N M D operations (8NMD), with kept logits three (6NMD).
"""

import functools

import torch

from bench import harness
from bench.harness import Case, Contender
from gapkern.testing import peak_memory

SCALE = 100.0  # where CLIP clamps it, and trained models are
BATCHES = {
    "quick": (256, 1024),
    "full": (64, 128, 256, 512, 1024, 4096, 8192, 16384),
    "avx2": (64, 256, 512, 1024, 4096, 8192),
}
WIDTHS = {"quick": (512,), "full": (512, 768, 1024), "avx2": (512,)}
WIDE_UP_TO = 4096  # beyond it only the first width
MEMORY = (4096, 8192, 16384, 32768, 65536)
LOGITS_UP_TO = 16384  # beyond it only what never holds them is asked


def _both_ways(logits):
    """One logit matrix, both directions from it."""
    labels = torch.arange(len(logits))
    return (torch.nn.functional.cross_entropy(logits, labels) + torch.nn.functional.cross_entropy(logits.T, labels)) / 2


def _eager(x, y, scale):
    return _both_ways(scale * x @ y.T)


def _by_norms(x, y, scale):
    return _both_ways(-scale * (x.square().sum(1)[:, None] - 2 * x @ y.T + y.square().sum(1)))


def _by_cdist(x, y, scale):
    return _both_ways(-scale * torch.cdist(x, y).square())


def _ours(memory, precision="highest", similarity="dot"):
    from gapkern import contrastive_loss

    def loss(x, y, scale):
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        try:
            return contrastive_loss(x, y, scale, similarity=similarity, memory=memory)
        finally:
            torch.set_float32_matmul_precision(before)

    return loss


def _inputs(n: int, d: int, backward: bool) -> list[torch.Tensor]:
    x, y = (harness.unit(n, d, seed=s) for s in (0, 1))
    y = torch.nn.functional.normalize(y + 0.15 * x, dim=1)
    return [t.requires_grad_(backward) for t in (x, y, torch.tensor(SCALE))]


def _call(loss, inputs):
    def once():
        value = loss(*inputs)
        return (value.detach(), *(torch.autograd.grad(value, inputs) if inputs[0].requires_grad else ()))

    return once


def _products(count, inputs, dtype=torch.float32):
    """Of `count` products: the logits, once or with four twice, and with more than one both gradients."""
    a, b = (t.detach().to(dtype) for t in inputs[:2])
    logits = torch.empty(len(a), len(b), dtype=dtype)
    out = torch.empty_like(a)

    def once():
        for _ in range(1 if count < 4 else 2):
            torch.mm(a, b.T, out=logits)
        if count > 1:
            torch.mm(logits, b, out=out)
            torch.mm(logits.T, a, out=out)

    return once


def _check(baseline: str, where: str, other_results: tuple[str, ...] = ("limit",)):
    """All against the baseline, but for names that start as `other_results`."""

    def check(results):
        expected = results[baseline]
        for name, found in results.items():
            if name.startswith(other_results):
                continue
            tolerance = 2e-2 if "bfloat16" in name else 2e-5
            for ours, theirs in zip(found, expected, strict=True):
                # The gradient of logit_scale is a small difference of large sums: it is judged by the loss.
                size = theirs.norm() if theirs.dim() else expected[0].abs()
                error = float((ours - theirs).norm() / size)
                assert error < tolerance, f"{name} at {where}: relative error {error:.1e}"

    return check


def case(n: int, d: int, backward: bool, bf16: bool = True) -> Case:
    """`bf16`: bfloat16 products too, ours and bare; without instructions for them ours are float32's."""
    import open_clip

    inputs = _inputs(n, d, backward)
    call = functools.partial(_call, inputs=inputs)

    torch.compiler.reset()
    contenders = [
        Contender("open_clip", call(open_clip.ClipLoss()), "baseline"),
        Contender("eager, one logit matrix", call(_eager), "baseline"),
        Contender("torch.compile", call(torch.compile(_eager)), "baseline"),
        Contender("gapkern, recompute", call(_ours("recompute"))),
        Contender("gapkern, keep", call(_ours("keep"))),
    ]
    if bf16:
        contenders += [
            Contender("gapkern, bfloat16 products", call(_ours("recompute", "medium"))),
            Contender("gapkern, bfloat16, keep", call(_ours("keep", "medium"))),
        ]
    for dtype, kind in ((torch.float32, "bare"), (torch.bfloat16, "bare bfloat16"))[: 1 + bf16]:
        for count in (4, 3) if backward else (1,):
            contenders.append(Contender(f"limit: {count} {kind} products", _products(count, inputs, dtype), "limit"))
    parameters = {"similarity": "dot", "N": n, "D": d, "pass": "forward+backward" if backward else "forward"}
    return Case(parameters, contenders, _check("open_clip", f"N={n}, D={d}"), "open_clip")


def distances_case(n: int, d: int) -> Case:
    """Squared distances, forward and backward, and what the dot products of the same pairs take."""
    inputs = _inputs(n, d, True)
    call = functools.partial(_call, inputs=inputs)
    of_dot_products = "gapkern, recompute, of dot products"
    contenders = [
        Contender("torch.cdist", call(_by_cdist), "baseline"),
        Contender("norms and a product", call(_by_norms), "baseline"),
        Contender("gapkern, recompute", call(_ours("recompute", similarity="sqeuclidean"))),
        Contender("gapkern, keep", call(_ours("keep", similarity="sqeuclidean"))),
        Contender(of_dot_products, call(_ours("recompute"))),
        Contender("limit: 4 bare products", _products(4, inputs), "limit"),
    ]
    parameters = {"similarity": "sqeuclidean", "N": n, "D": d, "pass": "forward+backward"}
    check = _check("norms and a product", f"N={n}, D={d}", ("limit", of_dot_products))
    return Case(parameters, contenders, check, "norms and a product")


def family_cases(n: int, d: int):
    """Other losses against the library that a user would pick: the same embeddings, forward and backward."""
    from lightly.loss import NTXentLoss
    from pytorch_metric_learning.losses import SupConLoss
    from sentence_transformers.sentence_transformer.losses import multiple_negatives_ranking as ranking

    from gapkern import info_nce_loss, losses

    x, y, _ = _inputs(n, d, True)
    unit = functools.partial(torch.nn.functional.normalize, dim=1)  # a part of the others' losses
    labels = torch.arange(n) % 64
    ids = torch.arange(n) // 2
    everything = ("q-d", "d-q", "q-q", "d-d")
    theirs = ranking.MultipleNegativesRankingLoss(
        torch.nn.Identity(), directions=("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
    )

    def call(loss, *inputs):
        return lambda: (lambda value: (value.detach(), *torch.autograd.grad(value, inputs)))(loss())

    def four(**options):
        return lambda: info_nce_loss(unit(x), unit(y), 20.0, directions=everything, **options)

    families = {
        "info_nce, four directions": [
            Contender(
                "sentence-transformers",
                call(lambda: theirs.compute_loss_from_embeddings([x, y], None), x, y),
                "baseline",
            ),
            Contender("gapkern", call(four(), x, y)),
            Contender("other: gapkern with a margin", call(four(margin=0.1), x, y)),
        ],
        "supcon, 64 classes": [
            Contender("pytorch-metric-learning", call(lambda: SupConLoss(temperature=0.1)(x, labels), x), "baseline"),
            Contender("gapkern", call(lambda: losses.supcon_loss(unit(x), labels, 10.0), x)),
        ],
        "ntxent": [
            Contender("lightly", call(lambda: NTXentLoss(temperature=0.1)(x, y), x, y), "baseline"),
            Contender("gapkern", call(lambda: losses.ntxent_loss(unit(x), unit(y), 10.0), x, y)),
        ],
        "clip, two positives a row": [
            Contender("gapkern", call(lambda: losses.contrastive_loss(x, y, 10.0, ids=ids), x, y)),
            Contender("other: gapkern, one positive", call(lambda: losses.contrastive_loss(x, y, 10.0), x, y)),
        ],
    }
    for loss, contenders in families.items():
        parameters = {"loss": loss, "N": n, "D": d, "pass": "forward+backward"}
        first = contenders[0].name
        yield Case(parameters, contenders, _check(first, f"{loss}, N={n}, D={d}", ("limit", "other")), first)


def cases(mode: str):
    for n in BATCHES[mode]:
        for d in WIDTHS[mode][: None if n <= WIDE_UP_TO else 1]:
            for backward in (False, True) if mode != "avx2" else (True,):
                yield case(n, d, backward, bf16=mode != "avx2")
    yield distances_case(1024 if mode == "quick" else 4096, 512)
    if mode != "avx2":
        yield from family_cases(1024 if mode == "quick" else 4096, 512)


_SETUP = """
import torch, open_clip
from gapkern import contrastive_loss
n, d = {n}, 512
torch.manual_seed(0)
x, y = (torch.nn.functional.normalize(torch.randn(n, d), dim=1).requires_grad_() for _ in range(2))
scale = torch.tensor(100.0, requires_grad=True)
theirs = open_clip.ClipLoss()
def eager(x, y, scale):
    logits = scale * x @ y.T
    labels = torch.arange(len(x))
    return (torch.nn.functional.cross_entropy(logits, labels) + torch.nn.functional.cross_entropy(logits.T, labels)) / 2
ours = lambda memory: lambda x, y, scale: contrastive_loss(x, y, scale, memory=memory)
loss = {loss}
loss(x[:256], y[:256], scale).backward()
x.grad = y.grad = None
"""


_FAMILY_SETUP = """
import torch
from gapkern import losses
n, d = {n}, 512
torch.manual_seed(0)
x, y = (torch.nn.functional.normalize(torch.randn(n, d), dim=1).requires_grad_() for _ in range(2))
labels, ids = torch.arange(n) % 64, torch.arange(n) // 2
four = ("q-d", "d-q", "q-q", "d-d")
loss = lambda n: {loss}
loss(600).backward()
x.grad = y.grad = None
"""
_FAMILY = {
    "info_nce, four directions, a margin": (2, "losses.info_nce_loss(x[:n], y[:n], 20.0, directions=four, margin=0.1)"),
    "supcon, 64 classes": (1, "losses.supcon_loss(x[:n], labels[:n], 10.0)"),
    "clip, two positives a row": (2, "losses.contrastive_loss(x[:n], y[:n], 10.0, ids=ids[:n], memory='recompute')"),
}


def family_memory(mode: str) -> dict:
    """MiB above inputs and gradients of the family's losses, forward and backward, each in a process of its own."""
    n = 16384 if mode == "full" else 4096
    row: dict = {"N": n, "D": 512}
    for name, (sides, loss) in _FAMILY.items():
        peak = peak_memory(f"loss({n}).backward()", setup=_FAMILY_SETUP.format(n=n, loss=loss))
        row[name] = max(0.0, peak - sides * n * 512 * 4 / 2**20)
    print("peak memory, MiB: " + ", ".join(f"{k} {v:.0f}" if k not in "ND" else f"{k}={v}" for k, v in row.items()))
    return row


def memory(mode: str) -> list[dict]:
    """MiB above inputs and gradients, forward and backward, each in a process of its own."""
    gradients = 2 * 512 * 4 / 2**20  # of one pair
    rows = []
    for n in MEMORY if mode == "full" else MEMORY[:1]:
        row = {"N": n, "D": 512}
        for name, loss in (
            ("open_clip", "theirs"),
            ("eager, one logit matrix", "eager"),
            ("gapkern, recompute", "ours('recompute')"),
            ("gapkern, keep", "ours('keep')"),
        ):
            if n > LOGITS_UP_TO and name != "gapkern, recompute":
                continue
            peak = peak_memory("loss(x, y, scale).backward()", setup=_SETUP.format(n=n, loss=loss))
            row[name] = max(0.0, peak - n * gradients)
        rows.append(row)
        print("peak memory, MiB: " + ", ".join(f"{k} {v:.0f}" if k not in "ND" else f"{k}={v}" for k, v in row.items()))
    return rows


def run(mode: str) -> dict:
    result = harness.run("contrastive", cases(mode), seconds=2.0 if mode == "quick" else 3.0)
    if mode != "avx2":
        result["peak_memory_mib"] = memory(mode)
        result["family_peak_memory_mib"] = family_memory(mode)
    return result
