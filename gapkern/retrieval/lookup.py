"""Searches in a FAISS index: exactly where the rows lie as they are, by its codes elsewhere."""

import re
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gapkern import _memory, _search
from gapkern.retrieval import families, stored
from gapkern.retrieval._faiss import errors, faiss, no_gpu, on_gpu

CHUNK = 2**22  # numbers that are moved and converted at once
GPU_NEIGHBOURS = 2048  # the most that FAISS selects on a GPU
RESULT_BYTES = 24  # of a neighbour: its id and distance, and a copy of both


class Lookup:
    """An index as it is now, and what searching it needs: views of its rows, a copy on a GPU."""

    def __init__(self, index: Any, metric: str, factory: str, device: str, mapped: bool):
        self.index, self.metric, self.factory, self.device, self.mapped = index, metric, factory, device, mapped
        self._views: dict[torch.device, tuple[Tensor, Tensor, Tensor | None, Tensor]] = {}
        self._copy: tuple[Any, Any] | None = None

    def nearest(self, rows: Tensor, k: int, moved: Callable[[Tensor, int], Tensor]) -> tuple[Tensor, Tensor]:
        """Distances float32 and ids (n, k) for rows (n, D), some at a time; what is missing is infinitely far, id -1.

        Args:
            moved: some of the rows as FAISS takes them, and the number of the first of them.
        """
        limits, exact = torch.finfo(torch.float32), families.flat_of(self.index) is not None
        device = rows.device if exact else torch.device("cpu")
        far = limits.max if self.metric == "l2" else limits.min
        distances = torch.full((len(rows), k), far, dtype=torch.float32, device=device)
        found = torch.full((len(rows), k), -1, dtype=torch.int64, device=device)
        least, step = min(k, int(self.index.ntotal)), max(1, CHUNK // rows.shape[1])
        for first in range(0, len(rows) if least else 0, step):
            some = slice(first, min(first + step, len(rows)))
            queries = moved(rows[some], first)
            nearest = self.exactly(queries, least, device) if exact else self.by_codes(queries, least)
            distances[some, :least], found[some, :least] = nearest
        return distances, found

    def exactly(self, queries: Tensor, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Distances float32 and ids (n, k) in a Flat index, with equal rows in the order of their ids."""
        gallery, ids, order, reach = self._view(device)
        sign = 1 if self.metric == "l2" else -1
        if device.type != "cpu":
            cost, rows = _search.search(queries.to(device), gallery, k, metric=self.metric, ids=order)
        else:
            count = min(len(gallery), k + _search.SPARE)
            values, rows = map(torch.from_numpy, families.flat_of(self.index).search(queries.numpy(), count))
            margin = _search.slack(queries.norm(dim=1), reach, self.metric)
            cost, rows = _search.settle(queries, gallery, sign * values, rows, margin, k, self.metric, order)
        return (sign * cost).float(), ids[rows]

    def _view(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """The Flat index's vectors and ids where they are needed, the ids that order ties, and the largest norm."""
        if device not in self._views:
            flat = families.flat_of(self.index)
            array = faiss().rev_swig_ptr(flat.get_xb(), flat.ntotal * flat.d).reshape(flat.ntotal, flat.d)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "The given NumPy array is not writable")
                gallery = torch.from_numpy(array).to(device)
            ids = torch.from_numpy(stored.ids(self.index)).to(device)
            order = None if bool((ids[1:] > ids[:-1]).all()) else ids
            self._views[device] = gallery, ids, order, _search.reach(gallery, torch.zeros_like(gallery[0]))
        return self._views[device]

    def by_codes(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Distances float32 and ids (n, k) as FAISS finds them, equal distances in the order of ids."""
        index = self.index if self.device == "auto" and k > GPU_NEIGHBOURS else self._searched()
        with errors("queries", f"a search that {self.factory!r} can do"):
            distances, ids = map(torch.from_numpy, index.search(queries.numpy(), k))
        downwards = self.metric == "ip"
        limits = torch.finfo(torch.float32)
        distances = distances.where(ids >= 0, limits.min if downwards else limits.max)
        # By id first, then by distance in a stable sort; what is missing (-1) stays last.
        order = torch.where(ids < 0, torch.iinfo(torch.int64).max, ids).argsort(1)
        values = distances.gather(1, order)
        order = order.gather(1, values.argsort(dim=1, stable=True, descending=downwards))
        return distances.gather(1, order), ids.gather(1, order)

    def _searched(self) -> Any:
        """A copy on FAISS's first GPU where `device` wants it there; the index itself elsewhere."""
        if self.device == "cpu" or (self.device == "auto" and (self.mapped or no_gpu())):
            return self.index
        if self._copy is None:
            try:
                with errors("device", f"'cpu' or 'auto' for {self.factory!r}, got 'cuda'"):
                    self._copy = on_gpu(self.index)
            except ValueError:
                if self.device == "cuda":
                    raise
                self._copy = self.index, None
        return self._copy[0]


def tune(index: Any, text: str, factory: str) -> None:
    """Sets FAISS's search parameters; raises ValueError where FAISS knows none of that name or value."""
    expected = f"FAISS search parameters of {factory!r}, got {text!r}"
    for name, value in re.findall(r"(nprobe|efSearch|k_factor\w*)=([^,]*)", text):
        if value.startswith("-") or not value.strip("0. "):
            raise ValueError(f"text: expected {expected}: {name} is above 0")
    with errors("text", expected):
        faiss().ParameterSpace().set_index_parameters(index, text)


def room(queries: int, k: int) -> None:
    """Raises ValueError where the k neighbours of so many queries do not fit into memory."""
    needed, free = RESULT_BYTES * queries * k, _memory.available()
    if needed > free:
        raise ValueError(
            f"k: expected neighbours that fit into {free / 2**30:.1f} GiB of free memory, got {k} of each of {queries} "
            f"queries, which take {needed / 2**30:.1f} GiB"
        )
