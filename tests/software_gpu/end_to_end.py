"""The losses from their embeddings to their gradients through the Hopper kernels, in several blocks of rows."""

import contextlib
import unittest.mock

import torch

from gapkern import contrastive_loss, sigmoid_loss
from gapkern.ops.contrastive import lse_pair, sigmoid_sum, sm90
from gapkern.testing import assert_three_way

from . import hopper_problems
from .hopper_problems import ROUNDING, losses_of_pairs, pair, rounding, seen_by_products


@contextlib.contextmanager
def blocks(rows: int, elements: int):
    """Within, at most `rows` rows of sums and `elements` elements of a gradient are formed at once."""
    with unittest.mock.patch.multiple(sm90, SUPER_ROWS=rows, GRADIENT_ELEMENTS=elements):
        yield


@contextlib.contextmanager
def matmul_precision(setting: str):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def softmax_in_blocks(device, n, m, d, dtype, kept_rows, offset, rows, elements, precision="medium"):
    """As a whole problem, with rows of exponentials kept in the first blocks and recomputed in the others."""
    with blocks(rows, elements):
        options = {"offset": offset, "precision": precision}
        return hopper_problems.softmax_statistics(device, n, m, d, dtype, kept_rows * 4 * m, **options)


def sigmoid_in_blocks(device, n, m, d, dtype, offset, elements, precision="medium"):
    with blocks(128, elements):
        return hopper_problems.sigmoid(device, n, m, d, dtype, offset, precision)


def nearly_solved(device, n, m, d, dtype, scale, offset=0, work_bytes=0, precision="medium"):
    """A small loss and its gradients have their own precision, not that of the logits whose differences they are."""
    x, y = pair(n, m, d, dtype)
    if offset:
        y = y.roll(offset, 0)

    def run(function, images, texts, s):
        inputs = [t.detach().clone().requires_grad_() for t in (images, texts, s)]
        loss = function(*inputs).mean()
        return [loss.detach(), *torch.autograd.grad(loss, inputs)]

    def losses_of_kernels(*inputs):
        row, col, positive = lse_pair(*inputs, label_offset=offset, precision=precision, work_bytes=work_bytes)
        return (row + col[offset : offset + n]) / 2 - positive

    def losses_of_differences(*inputs):
        return losses_of_pairs(*inputs, offset)

    scale = torch.tensor(scale)
    with blocks(128, 128 * m):
        ours = device.on(run, losses_of_kernels, x, y, scale)
    seen = seen_by_products(x, y, precision=precision)
    truth = run(losses_of_differences, *(v.double() for v in seen), scale.double())
    if min(n, m) == 1 and n == m:
        assert all(not v.any() for v in ours)
        return
    assert float(truth[0]) < 1e-9
    # Exponents of this size have a unit in the last place of 2^-17, whichever the products' precision.
    margin = max(rounding(dtype, precision), 2e-5)
    # The log-sum-exps are float64 numbers of the logits' size.
    assert abs(float(ours[0] - truth[0])) < 2e-5 * float(truth[0]) + 2**-52 * float(scale)
    for a, b in zip(ours[1:3], truth[1:3], strict=True):
        least = 2**-25 * a.numel() ** 0.5 if dtype == torch.float16 else 0  # what float16 itself cannot hold
        assert float((a.double() - b).norm()) < margin * float(b.norm()) + least
    assert abs(float(ours[3] - truth[3])) < 4 * margin * abs(float(truth[3]))


def losses(device, seed):
    """A random problem: contrastive_loss and sigmoid_loss with their gradients."""
    generator = torch.Generator().manual_seed(seed)

    def choose(values):
        return values[int(torch.randint(len(values), (1,), generator=generator))]

    n, m = (int(torch.randint(1, 601, (1,), generator=generator)) for _ in range(2))
    n, m = min(n, m), max(n, m)
    if choose([True, False, False]):
        m = n
    d, dtype = choose([8, 64, 136, 512]), choose([torch.bfloat16, torch.float16, torch.float32])
    offset = int(torch.randint(0, m - n + 1, (1,), generator=generator))
    rows, elements = choose([128, 256, 16384]), choose([1, 256 * m, 2**28])
    memory = choose([0, 4 * m * max(1, n // 2), 2**32])
    scale, closeness = choose([(1.0, 1.0), (14.3, 1.0), (50.0, 0.2), (50.0, 1.0)])
    similarity = choose(["dot", "sqeuclidean"]) if dtype != torch.float16 else "dot"
    precision = choose(["medium", "highest"])
    x, y, scale = *pair(n, m, d, dtype, seed=seed, closeness=closeness), torch.tensor(scale)

    def run(name, images, texts, s):
        inputs = [t.detach().clone().requires_grad_() for t in (images, texts, s)]
        if name == "contrastive" and n == m:
            loss = contrastive_loss(*inputs, similarity=similarity, memory=memory)
        elif name == "contrastive":
            options = {"similarity": similarity, "label_offset": offset, "precision": precision, "work_bytes": memory}
            row, _, positive = lse_pair(*inputs, **options)
            loss = (row - positive).mean()
        elif n == m:
            loss = sigmoid_loss(*inputs, -5.0)
        else:
            bias = torch.full_like(s, -5.0)
            loss = sigmoid_sum(*inputs, bias, label_offset=offset, precision=precision) / n
        loss.backward()
        return [loss.detach(), *(t.grad for t in inputs)]

    for name in ("contrastive", "sigmoid"):
        with matmul_precision(precision), blocks(rows, elements):
            ours = device.on(run, name, x, y, scale)
        seen = seen_by_products(x, y, precision=precision)
        truth = run(name, *(v.double() for v in seen), scale.double())
        single = run(name, *(v.float() for v in seen), scale)
        size = float(truth[0].abs())
        # A softmax's loss is a difference of float64 numbers of the logits' size; float16 ends at 2^-24.
        margins = [2e-5 + (2**-53 * float(scale) / size if size else 0)]
        least = 2**-25 if dtype == torch.float16 else 0
        margins += [
            rounding(dtype, precision) + least * g.numel() ** 0.5 / max(float(g.norm()), 1e-300) for g in truth[1:3]
        ]
        for a, b, c, margin in zip(ours, single, truth, margins, strict=False):
            assert_three_way(a.reshape(c.shape), b, c, margin)
        assert abs(float(ours[3]) - float(truth[3])) <= 10 * ROUNDING[dtype] * (abs(float(truth[3])) + 1e-2 * size)


def _in_blocks():
    bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
    # Three blocks of sums and of gradients, the last ragged; two tiles of columns and three.
    for dtype, kept_rows in ((bf16, 0), (bf16, 300), (bf16, 80), (f16, 0), (f32, 0)):
        yield softmax_in_blocks, (300, 390, 72, dtype, kept_rows, 61, 128, 128 * 390), {}
    yield softmax_in_blocks, (270, 600, 136, bf16, 270, 330, 128, 1), {}
    yield softmax_in_blocks, (400, 400, 24, bf16, 110, 0, 256, 256 * 400), {}
    for dtype, offset in ((bf16, -140), (f16, 0), (f32, 200)):
        yield sigmoid_in_blocks, (300, 390, 72, dtype, offset, 128 * 390), {}
    yield softmax_in_blocks, (300, 390, 40, f32, 300, 61, 512, 3 * 128 * 390, "highest"), {}
    yield sigmoid_in_blocks, (300, 390, 40, f32, 200, 3 * 128 * 390, "highest"), {}
    for dtype in (bf16, f16, f32):
        yield nearly_solved, (140, 140, 512, dtype, 50.0), {}
    yield nearly_solved, (140, 260, 256, f32, 50.0, 100), {"precision": "highest"}
    # In several blocks of rows and tiles of columns, some of them kept; labels at either end of the columns, and across
    # the middle of a tile; columns that are nobody's label.
    for offset, work_bytes in ((0, 0), (250, 2**30), (130, 4 * 390 * 64)):
        yield nearly_solved, (140, 390, 256, bf16, 100.0, offset, work_bytes), {}
    for dtype in (bf16, f16, f32):
        yield nearly_solved, (1, 1, 24, dtype, 30.0), {}
    yield nearly_solved, (1, 300, 256, bf16, 100.0, 299), {}


IN_BLOCKS = list(_in_blocks())
