"""`torch.ops.gapkern.contrastive_masked_lse`: log-sum-exps of logits over disjoint classes of pairs, in chunks of rows.

With t_ij = <x_i, y_j>, or -||x_i - y_j||^2, every pair is of one class, the first that applies:
    label     j = i + label_offset; counted by itself, or left out;
    positive  equal ids, where equal="positive";
    left out  equal ids, where equal="left_out"; t_ij above its row's or its column's limit; u_ij =
              <guide_x_i, guide_y_j> above a limit of the guide's;
    negative  all others.
An absent tensor is one without elements. The gradient weights are e^(s t - lse) of the pair's own class, 0 where left
out; limits and guides are constants.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from gapkern.ops import autocast, derivatives
from gapkern.ops.contrastive.chunked import _Gradients, _Logits
from gapkern.ops.contrastive.tangents import _Logits as _TangentLogits
from gapkern.ops.precision import matmul_precision
from gapkern.ops.products import matmul

CHUNK_ELEMENTS = 2**20  # logits at a time, in several copies: 4 MiB each in float32
CUDA_CHUNK_ELEMENTS = 2**25

_library = torch.library.Library("gapkern", "IMPL")


class MaskedArguments(NamedTuple):
    """The arguments of `contrastive_masked_lse`, in the order of its schema."""

    x: Tensor  # (N, D)
    y: Tensor  # (M, D)
    logit_scale: Tensor  # one element
    row_ids: Tensor  # (N,) int64, or (0,)
    col_ids: Tensor  # (M,) int64, or (0,)
    row_limit: Tensor  # (N,) of t, or (0,)
    col_limit: Tensor  # (M,), or (0,)
    guide_x: Tensor  # (N, G), or (0, 0)
    guide_y: Tensor  # (M, G), or (0, 0)
    guide_row_limit: Tensor  # (N,) of u, or (0,)
    guide_col_limit: Tensor  # (M,), or (0,)
    similarity: str
    label_offset: int
    label: str  # "counted", "left_out" or "none"
    equal: str  # "positive" or "left_out"
    precision: str
    work_bytes: int = 0

    def counts(self) -> tuple[int, int]:
        return self.x.shape[0], self.y.shape[0]


class Classes(NamedTuple):
    """Float64 results of `masked_lse`; an empty class has -inf."""

    row_negative: Tensor  # (N,)
    col_negative: Tensor  # (M,)
    row_positive: Tensor  # (N,)
    col_positive: Tensor  # (M,)
    label: Tensor  # (N,) s t at the labels, -inf without one; (0,) unless they are counted


def masked_lse(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    *,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    equal: str = "left_out",
    row_limit: Tensor | None = None,
    col_limit: Tensor | None = None,
    guide_x: Tensor | None = None,
    guide_y: Tensor | None = None,
    guide_row_limit: Tensor | None = None,
    guide_col_limit: Tensor | None = None,
    similarity: str = "dot",
    label_offset: int = 0,
    label: str = "counted",
    work_bytes: int = 0,
) -> Classes:
    """Row and column log-sum-exps of the logits, over negatives and over positives, and the labels' logits.

    Gradients reach x, y and logit_scale, once; memory is linear in N + M.

    Args:
        x: (N, D) float32, float16, bfloat16 or float64.
        y: (M, D), the same dtype.
        logit_scale: one element.
        row_ids, col_ids: (N,) and (M,) integers in [0, 2^24), together.
        equal: what pairs of equal ids are, "positive" or "left_out".
        row_limit, col_limit: (N,), (M,): pairs with t above either are left out.
        guide_x, guide_y: (N, G), (M, G): what the guide's limits are about.
        guide_row_limit, guide_col_limit: (N,), (M,).
        similarity: "dot" or "sqeuclidean".
        label_offset: the label of row i is column i + label_offset, where there is one.
        label: "counted" by itself, "left_out" of everything, or "none": no pair is a label.
        work_bytes: memory the forward pass may keep for the backward pass (on the CPU).

    Example:
        >>> x = torch.eye(3)
        >>> found = masked_lse(x, x, torch.tensor(2.0))
        >>> [round(v, 4) for v in found.row_negative.tolist()], found.label.tolist()
        ([0.6931, 0.6931, 0.6931], [2.0, 2.0, 2.0])
    """
    none, integers, matrix = absent(x)
    return Classes(
        *torch.ops.gapkern.contrastive_masked_lse(
            x,
            y,
            logit_scale,
            given(row_ids, integers),
            given(col_ids, integers),
            given(row_limit, none),
            given(col_limit, none),
            given(guide_x, matrix),
            given(guide_y, matrix),
            given(guide_row_limit, none),
            given(guide_col_limit, none),
            similarity,
            label_offset,
            label,
            equal,
            matmul_precision(x.device.type),
            work_bytes,
        )[:5]
    )


def absent(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What stands for a vector, for ids and for a matrix that are not given."""
    none = x.detach().new_empty(0)
    return none, none.to(torch.int64), none.reshape(0, 0)


def given(value: Tensor | None, absent: Tensor) -> Tensor:
    return absent if value is None else value.detach()


class _Masks:
    """Classes of a chunk's pairs."""

    def __init__(self, arguments: MaskedArguments, work: torch.dtype):
        self.arguments, self.work = arguments, work
        self.guided = bool(arguments.guide_x.numel())

    def labels(self, matrix: Tensor, first: int) -> Tensor:
        """A view of a chunk's labels, as many as it holds; `first` is the chunk's first row."""
        offset = first + self.arguments.label_offset
        if self.arguments.label != "none" and -matrix.shape[0] < offset < matrix.shape[1]:
            return matrix.diagonal(offset)
        return matrix[:0, 0]

    def rows_with_labels(self, rows: slice) -> slice:
        """Those of `rows`, as `labels` has them."""
        offset, m = self.arguments.label_offset, self.arguments.y.shape[0]
        if self.arguments.label == "none":
            return slice(0, 0)
        first = min(max(rows.start, -offset), rows.stop)
        return slice(first, max(first, min(rows.stop, m - offset)))

    def __call__(self, t: Tensor, rows: slice) -> tuple[Tensor | None, Tensor | None]:
        """Which pairs of t (n, M) are no negatives, and which are positives; None: none."""
        a = self.arguments
        positive, other = None, None

        def also(mask: Tensor | None, found: Tensor) -> Tensor:
            return found if mask is None else mask.logical_or_(found)

        for matrix, row_limit, col_limit in (
            (t, a.row_limit, a.col_limit),
            (None, a.guide_row_limit, a.guide_col_limit),
        ):
            if not (row_limit.numel() or col_limit.numel()):
                continue
            if matrix is None:
                matrix = matmul(a.guide_x[rows].to(self.work), a.guide_y.to(self.work).T, self.work)
            if row_limit.numel():
                other = also(other, matrix > row_limit[rows, None].to(self.work))
            if col_limit.numel():
                other = also(other, matrix > col_limit.to(self.work))
        if a.row_ids.numel():
            same = a.row_ids[rows, None] == a.col_ids
            other = also(other, same)
            positive = same.clone() if a.equal == "positive" else None
        if a.label != "none":
            if other is None:
                other = torch.zeros_like(t, dtype=torch.bool)
            self.labels(other, rows.start).fill_(True)
            if positive is not None:
                self.labels(positive, rows.start).fill_(False)
        return other, positive


def _logits_of(arguments: MaskedArguments) -> _Logits:
    logits = _Logits(arguments.x, arguments.y, arguments.similarity)
    elements = CUDA_CHUNK_ELEMENTS if arguments.x.is_cuda else CHUNK_ELEMENTS
    logits.step = max(1, elements // arguments.y.shape[0])
    return logits


def _similarities(logits: _Logits, rows: slice) -> Tensor:
    products = logits.products(rows)
    if not logits.euclidean:
        return products
    row_norms, col_norms = logits.norms(rows)
    return products.mul_(2).sub_(row_norms[:, None]).sub_(col_norms).clamp_(max=0)


def forward(*inputs):
    arguments = MaskedArguments(*inputs)
    logits = _logits_of(arguments)
    masks = _Masks(arguments, logits.dtype)
    n, m = arguments.counts()
    scale = arguments.logit_scale.reshape(())
    empty = torch.full((n + m,), -math.inf, dtype=torch.float64, device=arguments.x.device)
    row_negative, col_negative = (part.clone() for part in empty.split([n, m]))
    row_positive, col_positive = (part.clone() for part in empty.split([n, m]))
    label_t = empty[:n].clone() if arguments.label == "counted" else empty[:0].clone()
    for rows in logits.chunks():
        t = _similarities(logits, rows)
        other, positive = masks(t, rows)
        if label_t.numel():
            label_t[masks.rows_with_labels(rows)] = masks.labels(t, rows.start).double()
        s = t.mul_(scale.to(t.dtype))
        if positive is not None:
            apart = s.masked_fill(~positive, -math.inf)
            row_positive[rows] = apart.logsumexp(1).double()
            col_positive = torch.logaddexp(col_positive, apart.logsumexp(0).double())
        if other is not None:
            s.masked_fill_(other, -math.inf)
        row_negative[rows] = s.logsumexp(1).double()
        col_negative = torch.logaddexp(col_negative, s.logsumexp(0).double())
    there = label_t > -math.inf  # a negative scale leaves a missing label at -inf
    label_logit = torch.where(there, label_t * scale.double(), label_t)
    none = empty[:0].clone()
    return row_negative, col_negative, row_positive, col_positive, label_logit, none, none.clone(), none.clone()


def _weights(s: Tensor, lse: Tensor, gradient: Tensor) -> Tensor:
    """g e^(s - lse). Where a sum is empty it is no number, and none of its pairs are of the class: they are masked."""
    return (s - lse.to(s.dtype)).exp_().mul_(gradient.to(s.dtype))


def backward(*inputs):
    grads, lses, arguments, needs = inputs[:5], inputs[5:9], MaskedArguments(*inputs[12:-1]), inputs[-1]
    logits = _logits_of(arguments)
    masks = _Masks(arguments, logits.dtype)
    low = arguments.x.dtype if not logits.euclidean else logits.dtype
    loss_scale = torch.ones((), dtype=torch.float64, device=arguments.x.device)
    if low == torch.float16:  # gradients of 1/N underflow
        largest = torch.stack([g.abs().amax() for g in grads if g.numel()]).amax()
        loss_scale = torch.exp2(13 - torch.log2(largest.double()).ceil().nan_to_num(0, 0, 0))
    gradients = _Gradients(logits, needs, loss_scale)
    row_negative, col_negative, row_positive, col_positive, at_label = (g.double() * loss_scale for g in grads)
    scale = arguments.logit_scale.reshape(()).to(logits.dtype)
    for rows in logits.chunks():
        t = _similarities(logits, rows)
        other, positive = masks(t, rows)
        s = t * scale
        ds = _weights(s, lses[0][rows, None], row_negative[rows, None])
        ds += _weights(s, lses[1], col_negative)
        if other is not None:
            ds.masked_fill_(other, 0)
        if positive is not None:
            of_positives = _weights(s, lses[2][rows, None], row_positive[rows, None])
            of_positives += _weights(s, lses[3], col_positive)
            ds += of_positives.masked_fill_(~positive, 0)
        if at_label.numel():
            masks.labels(ds, rows.start).copy_(at_label[masks.rows_with_labels(rows)])
        sums = (ds.sum(1)[None], ds.sum(0)[None]) if logits.euclidean else (ds[:0, 0], ds[:0, 0])
        of_scale = torch.sum(t.mul_(ds), dtype=torch.float64).reshape(1)
        gradients.add(rows, ds.to(low), of_scale, *sums)
    dx, dy, of_scale = gradients.finish(scale)
    of_scale = of_scale.reshape(1).clone() if needs[2] else of_scale.new_empty(0)
    return dx.to(arguments.x.dtype), dy.to(arguments.y.dtype), of_scale.to(arguments.logit_scale.dtype)


for _name, _kernel in (("masked_lse", forward), ("masked_lse_backward", backward)):
    _library.impl(f"contrastive_{_name}", autocast.untouched(_kernel), "CompositeExplicitAutograd")


def doubles(like: Tensor, *shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(shape, dtype=torch.float64) for shape in shapes)


def rows_kept(n: int | torch.SymInt, m: int | torch.SymInt, item: int, work_bytes: int) -> int | torch.SymInt:
    if work_bytes <= 0:
        return 0
    # As an expression of the batch it would be compared with 0 and 1, which holds for some batches and not others.
    if not (isinstance(n, int) and isinstance(m, int)):
        return torch.library.get_ctx().new_dynamic_size()
    return min(n, work_bytes // (m * item))


@torch.library.register_fake("gapkern::contrastive_masked_lse", lib=_library)
def _(*inputs):
    arguments = MaskedArguments(*inputs)
    n, m = arguments.counts()
    labels = n if arguments.label == "counted" else 0
    classes = doubles(arguments.x, (n,), (m,), (n,), (m,), (labels,))
    work = torch.float64 if arguments.x.dtype == torch.float64 else torch.float32
    if arguments.x.device.type != "cpu":
        return *classes, *doubles(arguments.x, (0,), (0,), (0,))
    rows = rows_kept(n, m, work.itemsize, arguments.work_bytes)
    return *classes, *doubles(arguments.x, (5, n), (4, m)), arguments.x.new_empty((rows, m), dtype=work)


@torch.library.register_fake("gapkern::contrastive_masked_lse_backward", lib=_library)
def _(*inputs):
    arguments, needs = MaskedArguments(*inputs[12:-1]), inputs[-1]
    x, y = arguments.x, arguments.y
    return (
        x.new_empty(x.shape if needs[0] else (0,)),
        y.new_empty(y.shape if needs[1] else (0,)),
        arguments.logit_scale.new_empty((1,) if needs[2] else (0,)),
    )


def _save(ctx, inputs, output):
    tensors, ctx.options = inputs[:11], inputs[11:-1]
    ctx.mark_non_differentiable(*output[5:])
    ctx.save_for_backward(*tensors, *output[:4], *output[5:])


def _backward(ctx, *grads):
    tensors, results = ctx.saved_tensors[:11], ctx.saved_tensors[11:]
    x, _, logit_scale = tensors[:3]
    label = x.shape[0] if ctx.options[2] == "counted" else 0
    shapes = (*(r.shape for r in results[:4]), (label,))
    grads = tuple(
        x.new_zeros(shape, dtype=torch.float64) if g is None else g for g, shape in zip(grads[:5], shapes, strict=True)
    )
    needs = list(ctx.needs_input_grad[:3])
    found = torch.ops.gapkern.contrastive_masked_lse_backward(*grads, *results, *tensors, *ctx.options, needs)
    dx, dy, ds = (g if needed else None for g, needed in zip(found, needs, strict=True))
    return dx, dy, None if ds is None else ds.reshape(logit_scale.shape), *(None,) * 14


def jvp(inputs, tangents):
    arguments = MaskedArguments(*inputs)
    logits = _TangentLogits(inputs, tangents, arguments.similarity)
    masks = _Masks(arguments, logits.work)
    chunks = logits.chunks()

    def classes(rows):
        s = logits.of(rows).double()
        other, positive = masks(logits.products(rows).detach(), rows)
        negative = torch.ones_like(s, dtype=torch.bool) if other is None else ~other
        return s, negative, torch.zeros_like(negative) if positive is None else positive

    def lse(s, mask, dim):
        return s.masked_fill(~mask, -math.inf).logsumexp(dim)

    columns = []
    for of_class in (1, 2):
        parts = [lse(found[0], found[of_class], 0) for found in map(classes, chunks)]
        columns.append(torch.stack(parts).logsumexp(0))
    rows_of: tuple[list[Tensor], list[Tensor]] = ([], [])
    columns_of, labels_of = [torch.zeros_like(c) for c in columns], []
    for rows in chunks:
        s, *of_classes = classes(rows)
        ds = logits.tangent(rows).double()
        for k, mask in enumerate(of_classes):
            for dim, total in ((1, lse(s, mask, 1)[:, None]), (0, columns[k])):
                total = total.masked_fill(total == -math.inf, 0)
                part = ((s - total).masked_fill(~mask, -math.inf).exp() * ds).sum(dim)
                if dim:
                    rows_of[k].append(part)
                else:
                    columns_of[k] = columns_of[k] + part
        if arguments.label == "counted":
            own, before = masks.rows_with_labels(rows), rows.start
            padding = (own.start - before, rows.stop - own.stop)
            labels_of.append(torch.nn.functional.pad(masks.labels(ds, before), padding))
    label = torch.cat(labels_of) if labels_of else rows_of[0][0][:0]
    return torch.cat(rows_of[0]), columns_of[0], torch.cat(rows_of[1]), columns_of[1], label, None, None, None


derivatives.register("contrastive_masked_lse", _backward, save=_save, jvp=jvp)
derivatives.register("contrastive_masked_lse_backward", derivatives.refuse_twice, jvp=derivatives.refuse_jvp_twice)

for _key in ("AutocastCPU", "AutocastCUDA"):
    _library.impl("contrastive_masked_lse", autocast.rounded(torch.ops.gapkern.contrastive_masked_lse), _key)
