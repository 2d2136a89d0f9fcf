"""Reading embeddings and writing results: whole files or none, and errors that say what was expected."""

import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gapkern import _check

CHUNK = 2**22  # numbers at hand at once when a file is streamed


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary name beside `path`; the file written there takes its place once the block is left without an error.

    Raises:
        ValueError: the folder does not exist or cannot be written.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "numbers.txt"
        >>> with replacing(target) as temporary:
        ...     _ = temporary.write_text("1 2 3")
        >>> target.read_text(), [p.name for p in target.parent.iterdir()]
        ('1 2 3', ['numbers.txt'])
    """
    path = Path(path)
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=f".tmp{path.suffix}", dir=path.parent)
    except OSError as error:
        raise ValueError(f"path: cannot write {path}: {error.strerror}") from None
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write(path: str | os.PathLike, save: Callable[[Path], Any]) -> Path:
    """Calls `save` with a temporary name and renames what it wrote to `path`."""
    with replacing(path) as temporary:
        save(temporary)
    return Path(path)


def plain(value: Any) -> Any:
    """`value` with tensors, arrays, paths and non-finite numbers as JSON has them (NaN and infinity become null).

    Example:
        >>> plain({"a": torch.tensor([1.0, float("nan")]), "b": (np.float32(2.0),)})
        {'a': [1.0, None], 'b': [2.0]}
    """
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_json(path: str | os.PathLike, value: Any) -> Path:
    """Writes JSON that any reader takes: `plain` values, two spaces, a final newline."""
    return write(path, lambda p: p.write_text(json.dumps(plain(value), indent=2, allow_nan=False) + "\n"))


def folder(path: str | os.PathLike, *, name: str = "out") -> Path:
    """`path` as a folder that exists and can be written.

    Raises:
        ValueError: it cannot be made or written, in one line that says why.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ValueError(f"{name}: cannot write to the folder {path}: {error.strerror}") from None
    return path


def load_embeddings(path: str | os.PathLike, *, name: str = "path") -> Tensor:
    """Embeddings (N, D) from a `.npy` or `.safetensors` file, memory-mapped where the format allows.

    `file.npy[0]` takes the first matrix of an array (K, N, D); `file.safetensors[key]` the tensor of that key.

    Raises:
        ValueError: the file is absent, of another format, truncated, pickled, or holds no (N, D) of floating-point
            numbers.
    """
    text = os.fspath(path)
    index = None
    if text.endswith("]") and "[" in text:
        text, _, index = text[:-1].rpartition("[")
    file = Path(text)
    if not file.exists():
        raise ValueError(f"{name}: expected a file, got {file}, which does not exist")
    if file.is_dir():
        raise ValueError(f"{name}: expected a .npy or .safetensors file, got the folder {file}")
    if file.suffix == ".safetensors":
        array: Any = _load_safetensors(file, index, name)
    elif file.suffix == ".npy":
        array = _load_npy(file, index, name)
    else:
        raise ValueError(f"{name}: expected a .npy or .safetensors file, got {file}")
    try:
        return _check.matrix(name, array)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{error} in {path}") from None


def chunks(path: str | os.PathLike, rows: int | None = None, *, name: str = "path") -> Iterator[Tensor]:
    """The embeddings of a file, some rows at a time (by default about 4 million numbers), each in its own memory.

    The file is mapped anew for every chunk: one mapping would keep every page it has touched.

    Example:
        >>> import tempfile
        >>> file = save_embeddings(Path(tempfile.mkdtemp()) / "x.npy", torch.zeros(10, 2))
        >>> [len(part) for part in chunks(file, 4)]
        [4, 4, 2]
    """
    count, dims = load_embeddings(path, name=name).shape
    rows = rows or max(1, CHUNK // max(1, dims))
    for first in range(0, count, rows):
        yield load_embeddings(path, name=name)[first : first + rows].clone()


def _load_npy(file: Path, index: str | None, name: str) -> np.ndarray:
    try:
        array = np.load(file, mmap_mode="c", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{name}: expected a .npy file, got {file}: {reason}") from None
    if index is None:
        return array
    if not index.isdigit() or array.ndim != 3 or int(index) >= len(array):
        raise ValueError(
            f"{name}: expected [K] to choose from an array (K, N, D), got [{index}] of shape {array.shape}"
        )
    return array[int(index)]


def _load_safetensors(file: Path, key: str | None, name: str) -> Tensor:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            keys = list(opened.keys())
            if key is None and len(keys) != 1:
                raise ValueError(
                    f"{name}: expected one tensor in {file}, got {', '.join(keys)}; choose one as file[key]"
                )
            if key is not None and key not in keys:
                raise ValueError(f"{name}: expected one of {', '.join(keys)} in {file}, got [{key}]")
            return opened.get_tensor(key if key is not None else keys[0])
    except SafetensorError as error:
        raise ValueError(f"{name}: expected a .safetensors file, got {file}: {error}") from None


def save_embeddings(path: str | os.PathLike, x: Tensor) -> Path:
    """Writes (N, D) embeddings as `.npy` or `.safetensors`, by the name's ending; bfloat16 needs the latter."""
    path = Path(path)
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        return write(path, lambda p: save_file({"embeddings": x.contiguous()}, p))
    if path.suffix != ".npy":
        raise ValueError(f"path: expected a name ending in .npy or .safetensors, got {path}")
    if x.dtype == torch.bfloat16:
        raise ValueError(f"path: .npy has no bfloat16; expected a name ending in .safetensors, got {path}")
    return write(path, lambda p: np.save(p, x.numpy(), allow_pickle=False))
