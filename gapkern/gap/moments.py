"""Means and Gram matrices of rows, in float64: in one pass, batch by batch, rank by rank."""

import hashlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gapkern import files
from gapkern._compare import same_fields
from gapkern._rows import with_float64
from gapkern.ops import meanshift as _ops  # noqa: F401 - registers the operators

__all__ = ["Moments", "Sample", "batches", "hull", "numerical_rank", "principal"]


@dataclass(eq=False)
class Moments:
    """count, mean (D,) and gram (D, D) = sum_i (x_i - mean)(x_i - mean)^T of the rows seen so far.

    Example:
        >>> seen = Moments.of(torch.tensor([[0.0, 0.0], [2.0, 0.0]]))
        >>> seen.mean.tolist(), seen.gram.tolist()
        ([1.0, 0.0], [[2.0, 0.0], [0.0, 0.0]])
    """

    count: int
    mean: Tensor
    gram: Tensor

    __eq__ = same_fields

    @staticmethod
    def none(dims: int) -> "Moments":
        """Of no rows."""
        return Moments(0, torch.zeros(dims, dtype=torch.float64), torch.zeros(dims, dims, dtype=torch.float64))

    @staticmethod
    def of(x: Tensor) -> "Moments":
        """Of the rows of x (N, D), which may be mapped from a file."""
        seen = Moments.none(x.shape[1])
        for rows in batches(x):
            seen.update(rows)
        return seen

    def update(self, rows: Tensor) -> None:
        """Adds rows (n, D)."""
        if len(rows) == 0:
            return
        rows = with_float64(rows)
        mean = torch.ops.gapkern.meanshift_sum(rows).cpu() / len(rows)
        gram = torch.ops.gapkern.meanshift_gram(rows, mean.to(rows.device)).cpu()
        self.merge(Moments(len(rows), mean, gram))

    def merge(self, other: "Moments") -> None:
        """Adds the rows that `other` has seen (Chan, Golub and LeVeque, 1983)."""
        if other.count == 0:
            return
        count = self.count + other.count
        apart = other.mean - self.mean
        self.gram += other.gram + torch.outer(apart, apart) * (self.count * other.count / count)
        self.mean = self.mean + apart * (other.count / count)
        self.count = count

    def copy(self) -> "Moments":
        """The same, for further rows."""
        return replace(self, gram=self.gram.clone())


def batches(x: Tensor) -> tuple[Tensor, ...]:
    """The rows of x, as many at a time as a streamed file gives."""
    return x.split(max(1, files.CHUNK // max(1, x.shape[1])))  # type: ignore[no-untyped-call, no-any-return]


class Sample:
    """Up to `limit` rows drawn evenly from all that were seen; all of them while they are fewer.

    Every row has a random key and the smallest keys stay, so that samples merge. The keys of a batch are drawn by its
    place and by its rows, so that shards which are read side by side draw different positions.
    """

    def __init__(self, dims: int, limit: int) -> None:
        self.limit = limit
        self.rows = torch.empty(0, dims, dtype=torch.float32)
        self.keys = torch.empty(0, dtype=torch.float64)
        self.seen = 0

    def update(self, rows: Tensor) -> None:
        """Adds rows (n, D)."""
        if len(rows) == 0:
            return
        generator = torch.Generator().manual_seed(self._seed(rows))
        keys = torch.rand(len(rows), generator=generator, dtype=torch.float64)
        self.seen += len(rows)
        if self.seen > self.limit and len(self.keys) == self.limit:
            chosen = keys < self.keys.max()
            rows, keys = rows[chosen.to(rows.device)], keys[chosen]
        self._add(rows.cpu(), keys)

    def _seed(self, rows: Tensor) -> int:
        some = rows[:: max(1, len(rows) // 64)].detach().cpu().contiguous()
        found = hashlib.blake2b(str(self.seen).encode(), digest_size=8)
        found.update(some.view(torch.uint8).numpy().tobytes())
        return int.from_bytes(found.digest(), "little") >> 1

    def copy(self) -> "Sample":
        """The same, for further rows."""
        other = Sample(self.rows.shape[1], self.limit)
        other.rows, other.keys, other.seen = self.rows, self.keys, self.seen
        return other

    def merge(self, other: "Sample") -> None:
        """Adds what another sample has seen."""
        self.seen += other.seen
        self._add(other.rows, other.keys)

    def _add(self, rows: Tensor, keys: Tensor) -> None:
        if not len(keys):
            return
        # A copy, so that no mapped file or caller's tensor is held on to.
        self.rows = torch.cat([self.rows.to(rows.dtype), rows]) if len(self.keys) else rows.clone()
        self.keys = torch.cat([self.keys, keys])
        if len(self.keys) > self.limit:
            kept = self.keys.topk(self.limit, largest=False).indices.sort().values
            self.rows, self.keys = self.rows[kept], self.keys[kept]


def hull(seen: Moments, rows: Tensor) -> Tensor:
    """Orthonormal basis (D, rank) of the directions in which the seen rows differ, in float64.

    Few rows, all of them at hand: singular vectors of the centred rows, which resolve directions of relative size
    1e-12. Otherwise their Gram matrix, which resolves 1e-7, finer than float32 data can say.
    """
    if len(rows) == seen.count <= rows.shape[1]:
        centred = rows.double() - rows.double().mean(0)
        _, singular, vectors = torch.linalg.svd(centred, full_matrices=False)
        rank = int((singular > singular[0] * 1e-12 * max(rows.shape)).sum()) if len(singular) else 0
        return vectors[:rank].T
    values, vectors = principal(seen.gram)
    return vectors[:, : numerical_rank(values)]


def principal(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (descending) and eigenvectors (columns) of a Gram matrix."""
    values, vectors = torch.linalg.eigh(gram)
    return values.flip(0).clamp_min(0), vectors.flip(1)


def numerical_rank(values: Tensor) -> int:
    """How many eigenvalues of a Gram matrix, descending, are more than rounding."""
    return int((values > values[0] * 1e-14 * len(values)).sum()) if values[0] > 0 else 0
