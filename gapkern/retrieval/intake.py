"""Rows and ids as FAISS takes them: finite float32 rows, shifted, whose squares stay in range; ids given once."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gapkern._rows import unit
from gapkern.gap import Projection
from gapkern.gap.transforms import Transform

# Four times the square of a norm stays below float32's largest number, with rounding to spare.
LARGEST = math.sqrt(torch.finfo(torch.float32).max) / 4
# Codes are learned from squares, which have this norm's 24 bits above float32's least normal number.
LEAST = 1e-15
TINY = torch.finfo(torch.float32).tiny


def moved(
    name: str,
    rows: Tensor,
    first: int,
    shift: Transform | None,
    *,
    side: str,
    codes: tuple[float, float] | None = None,
) -> np.ndarray:
    """Rows (n, D) as float32, moved by the shift, contiguous; a gallery of length 1 where a projection is for cosine.

    Args:
        first: the number of the first of them, for messages.
        side: of the shift: "gallery" or "queries".
        codes: the least and the largest value that a code keeps.

    Raises:
        ValueError: NaN or infinity; a row that float32, squares in float32, or the codes cannot hold.
    """
    given, rows = rows, rows.float()
    _all_of(torch.isfinite(rows).all(1), name, "finite values in float32", "NaN or infinity", first)
    if given.dtype == torch.float64:
        lost = (rows.abs().amax(1) < TINY) & (given != 0).any(1)
        _all_of(~lost, name, f"values that float32 holds (from {TINY:.1e} on)", "a smaller one", first)
    _squares(name, rows, first)
    if shift is not None:
        if side == "gallery" and isinstance(shift, Projection) and shift.metric == "cosine":
            rows = unit(rows.double()).float()
        rows = shift.transform(rows) if side == "gallery" else shift.transform_queries(rows)
        _squares(name, rows, first)
    if codes is not None and side == "gallery":
        kept = ((rows >= codes[0]) & (rows <= codes[1])).all(1)
        _all_of(kept, name, f"values in [{codes[0]:g}, {codes[1]:g}], which the codes hold", "another", first)
    return np.ascontiguousarray(rows.cpu().numpy())


def _squares(name: str, rows: Tensor, first: int) -> None:
    norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    what = f"norms up to {LARGEST:.1e}, whose squares float32 holds (divide queries and gallery by one number)"
    _all_of(norms <= LARGEST, name, what, "a larger one", first)


def _all_of(right: Tensor, name: str, expected: str, got: str, first: int) -> None:
    if not bool(right.all()):
        row = first + int((~right).nonzero()[0])
        raise ValueError(f"{name}: expected {expected}, got {got}, first in row {row}")


def spread(name: str, rows: np.ndarray) -> None:
    """Raises ValueError where the largest norm of rows that codes or graphs are learned from is lost in squares."""
    largest = float(np.linalg.norm(rows.astype(np.float64), axis=1).max()) if len(rows) else 0.0
    if 0 < largest < LEAST:
        raise ValueError(
            f"{name}: expected norms from {LEAST:g} on, whose squares float32 holds (multiply queries and gallery by "
            f"one number), got none above {largest:.1e}"
        )


def numbers(ids: Any, count: int, following: int) -> np.ndarray:
    """ids as int64 (count,), each once; by default `following` and on.

    Raises:
        TypeError: they are no integers.
        ValueError: another number of them, negative ones, or one given twice.

    Example:
        >>> numbers(None, 3, 7), numbers([5, 2], 2, 7)
        (array([7, 8, 9]), array([5, 2]))
    """
    if ids is None:
        return np.arange(following, following + count, dtype=np.int64)
    names = ids.detach().cpu().numpy() if isinstance(ids, Tensor) else np.asarray(ids)
    if names.shape != (count,):
        raise ValueError(f"ids: expected shape ({count},), one for each row, got {names.shape}")
    if count and not np.issubdtype(names.dtype, np.integer):
        raise TypeError(f"ids: expected integers, got {names.dtype}")
    if count and (names.min() < 0 or int(names.max()) >= 2**63 - 1):
        wrong = int(np.flatnonzero((names < 0) | (names >= 2**63 - 1))[0])
        raise ValueError(f"ids: expected 0 <= id < 2**63 - 1, got {names[wrong]} in row {wrong}")
    names = np.ascontiguousarray(names, dtype=np.int64)
    unique, times = np.unique(names, return_counts=True)
    if len(unique) < count:
        raise ValueError(f"ids: expected each id once, got {unique[times > 1][0]} {times[times > 1][0]} times")
    return names
