"""The fused losses on a GPU: times at the targets' shapes, beside others at theirs, and peak memory."""

import functools
import unittest.mock
from collections.abc import Callable, Iterator
from typing import Any

import torch

from bench import harness
from bench.gpu import rivals
from bench.gpu.checks import EAGER, against_eager, check_large, gradients, pair
from bench.harness import Case, Contender
from gapkern import contrastive_loss, sigmoid_loss
from gapkern.ops.contrastive import dispatch


def ours(device: str, quick: bool) -> Iterator[Case]:
    """The targets' shapes: bfloat16, 32768 pairs, nothing of anybody else's beside them."""
    for n, d in ((64, 32),) if quick else ((32768, 768), (32768, 512), (32768, 1024)):
        inputs = pair(n, d, device, torch.bfloat16)
        contenders = [
            Contender(f"gapkern, {kind}", gradients(functools.partial(contrastive_loss, memory=kind), inputs))
            for kind in ("recompute", "keep")
        ]

        def check(results, inputs=inputs):
            for result in results.values():
                check_large(result, inputs)

        yield Case({"N": n, "D": d, "dtype": "bfloat16", "operations": 8 * n * n * d}, contenders, check)


def contrastive(device: str, quick: bool, dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,)) -> Iterator[Case]:
    """Against PyTorch, compiled once, and open_clip."""
    shapes = ((64, 32),) if quick else ((32768, 768), (4096, 768), (16384, 768), (32768, 512), (32768, 1024))
    for number, (n, d) in enumerate(shapes):
        for dtype in dtypes:
            inputs = pair(n, d, device, dtype)
            others = list(rivals.others(compiled=number == 0 and dtype == torch.bfloat16 and not quick))
            contenders = [Contender(name, gradients(f, inputs), "baseline") for name, f in others]
            for memory in ("recompute", "keep"):
                loss = functools.partial(contrastive_loss, memory=memory)
                contenders.append(Contender(f"gapkern, {memory}", gradients(loss, inputs)))
            if dtype == torch.float32:
                loss = functools.partial(contrastive_loss, memory="recompute")
                contenders.append(Contender("gapkern, chunked", in_chunks(gradients(loss, inputs))))

            def check(results, dtype=dtype):
                return against_eager(results, 3e-2 if dtype == torch.bfloat16 else 1e-4)

            about = {"N": n, "D": d, "dtype": str(dtype)[6:], "operations": 8 * n * n * d}
            yield Case(about, contenders, check, EAGER)


def in_chunks(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call as GAPKERN_KERNEL=chunked has it: the library's float32 products, where Hopper's take bfloat16 terms."""

    def once():
        with unittest.mock.patch.object(dispatch, "requested_kernel", return_value="chunked"):
            return call()

    return once


def float32(device: str, quick: bool) -> Iterator[Case]:
    """In bfloat16 terms, and by the library's float32 products."""
    yield from contrastive(device, quick, (torch.float32,))


def largest(device: str, quick: bool) -> Iterator[Case]:
    """A batch whose logits no device could hold; checked for being finite only."""
    n, d = (128, 32) if quick else (262_144, 512)
    inputs = pair(n, d, device, torch.bfloat16)
    loss = functools.partial(contrastive_loss, memory="recompute")
    about = {"N": n, "D": d, "dtype": "bfloat16", "operations": 8 * n * n * d}

    def finite(results):
        assert all(t.isfinite().all() and t.abs().sum() > 0 for t in results["gapkern, recompute"])

    yield Case(about, [Contender("gapkern, recompute", gradients(loss, inputs))], finite)


def memory(device: str, quick: bool) -> Iterator[dict[str, Any]]:
    """Peak bytes above what was there before the call: gradients and whatever the loss works with."""
    if device == "cpu":
        return
    for n in (4096,) if quick else (4096, 16384, 32768):
        inputs = pair(n, 768, device, torch.bfloat16)
        row: dict[str, Any] = {"N": n, "D": 768, "dtype": "bfloat16"}
        contenders = [(EAGER, rivals.eager)]
        for kind in ("recompute", "keep"):
            contenders.append((f"gapkern, {kind}", lambda x, y, s, kind=kind: contrastive_loss(x, y, s, memory=kind)))
        for name, loss in contenders:
            try:
                row[name] = _peak(gradients(loss, inputs))
            except RuntimeError as error:
                row[name] = f"failed: {harness.reason(error)}"
                torch.cuda.empty_cache()
        yield row


def _peak(call: Callable[[], Any]) -> int:
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


def sigmoid(device: str, quick: bool) -> Iterator[Case]:
    """The sigmoid loss and its gradients."""
    for n, d in ((64, 32),) if quick else ((16384, 768), (32768, 768)):
        for dtype in (torch.bfloat16, torch.float32):
            inputs = [*pair(n, d, device, dtype)[:2], *(torch.tensor(v, device=device) for v in (10.0, -8.0))]
            contenders = [
                Contender(EAGER, gradients(rivals.eager_sigmoid, inputs), "baseline"),
                Contender("open_clip", gradients(rivals.sigmoid_of_open_clip, inputs), "baseline"),
                Contender("gapkern", gradients(sigmoid_loss, inputs)),
            ]
            if dtype == torch.float32:
                contenders.append(Contender("gapkern, chunked", in_chunks(gradients(sigmoid_loss, inputs))))
            close = 3e-2 if dtype == torch.bfloat16 else 1e-4
            about = {"N": n, "D": d, "dtype": str(dtype)[6:], "operations": 6 * n * n * d}
            yield Case(about, contenders, lambda results, close=close: against_eager(results, close), EAGER)
