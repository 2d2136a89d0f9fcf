"""Embeddings that a shift has moved: what they were made from, what was done to them, and what of it is still so.

`OUT/shift.json` notes the shift and, shard by shard, the hashes of the source and of the result: a shard is finished
where both are so. The manifest is written last and has the source's model, order and transforms, and this one. A single
file has the same beside it, `OUT.npy.json`.
"""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gapkern import files, layout
from gapkern.embeddings.folder import metadata_files
from gapkern.embeddings.manifests import write_manifest
from gapkern.embeddings.provenance import described
from gapkern.gap import transforms
from gapkern.gap.transforms import Transform

NOTE = layout.SHIFTED


def check_unmoved(path: str | os.PathLike[str], *, name: str = "embeddings") -> None:
    """Raises ValueError where a shift has moved embeddings already."""
    if moved := described(path, name=name).get("transforms"):
        told = ", ".join(map(_told, moved))
        raise ValueError(f"{name}: expected embeddings that no shift has moved, got {path}, moved by {told}")


def _told(entry: dict[str, Any]) -> str:
    if entry.get("name") == "projection":
        return f"projection of {entry.get('components')} components"
    return f"{entry.get('name')} of alpha {entry.get('alpha')}"


def transform(shift: Transform, side: str) -> dict[str, Any]:
    """What a manifest says of a shift or a projection that moved one side."""
    return {**transforms.facts(shift), "side": side}


class Target:
    """What a file's or a folder's shards are moved to.

    Args:
        source: a file or a folder of shards.
        out: a file for a file, a folder for a folder; what is there of the same shift and source is kept.
        facts: from `transform`.
        model: of the embeddings.

    Attributes:
        pairs: each shard and where it goes; None for one that is finished.

    Raises:
        ValueError: `out` is the source, or holds another shift's or other files; a shift has moved the source already.
    """

    def __init__(
        self, source: str | os.PathLike[str], out: str | os.PathLike[str], facts: dict[str, Any], model: str | None
    ):
        check_unmoved(source)
        self.out, self.facts, self.model = Path(out), facts, model
        self.told = described(source, name="embeddings")
        place = layout.place(source, name="embeddings")
        self.source = Path(layout.parted(place)[0])
        self.folder = layout.is_folder(self.source)
        given = files.shards(place, name="embeddings")
        shards = [Path(layout.parted(shard)[0]) for shard in given]
        self.known: dict[str, dict[str, str]] = {}
        if not self.folder:
            if _same(self.out, shards[0]):
                raise ValueError(f"out: expected another file than that of the embeddings, got {self.out}")
            self.pairs: list[tuple[str, Path | None]] = [(given[0], self.out)]
            return
        self.out = files.folder(self.out)
        if _same(self.out, self.source) or _same(self.out, Path(layout.parted(source)[0])):
            raise ValueError(f"out: expected another folder than that of the embeddings, got {self.out}")
        goals = [self._goal(shard) for shard in shards]
        self._take_up({goal.name for goal in goals})
        self.pairs = [
            (text, None if self._finished(shard, goal) else goal)
            for text, shard, goal in zip(given, shards, goals, strict=True)
        ]
        if any(target for _, target in self.pairs):
            (self.out / layout.MANIFEST).unlink(missing_ok=True)

    def _goal(self, shard: str | Path) -> Path:
        """Where a shard goes; a table of another format becomes Parquet."""
        file = Path(layout.parted(shard)[0])
        return self.out / (file.name if layout.is_shard(file.name) else f"{file.stem}.parquet")

    def _take_up(self, names: set[str]) -> None:
        """Reads the note of a run before; removes its shards that the source no longer has."""
        note, other = self.out / NOTE, f"out: expected an empty folder or one of the same shift, got {self.out}, which"
        if note.exists():
            told = files.read_json(note, name="out")
            self.known = told.pop("shards", {}) if isinstance(told, dict) else {}
            if told != self.facts or not isinstance(self.known, dict):
                raise ValueError(f"{other} holds another's")
            if odd := [name for name in self.known if not layout.is_shard(name)]:
                raise ValueError(f"out: expected the names of shards in {note}, got {odd[0]!r}")
        ours = {NOTE, layout.MANIFEST, "metadata", *self.known, *(names if note.exists() else ())}
        if foreign := sorted(p.name for p in self.out.iterdir() if p.name not in ours and not p.name.startswith(".")):
            raise ValueError(f"{other} holds other files ({foreign[0]})")
        stale = [name for name in self.known if name not in names]
        if stale:
            (self.out / layout.MANIFEST).unlink(missing_ok=True)
        for name in stale:
            (self.out / name).unlink(missing_ok=True)
            del self.known[name]
        self._write_note()

    def _write_note(self) -> None:
        files.write_json(self.out / NOTE, {**self.facts, "shards": self.known})

    def _finished(self, shard: Path, target: Path) -> bool:
        known = self.known.get(target.name, {})
        return target.exists() and known == {"source": files.digest(shard), "sha256": files.digest(target)}

    def done(self, source: str, target: Path) -> None:
        """Notes that a shard has been moved."""
        if self.folder:
            origin = files.digest(layout.parted(source)[0])
            self.known[target.name] = {"source": origin, "sha256": files.digest(target)}
            self._write_note()

    def finish(self) -> dict[str, Any]:
        """Writes what the result was made from; returns it."""
        facts = {
            "kind": self.told.get("kind") or (self.source.name if self.source.name in layout.KINDS else None),
            "model": self.model,
            "order": self.told.get("order"),
            "transforms": [*(self.told.get("transforms") or []), self.facts],
        }
        if not self.folder:
            source = self.pairs[0][0]
            return self._describe(facts | {"made_from": [files.digest(layout.parted(source)[0])]})
        entries: list[dict[str, Any]] = []
        for source, _ in self.pairs:
            target = self._goal(source)
            rows = files.size(self._written(target.name), name="out")[0]
            entries.append(
                {
                    "name": target.name,
                    "rows": rows,
                    "bytes": target.stat().st_size,
                    "sha256": self.known[target.name]["sha256"],
                }
            )
        self._copy(metadata_files(self.source))
        first = files.open_matrix(self._written(entries[0]["name"]), name="out")
        made_from = [self.known[entry["name"]]["source"] for entry in entries]
        return write_manifest(self.out, entries, first.dims, first.dtype, **facts, made_from=made_from)

    def _written(self, name: str | None = None) -> str:
        """A file of the result as a path that is read: Parquet keeps the column that was chosen."""
        file = self.out if name is None else self.out / name
        key = layout.parted(self.pairs[0][0])[1]
        return f"{file}[{key}]" if key and file.suffix == ".parquet" and files.is_table(self.pairs[0][0]) else str(file)

    def _describe(self, facts: dict[str, Any]) -> dict[str, Any]:
        x = files.open_matrix(self._written(), name="out")
        told = {
            "format": layout.FORMAT,
            "version": layout.VERSION,
            **facts,
            "rows": x.rows,
            "dims": x.dims,
            "dtype": str(x.dtype).removeprefix("torch."),
            "bytes": self.out.stat().st_size,
            "sha256": files.digest(self.out),
        }
        files.write_json(f"{self.out}.json", told)
        return told

    def _copy(self, metadata: Sequence[Path]) -> None:
        beside = self.out / "metadata"
        shutil.rmtree(beside, ignore_errors=True)
        if metadata:
            files.folder(beside)
        for part in metadata:
            with files.replacing(beside / part.name) as temporary:
                shutil.copyfile(part, temporary)


def _same(a: Path, b: Path) -> bool:
    return a.exists() and b.exists() and a.samefile(b)
