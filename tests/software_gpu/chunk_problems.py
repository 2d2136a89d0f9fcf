"""Problems for the kernels between library products, each against float64."""

import itertools
import math

import torch

from gapkern.testing import assert_near

from .fixture import on_gpu

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

MASKS = ("ids", "row_limit", "col_limit", "guide", "guide_row_limit", "guide_col_limit")


def steps_between_products(device, n, m, dtype, squared):
    """contrastive_chunk_*: one kernel each on CUDA, PyTorch's operations elsewhere."""
    work = torch.promote_types(dtype, torch.float32)
    generator = torch.Generator().manual_seed(n)

    def draw(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(work)

    products, norms = 0.5 * draw(n, m), (draw(n).abs(), draw(m).abs()) if squared else (draw(0), draw(0))
    scale, offset = torch.tensor(30.0, dtype=work), 2
    t = 2 * products - norms[0][:, None] - norms[1] if squared else products
    s = (t.double() * 30).requires_grad_()
    rows = torch.arange(max(0, min(n, m - offset)))
    at_label = torch.zeros(n, m, dtype=torch.bool)
    at_label[rows, rows + offset] = True
    others = s.masked_fill(at_label, -math.inf)
    row, col = others.logsumexp(1), others.logsumexp(0)
    found = device.call("contrastive_chunk_lse", products, *norms, scale, offset)
    for ours, truth in zip(found, (row, col), strict=True):
        assert ours.dtype == torch.float64
        assert_near(ours, truth.detach(), 1e-13 if work == torch.float64 else 2e-6)
    weights = draw(n), draw(m), draw(n)
    (truth,) = torch.autograd.grad(row @ weights[0].double() + col @ weights[1].double(), s)
    truth[rows, rows + offset] = weights[2][rows].double()
    row, col = (v.detach() / math.log(2) for v in (row, col))
    like = products.to(dtype)
    ds, of_scale, row_sums, col_sums = device.call(
        "contrastive_chunk_gradient", products, *norms, scale, row, col, *weights, offset, like
    )
    tolerance = 1e-12 if dtype == torch.float64 else max(2e-5, torch.finfo(dtype).eps)
    assert ds.dtype == dtype
    assert_near(ds, truth, tolerance)
    assert abs(float(of_scale.sum()) - float((truth * t).sum())) < 2e-5 * float((truth * t).abs().sum())
    if squared:
        assert_near(row_sums.sum(0), truth.sum(1), 1e-4)
        assert_near(col_sums.sum(0), truth.sum(0), 1e-4)
    bias = torch.tensor(-2.0, dtype=work)
    z = -torch.ones(n, m, dtype=torch.float64)
    z[rows, rows + offset] = 1
    u = z * (products.double() * 30 - 2)
    loss, ds, of_scale, of_bias = device.call("contrastive_chunk_sigmoid", products, scale, bias, offset, like)
    truth = -z * torch.sigmoid(-u)
    assert_near(ds, truth, tolerance)
    assert_near(loss.sum(), -torch.nn.functional.logsigmoid(u).sum(), 2e-5)
    assert_near(of_bias.sum(), truth.sum(), 2e-5)
    assert abs(float(of_scale.sum()) - float((truth * products).sum())) < 2e-5 * float((truth * products).abs().sum())
    return [*found, ds, of_scale, of_bias]


def of_classes(device, n, m, dtype, squared, masks=MASKS, equal="positive", label="counted", offset=2, values=6):
    """contrastive_masked_chunk_lse and _gradient, element by element; ids have `values`."""
    work = torch.promote_types(dtype, torch.float32)
    generator = torch.Generator().manual_seed(n)

    def draw(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(work)

    products, norms = 0.5 * draw(n, m), (draw(n).abs(), draw(m).abs()) if squared else (draw(0), draw(0))
    t = (2 * products - norms[0][:, None] - norms[1]).clamp(max=0) if squared else products
    # Alike in their low half.
    row_ids, col_ids = (torch.randint(values, (k,), generator=generator) << 33 for k in (n, m))
    guide, shift = draw(n, m), -1.5 if squared else 0.5
    limits = {"row_limit": shift + 0.3 * draw(n), "col_limit": shift + 0.3 * draw(m)}
    limits |= {"guide_row_limit": 1 + draw(n), "guide_col_limit": 1 + draw(m)}
    limits = {name: limit if name in masks else draw(0) for name, limit in limits.items()}
    # Their definition.
    labels = (
        torch.arange(m) == torch.arange(n)[:, None] + offset if label != "none" else torch.zeros(n, m, dtype=torch.bool)
    )
    same = row_ids[:, None] == col_ids if "ids" in masks else torch.zeros(n, m, dtype=torch.bool)
    above = torch.zeros(n, m, dtype=torch.bool)
    for value, name in ((t, "row_limit"), (t, "col_limit"), (guide, "guide_row_limit"), (guide, "guide_col_limit")):
        if name in masks:
            above |= value > (limits[name][:, None] if "row" in name else limits[name])
    of = [~(labels | same | above), same & ~labels][: 2 if equal == "positive" and "ids" in masks else 1]

    scale = torch.tensor(30.0, dtype=work)
    given = (
        row_ids if "ids" in masks else row_ids[:0],
        col_ids if "ids" in masks else col_ids[:0],
        limits["row_limit"],
        limits["col_limit"],
        guide if "guide" in masks else draw(0, 0),
        limits["guide_row_limit"],
        limits["guide_col_limit"],
        offset if label != "none" else -(2**40),
        len(of) == 2,
    )
    found = device.call("contrastive_masked_chunk_lse", products, *norms, scale, *given)
    s = 30 * t.double()
    sums = [[s.masked_fill(~mask, -math.inf).logsumexp(dim) for mask in of] for dim in (1, 0)]
    for ours, truth in zip(found, map(torch.stack, sums), strict=True):
        assert ours.dtype == torch.float64
        assert torch.equal(ours == -math.inf, truth == -math.inf)
        assert_near(ours.nan_to_num(neginf=0), truth.nan_to_num(neginf=0), 1e-13 if work == torch.float64 else 2e-6)

    grads = [1 + draw(len(of), k).abs() for k in (n, m)]
    at_label = draw(n) if label == "counted" else draw(0)
    truth = torch.zeros(n, m, dtype=torch.float64)
    for mask, row, col, by_row, by_col in zip(of, *sums, *(g.double() for g in grads), strict=True):
        part = by_row[:, None] * (s - row[:, None]).exp() + by_col * (s - col).exp()
        truth = torch.where(mask, part, truth)
    if label == "counted":
        truth = torch.where(labels, at_label.double()[:, None], truth)
    lse2 = [torch.stack(side) / math.log(2) for side in sums]
    like = products.to(dtype)
    ds, of_scale, of_all, row_sums, col_sums = device.call(
        "contrastive_masked_chunk_gradient", products, *norms, scale, *given, *lse2, *grads, at_label, like
    )
    assert ds.dtype == dtype
    tolerance = 1e-12 if dtype == torch.float64 else max(4e-5, torch.finfo(dtype).eps)
    off = (ds.double() - truth).abs() > tolerance * truth.abs() + (6e-8 if dtype == torch.float16 else 1e-30)
    assert not off.any(), f"{int(off.sum())} elements, first at {off.nonzero()[0].tolist()}"
    for sum_of, exact in ((of_scale, truth * t), (of_all, truth)):
        assert abs(float(sum_of.sum()) - float(exact.sum())) <= 2e-5 * float(exact.abs().sum())
    if squared:
        assert_near(row_sums.sum(0), truth.sum(1), 1e-4)
        assert_near(col_sums.sum(0), truth.sum(0), 1e-4)
    return [*found, ds, of_scale, of_all]


def of_ids(device, n, m, dtype, soft_targets=False):
    """contrastive_masked_chunk_sigmoid."""
    work = torch.promote_types(dtype, torch.float32)
    generator = torch.Generator().manual_seed(n)
    products = 0.3 * torch.randn(n, m, generator=generator, dtype=torch.float64).to(work)
    row_ids, col_ids = (torch.randint(5, (k,), generator=generator) << 33 for k in (n, m))
    weights = [torch.rand(k, generator=generator, dtype=torch.float64) / 2 for k in (n, m)]
    scale, bias = torch.tensor(20.0, dtype=work), torch.tensor(-2.0, dtype=work)
    given = (products, scale, bias, row_ids, col_ids, *weights, soft_targets, products.to(dtype))
    loss, ds, of_scale, of_bias = device.call("contrastive_masked_chunk_sigmoid", *given)
    same, t = row_ids[:, None] == col_ids, products.double()
    a = torch.where(same, weights[0][:, None] + weights[1], 0.0)
    b = torch.where(same, 1 - a if soft_targets else 0.0, 1.0)
    logits = 20 * t - 2
    truth = b * torch.sigmoid(logits) - a * torch.sigmoid(-logits)
    size = b * torch.sigmoid(logits) + a * torch.sigmoid(-logits)
    assert ds.dtype == dtype
    tolerance = 1e-12 if dtype == torch.float64 else max(2e-5, torch.finfo(dtype).eps)
    off = (ds.double() - truth).abs() > tolerance * size + (6e-8 if dtype == torch.float16 else 1e-30)
    assert not off.any(), f"{int(off.sum())} elements, first at {off.nonzero()[0].tolist()}"
    losses = a * torch.nn.functional.softplus(-logits) + b * torch.nn.functional.softplus(logits)
    assert_near(loss.sum(), losses.sum(), 2e-5)
    for sum_of, exact in ((of_scale, truth * t), (of_bias, truth)):
        assert abs(float(sum_of.sum()) - float(exact.sum())) <= 2e-5 * float(exact.abs().sum())
    return [loss, ds, of_scale, of_bias]


def of_pairs():
    """Problems of the kernels whose pairs are of classes."""
    f32 = torch.float32
    for dtype, (n, m), squared in itertools.product(DTYPES, ((70, 150), (64, 132)), (False, True)):
        yield of_classes, (n, m, dtype, squared), {}
    # Equal ids left out, no positives; one side's limits; a guide alone; labels beyond most rows, left out, of no pair.
    for masks in (("row_limit",), ("col_limit", "ids"), ("guide", "guide_row_limit"), ("guide", "guide_col_limit"), ()):
        yield of_classes, (66, 130, f32, False), {"masks": masks, "equal": "left_out", "offset": 100}
    for label in ("left_out", "none"):
        yield of_classes, (65, 129, f32, True), {"label": label, "values": 1}
    for shape in ((1, 1), (1, 5), (5, 3), *on_gpu((3000, 5000))):
        yield of_classes, (*shape, f32, False), {"offset": 0}
    for dtype, (n, m) in itertools.product(DTYPES, ((70, 150), (64, 132), *on_gpu((3000, 5000)))):
        yield of_ids, (n, m, dtype), {}
    yield of_ids, (1, 1, f32), {}
    yield of_ids, (66, 132, f32), {"soft_targets": True}
    yield of_ids, (66, 131, torch.float64), {"soft_targets": True}


def kernels():
    for dtype, (n, m), squared in itertools.product(DTYPES, ((70, 150), (64, 132), (130, 261)), (False, True)):
        yield steps_between_products, (n, m, dtype, squared), {}
    yield steps_between_products, (1, 1, torch.float32, True), {}
    yield steps_between_products, (5, 3, torch.float64, False), {}
    yield from of_pairs()
