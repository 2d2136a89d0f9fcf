"""Search in a gallery: FAISS indexes with the gap closed (`GapIndex`), recall of both directions (`recall`), what
quantisers keep of the neighbours (`compare_quantisers`), and what projecting the queries buys in an index that exists
(`repair`)."""

from gapkern.retrieval.existing import Repair, repair
from gapkern.retrieval.index import GapIndex
from gapkern.retrieval.quantisers import QuantiserResult, compare_quantisers
from gapkern.retrieval.recalls import recall

__all__ = ["GapIndex", "QuantiserResult", "Repair", "compare_quantisers", "recall", "repair"]
