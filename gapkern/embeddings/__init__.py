"""Folders of embeddings: shards, their manifest and metadata; `verify` checks them."""

from gapkern.embeddings.folder import Embeddings, manifest, model_of, write_folder
from gapkern.embeddings.verification import verify

__all__ = ["Embeddings", "manifest", "model_of", "verify", "write_folder"]
