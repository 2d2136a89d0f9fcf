"""Measures computed as in a fresh process, whatever the program around them has set.

Autocast, grad mode, inference mode, the default device and NumPy's error handling belong to a thread, and are put aside
in the calling thread alone. What belongs to the process is never written: neither the default dtype, which code that is
called here must not rely on, nor the precision of float32 products (`product`), nor the number of threads.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ParamSpec, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

_P = ParamSpec("_P")
_R = TypeVar("_R")
_DEVICES = ("cpu", "cuda", "mps", "xpu")


@contextmanager
def isolation() -> Iterator[None]:
    """No autocast, no gradients, no inference tensors, CPU as the default device; afterwards all is as it was.

    Never to be held across a `yield`: the consumer's code would run in it. `isolated` and `steps` know generators.

    Example:
        >>> with torch.autocast("cpu", torch.bfloat16), isolation():
        ...     (torch.eye(2) @ torch.eye(2)).dtype
        torch.float32
    """
    with ExitStack() as stack:
        for device in _DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        # A default device is a __torch_function__ mode; without those there is none.
        stack.enter_context(torch._C.DisableTorchFunction())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(np.errstate(all="ignore"))
        yield


def isolated(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorates a public entry that computes measures: it runs within `isolation`, a generator function step by step.

    Example:
        >>> @isolated
        ... def product(x):
        ...     return x @ x
        >>> product(torch.eye(2, requires_grad=True)).requires_grad
        False
    """
    if inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def stepwise(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            return cast(_R, steps(cast(Iterable[object], function(*args, **kwargs))))

        return stepwise

    @functools.wraps(function)
    def alone(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with isolation():
            return function(*args, **kwargs)

    return alone


def steps(values: Iterable[_R]) -> Iterator[_R]:
    """What `values` yields, each worked out within `isolation` and handed over outside of it."""
    iterator = iter(values)
    try:
        while True:
            with isolation():
                try:
                    value = next(iterator)
                except StopIteration:
                    return
            yield value
    finally:
        close = getattr(iterator, "close", None)
        if close is not None:
            close()


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a (n, D) times b (D, m) with the full precision of their dtype, whatever the program allows its own products.

    Where it allows float32 factors to be rounded (`torch.set_float32_matmul_precision`, `torch.backends.*.
    fp32_precision`: settings of the process, which are left alone) the product is formed in float64.

    Example:
        >>> product(torch.eye(2), torch.ones(2, 1)).tolist()
        [[1.0], [1.0]]
    """
    if a.dtype != torch.float32 or not _rounded(a.device):
        return torch.mm(a, b, out=out)
    whole = (a.double() @ b.double()).float()
    return whole if out is None else out.copy_(whole)


def _rounded(device: torch.device) -> bool:
    settings: Any = torch.backends.cuda.matmul if device.type == "cuda" else torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    return settings.fp32_precision not in ("ieee", "none")
