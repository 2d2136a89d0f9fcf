"""Locks on files: one run at a time in a folder, and temporary files that show whether their writer still lives.

A lock is `flock`'s: the kernel drops it with the process, however that ends. Forked children give it up at once, so
that workers which outlive a killed run by seconds do not keep the next one out.
"""

import contextlib
import errno
import fcntl
import os
import re
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK = ".gapkern.lock"
TEMPORARY = re.compile(r"\..*\.gapkern-[0-9a-f]{8}\.tmp(\.[^.]*)?", re.DOTALL)
LONGEST = 100  # bytes of a file's name that go into its temporary one: names end at 255

_held: set[int] = set()
_guard = threading.Lock()  # a fork waits until no descriptor is half noted


def _drop_in_child() -> None:
    for descriptor in _held:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _held.clear()
    _guard.release()


os.register_at_fork(before=_guard.acquire, after_in_parent=_guard.release, after_in_child=_drop_in_child)


def _take(path: Path, flags: int = 0) -> int | None:
    """A descriptor that locks the file of that name, made where there is none; None while another holds it.

    Raises:
        OSError: it cannot be opened or made.
    """
    while True:
        with _guard:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | flags, 0o666)
            _held.add(descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno == errno.EWOULDBLOCK:
                _release(descriptor)
                return None
            # The file system has no locks: go on without one.
        # Another may have removed or renamed the file between the two calls: the lock is on no name then.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.lstat(path)):
                return descriptor
        _release(descriptor)


def _release(descriptor: int) -> None:
    with _guard:
        if descriptor in _held:  # not in a child
            _held.discard(descriptor)
            os.close(descriptor)


def make(folder: str | os.PathLike[str], *, name: str = "out") -> Path:
    """Makes a folder where there is none.

    Raises:
        ValueError: it cannot be made, or a file has its name.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise ValueError(f"{name}: cannot write to the folder {folder}: it is a file") from None
    except OSError as error:
        raise ValueError(f"{name}: cannot write to the folder {folder}: {error.strerror}") from None
    return folder


@contextmanager
def locked(folder: str | os.PathLike[str], *, name: str = "out") -> Iterator[Path]:
    """Makes a folder and keeps every other run out of it while the block lasts.

    What killed runs left half written there, in files of `files.replacing`, is removed first. The lock is the file
    `.gapkern.lock` in the folder, gone when the block is left; one that a killed run left behind locks nothing. A
    folder that was made here and stays empty is removed again.

    Args:
        folder: made where there is none.
        name: the argument that named it, for the message.

    Raises:
        ValueError: the folder cannot be written, or another run, or another thread, is writing it.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> with locked(folder):
        ...     with locked(folder):
        ...         pass
        Traceback (most recent call last):
            ...
        ValueError: out: expected a folder that no other run writes, got ...
        >>> os.listdir(folder)
        []
    """
    folder = Path(folder)
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    make(folder, name=name)
    lock = folder / LOCK
    try:
        descriptor = _take(lock)
    except OSError as error:
        raise ValueError(f"{name}: cannot write to the folder {folder}: {error.strerror}") from None
    if descriptor is None:
        raise ValueError(f"{name}: expected a folder that no other run writes, got {folder}")
    try:
        for inner, _, _ in os.walk(folder):
            sweep(Path(inner))
        yield folder
    finally:
        if descriptor in _held:
            with contextlib.suppress(OSError):
                lock.unlink()
            _release(descriptor)
            with contextlib.suppress(OSError):
                for place in missing:
                    place.rmdir()  # of a run that failed before it wrote anything


def temporary(path: Path) -> tuple[Path, int]:
    """A new file beside `path`, with its ending, and the descriptor that locks it while it is written.

    Raises:
        OSError: it cannot be made.
    """
    while True:
        start, suffix = (os.fsdecode(os.fsencode(part)[:LONGEST]) for part in (path.name, path.suffix))
        beside = path.parent / f".{start}.gapkern-{secrets.token_hex(4)}.tmp{suffix}"
        try:
            descriptor = _take(beside, os.O_EXCL)
        except FileExistsError:
            continue
        if descriptor is not None:
            return beside, descriptor


def release(descriptor: int) -> None:
    """Gives up the lock that `temporary` took."""
    _release(descriptor)


def sweep(folder: Path) -> None:
    """Removes the temporary files in a folder whose writers are gone."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if not TEMPORARY.fullmatch(entry.name):
                continue
            with contextlib.suppress(OSError):
                descriptor = os.open(entry.path, os.O_RDWR | os.O_NOFOLLOW)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(entry.path)
                finally:
                    os.close(descriptor)
