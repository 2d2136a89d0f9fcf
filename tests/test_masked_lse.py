"""The masked log-sum-exp: classes of pairs, against their definitions in float64."""

import itertools
import math
import os
from pathlib import Path

import pytest
import torch

from gapkern.ops.contrastive import itself, masked, masked_chunked, masked_lse, self_lse
from gapkern.reference import classes as reference
from gapkern.testing import assert_near, assert_three_way
from tests import warm
from tests.software_gpu import chunk_problems
from tests.software_gpu.torch_device import TorchDevice
from tests.warm import peak_memory

ROOT = Path(__file__).resolve().parent.parent
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
    monkeypatch.setattr(masked_chunked, "CHUNK_ELEMENTS", 5 * shape[1])
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


def rounded(x, masks):
    """Embeddings and limits at which float32 and float64 decide alike."""
    x = x.detach().mul(64).round().div(64)
    return x, {k: v if v.dtype == torch.int64 else v.mul(32).round().div(32) + 1 / 1024 for k, v in masks.items()}


def reference_of_itself(x, scale, *, ids=None, limit=None, **options):
    options = {"row_ids": ids, "col_ids": ids, "row_limit": limit, "label": "left_out", **options}
    return reference.masked_lse(x, x, scale, **options)[:4:2]


def differentiated_itself(function, x, scale, masks, options):
    x, scale = (t.detach().requires_grad_() for t in (x, scale))
    found = function(x, scale, **masks, **options)
    generator = torch.Generator().manual_seed(5)
    total = 0
    for result in found:
        weights = torch.randn(result.shape, generator=generator, dtype=torch.float64).to(result.dtype)
        total = total + (weights * result.masked_fill(result == -math.inf, 0)).sum()
    gradients = torch.autograd.grad(total, (x, scale), allow_unused=True)
    zeros = [torch.zeros_like(t) if g is None else g for g, t in zip(gradients, (x, scale), strict=True)]
    return [*(r.detach() for r in found), *zeros]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "d"), [(1, 3), (2, 5), (13, 9), (97, 33), (500, 16), (1100, 8)])
@pytest.mark.parametrize("chosen", [(), ("ids",), ("limit",), ("ids", "limit")])
def test_a_side_with_itself(dtype, n, d, chosen):
    x, _, masks = problem(n, 1, d, dtype=dtype)
    masks = {"ids": masks["row_ids"], "limit": masks["row_limit"]}
    x, masks = rounded(x, {k: masks[k] for k in chosen})
    work = torch.float64 if dtype == torch.float64 else torch.float32
    for i, similarity in enumerate(("dot", "sqeuclidean")[: 1 if n > 1000 or (n > 400 and "ids" in chosen) else 2]):
        scale = torch.tensor((7.0, -20.0)[i], dtype=work)
        options = {"similarity": similarity, "equal": ("positive", "left_out")[(i + n) % 2]}
        truth = differentiated_itself(reference_of_itself, x.double(), scale.double(), masks, options)
        theirs = differentiated_itself(reference_of_itself, x.to(work), scale, masks, options)
        for work_bytes in (0, 2**30):
            found = differentiated_itself(self_lse, x, scale, masks, {**options, "work_bytes": work_bytes})
            for k, (a, b, c) in enumerate(zip(found, theirs, truth, strict=True)):
                margin = 1e-13 if dtype == torch.float64 else 3e-6 if k < 2 else 1e-4 if k == 3 else 3 * MARGINS[dtype]
                if dtype == torch.bfloat16 and work_bytes and k == 3:
                    margin = 1e-3  # kept logits of 16 bits
                assert_three_way(a, b, c, margin, name=f"{options} {work_bytes} output {k}")


@pytest.mark.parametrize("scale", [90.0, 150.0, 900.0, -900.0])
def test_large_logits_need_references(scale):
    x, y, masks = problem(60, 70, 8)
    (x, _), (y, _) = rounded(2 * x, {}), rounded(y, {})
    masks = rounded(x, {k: masks[k] for k in (*IDS, "row_limit", "col_limit")})[1]
    for equal in ("positive", "left_out"):
        options = {"equal": equal, "label": "counted"}
        found, theirs, truth = (
            differentiated(f, x.to(t), y.to(t), torch.tensor(scale, dtype=t), masks, options)
            for f, t in (
                (masked_lse, torch.float32),
                (reference.masked_lse, torch.float32),
                (reference.masked_lse, x.dtype),
            )
        )
        own = {"ids": masks["row_ids"], "limit": masks["row_limit"]}
        for results, function, t in (
            (found, self_lse, torch.float32),
            (theirs, reference_of_itself, torch.float32),
            (truth, reference_of_itself, x.dtype),
        ):
            results += differentiated_itself(function, x.to(t), torch.tensor(scale, dtype=t), own, {"equal": equal})
        for k, (a, b, c) in enumerate(zip(found, theirs, truth, strict=True)):
            assert_three_way(a, b, c, 1e-4 if k in (7, 11) else 2e-5, name=f"{equal} output {k}")


@pytest.mark.parametrize("rows", [0, 30, 64])
def test_kept_logits_change_nothing(rows):
    x, y, masks = problem(64, 50, 8, dtype=torch.float32)
    options = {"equal": "positive", "label_offset": -5}
    s = torch.tensor(9.0)
    chosen = {k: masks[k] for k in (*IDS, "row_limit", "col_limit")}
    kept = differentiated(masked_lse, x, y, s, chosen, {**options, "work_bytes": rows * 50 * 4})
    for a, b in zip(kept, differentiated(masked_lse, x, y, s, chosen, options), strict=True):
        assert torch.equal(a, b)


def test_results_do_not_depend_on_the_number_of_threads():
    x, y, masks = problem(700, 900, 16, dtype=torch.float32)
    chosen = {k: masks[k] for k in (*IDS, "row_limit", "col_limit")}
    own = {"ids": masks["row_ids"], "limit": masks["row_limit"]}
    s, before, found = torch.tensor(9.0), torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(
                differentiated(masked_lse, x, y, s, chosen, {"equal": "positive"})
                + differentiated_itself(self_lse, x, s, own, {"equal": "positive"})
            )
    finally:
        torch.set_num_threads(before)
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_the_steps_of_other_devices_agree_with_the_processors():
    x, _, masks = problem(40, 1, 8)
    ids, limit, none = masks["row_ids"], masks["row_limit"], torch.zeros(0, dtype=torch.float64)
    s = torch.tensor(5.0, dtype=torch.float64)
    arguments = (x.detach(), s, ids, limit, "dot", "positive", "highest", 0)
    native = torch.ops.gapkern.contrastive_self_lse(*arguments)
    plain = itself._forward(*arguments)
    grads = torch.linspace(0, 1, 40, dtype=torch.float64), torch.linspace(1, -1, 40, dtype=torch.float64)
    backward = torch.ops.gapkern.contrastive_self_lse_backward(*grads, *native, *arguments[:-1], [True, True])
    plain_backward = itself._backward_kernel(*grads, *plain[:2], none, none, *arguments[:-1], [True, True])
    for a, b in zip((*native[:2], *backward), (*plain[:2], *plain_backward), strict=True):
        assert_near(a, b, 1e-13)
    whole = (x, x, s, ids, ids, limit, limit, x, x, none, limit, "sqeuclidean", 2, "counted", "positive", "highest", 0)
    whole = tuple(t.detach() if isinstance(t, torch.Tensor) else t for t in whole)
    native = torch.ops.gapkern.contrastive_masked_lse(*whole)
    plain = masked._forward(*whole)
    grads = [torch.where(r == -math.inf, 0.0, r.sin()) for r in native[:5]]
    backward = torch.ops.gapkern.contrastive_masked_lse_backward(
        *grads, *native[:4], *native[5:], *whole[:-1], [True, True, True]
    )
    plain_backward = masked._backward_kernel(*grads, *plain[:4], *plain[5:], *whole[:-1], [True, True, True])
    for a, b in zip((*native[:5], *backward), (*plain[:5], *plain_backward), strict=True):
        assert_near(a, b, 1e-12)


@pytest.mark.parametrize(("function", "arguments", "options"), list(chunk_problems.of_pairs()))
def test_the_steps_between_products(poisoned, function, arguments, options):
    """In PyTorch's operations; CUDA's kernels: tests/test_software_gpu.py."""
    function(TorchDevice("cpu"), *arguments, **options)


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

        def itself_of(x, s, o=(similarity, equal)):
            found = self_lse(x, s, ids=masks["row_ids"], limit=masks["row_limit"], similarity=o[0], equal=o[1])
            return tuple(v.masked_fill(v == -math.inf, 0) for v in found)

        assert torch.autograd.gradcheck(itself_of, (x, s), check_forward_ad=True)


@pytest.mark.parametrize("label", ["counted", "left_out", "none"])
def test_opcheck(label):
    x, y, masks = problem(6, 8, 4)
    s = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    arguments = (x, y, s, *masks.values(), "dot", 1, label, "positive", "highest", 0)
    torch.library.opcheck(torch.ops.gapkern.contrastive_masked_lse, arguments)
    detached = tuple(t.detach() if isinstance(t, torch.Tensor) else t for t in arguments)
    results = torch.ops.gapkern.contrastive_masked_lse(*detached)
    grads = [torch.ones_like(r) for r in results[:5]]
    torch.library.opcheck(
        torch.ops.gapkern.contrastive_masked_lse_backward,
        (*grads, *results[:4], *results[5:], *detached[:-1], [True, False, True]),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_opcheck_of_a_side_with_itself():
    x, _, masks = problem(6, 8, 4)
    s = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    arguments = (x, s, masks["row_ids"], masks["row_limit"], "dot", "positive", "highest", 2**20)
    torch.library.opcheck(torch.ops.gapkern.contrastive_self_lse, arguments)
    detached = tuple(t.detach() if isinstance(t, torch.Tensor) else t for t in arguments)
    results = torch.ops.gapkern.contrastive_self_lse(*detached)
    torch.library.opcheck(
        torch.ops.gapkern.contrastive_self_lse_backward,
        (results[0], results[1], *results, *detached[:-1], [True, True]),
        test_utils=("test_schema", "test_faketensor"),
    )


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


_ON_AN_INSTRUCTION_SET = """
import sys, torch
sys.path.insert(0, {root!r})
from tests import test_masked_lse as here
from gapkern._load import active_isa
assert active_isa() == "{isa}", active_isa()
for dtype in (torch.float32, torch.float64, torch.bfloat16):
    for chosen in ((), ("ids", "limit")):
        here.test_a_side_with_itself(dtype, 300, 11, chosen)
    for choice in (1, 5):
        x, y, masks = here.problem(150, 230, 11, dtype=dtype)
        x, masks = here.rounded(x, dict((k, masks[k]) for k in here.CHOICES[choice]))
        y, _ = here.rounded(y, dict())
        s, work = torch.tensor(9.0).to(x.dtype), torch.promote_types(dtype, torch.float32)
        options = dict(equal="positive", label_offset=40)
        found = here.differentiated(here.masked_lse, x, y, s, masks, options)
        truth = here.differentiated(here.reference.masked_lse, x.double(), y.double(), s.double(), masks, options)
        for k, (a, c) in enumerate(zip(found, truth)):
            tolerance = 3e-6 if k < 5 else max(4 * here.MARGINS[dtype], 1e-4 if k == 7 else 0)
            here.assert_near(a, c, tolerance, name=str((dtype, choice, k)))
print("ok")
"""


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "avx512bf16"])
def test_every_instruction_set_agrees_with_the_definition(isa):
    from gapkern._load import active_isa

    order = ["portable", "avx2", "avx512", "avx512bf16"]
    if order.index(isa) > order.index(active_isa()):
        pytest.skip(f"this processor has no {isa}")
    run = warm.run(_ON_AN_INSTRUCTION_SET.format(isa=isa, root=str(ROOT)), env={**os.environ, "GAPKERN_ISA": isa})
    assert run.stdout == "ok\n", run.stderr


def test_memory_is_linear():
    setup = (
        "import torch\nfrom gapkern.ops.contrastive import masked_lse\n"
        "def run(n):\n    x = torch.nn.functional.normalize(torch.randn(n, 64), dim=1).requires_grad_()\n"
        "    ids = torch.arange(n) // 4\n"
        "    found = masked_lse(x, x, torch.tensor(10.0), row_ids=ids, col_ids=ids)\n"
        "    (found.row_negative - found.label).sum().backward()\nrun(300)"
    )
    assert peak_memory("run(8192)", setup=setup) < 100  # one matrix of logits: 256 MiB
