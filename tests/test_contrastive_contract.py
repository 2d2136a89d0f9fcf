"""The contrastive operators beside their values: contracts, strides, threads, instruction sets, memory, refusals."""

import math
import os
import sys

import pytest
import torch

from gapkern.ops.contrastive import lse_pair, sigmoid_sum
from gapkern.reference import contrastive as reference
from gapkern.testing import assert_near
from tests import warm
from tests.contrasted import pair, value_and_gradients
from tests.warm import peak_memory


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_gradients_nobody_asked_for_are_not_formed(wanted):
    x, y = pair(20, 20, 8)
    inputs = [t.requires_grad_(w) for t, w in zip((x, y, torch.tensor(2.0)), wanted, strict=True)]
    row, col, positive = lse_pair(*inputs)
    stats = torch.ops.gapkern.contrastive_lse(*(t.detach() for t in inputs), "dot", 0, "highest", 0)[3:]
    formed = torch.ops.gapkern.contrastive_lse_backward(
        row.detach(),
        col.detach(),
        positive.detach(),
        *(t.detach() for t in inputs),
        *stats,
        "dot",
        0,
        "highest",
        list(wanted),
    )
    assert [t.numel() > 0 for t in formed] == list(wanted)
    (row.sum() + col.sum() - 2 * positive.sum()).backward()
    assert [t.grad is not None for t in inputs] == list(wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    x, y = pair(9, 11, 6, dtype)
    arguments = (x.requires_grad_(), y.requires_grad_(), torch.tensor(2.0, requires_grad=True))
    torch.library.opcheck(torch.ops.gapkern.contrastive_lse, (*arguments, "dot", 1, "highest", 0))
    torch.library.opcheck(torch.ops.gapkern.contrastive_lse, (*arguments, "sqeuclidean", 0, "highest", 10**6))
    bias = torch.tensor(-1.0, requires_grad=True)
    torch.library.opcheck(torch.ops.gapkern.sigmoid_loss, (*arguments, bias, 1, "highest", [True, True]))


def test_compiles_whole_with_a_dynamic_batch():
    def step(x, y, scale):
        row, col, positive = lse_pair(x, y, scale)
        return ((row + col) / 2 - positive).mean()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (8, 13, 40):
        x, y = (t.requires_grad_() for t in pair(n, n, 6, seed=n))
        scale = torch.tensor(4.0, requires_grad=True)
        expected = torch.autograd.grad(step(x, y, scale), (x, y, scale))
        actual = torch.autograd.grad(compiled(x, y, scale), (x, y, scale))
        for a, b in zip(actual, expected, strict=True):
            assert_near(a, b, 1e-6)


def test_autocast_lowers_the_embeddings_and_spares_the_scale():
    x, y = pair(30, 30, 16)
    scale = torch.tensor(14.2857)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        row, col, _ = lse_pair(x, y, scale)
    expected = lse_pair(x.bfloat16(), y.bfloat16(), scale)
    assert torch.equal(row, expected[0])
    assert torch.equal(col, expected[1])


def test_double_backward_is_refused():
    x, y = (t.requires_grad_() for t in pair(6, 6, 4))
    row, _, _ = lse_pair(x, y, torch.tensor(2.0))
    (gradient,) = torch.autograd.grad(row.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.sum().backward()
    loss = sigmoid_sum(x, y, torch.tensor(2.0), torch.tensor(0.0))
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.sum().backward()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_row_spoils_its_own_results_and_all_columns(value):
    x, y = pair(12, 12, 5)
    x[4, 2] = value
    row, col, _ = lse_pair(x, y, torch.tensor(2.0))
    expected = reference.lse_pair(x, y, torch.tensor(2.0))
    assert torch.equal(row.isfinite(), expected[0].isfinite())
    assert not col.isfinite().all()


def test_strides_do_not_matter():
    x, y = pair(40, 44, 12)
    scale = torch.tensor(3.0)
    plain = lse_pair(x, y, scale)
    strided = lse_pair(x.T.contiguous().T, torch.stack([y, y], 1)[:, 1], scale)
    misaligned = torch.empty(40 * 12 + 1)[1:].view(40, 12).copy_(x)
    for a, b, c in zip(plain, strided, lse_pair(misaligned, y, scale), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_two_runs_and_any_number_of_threads_agree_bit_for_bit():
    x, y = pair(700, 500 + 300, 48)
    scale = torch.tensor(20.0)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (threads, 1, 2, threads):
            torch.set_num_threads(n)
            results.append(value_and_gradients(lse_pair, x, y, scale))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda x, y, s: (x[0], y, s, "dot", 0, "highest", 0), "expected two dimensions"),
        (lambda x, y, s: (x, y[:, :3], s, "dot", 0, "highest", 0), "texts: expected D = 5 as in images, got 3"),
        (lambda x, y, s: (x[:0], y, s, "dot", 0, "highest", 0), "expected at least one row and one column"),
        (lambda x, y, s: (x, y.double(), s, "dot", 0, "highest", 0), "texts: expected the dtype of images"),
        (lambda x, y, s: (x, y, s.repeat(2), "dot", 0, "highest", 0), "logit_scale: expected one element, got 2"),
        (lambda x, y, s: (x, y, s, "cosine", 0, "highest", 0), "similarity: expected 'dot' or 'sqeuclidean'"),
        (lambda x, y, s: (x, y, s, "dot", 0, "low", 0), "precision: expected 'highest', 'high' or 'medium'"),
        (lambda x, y, s: (x, y, s, "dot", 3, "highest", 0), "label_offset: expected 0 <= label_offset <= M - N = 1"),
        (lambda x, y, s: (x.int(), y.int(), s, "dot", 0, "highest", 0), "expected float32, float64, bfloat16"),
    ],
)
def test_the_operator_refuses_what_it_cannot_serve(arguments, message):
    x, y = pair(6, 7, 5)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.gapkern.contrastive_lse(*arguments(x, y, torch.tensor(1.0)))


_ISA_PROBE = """
import torch, gapkern
from gapkern import _load, selfcheck
assert _load.active_isa() == "{isa}", _load.active_isa()
failed = [check for check in selfcheck.checks() if not check.passed]
assert not failed, failed
print("ok")
"""


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "avx512bf16"])
def test_every_instruction_set_agrees_with_the_references(isa):
    from gapkern import _load

    order = ["portable", "avx2", "avx512", "avx512bf16"]
    if order.index(isa) > order.index(_load.active_isa()):
        pytest.skip(f"this processor has no {isa}")
    run = warm.run(_ISA_PROBE.format(isa=isa), env={**os.environ, "GAPKERN_ISA": isa})
    assert run.stdout == "ok\n", run.stderr


linux = pytest.mark.skipif(
    sys.platform != "linux" or "GAPKERN_SANITIZED" in os.environ,
    reason="/proc, and memory as it is without a sanitizer's shadow",
)
_MEMORY_SETUP = """
import torch
from gapkern import contrastive_loss
from gapkern.losses import sigmoid_loss
n, d = 8192, 64
x, y = (torch.nn.functional.normalize(torch.randn(n, d), dim=1).requires_grad_() for _ in range(2))
{loss}(x[:64], y[:64], 50.0{options}).backward()
"""


@linux
@pytest.mark.parametrize(
    ("loss", "options"), [("contrastive_loss", ', memory="recompute"'), ("sigmoid_loss", ", -10.0")]
)
def test_no_n_by_m_matrix_is_ever_formed(loss, options):
    setup = _MEMORY_SETUP.format(loss=loss, options=options)
    mebibytes, whole = peak_memory(f"{loss}(x, y, 50.0{options}).backward()", setup=setup), 8192 * 8192 * 4 / 2**20
    assert mebibytes < whole / 3, f"{mebibytes:.0f} MiB more, where one N x M matrix has {whole:.0f}"


@linux
def test_the_memory_probe_sees_an_n_by_m_matrix():
    setup = _MEMORY_SETUP.format(loss="contrastive_loss", options="")
    assert peak_memory("(x @ y.T).sum().backward()", setup=setup) > 250
