"""Problems that reach every CUDA kernel, each against float64: what the device runs, in tests and by itself.

A problem is a function of the device; it asserts and returns what must be the same bits in every order. `KERNELS` reach
every kernel, on small shapes with ragged edges, and larger ones on a GPU.
"""

import itertools
import math

import torch

from gapkern._search import nearest
from gapkern.reference import meanshift as meanshift_reference
from gapkern.reference import robustness as robustness_reference
from gapkern.testing import assert_near

from . import chunk_problems, hopper_problems, masked_problems
from .chunk_problems import DTYPES
from .fixture import on_gpu


def on_cpu(name, *arguments):
    return getattr(torch.ops.gapkern, name)(*arguments)


def mean_shift(device, shape, dtype):
    generator = torch.Generator().manual_seed(shape[0])
    x = (torch.randn(shape, generator=generator, dtype=torch.float64) + 0.5).to(dtype)
    total = device.call("meanshift_sum", x)
    assert torch.equal(total, device.call("meanshift_sum", x)), "a fixed order"
    assert_near(total, meanshift_reference.column_sum(x), 1e-13)
    if shape[1] > 1:
        assert_near(device.call("meanshift_sum", x[:, 1:]), meanshift_reference.column_sum(x)[1:], 1e-13)
    shift = torch.linspace(-1, 1, shape[1], dtype=torch.float64)
    epsilon = 1e-13 if dtype == torch.float64 else torch.finfo(dtype).eps
    for normalize in (False, True):
        truth = x.double() + shift
        truth = torch.nn.functional.normalize(truth, dim=1) if normalize else truth
        ours = device.call("meanshift_apply", x, shift, normalize)
        assert ours.dtype == dtype
        assert_near(ours, truth, 2 * epsilon)
    nothing = torch.zeros(3, shape[1], dtype=dtype)
    assert torch.equal(device.call("meanshift_apply", nothing, torch.zeros_like(shift), True), nothing)
    return [total]


def noise(device, shape, dtype):
    """The bits are the CPU's."""
    generator = torch.Generator().manual_seed(shape[1])
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    bounds = x.float() if len(x) else torch.ones(1, shape[1])
    low, high = bounds.amin(0), bounds.amax(0)
    shift = torch.linspace(-1, 1, shape[1], dtype=torch.float64)
    calls = [
        ("perturb_bits", x, 7, 1, 2**32 - 3),
        ("perturb_noise", x, "gaussian", 0.3, 7, 1, 5),
        ("perturb_noise", x, "uniform", 0.3, 7, 1, 5),
        ("perturb_quantize", x, low, high, 32),
    ]
    found = []
    for name, *arguments in calls:
        found.append(device.call(name, *arguments))
        assert torch.equal(found[-1], on_cpu(name, *arguments)), name
    zeros, none = torch.zeros_like(x), torch.zeros_like(shift)
    bare = device.call("perturb_noisy_gallery", zeros, none, "gaussian", 0.3, 7, 1, 5, False, "after")
    assert torch.equal(bare, on_cpu("perturb_noise", zeros, "gaussian", 0.3, 7, 1, 5)), "other noise"
    for columns, normalize, when in itertools.product((0, 1), (False, True), ("after", "before")):
        rows, by = x[:, columns:], shift[columns:]
        if not rows.shape[1]:
            continue
        arguments = ("perturb_noisy_gallery", rows, by, "gaussian", 0.3, 7, 1, 2**32 - 3, normalize, when)
        epsilon = 1e-13 if dtype == torch.float64 else torch.finfo(dtype).eps
        found.append(device.call(*arguments))
        assert found[-1].dtype == dtype
        # Rounded in between, and the sums of squares are in the arithmetic type.
        assert_near(found[-1], on_cpu(*arguments), 4 * epsilon)
        if not normalize:
            steps = [("meanshift_apply", by, False), ("perturb_noise", "gaussian", 0.3, 7, 1, 2**32 - 3)]
            apart = rows
            for step, *options in steps if when == "after" else steps[::-1]:
                apart = device.call(step, apart, *options)
            assert torch.equal(found[-1], apart), "as in two steps, rounded in between"
        elif columns == 0:  # a row of zeros stays one
            quiet = ("gaussian", 0.0, 7, 1, 5, True, when)
            assert torch.equal(device.call("perturb_noisy_gallery", zeros, none, *quiet), zeros)
    return found


def wide_divisions(device):
    """Where indices leave 32 bits nvcc divides in 64: made to do so here, with the same results."""
    x = torch.randn(7, 257, generator=torch.Generator().manual_seed(0))
    low, high = x.amin(0), x.amax(0)
    for kernel, name, *arguments in (
        ("WriteBits", "perturb_bits", x, 7, 1, 3),
        ("quantize_allIff", "perturb_quantize", x, low, high, 32),
    ):
        expected = on_cpu(name, *arguments)
        with device.mistake((kernel, "-4294967296;", "-1;")):
            assert torch.equal(device.call(name, *arguments), expected)
    return [expected]


def nearest_rows(device, q, g, d, dtype):
    generator = torch.Generator().manual_seed(q)
    x = torch.randn(g, d, generator=generator)
    y = torch.randn(q, d, generator=generator)
    y[::2] = x[torch.randint(g, (len(y[::2]),), generator=generator)]
    x[g // 2 :] = x[: g - g // 2].flip(0)
    x, y = x.to(dtype), y.to(dtype)
    row, best, second, slack = found = device.call("robustness_nearest", y, x, x.float().mean(0))
    expected = on_cpu("robustness_nearest", y, x, x.float().mean(0))[3]
    torch.testing.assert_close(slack, expected, rtol=1e-5, atol=1e-12)
    squared, rows = robustness_reference.nearest_two(y, x)
    assert float((best - squared[:, 0]).abs().sub(slack).max()) <= 0
    assert torch.equal(second.isinf(), squared[:, 1].isinf())
    assert float((second - squared[:, 1]).nan_to_num(0).abs().sub(slack).max()) <= 0
    apart = squared[:, 1] - squared[:, 0] > slack
    assert torch.equal(row[apart], rows[apart])
    equal = (x[row] == x[rows]).all(1)  # equal rows have the same distance, and the first of them is found
    assert torch.equal(row[equal], rows[equal])
    assert torch.equal(device.on(nearest, y, x), rows)
    if d > 1:  # rows that do not start at a multiple of 16 bytes
        ragged = y[:, 1:], x[:, 1:]
        assert torch.equal(device.on(nearest, *ragged), robustness_reference.nearest_two(*ragged)[1])
    return list(found)


def exact(device, gallery, dims, dtype):
    generator = torch.Generator().manual_seed(gallery)
    found = []
    for variance, spread in ((1e-4, 0.5), (1e-2, 3.0), (1.0, 0.0), (1e-4, 300.0)):
        deviation = 2 * variance * math.sqrt(dims + 2 / variance)
        ahead = spread * torch.randn(3, gallery, generator=generator, dtype=torch.float64).abs()
        squared = (1 + deviation * ahead).to(dtype)
        squared[2] -= 1 + 1e-6  # the nearest lies below zero, by rounding
        targets = torch.randint(-1, gallery, (3, 2), generator=generator)
        targets[:, 0] = squared.argmin(1)
        found.append(device.call("robustness_exact", squared, targets, variance, dims))
        assert float((found[-1] - on_cpu("robustness_exact", squared, targets, variance, dims)).abs().max()) < 2e-5
    return found


def exact_inner(device, gallery, dtype):
    generator = torch.Generator().manual_seed(gallery)
    scores = torch.randn(3, gallery, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(-1, gallery, (3, 2), generator=generator)
    targets[:, 0] = scores.argmax(1)
    deviations = torch.tensor([0.0, 0.5, 3.0], dtype=torch.float64)
    arguments = ("robustness_exact_inner", scores, targets, deviations)
    found = device.call(*arguments)
    assert float((found - on_cpu(*arguments)).abs().max()) < 2e-5
    return [found]


def _kernels():
    bf16, f16, f32, f64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
    yield from hopper_problems.kernels()
    yield from chunk_problems.kernels()
    for dtype, shape in itertools.product(
        DTYPES, ((1, 1), (513, 64), (70, 33), (9, 1031), (0, 4), *on_gpu((2000, 130)))
    ):
        yield mean_shift, (shape, dtype), {}
    for dtype, shape in itertools.product(
        DTYPES, ((1, 1), (7, 257), (30, 136), (9, 1031), (0, 8), *on_gpu((300, 1032)))
    ):
        yield noise, (shape, dtype), {}
    yield wide_divisions, (), {}
    searches = [(1, 1, 1), (5, 2, 3), (130, 129, 7), (70, 300, 32), (3, 2000, 12), (1050, 700, 9)]
    searches += on_gpu((40, 1000, 130), (1000, 5000, 512), (3, 40_000, 64))
    for dtype, shape in itertools.product((f32, bf16, f16), searches):
        yield nearest_rows, (*shape, dtype), {}
    galleries = [(1, 3), (7, 64), (300, 512), (900, 16), (1500, 4096), *on_gpu(*itertools.product((1, 5000), (1, 63)))]
    for dtype, (gallery, dims) in itertools.product((f32, f64), galleries):
        yield exact, (gallery, dims, dtype), {}
    for dtype, gallery in itertools.product((f32, f64), (1, 7, 900, *on_gpu(5000))):
        yield exact_inner, (gallery, dtype), {}


KERNELS = [*_kernels(), *masked_problems.KERNELS]
# These call Hopper's kernels by name; the others go where the dispatcher leads them.
HOPPERS = (*hopper_problems.HOPPERS, *masked_problems.HOPPERS)
