"""The `contrastive_sm90_*` operators in PyTorch's operations: what their CUDA kernels compute, on any device.

Kernels: csrc/contrastive/sm90.cuh, whose constants these are. Exponentials are taken to base 2 and of a common shift:
e_ij = 2^(k <x_i, y_j> - c) with k = logit_scale / log 2 and control = {k, -c}; the suffix `lse2` means log-sum-exps in
base 2. Matrices with M columns come with rows of `row_pitch(M)` elements; the padding is undefined, and NaN here.
"""

import math

import torch
from torch import Tensor

from gapkern.ops.contrastive.lifted import CEILING, FLOOR
from gapkern.ops.contrastive.sm90 import WIDTH, row_pitch

_LN2, _LOG2E = math.log(2.0), 1 / math.log(2.0)
_WEIGHT_RANGE = 120  # kWeightRange
_SMALLEST_NORMAL = 2.0**-126  # ex2.approx.ftz flushes subnormals to zero


def shift(
    row_norms: Tensor,  # (N,) float32
    col_norms: Tensor,  # (M,) float32
    logit_scale: Tensor,
) -> Tensor:
    """control (2,): k, and -c such that no sum overflows and, where that allows it, none loses terms to underflow."""
    k = _LOG2E * logit_scale.reshape(()).float()
    bound = k.abs() * row_norms.float().amax() * col_norms.float().amax() * 1.001
    spare = CEILING - math.log2(max(len(row_norms), len(col_norms)))
    fitting = torch.minimum(bound, -(FLOOR + bound)).floor()
    return torch.stack([k, -torch.maximum((bound - spare).ceil(), fitting).clamp(min=0).float()])


def sums(
    images: Tensor,  # (n, D)
    texts: Tensor,  # (M, D)
    control: Tensor,  # (2,)
    kept: Tensor,  # (n, pitch) bfloat16, receives the exponentials; or empty
    label_offset: int,
) -> tuple[Tensor, Tensor]:
    """Row sums (n,) and column sums (M,) of the exponentials, float64; those of the labels are zero."""
    e = torch.exp2(control[0] * (images.float() @ texts.float().T) + control[1])
    e = torch.where(e < _SMALLEST_NORMAL, 0, e)
    e.diagonal(label_offset)[: len(images)] = 0
    if kept.numel():
        kept.fill_(float("nan"))[:, : texts.shape[0]] = e
    return e.sum(1, dtype=torch.float64), e.sum(0, dtype=torch.float64)


def lse(
    row_sums: Tensor,  # (N,) float64
    col_sums: Tensor,  # (M,) float64
    images: Tensor,  # (N, D)
    texts: Tensor,  # (M, D)
    control: Tensor,  # (2,)
    label_offset: int,
) -> tuple[Tensor, Tensor]:
    """Row (N,) and column (M,) log-sum-exps over all but the labels, -inf of nothing.

    Those whose sums over- or underflowed are recomputed in float32.
    """
    logits = control[0] * _LN2 * (images.float() @ texts.float().T)
    logits.diagonal(label_offset)[: len(images)] = -math.inf

    def finish(sums: Tensor, terms: int, dim: int) -> Tensor:
        complete = (sums >= terms * 2.0**FLOOR) & (sums < 2.0**127)
        exact = logits.logsumexp(dim).double()
        return torch.where(complete, _LN2 * (sums.log2() - control[1].double()), exact)

    return finish(row_sums, len(col_sums), 1), finish(col_sums, len(row_sums), 0)


def positive(images: Tensor, texts: Tensor, label_offset: int) -> Tensor:
    """<x_i, y_(i + label_offset)> for every row: (N,) float64."""
    labels = texts[label_offset : label_offset + len(images)]
    return torch.linalg.vecdot(images.double(), labels.double())


def weights(
    row_lse2: Tensor,  # (N,) float64
    col_lse2: Tensor,  # (M,) float64
    grad_row: Tensor,  # (N,) float64
    grad_col: Tensor,  # (M,) float64
    control: Tensor,  # (2,)
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of rows (N,), of columns (M rounded up to WIDTH, zeros at the end), and whether any is separate (1,).

    dS_ij = e_ij (row_weight_i + col_weight_j), with common weights grad 2^(c - lse2), their lowest bit 0. Where float32
    cannot represent such a weight or its exponentials, the row or column has a separate weight: the exponent
    log2 |grad| - lse2, its lowest bit 1 and the sign of grad in bit 1.
    """
    c = control[1].double()

    def weight(lse2: Tensor, grad: Tensor, terms: int) -> Tensor:
        exponent = grad.abs().log2() - lse2
        representable = (grad == 0) | ((exponent - c).abs() <= _WEIGHT_RANGE)
        is_common = (lse2 + c >= math.log2(terms) + FLOOR) & representable
        common = (grad * torch.exp2(-lse2 - c)).float().view(torch.int32) & ~1
        separate = (exponent.clamp(-1e30, 1e30).float().view(torch.int32) & ~3) | (grad < 0).int() << 1 | 1
        return torch.where(is_common, common, separate).view(torch.float32)

    rows, columns = weight(row_lse2, grad_row, len(col_lse2)), weight(col_lse2, grad_col, len(row_lse2))
    columns = torch.nn.functional.pad(columns, (0, -len(col_lse2) % WIDTH))
    return rows, columns, torch.cat([_is_separate(rows), _is_separate(columns)]).any().float().reshape(1)


def _is_separate(weight: Tensor) -> Tensor:
    return weight.view(torch.int32) & 1 == 1


def gradient(
    images: Tensor,  # (n, D)
    texts: Tensor,  # (M, D)
    control: Tensor,  # (2,)
    separate: Tensor,  # (1,): whether any weight is separate
    row_weight: Tensor,  # (n,)
    col_weight: Tensor,  # (M rounded up to WIDTH,)
    kept: Tensor,  # (n, pitch) bfloat16 exponentials, or empty
    grad_label: Tensor,  # (n,) float64
    label_offset: int,
    terms: int = 1,
) -> Tensor:
    """dS (terms n, pitch) in the embeddings' dtype, grad_label at the labels."""
    m = texts.shape[0]
    t = images.float() @ texts.float().T
    e = torch.exp2(control[0] * t + control[1])
    if kept.numel():  # where a weight is separate they may have been flushed
        e = torch.where(separate.bool(), e, kept[:, :m].float())
    ds = weighted(t, e, control, row_weight[:, None], col_weight[:m])
    ds.diagonal(label_offset)[: len(images)] = grad_label.to(ds.dtype)
    return _stored(ds, images.dtype, terms)


def _stored(ds: Tensor, dtype: torch.dtype, terms: int) -> Tensor:
    """(terms n, pitch): ds rounded to `dtype`, then what that left, and so on."""
    n, m = ds.shape
    stored = torch.full((terms, n, row_pitch(m)), float("nan"), dtype=dtype, device=ds.device)
    for matrix in stored:
        matrix[:, :m] = ds
        ds = ds - matrix[:, :m].float()
    return stored.flatten(0, 1)


def sigmoid(
    images: Tensor,  # (n, D)
    texts: Tensor,  # (M, D)
    logit_scale: Tensor,
    logit_bias: Tensor,
    label_offset: int,  # any
    terms: int = 1,
) -> tuple[Tensor, Tensor]:
    """Row sums (3, n) in float64 of the loss, dS and dS <x, y>; and dS (terms n, pitch) in the embeddings' dtype."""
    t = images.float() @ texts.float().T
    rows, columns = (torch.arange(len(v), device=t.device) for v in (images, texts))
    z = torch.where(rows[:, None] + label_offset == columns, 1.0, -1.0).to(t.dtype)
    s = z * (logit_scale.reshape(()).float() * t + logit_bias.reshape(()).float())
    ds = -z * torch.sigmoid(-s)
    of_rows = [v.sum(1, dtype=torch.float64) for v in (-torch.nn.functional.logsigmoid(s), ds, ds * t)]
    return torch.stack(of_rows), _stored(ds, images.dtype, terms)


def weighted(t: Tensor, e: Tensor, control: Tensor, row_weight: Tensor, col_weight: Tensor) -> Tensor:
    """e (row_weight + col_weight), or by separate weights, of products t and their exponentials e."""

    def term(weight: Tensor) -> Tensor:
        is_separate = _is_separate(weight)
        exponent = torch.where(is_separate, weight, weight.abs().log2() + control[1])
        negative = torch.where(is_separate, weight.view(torch.int32) & 2 != 0, weight < 0)
        return torch.where(negative, -1, 1) * torch.exp2(control[0] * t + exponent)

    separate = _is_separate(row_weight) | _is_separate(col_weight)
    return torch.where(separate, term(row_weight) + term(col_weight), e * (row_weight + col_weight))


STEPS = {
    "contrastive_sm90_shift": shift,
    "contrastive_sm90_sums": sums,
    "contrastive_sm90_lse": lse,
    "contrastive_sm90_positive": positive,
    "contrastive_sm90_weights": weights,
    "contrastive_sm90_gradient": gradient,
    "contrastive_sm90_sigmoid": sigmoid,
}

_library = torch.library.Library("gapkern", "IMPL")
for _name, _step in STEPS.items():
    _library.impl(_name, _step, "CompositeExplicitAutograd")
