"""sentence-transformers' losses of in-batch negatives under their own names, without their matrices.

They are subclasses: arguments, errors, configurations and model cards are the originals'. Other similarities than
cosine and dot product, whose logits no kernel of ours forms, go to the originals.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from gapkern import _check
from gapkern.losses.gist import gist_loss
from gapkern.losses.info_nce import info_nce_loss

_check.extra("sentence_transformers", "sentence-transformers", "peers")

from sentence_transformers.sentence_transformer import losses as theirs  # noqa: E402
from sentence_transformers.sentence_transformer.losses.multiple_negatives_ranking import embed_columns  # noqa: E402
from sentence_transformers.util import cos_sim, dot_score  # noqa: E402

DIRECTIONS = {"query_to_doc": "q-d", "query_to_query": "q-q", "doc_to_query": "d-q", "doc_to_doc": "d-d"}
HARDNESS = {"in_batch_negatives": "in-batch", "hard_negatives": "hard", "all_negatives": "all"}


class MultipleNegativesRankingLoss(theirs.MultipleNegativesRankingLoss):  # type: ignore[misc]
    """sentence-transformers' loss of this name by `info_nce_loss`, in linear memory.

    Args, inputs: as the original's. With gather_across_devices the batch is that of all ranks.

    Example:
        >>> loss = MultipleNegativesRankingLoss(torch.nn.Identity(), scale=1.0)
        >>> x = torch.eye(4)
        >>> round(float(loss.compute_loss_from_embeddings([x, x], None)), 4)
        0.7437
    """

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Any) -> Tensor:
        """The loss of queries, documents and any number of negatives, each (n, D)."""
        if self.similarity_fct not in (cos_sim, dot_score) or len(embeddings) < 2:
            found: Tensor = super().compute_loss_from_embeddings(embeddings, labels)
            return found
        if self.similarity_fct is cos_sim:
            embeddings = [normalize(x, dim=-1) for x in embeddings]
        queries, documents, *negatives = embeddings
        raised = self.hardness_mode is not None and self.hardness_strength > 0
        return info_nce_loss(
            queries,
            documents,
            self.scale,
            hard_negatives=torch.stack(negatives, 1) if negatives else None,
            share_hard_negatives=True,
            directions=[DIRECTIONS[name] for name in self.directions],
            partition="joint" if self.partition_mode == "joint" else "separate",
            hardness=self.hardness_strength if raised else 0.0,
            hardness_of=HARDNESS[self.hardness_mode] if raised else "all",
            reduction="none",
            group=_group(self),
        ).mean()


class CachedMultipleNegativesRankingLoss(theirs.CachedMultipleNegativesRankingLoss):  # type: ignore[misc]
    """sentence-transformers' GradCache of the loss above; their MatryoshkaLoss works around it.

    Args, inputs: as the original's. The loss itself needs no mini-batches.
    """

    def __init__(self, model: Any, *arguments: Any, **options: Any):
        super().__init__(model, *arguments, **options)
        wrapped = MultipleNegativesRankingLoss(model)
        for name in self._delegated_to_wrapped_loss:
            setattr(wrapped, name, getattr(self, name))
        self.loss: Any = wrapped

    def calculate_loss(self, reps: list[list[Tensor]], labels: Any = None, *, with_backward: bool = False) -> Tensor:
        """The loss of the mini-batches' embeddings; `with_backward` takes it back to them."""
        value: Tensor = self.loss.compute_loss_from_embeddings([torch.cat(parts) for parts in reps], labels)
        if with_backward:
            value.backward()
            value = value.detach()
        return value


class GISTEmbedLoss(theirs.GISTEmbedLoss):  # type: ignore[misc]
    """sentence-transformers' GISTEmbedLoss by `gist_loss`, in linear memory.

    Args, inputs: as the original's; where the guide needs tokens of its own, or ranks are gathered, it is the original.
    """

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Any) -> Tensor:
        """The loss of queries, documents and perhaps negatives."""
        columns = list(sentence_features)
        if self.must_retokenize or self.gather_across_devices or len(columns) not in (2, 3):
            found: Tensor = super().forward(columns, labels)
            return found
        copies = [dict(column) for column in columns]
        queries, documents, *negatives = (normalize(x, dim=-1) for x in embed_columns(self.model, columns))
        with torch.no_grad():
            guides = [normalize(x, dim=-1) for x in embed_columns(self.guide, copies)]
        return gist_loss(
            queries,
            documents,
            1 / self.temperature,
            guides[0],
            guides[1],
            negatives=negatives[0] if negatives else None,
            guide_negatives=guides[2] if negatives else None,
            margin=self.margin,
            margin_strategy=self.margin_strategy,
            contrast_queries=self.contrast_anchors,
            contrast_documents=self.contrast_positives,
        )


def _group(loss: Any) -> Any:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return True if loss.gather_across_devices and distributed else None
