"""`torch.ops.gapkern.meanshift_*`: sums, Gram matrices and shifts of rows (csrc/meanshift/meanshift.h)."""

import torch
from torch import Tensor

from gapkern.ops import derivatives

_CHUNK = 2**20  # elements in float64 at once
_TINY = 1e-12  # norms below it are taken for it, as torch.nn.functional.normalize does


@torch.library.register_fake("gapkern::meanshift_sum")
def _(x):
    return x.new_empty((x.shape[1],), dtype=torch.float64)


@torch.library.register_fake("gapkern::meanshift_gram")
def _(x, mean):
    return x.new_empty((x.shape[1], x.shape[1]), dtype=torch.float64)


@torch.library.register_fake("gapkern::meanshift_apply")
def _(x, shift, normalize):
    return x.new_empty(x.shape)


def _rows(x: Tensor) -> int:
    return max(1, _CHUNK // max(1, x.shape[1]))


def _sum(x: Tensor) -> Tensor:
    """For devices without kernels of ours."""
    return x.sum(0, dtype=torch.float64)


def _gram(x: Tensor, mean: Tensor) -> Tensor:
    """The library's product in float64, over chunks of rows."""
    gram = mean.new_zeros((x.shape[1], x.shape[1]), dtype=torch.float64)
    for rows in x.split(_rows(x)):
        centred = rows.to(torch.float64, copy=True).sub_(mean)
        gram.addmm_(centred.T, centred)
    return gram


def _apply(x: Tensor, shift: Tensor, normalize: bool) -> Tensor:
    """For devices without kernels of ours."""
    moved = torch.empty_like(x, memory_format=torch.contiguous_format)
    for first in range(0, x.shape[0], _rows(x)):
        rows = x[first : first + _rows(x)].double() + shift.double()
        if normalize:
            rows = rows / rows.norm(dim=1, keepdim=True).clamp_min(_TINY)
        moved[first : first + _rows(x)] = rows.to(x.dtype)
    return moved


_library = torch.library.Library("gapkern", "IMPL")
_library.impl("meanshift_sum", _sum, "CompositeExplicitAutograd")
_library.impl("meanshift_gram", _gram, "CompositeExplicitAutograd")
_library.impl("meanshift_apply", _apply, "CompositeExplicitAutograd")


def _save_sum(ctx, inputs, output):
    ctx.like = inputs[0].shape, inputs[0].dtype


def _backward_sum(ctx, grad):
    shape, dtype = ctx.like
    return (grad.to(dtype).expand(shape),)


def _save_gram(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward_gram(ctx, grad):
    x, mean = ctx.saved_tensors
    rows = (x.double() - mean.double()) @ (grad + grad.T)
    return rows.to(x.dtype), -rows.sum(0).to(mean.dtype)


def _save_apply(ctx, inputs, output):
    x, shift, ctx.normalize = inputs
    ctx.save_for_backward(x, shift, output)


def gradients(grad: Tensor, x: Tensor, shift: Tensor, moved: Tensor, normalize: bool, needs) -> tuple:
    """Of meanshift_apply, whose result is `moved`, for x and for the shift."""
    rows = grad.double()
    if normalize:
        norm = (x.double() + shift.double()).norm(dim=1, keepdim=True)
        unit = moved.double()
        inside = torch.where(norm > _TINY, (rows * unit).sum(1, keepdim=True), 0.0)
        rows = (rows - inside * unit) / norm.clamp_min(_TINY)
    return (
        rows.to(x.dtype) if needs[0] else None,
        rows.sum(0).reshape(shift.shape).to(shift.dtype) if needs[1] else None,
    )


def _backward_apply(ctx, grad):
    x, shift, output = ctx.saved_tensors
    return (*gradients(grad, x, shift, output, ctx.normalize, ctx.needs_input_grad), None)


def _jvp_sum(inputs, tangents):
    return tangents[0].sum(0, dtype=torch.float64)


def _jvp_gram(inputs, tangents):
    x, mean = (t.double() for t in inputs)
    moved = torch.zeros_like(x)
    for sign, tangent in zip((1, -1), tangents, strict=True):
        if tangent is not None:
            moved = moved + sign * tangent.double()
    half = (x - mean).T @ moved
    return half + half.T


def tangent(inputs, tangents):
    """Of meanshift_apply."""
    (x, shift, normalize), (dx, dshift, _) = inputs, tangents
    rows = torch.zeros_like(x, dtype=torch.float64)
    for moved in (dx, dshift):
        if moved is not None:
            rows = rows + moved.double()
    if normalize:
        moved = x.double() + shift.double()
        norm = moved.norm(dim=1, keepdim=True)
        clamped = norm.clamp_min(_TINY)
        unit = moved / clamped
        rows = (rows - torch.where(norm > _TINY, (rows * unit).sum(1, keepdim=True), 0.0) * unit) / clamped
    return rows.to(x.dtype)


derivatives.register("meanshift_sum", _backward_sum, save=_save_sum, jvp=_jvp_sum)
derivatives.register("meanshift_gram", _backward_gram, save=_save_gram, jvp=_jvp_gram)
derivatives.register("meanshift_apply", _backward_apply, save=_save_apply, jvp=tangent)
