"""Search in a gallery: FAISS indexes with the gap closed (`GapIndex`), and recall of both directions (`recall`)."""

from gapkern.retrieval.index import GapIndex
from gapkern.retrieval.recalls import recall

__all__ = ["GapIndex", "recall"]
