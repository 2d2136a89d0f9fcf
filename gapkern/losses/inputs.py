"""What the losses accept, made into tensors that the operators take."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from gapkern import _check
from gapkern.ops import autocast


def _plain(name: str, value: Any) -> None:
    """Refuses what only looks like a tensor of this process."""
    if hasattr(value, "device_mesh") and hasattr(value, "to_local"):
        raise TypeError(
            f"{name}: expected a tensor of this rank, got a DTensor; pass {name}.to_local() with "
            f"group={name}.device_mesh for rows that are sharded, or {name}.full_tensor()"
        )
    if isinstance(value, Tensor) and (value.layout is not torch.strided or value.is_nested):
        what = "a nested tensor" if value.is_nested else str(value.layout).removeprefix("torch.")
        raise TypeError(f"{name}: expected a dense tensor, got {what}")


def _for_autograd(value: Tensor) -> Tensor:
    """Tensors made under inference_mode cannot be saved for a backward pass; copies can."""
    if torch.compiler.is_compiling() or not value.is_inference() or torch.is_inference_mode_enabled():
        return value
    return value.clone()


def embeddings(name: str, value: Any, rows: str = "N") -> Tensor:
    """`value` as an (N, D) tensor; NumPy arrays share their memory.

    Raises:
        TypeError: not a dense floating-point tensor or array of this process.
        ValueError: not two-dimensional, or empty.
    """
    _plain(name, value)
    return _for_autograd(_check.matrix(name, value, rows=rows))


def scalar(name: str, value: Any, like: Tensor) -> Tensor:
    """`value` as a tensor of one element on the device of `like`.

    Raises:
        TypeError: not a number, nor a tensor or array of numbers.
        ValueError: not one element, a number that is not finite, or on another device than the CPU or `like`.
    """
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.item()
    if not isinstance(value, Tensor):
        if torch.compiler.is_compiling() and isinstance(value, (int, float)):
            # A sum is what the compiler takes a number into the graph with; anything else it compiles anew for.
            return torch.zeros((), dtype=torch.float64, device=like.device) + value
        return torch.full((), _check.number(name, value), dtype=torch.float64, device=like.device)
    _plain(name, value)
    if value.numel() != 1:
        raise ValueError(f"{name}: expected one element, got shape {tuple(value.shape)}")
    if value.dtype == torch.bool or value.is_complex():
        raise TypeError(f"{name}: expected a real number, got {value.dtype}")
    if not value.is_floating_point():
        value = value.double()
    if value.device != like.device:
        if value.device.type != "cpu":
            raise ValueError(f"{name}: expected device {like.device} as images, or the CPU, got {value.device}")
        value = value.to(like.device, non_blocking=True)
    return _for_autograd(value)


def check_pairs(
    images: Any,
    texts: Any,
    logit_scale: Any,
    names: tuple[str, str, str] = ("images", "texts", "logit_scale"),
    rectangular: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Images (N, D), texts (N, D) and logit_scale as tensors; under autocast in the dtype that products take them in.

    `rectangular` allows other numbers of texts.

    Raises:
        TypeError, ValueError: see `embeddings` and `scalar`; dtypes, devices, widths or rows that differ.
    """
    first, second, third = names
    images, texts = embeddings(first, images), embeddings(second, texts, "M")
    _check.same_width(**{first: images, second: texts})
    _check.same_device(**{first: images, second: texts})
    dtypes = autocast.dtype_of(images), autocast.dtype_of(texts)
    if dtypes[0] != dtypes[1]:
        kept = " (autocast leaves float64 alone)" if autocast.enabled(images.device.type) else ""
        raise TypeError(f"{second}: expected {images.dtype} as in {first}, got {texts.dtype}{kept}")
    if not rectangular:
        _check.same_rows(**{first: images, second: texts})
    scale = scalar(third, logit_scale, images)
    return images.to(dtypes[0]), texts.to(dtypes[1]), scale
