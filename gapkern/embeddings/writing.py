"""Shards, their metadata and whole folders of embeddings, written."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from gapkern import _check, files
from gapkern.embeddings import keys
from gapkern.embeddings.folder import METADATA
from gapkern.embeddings.manifests import write_manifest
from gapkern.layout import KINDS, SUFFIXES


def write_shard(
    folder: Path, name: str, x: Tensor, before: Callable[[dict[str, Any]], Any] = lambda entry: None
) -> dict[str, Any]:
    """Writes a shard to disk, whole or not at all; returns its entry in the manifest, which `before` is given first."""
    with files.replacing(folder / name) as temporary:
        files.save(temporary, x)
        files.sync(temporary)
        entry = {"name": name, "rows": len(x), "bytes": temporary.stat().st_size, "sha256": files.digest(temporary)}
        before(entry)
    return entry


def write_folder(
    out: str | os.PathLike[str],
    kind: str,
    parts: Iterable[Tensor],
    *,
    model: str | None = None,
    suffix: str = ".npy",
    names: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Writes matrices (n, D) as the shards of `out/kind`, and their manifest, which it returns.

    Args:
        kind: "img_emb" or "text_emb".
        parts: one shard each, alike in D and dtype.
        model: the id of what made them.
        suffix: ".npy", ".safetensors" or ".parquet".
        names: the rows' keys, each once, which are kept in Parquet files beside the shards; needs pyarrow.

    Raises:
        ValueError: the folder holds shards already, parts differ or there are none, or hold NaN or infinity; another
            number of names than rows, or one twice.
    """
    folder = files.folder(Path(out) / _check.choice("kind", kind, KINDS))
    if there := [p.name for p in folder.iterdir() if p.suffix in (*SUFFIXES, ".parquet")]:
        raise ValueError(f"out: expected a folder without shards, got {folder} with {there[0]}")
    entries: list[dict[str, Any]] = []
    told: list[dict[str, Any]] = []
    shape: Any = None
    rows = 0
    if names is not None:
        keys.unique("names", names)
    for i, part in enumerate(parts):
        part = _check.finite(f"parts[{i}]", _check.matrix(f"parts[{i}]", part))
        if shape not in (None, (part.shape[1], part.dtype)):
            raise ValueError(f"parts[{i}]: expected D and dtype {shape}, got {(part.shape[1], part.dtype)}")
        shape = (part.shape[1], part.dtype)
        if names is not None:
            mine = list(names[rows : rows + len(part)])
            if len(mine) < len(part):
                raise ValueError(f"names: expected one for each row, got {len(names)} for more than {rows} rows")
            told.append(write_metadata(folder, i, {"key": mine}))
        rows += len(part)
        entries.append(write_shard(folder, f"{kind}_{i}{suffix}", part.detach().cpu()))
    if not entries:
        raise ValueError("parts: expected at least one, got none")
    if names is None:
        return write_manifest(folder, entries, *shape, model=model)
    if len(names) != rows:
        raise ValueError(f"names: expected {rows}, one for each row, got {len(names)}")
    return write_manifest(folder, entries, *shape, model=model, order=keys.order(names), metadata=told)


def write_metadata(folder: Path, shard: int, columns: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """Writes what is known of a shard's rows as Parquet, beside `folder`; returns its entry in the manifest."""
    pyarrow = _check.extra("pyarrow", "pyarrow", "tables")
    parquet = _check.extra("pyarrow.parquet", "pyarrow", "tables")
    beside = files.folder(folder.parent / METADATA[folder.name][0])
    path = beside / f"metadata_{shard}.parquet"
    table = pyarrow.table(dict(columns))
    with files.replacing(path) as temporary:
        parquet.write_table(table, temporary)
        files.sync(temporary)
    return {"name": f"{beside.name}/{path.name}", "rows": table.num_rows, "sha256": files.digest(path)}
