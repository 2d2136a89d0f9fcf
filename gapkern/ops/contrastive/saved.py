"""Derivative rules of losses whose forward pass forms the gradients: (loss, the gradients of its first four inputs)."""

import torch
from torch.autograd import forward_ad

from gapkern.ops import derivatives


def needed(*inputs):
    """A transform hides from the caller which gradients are wanted; the rule's own inputs say it."""
    needs = [wanted or t.requires_grad for wanted, t in zip(inputs[-1], inputs[:2], strict=True)]
    return *inputs[:-1], needs


def save(ctx, inputs, output):
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:4], *output[1:])


def backward(ctx, grad_loss, *_):
    sources, saved = ctx.saved_tensors[:4], ctx.saved_tensors[4:]
    needs = ctx.needs_input_grad[:4]
    gradients = tuple(
        (g * grad_loss).to(t.dtype).reshape(t.shape)
        for g, t, needed in zip(saved, sources, needs, strict=True)
        if needed
    )
    if torch.is_grad_enabled() or forward_ad._current_level >= 0:  # the saved gradients are constants
        gradients = derivatives.once(gradients, (*sources, grad_loss))
    wanted = iter(gradients)
    options = len(ctx.needs_input_grad) - len(needs)
    return *(next(wanted) if needed else None for needed in needs), *(None,) * options
