"""The contrastive operators against float64 and PyTorch's own error."""

import math

import pytest
import torch

from gapkern.ops.contrastive import chunked, lse_pair, sigmoid_sum
from gapkern.ops.contrastive.arguments import LseBackwardArguments
from gapkern.reference import contrastive as reference
from gapkern.testing import assert_near, assert_three_way
from tests.contrasted import NAMES, pair, value_and_gradients
from tests.software_gpu import chunk_problems
from tests.software_gpu.torch_device import TorchDevice

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 1), (2, 3, 5), (33, 33, 7), (64, 129, 64), (123, 252, 33), (257, 260, 128), (300, 517, 72)]
MARGIN = {torch.float32: 2e-6, torch.float64: 1e-13, torch.bfloat16: 2e-3, torch.float16: 2e-4}


@pytest.mark.parametrize("similarity", ["dot", "sqeuclidean"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients_are_as_good_as_pytorchs(poisoned, shape, dtype, similarity):
    n, m, d = shape
    x, y = pair(n, m, d, dtype)
    offset = (m - n) // 2
    scale = torch.tensor(3.0, dtype=torch.float64)
    ours = value_and_gradients(lse_pair, x, y, scale, similarity=similarity, label_offset=offset)
    theirs = value_and_gradients(reference.lse_pair, x, y, scale.to(dtype), similarity=similarity, label_offset=offset)
    truth = value_and_gradients(
        reference.lse_pair, x.double(), y.double(), scale, similarity=similarity, label_offset=offset
    )
    for name, a, b, c in zip(NAMES, ours, theirs, truth, strict=True):
        assert_three_way(a, b, c, MARGIN[dtype], name=name)


def three_ways(x, y, scale, similarity):
    """Ours, PyTorch's in float32 (float64 for float64), and float64's."""
    work = torch.promote_types(x.dtype, torch.float32)
    return (
        value_and_gradients(lse_pair, x, y, scale, similarity=similarity),
        value_and_gradients(reference.lse_pair, x.to(work), y.to(work), scale.to(work), similarity=similarity),
        value_and_gradients(reference.lse_pair, x.double(), y.double(), scale, similarity=similarity),
    )


ROUNDING = {torch.float32: 5e-6, torch.float64: 1e-10, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0, 1e4])
@pytest.mark.parametrize("norm", [0.0, 1e-3, 1.0, 1e2, 1e4])
@pytest.mark.parametrize("similarity", ["dot", "sqeuclidean"])
def test_any_logit_scale_stays_finite_and_near(poisoned, dtype, scale, norm, similarity):
    x, y = pair(40, 50, 24, scale=1.0, seed=3)
    x, y = ((norm * torch.nn.functional.normalize(v, dim=1)).to(dtype) for v in (x, y))
    results = three_ways(x, y, torch.tensor(scale, dtype=torch.float64), similarity)
    for name, a, b, c in zip(NAMES, *results, strict=True):
        assert not a.isnan().any(), name
        # Float16 has no room for the largest gradients: there they are infinite.
        assert_three_way(a, b.to(a.dtype), c.to(a.dtype), ROUNDING[dtype], name=name)


@pytest.mark.parametrize("similarity", ["dot", "sqeuclidean"])
def test_norms_whose_squares_leave_float32(poisoned, similarity):
    x, y = pair(30, 40, 16, scale=1e22, seed=1)
    ours, _, truth = three_ways(x, y, torch.tensor(1.0, dtype=torch.float64), similarity)
    for name, a, c in zip(NAMES, ours, truth, strict=True):
        assert_near(a, c, 1e-6, name=name)


@pytest.mark.parametrize("d", [3, 72, 1024])
@pytest.mark.parametrize("apart", [1e-3, 0.1])
def test_near_pairs_keep_their_distances_far_from_the_centre(poisoned, d, apart):
    x, y = pair(60, 75, d, scale=5 / math.sqrt(d), seed=d)
    x += 50  # what all share is no matter
    y[:60] = x + apart * y[:60]
    y[60:] += 50
    results = three_ways(x, y, torch.tensor(2.0, dtype=torch.float64), "sqeuclidean")
    for name, a, b, c in zip(NAMES, *results, strict=True):
        assert_three_way(a, b, c, 2e-7 if "grad" not in name else 2e-6, name=name)


@pytest.mark.parametrize("work_bytes", [0, 10**6])
@pytest.mark.parametrize("scale", [30.0, 100.0, -100.0, 135.0, 1000.0])
@pytest.mark.parametrize("cosine", [0.9, 0.2, -0.3, -0.95])
def test_bfloat16_exponentials_stay_in_range_wherever_the_logits_lie(poisoned, cosine, scale, work_bytes):
    # Sums far below the largest possible exponential: a constant shift would lose them, and must be noticed.
    around = torch.nn.functional.normalize(torch.arange(1.0, 65.0), dim=0)
    x, y = pair(70, 90, 64, scale=0.02, seed=5)
    across = torch.nn.functional.normalize(y - (y @ around)[:, None] * around, dim=1)
    x = torch.nn.functional.normalize(around + x, dim=1).bfloat16()
    y = (cosine * around + (1 - cosine**2) ** 0.5 * across).bfloat16()
    s = torch.tensor(scale, dtype=torch.float64)
    ours = value_and_gradients(lse_pair, x, y, s, work_bytes=work_bytes)
    theirs = value_and_gradients(reference.lse_pair, x, y, s.bfloat16())
    truth = value_and_gradients(reference.lse_pair, x.double(), y.double(), s)
    for name, a, b, c in zip(NAMES, ours, theirs, truth, strict=True):
        assert torch.isfinite(a).all(), name
        assert_three_way(a, b, c, 2e-3, name=name)


@pytest.mark.parametrize("similarity", ["dot", "sqeuclidean"])
@pytest.mark.parametrize("fraction", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("scale", [5.0, 5e3])  # the second is float64's to solve, which keeps none of float32's
def test_kept_logits_change_nothing_but_the_time(similarity, fraction, scale):
    x, y = pair(150, 170, 20)
    scale = torch.tensor(scale)
    kept = int(fraction * 150 * 170 * 4)
    first = value_and_gradients(lse_pair, x, y, scale, similarity=similarity)
    second = value_and_gradients(lse_pair, x, y, scale, similarity=similarity, work_bytes=kept)
    for name, a, b in zip(NAMES, first, second, strict=True):
        assert_near(b, a, 1e-6, name=name)


@pytest.mark.parametrize("similarity", ["dot", "sqeuclidean"])
@pytest.mark.parametrize("work_bytes", [0, 10**6])
def test_gradcheck(similarity, work_bytes):
    x, y = pair(5, 7, 4, torch.float64)
    scale = torch.tensor(2.0, dtype=torch.float64)
    inputs = tuple(t.requires_grad_() for t in (x, y, scale))
    assert torch.autograd.gradcheck(
        lambda *t: lse_pair(*t, similarity=similarity, label_offset=1, work_bytes=work_bytes), inputs
    )


def check_any_shape(n, extra, d, log_scale, dtype, similarity, seed, log_norm):
    x, y = pair(n, n + extra, d, dtype, scale=10.0**log_norm / math.sqrt(d), seed=seed)
    results = three_ways(x, y, torch.tensor(10.0**log_scale, dtype=torch.float64), similarity)
    for name, a, b, c in zip(NAMES, *results, strict=True):
        a, b, c = (v.detach() for v in (a, b, c))
        # A gradient beyond float16's range is infinite, which is what a gradient scaler looks for.
        of_range, fits = c.abs() / torch.finfo(a.dtype).max, a.isfinite()
        assert fits[of_range < 0.999].all(), name
        assert a[of_range > 1.001].isinf().all(), name
        if fits.any():
            a, b, c = (v.double()[fits] for v in (a, b, c))
            allowed = float((b - c).abs().max()) + ROUNDING[dtype] * max(float(c.abs().max()), 1)
            assert float((a - c).abs().max()) <= allowed, name


@pytest.mark.parametrize(
    "example",
    [
        (4, 17, 24, 3.0, torch.float32, "sqeuclidean", 6838),  # logits of thousands, with float32's rounding
        (34, 22, 34, 3.52427752, torch.float32, "dot", 22),
        (33, 0, 1, 2.0, torch.float32, "sqeuclidean", 33),  # near pairs of large norm
        (43, 0, 1, 1.21636547, torch.float32, "sqeuclidean", 120),
        (56, 2, 1, 3.53648066, torch.float16, "dot", 45345),  # gradients beyond float16's range
        (1, 22, 3, 2.97352784, torch.bfloat16, "dot", 733982),  # one row, whose terms cancel
    ],
)
def test_shapes_that_were_hard_once(example):
    check_any_shape(*example, 0.0)


def test_properties_of_any_shape():
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    given = hypothesis.given(
        n=st.integers(1, 60),
        extra=st.integers(0, 30),
        d=st.integers(1, 40),
        log_scale=st.floats(-3, 4),
        dtype=st.sampled_from(DTYPES),
        similarity=st.sampled_from(["dot", "sqeuclidean"]),
        seed=st.integers(0, 2**20),
        log_norm=st.floats(-3, 4),
    )
    given(check_any_shape)()


SIGMOID_NAMES = ("loss", "images", "texts", "scale", "bias")


def sigmoid_and_gradients(function, *inputs, **options):
    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    loss = function(*inputs, **options)
    return [loss, *torch.autograd.grad(loss, inputs)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_sigmoid_loss_and_gradients(poisoned, shape, dtype):
    n, m, d = shape
    x, y = pair(n, m, d, dtype)
    values = [torch.tensor(v, dtype=torch.float64) for v in (10.0, -6.0)]
    offset = 1 if m > n else 0
    ours = sigmoid_and_gradients(sigmoid_sum, x, y, *values, label_offset=offset)
    theirs = sigmoid_and_gradients(reference.sigmoid_sum, x, y, *(v.to(dtype) for v in values), label_offset=offset)
    truth = sigmoid_and_gradients(reference.sigmoid_sum, x.double(), y.double(), *values, label_offset=offset)
    for name, a, b, c in zip(SIGMOID_NAMES, ours, theirs, truth, strict=True):
        assert_three_way(a, b, c, MARGIN[dtype], name=name)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0, 1e4])
@pytest.mark.parametrize("norm", [0.0, 1e-3, 1.0, 1e2, 1e4])
def test_sigmoid_loss_at_any_logit_scale(poisoned, scale, norm):
    x, y = (norm * torch.nn.functional.normalize(v, dim=1) for v in pair(40, 50, 24, scale=1.0, seed=3))
    values = [torch.tensor(v, dtype=torch.float64) for v in (scale, -10.0)]
    ours = sigmoid_and_gradients(sigmoid_sum, x, y, *values)
    theirs = sigmoid_and_gradients(reference.sigmoid_sum, x, y, *(v.float() for v in values))
    truth = sigmoid_and_gradients(reference.sigmoid_sum, x.double(), y.double(), *values)
    for name, a, b, c in zip(SIGMOID_NAMES, ours, theirs, truth, strict=True):
        assert_three_way(a, b, c, 2e-6, name=name)


def test_sigmoid_gradcheck():
    x, y = pair(4, 6, 3, torch.float64)
    inputs = tuple(t.requires_grad_() for t in (x, y, torch.tensor(3.0).double(), torch.tensor(-1.0).double()))
    assert torch.autograd.gradcheck(lambda *t: sigmoid_sum(*t, label_offset=2), inputs)


def test_sigmoid_rows_without_a_label_are_negatives():
    x, y = pair(5, 4, 3, torch.float64)
    scale, bias = torch.tensor(2.0).double(), torch.tensor(-1.0).double()
    s = scale * (x @ y.T) + bias
    assert_near(sigmoid_sum(x, y, scale, bias, label_offset=100), torch.nn.functional.softplus(s).sum(), 1e-12)


@pytest.mark.parametrize("similarity", ["dot", "sqeuclidean"])
def test_the_chunked_fallback_keeps_the_contract(monkeypatch, similarity):
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", 300)
    x, y = pair(37, 45, 6)
    scale = torch.tensor(4.0)
    ours = torch.ops.gapkern.contrastive_lse(x, y, scale, similarity, 3, "highest", 1000)
    other = chunked.contrastive_lse(x, y, scale, similarity, 3, "highest", 1000)
    for a, b in zip(ours[:3], other[:3], strict=True):
        assert_near(b, a, 1e-6)
    weights = [torch.linspace(0.1, 1, len(t), dtype=torch.float64) for t in ours[:3]]
    needs = [True, True, True]
    by_operator, by_chunks = (
        LseBackwardArguments(*weights, x, y, scale, *saved, similarity, 3, "highest", needs)
        for saved in (ours[3:], other[3:])
    )
    for a, b in zip(
        torch.ops.gapkern.contrastive_lse_backward(*by_operator),
        chunked.contrastive_lse_backward(by_chunks),
        strict=True,
    ):
        assert_near(b, a, 2e-6)
    ours = torch.ops.gapkern.sigmoid_loss(x, y, scale, torch.tensor(-2.0), 3, "highest", [True, True])
    other = chunked.sigmoid_loss(x, y, scale, torch.tensor(-2.0), 3, "highest", [True, True])
    for a, b in zip(ours, other, strict=True):
        assert_near(b, a, 2e-6)


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_medium_precision_is_near_and_the_others_are_exact(precision):
    x, y = pair(200, 200, 64, scale=0.125)
    scale = torch.tensor(20.0)
    exact = value_and_gradients(reference.lse_pair, x.double(), y.double(), scale.double())
    for name, a, c in zip(NAMES, value_and_gradients(lse_pair, x, y, scale, precision="medium"), exact, strict=True):
        assert_near(a, c, 1e-2, name=name)
    for name, a, c in zip(NAMES, value_and_gradients(lse_pair, x, y, scale, precision=precision), exact, strict=True):
        assert_near(a, c, 3e-6, name=name)


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (70, 150), (64, 256), (130, 129)])
@pytest.mark.parametrize("dtype", chunk_problems.DTYPES)
def test_the_steps_between_products(poisoned, squared, shape, dtype):
    """In PyTorch's operations; CUDA's kernels: tests/test_software_gpu.py."""
    chunk_problems.steps_between_products(TorchDevice("cpu"), *shape, dtype, squared)


def test_the_smallest_float16_gradients_survive_the_chunked_path(monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", 300)
    x, y = (torch.nn.functional.normalize(torch.randn(60, 16), dim=1).half() for _ in range(2))
    weights = [torch.full((60,), 1e-9, dtype=torch.float64) for _ in range(3)]
    weights[2] *= -2
    scale = torch.tensor(20.0)
    out = chunked.contrastive_lse(x, y, scale, "dot", 0, "highest", 0)
    arguments = LseBackwardArguments(
        *(w * 1e3 for w in weights), x, y, scale, *out[3:], "dot", 0, "highest", [True, True, True]
    )
    dx, dy, _ = chunked.contrastive_lse_backward(arguments)
    double = {name: getattr(arguments, name).double() for name in ("images", "texts", "logit_scale", "kept")}
    truth = chunked.contrastive_lse_backward(arguments._replace(**double))
    for ours, wanted in zip((dx, dy), truth, strict=False):
        assert float((ours.double() - wanted).abs().max()) < 2**-24, "the result's own rounding, of subnormal numbers"
        assert float(ours.abs().max()) > 0
