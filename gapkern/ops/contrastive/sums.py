"""`torch.ops.gapkern.contrastive_class_sums`: sums of t over pairs of equal ids (csrc/contrastive/class_sums.h).

Linear in either side's sums over a class, they need no matrix of pairs.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gapkern.ops import autocast, derivatives

CHUNK_ELEMENTS = 2**22  # of both sides at a time, in float64, on devices without kernels of ours
TOGETHER_ELEMENTS = 2**22  # of a side: up to here both gradients are formed at once

_library = torch.library.Library("gapkern", "IMPL")


class ClassArguments(NamedTuple):
    """The arguments of `contrastive_class_sums`, in the order of its schema."""

    x: Tensor  # (N, D)
    y: Tensor  # (M, D)
    row_ids: Tensor  # (N,) int64
    col_ids: Tensor  # (M,) int64
    similarity: str
    label_offset: int
    labelled: bool


def class_sums(
    x: Tensor,
    y: Tensor,
    row_ids: Tensor,
    col_ids: Tensor,
    *,
    similarity: str = "dot",
    label_offset: int = 0,
    labelled: bool = True,
) -> tuple[Tensor, Tensor]:
    """(N,), (M,) float64: each row's and each column's sum of t over the pairs of equal ids.

    Gradients reach x and y, once. Those of large embeddings are formed one after the other, which halves their memory.

    Args:
        x, y: (N, D), (M, D) float32, float16, bfloat16 or float64.
        row_ids, col_ids: (N,), (M,) integers.
        similarity: t is <x, y> for "dot", -||x - y||^2 for "sqeuclidean".
        label_offset: the label of row i is column i + label_offset, where there is one.
        labelled: whether labels are left out.

    Example:
        >>> x = torch.tensor([[1.0], [2.0], [3.0]])
        >>> class_sums(x, x, torch.tensor([0, 0, 1]), torch.tensor([0, 0, 0]))[0].tolist()
        [5.0, 8.0, 0.0]
    """

    def call(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = torch.ops.gapkern.contrastive_class_sums(
            x, y, row_ids, col_ids, similarity, label_offset, labelled
        )
        return found

    if max(x.numel(), y.numel()) <= TOGETHER_ELEMENTS:
        return call(x, y)
    # Twice the values, which cost little, each with one side's derivatives.
    (of_x, col_of_x), (of_y, col_of_y) = call(x, y.detach()), call(x.detach(), y)
    return of_x + (of_y - of_y.detach()), col_of_x + (col_of_y - col_of_y.detach())


class _Classes:
    """Numbers of the classes, from 0, and the pairs that are labels of equal ids, for PyTorch's operations."""

    def __init__(self, arguments: ClassArguments):
        a = arguments
        ordered = torch.cat([a.row_ids, a.col_ids]).sort().values
        self.number = len(ordered)
        self.rows, self.columns = (torch.searchsorted(ordered, ids) for ids in (a.row_ids, a.col_ids))
        n, m = len(a.x), len(a.y)
        first = min(max(0, -a.label_offset), n) if a.labelled else 0
        last = max(first, min(n, m - a.label_offset)) if a.labelled else 0
        self.own, self.labels = slice(first, last), slice(first + a.label_offset, last + a.label_offset)
        self.equal = (self.rows[self.own] == self.columns[self.labels]).double()[:, None]

    def summed(self, place: Tensor, values: Tensor) -> Tensor:
        return values.new_zeros(self.number, *values.shape[1:]).index_add_(0, place, values)

    def turned(self) -> "_Classes":
        """The same as the columns see it."""
        found = object.__new__(_Classes)
        found.number, found.rows, found.columns = self.number, self.columns, self.rows
        found.own, found.labels, found.equal = self.labels, self.own, self.equal
        return found


def _sums(classes: _Classes, x: Tensor, y: Tensor, euclidean: bool) -> Tensor:
    """Of x's rows, over a few columns in float64."""
    total = classes.summed(classes.columns, y)
    if not euclidean:
        found = (x * total[classes.rows]).sum(1)
        found[classes.own] -= (classes.equal * x[classes.own] * y[classes.labels]).sum(1)
        return found
    count = classes.summed(classes.columns, y.new_ones(len(y), 1))
    mean = total / count.clamp_min(1)
    spread = classes.summed(classes.columns, (y - mean[classes.columns]).square())
    found = -(count[classes.rows] * (x - mean[classes.rows]).square() + spread[classes.rows]).sum(1)
    found[classes.own] += (classes.equal * (x[classes.own] - y[classes.labels]).square()).sum(1)
    return found


def _gradient(classes: _Classes, x: Tensor, y: Tensor, by_own: Tensor, by_other: Tensor, euclidean: bool) -> Tensor:
    """Of x's rows, over a few columns in float64; gradients as columns of a matrix."""
    own, labels = classes.own, classes.labels
    found = by_own * classes.summed(classes.columns, y)[classes.rows]
    found += classes.summed(classes.columns, by_other * y)[classes.rows]
    of_labels = classes.equal * (by_own[own] + by_other[labels])
    found[own] -= of_labels * y[labels]
    if not euclidean:
        return found
    weights = by_own * classes.summed(classes.columns, torch.ones_like(by_other))[classes.rows]
    weights += classes.summed(classes.columns, by_other)[classes.rows]
    weights[own] -= of_labels
    return 2 * (found - weights * x)


def _runs(x: Tensor, y: Tensor) -> list[slice]:
    step = max(1, CHUNK_ELEMENTS // max(1, len(x) + len(y)))
    return [slice(c, c + step) for c in range(0, x.shape[1], step)]


def _forward(*inputs):
    arguments = ClassArguments(*inputs)
    x, y, euclidean = arguments.x, arguments.y, arguments.similarity == "sqeuclidean"
    classes = _Classes(arguments)
    rows, columns = (torch.zeros(len(t), dtype=torch.float64, device=x.device) for t in (x, y))
    for run in _runs(x, y):
        a, b = x[:, run].double(), y[:, run].double()
        rows += _sums(classes, a, b, euclidean)
        columns += _sums(classes.turned(), b, a, euclidean)
    return rows, columns


def _backward_kernel(*inputs):
    by_rows, by_columns = (g.double()[:, None] for g in inputs[:2])
    arguments, needs = ClassArguments(*inputs[2:-1]), inputs[-1]
    x, y, euclidean = arguments.x, arguments.y, arguments.similarity == "sqeuclidean"
    classes = _Classes(arguments)
    dx, dy = (torch.empty_like(t) if needed else t.new_empty(0) for t, needed in zip((x, y), needs, strict=True))
    for run in _runs(x, y):
        a, b = x[:, run].double(), y[:, run].double()
        if needs[0]:
            dx[:, run] = _gradient(classes, a, b, by_rows, by_columns, euclidean).to(x.dtype)
        if needs[1]:
            dy[:, run] = _gradient(classes.turned(), b, a, by_columns, by_rows, euclidean).to(y.dtype)
    return dx, dy


for _name, _kernel in (("class_sums", _forward), ("class_sums_backward", _backward_kernel)):
    _library.impl(f"contrastive_{_name}", autocast.untouched(_kernel), "CompositeExplicitAutograd")


@torch.library.register_fake("gapkern::contrastive_class_sums", lib=_library)
def _(*inputs):
    x, y = inputs[:2]
    return x.new_empty((x.shape[0],), dtype=torch.float64), y.new_empty((y.shape[0],), dtype=torch.float64)


@torch.library.register_fake("gapkern::contrastive_class_sums_backward", lib=_library)
def _(*inputs):
    sides, needs = inputs[2:4], inputs[-1]
    return tuple(t.new_empty(t.shape if needed else (0,)) for t, needed in zip(sides, needs, strict=True))


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4])
    ctx.options = inputs[4:]


def _backward(ctx, *grads):
    x, y = ctx.saved_tensors[:2]
    pairs = zip((x, y), grads, strict=True)
    grads = tuple(t.new_zeros(t.shape[0], dtype=torch.float64) if g is None else g for t, g in pairs)
    needs = list(ctx.needs_input_grad[:2])
    found = torch.ops.gapkern.contrastive_class_sums_backward(*grads, *ctx.saved_tensors, *ctx.options, needs)
    return *(g if needed else None for g, needed in zip(found, needs, strict=True)), *(None,) * 5


def _jvp(inputs, tangents):
    """A tangent of t is an inner product too: 2 <x - y, dy - dx> for distances."""
    arguments = ClassArguments(*inputs)
    x, y = (t.double() for t in inputs[:2])
    dx, dy = (torch.zeros_like(t) if d is None else d.double() for t, d in zip((x, y), tangents[:2], strict=True))
    left, right = [dx, x], [y, dy]
    if arguments.similarity == "sqeuclidean":
        left = [2 * dx, 2 * x, -2 * (x * dx).sum(1, keepdim=True), torch.full_like(x[:, :1], -2)]
        right = [y, dy, torch.ones_like(y[:, :1]), (y * dy).sum(1, keepdim=True)]
    arguments = arguments._replace(x=torch.cat(left, 1), y=torch.cat(right, 1), similarity="dot")
    return torch.ops.gapkern.contrastive_class_sums(*arguments)


derivatives.register("contrastive_class_sums", _backward, save=_save, jvp=_jvp)
derivatives.register("contrastive_class_sums_backward", derivatives.refuse_twice, jvp=derivatives.refuse_jvp_twice)

for _key in ("AutocastCPU", "AutocastCUDA"):
    _library.impl("contrastive_class_sums", autocast.rounded(torch.ops.gapkern.contrastive_class_sums), _key)
