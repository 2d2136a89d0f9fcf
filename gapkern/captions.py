"""Files of captions: COCO's, Karpathy's `dataset_*.json`, open_clip's tables, and plain JSON of images and captions."""

import csv
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gapkern.prompts import check_text, read_json, read_text

FILES = ("image", "file_name", "filename", "image_path", "file", "filepath", "image_name")
TEXTS = ("captions", "caption", "text", "texts", "title")
TABLES = (".csv", ".tsv")


@dataclass(frozen=True)
class Captions:
    """Captions and their images by name.

    Attributes:
        images: the files of images that have captions.
        texts: image by image.
        image_of: each text's image, an index into `images`.
        keys: each text's id.
    """

    images: list[str]
    texts: list[str]
    image_of: list[int]
    keys: list[str]


def read(path: str | os.PathLike[str], split: str = "test", *, name: str = "annotation_file") -> Captions:
    """Reads captions.

    Args:
        path: JSON of one of these: COCO's captions (`images` with id and file_name, `annotations` with image_id and
            caption), whose images come in the order of their ids; Karpathy's (`images` with filename, split and
            sentences), of which a split is taken; `{file: caption or captions}`; a list of `{image, caption}`. Or
            `.csv`, `.tsv`: columns of images and of captions, as open_clip's `filepath` and `title`, between tabs or
            commas.
        split: of Karpathy's file; "train" takes "restval" too.

    Raises:
        ValueError: not such a file, no captions, an image that is not there or there twice, a caption that is no text.
    """
    if os.fspath(path).lower().endswith(TABLES):
        return _captions(_table(path, name), path, name)
    found = read_json(name, path)
    expected = f"{name}: expected COCO's captions (images: id, file_name; annotations: image_id, caption), got {path}"
    try:
        if isinstance(found, dict) and isinstance(found.get("images"), list):
            karpathy = any(isinstance(entry, dict) and "sentences" in entry for entry in found["images"])
            pairs = _karpathy(found["images"], split, path, name) if karpathy else _coco(found)
        elif isinstance(found, dict) and found and not {"images", "annotations"} & found.keys():
            pairs = [(file, [(None, text) for text in _many(texts)]) for file, texts in found.items()]
        elif isinstance(found, list) and found:
            pairs = _listed(found)
        else:
            raise KeyError("images")
    except (KeyError, TypeError) as error:
        raise ValueError(f"{expected}: {type(error).__name__} {error}") from None
    except _Contradiction as error:
        raise ValueError(f"{name}: {error} in {path}") from None
    return _captions(pairs, path, name)


class _Contradiction(Exception):
    pass


Pairs = list[tuple[str, list[tuple[Any, Any]]]]


def _captions(pairs: Pairs, path: str | os.PathLike[str], name: str) -> Captions:
    pairs = [(file, texts) for file, texts in pairs if texts]
    if not pairs:
        raise ValueError(f"{name}: expected at least one caption, got none in {path}")
    texts, image_of, keys = [], [], []
    for i, (file, told) in enumerate(pairs):
        for n, (key, text) in enumerate(told):
            texts.append(check_text(name, text, f"the caption of {file!r}"))
            image_of.append(i)
            keys.append(f"{file}#{n}" if key is None else str(key))
    if len(set(keys)) < len(keys):
        keys = [f"{pairs[i][0]}#{n}" for n, i in enumerate(image_of)]
    return Captions([file for file, _ in pairs], texts, image_of, keys)


def _many(texts: Any) -> Sequence[Any]:
    return texts if isinstance(texts, list) else [texts]


def _coco(found: dict[str, Any]) -> Pairs:
    names: dict[Any, str] = {}
    for entry in found["images"]:
        key, file = _id(entry["id"]), _file(entry["file_name"])
        if names.setdefault(key, file) != file:
            raise _Contradiction(f"expected each image's id once, got {key} for {names[key]} and {file}")
    texts: dict[Any, list[tuple[Any, Any]]] = {key: [] for key in sorted(names, key=lambda k: (isinstance(k, str), k))}
    for i, entry in enumerate(found["annotations"]):
        if (key := _id(entry["image_id"])) not in texts:
            raise _Contradiction(f"expected captions of the images that it has, got image_id {key} in annotation {i}")
        texts[key].append((entry.get("id"), entry["caption"]))
    merged: dict[str, list[tuple[Any, Any]]] = {}
    for key, told in texts.items():
        merged.setdefault(names[key], []).extend(told)
    return list(merged.items())


def _karpathy(images: list[Any], split: str, path: Any, name: str) -> Pairs:
    there = sorted({str(entry["split"]) for entry in images if "split" in entry})
    wanted = ("train", "restval") if split == "train" else (split,)
    if there and not set(wanted) & set(there):
        raise _Contradiction(f"expected the split {split!r}, got {', '.join(there)}")
    pairs: Pairs = []
    for entry in images:
        if "split" in entry and entry["split"] not in wanted:
            continue
        folder = _file(entry["filepath"]) + "/" if entry.get("filepath") else ""
        told = [(sentence.get("sentid"), sentence["raw"]) for sentence in entry["sentences"]]
        pairs.append((folder + _file(entry["filename"]), told))
    return pairs


def _listed(found: list[Any]) -> Pairs:
    merged: dict[str, list[tuple[Any, Any]]] = {}
    for entry in found:
        file, told = (next((entry[key] for key in names if key in entry), None) for names in (FILES, TEXTS))
        if file is None or told is None:
            raise KeyError("image" if file is None else "caption")
        merged.setdefault(_file(file), []).extend((None, text) for text in _many(told))
    return list(merged.items())


def _table(path: str | os.PathLike[str], name: str) -> Pairs:
    text = read_text(name, path)
    delimiter = "\t" if "\t" in text.partition("\n")[0] else ","
    try:
        rows = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True) if row]
    except csv.Error as error:
        raise ValueError(f"{name}: expected a table of images and captions in {path}, got {error}") from None
    head = [cell.strip().lower() for cell in rows[0]] if rows else []
    places = [next((head.index(column) for column in names if column in head), None) for names in (FILES, TEXTS)]
    file, told = places
    if file is None or told is None:
        raise ValueError(
            f"{name}: expected columns of images ({', '.join(FILES)}) and of captions ({', '.join(TEXTS)}) in {path}, "
            f"got {', '.join(map(repr, head[:5])) or 'none'}"
        )
    for i, row in enumerate(rows[1:]):
        if len(row) != len(head) or not row[file]:
            got = f"{len(row)}" if len(row) != len(head) else "no image"
            raise ValueError(f"{name}: expected {len(head)} columns in {path}, got {got} in row {i}")
    merged: dict[str, list[tuple[Any, Any]]] = {}
    for row in rows[1:]:
        merged.setdefault(row[file], []).append((None, row[told]))
    return list(merged.items())


def _id(value: Any) -> Any:
    """Ids are numbers, written as such or as text; or names."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise TypeError(f"an image's id of {value!r}")
    text = str(value)
    return int(text) if text.isascii() and text.isdecimal() else text


def _file(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise TypeError(f"an image's file of {value!r}")
    return value
