"""What a result depends on: versions, processor, threads."""

import platform
from importlib import metadata
from typing import Any

import torch

from gapkern import _load
from gapkern._version import __version__

PACKAGES = ("torch", "numpy", "open_clip_torch", "faiss-cpu", "scikit-learn", "matplotlib", "safetensors")


def processor() -> str:
    """The processor's name, as well as the system tells it."""
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
        if names:
            return names[0]
    except OSError:
        pass
    return platform.processor() or platform.machine()


def versions() -> dict[str, str | None]:
    """Versions of the packages that matter; None where one is not installed."""
    found: dict[str, str | None] = {"gapkern": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def describe() -> dict[str, Any]:
    """Versions, processor, threads and the kernels in use, for a result file."""
    return {
        "versions": versions(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "kernels": {library.name: library.detail for library in _load.status()},
    }
