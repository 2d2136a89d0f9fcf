"""`torch.ops.gapkern.distill_*`: the cross-entropy of a student's softmaxes to a teacher's, in chunks of rows.

With logits S (N, M) of the student and R of the teacher, P and T their softmaxes over rows, or over columns:
-log P_ij = (max - S_ij) + log sum exp(S - max) has no term below zero, so its mean under T cancels nothing, and the
gradient's P - T is formed from the difference of the logarithms. One rounding of the embeddings serves it all.
"""

import torch
from torch import Tensor

from gapkern.ops import autocast, derivatives
from gapkern.ops.products import add_matmul, matmul, write_matmul

CHUNK_ELEMENTS = 2**21  # logits at hand, in several copies: 8 MiB each in float32
CUDA_CHUNK_ELEMENTS = 2**25

_library = torch.library.Library("gapkern", "FRAGMENT")
_PAIR = "Tensor images, Tensor texts, Tensor logit_scale"
_BOTH = (
    f"{_PAIR}, Tensor teacher_images, Tensor teacher_texts, Tensor teacher_scale,"
    " Tensor row_stats, Tensor col_stats, Tensor teacher_row_stats, Tensor teacher_col_stats"
)
_library.define(f"distill_stats({_PAIR}) -> (Tensor row_stats, Tensor col_stats)")
_library.define(f"distill_cross({_BOTH}) -> (Tensor rows, Tensor cols)")
_library.define(
    f"distill_cross_backward(Tensor grad_rows, Tensor grad_cols, {_BOTH}, bool[3] needs)"
    " -> (Tensor grad_images, Tensor grad_texts, Tensor grad_logit_scale)"
)


class _Logits:
    """<x, y> of a few rows at a time, and s."""

    def __init__(self, images: Tensor, texts: Tensor, logit_scale: Tensor):
        self.work = torch.promote_types(images.dtype, torch.float32)
        native = images.is_cuda and images.dtype == texts.dtype
        self.x, self.y = (images, texts) if native else (images.to(self.work), texts.to(self.work))
        self.scale = logit_scale.reshape(()).to(self.work)

    def products(self, rows: slice) -> Tensor:
        return matmul(self.x[rows], self.y.T, self.work)


def _chunks(images: Tensor, texts: Tensor):
    step = max(1, (CUDA_CHUNK_ELEMENTS if images.is_cuda else CHUNK_ELEMENTS) // len(texts))
    return (slice(i, min(len(images), i + step)) for i in range(0, len(images), step))


def _stats(images, texts, logit_scale):
    """[2, N] and [2, M] in float64: the largest logit, and the logarithm of the sum of exponentials about it."""
    logits = _Logits(images, texts, logit_scale)
    row = images.new_empty((2, len(images)), dtype=torch.float64)
    col = images.new_empty((2, len(texts)), dtype=torch.float64)
    col[0], col[1] = -torch.inf, 0  # the second is the sum itself, until the end
    for rows in _chunks(images, texts):
        s = logits.scale * logits.products(rows)
        most = s.amax(1)
        row[0, rows] = most.double()
        row[1, rows] = torch.sum((s - most[:, None]).exp_(), 1, dtype=torch.float64).log()
        most = s.amax(0)
        part = torch.sum((s - most).exp_(), 0, dtype=torch.float64)
        merged = torch.maximum(col[0], most.double())
        col[1] = col[1] * (col[0] - merged).exp() + part * (most.double() - merged).exp()
        col[0] = merged
    col[1].log_()
    return row, col


def _surprise(s: Tensor, stats: Tensor) -> Tensor:
    """-log softmax >= 0 of logits s; stats [2, ...] broadcast against them."""
    return (stats[0].to(s.dtype) - s).add_(stats[1].to(s.dtype))


def _difference(student: Tensor, teacher: Tensor) -> Tensor:
    """exp(-student) - exp(-teacher), to the relative precision of the exponents' difference."""
    apart = teacher - student
    larger = torch.minimum(student, teacher).neg_().exp_()
    return larger.mul_(apart.abs().neg_().expm1_().neg_()).mul_(apart.sign_())


def _cross(
    images, texts, logit_scale, teacher_images, teacher_texts, teacher_scale, row, col, teacher_row, teacher_col
):
    student, teacher = _Logits(images, texts, logit_scale), _Logits(teacher_images, teacher_texts, teacher_scale)
    of_rows = images.new_empty(len(images), dtype=torch.float64)
    of_cols = images.new_zeros(len(texts), dtype=torch.float64)
    for rows in _chunks(images, texts):
        s, r = student.scale * student.products(rows), teacher.scale * teacher.products(rows)
        share = _surprise(r, teacher_row[:, rows, None]).neg_().exp_()
        of_rows[rows] = torch.sum(share * _surprise(s, row[:, rows, None]), 1, dtype=torch.float64)
        share = _surprise(r, teacher_col[:, None]).neg_().exp_()
        of_cols += torch.sum(share * _surprise(s, col[:, None]), 0, dtype=torch.float64)
    return of_rows, of_cols


def _cross_backward(
    grad_rows,
    grad_cols,
    images,
    texts,
    logit_scale,
    teacher_images,
    teacher_texts,
    teacher_scale,
    row,
    col,
    teacher_row,
    teacher_col,
    needs,
):
    student, teacher = _Logits(images, texts, logit_scale), _Logits(teacher_images, teacher_texts, teacher_scale)
    work = student.work
    # Gradients of 1/N underflow in float16: its products are float32's.
    low = images.dtype if images.is_cuda and images.dtype == texts.dtype == torch.bfloat16 else work
    x, y = student.x.to(low), student.y.to(low)
    dx = torch.zeros(x.shape if needs[0] else (0,), dtype=work, device=x.device)
    dy = torch.zeros(y.shape if needs[1] else (0,), dtype=work, device=x.device)
    of_scale = torch.zeros((), dtype=torch.float64, device=x.device)
    by_row, by_col = grad_rows.to(work)[:, None], grad_cols.to(work)
    for rows in _chunks(images, texts):
        t = student.products(rows)
        s, r = student.scale * t, teacher.scale * teacher.products(rows)
        ds = _difference(_surprise(s, row[:, rows, None]), _surprise(r, teacher_row[:, rows, None])).mul_(by_row[rows])
        ds += _difference(_surprise(s, col[:, None]), _surprise(r, teacher_col[:, None])).mul_(by_col)
        of_scale += torch.sum(t.mul_(ds), dtype=torch.float64)
        if needs[0]:
            write_matmul(dx[rows], ds.to(low), y)
        if needs[1]:
            add_matmul(dy, ds.T.to(low), x[rows])
    dx, dy = (student.scale * d for d in (dx, dy))
    of_scale = of_scale.reshape(1) if needs[2] else of_scale.new_empty(0)
    return dx.to(images.dtype), dy.to(texts.dtype), of_scale.to(logit_scale.dtype)


for _name, _kernel in (("stats", _stats), ("cross", _cross), ("cross_backward", _cross_backward)):
    _library.impl(f"distill_{_name}", autocast.untouched(_kernel), "CompositeExplicitAutograd")


@torch.library.register_fake("gapkern::distill_stats", lib=_library)
def _(images, texts, logit_scale):
    return tuple(images.new_empty((2, t.shape[0]), dtype=torch.float64) for t in (images, texts))


@torch.library.register_fake("gapkern::distill_cross", lib=_library)
def _(images, texts, *_):
    return tuple(images.new_empty((t.shape[0],), dtype=torch.float64) for t in (images, texts))


@torch.library.register_fake("gapkern::distill_cross_backward", lib=_library)
def _(grad_rows, grad_cols, images, texts, logit_scale, *rest):
    needs = rest[-1]
    return (
        images.new_empty(images.shape if needs[0] else (0,)),
        texts.new_empty(texts.shape if needs[1] else (0,)),
        logit_scale.new_empty((1,) if needs[2] else (0,)),
    )


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad_rows, grad_cols):
    inputs = ctx.saved_tensors
    images, texts, scale = inputs[:3]
    grad_rows = scale.new_zeros(len(images), dtype=torch.float64) if grad_rows is None else grad_rows
    grad_cols = scale.new_zeros(len(texts), dtype=torch.float64) if grad_cols is None else grad_cols
    needs = list(ctx.needs_input_grad[:3])
    dx, dy, ds = torch.ops.gapkern.distill_cross_backward(grad_rows, grad_cols, *inputs, needs)
    gradients = (dx, dy, ds.reshape(scale.shape) if needs[2] else None)
    return *(g if needed else None for g, needed in zip(gradients, needs, strict=True)), *(None,) * 7


def _constant(ctx, *_):
    raise RuntimeError("gapkern: distill_stats is not differentiable; distill_cross has the whole derivative")


derivatives.register("distill_stats", _constant)
derivatives.register("distill_cross", _backward, save=_save)
derivatives.register("distill_cross_backward", derivatives.refuse_twice, jvp=derivatives.refuse_jvp_twice)


def stats(images: Tensor, texts: Tensor, logit_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Constants that `cross` needs: [2, N] for the rows and [2, M] for the columns, in float64."""
    return torch.ops.gapkern.distill_stats(images.detach(), texts.detach(), logit_scale.detach())


def cross(student, teacher, student_stats, teacher_stats) -> tuple[Tensor, Tensor]:
    """Cross-entropies to the teacher's softmaxes: (N,) over the rows and (M,) over the columns, in float64.

    Args:
        student, teacher: (images (N, D), texts (M, D), logit_scale); their D and dtypes may differ.
        student_stats, teacher_stats: of `stats`. Where the columns' are of more rows than these (N, D), as of all
            ranks, the columns' results are these rows' part, whose sum over the ranks is the cross-entropy.

    Example:
        >>> x, s = torch.eye(2), torch.tensor(1.0)
        >>> rows, cols = cross((x, x, s), (x, x, s), stats(x, x, s), stats(x, x, s))
        >>> round(float(rows[0]), 4)
        0.5822
    """
    return torch.ops.gapkern.distill_cross(*student, *teacher, *student_stats, *teacher_stats)
