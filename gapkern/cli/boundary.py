"""Between a verb and its user: what a mistake, a full disk, an interrupt or a closed pipe look like from outside.

Mistakes are one line and exit status 2. An error that is none of the user's is exit status 1 and asks to be reported;
`--debug` shows where any error comes from.
"""

import codecs
import contextlib
import os
import struct
import sys
import tarfile
import tokenize
import traceback
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from gapkern.cli import answer

ERRORS = "gapkern.spelled"  # how what the terminal's encoding lacks is written
_SPELLINGS = {
    "α": "alpha",
    "×": "x",
    "→": "->",
    "–": "-",
    "—": "-",
    "…": "...",
    "“": '"',
    "”": '"',
    "’": "'",
}
_NO_MEMORY = ("DefaultCPUAllocator", "bad_alloc", "std::length_error", "Unable to allocate")


def _spelled(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lost = error.object[error.start : error.end]
    return "".join(_SPELLINGS.get(c) or c.encode("ascii", "backslashreplace").decode() for c in lost), error.end


codecs.register_error(ERRORS, _spelled)


def spelled(text: str, encoding: str | None) -> str:
    """`text` as a terminal of that encoding shows it.

    Example:
        >>> spelled("α ≤ 1", "ascii"), spelled("α ≤ 1", "utf-8")
        ('alpha \\\\u2264 1', 'α ≤ 1')
    """
    encoding = encoding or "utf-8"
    return text.encode(encoding, ERRORS).decode(encoding)


def line(text: object) -> str:
    """One line of a message: line ends are spaces, and what would steer a terminal is escaped.

    Example:
        >>> line("expected\\n a file, got \\x1b[2J.npy")
        'expected a file, got \\\\x1b[2J.npy'
    """
    joined = " ".join(part.strip() for part in str(text).strip().split("\n"))
    return "".join(c if c.isprintable() or "\ud800" <= c <= "\udfff" else ascii(c)[1:-1] for c in joined)


def mistake(error: BaseException) -> str | None:
    """What to tell of an error that input, a file system or too little memory caused; None for one of our own.

    Example:
        >>> mistake(PermissionError(13, "Permission denied", "x.npy")), mistake(KeyError("x"))
        ('cannot read or write x.npy: Permission denied', None)
    """
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _out_of_memory(error)):
        return f"expected work that fits into memory, got {line(error).rstrip('.') or 'too much'}"
    if isinstance(error, OSError) and error.strerror:
        names = [os.fsdecode(n) for n in (error.filename, error.filename2) if isinstance(n, str | bytes)]
        return line(" ".join(["cannot read or write", " and ".join(names)]).strip() + f": {error.strerror}")
    if isinstance(error, OSError | ValueError | TypeError | ImportError):
        return line(error) or type(error).__name__
    if type(error).__name__ in ("LinAlgError", "_LinAlgError"):  # NumPy's and PyTorch's
        return f"expected embeddings that can be decomposed in float64, got {line(error)}"
    if isinstance(error, _foreign()):
        return f"expected files that can be read, got one of which a reader says: {line(error) or type(error).__name__}"
    return None


def _foreign() -> tuple[type[BaseException], ...]:
    """What readers of formats raise of damaged files; those that name the file make ValueErrors of it."""
    from safetensors import SafetensorError

    return (
        EOFError,
        RecursionError,
        OverflowError,
        tokenize.TokenError,
        SafetensorError,
        tarfile.TarError,
        zipfile.BadZipFile,
        zlib.error,
        struct.error,
    )


def _out_of_memory(error: RuntimeError) -> bool:
    import torch

    return isinstance(error, torch.OutOfMemoryError) or any(mark in str(error) for mark in _NO_MEMORY)


@contextlib.contextmanager
def streams() -> Iterator[None]:
    """Standard streams that take every character, and are there even where the caller closed them."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            # The next file that is opened would get the number of the stream that is missing.
            opened = open(os.devnull, "r+" if number else "r", encoding="utf-8")  # noqa: SIM115
            setattr(sys, name, opened)
    before = []
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            before.append((stream, stream.errors))
            stream.reconfigure(errors=ERRORS)
    try:
        yield
    finally:
        for stream, errors in before:
            with contextlib.suppress(OSError, ValueError):
                stream.reconfigure(errors=errors)


def guarded(name: str, work: Callable[[], Any], debug: bool = False) -> int:
    """The exit status of `work`, which belongs to the command `name`; what goes wrong is said on stderr.

    Returns:
        What `work` returns, 0 for None; 2 for a mistake, 130 for an interrupt, 1 for an error of gapkern's own.
    """
    try:
        status = work() or 0
    except KeyboardInterrupt:
        _say(f"{name}: interrupted")
        status = 130
    except BrokenPipeError:
        status = 0  # the reader of the output has closed it
    except Exception as error:
        if isinstance(error, OSError) and error.filename is None and flushed(name):
            return 2  # it was what was printed
        if debug:
            _say(traceback.format_exc().rstrip())
        said = mistake(error)
        status = 1 if said is None else 2
        _say(
            f"{name}: {said}"
            if said is not None
            else f"{name}: internal error: {type(error).__name__}: {line(error)} (please report it with what "
            "`gapkern --debug` shows)"
        )
    return max(status, flushed(name))


def flushed(name: str) -> int:
    """Flushes the output: 0, also into a closed pipe (`| head`); 2 where it cannot be written."""
    stream = answer.stream()
    try:
        sys.stdout.flush()
        stream.flush()
        return 0
    except (OSError, ValueError) as error:
        if isinstance(error, OSError):
            # The interpreter flushes again at exit, and would report the error a second time.
            with contextlib.suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())
        if isinstance(error, BrokenPipeError | ValueError):
            return 0
        _say(f"{name}: cannot write to the standard output: {error.strerror}")
        return 2


def _say(text: str) -> None:
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)
