"""What embeddings were made from: their model, their rows' order, their files' hashes."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gapkern import files
from gapkern.embeddings.manifests import manifest
from gapkern.layout import FORMAT, KINDS, place


def described(path: str | os.PathLike[str], kind: str | None = None, *, name: str = "path") -> dict[str, Any]:
    """What is known of embeddings beside their values: the manifest of a folder, or what stands beside a file.

    Raises:
        ValueError: see `place` and `manifest`.
    """
    found = place(path, kind, name=name)
    if found.is_dir():
        return manifest(found, name=name) or {}
    note = Path(f"{found}.json")
    try:
        told = files.read_json(note, name=name)
    except (OSError, ValueError):
        return {}
    # A file that has been written anew since is not the one that was described.
    if not isinstance(told, dict) or told.get("format") != FORMAT or told.get("bytes") != found.stat().st_size:
        return {}
    return told if told.get("sha256") == files.digest(found) else {}


def kind_of(path: str | os.PathLike[str], kind: str | None = None, *, name: str = "path") -> str | None:
    """ "img_emb" or "text_emb", as the manifest or the folder's name says; None where neither does."""
    told = described(path, kind, name=name).get("kind") or place(path, kind, name=name).name
    return told if told in KINDS else None


def made_from(path: str | os.PathLike[str], kind: str | None = None, *, name: str = "path") -> dict[str, Any]:
    """What a result says of embeddings that it was made from.

    Returns:
        "sha256" of their files in the rows' order; where they are known, "order" (the hash of the rows' keys) and
        "transforms" that have moved them; "key" where a file holds several matrices.

    Raises:
        ValueError: see `described`; a file is absent.
    """
    told = described(path, kind, name=name)
    parts = [files.parted(shard) for shard in files.shards(place(path, kind, name=name), name=name)]
    facts = {
        "sha256": [files.digest(file) for file, _ in parts],
        "key": parts[0][1],
        "order": told.get("order"),
        "transforms": told.get("transforms"),
    }
    return {key: value for key, value in facts.items() if value}


def model_of(path: str | os.PathLike[str], kind: str | None = None, *, name: str = "path") -> str | None:
    """The id of the model that made a folder's embeddings, from its manifest; None where nothing says it.

    Args:
        path, kind: as for `Embeddings`.

    Raises:
        ValueError: the folder holds both kinds and `kind` does not say which; its manifest is none.
    """
    return described(path, kind, name=name).get("model")


def agreed(models: Mapping[str, str | None]) -> str | None:
    """The one model that is known of several embeddings, by their argument's name; None where none is.

    Raises:
        ValueError: two are known and differ.

    Example:
        >>> agreed({"gallery": "ViT-B-16/openai", "queries": None})
        'ViT-B-16/openai'
    """
    known = {name: model for name, model in models.items() if model}
    for name, model in known.items():
        first, expected = next(iter(known.items()))
        if model != expected:
            raise ValueError(f"{name}: expected embeddings of {expected} as in {first}, got those of {model}")
    return next(iter(known.values()), None)
