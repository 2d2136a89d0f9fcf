"""Autocast: what it does to embeddings, and arithmetic that it must not touch."""

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor


def enabled(device: str) -> bool:
    """Whether autocast is at work on this type of device."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def disabled(device: str) -> AbstractContextManager[Any]:
    """Inside, products keep their operands' dtype."""
    return torch.autocast(device, enabled=False) if enabled(device) else contextlib.nullcontext()


def dtype_of(x: Tensor) -> torch.dtype:
    """The dtype that products take x in: autocast leaves float64 alone."""
    if x.dtype == torch.float64 or not enabled(x.device.type):
        return x.dtype
    return torch.get_autocast_dtype(x.device.type)


def untouched(function):
    """A kernel whose first argument says the device, without autocast inside."""

    def call(first, *rest):
        with disabled(first.device.type):
            return function(first, *rest)

    return call


def rounded(operator, embeddings: int = 2):
    """Under autocast only the embeddings take the lower precision: a rounded logit_scale would shift every logit.

    They are the operator's first arguments, `embeddings` of them.
    """

    def call(*inputs):
        lower = [x.to(dtype_of(x)) for x in inputs[:embeddings]]
        with disabled(lower[0].device.type):
            return operator(*lower, *inputs[embeddings:])

    return call
