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
    return Case(parameters, contenders, harness.equal_to("open_clip", f"N={n}, D={d}"), "open_clip")


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
    check = harness.equal_to("norms and a product", f"N={n}, D={d}", ("limit", of_dot_products))
    return Case(parameters, contenders, check, "norms and a product")


def cases(mode: str):
    for n in BATCHES[mode]:
        for d in WIDTHS[mode][: None if n <= WIDE_UP_TO else 1]:
            for backward in (False, True) if mode != "avx2" else (True,):
                yield case(n, d, backward, bf16=mode != "avx2")
    yield distances_case(1024 if mode == "quick" else 4096, 512)


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
    return result
