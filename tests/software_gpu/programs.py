"""Tiny PTX programs for what is no scalar arithmetic: memory, warps, barriers, bulk copies, matrix products.

Each is a function of the device that asserts and returns the forms it has run; expected values are worked out here,
from the PTX ISA's tables.
"""

import ctypes
import itertools
import re

import numpy as np
import torch

from .device import Device
from .forms import LOAD, REGISTER, STORE, TEXT, program

BYTES = {"u8": 1, "s8": 1, "u16": 2, "u32": 4, "f32": 4, "u64": 8, "f64": 8}
WIDTH = {1: "h", 2: "h", 4: "w", 8: "d"}
_MEMORY = re.compile(r"(ld|st)\.(global|shared|param)(?:\.nc)?(?:\.v([24]))?\.([usf]\d+)$")


def is_memory(form: str) -> bool:
    return _MEMORY.match(form) is not None


def memory(device: Device, form: str) -> set[str]:
    """Bytes go by `form` from where they are to where they are looked at."""
    kind, space, vector, type_ = _MEMORY.match(form).groups()
    count, size = int(vector or 1), BYTES[type_]
    total, w = count * size, WIDTH[size]
    registers = [f"%v{i}" for i in range(count)]
    listed = f"{{{', '.join(registers)}}}" if vector else registers[0]
    values = np.random.default_rng(total).integers(0, 256, 32 * total, dtype=np.uint8)
    body = f".shared .align 16 .b8 room[{32 * total}]; .reg .b32 %base; mov.u32 %base, room;\n"
    body += "".join(f".reg {REGISTER[w]} {r};\n" for r in registers)
    body += f".reg .b64 %from, %to; .reg .b32 %s; mul.wide.u32 %from, %t, {total}; add.s64 %to, %a1, %from;\n"
    body += f"add.s64 %from, %a0, %from; mul.lo.s32 %s, %t, {total}; add.s32 %s, %s, %base;\n"
    singly = {
        "h": ("ld.global.u16", "st.global.u16"),
        "w": ("ld.global.u32", "st.global.u32"),
        "d": ("ld.global.u64", "st.global.u64"),
    }[w]
    into, out = "", ""
    for i, r in enumerate(registers):
        into += f"{singly[0]} {r}, [%from+{i * size}];\n"
        out += f"{singly[1]} [%to+{i * size}], {r};\n"
    if space == "param":
        offset = 16
        signed = type_[0] == "s"
        values[0] = 0x85
        body += f"{form} {listed}, [q+{offset}];\n"
        out = "".join(
            f"st.global.u{8 * max(size, 2)} [%to+{i * max(size, 2)}], {r};\n" for i, r in enumerate(registers)
        )
        expected = values[:total]
        if size == 1:
            expected = expected.view(np.int8).astype(np.int16) if signed else expected.astype(np.uint16)
        expected = np.ascontiguousarray(expected).view(np.uint8)
        result = torch.zeros(len(expected), dtype=torch.uint8)
        text = program(body.replace("%a1", "%a0") + out, 1, 1, ".param .align 16 .b8 q[32]")
        packed = bytes(16) + values[:total].tobytes() + bytes(16 - total)
        device.run(text, "k", [result, bytes(8) + packed], block=(1, 1, 1))  # q lies at a multiple of 16
        assert (result.numpy() == expected).all(), form
        return {form}
    if space == "global":
        inner = (f"{form} {listed}, [%from];\n" + out) if kind == "ld" else (into + f"{form} [%to], {listed};\n")
    elif kind == "ld":
        body += into + "".join(f"st.shared.u{8 * size} [%s+{i * size}], {r};\n" for i, r in enumerate(registers))
        inner = f"{form} {listed}, [%s];\n" + out
    else:
        body += into + f"{form} [%s], {listed};\n"
        inner = "".join(f"ld.shared.u{8 * size} {r}, [%s+{i * size}];\n" for i, r in enumerate(registers)) + out
    source, result = torch.from_numpy(values), torch.zeros(32 * total, dtype=torch.uint8)
    device.run(program(body + inner, 2), "k", [source, result])
    assert torch.equal(source, result), form
    return {form, "ld.param.u64"}


def shuffles(device: Device) -> set[str]:
    lanes = np.arange(32)
    rng = np.random.default_rng(0)
    values = rng.integers(0, 2**32, 32, dtype=np.uint32)
    for mode, part, by in itertools.product(("bfly", "down", "up", "idx"), (32, 8), (0, 1, 3, 7, 16, 31)):
        first, last = lanes // part * part, lanes // part * part + part - 1
        source = {"bfly": lanes ^ by, "down": lanes + by, "up": lanes - by, "idx": first | by & (part - 1)}[mode]
        inside = source >= first if mode == "up" else source <= last
        expected = values[np.where(inside, source, lanes)]
        clamp = (32 - part) << 8 | (0 if mode == "up" else 31)
        body = f""".reg .b32 %x, %y; .reg .pred %p; .reg .b64 %z; add.s64 %z, %a0, %o; ld.global.u32 %x, [%z];
shfl.sync.{mode}.b32 %y|%p, %x, {by}, {clamp}, -1; add.s64 %z, %a1, %o; st.global.u32 [%z], %y;
selp.u32 %y, 1, 0, %p; st.global.u32 [%z+4], %y;"""
        out = torch.zeros(64, dtype=torch.int32)
        device.run(program(body, 2), "k", [torch.from_numpy(values.astype(np.int64)), out])
        found = out.numpy().view(np.uint32).reshape(32, 2)
        assert (found[:, 0] == expected).all(), (mode, part, by)
        assert (found[:, 1] == inside).all(), (mode, part, by)
    return {f"shfl.sync.{mode}.b32" for mode in ("bfly", "down", "idx")}


def votes(device: Device) -> set[str]:
    body = """.reg .b32 %x, %y; .reg .pred %p, %q; .reg .b64 %z; and.b32 %x, %t, 5; setp.eq.s32 %p, %x, 4;
vote.sync.ballot.b32 %y, %p, -1; add.s64 %z, %a0, %o; st.global.u32 [%z], %y;
mov.u32 %x, 0; elect.sync %y|%q, -1; @%q mov.s32 %x, 1; shl.b32 %x, %x, 8; or.b32 %x, %x, %y;
st.global.u32 [%z+4], %x; vote.sync.any.pred %q, %p, -1; selp.u32 %x, 1, 0, %q; setp.gt.u32 %p, %t, 31;
vote.sync.any.pred %q, %p, -1; selp.u32 %y, 2, 0, %q; or.b32 %x, %x, %y; bar.warp.sync -1; st.global.u32 [%z+8], %x;"""
    out = torch.zeros(128, dtype=torch.int32)
    device.run(program(body.replace("add.s64 %z, %a0, %o;", "shl.b64 %z, %o, 1; add.s64 %z, %a0, %z;"), 1), "k", [out])
    votes, elected, any_of, _ = out.numpy().view(np.uint32).reshape(32, 4).T
    assert (any_of == 1).all()
    assert (votes == sum(1 << i for i in range(32) if i & 5 == 4)).all()
    assert ((elected & 255) == 0).all()
    assert (elected >> 8 == (np.arange(32) == 0)).all()
    return {"vote.sync.ballot.b32", "vote.sync.any.pred", "bar.warp.sync", "elect.sync"}


def branches(device: Device) -> set[str]:
    """Loops of another length in every lane (Collatz), early exits, labels in their scopes."""
    body = """.reg .b32 %n, %i, %x; .reg .pred %p, %q; .reg .b64 %z; add.s64 %z, %a0, %o; add.s32 %n, %t, 1;
mov.u32 %i, 0;
LOOP: setp.eq.s32 %p, %n, 1; @%p bra END; add.s32 %i, %i, 1; and.b32 %x, %n, 1; setp.eq.s32 %q, %x, 0; @%q bra EVEN;
{ mad.lo.s32 %n, %n, 3, 1; bra.uni END; END: } bra.uni LOOP;
EVEN: shr.u32 %n, %n, 1; bra LOOP;
END: st.global.u32 [%z], %i; setp.gt.u32 %p, %t, 9; @%p ret; st.global.u32 [%z+4], %t;"""
    out = torch.zeros(64, dtype=torch.int32)
    device.run(program(body, 1), "k", [out])
    for i, (steps, index) in enumerate(out.reshape(32, 2).tolist()):
        n, expected = i + 1, 0
        while n != 1:
            n, expected = (3 * n + 1 if n % 2 else n // 2), expected + 1
        assert (steps, index) == (expected, i if i <= 9 else 0)
    return {"bra", "bra.uni", "ret"}


def barriers(device: Device) -> set[str]:
    """A value goes round all warps; then two barriers of half the warps each."""
    body = """.shared .align 4 .b8 room[1024]; .reg .b32 %s, %x, %y, %b; .reg .b64 %z; shl.b32 %s, %t, 2;
mov.u32 %x, room; add.s32 %s, %s, %x; mul.lo.s32 %y, %t, 7; st.shared.u32 [%s], %y; bar.sync 0;
add.s32 %y, %t, 33; and.b32 %y, %y, 127; shl.b32 %y, %y, 2; add.s32 %y, %y, %x; ld.shared.u32 %y, [%y];
add.s64 %z, %a0, %o; st.global.u32 [%z], %y; shr.u32 %b, %t, 6; add.s32 %b, %b, 1; bar.sync %b, 64;
st.shared.u32 [%s+512], %t; bar.sync %b, 64; xor.b32 %y, %t, 32; shl.b32 %y, %y, 2; add.s32 %y, %y, %x;
ld.shared.u32 %y, [%y+512]; st.global.u32 [%z+4], %y;"""
    out = torch.zeros(256, dtype=torch.int32)
    device.run(program(body, 1, 128), "k", [out], block=(128, 1, 1))
    found = out.reshape(128, 2)
    threads = torch.arange(128)
    assert torch.equal(found[:, 0].long(), (threads + 33) % 128 * 7)
    assert torch.equal(found[:, 1].long(), threads ^ 32)
    return {"bar.sync"}


def registers(device: Device) -> set[str]:
    body = """.reg .b32 %w; .reg .pred %p; .reg .b64 %z; shr.u32 %w, %t, 7; setp.eq.s32 %p, %w, 0; @%p bra LESS;
setmaxnreg.inc.sync.aligned.u32 232; bra.uni ON; LESS: setmaxnreg.dec.sync.aligned.u32 40;
ON: add.s64 %z, %a0, %o; st.global.u32 [%z], %w;"""
    out = torch.zeros(768, dtype=torch.int32)
    device.run(program(body, 1, 384), "k", [out], block=(384, 1, 1))
    assert torch.equal(out[::2].long(), torch.arange(384) // 128)
    return {"setmaxnreg.inc.sync.aligned.u32", "setmaxnreg.dec.sync.aligned.u32"}


def stored_matrix(device: Device) -> set[str]:
    """Matrix i, row r at 16 (8 i + r); lane l's register i holds the elements 2 (l mod 4) and one more of row l / 4."""
    body = """.shared .align 16 .b8 room[512]; .reg .b32 %s, %x, %v<4>; .reg .b64 %z; mov.u32 %x, room;
shl.b32 %s, %t, 4; add.s32 %s, %s, %x; mov.u32 %v0, %t; add.s32 %v1, %t, 65536; add.s32 %v2, %t, 131072;
add.s32 %v3, %t, 196608;
stmatrix.sync.aligned.x4.m8n8.shared.b16 [%s], {%v0, %v1, %v2, %v3}; bar.sync 0; add.s64 %z, %a0, %o;
add.s64 %z, %z, %o; ld.shared.v4.f32 {%v0, %v1, %v2, %v3}, [%s];
st.global.v4.f32 [%z], {%v0, %v1, %v2, %v3};"""
    out = torch.zeros(128, dtype=torch.int32)
    device.run(program(body, 1), "k", [out])
    for i, r, piece in itertools.product(range(4), range(8), range(4)):
        assert int(out[(8 * i + r) * 4 + piece]) == 65536 * i + 4 * r + piece
    return {"stmatrix.sync.aligned.x4.m8n8.shared.b16"}


def tensor_map(device: Device, tensor: torch.Tensor, box: tuple, swizzle: int) -> bytes:
    """Of a (rows, columns) tensor, as three dimensions with one plane."""
    rows, columns = tensor.shape
    address = device.lib.software_gpu_map(tensor.data_ptr(), tensor.numel() * 2, 1)
    room = ctypes.create_string_buffer(128)
    code = device.lib.software_gpu_encode(
        room,
        6 if tensor.dtype == torch.float16 else 9,
        3,
        address,
        (ctypes.c_uint64 * 3)(columns, rows, 1),
        (ctypes.c_uint64 * 2)(2 * columns, 2 * columns * rows),
        (ctypes.c_uint32 * 3)(*box, 1),
        swizzle,
    )
    assert code == 0, device.fault()
    return room.raw


WAIT = """{{ .reg .pred q; LAB: mbarrier.try_wait.parity.shared::cta.b64 q, [{0}], {1}, 1000;
@q bra OUT; bra LAB; OUT: }}"""
LOADS = "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"


def bulk_copies(device: Device) -> set[str]:
    """A box over the tensor's edge, swizzled, looked at byte by byte and stored elsewhere."""
    for swizzle in range(4):
        columns = (64, 16, 32, 64)[swizzle]
        source = torch.randn(13, 72).bfloat16()
        to = torch.full((13, 72), 7.0).bfloat16()
        seen = torch.zeros(16, columns, dtype=torch.bfloat16)
        size = 32 * columns
        maps = [tensor_map(device, t, (columns, 16), swizzle) for t in (source, to)]
        text = f"""{TEXT}.extern .shared .align 16 .b8 room[];
.visible .entry k(.param .align 64 .b8 m[128], .param .align 64 .b8 n[128], .param .u64 p) .maxntid 32, 1, 1 {{
.reg .b32 %t, %r, %b, %x, %s; .reg .b64 %m, %n, %p, %o; .reg .pred %e, %l;
mov.u32 %t, %tid.x; mov.u32 %r, room; add.s32 %b, %r, 8192; mov.b64 %m, m; cvta.param.u64 %m, %m; mov.b64 %n, n;
cvta.param.u64 %n, %n; ld.param.u64 %p, [p]; setp.ne.s32 %e, %t, 0; prefetch.tensormap [%m];
@%e bra READY; mbarrier.init.shared::cta.b64 [%b], 1; fence.mbarrier_init.release.cluster;
mbarrier.arrive.expect_tx.shared::cta.b64 _, [%b], {size};
{LOADS}.L2::cache_hint [%r], [%m, {{8, 3, 0}}], [%b], 0;
READY: bar.sync 0; {WAIT.format("%b", 0)}
mov.u32 %x, 0;
NEXT: shl.b32 %s, %t, 2; add.s32 %s, %s, %x; setp.ge.s32 %l, %s, {size}; @%l bra DONE; cvt.s64.s32 %o, %s;
add.s64 %o, %o, %p;
add.s32 %s, %s, %r; {{ .reg .b32 v; ld.shared.u32 v, [%s]; st.global.u32 [%o], v; st.shared.u32 [%s], v; }}
add.s32 %x, %x, 128; bra NEXT;
DONE: fence.proxy.async.shared::cta; bar.sync 0; @%e bra END;
cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%n, {{8, 3, 0}}], [%r]; cp.async.bulk.commit_group;
cp.async.bulk.wait_group.read 0; END: ret; }}
"""
        device.run(text, "k", [*maps, seen], shared=8200)
        expected = torch.zeros(16, columns).bfloat16()
        inside = source[3:19, 8 : 8 + columns]
        expected[: len(inside), : inside.shape[1]] = inside
        for row, piece in itertools.product(range(16), range(columns // 8)):
            # Within 8 rows of 128 bytes, the 16 bytes' number is exclusive-or-ed with that of their 128 bytes.
            linear = 2 * columns * row + 16 * piece
            place = linear ^ (linear >> 7 & ((0, 1, 3, 7)[swizzle])) << 4
            found = seen.flatten()[place // 2 : place // 2 + 8]
            assert torch.equal(found, expected[row, 8 * piece : 8 * piece + 8]), (swizzle, row, piece)
        stored = torch.full((13, 72), 7.0).bfloat16()
        stored[3:, 8 : 8 + columns] = inside
        assert torch.equal(to, stored)
    return {
        "cvta.param.u64",
        "prefetch.tensormap",
        "mbarrier.init.shared::cta.b64",
        "fence.mbarrier_init.release.cluster",
        "mbarrier.arrive.expect_tx.shared::cta.b64",
        "mbarrier.try_wait.parity.shared::cta.b64",
        "fence.proxy.async.shared::cta",
        f"{LOADS}.L2::cache_hint",
        "cp.async.bulk.commit_group",
        "cp.async.bulk.tensor.3d.global.shared::cta.bulk_group",
        "cp.async.bulk.wait_group.read",
    }


def cluster(device: Device) -> set[str]:
    """Two CTAs: one load for both, an arrival of each at the other's barrier."""
    source, seen = torch.randn(8, 64).bfloat16(), torch.zeros(2, 8, 64).bfloat16()
    text = f"""{TEXT}.extern .shared .align 16 .b8 room[];
.visible .entry k(.param .align 64 .b8 m[128], .param .u64 p) .maxntid 32, 1, 1 {{
.reg .b32 %t, %r, %b, %c, %x, %y, %s; .reg .b64 %m, %p, %o; .reg .pred %e, %f; .reg .b16 %h;
mov.u32 %t, %tid.x; mov.u32 %r, room; add.s32 %b, %r, 1024; mov.b64 %m, m; cvta.param.u64 %m, %m; ld.param.u64 %p, [p];
mov.u32 %x, %cluster_ctarank; setp.ne.s32 %e, %t, 0; setp.ne.s32 %f, %x, 0; or.pred %f, %f, %e; mov.u16 %h, 3;
@%e bra READY; mbarrier.init.shared::cta.b64 [%b], 2; mbarrier.init.shared::cta.b64 [%b+8], 1;
fence.mbarrier_init.release.cluster; mbarrier.arrive.expect_tx.shared::cta.b64 _, [%b], 1024;
READY: barrier.cluster.arrive.relaxed.aligned; barrier.cluster.wait.aligned;
@%f bra ISSUED; {LOADS}.multicast::cluster.L2::cache_hint [%r], [%m, {{0, 0, 0}}], [%b], %h, 0; ISSUED:
@%e bra ARRIVED; mbarrier.arrive.shared::cta.b64 _, [%b]; xor.b32 %y, %x, 1; add.s32 %c, %b, 8;
{{ .reg .b32 far; mapa.shared::cluster.u32 far, %c, %y; mbarrier.arrive.shared::cluster.b64 _, [far]; }}
ARRIVED: {WAIT.format("%b", 0)} {WAIT.format("%b+8", 0)}
shl.b32 %y, %x, 10; shl.b32 %s, %t, 5; add.s32 %y, %y, %s; cvt.s64.s32 %o, %y; add.s64 %o, %o, %p; add.s32 %s, %s, %r;
{{ .reg .b32 v<4>; ld.shared.v4.f32 {{v0, v1, v2, v3}}, [%s]; st.global.v4.u32 [%o], {{v0, v1, v2, v3}};
ld.shared.v4.f32 {{v0, v1, v2, v3}}, [%s+16]; st.global.v4.u32 [%o+16], {{v0, v1, v2, v3}}; }}
barrier.cluster.arrive.relaxed.aligned; barrier.cluster.wait.aligned; ret; }}
"""
    packed = tensor_map(device, source, (64, 8), 0)
    device.run(text, "k", [packed, seen], grid=(2, 1, 1), cluster=(2, 1, 1), shared=1040)
    assert torch.equal(seen[0], source)
    assert torch.equal(seen[1], source)
    return {
        f"{LOADS}.multicast::cluster.L2::cache_hint",
        "mbarrier.arrive.shared::cta.b64",
        "mapa.shared::cluster.u32",
        "mbarrier.arrive.shared::cluster.b64",
        "barrier.cluster.arrive.relaxed.aligned",
        "barrier.cluster.wait.aligned",
    }


def products(device: Device) -> set[str]:
    """64 x 64 by 64 x 256 in four steps, at every swizzle; the accumulators' places from the ISA's figure."""
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "f16")):
        x, y = torch.randn(64, 64).to(dtype), torch.randn(256, 64).to(dtype)
        out = torch.zeros(128, 128)
        accumulators = ", ".join(f"%d{i}" for i in range(128))
        steps = ""
        for step in range(4):
            steps += f"""{{ .reg .pred p; setp.ne.b32 p, {step}, 0;
wgmma.mma_async.sync.aligned.m64n256k16.f32.{name}.{name}
{{{accumulators}}}, %x, %y, p, 1, 1, 0, 0; }} add.s64 %x, %x, 2; add.s64 %y, %y, 2;\n"""
        keeps = "".join(f"st.global.f32 [%o+{4 * i}], %d{i};\n" for i in range(128))
        text = f"""{TEXT}.extern .shared .align 16 .b8 room[];
.visible .entry k(.param .align 64 .b8 m[128], .param .align 64 .b8 n[128], .param .u64 p) .maxntid 128, 1, 1 {{
.reg .b32 %t, %r, %q, %b, %s; .reg .b64 %m, %n, %p, %o, %x, %y; .reg .pred %e; .reg .f32 %d<128>;
mov.u32 %t, %tid.x; mov.u32 %r, room; add.s32 %q, %r, 8192; add.s32 %b, %r, 40960; mov.b64 %m, m; cvta.param.u64 %m, %m;
mov.b64 %n, n; cvta.param.u64 %n, %n; ld.param.u64 %p, [p]; setp.ne.s32 %e, %t, 0;
@%e bra READY; mbarrier.init.shared::cta.b64 [%b], 1; mbarrier.arrive.expect_tx.shared::cta.b64 _, [%b], 40960;
{LOADS}.L2::cache_hint [%r], [%m, {{0, 0, 0}}], [%b], 0; {LOADS}.L2::cache_hint [%q], [%n, {{0, 0, 0}}], [%b], 0;
READY: bar.sync 0; {WAIT.format("%b", 0)}
shr.u32 %s, %r, 4; cvt.u64.u32 %x, %s; or.b64 %x, %x, 4611686293305360384; shr.u32 %s, %q, 4; cvt.u64.u32 %y, %s;
or.b64 %y, %y, 4611686293305360384; wgmma.fence.sync.aligned;
{steps} wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
mul.wide.u32 %o, %t, 512; add.s64 %o, %o, %p; {keeps} ret; }}
"""
        maps = [tensor_map(device, x, (64, 64), 3), tensor_map(device, y, (64, 256), 3)]
        device.run(text, "k", [*maps, out], block=(128, 1, 1), shared=40968)
        truth = x.double() @ y.double().T
        for thread, i in itertools.product(range(128), range(0, 128, 5)):
            warp, lane = divmod(thread, 32)
            row = 16 * warp + lane // 4 + 8 * (i // 2 % 2)
            column = 8 * (i // 4) + 2 * (lane % 4) + i % 2
            assert abs(float(out[thread, i]) - float(truth[row, column])) < 1e-4, (thread, i)
    return {
        "wgmma.fence.sync.aligned",
        "wgmma.commit_group.sync.aligned",
        "wgmma.wait_group.sync.aligned",
        *(f"wgmma.mma_async.sync.aligned.m64n256k16.f32.{t}.{t}" for t in ("bf16", "f16")),
    }


PROGRAMS = [shuffles, votes, branches, barriers, registers, stored_matrix, bulk_copies, cluster, products]
assert set(LOAD) == set(STORE)
