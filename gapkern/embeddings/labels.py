"""One loader of labels for every verb: from any natural file, checked, and joined to the rows they are of."""

import csv
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gapkern import _formats, files, layout
from gapkern.embeddings import keys, sides
from gapkern.embeddings.folder import Embeddings
from gapkern.embeddings.provenance import described
from gapkern.prompts import read_json, read_lines

KINDS = {"images": "img_emb", "texts": "text_emb"}
KEYS = ("key", "image", "image_path", "file_name", "filename", "filepath", "path", "id")
VALUES = ("label", "labels", "class", "target", "cls", "answer")


@dataclass(frozen=True)
class Side:
    """Embeddings as an argument names them: how many rows, and whose.

    Attributes:
        path: a file or a folder, or None for what has no path.
        count: rows.
        name: the argument.
        kind: "img_emb" or "text_emb", where the folder may hold both.
    """

    path: str | None
    count: int
    name: str
    kind: str | None = None

    @property
    def order(self) -> str | None:
        return None if self.path is None else described(self.path, self.kind, name=self.name).get("order")

    def keys(self, column: str = "key") -> list[str] | None:
        if self.path is None:
            return None
        place = layout.place(self.path, self.kind, name=self.name)
        if not layout.is_folder(place) and not files.is_table(place):
            return None
        return Embeddings(self.path, self.kind, name=self.name).keys(column)


def load(
    text: str | None,
    rows: Side,
    count: int,
    what: str,
    *,
    name: str = "labels",
    names: Sequence[str] | None = None,
    to: Side | None = None,
    fewer: bool = False,
) -> Tensor | None:
    """What --labels says: (N,) int64, one of `count` for each row.

    Args:
        text: None; "paired"; a whole number n, of rows for each of `count` in order; or a file: `.npy`,
            `.npz[key]`, `.safetensors[key]` of integers; `.json` of a list, or of an object from rows' keys; `.csv`,
            `.tsv` or a table with a column of labels and one of keys; a table's file[column]; lines. Names stand for
            numbers where `names` has them.
        rows: what is labelled.
        count: what the labels choose from.
        what: what those are called in errors: "classes", "gallery rows".
        names: of what they choose from.
        to: what they choose from, where it has keys: "paired" and `image_of.npy` are checked against them.
        fewer: whether "paired" may leave some of those without a row.

    Raises:
        ValueError: no such file, another shape or number, no integers, out of range, of rows of another order.
    """
    if text is None:
        return None
    if text == "paired" or (text.isascii() and text.isdecimal()):
        return _in_order(text, rows, count, what, name, to, fewer)
    values, named = _read(text, name)
    if named is not None and _is_tables(text) and rows.keys() is None:
        named = None  # as they are stored
    found = _array(values, names, name) if named is None else _by_key(values, named, rows, names, name)
    if found.shape != (rows.count,):
        per = {"queries": "query"}.get(rows.name, rows.name.removesuffix("s"))
        raise ValueError(f"{name}: expected shape ({rows.count},), one per {per}, got {tuple(found.shape)}")
    facts = sides.of(text.partition("[")[0], name=name) if named is None else {}
    if facts:
        found = _ordered(found, text, facts, rows, name)
        if to is not None and facts.get("of") and to.order and facts["of"] != to.order:
            found = _rejoined(rows, to, name, text)
        if names is not None and facts.get("names") and list(names) != list(facts["names"]):
            of = keys.classes_of(facts["names"], list(names), argument=name)
            found = torch.tensor(of)[in_range(name, found, len(of), "classes")]
    return in_range(name, found, count, what)


def _is_tables(text: str) -> bool:
    return files.is_table(text) or layout.is_folder(text)


def made_from(text: str | None) -> dict[str, Any]:
    """What a result says of the labels that it was made from: the file's hash, or the word or number that was given."""
    if text is None:
        return {}
    file = layout.parted(text)[0]
    if layout.is_folder(text):
        shards = [layout.parted(shard)[0] for shard in files.shards(text, name="labels")]
        return {"labels": {"sha256": [files.digest(shard) for shard in shards]}}
    there = os.path.isfile(file) or (files.is_table(file) and os.path.isdir(file))
    return {"labels": {"sha256": [files.digest(file)]} if there else text}


def in_range(name: str, values: Tensor, count: int, what: str) -> Tensor:
    """Raises ValueError unless all values are in [0, count)."""
    wrong = ((values < 0) | (values >= count)).nonzero()
    if len(wrong):
        hint = "; they count from 0" if int(values.min()) == 1 and int(values.max()) == count else ""
        raise ValueError(
            f"{name}: expected values in [0, {count}), {what}, got {int(values[wrong[0]])} in row {int(wrong[0])}{hint}"
        )
    return values


def check_paired(first: Side, second: Side) -> None:
    """Raises ValueError where both sides' rows are known by name and row i of one is not row i of the other."""
    if first.order is None or second.order is None or first.order == second.order:
        return
    for images, texts in ((first, second), (second, first)):
        of = texts.keys("image_key")
        there = images.keys()
        if of is None or there is None:
            continue
        if of != there:
            at = next((i for i, (a, b) in enumerate(zip(of, there, strict=False)) if a != b), min(len(of), len(there)))
            got = f"{of[at]!r} beside {there[at]!r}" if at < min(len(of), len(there)) else f"{len(of)} and {len(there)}"
            raise ValueError(
                f"{texts.name}: expected row i to belong to row i of {images.name}, got {got} in row {at}: they are "
                "known by name and come in other orders"
            )
        return


def _in_order(text: str, rows: Side, count: int, what: str, name: str, to: Side | None, fewer: bool) -> Tensor:
    each = 1 if text == "paired" else int(text)
    if fewer and text == "paired" and rows.count < count:
        return torch.arange(rows.count)
    if not each or each * count != rows.count:
        per = "one of" if text == "paired" else f"{each} for each of"
        if rows.name == "texts" and to is not None:
            raise ValueError(f"{name}: expected {each} texts for each of {count} images, got {rows.count} texts")
        raise ValueError(f"{name}: expected {text}, {per} {count} {what}, got {rows.count} {rows.name}")
    found = torch.arange(count).repeat_interleave(each)
    if to is not None:
        of, there = rows.keys("image_key"), to.keys()
        if of is not None and there is not None:
            if [there[i] for i in found.tolist()] != of:
                raise ValueError(
                    f"{name}: expected {text!r} only where each of the {rows.name} belongs to the row of its number, "
                    f"got {rows.name} of other {to.name} by name: pass image_of.npy"
                )
        elif each == 1:
            check_paired(to, rows)
    return found


def _ordered(found: Tensor, text: str, facts: dict[str, Any], rows: Side, name: str) -> Tensor:
    """Labels in the order of the rows, where a file says whose they are."""
    mine = rows.order
    if facts.get("order") is None or mine is None or facts["order"] == mine:
        return found
    kind = "text_emb" if facts.get("of") else "img_emb"
    beside = Path(text.partition("[")[0]).parent
    there = Embeddings(beside, kind).keys() if layout.place(beside / kind).is_dir() else None
    wanted = rows.keys()
    if there is None or wanted is None or keys.order(there) != facts["order"] or not set(wanted) <= set(there):
        raise ValueError(
            f"{name}: expected labels of the rows of {rows.path}, got those of another order in {text} "
            "and no keys to join them by"
        )
    row = {key: i for i, key in enumerate(there)}
    return found[[row[key] for key in wanted]]


def _rejoined(rows: Side, to: Side, name: str, text: str) -> Tensor:
    """Each row's image among images of another order than a file was written for, by the images' names."""
    of, there = rows.keys("image_key"), to.keys()
    if of is None or there is None:
        raise ValueError(f"{name}: expected rows of {to.path}, got those of {to.name} in another order in {text}")
    distinct = list(dict.fromkeys(of))
    row = dict(zip(distinct, keys.rows_of(distinct, there, name=name), strict=True))
    if missing := [key for key, found in row.items() if found is None]:
        raise ValueError(f"{name}: expected all images of {rows.path} in {to.path}, got none of {missing[0]!r}")
    return torch.tensor([int(row[key] or 0) for key in of])


def _read(text: str, name: str) -> tuple[Any, list[str] | None]:
    """A file's values, and the keys of the rows they are of, where it has them."""
    path, _, key = text[:-1].rpartition("[") if text.endswith("]") else (text, "", "")
    suffix = os.path.splitext(path)[1].lower()
    if layout.is_folder(path) and files.is_table((shards := files.shards(path, name=name))[0]):
        return _table(shards, key, name)
    if not os.path.isfile(path) and not files.is_table(path):
        raise ValueError(f"{name}: cannot read {text}: expected a file, a number or 'paired'")
    if suffix in (".npy", ".safetensors"):
        return array(name, text), None
    if suffix == ".npz":
        return _npz(path, key, name), None
    if suffix == ".json":
        found = read_json(name, path)
        if isinstance(found, dict) and len(found) == 1 and isinstance(only := next(iter(found.values())), list):
            found = only
        if isinstance(found, dict):
            return list(found.values()), list(found)
        return found, None
    if suffix in (".csv", ".tsv"):
        return _csv(path, "\t" if suffix == ".tsv" else ",", name)
    if files.is_table(path):
        return _table([path], key, name)
    if suffix in (".txt", ".labels", ".cls", ""):
        return _numbers(read_lines(name, path)), None
    raise ValueError(
        f"{name}: expected .npy, .npz, .safetensors, .json, .csv, .tsv, .txt or a table such as .parquet, got {text}"
    )


def array(name: str, path: str) -> Tensor:
    """A tensor of any shape from `.npy`, or from `.safetensors`, as file[key] where it holds several.

    Raises:
        ValueError: no such file, or none of these.
    """
    text, _, key = path[:-1].rpartition("[") if path.endswith("]") else (path, "", "")
    if text.endswith(".safetensors"):
        return _formats.read_safetensors(Path(text), key or None, name)
    if not text.endswith(".npy"):
        raise ValueError(f"{name}: expected a .npy or .safetensors file, got {path}")
    found = files.load_array(text, name=name)
    if found.dtype.kind not in "iufcb":
        return _array(found.tolist(), None, name)
    found = found.astype(found.dtype.newbyteorder("="))
    if found.dtype.kind == "u" and found.size and int(found.max()) < 2**63:
        found = found.astype(np.int64)
    try:
        return torch.from_numpy(found)
    except TypeError:
        raise ValueError(f"{name}: expected numbers of at most 64 bits, got {found.dtype} in {path}") from None


def _npz(path: str, key: str, name: str) -> Tensor:
    try:
        with np.load(path, allow_pickle=False) as opened:
            there = list(opened.files)
            if (key and key not in there) or (not key and len(there) != 1):
                raise ValueError(f"expected one of {', '.join(there)} as file[key]")
            return torch.from_numpy(opened[key or there[0]])
    except Exception as error:  # zipfile and zlib have their own
        raise ValueError(f"{name}: expected a .npz file of integers, got {path}: {error}") from None


def _table(shards: Sequence[str], key: str, name: str) -> tuple[list[Any], list[str] | None]:
    path = shards[0]
    there = files.columns(path, name=name)
    value = key or next((column for column in VALUES if column in there), None)
    if value is None:
        raise ValueError(f"{name}: expected a column {' or '.join(VALUES[:4])} in {path}, got {', '.join(there)}")
    of = next((column for column in KEYS if column in there and column != value), None)
    found = [each for shard in shards for each in files.column(shard, value, name=name)]
    if of is None:
        return found, None
    return found, [str(each) for shard in shards for each in files.column(shard, of, name=name)]


def _csv(path: str, delimiter: str, name: str) -> tuple[list[Any], list[str] | None]:
    lines = read_lines(name, path)
    table = list(csv.reader(io.StringIO("\n".join(lines)), delimiter=delimiter))
    if not table:
        raise ValueError(f"{name}: expected a column of labels in {path}, got none")
    head = [cell.strip().lower() for cell in table[0]]
    value = next((head.index(column) for column in VALUES if column in head), None)
    if value is None:
        if len(head) != 1:
            raise ValueError(f"{name}: expected a column {' or '.join(VALUES[:4])} in {path}, got {', '.join(head)}")
        return _numbers([row[0] if row else "" for row in table]), None
    key = next((head.index(column) for column in KEYS if column in head), None)
    body = table[1:]
    if wrong := [i for i, row in enumerate(body) if len(row) != len(head)]:
        raise ValueError(f"{name}: expected {len(head)} columns in {path}, got {len(body[wrong[0]])} in row {wrong[0]}")
    return _numbers([row[value] for row in body]), None if key is None else [row[key] for row in body]


def _numbers(cells: Sequence[str]) -> list[Any]:
    """Cells as integers where all are."""
    texts = [cell.strip() for cell in cells]
    return [int(t) for t in texts] if all(t.lstrip("-").isdecimal() and t.isascii() for t in texts) else texts


def _by_key(values: Any, named: list[str], rows: Side, names: Sequence[str] | None, name: str) -> Tensor:
    found = _array(values, names, name)
    wanted = rows.keys()
    if wanted is None:
        raise ValueError(f"{name}: expected {rows.name} whose rows have keys, for labels by key, got rows as stored")
    keys.unique(name, named)
    of = keys.rows_of(named, wanted, name=name, what="row")
    row = {r: i for i, r in enumerate(of) if r is not None}
    if len(row) < sum(r is not None for r in of):
        raise ValueError(f"{name}: expected each row's label once, got two keys of one row")
    if missing := [key for i, key in enumerate(wanted) if i not in row]:
        raise ValueError(f"{name}: expected a label for each row, got none for {missing[0]!r} ({len(missing)} rows)")
    return found[[row[i] for i in range(len(wanted))]]


def _array(values: Any, names: Sequence[str] | None, name: str) -> Tensor:
    """Integers, or names of `names`, as int64."""
    if isinstance(values, Tensor):
        if values.dtype.is_floating_point or values.dtype.is_complex or values.dtype == torch.bool:
            raise ValueError(f"{name}: expected integers, got {values.dtype}")
        return values.to(torch.int64)
    if not isinstance(values, list) or not values:
        raise ValueError(f"{name}: expected integers, one for each row, got {type(values).__name__}")
    if all(isinstance(v, str) for v in values):
        if names is None:
            raise ValueError(f"{name}: expected integers, got strings such as {values[0]!r}")
        distinct = sorted(set(values))
        place = keys.places(list(names))
        of = {value: place(value) for value in distinct}
        if unknown := [value for value in distinct if of[value] is None]:
            raise ValueError(f"{name}: expected class names, got {unknown[0]!r}")
        return torch.tensor([of[value] for value in values])
    if wrong := [i for i, v in enumerate(values) if isinstance(v, bool) or not isinstance(v, int) or abs(v) >= 2**63]:
        raise ValueError(f"{name}: expected integers, got {values[wrong[0]]!r} in row {wrong[0]}")
    return torch.tensor(values, dtype=torch.int64)
