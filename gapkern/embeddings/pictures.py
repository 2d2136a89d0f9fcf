"""Images on disk: which files are images, and what a file's bytes are as RGB.

Decoded as open_clip's training loader and PIL do it, `Image.open(...).convert("RGB")`: EXIF orientation is not applied,
transparency is dropped, the first frame is taken. Only modes that PIL clips to eight bits are scaled here by their
range, or refused.
"""

import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SUFFIXES = (
    ".avif",
    ".bmp",
    ".gif",
    ".jfif",
    ".jp2",
    ".jpe",
    ".jpeg",
    ".jpg",
    ".pbm",
    ".pgm",
    ".png",
    ".pnm",
    ".ppm",
    ".tif",
    ".tiff",
    ".webp",
)


class Undecoded(ValueError):
    """An image whose bytes are there, and no image; `signature` is what they sign."""

    signature = ""


def text(name: str) -> str:
    """A file's name as text: bytes that are not UTF-8 become escapes.

    Example:
        >>> text(os.fsdecode(b"caf\\xe9.png"))
        'caf\\\\xe9.png'
    """
    return os.fsencode(name).decode("utf-8", errors="backslashreplace")


def is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES and not name.rpartition("/")[2].startswith(".")


def decode(content: bytes, name: str) -> Any:
    """An image's bytes as PIL's RGB; 16-bit greys are scaled from 65535 to 255.

    Raises:
        ValueError: no image, a damaged one, or numbers whose range is unknown (floats, 32-bit integers).
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content)) as opened:
            return rgb(opened)
    except Exception as error:  # PIL's plugins raise anything on damaged files
        reason = str(error).replace("\n", " ")
        raise Undecoded(f"images: cannot read {name} ({_without_address(reason)})") from None


def rgb(image: Any) -> Any:
    """A PIL image as RGB of eight bits.

    Raises:
        ValueError: its mode's range is unknown.
    """
    import numpy as np
    from PIL import Image

    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        top = 65535
        if image.format == "TIFF":
            top = 2 ** int(image.tag_v2.get(258, (16,))[0]) - 1
        grey = np.asarray(image).astype(np.float64)
        if grey.min() < 0 or grey.max() > top:
            raise ValueError(f"expected greys in [0, {top}], got {grey.min():g} to {grey.max():g}")
        return Image.fromarray(np.rint(grey * (255 / top)).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        kind = "32-bit floats" if image.mode == "F" else "32-bit integers"
        raise ValueError(f"expected 8 or 16 bits a channel, got {kind}, whose range is not known")
    return image.convert("RGB")


def _without_address(reason: str) -> str:
    """PIL names the buffer it read by its address, which differs from run to run."""
    before, found, after = reason.partition("<_io.BytesIO object at ")
    return before + "its bytes" + after.partition(">")[2] if found else reason


@dataclass(frozen=True)
class Files:
    """The bytes of files below a folder by their row; sent to workers by its paths alone."""

    root: Path
    paths: Sequence[str]

    def __call__(self, i: int) -> bytes:
        path = self.root / self.paths[i]
        if path.exists() and not path.is_file():
            raise ValueError(f"images: cannot read {text(self.paths[i])} (a device or a pipe)")
        try:
            return path.read_bytes()
        except OSError as error:
            raise ValueError(f"images: cannot read {text(self.paths[i])} ({error.strerror})") from None


@dataclass(frozen=True)
class Members:
    """The bytes of tars' members by their row: (path, offset, count)."""

    places: Sequence[tuple[Path, int, int]]
    names: Sequence[str]

    def __call__(self, i: int) -> bytes:
        path, offset, count = self.places[i]
        try:
            with open(path, "rb") as file:
                file.seek(offset)
                content = file.read(count)
        except OSError as error:
            raise ValueError(f"images: cannot read {self.names[i]} ({error.strerror})") from None
        if len(content) < count:
            raise ValueError(f"images: cannot read {self.names[i]} ({path} ends within it)")
        return content


@dataclass(frozen=True)
class Joined:
    """The rows of several readers, one after the other."""

    readers: Sequence[Callable[[int], bytes]]
    counts: Sequence[int]

    def __call__(self, i: int) -> bytes:
        for reader, count in zip(self.readers, self.counts, strict=True):
            if i < count:
                return reader(i)
            i -= count
        raise IndexError(i)


@dataclass(frozen=True)
class Decoded:
    """Images of a reader's bytes."""

    content: Callable[[int], bytes]
    names: Sequence[str]

    def __call__(self, i: int) -> Any:
        return decode(self.content(i), self.names[i])


def walk(root: Path) -> tuple[list[str], list[str], list[str]]:
    """The images below a folder, the other files, and the first-level folders, as names relative to it.

    Links to folders are followed, each folder is visited once; hidden files and folders are left out.

    Raises:
        ValueError: a link leads nowhere.
    """
    from gapkern.layout import natural, note

    images: list[str] = []
    others: list[str] = []
    seen: dict[tuple[int, int], str] = {}
    classes: list[str] = []
    # Links last: a folder is known by its own name where it has one below the root.
    queue: list[str] = [""]
    links: list[str] = []
    while queue or links:
        here = queue.pop() if queue else links.pop(0)
        status = (root / here).stat()
        if (earlier := seen.setdefault((status.st_dev, status.st_ino), here)) != here:
            note(f"images: the link {here} left aside: {root / earlier} once more")
            continue
        if here and "/" not in here:
            classes.append(here)
        try:
            entries = sorted(os.scandir(root / here), key=lambda e: natural(e.name))
        except OSError as error:
            raise ValueError(f"images: cannot read the folder {root / here}: {error.strerror}") from None
        for entry in entries:
            if entry.name.startswith("."):
                continue
            name = f"{here}/{entry.name}" if here else entry.name
            if entry.is_dir():
                (links if entry.is_symlink() else queue).append(name)
            elif is_image(name) or not entry.is_symlink() or entry.is_file():
                (images if is_image(name) else others).append(name)
            else:
                others.append(name)
    order = lambda name: [natural(part) for part in name.split("/")]  # noqa: E731
    return sorted(images, key=order), sorted(others, key=order), sorted(classes)
