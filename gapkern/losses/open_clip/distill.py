"""The contrastive loss and a teacher's softmaxes: `DistillClipLoss`."""

from typing import Any

import torch
from torch import Tensor

from gapkern import _check
from gapkern.losses import distributed
from gapkern.losses.inputs import check_pairs
from gapkern.losses.open_clip.base import NAMES
from gapkern.losses.open_clip.clip import ClipLoss
from gapkern.losses.steps import in_float, log_sum_exps, own_rows, wanted
from gapkern.ops import distill

TEACHER_NAMES = ("dist_image_features", "dist_text_features", "dist_logit_scale")


class DistillClipLoss(ClipLoss):
    """Drop-in for `open_clip.DistillClipLoss`: the contrastive loss and the cross-entropy to a teacher's softmaxes.

    The softmaxes are formed in chunks of rows and used at once; the teacher gets no gradient.

    Example:
        >>> x = torch.eye(2)
        >>> [round(float(v), 4) for v in DistillClipLoss()(x, x, torch.tensor(1.0), x, x, torch.tensor(1.0))]
        [0.3133, 0.5822]
    """

    def dist_loss(self, teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
        """The mean over rows of the cross-entropy of the student's softmax to the teacher's."""
        return -(teacher_logits.softmax(dim=1) * student_logits.log_softmax(dim=1)).sum(dim=1).mean(dim=0)

    def forward(  # type: ignore[override]
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        dist_image_features: Tensor,
        dist_text_features: Tensor,
        dist_logit_scale: Tensor,
        output_dict: bool = False,
    ) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        """(contrastive, distill), or a dict of "contrastive_loss" and "distill_loss"."""
        student = image_features, text_features, logit_scale
        teacher = dist_image_features, dist_text_features, dist_logit_scale
        fused = not self._is_dense(image_features, "dist_loss")
        contrastive, distill_loss = (self._fused if fused else self._dense)(student, teacher)
        if output_dict:
            return {"contrastive_loss": contrastive, "distill_loss": distill_loss}
        return contrastive, distill_loss

    def _dense(self, student: tuple[Any, Any, Any], teacher: tuple[Any, Any, Any]) -> tuple[Tensor, Tensor]:
        logits, targets = self.get_logits(*student), self.get_logits(*teacher)
        per_image, per_text = (self.dist_loss(t, s) for t, s in zip(targets, logits, strict=True))
        return self._cross_entropies(*logits), (per_image + per_text) / 2

    def _fused(self, student: tuple[Any, Any, Any], teacher: tuple[Any, Any, Any]) -> tuple[Tensor, Tensor]:
        def check() -> Any:
            of_student = check_pairs(*student, names=NAMES)
            of_teacher = check_pairs(*teacher, names=TEACHER_NAMES)
            _check.same_rows(image_features=of_student[0], dist_image_features=of_teacher[0])
            _check.same_device(image_features=of_student[0], dist_image_features=of_teacher[0])
            return of_student, tuple(t.detach() for t in of_teacher)

        place, ((images, texts, scale), (teacher_images, teacher_texts, teacher_scale)) = self._checked(check)
        own = slice(0, texts.shape[0])
        if place is not None:
            own = own_rows(texts, place)
            terms = wanted(self._terms(), images=images, texts=texts, logit_scale=scale)
            images, texts = (distributed.scale_gradient(t, self._factor()) for t in (images, texts))
            scale = distributed.mean_gradient(scale, place)
            texts = distributed.gather(texts, place, terms)
            teacher_texts = distributed.gather(teacher_texts, place, "the teacher")
        row, col, positive = log_sum_exps(images, texts, scale, "dot", "auto", own.start)
        both = (images, texts, scale), (teacher_images, teacher_texts, teacher_scale)
        stats = [_of_all_ranks(distill.stats(*of), place) for of in both]
        rows, cols = distill.cross(*both, *stats)
        if place is not None:
            col, cols = distributed.merge_columns(col, place), distributed.sum_columns(cols, place)
        losses = (row + col[own]) / 2 - positive, (rows + cols[own]) / 2
        contrastive, distill_loss = (in_float(self._mean(v, place), images) for v in losses)
        return contrastive, distill_loss


def _of_all_ranks(stats: tuple[Tensor, Tensor], place: distributed.Shard | None) -> tuple[Tensor, Tensor]:
    """The rows' statistics as they are, the columns' over every rank's rows."""
    rows, cols = stats
    if place is None:
        return rows, cols
    largest, logs = distributed.stack(cols, place).unbind(1)
    most = largest.amax(0)
    return rows, torch.stack([most, (largest - most + logs).logsumexp(0)])


DistillClipLoss._hooks = ClipLoss._hooks | {"dist_loss": vars(DistillClipLoss)["dist_loss"]}
