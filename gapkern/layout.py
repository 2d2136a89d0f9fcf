"""What a path to embeddings means, for every verb alike: a file, or the one set of shards in a folder.

A folder means, in this order: itself where it has a manifest; its `img_emb` or `text_emb`; the files that Hugging
Face's `datasets` saved there; its only family of files (names that are alike but for their numbers). What `embed`
writes beside embeddings is no shard. Tables count where there are no `.npy` and `.safetensors` files. Two possible
meanings are refused with both named, and a meaning that the path does not spell out is said: see `notes`.
`folder[column]` chooses in each of its tables, as `file[key]` does.
"""

import contextlib
import json
import os
import re
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from gapkern import _check, _formats

FORMAT, VERSION = "gapkern.embeddings", 1
MANIFEST, PROGRESS, SHIFTED = "manifest.json", ".progress", "shift.json"
KINDS = ("img_emb", "text_emb")
SIDES = ("classes.npy", "image_of.npy", "labels.npy")
SUFFIXES = (".npy", ".safetensors")
TABLES = (".parquet", ".arrow", ".feather")
LANCE = ".lance"  # a folder that is one table

_notes: ContextVar[list[str] | None] = ContextVar("notes", default=None)


@contextlib.contextmanager
def notes() -> Iterator[list[str]]:
    """Collects what is said within the block of choices that were made and of things left aside.

    Example:
        >>> with notes() as said:
        ...     note("images: out/img_emb")
        >>> said
        ['images: out/img_emb']
    """
    said: list[str] = []
    token = _notes.set(said)
    try:
        yield said
    finally:
        _notes.reset(token)


def note(text: str) -> None:
    """Says something once to the caller that collects `notes`."""
    said = _notes.get()
    if said is not None and text not in said:
        said.append(text)


def natural(name: str) -> list[tuple[bool, int, str]]:
    """A key that sorts numbers within names by their value.

    Example:
        >>> sorted(["x_10", "x_2"], key=natural)
        ['x_2', 'x_10']
    """
    return [(not t.isdecimal(), int(t) if t.isdecimal() else 0, t) for t in re.split(r"(\d+)", name)]


def parted(path: str | os.PathLike[str]) -> tuple[str, str | None]:
    """The file or folder of `file[key]`, and the key; None where there is none.

    Example:
        >>> parted("x.npy[0]"), parted("x.npy")
        (('x.npy', '0'), ('x.npy', None))
    """
    text = os.fspath(path)
    if not text.endswith("]") or "[" not in text or os.path.isdir(text):
        return text, None
    file, _, key = text[:-1].rpartition("[")
    return file, key


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Whether a path, or what is before its [key], is a folder of shards: Lance's are tables."""
    file, _ = parted(path)
    return os.path.isdir(file) and not file.rstrip("/").endswith(LANCE)


def place(path: str | os.PathLike[str], kind: str | None = None, *, name: str = "path") -> Path:
    """The file or the folder of shards that `path` means.

    Raises:
        ValueError: a folder that means two things, or is not what `kind` says; an embed run that has not ended.
    """
    if kind is not None:
        _check.choice("kind", kind, KINDS)
    file, key = parted(path)
    if not is_folder(path):
        return Path(path)
    path = Path(file)
    if key is not None:
        return Path(f"{place(path, kind, name=name)}[{key}]")
    path = _saved(path, name)
    if _is_shards(path):
        return path
    inside = [k for k in KINDS if _holds(path / k)]
    beside = _families(path, name)
    if kind in inside or (kind is None and len(inside) == 1 and not beside):
        chosen = kind or inside[0]
        aside = [p.name for k, files in beside.items() for p in files]
        note(f"{name}: {path / chosen}" + (f"; left aside: {', '.join(sorted(aside))}" if aside else ""))
        return _finished(path / chosen, name)
    if inside:
        if kind is not None:
            raise ValueError(f"{name}: expected {kind} in {path}, got {' and '.join(inside)}")
        raise ValueError(
            f"{name}: expected {' or '.join(KINDS)} in {path}, got {' and '.join([*inside, *beside])}: "
            f"name one, such as {path / inside[0]}"
        )
    return _finished(path, name)


def shards(path: str | os.PathLike[str], *, name: str = "path") -> list[str]:
    """The files that hold what `path` means, in natural order (2 before 10); `path` itself where it is a file.

    Raises:
        ValueError: see `place`; no `.npy` or `.safetensors` files, both, files of several families, a number twice.
    """
    text, chosen = parted(place(path, name=name))
    found = Path(text)
    if not is_folder(found):
        return [os.fspath(path)]
    tail = "" if chosen is None else f"[{chosen}]"
    if (listed := _listed(found, name)) is not None:
        return [f"{file}{tail}" for file in listed]
    there = _files(found)
    kinds = {p.suffix for p in there}
    if len(kinds) != 1:
        got = " and ".join(sorted(kinds)) or "neither, nor tables"
        raise ValueError(f"{name}: expected .npy or .safetensors files in the folder {found}, got {got}")
    if not _is_shards(found):
        families = _families(found, name)
        if len(families) > 1:
            counted = ", ".join(f"{family} ({len(files)})" for family, files in families.items())
            raise ValueError(
                f"{name}: expected the shards of one matrix in {found}, got {counted}: name a file, or "
                "give each a folder"
            )
        own = next(iter(families.values()), None)
        if own is None:
            own = [p for p in there if p.name == "classes.npy"]
            if not own:
                raise ValueError(f"{name}: expected embeddings in the folder {found}, got {_names(there)}")
        if len(own) < len(there) or own[0].name in SIDES:
            aside = _names([p for p in there if p not in own])
            note(f"{name}: {_names(own)} in {found}" + (f"; left aside: {aside}" if aside else ""))
        there = own
    numbers: dict[tuple[str, ...], Path] = {}
    for file in there:
        key = tuple(str(int(t)) if t.isdecimal() else t for t in re.split(r"(\d+)", file.name))
        if (other := numbers.setdefault(key, file)) != file:
            raise ValueError(f"{name}: expected each shard once in {found}, got {other.name} and {file.name}")
    return [f"{p}{tail}" for p in there]


def is_shard(name: str) -> bool:
    """Whether a name that a file tells is that of a shard beside it, and leads nowhere else.

    Example:
        >>> is_shard("img_emb_0.npy"), is_shard("../img_emb_0.npy"), is_shard(".npy")
        (True, False, False)
    """
    return Path(name).name == name and Path(name).suffix in (*SUFFIXES, ".parquet") and not name.startswith(".")


def _is_shards(folder: Path) -> bool:
    """Whether the folder has a manifest of shards; of which it then holds nothing else."""
    return _told(folder / MANIFEST).get("format") == FORMAT


def _finished(folder: Path, name: str) -> Path:
    begun = "embed" if (folder / PROGRESS).is_dir() else "shift apply" if (folder / SHIFTED).exists() else None
    if begun and not (folder / MANIFEST).exists():
        raise ValueError(f"{name}: expected a finished folder, got {folder}, whose {begun} has not ended: run it again")
    return folder


def _holds(folder: Path) -> bool:
    return folder.is_dir() and ((folder / PROGRESS).is_dir() or (folder / MANIFEST).exists() or bool(_files(folder)))


def _files(folder: Path) -> list[Path]:
    """The matrices in a folder, in natural order; where there are none, its tables."""
    there = [p for p in folder.iterdir() if not p.name.startswith(".") and p.is_file()]
    found = [p for p in there if p.suffix in SUFFIXES] or [p for p in there if p.suffix in TABLES]
    return sorted(found, key=lambda p: natural(p.name))


def _saved(folder: Path, name: str) -> Path:
    """The only split that `datasets` saved in a folder; the folder itself where there are no splits."""
    splits: Any = _told(folder / "dataset_dict.json").get("splits")
    if not isinstance(splits, list) or not all(isinstance(split, str) for split in splits):
        return folder
    inside: list[str] = [split for split in splits if (folder / split).is_dir()]
    if len(inside) != 1:
        got = ", ".join(inside) or "none"
        hint = f": name one, such as {folder / inside[0]}" if inside else ""
        raise ValueError(f"{name}: expected one split in {folder}, got {got}{hint}")
    note(f"{name}: {folder / inside[0]}")
    return folder / inside[0]


def _listed(folder: Path, name: str) -> list[Path] | None:
    """The files that `datasets` lists in a folder's state; None where it has none."""
    entries = _told(folder / "state.json").get("_data_files")
    if not isinstance(entries, list):
        return None
    names = [entry.get("filename") if isinstance(entry, dict) else None for entry in entries]
    if not names or not all(isinstance(n, str) and Path(n).name == n and Path(n).suffix in TABLES for n in names):
        raise ValueError(f"{name}: expected the names of Arrow's files in {folder / 'state.json'}, got {names[:3]}")
    return [folder / str(n) for n in names]


def _told(file: Path) -> dict[str, Any]:
    """What a JSON file says; nothing where there is none."""
    try:
        found = json.loads(_formats.text(file, name="path"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _families(folder: Path, name: str) -> dict[str, list[Path]]:
    """The folder's files by what their names share, but for those that `embed` writes beside embeddings."""
    found: dict[str, list[Path]] = {}
    for file in _files(folder):
        if file.name not in SIDES:
            found.setdefault(re.sub(r"\d+", "*", file.name), []).append(file)
    return found


def _names(files: list[Path]) -> str:
    names = [p.name for p in files]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
