"""What a local model is called: by the bytes of its files, not by its path."""

import hashlib
from pathlib import Path

from gapkern import files

KEPT = (".json", ".safetensors", ".bin", ".pth", ".pt", ".txt", ".model", ".jinja")


def of_folder(folder: Path, within: str = "*", kept: tuple[str, ...] = KEPT) -> str:
    """The hash of a model's folder: its configuration, weights and vocabulary, by name.

    Args:
        within: which files, as for `Path.glob`.
        kept: their suffixes; no other file changes what the model is.
    """
    parts = [p for p in sorted(folder.glob(within)) if p.suffix in kept and p.is_file()]
    told = "".join(f"{p.relative_to(folder).as_posix()} {files.digest(p)}\n" for p in parts)
    return hashlib.sha256(told.encode()).hexdigest()[:16]
