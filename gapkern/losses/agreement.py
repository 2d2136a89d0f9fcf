"""What ranks tell each other before a loss's first collective, so that a bad input raises everywhere and nobody waits.

One number a step, the digest of the rank's terms, goes around on the CPU: gloo's side of the group, or a gloo group
beside it where it has NCCL alone. The device is not waited for. Where the digests differ, the terms follow in words.
"""

import functools
import hashlib
import json
import weakref
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

_ERRORS = {"ValueError": ValueError, "TypeError": TypeError, "RuntimeError": RuntimeError}
_channels: "weakref.WeakKeyDictionary[Any, Any]" = weakref.WeakKeyDictionary()


def terms_of(x: Tensor, terms: str) -> str:
    """What a rank is about to do with its pairs."""
    return json.dumps(["", f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}", terms])


def problem(error: Exception) -> str:
    """Why a rank cannot go on."""
    kind = type(error).__name__
    return json.dumps([kind if kind in _ERRORS else "ValueError", str(error), ""])


def reach(group: Any, mine: str) -> None:
    """Returns where all ranks of `group` brought the same terms.

    Raises:
        ValueError, TypeError: on every rank alike: a rank brought a problem, or terms that differ.
    """
    channel = _channel(group)
    device = "cpu" if channel is not group or _on_the_cpu(group) else "cuda"
    # Default devices are the caller's; these tensors are not.
    with torch.device(device):
        number = torch.tensor([_digest(mine)], dtype=torch.int64, device=device)
        everyone = number.new_empty((dist.get_world_size(channel), 1))
        dist.all_gather(list(everyone.unbind()), number, group=channel)
        if bool((everyone == number).all()) and json.loads(mine)[0] == "":
            return
        said: list[Any] = [None] * len(everyone)
        dist.all_gather_object(said, mine, group=channel)
    _refuse([json.loads(terms) for terms in said])


def _refuse(said: list[list[str]]) -> NoReturn:
    problems = [f"rank {rank}: {text}" for rank, (kind, text, _) in enumerate(said) if kind]
    if problems:
        kind = next(kind for kind, *_ in said if kind)
        raise _ERRORS[kind]("; ".join(problems))
    if len({terms for *_, terms in said}) > 1:
        raise ValueError(f"losses: expected the same call on every rank, got {_by_rank([t for *_, t in said])}")
    raise ValueError(
        f"images: expected the same shape and dtype on every rank, got {_by_rank([text for _, text, _ in said])}; "
        "drop the last uneven batch (drop_last=True)"
    )


def _by_rank(said: list[str]) -> str:
    """Each thing said once, with the ranks that said it.

    Example:
        >>> _by_rank(["a", "b", "a"])
        'a on ranks 0, 2; b on rank 1'
    """
    ranks: dict[str, list[str]] = {}
    for rank, text in enumerate(said):
        ranks.setdefault(text, []).append(str(rank))
    return "; ".join(f"{text} on rank{'s' * (len(of) > 1)} {', '.join(of)}" for text, of in ranks.items())


@functools.lru_cache(maxsize=256)
def _digest(terms: str) -> int:
    return int.from_bytes(hashlib.blake2b(terms.encode(), digest_size=7).digest(), "big")


def _on_the_cpu(group: Any) -> bool:
    try:
        group._get_backend(torch.device("cpu"))
    except RuntimeError:
        return False
    return True


def _channel(group: Any) -> Any:
    """A group of the same ranks that carries tensors of the CPU; `group` itself where there is none to be had."""
    if group not in _channels:
        channel = group
        if not _on_the_cpu(group) and dist.is_gloo_available():
            ranks = dist.get_process_group_ranks(group)
            channel = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
        # A group that holds itself would stay.
        _channels[group] = None if channel is group else channel
    return _channels[group] or group
