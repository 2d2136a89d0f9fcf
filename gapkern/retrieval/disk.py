"""An index built from files block by block, larger than memory where it has inverted lists, taken up where it was left.

DIR/unfinished/ holds the plan, the trained index and one finished index for each block of rows; every file there is
whole or absent, and each depends on nothing but the plan. Merged, they become DIR's index in one step.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gapkern import _check, files
from gapkern.gap import MeanShift
from gapkern.retrieval import store
from gapkern.retrieval._faiss import errors, faiss, quiet, train
from gapkern.retrieval.index import GapIndex

WORK = "unfinished"
SAMPLE = 2**17  # rows to learn from
BLOCK = 2**26  # numbers of a block


def build(
    gallery: str | os.PathLike,
    out: str | os.PathLike,
    factory: str = "Flat",
    metric: str = "l2",
    shift: MeanShift | None = None,
    *,
    ids: str | os.PathLike | None = None,
    model: str | None = None,
    sample: int = SAMPLE,
    block: int | None = None,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Builds an index of a file or a folder of shards; the same call again goes on where a killed one stopped.

    Args:
        gallery: embeddings (G, D): `.npy`, `.safetensors`, or a folder of either.
        out: the folder; `GapIndex.load` reads it. An index that is there is replaced once the new one is complete.
        factory, metric, shift, model: as for `GapIndex`. With inverted lists ("IVF...") no more than a block is in
            memory at once; other indexes must fit there; graphs ("HNSW...") are built in one go and cannot be taken up.
        ids: a `.npy` of integers (G,).
        sample: rows, drawn evenly, from which lists and codes are learned.
        block: rows of a block (default: 67 million numbers).
        progress: called with a stage ("train", "add", "merge"), what is done and the total.

    Returns:
        The manifest.

    Raises:
        ValueError: what `GapIndex` raises, by the gallery's rows; a folder that holds other things.
    """
    rows = _Rows(gallery)
    index = GapIndex(factory, metric, shift, model=model)
    if index.dims is None:
        index._make(rows.dims)
    if index.dims != rows.dims:
        raise ValueError(f"gallery: expected D = {index.dims} as the shift, got ({len(rows)}, {rows.dims})")
    names = index._ids(None if ids is None else _integers(ids), len(rows))
    size = _check.integer("block", block, low=1) if block is not None else max(1, BLOCK // rows.dims)
    _check.integer("sample", sample, low=1)
    folder = store.claim(out)
    plan = {
        "factory": factory, "metric": metric, "model": index.model, "shift": _shift_facts(shift), "gallery": rows.facts,
        "ids": None if ids is None else files.fingerprint(torch.from_numpy(names)[:, None]),
        "sample": sample, "block": size, "faiss": faiss().__version__,
    }  # fmt: skip
    work = folder / WORK
    if (folder / store.MANIFEST).exists() and store.manifest(folder).get("plan") == plan:
        shutil.rmtree(work, ignore_errors=True)
        return store.manifest(folder)
    _start(work, plan)
    trained = work / "trained.faiss"
    if not trained.exists():
        progress("train", 0, 1)
        _train(index, rows, sample)
        files.write(trained, lambda path: faiss().write_index(index._index, str(path)))
    progress("train", 1, 1)
    if not _merges(trained):
        size = len(rows)
    blocks = []
    for number, first in enumerate(range(0, len(rows), size)):
        path = work / f"block-{number:06d}.faiss"
        if not path.exists():
            _add(trained, path, index, rows, names, first, min(len(rows), first + size), progress)
        blocks.append(path)
        progress("add", min(len(rows), first + size), len(rows))
    progress("merge", 0, 1)
    index._index, data = _merge(folder, trained, blocks)
    if index.count != len(rows):
        raise RuntimeError(f"merging {len(blocks)} blocks gave {index.count} vectors of {len(rows)}")
    index._next = int(names.max()) + 1
    if shift is not None:
        data["shift"] = store.put(folder, "shift", shift.save)
    store.commit(folder, {**index.facts(), "plan": plan}, data)
    shutil.rmtree(work, ignore_errors=True)
    progress("merge", 1, 1)
    return store.manifest(folder)


class _Rows:
    """Rows of a gallery's files by their number."""

    def __init__(self, path: str | os.PathLike):
        self.shards = files.shards(path, name="gallery")
        sizes = [files.size(shard, name="gallery") for shard in self.shards]
        self.dims = files.size(path, name="gallery")[1]
        self.starts = np.concatenate([[0], np.cumsum([count for count, _ in sizes])])
        self.facts = []
        for shard, (count, _) in zip(self.shards, sizes, strict=True):
            name = shard.rpartition("[")[0] if shard.endswith("]") else shard
            status = os.stat(name)
            self.facts.append([os.path.basename(shard), count, status.st_size, status.st_mtime_ns])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, which: slice) -> Tensor:
        parts = []
        for shard, start, end in zip(self.shards, self.starts, self.starts[1:], strict=False):
            low, high = max(which.start, start), min(which.stop, end)
            if low < high:
                parts.append(files.load_embeddings(shard, name="gallery")[low - start : high - start].float())
        return torch.cat(parts)


def _integers(path: str | os.PathLike) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"ids: expected a .npy file of integers, got {path} ({error})") from None


def _shift_facts(shift: MeanShift | None) -> Any:
    if shift is None:
        return None
    return [files.fingerprint(shift.shift_vector_), shift.alpha, shift.moves, shift.normalize]


def _start(work: Path, plan: dict[str, Any]) -> None:
    """Keeps the work of an earlier run with the same plan, and clears away any other."""
    try:
        known = json.loads((work / "plan.json").read_text())
    except (OSError, ValueError):
        known = None
    if known != plan:
        shutil.rmtree(work, ignore_errors=True)
        files.folder(work)
        files.write_json(work / "plan.json", plan)
    for leftover in work.glob(".*.tmp*"):
        leftover.unlink()


def _train(index: GapIndex, rows: _Rows, sample: int) -> None:
    if index._index.is_trained:
        return
    wanted = np.linspace(0, len(rows) - 1, min(sample, len(rows))).round().astype(np.int64)
    step = max(1, BLOCK // 16 // rows.dims)
    parts = []
    for first in range(0, len(rows), step):
        inside = wanted[np.searchsorted(wanted, first) : np.searchsorted(wanted, first + step)]
        if len(inside):
            part = rows[first : min(len(rows), first + step)]
            parts.append(index._moved("gallery", part, first, side="gallery")[inside - first])
    learned = np.concatenate(parts)
    with errors("gallery", f"enough rows to train {index.factory!r}, got {len(learned)}"):
        train(index._index, learned, "gallery")


def _on_disk(ivf: Any) -> bool:
    """Whether there are inverted lists that can live in a file; FastScan's, packed in blocks, cannot."""
    module = faiss()
    if ivf is None:
        return False
    lists = module.downcast_InvertedLists(ivf.invlists)
    return isinstance(lists, module.ArrayInvertedLists) and not isinstance(ivf, module.IndexIVFPQR)


def _merges(trained: Path) -> bool:
    """Whether indexes of blocks can be put together."""
    module = faiss()
    one, other = (module.read_index(str(trained)) for _ in range(2))
    ivf = module.try_extract_index_ivf(one)
    if ivf is not None:
        return _on_disk(module.downcast_index(ivf))
    try:
        one.merge_from(other, 0)
    except RuntimeError:
        return False
    return True


def _add(trained, path, index, rows, names, first, last, progress) -> None:
    module = faiss()
    part = module.read_index(str(trained))
    step = max(1, BLOCK // 16 // rows.dims)
    for start in range(first, last, step):
        end = min(last, start + step)
        some = index._moved("gallery", rows[start:end], start, side="gallery")
        with errors("gallery", f"vectors that {index.factory!r} can hold"):
            part.add_with_ids(some, names[start:end])
        progress("add", end, len(rows))
    files.write(path, lambda temporary: module.write_index(part, str(temporary)))


def _merge(folder: Path, trained: Path, blocks: list[Path]) -> tuple[Any, dict[str, Any]]:
    """The whole index, and its data files."""
    module = faiss()
    whole = module.read_index(str(trained))
    ivf = module.try_extract_index_ivf(whole)
    data = {}
    if ivf is not None and _on_disk(module.downcast_index(ivf)):
        from faiss.contrib.ondisk import merge_ondisk

        with quiet():
            data["lists"] = store.put(
                folder, "lists", lambda temporary: merge_ondisk(whole, [str(b) for b in blocks], temporary)
            )
        # The name alone: the folder may move.
        module.downcast_InvertedLists(ivf.invlists).filename = data["lists"]["name"]
    elif len(blocks) == 1:
        whole = module.read_index(str(blocks[0]))
    else:
        for block in blocks:
            whole.merge_from(module.read_index(str(block)), 0)
    data["index"] = store.put(folder, "index", lambda temporary: module.write_index(whole, temporary))
    return whole, data
