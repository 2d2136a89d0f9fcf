"""What stands beside embeddings: labels, class vectors and their names, captions' images; each with its rows' order.

`OUT/rows.json` names each file with its hash and the orders (`keys.order`) of its rows and of what its values point
into. A file whose rows are no longer there goes when the embeddings do.
"""

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from gapkern import files, layout
from gapkern.embeddings import keys
from gapkern.embeddings.folder import Embeddings
from gapkern.embeddings.manifests import manifest

NAME, FORMAT, VERSION = "rows.json", "gapkern.rows", 1
LABELS, CLASSES, CLASSNAMES, IMAGE_OF = "labels.npy", "classes.npy", "classnames.json", "image_of.npy"


def read(folder: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    """The entries of a folder's rows.json by file; none where there is none.

    Raises:
        ValueError: it is none of ours.
    """
    file = Path(folder) / NAME
    try:
        found = files.read_json(file, name="rows")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    entries = found.get("files") if isinstance(found, dict) else None
    known = isinstance(entries, dict) and all(map(_known, entries.values()))
    if not known or (found.get("format"), found.get("version")) != (FORMAT, VERSION):
        raise ValueError(f"rows: expected {FORMAT} of version {VERSION} in {file}")
    return dict(entries or {})


def _known(entry: Any) -> bool:
    names = entry.get("names") if isinstance(entry, dict) else 0
    named = names is None or (isinstance(names, list) and all(isinstance(name, str) for name in names))
    return named and all(isinstance(entry.get(key, ""), str | None) for key in ("sha256", "order", "of", "model"))


def of(path: str | os.PathLike[str], *, name: str = "path") -> dict[str, Any]:
    """What the rows.json beside a file says of it; nothing where none does.

    Raises:
        ValueError: the file is not the one that it names.
    """
    path = Path(path)
    entry = read(path.parent).get(path.name) if path.is_file() else None
    if entry is None:
        return {}
    if files.digest(path) != entry.get("sha256"):
        raise ValueError(
            f"{name}: expected {path} as {path.parent / NAME} has it, got another file: give your own another name"
        )
    return entry


@dataclass
class Settled:
    """What one run of `embed` has for the files beside its embeddings."""

    model: str
    images: bool = False
    texts: bool = False
    resume: bool = True
    labels: Sequence[int] | None = None
    classes: Sequence[str] | None = None
    image_of: Sequence[int] | None = None
    captioned: Sequence[str] | None = None
    classnames: Sequence[str] | None = None
    vectors: Tensor | None = None


def relabelled(out: Path, classnames: Sequence[str]) -> list[int] | None:
    """The class among `classnames` of each class that a folder's labels know; None where no labels know any.

    Raises:
        ValueError: they are of another set.
    """
    entry = read(out).get(LABELS, {})
    if not entry.get("names"):
        return None
    if entry["names"] == list(classnames):
        return list(range(len(classnames)))
    return keys.classes_of(entry["names"], list(classnames), empty=[])


def _labels(out: Path, classes: int) -> np.ndarray:
    """labels.npy as `settle` wrote it: numbers of classes."""
    found = files.load_array(out / LABELS, name="labels")
    if (
        found.ndim != 1
        or found.dtype.kind not in "iu"
        or (len(found) and not 0 <= found.min() <= found.max() < classes)
    ):
        raise ValueError(
            f"labels: expected a number of the {classes} classes for each row in {out / LABELS}, got "
            f"{found.dtype} {found.shape}"
        )
    return found


def settle(out: Path, now: Settled) -> None:
    """Writes the files beside the embeddings that `out` holds now, and removes those of rows or names before."""
    entries = {name: entry for name, entry in read(out).items() if (out / name).is_file()}
    orders = {kind: (manifest(out / kind) or {}).get("order") for kind in layout.KINDS}

    def put(name: str, values: Any, **facts: Any) -> None:
        files.write(out / name, lambda p: np.save(p, values))
        entries[name] = {"sha256": files.digest(out / name), **facts}

    def drop(name: str) -> None:
        entries.pop(name, None)
        (out / name).unlink(missing_ok=True)

    if now.images:
        drop(LABELS)
        if now.labels is not None:
            names = list(now.classes) if now.classes is not None else None
            put(LABELS, np.asarray(now.labels, dtype=np.int64), order=orders["img_emb"], names=names)
    elif now.classnames is not None and (to := relabelled(out, now.classnames)) is not None:
        before = entries[LABELS]
        labels = np.asarray(to, dtype=np.int64)[_labels(out, len(to))]
        put(LABELS, labels, order=before["order"], names=list(now.classnames))
    if now.vectors is not None and now.classnames is not None:
        names = list(now.classnames)
        facts = {"names": names, "model": now.model, "images": orders["img_emb"]}
        put(CLASSES, now.vectors.numpy(), order=keys.order(names), **facts)
    elif now.images or now.texts:
        of_labels = entries.get(LABELS, {}).get("names")
        kept = entries.get(CLASSES, {})
        former = now.images and (not now.resume or kept.get("images") not in (None, orders["img_emb"]))
        if former or kept.get("model") != now.model or of_labels not in (None, kept.get("names")):
            drop(CLASSES)
    names = entries.get(CLASSES, {}).get("names") or entries.get(LABELS, {}).get("names")
    if names:
        files.write_json(out / CLASSNAMES, names)
        entries[CLASSNAMES] = {"sha256": files.digest(out / CLASSNAMES), "order": keys.order(names)}
    else:
        drop(CLASSNAMES)
    if now.images or now.texts:
        _settle_captions(out, now, orders, entries, put, drop)
    if entries:
        files.write_json(out / NAME, {"format": FORMAT, "version": VERSION, "files": dict(sorted(entries.items()))})
    else:
        (out / NAME).unlink(missing_ok=True)


def _settle_captions(
    out: Path, now: Settled, orders: dict[str, Any], entries: dict[str, Any], put: Any, drop: Any
) -> None:
    if now.texts:
        drop(IMAGE_OF)
        if now.image_of is not None:
            of = keys.order(now.captioned) if now.captioned is not None else orders["img_emb"]
            put(IMAGE_OF, np.asarray(now.image_of, dtype=np.int64), order=orders["text_emb"], of=of)
        return
    before = entries.get(IMAGE_OF, {})
    if before and before.get("of") == orders["img_emb"]:
        return
    drop(IMAGE_OF)
    if before and (found := joined(out, orders["img_emb"])) is not None:
        rows, of = found
        put(IMAGE_OF, rows, order=orders["text_emb"], of=of)


def joined(out: Path, images_order: str | None) -> tuple[np.ndarray, str | None] | None:
    """(T,) int64: each text's row among the images of a folder, by key, and the images' order.

    Where they are not all there, the row among the texts' own images as they come; None where keys are unknown.
    """
    of = Embeddings(out, "text_emb").keys("image_key") if manifest(out / "text_emb") else None
    if of is None:
        return None
    distinct = list(dict.fromkeys(of))
    found: list[int | None] = list(range(len(distinct)))
    order: str | None = keys.order(distinct)
    images = Embeddings(out, "img_emb").keys()
    if images is not None:
        with contextlib.suppress(ValueError):
            rows = keys.rows_of(distinct, images, name="captions")
            if None not in rows:
                found, order = rows, images_order
    row = dict(zip(distinct, found, strict=True))
    return np.asarray([row[key] for key in of], dtype=np.int64), order
