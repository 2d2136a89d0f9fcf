"""Processes that evaluate together, and matrices of which each holds a share of the rows."""

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
from gapkern._compare import same_fields

__all__ = ["RankLost", "Ranks", "Rows"]


class RankLost(RuntimeError):
    """Another rank has ended or no longer answers; what is finished is kept."""


@contextmanager
def _together() -> Iterator[None]:
    """What a collective raises is that a rank is lost: by where it comes from, whatever the backend's words are."""
    try:
        yield
    except RuntimeError as error:
        raise RankLost(str(error).strip().split("\n")[0] or type(error).__name__) from None


@dataclass(frozen=True, eq=False)
class Rows:
    """This rank's rows of a matrix: `values` (n, D) are rows first .. first + n - 1 of `total`."""

    values: Tensor
    first: int
    total: int

    __eq__ = same_fields

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
            # The default arguments of its functions are the default group at the moment of its import. Imported later,
            # with a model's library, it would hold the group beyond destroy_process_group, and gloo's threads, alive as
            # the interpreter ends, abort the process now and then.
            from torch.distributed import nn  # noqa: F401

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
