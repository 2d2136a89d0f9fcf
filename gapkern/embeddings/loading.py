"""Images through a DataLoader: read, signed and preprocessed by any number of workers, started in any way.

What is sent to workers pickles; what they send back is tensors and strings, never their exceptions: an image that
cannot be read comes back as the line that names it.
"""

import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from gapkern.models import batch


@dataclass
class Batch:
    """Preprocessed images and what happened to the others.

    Attributes:
        images: those that could be read, as `gapkern.models.batch` puts them together, or None.
        signatures: of all rows.
        problems: why a row could not be read, by its place in the batch.
    """

    images: Any
    signatures: list[str] = field(default_factory=list)
    problems: dict[int, str] = field(default_factory=dict)

    def pin_memory(self) -> "Batch":
        self.images = pytree.tree_map_only(Tensor, lambda t: t.pin_memory(), self.images)
        return self


class _Rows(torch.utils.data.Dataset[tuple[str, Any, str]]):
    def __init__(self, read: Callable[[int], tuple[str, Any]], preprocess: Callable[[Any], Any]):
        self.read, self.preprocess = read, preprocess

    def __getitem__(self, i: int) -> tuple[str, Any, str]:
        try:
            signature, image = self.read(i)
        except (ValueError, OSError) as error:
            return getattr(error, "signature", "unreadable"), None, str(error).replace("\n", " ")
        return signature, self.preprocess(image), ""


def _collate(items: list[tuple[str, Any, str]]) -> Batch:
    images = [image for _, image, _ in items if image is not None]
    problems = {i: problem for i, (_, _, problem) in enumerate(items) if problem}
    return Batch(batch(images) if images else None, [signature for signature, _, _ in items], problems)


@dataclass(frozen=True)
class Unsigned:
    """Images that need no signature: `image(i)`."""

    image: Callable[[int], Any]

    def __call__(self, i: int) -> tuple[str, Any]:
        return "", self.image(i)


def batches(
    read: Callable[[int], tuple[str, Any]],
    preprocess: Callable[[Any], Any],
    spans: Sequence[Sequence[int]],
    workers: int = 0,
    *,
    pin: bool = False,
) -> Iterator[Batch]:
    """The images of each span of rows.

    Args:
        read: the signature and the image of a row; sent to workers.
        preprocess: of an image; sent to workers.
        spans: the rows of each batch.
        workers: processes, started as `torch.multiprocessing` is set to; 0 reads here.
        pin: page-locked tensors.

    Raises:
        ValueError: workers are started anew (spawn, forkserver) and what they need does not pickle.
    """
    workers = min(workers, len(spans))
    rows = _Rows(read, preprocess)
    if workers and torch.multiprocessing.get_start_method() != "fork":
        try:
            pickle.dumps(rows)
        except Exception as error:
            raise ValueError(
                f"num_workers: expected 0 for images or a preprocessing that cannot be sent to workers, got {workers} "
                f"({type(error).__name__}: {error})"
            ) from None
    loader = torch.utils.data.DataLoader(
        rows,
        batch_sampler=[list(span) for span in spans],
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=pin,
        generator=torch.Generator(),  # the workers' seeds else come from the caller's
    )
    yield from loader
