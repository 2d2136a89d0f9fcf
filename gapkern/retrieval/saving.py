"""The files of an index in its folder: FAISS's, those of the lists on disk, and the shift's."""

import os
from pathlib import Path
from typing import Any

from gapkern.gap import transforms
from gapkern.gap.transforms import Transform
from gapkern.retrieval import store, stored


def write(folder: Path, index: Any, shift: Transform | None) -> dict[str, dict[str, Any]]:
    """Writes an index and its shift; returns what the manifest says of each file."""
    data = {}
    lists = stored.on_disk(index)
    if lists is not None:
        source = lists.filename
        data["lists"] = store.put(folder, "lists", lambda temporary: store.copy(source, temporary))
        lists.filename = data["lists"]["name"]  # the folder may move
    try:
        data["index"] = store.put(folder, "index", lambda temporary: store.write_index(index, temporary))
    finally:
        if lists is not None:
            lists.filename = source
    if shift is not None:
        data["shift"] = store.put(folder, "shift", shift.save)
    return data


def read(path: str | os.PathLike[str], mmap: bool, verify: bool | None) -> tuple[dict[str, Any], Any, Transform | None]:
    """The manifest of a folder, its index and its shift.

    Raises:
        ValueError: see `GapIndex.load`.
    """
    while True:
        found = store.manifest(path)
        try:
            return found, *_of(path, found, mmap, verify)
        except (ValueError, OSError):
            # Another run may have replaced the index meanwhile, and its files with it.
            if store.manifest(path) == found:
                raise


def _of(
    path: str | os.PathLike[str], found: dict[str, Any], mmap: bool, verify: bool | None
) -> tuple[Any, Transform | None]:
    paths = store.checked(path, found, verify, mmap)
    shift = transforms.load(paths["shift"]) if "shift" in paths else None
    index = stored.read(paths["index"], paths.get("lists"), mmap)
    size = int(index.ntotal), int(index.d) if shift is None else shift.n_features_in_
    if size != (found["count"], found["dims"]):
        raise ValueError(
            f"path: expected {found['count']} x {found['dims']} as the manifest says, got "
            f"{size[0]} x {size[1]} in {paths['index']}"
        )
    return index, shift
