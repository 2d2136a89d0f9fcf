"""A file that was drawn for the fuzzer, and what its matrix is."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROWS, DIMS = 30, 16
REFUSED = None


@dataclass
class Drawn:
    """A file, how a command names it, and the matrix in it; None where it must be refused."""

    argument: str
    file: Path
    matrix: np.ndarray | None
    read: Callable[[], np.ndarray]  # the matrix by the format's own library
    damaged: bool = False


def values(rng: random.Random, rows: int, dims: int = DIMS) -> np.ndarray:
    return np.random.default_rng(rng.getrandbits(64)).standard_normal((rows, dims))


def rows_of(rng: random.Random) -> int:
    return rng.choice((0, 1, 2, ROWS, ROWS, ROWS, 31, 700))


def whole(matrix: np.ndarray) -> np.ndarray | None:
    """A matrix that is embeddings, or None."""
    return matrix if len(matrix) and matrix.shape[1] == DIMS and np.isfinite(matrix).all() else REFUSED
