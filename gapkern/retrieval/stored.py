"""What lies in a FAISS index: ids, vectors, lists in a file; and indexes read from files."""

from pathlib import Path
from typing import Any

import numpy as np

from gapkern import _memory
from gapkern.retrieval import families
from gapkern.retrieval._faiss import errors, faiss


def ids(index: Any) -> np.ndarray:
    """All ids, int64 (N,): an IDMap's in the order they were added, else list by list."""
    module = faiss()
    ivf = families.lists_of(index)
    if ivf is None:
        return module.vector_to_array(index.id_map)
    parts = [part for _, part in _listed(ivf)]
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def _listed(ivf: Any) -> Any:
    """Each list that is not empty, and its ids."""
    module = faiss()
    lists = ivf.invlists
    for number in range(lists.nlist):
        count = lists.list_size(number)
        if count:
            pointer = lists.get_ids(number)
            part = module.rev_swig_ptr(pointer, count).copy()
            lists.release_ids(number, pointer)
            yield number, part


def vectors(index: Any, keys: Any, factory: str) -> np.ndarray:
    """The decoded vectors of ids (N,), back through the transforms: float32 (N, D).

    Raises:
        TypeError: no integers.
        ValueError: an id that the index does not hold; codes that FAISS does not decode.
    """
    wanted = np.asarray(keys)
    if wanted.ndim != 1 or (len(wanted) and not np.issubdtype(wanted.dtype, np.integer)):
        raise TypeError(f"keys: expected integers (N,), got {wanted.dtype} of shape {wanted.shape}")
    missing = wanted[~np.isin(wanted, ids(index))]
    if len(missing):
        raise ValueError(f"keys: expected ids of the index, got {missing[0]}, which it does not hold")
    if not len(wanted):
        return np.empty((0, index.d), np.float32)
    expected = f"an index whose codes FAISS decodes, got {factory!r}"
    if not families.decodes(index):
        raise ValueError(f"keys: expected {expected}")
    with errors("keys", expected):
        return _decoded(index, wanted.astype(np.int64))


def _decoded(index: Any, wanted: np.ndarray) -> np.ndarray:
    module = faiss()
    ivf = families.lists_of(index)
    if ivf is None:
        held = ids(index)
        order = held.argsort()
        rows = order[np.searchsorted(held, wanted, sorter=order)]
        inner = module.downcast_index(index.index)
        return np.stack([inner.reconstruct(int(row)) for row in rows])
    found = np.empty((len(wanted), ivf.d), np.float32)
    order = wanted.argsort(kind="stable")
    for number, names in _listed(ivf):
        for offset in np.flatnonzero(np.isin(names, wanted)):
            vector = np.empty(ivf.d, np.float32)
            ivf.reconstruct_from_offset(number, int(offset), module.swig_ptr(vector))
            first, last = (np.searchsorted(wanted, names[offset], side, sorter=order) for side in ("left", "right"))
            found[order[first:last]] = vector
    outer = module.downcast_index(index)
    if not isinstance(outer, module.IndexPreTransform):
        return found
    whole = np.empty((len(wanted), outer.d), np.float32)
    outer.reverse_chain(len(found), module.swig_ptr(found), module.swig_ptr(whole))
    return whole


def on_disk(index: Any) -> Any:
    """Inverted lists that live in a file, or None."""
    module = faiss()
    ivf = families.lists_of(index)
    lists = None if ivf is None else module.downcast_InvertedLists(ivf.invlists)
    return lists if isinstance(lists, module.OnDiskInvertedLists) else None


def read(path: Path, lists: Path | None, mmap: bool) -> Any:
    """An index from FAISS's file and, where they have their own, its lists' file.

    Raises:
        ValueError: FAISS cannot read it; it does not fit into memory.
    """
    module = faiss()
    flags = 0
    if lists is not None:
        # FAISS would look for the lists where they were built, or print where it looks instead.
        flags = module.IO_FLAG_SKIP_IVF_DATA | module.IO_FLAG_READ_ONLY
    elif mmap:
        flags = module.IO_FLAG_MMAP_IFC | module.IO_FLAG_READ_ONLY
    size, free = sum(file.stat().st_size for file in (path, lists) if file is not None), _memory.available()
    if not mmap and size > free:
        raise ValueError(
            f"path: expected an index that fits into {free / 2**30:.1f} GiB of free memory, got "
            f"{size / 2**30:.1f} GiB; load it with mmap=True"
        )
    with errors("path", f"an index that FAISS {module.__version__} reads in {path}"):
        index = module.read_index(str(path), flags)
        if lists is not None:
            _attach(index, lists, mmap)
    inner = families.lists_of(index)
    if isinstance(inner, module.IndexIVFPQFastScan):
        inner.fine_quantizer = inner.pq  # FAISS leaves it null, and `reconstruct` reads it: a segmentation fault
    return index


def _attach(index: Any, path: Path, mmap: bool) -> None:
    module = faiss()
    ivf = families.lists_of(index)
    mapped = on_disk(index)
    if mapped is None or mapped.totsize != path.stat().st_size:
        raise RuntimeError(f"the lists are not those of {path}")
    mapped.filename, mapped.read_only = str(path), True
    mapped.do_mmap()
    if not mmap:
        held = module.ArrayInvertedLists(mapped.nlist, mapped.code_size)
        mapped.copy_subset_to(held, module.InvertedLists.SUBSET_TYPE_ID_RANGE, 0, 2**63 - 1)
        ivf.replace_invlists(held, True)
        held.this.disown()
