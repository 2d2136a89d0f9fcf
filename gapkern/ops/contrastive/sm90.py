"""The contrastive operators on Hopper (compute capability 9.0): the losses' arithmetic in the products' epilogues.

Same schemas and contract as csrc/contrastive/contrastive.h. The steps are the operators `contrastive_sm90_*`: CUDA
kernels in csrc/contrastive/sm90.cuh, and their PyTorch emulation in emulation.py; dX and dY are library products with
dS. No step synchronises with the host. float32 (precision "medium") is rounded to bfloat16 once, its gradients are
float32. Euclidean similarity is a product of longer rows (lifted.py).
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gapkern.ops.contrastive import labels, lifted
from gapkern.ops.contrastive.arguments import LseBackwardArguments
from gapkern.ops.products import add_matmul, write_matmul

SUPER_ROWS = 8192  # rows per call of contrastive_sm90_sums: they stay in L2 while the texts pass
GRADIENT_ELEMENTS = 9 * 2**25  # of dS at a time: 576 MiB,
LARGEST_GRADIENT, GRADIENT_ROWS = 2**30, 4096  # or 2 GiB for so many rows: dY is read and written once for each chunk
TILE, WIDTH, MULTIPROCESSORS = 128, 256, 132  # rows and columns of a product's tile, and the SMs of an H100


def row_pitch(columns: int) -> int:
    """Elements from one row to the next of dS and the kept exponentials: columns, rounded up to a multiple of 8."""
    return -(-columns // 8) * 8


def _operands(x: Tensor) -> Tensor:
    """Embeddings as the kernels take them: bfloat16 or float16, contiguous, aligned to 16 bytes."""
    x = (x.bfloat16() if x.dtype == torch.float32 else x).contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _exponentials(kept: Tensor, images: Tensor, texts: Tensor) -> Tensor:
    """The memory of `kept` as (rows, pitch) bfloat16 exponentials, as many as fit: all, or a multiple of TILE rows.

    None for float16: the exponentials exceed its range, and in bfloat16 are less precise than its gradients.
    """
    n, pitch = images.shape[0], row_pitch(texts.shape[0])
    rows = min(n, kept.numel() * kept.element_size() // (2 * pitch)) if images.dtype == torch.bfloat16 else 0
    rows = rows if rows == n else rows // TILE * TILE
    return kept.view(torch.bfloat16).flatten()[: rows * pitch].view(rows, pitch)


def _chunks(n: int, kept: int, step: int) -> Iterator[slice]:
    """Chunks of at most `step` of n rows, none across the end of the `kept` first ones."""
    for first, last in ((0, kept), (kept, n)):
        for start in range(first, last, step):
            yield slice(start, min(last, start + step))


def _gradient_rows(n: int, m: int, d: int) -> int:
    """Rows of dS at a time: pairs of tiles, as clusters have them, and where it fits whole waves of dX's tiles."""
    pair = 2 * TILE
    most = max(GRADIENT_ELEMENTS // m, min(GRADIENT_ROWS, LARGEST_GRADIENT // m)) // pair * pair or pair
    across = -(-d // WIDTH)
    wave = TILE * math.lcm(2, MULTIPROCESSORS // math.gcd(MULTIPROCESSORS, across))
    return min(n, most // wave * wave or most)


def _times(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * factor in `dtype`, in one pass over memory; `gradient` may be overwritten."""
    if gradient.dtype == dtype:
        return gradient.mul_(factor)
    return torch.mul(gradient, factor, out=gradient.new_empty(gradient.shape, dtype=dtype))


def _products(x: Tensor, y: Tensor, logit_scale: Tensor, similarity: str) -> tuple[Tensor, Tensor, Tensor]:
    """Operands and control of the logits as products: of the embeddings, or of the longer rows."""
    if similarity == "sqeuclidean":
        return *lifted.operands(x, y), lifted.control(x, y, logit_scale)
    norms = [torch.linalg.vector_norm(v, dim=1, dtype=torch.float32) for v in (x, y)]
    return x, y, torch.ops.gapkern.contrastive_sm90_shift(*norms, logit_scale)


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
    images, texts = _operands(images), _operands(texts)
    x, y, control = _products(images, texts, logit_scale, similarity)
    n, m = x.shape[0], y.shape[0]
    kept = x.new_empty((min(n, max(work_bytes, 0) // (4 * m)), m), dtype=torch.float32)
    exponentials = _exponentials(kept, x, y)
    row_sums = torch.empty(n, dtype=torch.float64, device=x.device)
    col_sums = torch.zeros(m, dtype=torch.float64, device=x.device)
    for rows in _chunks(n, exponentials.shape[0], SUPER_ROWS):
        row_sums[rows], part = torch.ops.gapkern.contrastive_sm90_sums(
            x[rows], y, control, exponentials[rows], rows.start + label_offset
        )
        col_sums += part
    row, col = torch.ops.gapkern.contrastive_sm90_lse(row_sums, col_sums, x, y, control, label_offset)
    label_similarities = lifted.labels if similarity == "sqeuclidean" else torch.ops.gapkern.contrastive_sm90_positive
    label_t = label_similarities(images, texts, label_offset)
    return *labels.with_labels(row, col, label_t, logit_scale, label_offset), kept


def contrastive_lse_backward(arguments: LseBackwardArguments) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `contrastive_lse`."""
    images, texts = _operands(arguments.images), _operands(arguments.texts)
    logit_scale, needs = arguments.logit_scale, arguments.needs
    x, y, control = _products(images, texts, logit_scale, arguments.similarity)
    loss_scale = labels.loss_scale(arguments, x.dtype)
    by_rows = needs[0] or (needs[2] and not needs[1])  # <X, dX> is the gradient of the scale, as is <Y, dY>
    dx, dy = _unscaled_gradients(x, y, control, arguments.scaled(loss_scale), (by_rows, needs[1]))
    of_scale = loss_scale.new_empty(0)
    if needs[2]:
        side, gradient = (x, dx) if by_rows else (y, dy)
        of_scale = (torch.linalg.vecdot(side.float(), gradient).sum(dtype=torch.float64) / loss_scale).reshape(1)
    factor = (logit_scale.reshape(()).double() / loss_scale).float()
    if arguments.similarity == "sqeuclidean":
        dx, dy = lifted.gradients(images, texts, dx, dy)
        factor, of_scale = 2 * factor, 2 * of_scale
    dx = dx if needs[0] else dx.new_empty(0)
    dx, dy = _times(dx, factor, arguments.images.dtype), _times(dy, factor, arguments.texts.dtype)
    return dx, dy, of_scale.to(logit_scale.dtype)


def _unscaled_gradients(
    x: Tensor, y: Tensor, control: Tensor, arguments: LseBackwardArguments, needs: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    """dS Y and dS^T X in float32, from dS of some rows at a time; empty where not needed."""
    n, m = x.shape[0], y.shape[0]
    grad_label = labels.gradient(arguments)
    row_weight, col_weight, separate = torch.ops.gapkern.contrastive_sm90_weights(
        *labels.lse2(arguments), arguments.grad_row, arguments.grad_col, control
    )
    exponentials = _exponentials(arguments.kept, x, y)
    dx = torch.empty(x.shape if needs[0] else (0,), dtype=torch.float32, device=x.device)
    dy = torch.zeros(y.shape if needs[1] else (0,), dtype=torch.float32, device=x.device)
    for rows in _chunks(n, exponentials.shape[0], _gradient_rows(n, m, x.shape[1])):
        ds = torch.ops.gapkern.contrastive_sm90_gradient(
            images=x[rows],
            texts=y,
            control=control,
            separate=separate,
            row_weight=row_weight[rows],
            col_weight=col_weight,
            kept=exponentials[rows],
            grad_label=grad_label[rows],
            label_offset=rows.start + arguments.label_offset,
        )[:, :m]
        if needs[0]:
            write_matmul(dx[rows], ds, y)
        if needs[1]:
            add_matmul(dy, ds.T, x[rows])
    return dx, dy


def sigmoid_loss(
    images: Tensor,
    texts: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    label_offset: int,
    precision: str,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """See `gapkern.ops.contrastive.sigmoid_sum`."""
    x, y = _operands(images), _operands(texts)
    n, m = x.shape[0], y.shape[0]
    sums = torch.zeros(3, dtype=torch.float64, device=x.device)
    dx = torch.empty(x.shape if needs[0] else (0,), dtype=torch.float32, device=x.device)
    dy = torch.zeros(y.shape if needs[1] else (0,), dtype=torch.float32, device=x.device)
    for rows in _chunks(n, 0, _gradient_rows(n, m, x.shape[1])):
        of_rows, ds = torch.ops.gapkern.contrastive_sm90_sigmoid(
            x[rows], y, logit_scale, logit_bias, rows.start + label_offset
        )
        sums += of_rows.sum(1)
        if needs[0]:
            write_matmul(dx[rows], ds[:, :m], y)
        if needs[1]:
            add_matmul(dy, ds[:, :m].T, x[rows])
    scale = logit_scale.reshape(()).float()
    loss, of_bias, of_scale = (v.clone() for v in sums)
    return loss, _times(dx, scale, dx.dtype), _times(dy, scale, dy.dtype), of_scale, of_bias
