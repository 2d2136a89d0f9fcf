"""open_clip's loss classes, with its arguments, its order and its results, on gapkern's losses.

Across ranks (`world_size` > 1) each rank forms its rows of the logits once. With W ranks:

| local_loss | gather_with_grad | value | gradient of the features |
| --- | --- | --- | --- |
| False | False | of the whole batch | that of the whole batch |
| False | True | of the whole batch | W times that of the whole batch |
| True | either | of this rank's pairs | W times that of the whole batch |

DistributedDataParallel averages over ranks, so that factor W trains as one process with the whole batch would. The
factors are open_clip's own. Where open_clip leaves part of the gradient out (local_loss without gather_with_grad), here
it is whole. The gradient of logit_scale is that of the whole batch, on every rank.
"""

from typing import Any

import torch
from torch import Tensor

from gapkern import _check
from gapkern.losses import distributed
from gapkern.losses.functional import (
    check_pairs,
    in_float,
    log_sum_exps,
    pair_losses,
    scalar,
    sharded_losses,
    sharded_sigmoid,
    sigmoid_rows,
    without_gradient,
)  # fmt: skip
from gapkern.ops.chunked import CHUNK_ELEMENTS


class ClipLoss(torch.nn.Module):
    """Drop-in for `open_clip.ClipLoss`: the contrastive loss without its logits.

    Args:
        local_loss, gather_with_grad: see the module's table.
        cache_labels: has nothing to do here, as no labels are formed.
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
        super().__init__()
        if use_horovod:
            raise ValueError("use_horovod: expected False; use torch.distributed")
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.use_horovod = use_horovod

    def _place(self) -> distributed.Shard:
        return _place(self.rank, self.world_size)

    def _factor(self) -> float:
        return 1.0 if self.local_loss or self.gather_with_grad else 1 / self.world_size

    def _mean(self, losses: Tensor) -> Tensor:
        """Over this rank's pairs, or over everyone's."""
        mean = losses.mean()
        return mean if self.world_size == 1 or self.local_loss else distributed.mean_value(mean, self._place())

    def _contrastive(self, image_features, text_features, logit_scale, logit_bias=None) -> Tensor:
        scale = check_pairs(image_features, text_features, logit_scale)
        if self.world_size == 1:
            losses = pair_losses(image_features, text_features, scale, "dot", "auto")
        else:
            losses = sharded_losses(image_features, text_features, scale, "dot", "auto", self._place(), self._factor())
        return in_float(self._mean(without_gradient(losses, logit_bias)), image_features)

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
        super().__init__(local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod)
        self.clip_loss_weight = clip_loss_weight
        self.caption_loss_weight = caption_loss_weight
        self.caption_loss = torch.nn.CrossEntropyLoss(ignore_index=pad_id)

    def forward(self, image_features, text_features, logits, labels, logit_scale, output_dict=False):  # type: ignore[override]
        """(contrastive, caption), or a dict of "contrastive_loss" and "caption_loss"; logits (N, L, V)."""
        if self.clip_loss_weight:
            contrastive = self.clip_loss_weight * self._contrastive(image_features, text_features, logit_scale)
        else:
            contrastive = torch.tensor(0, device=logits.device)
        caption = self.caption_loss_weight * self.caption_loss(logits.permute(0, 2, 1), labels)
        if output_dict:
            return {"contrastive_loss": contrastive, "caption_loss": caption}
        return contrastive, caption


class DistillClipLoss(ClipLoss):
    """Drop-in for `open_clip.DistillClipLoss`: the contrastive loss and the cross-entropy to a teacher's softmaxes.

    The teacher's softmaxes are formed in chunks of rows and used at once; the teacher gets no gradient.

    Example:
        >>> x = torch.eye(2)
        >>> [round(float(v), 4) for v in DistillClipLoss()(x, x, torch.tensor(1.0), x, x, torch.tensor(1.0))]
        [0.3133, 0.5822]
    """

    def forward(  # type: ignore[override]
        self,
        image_features,
        text_features,
        logit_scale,
        dist_image_features,
        dist_text_features,
        dist_logit_scale,
        output_dict=False,
    ):
        """(contrastive, distill), or a dict of "contrastive_loss" and "distill_loss"."""
        images, texts = image_features, text_features
        scale = check_pairs(images, texts, logit_scale)
        teacher_images, teacher_texts = dist_image_features.detach(), dist_text_features.detach()
        teacher_scale = check_pairs(teacher_images, teacher_texts, dist_logit_scale).detach()
        own = slice(0, len(texts))
        if self.world_size > 1:
            place = self._place()
            distributed.check_even(place, images=images, texts=texts)
            images, texts = (distributed.scale_gradient(t, self._factor()) for t in (images, texts))
            scale = distributed.mean_gradient(scale, place)
            own = slice(place.rank * len(texts), (place.rank + 1) * len(texts))
            texts, teacher_texts = distributed.gather(texts, place), distributed.gather(teacher_texts, place)
        row, col, positive = log_sum_exps(images, texts, scale, "dot", "auto", own.start)
        with torch.no_grad():
            teacher = teacher_images, teacher_texts, teacher_scale
            teacher_row, teacher_col, _ = log_sum_exps(*teacher, "dot", 0, own.start)
            if self.world_size > 1:
                teacher_col = distributed.merge_columns(teacher_col, place)
        if self.world_size > 1:
            col = distributed.merge_columns(col, place)
        both = (row + col[own]) / 2
        # Every logit weighted by the teacher's two softmaxes, over this rank's rows.
        agreement = _TeacherWeighted.apply(images, texts, scale, *teacher, teacher_row, teacher_col)
        contrastive = in_float(self._mean(both - positive), image_features)
        distill = in_float(self._mean(both - agreement / len(images)), image_features)
        if output_dict:
            return {"contrastive_loss": contrastive, "distill_loss": distill}
        return contrastive, distill


class _TeacherWeighted(torch.autograd.Function):
    """sum_ij T_ij s <x_i, y_j> with T the mean of the teacher's row and column softmaxes, in chunks of rows."""

    @staticmethod
    def forward(ctx, images, texts, scale, teacher_images, teacher_texts, teacher_scale, teacher_row, teacher_col):
        work = torch.promote_types(images.dtype, torch.float32)
        x, y = images.to(work), texts.to(work)
        teacher_y = teacher_texts.to(work)
        step = max(1, CHUNK_ELEMENTS // len(y))
        toward_x, toward_y = torch.empty_like(x), torch.zeros_like(y)
        for first in range(0, len(x), step):
            rows = slice(first, first + step)
            t = teacher_scale.to(work) * (teacher_images[rows].to(work) @ teacher_y.T)
            weight = (t - teacher_row[rows, None].to(work)).exp_()
            weight += (t - teacher_col.to(work)).exp_()
            weight /= 2
            toward_x[rows] = weight @ y
            toward_y += weight.T @ x[rows]
        total = (x.double() * toward_x.double()).sum()
        ctx.save_for_backward(toward_x, toward_y, total, scale)
        ctx.dtypes = images.dtype, texts.dtype
        return scale.double().reshape(()) * total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        toward_x, toward_y, total, scale = ctx.saved_tensors
        factor = (grad * scale.double().reshape(())).to(toward_x.dtype)
        return (
            (factor * toward_x).to(ctx.dtypes[0]),
            (factor * toward_y).to(ctx.dtypes[1]),
            (grad * total).to(scale.dtype).reshape(scale.shape),
            *(None,) * 5,
        )


class SigLipLoss(torch.nn.Module):
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
        super().__init__()
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.dist_impl = _check.choice("dist_impl", dist_impl or "bidir", ("bidir", "shift", "reduce", "gather"))
        self.chunk_size = chunk_size

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, or {"contrastive_loss": loss}."""
        scale = check_pairs(image_features, text_features, logit_scale)
        bias = scalar("logit_bias", 0.0 if logit_bias is None else logit_bias, image_features)
        if self.world_size == 1:
            loss = sigmoid_rows(image_features, text_features, scale, bias, 0) / len(image_features)
        else:
            loss = sharded_sigmoid(image_features, text_features, scale, bias, _place(self.rank, self.world_size), 1.0)
        loss = in_float(loss, image_features)
        return {"contrastive_loss": loss} if output_dict else loss


def _place(rank: int, world_size: int) -> distributed.Shard:
    place = distributed.shard(True)
    if (place.rank, place.world) != (rank, world_size):
        raise ValueError(
            f"rank and world_size: expected {place.rank} and {place.world} as in torch.distributed, "
            f"got {rank} and {world_size}"
        )
    return place


class patch_open_clip:
    """Makes open_clip's `create_loss` and its names for the losses return gapkern's classes.

    In effect at once; `undo()` or leaving a `with` block takes it back.

    Example:
        >>> import open_clip
        >>> with patch_open_clip():
        ...     open_clip.ClipLoss.__module__
        'gapkern.losses.open_clip'
        >>> open_clip.ClipLoss.__module__
        'open_clip.loss'
    """

    def __init__(self):
        open_clip = _check.extra("open_clip", "open_clip_torch", "demo")
        self._replaced: list[tuple[Any, str, Any]] = []
        for ours in (ClipLoss, CoCaLoss, DistillClipLoss, SigLipLoss):
            name = ours.__name__
            for module in (open_clip, open_clip.loss, open_clip.factory):
                if hasattr(module, name):
                    self._replaced.append((module, name, getattr(module, name)))
                    setattr(module, name, ours)

    def undo(self) -> None:
        """Gives open_clip its own classes back."""
        while self._replaced:
            setattr(*self._replaced.pop())

    def __enter__(self) -> "patch_open_clip":
        return self

    def __exit__(self, *_: Any) -> None:
        self.undo()
