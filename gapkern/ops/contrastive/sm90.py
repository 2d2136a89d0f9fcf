"""The contrastive operators on Hopper (compute capability 9.0): the losses' arithmetic in the products' epilogues.

Same schemas and contract as csrc/contrastive/contrastive.h. The steps are the operators `contrastive_sm90_*`: CUDA
kernels in csrc/contrastive/sm90.cuh, and their PyTorch emulation in emulation.py; dX and dY are library products with
dS. float32 is rounded to bfloat16 once (precision "medium"), or multiplied and dS stored in terms (terms.py); its
gradients are float32. Euclidean similarity is a product of longer rows (lifted.py).

No step synchronises with the host, but for float32 in terms: where a sum leaves the range of the common shift, or a
weight that of float32, what the kernels do instead has fewer bits than float32's, and the chunks take over. In a
captured graph, which cannot ask, they do from the start.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gapkern.ops.contrastive import chunked, labels, lifted, terms
from gapkern.ops.contrastive.arguments import LseBackwardArguments
from gapkern.ops.products import add_matmul, write_matmul

SUPER_ROWS = 8192  # rows per call of contrastive_sm90_sums: they stay in L2 while the texts pass,
SHARE_OF_TERMS = 4  # a quarter of them where they are 6 D long
GRADIENT_ELEMENTS = 9 * 2**25  # of dS at a time: 576 MiB,
LARGEST_GRADIENT, GRADIENT_ROWS = 2**30, 4096  # or 2 GiB for so many rows: dY is read and written once for each chunk
_LN2 = math.log(2.0)
TILE, WIDTH, MULTIPROCESSORS = 128, 256, 132  # rows and columns of a product's tile, and the SMs of an H100


def row_pitch(columns: int) -> int:
    """Elements from one row to the next of dS and the kept exponentials: columns, rounded up to a multiple of 8."""
    return -(-columns // 8) * 8


def _operands(x: Tensor, precision: str) -> Tensor:
    """Embeddings as the kernels take them: bfloat16 or float16, contiguous, aligned to 16 bytes; float32 for terms."""
    x = (x.bfloat16() if x.dtype == torch.float32 and precision == "medium" else x).contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def keeps(dtype: torch.dtype, precision: str) -> bool:
    """Whether exponentials are kept. Float16's range is too small; in bfloat16 they are less precise than gradients of
    float16, and of float32 that was not rounded."""
    return dtype == torch.bfloat16 or (dtype == torch.float32 and precision == "medium")


def _in_terms(x: Tensor) -> bool:
    return x.dtype == torch.float32


def _may_ask() -> bool:
    return not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


def _complete(sums: Tensor, count: int) -> Tensor:
    """Whether the common shift held every sum over `count` pairs.

    One pair alone is the label, whose sum is empty.
    """
    return ((sums >= (count if count > 1 else 0) * 2.0**lifted.FLOOR) & (sums < 2.0**127)).all()


def _rows(x: Tensor, side: int) -> Tensor:
    """Operands as the products multiply them, of the images, 0, or the texts, 1."""
    return terms.rows(x, side) if _in_terms(x) else x


def _exponentials(kept: Tensor, images: Tensor, texts: Tensor) -> Tensor:
    """The memory of `kept` as (rows, pitch) bfloat16 exponentials, as many as fit: all, or a multiple of TILE rows."""
    n, pitch = images.shape[0], row_pitch(texts.shape[0])
    rows = min(n, kept.numel() * kept.element_size() // (2 * pitch))
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
    """Operands and control of the logits as products: of the embeddings, or of the longer rows.

    In float32 the texts carry the scale, and k is 1: rounded to float32 it would be wrong for all logits alike.
    """
    if similarity == "sqeuclidean":
        return *lifted.operands(x, y), lifted.control(x, y, logit_scale)
    if _in_terms(x):
        y = torch.mul(y, logit_scale.reshape(1).double() / _LN2, out=torch.empty_like(y))
        logit_scale = torch.full_like(logit_scale, _LN2, dtype=torch.float32)
    norms = [torch.linalg.vector_norm(v, dim=1, dtype=torch.float32) for v in (x, y)]
    control = torch.ops.gapkern.contrastive_sm90_shift(*norms, logit_scale)
    if _in_terms(x):
        control[:1].fill_(1)
    return x, y, control


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
    kept_bytes = max(work_bytes, 0) if keeps(images.dtype, precision) else 0
    images, texts = _operands(images, precision), _operands(texts, precision)
    if _in_terms(images) and not _may_ask():
        return chunked.contrastive_lse(images, texts, logit_scale, similarity, label_offset, precision, 0)
    x, y, control = _products(images, texts, logit_scale, similarity)
    n, m = x.shape[0], y.shape[0]
    kept = x.new_empty((min(n, kept_bytes // (4 * m)), m), dtype=torch.float32)
    exponentials = _exponentials(kept, x, y)
    row_sums = torch.empty(n, dtype=torch.float64, device=x.device)
    col_sums = torch.zeros(m, dtype=torch.float64, device=x.device)
    columns = _rows(y, 1)
    for rows in _chunks(n, exponentials.shape[0], SUPER_ROWS // (SHARE_OF_TERMS if _in_terms(x) else 1)):
        row_sums[rows], part = torch.ops.gapkern.contrastive_sm90_sums(
            _rows(x[rows], 0), columns, control, exponentials[rows], rows.start + label_offset
        )
        col_sums += part
    if _in_terms(x) and not (_complete(row_sums, m) & _complete(col_sums, n)):
        return chunked.contrastive_lse(images, texts, logit_scale, similarity, label_offset, precision, 0)
    row, col = torch.ops.gapkern.contrastive_sm90_lse(row_sums, col_sums, x, y, control, label_offset)
    label_similarities = lifted.labels if similarity == "sqeuclidean" else torch.ops.gapkern.contrastive_sm90_positive
    label_t = label_similarities(images, texts, label_offset)
    return *labels.with_labels(row, col, label_t, logit_scale, label_offset), kept


def contrastive_lse_backward(arguments: LseBackwardArguments) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `contrastive_lse`."""
    images, texts = (_operands(v, arguments.precision) for v in (arguments.images, arguments.texts))
    logit_scale, needs = arguments.logit_scale, arguments.needs
    if _in_terms(images) and not _may_ask():
        return chunked.contrastive_lse_backward(arguments)
    x, y, control = _products(images, texts, logit_scale, arguments.similarity)
    loss_scale = labels.loss_scale(arguments, x.dtype)
    weights = _weights(arguments.scaled(loss_scale), control)
    if _in_terms(x) and bool(weights[2].any()):
        return chunked.contrastive_lse_backward(arguments)
    # <X, dX> is the gradient of the scale, as is <Y, dY>, and <X, dX> only where the texts do not carry the scale.
    by_rows = not _in_terms(x) and (needs[0] or not needs[1])
    products = needs[0] or (needs[2] and by_rows), needs[1] or (needs[2] and not by_rows)
    dx, dy = _unscaled_gradients(x, y, control, weights, arguments.scaled(loss_scale), products)
    of_scale = scale_gradient(*((x, dx) if by_rows else (texts, dy)), loss_scale, needs[2])
    factor = (logit_scale.reshape(()).double() / loss_scale).float()
    of_images = torch.full_like(factor, _LN2) if _in_terms(x) else factor
    if arguments.similarity == "sqeuclidean":
        dx, dy = lifted.gradients(images, texts, dx, dy)
        factor, of_images, of_scale = 2 * factor, 2 * factor, 2 * of_scale
    dx, dy = (v if needed else v.new_empty(0) for v, needed in zip((dx, dy), needs, strict=False))
    dx, dy = _times(dx, of_images, arguments.images.dtype), _times(dy, factor, arguments.texts.dtype)
    return dx, dy, of_scale.to(logit_scale.dtype)


def _weights(arguments: LseBackwardArguments, control: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of rows and columns, and whether any is a separate one."""
    return torch.ops.gapkern.contrastive_sm90_weights(
        *labels.lse2(arguments), arguments.grad_row, arguments.grad_col, control
    )


def _unscaled_gradients(
    x: Tensor,
    y: Tensor,
    control: Tensor,
    weights: tuple[Tensor, Tensor, Tensor],
    arguments: LseBackwardArguments,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """dS Y and dS^T X in float32, from dS of some rows at a time; empty where not needed."""
    n, m = x.shape[0], y.shape[0]
    grad_label = labels.gradient(arguments)
    row_weight, col_weight, separate = weights
    exponentials = _exponentials(arguments.kept, x, y)
    dx, dy = accumulators(x, y, needs)
    columns, count = _rows(y, 1), terms.TERMS if _in_terms(x) else 1
    for rows in _chunks(n, exponentials.shape[0], _gradient_rows(n, count * m, x.shape[1])):
        some = _rows(x[rows], 0)
        ds = torch.ops.gapkern.contrastive_sm90_gradient(
            images=some,
            texts=columns,
            control=control,
            separate=separate,
            row_weight=row_weight[rows],
            col_weight=col_weight,
            kept=exponentials[rows],
            grad_label=grad_label[rows],
            label_offset=rows.start + arguments.label_offset,
            terms=count,
        )
        multiply(ds, some, columns, dx[rows], dy, needs)
    return dx, dy


def accumulators(x: Tensor, y: Tensor, needs: Sequence[bool]) -> tuple[Tensor, Tensor]:
    """What `multiply` writes and what it adds to; empty where not needed."""
    dx = torch.empty(x.shape if needs[0] else (0,), dtype=torch.float32, device=x.device)
    return dx, torch.zeros(y.shape if needs[1] else (0,), dtype=torch.float32, device=x.device)


def scale_gradient(side: Tensor, gradient: Tensor, loss_scale: Tensor, needed: bool) -> Tensor:
    """The gradient of logit_scale, (1,) float64, from a side and its unscaled gradient; (0,) where not needed."""
    if not needed:
        return loss_scale.new_empty(0)
    return (torch.linalg.vecdot(side.float(), gradient).sum(dtype=torch.float64) / loss_scale).reshape(1)


def multiply(ds: Tensor, x: Tensor, y: Tensor, dx: Tensor, dy: Tensor, needs: Sequence[bool]) -> None:
    """dx = dS y and dy += dS^T x where needed, of operands as the products had them, and dS with its padding."""
    if len(ds) == len(x):
        ds = ds[:, : len(y)]
        if needs[0]:
            write_matmul(dx, ds, y)
        if needs[1]:
            add_matmul(dy, ds.T, x)
        return
    matrices = list(ds[:, : len(y)].chunk(terms.TERMS))
    if needs[0]:
        terms.add_products(dx.zero_(), matrices, terms.of_rows(y, 1))
    if needs[1]:
        terms.add_products(dy, [v.T for v in matrices], terms.of_rows(x, 0))


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
    x, y = _operands(images, precision), _operands(texts, precision)
    n, m = x.shape[0], y.shape[0]
    sums = torch.zeros(3, dtype=torch.float64, device=x.device)
    dx, dy = accumulators(x, y, needs)
    columns, count = _rows(y, 1), terms.TERMS if _in_terms(x) else 1
    for rows in _chunks(n, 0, _gradient_rows(n, count * m, x.shape[1])):
        some = _rows(x[rows], 0)
        of_rows, ds = torch.ops.gapkern.contrastive_sm90_sigmoid(
            some, columns, logit_scale, logit_bias, rows.start + label_offset, count
        )
        sums += of_rows.sum(1)
        multiply(ds, some, columns, dx[rows], dy, needs)
    scale = logit_scale.reshape(()).float()
    loss, of_bias, of_scale = (v.clone() for v in sums)
    return loss, _times(dx, scale, dx.dtype), _times(dy, scale, dy.dtype), of_scale, of_bias
