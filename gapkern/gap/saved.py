"""The files of a mean shift and of a projection: tensors in safetensors, the parameters in the metadata."""

import ast
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from gapkern import _formats, files

__all__ = ["FORMAT_VERSION", "blame", "kind", "read", "write"]

FORMAT_VERSION = 1
_PLAIN_NAME = "moves"  # stored without quotes


def write(
    path: str | os.PathLike[str],
    kind: str,
    facts: dict[str, Any],
    tensors: dict[str, Tensor],
    made_from: Mapping[str, Any] | None = None,
) -> None:
    """Writes the file of a `kind`; one of that name is replaced only once the new one is complete."""
    if made_from is not None:
        facts = {**facts, "made_from": dict(made_from)}
    from safetensors.torch import save_file

    metadata = {"format": f"gapkern.{kind}", "version": str(FORMAT_VERSION)}
    metadata |= {name: value if name == _PLAIN_NAME else repr(value) for name, value in facts.items()}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    files.write(path, lambda temporary: save_file(tensors, temporary, metadata))


def kind(path: str | os.PathLike[str]) -> str:
    """The kind that a file says it has; "" where it is none of `write`'s.

    Raises:
        ValueError: not a regular file.
    """
    from safetensors import SafetensorError, safe_open

    _formats.opened(Path(path), "path")
    try:
        with safe_open(path, "pt") as file:
            said = (file.metadata() or {}).get("format", "")
    except (SafetensorError, OSError):
        return ""
    return said.removeprefix("gapkern.") if said.startswith("gapkern.") else ""


def read(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `write` wrote of that kind.

    Raises:
        ValueError: not a file of this format or of this version.
    """
    from safetensors import SafetensorError, safe_open

    _formats.opened(Path(path), "path")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"path: expected a safetensors file, got {path} ({error})") from None
    if metadata.get("format") != f"gapkern.{kind}" or metadata.get("version") != str(FORMAT_VERSION):
        raise ValueError(
            f"path: expected a gapkern.{kind} file of version {FORMAT_VERSION}, got {path} with "
            f"format {metadata.get('format')!r}, version {metadata.get('version')!r}"
        )
    with blame(path):
        facts = {
            name: text if name == _PLAIN_NAME else float("nan") if text == "nan" else ast.literal_eval(text)
            for name, text in metadata.items()
            if name not in ("format", "version")
        }
    return facts, tensors


@contextmanager
def blame(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns what goes wrong with a file's contents into one line that names it."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f"path: expected {error.args[0]} in {path}, which lacks it") from None
    except (TypeError, ValueError, SyntaxError, MemoryError, RecursionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"path: expected one that can be applied in {path}, got {reason}") from None
