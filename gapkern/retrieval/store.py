"""A folder that holds an index: data files named by their hashes, and a manifest that names them.

The manifest is replaced last and at once, so that a run which is killed leaves the index of before or the new one.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gapkern import files

FORMAT, FORMAT_VERSION = "gapkern.GapIndex", 1
MANIFEST = "manifest.json"
SUFFIXES = {"index": ".faiss", "lists": ".ivfdata", "shift": ".safetensors"}


def claim(path: str | os.PathLike) -> Path:
    """A folder that an index may be written to.

    Raises:
        ValueError: it cannot be written, or holds files that are no index's.
    """
    folder = files.folder(path, name="path")
    if not (folder / MANIFEST).exists():
        ours = {p for kind, suffix in SUFFIXES.items() for p in folder.glob(f"{kind}-*{suffix}")}
        foreign = [p.name for p in folder.iterdir() if p not in ours and p.name != "unfinished" and p.name[0] != "."]
        if foreign:
            raise ValueError(
                f"path: expected an empty folder or one with an index, got {folder}, which holds {min(foreign)}"
            )
    return folder


def put(folder: Path, kind: str, save: Callable[[str], Any]) -> dict[str, Any]:
    """Has `save` write a data file and gives it its name; returns what the manifest says of it."""
    temporary = folder / f".{kind}.tmp{SUFFIXES[kind]}"
    temporary.unlink(missing_ok=True)
    try:
        save(str(temporary))
        found = files.digest(temporary)
        name = f"{kind}-{found[:16]}{SUFFIXES[kind]}"
        os.replace(temporary, folder / name)
    finally:
        temporary.unlink(missing_ok=True)
    return {"name": name, "bytes": (folder / name).stat().st_size, "sha256": found}


def commit(folder: Path, facts: Mapping[str, Any], data: Mapping[str, Mapping[str, Any]]) -> None:
    """Makes the data files the folder's index, and removes those of the one before."""
    files.write_json(
        folder / MANIFEST, {"format": FORMAT, "version": FORMAT_VERSION, **facts, "files": data}
    )  # fmt: skip
    current = {entry["name"] for entry in data.values()}
    for kind, suffix in SUFFIXES.items():
        for old in (*folder.glob(f"{kind}-*{suffix}"), *folder.glob(f".{kind}.tmp*")):
            if old.name not in current:
                old.unlink(missing_ok=True)


def manifest(folder: str | os.PathLike) -> dict[str, Any]:
    """The manifest of an index.

    Raises:
        ValueError: no index is there, or one of another format.
    """
    path = Path(folder) / MANIFEST
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"path: expected a folder with an index, got {folder}, which has no {MANIFEST}") from None
    except ValueError as error:
        raise ValueError(f"path: expected JSON in {path}, got {error}") from None
    got = (found.get("format"), found.get("version")) if isinstance(found, dict) else (None, None)
    if got != (FORMAT, FORMAT_VERSION):
        raise ValueError(f"path: expected a {FORMAT} of version {FORMAT_VERSION}, got {got[0]!r}, {got[1]!r} in {path}")
    return found


def checked(folder: str | os.PathLike, found: Mapping[str, Any], verify: bool) -> dict[str, Path]:
    """The data files of a manifest by kind, once their sizes, and with `verify` their hashes, are as it says.

    Raises:
        ValueError: a file is missing or is not the one that was written.
    """
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
