"""Mistakes in what Hopper's kernels do with classes of pairs: their marks, comparisons, passes and weights."""

import torch

from . import masked_problems
from .planting import GONE, of

SUMS, GRADIENTS = "MaskedSumsINS_10bfloat16_t", "MaskedGradientsINS_10bfloat16_t"
SIGMOIDS = "MaskedSigmoidINS_10bfloat16_t"
_BFLOAT16 = torch.bfloat16


def elements(device):
    masked_problems.masked_elements(device, 140, 300, 72, _BFLOAT16)


def separate(device):
    masked_problems.masked_elements(device, 140, 300, 72, _BFLOAT16, 150, True)


def sigmoid(device):
    masked_problems.masked_sigmoid_elements(device, 140, 300, 72, _BFLOAT16)


def targets(device):
    masked_problems.masked_sigmoid_elements(device, 140, 300, 72, _BFLOAT16, True)


def _mistakes():
    row_marks = r"(ld\.global\.nc\.v2\.f32 \{[^}]*\}, \[%rd\d+)\]"
    column_marks = r"(ld\.global\.nc\.v4\.f32 \{[^}]*\}, \[%rd\d+)(\+?\d*)\]"
    compared = r"setp\.lt\.f32 (%p\d+), (%f\d+), (%f\d+);"
    yield of("the mark of the row after", "wrong result", SUMS, (row_marks, r"\1+8]", 0), problem=elements)
    yield of(
        "a limit that leaves out what is below",
        "wrong result",
        SUMS,
        (compared, r"setp.gt.f32 \1, \2, \3;", 1),
        problem=elements,
    )
    yield of(
        "a limit of rows for columns", "wrong result", SUMS, (compared, r"setp.lt.f32 \1, \3, \3;", 4), problem=elements
    )
    yield of(
        "a pass whose sums its condition keeps from being added",
        "wrong result",
        "sum_class_parts",
        (r"setp\.(eq|neu)\.f32 (%p\d+), (%f\d+), 0f00000000;", r"setp.lt.f32 \2, \3, 0f00000000;", 0),
        problem=elements,
    )
    yield of(
        "positives that are added as they come", "race", SUMS, (r"bar\.sync %r\d+, %r\d+;", GONE, 1), problem=elements
    )
    yield of(
        "a class number of one bit",
        "wrong result",
        SUMS,
        (r"setp\.eq\.s32 (%p\d+), (%r\d+), (%r\d+);", r"setp.ne.s32 \1, \2, \3;", 40),
        problem=elements,
    )
    yield of(
        "exponents that no pass raises",
        "wrong result",
        "next_pass",
        (r"add\.f32 (%f\d+), (%f\d+), (%f\d+);", r"mov.f32 \1, \2;"),
        problem=elements,
    )
    yield of(
        "the weights of the columns after", "wrong result", GRADIENTS, (column_marks, r"\1+32]", 30), problem=elements
    )
    yield of(
        "separate weights only where every lane has one",
        "wrong result",
        GRADIENTS,
        (r"vote\.sync\.any\.pred (%p\d+), (%p\d+), (%r\d+);", r"vote.sync.all.pred \1, \2, \3;", 1),
        problem=separate,
    )
    yield of(
        "the weight of another row's positive",
        ("wrong result", "out of bounds"),
        SIGMOIDS,
        (row_marks, r"\1+8]", 1),
        problem=sigmoid,
    )
    yield of(
        "targets that are weights",
        "wrong result",
        SIGMOIDS,
        (r"ld\.param\.u8 (%rs\d+), (\[[^\]]*\]);", r"mov.u16 \1, 0;"),
        problem=targets,
    )


MISTAKES = list(_mistakes())
