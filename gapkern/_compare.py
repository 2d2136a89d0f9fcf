"""Equality of dataclasses that hold tensors, whose own `==` gives no single answer."""

import math
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor


def same_fields(self: Any, other: Any) -> bool:
    """For `__eq__` of a dataclass with eq=False: one class, and all compared fields the same to the bit.

    Tensors are the same by dtype, shape and values, on whatever device; NaN is the same as NaN, as a result computed
    twice should be.
    """
    if type(self) is not type(other):
        return NotImplemented
    return all(_same(getattr(self, f.name), getattr(other, f.name)) for f in fields(self) if f.compare)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        if not isinstance(b, Tensor) or a.dtype != b.dtype or a.shape != b.shape:
            return False
        a, b = a.detach().cpu(), b.detach().cpu()
        return bool(((a == b) | ((a != a) & (b != b))).all())
    if isinstance(a, float) and isinstance(b, float):
        return a == b or (math.isnan(a) and math.isnan(b))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(_same, a, b))
    if is_dataclass(a) and not isinstance(a, type):
        return bool(a == b)
    return bool(a == b)
