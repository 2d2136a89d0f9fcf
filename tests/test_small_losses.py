"""Losses of trained batches, 1e-6 to 1e-1: their own precision, not that of the logits whose differences they are."""

import functools
import os

import pytest
import torch

from gapkern import contrastive_loss
from gapkern.ops.contrastive import chunked, lse_pair, sigmoid_sum, sm90
from gapkern.ops.contrastive.arguments import LseBackwardArguments
from gapkern.reference import contrastive as reference
from tests import warm
from tests.software_gpu.hopper_problems import losses_of_pairs

NAMES = ("loss", "grad_images", "grad_texts", "grad_logit_scale")


def unit(x):
    return torch.nn.functional.normalize(x, dim=1)


def loss_of(function, x, y, scale, offset=0, **options):
    """The mean loss of both directions over the rows that have labels."""
    row, col, positive = function(x, y, scale, label_offset=offset, **options)
    return ((row + col[offset : offset + len(x)]) / 2 - positive).mean()


@functools.cache
def trained(n, m, d, scale, loss, similarity="dot", offset=0, norms=1.0):
    """Pairs in float64 with about this loss: the noise between the two sides is found by bisection."""
    generator = torch.Generator().manual_seed(n + d)
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)  # noqa: E731
    x, y, noise = unit(draw(n, d)), unit(draw(m, d)), unit(draw(n, d))
    length = torch.linspace(1, norms, n, dtype=torch.float64)[:, None]

    def texts(much):
        whole = y.clone()
        whole[offset : offset + n] = unit(x + much * noise)
        return whole

    low, high = 0.0, 4.0
    s = torch.tensor(scale, dtype=torch.float64)
    for _ in range(40):
        middle = (low + high) / 2
        small = loss_of(reference.lse_pair, length * x, texts(middle), s, offset, similarity=similarity) < loss
        low, high = (middle, high) if small else (low, middle)
    return length * x, texts(high)


def differentiated(function, x, y, scale, dtype, **options):
    inputs = [t.detach().to(dtype).requires_grad_() for t in (x, y)]
    # A scale that float32 holds: what rounding it costs is not the operator's.
    inputs.append(torch.tensor(scale, dtype=torch.float32).to(dtype).requires_grad_())
    loss = loss_of(function, *inputs, **options)
    return [loss.detach(), *torch.autograd.grad(loss, inputs)]


def relative(a, truth):
    return float((a.double() - truth).norm() / truth.norm())


CASES = [
    (3, 3, 31, 14.3, 0.0316),
    (3, 3, 31, 14.3, 4e-4),
    (64, 64, 64, 14.3, 1e-2),
    (64, 64, 64, 50.0, 1e-3),
    (200, 200, 64, 100.0, 1e-1),
    (200, 200, 64, 100.0, 1e-4),
    (200, 200, 64, 100.0, 1e-6),
    (500, 500, 300, 50.0, 1e-3),
    (40, 100, 48, 30.0, 1e-3, "dot", 17),
    (17, 33, 8, 30.0, 1e-2, "dot", 16),
    (8, 8, 2, 100.0, 5e-2),
    (60, 60, 32, 5.0, 2e-2, "sqeuclidean"),
    (60, 90, 32, 20.0, 1e-4, "sqeuclidean", 30),
    (60, 60, 32, 100.0, 1e-2, "sqeuclidean"),
    (50, 50, 64, 20.0, 1e-1, "dot", 0, 5.0),  # the bound is five times what most rows reach
    (50, 50, 64, 300.0, 1e-3),  # beyond any shift of float32's exponents
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("work_bytes", [0, 2**30])
def test_small_losses_keep_their_relative_precision(poisoned, case, work_bytes):
    n, m, d, scale, loss, *rest = case
    similarity, offset, norms = (*rest, *("dot", 0, 1.0)[len(rest) :])
    x, y = (t.float().double() for t in trained(n, m, d, scale, loss, similarity, offset, norms))
    options = {"similarity": similarity, "offset": offset}
    truth = differentiated(reference.lse_pair, x, y, scale, torch.float64, **options)
    theirs = differentiated(reference.lse_pair, x, y, scale, torch.float32, **options)
    ours = differentiated(lse_pair, x, y, scale, torch.float32, work_bytes=work_bytes, **options)
    assert loss / 2 < float(truth[0]) < 2 * loss
    # The inputs' products round to 2^-24 of the largest logit: no arithmetic after them can do better.
    floor = 5e-7 + 1.2e-7 * scale * norms * (4 if similarity == "sqeuclidean" else 1)
    for name, a, b, c in zip(NAMES, ours, theirs, truth, strict=True):
        assert relative(a, c) <= min(relative(b, c), floor) + floor, (name, relative(a, c), relative(b, c))


def test_one_dimension_against_the_closed_form():
    # Two pairs at +1 and -1: every direction's loss is log(1 + e^(-2 s)).
    x = torch.tensor([[1.0], [-1.0]])
    for scale in (1.0, 3.0, 5.0):
        loss, *_, of_scale = differentiated(lse_pair, x, x, scale, torch.float32)
        e = torch.tensor(-2 * scale, dtype=torch.float64).exp()
        assert relative(loss, e.log1p()) < 3e-7
        assert relative(of_scale, -2 * e / (1 + e)) < 3e-7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [14.3, 100.0])
@pytest.mark.parametrize("loss", [1e-1, 1e-3])
def test_small_losses_of_half_precision(poisoned, dtype, scale, loss):
    x, y = (t.to(dtype).double() for t in trained(96, 96, 128, scale, loss))
    truth = differentiated(reference.lse_pair, x, y, scale, torch.float64)
    work_bytes = 2**30 if scale == 100 else 0
    inputs = [t.to(dtype).requires_grad_() for t in (x, y)]
    s = torch.tensor(scale, requires_grad=True)
    value = loss_of(lse_pair, *inputs, s, work_bytes=work_bytes)
    ours = [value.detach(), *torch.autograd.grad(value, [*inputs, s])]
    assert relative(ours[0], truth[0]) < 1e-5
    assert relative(ours[3], truth[3]) < (1e-2 if work_bytes and dtype == torch.bfloat16 else 1e-5)
    for a, b in zip(ours[1:3], truth[1:3], strict=True):
        least = 2**-24 * a.numel() ** 0.5 if dtype == torch.float16 else 0  # subnormal numbers
        assert float((a.double() - b).norm()) < 5e-3 * float(b.norm()) + least


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("similarity", ["dot", "sqeuclidean"])
@pytest.mark.parametrize("scale", [0.0, 1e-30, 14.3, -20.0, 100.0, 1e4])
@pytest.mark.parametrize("memory", ["recompute", "keep"])
def test_a_batch_of_one_has_no_loss_and_no_gradient(dtype, similarity, scale, memory):
    generator = torch.Generator().manual_seed(5)
    for d, norm in ((1, 1.0), (16, 1.0), (513, 30.0)):
        x, y = ((norm * unit(torch.randn(1, d, generator=generator))).to(dtype).requires_grad_() for _ in range(2))
        s = torch.tensor(scale, requires_grad=True)
        loss = contrastive_loss(x, y, s, similarity=similarity, memory=memory)
        assert loss.detach().item() == 0
        for gradient in torch.autograd.grad(loss, (x, y, s)):
            assert torch.count_nonzero(gradient) == 0


def by_chunks(module):
    """Like `lse_pair`, by the functions of a module of steps between products."""

    class Pair(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, y, scale, similarity, offset):
            row, col, positive, *saved = module.contrastive_lse(x, y, scale, similarity, offset, "highest", 0)
            ctx.save_for_backward(x, y, scale, *saved)
            ctx.options = similarity, offset
            return row, col, positive

        @staticmethod
        def backward(ctx, *grads):
            similarity, offset = ctx.options
            arguments = (*grads, *ctx.saved_tensors, similarity, offset, "highest", [True, True, True])
            found = module.contrastive_lse_backward(LseBackwardArguments(*arguments))
            return *(g.reshape(t.shape) for g, t in zip(found, ctx.saved_tensors, strict=False)), None, None

    return lambda x, y, scale, similarity="dot", label_offset=0: Pair.apply(x, y, scale, similarity, label_offset)


@pytest.mark.parametrize("case", [*CASES[:10], CASES[12]], ids=str)
def test_the_steps_between_products_keep_it_too(monkeypatch, case):
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", 2000)
    n, m, d, scale, loss, *rest = case
    similarity, offset = (*rest, *("dot", 0)[len(rest) :])[:2]
    x, y = (t.float().double() for t in trained(n, m, d, scale, loss, similarity, offset))
    options = {"similarity": similarity, "offset": offset}
    truth = differentiated(reference.lse_pair, x, y, scale, torch.float64, **options)
    ours = differentiated(by_chunks(chunked), x, y, scale, torch.float32, **options)
    floor = 2e-6 + 2e-7 * scale * (4 if similarity == "sqeuclidean" else 1)
    for name, a, c in zip(NAMES, ours, truth, strict=True):
        assert relative(a, c) <= floor, (name, relative(a, c))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("n", [1, 2, 96])
def test_hopper_s_steps_keep_it_too(monkeypatch, dtype, n):
    """Down to losses below a float32's last bit, with labels anywhere among the columns."""
    monkeypatch.setattr(sm90, "SUPER_ROWS", 40)
    for scale, offset in ((14.3, 0), (50.0, 7), (100.0, 0)):
        generator = torch.Generator().manual_seed(n)
        x, y = (unit(torch.randn(k, 512, generator=generator, dtype=torch.float64)) for k in (n, n + offset))
        y[offset:] = unit(y[offset:] + x)
        x, y = (t.to(dtype) for t in (x, y))
        inputs = [t.requires_grad_() for t in (x.double(), y.double(), torch.tensor(scale).double())]
        losses = losses_of_pairs(*inputs, offset).mean()
        truth = [losses.detach(), *torch.autograd.grad(losses, inputs)]
        inputs = [t.requires_grad_() for t in (x, y, torch.tensor(scale))]
        loss = loss_of(by_chunks(sm90), *inputs, offset)
        ours = [loss.detach(), *torch.autograd.grad(loss, inputs)]
        if n + offset == 1:
            assert all(torch.count_nonzero(v) == 0 for v in ours)
            continue
        assert abs(float(ours[0] - truth[0])) < 2e-5 * float(truth[0]) + 2**-52 * scale
        for a, c in zip(ours[1:3], truth[1:3], strict=True):
            least = 2**-25 * a.numel() ** 0.5 if dtype == torch.float16 else 0  # below what it holds
            assert float((a.double() - c).norm()) < 5e-3 * float(c.norm()) + least
        assert relative(ours[3], truth[3]) < 1e-2


def test_a_batch_of_one_by_the_steps_between_products():
    x, y = (unit(torch.randn(1, 16, generator=torch.Generator().manual_seed(i))) for i in (1, 2))
    for scale in (14.3, 100.0):
        for similarity in ("dot", "sqeuclidean"):
            found = differentiated(by_chunks(chunked), x, y, scale, torch.float32, similarity=similarity)
            assert all(torch.count_nonzero(v) == 0 for v in found)


def test_hopper_s_exponents_are_taken_from_the_bound_where_it_fits():
    x, y = (t.bfloat16() for t in trained(96, 96, 64, 30.0, 1e-2))
    found = loss_of(by_chunks(sm90), x, y, torch.tensor(30.0))
    truth = loss_of(reference.lse_pair, x.double(), y.double(), torch.tensor(30.0).double())
    assert relative(found, truth) < 1e-5
    norms = torch.ones(4)
    for scale, shift in ((14.3, 20.0), (30.0, 43.0), (60.0, 15.0), (100.0, 37.0)):
        _, found = torch.ops.gapkern.contrastive_sm90_shift(norms, norms, torch.tensor(scale))
        assert -float(found) == shift


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sigmoid_losses_of_trained_pairs(dtype):
    x, y = trained(80, 80, 64, 50.0, 1e-3)
    scale, bias = (torch.tensor(v, dtype=torch.float64) for v in (100.0, -40.0))
    inputs = [t.to(dtype).requires_grad_() for t in (x, y)] + [scale.to(dtype).requires_grad_(), bias.to(dtype)]
    ours = sigmoid_sum(*inputs)
    exact = [t.detach().double().requires_grad_() for t in inputs[:3]] + [bias]
    truth = reference.sigmoid_sum(*exact)
    assert 1 < float(truth.detach()) < 10
    margin = 1e-5 if dtype == torch.float32 else 1e-13
    assert relative(ours.detach(), truth.detach()) < margin
    for a, c in zip(torch.autograd.grad(ours, inputs[:3]), torch.autograd.grad(truth, exact[:3]), strict=True):
        assert relative(a, c) < margin


_ON_AN_INSTRUCTION_SET = """
import torch
from gapkern.ops.contrastive import lse_pair
g = torch.Generator().manual_seed(0)
x = torch.nn.functional.normalize(torch.randn(50, 24, generator=g), dim=1)
y = torch.nn.functional.normalize(x + .2 * torch.randn(50, 24, generator=g), dim=1)
for s in (14.3, 100.0):
    losses = []
    for dtype in (torch.float32, torch.float64):
        row, col, positive = lse_pair(x.to(dtype), y.to(dtype), torch.tensor(s))
        losses.append(((row + col) / 2 - positive).mean())
    print(float((losses[0] - losses[1]).abs() / losses[1]))
"""


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_instruction_set_keeps_it(isa):
    environment = {**os.environ, "GAPKERN_ISA": isa}
    done = warm.run(_ON_AN_INSTRUCTION_SET, env=environment)
    assert done.returncode == 0, done.stderr
    for found, most in zip(done.stdout.split(), (1.5e-6, 1e-5), strict=True):
        assert float(found) < most
