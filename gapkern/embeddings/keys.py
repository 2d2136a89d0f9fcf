"""Rows have names: an order is the ordered keys' SHA-256, and two orders are joined by their keys or not at all."""

import hashlib
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence

from gapkern import layout
from gapkern.embeddings.pictures import is_image

AS_STORED = "as stored"


def order(keys: Iterable[str]) -> str:
    """The SHA-256 of keys in their order.

    Example:
        >>> order(["a", "b"]) == order(["a", "b"]), order(["ab", ""]) == order(["a", "b"])
        (True, False)
    """
    digest = hashlib.sha256()
    for key in keys:
        data = key.encode("utf-8", errors="surrogateescape")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def unique(name: str, keys: Sequence[str]) -> Sequence[str]:
    """Raises ValueError where a key is there twice."""
    if len(set(keys)) < len(keys):
        seen: set[str] = set()
        twice = next(key for key in keys if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"{name}: expected each row's key once, got {twice!r} twice")
    return keys


def rows_of(wanted: Sequence[str], keys: Sequence[str], *, name: str, what: str = "image") -> list[int | None]:
    """The row of each wanted image among keys; None where there is none.

    Two names are one image where one is the end of the other, folder by folder (`val2014/a.jpg`, `a.jpg`,
    `0.tar/a.jpg`), the wanted one with or without its suffix; Unicode's forms and, failing that, cases are alike.

    Raises:
        ValueError: a name fits two rows.

    Example:
        >>> rows_of(["b.png", "x/a", "c"], ["a.png", "b.png"], name="captions")
        [1, 0, None]
    """
    exact = {key: row for row, key in enumerate(keys)}
    parts = [_parts(key) for key in keys]
    ends: dict[str, list[int]] = {}
    for row, key in enumerate(parts):
        # The set: a name without a suffix is its own stem.
        for end in {key[-1], _stem(key[-1]), key[-1].casefold(), _stem(key[-1]).casefold()}:
            ends.setdefault(end, []).append(row)
    found: list[int | None] = []
    for text in wanted:
        if text in exact:
            found.append(exact[text])
            continue
        mine = _parts(text)
        fitting = [row for row in ends.get(mine[-1], []) if _fits(mine, parts[row])]
        if not fitting:
            folded = [part.casefold() for part in mine]
            fitting = [row for row in ends.get(folded[-1], []) if _fits(folded, [p.casefold() for p in parts[row]])]
        if len(fitting) > 1:
            same = [row for row in fitting if parts[row] == mine]
            fitting = same if len(same) == 1 else fitting
        if len(fitting) > 1:
            raise ValueError(
                f"{name}: expected one {what} of the name {text!r}, got {keys[fitting[0]]} and {keys[fitting[1]]}"
            )
        found.append(fitting[0] if fitting else None)
    return found


def _parts(key: str) -> list[str]:
    text = unicodedata.normalize("NFC", key).replace("\\", "/")
    return [part for part in text.split("/") if part not in ("", ".")] or [text]


def _stem(name: str) -> str:
    return name.rpartition(".")[0] if is_image(name) else name


def _fits(wanted: Sequence[str], there: Sequence[str]) -> bool:
    if wanted[-1] != there[-1] and (is_image(wanted[-1]) or wanted[-1] != _stem(there[-1])):
        return False
    n = min(len(wanted), len(there))
    return list(wanted[-n:-1]) == list(there[-n:-1])


def plain(name: str) -> str:
    """A class's name without what spellings differ in: case, Unicode's form, underscores.

    Example:
        >>> plain("Golden_Retriever")
        'golden retriever'
    """
    return " ".join(unicodedata.normalize("NFC", name).replace("_", " ").casefold().split())


def classes_of(
    folders: Sequence[str],
    names: Sequence[str] | Mapping[str, str],
    *,
    empty: Sequence[str] = (),
    argument: str = "classnames",
) -> list[int]:
    """Each folder's class: its place among class names that come in another order.

    Args:
        folders: what the classes are called where the images are.
        names: the names of the same set in any order, which are then matched; of folders 0, 1, ..., or of WordNet ids
            in their order, any names in that order; or a mapping of folders to names.
        empty: classes without images, which names may or may not have.
        argument: what errors call the names.

    Raises:
        ValueError: another count or another set, a name twice.

    Example:
        >>> classes_of(["eight", "one"], ["one", "eight"]), classes_of(["0", "1"], ["zero", "one"])
        ([1, 0], [0, 1])
    """
    among = places(list(names))
    if isinstance(names, Mapping):
        if missing := [folder for folder in folders if among(folder) is None]:
            raise ValueError(f"{argument}: expected a name for each class, got none of {_list(missing)}")
        return [among(folder) or 0 for folder in folders]
    everyone = [*folders, *empty]
    by_name = [among(folder) for folder in folders]
    places_of = [place for place in by_name if place is not None]
    if len(set(places_of)) == len(folders) and set(range(len(names))) <= {*places_of, *map(among, empty)}:
        return places_of
    if all(re.fullmatch("[0-9]+", folder) for folder in everyone):
        if sorted(map(int, everyone)) == list(range(len(names))):
            return [int(folder) for folder in folders]
    elif len(everyone) == len(names) and all(re.fullmatch("n[0-9]{8}", folder) for folder in everyone):
        layout.note(f"{argument}: taken in the order of the classes' WordNet ids")
        known = sorted(everyone)
        return [known.index(folder) for folder in folders]
    classes = places(everyone)
    unknown = [folder for folder in folders if among(folder) is None]
    extra = [name for name in names if classes(name) is None]
    raise ValueError(
        f"{argument}: expected the names of the images' {len(everyone)} classes, in any order, or a JSON object from "
        f"those to names; got {len(names)} names"
        + (f", none for {_list(unknown)}" if unknown else "")
        + (f", no class for {_list(extra)}" if extra else "")
        + ("" if unknown or extra else ", some of them twice")
    )


def places(names: Sequence[str]) -> Callable[[str], int | None]:
    """A function from a name to its one place: as it is written, else but for its spelling; else None."""
    exact: dict[str, list[int]] = {}
    spelt: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        exact.setdefault(name, []).append(i)
        spelt.setdefault(plain(name), []).append(i)

    def place(name: str) -> int | None:
        places = exact.get(name) or spelt.get(plain(name), [])
        return places[0] if len(places) == 1 else None

    return place


def _list(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
