"""Standard output is the answer's alone: what libraries print there while a verb works goes to standard error."""

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from typing import TextIO

_stream: TextIO | None = None


def stream() -> TextIO:
    """Where an answer is written."""
    return _stream or sys.stdout


@contextlib.contextmanager
def alone(only: bool) -> Iterator[None]:
    """While the block lasts, the process's descriptor 1 is standard error, and `stream()` the standard output.

    C and C++ code, threads and child processes write to the descriptor, whatever Python's `sys.stdout` is. It is moved
    once, before there are threads, and moved back at the end. Where `sys.stdout` is not the descriptor, as in tests and
    notebooks, the descriptor is left alone.

    Args:
        only: what Python code prints with `print` is no answer either (--json): `stream()` alone is.
    """
    global _stream
    before, moved = sys.stdout, None
    with contextlib.suppress(OSError, ValueError, AttributeError):
        if before.fileno() == 1:
            before.flush()
            _flush_c()
            moved = os.dup(1)
            os.dup2(2, 1)
    answers = before
    if moved is not None:
        answers = open(moved, "w", encoding=before.encoding, errors=before.errors, closefd=False)  # noqa: SIM115
        if before.line_buffering:
            answers.reconfigure(line_buffering=True)
    _stream = answers
    sys.stdout = sys.stderr if only else answers
    try:
        yield
        answers.flush()
    finally:
        _stream, sys.stdout = None, before
        if moved is not None:
            _flush_c()
            os.dup2(moved, 1)
            with contextlib.suppress(OSError, ValueError):
                answers.close()
            os.close(moved)


def _flush_c() -> None:
    """What C's own buffer holds goes where the descriptor leads now, not where it leads when the process ends."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).fflush(None)
