"""FAISS, imported when it is first needed, and its errors in our words."""

import ctypes
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from gapkern import _check


def faiss() -> Any:
    """The faiss module.

    Raises:
        ImportError: it is not installed.
    """
    return _check.extra("faiss", "faiss-cpu", "retrieval")


@contextmanager
def errors(name: str, expected: str) -> Iterator[None]:
    """Turns what FAISS throws into a ValueError `name: expected ..., got ...` with FAISS's own reason."""
    try:
        yield
    except RuntimeError as error:
        # "Error in <signature> at <file>:<line>: Error: 'condition' failed: reason"
        reason = re.sub(r"^Error in .*? at \S+?:\d+: (Error: )?", "", str(error).strip().replace("\n", " "))
        raise ValueError(f"{name}: expected {expected}; FAISS: {reason}") from None


@contextmanager
def one_warning(name: str) -> Iterator[None]:
    """Makes one warning of the lines that FAISS's clustering prints on stderr, the same for each codebook."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            lines = list(dict.fromkeys(file.read().decode(errors="replace").splitlines()))
            advice = [line for line in lines if line.startswith("WARNING clustering")]
            for line in lines:
                if line not in advice:
                    print(line, file=sys.stderr)
    if advice:
        warnings.warn(f"{name}: FAISS: {advice[0].removeprefix('WARNING ')}", stacklevel=4)


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps what FAISS prints on stdout from there: --json promises nothing else."""
    libc = ctypes.CDLL(None)
    sys.stdout.flush()
    libc.fflush(None)
    kept = os.dup(1)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        try:
            yield
        finally:
            libc.fflush(None)
            os.dup2(kept, 1)
            os.close(kept)
