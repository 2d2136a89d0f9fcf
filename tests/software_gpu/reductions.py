"""PTX programs for additions in memory: atomics, bulk copies of rows, bulk reductions; and for their races."""

import ctypes
import itertools

import numpy as np
import torch

from .device import Device
from .forms import TEXT, program
from .programs import WAIT

ROWS = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
TYPES = {  # PyTorch's, the instruction's, the tensor map's
    torch.float32: ("add.f32", 7),
    torch.bfloat16: ("add.noftz.bf16", 9),
    torch.float16: ("add.noftz.f16", 6),
    torch.int32: ("add.s32", 3),
    torch.float64: ("add.f64", 8),
}


def launch(device: Device, body: str, pointers: list, threads: int = 64, grid: int = 3, **options) -> None:
    body = f".reg .b32 %c; mov.u32 %c, %ctaid.x;\n{body}"
    text = program(body, len(pointers), threads)
    device.run(text, "k", pointers, grid=(grid, 1, 1), block=(threads, 1, 1), **options)


def sums(device: Device) -> set[str]:
    """Every thread of three CTAs adds to one place; a ticket for each."""
    forms = set()
    for order, (type_, one, dtype) in itertools.product(
        ("", ".relaxed.gpu"),
        (("f32", "0f3F800000", torch.float32), ("u32", "1", torch.int32), ("f64", "0d3FF0000000000000", torch.float64)),
    ):
        form = f"red{order}.global.add.{type_}"
        total = torch.tensor([5], dtype=dtype)
        launch(device, f"{form} [%a0], {one};", [total])
        assert total.item() == 5 + 192, form
        forms.add(form)
    tickets = torch.full((192,), -1, dtype=torch.int32)
    counter = torch.zeros(1, dtype=torch.int32)
    body = """.reg .b32 %k; .reg .b64 %z; atom.global.add.u32 %k, [%a0], 1; mad.lo.s32 %c, %c, 64, %t;
mul.wide.u32 %z, %c, 4; add.s64 %z, %z, %a1; st.global.u32 [%z], %k;"""
    launch(device, body, [counter, tickets])
    assert tickets.sort().values.tolist() == list(range(192))
    together = torch.zeros(4)
    body = """.reg .f32 %f<4>; cvt.rn.f32.u32 %f0, %t; mov.f32 %f1, 0f3F800000; mov.f32 %f2, 0f40000000;
neg.f32 %f3, %f0; red.global.add.v4.f32 [%a0], {%f0, %f1, %f2, %f3};"""
    launch(device, body, [together])
    assert together.tolist() == [3 * 2016, 192, 384, -3 * 2016]
    return forms | {"atom.global.add.u32", "red.global.add.v4.f32"}


def others(device: Device) -> set[str]:
    """Each operation on shared memory by 64 threads, and compare-and-swap as a lock-free maximum."""
    forms = set()
    values = np.random.default_rng(0).integers(0, 2**32, 64, dtype=np.uint32)
    for operation, start, expected in (
        ("add.u32", 7, int(values.sum(dtype=np.uint32)) + 7 & 0xFFFFFFFF),
        ("min.u32", 2**32 - 1, int(values.min())),
        ("max.s32", 0, max(0, int(values.view(np.int32).max()))),
        ("min.s32", 0, int(values.view(np.int32).min()) & 0xFFFFFFFF),
        ("and.b32", 2**32 - 1, int(np.bitwise_and.reduce(values))),
        ("or.b32", 0, int(np.bitwise_or.reduce(values))),
        ("xor.b32", 0, int(np.bitwise_xor.reduce(values))),
    ):
        form = f"red.shared.{operation}"
        body = f""".shared .align 8 .b8 room[8]; .reg .b32 %r, %x; .reg .b64 %z; .reg .pred %e; mov.u32 %r, room;
setp.ne.s32 %e, %t, 0; @%e bra ON; st.shared.u32 [%r], {start}; ON: bar.sync 0; add.s64 %z, %a0, %o;
ld.global.u32 %x, [%z]; {form} [%r], %x; bar.sync 0; ld.shared.u32 %x, [%r]; @!%e st.global.u32 [%a1], %x;"""
        found = torch.zeros(1, dtype=torch.int32)
        launch(device, body, [torch.from_numpy(values.astype(np.int64)), found], grid=1)
        assert int(found) & 0xFFFFFFFF == expected, form
        forms.add(form)
    body = """.reg .b32 %x, %y, %was; .reg .b64 %z; .reg .pred %p; add.s64 %z, %a0, %o; ld.global.u32 %x, [%z];
atom.global.add.u32 %was, [%a1], 0;
AGAIN: max.s32 %y, %was, %x; atom.global.cas.b32 %y, [%a1], %was, %y; setp.ne.s32 %p, %y, %was; mov.u32 %was, %y;
@%p bra AGAIN; atom.global.exch.b32 %y, [%a2], %x;"""
    most, last = torch.full((1,), -(2**31), dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    launch(device, body, [torch.from_numpy(values.astype(np.int64)), most, last])
    assert int(most) == int(values.view(np.int32).max())
    assert int(last) & 0xFFFFFFFF in values
    return forms | {"atom.global.cas.b32", "atom.global.exch.b32"}


def rows(columns: int, dtype: torch.dtype, action: str = "", fence: str = "fence.proxy.async.shared::cta;") -> str:
    """Each of several CTAs loads a row, doubles it with its own stores, and adds it to one row."""
    size = columns * dtype.itemsize
    add = action or f"cp.reduce.async.bulk.global.shared::cta.bulk_group.{TYPES[dtype][0]}"
    return f""".shared .align 16 .b8 room[{size + 16}]; .reg .b32 %r, %b, %x; .reg .b64 %z; .reg .pred %e;
mov.u32 %r, room; add.s32 %b, %r, {size}; mul.wide.u32 %z, %c, {size}; add.s64 %z, %z, %a0; setp.ne.s32 %e, %t, 0;
@%e bra READY; mbarrier.init.shared::cta.b64 [%b], 1; mbarrier.arrive.expect_tx.shared::cta.b64 _, [%b], {size};
{ROWS} [%r], [%z], {size}, [%b]; READY: bar.sync 0; {WAIT.format("%b", 0)}
shl.b32 %x, %t, 2; add.s32 %x, %x, %r; {{ .reg .b32 v; ld.shared.u32 v, [%x]; st.shared.u32 [%x], 0;
st.shared.u32 [%x], v; }} {fence} bar.sync 0;
@%e bra END; {add} [%a1], [%r], {size}; cp.async.bulk.commit_group; cp.async.bulk.wait_group 0; END:"""


def row_sums(device: Device) -> set[str]:
    forms = {ROWS}
    for dtype in TYPES:
        columns = 256 // dtype.itemsize
        source = torch.randint(-4, 5, (5, columns), generator=torch.Generator().manual_seed(0)).to(dtype)
        total = torch.ones(columns, dtype=dtype)
        launch(device, rows(columns, dtype), [source, total], grid=5)
        assert torch.equal(total.double(), 1 + source.double().sum(0)), dtype
        forms.add(f"cp.reduce.async.bulk.global.shared::cta.bulk_group.{TYPES[dtype][0]}")
    copied = torch.zeros(64)
    source = torch.randn(1, 64)
    launch(device, rows(64, torch.float32, "cp.async.bulk.global.shared::cta.bulk_group"), [source, copied], grid=1)
    assert torch.equal(copied, source[0])
    return forms | {"cp.async.bulk.global.shared::cta.bulk_group"}


def boxes(device: Device) -> set[str]:
    """Two CTAs add a box that lies over the edge of a tensor, swizzled in shared memory."""
    form = "cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.bulk_group"
    for dtype, swizzle in itertools.product((torch.float32, torch.bfloat16), (0, 3)):
        wide = 128 // dtype.itemsize
        to = torch.ones(13, 2 * wide, dtype=dtype)
        box = torch.randint(-4, 5, (8, wide), generator=torch.Generator().manual_seed(1)).to(dtype)
        placed = torch.empty_like(box)
        for row, piece in itertools.product(range(8), range(8)):
            there = piece ^ row if swizzle else piece
            each = wide // 8
            placed[row, each * there : each * (there + 1)] = box[row, each * piece : each * (piece + 1)]
        room = ctypes.create_string_buffer(128)
        address = device.lib.software_gpu_map(to.data_ptr(), to.numel() * dtype.itemsize, 1)
        extents = (ctypes.c_uint64 * 2)(2 * wide, 13), (ctypes.c_uint64 * 1)(256), (ctypes.c_uint32 * 2)(wide, 8)
        assert device.lib.software_gpu_encode(room, TYPES[dtype][1], 2, address, *extents, swizzle) == 0, device.fault()
        text = f"""{TEXT}.extern .shared .align 1024 .b8 room[];
.visible .entry k(.param .align 64 .b8 m[128], .param .u64 p) .maxntid 32, 1, 1 {{
.reg .b32 %t, %r, %x, %y; .reg .b64 %m, %p, %o; .reg .pred %e;
mov.u32 %t, %tid.x; mov.u32 %r, room; mov.b64 %m, m; cvta.param.u64 %m, %m; ld.param.u64 %p, [p];
mov.u32 %y, 0; NEXT: shl.b32 %x, %t, 2; add.s32 %x, %x, %y; cvt.u64.u32 %o, %x; add.s64 %o, %o, %p; add.s32 %x, %x, %r;
{{ .reg .b32 v; ld.global.u32 v, [%o]; st.shared.u32 [%x], v; }} add.s32 %y, %y, 128; setp.lt.s32 %e, %y, 1024;
@%e bra NEXT; fence.proxy.async.shared::cta; bar.sync 0; setp.ne.s32 %e, %t, 0; @%e bra END;
{form} [%m, {{{wide // 2}, 9}}], [%r]; cp.async.bulk.commit_group; cp.async.bulk.wait_group 0; END: ret; }}
"""
        device.run(text, "k", [room.raw, placed], grid=(2, 1, 1), shared=1024)
        expected = torch.ones(13, 2 * wide, dtype=torch.float64)
        expected[9:, wide // 2 : wide // 2 + wide] += 2 * box[:4].double()
        assert torch.equal(to.double(), expected), (dtype, swizzle)
    return {form}


PROGRAMS = [sums, others, row_sums, boxes]


def _faults():
    def red(body, *pointers, **options):
        return lambda device: launch(device, body, [p.clone() for p in pointers], **options)

    one = torch.zeros(4)
    yield "atomics of several CTAs", red("red.global.add.f32 [%a0], 0f3F800000;", one), ""
    yield (
        "an atomic and another CTA's store",
        red(
            ".reg .pred %p; setp.eq.s32 %p, %c, 0; @%p st.global.u32 [%a0], %t; @!%p red.global.add.u32 [%a0], 1;", one
        ),
        "race",
    )
    yield (
        "an atomic and another CTA's load",
        red(".reg .b32 %x; red.global.add.u32 [%a0], 1; ld.global.u32 %x, [%a0];", one),
        "race",
    )
    yield (
        "an atomic and another warp's load",
        red(".reg .b32 %x; red.global.add.u32 [%a0], 1; ld.global.u32 %x, [%a0];", one, grid=1),
        "race",
    )
    yield (
        "a load behind a barrier",
        red(".reg .b32 %x; red.global.add.u32 [%a0], 1; bar.sync 0; ld.global.u32 %x, [%a0];", one, grid=1),
        "",
    )
    yield "an atomic that is misaligned", red("red.global.add.u64 [%a0+4], 1;", one), "misaligned"
    yield "an atomic too far", red("red.global.add.u32 [%a0+16], 1;", one), "out of bounds"
    yield (
        "an atomic on what nobody wrote",
        red(".shared .align 4 .b8 room[4]; .reg .b32 %r; mov.u32 %r, room; red.shared.add.u32 [%r], 1;", one),
        "uninitialised",
    )
    source = torch.randn(3, 64)
    yield "bulk reductions of several CTAs", red(rows(64, torch.float32), source, torch.zeros(64)), ""
    copy = "cp.async.bulk.global.shared::cta.bulk_group"
    yield "bulk copies of several CTAs", red(rows(64, torch.float32, copy), source, torch.zeros(64)), "race"
    yield (
        "no proxy fence before a bulk reduction",
        red(rows(64, torch.float32, fence=""), source, torch.zeros(64)),
        "missing proxy fence",
    )
    yield "a bulk reduction too far", red(rows(64, torch.float32), source, torch.zeros(60)), "out of bounds"


FAULTS = list(_faults())
