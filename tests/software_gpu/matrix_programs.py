"""PTX programs for what Hopper's matrix products can read: registers, transposed operands, ldmatrix.

Each is a function of the device that asserts and returns the forms it has run; layouts are written down here from the
PTX ISA's figures, apart from the device's.
"""

import itertools

import torch

from .device import Device
from .forms import TEXT, program
from .programs import LOADS, WAIT, tensor_map

NAMES = {torch.bfloat16: "bf16", torch.float16: "f16"}
MODES = {0: 0, 1: 3, 2: 2, 3: 1}  # a tensor map's swizzle, and the descriptor's number for it


def descriptor(leading: int, stride: int, swizzle: int) -> int:
    """The bits above the start's, of an operand in shared memory."""
    bits = leading >> 4 << 16 | stride >> 4 << 32 | MODES[swizzle] << 62
    return bits - 2**64 if bits >= 2**63 else bits


def product(columns: int, dtype: torch.dtype, a: str, last: str) -> str:
    accumulators = ", ".join(f"%d{i}" for i in range(columns // 2))
    return f"""{{ .reg .pred p; setp.ne.b32 p, %k, 0;
wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{NAMES[dtype]}.{NAMES[dtype]}
{{{accumulators}}}, {a}, %y, p, {last}; }} mov.u32 %k, 1;\n"""


def kernel(parameters: str, body: str, columns: int) -> str:
    """128 threads; thread 0 makes a barrier at %b and issues `loads`; everyone's %d go to p."""
    keeps = "".join(f"st.global.f32 [%o+{4 * i}], %d{i};\n" for i in range(columns // 2))
    return f"""{TEXT}.extern .shared .align 1024 .b8 room[];
.visible .entry k({parameters}, .param .u64 p) .maxntid 128, 1, 1 {{
.reg .b32 %t, %l, %w, %r, %q, %b, %s, %k, %f<4>; .reg .b64 %m, %n, %p, %o, %x, %y, %z; .reg .pred %e;
.reg .f32 %d<{columns // 2}>;
mov.u32 %t, %tid.x; mov.u32 %r, room; add.s32 %b, %r, 65536; ld.param.u64 %p, [p]; setp.ne.s32 %e, %t, 0; mov.u32 %k, 0;
{body}
mul.wide.u32 %o, %t, {2 * columns}; add.s64 %o, %o, %p; {keeps} ret; }}
"""


def check(out: torch.Tensor, truth: torch.Tensor) -> None:
    """Thread t of 128 holds row 16 (t / 32) + (t mod 32) / 4, and eight more, of two columns of each eight."""
    for thread, i in itertools.product(range(128), range(out.shape[1])):
        warp, lane = divmod(thread, 32)
        row = 16 * warp + lane // 4 + 8 * (i // 2 % 2)
        column = 8 * (i // 4) + 2 * (lane % 4) + i % 2
        assert abs(float(out[thread, i]) - float(truth[row, column])) < 1e-4, (thread, i)


# A of 64 x 64 in registers, from global memory in the fragment's layout: rows l / 4 and eight more, columns
# 2 (l mod 4), one more, and the same eight further on.
FRAGMENT = """and.b32 %l, %t, 31; shr.u32 %w, %t, 5; shl.b32 %w, %w, 4; shr.u32 %s, %l, 2; add.s32 %w, %w, %s;
and.b32 %l, %l, 3; mul.lo.s32 %w, %w, 128; shl.b32 %l, %l, 2; add.s32 %w, %w, %l; cvt.u64.u32 %o, %w;
add.s64 %z, %z, %o;
"""
LOADED = """ld.global.u32 %f0, [%z+{0}]; ld.global.u32 %f1, [%z+{1}]; ld.global.u32 %f2, [%z+{2}];
ld.global.u32 %f3, [%z+{3}];
"""


def with_registers(dtype: torch.dtype, between: str = "", fence: str = "wgmma.fence.sync.aligned;") -> str:
    """A (64 x 64) in registers by B (64 x 64) in shared memory; `between` a product and its wait."""
    steps = ""
    for step in range(4):
        steps += LOADED.format(*(32 * step + at for at in (0, 1024, 16, 1040))) + fence
        steps += product(64, dtype, "{%f0, %f1, %f2, %f3}", "1, -1, 0") + "wgmma.commit_group.sync.aligned;\n"
        steps += between + "wgmma.wait_group.sync.aligned 0; add.s64 %y, %y, 2;\n"
    body = f"""mov.b64 %n, n; cvta.param.u64 %n, %n; ld.param.u64 %z, [a];
@%e bra READY; mbarrier.init.shared::cta.b64 [%b], 1; mbarrier.arrive.expect_tx.shared::cta.b64 _, [%b], 8192;
{LOADS}.L2::cache_hint [%r], [%n, {{0, 0, 0}}], [%b], 0;
READY: bar.sync 0; {WAIT.format("%b", 0)}
shr.u32 %s, %r, 4; cvt.u64.u32 %y, %s; or.b64 %y, %y, {descriptor(16, 1024, 3)};
{FRAGMENT}{steps}"""
    return kernel(".param .align 64 .b8 n[128], .param .u64 a", body, 64)


def run_with_registers(device: Device, dtype: torch.dtype = torch.bfloat16, **changes) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(64, 64, generator=generator).to(dtype) for _ in range(2))
    out = torch.zeros(128, 32)
    packed = tensor_map(device, y, (64, 64), 3)
    device.run(with_registers(dtype, **changes), "k", [packed, x, out], block=(128, 1, 1), shared=65544)
    check(out, -(x.double() @ y.double().T))


def register_products(device: Device) -> set[str]:
    for dtype in NAMES:
        run_with_registers(device, dtype)
    return {f"wgmma.mma_async.sync.aligned.m64n64k16.f32.{t}.{t}" for t in NAMES.values()}


def transposed_products(device: Device) -> set[str]:
    """Both operands with their rows along memory: A (k, 64), B (k, 128), in boxes as wide as each swizzle."""
    for dtype, swizzle in itertools.product(NAMES, range(4)):
        generator = torch.Generator().manual_seed(swizzle)
        x, y = (torch.randn(64, rows, generator=generator).to(dtype) for rows in (64, 128))
        wide = (8, 16, 32, 64)[swizzle]
        box = 64 * wide * 2
        loads, at = "", 0
        for name, rows in (("%m", 64), ("%n", 128)):
            for column in range(0, rows, wide):
                loads += f"add.s32 %s, %r, {at}; {LOADS}.L2::cache_hint [%s], [{name}, {{{column}, 0, 0}}], [%b], 0;\n"
                at += box
        # Without a swizzle the leading offset is that between cores along k, otherwise that between boxes.
        shape = descriptor(128, box, 0) if swizzle == 0 else descriptor(box, 16 * wide, swizzle)
        step = 2 * 128 if swizzle == 0 else 32 * wide
        steps = (
            product(128, dtype, "%x", "1, 1, 1, 1") + f"add.s64 %x, %x, {step // 16}; add.s64 %y, %y, {step // 16};\n"
        ) * 4
        body = f"""mov.b64 %m, m; cvta.param.u64 %m, %m; mov.b64 %n, n; cvta.param.u64 %n, %n;
@%e bra READY; mbarrier.init.shared::cta.b64 [%b], 1; mbarrier.arrive.expect_tx.shared::cta.b64 _, [%b], {at};
{loads} READY: bar.sync 0; {WAIT.format("%b", 0)}
shr.u32 %s, %r, 4; cvt.u64.u32 %x, %s; or.b64 %x, %x, {shape}; add.s32 %q, %r, 8192; shr.u32 %s, %q, 4;
cvt.u64.u32 %y, %s; or.b64 %y, %y, {shape}; wgmma.fence.sync.aligned;
{steps} wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;"""
        text = kernel(".param .align 64 .b8 m[128], .param .align 64 .b8 n[128]", body, 128)
        maps, out = [tensor_map(device, t, (wide, 64), swizzle) for t in (x, y)], torch.zeros(128, 64)
        device.run(text, "k", [*maps, out], block=(128, 1, 1), shared=65544)
        check(out, x.double().T @ y.double())
    return {f"wgmma.mma_async.sync.aligned.m64n128k16.f32.{t}.{t}" for t in NAMES.values()}


def matrices(device: Device) -> set[str]:
    """Matrix i has the element 64 i + 8 r + c in row r and column c; lane l receives two of row (column) l / 4."""
    forms = set()
    for kind, count, transposed in itertools.product(("ld", "st"), (1, 2, 4), (False, True)):
        form = f"{kind}matrix.sync.aligned.m8n8.x{count}{'.trans' * transposed}.shared.b16"
        registers = ", ".join(f"%v{i}" for i in range(count))
        values = torch.arange(256, dtype=torch.int32).to(torch.int16)
        place = lambda i, lane, e, transposed=transposed: (  # noqa: E731
            64 * i + (8 * (lane % 4 * 2 + e) + lane // 4 if transposed else 8 * (lane // 4) + lane % 4 * 2 + e)
        )
        lanes = torch.tensor([[[place(i, lane, e) for e in (0, 1)] for i in range(4)] for lane in range(32)])
        start = """.shared .align 16 .b8 room[512]; .reg .b32 %s, %x, %v<4>; .reg .b64 %g; mov.u32 %x, room;
shl.b32 %s, %t, 4; add.s32 %s, %s, %x; shl.b64 %g, %o, 1; add.s64 %a0, %a0, %g; add.s64 %a1, %a1, %g;
ld.global.v4.u32 {%v0, %v1, %v2, %v3}, [%a0];
"""
        if kind == "ld":  # rows from memory, fragments out
            body = f"""{start} st.shared.v4.u32 [%s], {{%v0, %v1, %v2, %v3}}; bar.sync 0;
{form} {{{registers}}}, [%s]; st.global.v4.u32 [%a1], {{%v0, %v1, %v2, %v3}};"""
            given, expected = values, values[lanes].flatten()
            kept = values
        else:  # fragments from memory, rows out
            body = f"""{start} mov.u32 %x, 0; st.shared.v4.u32 [%s], {{%x, %x, %x, %x}}; bar.sync 0;
{form} [%s], {{{registers}}}; bar.sync 0; ld.shared.v4.u32 {{%v0, %v1, %v2, %v3}}, [%s];
st.global.v4.u32 [%a1], {{%v0, %v1, %v2, %v3}};"""
            given, expected = values[lanes].flatten(), values
            kept = torch.zeros_like(values)
        out = torch.zeros(256, dtype=torch.int16)
        device.run(program(body, 2), "k", [given.contiguous(), out])
        if kind == "ld":  # registers that were not loaded keep a row's words
            found, wanted, other = (t.reshape(32, 4, 2) for t in (out, expected, kept))
            assert torch.equal(found[:, :count], wanted[:, :count]), form
            assert torch.equal(found[:, count:], other[:, count:]), form
        else:
            assert torch.equal(out[: 64 * count], expected[: 64 * count]), form
            assert not out[64 * count :].any()
        forms.add(form)
    return forms


PROGRAMS = [register_products, transposed_products, matrices]

# What may not be done with a product's registers, and what is said of it.
FAULTS = [
    ("a register of A overwritten in flight", {"between": "mov.u32 %f1, 0;\n"}, "wgmma in flight"),
    ("a register of A read in flight", {"between": "add.s32 %s, %f3, 1;\n"}, "wgmma in flight"),
    ("an accumulator read in flight", {"between": "mov.b32 %s, %d7;\n"}, "wgmma in flight"),
    ("no wgmma.fence after A was loaded", {"fence": ""}, "missing wgmma.fence"),
]
