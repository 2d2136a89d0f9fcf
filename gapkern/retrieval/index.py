"""`GapIndex`: a FAISS index that closes the gap, keeps its ids, and says what is wrong with what it is given."""

import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gapkern import _check
from gapkern._ambient import isolated
from gapkern.gap import MeanShift
from gapkern.retrieval import exact, store
from gapkern.retrieval._faiss import errors, faiss, no_gpu, on_gpu, train

CHUNK = 2**22  # numbers that are moved and converted at once
GPU_NEIGHBOURS = 2048  # the most that FAISS selects on a GPU


class GapIndex:
    """A gallery to search, under any FAISS factory string; embeddings are stored as float32 or as its codes.

    Args:
        factory: "Flat" searches exactly, with equally near rows in the order of their ids; "IVF1024,SQ8", "OPQ16,PQ16",
            "HNSW32" and all others as FAISS does.
        metric: "l2", squared Euclidean distances, ascending; or "ip", inner products, descending.
        shift: a fitted `MeanShift`, applied to what is added or, where it moves the queries, to what is searched for.
        model: what made the embeddings; kept with the index (default: the shift's).
        device: where codes are searched: "cuda", FAISS's first GPU; "cpu"; or "auto", a GPU where FAISS is built with
            them, sees one and knows the index there, unless files are mapped. A Flat index is searched where the
            queries are. Not yet run on a GPU.

    Raises:
        ImportError: faiss-cpu is not installed.
        TypeError: an argument of a wrong type.
        ValueError: a factory string that FAISS does not know; a shift of another model; "cuda" without FAISS on a GPU.

    Example:
        >>> gallery = torch.eye(3)
        >>> index = GapIndex().add(gallery, ids=[10, 20, 30])
        >>> distances, ids = index.search(torch.tensor([[0.0, 1.0, 0.1]]), k=2)
        >>> ids.tolist()
        [[20, 30]]
    """

    def __init__(
        self, factory: str = "Flat", metric: str = "l2", shift: MeanShift | None = None, *, model: str | None = None,
        device: str = "auto",
    ):  # fmt: skip
        if not isinstance(factory, str):
            raise TypeError(f"factory: expected a FAISS factory string, got {type(factory).__name__}")
        if shift is not None and not isinstance(shift, MeanShift):
            raise TypeError(f"shift: expected a gapkern.MeanShift, got {type(shift).__name__}")
        faiss()
        self.factory = factory
        self.metric = _check.choice("metric", metric, ("l2", "ip"))
        self.device = _check.choice("device", device, ("auto", "cpu", "cuda"))
        if device == "cuda" and (reason := no_gpu()):
            raise ValueError(f"device: expected 'auto' or 'cpu', as {reason}, got 'cuda'")
        self.shift = shift
        self.model = model or (shift.model if shift is not None else None)
        if shift is not None and shift.model not in (None, self.model):
            raise ValueError(f"shift: expected one of model {self.model}, got one of {shift.model}")
        if shift is not None and metric == "ip":
            warnings.warn(
                "metric='ip' gains nothing from a shift, which adds the same to every score of a query; use 'l2'",
                stacklevel=2,
            )
        self._index: Any = None
        self._read_only = False
        self._next = 0  # above all ids so far
        self._views: dict[Any, Any] = {}
        if shift is not None:
            self._make(len(shift.shift_vector_))

    def __repr__(self) -> str:
        return (
            f"GapIndex(factory={self.factory!r}, metric={self.metric!r}, shift={self.shift!r}): "
            f"{self.count} vectors, D = {self.dims}"
        )

    @property
    def count(self) -> int:
        """Number of vectors."""
        return int(self._index.ntotal) if self._index is not None else 0

    def __len__(self) -> int:
        return self.count

    @property
    def dims(self) -> int | None:
        """D, known once something was trained or added."""
        return int(self._index.d) if self._index is not None else None

    @property
    def trained(self) -> bool:
        """Whether vectors can be added."""
        return self._index is not None and bool(self._index.is_trained)

    @property
    def exact(self) -> bool:
        """Whether every distance is compared: a Flat index."""
        return self._index is not None and self._flat() is not None

    @property
    def lists(self) -> int:
        """Number of inverted lists, 0 where there are none."""
        ivf = faiss().try_extract_index_ivf(self._index) if self._index is not None else None
        return int(ivf.nlist) if ivf is not None else 0

    @property
    def bytes_per_vector(self) -> float:
        """Size of a stored vector's code, without its id and what all share; with its links where there is a graph."""
        if not self.count:
            raise ValueError("GapIndex: expected vectors to measure, got none; call add first")
        try:
            return float(self._index.sa_code_size())
        except RuntimeError:  # graphs have no code apart from the whole
            return len(faiss().serialize_index(self._index)) / self.count - 8

    def _make(self, dims: int) -> None:
        module = faiss()
        metric = module.METRIC_L2 if self.metric == "l2" else module.METRIC_INNER_PRODUCT
        with errors("factory", f"a FAISS factory string for D = {dims}, got {self.factory!r}"):
            index = module.index_factory(dims, self.factory, metric)
        if module.try_extract_index_ivf(index) is None and not isinstance(index, module.IndexIDMap):
            # Only inverted lists keep ids of their own.
            index = module.IndexIDMap(index)
        self._index = index

    def _flat(self) -> Any:
        """The Flat index inside, or None."""
        module = faiss()
        if not isinstance(self._index, module.IndexIDMap):
            return None
        inner = module.downcast_index(self._index.index)
        return inner if isinstance(inner, module.IndexFlat) else None

    def _rows(self, name: str, value: Any, *, empty: bool = False) -> Tensor:
        rows = _check.matrix(name, value, empty=empty).detach()
        if self._index is None:
            self._make(rows.shape[1])
        if rows.shape[1] != self.dims:
            raise ValueError(f"{name}: expected D = {self.dims}, got shape {tuple(rows.shape)}")
        return rows

    def _moved(self, name: str, rows: Tensor, first: int, *, side: str) -> np.ndarray:
        """Finite, moved, float32 and contiguous, as FAISS takes it."""
        rows = rows.float()
        wrong = ~torch.isfinite(rows).all(1)
        if bool(wrong.any()):
            row = first + int(wrong.nonzero()[0])
            raise ValueError(f"{name}: expected finite values in float32, got NaN or infinity, first in row {row}")
        if self.shift is not None:
            rows = self.shift.transform(rows) if side == "gallery" else self.shift.transform_queries(rows)
        return np.ascontiguousarray(rows.cpu().numpy())

    @isolated
    def train(self, sample: Any) -> "GapIndex":
        """Learns lists and codes from gallery rows (N, D), which are moved as the gallery is. Returns self.

        Raises:
            ValueError: too few rows; vectors were added already; another D; NaN or infinity.
        """
        rows = self._rows("sample", sample)
        self._writable()
        if self.count:
            raise ValueError(f"GapIndex: expected an empty index to train, got one of {self.count} vectors")
        if not self._index.is_trained:
            moved = self._moved("sample", rows, 0, side="gallery")
            with errors("sample", f"enough rows to train {self.factory!r}, got {len(rows)}"):
                train(self._index, moved, "sample")
        return self

    @isolated
    def add(self, gallery: Any, ids: Any = None) -> "GapIndex":
        """Adds rows (N, D) of any floating-point dtype and strides. Returns self.

        Args:
            ids: (N,) integers >= 0, each once (default: on from the highest so far).

        Raises:
            TypeError: no floating-point embeddings, ids that are no integers.
            ValueError: another D, a NaN or an infinity (by row), ids of another number or given twice, not trained.
        """
        rows = self._rows("gallery", gallery, empty=True)
        self._writable()
        if not self._index.is_trained:
            raise ValueError(f"GapIndex: {self.factory!r} must learn from a sample; call train(sample) before add")
        names = self._ids(ids, len(rows))
        step = max(1, CHUNK // rows.shape[1])
        if len(rows) > step:
            # All are looked at before any is added.
            for first in range(0, len(rows), step):
                self._moved("gallery", rows[first : first + step], first, side="gallery")
        for first in range(0, len(rows), step):
            some = self._moved("gallery", rows[first : first + step], first, side="gallery")
            with errors("gallery", f"vectors that {self.factory!r} can hold"):
                self._index.add_with_ids(some, names[first : first + step])
        if len(names):
            self._next = max(self._next, int(names.max()) + 1)
        self._views.clear()
        return self

    def _writable(self) -> None:
        if self._read_only:
            raise ValueError(
                "GapIndex: expected an index in memory, got one mapped from files; load it with mmap=False"
            )

    def _ids(self, ids: Any, count: int) -> np.ndarray:
        if ids is None:
            return np.arange(self._next, self._next + count, dtype=np.int64)
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
        if count and self.count and unique[0] < self._next:
            known = unique[np.isin(unique, self.ids())]
            if len(known):
                raise ValueError(f"ids: expected new ids, got {known[0]}, which the index holds already")
        return names

    def ids(self) -> np.ndarray:
        """All ids, int64 (N,): in the order they were added, or list by list where there are inverted lists."""
        module = faiss()
        if self._index is None:
            return np.empty(0, np.int64)
        ivf = module.try_extract_index_ivf(self._index)
        if ivf is None:
            return module.vector_to_array(self._index.id_map)
        lists = ivf.invlists
        sizes = [lists.list_size(i) for i in range(lists.nlist)]
        parts = [module.rev_swig_ptr(lists.get_ids(i), n).copy() for i, n in enumerate(sizes) if n]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def set_parameters(self, text: str) -> "GapIndex":
        """Sets FAISS's search parameters, as "nprobe=16" or "efSearch=64". Returns self.

        Raises:
            ValueError: FAISS knows none of that name for this index.
        """
        if self._index is None:
            raise ValueError("GapIndex: train or add before set_parameters")
        with errors("text", f"FAISS search parameters of {self.factory!r}, got {text!r}"):
            faiss().ParameterSpace().set_index_parameters(self._index, text)
        self._views.pop("gpu", None)
        return self

    @isolated
    def search(self, queries: Any, k: int) -> tuple[Any, Any]:
        """The k nearest gallery vectors of each query.

        Args:
            queries: (Q, D), any floating-point dtype and strides; on a CUDA device a Flat index is searched there.
            k: how many; beyond `count`, ids are -1 and distances the largest float32 (the least for "ip"), as in FAISS.

        Returns:
            distances float32 (Q, k), nearest first, and ids int64 (Q, k): tensors for a tensor, on its device, arrays
            for an array. Equal distances come in the order of ids; with a Flat index equality is exact, and of more
            equal rows than k the lowest ids are found.

        Raises:
            ValueError: another D, a NaN or an infinity (by row), k < 1.
        """
        k = _check.integer("k", k, low=1)
        if self._index is None:
            raise ValueError("GapIndex: expected vectors to search, got none; call add first")
        rows = self._rows("queries", queries, empty=True)
        distances = torch.full((len(rows), k), torch.finfo(torch.float32).max, dtype=torch.float32)
        if self.metric == "ip":
            distances.neg_()
        found = torch.full((len(rows), k), -1, dtype=torch.int64)
        device = rows.device
        if device.type != "cpu" and self.exact:
            distances, found = distances.to(device), found.to(device)
        step = max(1, CHUNK // rows.shape[1])
        least = min(k, self.count)
        for first in range(0, len(rows) if least else 0, step):
            moved = torch.from_numpy(self._moved("queries", rows[first : first + step], first, side="queries"))
            some = slice(first, first + len(moved))
            if self.exact:
                d, i = self._search_flat(moved, least, device)
                distances[some, :least], found[some, :least] = d, i
            else:
                distances[some], found[some] = self._search_codes(moved, k)
        if isinstance(queries, np.ndarray):
            return distances.numpy(), found.numpy()
        return distances.to(device), found.to(device)

    def _search_flat(self, queries: Tensor, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
        gallery, ids, reach = self._view(device)
        sign = 1 if self.metric == "l2" else -1
        ordered = self._views["ordered"]
        if device.type != "cpu":
            cost, rows = exact.search(
                queries.to(device), gallery, k, metric=self.metric, ids=None if ordered else ids
            )  # fmt: skip
        else:
            count = min(len(gallery), k + exact.SPARE)
            values, rows = map(torch.from_numpy, self._flat().search(queries.numpy(), count))
            margin = exact.slack(queries.norm(dim=1), reach, self.metric)
            cost, rows = exact.settle(
                queries, gallery, sign * values, rows, margin, k, self.metric, None if ordered else ids
            )  # fmt: skip
        return (sign * cost).float(), ids[rows]

    def _view(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """The Flat index's vectors and ids where they are needed, and the largest norm."""
        if device not in self._views:
            flat = self._flat()
            array = faiss().rev_swig_ptr(flat.get_xb(), flat.ntotal * flat.d).reshape(flat.ntotal, flat.d)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "The given NumPy array is not writable")
                gallery = torch.from_numpy(array).to(device)
            ids = torch.from_numpy(self.ids()).to(device)
            self._views[device] = gallery, ids, exact.reach(gallery, torch.zeros_like(gallery[0]))
            self._views["ordered"] = bool((ids[1:] > ids[:-1]).all())
        return self._views[device]

    def _search_codes(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        index = self._index if self.device == "auto" and k > GPU_NEIGHBOURS else self._searched()
        with errors("queries", f"a search that {self.factory!r} can do"):
            distances, ids = map(torch.from_numpy, index.search(queries.numpy(), k))
        # By id first, then by distance in a stable sort; what is missing (-1) stays last.
        order = torch.where(ids < 0, torch.iinfo(torch.int64).max, ids).argsort(1)
        values = distances.gather(1, order)
        order = order.gather(1, values.argsort(dim=1, stable=True, descending=self.metric == "ip"))
        return distances.gather(1, order), ids.gather(1, order)

    def _searched(self) -> Any:
        """A copy on FAISS's first GPU where `device` wants it there; the index itself elsewhere."""
        if self.device == "cpu" or (self.device == "auto" and (self._read_only or no_gpu())):
            return self._index
        if "gpu" not in self._views:
            try:
                with errors("device", f"'cpu' or 'auto' for {self.factory!r}, got 'cuda'"):
                    self._views["gpu"] = on_gpu(self._index)
            except ValueError:
                if self.device == "cuda":
                    raise
                self._views["gpu"] = self._index, None
        return self._views["gpu"][0]

    def save(self, path: str | os.PathLike) -> Path:
        """Writes the index into a folder: FAISS's file, the shift, a manifest with counts and hashes. Atomic.

        Raises:
            ValueError: nothing was trained or added; the folder cannot be written or holds other things.
        """
        if self._index is None:
            raise ValueError("GapIndex: train or add before save")
        folder = store.claim(path)
        module = faiss()
        data = {}
        lists = self._on_disk()
        if lists is not None:
            source = lists.filename
            data["lists"] = store.put(folder, "lists", lambda temporary: shutil.copyfile(source, temporary))
            lists.filename = data["lists"]["name"]  # the folder may move
        try:
            data["index"] = store.put(folder, "index", lambda temporary: module.write_index(self._index, temporary))
        finally:
            if lists is not None:
                lists.filename = source
        if self.shift is not None:
            data["shift"] = store.put(folder, "shift", self.shift.save)
        store.commit(folder, self.facts(), data)
        return folder

    def facts(self) -> dict[str, Any]:
        """What the manifest says of the index."""
        return {
            "factory": self.factory, "metric": self.metric, "dims": self.dims, "count": self.count, "next": self._next,
            "model": self.model, "faiss": faiss().__version__,
        }  # fmt: skip

    def _on_disk(self) -> Any:
        """Inverted lists that live in a file, or None."""
        module = faiss()
        ivf = module.try_extract_index_ivf(self._index)
        lists = None if ivf is None else module.downcast_InvertedLists(ivf.invlists)
        return lists if isinstance(lists, module.OnDiskInvertedLists) else None

    @staticmethod
    def load(
        path: str | os.PathLike, mmap: bool = False, *, verify: bool | None = None, device: str = "auto"
    ) -> "GapIndex":
        """Reads what `save` or `gapkern index` wrote.

        Args:
            mmap: leave the vectors in the file until a search needs them; nothing can be added then. An index with
                lists on disk is always mapped.
            verify: compare the files' hashes with the manifest's (default: where they are read whole).
            device: as for `GapIndex`.

        Raises:
            ValueError: no index, another format, a file that is missing, truncated or changed.
        """
        module = faiss()
        found = store.manifest(path)
        paths = store.checked(path, found, (not mmap) if verify is None else verify)
        shift = MeanShift.load(paths["shift"]) if "shift" in paths else None
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "metric='ip'")
            index = GapIndex(found["factory"], found["metric"], shift, model=found["model"], device=device)
        flags = 0
        if "lists" in paths:
            flags = module.IO_FLAG_ONDISK_SAME_DIR | module.IO_FLAG_READ_ONLY
        elif mmap:
            flags = module.IO_FLAG_MMAP_IFC | module.IO_FLAG_READ_ONLY
        with errors("path", f"an index that FAISS {module.__version__} reads in {paths['index']}"):
            index._index = module.read_index(str(paths["index"]), flags)
        if (index.count, index.dims) != (found["count"], found["dims"]):
            raise ValueError(
                f"path: expected {found['count']} x {found['dims']} as the manifest says, got "
                f"{index.count} x {index.dims} in {paths['index']}"
            )
        index._next, index._read_only = found["next"], bool(flags)
        return index
