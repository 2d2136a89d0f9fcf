"""`GapIndex`: a FAISS index that closes the gap, keeps its ids, and says what is wrong with what it is given."""

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gapkern import _check
from gapkern._ambient import isolated
from gapkern.gap import MeanShift, Projection, transforms
from gapkern.retrieval import families, foreign, intake, lookup, saving, store, stored
from gapkern.retrieval._faiss import errors, faiss, no_gpu, train
from gapkern.retrieval.described import Described


class GapIndex(Described):
    """A gallery to search, under any FAISS factory string; embeddings are stored as float32 or as its codes.

    Args:
        factory: "Flat" searches exactly, with equally near rows in the order of their ids; "IVF1024,SQ8", "OPQ16,PQ16",
            "HNSW32" and all others as FAISS does.
        metric: "l2", squared Euclidean distances, ascending; or "ip", inner products, descending.
        shift: a fitted `MeanShift`, applied to what is added or, where it moves the queries, to what is searched for;
            or a fitted `Projection` of that metric, applied to what is searched for and, where it reduces, to what is
            added, of which k numbers are stored then. One for "cosine" goes with "ip", and has rows scaled to length 1.
        model: what made the embeddings; kept with the index (default: the shift's).
        device: where codes are searched: "cuda", FAISS's first GPU; "cpu"; or "auto", a GPU where FAISS is built with
            them, sees one and knows the index there, unless files are mapped. A Flat index is searched where the
            queries are. Not yet run on a GPU.
        d: width of the rows, where it should be checked at once (default: that of the first rows).

    Raises:
        ImportError: faiss-cpu is not installed.
        TypeError: an argument of a wrong type.
        ValueError: a factory string that FAISS does not know or cannot serve; a shift that is not fitted, or of another
            model, width or metric; "cuda" without FAISS on a GPU.

    Example:
        >>> gallery = torch.eye(3)
        >>> index = GapIndex().add(gallery, ids=[10, 20, 30])
        >>> distances, ids = index.search(torch.tensor([[0.0, 1.0, 0.1]]), k=2)
        >>> ids.tolist()
        [[20, 30]]
    """

    def __init__(
        self,
        factory: str = "Flat",
        metric: str = "l2",
        shift: MeanShift | Projection | None = None,
        *,
        model: str | None = None,
        device: str = "auto",
        d: int | None = None,
    ):
        if not isinstance(factory, str):
            raise TypeError(f"factory: expected a FAISS factory string, got {type(factory).__name__}")
        transforms.check("shift", shift)
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
        transforms.fits_metric("shift", shift, metric)
        if isinstance(shift, MeanShift) and metric == "ip":
            _check.warn(
                "metric='ip' gains nothing from a shift, which adds the same to every score of a query; use "
                "'l2', or a Projection"
            )
        self._index: Any = None
        self._codes: tuple[float, float] | None = None
        self._read_only = self._broken = False
        self._next = 0  # above all ids so far
        self._looked_up: lookup.Lookup | None = None
        widths = {} if shift is None else {"shift": shift.n_features_in_}
        if d is not None:
            widths["d"] = _check.integer("d", d, low=1)
        if len(set(widths.values())) > 1:
            raise ValueError(f"d: expected D = {widths['shift']} as the shift, got {d}")
        for width in set(widths.values()):
            self._make(width)

    def _make(self, d: int) -> None:
        stored = d if self.shift is None else self.shift.n_features_out_
        if not stored:
            raise ValueError("shift: expected a projection that keeps a component or more to reduce rows, got k = 0")
        self._index = families.make(self.factory, stored, self.metric)
        self._codes = families.code_range(self._index)

    def _rows(self, name: str, value: Any, *, empty: bool = False) -> Tensor:
        rows = _check.matrix(name, value, empty=empty).detach()
        if self._index is None:
            self._make(rows.shape[1])
        if rows.shape[1] != self.d:
            raise ValueError(f"{name}: expected D = {self.d}, got shape {tuple(rows.shape)}")
        return rows

    def moved(self, name: str, rows: Tensor, first: int, *, side: str = "gallery") -> np.ndarray:
        """Rows as FAISS's index takes them (`intake.moved`); `first` is the number of the first, for messages."""
        return intake.moved(name, rows, first, self.shift, side=side, codes=self._codes)

    @isolated
    def train(self, sample: Any) -> "GapIndex":
        """Learns lists and codes from gallery rows (N, D), which are moved as the gallery is. Returns self.

        Raises:
            ValueError: too few rows; vectors were added already; another D; NaN, infinity, or norms out of range.
        """
        rows = self._rows("sample", sample)
        self._writable()
        if self.ntotal:
            raise ValueError(f"GapIndex: expected an empty index to train, got one of {self.ntotal} vectors")
        if not self._index.is_trained:
            moved = self.moved("sample", rows, 0)
            intake.spread("sample", moved)
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
            ValueError: another D, a NaN, an infinity or a norm whose square leaves float32 (by row), ids of another
                number or given twice, not trained. The index is as it was.
        """
        rows = self._rows("gallery", gallery, empty=True)
        self._writable()
        if not self._index.is_trained:
            raise ValueError(f"GapIndex: {self.factory!r} must learn from a sample; call train(sample) before add")
        names = intake.numbers(ids, len(rows), self._next)
        if len(names) and self.ntotal and names.min() < self._next:
            known = np.sort(names[np.isin(names, self.ids())])
            if len(known):
                raise ValueError(f"ids: expected new ids, got {known[0]}, which the index holds already")
        step = max(1, len(rows) if families.built_at_once(self._index) else lookup.CHUNK // rows.shape[1])
        if len(rows) > step:
            # All are looked at before any is added.
            for first in range(0, len(rows), step):
                self.moved("gallery", rows[first : first + step], first)
        for first in range(0, len(rows), step):
            some = self.moved("gallery", rows[first : first + step], first)
            if not self.ntotal and not self.exact:
                intake.spread("gallery", some)
            self._append(some, names[first : first + step])
        if len(names):
            self._next = max(self._next, int(names.max()) + 1)
        self._looked_up = None
        return self

    def _append(self, rows: np.ndarray, names: np.ndarray) -> None:
        before = self.ntotal
        families.prepare(self._index, rows, "gallery")
        try:
            with errors("gallery", f"vectors that {self.factory!r} can hold"):
                self._index.add_with_ids(rows, names)
        except ValueError:
            if not before:
                self._index.reset()
            elif families.holds(self._index) != before:
                self._broken = True
            raise

    def _writable(self) -> None:
        self._usable()
        if self._read_only:
            raise ValueError(
                "GapIndex: expected an index in memory, got one mapped from files; load it with mmap=False"
            )

    def _usable(self) -> None:
        if self._broken:
            raise ValueError(
                "GapIndex: expected a whole index, got one that FAISS left half extended; load or build it anew"
            )

    @isolated
    def remove_ids(self, ids: Any) -> int:
        """Removes vectors; ids that the index does not hold are passed over, as in FAISS. Returns how many it removed.

        Args:
            ids: (N,) integers.

        Raises:
            TypeError, ValueError: no integers; an index that FAISS removes nothing from (graphs, refinements).
        """
        self._writable()
        if self._index is None:
            raise ValueError("GapIndex: expected vectors to remove, got none; call add first")
        wanted = intake.numbers(np.unique(np.asarray(ids)), len(np.unique(np.asarray(ids))), 0)
        expected = f"an index that FAISS removes vectors from, got {self.factory!r}"
        if (reason := families.removal(self._index)) is not None:
            raise ValueError(f"GapIndex: expected {expected}: {reason}")
        with errors("GapIndex", expected):
            removed = int(self._index.remove_ids(wanted))
        self._looked_up = None
        return removed

    @isolated
    def reconstruct(self, key: int) -> np.ndarray:
        """The vector of an id as the index holds it, float32 (D,), (k,) where a projection reduces: shifted, and
        decoded where there are codes.

        Distances are to this vector. Only a Flat index without a shift of the gallery gives back the row itself.

        Raises:
            TypeError, ValueError: no integer; an id that the index does not hold; codes that FAISS does not decode.

        Example:
            >>> GapIndex().add(torch.eye(2), ids=[5, 7]).reconstruct(7).tolist()
            [0.0, 1.0]
        """
        return self.reconstruct_batch([_check.integer("key", key, low=0)])[0]

    @isolated
    def reconstruct_batch(self, keys: Any) -> np.ndarray:
        """`reconstruct` of several ids (N,): float32 (N, D)."""
        self._usable()
        if self._index is None:
            raise ValueError("GapIndex: expected vectors to reconstruct, got none; call add first")
        return stored.vectors(self._index, keys, self.factory)

    def ids(self) -> np.ndarray:
        """All ids, int64 (N,): in the order they were added, or list by list where there are inverted lists."""
        return np.empty(0, np.int64) if self._index is None else stored.ids(self._index)

    def set_parameters(self, text: str) -> "GapIndex":
        """Sets FAISS's search parameters, as "nprobe=16" or "efSearch=64". Returns self.

        Raises:
            ValueError: FAISS knows none of that name for this index.
        """
        if self._index is None:
            raise ValueError("GapIndex: train or add before set_parameters")
        lookup.tune(self._index, text, self.factory)
        self._looked_up = None
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
        self._usable()
        if self._index is None:
            raise ValueError("GapIndex: expected vectors to search, got none; call add first")
        rows = self._rows("queries", queries, empty=True)
        lookup.room(len(rows), k)
        distances, found = self._lookup().nearest(rows, k, self._asking)
        if isinstance(queries, np.ndarray):
            return distances.numpy(), found.numpy()
        return distances.to(rows.device), found.to(rows.device)

    def _asking(self, rows: Tensor, first: int) -> Tensor:
        return torch.from_numpy(self.moved("queries", rows, first, side="queries"))

    def _lookup(self) -> lookup.Lookup:
        if self._looked_up is None:
            self._looked_up = lookup.Lookup(self._index, self.metric, self.factory, self.device, self._read_only)
        return self._looked_up

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the index into a folder: FAISS's file, the shift, a manifest with counts and hashes. Atomic.

        Raises:
            ValueError: nothing was trained or added; the folder cannot be written, is being written, or holds other
                things.
        """
        self._usable()
        if self._index is None:
            raise ValueError("GapIndex: train or add before save")
        with store.claimed(path) as folder:
            data = saving.write(folder, self._index, self.shift)
            store.commit(folder, self.facts(), data)
        return Path(path)

    def facts(self) -> dict[str, Any]:
        """What the manifest says of the index."""
        return store.facts(self.factory, self.metric, self.d, self.ntotal, self._next, self.model)

    @staticmethod
    def load(
        path: str | os.PathLike[str], mmap: bool = False, *, verify: bool | None = None, device: str = "auto"
    ) -> "GapIndex":
        """Reads what `save` or `gapkern index` wrote.

        Args:
            mmap: leave the vectors in the file until a search needs them; nothing can be added then.
            verify: compare the files' hashes with the manifest's (default: unless more than 1 GiB is mapped).
            device: as for `GapIndex`.

        Raises:
            ValueError: no index, another format, a file that is missing, truncated or changed; one that does not fit
                into memory.
        """
        found, index, shift = saving.read(path, mmap, verify)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "metric='ip'")
            loaded = GapIndex(found["factory"], found["metric"], shift, model=found["model"], device=device)
        loaded._index, loaded._codes = index, families.code_range(index)
        loaded._next, loaded._read_only = found["next"], mmap
        return loaded

    @staticmethod
    def from_faiss(
        path: str | os.PathLike[str],
        shift: Projection | None = None,
        *,
        mmap: bool = False,
        model: str | None = None,
        device: str = "auto",
    ) -> "GapIndex":
        """An index that others built: FAISS's file, or a folder with one, as autofaiss writes it; the file stays as is.

        Args:
            shift: a fitted projection that keeps the width, such as `repair` found: queries are moved by it.
            mmap, device: as for `load`.
            model: what made the embeddings.

        Raises:
            ValueError: no index of vectors, one by another metric than L2 or inner product, or by ids within it.

        Example:
            >>> import faiss, tempfile
            >>> path = Path(tempfile.mkdtemp()) / "knn.index"
            >>> flat = faiss.IndexFlatL2(3)
            >>> flat.add(torch.eye(3).numpy())
            >>> faiss.write_index(flat, str(path))
            >>> projection = Projection("exact").fit(torch.eye(3))
            >>> GapIndex.from_faiss(path, projection).search(torch.tensor([[0.0, 9.0, 1.0]]), k=2)[1].tolist()
            [[1, 2]]
        """
        place, found = foreign.opened(path, "path", mmap)
        if shift is not None and not isinstance(shift, Projection):
            raise TypeError(f"shift: expected a Projection, got {type(shift).__name__}")
        if shift is not None and shift.reduce:
            raise ValueError("shift: expected a projection that keeps the width, got one that reduces it")
        metric = foreign.metric(found, place, "path")
        index = GapIndex("Flat", metric, shift, model=model, device=device)
        index.factory = foreign.kind(found)
        if shift is not None and shift.n_features_in_ != found.d:
            raise ValueError(f"shift: expected D = {found.d} as in {place}, got D = {shift.n_features_in_}")
        index._index, index._read_only = foreign.named(found, place, "path"), mmap
        index._codes = families.code_range(index._index)
        index._next = int(index.ids().max()) + 1
        return index
