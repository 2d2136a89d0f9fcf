"""The sigmoid loss with ids, weights and soft targets, against its definition in float64."""

import itertools
import math
import os

import pytest
import torch

from gapkern import losses
from gapkern.ops.contrastive import masked_chunked, masked_sigmoid_sum, sigmoid_sum
from gapkern.ops.contrastive.arguments import MaskedSigmoidArguments
from gapkern.reference import classes as reference
from gapkern.testing import assert_near, assert_three_way
from tests import warm
from tests.warm import peak_memory

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 1), (1, 6, 3), (6, 1, 3), (13, 17, 9), (64, 449, 33), (123, 252, 64), (257, 260, 128)]
# Of bfloat16: dS and the gradients are each rounded, by 2^-9 at most.
MARGINS = {torch.float32: 2e-6, torch.float64: 1e-13, torch.bfloat16: 2**-8, torch.float16: 3e-4}
NAMES = ("loss", "grad_x", "grad_y", "grad_logit_scale", "grad_logit_bias")
SOFT = pytest.mark.parametrize("soft", [False, True])


def problem(n, m, d, dtype=torch.float64, classes=5, seed=0, norm=1.0):
    """(x, y), ids, and weights whose sums lie between 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)  # noqa: E731
    x, y = ((norm * torch.nn.functional.normalize(draw(k, d), dim=1)).to(dtype) for k in (n, m))
    ids = [torch.randint(0, classes, (k,), generator=generator) for k in (n, m)]
    weights = [torch.rand(k, generator=generator, dtype=torch.float64) / 2 for k in (n, m)]
    return (x, y), (*ids, *weights)


def scalars(scale=10.0, bias=-6.0):
    return torch.tensor(scale, dtype=torch.float64), torch.tensor(bias, dtype=torch.float64)


def differentiated(function, pairs, values, classes, soft, dtype=None):
    given = (
        [t.detach().clone().to(dtype).requires_grad_() for t in (*pairs, *values)]
        if dtype
        else [t.detach().clone().requires_grad_() for t in (*pairs, *values)]
    )
    loss = function(*given, *classes, soft_targets=soft)
    return [loss.detach(), *torch.autograd.grad(loss, given)]


def check(pairs, values, classes, soft, margin):
    """Ours is as near float64's as PyTorch's in the arithmetic of the operator, but for `margin`."""
    work = torch.promote_types(pairs[0].dtype, torch.float32)
    ours = differentiated(masked_sigmoid_sum, pairs, values, classes, soft)
    theirs = differentiated(reference.masked_sigmoid_sum, pairs, values, classes, soft, work)
    truth = differentiated(reference.masked_sigmoid_sum, pairs, values, classes, soft, torch.float64)
    for name, a, b, c in zip(NAMES, ours, theirs, truth, strict=True):
        # Gradients come in the embeddings' dtype: float16 holds multiples of 6e-8.
        assert_three_way(a, b.to(a.dtype), c.to(a.dtype), margin, name=name)


@SOFT
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_those_of_the_definition(poisoned, shape, dtype, soft):
    pairs, classes = problem(*shape, dtype)
    check(pairs, scalars(), classes, soft, MARGINS[dtype])


@SOFT
@pytest.mark.parametrize("scale", [-20.0, 1e-3, 1.0, 100.0, 1e4])
@pytest.mark.parametrize("norm", [0.0, 1e-3, 1.0, 1e2])
def test_any_logit_scale(poisoned, scale, norm, soft):
    pairs, classes = problem(40, 50, 24, torch.float32, norm=norm)
    check(pairs, scalars(scale, -10.0), classes, soft, 2e-6)


@SOFT
@pytest.mark.parametrize("classes", ["none", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_no_positive_and_nothing_but_positives(poisoned, classes, dtype, soft):
    pairs, (row_ids, col_ids, *weights) = problem(47, 61, 16, dtype)
    ids = (torch.zeros_like(row_ids), torch.full_like(col_ids, classes == "none"))
    check(pairs, scalars(5.0, 1.0), (*ids, *weights), soft, MARGINS[dtype])


@SOFT
def test_random_problems(poisoned, soft):
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies

    @hypothesis.given(
        n=st.integers(1, 40),
        m=st.integers(1, 500),
        d=st.integers(1, 40),
        number=st.integers(1, 60),
        scale=st.floats(-40, 40),
        bias=st.floats(-20, 10),
        dtype=st.sampled_from(DTYPES),
        seed=st.integers(0, 2**20),
    )
    def run(n, m, d, number, scale, bias, dtype, seed):
        pairs, classes = problem(n, m, d, dtype, number, seed)
        check(pairs, scalars(scale, bias), classes, soft, 3 * MARGINS[dtype])

    run()


@SOFT
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_pair_alone_is_pytorchs_formula(dtype, soft):
    """Also where the loss is e^-20: it keeps its own precision."""
    one, id_ = torch.ones(1, 1), torch.zeros(1, dtype=torch.int64)
    for logit, right, a in itertools.product((-20.0, -1.0, 0.0, 3.0, 20.0), (True, False), (1.0, 0.25)):
        weights = (torch.full((1,), a / 4, dtype=torch.float64), torch.full((1,), 3 * a / 4, dtype=torch.float64))
        classes = (id_, id_ if right else id_ + 1, *weights)
        found, truth = (
            differentiated(f, (one.to(t), one.to(t)), scalars(2.0, logit - 2), classes, soft)
            for f, t in ((masked_sigmoid_sum, dtype), (reference.masked_sigmoid_sum, torch.float64))
        )
        for name, x, y in zip(NAMES, found, truth, strict=True):
            assert_near(x, y.to(x.dtype), 1e-14 if dtype == torch.float64 else 1e-6, name=name)


@SOFT
@pytest.mark.parametrize("dtype", DTYPES)
def test_pairs_by_ids_are_pairs_by_their_places(dtype, soft):
    (x, y), _ = problem(90, 90, 20, dtype)
    ids, half = torch.arange(90), torch.full((90,), 0.5, dtype=torch.float64)
    found = differentiated(masked_sigmoid_sum, (x, y), scalars(50.0, -20.0), (ids, ids, half, half), soft)
    plain = differentiated(lambda *t, **_: sigmoid_sum(*t[:4]), (x, y), scalars(50.0, -20.0), (), soft)
    for name, a, b in zip(NAMES, found, plain, strict=True):
        # The same but for the order of float32's sums; gradients come in the embeddings' dtype.
        assert_near(a, b, 2e-6 if name[-1] not in "xy" else MARGINS[dtype], name=name)


@SOFT
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_id_is_told_from_every_other(dtype, soft):
    pairs, (row_ids, col_ids, *weights) = problem(30, 40, 8, dtype, classes=4)
    found = differentiated(masked_sigmoid_sum, pairs, scalars(), (row_ids, col_ids, *weights), soft)
    for numbers in (
        [2**24, 2**24 + 1, 2**24 + 2, 2**24 + 3],
        [2**31 - 1, 2**31, -(2**31), 0],
        [2**53, 2**53 + 1, 2**53 + 2, 0],
        [-(2**63), 2**63 - 1, 2**63 - 2, 2**32],
    ):
        ids = [torch.tensor(numbers)[i] for i in (row_ids, col_ids)]
        for a, b in zip(
            differentiated(masked_sigmoid_sum, pairs, scalars(), (*ids, *weights), soft), found, strict=True
        ):
            assert torch.equal(a, b)
    other = torch.where(col_ids == 0, 2**40, col_ids)  # an id that no row has
    same = torch.where(col_ids == 0, 9, col_ids)
    a, b = (differentiated(masked_sigmoid_sum, pairs, scalars(), (row_ids, v, *weights), soft) for v in (other, same))
    for first, second in zip(a, b, strict=True):
        assert torch.equal(first, second)


@SOFT
def test_only_what_is_needed_is_formed(poisoned, soft):
    (x, y), classes = problem(30, 40, 8)
    whole = differentiated(masked_sigmoid_sum, (x, y), scalars(), classes, soft)
    for needs in itertools.product((False, True), repeat=2):
        found = torch.ops.gapkern.contrastive_masked_sigmoid(x, y, *scalars(), *classes, soft, "highest", list(needs))
        expected = [v if k in (0, 3, 4) or needs[k - 1] else v.new_empty(0) for k, v in enumerate(whole)]
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)


@SOFT
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_chunks_of_other_devices_agree(dtype, soft, monkeypatch):
    monkeypatch.setattr(masked_chunked, "CHUNK_ELEMENTS", 700)
    (x, y), classes = problem(50, 90, 12, dtype)
    arguments = (x, y, *scalars(), *classes, soft, "highest", [True, True])
    found = torch.ops.gapkern.contrastive_masked_sigmoid(*arguments)
    for name, a, b in zip(NAMES, found, masked_chunked.masked_sigmoid(MaskedSigmoidArguments(*arguments)), strict=True):
        assert_near(a, b, 3e-6 if dtype == torch.float32 else 1e-13, name=name)


def test_results_do_not_depend_on_the_number_of_threads():
    pairs, classes = problem(700, 900, 16, torch.float32)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(differentiated(masked_sigmoid_sum, pairs, scalars(), classes, False))
    finally:
        torch.set_num_threads(before)
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@SOFT
def test_opcheck(soft):
    pairs, classes = problem(6, 8, 4)
    leaves = [t.requires_grad_() for t in (*pairs, *scalars(2.0, -1.0))]
    arguments = (*leaves, *classes, soft, "highest", [True, True])
    torch.library.opcheck(torch.ops.gapkern.contrastive_masked_sigmoid, arguments)


@SOFT
def test_gradcheck_reverse_and_forward(soft):
    pairs, classes = problem(4, 6, 3, classes=3)
    leaves = [t.requires_grad_() for t in (*pairs, *scalars(1.5, -1.0))]
    call = lambda *t: masked_sigmoid_sum(*t, *classes, soft_targets=soft)  # noqa: E731
    assert torch.autograd.gradcheck(call, leaves, check_forward_ad=True)


def test_double_backward_is_refused():
    pairs, classes = problem(5, 5, 3)
    leaves = [t.requires_grad_() for t in (*pairs, *scalars())]
    (gradient,) = torch.autograd.grad(masked_sigmoid_sum(*leaves, *classes), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        gradient.sum().backward()


@SOFT
def test_nan_reaches_the_loss_and_the_gradients(soft):
    (x, y), classes = problem(20, 30, 5, torch.float32)
    x[3, 2] = math.nan
    loss, dx, dy, *_ = differentiated(masked_sigmoid_sum, (x, y), scalars(), classes, soft)
    assert loss.isnan()
    assert dx[3].isnan().all()
    assert dx[:3].isfinite().all()
    assert dy.isnan().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(4, 2)}, "texts: expected D = 2 as in images, got 3"),
        ({3: torch.zeros(2)}, "logit_bias: expected one element, got 2"),
        ({4: torch.zeros(5, dtype=torch.int64)}, "row_ids: expected 4 elements, got 5"),
        ({5: torch.zeros(5, dtype=torch.int64)}, "col_ids: expected 6 elements, got 5"),
        ({6: torch.zeros(1)}, "row_weights: expected 4 elements, got 1"),
        ({7: torch.zeros(1)}, "col_weights: expected 6 elements, got 1"),
        ({4: torch.zeros(4)}, "row_ids and col_ids: expected int64"),
        ({5: torch.zeros(6, dtype=torch.int32)}, "row_ids and col_ids: expected int64"),
        ({10: [True]}, "needs: expected two flags"),
    ],
)
def test_the_operator_refuses_what_it_cannot_serve(change, message):
    (x, y), classes = problem(4, 6, 3, torch.float32)
    arguments = [x, y, *scalars(), *classes, False, "highest", [True, True]]
    for place, value in change.items():
        arguments[place] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.gapkern.contrastive_masked_sigmoid(*arguments)


_ON_AN_INSTRUCTION_SET = """
import torch
from gapkern._load import active_isa
from tests import test_masked_sigmoid as here
assert active_isa() == "{isa}", active_isa()
for dtype in here.DTYPES:
    for soft in (False, True):
        for shape in ((1, 1, 1), (37, 470, 11), (150, 230, 24)):
            pairs, classes = here.problem(*shape, dtype)
            here.check(pairs, here.scalars(), classes, soft, here.MARGINS[dtype])
print("ok")
"""


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "avx512bf16"])
def test_every_instruction_set_agrees_with_the_definition(isa):
    from gapkern._load import active_isa

    order = ["portable", "avx2", "avx512", "avx512bf16"]
    if order.index(isa) > order.index(active_isa()):
        pytest.skip(f"this processor has no {isa}")
    run = warm.run(_ON_AN_INSTRUCTION_SET.format(isa=isa), env={**os.environ, "GAPKERN_ISA": isa})
    assert run.stdout == "ok\n", run.stderr


def test_memory_is_linear():
    setup = (
        "import torch\nfrom gapkern import sigmoid_loss\n"
        "def run(n):\n    x = torch.nn.functional.normalize(torch.randn(n, 64), dim=1).requires_grad_()\n"
        "    ids = torch.arange(n) // 4\n"
        "    sigmoid_loss(x, x, 10.0, -10.0, ids=ids, positives='mean', soft_label=True).backward()\nrun(300)"
    )
    assert peak_memory("run(8192)", setup=setup) < 100  # one matrix of logits: 256 MiB


def test_a_soft_label_is_learnt():
    """At the minimum a logit's sigmoid is its target: 1/2 with two positives."""
    x, ids = torch.zeros(4, 2, dtype=torch.float64), torch.zeros(4, dtype=torch.int64)
    loss = losses.sigmoid_loss(
        x,
        x[:2],
        1.0,
        bias := torch.zeros((), dtype=torch.float64, requires_grad=True),
        ids=(ids, ids[:2]),
        positives="mean",
        symmetric=False,
        soft_label=True,
    )
    (gradient,) = torch.autograd.grad(loss, bias)
    assert_near(loss.detach(), torch.tensor(2 * math.log(2)), 1e-7)
    assert float(gradient) == 0
