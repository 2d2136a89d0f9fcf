"""Losses over classes of pairs by CUDA's kernels, in chunks of rows, from the embeddings to their gradients."""

import math

import pytest
import torch

from gapkern import contrastive_loss, losses, sigmoid_loss
from gapkern.ops.contrastive import chunked, masked_chunked, masked_lse, self_lse
from gapkern.reference import classes as reference_classes
from gapkern.reference import losses as reference
from gapkern.testing import assert_three_way
from tests.software_gpu.fixture import on_gpu
from tests.test_masked_lse import (
    GUIDE,
    IDS,
    MARGINS,
    differentiated,
    differentiated_itself,
    problem,
    reference_of_itself,
    rounded,
)

ALL = (*IDS, "row_limit", "col_limit", *GUIDE)
SHAPES = [(70, 150), *on_gpu((3000, 5000), (1, 1), (257, 1025))]


@pytest.fixture
def in_chunks(monkeypatch):
    """Of about 40 rows of 150 logits."""
    monkeypatch.setattr(masked_chunked, "CHUNK_ELEMENTS", 6000)
    monkeypatch.setattr(chunked, "CUDA_CHUNK_ELEMENTS", 6000)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("chosen", "options"),
    [
        (ALL, {"equal": "positive", "label_offset": 3}),
        (ALL, {"equal": "left_out", "label_offset": -60, "similarity": "sqeuclidean"}),
        (IDS, {"equal": "positive", "label": "left_out"}),
        (("row_limit", *GUIDE[:3]), {"label": "none"}),
        ((), {"similarity": "sqeuclidean"}),
    ],
)
def test_masked_lse(cuda_device, in_chunks, poisoned, shape, dtype, chosen, options):
    x, y, masks = problem(*shape, dtype=dtype)  # 9 dims: no kernel of Hopper's
    work = torch.promote_types(dtype, torch.float32)
    x, masks = rounded(x, {name: masks[name] for name in chosen})
    y, _ = rounded(y, {})
    s = torch.tensor(12.0, dtype=work)
    found = cuda_device.on(differentiated, masked_lse, x, y, s, masks, options)
    truth = differentiated(reference_classes.masked_lse, x.double(), y.double(), s.double(), masks, options)
    plain = {k: v.to(work) if v.is_floating_point() else v for k, v in masks.items()}
    theirs = differentiated(reference_classes.masked_lse, x.to(work), y.to(work), s, plain, options)
    assert [g.dtype for g in found[5:7]] == [dtype] * 2
    for k, (a, b, c) in enumerate(zip(found, theirs, truth, strict=True)):
        margin = (3e-6 if dtype != torch.float64 else 1e-13) if k < 5 else 3 * MARGINS[dtype]
        margin = max(margin, 1e-4) if k == 7 and dtype != torch.float64 else margin
        assert_three_way(a, b, c, margin, name=f"output {k}")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_side_with_itself(cuda_device, in_chunks, dtype):
    x, _, masks = problem(130, 1, 9, dtype=dtype)
    x, masks = rounded(x, {"ids": masks["row_ids"], "limit": masks["row_limit"]})
    work = torch.promote_types(dtype, torch.float32)
    s, options = torch.tensor(7.0, dtype=work), {"equal": "positive"}
    found = cuda_device.on(differentiated_itself, self_lse, x, s, masks, options)
    truth = differentiated_itself(reference_of_itself, x.double(), s.double(), masks, options)
    theirs = differentiated_itself(reference_of_itself, x.to(work), s, masks, options)
    for k, (a, b, c) in enumerate(zip(found, theirs, truth, strict=True)):
        margin = 1e-13 if dtype == torch.float64 else 3e-6 if k < 2 else 1e-4 if k == 3 else 3 * MARGINS[dtype]
        assert_three_way(a, b, c, margin, name=f"output {k}")


def with_gradients(function, x, y, s, *constants, **options):
    x, y, s = (t.detach().clone().requires_grad_() for t in (x, y, s))
    loss = function(x, y, s, *constants, **options)
    return [loss.detach(), *torch.autograd.grad(loss, (x, y, s))]


LOSSES = [
    (losses.info_nce_loss, reference.info_nce_loss, (), {"ids": "row_ids"}),
    (contrastive_loss, reference.contrastive_loss, (), {"ids": "row_ids", "positives": "in"}),
    (losses.gist_loss, reference.gist_loss, ("guide_x", "guide_x"), {}),
    (sigmoid_loss, reference.sigmoid_loss, ("bias",), {"ids": "row_ids", "positives": "mean"}),
    (sigmoid_loss, reference.sigmoid_loss, ("bias",), {"ids": "row_ids", "positives": "mean", "soft_label": True}),
]


@pytest.mark.parametrize(("ours", "plain", "constants", "options"), LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses(cuda_device, in_chunks, ours, plain, constants, options, dtype):
    x, y, masks = problem(130, 130, 9, dtype=dtype)
    x, masks = rounded(x, {k: masks[k] for k in ("row_ids", "guide_x")})
    y, s = rounded(y, {})[0], torch.tensor(20.0)
    named = {**masks, "bias": torch.tensor(-3.0)}
    arguments = [named[name] for name in constants]
    options = {k: named.get(v, v) for k, v in options.items()}
    found = cuda_device.on(with_gradients, ours, x, y, s, *arguments, **options)
    wide = [t.double() if t.is_floating_point() else t for t in arguments]
    truth = with_gradients(plain, x.double(), y.double(), s.double(), *wide, **options)
    single = [t.float() if t.is_floating_point() else t for t in arguments]
    theirs = with_gradients(plain, x.float(), y.float(), s, *single, **options)
    for k, (a, b, c) in enumerate(zip(found, theirs, truth, strict=True)):
        margin = 3e-6 if k == 0 else max(3 * MARGINS[dtype], 1e-4 if k == 3 else 0)
        assert_three_way(a, b, c, margin, name=f"output {k}")


def test_a_batch_of_one_has_no_loss_and_no_gradient(cuda_device):
    x, ids = torch.randn(1, 9), torch.zeros(1, dtype=torch.int64)
    for v in cuda_device.on(with_gradients, losses.info_nce_loss, x, x + 1, torch.tensor(50.0), ids=ids):
        assert not v.any()


def test_a_small_loss_keeps_its_precision(cuda_device):
    """A label that outweighs all others by e^20, whose logits alone are hundreds."""
    x = 3 * torch.nn.functional.normalize(torch.randn(40, 9, generator=torch.Generator().manual_seed(0)), dim=1)
    ids, s = torch.arange(40), torch.tensor(30.0)
    found = cuda_device.on(with_gradients, losses.info_nce_loss, x, x.clone(), s, ids=ids)
    t = x.double() @ x.double().T
    others = (30 * (t - t.diagonal()[:, None])).fill_diagonal_(-math.inf)
    share = others.exp() / (1 + others.exp().sum(1, keepdim=True))
    truth = others.exp().sum(1).log1p().mean()
    of_scale = (share * (t - t.diagonal()[:, None])).sum() / 40
    assert float(truth) < 1e-3
    assert abs(float(found[0]) - float(truth)) < 1e-4 * float(truth)
    assert abs(float(found[3]) - float(of_scale)) < 1e-3 * abs(float(of_scale))
