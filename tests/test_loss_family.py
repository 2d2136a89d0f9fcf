"""The family of contrastive losses: definitions in float64, gradients, degenerate batches, errors."""

import functools
import math

import pytest
import torch

from gapkern import losses
from gapkern.ops.contrastive import masked_chunked
from gapkern.reference import losses as reference
from gapkern.testing import assert_near, assert_three_way

ALL = ("q-d", "d-q", "q-q", "d-d")


def unit(*size, generator, dtype=torch.float64):
    return torch.nn.functional.normalize(torch.randn(*size, generator=generator, dtype=torch.float64), dim=-1).to(dtype)


def tensors(n=12, d=7, seed=0):
    g = torch.Generator().manual_seed(seed)
    draw = functools.partial(unit, generator=g)
    return {
        "x": draw(n, d),
        "y": draw(n, d),
        "s": torch.tensor(5.0, dtype=torch.float64),
        "hard": draw(n, 3, d),
        "extra": draw(5, d),
        "texts": draw(n, 2, d),
        "guide_x": draw(n, 4),
        "guide_y": draw(n, 4),
        "guide_extra": draw(5, 4),
        "ids": torch.randint(0, 6, (n,), generator=g),
        "other_ids": torch.randint(0, 6, (n,), generator=g),
        "weights": torch.rand(n, generator=g, dtype=torch.float64),
        "prior": 0.1 * torch.rand(n, generator=g, dtype=torch.float64),
        "bias": torch.tensor(-3.0, dtype=torch.float64),
    }


def info_nce(module, t, **options):
    named = {"hard": "hard_negatives", "extra": "extra_negatives", "ids": "ids", "weights": "weights"}
    given = {named[k]: t[k] for k in named if options.pop(k, False)}
    if options.pop("two_ids", False):
        given["ids"] = (t["ids"], t["other_ids"])
    if options.pop("prior", False):
        given["debias"] = t["prior"]
    return module.info_nce_loss(t["x"], t["y"], t["s"], **given, **options)


def clip(module, t, **options):
    if options.pop("two_ids", False):
        options["ids"] = (t["ids"], t["other_ids"])
    for name in ("ids", "weights"):
        if options.get(name) is True:
            options[name] = t[name]
    return module.contrastive_loss(t["x"], t["y"], t["s"], **options)


def siglip(module, t, rows=12, **options):
    ids = (t["ids"][:rows], t["other_ids"])
    return module.sigmoid_loss(t["x"][:rows], t["y"], t["s"], t["bias"], ids=ids, **options)


def supcon(module, t, **options):
    if options.pop("weights", False):
        options["weights"] = t["weights"]
    return module.supcon_loss(t["x"], t["ids"], t["s"], **options)


def mil_nce(module, t, **options):
    return module.mil_nce_loss(t["x"], t["texts"], t["s"], **options)


def gist(module, t, negatives=False, **options):
    if negatives:
        options |= {"negatives": t["extra"], "guide_negatives": t["guide_extra"]}
    return module.gist_loss(t["x"], t["y"], t["s"], t["guide_x"], t["guide_y"], **options)


def uniformity(module, t):
    return module.uniformity_loss(t["x"], t["s"])


CASES = [
    (info_nce, {}),
    (info_nce, {"hard": True, "margin": 0.1}),
    (info_nce, {"directions": ALL}),
    (info_nce, {"directions": ALL, "margin": 0.2, "ids": True, "label_smoothing": 0.1}),
    (info_nce, {"directions": ALL, "partition": "separate", "two_ids": True, "label_smoothing": 0.2, "margin": 0.3}),
    (info_nce, {"directions": ("d-q",), "reduction": "sum"}),
    (info_nce, {"directions": ("q-d", "d-q"), "hardness": 3.0, "hard": True, "hardness_of": "all", "margin": 0.2}),
    (info_nce, {"hardness": 3.0, "hard": True, "hardness_of": "hard", "extra": True}),
    (info_nce, {"hardness": 3.0, "hard": True, "share_hard_negatives": True, "extra": True, "directions": ALL}),
    (info_nce, {"debias": 0.05, "hard": True, "directions": ("q-d", "q-q", "d-d"), "margin": 0.1}),
    (info_nce, {"prior": True, "label_smoothing": 0.1, "extra": True, "reduction": "none", "weights": True}),
    (info_nce, {"decoupled": True, "directions": ALL, "partition": "separate", "weights": True}),
    (clip, {"ids": True}),
    (clip, {"two_ids": True, "positives": "in", "reduction": "sum"}),
    (clip, {"two_ids": True, "label_smoothing": 0.1, "weights": True, "similarity": "sqeuclidean"}),
    (clip, {"label_smoothing": 0.2, "reduction": "none"}),
    (clip, {"weights": True}),
    (siglip, {}),
    (siglip, {"positives": "mean"}),
    (siglip, {"positives": "mean", "rows": 5}),
    (siglip, {"positives": "mean", "symmetric": False}),
    (siglip, {"positives": "mean", "soft_label": True}),
    (siglip, {"positives": "mean", "soft_label": True, "symmetric": False, "rows": 5}),
    (supcon, {}),
    (supcon, {"positives": "in", "weights": True}),
    (supcon, {"reduction": "none"}),
    (mil_nce, {}),
    (mil_nce, {"reduction": "sum"}),
    (gist, {"negatives": True}),
    (gist, {"margin": 0.1, "margin_strategy": "relative", "contrast_queries": False}),
    (uniformity, {}),
]


def differentiated(call, module, t, options, dtype):
    t = {k: v.to(dtype) if v.is_floating_point() else v for k, v in t.items()}
    leaves = [t[k].detach().clone().requires_grad_() for k in ("x", "y", "s", "hard", "extra", "texts", "bias")]
    t |= dict(zip(("x", "y", "s", "hard", "extra", "texts", "bias"), leaves, strict=True))
    loss = call(module, t, **options)
    gradients = torch.autograd.grad(loss.sum(), leaves, allow_unused=True)
    return [loss.detach(), *(torch.zeros_like(v) if g is None else g for g, v in zip(gradients, leaves, strict=True))]


@pytest.mark.parametrize(("call", "options"), CASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_loss_is_its_definition(call, options, seed, monkeypatch):
    monkeypatch.setattr(masked_chunked, "CHUNK_ELEMENTS", 50)
    t = {k: v.float().double() if v.is_floating_point() else v for k, v in tensors(seed=seed).items()}
    truth = differentiated(call, reference, t, options, torch.float64)
    found = differentiated(call, losses, t, options, torch.float64)
    for i, (a, b) in enumerate(zip(found, truth, strict=True)):
        assert_near(a, b, 1e-11, name=f"output {i}")
    ours, theirs = (differentiated(call, m, t, options, torch.float32) for m in (losses, reference))
    assert ours[0].dtype == torch.float32
    for i, (a, b, c) in enumerate(zip(ours, theirs, truth, strict=True)):
        assert_three_way(a, b, c, 1e-5 if i != 3 else 1e-4, name=f"output {i}")


# The gradient of hardness is no derivative: a part of the logits is held.
@pytest.mark.parametrize(("call", "options"), [case for case in CASES if "hardness" not in case[1]])
def test_gradcheck(call, options):
    t = tensors(4, 3)
    names = ("x", "y", "s", "hard", "extra", "texts", "bias")

    def function(*leaves):
        return call(losses, t | dict(zip(names, leaves, strict=True)), **dict(options))

    options = {**options, **({"rows": 3} if "rows" in options else {})}
    if call is siglip:
        options = {"rows": 4} | options
    assert torch.autograd.gradcheck(function, [t[k].requires_grad_() for k in names])


def test_gradcheck_of_prefixes_and_views():
    t = tensors(4, 5)
    names = ("x", "y", "s", "hard")

    def prefixes(x, y, s, hard):
        return losses.Matryoshka(losses.info_nce_loss, (5, 2), (1, 0.5))(x, y, s, hard_negatives=hard, margin=0.3)

    leaves = [t[k].requires_grad_() for k in names]
    assert torch.autograd.gradcheck(prefixes, leaves)
    for options in ({}, {"decoupled": True, "ids": torch.tensor([0, 0, 1, 2])}):
        call = functools.partial(losses.ntxent_loss, **options)
        assert torch.autograd.gradcheck(call, leaves[:3])


@pytest.mark.parametrize("hardness_of", ["in-batch", "hard", "all"])
def test_gradcheck_of_hardness_with_its_part_held(hardness_of):
    """The held part moves the value, and not the gradient: it is that of a loss whose logits have a constant added."""
    t = tensors(4, 3)
    options = {"hardness": 2.0, "hardness_of": hardness_of, "hard_negatives": t["hard"]}
    own, hard = t["x"] @ t["y"].T, torch.einsum("nd,nkd->nk", t["x"], t["hard"])
    held = [2.0 * v for v in (own - own.diagonal().diag(), hard)]
    held = [h if hardness_of in ("all", kind) else 0 * h for h, kind in zip(held, ("in-batch", "hard"), strict=True)]

    def constant(x, y, s):
        logits = torch.cat([s * x @ y.T + held[0], s * torch.einsum("nd,nkd->nk", x, t["hard"]) + held[1]], 1)
        return torch.nn.functional.cross_entropy(logits, torch.arange(4))

    leaves = [t[k].requires_grad_() for k in ("x", "y", "s")]
    assert torch.autograd.gradcheck(constant, leaves)
    found, truth = losses.info_nce_loss(*leaves, **options), constant(*leaves)
    assert_near(found.detach(), truth.detach(), 1e-12)
    for a, b in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(truth, leaves), strict=True):
        assert_near(a, b, 1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("call", "options"), CASES)
def test_half_precision(call, options, dtype):
    t = tensors(32, 16)
    t = {k: v.to(dtype).double() if v.is_floating_point() else v for k, v in t.items()}
    truth = differentiated(call, reference, t, options | ({"rows": 32} if call is siglip else {}), torch.float64)
    low = {k: v.to(dtype) if v.is_floating_point() and k != "s" else v for k, v in t.items()}
    leaves = {k: low[k].requires_grad_() for k in ("x", "y", "hard", "extra", "texts")}
    loss = call(losses, low, **(options | ({"rows": 32} if call is siglip else {})))
    assert loss.dtype == torch.float32
    assert_near(loss, truth[0], 2e-2)
    loss.sum().backward()
    for name, index in (("x", 1), ("y", 2)):
        if leaves[name].grad is not None:
            assert leaves[name].grad.dtype == dtype
            assert_near(leaves[name].grad, truth[index], 6e-2)


@pytest.mark.parametrize(
    "loss",
    [
        lambda x: losses.info_nce_loss(x, x, 50.0),
        lambda x: losses.info_nce_loss(x, x, 50.0, debias=0.1),
        lambda x: losses.info_nce_loss(x, x, 50.0, directions=ALL, partition="separate"),
        lambda x: losses.info_nce_loss(x, x, 50.0, decoupled=True),
        lambda x: losses.contrastive_loss(x, x, 50.0, ids=torch.tensor([3])),
        lambda x: losses.contrastive_loss(x, x, 50.0, weights=torch.ones(1)),
        lambda x: losses.ntxent_loss(x, x, 50.0),
        lambda x: losses.supcon_loss(x, torch.tensor([1]), 50.0),
        lambda x: losses.mil_nce_loss(x, x[:, None], 50.0),
        lambda x: losses.gist_loss(x, x, 50.0, x, x),
    ],
)
def test_one_row_is_exactly_zero(loss):
    x = torch.randn(1, 8).requires_grad_()
    value = loss(x)
    assert float(value) == 0
    value.backward()
    assert not x.grad.any()


def test_all_positives_and_no_positives():
    x = unit(6, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    same, apart = torch.zeros(6, dtype=torch.int64), torch.arange(6)
    assert float(losses.supcon_loss(x, apart, 5.0)) == 0
    assert float(losses.contrastive_loss(x, x, 5.0, ids=same, positives="in")) == pytest.approx(math.log(6))
    assert float(losses.info_nce_loss(x, x, 5.0, ids=same)) == 0
    assert_near(losses.contrastive_loss(x, x, 5.0, ids=apart), losses.contrastive_loss(x, x, 5.0), 1e-12)
    assert float(losses.info_nce_loss(x, x, 5.0, margin=-3.0)) == 0
    for loss in (
        losses.supcon_loss(x, apart, 5.0),
        losses.supcon_loss(x, same, 5.0),
        losses.contrastive_loss(x, x, 5.0, ids=same),
        losses.info_nce_loss(x, x, 5.0, ids=same, directions=ALL),
        losses.info_nce_loss(x, x, 5.0, weights=torch.zeros(6)),
        losses.info_nce_loss(x, x, 5.0, margin=-3.0, directions=ALL, debias=0.1, label_smoothing=0.1, decoupled=True),
    ):
        (gradient,) = torch.autograd.grad(loss, x)
        assert gradient.isfinite().all()


def test_small_losses_keep_their_digits():
    x = torch.eye(8, dtype=torch.float32)
    for loss in (
        losses.info_nce_loss(x, x, 30.0),
        losses.contrastive_loss(x, x, 30.0, ids=torch.arange(8)),
        losses.gist_loss(x, x, 30.0, x, x, contrast_queries=False, contrast_documents=False),
    ):
        assert float(loss) == pytest.approx(7 * torch.exp(torch.tensor(-30.0, dtype=torch.float64)).item(), rel=1e-5)


def test_simclr_is_the_separate_partition():
    t = tensors()
    both = torch.cat([t["x"], t["y"]])
    logits = t["s"] * both @ both.T
    logits.fill_diagonal_(-torch.inf)
    partner = torch.arange(24).roll(12)
    assert_near(losses.ntxent_loss(t["x"], t["y"], t["s"]), torch.nn.functional.cross_entropy(logits, partner), 1e-12)


def test_matryoshka_sums_prefixes():
    t = tensors()
    module = losses.Matryoshka(losses.info_nce_loss, (7, 4, 2), weights=(1, 0.5, 2))
    cut = lambda v, d: torch.nn.functional.normalize(v[..., :d], dim=-1)  # noqa: E731
    expected = sum(
        w * reference.info_nce_loss(cut(t["x"], d), cut(t["y"], d), t["s"], hard_negatives=cut(t["hard"], d))
        for d, w in ((7, 1), (4, 0.5), (2, 2))
    )
    assert_near(module(t["x"], t["y"], t["s"], hard_negatives=t["hard"]), expected, 1e-12)


def test_compiles_whole():
    t = tensors()

    def call(x, y):
        return losses.info_nce_loss(x, y, t["s"], directions=ALL, ids=t["ids"], margin=0.1, label_smoothing=0.1)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert_near(compiled(t["x"], t["y"]), call(t["x"], t["y"]), 1e-12)
