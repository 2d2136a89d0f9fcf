"""The losses on Hopper: products with the losses' arithmetic in the epilogue, library products for the gradients.

Same schemas and contract as csrc/contrastive/contrastive.h. The steps are the operators `contrastive_sm90_*`: CUDA
kernels (csrc/contrastive/sm90.cuh), and PyTorch's operations here. Nothing in between waits for the device. float32 is
taken with precision "medium", rounded to bfloat16 once; the gradients are then float32.
"""

import functools
import math
import os

import torch
from torch import Tensor

from gapkern.ops import chunked
from gapkern.ops.chunked import _product

SUPER_ROWS = 16384  # rows whose partial sums are at hand at once
GRADIENT_ELEMENTS = 9 * 2**25  # of dS at hand: 576 MiB
TILE, WIDTH, MULTIPROCESSORS = 128, 256, 132  # rows and dims of a product's tile, and a Hopper's multiprocessors
MOST_COLUMNS = 2**24  # of the sigmoid loss, where numbers of columns are float32

_LN2, _LOG2E = math.log(2.0), 1 / math.log(2.0)
_CEILING, _FLOOR, _WEIGHT_RANGE = 110, -102, 120  # csrc/contrastive/sm90.cuh
_TAKEN = (
    "sm90 for dot products of bfloat16, float16, and float32 with matmul precision medium, where dims are a "
    "multiple of 8; chunked for the rest"
)


@functools.cache
def asked() -> str:
    """`GAPKERN_KERNEL`, read once: auto, chunked or sm90."""
    kernel = os.environ.get("GAPKERN_KERNEL") or "auto"
    if kernel not in ("auto", "chunked", "sm90"):
        raise ValueError(f"GAPKERN_KERNEL: expected auto, chunked or sm90, got {kernel!r}")
    return kernel


def built() -> bool:
    """Whether the loaded CUDA library has the Hopper kernels."""
    return torch._C._dispatch_has_kernel_for_dispatch_key("gapkern::contrastive_sm90_sums", "CUDA")


def hindrance(
    device: torch.device, dtype: torch.dtype, dims: int, similarity: str = "dot", precision: str = "highest"
) -> str:
    """Why the Hopper kernels cannot take such embeddings; empty where they can."""
    if device.type != "cuda":
        return f"they need a CUDA device, got {device.type}"
    if not built():
        return "the library was built without them"
    capability = torch.cuda.get_device_capability(device)
    if capability != (9, 0):
        return f"they need a device of capability 9.0, got {capability[0]}.{capability[1]}"
    if dtype == torch.float32 and precision != "medium":
        return f"they take float32 with torch.set_float32_matmul_precision('medium'), got {precision!r}"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"they take bfloat16, float16 and float32, got {str(dtype).removeprefix('torch.')}"
    if dims % 8:
        return f"they need dims to be a multiple of 8, got {dims}"
    if similarity != "dot":
        return f"they have the similarity 'dot', got {similarity!r}"
    return ""


def in_use() -> dict[str, str]:
    """The losses' kernels on every device, and why not others; Hopper's are for the dtypes that `hindrance` accepts."""
    found = {"cpu": "the processor's kernels"}
    for index in range(torch.cuda.device_count()):
        reason = (
            "GAPKERN_KERNEL=chunked"
            if asked() == "chunked"
            else hindrance(torch.device("cuda", index), torch.bfloat16, 8)
        )
        found[f"cuda:{index}"] = f"chunked (not the Hopper kernels: {reason})" if reason else _TAKEN
    return found


def compiled() -> list[str]:
    """The losses' CUDA kernels in the loaded library: "chunked" for every device, "sm90" for Hopper."""
    chunks = torch._C._dispatch_has_kernel_for_dispatch_key("gapkern::contrastive_chunk_lse", "CUDA")
    return ["chunked"] * chunks + ["sm90"] * built()


def chosen(images: Tensor, similarity: str, precision: str = "highest", columns: int = 0) -> bool:
    """Whether the Hopper kernels take these embeddings. The same answer in the backward pass."""
    kernel = asked()
    if kernel == "chunked":
        return False
    reason = hindrance(images.device, images.dtype, images.shape[1], similarity, precision)
    if not reason and columns > MOST_COLUMNS:
        reason = f"they take at most {MOST_COLUMNS} texts in the sigmoid loss, got {columns}"
    if reason and kernel == "sm90" and images.is_cuda:
        raise ValueError(f"GAPKERN_KERNEL=sm90: the Hopper kernels cannot run: {reason}")
    return not reason


def dispatch(name: str):
    """The operator `name` of this module where the Hopper kernels can run, otherwise of `chunked`."""
    ours, other = globals()[name], getattr(chunked, name)

    def call(*arguments):
        if name == "sigmoid_loss":
            images, texts, _, _, _, precision, _ = arguments
            take = chosen(images, "dot", precision, texts.shape[0])
        else:
            embeddings, similarity = (0, 3) if name == "contrastive_lse" else (3, 9)
            take = chosen(arguments[embeddings], arguments[similarity], arguments[similarity + 2])
            # A single pair's loss is zero, which sums of rounded exponentials miss.
            take = take and arguments[embeddings + 1].shape[0] > 1
        return (ours if take else other)(*arguments)

    return call


def _factors(x: Tensor) -> Tensor:
    """Embeddings as the products take them: bfloat16 or float16, contiguous, at a multiple of 16 bytes."""
    x = (x.bfloat16() if x.dtype == torch.float32 else x).contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _pitch(columns: int) -> int:
    return -(-columns // 8) * 8


def _exponentials(kept: Tensor, images: Tensor, texts: Tensor) -> Tensor:
    """The memory of `kept` as rows of bfloat16 exponentials, as many as fit: all, or a multiple of a tile's rows.

    float16 keeps none: its range is too small for exponentials, and bfloat16's precision for its gradients.
    """
    n, pitch = images.shape[0], _pitch(texts.shape[0])
    rows = min(n, kept.numel() * kept.element_size() // (2 * pitch)) if images.dtype == torch.bfloat16 else 0
    rows = rows if rows == n else rows // TILE * TILE
    return kept.view(torch.bfloat16).flatten()[: rows * pitch].view(rows, pitch)


def _blocks(n: int, kept: int, step: int):
    """Slices of at most `step` rows; none has both rows that were kept and rows that were not."""
    for first, last in ((0, kept), (kept, n)):
        for start in range(first, last, step):
            yield slice(start, min(last, start + step))


def _gradient_rows(n: int, m: int, d: int) -> int:
    """Rows of dS at a time: within GRADIENT_ELEMENTS, and so that dX's tiles fill the multiprocessors evenly."""
    most = max(TILE, GRADIENT_ELEMENTS // m // TILE * TILE)
    across = -(-d // WIDTH)
    wave = TILE * (MULTIPROCESSORS // math.gcd(MULTIPROCESSORS, across))
    return min(n, most // wave * wave or most)


def _control(images: Tensor, texts: Tensor, logit_scale: Tensor) -> Tensor:
    norms = [torch.linalg.vector_norm(x, dim=1, dtype=torch.float32) for x in (images, texts)]
    return torch.ops.gapkern.contrastive_sm90_shift(*norms, logit_scale)


def contrastive_lse(images, texts, logit_scale, similarity, label_offset, precision, work_bytes):
    """See `gapkern.ops.contrastive.lse_pair`."""
    images, texts = _factors(images), _factors(texts)
    n, m = images.shape[0], texts.shape[0]
    kept = images.new_empty((min(n, max(work_bytes, 0) // (4 * m)), m), dtype=torch.float32)
    exponentials = _exponentials(kept, images, texts)
    control = _control(images, texts, logit_scale)
    row_sums = torch.empty(n, dtype=torch.float64, device=images.device)
    col_sums = torch.zeros(m, dtype=torch.float64, device=images.device)
    for rows in _blocks(n, exponentials.shape[0], SUPER_ROWS):
        row_sums[rows], part = torch.ops.gapkern.contrastive_sm90_sums(images[rows], texts, control, exponentials[rows])
        col_sums += part
    row, col = torch.ops.gapkern.contrastive_sm90_lse(row_sums, col_sums, images, texts, control)
    positive = torch.ops.gapkern.contrastive_sm90_positive(images, texts, label_offset)
    row_stats = torch.stack([torch.zeros_like(row), row / _LN2, positive])
    col_stats = torch.stack([torch.zeros_like(col), col / _LN2])
    return row, col, positive * logit_scale.reshape(()).double(), row_stats, col_stats, kept


def contrastive_lse_backward(
    grad_row,
    grad_col,
    grad_positive,
    images,
    texts,
    logit_scale,
    row_stats,
    col_stats,
    kept,
    similarity,
    label_offset,
    precision,
    needs,
):
    """Gradients of `contrastive_lse`."""
    x, y = _factors(images), _factors(texts)
    n, m = x.shape[0], y.shape[0]
    (_, row, positive), col = row_stats, col_stats[1]
    raised = torch.ones((), dtype=torch.float64, device=x.device)
    if x.dtype == torch.float16:  # no room for gradients of 1/N, as in chunked.py
        largest = torch.stack([g.abs().amax() for g in (grad_row, grad_col, grad_positive)]).amax()
        raised = torch.exp2(13 - torch.log2(largest).ceil().nan_to_num(0, 0, 0))
    grad_row, grad_col, grad_positive = (g.double() * raised for g in (grad_row, grad_col, grad_positive))
    control = _control(x, y, logit_scale)
    row_weight, col_weight, apart = torch.ops.gapkern.contrastive_sm90_weights(row, col, grad_row, grad_col, control)
    exponentials = _exponentials(kept, x, y)
    by_rows = needs[0] or (needs[2] and not needs[1])  # <X, dX> is the gradient of the scale, as is <Y, dY>
    dx = torch.empty(x.shape if by_rows else (0,), dtype=torch.float32, device=x.device)
    dy = torch.zeros(y.shape if needs[1] else (0,), dtype=torch.float32, device=x.device)
    for rows in _blocks(n, exponentials.shape[0], _gradient_rows(n, m, x.shape[1])):
        ds = torch.ops.gapkern.contrastive_sm90_gradient(
            x[rows],
            y,
            logit_scale,
            control,
            apart,
            row_weight[rows],
            col_weight,
            exponentials[rows],
            positive[rows],
            row[rows],
            col,
            grad_row[rows],
            grad_col,
            grad_positive[rows],
            rows.start + label_offset,
        )[:, :m]
        if by_rows:
            dx[rows] = _product(ds, y, torch.float32)
        if needs[1]:
            dy += _product(ds.T, x[rows], torch.float32)
    of_scale = raised.new_empty(0)
    if needs[2]:
        side, gradient = (x, dx) if by_rows else (y, dy)
        of_scale = (torch.linalg.vecdot(side.float(), gradient).sum(dtype=torch.float64) / raised).reshape(1)
    factor = (logit_scale.reshape(()).double() / raised).float()
    dx = dx * factor if needs[0] else dx.new_empty(0)
    return dx.to(images.dtype), (dy * factor).to(texts.dtype), of_scale.to(logit_scale.dtype)


def sigmoid_loss(images, texts, logit_scale, logit_bias, label_offset, precision, needs):
    """See `gapkern.ops.contrastive.sigmoid_sum`."""
    x, y = _factors(images), _factors(texts)
    n, m = x.shape[0], y.shape[0]
    labels = torch.arange(label_offset, label_offset + n, dtype=torch.float32, device=x.device)
    numbers = torch.arange(m, dtype=torch.float32, device=x.device)
    sums = torch.zeros(3, dtype=torch.float64, device=x.device)
    dx = torch.empty(x.shape if needs[0] else (0,), dtype=torch.float32, device=x.device)
    dy = torch.zeros(y.shape if needs[1] else (0,), dtype=torch.float32, device=x.device)
    for rows in _blocks(n, 0, _gradient_rows(n, m, x.shape[1])):
        of_rows, ds = torch.ops.gapkern.contrastive_sm90_sigmoid(
            x[rows], y, logit_scale, logit_bias, labels[rows], numbers
        )
        sums += of_rows.sum(1)
        if needs[0]:
            dx[rows] = _product(ds[:, :m], y, torch.float32)
        if needs[1]:
            dy += _product(ds[:, :m].T, x[rows], torch.float32)
    scale = logit_scale.reshape(()).float()
    loss, of_bias, of_scale = (v.clone() for v in sums)
    return loss, dx * scale, dy * scale, of_scale, of_bias


def _shift(row_norms, col_norms, logit_scale):
    k = _LOG2E * logit_scale.reshape(()).float()
    bound = k.abs() * row_norms.float().amax() * col_norms.float().amax() * 1.001
    spare = _CEILING - math.log2(max(len(row_norms), len(col_norms)))
    fitting = torch.minimum(bound, -(_FLOOR + bound)).floor()
    return torch.stack([k, -torch.maximum((bound - spare).ceil(), fitting).clamp(min=0).float()])


def _sums(images, texts, control, kept):
    e = torch.exp2(control[0] * (images.float() @ texts.float().T) + control[1])
    e = torch.where(e < 2.0**-126, 0, e)
    if kept.numel():
        kept.fill_(float("nan"))[:, : texts.shape[0]] = e
    return e.sum(1, dtype=torch.float64), e.sum(0, dtype=torch.float64)


def _lse(row_sums, col_sums, images, texts, control):
    def finish(sums, terms, x, y):
        complete = (sums >= terms * 2.0**_FLOOR) & (sums < 2.0**127)
        exact = (control[0] * _LN2 * (x.float() @ y.float().T)).logsumexp(1).double()
        return torch.where(complete, _LN2 * (sums.log2() - control[1].double()), exact)

    return finish(row_sums, len(col_sums), images, texts), finish(col_sums, len(row_sums), texts, images)


def _positive(images, texts, label_offset):
    labels = texts[label_offset : label_offset + len(images)]
    return torch.linalg.vecdot(images.float(), labels.float()).double()


def _weights(row_lse2, col_lse2, grad_row, grad_col, control):
    shift = control[1].double()

    def unsafe(lse2, grad, terms):
        exponent = grad.abs().log2() - lse2 - shift
        representable = (grad == 0) | (exponent.abs() <= _WEIGHT_RANGE)
        return ~((lse2 + shift >= math.log2(terms) + _FLOOR) & representable).all()

    apart = unsafe(row_lse2, grad_row, len(col_lse2)) | unsafe(col_lse2, grad_col, len(row_lse2))

    def weight(lse2, grad):
        exponent = (grad.abs().log2() - lse2).clamp(-1e30, 1e30).float()
        encoded = (exponent.view(torch.int32) & ~1) | (grad < 0).int()
        return torch.where(apart, encoded.view(torch.float32), (grad * torch.exp2(-lse2 - shift)).float())

    return weight(row_lse2, grad_row), weight(col_lse2, grad_col), apart.float().reshape(1)


def _gradient(
    images,
    texts,
    logit_scale,
    control,
    apart,
    row_weight,
    col_weight,
    kept,
    positive,
    row_lse2,
    col_lse2,
    grad_row,
    grad_col,
    grad_positive,
    label_offset,
):
    m = texts.shape[0]
    v = control[0] * (images.float() @ texts.float().T)
    e = kept[:, :m].float() if kept.numel() else torch.exp2(v + control[1])

    def term(weight):
        sign = 1 - 2 * (weight.view(torch.int32) & 1)
        return sign * torch.exp2(v + weight)

    together = e * (row_weight[:, None] + col_weight)
    ds = images.new_full((images.shape[0], _pitch(m)), float("nan"))
    ds[:, :m] = torch.where(apart.bool(), term(row_weight[:, None]) + term(col_weight), together)
    labels = slice(label_offset, label_offset + len(images))
    w = _LOG2E * logit_scale.reshape(()).double() * positive
    patch = grad_row * torch.exp2(w - row_lse2) + grad_col[labels] * torch.exp2(w - col_lse2[labels]) + grad_positive
    ds.diagonal(label_offset)[: len(images)] = patch.to(ds.dtype)
    return ds


def _sigmoid(images, texts, logit_scale, logit_bias, row_labels, col_numbers):
    t = images.float() @ texts.float().T
    z = torch.where(row_labels[:, None] == col_numbers, 1.0, -1.0).to(t.dtype)
    s = z * (logit_scale.reshape(()).float() * t + logit_bias.reshape(()).float())
    ds = -z * torch.sigmoid(-s)
    sums = [v.sum(1, dtype=torch.float64) for v in (-torch.nn.functional.logsigmoid(s), ds, ds * t)]
    rounded = images.new_full((images.shape[0], _pitch(texts.shape[0])), float("nan"))
    rounded[:, : texts.shape[0]] = ds
    return torch.stack(sums), rounded


_library = torch.library.Library("gapkern", "IMPL")
for _name in ("shift", "sums", "lse", "positive", "weights", "gradient", "sigmoid"):
    _library.impl(f"contrastive_sm90_{_name}", globals()[f"_{_name}"], "CompositeExplicitAutograd")
