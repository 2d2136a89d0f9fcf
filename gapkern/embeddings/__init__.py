"""Folders of embeddings: shards, their manifest and metadata; `embed` writes them, `verify` checks them."""

from typing import Any

from gapkern.embeddings.folder import Embeddings
from gapkern.embeddings.manifests import manifest
from gapkern.embeddings.provenance import described, model_of
from gapkern.embeddings.verification import verify
from gapkern.embeddings.writing import write_folder

__all__ = ["Embeddings", "RankLost", "described", "embed", "manifest", "model_of", "verify", "write_folder"]


def __getattr__(name: str) -> Any:
    # `run` stands above `gapkern.models`, which reads hashes from here.
    if name in ("embed", "RankLost"):
        from gapkern.embeddings import run

        return getattr(run, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
