"""Reading embeddings and writing results: whole files or none, and errors that say what was expected."""

import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gapkern import _check, _lock

CHUNK = 2**22  # numbers at hand at once when a file is streamed


@contextmanager
def replacing(path: str | os.PathLike, *, name: str = "path") -> Iterator[Path]:
    """A temporary name beside `path`; the file written there takes its place once the block is left without an error.

    A link is followed: the file that it names is replaced. What killed runs left half written in the folder is removed.

    Raises:
        ValueError: the folder does not exist or cannot be written; `path` is a folder, a device or a pipe.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "numbers.txt"
        >>> with replacing(target) as temporary:
        ...     _ = temporary.write_text("1 2 3")
        >>> target.read_text(), [p.name for p in target.parent.iterdir()]
        ('1 2 3', ['numbers.txt'])
    """
    path = writable(path, name=name)
    _lock.sweep(path.parent)
    try:
        temporary, lock = _lock.temporary(path)
    except OSError as error:
        raise ValueError(f"{name}: cannot write {path}: {error.strerror}") from None
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
        _lock.release(lock)


def writable(path: str | os.PathLike, *, name: str = "path") -> Path:
    """`path`, or the file that it links to, once a file can be put there: to be asked before the work for it is done.

    Raises:
        ValueError: its folder does not exist or cannot be written; it is a folder, a device or a pipe.
    """
    given, path = path, Path(os.path.realpath(path))
    kind = "a folder" if path.is_dir() else "no regular file" if path.exists() and not path.is_file() else None
    if kind is None and not path.parent.is_dir():
        kind = "Not a directory" if path.parent.exists() else "No such file or directory"
    elif kind is None and not os.access(path.parent, os.W_OK | os.X_OK):
        kind = "Permission denied"
    elif kind is not None:
        kind = f"it is {kind}"
    if kind is not None:
        raise ValueError(f"{name}: cannot write {given}: {kind}")
    return path


def write(path: str | os.PathLike, save: Callable[[Path], Any]) -> Path:
    """Calls `save` with a temporary name and renames what it wrote to `path`."""
    with replacing(path) as temporary:
        save(temporary)
    return Path(path)


def sync(path: str | os.PathLike) -> None:
    """Waits until the file's bytes are on the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


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
    path = _lock.make(path, name=name)
    try:
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ValueError(f"{name}: cannot write to the folder {path}: {error.strerror}") from None
    return path


def shards(path: str | os.PathLike, *, name: str = "path") -> list[str]:
    """The embedding files of a folder, in natural order (2 before 10); or `path` alone where it is no folder.

    Raises:
        ValueError: the folder holds no `.npy` or `.safetensors` files, or both kinds.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> for n in (10, 2):
        ...     _ = save_embeddings(folder / f"img_emb_{n}.npy", torch.zeros(n, 3))
        >>> [Path(shard).name for shard in shards(folder)], size(folder)
        (['img_emb_2.npy', 'img_emb_10.npy'], (12, 3))
    """
    if not os.path.isdir(path):
        return [os.fspath(path)]
    found = [p for p in Path(path).iterdir() if p.suffix in (".npy", ".safetensors") and not p.name.startswith(".")]
    kinds = {p.suffix for p in found}
    if len(kinds) != 1:
        got = " and ".join(sorted(kinds)) or "neither"
        raise ValueError(f"{name}: expected .npy or .safetensors files in the folder {path}, got {got}")
    return [str(p) for p in sorted(found, key=lambda p: natural(p.name))]


def natural(name: str) -> list[tuple[bool, int, str]]:
    """A key that sorts numbers within names by their value.

    Example:
        >>> sorted(["x_10", "x_2"], key=natural)
        ['x_2', 'x_10']
    """
    return [(not t.isdigit(), int(t) if t.isdigit() else 0, t) for t in re.split(r"(\d+)", name)]


def size(path: str | os.PathLike, *, name: str = "path") -> tuple[int, int]:
    """Rows and columns of a file's or a folder's embeddings; `.npy` files are not read for it."""
    rows, dims = 0, 0
    for shard in shards(path, name=name):
        part = _load(shard, name)
        if dims and part.shape[1] != dims:
            raise ValueError(f"{name}: expected D = {dims} as in the shards before, got {tuple(part.shape)} in {shard}")
        rows, dims = rows + len(part), part.shape[1]
    return rows, dims


def digest(path: str | os.PathLike) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            found.update(block)
    return found.hexdigest()


def fingerprint(x: Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and values, a piece at a time.

    Example:
        >>> fingerprint(torch.zeros(2, 3)) == fingerprint(torch.zeros(3, 2))
        False
    """
    digest = hashlib.sha256(f"{x.dtype} {tuple(x.shape)}".encode())
    for rows in x.detach().cpu().split(max(1, CHUNK // max(1, x[:1].numel()))):
        digest.update(rows.contiguous().view(torch.uint8).numpy() if rows.dim() > 1 else rows.numpy().tobytes())
    return digest.hexdigest()


def load_embeddings(path: str | os.PathLike, *, name: str = "path") -> Tensor:
    """Embeddings (N, D) from a `.npy` or `.safetensors` file, or from a folder of either, shard after shard.

    `file.npy[0]` takes the first matrix of an array (K, N, D); `file.safetensors[key]` the tensor of that key. A `.npy`
    file is mapped, a folder is read into memory.

    Raises:
        ValueError: the file is absent, of another format, truncated, pickled, or holds no (N, D) of floating-point
            numbers; shards differ in D or dtype; a folder does not fit into memory.
    """
    first, *others = shards(path, name=name)
    whole = _load(first, name)
    if not others:
        return whole
    rows, dims = size(path, name=name)
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if (needed := rows * dims * whole.element_size()) > free:
        raise ValueError(
            f"{name}: expected embeddings that fit into {free / 2**30:.1f} GiB of free memory, got "
            f"{needed / 2**30:.1f} GiB in {path}"
        )
    parts = [whole, *(_load(shard, name) for shard in others)]
    for shard, part in zip(others, parts[1:], strict=True):
        if part.dtype != whole.dtype:
            raise ValueError(f"{name}: expected {whole.dtype} as in {first}, got {part.dtype} in {shard}")
    return torch.cat(parts)


def chunks(path: str | os.PathLike, rows: int | None = None, *, name: str = "path") -> Iterator[Tensor]:
    """The embeddings of a file or folder, some rows at a time (by default about 4 million numbers), in memory.

    A file is mapped anew for every chunk: one mapping would keep every page it has touched.

    Example:
        >>> import tempfile
        >>> file = save_embeddings(Path(tempfile.mkdtemp()) / "x.npy", torch.zeros(10, 2))
        >>> [len(part) for part in chunks(file, 4)]
        [4, 4, 2]
    """
    for shard in shards(path, name=name):
        count, dims = _load(shard, name).shape
        step = rows or max(1, CHUNK // max(1, dims))
        for first in range(0, count, step):
            yield _load(shard, name)[first : first + step].clone()


def convert(
    source: str | os.PathLike, target: str | os.PathLike, change: Callable[[Tensor], Tensor], *, name: str = "path"
) -> Iterator[int]:
    """Writes `change(rows)` for the rows of a file to another file, a chunk at a time; yields the rows done so far.

    `.npy` is streamed through; `.safetensors` is put together in memory. `target` appears only once it is complete.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> list(convert(save_embeddings(folder / "x.npy", torch.ones(3, 2)), folder / "y.npy", lambda x: 2 * x))
        [3]
        >>> load_embeddings(folder / "y.npy").sum().item()
        12.0
    """
    target = Path(target)
    rows, dims = size(source, name=name)
    parts, done = [], 0
    with replacing(target) as temporary:
        mapped = None
        for part in chunks(source, name=name):
            part = change(part)
            if target.suffix == ".npy" and part.dtype != torch.bfloat16:
                if mapped is None:
                    dtype = part[:0].numpy().dtype
                    mapped = np.lib.format.open_memmap(temporary, mode="w+", dtype=dtype, shape=(rows, dims))
                mapped[done : done + len(part)] = part.numpy()
            else:
                parts.append(part)
            done += len(part)
            yield done
        if mapped is None:
            save(temporary, torch.cat(parts))
        else:
            mapped.flush()


def _load(path: str | os.PathLike, name: str) -> Tensor:
    text = os.fspath(path)
    index = None
    if text.endswith("]") and "[" in text:
        text, _, index = text[:-1].rpartition("[")
    file = Path(text)
    if not file.exists():
        raise ValueError(f"{name}: expected a file, got {file}, which does not exist")
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
    with replacing(path) as temporary:
        save(temporary, x)
    return Path(path)


def save(path: Path, x: Tensor) -> None:
    """Writes (N, D) embeddings to `path` itself, by its ending."""
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file({"embeddings": x.contiguous()}, path)
    elif path.suffix != ".npy":
        raise ValueError(f"path: expected a name ending in .npy or .safetensors, got one in {path.suffix or 'nothing'}")
    elif x.dtype == torch.bfloat16:
        raise ValueError("path: .npy has no bfloat16; expected a name ending in .safetensors")
    else:
        np.save(path, x.numpy(), allow_pickle=False)
