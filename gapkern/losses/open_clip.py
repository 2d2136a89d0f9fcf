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

Subclasses may override open_clip's methods: `get_logits`, `get_ground_truth`, `dist_loss`, SigLipLoss's `_loss`. Where
one is overridden, or labels were put into the cache, the loss is formed from the N x M logits with them.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from gapkern import _check
from gapkern.losses import distributed
from gapkern.losses.functional import (
    in_float,
    log_sum_exps,
    own_rows,
    pair_losses,
    sharded_losses,
    sharded_sigmoid,
    sigmoid_rows,
    wanted,
    without_gradient,
)
from gapkern.losses.inputs import check_pairs, scalar
from gapkern.ops import distill

T = TypeVar("T")
_init_module = torch.nn.Module.__init__  # not super(): that may be open_clip's class, once it was patched


class _StandsIn(type):
    """While open_clip is patched, its own class's instances are instances of the class under its name, too."""

    stands_for: type | None = None

    def __instancecheck__(cls, instance: Any) -> bool:
        other = cls.__dict__.get("stands_for")
        return super().__instancecheck__(instance) or (other is not None and isinstance(instance, other))


class _Loss(torch.nn.Module, metaclass=_StandsIn):
    """What the drop-in classes share: their place among ranks, and whether their hooks are their own."""

    rank: int
    world_size: int
    _hooks: dict[str, Any]

    def _replaced(self, *names: str) -> bool:
        """Whether a subclass or an instance has one of these methods of its own."""
        return any(name in vars(self) or getattr(type(self), name) is not self._hooks[name] for name in names)

    def _checked(self, check: Callable[[], T]) -> tuple[distributed.Shard | None, T]:
        """This rank's place, if there are others, and the result of `check`; an error is raised on every rank."""
        place = distributed.shard(True) if self.world_size > 1 else None
        try:
            if place is not None and (place.rank, place.world) != (self.rank, self.world_size):
                raise ValueError(
                    f"rank and world_size: expected {place.rank} and {place.world} as in torch.distributed, "
                    f"got {self.rank} and {self.world_size}"
                )
            return place, check()
        except (TypeError, ValueError) as error:
            if place is not None:
                distributed.refuse(place, error)
            raise


class ClipLoss(_Loss):
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
        _init_module(self)
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

    def _contrastive(self, image_features, text_features, logit_scale, logit_bias=None) -> Tensor:
        if self._is_dense(image_features):
            logits = self.get_logits(image_features, text_features, logit_scale, logit_bias=logit_bias)
            return self._cross_entropies(*logits)

        def check():
            images, texts, scale = check_pairs(image_features, text_features, logit_scale, _NAMES)
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
        image_features,
        text_features,
        logit_scale,
        dist_image_features,
        dist_text_features,
        dist_logit_scale,
        output_dict=False,
    ):
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
        def check():
            of_student = check_pairs(*student, names=_NAMES)
            of_teacher = check_pairs(*teacher, names=_TEACHER_NAMES)
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


class SigLipLoss(_Loss):
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
        _init_module(self)
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

    def _pairs(self, image_features, text_features, logit_scale, logit_bias) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        images, texts, scale = check_pairs(image_features, text_features, logit_scale, _NAMES)
        return images, texts, scale, scalar("logit_bias", 0.0 if logit_bias is None else logit_bias, images)

    def _over_ranks(self, image_features, text_features, logit_scale, logit_bias) -> Tensor:
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


_NAMES = ("image_features", "text_features", "logit_scale")
_TEACHER_NAMES = ("dist_image_features", "dist_text_features", "dist_logit_scale")
ClipLoss._hooks = {name: vars(ClipLoss)[name] for name in ("get_logits", "get_ground_truth")}
DistillClipLoss._hooks = ClipLoss._hooks | {"dist_loss": vars(DistillClipLoss)["dist_loss"]}
SigLipLoss._hooks = {name: vars(SigLipLoss)[name] for name in ("get_logits", "get_ground_truth", "_loss")}
