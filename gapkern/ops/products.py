"""Matrix products of half-precision operands with wider results."""

import torch
from torch import Tensor


def matmul(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a b with the result, not just the accumulation, in `dtype`."""
    if a.dtype == dtype:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)


def write_matmul(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a b, in the dtype of `out`, without a temporary where PyTorch can."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    elif _fused(out, a):
        torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)
    else:
        out.copy_(matmul(a, b, out.dtype))


def add_matmul(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a b, in the dtype of `out`.

    Through a temporary that is four passes over memory beside the product's own; as the product's accumulator two.
    """
    if out.dtype == a.dtype:
        out.addmm_(a, b)
    elif _fused(out, a):
        torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, out=out)
    else:
        out += matmul(a, b, out.dtype)


_writes_wider: dict[tuple[torch.device, torch.dtype, torch.dtype], bool] = {}


def _fused(out: Tensor, a: Tensor) -> bool:
    """Whether products of the dtype of `a` write to and add to a given matrix like `out`.

    Asked of the library itself, once for a device and dtypes: `out=` with `out_dtype=` has been there and wrong
    (pytorch #154086). The answer costs a synchronisation; a stream that is being captured cannot give it, and captures
    the product with a temporary.
    """
    key = (out.device, a.dtype, out.dtype)
    if key not in _writes_wider:
        if not out.is_cuda or torch.cuda.is_current_stream_capturing():
            return False
        _writes_wider[key] = _is_right(*key)
    return _writes_wider[key]


def _is_right(device: torch.device, narrow: torch.dtype, wide: torch.dtype) -> bool:
    a, b = (torch.arange(1.0, 257.0, device=device).reshape(16, 16).remainder(7).to(narrow) for _ in range(2))
    expected = a.to(wide) @ b.to(wide)
    found = torch.full((48, 16), 3.0, dtype=wide, device=device)
    try:
        torch.ops.aten.mm.dtype_out(a, b, wide, out=found[:16])
        torch.ops.aten.addmm.dtype_out(found[16:32], a.t().contiguous().t(), b, wide, out=found[16:32])
    except (AttributeError, RuntimeError):
        return False
    return torch.equal(found, torch.cat([expected, expected + 3, torch.full_like(expected, 3)]))
