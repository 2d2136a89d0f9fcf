"""Mistakes planted in the kernels over chunks whose pairs are of classes, and what the device must say of each."""

import torch

from . import chunk_problems
from .planting import GONE, Mistake, of

TILES, GRADIENT, IDS = "class_tilesIfE", "class_gradientIffE", "sigmoid_of_idsIffE"


def classes(device):
    chunk_problems.of_classes(device, 70, 150, torch.float32, False)


def ids(device):
    chunk_problems.of_ids(device, 70, 150, torch.float32)


def _mistakes():
    for which, name in enumerate(("the next class's maxima are written", "the warps' columns are combined")):
        yield of(
            f"no barrier before {name}",
            ("race", "uninitialised"),
            TILES,
            (r"bar\.sync 0;", GONE, which),
            problem=classes,
        )
    lower_half = "{ .reg .b32 a, b; cvt.u32.u64 a, \\2; cvt.u32.u64 b, \\3; setp.eq.s32 \\1, a, b; }"
    for kernel, problem in ((TILES, classes), (IDS, ids)):
        yield of(
            f"ids compared by their lower half, {problem.__name__}",
            "wrong result",
            kernel,
            (r"setp\.eq\.s64 (%p\d+), (%rd\d+), (%rd\d+);", lower_half),
            problem=problem,
        )
    for kernel, problem in ((TILES, classes), (GRADIENT, classes), (IDS, ids)):
        yield of(
            f"what lies beyond the last row or column, {kernel.partition('I')[0]}",
            "out of bounds",
            kernel,
            (r"min\.s32 (%r\d+), (%r\d+), %r\d+;", r"mov.b32 \1, \2;"),
            problem=problem,
        )
    yield of(
        "limits that leave out what is below",
        "wrong result",
        TILES,
        (r"setp\.gt\.f32 (%p\d+, %f\d+, %f\d+;)", r"setp.lt.f32 \1"),
        problem=classes,
    )
    yield of(
        "rows folded over the wrong lanes",
        "wrong result",
        TILES,
        (r"(shfl\.sync\.bfly\.b32 [^;]*, )(%r\d+|16)(, [^,]*, [^,]*;)", r"\g<1>1\3", 9),
        problem=classes,
    )
    for which, name in ((0, "a column's log-sum-exp"), (4, "a row's log-sum-exp")):
        yield of(
            f"{name} taken for zero",
            "wrong result",
            GRADIENT,
            (r"ld\.global\.f64 (%fd\d+), \[%rd\d+\];", r"mov.f64 \1, 0d0000000000000000;", which),
            problem=classes,
        )
    yield of(
        "positives that count as negatives",
        "wrong result",
        IDS,
        (r"neg\.f32 (%f\d+), (%f\d+);", r"mov.f32 \1, \2;"),
        problem=ids,
    )
    yield of(
        "a sum of dS that nobody wrote",
        ("uninitialised", "wrong result"),
        GRADIENT,
        (r"st\.global\.f64 [^;]*;", GONE),
        problem=classes,
    )
    yield Mistake(
        "a tile of classes that was not launched",
        ("uninitialised",),
        "lse_combine",
        ((TILES, "grid.x", 1),),
        classes,
    )


MISTAKES = list(_mistakes())
