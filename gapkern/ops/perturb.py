"""`torch.ops.gapkern.perturb_*`: counter-based noise and quantisation of rows (csrc/perturb/perturb.h)."""

import torch


@torch.library.register_fake("gapkern::perturb_bits")
def _(x, seed, trial, first_row):
    return x.new_empty(x.shape, dtype=torch.int32)


@torch.library.register_fake("gapkern::perturb_noise")
def _(x, law, std, seed, trial, first_row):
    return x.new_empty(x.shape)


@torch.library.register_fake("gapkern::perturb_quantize")
def _(x, low, high, bins):
    return x.new_empty(x.shape)


def _unchanged(ctx, grad):
    return (grad, *(None,) * 5)


def _zero(ctx, grad):
    """A step function's derivative, as torch.round has it."""
    return torch.zeros_like(grad), None, None, None


torch.library.register_autograd("gapkern::perturb_noise", _unchanged)
torch.library.register_autograd("gapkern::perturb_quantize", _zero)
