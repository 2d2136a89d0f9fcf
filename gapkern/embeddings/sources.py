"""What is embedded: images of a folder, of webdataset tars or of a data set; texts of a file or of captions.

Every row has a key: an image's name below its folder or tar, a caption's id, a line's number. Images are opened when
they are asked for, by any process.
"""

import functools
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gapkern import layout
from gapkern.captions import TABLES
from gapkern.captions import read as read_captions
from gapkern.embeddings import keys, pictures, tars
from gapkern.prompts import check_text, read_json, read_lines


@dataclass(frozen=True)
class Images:
    """Images and what is known of each: `read(i)` is the i-th as PIL has it, `names[i]` says which it is.

    Attributes:
        read: sent to workers, so a function of a module or an object that pickles.
        names: the rows' keys, each once.
        content: `content(i)` are the bytes of the i-th; None where images are no files.
        identity: what says which images these are where there are no bytes to compare.
        labels: each image's class, an index into `classes`; or None.
        captions: each image's caption; or None.
        empty: classes that have no images and no place in `classes`.
    """

    read: Callable[[int], Any]
    names: Sequence[str]
    content: Callable[[int], bytes] | None = None
    identity: str = ""
    labels: Sequence[int] | None = None
    classes: Sequence[str] | None = None
    captions: Sequence[str] | None = None
    empty: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.names)

    @property
    def keys(self) -> Sequence[str]:
        return self.names

    def signature(self, i: int) -> str:
        """What changes with the i-th image: the hash of its bytes; "unreadable" where they cannot be read."""
        if self.content is None:
            return self.identity
        try:
            return hashlib.sha256(self.content(i)).hexdigest()
        except ValueError:
            return "unreadable"

    def signed(self, i: int) -> tuple[str, Any]:
        """The i-th image's signature, and the image; its bytes are read once.

        Raises:
            ValueError: it cannot be read; the message names it.
        """
        if self.content is None:
            return self.identity, self.read(i)
        content = self.content(i)
        signature = hashlib.sha256(content).hexdigest()
        try:
            return signature, pictures.decode(content, self.names[i])
        except pictures.Undecoded as error:
            error.signature = signature
            raise

    def fingerprint_of(self, rows: Sequence[int], signatures: Iterable[str] | None = None) -> str:
        """Changes with the names and the bytes of some rows, and with their order."""
        signatures = map(self.signature, rows) if signatures is None else signatures
        return keys.order([*signatures, *(self.names[i] for i in rows)])

    @property
    def fingerprint(self) -> str:
        """`fingerprint_of` all rows."""
        return self.fingerprint_of(range(len(self)))

    def columns(self, rows: Sequence[int]) -> dict[str, list[Any]]:
        """The metadata of some images, as clip-retrieval names it, and their keys."""
        found: dict[str, list[Any]] = {"key": [self.names[i] for i in rows]}
        found["image_path"] = found["key"]
        if self.captions is not None:
            found["caption"] = [self.captions[i] for i in rows]
        if self.labels is not None:
            found["label"] = [self.labels[i] for i in rows]
        return found

    def fits(self, classnames: Any) -> bool:
        """Whether names can be those of the images' classes."""
        try:
            with layout.notes():
                return self.classes is not None and bool(keys.classes_of(self.classes, classnames, empty=self.empty))
        except ValueError:
            return False

    def named(self, classnames: Any) -> tuple["Images", list[str] | None]:
        """These images with labels into `classnames`, and the names in that order: see `keys.classes_of`.

        Raises:
            ValueError: names of another set; labels beyond them.
        """
        names = list(classnames.values()) if isinstance(classnames, dict) else list(classnames)
        if self.labels is None:
            return self, names
        if self.classes is None:
            if isinstance(classnames, dict):
                raise ValueError("classnames: expected a list for images whose classes are numbers, got a mapping")
            if (most := max(self.labels)) >= len(names):
                raise ValueError(f"classnames: expected at least {most + 1}, as the images' labels, got {len(names)}")
            return replace(self, classes=names), names
        of = keys.classes_of(self.classes, classnames, empty=self.empty)
        return replace(self, labels=[of[label] for label in self.labels], classes=names, empty=()), names


@dataclass(frozen=True)
class Texts:
    """Texts and their keys; `image_of[t]` is the image of text t, an index into the names `images`, or None."""

    texts: Sequence[str]
    image_of: Sequence[int] | None = None
    images: Sequence[str] | None = None
    ids: Sequence[str] | None = None

    def __len__(self) -> int:
        return len(self.texts)

    @functools.cached_property
    def keys(self) -> Sequence[str]:
        return self.ids if self.ids is not None else [str(i) for i in range(len(self.texts))]

    def fingerprint_of(self, rows: Sequence[int]) -> str:
        """Changes with some texts, their keys and their order."""
        return keys.order([*(self.texts[i] for i in rows), *(self.keys[i] for i in rows)])

    @property
    def fingerprint(self) -> str:
        """`fingerprint_of` all texts."""
        return self.fingerprint_of(range(len(self)))

    def columns(self, rows: Sequence[int]) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {"key": [self.keys[i] for i in rows], "caption": [self.texts[i] for i in rows]}
        if self.image_of is not None:
            found["image"] = [self.image_of[i] for i in rows]
            if self.images is not None:
                found["image_key"] = [self.images[self.image_of[i]] for i in rows]
        return found

    def joined(self, names: Sequence[str], *, skip: bool = False) -> "Texts":
        """These texts with `image_of` into the images `names`, which are found by name.

        Args:
            skip: leave out texts whose image is not among them.

        Raises:
            ValueError: a text's image is not among them, or fits two; no text's is.
        """
        if self.images is None or self.image_of is None:
            return self
        rows = keys.rows_of(self.images, names, name="captions")
        missing = [file for file, row in zip(self.images, rows, strict=True) if row is None]
        if missing and (not skip or len(missing) == len(rows)):
            raise ValueError(
                f"captions: expected an image for each caption, got none of the name {missing[0]!r} "
                f"({len(missing)} of {len(rows)} images are not among the {len(names)})"
            )
        kept = [t for t, i in enumerate(self.image_of) if rows[i] is not None]
        if missing:
            layout.note(f"captions: {len(self) - len(kept)} of {len(missing)} images that are not there left out")
        image_of = [int(rows[self.image_of[t]] or 0) for t in kept]
        return Texts([self.texts[t] for t in kept], image_of, names, [self.keys[t] for t in kept])


def images(source: Any) -> Images:
    """Images of a folder (searched through) and of the tars in it; of a `.tar`; of a list of tars.

    Where all images of a folder lie in subfolders, the first subfolder is the image's class, as in ImageFolder. Other
    files are counted by suffix in a note.

    Raises:
        ValueError: no images are there, or a tar cannot be read to its end.
    """
    if isinstance(source, Images):
        return source
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        if path.is_dir():
            return _folder(path)
        source = [path]
    paths = [Path(part) for part in source]
    if folders := [path for path in paths if path.is_dir()]:
        raise ValueError(f"images: expected one folder, or tars, got {len(paths)} sources with the folder {folders[0]}")
    return _tars(paths, tars.index(paths))


def texts(source: Any, split: str = "test") -> Texts:
    """Texts of a file, one per line; of captions in JSON, `.csv` or `.tsv` (`gapkern.captions`); a list of strings.

    Raises:
        ValueError: no such file, or no text in it.
    """
    if isinstance(source, Texts):
        return source
    if not isinstance(source, str | os.PathLike):
        found = Texts(list(source))
        if wrong := [i for i, text in enumerate(found.texts) if not isinstance(text, str)]:
            raise TypeError(f"texts: expected strings, got {type(found.texts[wrong[0]]).__name__} in row {wrong[0]}")
    elif os.fspath(source).lower().endswith(TABLES):
        return captions(source, split)
    elif os.fspath(source).endswith(".json"):
        told = read_json("texts", source)
        if not (isinstance(told, list) and told and all(isinstance(text, str) for text in told)):
            return captions(source, split)
        found = Texts(told)
    else:
        found = Texts(read_lines("texts", source))
    if not len(found):
        raise ValueError(f"texts: expected at least one, got none in {source}")
    for i, text in enumerate(found.texts):
        check_text("texts", text, f"row {i}")
    return found


def captions(annotation_file: str | os.PathLike[str], split: str = "test") -> Texts:
    """Captions, image by image, and each one's image among those with captions: see `gapkern.captions`."""
    found = read_captions(annotation_file, split)
    return Texts(found.texts, found.image_of, found.images, found.keys)


def _folder(path: Path) -> Images:
    names, others, folders = pictures.walk(path)
    archives = [name for name in others if name.lower().endswith(".tar")]
    counts = Counter(os.path.splitext(name)[1].lower() or "no suffix" for name in others if name not in archives)
    if not names and not archives:
        kinds = ", ".join(pictures.SUFFIXES)
        got = f"{len(others)} other files" + (f" ({_counted(counts)})" if counts else "")
        raise ValueError(f"images: expected files ending in {kinds}, or .tar, in {path}, got {got}")
    if counts:
        layout.note(f"images: left aside in {path}: {_counted(counts)}")
    in_tars = None
    if archives:
        paths = [path / name for name in archives]
        index = tars.index(paths)
        if names and not index.samples:
            layout.note(f"images: left aside in {path}: {len(archives)} .tar without images, such as {archives[0]}")
        else:
            in_tars = _tars(paths, index)
    if not names and in_tars is not None:
        return in_tars
    labels = classes = None
    empty: Sequence[str] = ()
    if all("/" in name for name in names) and in_tars is None:
        classes = sorted({name.split("/")[0] for name in names})
        of = {name: i for i, name in enumerate(classes)}
        labels = [of[name.split("/")[0]] for name in names]
        classes = [pictures.text(name) for name in classes]
        empty = [name for name in folders if name not in of]
        if empty:
            layout.note(f"images: folders without images are no classes: {', '.join(empty[:5])}")
    content: Any = pictures.Files(path, names)
    names = [pictures.text(name) for name in names]
    if in_tars is not None and in_tars.content is not None:
        layout.note(f"images: {len(names)} files and {len(in_tars)} images in {len(archives)} tars of {path}")
        content = pictures.Joined([content, in_tars.content], [len(names), len(in_tars)])
        names = [*names, *in_tars.names]
    keys.unique("images", names)
    return Images(pictures.Decoded(content, names), names, content, "", labels, classes, None, empty)


def _tars(paths: list[Path], found: tars.Index) -> Images:
    """Images of webdataset tars, with the `.txt` and `.cls` beside them."""
    samples = found.samples
    where = ", ".join(map(str, paths[:3])) or "a list"
    if not samples:
        kinds, got = ", ".join(pictures.SUFFIXES), _counted(found.others) or "nothing"
        raise ValueError(f"images: expected images ({kinds}) in {where}, got {got}")
    if found.others:
        layout.note(f"images: left aside in {where}: {_counted(found.others)}")
    names = [sample.name for sample in samples]
    content = pictures.Members([sample.place for sample in samples], names)
    numbers = [tars.number(sample.label) for sample in samples]
    labels = [n for n in numbers if n is not None]
    if labels and len(labels) < len(numbers):
        layout.note(f"images: {len(labels)} of {len(numbers)} have a number in .cls: none is a label")
    told = None
    if any(sample.text is not None for sample in samples):
        told = [check_text("images", sample.text or "", f"the .txt of {sample.name}") for sample in samples]
    return Images(
        pictures.Decoded(content, names),
        keys.unique("images", names),
        content,
        labels=labels if len(labels) == len(numbers) else None,
        captions=told,
    )


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {suffix}" for suffix, count in sorted(counts.items()))
