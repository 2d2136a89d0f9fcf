"""`torch.ops.gapkern.perturb_*`: counter-based noise and quantisation of rows (csrc/perturb/perturb.h)."""

import torch
from torch import Tensor

from gapkern.ops import derivatives, meanshift

_RANGE = "gapkern: perturb_quantize has no derivative for low and high; pass them without a gradient (detach())"


@torch.library.register_fake("gapkern::perturb_bits")
def _(x, seed, trial, first_row):
    return x.new_empty(x.shape, dtype=torch.int32)


@torch.library.register_fake("gapkern::perturb_noise")
def _(x, law, std, seed, trial, first_row):
    return x.new_empty(x.shape)


@torch.library.register_fake("gapkern::perturb_noisy_gallery")
def _(x, shift, law, std, seed, trial, first_row, normalize, when):
    return x.new_empty(x.shape)


@torch.library.register_fake("gapkern::perturb_quantize")
def _(x, low, high, bins):
    return x.new_empty(x.shape)


def _noisy_gallery(x: Tensor, shift: Tensor, law, std, seed, trial, first_row, normalize, when) -> Tensor:
    """One operator after the other, for devices without a kernel that has both in one pass."""
    if when not in ("after", "before"):
        raise RuntimeError(f"when: expected 'after' or 'before', got {when!r}")
    noise, move = torch.ops.gapkern.perturb_noise, torch.ops.gapkern.meanshift_apply
    if when == "before":
        return move(noise(x, law, std, seed, trial, first_row), shift, normalize)
    return noise(move(x, shift, normalize), law, std, seed, trial, first_row)


def _save_noisy_gallery(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], inputs[1])
    ctx.options = inputs[2:]


def _backward_noisy_gallery(ctx, grad):
    """The shift's derivative where it acts; noise passes gradients as they are."""
    x, shift = ctx.saved_tensors
    *noise, normalize, when = ctx.options
    if when == "before":
        x = torch.ops.gapkern.perturb_noise(x, *noise)
    moved = torch.ops.gapkern.meanshift_apply(x, shift, normalize)
    return (*meanshift.gradients(grad, x, shift, moved, normalize, ctx.needs_input_grad), *(None,) * 7)


def _jvp_noisy_gallery(inputs, tangents):
    x, shift, *noise, normalize, when = inputs
    if when == "before":
        x = torch.ops.gapkern.perturb_noise(x, *noise)
    return meanshift.tangent((x, shift, normalize), (*tangents[:2], None))


def _unchanged(ctx, grad):
    return (grad, *(None,) * 5)


def _jvp_unchanged(inputs, tangents):
    return tangents[0].clone()


def _save_quantize(ctx, inputs, output):
    if any(t.requires_grad for t in inputs[1:3]):
        raise RuntimeError(_RANGE)


def _zero(ctx, grad):
    """A step function's derivative, as torch.round has it."""
    return torch.zeros_like(grad), None, None, None


def _jvp_quantize(inputs, tangents):
    if any(tangent is not None for tangent in tangents[1:3]):
        raise RuntimeError(_RANGE)
    return torch.zeros_like(inputs[0])


def _save_bits(ctx, inputs, output):
    ctx.mark_non_differentiable(output)


def _refuse(ctx, *_):
    raise RuntimeError("gapkern: perturb_bits is not differentiable")


def _constant(inputs, tangents):
    """Random bits do not depend on x, but for its shape."""
    return None


derivatives.register("perturb_bits", _refuse, save=_save_bits, jvp=_constant)
derivatives.register("perturb_noise", _unchanged, jvp=_jvp_unchanged)
derivatives.register("perturb_quantize", _zero, save=_save_quantize, jvp=_jvp_quantize)
derivatives.register("perturb_noisy_gallery", _backward_noisy_gallery, save=_save_noisy_gallery, jvp=_jvp_noisy_gallery)
_library = torch.library.Library("gapkern", "IMPL")
_library.impl("perturb_noisy_gallery", _noisy_gallery, "CompositeExplicitAutograd")
