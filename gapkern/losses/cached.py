"""Batches that the encoders cannot hold: gradients of the embeddings first, then of the encoders, a chunk at a time."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import get_device_states, set_device_states

from gapkern import _check
from gapkern.ops import autocast

Encoder = Callable[[Any], Tensor]


class _Ambient:
    """Random states and autocast, as they are now."""

    def __init__(self, tensors: list[Tensor]):
        self.cpu = torch.get_rng_state()
        self.devices, self.states = get_device_states(*tensors)
        self.device = next((t.device.type for t in tensors if t.device.type != "cpu"), "cpu")
        self.autocast = autocast.enabled(self.device)
        self.dtype = torch.get_autocast_dtype(self.device) if self.autocast else None

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        with torch.random.fork_rng(devices=self.devices, enabled=True), self.casts():
            torch.set_rng_state(self.cpu)
            set_device_states(self.devices, self.states)
            yield

    def casts(self) -> contextlib.AbstractContextManager[Any]:
        # Not cached: copies of weights made without a graph would be found where one is wanted.
        return torch.autocast(self.device, dtype=self.dtype, enabled=self.autocast, cache_enabled=False)


def _length(inputs: Any) -> int:
    sizes = {len(t) for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor) and t.dim()}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(f"inputs: expected tensors of one number of rows, at least one, got {sorted(sizes)}")
    return sizes.pop()


def _rows(inputs: Any, start: int, stop: int) -> Any:
    return pytree.tree_map(lambda t: t[start:stop] if isinstance(t, Tensor) and t.dim() else t, inputs)


class _Encoded(torch.autograd.Function):
    """Embeddings that were encoded without a graph; backward encodes them again, a chunk at a time, and goes on."""

    @staticmethod
    def forward(
        ctx: Any, embeddings: Tensor, anchor: Tensor, encoder: Encoder, chunks: list[Any], ambients: list[_Ambient]
    ) -> Tensor:
        ctx.encoder, ctx.chunks, ctx.ambients = encoder, chunks, ambients
        return embeddings.view_as(embeddings)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None, None, None]:
        start = 0
        for i, (inputs, ambient) in enumerate(zip(ctx.chunks, ctx.ambients, strict=True)):
            last = i + 1 == len(ctx.chunks)
            alone = contextlib.nullcontext() if last else _unsynchronised(ctx.encoder)
            with alone:
                with ambient.again(), torch.enable_grad():
                    found = ctx.encoder(inputs)
                stop = start + len(found)
                if found.requires_grad:
                    torch.autograd.backward(found, grad[start:stop].to(found.dtype))
                start = stop
        return None, torch.zeros(()), None, None, None


def _unsynchronised(encoder: Any) -> contextlib.AbstractContextManager[Any]:
    """Without the gradients' all-reduce of DistributedDataParallel."""
    with contextlib.ExitStack() as stack:
        for module in encoder.modules() if isinstance(encoder, torch.nn.Module) else ():
            if hasattr(module, "no_sync"):
                stack.enter_context(module.no_sync())  # type: ignore[operator]
        return stack.pop_all()


def cached(loss: Callable[..., Tensor], encoders: Encoder | Sequence[Encoder], chunk: int) -> Callable[..., Tensor]:
    """`loss` over a batch that the encoders cannot hold at once (GradCache, Gao et al. 2021, Sec. 3).

    The batch is encoded without a graph, `chunk` rows at a time; `backward()` of the loss forms the gradients of the
    embeddings, and encodes each chunk again with the same random numbers to take them on into the parameters' `.grad`.
    The gradients are those of the whole batch. Autocast is as it was at the call; GradScaler and the loss's `group`
    work as ever; a DistributedDataParallel encoder synchronises once, with its last chunk (where several inputs have
    one encoder: once an input).

    Args:
        loss: (*embeddings, *arguments, **options) -> loss, 0-d.
        encoders: one for each input, or one for all; each takes rows of its input, a tensor or any nest of tensors
            with rows first, to (n, D). Layers whose result depends on the batch, or that count calls (batch
            normalisation in training), see chunks, twice.
        chunk: rows at a time.

    Returns:
        (inputs of the encoders, *arguments, **options) -> the loss. `inputs` is a sequence, one for each encoder, or of
        any number for a single encoder. `torch.autograd.grad` reaches the arguments, not the parameters.

    Raises:
        ValueError: no rows, rows that differ within an input, another number of inputs than of encoders.

    Example:
        >>> encoder = torch.nn.Linear(3, 2)
        >>> from gapkern.losses import info_nce_loss
        >>> step = cached(info_nce_loss, encoder, chunk=2)
        >>> step([torch.ones(5, 3), torch.ones(5, 3)], 1.0).backward()
        >>> encoder.weight.grad.shape
        torch.Size([2, 3])
    """
    chunk = _check.integer("chunk", chunk, low=1)
    many = isinstance(encoders, (list, tuple, torch.nn.ModuleList))

    def step(inputs: Sequence[Any], *arguments: Any, **options: Any) -> Tensor:
        if isinstance(inputs, Tensor) or not isinstance(inputs, (list, tuple)):
            raise TypeError(f"inputs: expected a list of the encoders' inputs, got {type(inputs).__name__}")
        each: Sequence[Encoder] = list(encoders) if many else [encoders] * len(inputs)  # type: ignore
        if len(each) != len(inputs):
            raise ValueError(f"inputs: expected {len(each)}, one for each encoder, got {len(inputs)}")
        return loss(*(_encode(e, x, chunk) for e, x in zip(each, inputs, strict=True)), *arguments, **options)

    return step


def _encode(encoder: Encoder, inputs: Any, chunk: int) -> Tensor:
    chunks = [_rows(inputs, i, i + chunk) for i in range(0, _length(inputs), chunk)]
    ambients, found = [], []
    for part in chunks:
        tensors = [t for t in pytree.tree_leaves(part) if isinstance(t, Tensor)]
        if isinstance(encoder, torch.nn.Module):
            tensors += list(encoder.parameters())[:1]
        ambients.append(_Ambient(tensors))
        with torch.no_grad(), ambients[-1].casts():
            found.append(encoder(part))
    embeddings = torch.cat(found)
    if not torch.is_grad_enabled():
        return embeddings
    anchor = torch.zeros((), requires_grad=True)  # what makes autograd call backward
    encoded: Tensor = _Encoded.apply(embeddings, anchor, encoder, chunks, ambients)
    return encoded
