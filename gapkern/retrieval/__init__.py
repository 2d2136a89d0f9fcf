"""Search in a gallery: FAISS indexes with the gap closed (`GapIndex`), recall of both directions (`recall`), and what
quantisers keep of the neighbours (`compare_quantisers`)."""

from gapkern.retrieval.index import GapIndex
from gapkern.retrieval.quantisers import QuantiserResult, compare_quantisers
from gapkern.retrieval.recalls import recall

__all__ = ["GapIndex", "QuantiserResult", "compare_quantisers", "recall"]
