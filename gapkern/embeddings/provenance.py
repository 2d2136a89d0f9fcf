"""What embeddings were made from: their model, their rows' order, their files' hashes."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gapkern import _formats, files, layout
from gapkern.embeddings import keys
from gapkern.embeddings.folder import Embeddings
from gapkern.embeddings.manifests import manifest
from gapkern.layout import FORMAT, KINDS, place


def described(path: str | os.PathLike[str], kind: str | None = None, *, name: str = "path") -> dict[str, Any]:
    """What is known of embeddings beside their values: a folder's manifest, what stands beside a file, tables' keys.

    Raises:
        ValueError: see `place` and `manifest`.
    """
    found = place(path, kind, name=name)
    told = manifest(found, name=name) if found.is_dir() else _note(found, name)
    if not told and (keyed := _keyed(found, name)) is not None:
        return {"order": keys.order(keyed)}
    return told or {}


def _note(found: Path, name: str) -> dict[str, Any]:
    """What `shift apply` wrote beside a file."""
    if files.is_table(found):
        found = Path(layout.parted(found)[0])
    try:
        told = files.read_json(f"{found}.json", name=name)
    except (OSError, ValueError):
        return {}
    # A file that has been written anew since is not the one that was described.
    if not isinstance(told, dict) or told.get("format") != FORMAT or told.get("bytes") != found.stat().st_size:
        return {}
    return told if told.get("sha256") == files.digest(found) else {}


def _keyed(found: Path, name: str) -> list[str] | None:
    """The keys of tables' rows, which are in them; None of other files, and of tables without."""
    file, _ = layout.parted(found)
    if os.path.isdir(file) or files.is_table(file):
        shards = files.shards(found, name=name) if os.path.exists(file) else []
        if shards and all(map(files.is_table, shards)):
            return Embeddings(found, name=name).keys()
    return None


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
    parts = [layout.parted(shard) for shard in files.shards(place(path, kind, name=name), name=name)]
    for file, _ in parts:
        _formats.opened(Path(file), name)
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
