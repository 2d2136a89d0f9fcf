"""What the pairs' losses are made of: rows of the logits on one process, and on a rank within the whole batch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gapkern import _check
from gapkern.losses import distributed, ring
from gapkern.ops import contrastive
from gapkern.ops.precision import matmul_precision

# memory="auto" lets the forward pass keep this much for the backward pass, which then forms the logits once less.
AUTO_BYTES = 256 * 2**20
ALL_BYTES = 2**62
IN_A_RING = ", in a ring"


def work_bytes(memory: str | int) -> int:
    """Bytes of N x M work space that a `memory` argument allows."""
    if isinstance(memory, str):
        _check.choice("memory", memory, ("auto", "recompute", "keep"))
        return {"recompute": 0, "auto": AUTO_BYTES, "keep": ALL_BYTES}[memory]
    return _check.integer("memory", memory, low=0)


def pair_losses(images: Tensor, texts: Tensor, scale: Tensor, similarity: str, memory: str | int) -> Tensor:
    """(N,) float64."""
    row, col, positive = log_sum_exps(images, texts, scale, similarity, memory, 0)
    return (row + col) / 2 - positive


def log_sum_exps(
    images: Tensor, texts: Tensor, scale: Tensor, similarity: str, memory: str | int, label_offset: int
) -> tuple[Tensor, Tensor, Tensor]:
    return contrastive.lse_pair(
        images,
        texts,
        scale,
        similarity=similarity,
        label_offset=label_offset,
        precision=matmul_precision(images.device.type),
        work_bytes=work_bytes(memory) if torch.is_grad_enabled() else 0,
    )


def wanted(terms: str, **tensors: Tensor) -> str:
    """`terms`, and which gradients flow: the ranks' backward passes meet too."""
    with_gradient = [name for name, t in tensors.items() if torch.is_grad_enabled() and t.requires_grad]
    return f"{terms} with gradients of {', '.join(with_gradient) or 'nothing'}"


def own_rows(texts: Tensor, place: distributed.Shard) -> slice:
    """Where this rank's rows are among everyone's."""
    return slice(place.rank * texts.shape[0], (place.rank + 1) * texts.shape[0])


def sharded_losses(
    images: Tensor,
    texts: Tensor,
    scale: Tensor,
    similarity: str,
    memory: str | int,
    place: distributed.Shard,
    factor: float,
    terms: str,
    travels: bool = False,
) -> Tensor:
    """(n,) float64 losses of this rank's pairs within the whole batch; texts are gathered, or travel.

    `factor` multiplies the gradients of images and texts; 1 is that of the sum of all ranks' means.
    """
    terms = wanted(terms, images=images, texts=texts, logit_scale=scale)
    own = own_rows(texts, place)
    images, texts = (distributed.scale_gradient(t, factor) for t in (images, texts))
    scale = distributed.mean_gradient(scale, place)
    if travels:
        distributed.agree(texts, place, terms + IN_A_RING)
        part = work_bytes(memory) // place.world

        def block(owner: int, visitors: Sequence[Tensor], images: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
            return log_sum_exps(images, visitors[0], scale, similarity, part, 0)

        job = ring.Visit(place, block, ("lse", "columns", "own"))
        row, partial, positive = ring.visit(job, [texts], (images, scale))
    else:
        everyone = distributed.gather(texts, place, terms)
        row, partial, positive = log_sum_exps(images, everyone, scale, similarity, memory, own.start)
    return (row + distributed.merge_columns(partial, place)[own]) / 2 - positive


def sigmoid_rows(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, label_offset: int) -> Tensor:
    precision = matmul_precision(images.device.type)
    return contrastive.sigmoid_sum(images, texts, scale, bias, label_offset=label_offset, precision=precision)


def sharded_sigmoid(
    images: Tensor,
    texts: Tensor,
    scale: Tensor,
    bias: Tensor,
    place: distributed.Shard,
    factor: float,
    terms: str,
    travels: bool = False,
) -> Tensor:
    """0-d float64: this rank's rows against all texts, over its number of pairs."""
    terms = wanted(terms, images=images, texts=texts, logit_scale=scale, logit_bias=bias)
    images, texts = (distributed.scale_gradient(t, factor) for t in (images, texts))
    scale, bias = (distributed.mean_gradient(t, place) for t in (scale, bias))
    if not travels:
        everyone = distributed.gather(texts, place, terms)
        return sigmoid_rows(images, everyone, scale, bias, place.rank * texts.shape[0]) / images.shape[0]

    def block(owner: int, visitors: Sequence[Tensor], images: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor]:
        return (sigmoid_rows(images, visitors[0], scale, bias, 0 if owner == place.rank else texts.shape[0]),)

    distributed.agree(texts, place, terms + IN_A_RING)
    job = ring.Visit(place, block, ("sum",), again=True)
    (total,) = ring.visit(job, [texts], (images, scale, bias))
    return total / images.shape[0]


def without_gradient(losses: Tensor, bias: Tensor | None) -> Tensor:
    """The losses themselves: a bias moves all logits alike. Its gradient is zero, and is there."""
    if bias is None:
        return losses
    return losses + (bias - bias).reshape(())


def in_float(losses: Tensor, images: Tensor) -> Tensor:
    return losses if images.dtype == torch.float64 else losses.float()
