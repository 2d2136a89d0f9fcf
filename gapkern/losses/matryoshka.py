"""Losses of prefixes of the embeddings, and of their spread."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gapkern import _check
from gapkern.losses import pairs, prefixes
from gapkern.losses.inputs import embeddings
from gapkern.ops import autocast


class Matryoshka(torch.nn.Module):
    """The sum of a loss over prefixes of the embeddings (Kusupati et al. 2022, Eq. 1), each normalised again.

    On the CPU all prefixes of `contrastive_loss` and `info_nce_loss` are one pass over the logits, of no more products
    than the widest prefix alone has. With masks, hard or extra negatives, other directions than "q-d" and "d-q", a
    group, or another loss, each prefix is a call of the loss.

    Args:
        loss: (*embeddings, logit_scale, ...) -> loss: any of `gapkern.losses`.
        dims: widths of the prefixes.
        weights: one for each width; 1 where None.
        normalize: whether prefixes become unit vectors.
        count: how many of the arguments are embeddings.

    Raises:
        ValueError: no width, or one below 1 or beyond the embeddings'; not as many weights.

    Example:
        >>> from gapkern.losses import info_nce_loss
        >>> x = torch.eye(4)
        >>> round(float(Matryoshka(info_nce_loss, dims=(4,))(x, x, 2.0)), 4)
        0.3408
    """

    def __init__(
        self,
        loss: Callable[..., Tensor],
        dims: Sequence[int],
        weights: Sequence[float] | None = None,
        *,
        normalize: bool = True,
        count: int = 2,
    ):
        super().__init__()
        if not dims:
            raise ValueError("dims: expected at least one width")
        self.dims = tuple(_check.integer("dims", d, low=1) for d in dims)
        if weights is not None and len(weights) != len(self.dims):
            raise ValueError(f"weights: expected {len(self.dims)}, one for each of dims, got {len(weights)}")
        self.weights = (1.0,) * len(self.dims) if weights is None else tuple(float(w) for w in weights)
        self.loss, self.normalize, self.count = loss, normalize, _check.integer("count", count, low=1)

    def _prefix(self, x: Tensor, dims: int) -> Tensor:
        if dims > x.shape[-1]:
            raise ValueError(f"dims: expected at most the embeddings' {x.shape[-1]}, got {dims}")
        x = x[..., :dims]
        return torch.nn.functional.normalize(x, dim=-1) if self.normalize else x

    def forward(self, *arguments: Any, **options: Any) -> Tensor:
        """The weighted sum of the losses; hard_negatives, extra_negatives and negatives are shortened too."""
        if self.count == 2:
            at_once = prefixes.together(self.loss, self.dims, self.weights, self.normalize, arguments, options)
            if at_once is not None:
                return at_once
        features, rest = arguments[: self.count], arguments[self.count :]
        further = {
            k: v
            for k, v in options.items()
            if k in ("hard_negatives", "extra_negatives", "negatives") and isinstance(v, Tensor)
        }
        total: Any = 0.0
        for dims, weight in zip(self.dims, self.weights, strict=True):
            shorter = {k: self._prefix(v, dims) for k, v in further.items()}
            cut = [self._prefix(x, dims) for x in features]
            total = total + weight * self.loss(*cut, *rest, **{**options, **shorter})
        found: Tensor = total
        return found


def uniformity_loss(features: Tensor, t: Tensor | float = 2.0, *, group: Any = None, exchange: str = "auto") -> Tensor:
    """log of the mean of exp(-t ||x_i - x_j||^2) over pairs i != j (Wang and Isola 2020), in linear memory.

    Args:
        features: (N, D), N >= 2, float32, float16, bfloat16 or float64.
        t: one element.
        group, exchange: as for `contrastive_loss`.

    Returns:
        0-d, in float32 (float64 for float64 inputs).

    Raises:
        ValueError: fewer than two rows. TypeError: not floating-point.

    Example:
        >>> round(float(uniformity_loss(torch.eye(3))), 4)
        -4.0
    """
    batch = pairs.Batch(group, exchange)
    try:
        x = embeddings("features", features)
        x = x.to(autocast.dtype_of(x))
        scale = pairs.scalar("t", t, x)
        world = 1 if batch.place is None else batch.place.world
        if len(x) * world < 2:
            raise ValueError(f"features: expected at least two rows, got {len(x)}")
    except (TypeError, ValueError) as error:
        batch.refuse(error)
        raise
    like, n = x, len(x) * world
    batch.enter("uniformity_loss", {"t": scale}, features=x)
    x, scale = batch.feature(x), batch.scalar(scale)
    negative, _ = batch.spread(x).against_itself(scale, similarity="sqeuclidean")
    total = batch.merged(pairs.log_sum(negative[None], 1))
    mean = total - torch.log(torch.full_like(total, float(n) * (n - 1)))
    return batch.reduce(mean, None, "mean", like)
