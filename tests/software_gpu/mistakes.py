"""Mistakes planted in the library's kernels, their launches and tensor maps, and what the device must say of each."""

from dataclasses import dataclass

import torch

from . import problems
from .device import Device, quiet

SUMS, KEPT, GRADIENTS = "4SumsINS_10bfloat16_tEv", "4SumsINS_10bfloat16_tES", "GradientsINS_10bfloat16_t"
COLUMN_SUM, SHIFTED, NEAREST = "sum_rowsIfLi4E", "apply_rowsIfLi4ELb1E", "nearest_tilesIfLb1E"
LSE_TILES, BITS = "lse_tilesIfLb1E", "WriteBits"


def sums(device):
    x, y = problems.pair(300, 300, 320, torch.bfloat16)
    control = torch.tensor([5.0, -3.0])
    rows, columns = device.call("contrastive_sm90_sums", x, y, control, x.new_empty(0))
    truth = torch.exp2(5 * (x.double() @ y.double().T) - 3)
    problems.assert_near(rows, truth.sum(1), 1e-5)
    problems.assert_near(columns, truth.sum(0), 1e-5)


def kept(device):
    x, y = problems.pair(300, 300, 136, torch.bfloat16)
    control, to = torch.tensor([5.0, -3.0]), torch.zeros(300, 304, dtype=torch.bfloat16)
    device.call("contrastive_sm90_sums", x, y, control, to)
    problems.assert_near(to[:, :300], torch.exp2(5 * (x.double() @ y.double().T) - 3), 4e-3)


def column_sum(device):
    problems.mean_shift(device, (513, 64), torch.float32)


def nearest(device):
    problems.nearest_rows(device, 70, 300, 32, torch.float32)


def chunk(device):
    problems.steps_between_products(device, 64, 132, torch.float32, False)


def bits(device):
    x = torch.zeros(40, 257)
    assert torch.equal(device.call("perturb_bits", x, 7, 1, 3), problems.on_cpu("perturb_bits", x, 7, 1, 3))


@dataclass(frozen=True)
class Mistake:
    name: str
    kinds: tuple[str, ...]  # any of them; "wrong result" is the reference's word
    kernel: str
    changes: tuple
    problem: object
    seeds: tuple[int, ...] = (0, 1, 2)  # the first that shows it


def _mistakes():
    def of(name, kinds, kernel, *changes, problem, seeds=(0, 1, 2)):
        planted = tuple((kernel, *c) for c in changes)
        return Mistake(name, (kinds,) if isinstance(kinds, str) else kinds, kernel, planted, problem, seeds)

    gone = ""
    # barriers among threads
    yield of("no barrier before shared memory is read", "race", COLUMN_SUM, (r"bar\.sync 0;", gone), problem=column_sum)
    yield of(
        "no barrier in a tile of products",
        ("race", "uninitialised"),
        NEAREST,
        (r"bar\.sync 0;", gone, 0),
        problem=nearest,
    )
    yield of(
        "no barrier between maxima and sums",
        ("race", "uninitialised"),
        LSE_TILES,
        (r"bar\.sync 0;", gone, 0),
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
        (r"st\.shared\.f64 [^;]*;", gone, 0),
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
        (r"mov\.u32 %r\d+, %tid\.x;", gone),
        problem=column_sum,
    )
    yield of(
        "a value that nobody formed", "uninitialised", SHIFTED, (r"sqrt\.rn\.f32 [^;]*;", gone), problem=column_sum
    )
    yield Mistake(
        "a tensor that the kernel before left unwritten",
        ("uninitialised",),
        "sum_parts",
        ((SUMS, r"st\.global\.f32 [^;]*;", gone, 0),),
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
    # Hopper: fences, barriers, asynchronous copies and products
    yield of(
        "no proxy fence before a bulk store",
        "missing proxy fence",
        KEPT,
        (r"fence\.proxy\.async\.shared::cta;", gone),
        problem=kept,
    )
    yield of(
        "no barrier before columns are added",
        ("race", "uninitialised"),
        SUMS,
        (r"bar\.sync %r\d+, %r\d+;", gone, 0),
        problem=sums,
    )
    yield of(
        "a column sum over the scratch of a store in flight",
        "race",
        KEPT,
        (r"cp\.async\.bulk\.wait_group\.read 0;", gone, 0),
        problem=kept,
    )
    yield of(
        "a first group that does not say it is done",
        "deadlock",
        SUMS,
        (r"mbarrier\.arrive\.shared::cta\.b64 _, \[%r\d+\];", gone, 0),
        problem=sums,
    )
    yield of(
        "a bulk store that nobody waits for",
        "race",
        KEPT,
        (r"cp\.async\.bulk\.wait_group\.read \d;", gone),
        problem=kept,
    )
    yield of("bulk stores in no group", "race", KEPT, (r"cp\.async\.bulk\.commit_group;", gone), problem=kept)
    yield of("no wgmma.fence", "missing wgmma.fence", SUMS, (r"wgmma\.fence\.sync\.aligned;", gone), problem=sums)
    yield of(
        "accumulators read too early",
        "wgmma in flight",
        SUMS,
        (r"wgmma\.wait_group\.sync\.aligned 0;", gone),
        problem=sums,
    )
    yield of(
        "a stage released too early",
        "race",
        SUMS,
        (r"wgmma\.wait_group\.sync\.aligned 1;", "wgmma.wait_group.sync.aligned 7;"),
        problem=sums,
    )
    yield of(
        "too few bytes expected",
        "mbarrier bytes",
        SUMS,
        (r"(arrive\.expect_tx\.shared::cta\.b64 _, \[%r\d+\], )%r\d+", r"\g<1>49136"),
        problem=sums,
    )
    yield of(
        "too many bytes expected",
        "mbarrier bytes",
        SUMS,
        (r"(arrive\.expect_tx\.shared::cta\.b64 _, \[%r\d+\], )%r\d+", r"\g<1>49168"),
        problem=sums,
    )
    yield of(
        "a full barrier for one producer more",
        "deadlock",
        SUMS,
        (r"(mbarrier\.init\.shared::cta\.b64 \[%r\d+\], )(%r\d+)", r"\g<1>2", 0),
        problem=sums,
    )
    yield of(
        "an empty barrier for one consumer less",
        ("race", "mbarrier"),
        SUMS,
        (r"(mbarrier\.init\.shared::cta\.b64 \[%r\d+\], )(%r\d+)", r"\g<1>3", 1),
        problem=sums,
    )
    yield of(
        "no fence after the barriers' initialisation",
        "mbarrier",
        SUMS,
        (r"fence\.mbarrier_init\.release\.cluster;", gone),
        problem=sums,
    )
    yield of(
        "no wait for the cluster", ("mbarrier", "race"), SUMS, (r"barrier\.cluster\.wait\.aligned;", gone), problem=sums
    )
    yield of(
        "no arrival at the cluster's barrier",
        "divergent barrier",
        SUMS,
        (r"barrier\.cluster\.arrive\.relaxed\.aligned;", gone),
        problem=sums,
    )
    yield of(
        "a wait that does not wait",
        ("race", "uninitialised", "mbarrier"),
        SUMS,
        (r"@P1 bra DONE;", "bra DONE;"),
        problem=sums,
    )
    yield of(
        "a multicast to one CTA",
        ("deadlock", "mbarrier bytes"),
        SUMS,
        (r"mov\.u16 (%rs\d+), 3;", r"mov.u16 \1, 1;"),
        problem=sums,
    )
    yield of(
        "a multicast to an absent CTA",
        "out of bounds",
        SUMS,
        (r"mov\.u16 (%rs\d+), 3;", r"mov.u16 \1, 7;"),
        problem=sums,
    )
    yield of(
        "a misplaced stage",
        ("race", "misaligned", "uninitialised", "wrong result"),
        SUMS,
        (r"(add\.s32 %r\d+, %r\d+), 9216;", r"\1, 9344;"),
        problem=sums,
    )
    yield of(
        "a coordinate one off",
        "wrong result",
        SUMS,
        (
            r"(cp\.async\.bulk\.tensor\.3d\.shared::cluster[^\[]*\[%r\d+\], \[%rd\d+, \{%r\d+, )(%r\d+)(, [^;]*;)",
            r"{ .reg .b32 t; add.s32 t, \2, 1; \1t\3 }",
            0,
        ),
        problem=sums,
    )
    yield of(
        "a descriptor of another stride",
        ("wrong result", "uninitialised", "race"),
        SUMS,
        (r"4611686293305360384", "4611686155866406912"),
        problem=sums,
    )
    yield of(
        "registers that are not there",
        "deadlock",
        SUMS,
        (r"setmaxnreg\.inc\.sync\.aligned\.u32 232;", "setmaxnreg.inc.sync.aligned.u32 248;"),
        problem=sums,
    )
    yield of(
        "a count of registers that is none",
        "setmaxnreg",
        SUMS,
        (r"setmaxnreg\.dec\.sync\.aligned\.u32 40;", "setmaxnreg.dec.sync.aligned.u32 44;"),
        problem=sums,
    )
    yield of("a misaligned row of stmatrix", "misaligned", KEPT, (r"(stmatrix[^\[]*\[%r\d+)\]", r"\1+4]"), problem=kept)
    yield of(
        "a remote arrival at an absent CTA",
        "out of bounds",
        SUMS,
        (r"(mapa\.shared::cluster\.u32 remAddr32, %r\d+, )%r\d+", r"\g<1>2"),
        problem=sums,
    )
    yield of("CTAs that are no cluster", "out of bounds", SUMS, ("cluster.x", 1), problem=sums)
    yield of(
        "loads by every lane",
        ("mbarrier bytes", "race", "mbarrier"),
        SUMS,
        (r"@%px mov\.s32 (%r\d+), 1;", r"mov.s32 \1, 1;"),
        problem=sums,
    )


MISTAKES = list(_mistakes())


def noticed(device: Device, mistake: Mistake) -> str:
    """What is said of it: "kind in kernel, line: what", or "wrong result"; "" where it goes unnoticed."""
    for seed in mistake.seeds:
        device.seed(seed)
        try:
            with quiet(), device.mistake(*mistake.changes):  # CUTLASS prints the tensor maps that are refused
                mistake.problem(device)
        except (RuntimeError, AssertionError) as error:
            fault = device.fault()
            if fault is None:
                kind, said = "wrong result", str(error).split("\n")[0][:120]
            else:
                kind, said = fault.kind, f"{fault.kind} in {fault.kernel}, line {fault.line}: {fault.what}"
            if kind in mistake.kinds and (fault is None or mistake.kernel in fault.kernel):
                return said
            return f"MISTAKEN for {said}"
        finally:
            device.seed(0)
    return ""
