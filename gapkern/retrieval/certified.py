"""What the codes of an index that exists leave certain of its first neighbours."""

from typing import Any

import torch
from torch import Tensor

from gapkern.gap import Projection
from gapkern.retrieval import families, foreign
from gapkern.retrieval._faiss import errors
from gapkern.theory import Certificates, certify

__all__ = ["certificates"]


def certificates(index: Any, rows: Tensor, queries: Tensor, projection: Projection) -> Certificates | None:
    """`certify` of FAISS's index of rows (G, D), which are in the order of their ids, and queries (Q, D).

    None where the index orders rows otherwise than by their scores to what its codes decode to.
    """
    if not families.decodes(index) or not families.scores_decoded(index, projection.metric):
        return None
    names = foreign.ids(index)
    with errors("existing", "an index whose codes FAISS decodes"):
        decoded = foreign.decoded(index, names)[names.argsort(kind="stable")]
    return certify(queries, rows, torch.from_numpy(decoded), projection)
