"""What the drop-in classes share: their place among ranks, their hooks, and how they pass for open_clip's."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from gapkern.losses import distributed

T = TypeVar("T")
NAMES = ("image_features", "text_features", "logit_scale")
init_module = torch.nn.Module.__init__  # not super(): that may be open_clip's class, once it was patched


class StandsIn(type):
    """While open_clip is patched, its own class's instances are instances of the class under its name, too."""

    stands_for: type | None = None

    def __instancecheck__(cls, instance: Any) -> bool:
        other = cls.__dict__.get("stands_for")
        return super().__instancecheck__(instance) or (other is not None and isinstance(instance, other))


class DropIn(torch.nn.Module, metaclass=StandsIn):
    """What the drop-in classes share: their place among ranks, and whether their hooks are their own."""

    rank: int
    world_size: int
    _hooks: dict[str, Any]

    def _replaced(self, *names: str) -> bool:
        """Whether a subclass or an instance has one of these methods of its own."""
        return any(name in vars(self) or getattr(type(self), name) is not self._hooks[name] for name in names)

    def _checked(self, check: Callable[[], T]) -> tuple[distributed.Shard | None, T]:
        """This rank's place, if there are others, and the result of `check`; an error is raised on every rank."""
        place = distributed.shard(True) if self.world_size > 1 else None
        try:
            if place is not None and (place.rank, place.world) != (self.rank, self.world_size):
                raise ValueError(
                    f"rank and world_size: expected {place.rank} and {place.world} as in torch.distributed, "
                    f"got {self.rank} and {self.world_size}"
                )
            return place, check()
        except (TypeError, ValueError) as error:
            if place is not None:
                distributed.refuse(place, error)
            raise
