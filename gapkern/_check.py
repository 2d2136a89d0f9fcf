"""Argument checks with one voice: the argument's name, what was expected, what came."""

import inspect
import math
import numbers
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

_PACKAGE = str(Path(__file__).parent)
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def tensor(name: str, value: Any) -> torch.Tensor:
    """`value` as a floating-point tensor; NumPy arrays share their memory.

    Raises:
        TypeError: not a tensor or array, or not of a floating-point dtype.
    """
    if isinstance(value, np.ndarray):
        if value.dtype.newbyteorder("=") not in (np.float16, np.float32, np.float64):
            raise TypeError(f"{name}: expected float16, float32 or float64, got an array of {value.dtype}")
        if not value.dtype.isnative:
            value = value.astype(value.dtype.newbyteorder("="))
        if any(stride < 0 for stride in value.strides) or not value.flags.writeable:
            value = value.copy()
        value = torch.from_numpy(value)
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor or numpy.ndarray, got {type(value).__name__}")
    if value.dtype not in FLOATS:
        raise TypeError(f"{name}: expected float32, float16, bfloat16 or float64, got {value.dtype}")
    return value


def matrix(name: str, value: Any, *, rows: str = "N", empty: bool = False) -> torch.Tensor:
    """`value` as a (rows, D) floating-point tensor.

    Raises:
        TypeError: not a floating-point tensor or array.
        ValueError: not two-dimensional, without columns, or without rows where `empty` is False.
    """
    value = tensor(name, value)
    if value.dim() != 2:
        raise ValueError(f"{name}: expected shape ({rows}, D), got {tuple(value.shape)}")
    if value.shape[1] == 0:
        raise ValueError(f"{name}: expected at least one column, got shape {tuple(value.shape)}")
    if not empty and value.shape[0] == 0:
        raise ValueError(f"{name}: expected at least one row, got shape {tuple(value.shape)}")
    return value


def same_width(**matrices: torch.Tensor) -> None:
    """Raises ValueError unless all matrices have the same number of columns."""
    (first, reference), *others = matrices.items()
    for name, other in others:
        if other.shape[1] != reference.shape[1]:
            raise ValueError(f"{name}: expected D = {reference.shape[1]} as in {first}, got shape {tuple(other.shape)}")


def same_rows(**matrices: torch.Tensor) -> None:
    """Raises ValueError unless all matrices have the same number of rows."""
    (first, reference), *others = matrices.items()
    for name, other in others:
        if other.shape[0] != reference.shape[0]:
            raise ValueError(
                f"{name}: expected {reference.shape[0]} rows as in {first}, got shape {tuple(other.shape)}"
            )


def same_device(**tensors: torch.Tensor) -> None:
    """Raises ValueError unless all tensors are on one device."""
    (first, reference), *others = tensors.items()
    for name, other in others:
        if other.device != reference.device:
            raise ValueError(f"{name}: expected device {reference.device} as {first}, got {other.device}")


def finite(name: str, value: torch.Tensor, first: int = 0, *, where: str = "") -> torch.Tensor:
    """Raises ValueError naming the first row that holds a NaN or an infinity.

    Args:
        first: the row of the whole that `value` begins with.
        where: said after the row.
    """
    if not bool(torch.isfinite(value).all()):
        bad = ~torch.isfinite(value)
        rows = bad.reshape(bad.shape[0], -1).any(1) if value.dim() else bad
        row = first + (int(rows.nonzero()[0]) if value.dim() else 0)
        raise ValueError(f"{name}: expected finite values, got NaN or infinity, first in row {row}{where}")
    return value


def number(
    name: str,
    value: Any,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    exclusive: bool = False,
) -> float:
    """`value` as a finite float within [low, high], or above `low` where `exclusive`.

    Raises:
        TypeError: not a real number.
        ValueError: outside the range, NaN or infinite.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    value = float(value)
    below = value <= low if exclusive else value < low
    if not math.isfinite(value) or below or value > high:
        bounds = []
        if low > -math.inf:
            bounds.append(f"{'>' if exclusive else '>='} {low:g}")
        if high < math.inf:
            bounds.append(f"<= {high:g}")
        raise ValueError(f"{name}: expected a finite number {' and '.join(bounds)}".rstrip() + f", got {value:g}")
    return value


def integer(name: str, value: Any, *, low: int | None = None, high: int | None = None) -> int:
    """`value` as an int within [low, high].

    Raises:
        TypeError: not an integer.
        ValueError: outside the range.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    value = int(value)
    if (low is not None and value < low) or (high is not None and value > high):
        bounds = " and ".join(
            text for text in (f">= {low}" if low is not None else "", f"<= {high}" if high is not None else "") if text
        )
        raise ValueError(f"{name}: expected an integer {bounds}, got {value}")
    return value


def choice(name: str, value: Any, options: Iterable[str]) -> str:
    """`value` if it is one of `options`.

    Raises:
        ValueError: not one of them.
    """
    options = list(options)
    if value not in options:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, options))}, got {value!r}")
    return value


def extra(module: str, package: str, name: str) -> Any:
    """Imports an optional dependency; the error names the extra that brings it.

    Raises:
        ImportError: the module is not installed.
    """
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{package} is needed here; run `pip install 'gapkern[{name}]'` ({error})") from None


def warn(message: str) -> None:
    """A UserWarning of the line that called the package, however deep in it this is."""
    level, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
