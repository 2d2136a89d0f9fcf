"""What an index that FAISS's factory makes can do: where its ids lie, whether parts of it can be put together.

Read from the types of what is made, not from the string: a transform or a refinement around an inverted file changes
what FAISS can do with it.
"""

import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from gapkern import _memory
from gapkern.retrieval._faiss import errors, faiss

HNSW_LINKS, NSG_LINKS = 2, 4  # the fewest of a node with which FAISS builds a graph: fewer end or hang the process
FASTSCAN_BLOCK = 32  # codes
NSG_EXACT = 20_000  # nodes up to which NSG starts from all distances: its approximate start fails on small graphs
INNER = ("index", "base_index", "refine_index", "storage", "quantizer")
LIST_BYTES = 48  # of an empty inverted list in memory: two vectors

# By type, what FAISS makes but cannot serve.
UNSERVED = {
    "Index2Layer": "FAISS encodes and decodes with it but has no search over it",
    "IndexNSGPQ": "FAISS ends the process when it builds this graph",
    "IndexLattice": "FAISS's files do not keep its codes",
}


def make(factory: str, d: int, metric: str) -> Any:
    """An empty index for rows of width `d` whose search gives the ids that it was given.

    An `IDMap` in the string is left out: inverted lists keep ids themselves, everything else gets one around it.

    Raises:
        ValueError: FAISS does not know the string, or cannot serve what it means.
    """
    module = faiss()
    expected = f"a FAISS factory string for D = {d}, got {factory!r}"
    if re.search(r"(?<!\d)0+(?!\d)", factory):
        raise ValueError(f"factory: expected {expected}: none of its numbers may be 0")
    plain = re.sub(r",IDMap2?(?=[,)]|$)", "", re.sub(r"(^|(?<=[,(]))IDMap2?,", "", factory))
    lists = max((int(n) for n in re.findall(r"(?<![A-Za-z])IVF(\d+)", plain)), default=0)
    lists = max([lists, *(2 ** min(60, int(m) * int(n)) for m, n in re.findall(r"IMI(\d+)x(\d+)", plain))])
    if lists * (LIST_BYTES + 4 * d) > (free := _memory.available()):
        raise ValueError(
            f"factory: expected {expected}: {lists} lists do not fit into {free / 2**30:.1f} GiB of memory"
        )
    number = module.METRIC_L2 if metric == "l2" else module.METRIC_INNER_PRODUCT
    with errors("factory", expected):
        index = module.index_factory(d, plain, number)
    _refuse(index, expected, number)
    return index if lists_of(index) is not None else module.IndexIDMap(index)


def _refuse(index: Any, expected: str, metric: int) -> None:
    module = faiss()
    if index.metric_type != metric:
        raise ValueError(f"factory: expected {expected}: it measures no inner products, metric='ip'")
    for part in parts(index):
        kind = type(part).__name__
        if kind in UNSERVED:
            raise ValueError(f"factory: expected {expected}: {kind}: {UNSERVED[kind]}")
        if isinstance(part, module.IndexIDMap):
            raise ValueError(f"factory: expected {expected}: an IDMap inside of another index")
        links = module.vector_to_array(part.hnsw.cum_nneighbor_per_level) if hasattr(part, "hnsw") else None
        if links is not None and (len(links) < 2 or links[1] < 2 * HNSW_LINKS):
            raise ValueError(f"factory: expected {expected}: HNSW needs {HNSW_LINKS} links or more")
        if hasattr(part, "nsg"):
            if part.nsg.R < NSG_LINKS:
                raise ValueError(f"factory: expected {expected}: NSG needs {NSG_LINKS} links or more")
            part.build_type = 0
        if getattr(part, "bbs", FASTSCAN_BLOCK) != FASTSCAN_BLOCK:
            raise ValueError(f"factory: expected {expected}: FAISS decodes and merges only blocks of {FASTSCAN_BLOCK}")


def parts(index: Any, quantizers: bool = True) -> Iterator[Any]:
    """An index and all that it is made of, with or without the coarse quantizers of inverted files."""
    index = faiss().downcast_index(index)
    yield index
    for name in INNER[: None if quantizers else -1]:
        inner = getattr(index, name, None)
        if inner is not None:
            yield from parts(inner, quantizers)


def transforms(index: Any) -> list[Any]:
    """The transforms that rows go through, in order."""
    module = faiss()
    return [
        module.downcast_VectorTransform(part.chain.at(i))
        for part in parts(index)
        if isinstance(part, module.IndexPreTransform)
        for i in range(part.chain.size())
    ]


def lists_of(index: Any) -> Any:
    """The inverted file whose lists keep the ids, or None where an IDMap around the whole has them."""
    module = faiss()
    index = module.downcast_index(index)
    if isinstance(index, module.IndexPreTransform):
        return lists_of(index.index)
    # These two look rows up by ids, which must be 0, 1, ...; a refinement's ids are its rows' numbers.
    numbered = (module.IndexIVFPQR, module.IndexIVFFlatDedup)
    return index if isinstance(index, module.IndexIVF) and not isinstance(index, numbered) else None


def flat_of(index: Any) -> Any:
    """The Flat index in an IDMap, whose rows lie one after the other; or None."""
    module = faiss()
    if not isinstance(index, module.IndexIDMap):
        return None
    inner = module.downcast_index(index.index)
    return inner if type(inner) in (module.IndexFlat, module.IndexFlatL2, module.IndexFlatIP) else None


def built_at_once(index: Any) -> bool:
    """Whether all rows must come in one `add`: NSG."""
    return _nsg(index) is not None


def _nsg(index: Any) -> Any:
    rows = (part for part in parts(index, quantizers=False) if hasattr(part, "nsg"))
    return next(rows, None)


def prepare(index: Any, rows: np.ndarray, name: str) -> None:
    """What must hold before FAISS builds a graph at once, in which it would not end otherwise.

    Raises:
        ValueError: most rows are equal.
    """
    nsg = _nsg(index)
    if nsg is None or not len(rows):
        return
    nsg.build_type = int(len(rows) > NSG_EXACT)
    distinct = len(np.unique(rows.view(np.dtype((np.void, rows.itemsize * rows.shape[1])))))
    if 2 * distinct < len(rows):
        raise ValueError(f"{name}: expected rows that differ for an NSG graph, got {distinct} of {len(rows)}")


def holds(index: Any) -> int:
    """The most rows that any of an index's parts has: more than `ntotal` after an `add` that failed half-way."""
    return max(int(part.ntotal) for part in parts(index, quantizers=False))


def merges_lists(index: Any) -> bool:
    """Whether the lists are plain arrays, which a file can hold: FastScan's and Panorama's are not."""
    module = faiss()
    ivf = lists_of(index)
    return ivf is not None and type(module.downcast_InvertedLists(ivf.invlists)) is module.ArrayInvertedLists


def appends(one: Any, other: Any) -> bool:
    """Whether FAISS can append one index to another; both are empty and of one kind."""
    module = faiss()
    # An IDMap around an inverted file would number its rows anew, from 0; FastScan's codes lie in blocks.
    if any(isinstance(part, module.IndexIVF | module.IndexFastScan) for part in parts(one)):
        return False
    try:
        one.merge_from(other, 0)
    except RuntimeError:
        return False
    return True


def removal(index: Any) -> str | None:
    """Why single vectors cannot be removed; None where they can."""
    module = faiss()
    if lists_of(index) is None and any(isinstance(part, module.IndexIVF) for part in parts(index.index)):
        return "its rows are known by their numbers"
    return None


def decodes(index: Any) -> bool:
    """Whether FAISS gives a vector back: from this FastScan it gives another."""
    return not any(type(part).__name__ == "IndexIVFRaBitQFastScan" for part in parts(index))


def scores_decoded(index: Any, metric: str) -> bool:
    """Whether an index orders rows by their scores to what their codes decode to: flat rows, scalar and product codes.

    Others take part of a score from the row as it was (RaBitQ), round their tables (FastScan), or re-rank.
    """
    module = faiss()
    plain = (module.IndexFlat, module.IndexIVFFlat, module.IndexHNSWFlat, module.IndexNSGFlat, module.IndexIDMap)
    codes = (module.IndexScalarQuantizer, module.IndexIVFScalarQuantizer, module.IndexPQ, module.IndexIVFPQ)
    graphs = (module.IndexHNSWSQ, module.IndexHNSWPQ)
    for part in parts(index, quantizers=False):
        if isinstance(part, module.IndexIVFPQR | module.IndexIVFPQFastScan):
            return False
        if isinstance(part, module.IndexPreTransform):
            # Orthogonal maps keep distances, up to a constant of the query; their offsets do not keep inner products.
            if metric != "l2" or not all(getattr(t, "is_orthonormal", False) for t in transforms(part)):
                return False
        elif not isinstance(part, plain + codes + graphs) or getattr(part, "search_type", 0) != 0:
            return False
    return True


def about_centres(index: Any) -> bool:
    """Whether scores err by <y - centre, e>, e the code's error: RaBitQ's, flat or in lists."""
    return any("RaBitQ" in type(part).__name__ for part in parts(index, quantizers=False))


def code_range(index: Any) -> tuple[float, float] | None:
    """The least and the largest value that a code keeps, where it is one of values as they are; None elsewhere."""
    module = faiss()
    ranges = {"QT_fp16": (-65504.0, 65504.0), "QT_8bit_direct": (0.0, 255.0), "QT_8bit_direct_signed": (-128.0, 127.0)}
    known = {getattr(module.ScalarQuantizer, name, None): limits for name, limits in ranges.items()}
    if transforms(index):
        return None
    found = [known[part.sq.qtype] for part in parts(index) if hasattr(part, "sq") and part.sq.qtype in known]
    return (max(low for low, _ in found), min(high for _, high in found)) if found else None
