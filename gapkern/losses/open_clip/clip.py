"""The contrastive loss as open_clip calls it: `ClipLoss`, and `CoCaLoss` with its captions."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gapkern import _check
from gapkern.losses import distributed
from gapkern.losses.inputs import check_pairs, scalar
from gapkern.losses.open_clip.base import NAMES, DropIn, init_module
from gapkern.losses.steps import in_float, own_rows, pair_losses, sharded_losses, wanted, without_gradient


class ClipLoss(DropIn):
    """Drop-in for `open_clip.ClipLoss`: the contrastive loss without its logits.

    Args:
        local_loss, gather_with_grad: see the module's table.
        cache_labels: whether `get_ground_truth` keeps its labels; the loss itself forms none.
        rank, world_size: of the default torch.distributed group.
        use_horovod: not supported.

    Raises:
        ValueError: use_horovod, or a world_size that is not the group's.

    Example:
        >>> loss = ClipLoss()
        >>> features = torch.nn.functional.normalize(torch.eye(4) + 0.1, dim=1)
        >>> sorted(loss(features, features, torch.tensor(10.0), output_dict=True))
        ['contrastive_loss']
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ):
        init_module(self)
        if use_horovod:
            raise ValueError("use_horovod: expected False; use torch.distributed")
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.use_horovod = use_horovod
        self.prev_num_logits = 0
        self.labels: dict[torch.device, Tensor] = {}
        self._formed: tuple[Tensor | None, int] = (None, 0)

    def get_ground_truth(self, device: torch.device, num_logits: int) -> Tensor:
        """(num_logits,) int64: the column of each row's label."""
        if self.prev_num_logits == num_logits and device in self.labels:
            return self.labels[device]
        first = num_logits * self.rank if self.world_size > 1 and self.local_loss else 0
        labels = torch.arange(first, first + num_logits, device=device)
        if self.cache_labels:
            self.labels[device], self.prev_num_logits = labels, num_logits
            self._formed = labels, labels._version
        return labels

    def get_logits(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The logits of images against texts and of texts against images, of the rows that the loss is over."""
        images, texts = image_features, text_features
        if self.world_size > 1:
            images, texts = self._everyone(images, "image_features"), self._everyone(texts, "text_features")
        if self.world_size > 1 and self.local_loss:
            per_image = logit_scale * image_features @ texts.T
            per_text = logit_scale * text_features @ images.T
        else:
            per_image = logit_scale * images @ texts.T
            per_text = per_image.T
        if logit_bias is not None:
            per_image, per_text = per_image + logit_bias, per_text + logit_bias
        return per_image, per_text

    def _everyone(self, features: Tensor, name: str) -> Tensor:
        """Every rank's features, with the gradients that `local_loss` and `gather_with_grad` ask for."""
        place, _ = self._checked(lambda: _check.matrix(name, features))
        assert place is not None
        if self.gather_with_grad:
            return distributed.gather(features, place, wanted(name, features=features))
        everyone = distributed.gather(features.detach(), place, name)
        if self.local_loss:
            return everyone
        own = own_rows(features, place)
        return torch.cat([everyone[: own.start], features, everyone[own.stop :]])

    def _is_dense(self, features: Any, *hooks: str) -> bool:
        """Whether the logits are formed: a hook is not ours, or labels in the cache are not."""
        if self._replaced("get_logits", "get_ground_truth", *hooks):
            return True
        cached = self.labels.get(features.device) if self.labels and isinstance(features, Tensor) else None
        formed, version = self._formed
        if cached is None or (cached is formed and cached._version == version):
            return False
        first = self.rank * cached.shape[0] if self.world_size > 1 and self.local_loss else 0
        ours = cached.dim() == 1 and torch.equal(cached, torch.arange(first, first + len(cached), device=cached.device))
        self._formed = (cached, cached._version) if ours else (None, 0)
        return not ours

    def _cross_entropies(self, per_image: Tensor, per_text: Tensor) -> Tensor:
        labels = self.get_ground_truth(per_image.device, per_image.shape[0])
        return (F.cross_entropy(per_image, labels) + F.cross_entropy(per_text, labels)) / 2

    def _factor(self) -> float:
        return 1.0 if self.local_loss or self.gather_with_grad else 1 / self.world_size

    def _mean(self, losses: Tensor, place: distributed.Shard | None) -> Tensor:
        """Over this rank's pairs, or over everyone's."""
        mean = losses.mean()
        return mean if place is None or self.local_loss else distributed.mean_value(mean, place)

    def _terms(self) -> str:
        return f"{type(self).__name__}(local_loss={self.local_loss}, gather_with_grad={self.gather_with_grad})"

    def _contrastive(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor | None = None
    ) -> Tensor:
        if self._is_dense(image_features):
            logits = self.get_logits(image_features, text_features, logit_scale, logit_bias=logit_bias)
            return self._cross_entropies(*logits)

        def check() -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
            images, texts, scale = check_pairs(image_features, text_features, logit_scale, NAMES)
            return images, texts, scale, None if logit_bias is None else scalar("logit_bias", logit_bias, images)

        place, (images, texts, scale, bias) = self._checked(check)
        if place is None:
            losses = pair_losses(images, texts, scale, "dot", "auto")
        else:
            losses = sharded_losses(images, texts, scale, "dot", "auto", place, self._factor(), self._terms())
        return in_float(self._mean(without_gradient(losses, bias), place), images)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, or {"contrastive_loss": loss}."""
        loss = self._contrastive(image_features, text_features, logit_scale, logit_bias)
        return {"contrastive_loss": loss} if output_dict else loss


class CoCaLoss(ClipLoss):
    """Drop-in for `open_clip.CoCaLoss`: the contrastive loss and a captioning cross-entropy.

    Example:
        >>> loss = CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0)
        >>> x = torch.eye(2)
        >>> contrastive, caption = loss(x, x, torch.zeros(2, 3, 5), torch.ones(2, 3).long(), torch.tensor(1.0))
        >>> round(float(contrastive), 4), round(float(caption), 4)
        (0.3133, 3.2189)
    """

    def __init__(
        self,
        caption_loss_weight: float,
        clip_loss_weight: float,
        pad_id: int = 0,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ):
        ClipLoss.__init__(self, local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod)
        self.clip_loss_weight = clip_loss_weight
        self.caption_loss_weight = caption_loss_weight
        self.caption_loss = torch.nn.CrossEntropyLoss(ignore_index=pad_id)

    def forward(  # type: ignore[override]
        self,
        image_features: Tensor,
        text_features: Tensor,
        logits: Tensor,
        labels: Tensor,
        logit_scale: Tensor,
        output_dict: bool = False,
    ) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        """(contrastive, caption), or a dict of "contrastive_loss" and "caption_loss"; logits (N, L, V)."""
        if self.clip_loss_weight:
            contrastive = self.clip_loss_weight * self._contrastive(image_features, text_features, logit_scale)
        else:
            contrastive = torch.tensor(0, device=logits.device)
        caption = self.caption_loss_weight * self.caption_loss(logits.permute(0, 2, 1), labels)
        if output_dict:
            return {"contrastive_loss": contrastive, "caption_loss": caption}
        return contrastive, caption


ClipLoss._hooks = {name: vars(ClipLoss)[name] for name in ("get_logits", "get_ground_truth")}
