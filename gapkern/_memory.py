"""How much memory this process may still take."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

# By the file system: a group's limits, what it uses, and where its statistics say what files it keeps for later.
_VERSIONS = {
    "cgroup2": (("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file")),
    "cgroup": (("memory.limit_in_bytes",), "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
}
UNLIMITED = 2**63


def available(root: str | os.PathLike[str] = "/") -> int:
    """Bytes that can be taken without swapping: what the system has, and no more than any control group leaves.

    Files that are only kept for later count as free, in the system (MemAvailable) as in a group.

    Args:
        root: where /proc and the control groups lie.

    Example:
        >>> available() > 2**20
        True
    """
    root = Path(root)
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, KeyError, ValueError, IndexError):
        free = min(free, _table(root / "proc/meminfo")["MemAvailable:"] * 1024)
    for kind, group in _groups(root):
        free = min(free, _left(kind, group))
    return max(0, free)


def _table(file: Path) -> dict[str, int]:
    lines = (line.split() for line in _text(file).split("\n") if line)
    return {words[0]: int(words[1]) for words in lines}


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="surrogateescape")


def _groups(root: Path) -> Iterator[tuple[str, Path]]:
    """The folder of each group that limits the memory of this process: its own, and those around it."""
    try:
        mounts = [line.split(" ") for line in _text(root / "proc/self/mountinfo").split("\n") if " - cgroup" in line]
        groups = [line.split(":", 2) for line in _text(root / "proc/self/cgroup").split("\n") if line]
    except OSError:
        return
    for words in mounts:
        # id, parent, device, what of the file system is mounted, where, options, ..., "-", kind, source, options
        kind, options = words[words.index("-") + 1], words[-1].split(",")
        if kind not in _VERSIONS or (kind == "cgroup" and "memory" not in options):
            continue
        wanted = "memory" if kind == "cgroup" else ""
        group = next((g for _, controllers, g in groups if wanted in controllers.split(",")), "/")
        mounted, top = words[3].rstrip("/"), root / words[4].lstrip("/")
        inside = group[len(mounted) :] if group.startswith(f"{mounted}/") else ""
        folder = top / inside.strip("/")
        while True:
            yield kind, folder
            if folder == top or folder == folder.parent:
                break
            folder = folder.parent


def _left(kind: str, group: Path) -> int:
    limits, usage, kept = _VERSIONS[kind]
    most = UNLIMITED
    for limit in limits:
        with contextlib.suppress(OSError, ValueError):  # no such file at the root; "max" is no number
            most = min(most, int(_text(group / limit)))
    if most == UNLIMITED:
        return most
    try:
        used, statistics = int(_text(group / usage)), _table(group / "memory.stat")
    except (OSError, ValueError, IndexError):
        return most
    return most - max(0, used - sum(statistics.get(name, 0) for name in kept))
