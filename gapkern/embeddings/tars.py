"""Webdataset tars, indexed once and then read at offsets; every byte of an archive is accounted for.

A member whose last suffix is an image's is a row. `.txt` and `.cls` belong to the image that shares the name but for
the suffix, else to the one image that shares it up to its first dot. A name given again is another sample.
"""

import re
import tarfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from gapkern.embeddings.pictures import is_image, text

BLOCK = 512


@dataclass
class Sample:
    """An image in a tar: its member's name, where its bytes are, and what is told of it."""

    name: str
    place: tuple[Path, int, int]
    text: str | None = None
    label: str | None = None


@dataclass
class Index:
    """Samples of tars, and the other members by suffix."""

    samples: list[Sample] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter[str])


def index(paths: list[Path]) -> Index:
    """Reads the headers of tars to their ends.

    Raises:
        ValueError: not an uncompressed tar, or not a whole one: a damaged header, a cut, zeros within, more behind the
            end; two images of one sample.
    """
    found = Index()
    names: Counter[str] = Counter()
    for path, title in zip(paths, _titles(paths), strict=True):
        members = _members(path)
        _samples(path, title, members, found, names)
    return found


def _titles(paths: list[Path]) -> list[str]:
    """What each tar is called in its rows' names: its own name, with as many folders before it as tell all apart."""
    for depth in range(1, max((len(p.absolute().parts) for p in paths), default=1) + 1):
        titles = ["/".join(p.absolute().parts[-depth:]) for p in paths]
        if len(set(titles)) == len(titles):
            return titles
    raise ValueError(f"images: expected each tar once, got {paths[0]} among others twice")


def _members(path: Path) -> list[tarfile.TarInfo]:
    if path.exists() and not path.is_file():
        raise ValueError(f"images: expected a folder or an uncompressed .tar, got {path}, which is a device or a pipe")
    try:
        with tarfile.open(path, "r:") as opened:
            members = list(opened)
            end = opened.offset
    except Exception as error:  # tarfile raises anything on damaged headers
        reason = str(error) or type(error).__name__
        raise ValueError(f"images: expected a folder or an uncompressed .tar, got {path} ({reason})") from None
    size = path.stat().st_size
    for member in members:
        if member.isfile() and not member.issparse() and member.offset_data + member.size > size:
            raise ValueError(f"images: expected a whole tar, got {path}, which ends within {member.name}")
    with open(path, "rb") as file:
        file.seek(end)
        zeros = 0
        while block := file.read(2**20):
            if block.count(0) != len(block):
                at = end + zeros + next(i for i, byte in enumerate(block) if byte)
                raise ValueError(
                    f"images: expected a whole tar, got {path}, which has at byte {end} neither a header nor its end "
                    f"(two blocks of zeros and then nothing), and more at byte {at}"
                )
            zeros += len(block)
    if zeros < 2 * BLOCK:
        last = members[-1].name if members else "its start"
        raise ValueError(
            f"images: expected a whole tar, got {path}, which is cut after {last}: no two blocks of zeros end it"
        )
    return members


def _samples(path: Path, title: str, members: list[tarfile.TarInfo], found: Index, names: Counter[str]) -> None:
    data = {m.name: m for m in members if m.isfile()}
    occurrences: Counter[str] = Counter()
    pictures: dict[tuple[str, int], Sample] = {}
    groups: dict[tuple[str, int], list[Sample]] = {}
    sides: list[tuple[str, str, int, tarfile.TarInfo]] = []
    for member in members:
        name = member.name.removeprefix("./")
        if member.isdir() or name.rpartition("/")[2].startswith("."):
            continue
        if member.islnk() or member.issym():
            target = _target(member, data)
        else:
            target = member if member.isfile() and not member.issparse() else None
        stem, _, suffix = name.rpartition(".")
        if target is None or not (is_image(name) or suffix.lower() in ("txt", "cls")):
            if target is None and is_image(name):
                raise ValueError(f"images: expected {name} in {path} to be a file, got a link or a sparse file")
            found.others["." + suffix.lower() if stem else name] += 1
            continue
        occurrences[name] += 1
        time = occurrences[name]
        if not is_image(name):
            sides.append((stem, suffix.lower(), time, target))
            continue
        row = text(f"{title}/{name}")
        names[row] += 1
        sample = Sample(row if names[row] == 1 else f"{row}#{names[row]}", (path, target.offset_data, target.size))
        if (stem, time) in pictures:
            other = pictures[stem, time].name.rpartition(".")[2]
            raise ValueError(f"images: expected one image of {stem} in {path}, got .{other}, .{suffix.lower()}")
        pictures[stem, time] = sample
        groups.setdefault((_key(name), time), []).append(sample)
        found.samples.append(sample)
    for stem, suffix, time, member in sides:
        group = groups.get((_key(f"{stem}.{suffix}"), time), [])
        own = pictures.get((stem, time)) or (group[0] if len(group) == 1 else None)
        if own is None:
            found.others[f".{suffix}"] += 1
            continue
        content = _content(path, member)
        if suffix == "txt":
            own.text = content
        else:
            own.label = content


def _key(name: str) -> str:
    """Webdataset's: the name up to the first dot behind the last folder."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _target(member: tarfile.TarInfo, data: dict[str, tarfile.TarInfo]) -> tarfile.TarInfo | None:
    """The file that a link within the tar leads to."""
    name = member.linkname
    if member.issym():
        parts = member.name.split("/")[:-1]
        for part in name.split("/"):
            if part == "..":
                parts = parts[:-1]
            elif part != ".":
                parts.append(part)
        name = "/".join(parts)
    found = data.get(name)
    return found if found is not None and not found.issparse() else None


def _content(path: Path, member: tarfile.TarInfo) -> str:
    with open(path, "rb") as file:
        file.seek(member.offset_data)
        content = file.read(member.size)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"images: expected UTF-8 in {member.name} of {path} ({error})") from None


def number(label: str | None) -> int | None:
    """A `.cls` member's number."""
    return int(label) if label is not None and re.fullmatch(r"\s*[0-9]{1,18}\s*", label) else None
