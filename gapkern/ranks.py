"""Galleries and queries spread over ranks: each holds its share of rows, in order, and reads the others' in turn.

Whatever the number of ranks: shares are consecutive rows, noise depends on an element's place alone, counts are summed
as integers, and near-ties are decided in float64 from the rows themselves. So results are the same to the last bit.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gapkern import _check, files
from gapkern.gap import MeanShift
from gapkern.perturb import _NEXT_STREAM, Perturbation, Quantize, Replace, _stages
from gapkern.retrieval import exact


class RankLost(RuntimeError):
    """Another rank has ended or no longer answers."""


@contextmanager
def _together() -> Iterator[None]:
    """What a collective raises is that a rank is lost: by where it comes from, whatever the backend's words are."""
    try:
        yield
    except RuntimeError as error:
        raise RankLost(str(error).strip().split("\n")[0] or type(error).__name__) from None


@dataclass(frozen=True)
class Rows:
    """This rank's rows of a matrix: `values` (n, D) are rows first .. first + n - 1 of `total`."""

    values: Tensor
    first: int
    total: int

    def of(self, values: Tensor) -> "Rows":
        """The same place with other values."""
        return replace(self, values=values)


class Ranks:
    """This process among those that evaluate together; alone, it is rank 0 of 1.

    Args:
        timeout: seconds after which a rank that waits for another gives up.
        device: "cpu" or "cuda"; each rank takes the device of its LOCAL_RANK.

    Under `torchrun` the process group is made here, gloo for "cpu" and NCCL for "cuda"; one that is there already is
    used. Without either there is one rank.

    Raises:
        ValueError: an argument out of range, or no such device.

    Example:
        >>> with Ranks() as ranks:
        ...     ranks.rank, ranks.world, ranks.share(10)
        (0, 1, slice(0, 10, None))
    """

    def __init__(self, timeout: float = 1800, device: str = "cpu"):
        timeout = _check.number("timeout", timeout, low=0, exclusive=True)
        _check.choice("device", device, ("cpu", "cuda"))
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device: expected 'cpu', as no CUDA device is visible, got 'cuda'")
        self.device = torch.device(device)
        self._made = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized()
        if device == "cuda":
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
            torch.cuda.set_device(self.device)
        if self._made:
            with _together():
                dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timedelta(seconds=timeout))
        together = dist.is_available() and dist.is_initialized()
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if self._made and dist.is_initialized() and kind is None:
            with _together():
                dist.destroy_process_group()

    def share(self, total: int, rank: int | None = None) -> slice:
        """A rank's rows of `total`: consecutive, as even as can be.

        Example:
            >>> ranks = Ranks()
            >>> ranks.world = 3
            >>> [ranks.share(10, r) for r in range(3)]
            [slice(0, 4, None), slice(4, 7, None), slice(7, 10, None)]
        """
        rank = self.rank if rank is None else rank
        even, more = divmod(total, self.world)
        first = rank * even + min(rank, more)
        return slice(first, first + even + (rank < more))

    def rows(self, whole: Tensor) -> Rows:
        """This rank's share of a matrix (N, D), which may be mapped from a file."""
        mine = self.share(len(whole))
        return Rows(whole[mine].to(self.device), mine.start, len(whole))

    def agree(self, name: str, value: Any) -> None:
        """Refuses, on every rank alike, inputs that differ between ranks.

        Raises:
            ValueError: they do.
        """
        if self.world == 1:
            return
        everyone: list[Any] = [None] * self.world
        with _together():
            dist.all_gather_object(everyone, value)
        if any(other != everyone[0] for other in everyone):
            raise ValueError(f"{name}: expected the same on every rank, got {everyone}")

    def first(self, value: Any) -> Any:
        """What rank 0 has."""
        if self.world == 1:
            return value
        box = [value]
        with _together():
            dist.broadcast_object_list(box, 0)
        return box[0]

    def sum(self, counts: Tensor) -> Tensor:
        """Integers summed over ranks."""
        if self.world == 1:
            return counts.cpu()
        total = counts.to(self.device).clone()
        with _together():
            dist.all_reduce(total)
            return total.cpu()

    def each(self, rows: Rows) -> Iterator[tuple[int, Tensor]]:
        """Every rank's rows in order, one rank's at a time, and the row that they start at."""
        for source in range(self.world):
            place = self.share(rows.total, source)
            if place.stop > place.start:
                yield place.start, self._from(source, rows, place)

    def batches(self, rows: Rows) -> Iterator[Tensor]:
        """All rows in order on every rank, in batches that do not depend on the number of ranks."""
        step = max(1, files.CHUNK // rows.values.shape[1])
        for start in range(0, rows.total, step):
            stop, parts = min(rows.total, start + step), []
            for source in range(self.world):
                place = self.share(rows.total, source)
                part = slice(max(start, place.start), min(stop, place.stop))
                if part.stop > part.start:
                    parts.append(self._from(source, rows, part))
            yield parts[0] if len(parts) == 1 else torch.cat(parts)

    def _from(self, source: int, rows: Rows, part: slice) -> Tensor:
        """Rows `part` of the whole, which are all `source`'s."""
        if source == self.rank:
            values = rows.values[part.start - rows.first : part.stop - rows.first].contiguous()
        else:
            values = rows.values.new_empty(part.stop - part.start, rows.values.shape[1])
        if self.world > 1:
            with _together():
                dist.broadcast(values, source)
        return values

    def extremes(self, x: Tensor) -> Tensor:
        """(2, D): each column's smallest and largest value over all ranks' rows."""
        bounds = x.new_full((2, x.shape[1]), torch.inf)
        if len(x):
            bounds[0], bounds[1] = x.amin(0), -x.amax(0)
        if self.world > 1:
            with _together():
                dist.all_reduce(bounds, dist.ReduceOp.MIN)
        bounds[1].neg_()
        return bounds


def normalized(rows: Rows) -> Rows:
    """Float32 rows of length one: what was stored in half precision is off by more than neighbours are apart."""
    return rows.of(torch.nn.functional.normalize(rows.values.float(), dim=1))


def fit(components: str | int | float, gallery: Rows, queries: Rows, ranks: Ranks) -> MeanShift:
    """The mean shift of rows on all ranks, the same to the bit for any number of them; memory: one batch."""
    shift = MeanShift(components=components)
    for batch in ranks.batches(gallery):
        shift.partial_fit(gallery=batch)
    for batch in ranks.batches(queries):
        shift.partial_fit(queries=batch)
    return shift


def perturbed(rows: Rows, perturbation: Perturbation | None, seed: int, ranks: Ranks) -> Rows:
    """What `perturb` makes of the whole matrix, of which every rank does its rows."""
    if perturbation is None:
        return rows
    x = rows.values
    for index, stage in enumerate(_stages(perturbation)):
        if isinstance(stage, Replace):
            raise ValueError(
                "perturbation: expected noise or quantisation, got a Replace; evaluate that gallery itself"
            )
        if isinstance(stage, Quantize):
            # The cells are the whole gallery's: two rows more, that are cut off again, hold its range.
            x = stage.apply(torch.cat([x, ranks.extremes(x)]), seed, 0)[: len(x)]
        else:
            x = stage.apply(x, (seed + index * _NEXT_STREAM) % 2**63, 0, rows.first)
    return rows.of(x)


def topk(queries: Tensor, gallery: Rows, k: int, ranks: Ranks) -> Tensor:
    """The k nearest rows of the whole gallery for this rank's queries: int64 (q, min(k, G)), equal ones by lowest row.

    Every rank's share of the gallery is searched in turn and merged into the best so far: never Q x G, and never the
    whole gallery on one rank.
    """
    best = queries.new_empty(len(queries), 0, dtype=torch.float64)
    found = queries.new_empty(len(queries), 0, dtype=torch.int64)
    for first, rows in ranks.each(gallery):
        _, near = exact.search(queries, rows, min(k, len(rows)))
        if len(rows) == gallery.total:
            return near
        asking = torch.arange(len(queries), device=near.device).repeat_interleave(near.shape[1])
        cost = exact.costs(queries, rows, asking, near.flatten(), "l2").view_as(near)
        # Earlier ranks hold lower rows: a stable sort leaves the lowest of equal ones in front.
        best, order = torch.cat([best, cost], 1).sort(dim=1, stable=True)
        found = torch.cat([found, near + first], 1).gather(1, order)[:, :k]
        best = best[:, :k]
    return found
