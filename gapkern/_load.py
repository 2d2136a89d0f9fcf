"""Loads the native libraries and knows why one is absent.

`status()` lists every library with what became of it; `gapkern doctor` prints it. None is a Python module: PyTorch
loads them, and what they say of themselves is read by ctypes, so that one build serves every version of Python.
"""

import ctypes
import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from gapkern._version import __version__

_PACKAGE = Path(__file__).resolve().parent
_REBUILD = (
    "rebuild with `make build` or `pip install --no-build-isolation -e .`"
    if (_PACKAGE.parent / "CMakeLists.txt").exists()
    else "reinstall with `pip install --force-reinstall --no-deps gapkern`"
)


@dataclass(frozen=True)
class LibraryStatus:
    """What became of one native library: its file name, whether it is loaded, and why not."""

    name: str
    loaded: bool
    detail: str


_status: dict[str, LibraryStatus] = {}


def status() -> list[LibraryStatus]:
    """Every native library, in loading order.

    Example:
        >>> [library.name for library in status()]
        ['libgapkern_cpu', 'libgapkern_cuda']
    """
    return list(_status.values())


def build_facts() -> dict[str, str]:
    """What the CPU library was built from: version, torch, compiler, and the digest of csrc/ as `sources`."""
    facts: dict[str, str] = json.loads(_said("gapkern_build_facts"))
    return facts


def active_isa() -> str:
    """The instruction set the CPU kernels use; the environment's GAPKERN_ISA lowers it."""
    return _said("gapkern_active_isa")


def _said(name: str) -> str:
    path = _find("libgapkern_cpu")
    assert path is not None, "load() comes first"
    function = getattr(ctypes.CDLL(str(path)), name)  # the library that is loaded already
    function.restype = ctypes.c_char_p
    return bytes(function()).decode()


def sources_digest(root: Path) -> str | None:
    """SHA-256 over csrc/ below `root`, as cmake/WriteBuildFacts.cmake does; None outside a checkout."""
    if not (root / "CMakeLists.txt").exists():
        return None
    suffixes = {".h", ".cpp", ".cu", ".cuh"}
    paths = sorted(p.relative_to(root).as_posix() for p in (root / "csrc").rglob("*") if p.suffix in suffixes)
    lines = [f"{hashlib.sha256((root / path).read_bytes()).hexdigest()} {path}\n" for path in paths]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _check_fresh(facts: dict[str, str]) -> None:
    if facts["version"] != __version__:
        raise ImportError(
            f"gapkern: the native libraries are of version {facts['version']}, the Python files of {__version__}; "
            f"{_REBUILD}"
        )
    digest = sources_digest(_PACKAGE.parent)
    if digest is not None and digest != facts["sources"]:
        raise ImportError(f"gapkern: csrc/ has changed since the native libraries were built; {_REBUILD}")


def _find(name: str) -> Path | None:
    return next((path for path in (_PACKAGE / "lib").glob(f"{name}.*") if path.suffix in (".so", ".dylib")), None)


def load() -> None:
    """Loads what this installation has. The CPU library is required, the CUDA library optional.

    Raises:
        ImportError: a required library is absent, stale or unloadable; in one line, with what to do about it.
        SystemExit: the same, where this import is the first step of the command line `gapkern`.
    """
    try:
        _load_all()
    except ImportError as error:
        if Path(sys.argv[0]).stem == "gapkern" or (sys.argv[0] == "-m" and "gapkern" in sys.orig_argv):
            sys.exit(str(error))
        raise


def _load_all() -> None:
    path = _find("libgapkern_cpu")
    if path is None:
        raise ImportError(
            f"gapkern: the native libraries are not built (no {_PACKAGE / 'lib'}/libgapkern_cpu); {_REBUILD}"
        )
    try:
        torch.ops.load_library(path)
        facts = build_facts()
    except (OSError, AttributeError) as error:
        raise ImportError(
            f"gapkern: libgapkern_cpu does not load with torch {torch.__version__}: {error}; {_REBUILD}"
        ) from None
    _check_fresh(facts)
    _status["libgapkern_cpu"] = LibraryStatus("libgapkern_cpu", True, f"kernels: {active_isa()}")
    _status["libgapkern_cuda"] = _load_cuda()


def _load_cuda() -> LibraryStatus:
    name = "libgapkern_cuda"
    path = _find(name)
    if path is None:
        return LibraryStatus(name, False, "not built (GAPKERN_CUDA=off, or no nvcc when it was built)")
    if torch.version.cuda is None:
        return LibraryStatus(name, False, f"torch {torch.__version__} is a CPU-only build")
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return LibraryStatus(name, False, f"does not load: {error}")
    if not torch.cuda.is_available():
        return LibraryStatus(name, True, "loaded; no CUDA device is visible")
    return LibraryStatus(name, True, "loaded")
