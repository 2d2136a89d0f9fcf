"""Files that appear whole or not at all, and what is said where they cannot."""

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gapkern import _lock

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


@contextmanager
def replacing(path: str | os.PathLike[str], *, name: str = "path") -> Iterator[Path]:
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
        with _named(f"{name}: cannot write {path}"):
            yield temporary
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        _lock.release(lock)


@contextmanager
def _named(doing: str) -> Iterator[None]:
    """Turns what writers raise where a disk is full or fails, each in its own way, into one ValueError."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        # NumPy tells only how much it wrote; Rust, C++ and Arrow put the system's words into their own.
        text = str(error)
        words = [
            os.strerror(number)
            for number in _NO_ROOM
            if getattr(error, "errno", None) == number or os.strerror(number) in text
        ]
        if not words and "requested and" in text and isinstance(error, OSError):
            words = [os.strerror(errno.ENOSPC)]
        if not words:
            raise
        raise ValueError(f"{doing}: {words[0]}") from None


def writable(path: str | os.PathLike[str], *, name: str = "path") -> Path:
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


def write(path: str | os.PathLike[str], save: Callable[[Path], Any]) -> Path:
    """Calls `save` with a temporary name and renames what it wrote to `path`."""
    with replacing(path) as temporary:
        save(temporary)
    return Path(path)


def sync(path: str | os.PathLike[str]) -> None:
    """Waits until the file's bytes are on the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
