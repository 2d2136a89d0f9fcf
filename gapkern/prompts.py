"""Class names and prompt templates from lines or CLIP_benchmark's JSON files, whose own can be named too."""

import contextlib
import importlib.util
import os
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gapkern import files, layout

DEFAULT = ("a photo of a {c}.",)
Templates = list[str] | dict[str, list[str]]


def read_json(name: str, path: str | os.PathLike[str]) -> Any:
    """What a JSON file holds. A name without a folder is looked for among CLIP_benchmark's files too, if installed.

    Raises:
        ValueError: no such file, or no JSON.
    """
    file = Path(path)
    if not file.exists() and file.name == os.fspath(path):
        found = importlib.util.find_spec("clip_benchmark")
        for folder in (found.submodule_search_locations or []) if found else []:
            if (Path(folder) / "datasets" / file).exists():
                file = Path(folder) / "datasets" / file
    with _there(name, path):
        return files.read_json(file, name=name)


def read_text(name: str, path: str | os.PathLike[str]) -> str:
    """What a UTF-8 file holds, without a byte-order mark.

    Raises:
        ValueError: no such file, not UTF-8.
    """
    with _there(name, path):
        return files.read_text(path, name=name)


def read_lines(name: str, path: str | os.PathLike[str]) -> list[str]:
    """The lines of a UTF-8 file. LF or CRLF ends a line and nothing else does; blank lines at the end are none.

    Raises:
        ValueError: no such file, not UTF-8.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "lines.txt"
        >>> _ = file.write_bytes(bytes([97, 13, 10, 10, 98, 10, 10]))
        >>> read_lines("texts", file)
        ['a', '', 'b']
    """
    lines = [line.removesuffix("\r") for line in read_text(name, path).split("\n")]
    while lines and not lines[-1].strip():
        lines.pop()
    return lines


@contextlib.contextmanager
def _there(name: str, path: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(f"{name}: cannot read {path}: {error.strerror}") from None


def check_text(name: str, value: Any, where: str) -> str:
    """`value` if it is a string that UTF-8 can hold.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(value, str):
        raise ValueError(f"{name}: expected a string for {where}, got {_some(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name}: expected text for {where}, got a lone surrogate in {value!a}") from None
    return value


def load_templates(path: str | os.PathLike[str], dataset: str) -> Templates:
    """Templates with {c} for the class, or each class's own prompts.

    The file holds one per line, or JSON: a list; or, by dataset, a list or a dictionary of prompts by class. A dataset
    that it lacks takes those of imagenet1k, as in CLIP_benchmark. `file[dataset]` names one.

    Raises:
        ValueError: not such a file, nothing for this dataset, a template without {c}.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "templates.json"
        >>> _ = file.write_text('{"digits": ["the digit {c}"]}')
        >>> load_templates(file, "digits")
        ['the digit {c}']
    """
    path, dataset = _chosen(path, dataset)
    found = _read("templates", path)
    if isinstance(found, dict):
        chosen = next((found[key] for key in (*_keys(dataset), "imagenet1k") if key in found), None)
        if chosen is None:
            raise ValueError(f"templates: expected {dataset!r} or 'imagenet1k' in {path}, got {_some(found)}")
        found = chosen
    if isinstance(found, dict):
        for name, prompts in found.items():
            _strings(f"templates of {name!r}", prompts)
        return found
    return check_templates(found)


def check_templates(templates: Any) -> list[str]:
    """Raises ValueError unless all templates are strings with {c} and no other place."""
    for template in _strings("templates", templates):
        try:
            places = [place for _, place, _, _ in string.Formatter().parse(template) if place is not None]
        except ValueError as error:
            raise ValueError(f"templates: expected a string with {{c}}, got {template!r} ({error})") from None
        if not places or any(place != "c" for place in places):
            raise ValueError(f"templates: expected a string with {{c}} for the class, got {template!r}")
    return list(templates)


def load_classnames(
    path: str | os.PathLike[str], dataset: str = "", fits: Callable[[Any], bool] = lambda names: False
) -> list[str] | dict[str, str]:
    """Class names, or a mapping of what the classes are called where the images are to their names.

    The file holds one per line, or JSON: a list, a mapping, or either by dataset. `file[dataset]` names one. Without
    a dataset that is named, the only one is taken, or the only one whose names are those of the images.

    Args:
        fits: whether names can be those of the images.

    Raises:
        ValueError: not such a file, nothing for this dataset, or several that it may be.
    """
    path, dataset = _chosen(path, dataset)
    found = _read("classnames", path)
    if isinstance(found, dict) and not all(isinstance(value, str) for value in found.values()):
        among = [key for key in _keys(dataset) if key in found]
        if not dataset:
            among = list(found) if len(found) == 1 else [key for key, names in found.items() if fits(names)]
        if not among or (not dataset and len(among) > 1):
            wanted = repr(dataset) if dataset else f"a list or a mapping, or one data set chosen as {path}[NAME],"
            raise ValueError(
                f"classnames: expected {wanted} in {path}, got {_names(among or list(found))}"
                + (", which all fit" if among else "")
            )
        if not dataset and len(found) > 1:
            layout.note(f"classnames: those of {among[0]} in {path}")
        found = found[among[0]]
    if isinstance(found, dict):
        _strings("classnames", list(found.values()))
        return found
    return _strings("classnames", found)


def fill(templates: Templates, classnames: list[str]) -> list[list[str]]:
    """The prompts of every class.

    Example:
        >>> fill(["a {c}", "one {c}"], ["cat", "dog"])
        [['a cat', 'one cat'], ['a dog', 'one dog']]

    Raises:
        ValueError: class-specific prompts lack a class.
    """
    if isinstance(templates, dict):
        missing = [name for name in classnames if not templates.get(name)]
        if missing:
            raise ValueError(f"templates: expected prompts of every class, got none of {missing[0]!r}")
        return [templates[name] for name in classnames]
    return [[template.format(c=name) for template in templates] for name in classnames]


def _read(name: str, path: str | os.PathLike[str]) -> Any:
    if os.fspath(path).endswith(".json"):
        return read_json(name, path)
    lines = read_lines(name, path)
    if blank := [i + 1 for i, line in enumerate(lines) if not line.strip()]:
        raise ValueError(f"{name}: expected no blank line within {path}, got one in line {blank[0]}")
    return lines


def _chosen(path: str | os.PathLike[str], dataset: str) -> tuple[str, str]:
    """The file and the data set of `file[dataset]`."""
    file, key = layout.parted(path)
    return (os.fspath(path), dataset) if key is None or os.path.exists(path) else (file, key)


def _names(names: list[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _keys(dataset: str) -> tuple[str, ...]:
    """vtab/x, tfds/x and wds/x are found as x too."""
    prefix, _, short = dataset.partition("/")
    return (dataset, short) if short and prefix in ("vtab", "tfds", "wds") else (dataset,)


def _strings(name: str, value: Any) -> list[str]:
    if not isinstance(value, list | tuple) or not value or not all(isinstance(v, str) for v in value):
        raise ValueError(f"{name}: expected a list of strings, got {_some(value)}")
    return [check_text(name, text, "each") for text in value]


def _some(value: Any) -> str:
    text = ", ".join(map(repr, list(value)[:5])) if isinstance(value, dict) and value else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
