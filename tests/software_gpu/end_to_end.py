"""The losses from their embeddings to their gradients through the Hopper kernels, in several blocks of rows."""

import contextlib
import unittest.mock

import torch

from gapkern import contrastive_loss, sigmoid_loss
from gapkern.ops.contrastive import lse_pair, sigmoid_sum, sm90
from gapkern.testing import assert_three_way

from . import problems
from .problems import ROUNDING, pair, seen_by_products


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


def softmax_in_blocks(device, n, m, d, dtype, kept_rows, offset, rows, elements):
    """As a whole problem, with rows of exponentials kept in the first blocks and recomputed in the others."""
    with blocks(rows, elements):
        return problems.softmax_statistics(device, n, m, d, dtype, kept_rows * 4 * m, offset=offset)


def sigmoid_in_blocks(device, n, m, d, dtype, offset, elements):
    with blocks(128, elements):
        return problems.sigmoid(device, n, m, d, dtype, offset)


def all_but_solved(device, n, d, dtype, scale):
    """Where the loss vanishes its rounding does not: it is a difference of numbers as large as the logits."""
    x, y = pair(n, n, d, dtype)

    def run(images, texts):
        inputs = [t.detach().clone().requires_grad_() for t in (images, texts)]
        loss = contrastive_loss(*inputs, scale)
        return [loss.detach(), *torch.autograd.grad(loss, inputs)]

    with matmul_precision("medium"):
        ours = device.on(run, x, y)
    truth = run(*(v.double() for v in seen_by_products(x, y)))
    assert float(truth[0]) < 1e-6 * scale
    assert abs(float(ours[0] - truth[0])) < 1e-6 * scale
    for a, b in zip(ours[1:], truth[1:], strict=True):
        assert float((a.double() - b).abs().max()) < 2e-6 * scale**2 / n


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
    scale, closeness = choose([(1.0, 1.0), (14.3, 1.0), (50.0, 0.2)])  # at 50 close pairs would be all but solved
    x, y, scale = *pair(n, m, d, dtype, seed=seed, closeness=closeness), torch.tensor(scale)

    def run(name, images, texts, s):
        inputs = [t.detach().clone().requires_grad_() for t in (images, texts, s)]
        if name == "contrastive" and n == m:
            loss = contrastive_loss(*inputs, memory=memory)
        elif name == "contrastive":
            row, _, positive = lse_pair(*inputs, label_offset=offset, precision="medium", work_bytes=memory)
            loss = (row - positive).mean()
        elif n == m:
            loss = sigmoid_loss(*inputs, -5.0)
        else:
            bias = torch.full_like(s, -5.0)
            loss = sigmoid_sum(*inputs, bias, label_offset=offset, precision="medium") / n
        loss.backward()
        return [loss.detach(), *(t.grad for t in inputs)]

    for name in ("contrastive", "sigmoid"):
        with matmul_precision("medium"), blocks(rows, elements):
            ours = device.on(run, name, x, y, scale)
        seen = seen_by_products(x, y)
        truth = run(name, *(v.double() for v in seen), scale.double())
        single = run(name, *(v.float() for v in seen), scale)
        size = float(truth[0].abs())
        # The softmax's loss is a difference of logits, whose float32 products round by their size.
        of_loss = 2e-5 + (1e-6 * float(scale) / size if name == "contrastive" else 0)
        for a, b, c, margin in zip(ours, single, truth, (of_loss, *[ROUNDING[dtype]] * 2), strict=False):
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
    for dtype in (bf16, f16, f32):
        yield all_but_solved, (140, 512, dtype, 50.0), {}


IN_BLOCKS = list(_in_blocks())
