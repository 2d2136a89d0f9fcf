"""The sigmoid loss as open_clip calls it: `SigLipLoss`."""

import torch
from torch import Tensor
from torch.nn import functional as F

from gapkern import _check
from gapkern.losses import distributed
from gapkern.losses.inputs import check_pairs, scalar
from gapkern.losses.open_clip.base import NAMES, DropIn, init_module
from gapkern.losses.steps import in_float, sharded_sigmoid, sigmoid_rows, wanted


class SigLipLoss(DropIn):
    """Drop-in for `open_clip.SigLipLoss`: the sigmoid loss in one pass.

    Across ranks the value is that of this rank's images against all texts, and the features' gradient W times that of
    the whole batch, as open_clip has them.

    Args:
        cache_labels: has nothing to do here.
        rank, world_size: of the default torch.distributed group.
        dist_impl: None or one of open_clip's "bidir", "shift", "reduce", "gather"; texts are gathered whichever it is.
        chunk_size: has nothing to do here, as memory is linear already.

    Example:
        >>> x = torch.eye(2)
        >>> round(float(SigLipLoss()(x, x, torch.tensor(10.0), torch.tensor(-10.0))), 4)
        0.6932
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        chunk_size: int = 0,
    ):
        init_module(self)
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.dist_impl = _check.choice("dist_impl", dist_impl or "bidir", ("bidir", "shift", "reduce", "gather"))
        self.chunk_size = chunk_size
        self.prev_num_logits = 0
        self.labels: dict[torch.device, Tensor] = {}

    def get_ground_truth(
        self, device: torch.device, dtype: torch.dtype, num_logits: int, negative_only: bool = False
    ) -> Tensor:
        """(num_logits, num_logits): 1 for the pairs and -1 elsewhere, or -1 everywhere."""
        labels = torch.full((num_logits, num_logits), -1, device=device, dtype=dtype)
        return labels if negative_only else labels.fill_diagonal_(1)

    def get_logits(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor | None = None
    ) -> Tensor:
        """(N, M): s <x_i, y_j> + bias."""
        logits = logit_scale * image_features @ text_features.T
        return logits if logit_bias is None else logits + logit_bias

    def _loss(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        negative_only: bool = False,
    ) -> Tensor:
        """The loss of these images against these texts, as pairs or as negatives alone."""
        if self._replaced("get_logits", "get_ground_truth"):
            logits = self.get_logits(image_features, text_features, logit_scale, logit_bias)
            n, like = image_features.shape[0], image_features
            labels = self.get_ground_truth(like.device, like.dtype, n, negative_only=negative_only)
            return -F.logsigmoid(labels * logits).sum() / n
        images, texts, scale, bias = self._pairs(image_features, text_features, logit_scale, logit_bias)
        # Labels beyond the last column are nobody's.
        offset = texts.shape[0] if negative_only else 0
        return in_float(sigmoid_rows(images, texts, scale, bias, offset) / images.shape[0], images)

    def _pairs(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        images, texts, scale = check_pairs(image_features, text_features, logit_scale, NAMES)
        return images, texts, scale, scalar("logit_bias", 0.0 if logit_bias is None else logit_bias, images)

    def _over_ranks(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor | None
    ) -> Tensor:
        place, (images, texts, scale, bias) = self._checked(
            lambda: self._pairs(image_features, text_features, logit_scale, logit_bias)
        )
        assert place is not None
        if not self._replaced("get_logits", "get_ground_truth", "_loss"):
            return in_float(sharded_sigmoid(images, texts, scale, bias, place, 1.0, type(self).__name__), images)
        terms = wanted(type(self).__name__, text_features=text_features)
        everyone = distributed.gather(text_features, place, terms).chunk(place.world)
        # This rank's own texts first, as open_clip has them.
        loss = self._loss(image_features, text_features, logit_scale, logit_bias)
        for rank, others in enumerate(everyone):
            if rank != place.rank:
                loss = loss + self._loss(image_features, others, logit_scale, logit_bias, negative_only=True)
        return loss

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, or {"contrastive_loss": loss}."""
        arguments = image_features, text_features, logit_scale, logit_bias
        loss = self._loss(*arguments) if self.world_size == 1 else self._over_ranks(*arguments)
        return {"contrastive_loss": loss} if output_dict else loss


SigLipLoss._hooks = {name: vars(SigLipLoss)[name] for name in ("get_logits", "get_ground_truth", "_loss")}
