"""Losses whose pairs are of classes (ids, positives, limits of a guide) on a GPU, beside their definitions."""

from collections.abc import Callable, Iterator

import torch

from bench.gpu.checks import EAGER, against_eager, gradients, pair, rows
from bench.harness import Case, Contender
from gapkern import contrastive_loss, losses, sigmoid_loss
from gapkern.reference import losses as reference


def masked(device: str, quick: bool) -> Iterator[Case]:
    """Ids of 8 rows each; a guide whose limits leave out about half of the pairs."""
    for n, d in ((64, 32),) if quick else ((16384, 768),):
        generator = torch.Generator(device).manual_seed(2)
        ids = torch.randint(max(1, n // 8), (n,), generator=generator, device=device)
        guides = [rows(n, 32, device=device, seed=s) for s in (3, 4)]
        bias = torch.tensor(-8.0, device=device)
        forms: dict[str, tuple[Callable, Callable]] = {
            "duplicates left out": (
                lambda x, y, s, ids=ids: losses.info_nce_loss(x, y, s, ids=ids),
                lambda x, y, s, ids=ids: reference.info_nce_loss(x, y, s, ids=ids),
            ),
            "several positives": (
                lambda x, y, s, ids=ids: contrastive_loss(x, y, s, ids=ids, positives="in"),
                lambda x, y, s, ids=ids: reference.contrastive_loss(x, y, s, ids=ids, positives="in"),
            ),
            "guide": (
                lambda x, y, s, g=guides: losses.gist_loss(x, y, s, *g, contrast_queries=False),
                lambda x, y, s, g=guides: reference.gist_loss(x, y, s, *g, contrast_queries=False),
            ),
            "sigmoid, several positives": (
                lambda x, y, s, b=bias, ids=ids: sigmoid_loss(x, y, s, b, ids=ids),
                lambda x, y, s, b=bias, ids=ids: reference.sigmoid_loss(x, y, s, b, ids=ids),
            ),
        }
        for name, (ours, plain) in forms.items():
            for dtype in (torch.bfloat16, torch.float32):
                inputs = pair(n, d, device, dtype)

                def eager(x, y, s, plain=plain):
                    return plain(x.float(), y.float(), s)

                contenders = [
                    Contender(EAGER, gradients(eager, inputs), "baseline"),
                    Contender("gapkern", gradients(ours, inputs)),
                ]

                def check(results, dtype=dtype):
                    return against_eager(results, 3e-2 if dtype == torch.bfloat16 else 1e-3)

                about = {"operation": name, "N": n, "D": d, "dtype": str(dtype)[6:]}
                yield Case(about, contenders, check, EAGER)
