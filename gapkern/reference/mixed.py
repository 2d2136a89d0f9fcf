"""Search in a gallery of several modalities as published (GR-CLIP, arXiv 2507.19054), document by document."""

import math

import torch
from torch import Tensor


def unit(x: Tensor) -> Tensor:
    """x / ||x||, (D,) float64."""
    found: Tensor = x.double() / torch.linalg.vector_norm(x.double())
    return found


def document(
    text: Tensor | None,
    image: Tensor | None,
    text_mean: Tensor | None = None,
    image_mean: Tensor | None = None,
    weight: float = 0.5,
) -> Tensor:
    """One document (D,): N(N(text) - mean), N(N(image) - mean), or of both N(w N(text) + (1 - w) N(image) - the same of
    the means). Means are of unit rows; None is no mean.

    Example:
        >>> document(torch.tensor([3.0, 4.0]), None, torch.tensor([0.6, 0.0])).tolist()
        [0.0, 1.0]
    """
    of_text, of_image = (0.0 if mean is None else mean.double() for mean in (text_mean, image_mean))
    if text is not None and image is not None:
        both = weight * unit(text) + (1 - weight) * unit(image)
        return unit(both - (weight * of_text + (1 - weight) * of_image))
    if text is not None:
        return unit(unit(text) - of_text)
    assert image is not None
    return unit(unit(image) - of_image)


def query(text: Tensor, mean: Tensor | None = None) -> Tensor:
    """N(N(text) - mean), (D,)."""
    return unit(unit(text) if mean is None else unit(text) - mean.double())


def ndcg(scores: Tensor, gains: Tensor, k: int = 10) -> float:
    """sum of gain / log2(rank + 1) over the k best by score, over the same of the k largest gains (Jarvelin and
    Kekalainen, 2002); 0 where there is no gain.

    Example:
        >>> round(ndcg(torch.tensor([0.9, 0.8, 0.1]), torch.tensor([0.0, 1.0, 0.0])), 4)
        0.6309
    """
    found = gains[scores.argsort(descending=True, stable=True)][:k].tolist()
    ideal = gains.sort(descending=True).values[:k].tolist()
    total, most = (sum(g / math.log2(r + 2) for r, g in enumerate(values)) for values in (found, ideal))
    return total / most if most else 0.0
