"""Functions that compiled graphs do not look into: their result is a constant, or they run outside."""

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar

_F = TypeVar("_F", bound=Callable[..., object])


def constant(function: _F) -> _F:
    """As torch.compiler.assume_constant_result, whose call imports torch._dynamo: half of the time of this package's.

    Example:
        >>> constant(lambda: 3)()
        3
    """
    function.__dict__["_dynamo_marked_constant"] = True
    return function


def eager(function: _F) -> _F:
    """As torch.compiler.disable, whose call imports torch._dynamo: the function breaks the graph.

    Example:
        >>> eager(lambda: 3)()
        3
    """

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        compiler = sys.modules.get("torch._dynamo")
        return function(*arguments) if compiler is None else compiler.disable(function)(*arguments)

    call.__dict__["_torchdynamo_disable"] = True
    return call  # type: ignore[return-value]
