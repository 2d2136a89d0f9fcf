"""An index built from files block by block, larger than memory where it has inverted lists, taken up where it was left.

DIR/unfinished/ holds the plan, the trained index and one finished index for each block of rows; every file there is
whole or absent, and each depends on nothing but the plan. Merged, they become DIR's index in one step.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gapkern import _check, files, layout
from gapkern.embeddings.provenance import described
from gapkern.gap import MeanShift, Projection, transforms
from gapkern.retrieval import families, intake, store, stored
from gapkern.retrieval._faiss import errors, faiss, train
from gapkern.retrieval.index import GapIndex

SAMPLE = 2**17  # rows to learn from
BLOCK = 2**26  # numbers of a block


def build(
    gallery: str | os.PathLike[str],
    out: str | os.PathLike[str],
    factory: str = "Flat",
    metric: str = "l2",
    shift: MeanShift | Projection | None = None,
    *,
    ids: str | os.PathLike[str] | None = None,
    model: str | None = None,
    sample: int = SAMPLE,
    block: int | None = None,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Builds an index of a file or a folder of shards; the same call again goes on where a killed one stopped.

    Args:
        gallery: embeddings (G, D): a file or a folder as `gapkern.files.load_embeddings` reads them.
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
        ValueError: what `GapIndex` raises, by the gallery's rows; a folder that holds other things, that another run
            writes, or whose disk is full.
    """
    rows = _Rows(gallery)
    transforms.check("shift", shift)
    if shift is not None and (width := shift.n_features_in_) != rows.dims:
        raise ValueError(f"gallery: expected D = {width} as the shift, got ({len(rows)}, {rows.dims})")
    index = GapIndex(factory, metric, shift, model=model, d=rows.dims)
    names = intake.numbers(None if ids is None else _integers(ids), len(rows), 0)
    size = _check.integer("block", block, low=1) if block is not None else max(1, BLOCK // rows.dims)
    _check.integer("sample", sample, low=1)
    with store.claimed(out) as folder:
        plan = {
            "factory": factory,
            "metric": metric,
            "model": index.model,
            "shift": _shift_facts(shift),
            "gallery": rows.facts(),
            "order": described(gallery, name="gallery").get("order"),
            "sample": sample,
            "ids": None if ids is None else files.fingerprint(torch.from_numpy(names)[:, None]),
            "block": size,
            "faiss": faiss().__version__,
        }
        work = folder / store.WORK
        if not _complete(folder, plan):
            _start(work, plan)
            _build(folder, plan, index, rows, names, progress)
        shutil.rmtree(work, ignore_errors=True)
        return store.manifest(folder)


def _complete(folder: Path, plan: dict[str, Any]) -> bool:
    """Whether the folder's index is that of the plan, with all of its files."""
    try:
        found = store.manifest(folder)
        return found.get("plan") == plan and bool(store.checked(folder, found, False))
    except ValueError:
        return False


def _build(
    folder: Path, plan: dict[str, Any], index: GapIndex, rows: "_Rows", names: np.ndarray, progress: Any
) -> None:
    trained = folder / store.WORK / "trained.faiss"
    if not trained.exists():
        progress("train", 0, 1)
        _train(index, rows, plan["sample"])
        store.keep(trained, lambda path: store.write_index(index.faiss_index, path))
    progress("train", 1, 1)
    size = plan["block"] if _merges(trained) else len(rows)
    blocks = []
    for number, first in enumerate(range(0, len(rows), size)):
        path = trained.with_name(f"block-{number:06d}.faiss")
        if not path.exists():
            _add(trained, path, index, rows, names, first, min(len(rows), first + size), progress)
        blocks.append(path)
        progress("add", min(len(rows), first + size), len(rows))
    progress("merge", 0, 1)
    whole, data = _merge(folder, trained, blocks)
    if whole.ntotal != len(rows):
        raise RuntimeError(f"merging {len(blocks)} blocks gave {whole.ntotal} vectors of {len(rows)}")
    if index.shift is not None:
        data["shift"] = store.put(folder, "shift", index.shift.save)
    facts = store.facts(index.factory, index.metric, rows.dims, whole.ntotal, int(names.max()) + 1, index.model)
    store.commit(folder, {**facts, "plan": plan}, data)
    progress("merge", 1, 1)


class _Rows:
    """Rows of a gallery's files by their number."""

    def __init__(self, path: str | os.PathLike[str]):
        self.shards = files.shards(path, name="gallery")
        self.dims = files.size(path, name="gallery")[1]
        self.parts = [files.open_matrix(shard, name="gallery") for shard in self.shards]
        self.counts = [part.rows for part in self.parts]
        self.starts = np.concatenate([[0], np.cumsum(self.counts)])

    def facts(self) -> list[list[Any]]:
        """Of each shard its name, rows and the SHA-256 of its file: times and sizes do not tell other bytes."""
        return [
            [os.path.basename(shard), count, files.digest(layout.parted(shard)[0])]
            for shard, count in zip(self.shards, self.counts, strict=True)
        ]

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, which: slice) -> Tensor:
        parts = []
        for matrix, start, end in zip(self.parts, self.starts, self.starts[1:], strict=False):
            low, high = max(which.start, start), min(which.stop, end)
            if low < high:
                parts.append(matrix.read(int(low - start), int(high - start)))
        return torch.cat(parts)


def _integers(path: str | os.PathLike[str]) -> np.ndarray:
    return np.array(files.load_array(path, name="ids"))


def _shift_facts(shift: transforms.Transform | None) -> Any:
    if isinstance(shift, Projection):
        return transforms.facts(shift)
    return shift and [files.fingerprint(shift.shift_vector_), shift.alpha, shift.moves, shift.normalize]


def _start(work: Path, plan: dict[str, Any]) -> None:
    """Keeps the work of an earlier run with the same plan, and clears away any other."""
    try:
        known = files.read_json(work / "plan.json")
    except (OSError, ValueError):
        known = None
    if known != plan:
        shutil.rmtree(work, ignore_errors=True)
        files.folder(work)
        files.write_json(work / "plan.json", plan)


def _train(index: GapIndex, rows: _Rows, sample: int) -> None:
    if index.is_trained:
        return
    wanted = np.linspace(0, len(rows) - 1, min(sample, len(rows))).round().astype(np.int64)
    step = max(1, BLOCK // 16 // rows.dims)
    parts = []
    for first in range(0, len(rows), step):
        inside = wanted[np.searchsorted(wanted, first) : np.searchsorted(wanted, first + step)]
        if len(inside):
            part = rows[first : min(len(rows), first + step)]
            parts.append(index.moved("gallery", part, first)[inside - first])
    learned = np.concatenate(parts)
    intake.spread("gallery", learned)
    with errors("gallery", f"enough rows to train {index.factory!r}, got {len(learned)}"):
        train(index.faiss_index, learned, "gallery")


def _merges(trained: Path) -> bool:
    """Whether indexes of blocks can be put together."""
    one, other = (faiss().read_index(str(trained)) for _ in range(2))
    return families.merges_lists(one) or families.appends(one, other)


def _add(
    trained: Path, path: Path, index: GapIndex, rows: _Rows, names: np.ndarray, first: int, last: int, progress: Any
) -> None:
    part = faiss().read_index(str(trained))
    step = last - first if families.built_at_once(part) else max(1, BLOCK // 16 // rows.dims)
    for start in range(first, last, step):
        end = min(last, start + step)
        some = index.moved("gallery", rows[start:end], start)
        if start == 0 and not index.exact:
            intake.spread("gallery", some)
        families.prepare(part, some, "gallery")
        with errors("gallery", f"vectors that {index.factory!r} can hold"):
            part.add_with_ids(some, names[start:end])
        progress("add", end, len(rows))
    store.keep(path, lambda temporary: store.write_index(part, temporary))


def _merge(folder: Path, trained: Path, blocks: list[Path]) -> tuple[Any, dict[str, Any]]:
    """The whole index, and its data files."""
    module = faiss()
    whole = module.read_index(str(trained))
    data = {}
    if families.merges_lists(whole):
        parts = [module.read_index(str(block), module.IO_FLAG_MMAP | module.IO_FLAG_READ_ONLY) for block in blocks]
        lists, sources = families.lists_of(whole), [families.lists_of(part) for part in parts]
        data["lists"] = store.put(folder, "lists", lambda temporary: store.write_lists(lists, sources, temporary))
        whole.ntotal = lists.ntotal
        # The name alone: the folder may move.
        stored.on_disk(whole).filename = data["lists"]["name"]
    elif len(blocks) == 1:
        whole = module.read_index(str(blocks[0]))
    else:
        for block in blocks:
            whole.merge_from(module.read_index(str(block)), 0)
    data["index"] = store.put(folder, "index", lambda temporary: store.write_index(whole, temporary))
    return whole, data
