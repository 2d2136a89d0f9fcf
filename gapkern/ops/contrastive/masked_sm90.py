"""The operators over classes of pairs on Hopper: ids and limits are compared in the products' epilogues.

Contract: `masked` and `masked_sigmoid`, without guides. The steps are the operators `contrastive_sm90_masked_*`: CUDA
kernels in csrc/contrastive/sm90_masked.cuh, in PyTorch's operations masked_emulation.py. No step synchronises
with the host, and float32 is rounded to bfloat16 once.

Rows and columns have records of float32, of which the first are the bits of an int32, equal for pairs of equal ids, and
the limit of <x, y>. A log-sum-exp whose terms underflow at the shift common to all is found by another pass at a higher
one; what PASSES have not found is recomputed in float32 without tensor cores.
"""

import math

import torch
from torch import Tensor

from gapkern.ops.contrastive import labels, lifted, sm90
from gapkern.ops.contrastive.arguments import MaskedArguments, MaskedBackwardArguments, MaskedSigmoidArguments

PASSES = 3
NO_ROW, NO_COLUMN = -1, -2  # kNoRow, kNoColumn of csrc/contrastive/sm90_gemm.h: of rows and columns without ids
_MARGIN = 2.0**-19  # of a product, in units of the largest: tensor cores and float32 add in another order

_LN2 = math.log(2.0)


class _Pairs:
    """What the kernels are told: operands, control, and where the labels are."""

    def __init__(self, arguments: MaskedArguments):
        a = arguments
        self.arguments, self.euclidean = a, a.similarity == "sqeuclidean"
        self.images, self.texts = (sm90._operands(v, "medium") for v in (a.x, a.y))
        self.x, self.y, control = sm90._products(self.images, self.texts, a.logit_scale, a.similarity)
        norms = [torch.linalg.vector_norm(v, dim=1, dtype=torch.float32).amax() for v in (self.images, self.texts)]
        self.reach = (norms[0] + norms[1]) ** 2 / 2 if self.euclidean else norms[0] * norms[1]
        lowest = -1.001 * control[0].abs() * self.reach  # the norms are rounded
        self.control = torch.cat([control, lowest.reshape(1)])
        self.n, self.m = a.counts()
        self.label_offset = self.m if a.label == "none" else a.label_offset  # beyond every column
        first = min(max(0, -self.label_offset), self.n)
        self.labelled = slice(first, max(first, min(self.n, self.m - self.label_offset)))
        self.positive = a.equal == "positive" and a.row_ids.numel() > 0

    def sides(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """The (ids, limits) of rows, and of columns rounded up to whole tiles."""
        a, whole = self.arguments, -(-self.m // sm90.WIDTH) * sm90.WIDTH
        rows = self._side(a.row_ids, a.row_limit, self.n, NO_ROW)
        return rows, self._side(a.col_ids, a.col_limit, whole, NO_COLUMN)

    def _side(self, ids: Tensor, limit: Tensor, count: int, absent: int) -> tuple[Tensor, Tensor]:
        if self.euclidean:  # t = 2 <x', y'>, which only rounding brings above zero
            limit = torch.where(limit < 0, limit / 2, math.inf)
        return _filled(ids.int(), count, absent), _filled(limit.float(), count, math.inf)

    def label_t(self) -> Tensor:
        """t at the labels of the rows that have one, in float64."""
        rows = self.labelled
        if rows.start == rows.stop:
            return self.x.new_empty(0, dtype=torch.float64)
        found = lifted.labels if self.euclidean else torch.ops.gapkern.contrastive_sm90_positive
        return found(self.images[rows], self.texts, rows.start + self.label_offset)

    def pending(self) -> tuple[Tensor, Tensor]:
        """Log-sum-exps (classes, N) and (classes, M) before any pass: +inf, or -inf of positives that ids rule out."""
        a, device = self.arguments, self.x.device
        found = [torch.full((1 + self.positive, k), math.inf, dtype=torch.float64, device=device) for k in a.counts()]
        if self.positive:
            equal = [_count_equal(a.row_ids, a.col_ids), _count_equal(a.col_ids, a.row_ids)]
            rows = self.labelled
            columns = slice(rows.start + self.label_offset, rows.stop + self.label_offset)
            if rows.start < rows.stop:
                both = (a.row_ids[rows] == a.col_ids[columns]).long()
                equal[0][rows] -= both
                equal[1][columns] -= both
            for lse, count in zip(found, equal, strict=True):
                lse[1].masked_fill_(count == 0, -math.inf)
        return found[0], found[1]


def _filled(values: Tensor, count: int, fill: float) -> Tensor:
    """`values`, which may have no elements, with `fill` behind them: (count,)."""
    return torch.nn.functional.pad(values, (0, count - values.shape[0]), value=fill)


def _records(ids: Tensor, *values: Tensor) -> Tensor:
    """(count, 1 + values) float32: the bits of `ids` first."""
    return torch.stack([ids, *(v.view(torch.int32) for v in values)], 1).view(torch.float32)


def _count_equal(ids: Tensor, others: Tensor) -> Tensor:
    """How many of `others` equal each of `ids`."""
    ordered = others.sort().values
    return torch.searchsorted(ordered, ids, right=True) - torch.searchsorted(ordered, ids)


def masked_lse(arguments: MaskedArguments) -> tuple[Tensor, ...]:
    """The results of `contrastive_masked_lse`; nothing is kept."""
    pairs = _Pairs(arguments)
    x, y, n, m = pairs.x, pairs.y, pairs.n, pairs.m
    rows_of, columns_of = pairs.sides()
    row_marks, col_marks = _records(*rows_of), _records(*columns_of)
    row_lse, col_lse = pairs.pending()
    control, condition = pairs.control, pairs.control.new_empty(0)
    for _ in range(PASSES):
        row_sums, col_sums = torch.empty_like(row_lse), torch.zeros_like(col_lse)
        for rows in sm90._chunks(n, 0, sm90.SUPER_ROWS):
            row_sums[:, rows], part = torch.ops.gapkern.contrastive_sm90_masked_sums(
                images=x[rows],
                texts=y,
                control=control,
                condition=condition,
                row_marks=row_marks[rows],
                col_marks=col_marks,
                label_offset=rows.start + pairs.label_offset,
                positive=pairs.positive,
            )
            col_sums += part
        condition, control = torch.ops.gapkern.contrastive_sm90_masked_merge(
            row_sums, col_sums, control, row_lse, col_lse
        )
    widened = [_records(ids, limit + _MARGIN * pairs.reach) for ids, limit in (rows_of, columns_of)]
    torch.ops.gapkern.contrastive_sm90_masked_repair(
        x, y, pairs.control, *widened, pairs.label_offset, row_lse, col_lse
    )
    nothing = [torch.full((k,), -math.inf, dtype=torch.float64, device=x.device) for k in (n, m)]
    positive = [row_lse[1].clone(), col_lse[1].clone()] if pairs.positive else nothing
    label = torch.full_like(nothing[0][: n if arguments.label == "counted" else 0], -math.inf)
    if arguments.label == "counted":
        label[pairs.labelled] = pairs.label_t() * arguments.logit_scale.reshape(()).double()
    none = [label.new_empty(0) for _ in range(3)]
    return row_lse[0].clone(), col_lse[0].clone(), *positive, label, *none


def _weighted(pairs: _Pairs, given: MaskedBackwardArguments, loss_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Records of rows and columns with the weights of negatives and of positives."""
    rows, columns = pairs.sides()
    weights: list[list[Tensor]] = []
    for of_class in (0, 2):
        lse2, grad = [], []
        for lse, g in zip(given.lses[of_class : of_class + 2], given.grads[of_class : of_class + 2], strict=True):
            empty = lse == -math.inf  # any weight that is not a separate one
            lse2.append(torch.where(empty, -pairs.control[1].double(), lse.double() / _LN2))
            grad.append(torch.where(empty, 0, g.double() * loss_scale))
        weights.append(torch.ops.gapkern.contrastive_sm90_weights(*lse2, *grad, pairs.control[:2])[:2])
    (row, col), (positive_row, positive_col) = weights
    if not pairs.positive:
        positive_row, positive_col = torch.zeros_like(row), torch.zeros_like(col)
    return _records(*rows, row, positive_row), _records(*columns, col, positive_col)


def masked_lse_backward(given: MaskedBackwardArguments) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `masked_lse`."""
    pairs, needs = _Pairs(given.pairs), given.needs
    x, y, n, m = pairs.x, pairs.y, pairs.n, pairs.m
    loss_scale = labels.loss_scale_of(given.grads, x.dtype)
    row_marks, col_marks = _weighted(pairs, given, loss_scale)
    grad_label = given.grads[4].double() * loss_scale
    if not grad_label.numel():
        grad_label = loss_scale.new_zeros(n)
    products = needs[0] or (needs[2] and not needs[1]), needs[1]
    dx, dy = sm90.accumulators(x, y, products)
    for rows in sm90._chunks(n, 0, sm90._gradient_rows(n, m, x.shape[1])):
        ds = torch.ops.gapkern.contrastive_sm90_masked_gradient(
            images=x[rows],
            texts=y,
            control=pairs.control,
            row_marks=row_marks[rows],
            col_marks=col_marks,
            grad_label=grad_label[rows],
            label_offset=rows.start + pairs.label_offset,
        )
        sm90.multiply(ds, x[rows], y, dx[rows], dy, products)
    of_scale = sm90.scale_gradient(*((x, dx) if products[0] else (y, dy)), loss_scale, needs[2])
    factor = (given.pairs.logit_scale.reshape(()).double() / loss_scale).float()
    if pairs.euclidean:
        dx, dy = lifted.gradients(pairs.images, pairs.texts, dx, dy)
        factor, of_scale = 2 * factor, 2 * of_scale
    dx = dx if needs[0] else dx.new_empty(0)
    dx, dy = sm90._times(dx, factor, given.pairs.x.dtype), sm90._times(dy, factor, given.pairs.y.dtype)
    return dx, dy, of_scale.to(given.pairs.logit_scale.dtype)


def masked_sigmoid(arguments: MaskedSigmoidArguments) -> tuple[Tensor, ...]:
    """See `gapkern.ops.contrastive.masked_sigmoid_sum`."""
    a = arguments
    images, texts = (sm90._operands(v, "medium") for v in (a.x, a.y))
    whole = -(-texts.shape[0] // sm90.WIDTH) * sm90.WIDTH
    ordered = torch.cat([a.row_ids, a.col_ids]).sort().values
    numbers = [torch.searchsorted(ordered, ids, out_int32=True) for ids in (a.row_ids, a.col_ids)]  # equal of equal ids
    row_marks = _records(numbers[0], a.row_weights.float())
    col_marks = _records(_filled(numbers[1], whole, NO_COLUMN), _filled(a.col_weights.float(), whole, 0.0))

    n, m = images.shape[0], texts.shape[0]
    sums = torch.zeros(3, dtype=torch.float64, device=images.device)
    dx, dy = sm90.accumulators(images, texts, a.needs)
    for rows in sm90._chunks(n, 0, sm90._gradient_rows(n, m, images.shape[1])):
        of_rows, ds = torch.ops.gapkern.contrastive_sm90_masked_sigmoid(
            images[rows], texts, a.logit_scale, a.logit_bias, row_marks[rows], col_marks, a.soft_targets
        )
        sums += of_rows.sum(1)
        sm90.multiply(ds, images[rows], texts, dx[rows], dy, a.needs)
    scale = a.logit_scale.reshape(()).float()
    loss, of_bias, of_scale = (v.clone() for v in sums)
    return loss, dx.mul_(scale), dy.mul_(scale), of_scale, of_bias
