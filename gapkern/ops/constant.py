"""Functions whose result a compiled graph takes as a constant."""

from collections.abc import Callable
from typing import TypeVar

_F = TypeVar("_F", bound=Callable[..., object])


def constant(function: _F) -> _F:
    """As torch.compiler.assume_constant_result, whose call imports torch._dynamo: half of the time of this package's.

    Example:
        >>> constant(lambda: 3)()
        3
    """
    function.__dict__["_dynamo_marked_constant"] = True
    return function
