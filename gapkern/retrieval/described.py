"""What an index says of itself, in FAISS's words."""

from typing import Any

from gapkern.gap import MeanShift, Projection
from gapkern.retrieval import families
from gapkern.retrieval._faiss import faiss

__all__ = ["Described"]


class Described:
    """The attributes of `GapIndex` that are read: of FAISS's index, once there is one, and of the shift before it."""

    factory: str
    metric: str
    shift: MeanShift | Projection | None
    _index: Any

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(factory={self.factory!r}, metric={self.metric!r}, shift={self.shift!r}): "
            f"{self.ntotal} vectors, D = {self.d}"
        )

    @property
    def ntotal(self) -> int:
        """Number of vectors."""
        return int(self._index.ntotal) if self._index is not None else 0

    def __len__(self) -> int:
        return self.ntotal

    @property
    def d(self) -> int | None:
        """Width of the rows that are given, known once it was, or once something was trained or added.

        A projection that reduces them has FAISS's index hold its k columns: `faiss_index.d`.
        """
        if self.shift is not None:
            return self.shift.n_features_in_
        return int(self._index.d) if self._index is not None else None

    # As manifests have them.
    count, dims = ntotal, d

    @property
    def is_trained(self) -> bool:
        """Whether vectors can be added."""
        return self._index is not None and bool(self._index.is_trained)

    @property
    def metric_type(self) -> int:
        """FAISS's number of the metric."""
        return int(faiss().METRIC_L2 if self.metric == "l2" else faiss().METRIC_INNER_PRODUCT)

    @property
    def exact(self) -> bool:
        """Whether every distance is compared: a Flat index."""
        return self._index is not None and families.flat_of(self._index) is not None

    @property
    def nlist(self) -> int:
        """Number of inverted lists, 0 where there are none."""
        ivf = None if self._index is None else faiss().try_extract_index_ivf(self._index)
        return int(ivf.nlist) if ivf is not None else 0

    @property
    def faiss_index(self) -> Any:
        """FAISS's own index, once `d` is known: an IDMap, or an inverted file, which keeps ids itself."""
        return self._index

    @property
    def bytes_per_vector(self) -> float:
        """Size of a stored vector's code, without its id and what all share; with its links where there is a graph."""
        if not self.ntotal:
            raise ValueError("GapIndex: expected vectors to measure, got none; call add first")
        try:
            return float(self._index.sa_code_size())
        except RuntimeError:  # graphs have no code apart from the whole
            return len(faiss().serialize_index(self._index)) / self.ntotal - 8
