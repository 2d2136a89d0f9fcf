"""What is embedded: images of a folder, of webdataset tars or of a data set; texts of a file or of COCO's captions.

Images are opened when they are asked for, by any process: a tar is indexed once and then read at offsets.
"""

import hashlib
import io
import os
import re
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gapkern import files

SAMPLED = 1000  # images whose bytes make the fingerprint, beside the names and sizes of all
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Images:
    """Images and what is known of each: `read(i)` is the i-th as PIL has it, `names[i]` says which it is.

    Attributes:
        labels: each image's class, an index into `classes`; or None.
        captions: each image's caption; or None.
        fingerprint: changes with the images' names, sizes and order, and with the bytes of up to 1000 of them, drawn
            evenly; of a data set with its name, split and labels alone.
    """

    read: Callable[[int], Any]
    names: Sequence[str]
    fingerprint: str
    labels: Sequence[int] | None = None
    classes: Sequence[str] | None = None
    captions: Sequence[str] | None = None

    def __len__(self) -> int:
        return len(self.names)

    def columns(self, rows: slice) -> dict[str, Sequence[Any]]:
        """The metadata of some images, as clip-retrieval names it."""
        found: dict[str, Sequence[Any]] = {"image_path": self.names[rows]}
        if self.captions is not None:
            found["caption"] = self.captions[rows]
        if self.labels is not None:
            found["label"] = self.labels[rows]
        return found


@dataclass(frozen=True)
class Texts:
    """Texts; `image_of[t]` is the image to which text t belongs, or None."""

    texts: Sequence[str]
    image_of: Sequence[int] | None = None

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def fingerprint(self) -> str:
        return _hash(self.texts)

    def columns(self, rows: slice) -> dict[str, Sequence[Any]]:
        found: dict[str, Sequence[Any]] = {"caption": self.texts[rows]}
        return found if self.image_of is None else found | {"image": self.image_of[rows]}


def images(source: Any) -> Images:
    """Images of a folder (searched through), of a `.tar`, or of several tars, a list or a folder of them.

    Where all images of a folder lie in subfolders, the first subfolder is the image's class, as in ImageFolder.

    Raises:
        ValueError: no images are there, or a tar cannot be read.
    """
    if isinstance(source, Images):
        return source
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        if path.is_dir():
            tars = sorted(path.glob("*.tar"), key=lambda p: files.natural(p.name))
            return _tars(tars) if tars else _folder(path)
        source = [path]
    return _tars([Path(part) for part in source])


def texts(source: Any) -> Texts:
    """Texts of a file, one per line; of COCO's captions JSON, in the file's order by image; or a list of strings.

    Raises:
        ValueError: no such file, or no text in it.
    """
    if isinstance(source, Texts):
        return source
    if not isinstance(source, str | os.PathLike):
        found = Texts(list(source))
        if wrong := [i for i, text in enumerate(found.texts) if not isinstance(text, str)]:
            raise TypeError(f"texts: expected strings, got {type(found.texts[wrong[0]]).__name__} in row {wrong[0]}")
    elif os.fspath(source).endswith(".json"):
        return captions(source)
    else:
        try:
            found = Texts(Path(source).read_text(encoding="utf-8").splitlines())
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"texts: cannot read {source} as UTF-8 text ({error})") from None
    if not len(found):
        raise ValueError(f"texts: expected at least one, got none in {source}")
    return found


def captions(annotation_file: str | os.PathLike) -> Texts:
    """COCO's captions, image by image in the order of their ids, and each one's image among those with captions."""
    from gapkern import datasets

    found = datasets.load("mscoco_captions", annotation_file=os.fspath(annotation_file))
    return Texts(found.captions, found.image_of)


def dataset(
    name: str, root: str = ".", split: str = "test", annotation_file: str | None = None
) -> tuple[Images, Texts | None]:
    """A data set of `gapkern.datasets`: its images with labels, and its captions where it has some.

    Raises:
        ValueError: no such data set, or it does not lie there; one of questions, which have images many times.
        ImportError: torchvision or scikit-learn is needed and not installed.
    """
    from gapkern import datasets

    found = datasets.load(name, root, split, annotation_file)
    if isinstance(found, datasets.Questions):
        raise ValueError(f"dataset: expected one of images with labels or captions, got {name}, which has questions")
    names = [f"{name}/{split}/{i}" for i in range(len(found))]
    if isinstance(found, datasets.Captioned):
        facts = [name, split, *found.captions, *map(str, found.image_of)]
        return Images(found.image, names, _hash(facts)), Texts(found.captions, found.image_of)
    facts = [name, split, *map(str, found.labels)]
    return Images(found.image, names, _hash(facts), found.labels, found.classes), None


def _folder(path: Path) -> Images:
    found = [Path(base, name) for base, _, names in os.walk(path, followlinks=True) for name in names]
    there = sorted(
        (p.relative_to(path).as_posix() for p in found if p.suffix.lower() in SUFFIXES and not p.name.startswith(".")),
        key=lambda name: [files.natural(part) for part in name.split("/")],
    )
    if not there:
        kinds = ", ".join(SUFFIXES)
        raise ValueError(f"images: expected files ending in {kinds}, or .tar, in {path}, got {len(found)} other files")
    labels = classes = None
    if all("/" in name for name in there):
        classes = sorted({name.split("/")[0] for name in there})
        of = {name: i for i, name in enumerate(classes)}
        labels = [of[name.split("/")[0]] for name in there]
    facts = [f"{name} {(path / name).stat().st_size}" for name in there]
    facts += _contents(there, lambda i: (path / there[i]).read_bytes())
    return Images(lambda i: _decode(path / there[i], there[i]), there, _hash(facts), labels, classes)


def _tars(paths: list[Path]) -> Images:
    """Images of webdataset tars: members that share a name up to its first dot make a sample."""
    names, places, texts_of, labels_of, facts = [], [], [], [], []
    for path in paths:
        samples: dict[str, dict[str, tarfile.TarInfo]] = {}
        try:
            with tarfile.open(path, "r:") as opened:
                for member in opened:
                    if member.isfile():
                        folder, _, name = member.name.rpartition("/")
                        key, _, extension = name.partition(".")
                        samples.setdefault(f"{folder}/{key}" if folder else key, {})[f".{extension.lower()}"] = member
                        facts.append(f"{path.name} {member.name} {member.size} {member.offset_data}")
        except (tarfile.TarError, OSError) as error:
            raise ValueError(f"images: expected a folder or an uncompressed .tar, got {path} ({error})") from None
        size = path.stat().st_size
        for key, sample in samples.items():
            pictures = [extension for extension in sample if extension in SUFFIXES]
            if not pictures:
                continue
            if len(pictures) > 1:
                raise ValueError(f"images: expected one image of {key} in {path}, got {', '.join(pictures)}")
            member = sample[pictures[0]]
            if member.offset_data + member.size > size:
                raise ValueError(f"images: expected a whole tar, got {path}, which ends within {member.name}")
            names.append(f"{path.name}/{member.name}")
            places.append((path, member.offset_data, member.size))
            texts_of.append(_side(path, sample.get(".txt")))
            labels_of.append(_side(path, sample.get(".cls")))
    if not names:
        raise ValueError(
            f"images: expected images ({', '.join(SUFFIXES)}) in {paths[0] if paths else 'a list'}, got none"
        )

    def content(i: int) -> bytes:
        path, offset, count = places[i]
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read(count)

    whole = [label is not None and re.fullmatch(r"\s*\d+\s*", label) is not None for label in labels_of]
    labels = [int(label or 0) for label in labels_of] if all(whole) else None
    told = [text or "" for text in texts_of] if any(text is not None for text in texts_of) else None
    facts += _contents(names, content)
    return Images(lambda i: _decode(io.BytesIO(content(i)), names[i]), names, _hash(facts), labels, None, told)


def _side(path: Path, member: tarfile.TarInfo | None) -> str | None:
    if member is None:
        return None
    with open(path, "rb") as file:
        file.seek(member.offset_data)
        return file.read(member.size).decode("utf-8", errors="replace")


def _decode(file: Any, name: str) -> Any:
    from PIL import Image

    try:
        with Image.open(file) as opened:
            return opened.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"images: cannot read {name} ({error})") from None


def _contents(names: Sequence[str], content: Callable[[int], bytes]) -> list[str]:
    """Hashes of some images' bytes."""
    found = []
    for i in range(0, len(names), -(-len(names) // SAMPLED)):
        try:
            found.append(hashlib.sha256(content(i)).hexdigest())
        except OSError as error:
            raise ValueError(f"images: cannot read {names[i]} ({error})") from None
    return found


def _hash(facts: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for fact in facts:
        digest.update(fact.encode("utf-8", errors="surrogateescape") + b"\0")
    return digest.hexdigest()
