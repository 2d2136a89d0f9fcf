"""A device of PyTorch's under the interface of the one made of software: `TorchDevice("cuda")` is the GPU."""

import torch


class TorchDevice:
    """Tensors travel there and back. `TorchDevice("cpu")` shows that they do, and runs the CPU's kernels."""

    def __init__(self, name: str):
        self.name = name

    def seed(self, order: int, rounding: int = 0) -> None:
        """The order of its threads is its own."""

    def on(self, function, *arguments, **options):
        """`function(*arguments, **options)` with the tensors there; those of the result come back.

        A tensor that requires a gradient arrives without that: leaves are made within `function`.
        """
        found = function(*self.there(arguments), **self.there(options))
        return _each(lambda t: t.detach().cpu(), found)

    def call(self, name: str, *arguments):
        """The operator's implementation there; what it writes to is written to here."""
        operator, there = getattr(torch.ops.gapkern, name).default, self.there(arguments)
        found = operator(*there)
        for of, ours, theirs in zip(operator._schema.arguments, arguments, there, strict=False):  # others have defaults
            if of.is_out or (of.alias_info is not None and of.alias_info.is_write):
                ours.copy_(theirs)
        return _each(lambda t: t.cpu(), found)

    def there(self, values):
        return _each(self._copy, values)

    def _copy(self, x: torch.Tensor) -> torch.Tensor:
        """The whole storage, so that offsets and strides stay: a view that is not aligned here is not aligned there."""
        bytes_here = torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage())
        storage = bytes_here.to(self.name, copy=True).untyped_storage()
        return torch.empty(0, dtype=x.dtype, device=self.name).set_(storage, x.storage_offset(), x.size(), x.stride())


def _each(of, values):
    """With `of` of every tensor in tuples, lists and dicts."""
    if isinstance(values, torch.Tensor):
        return of(values)
    if type(values) in (tuple, list):
        return type(values)(_each(of, v) for v in values)
    if type(values) is dict:
        return {key: _each(of, v) for key, v in values.items()}
    return values
