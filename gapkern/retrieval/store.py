"""A folder that holds an index: data files named by their hashes, and a manifest that names them.

The manifest is replaced last and at once, so that a run which is killed leaves the index of before or the new one.
"""

import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gapkern import _lock, files
from gapkern.retrieval._faiss import faiss

FORMAT, FORMAT_VERSION = "gapkern.GapIndex", 1
MANIFEST = "manifest.json"
FIELDS: dict[str, Any] = {
    "factory": str,
    "metric": str,
    "dims": int,
    "count": int,
    "next": int,
    "model": str | None,
    "files": dict,
}
WORK = "unfinished"  # the folder of a build that is under way
VERIFIED = 2**30  # bytes of mapped files that are read once more to compare their hashes
SUFFIXES = {"index": ".faiss", "lists": ".ivfdata", "shift": ".safetensors"}


@contextmanager
def claimed(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder that an index may be written to, and no other run writes to while the block lasts.

    What a killed run left half written there is removed.

    Raises:
        ValueError: it cannot be written, is being written, or holds files that are no index's.
    """
    with _lock.locked(path, name="path") as folder:
        if not (folder / MANIFEST).exists():
            ours = {p for kind, suffix in SUFFIXES.items() for p in folder.glob(f"{kind}-*{suffix}")}
            foreign = [p.name for p in folder.iterdir() if p not in ours and p.name != WORK and p.name[0] != "."]
            if foreign:
                raise ValueError(
                    f"path: expected an empty folder or one with an index, got {folder}, which holds {min(foreign)}"
                )
        for place in (folder, folder / WORK):
            for leftover in place.glob(".*.tmp*"):
                leftover.unlink(missing_ok=True)
        yield folder


def put(folder: Path, kind: str, save: Callable[[Path], Any]) -> dict[str, Any]:
    """Has `save` write a data file and gives it its name; returns what the manifest says of it."""
    temporary = folder / f".{kind}.tmp{SUFFIXES[kind]}"
    try:
        save(temporary)
        files.sync(temporary)
        found = files.digest(temporary)
        name = f"{kind}-{found[:16]}{SUFFIXES[kind]}"
        os.replace(temporary, folder / name)
    except OSError as error:
        raise ValueError(f"path: cannot write {temporary}: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)
    return {"name": name, "bytes": (folder / name).stat().st_size, "sha256": found}


def keep(path: Path, save: Callable[[Path], Any]) -> None:
    """Has `save` write a file of an unfinished build, which has its name only once it is whole and on the disk."""

    def whole(temporary: Path) -> None:
        save(temporary)
        files.sync(temporary)

    files.write(path, whole)


def write_index(index: Any, path: Path) -> None:
    """Writes FAISS's file of an index.

    FAISS's own writing drops an error that only the last flush meets; here each piece is Python's to write.

    Raises:
        OSError: the disk is full, or another fault of the file system.
    """
    module = faiss()
    failed: list[OSError] = []
    with open(path, "wb", buffering=2**20) as file:

        def take(piece: bytes) -> None:
            try:
                file.write(piece)
            except OSError as error:
                failed.append(error)
                raise

        try:
            module.write_index(index, module.PyCallbackIOWriter(take))
        except Exception:
            if failed:
                raise failed[0] from None
            raise


def write_lists(ivf: Any, blocks: Sequence[Any], path: Path) -> None:
    """Writes the lists of the blocks' inverted files one after the other, and has those of `ivf` lie in that file.

    FAISS would write through a mapping, where a full disk is a SIGBUS.

    Raises:
        OSError: the disk is full, or another fault of the file system.
    """
    module = faiss()
    sources = [block.invlists for block in blocks]
    mapped = module.OnDiskInvertedLists()
    mapped.nlist, mapped.code_size, mapped.read_only = ivf.nlist, ivf.invlists.code_size, True
    mapped.lists.clear()
    size = mapped.code_size
    with open(path, "wb", buffering=2**20) as file:
        for number in range(ivf.nlist):
            counts = [lists.list_size(number) for lists in sources]
            entry = module.OnDiskOneList()
            entry.size = entry.capacity = sum(counts)
            entry.offset = file.tell()
            mapped.lists.push_back(entry)
            filled = [(lists, count) for lists, count in zip(sources, counts, strict=True) if count]
            for lists, count in filled:
                file.write(module.rev_swig_ptr(lists.get_codes(number), count * size))
            for lists, count in filled:
                file.write(module.rev_swig_ptr(lists.get_ids(number), count))
        mapped.totsize = file.tell()
    ivf.replace_invlists(mapped, True)
    mapped.this.disown()
    ivf.ntotal = sum(block.ntotal for block in blocks)


def copy(source: str | os.PathLike[str], target: Path) -> None:
    """Copies a file by plain writes."""
    with open(source, "rb") as old, open(target, "wb") as new:
        shutil.copyfileobj(old, new, 2**20)


def facts(factory: str, metric: str, dims: int | None, count: int, following: int, model: str | None) -> dict[str, Any]:
    """What a manifest says of an index of `count` rows that were given as (dims,); `following` is above all ids."""
    return {
        "factory": factory,
        "metric": metric,
        "dims": dims,
        "count": count,
        "next": following,
        "model": model,
        "faiss": faiss().__version__,
    }


def commit(folder: Path, facts: Mapping[str, Any], data: Mapping[str, Mapping[str, Any]]) -> None:
    """Makes the data files the folder's index, and removes those of the one before."""
    files.write_json(folder / MANIFEST, {"format": FORMAT, "version": FORMAT_VERSION, **facts, "files": data})
    current = {entry["name"] for entry in data.values()}
    for kind, suffix in SUFFIXES.items():
        for old in (*folder.glob(f"{kind}-*{suffix}"), *folder.glob(f".{kind}.tmp*")):
            if old.name not in current:
                old.unlink(missing_ok=True)


def manifest(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest of an index.

    Raises:
        ValueError: no index is there, or one of another format.
    """
    path = Path(folder) / MANIFEST
    try:
        found = files.read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"path: expected a folder with an index, got {folder}, which has no {MANIFEST}") from None
    got = (found.get("format"), found.get("version")) if isinstance(found, dict) else (None, None)
    if got != (FORMAT, FORMAT_VERSION):
        raise ValueError(f"path: expected a {FORMAT} of version {FORMAT_VERSION}, got {got[0]!r}, {got[1]!r} in {path}")
    if (field := next((f for f in FIELDS if f not in found or not _whole(f, found[f])), None)) is not None:
        raise ValueError(f"path: expected the {field} of an index in {path}, got {found.get(field)!r}")
    return found


def _whole(field: str, value: Any) -> bool:
    """Whether a manifest's entry is one that was written here."""
    if field != "files":
        return isinstance(value, FIELDS[field]) and not isinstance(value, bool)
    return (
        isinstance(value, dict)
        and "index" in value
        and all(
            kind in SUFFIXES
            and isinstance(entry, dict)
            and re.fullmatch(rf"{kind}-[0-9a-f]{{16}}{re.escape(SUFFIXES[kind])}", str(entry.get("name")))
            and isinstance(entry.get("bytes"), int)
            and isinstance(entry.get("sha256"), str)
            for kind, entry in value.items()
        )
    )


def checked(
    folder: str | os.PathLike[str], found: Mapping[str, Any], verify: bool | None, mmap: bool = False
) -> dict[str, Path]:
    """The data files of a manifest by kind, once their sizes, and with `verify` their hashes, are as it says.

    Args:
        verify: None leaves out the hashes of more than 1 GiB that is mapped.

    Raises:
        ValueError: a file is missing or is not the one that was written.
    """
    if verify is None:
        verify = not mmap or sum(entry["bytes"] for entry in found["files"].values()) <= VERIFIED
    paths = {}
    for kind, entry in found["files"].items():
        path = paths[kind] = Path(folder) / entry["name"]
        if not path.exists():
            raise ValueError(f"path: expected the file {path}, which the manifest names and which does not exist")
        if path.stat().st_size != entry["bytes"]:
            raise ValueError(f"path: expected {entry['bytes']} bytes in {path}, got {path.stat().st_size}")
        if verify and (got := files.digest(path)) != entry["sha256"]:
            raise ValueError(f"path: expected SHA-256 {entry['sha256']} of {path}, got {got}: it was changed")
    return paths
