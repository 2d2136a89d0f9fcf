"""Folders of embeddings as clip-retrieval writes them, and the manifest that says what they hold.

    OUT/img_emb/img_emb_0.npy ...     OUT/metadata/metadata_0.parquet ...
    OUT/text_emb/text_emb_0.npy ...   OUT/text_metadata/metadata_0.parquet ...
    OUT/<kind>/manifest.json          model, rows, D, dtype, the order of the rows' keys, what the embeddings were made
                                      from, and each shard's rows, bytes and SHA-256

The keys are the metadata's column `key`; the manifest has their order's hash. Shards are in natural order (2 before
10). Where clip-retrieval wrote the folder, `metadata` belongs to both kinds, there is no manifest, and the order of the
rows is called "as stored".
"""

import bisect
import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gapkern import _check, files, layout
from gapkern.embeddings import keys
from gapkern.layout import FORMAT, KINDS, MANIFEST, VERSION, place

ENTRY = {"name": str, "rows": int, "bytes": int, "sha256": str}
PARTS: dict[str, dict[str, type]] = {
    "metadata": {"name": str, "sha256": str},
    "sources": {"source": str, "told": str, "skipped": dict},
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
}
METADATA = {"img_emb": ("metadata",), "text_emb": ("text_metadata", "metadata")}


def manifest(path: str | os.PathLike, *, name: str = "path") -> dict[str, Any] | None:
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


def described(path: str | os.PathLike, kind: str | None = None, *, name: str = "path") -> dict[str, Any]:
    """What is known of embeddings beside their values: the manifest of a folder, or what stands beside a file.

    Raises:
        ValueError: see `place` and `manifest`.
    """
    found = place(path, kind, name=name)
    if found.is_dir():
        return manifest(found, name=name) or {}
    note = Path(f"{found}.json")
    try:
        told = files.read_json(note, name=name)
    except (OSError, ValueError):
        return {}
    # A file that has been written anew since is not the one that was described.
    if not isinstance(told, dict) or told.get("format") != FORMAT or told.get("bytes") != found.stat().st_size:
        return {}
    return told if told.get("sha256") == files.digest(found) else {}


def kind_of(path: str | os.PathLike, kind: str | None = None, *, name: str = "path") -> str | None:
    """ "img_emb" or "text_emb", as the manifest or the folder's name says; None where neither does."""
    told = described(path, kind, name=name).get("kind") or place(path, kind, name=name).name
    return told if told in KINDS else None


def made_from(path: str | os.PathLike, kind: str | None = None, *, name: str = "path") -> dict[str, Any]:
    """What a result says of embeddings that it was made from.

    Returns:
        "sha256" of their files in the rows' order; where they are known, "order" (the hash of the rows' keys) and
        "transforms" that have moved them; "key" where a file holds several matrices.

    Raises:
        ValueError: see `described`; a file is absent.
    """
    told = described(path, kind, name=name)
    parts = [files.parted(shard) for shard in files.shards(place(path, kind, name=name), name=name)]
    facts = {
        "sha256": [files.digest(file) for file, _ in parts],
        "key": parts[0][1],
        "order": told.get("order"),
        "transforms": told.get("transforms"),
    }
    return {key: value for key, value in facts.items() if value}


def model_of(path: str | os.PathLike, kind: str | None = None, *, name: str = "path") -> str | None:
    """The id of the model that made a folder's embeddings, from its manifest; None where nothing says it.

    Args:
        path, kind: as for `Embeddings`.

    Raises:
        ValueError: the folder holds both kinds and `kind` does not say which; its manifest is none.
    """
    return described(path, kind, name=name).get("model")


def agreed(models: Mapping[str, str | None]) -> str | None:
    """The one model that is known of several embeddings, by their argument's name; None where none is.

    Raises:
        ValueError: two are known and differ.

    Example:
        >>> agreed({"gallery": "ViT-B-16/openai", "queries": None})
        'ViT-B-16/openai'
    """
    known = {name: model for name, model in models.items() if model}
    for name, model in known.items():
        first, expected = next(iter(known.items()))
        if model != expected:
            raise ValueError(f"{name}: expected embeddings of {expected} as in {first}, got those of {model}")
    return next(iter(known.values()), None)


class Embeddings:
    """Embeddings (N, D) of a file or a folder of shards, mapped: rows are read when they are asked for.

    Args:
        path: `.npy`, `.safetensors`, a folder of either, or one that holds `img_emb` or `text_emb`.
        kind: "img_emb" or "text_emb", where the folder holds both.

    Attributes: shards (paths in natural order), counts (rows of each), dims, dtype, manifest (or None), model, order
    (the hash of the rows' keys, or None where rows are as stored).

    Raises:
        ValueError: what is there cannot be read, shards differ in D or dtype, or names, rows, bytes, D or dtype are not
            those of the manifest. Values are compared by `verify`.

    Example:
        >>> import tempfile
        >>> out = tempfile.mkdtemp()
        >>> _ = write_folder(out, "img_emb", [torch.zeros(3, 4), torch.ones(2, 4)], model="mine")
        >>> x = Embeddings(out)
        >>> len(x), x.dims, x.model, x[2:4].sum(1).tolist()
        (5, 4, 'mine', [0.0, 4.0])
    """

    def __init__(self, path: str | os.PathLike, kind: str | None = None, *, name: str = "path"):
        self.path = place(path, kind, name=name)
        self.kind = self.path.name if self.path.name in KINDS else None
        self.manifest = manifest(self.path, name=name)
        self.shards = files.shards(self.path, name=name)
        self._name = name
        mapped = [files.load_embeddings(shard, name=name) for shard in self.shards]
        self.counts = [len(part) for part in mapped]
        self.dims, self.dtype = mapped[0].shape[1], mapped[0].dtype
        for shard, part in zip(self.shards, mapped, strict=True):
            if (part.shape[1], part.dtype) != (self.dims, self.dtype):
                raise ValueError(
                    f"{name}: expected D = {self.dims} and {self.dtype} as in {self.shards[0]}, got "
                    f"{tuple(part.shape)} and {part.dtype} in {shard}"
                )
        self._starts = [sum(self.counts[:i]) for i in range(len(self.counts))]
        if self.manifest is not None and (found := differences(self.manifest, self.shards, mapped)):
            raise ValueError(f"{name}: {self.path} differs from its manifest: {'; '.join(found)}")

    @property
    def model(self) -> str | None:
        return None if self.manifest is None else self.manifest.get("model")

    @property
    def order(self) -> str | None:
        return None if self.manifest is None else self.manifest.get("order")

    def keys(self, column: str = "key") -> list[str] | None:
        """The rows' keys, from the metadata; None where it is not there or has no such column.

        Raises:
            ValueError: the metadata is not the one whose keys' order the manifest has.
        """
        if not metadata_files(self.path):
            return None
        parquet = _check.extra("pyarrow.parquet", "pyarrow", "tables")
        with self._parquet():
            if any(column not in parquet.read_schema(part).names for part in metadata_files(self.path)):
                return None
        found = [str(row[column]) for row in self.metadata([column])]
        if column == "key" and self.order is not None and keys.order(found) != self.order:
            raise ValueError(f"{self._name}: expected metadata of the order in {self.path / MANIFEST}, got another's")
        return found

    def __len__(self) -> int:
        return sum(self.counts)

    def __getitem__(self, rows: int | slice) -> Tensor:
        """A row (D,), or the rows (n, D) of a slice without a step, read into memory."""
        if isinstance(rows, slice):
            first, last, step = rows.indices(len(self))
            if step != 1:
                raise ValueError(f"rows: expected a slice without a step, got {rows}")
            parts = list(self.chunks(first=first, last=last))
            return torch.cat(parts) if parts else torch.empty(0, self.dims, dtype=self.dtype)
        row = rows + len(self) if rows < 0 else rows
        if not 0 <= row < len(self):
            raise IndexError(f"rows: expected a row of {len(self)}, got {rows}")
        return self[row : row + 1][0]

    def chunks(self, rows: int | None = None, *, first: int = 0, last: int | None = None) -> Iterator[Tensor]:
        """The rows from `first` to `last`, some at a time, in memory; never across two shards."""
        last = len(self) if last is None else min(last, len(self))
        step = rows or max(1, files.CHUNK // self.dims)
        i = max(0, bisect.bisect_right(self._starts, first) - 1)
        while first < last:
            start, end = self._starts[i], self._starts[i] + self.counts[i]
            while first < min(last, end):
                until = min(first + step, last, end)
                mapped = files.load_embeddings(self.shards[i], name=self._name)
                yield mapped[first - start : until - start].clone()
                first = until
            i += 1

    def metadata(self, columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
        """What the Parquet files say of each row, in the rows' order; read a group of rows at a time.

        Raises:
            ValueError: there is no metadata, or not one entry per row.
            ImportError: pyarrow is not installed.
        """
        parquet = _check.extra("pyarrow.parquet", "pyarrow", "tables")
        parts = metadata_files(self.path)
        with self._parquet():
            counts = [parquet.read_metadata(part).num_rows for part in parts]
        if sum(counts) != len(self):
            raise ValueError(f"{self._name}: expected metadata of {len(self)} rows for {self.path}, got {sum(counts)}")
        for part in parts:
            with self._parquet():
                for batch in parquet.ParquetFile(part).iter_batches(columns=columns):
                    yield from batch.to_pylist()

    @contextlib.contextmanager
    def _parquet(self) -> Iterator[None]:
        """Turns what pyarrow raises on damaged files into one line."""
        arrow = _check.extra("pyarrow", "pyarrow", "tables")
        try:
            yield
        except (arrow.ArrowException, OSError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"{self._name}: expected Parquet beside {self.path}, got {reason}") from None


def metadata_files(shards: Path) -> list[Path]:
    """The Parquet files that belong to a folder of shards, in natural order; none where there are none."""
    for folder in (*(shards.parent / name for name in METADATA.get(shards.name, ())), shards / "metadata"):
        found = [p for p in folder.glob("*.parquet") if not p.name.startswith(".")]
        if found:
            return sorted(found, key=lambda p: layout.natural(p.name))
    return []


def differences(found: Mapping[str, Any], shards: Sequence[str], mapped: Sequence[Tensor]) -> list[str]:
    """How shards differ from a manifest in what can be seen without reading them."""
    result = []
    known = {entry["name"]: entry for entry in found["shards"]}
    there = {Path(shard).name: part for shard, part in zip(shards, mapped, strict=True)}
    result += [f"{name} is missing" for name in known if name not in there]
    result += [f"{name} is not in it" for name in there if name not in known]
    sizes = {Path(shard).name: os.path.getsize(shard) for shard in shards}
    for name, part in there.items():
        if name in known and len(part) != known[name]["rows"]:
            result.append(f"{name}: expected {known[name]['rows']} rows, got {len(part)}")
        elif name in known and sizes[name] != known[name]["bytes"]:
            result.append(f"{name}: expected {known[name]['bytes']} bytes, got {sizes[name]}")
        if part.shape[1] != found["dims"]:
            result.append(f"{name}: expected D = {found['dims']}, got {part.shape[1]}")
        if (dtype := str(part.dtype).removeprefix("torch.")) != found["dtype"]:
            result.append(f"{name}: expected {found['dtype']}, got {dtype}")
    if not result and (rows := sum(map(len, there.values()))) != found["rows"]:
        result.append(f"expected {found['rows']} rows, got {rows}")
    return result


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


def write_manifest(folder: Path, entries: list[dict[str, Any]], dims: int, dtype: torch.dtype, **facts: Any) -> dict:
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


def write_folder(
    out: str | os.PathLike,
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
        suffix: ".npy" or ".safetensors".
        names: the rows' keys, each once, which are kept in Parquet files beside the shards; needs pyarrow.

    Raises:
        ValueError: the folder holds shards already, parts differ or there are none, or hold NaN or infinity; another
            number of names than rows, or one twice.
    """
    folder = files.folder(Path(out) / _check.choice("kind", kind, KINDS))
    if there := [p.name for p in folder.iterdir() if p.suffix in (".npy", ".safetensors")]:
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
