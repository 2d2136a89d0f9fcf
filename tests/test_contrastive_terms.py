"""Float32 in bfloat16 terms: exact sums of the largest, losses of float32's accuracy, however tensor cores round."""

import pytest
import torch

from gapkern.ops.contrastive import chunked, dispatch, lse_pair, sm90, terms
from gapkern.reference import contrastive as reference
from gapkern.testing import assert_near, assert_three_way
from tests.software_gpu.fixture import on_gpu
from tests.test_contrastive_sm90 import NAMES, by_autograd, pair, steps

KINDS = ["random", "aligned", "positive", "equal", "few", "norms", "powers"]
MARGIN = 1e-6  # exponents, weights and dS are float32 numbers of their own: some units in the last place


def embeddings(kind, n=12, d=328, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(n, d, generator=generator, dtype=torch.float64) for _ in range(2))
    if kind == "aligned":
        direction = torch.randn(1, d, generator=generator, dtype=torch.float64)
        x, y = 0.1 * x + direction, 0.1 * y + direction
    elif kind == "positive":
        x, y = x.abs(), y.abs()
    elif kind == "equal":
        x, y = torch.ones_like(x), torch.ones_like(y)
    elif kind == "few":  # most of a row's norm in few of its elements
        x, y = x**7, y**7
    if kind == "powers":  # norms around a power of two, where the grid changes
        x, y = (v / v.norm(dim=1, keepdim=True) * torch.linspace(0.6, 0.74, n)[:, None].double() for v in (x, y))
    elif kind == "norms":
        x, y = (v * torch.logspace(-20, 12, n, 2, dtype=torch.float64)[:, None] for v in (x, y))
    else:
        x, y = (v / v.norm(dim=1, keepdim=True) for v in (x, y))
    return x.float(), y.float()


def cut(values, bits=24):
    """Towards zero, to so many significant bits."""
    fraction, exponent = torch.frexp(values)
    return torch.ldexp(torch.trunc(fraction * 2.0**bits), exponent - bits)


def tensor_core(a, b):
    """a b^T as tensor cores form it at worst: 16 products at a time, cut off 24 bits below the largest, and the sum."""
    sums = torch.zeros(len(a), len(b), dtype=torch.float64)
    for u, v in zip(a.double().split(16, 1), b.double().split(16, 1), strict=True):
        addends = torch.cat([u[:, None] * v, sums[..., None]], -1)
        unit = torch.ldexp(torch.ones_like(sums), torch.frexp(addends.abs().amax(-1))[1] - 25)[..., None]
        sums = cut((torch.trunc(addends / unit) * unit).sum(-1))
    return sums


def added_up(a, b):
    """a b^T in float32, one product after the other."""
    sums = torch.zeros(len(a), len(b))
    for u, v in zip(a.T, b.T, strict=True):
        sums += u[:, None] * v
    return sums


@pytest.mark.parametrize("kind", KINDS)
def test_terms_add_up_to_what_they_are_of(kind):
    x, _ = embeddings(kind)
    parts = terms.split(x)
    assert [p.dtype for p in parts] == [torch.bfloat16] * 3
    off = (sum(p.double() for p in parts) - x.double()).abs() / x.double().norm(dim=1, keepdim=True)
    assert float(off.max()) < 2**-28
    for side in (0, 1):
        found = terms.of_rows(terms.rows(x, side), side)
        assert all(torch.equal(a, b) for a, b in zip(found, parts, strict=True))
    assert not terms.split(torch.zeros(3, 8))[0].any()


@pytest.mark.parametrize("kind", KINDS)
def test_no_sum_of_the_largest_terms_is_rounded(kind):
    x, y = embeddings(kind, d=1024)
    x, y = (terms.split(v)[0].double() for v in (x, y))
    order = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(1))
    sums = (x[:, None] * y)[..., order].cumsum(-1)
    assert torch.equal(sums.float().double(), sums)
    assert torch.equal(tensor_core(x, y), x @ y.T)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("d", [8, 72, 1024])
def test_products_on_the_worst_of_tensor_cores_are_float32s(kind, d):
    x, y = embeddings(kind, d=d)
    truth, norms = x.double() @ y.double().T, x.double().norm(dim=1)[:, None] * y.double().norm(dim=1)
    found = tensor_core(terms.rows(x, 0), terms.rows(y, 1))
    off, of_float32 = ((v.double() - truth).abs() / norms for v in (found, added_up(x, y)))
    assert float(off.max()) < 2**-22.5
    assert_three_way(found / norms, added_up(x, y) / norms, truth / norms, 2**-24)
    assert float(off.square().mean()) <= float(of_float32.square().mean()) + 2.0**-48


def test_what_the_order_and_the_grid_are_for():
    """Without either the steps' cut-off bits add up, to ten and more times float32's error."""
    x, y = embeddings("aligned", d=768)
    truth = x.double() @ y.double().T

    def error(found):
        return float((found - truth).norm() / truth.norm())

    right, worst_first = (tensor_core(*v) for v in _arranged(x, y, terms.split))
    plain, _ = (tensor_core(*v) for v in _arranged(x, y, _rounded_terms))
    assert error(right) < 2**-24
    assert error(plain) > 20 * error(right)
    assert error(worst_first) > 50 * error(right)
    assert error(plain) > 2 * error(added_up(x, y).double())


def _arranged(x, y, split):
    of_x, of_y = split(x), split(y)
    for order in (terms.PRODUCTS, terms.PRODUCTS[::-1]):
        yield torch.cat([of_x[i] for i, _ in order], 1), torch.cat([of_y[j] for _, j in order], 1)


def _rounded_terms(x):
    found, rest = [], x
    for _ in range(3):
        found.append(rest.bfloat16())
        rest = rest - found[-1].float()
    return found


@pytest.mark.parametrize("one_sign", [False, True])
def test_products_with_gradients_of_the_library_are_float32s(monkeypatch, one_sign):
    """Its own sums are cut off too: those of the largest terms are short, and added up in float32."""
    generator = torch.Generator().manual_seed(0)
    ds = torch.rand(5, 5000, generator=generator) / 5000
    y = torch.randn(5000, 24, generator=generator)
    y = torch.nn.functional.normalize(y.abs() if one_sign else y, dim=1)
    monkeypatch.setattr(terms, "add_matmul", lambda out, a, b: out.add_(tensor_core(a, b.T).float()))

    def found():
        out = torch.zeros(5, 24)
        terms.add_products(out, _rounded_terms(ds), terms.of_rows(terms.rows(y, 1), 1))
        return out

    truth = ds.double() @ y.double()
    assert_three_way(found(), added_up(ds, y.T), truth, 0)
    monkeypatch.setattr(terms, "_STEPS", (2**31,) * 3)
    with pytest.raises(AssertionError, match="error above"):
        assert_three_way(found(), added_up(ds, y.T), truth, 0)


def test_products_in_blocks_of_rows(monkeypatch):
    x, y = embeddings("random", n=50, d=40)
    whole, parts = torch.ones(50, 24), torch.ones(50, 24)
    left, right = terms.split(x), terms.of_rows(terms.rows(y[:40, :24].contiguous(), 1), 1)
    terms.add_products(whole, left, right)
    assert_near(whole, 1 + x.double() @ y[:40, :24].double(), 1e-7)
    monkeypatch.setattr(terms, "_BLOCK", 7 * 24)
    terms.add_products(parts, left, right)
    assert_near(parts, whole, 1e-7)


@pytest.mark.parametrize("shape", [(1, 1, 8), (3, 9, 16), (128, 256, 64), (300, 517, 72), (130, 260, 512)])
@pytest.mark.parametrize(
    ("scale", "size", "margin"),
    [
        (0.0, 1.0, MARGIN),
        (1.0, 1.0, MARGIN),
        (14.3, 1.0, MARGIN),
        (100.0, 1.0, MARGIN),
        (-7.0, 2.0, MARGIN),
        (10.0, 5.0, MARGIN),
    ],
)
def test_orchestration_against_float64(poisoned, shape, scale, size, margin):
    n, m, d = shape
    x, y = pair(n, m, d, torch.float32, size=size)
    scale, offset = torch.tensor(scale), (m - n) // 2
    ours = steps(x, y, scale, offset, 2**40)
    assert [g.dtype for g in ours[3:5]] == [torch.float32] * 2
    truth = by_autograd(reference.lse_pair, x.double(), y.double(), scale.double(), offset)
    single = by_autograd(reference.lse_pair, x, y, scale, offset)
    for name, a, b, c in zip(NAMES, ours, single, truth, strict=True):
        # The scale's gradient is a sum of both signs: a share of what is summed, not of the sum.
        allowed = margin if name.startswith("grad") else MARGIN
        assert_three_way(a.reshape(c.shape), b, c, allowed * (10 if name == NAMES[-1] else 1), name=name)
    assert torch.equal(ours[2], scale.double() * (x.double() * y.double()[offset : offset + n]).sum(1)) or n > 1


def test_orchestration_in_blocks_forms_only_what_is_needed(monkeypatch):
    x, y = pair(700, 705, 24, torch.float32)
    scale = torch.tensor(20.0)
    whole = steps(x, y, scale, 2)
    monkeypatch.setattr(sm90, "SUPER_ROWS", 1024)
    monkeypatch.setattr(sm90, "GRADIENT_ELEMENTS", 3 * 256 * 705)
    for needs in ((True, True, True), (True, False, False), (False, True, False), (False, False, True)):
        some = steps(x, y, scale, 2, needs=needs)
        for name, wanted, a, b in zip(NAMES, (*[True] * 3, *needs), some, whole, strict=True):
            assert a.numel() == (b.numel() if wanted else 0)
            if wanted:
                assert_near(a, b, 1e-6, name=name)


@pytest.mark.parametrize("shape", [(1, 1, 8), (128, 256, 64), (300, 517, 72)])
@pytest.mark.parametrize("side", [-1, 0, 1])
def test_sigmoid_orchestration_against_float64(poisoned, shape, side):
    n, m, d = shape
    x, y = pair(n, m, d, torch.float32)
    scale, bias, offset = torch.tensor(14.3), torch.tensor(-6.0), side * (n // 2 + 1)
    ours = sm90.sigmoid_loss(x, y, scale, bias, offset, "highest", [True, True])
    inputs = [t.clone().requires_grad_() for t in (x, y, scale, bias)]
    loss = reference.sigmoid_sum(*inputs, label_offset=offset)
    single = [loss.detach(), *torch.autograd.grad(loss, inputs)]
    inputs = [t.detach().double().requires_grad_() for t in inputs]
    loss = reference.sigmoid_sum(*inputs, label_offset=offset)
    truth = [loss.detach(), *torch.autograd.grad(loss, inputs)]
    for name, a, b, c in zip(("loss", "images", "texts"), ours, single, truth, strict=False):
        assert_three_way(a, b, c, MARGIN, name=name)
    for a, b in zip(ours[3:], truth[3:], strict=True):
        assert abs(float(a) - float(b)) <= 2e-6 * (float(truth[0]) + abs(float(b)))


def test_only_what_is_kept_has_memory(monkeypatch):
    """Exponentials of float32 are recomputed: the forward pass takes nothing for them, nor does its fake."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr(dispatch, "uses_sm90", lambda images, similarity, precision: True)
    for dtype, precision, kept in (
        (torch.float32, "highest", False),
        (torch.float32, "medium", True),
        (torch.float16, "highest", False),
        (torch.bfloat16, "highest", True),
    ):
        x, y = pair(12, 20, 8, dtype)
        ours = sm90.contrastive_lse(x, y, torch.tensor(3.0), "dot", 0, precision, 2**20)[-1]
        with FakeTensorMode() as mode:
            fake = [mode.from_tensor(v) for v in (x, y, torch.tensor(3.0))]
            expected = torch.ops.gapkern.contrastive_lse(*fake, "dot", 0, precision, 2**20)[-1]
        assert ours.shape == expected.shape == (12 * kept, 20)


@pytest.mark.sm90
@pytest.mark.parametrize("rounding", [0, 1])
@pytest.mark.parametrize("kind", ["aligned", "random"])
def test_the_device_forms_products_of_float32s_accuracy(cuda_device, kind, rounding):
    """Log-sum-exps of logits that are nearly one: the products' errors, and on the worst of tensor cores."""
    x, y = embeddings(kind, n=40, d=256)
    scale = torch.tensor(64.0)
    cuda_device.seed(0, rounding)
    row, col, *_ = cuda_device.on(sm90.contrastive_lse, x, y, scale, "dot", 0, "highest", 0)
    cuda_device.seed(0)
    logits = 64 * (x.double() @ y.double().T)
    by_products = 64 * added_up(x, y)
    for found, dim in ((row, 1), (col, 0)):
        assert_three_way(found, by_products.logsumexp(dim), logits.logsumexp(dim), 2.0**-24)


@pytest.mark.sm90
@pytest.mark.parametrize("shape", [(140, 270, 40), *on_gpu((2000, 2500, 384), (4096, 4096, 768))])
def test_against_chunks_of_the_library(cuda_device, shape):
    x, y = pair(*shape, torch.float32)
    scale, bias = torch.tensor(40.0), torch.tensor(-6.0)
    ours, other = (cuda_device.on(steps, x, y, scale, shape[1] - shape[0], module=v) for v in (sm90, chunked))
    for name, a, b in zip(NAMES, ours, other, strict=True):
        assert_near(a.reshape(b.shape), b, 2e-5 if name.startswith("grad") else 1e-6, name=name)
    ours = cuda_device.on(sm90.sigmoid_loss, x, y, scale, bias, 3, "highest", [True] * 2)
    other = cuda_device.on(chunked.sigmoid_loss, x, y, scale, bias, 3, "highest", [True] * 2)
    for a, b in zip(ours, other, strict=True):
        assert_near(a, b, 2e-5)


@pytest.mark.gpu
@pytest.mark.sm90
def test_two_runs_agree_and_a_graph_replays():
    if not dispatch.built():
        pytest.skip("the library was built without the Hopper kernels")
    x, y = (v.cuda() for v in pair(3001, 3003, 256, torch.float32))
    scale = torch.tensor(50.0, device="cuda")
    assert dispatch.uses_sm90(x, "dot", "highest")
    first, second = (by_autograd(lse_pair, x, y, scale, 1) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        steps(x, y, scale)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = steps(x, y, scale)
    x.copy_(pair(3001, 3003, 256, torch.float32, size=3.0, seed=1)[0])
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, steps(x, y, scale), strict=True))
