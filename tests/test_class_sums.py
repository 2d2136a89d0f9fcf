"""Sums over the pairs of equal ids: values, gradients and transforms are those of the definition."""

import itertools

import pytest
import torch
from torch import func
from torch.utils._pytree import tree_leaves

from gapkern.ops.contrastive import class_sums, sums
from gapkern.reference import classes as reference
from gapkern.testing import assert_near, assert_three_way
from tests.warm import peak_memory

OPS = torch.ops.gapkern
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
MARGINS = {torch.float64: 1e-13, torch.float32: 1e-7, torch.bfloat16: 4e-3, torch.float16: 5e-4}
SHAPES = [(1, 1, 3, 1), (1, 6, 5, 2), (13, 17, 9, 4), (40, 30, 70, 1), (130, 120, 67, 40)]
LABELS = [{}, {"label_offset": 3}, {"label_offset": -2}, {"label_offset": -50}, {"labelled": False}]


def problem(n, m, d, classes, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(k, d, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for k in (n, m))
    # Any numbers will do, and some classes have rows on one side alone.
    names = torch.randint(-(2**60), 2**60, (classes + 2,), generator=generator)
    first, second = (torch.randint(0, classes + 1, (k,), generator=generator) for k in (n, m))
    return x, y, names[first], names[second + 1 if classes > 2 else second]


def differentiated(function, x, y, ids, options):
    x, y = (t.detach().requires_grad_() for t in (x, y))
    found = function(x, y, *ids, **options)
    generator = torch.Generator().manual_seed(5)
    weights = (torch.randn(len(r), generator=generator, dtype=torch.float64).to(r.dtype) for r in found)
    total = sum((w * r).sum() for w, r in zip(weights, found, strict=True))
    return [*(r.detach() for r in found), *torch.autograd.grad(total, (x, y))]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("together", [0, 2**22])
def test_values_and_gradients_are_those_of_the_definition(dtype, shape, together, monkeypatch):
    monkeypatch.setattr(sums, "TOGETHER_ELEMENTS", together)
    x, y, *ids = problem(*shape, dtype=dtype)
    work = torch.float64 if dtype == torch.float64 else torch.float32
    for similarity, labels in itertools.product(("dot", "sqeuclidean"), LABELS):
        options = {"similarity": similarity, **labels}
        found = differentiated(class_sums, x, y, ids, options)
        theirs = differentiated(reference.class_sums, x.to(work), y.to(work), ids, options)
        truth = differentiated(reference.class_sums, x.double(), y.double(), ids, options)
        for k, (a, b, c) in enumerate(zip(found, theirs, truth, strict=True)):
            assert a.dtype == (torch.float64 if k < 2 else dtype)
            assert_three_way(a, b, c, MARGINS[dtype] if k > 1 else 1e-13, name=f"{options} output {k}")


@pytest.mark.parametrize("shape", SHAPES)
def test_the_steps_of_other_devices_agree_with_the_processors(shape, monkeypatch):
    monkeypatch.setattr(sums, "CHUNK_ELEMENTS", 200)
    x, y, *ids = problem(*shape)
    by_rows, by_columns = torch.linspace(-1, 2, len(x)).double(), torch.linspace(3, -1, len(y)).double()
    for similarity, labels in itertools.product(("dot", "sqeuclidean"), LABELS):
        labels = {"label_offset": 0, "labelled": True, **labels}
        arguments = (x.detach(), y.detach(), *ids, similarity, *labels.values())
        ours = (
            *OPS.contrastive_class_sums(*arguments),
            *OPS.contrastive_class_sums_backward(by_rows, by_columns, *arguments, [True, True]),
        )
        plain = *sums._forward(*arguments), *sums._backward_kernel(by_rows, by_columns, *arguments, [True, True])
        for a, b in zip(ours, plain, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_near_pairs_far_from_the_origin_keep_their_distances():
    x, y, *ids = problem(60, 70, 20, 3, dtype=torch.float32)
    x, y = ((1000 + t.detach() / 100).requires_grad_() for t in (x, y))
    truth = differentiated(reference.class_sums, x.double(), y.double(), ids, {"similarity": "sqeuclidean"})
    found = differentiated(class_sums, x, y, ids, {"similarity": "sqeuclidean"})
    for a, b, tolerance in zip(found, truth, (1e-10, 1e-10, 1e-6, 1e-6), strict=True):
        assert_near(a.double(), b, tolerance)


def test_pairs_of_a_label_alone_have_neither_sums_nor_gradients():
    x, y, *_ = problem(30, 30, 7, 1, dtype=torch.float32)
    ids = torch.arange(30)
    for value in differentiated(class_sums, x, y, (ids, ids), {}):
        assert not value.any()


def test_results_do_not_depend_on_the_number_of_threads():
    before, found = torch.get_num_threads(), []
    cases = [problem(700, 900, 80, classes, dtype=torch.float32) for classes in (1, 5, 600)]
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append([v for x, y, *ids in cases for v in differentiated(class_sums, x, y, ids, {})])
    finally:
        torch.set_num_threads(before)
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_any_strides():
    x, y, *ids = problem(40, 30, 21, 6)
    expected = class_sums(x, y, *ids)
    apart = [torch.stack([t, t], 2).detach()[:, :, 0] for t in (x, y)]
    for a, b in zip(class_sums(*apart, *ids), expected, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(class_sums(x.T.contiguous().T, y, *ids), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("similarity", ["dot", "sqeuclidean"])
def test_gradcheck_opcheck_and_transforms(similarity):
    x, y, *ids = problem(5, 7, 3, 2)
    arguments = (*ids, similarity, 1, True)

    def call(x, y):
        return OPS.contrastive_class_sums(x, y, *arguments)

    def definition(x, y):
        return reference.class_sums(x, y, *ids, similarity=similarity, label_offset=1)

    assert torch.autograd.gradcheck(call, (x, y), check_forward_ad=True)
    torch.library.opcheck(OPS.contrastive_class_sums, (x, y, *arguments))
    grads = torch.ones(5, dtype=torch.float64), torch.ones(7, dtype=torch.float64)
    for needs in ([True, False], [False, True], [True, True]):
        torch.library.opcheck(
            OPS.contrastive_class_sums_backward,
            (*grads, x.detach(), y.detach(), *arguments, needs),
            test_utils=("test_schema", "test_faketensor"),
        )
    many = torch.stack([x.detach(), -2 * x.detach()])
    for transform in (
        lambda f, x, y: func.vmap(f, in_dims=(0, None))(many, y),
        lambda f, x, y: func.jacrev(f, (0, 1))(x, y),
        lambda f, x, y: func.jacfwd(f, (0, 1))(x, y),
        lambda f, x, y: func.grad(lambda x: func.jvp(f, (x, y), (y[:5], x.sum(0).expand(7, 3)))[1][0].sum())(x),
    ):
        ours, expected = (tree_leaves(transform(f, x.detach(), y.detach())) for f in (call, definition))
        for a, b in zip(ours, expected, strict=True):
            assert_near(a.detach(), b.detach(), 1e-12)


def test_double_backward_is_refused():
    x, y, *ids = problem(5, 7, 3, 2)
    (gradient,) = torch.autograd.grad(class_sums(x, y, *ids)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        gradient.sum().backward()


def test_autocast_rounds_the_embeddings_alone():
    x, y, *ids = problem(40, 30, 21, 6, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = class_sums(x, y, *ids)
    for a, b in zip(found, class_sums(x.bfloat16(), y.bfloat16(), *ids), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": torch.ones(7, 4)}, r"x and y: expected shapes \(N, D\) and \(M, D\)"),
        ({"y": torch.ones(7, 3, dtype=torch.float64)}, "y: expected the dtype of x"),
        ({"row_ids": torch.zeros(4).long()}, "row_ids: expected 5 elements, got 4"),
        ({"col_ids": torch.zeros(5).long()}, "col_ids: expected 7 elements, got 5"),
        ({"similarity": "cosine"}, "similarity: expected 'dot' or 'sqeuclidean', got 'cosine'"),
        ({"x": torch.ones(5, 3).int(), "y": torch.ones(7, 3).int()}, "x: expected float32, float64, bfloat16"),
    ],
)
def test_mistakes_are_named(change, message):
    given = {"x": torch.ones(5, 3), "y": torch.ones(7, 3), "row_ids": torch.zeros(5).long()}
    given |= {"col_ids": torch.zeros(7).long(), **change}
    with pytest.raises(RuntimeError, match=message):
        class_sums(**given)


@pytest.mark.slow
def test_memory_is_that_of_one_gradient():
    setup = """
import torch
from gapkern.ops.contrastive import class_sums
def sides(n):
    x, y = (torch.ones(n, 512).requires_grad_() for _ in range(2))
    x.grad, y.grad = torch.ones(n, 512), torch.ones(n, 512)
    return x, y, torch.arange(n) // 2, torch.arange(n) // 2
def run(given):
    sum(class_sums(*given)).sum().backward()
run(sides(9))
given = sides(16384)
"""
    assert peak_memory("run(given)", setup=setup) < 45  # one gradient is 32 MiB
