"""What several ranks do as one: a failure on one of them is raised on all."""

from collections.abc import Callable
from typing import Any, TypeVar

_T = TypeVar("_T")


def gather(work: Callable[[], _T], group: Any = None) -> list[_T]:
    """What `work()` gives on every rank of a torch.distributed group, in order; by objects, which travel pickled.

    Args:
        work: this rank's part. Whatever it raises, the other ranks are told instead of left waiting.
        group: None is the default group.

    Raises:
        ValueError: `work` raised on some rank; on every rank alike, naming the first that did and what it said.
    """
    import torch.distributed as dist

    try:
        mine: tuple[_T | None, str | None] = work(), None
    except Exception as error:
        mine = None, str(error) or type(error).__name__
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    for rank, (_, failure) in enumerate(everyone):
        if failure is not None:
            raise ValueError(f"rank {rank}: {failure}")
    return [value for value, _ in everyone]
