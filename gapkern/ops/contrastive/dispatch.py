"""Which implementation the losses run on devices without kernels of their own: `sm90` on Hopper, `chunked` elsewhere.

`GAPKERN_KERNEL` forces one. The CPU's operators are registered in C++ and never come here.
"""

import functools
import os
from types import ModuleType

import torch
from torch import Tensor

from gapkern.ops.contrastive import chunked, masked_chunked, masked_sm90, sm90
from gapkern.ops.contrastive.arguments import (
    LseBackwardArguments,
    MaskedArguments,
    MaskedBackwardArguments,
    MaskedSigmoidArguments,
)

_SM90_SCOPE = (
    "sm90 for bfloat16, for float32 with matmul precision medium, and for dot products of float16 and of float32 with "
    "precision highest, where dims are a multiple of 8; chunked for the rest"
)


@functools.cache
def requested_kernel() -> str:
    """`GAPKERN_KERNEL`, read once: auto, chunked or sm90."""
    kernel = os.environ.get("GAPKERN_KERNEL") or "auto"
    if kernel not in ("auto", "chunked", "sm90"):
        raise ValueError(f"GAPKERN_KERNEL: expected auto, chunked or sm90, got {kernel!r}")
    return kernel


def built() -> bool:
    """Whether the loaded CUDA library has the sm90 kernels."""
    return torch._C._dispatch_has_kernel_for_dispatch_key("gapkern::contrastive_sm90_sums", "CUDA")


def compiled() -> list[str]:
    """The losses' CUDA kernels in the loaded library: "chunked" for every device, "sm90" for Hopper."""
    chunks = torch._C._dispatch_has_kernel_for_dispatch_key("gapkern::contrastive_chunk_lse", "CUDA")
    return ["chunked"] * chunks + ["sm90"] * built()


def in_use() -> dict[str, str]:
    """The losses' kernels on every device, and why not the sm90 ones (asked for bfloat16, whose dims are aligned)."""
    found = {"cpu": "the processor's kernels"}
    for index in range(torch.cuda.device_count()):
        reason = (
            "GAPKERN_KERNEL=chunked"
            if requested_kernel() == "chunked"
            else unsupported_reason(torch.device("cuda", index), torch.bfloat16, 8)
        )
        found[f"cuda:{index}"] = f"chunked (not the Hopper kernels: {reason})" if reason else _SM90_SCOPE
    return found


def unsupported_reason(
    device: torch.device, dtype: torch.dtype, dims: int, similarity: str = "dot", precision: str = "highest"
) -> str:
    """Why the sm90 kernels do not support such embeddings; empty where they do."""
    if device.type != "cuda":
        return f"they need a CUDA device, got {device.type}"
    if not built():
        return "the library was built without them"
    capability = torch.cuda.get_device_capability(device)
    if capability != (9, 0):
        return f"they need a device of capability 9.0, got {capability[0]}.{capability[1]}"
    if dtype == torch.float32 and precision not in ("highest", "medium"):
        return f"they take float32 with torch.set_float32_matmul_precision('highest') or 'medium', got {precision!r}"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"they take bfloat16, float16 and float32, got {str(dtype).removeprefix('torch.')}"
    if dims % 8:
        return f"they need dims to be a multiple of 8, got {dims}"
    if similarity == "sqeuclidean" and dtype == torch.float16:
        return "they take no float16 for the similarity 'sqeuclidean': squared norms overflow"
    if similarity == "sqeuclidean" and dtype == torch.float32 and precision != "medium":
        return "they take float32 for the similarity 'sqeuclidean' with matmul precision 'medium', got 'highest'"
    return ""


def uses_sm90(
    images: Tensor, similarity: str, precision: str = "highest", masked: bool = False, guided: bool = False
) -> bool:
    """Whether the sm90 kernels take these embeddings; the same answer in the forward and the backward pass."""
    kernel = requested_kernel()
    if kernel == "chunked":
        return False
    reason = unsupported_reason(images.device, images.dtype, images.shape[1], similarity, precision)
    if masked and not reason:
        reason = _unsupported_masks(images.dtype, precision, guided)
    if reason and kernel == "sm90" and images.is_cuda:
        raise ValueError(f"GAPKERN_KERNEL=sm90: the Hopper kernels cannot run: {reason}")
    return not reason


def _unsupported_masks(dtype: torch.dtype, precision: str, guided: bool) -> str:
    if guided:
        return "they have ids and limits, and no guide, whose products would be formed beside the logits"
    if dtype == torch.float32 and precision != "medium":
        return f"they take ids and limits of float32 with matmul precision 'medium', got {precision!r}"
    return ""


def keeps(images: Tensor, similarity: str, precision: str) -> bool:
    """Whether the forward pass has a use for the memory that it may keep."""
    return not uses_sm90(images, similarity, precision) or sm90.keeps(images.dtype, precision)


def _implementation(images: Tensor, similarity: str, precision: str) -> ModuleType:
    return sm90 if uses_sm90(images, similarity, precision) else chunked


def contrastive_lse(
    images: Tensor,
    texts: Tensor,
    logit_scale: Tensor,
    similarity: str,
    label_offset: int,
    precision: str,
    work_bytes: int,
) -> tuple[Tensor, ...]:
    """See `gapkern.ops.contrastive.lse_pair`."""
    implementation = _implementation(images, similarity, precision)
    return implementation.contrastive_lse(images, texts, logit_scale, similarity, label_offset, precision, work_bytes)


def contrastive_lse_backward(arguments: LseBackwardArguments) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `contrastive_lse`."""
    implementation = _implementation(arguments.images, arguments.similarity, arguments.precision)
    return implementation.contrastive_lse_backward(arguments)


def sigmoid_loss(
    images: Tensor,
    texts: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    label_offset: int,
    precision: str,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    """See `gapkern.ops.contrastive.sigmoid_sum`."""
    implementation = _implementation(images, "dot", precision)
    return implementation.sigmoid_loss(images, texts, logit_scale, logit_bias, label_offset, precision, needs)


def _masked_implementation(arguments: MaskedArguments) -> ModuleType:
    guided = arguments.guide_x.numel() > 0
    sm90_takes_them = uses_sm90(arguments.x, arguments.similarity, arguments.precision, True, guided)
    return masked_sm90 if sm90_takes_them else masked_chunked


def masked_lse(arguments: MaskedArguments) -> tuple[Tensor, ...]:
    """See `gapkern.ops.contrastive.masked_lse`."""
    return _masked_implementation(arguments).masked_lse(arguments)


def masked_lse_backward(arguments: MaskedBackwardArguments) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `masked_lse`."""
    return _masked_implementation(arguments.pairs).masked_lse_backward(arguments)


def masked_sigmoid(arguments: MaskedSigmoidArguments) -> tuple[Tensor, ...]:
    """See `gapkern.ops.contrastive.masked_sigmoid_sum`."""
    implementation = masked_sm90 if uses_sm90(arguments.x, "dot", arguments.precision, True) else masked_chunked
    return implementation.masked_sigmoid(arguments)
