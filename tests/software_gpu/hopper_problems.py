"""Problems of Hopper's losses, each against float64: statistics, gradients, and dS element by element."""

import itertools
import math

import torch

from gapkern.ops.contrastive import emulation, lse_pair, sigmoid_sum, terms
from gapkern.reference import contrastive as reference
from gapkern.testing import assert_near, assert_three_way

from .fixture import on_gpu

# What rounding dS and the results once costs; statistics are never rounded.
ROUNDING = {torch.bfloat16: 5e-3, torch.float16: 7e-4, torch.float32: 5e-3}
FLOAT32 = 1e-6  # what exponentials and weights cost, where nothing is rounded to less
NAMES = ("row_lse", "col_lse", "positive", "grad_images", "grad_texts", "grad_logit_scale")


def pair(n, m, d, dtype, size=1.0, seed=0, closeness=1.0):
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(rows, d, generator=generator, dtype=torch.float64) for rows in (n, m))
    y[:n] += closeness * x[: len(y[:n])]
    return [(size * v / v.norm(dim=1, keepdim=True)).to(dtype) for v in (x, y)]


def seen_by_products(*values, precision="medium"):
    rounds = precision == "medium"
    return [v.bfloat16().float() if rounds and v.dtype == torch.float32 else v for v in values]


def rounding(dtype, precision):
    """What the gradients' precision costs."""
    return FLOAT32 if dtype == torch.float32 and precision != "medium" else ROUNDING[dtype]


def losses_of_pairs(x, y, scale, offset=0):
    """The pairs' softmax losses (N,), in both directions, from differences of logits: right however small they are."""
    logits = scale * (x @ y.T)
    rows = torch.arange(len(x))
    positive = logits[rows, rows + offset]
    own = torch.zeros_like(logits, dtype=torch.bool)
    own[rows, rows + offset] = True
    others = logits.masked_fill(own, -math.inf)
    row = (others - positive[:, None]).exp().sum(1).log1p()
    return (row + (others[:, offset : offset + len(x)] - positive).exp().sum(0).log1p()) / 2


# --- the Hopper path


def softmax_statistics(
    device, n, m, d, dtype, work_bytes=0, size=1.0, scale=14.3, offset=0, precision="medium", similarity="dot"
):
    """lse_pair and all its gradients."""
    x, y = pair(n, m, d, dtype, size)
    scale = torch.tensor(scale)

    def run(function, images, texts, s, **options):
        inputs = [t.detach().clone().requires_grad_() for t in (images, texts, s)]
        statistics = function(*inputs, similarity=similarity, label_offset=offset, **options)
        total = 0
        for v, w in zip(statistics, (1.0, -0.7, -1.3), strict=True):
            weight = torch.linspace(0.5, 1.5, len(v), dtype=torch.float64) * w / len(v)
            if w == -0.7:
                weight[::3] = 0
            total = total + (v.double() * weight).sum()
        return [*(v.detach() for v in statistics), *torch.autograd.grad(total, inputs)]

    ours = device.on(run, lse_pair, x, y, scale, precision=precision, work_bytes=work_bytes)
    assert [g.dtype for g in ours[3:5]] == [dtype] * 2
    if dtype == torch.float32:
        assert any(not torch.equal(g, g.bfloat16().float()) for g in ours[3:5])
    seen = seen_by_products(x, y, precision=precision)
    truth = run(reference.lse_pair, *(v.double() for v in seen), scale.double())
    single = run(reference.lse_pair, *(v.float() for v in seen), scale)
    of_gradients = rounding(dtype, precision)
    for name, a, b, c in zip(NAMES, ours, single, truth, strict=True):
        margin = of_gradients if name.startswith("grad") else 5e-6
        assert_three_way(a.reshape(c.shape), b, c, margin * (10 if name == NAMES[-1] else 1), name=name)
    return ours


def sigmoid(device, n, m, d, dtype, offset=0, precision="medium"):
    """sigmoid_sum and all its gradients."""
    x, y = pair(n, m, d, dtype)
    scale, bias = torch.tensor(14.3), torch.tensor(-6.0)

    def run(function, *inputs, **options):
        inputs = [t.detach().clone().requires_grad_() for t in inputs]
        loss = function(*inputs, label_offset=offset, **options)
        return [loss.detach(), *torch.autograd.grad(loss, inputs)]

    ours = device.on(run, sigmoid_sum, x, y, scale, bias, precision=precision)
    assert [g.dtype for g in ours[1:3]] == [dtype] * 2
    seen = seen_by_products(x, y, precision=precision)
    truth = run(reference.sigmoid_sum, *(v.double() for v in (*seen, scale, bias)))
    single = run(reference.sigmoid_sum, *(v.float() for v in seen), scale, bias)
    for a, b, c, margin in zip(ours, single, truth, (2e-5, *[rounding(dtype, precision)] * 2), strict=False):
        assert_three_way(a, b, c, margin)
    # Sums of both signs, of float32 values that were not rounded: a share of the loss.
    for a, b in zip(ours[3:], truth[3:], strict=True):
        assert abs(float(a) - float(b)) <= 2e-5 * (float(truth[0]) + abs(float(b)))
    return ours


def float16_gradients_of_kept(device):
    """What float16 embeddings never ask of gapkern/ops/contrastive/sm90.py: gradients of kept exponentials."""
    n, m, d = 65, 90, 16
    x, y = pair(n, m, d, torch.float16)
    control = emulation.shift(torch.ones(n), torch.ones(m), torch.tensor(5.0))
    kept = torch.zeros(n, 96, dtype=torch.bfloat16)
    logits = 5.0 * (x.double() @ y.double().T)
    kept[:, :m] = torch.exp2(control[0] * (x.float() @ y.float().T) + control[1])
    row, col = (logits.logsumexp(i) / math.log(2) for i in (1, 0))
    grads = [torch.full((k,), 0.5, dtype=torch.float64) for k in (n, m, n)]
    for separate in (0.0, 1.0):
        exponents = [g.log2() - v for g, v in ((grads[0], row), (grads[1], col))]
        common = [torch.exp2(v - control[1].double()).float() for v in exponents]
        weights = [  # told apart by the last bit; the one before is a separate weight's sign
            (v.float().view(torch.int32) & ~3 | 1 if separate else w.view(torch.int32) & ~1).view(torch.float32)
            for v, w in zip(exponents, common, strict=True)
        ]
        weights[1] = torch.nn.functional.pad(weights[1], (0, 256 - m))
        arguments = (x, y, control, torch.tensor([separate]), *weights, kept, grads[2], 0)
        ds = device.call("contrastive_sm90_gradient", *arguments)[:, :m]
        truth = 0.5 * (logits.softmax(1) + logits.softmax(0))
        truth[torch.arange(n), torch.arange(n)] = grads[2]
        assert_near(ds, truth, 5e-3)
    return [ds]


def elements_near(found, truth, epsilon, scale=1.0):
    """Each element apart, where a norm would not see one register of a fragment."""
    least = 1e-6 * float(truth.abs().max()) * scale
    off = (found.double() - truth).abs() > epsilon * truth.abs() + least
    assert not off.any(), f"{int(off.sum())} elements, first at {off.nonzero()[0].tolist()}"


def gradient_elements(device, n, m, d, dtype, keep, separate=False):
    """dS of the softmax losses, element by element, from weights of one size."""
    x, y = pair(n, m, d, dtype)
    scale, norms = torch.tensor(3.0), [torch.linspace(0.9, 1, n), torch.linspace(1, 0.8, m)]
    control = device.call("contrastive_sm90_shift", *norms, scale)
    assert torch.equal(control, emulation.shift(*norms, scale))
    kept = torch.zeros(n if keep else 0, -(-m // 8) * 8, dtype=torch.bfloat16)
    offset, rows = (m - n) // 2, torch.arange(n)
    sums = device.call("contrastive_sm90_sums", x, y, control, kept, offset)
    logits = 3.0 * (x.double() @ y.double().T)
    others = logits.clone()
    others[rows, rows + offset] = -math.inf
    for found, of_others in zip(device.call("contrastive_sm90_lse", *sums, x, y, control, offset), (1, 0), strict=True):
        elements_near(found, others.logsumexp(of_others), 2e-6)
    positive = device.call("contrastive_sm90_positive", x, y, offset)
    elements_near(3 * positive, logits.diagonal(offset)[:n], 1e-15)
    row, col = logits.logsumexp(1), logits.logsumexp(0)
    grads = [1 + torch.rand(k, generator=torch.Generator().manual_seed(k), dtype=torch.float64) for k in (n, m, n)]
    grads[1] *= m / n
    if separate:  # weights that leave float32, of a row and a column in tiles that have others too
        grads[0][0] = 1e-70
        grads[1][m - 1] = -1e-70
    row2, col2 = row / math.log(2), col / math.log(2)
    weights = device.call("contrastive_sm90_weights", row2, col2, *grads[:2], control)
    assert bool(weights[2]) == separate
    assert sum(int((w.view(torch.int32) & 1).sum()) for w in weights[:2]) == 2 * separate
    ds = device.call("contrastive_sm90_gradient", x, y, control, weights[2], *weights[:2], kept, grads[2], offset)
    ds = ds[:, :m]
    truth = grads[0][:, None] * (logits - row[:, None]).exp() + grads[1] * (logits - col).exp()
    truth[rows, rows + offset] = grads[2]
    elements_near(ds, truth, 2**-7 if keep else 2 ** (-8 if dtype == torch.bfloat16 else -10))
    return [ds]


def in_terms(device, loss, n, m, d, scale=3.0):
    """dS of float32 embeddings, element by element, as the sum of bfloat16 matrices that have 24 bits together."""
    x, y = pair(n, m, d, torch.float32)
    x, y, scale = 2 * x, y / 3, torch.tensor(scale)
    operands = terms.rows(x, 0), terms.rows(y, 1)
    logits = float(scale) * (x.double() @ y.double().T)
    offset, rows = (m - n) // 2, torch.arange(n)
    if loss == "softmax":
        lse = [logits.logsumexp(i) for i in (1, 0)]
        grads = [1 + torch.rand(k, generator=torch.Generator().manual_seed(k), dtype=torch.float64) for k in (n, m, n)]
        control = device.call("contrastive_sm90_shift", *(v.norm(dim=1) for v in (x, y)), scale)
        weights = device.call("contrastive_sm90_weights", *(v / math.log(2) for v in lse), *grads[:2], control)
        weights, kept = [weights[2], *weights[:2]], operands[0].new_empty(0)
        ds = device.call("contrastive_sm90_gradient", *operands, control, *weights, kept, grads[2], offset, 3)
        truth = grads[0][:, None] * (logits - lse[0][:, None]).exp() + grads[1] * (logits - lse[1]).exp()
        truth[rows, rows + offset] = grads[2]
    else:
        _, ds = device.call("contrastive_sm90_sigmoid", *operands, scale, torch.tensor(-1.0), offset, 3)
        z = torch.where(torch.arange(n)[:, None] + offset == torch.arange(m), 1.0, -1.0).double()
        truth = -z * torch.sigmoid(-z * (logits - 1))
    matrices = ds.view(3, n, -1)[:, :, :m].double()
    elements_near(matrices.sum(0), truth, 1e-6, 0.1)
    for k in (1, 2):  # each is half a unit in the last place of what the ones before it add up to, at most
        assert bool((matrices[k].abs() <= 2.0 ** -(8 * k) * truth.abs() * 1.01).all())
    return [ds.view(3, n, -1)[:, :, :m]]


def sigmoid_elements(device, n, m, d, dtype, offset=0):
    x, y = pair(n, m, d, dtype)
    scale, bias = torch.tensor(3.0), torch.tensor(-1.0)
    sums, ds = device.call("contrastive_sm90_sigmoid", x, y, scale, bias, offset)
    t = x.double() @ y.double().T
    z = torch.where(torch.arange(n)[:, None] + offset == torch.arange(m), 1.0, -1.0).double()
    u = z * (3 * t - 1)
    truth = -z * torch.sigmoid(-u)
    elements_near(ds[:, :m], truth, 2 ** (-8 if dtype == torch.bfloat16 else -10))
    for found, values in zip(sums, (-torch.nn.functional.logsigmoid(u), truth, truth * t), strict=True):
        assert float((found - values.sum(1)).abs().max()) < 1e-5 * float(values.abs().sum(1).max())
    return [sums, ds[:, :m]]


def kernels():
    bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
    kept = 2**32
    on_hopper = [(131, 260, 72), *on_gpu((3, 9, 16), (515, 515, 136), (1025, 2311, 768), (1000, 17000, 64))]
    for shape, dtype, work_bytes in itertools.product(on_hopper, (bf16, f16), (0, kept, *on_gpu(10**6))):
        yield softmax_statistics, (*shape, dtype, work_bytes), {"offset": (shape[1] - shape[0]) // 2}
    yield softmax_statistics, (1, 1, 8, bf16, kept), {}
    for work_bytes in (0, *on_gpu(kept)):
        yield softmax_statistics, (130, 300, 64, f32, work_bytes), {"offset": 7}
    # Sums that need the repair, separate weights.
    norms = [(5.0, 100.0), (20.0, 100.0), *on_gpu(*itertools.product((0.1, 1.0, 5.0, 30.0), (1.0, 14.3, 50.0)))]
    for (size, scale), work_bytes in itertools.product(norms, (0, kept)):
        yield softmax_statistics, (140, 270, 32, bf16, work_bytes), {"size": size, "scale": scale}
    yield softmax_statistics, (140, 270, 32, f16, 0), {"size": 8.0, "scale": 20.0}
    # Distances as products of longer rows; at the larger scale and size many sums are repaired.
    for dtype, work_bytes in ((bf16, 0), (bf16, kept), (f32, 0)):
        yield softmax_statistics, (130, 300, 64, dtype, work_bytes), {"offset": 7, "similarity": "sqeuclidean"}
    for size, scale in ((1.0, 100.0), (5.0, 30.0), (3.0, -2.0)):
        options = {"size": size, "scale": scale, "similarity": "sqeuclidean"}
        yield softmax_statistics, (140, 270, 32, bf16, 0), options
    # Float32 in terms; at the larger norms sums are repaired, and weights separate.
    for size, scale in ((1.0, 14.3), (4.0, 30.0)):
        options = {"size": size, "scale": scale, "offset": 7, "precision": "highest"}
        yield softmax_statistics, (140, 300, 64, f32), options
    for loss in ("softmax", "sigmoid"):
        yield in_terms, (loss, 140, 300, 40), {}
    yield sigmoid, (129, 300, 40, f32), {"offset": -70, "precision": "highest"}
    yield float16_gradients_of_kept, (), {}
    for dtype, keep, separate in (
        (bf16, False, False),
        (bf16, True, False),
        (bf16, False, True),
        (bf16, True, True),
        (f16, False, False),
        (f16, False, True),
    ):
        yield gradient_elements, (140, 300, 72, dtype, keep, separate), {}
    yield gradient_elements, (70, 1290, 8, bf16, False), {}  # more tiles than a loop's unrolling
    for dtype, offset in ((bf16, 0), (f16, 150)):
        yield sigmoid_elements, (140, 300, 72, dtype, offset), {}
    for offset in (-(2**40), -139, 299, 300, 2**40):  # one row has a label, or none
        yield sigmoid_elements, (140, 300, 8, bf16, offset), {}
    for dtype, offset in ((bf16, 0), (f16, 5), (f32, -70)):
        yield sigmoid, (129, 300, 72, dtype), {"offset": offset}
        for shape in on_gpu((1, 1, 8), (515, 515, 136), (1025, 2311, 768), (17000, 1000, 64)):
            yield sigmoid, (*shape, dtype), {"offset": offset}


HOPPERS = (float16_gradients_of_kept, gradient_elements, sigmoid_elements, in_terms)  # which call its kernels by name
