"""Mistakes planted in the library's kernels, their launches and tensor maps, and what the device must say of each."""

from . import class_mistakes, hopper_mistakes, masked_mistakes
from .planting import (
    BITS,
    COLUMN_SUM,
    GONE,
    LSE_TILES,
    NEAREST,
    SHIFTED,
    SUMS,
    Mistake,
    bits,
    chunk,
    column_sum,
    exact,
    gradient,
    nearest,
    of,
    single_pair,
    statistics,
    sums,
)


def _mistakes():
    # barriers among threads
    yield of("no barrier before shared memory is read", "race", COLUMN_SUM, (r"bar\.sync 0;", GONE), problem=column_sum)
    yield of(
        "no barrier in a tile of products",
        ("race", "uninitialised"),
        NEAREST,
        (r"bar\.sync 0;", GONE, 0),
        problem=nearest,
    )
    yield of(
        "no barrier between maxima and sums",
        ("race", "uninitialised"),
        LSE_TILES,
        (r"bar\.sync 0;", GONE, 0),
        problem=chunk,
    )
    yield of(
        "a barrier for some lanes",
        "divergent barrier",
        COLUMN_SUM,
        (
            r"bar\.sync 0;",
            "{ .reg .pred q; .reg .b32 t; mov.u32 t, %tid.x; and.b32 t, t, 31; setp.lt.u32 q, t, 7; @q bar.sync 0; }",
        ),
        problem=column_sum,
    )
    yield of(
        "a barrier for some warps",
        "divergent barrier",
        COLUMN_SUM,
        (
            r"bar\.sync 0;",
            "{ .reg .pred q; .reg .b32 t; mov.u32 t, %tid.x; shr.u32 t, t, 5; setp.lt.u32 q, t, 3; @q bar.sync 0; }",
        ),
        problem=column_sum,
    )
    yield of(
        "a barrier that counts too few threads",
        ("divergent barrier", "race", "uninitialised"),
        COLUMN_SUM,
        (r"bar\.sync 0;", "bar.sync 0, 128;"),
        problem=column_sum,
    )
    yield of(
        "threads that leave before a barrier",
        "divergent barrier",
        COLUMN_SUM,
        (
            r"bar\.sync 0;",
            "{ .reg .pred q; .reg .b32 t; mov.u32 t, %tid.x; shr.u32 t, t, 5; "
            "setp.eq.u32 q, t, 5; @q ret; } bar.sync 0;",
        ),
        problem=column_sum,
    )
    yield of(
        "a shuffle that names absent lanes",
        "divergent",
        SHIFTED,
        (r"(mov\.[ub]32 %r\d+), -1;", r"\1, 2147483647;"),
        problem=column_sum,
    )
    # memory
    yield of(
        "an index too far",
        "out of bounds",
        SHIFTED,
        (r"(st\.global\.v4\.f32 \[%rd\d+)\]", r"\1+8192]"),
        problem=column_sum,
    )
    yield of(
        "an index one off",
        ("out of bounds", "race", "misaligned"),
        BITS,
        (r"(st\.global\.u32 \[%rd\d+)\]", r"\1+4]"),
        problem=bits,
    )
    yield of(
        "an index before the tensor",
        "out of bounds",
        BITS,
        (r"(st\.global\.u32 \[%rd\d+)\]", r"\1+-4096]"),
        problem=bits,
    )
    yield of(
        "a misaligned vector",
        "misaligned",
        SHIFTED,
        (r"(ld\.global\.v4\.f32 \{[^}]*\}, \[%rd\d+)\]", r"\1+4]"),
        problem=column_sum,
    )
    yield of(
        "shared memory that nobody wrote",
        "uninitialised",
        COLUMN_SUM,
        (r"st\.shared\.f64 [^;]*;", GONE, 0),
        problem=column_sum,
    )
    yield of(
        "shared memory beyond its end",
        "out of bounds",
        COLUMN_SUM,
        (r"(st\.shared\.f64 \[%r\d+)[^\]]*\]", r"\1+60000]"),
        problem=column_sum,
    )
    yield of(
        "a register that nobody wrote",
        "uninitialised",
        COLUMN_SUM,
        (r"mov\.u32 %r\d+, %tid\.x;", GONE),
        problem=column_sum,
    )
    yield of(
        "a value that nobody formed", "uninitialised", SHIFTED, (r"sqrt\.rn\.f32 [^;]*;", GONE), problem=column_sum
    )
    yield Mistake(
        "a tensor that the kernel before left unwritten",
        ("uninitialised",),
        "sum_parts",
        ((SUMS, r"st\.global\.f32 [^;]*;", GONE, 0),),
        sums,
    )
    yield of("two CTAs at one place", "race", BITS, (r"mov\.u32 (%r\d+), %ctaid\.x;", r"mov.u32 \1, 0;"), problem=bits)
    yield of(
        "two warps at one place",
        "race",
        BITS,
        (r"mov\.u32 (%r\d+), %tid\.x;", r"mov.u32 \1, %tid.x; and.b32 \1, \1, 31;"),
        problem=bits,
    )
    yield of(
        "two lanes at one place",
        "race",
        BITS,
        (r"st\.global\.u32 \[(%rd\d+)\], ([^;]*);", r"{ .reg .b64 t; and.b64 t, \1, -512; st.global.u32 [t], \2; }"),
        problem=bits,
    )
    yield of("an instruction that is not known", "unknown instruction", BITS, (r"xor\.b32", "xor.b33"), problem=bits)
    # launches
    for name, what, value in (
        ("an empty grid", "grid.x", 0),
        ("a grid too high", "grid.y", 70000),
        ("a block too large for the kernel", "block.x", 1024),
        ("a block of nobody", "block.x", 0),
        ("more shared memory than asked for", "shared", 50000),
        ("a cluster that does not divide the grid", "cluster.y", 7),
        ("a cluster too large", "cluster.x", 16),
    ):
        kernel = SUMS if what.startswith("cluster") else COLUMN_SUM
        yield of(name, "bad launch", kernel, (what, value), problem=sums if kernel == SUMS else column_sum)
    yield of("a host pointer", "no device memory", COLUMN_SUM, ("arguments.host", 0), problem=column_sum)
    yield of(
        "swapped pointers",
        ("out of bounds", "uninitialised", "race", "wrong result"),
        COLUMN_SUM,
        ("arguments.swap", 3),
        problem=column_sum,
    )
    yield of("a pointer four bytes on", "misaligned", COLUMN_SUM, ("arguments.move", 4), problem=column_sum)
    yield of("a count too large", "out of bounds", COLUMN_SUM, ("arguments.move", 8 * 65536 + 9), problem=column_sum)
    yield of("shared memory too small", "out of bounds", SUMS, ("shared", 100000), problem=sums)
    # tensor maps
    for name, what, value in (
        ("a misaligned address", "map.shift", 8),
        ("an address beyond the tensor", "map.shift", 4096),
        ("a stride that is no multiple of 16", "map.stride", 632),
        ("a stride twice the tensor's", "map.stride", 1280),
        ("a box of 300", "map.box.1", 300),
        ("a box of rows of 120 bytes", "map.box.0", 60),
        ("a box wider than its swizzle", "map.swizzle", 1),
        ("interleaved", "map.interleave", 1),
        ("an element stride", "map.element_stride", 2),
        ("an empty dimension", "map.dims.1", 0),
        ("more rows than the tensor has", "map.dims.1", 301),
        ("six dimensions", "map.rank", 6),
    ):
        kinds = ("bad tensor map",)
        yield Mistake(f"tensor map: {name}", kinds, "", (("", what, value),), sums)
    yield of(
        "a tensor map that was never made",
        "bad tensor map",
        SUMS,
        (r"(add\.s64 %rd\d+, %rd\d+), 384;", r"\1, 448;"),
        problem=sums,
    )
    # what only values show
    yield of(
        "a tie that goes to the higher row",
        "wrong result",
        "nearest_combine",
        (r"setp\.lt\.s32", "setp.gt.s32"),
        problem=nearest,
    )
    yield of(
        "no barrier before the largest norm is read",
        ("race", "uninitialised"),
        "choose_shift",
        (r"bar\.sync 0;", GONE, 0),
        problem=statistics,
    )
    for name, which in (("rivals are counted", 1), ("a list of rivals is read", 3)):
        yield of(
            f"no barrier before {name}",
            ("race", "uninitialised"),
            "stays_nearestIf",
            (r"bar\.sync 0;", GONE, which),
            problem=exact,
        )
    yield of(
        "a sum that misses a tile's part",
        "wrong result",
        "sum_parts",
        (r"ld\.global\.f32 (%f\d+), \[%rd\d+\];", r"mov.f32 \1, 0f00000000;", 0),
        problem=gradient,
    )
    yield of(
        "the smaller norm for the larger", "wrong result", "choose_shift", (r"setp\.gt", "setp.lt"), problem=gradient
    )
    yield of(
        "weights' padding unwritten",
        ("uninitialised", "wrong result"),
        "form_weights",
        (r"st\.global\.u32 [^;]*;", GONE, 0),
        problem=gradient,
    )
    yield of(
        "a repaired sum that has its label",
        "wrong result",
        "repair_lseINS_8BFloat16",
        (r"setp\.eq\.s64 (%p\d+), (%rd\d+), %rd\d+;", r"setp.eq.s64 \1, \2, -7;"),
        problem=single_pair,
    )
    yield of(
        "the gradient of another row's label",
        ("out of bounds", "wrong result"),
        "set_labelsINS_8BFloat16",
        (r"ld\.global\.f64 (%fd\d+), \[(%rd\d+)\];", r"ld.global.f64 \1, [\2+8];"),
        problem=gradient,
    )
    yield of(
        "a product of half the lanes",
        "wrong result",
        "label_productsINS_8BFloat16",
        (r"(shfl\.sync\.bfly\.b32 [^;]*, )(%r\d+|16)(, )", r"\g<1>1\3", 0),
        problem=gradient,
    )


MISTAKES = [*_mistakes(), *class_mistakes.MISTAKES, *hopper_mistakes.MISTAKES, *masked_mistakes.MISTAKES]
