"""Whether a folder of embeddings is what was written: every shard whole, in its place, once, and finite."""

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gapkern import _formats, files, layout
from gapkern.embeddings import sides
from gapkern.embeddings.folder import Embeddings, metadata_files
from gapkern.embeddings.manifests import manifest
from gapkern.layout import KINDS, MANIFEST


def verify(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads all embeddings of a folder, or one file, and compares them with the manifest where there is one.

    Args:
        path: a file, a folder of shards, or one that holds `img_emb`, `text_emb`.

    Returns:
        For each folder of shards: rows, dims, dtype, shards, model, and whether it has a manifest and metadata.

    Raises:
        ValueError: a shard is truncated, pickled, in another's place, there twice, missing or holds NaN or infinity;
            the manifest or the metadata say something else. Names each shard and, where there is one, the row.

    Example:
        >>> import tempfile
        >>> from gapkern.embeddings import write_folder
        >>> out = tempfile.mkdtemp()
        >>> _ = write_folder(out, "img_emb", [torch.zeros(3, 4)])
        >>> verify(out)["img_emb"]["rows"]
        3
    """
    path = Path(path)
    kinds = [kind for kind in KINDS if (path / kind).is_dir()]
    if len(kinds) == 1:
        layout.place(path)  # refuses shards beside the folder
    places = {kind: path / kind for kind in kinds} or {path.name: path}
    problems: list[str] = []
    result = {name: _verify(place, problems) for name, place in places.items()}
    if path.is_dir():
        problems += _beside(path)
    if problems:
        raise ValueError(f"path: {path} is not as it was written: {'; '.join(problems)}")
    return result


def _beside(path: Path) -> list[str]:
    """What is wrong with the labels, class vectors and images of captions beside embeddings, and with their orders."""
    problems = []
    orders = {kind: (manifest(path / kind) or {}).get("order") for kind in KINDS if (path / kind).is_dir()}
    for name, entry in sides.read(path).items():
        try:
            if not sides.of(path / name):
                problems.append(f"{path / name}: missing, {sides.NAME} has it")
        except ValueError as error:
            problems.append(str(error).removeprefix("path: "))
        kind = "img_emb" if name == sides.LABELS else "text_emb" if name == sides.IMAGE_OF else None
        if kind in orders and entry.get("order") != orders[kind]:
            problems.append(f"{path / name}: expected the order of {path / kind}, got another's")
    return problems


def _verify(folder: Path, problems: list[str]) -> dict[str, Any]:
    try:
        known = manifest(folder)
        shards = [Path(shard) for shard in files.shards(folder)]
    except ValueError as error:
        problems.append(str(error).removeprefix("path: "))
        return {}
    entries = {entry["name"]: entry for entry in known["shards"]} if known else {}
    hashes = {shard.name: files.digest(shard) for shard in shards if shard.exists()}
    rows, dims, dtype, start, counted = 0, None, None, 0, []
    for i, shard in enumerate(shards):
        reasons: list[str] = []
        count = 0
        if broken := unreadable(shard):
            reasons.append(broken)
        else:
            part = files.open_matrix(shard)
            count = part.rows
            dims, dtype = (part.dims, part.dtype) if dims is None else (dims, dtype)
            if (part.dims, part.dtype) != (dims, dtype):
                differs = f"{(part.rows, part.dims)} {part.dtype}"
                reasons.append(f"expected D = {dims} and {dtype} as before it, got {differs}")
            if (row := not_finite(shard)) is not None:
                reasons.append(f"NaN or infinity in row {row} (row {start + row} of all)")
        if shard.name in hashes:
            reasons += _misplaced(shard.name, hashes, entries, [s.name for s in shards[:i]], known is not None)
        if known is not None and shard.name in entries and not reasons:
            entry = entries[shard.name]
            if count != entry["rows"]:
                reasons.append(f"expected {entry['rows']} rows as in the manifest, got {count}")
            elif hashes[shard.name] != entry["sha256"]:
                reasons.append(f"expected SHA-256 {entry['sha256'][:16]}..., got {hashes[shard.name][:16]}...: changed")
        problems += [f"{shard}: {reason}" for reason in reasons]
        start += count
        rows += count
        counted.append(count)
    problems += [f"{folder / name}: missing, the manifest has it" for name in entries if name not in hashes]
    if known is None:
        problems += [f"{folder / name}: missing, later shards are there" for name in _holes([s.name for s in shards])]
    elif not problems:
        for key, got in (("rows", rows), ("dims", dims), ("dtype", str(dtype).removeprefix("torch."))):
            if got != known[key]:
                problems.append(f"{folder}: expected {key} {known[key]} as in the manifest, got {got}")
    has_metadata = _metadata(folder, shards, counted, known, problems)
    return {
        "rows": rows,
        "dims": dims,
        "dtype": str(dtype).removeprefix("torch."),
        "shards": len(shards),
        "model": known.get("model") if known else None,
        "manifest": known is not None,
        "metadata": has_metadata,
    }


def unreadable(shard: Path) -> str | None:
    """Why a file is no matrix of embeddings; None where it is one."""
    if shard.suffix == ".npy" and shard.exists():
        try:
            with open(shard, "rb") as file:
                version = np.lib.format.read_magic(file)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, _, dtype = read(file)
                there = os.fstat(file.fileno()).st_size - file.tell()
        except ValueError as error:
            return f"expected a .npy file, got {_formats.reason(error)}"
        if dtype.hasobject:
            return "expected numbers, got pickled objects, which are not loaded"
        needed = int(np.prod(shape)) * dtype.itemsize
        if len(shape) == 2 and there != needed:
            row = there // max(1, shape[1] * dtype.itemsize)
            how = f"truncated in row {row}" if there < needed else "with more behind them"
            return f"expected {shape[0]} rows of {shape[1]}, got {there} of {needed} bytes: {how}"
    try:
        for _ in files.chunks(shard) if files.is_table(shard) else [files.open_matrix(shard)]:
            pass
    except ValueError as error:
        return str(error).removeprefix("path: ")
    return None


def not_finite(shard: Path) -> int | None:
    """The first row with NaN or infinity."""
    start = 0
    for part in files.chunks(shard):
        bad = (~torch.isfinite(part)).any(1).nonzero()
        if len(bad):
            return start + int(bad[0])
        start += len(part)
    return None


def _misplaced(name: str, hashes: dict[str, Any], entries: dict[str, Any], before: list[str], known: bool) -> list[str]:
    mine = hashes[name]
    owners = [other for other, entry in entries.items() if entry["sha256"] == mine]
    if known and name not in entries:
        copy = f"; it repeats {owners[0]}, from row 0 on" if owners else ""
        return [f"not in the manifest{copy}"]
    if known and owners and name not in owners:
        twice = hashes.get(owners[0]) == mine
        return [f"holds {owners[0]}'s rows, from row 0 on: {'there twice' if twice else 'reordered'}"]
    if not known and (same := [other for other in before if hashes.get(other) == mine]):
        return [f"holds {same[0]}'s rows, from row 0 on: there twice"]
    return []


def _holes(names: list[str]) -> list[str]:
    """Numbers that are left out between the first and the last shard of one naming.

    Example:
        >>> _holes(["img_emb_0.npy", "img_emb_2.npy"])
        ['img_emb_1.npy']
    """
    parts = [re.fullmatch(r"(.*?)(\d+)(\.\w+)", name) for name in names]
    if not all(parts) or len({(p[1], p[3]) for p in parts if p}) != 1:
        return []
    numbers = {int(p[2]): len(p[2]) for p in parts if p}
    width = max(numbers.values()) if any(p and p[2].startswith("0") and len(p[2]) > 1 for p in parts) else 1
    head, tail = (parts[0][1], parts[0][3]) if parts[0] else ("", "")
    return [f"{head}{n:0{width}d}{tail}" for n in range(max(numbers)) if n not in numbers]


def _metadata(folder: Path, shards: list[Path], counts: list[int], known: Any, problems: list[str]) -> bool:
    parts = metadata_files(folder)
    for entry in (known or {}).get("metadata") or []:
        file = folder.parent / entry["name"]
        if not file.exists():
            problems.append(f"{file}: missing, the manifest has it")
        elif (got := files.digest(file)) != entry["sha256"]:
            problems.append(f"{file}: expected SHA-256 {entry['sha256'][:16]}..., got {got[:16]}...: changed")
    told = [entry["name"] for entry in (known or {}).get("metadata") or []]
    if (known or {}).get("has_metadata") and len(told) != len(shards):
        problems.append(f"{folder / MANIFEST}: expected the metadata of {len(shards)} shards, got {len(told)}")
    if not parts:
        return False
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import read_metadata
    except ImportError:
        return True
    if known is not None and known.get("order") and not problems:
        try:
            Embeddings(folder).keys()
        except ValueError as error:
            problems.append(str(error).removeprefix("path: "))
    if len(parts) != len(shards):
        problems.append(f"{parts[0].parent}: expected {len(shards)} files, one per shard, got {len(parts)}")
        return True
    for part, shard, count in zip(parts, shards, counts, strict=True):
        try:
            got = read_metadata(part).num_rows
        except (ArrowException, OSError) as error:
            problems.append(f"{part}: expected Parquet, got {_formats.reason(error)}")
            continue
        if count and got != count:
            problems.append(
                f"{part}: expected {count} rows as in {shard.name}, got {got}: row {min(got, count)} has no match"
            )
    return True
