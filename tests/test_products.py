"""Products of half precision that write to, and add to, a wider matrix."""

import pytest
import torch

from gapkern.ops import products
from gapkern.testing import assert_near


def operands(dtype):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in ((5, 7), (7, 3))]


@pytest.mark.parametrize(
    ("narrow", "wide"), [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64,) * 2]
)
@pytest.mark.parametrize("transposed", [False, True])
def test_written_and_added(narrow, wide, transposed):
    a, b = operands(narrow)
    a = a.t().contiguous().t() if transposed else a
    truth, whole = a.double() @ b.double(), torch.full((9, 3), 2.0, dtype=wide)
    products.write_matmul(whole[2:7], a, b)
    assert_near(whole[2:7], truth, 1e-6)
    products.add_matmul(whole[2:7], a, b)
    assert_near(whole[2:7], 2 * truth, 1e-6)
    assert torch.equal(whole[[0, 1, 7, 8]], torch.full((4, 3), 2.0, dtype=wide)), "rows beside them"


def right_product(a, b, dtype, *, out):
    return out.copy_(a.to(dtype) @ b.to(dtype))


def right_sum(c, a, b, dtype, *, out):
    return out.copy_(c + a.to(dtype) @ b.to(dtype))


def absent(*arguments, out):
    raise NotImplementedError("Could not run 'aten::mm.dtype_out' with arguments from the 'CUDA' backend")


@pytest.mark.parametrize(
    ("product", "total", "trusted"),
    [
        (right_product, right_sum, True),
        (absent, right_sum, False),
        (right_product, absent, False),
        (right_product, lambda c, a, b, dtype, *, out: out.copy_(a.to(dtype) @ b.to(dtype)), False),
        (right_product, lambda c, a, b, dtype, *, out: c + a.to(dtype) @ b.to(dtype), False),
        (lambda a, b, dtype, *, out: a.to(dtype) @ b.to(dtype), right_sum, False),
    ],
    ids=["right", "no product", "no sum", "forgets what was there", "leaves it", "writes nothing"],
)
def test_the_library_is_asked_whether_it_is_right(monkeypatch, product, total, trusted):
    monkeypatch.setattr(torch.ops.aten.mm, "dtype_out", product)
    monkeypatch.setattr(torch.ops.aten.addmm, "dtype_out", total)
    assert products._is_right(torch.device("cpu"), torch.bfloat16, torch.float32) == trusted


def test_what_is_trusted_is_called(monkeypatch):
    calls = []
    monkeypatch.setattr(products, "_fused", lambda out, a: True)
    monkeypatch.setattr(
        torch.ops.aten.mm, "dtype_out", lambda *a, out: calls.append("mm") or right_product(*a, out=out)
    )
    monkeypatch.setattr(
        torch.ops.aten.addmm, "dtype_out", lambda *a, out: calls.append("addmm") or right_sum(*a, out=out)
    )
    a, b = operands(torch.bfloat16)
    out = torch.zeros(5, 3)
    products.write_matmul(out, a, b)
    products.add_matmul(out, a, b)
    assert_near(out, 2 * a.double() @ b.double(), 1e-6)
    assert calls == ["mm", "addmm"]
