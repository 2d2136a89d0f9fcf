"""Losses of several prefixes in one pass: the operator against its definition, Matryoshka against a loop."""

import functools

import pytest
import torch
from torch import func
from torch.autograd import forward_ad

from gapkern import losses
from gapkern.losses import prefixes
from gapkern.ops.contrastive import prefix_lse
from gapkern.reference import contrastive as reference
from gapkern.testing import assert_near, assert_three_way
from tests.warm import peak_memory

MARGINS = {torch.float32: 3e-6, torch.bfloat16: 6e-3, torch.float16: 2e-3, torch.float64: 1e-13}
NAMES = ("row", "column", "label", "images", "texts", "scale", "row factors", "column factors")


def problem(n=13, m=17, d=9, dims=(4, 7, 9), dtype=torch.float64, seed=0, units=True):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)  # noqa: E731
    x, y = draw(n, d), draw(m, d)
    y[:n] += x
    x, y = ((t + 0.5 * t.sign()).to(dtype) for t in (x, y))  # no prefix is short beside the others
    factors = [torch.stack([1 / t[:, :k].double().norm(dim=1) for k in dims]) for t in (x, y)]
    if not units:
        factors = [f * (0.5 + torch.rand(f.shape, generator=generator, dtype=torch.float64)) for f in factors]
    return x, y, factors


def differentiated(function, x, y, s, factors, dims, **options):
    leaves = [t.detach().requires_grad_() for t in (x, y, s, *factors)]
    found = function(*leaves, dims, **options)
    generator = torch.Generator().manual_seed(5)
    total = 0
    for result in found:
        total = total + (torch.randn(result.shape, generator=generator, dtype=torch.float64) * result).sum()
    return [*(r.detach() for r in found), *torch.autograd.grad(total, leaves)]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(13, 17), (1, 1), (1, 6), (64, 64), (70, 131)])
@pytest.mark.parametrize("dims", [(9,), (1, 9), (4, 7, 9), (2, 4, 6, 8, 70)])
def test_values_and_gradients_are_those_of_the_definition(dtype, shape, dims):
    for scale, units in ((7.0, False), (30.0, True), (-5.0, False)):
        x, y, factors = problem(*shape, dims[-1], dims, dtype, units=units)
        s = torch.tensor(scale, dtype=torch.float64)
        found = differentiated(prefix_lse, x, y, s, factors, dims)
        truth = differentiated(reference.prefix_lse, x.double(), y.double(), s, factors, dims)
        work = torch.promote_types(dtype, torch.float32)
        theirs = differentiated(
            reference.prefix_lse, x.to(work), y.to(work), s.to(work), [f.to(work) for f in factors], dims
        )
        for name, a, b, c in zip(NAMES, found, theirs, truth, strict=True):
            assert a.dtype == (dtype if name in ("images", "texts") else torch.float64)
            # Of one pair all gradients are zero, and their errors relative to nothing.
            if float(c.abs().max()) < 1e-12:
                assert float(a.abs().max()) < 1e-5
                continue
            # The gradient of the scale is a small difference of large sums.
            assert_three_way(a, b, c, MARGINS[dtype] * (10 if name == "scale" else 1), name=f"{name} at {scale}")


@pytest.mark.parametrize("scale", [100.0, 140.0, 500.0, 2000.0, -150.0])
def test_large_logits_take_the_range_that_they_need(scale):
    """Shifted exponents, tracked ones and float64, of prefixes whose bounds are not the same."""
    dims = (3, 8, 40)
    x, y, factors = problem(50, 60, 40, dims, torch.float32)
    for f in factors:
        f[0] *= 0.3
    s = torch.tensor(scale)
    found = differentiated(prefix_lse, x, y, s, factors, dims)
    truth = differentiated(reference.prefix_lse, x.double(), y.double(), s.double(), factors, dims)
    theirs = differentiated(reference.prefix_lse, x, y, s, factors, dims)
    for name, a, b, c in zip(NAMES, found, theirs, truth, strict=True):
        assert_three_way(a, b, c, 1e-5, name=name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_several_stripes_and_chunks(dtype, poisoned):
    dims = (4, 24, 32)
    x, y, factors = problem(1500, 2100, 32, dims, dtype)
    s = torch.tensor(20.0, dtype=dtype)
    found = differentiated(prefix_lse, x, y, s, factors, dims)
    truth = differentiated(reference.prefix_lse, x.double(), y.double(), s.double(), factors, dims)
    theirs = differentiated(reference.prefix_lse, x, y, s, factors, dims)
    for name, a, b, c in zip(NAMES, found, theirs, truth, strict=True):
        assert_three_way(a, b, c, 1e-13 if dtype == torch.float64 else 3e-6, name=name)


@pytest.mark.parametrize("precision", ["highest", "medium"])
@pytest.mark.parametrize("rows", [0, 100, 150, 300])
def test_kept_logits(rows, precision):
    dims = (8, 20, 32)
    x, y, factors = problem(300, 320, 32, dims, torch.float32)
    s = torch.tensor(20.0)
    kept, formed = (
        differentiated(prefix_lse, x, y, s, factors, dims, precision=precision, work_bytes=b)
        for b in (rows * 3 * 320 * 4, 0)
    )
    for name, a, b in zip(NAMES, kept, formed, strict=True):
        if precision == "highest":
            assert torch.equal(a, b), name
        else:
            assert_near(a, b, 5e-3, name=name)
    exact = differentiated(reference.prefix_lse, x.double(), y.double(), s.double(), factors, dims)
    for name, a, c in zip(NAMES, kept, exact, strict=True):
        assert_near(a, c, 3e-6 if precision == "highest" else 1e-2, name=name)


def test_small_losses_keep_their_digits():
    dims = (16, 64)
    x = torch.nn.functional.normalize(torch.randn(40, 64, generator=torch.Generator().manual_seed(0)), dim=1)
    factors = [torch.stack([1 / x[:, :k].double().norm(dim=1) for k in dims])] * 2
    row, _, positive = prefix_lse(x, x, torch.tensor(60.0), *factors, dims)
    exact, _, label = reference.prefix_lse(x.double(), x.double(), torch.tensor(60.0).double(), *factors, dims)
    assert float((exact - label).min()) < 1e-9
    assert_near(row - positive, exact - label, 1e-4)


def test_results_do_not_depend_on_the_number_of_threads():
    x, y, factors = problem(700, 900, 24, (5, 16, 24), torch.float32)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(differentiated(prefix_lse, x, y, torch.tensor(9.0), factors, (5, 16, 24)))
    finally:
        torch.set_num_threads(before)
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_derivatives():
    x, y, factors = problem(5, 6, 4, (1, 3, 4))
    inputs = [t.requires_grad_() for t in (x, y, torch.tensor(2.0).double(), *factors)]
    call = lambda *t: prefix_lse(*t, (1, 3, 4))  # noqa: E731
    assert torch.autograd.gradcheck(call, inputs)
    primals = tuple(t.detach() for t in inputs)
    tangents = tuple(torch.randn(t.shape, dtype=t.dtype, generator=torch.Generator().manual_seed(3)) for t in primals)
    _, expected = func.jvp(lambda *t: reference.prefix_lse(*t, (1, 3, 4)), primals, tangents)
    for given in (tangents, (None, tangents[1], None, tangents[3], None), (tangents[0], *[None] * 4)):
        with forward_ad.dual_level():
            duals = [t if d is None else forward_ad.make_dual(t, d) for t, d in zip(primals, given, strict=True)]
            ours = [forward_ad.unpack_dual(r).tangent for r in call(*duals)]
            theirs = [forward_ad.unpack_dual(r).tangent for r in reference.prefix_lse(*duals, (1, 3, 4))]
        for a, b in zip(ours, theirs, strict=True):
            assert_near(a, b, 1e-12)
    assert len(expected) == 3
    (gradient,) = torch.autograd.grad(call(*inputs)[0].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        gradient.sum().backward()


def test_opcheck():
    x, y, factors = problem(6, 8, 5, (2, 5))
    arguments = (
        *(t.requires_grad_() for t in (x, y, torch.tensor([2.0], dtype=torch.float64), *factors)),
        [2, 5],
        "highest",
        2**20,
    )
    torch.library.opcheck(torch.ops.gapkern.contrastive_prefix_lse, arguments)
    detached = tuple(t.detach() if isinstance(t, torch.Tensor) else t for t in arguments)
    results = torch.ops.gapkern.contrastive_prefix_lse(*detached)
    torch.library.opcheck(
        torch.ops.gapkern.contrastive_prefix_lse_backward,
        (*results[:3], *detached[:5], *results[3:], *detached[5:7], [True, False, True, False, True]),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dims": [2, 2, 5]}, "dims: expected increasing widths, got 2 after 2"),
        ({"dims": [2, 3, 4]}, "dims: expected the last to be D = 5"),
        ({"dims": []}, "dims: expected the last to be D = 5"),
        ({"dims": [2, 5]}, r"row_factors and col_factors: expected one for each prefix and row, \(2, N\)"),
        ({"texts": torch.ones(5, 5).double()}, "texts: expected at least N = 6 rows, got 5"),
        ({"images": torch.ones(6, 4).double()}, "texts: expected D = 4 as in images, got 5"),
    ],
)
def test_what_the_operator_refuses(change, message):
    x, y, factors = problem(6, 8, 5, (2, 4, 5))
    given = {"images": x, "texts": y, "scale": torch.tensor(1.0), "f": factors[0], "g": factors[1], "dims": [2, 4, 5]}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.gapkern.contrastive_prefix_lse(*(given | change).values(), "highest", 0)


def by_prefix(module, *arguments, **options):
    """The same without the one pass."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefixes, "together", lambda *_: None)
        return module(*arguments, **options)


def taken(monkeypatch):
    """Counts the calls of the operator."""
    calls = []

    def counted(*arguments, **options):
        calls.append(1)
        return prefix_lse(*arguments, **options)

    monkeypatch.setattr(prefixes.contrastive, "prefix_lse", counted)
    return calls


WEIGHTS = torch.linspace(0, 2, 30).double()
ONE_PASS = {
    "clip": (losses.contrastive_loss, {}),
    "clip, sum": (losses.contrastive_loss, {"reduction": "sum", "memory": "keep", "logit_bias": -2.0}),
    "clip, weights": (losses.contrastive_loss, {"weights": WEIGHTS, "memory": 10_000}),
    "a part": (functools.partial(losses.contrastive_loss, memory="recompute"), {"reduction": "none"}),
    "q-d": (losses.info_nce_loss, {}),
    "q-d by name": (losses.info_nce_loss, {"directions": "q-d", "margin": None, "label_smoothing": 0.0}),
    "d-q": (losses.info_nce_loss, {"directions": ["d-q"], "weights": WEIGHTS, "reduction": "sum"}),
    "joint": (losses.info_nce_loss, {"directions": ("q-d", "d-q"), "reduction": "none"}),
    "separate": (losses.info_nce_loss, {"directions": ("d-q", "q-d"), "partition": "separate"}),
}


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ONE_PASS)
def test_matryoshka_in_one_pass_is_the_sum_of_its_prefixes(case, dtype, normalize, monkeypatch):
    loss, options = ONE_PASS[case]
    calls = taken(monkeypatch)
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(30, 20, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    x[3] = 0  # a row without a direction
    y[4, :6] = 0
    module = losses.Matryoshka(loss, (16, 6, 11, 6), (1.0, 0.5, 2.0, 0.25), normalize=normalize)
    found = []
    for call, kind in (
        (module, dtype),
        (functools.partial(by_prefix, module), dtype),
        (functools.partial(by_prefix, module), torch.float64),
    ):
        leaves = [t.to(kind).requires_grad_() for t in (x, y)] + [
            torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
        ]
        value = call(*leaves, **options)
        found.append([value.detach(), *torch.autograd.grad(value.sum(), leaves)])
        assert len(calls) == 1  # of the first alone
    for a, b, c in zip(*found, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert_three_way(a, b, c, MARGINS[dtype])


OTHERS = {
    "a margin": (losses.info_nce_loss, {"margin": 0.2}),
    "directions": (losses.info_nce_loss, {"directions": ("q-d", "q-q")}),
    "hard negatives": (losses.info_nce_loss, {"hard_negatives": torch.ones(9, 2, 8).double()}),
    "ids": (losses.contrastive_loss, {"ids": torch.arange(9) // 2}),
    "distances": (losses.contrastive_loss, {"similarity": "sqeuclidean"}),
    "smoothing": (losses.contrastive_loss, {"label_smoothing": 0.1}),
    "another": (lambda x, y, s: losses.sigmoid_loss(x, y, s, -1.0), {}),
}


@pytest.mark.parametrize("case", OTHERS)
def test_matryoshka_of_other_losses_is_a_loop(case, monkeypatch):
    loss, options = OTHERS[case]
    calls = taken(monkeypatch)
    x, y = (torch.randn(9, 8, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in (0, 1))
    module = losses.Matryoshka(loss, (8, 3))
    assert_near(module(x, y, 4.0, **options), by_prefix(module, x, y, 4.0, **options), 1e-14)
    assert calls == []


def test_matryoshka_says_what_a_loss_would():
    module = losses.Matryoshka(losses.contrastive_loss, (4, 2))
    x = torch.eye(4)
    for arguments, options, error, message in (
        ((x, x), {}, TypeError, "logit_scale"),
        ((x, x, 1.0), {"speed": 1}, TypeError, "speed"),
        ((x, x, 1.0, None, "dot"), {}, TypeError, "positional"),
        ((x, x, 1.0), {"logit_scale": 1.0}, TypeError, "logit_scale"),
        ((x, x[:3], 1.0), {}, ValueError, "texts: expected 4 rows"),
        ((x, x.double(), 1.0), {}, TypeError, "texts: expected torch.float32 as in images"),
        ((x, x, torch.ones(2)), {}, ValueError, "logit_scale: expected one element"),
        ((x, x, 1.0), {"reduction": "max"}, ValueError, "reduction: expected one of"),
        ((x, x, 1.0), {"memory": "all"}, ValueError, "memory: expected one of"),
        ((x, x, 1.0), {"weights": torch.ones(3)}, ValueError, r"weights: expected shape \(4,\)"),
        ((x[:, :3], x[:, :3], 1.0), {}, ValueError, "dims: expected at most the embeddings' 3, got 4"),
    ):
        with pytest.raises(error, match=message):
            module(*arguments, **options)


def test_matryoshka_compiles_whole():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(7, 6, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2))
    module = losses.Matryoshka(losses.info_nce_loss, (6, 3))
    compiled = torch.compile(lambda x, y: module(x, y, 5.0), fullgraph=True, backend="aot_eager")
    assert_near(compiled(x, y).detach(), module(x, y, 5.0).detach(), 1e-13)
    for a, b in zip(
        *(torch.autograd.grad(f(x, y), (x, y)) for f in (compiled, lambda x, y: module(x, y, 5.0))), strict=True
    ):
        assert_near(a, b, 1e-12)


def test_matryoshka_under_autocast_and_transforms():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(40, 32, generator=generator) for _ in range(2))
    module = losses.Matryoshka(losses.contrastive_loss, (32, 16, 8))
    exact = module(x, y, 10.0)
    with torch.autocast("cpu", torch.bfloat16):
        low = module(x, y, 10.0)
    assert low.dtype == torch.float32
    assert 0 < float((low - exact).abs()) < 2e-2 * float(exact)
    gradient = func.grad(lambda x: module(x, y, 10.0))(x)
    leaf = x.clone().requires_grad_()
    module(leaf, y, 10.0).backward()
    assert_near(gradient, leaf.grad, 1e-6)
    _, along = func.jvp(lambda x: module(x, y, 10.0), (x,), (y,))
    assert_near(along, (gradient * y).sum(), 1e-4)


def test_memory_is_linear():
    setup = (
        "import torch\nfrom gapkern import losses\n"
        "module = losses.Matryoshka(losses.contrastive_loss, (64, 32, 16))\n"
        "def run(n):\n"
        "    x, y = (torch.randn(n, 64, requires_grad=True) for _ in 'xy')\n"
        "    module(x, y, 10.0, memory='recompute').backward()\nrun(300)"
    )
    assert peak_memory("run(8192)", setup=setup) < 110  # one matrix of logits: 256 MiB
