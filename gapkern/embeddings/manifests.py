"""The manifest of a folder of shards: what it must say, how it is written, and how shards differ from it."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from gapkern import files
from gapkern.layout import FORMAT, MANIFEST, VERSION

ENTRY = {"name": str, "rows": int, "bytes": int, "sha256": str}
PARTS: dict[str, dict[str, Any]] = {
    "metadata": {"name": str, "sha256": str},
    "sources": {"source": str, "told": str, "skipped": dict, "truncated": int | None},
    "transforms": {"name": str},
}
FACTS: dict[str, type] = {
    "model": str,
    "order": str,
    "transforms": list,
    "metadata": list,
    "spans": list,
    "sources": list,
    "skipped": dict,
    "context": int,
    "truncated": int,
}


def manifest(path: str | os.PathLike[str], *, name: str = "path") -> dict[str, Any] | None:
    """The manifest of a folder of shards; None where there is none.

    Raises:
        ValueError: it is no manifest, or one of another version.
    """
    file = Path(path) / MANIFEST
    try:
        found = files.read_json(file, name=name)
    except (FileNotFoundError, NotADirectoryError):
        return None
    got = (found.get("format"), found.get("version")) if isinstance(found, dict) else (None, None)
    if got != (FORMAT, VERSION):
        raise ValueError(f"{name}: expected {FORMAT} of version {VERSION}, got {got[0]!r}, {got[1]!r} in {file}")
    fields = {"rows": int, "dims": int, "dtype": str, "shards": list}
    if not (_has(found, fields) and all(_has(entry, ENTRY) for entry in found["shards"])):
        raise ValueError(f"{name}: expected {', '.join(fields)} with each shard's hash in {file}, got {list(found)}")
    odd = [key for key, kind in FACTS.items() if not isinstance(found.get(key), kind | None)]
    odd += [key for key, fields in PARTS.items() if not all(_has(entry, fields) for entry in found.get(key) or [])]
    odd += [] if odd or is_spans(found.get("spans") or []) else ["spans"]
    if odd:
        key = odd[0]
        raise ValueError(f"{name}: expected {key} as embed writes it in {file}, got {str(found[key])[:40]!r}")
    return found


def is_spans(value: Any) -> bool:
    """Whether these are first and last keys of shards."""
    return isinstance(value, list) and all(
        isinstance(ends, list) and len(ends) in (0, 2) and all(isinstance(key, str) for key in ends) for ends in value
    )


def is_note(value: Any, shard: str, metadata: str) -> bool:
    """Whether this is what `embed` notes of the shard of that name, whose metadata is a file of that name."""
    if not _has(value, PARTS["sources"]):
        return False
    entries = [(value.get("shard"), ENTRY, shard), (value.get("metadata"), PARTS["metadata"], metadata)]
    return all(entry is None or (_has(entry, fields) and entry["name"] == name) for entry, fields, name in entries)


def _has(entry: Any, fields: Mapping[str, type]) -> bool:
    return isinstance(entry, dict) and all(isinstance(entry.get(key), kind) for key, kind in fields.items())


def differences(found: Mapping[str, Any], shards: Sequence[str], parts: Sequence[Any]) -> list[str]:
    """How shards differ from a manifest in what can be seen without reading them; `parts` are their matrices."""
    result = []
    known = {entry["name"]: entry for entry in found["shards"]}
    there = {Path(shard).name: part for shard, part in zip(shards, parts, strict=True)}
    result += [f"{name} is missing" for name in known if name not in there]
    result += [f"{name} is not in it" for name in there if name not in known]
    sizes = {Path(shard).name: os.path.getsize(shard) for shard in shards}
    for name, part in there.items():
        if name in known and part.rows != known[name]["rows"]:
            result.append(f"{name}: expected {known[name]['rows']} rows, got {part.rows}")
        elif name in known and sizes[name] != known[name]["bytes"]:
            result.append(f"{name}: expected {known[name]['bytes']} bytes, got {sizes[name]}")
        if part.dims != found["dims"]:
            result.append(f"{name}: expected D = {found['dims']}, got {part.dims}")
        if (dtype := str(part.dtype).removeprefix("torch.")) != found["dtype"]:
            result.append(f"{name}: expected {found['dtype']}, got {dtype}")
    if not result and (rows := sum(part.rows for part in there.values())) != found["rows"]:
        result.append(f"expected {found['rows']} rows, got {rows}")
    return result


def write_manifest(
    folder: Path, entries: list[dict[str, Any]], dims: int, dtype: torch.dtype, **facts: Any
) -> dict[str, Any]:
    """Writes the manifest of a folder's shards and returns it."""
    found = {
        "format": FORMAT,
        "version": VERSION,
        "kind": folder.name,
        **facts,
        "rows": sum(e["rows"] for e in entries),
        "dims": dims,
        "dtype": str(dtype).removeprefix("torch."),
        "shards": entries,
    }
    files.write_json(folder / MANIFEST, found)
    return found
