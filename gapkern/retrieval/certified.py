"""What the codes of an index that exists leave certain of its first neighbours."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from gapkern.gap import Projection
from gapkern.retrieval import families, stored
from gapkern.retrieval._faiss import errors, faiss
from gapkern.theory import Certificates, certify

__all__ = ["certificates"]


def certificates(index: Any, rows: Tensor, queries: Tensor, projection: Projection) -> Certificates | None:
    """`certify` of FAISS's index of rows (G, D), which are in the order of their ids, and queries (Q, D).

    None where the index orders rows otherwise than by their scores to what its codes decode to.
    """
    if not families.decodes(index) or not families.scores_decoded(index, projection.metric):
        return None
    with errors("existing", "an index whose codes FAISS decodes"):
        decoded = torch.from_numpy(_decoded(index))
    return certify(queries, rows, decoded, projection)


def _decoded(index: Any) -> np.ndarray:
    """What the codes stand for (G, D), in the order of the ids."""
    module = faiss()
    if families.lists_of(index) is not None:
        return stored.vectors(index, np.sort(stored.ids(index)), type(index).__name__)
    outer = module.downcast_index(index)
    names = np.arange(index.ntotal)
    if isinstance(outer, module.IndexIDMap):
        names, outer = module.vector_to_array(outer.id_map), module.downcast_index(outer.index)
    found: np.ndarray = outer.reconstruct_n(0, index.ntotal)[names.argsort(kind="stable")]
    return found
