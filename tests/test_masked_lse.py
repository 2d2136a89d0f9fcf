"""The masked log-sum-exp and the sigmoid loss with ids: classes of pairs, against their definitions in float64."""

import itertools
import math

import pytest
import torch

from gapkern.ops.contrastive import masked, masked_lse, masked_sigmoid_sum
from gapkern.reference import losses as reference
from gapkern.testing import assert_near, assert_three_way
from tests.warm import peak_memory

MARGINS = {torch.float32: 3e-6, torch.bfloat16: 6e-3, torch.float16: 2e-3, torch.float64: 1e-13}


def problem(n=13, m=17, d=9, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)  # noqa: E731
    x, y = (torch.nn.functional.normalize(draw(k, d), dim=1).to(dtype).requires_grad_() for k in (n, m))
    masks = {
        "row_ids": torch.randint(0, 5, (n,), generator=generator),
        "col_ids": torch.randint(0, 5, (m,), generator=generator),
        "row_limit": 0.4 + 0.1 * draw(n),
        "col_limit": 0.4 + 0.1 * draw(m),
        "guide_x": draw(n, 4),
        "guide_y": draw(m, 4),
        "guide_row_limit": 1 + draw(n),
        "guide_col_limit": 1 + draw(m),
    }
    return x, y, masks


IDS = ("row_ids", "col_ids")
GUIDE = ("guide_x", "guide_y", "guide_row_limit", "guide_col_limit")
CHOICES = [(), IDS, ("row_limit",), ("col_limit",), GUIDE[:3], (*IDS, "row_limit", "col_limit", *GUIDE)]


def differentiated(function, x, y, s, masks, options):
    x, y, s = (t.detach().requires_grad_() for t in (x, y, s))
    found = function(x, y, s, **masks, **options)
    generator = torch.Generator().manual_seed(5)
    total = 0
    for result in found:
        weights = torch.randn(result.shape, generator=generator, dtype=torch.float64).to(result.dtype)
        total = total + (weights * result.masked_fill(result == -math.inf, 0)).sum()
    gradients = torch.autograd.grad(total, (x, y, s), allow_unused=True)
    zeros = [torch.zeros_like(t) if g is None else g for g, t in zip(gradients, (x, y, s), strict=True)]
    return [*(r.detach() for r in found), *zeros]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(13, 17), (17, 13), (1, 1), (1, 6), (64, 64)])
@pytest.mark.parametrize("chosen", range(len(CHOICES)))
def test_values_and_gradients_are_those_of_the_definition(dtype, shape, chosen, monkeypatch):
    monkeypatch.setattr(masked, "CHUNK_ELEMENTS", 5 * shape[1])
    x, y, masks = problem(*shape, dtype=dtype)
    masks = {name: masks[name] for name in CHOICES[chosen]}
    if dtype != torch.float64:
        # Limits at which float32 and float64 decide alike.
        x, y = (t.detach().mul(64).round().div(64).requires_grad_() for t in (x, y))
        for name, value in masks.items():
            masks[name] = value if value.dtype == torch.int64 else value.mul(32).round().div(32) + (1 / 1024)
    cases = itertools.product(("dot", "sqeuclidean"), (0, 3, -2), ("counted", "left_out", "none"))
    for i, (similarity, offset, label) in enumerate(cases):
        equal = ("positive", "left_out")[i % 2]
        options = {"similarity": similarity, "label_offset": offset, "label": label, "equal": equal}
        s = torch.tensor((7.0, 30.0, -2.0)[i % 3], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        found = differentiated(masked_lse, x, y, s, masks, options)
        truth = differentiated(reference.masked_lse, x.double(), y.double(), s.double(), masks, options)
        plain = {k: v.float() if v.is_floating_point() else v for k, v in masks.items()}
        work = torch.float64 if dtype == torch.float64 else torch.float32
        theirs = differentiated(
            reference.masked_lse, x.to(work), y.to(work), s, masks if work.itemsize == 8 else plain, options
        )
        for k, (a, b, c) in enumerate(zip(found, theirs, truth, strict=True)):
            # Values are float32's whatever the inputs; half-precision inputs round dS; the gradient of the scale is a
            # small difference of large sums.
            margin = (3e-6 if dtype != torch.float64 else 1e-13) if k < 5 else 3 * MARGINS[dtype]
            margin = max(margin, 1e-4) if k == 7 and dtype != torch.float64 else margin
            assert_three_way(a, b, c, margin, name=f"{options} output {k}")


def test_gradcheck_reverse_and_forward():
    x, y, masks = problem(4, 6, 3)
    s = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    for similarity, label, equal in itertools.product(
        ("dot", "sqeuclidean"), ("counted", "none"), ("positive", "left_out")
    ):

        def call(x, y, s, o=(similarity, label, equal)):
            found = masked_lse(x, y, s, **masks, similarity=o[0], label=o[1], equal=o[2], label_offset=-1)
            return tuple(v.masked_fill(v == -math.inf, 0) for v in found)

        assert torch.autograd.gradcheck(call, (x, y, s), check_forward_ad=True)


@pytest.mark.parametrize("label", ["counted", "left_out", "none"])
def test_opcheck(label):
    x, y, masks = problem(6, 8, 4)
    s = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    arguments = (x, y, s, *masks.values(), "dot", 1, label, "positive", "highest")
    torch.library.opcheck(torch.ops.gapkern.contrastive_masked_lse, arguments)
    detached = tuple(t.detach() if isinstance(t, torch.Tensor) else t for t in arguments)
    results = torch.ops.gapkern.contrastive_masked_lse(*detached)
    grads = [torch.ones_like(r) for r in results]
    torch.library.opcheck(
        torch.ops.gapkern.contrastive_masked_lse_backward,
        (*grads, *results[:4], *detached, [True, False, True]),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_opcheck_of_the_sigmoid():
    x, y, masks = problem(6, 8, 4)
    s, b = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (2.0, -1.0))
    weights = torch.rand(6, dtype=torch.float64), torch.rand(8, dtype=torch.float64)
    arguments = (x, y, s, b, masks["row_ids"], masks["col_ids"], *weights, "highest", [True, True])
    torch.library.opcheck(
        torch.ops.gapkern.contrastive_masked_sigmoid, arguments, test_utils=("test_schema", "test_faketensor")
    )

    def call(x, y, s, b):
        return masked_sigmoid_sum(x, y, s, b, *arguments[4:8])

    assert torch.autograd.gradcheck(call, (x, y, s, b))


def test_empty_classes_have_no_gradient():
    x, y, _ = problem(5, 5, 3)
    s = torch.tensor(2.0, dtype=torch.float64)
    same = torch.zeros(5, dtype=torch.int64)
    found = masked_lse(x, y, s, row_ids=same, col_ids=same)
    assert all((v == -math.inf).all() for v in found[:4])
    found = masked_lse(x, y, s, row_ids=same, col_ids=same, equal="positive")
    assert (found.row_negative == -math.inf).all()
    (found.row_negative.exp().sum() + found.row_positive.sum()).backward()
    assert x.grad.isfinite().all()
    assert x.grad.abs().sum() > 0


def test_double_backward_is_refused():
    x, y, _ = problem(5, 5, 3)
    s = torch.tensor(2.0, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(masked_lse(x, y, s).row_negative.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        gradient.sum().backward()


def test_autocast_rounds_the_embeddings_alone():
    x, y, masks = problem(dtype=torch.float32)
    s = torch.tensor(30.03)
    masks = {k: masks[k] for k in IDS}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = masked_lse(x, y, s, **masks)
    for a, b in zip(found, masked_lse(x.bfloat16(), y.bfloat16(), s, **masks), strict=True):
        assert torch.equal(a, b)


def test_vmap_is_a_loop():
    x, y, masks = problem()
    s = torch.tensor(3.0, dtype=torch.float64)
    call = lambda y: masked_lse(x.detach(), y, s, row_ids=masks["row_ids"], col_ids=masks["col_ids"]).row_negative  # noqa: E731
    many = torch.stack([y.detach(), 2 * y.detach()])
    assert_near(torch.vmap(call)(many), torch.stack([call(t) for t in many]), 1e-14)


def test_memory_is_linear():
    setup = (
        "import torch\nfrom gapkern.ops.contrastive import masked_lse\n"
        "def run(n):\n    x = torch.nn.functional.normalize(torch.randn(n, 64), dim=1).requires_grad_()\n"
        "    ids = torch.arange(n) // 4\n"
        "    found = masked_lse(x, x, torch.tensor(10.0), row_ids=ids, col_ids=ids)\n"
        "    (found.row_negative - found.label).sum().backward()\nrun(300)"
    )
    assert peak_memory("run(8192)", setup=setup) < 100  # one matrix of logits: 256 MiB
