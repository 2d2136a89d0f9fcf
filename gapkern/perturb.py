"""Perturbations of a gallery: noise, quantisation, replacement, and chains of them (Chowers et al., CVPR 2026)."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gapkern import _check
from gapkern._rows import with_float64
from gapkern.ops import perturb as _ops  # noqa: F401 - registers the operators

__all__ = [
    "Chain",
    "Gaussian",
    "Perturbation",
    "Quantize",
    "Replace",
    "Uniform",
    "check",
    "perturb",
    "title",
]

_NEXT_STREAM = 0x9E3779B97F4A7C15


class Perturbation:
    """What all perturbations have: `a | b` applies a, then b.

    Attributes:
        name: "gaussian", "uniform", "quantize", "replace" or "chain".
        random: whether two trials differ.
    """

    name = ""
    random = False

    def base(self, gallery: Tensor) -> Tensor:
        """The gallery this perturbation starts from: another one for `Replace`."""
        return gallery

    def apply(self, x: Tensor, seed: int, trial: int, first_row: int = 0) -> Tensor:
        """x (N, D) perturbed; `first_row` is the row of the whole gallery that x starts at."""
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """What a report says of it: perturbation, and variance, scale, bins, range where they apply."""
        return {"perturbation": self.name}

    def steps(self, seed: int) -> Iterator[tuple["Perturbation", int]]:
        """The stages in turn, each with the seed of its own draws: itself alone, unless it is a chain.

        Example:
            >>> [(stage.name, own == 7) for stage, own in (Gaussian(0.1) | Gaussian(0.2)).steps(7)]
            [('gaussian', True), ('gaussian', False)]
        """
        yield self, seed

    def __or__(self, other: "Perturbation") -> "Chain":
        if not isinstance(other, Perturbation):
            return NotImplemented
        return Chain((*(stage for stage, _ in self.steps(0)), *(stage for stage, _ in other.steps(0))))


@dataclass(frozen=True)
class _Noise(Perturbation):
    variance: float
    scale: str = "total"
    random = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "variance", _check.number("variance", self.variance, low=0))
        _check.choice("scale", self.scale, ("total", "per_coordinate"))
        object.__setattr__(self, "random", self.variance > 0)

    def per_coordinate(self, dims: int) -> float:
        """The variance of one coordinate of a D-dimensional row."""
        return self.variance / dims if self.scale == "total" else self.variance

    def apply(self, x: Tensor, seed: int, trial: int, first_row: int = 0) -> Tensor:
        std = self.per_coordinate(x.shape[1]) ** 0.5
        noisy: Tensor = torch.ops.gapkern.perturb_noise(x, self.name, std, seed, trial, first_row)
        return noisy

    def describe(self) -> dict[str, Any]:
        return {"perturbation": self.name, "variance": self.variance, "scale": self.scale}


class Gaussian(_Noise):
    """Independent Gaussian noise on every coordinate of every row.

    Args:
        variance: sigma^2 >= 0.
        scale: "total": E||noise||^2 = variance, that is variance / D per coordinate; or "per_coordinate".

    Example:
        >>> Gaussian(0.005)
        Gaussian(variance=0.005, scale='total')
        >>> Gaussian(0.512).per_coordinate(512)
        0.001
    """

    name = "gaussian"


class Uniform(_Noise):
    """Independent noise, uniform about zero, with the variance of `Gaussian`.

    Example:
        >>> Uniform(0.022, scale="per_coordinate").describe()["scale"]
        'per_coordinate'
    """

    name = "uniform"


@dataclass(frozen=True)
class Quantize(Perturbation):
    """Every coordinate at the centre of its cell among `bins` equal cells.

    Args:
        bins: cells between the smallest and the largest value, 2 to 2^24.
        range: "per_dimension": the smallest and largest value of each coordinate over the gallery; "global": of all.

    Example:
        >>> perturb(torch.tensor([[0.0], [0.4], [1.0]]), Quantize(2), seed=0).flatten().tolist()
        [0.25, 0.25, 0.75]
    """

    bins: int
    range: str = "per_dimension"
    name = "quantize"

    def __post_init__(self) -> None:
        object.__setattr__(self, "bins", _check.integer("bins", self.bins, low=2, high=2**24))
        _check.choice("range", self.range, ("per_dimension", "global"))

    def apply(self, x: Tensor, seed: int, trial: int, first_row: int = 0) -> Tensor:
        if x.shape[0] == 0:
            return x.clone()
        low, high = torch.aminmax(x, dim=0)
        return self.within(x, low, high)

    def within(self, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """x (N, D) in the cells between given smallest and largest values (D,) of each coordinate.

        Example:
            >>> Quantize(2).within(torch.tensor([[0.1]]), torch.tensor([0.0]), torch.tensor([1.0])).tolist()
            [[0.25]]
        """
        if self.range == "global":
            low, high = low.amin().reshape(1), high.amax().reshape(1)
        work = torch.promote_types(x.dtype, torch.float32)
        quantized: Tensor = torch.ops.gapkern.perturb_quantize(
            x, low.detach().to(work), high.detach().to(work), self.bins
        )
        return quantized

    def describe(self) -> dict[str, Any]:
        return {"perturbation": self.name, "bins": self.bins, "range": self.range}


@dataclass(frozen=True, eq=False)
class Replace(Perturbation):
    """Another gallery in the place of the first: the same classes or captions in other words.

    Args:
        gallery: (G, D), row i standing for row i of the original.
        label: what a report calls it.

    Example:
        >>> perturb(torch.zeros(1, 2), Replace(torch.ones(1, 2)), seed=0).tolist()
        [[1.0, 1.0]]
    """

    gallery: Any = field(repr=False)
    label: str = ""
    name = "replace"

    def __post_init__(self) -> None:
        matrix = _check.finite("gallery", _check.matrix("gallery", self.gallery, rows="G"))
        object.__setattr__(self, "gallery", matrix)

    def base(self, gallery: Tensor) -> Tensor:
        if self.gallery.shape != gallery.shape:
            raise ValueError(
                f"gallery: expected shape {tuple(gallery.shape)} as the gallery it replaces, "
                f"got {tuple(self.gallery.shape)}"
            )
        replacement: Tensor = self.gallery
        return replacement.to(gallery)

    def apply(self, x: Tensor, seed: int, trial: int, first_row: int = 0) -> Tensor:
        return x

    def describe(self) -> dict[str, Any]:
        return {"perturbation": self.name, "label": self.label}


@dataclass(frozen=True)
class Chain(Perturbation):
    """Several perturbations in turn, written `a | b`; a `Replace` can only come first.

    Example:
        >>> Gaussian(0.005) | Quantize(32)
        Chain(stages=(Gaussian(variance=0.005, scale='total'), Quantize(bins=32, range='per_dimension')))
    """

    stages: tuple[Perturbation, ...]
    name = "chain"

    def __post_init__(self) -> None:
        if any(isinstance(stage, Replace) for stage in self.stages[1:]):
            raise ValueError("stages: expected Replace only as the first stage of a chain")
        object.__setattr__(self, "random", any(stage.random for stage in self.stages))

    def base(self, gallery: Tensor) -> Tensor:
        return self.stages[0].base(gallery)

    def steps(self, seed: int) -> Iterator[tuple[Perturbation, int]]:
        for index, stage in enumerate(self.stages):
            yield stage, (seed + index * _NEXT_STREAM) % 2**63

    def apply(self, x: Tensor, seed: int, trial: int, first_row: int = 0) -> Tensor:
        for stage, own in self.steps(seed):
            x = stage.apply(x, own, trial, first_row)
        return x

    def describe(self) -> dict[str, Any]:
        return {"perturbation": self.name, "stages": [stage.describe() for stage in self.stages]}


def title(description: dict[str, Any]) -> str:
    """One short line for a report, from `Perturbation.describe()`.

    Example:
        >>> title(Gaussian(0.005).describe()), title((Gaussian(0.1) | Quantize(32, "global")).describe())
        ('gaussian 0.005 total', 'gaussian 0.1 total | quantize 32 global')
    """
    if description.get("stages"):
        return " | ".join(map(title, description["stages"]))
    keys = ("variance", "scale", "bins", "range", "label")
    return " ".join(
        [description["perturbation"], *(str(description[k]).replace("_", " ") for k in keys if description.get(k))]
    )


def perturb(
    x: Tensor | np.ndarray, perturbation: Perturbation, seed: int, trial: int = 0, *, first_row: int = 0
) -> Any:
    """`x` under a perturbation, of the shape, dtype and kind (tensor or array) of the input.

    Noise is counter-based: an element's value depends on seed, trial, its row and column alone, so that any chunking
    (give each chunk its `first_row`), thread count or device yields the same bits.

    Args:
        x: (N, D) float32, float16, bfloat16 or float64.
        perturbation: `Gaussian`, `Uniform`, `Quantize`, `Replace` or a chain.
        seed: 0 <= seed < 2^63.
        trial: 0 <= trial < 2^32; each draws anew.
        first_row: the row of the whole matrix that x starts at.

    Raises:
        TypeError: x is no floating-point matrix, or perturbation is none.
        ValueError: an argument out of range.

    Example:
        >>> x = torch.zeros(4, 3)
        >>> whole = perturb(x, Gaussian(3.0), seed=7)
        >>> torch.equal(whole[2:], perturb(x[2:], Gaussian(3.0), seed=7, first_row=2))
        True
    """
    check(perturbation)
    seed = _check.integer("seed", seed, low=0, high=2**63 - 1)
    trial = _check.integer("trial", trial, low=0, high=2**32 - 1)
    first_row = _check.integer("first_row", first_row, low=0)
    matrix = _check.matrix("x", x, rows="N", empty=True)
    rows = perturbation.base(with_float64(matrix))
    result = perturbation.apply(rows, seed, trial, first_row).to(matrix.device)
    return result.numpy() if isinstance(x, np.ndarray) else result


def check(perturbation: Any) -> Perturbation:
    """Raises TypeError unless `perturbation` is one."""
    if not isinstance(perturbation, Perturbation):
        raise TypeError(
            f"perturbation: expected Gaussian, Uniform, Quantize, Replace or a chain of them, "
            f"got {type(perturbation).__name__}"
        )
    return perturbation
