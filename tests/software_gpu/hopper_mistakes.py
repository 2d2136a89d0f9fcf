"""Mistakes in what Hopper's kernels do asynchronously: fences, barriers, copies, products; and in their fragments."""

from .planting import GONE, GRADIENTS, KEPT, SIGMOIDS, SUMS, TERMS, of, separate

_TRY_WAIT = r"(mbarrier\.try_wait\.parity\.shared::cta\.b64 P1, \[%r\d+\], )(%r\d+)(, %r\d+;)"
_OTHER_PARITY = r"{ .reg .b32 t; xor.b32 t, \2, 1; \1t\3 }"
_EXPECT_BYTES = r"(arrive\.expect_tx\.shared::cta\.b64 _, \[%r\d+\], )%r\d+"
_INITIALISE = r"(mbarrier\.init\.shared::cta\.b64 \[%r\d+\], )(%r\d+)"


def _mistakes():
    yield of(
        "no proxy fence before a bulk store", "missing proxy fence", KEPT, (r"fence\.proxy\.async\.shared::cta;", GONE)
    )
    yield of(
        "no barrier before columns are added", ("race", "uninitialised"), SUMS, (r"bar\.sync %r\d+, %r\d+;", GONE, 0)
    )
    yield of(
        "a column sum over the scratch of a store in flight",
        "race",
        KEPT,
        (r"cp\.async\.bulk\.wait_group\.read 0;", GONE, 0),
    )
    yield of(
        "a first group that does not say it is done",
        "deadlock",
        SUMS,
        (r"mbarrier\.arrive\.shared::cta\.b64 _, \[%r\d+\];", GONE, 0),
    )
    yield of("a bulk store that nobody waits for", "race", KEPT, (r"cp\.async\.bulk\.wait_group\.read \d;", GONE))
    yield of("bulk stores in no group", "race", KEPT, (r"cp\.async\.bulk\.commit_group;", GONE))
    yield of("no wgmma.fence", "missing wgmma.fence", SUMS, (r"wgmma\.fence\.sync\.aligned;", GONE))
    yield of("accumulators read too early", "wgmma in flight", SUMS, (r"wgmma\.wait_group\.sync\.aligned 0;", GONE))
    yield of(
        "a stage released too early",
        "race",
        SUMS,
        (r"wgmma\.wait_group\.sync\.aligned 1;", "wgmma.wait_group.sync.aligned 7;"),
    )
    yield of("too few bytes expected", "mbarrier bytes", SUMS, (_EXPECT_BYTES, r"\g<1>49136"))
    yield of("too many bytes expected", "mbarrier bytes", SUMS, (_EXPECT_BYTES, r"\g<1>49168"))
    yield of("a full barrier for one producer more", "deadlock", SUMS, (_INITIALISE, r"\g<1>2", 0))
    yield of("an empty barrier for one consumer less", ("race", "mbarrier"), SUMS, (_INITIALISE, r"\g<1>3", 1))
    yield of(
        "no fence after the barriers' initialisation",
        "mbarrier",
        SUMS,
        (r"fence\.mbarrier_init\.release\.cluster;", GONE),
    )
    yield of("no wait for the cluster", ("mbarrier", "race"), SUMS, (r"barrier\.cluster\.wait\.aligned;", GONE))
    yield of(
        "no arrival at the cluster's barrier",
        "divergent barrier",
        SUMS,
        (r"barrier\.cluster\.arrive\.relaxed\.aligned;", GONE),
    )
    yield of("a wait that does not wait", ("race", "uninitialised", "mbarrier"), SUMS, (r"@P1 bra DONE;", "bra DONE;"))
    yield of(
        "a multicast to one CTA", ("deadlock", "mbarrier bytes"), SUMS, (r"mov\.u16 (%rs\d+), 3;", r"mov.u16 \1, 1;")
    )
    yield of("a multicast to an absent CTA", "out of bounds", SUMS, (r"mov\.u16 (%rs\d+), 3;", r"mov.u16 \1, 7;"))
    yield of(
        "a misplaced stage",
        ("race", "misaligned", "uninitialised", "wrong result"),
        SUMS,
        (r"(add\.s32 %r\d+, %r\d+), 9216;", r"\1, 9344;"),
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
    )
    yield of(
        "a descriptor of another stride",
        ("wrong result", "uninitialised", "race"),
        SUMS,
        (r"4611686293305360384", "4611686155866406912"),
    )
    yield of(
        "registers that are not there",
        "deadlock",
        SUMS,
        (r"setmaxnreg\.inc\.sync\.aligned\.u32 232;", "setmaxnreg.inc.sync.aligned.u32 248;"),
    )
    yield of(
        "a count of registers that is none",
        "setmaxnreg",
        SUMS,
        (r"setmaxnreg\.dec\.sync\.aligned\.u32 40;", "setmaxnreg.dec.sync.aligned.u32 44;"),
    )
    yield of("a misaligned row of stmatrix", "misaligned", KEPT, (r"(stmatrix[^\[]*\[%r\d+)\]", r"\1+4]"))
    yield of(
        "a remote arrival at an absent CTA",
        "out of bounds",
        SUMS,
        (r"(mapa\.shared::cluster\.u32 remAddr32, %r\d+, )%r\d+", r"\g<1>2"),
    )
    yield of("CTAs that are no cluster", "out of bounds", SUMS, ("cluster.x", 1))
    yield of(
        "loads by every lane",
        ("mbarrier bytes", "race", "mbarrier"),
        SUMS,
        (r"@%px mov\.s32 (%r\d+), 1;", r"mov.s32 \1, 1;"),
    )
    yield of("a producer that waits for the other parity", "deadlock", SUMS, (_TRY_WAIT, _OTHER_PARITY, 2))
    yield of(
        "a consumer that waits for the other parity", ("race", "uninitialised"), SUMS, (_TRY_WAIT, _OTHER_PARITY, 0)
    )
    yield of(
        "stages released to one CTA only",
        ("race", "deadlock", "mbarrier"),
        SUMS,
        (r"(mapa\.shared::cluster\.u32 remAddr32, %r\d+, )%r\d+", r"\g<1>0"),
    )
    yield of("registers that are not given back", "deadlock", SUMS, (r"setmaxnreg\.dec\.sync\.aligned\.u32 40;", GONE))
    yield of(
        "products that are never committed",
        ("race", "wgmma in flight", "asynchronous work at exit"),
        SUMS,
        (r"wgmma\.commit_group\.sync\.aligned;", GONE),
    )
    yield of(
        "a descriptor that moves too far",
        "wrong result",
        SUMS,
        (r"(add\.s32 %r\d+, %r\d+, )2(;\s*mov\.b64 %rd\d+, \{)", r"\g<1>4\2", 0),
    )
    yield of("no barrier after columns are added", "race", SUMS, (r"bar\.sync %r\d+, %r\d+;", GONE, 1))
    yield of(
        "a stage of stores used again one store too early",
        "race",
        KEPT,
        (r"cp\.async\.bulk\.wait_group\.read 1;", "cp.async.bulk.wait_group.read 2;"),
    )
    yield of(
        "a bulk store's coordinates swapped",
        ("race", "wrong result"),
        KEPT,
        (r"(cp\.async\.bulk\.tensor\.3d\.global[^{]*\{)(%r\d+), (%r\d+)", r"\1\3, \2", 0),
    )
    yield of(
        "the halves of a pair swapped",
        "wrong result",
        KEPT,
        (r"cvt\.rn\.bf16x2\.f32 (%r\d+), (%f\d+), (%f\d+);", r"cvt.rn.bf16x2.f32 \1, \3, \2;", 5),
    )
    yield of(
        "two registers of stmatrix swapped",
        "wrong result",
        KEPT,
        (r"(stmatrix[^{]*\{)(%r\d+), (%r\d+)", r"\1\3, \2", 3),
    )
    yield of(
        "a group's turn that one warp more must end",
        "deadlock",
        SUMS,
        (r"(mbarrier\.init\.shared::cta\.b64 \[%r\d+\], )(%r\d+)", r"\g<1>5", 8),
    )
    yield of(
        "a label's column in blocks of sixteen",
        "wrong result",
        SUMS,
        (r"shr\.u32 (%r\d+), (%r\d+), 3;", r"shr.u32 \1, \2, 4;"),
    )
    yield of(
        "lanes of other columns added",
        "wrong result",
        SUMS,
        (r"(shfl\.sync\.bfly\.b32 %r\d+\|%p\d+, %r\d+, )%r\d+(, )", r"\g<1>8\2", 11),
    )
    yield of(
        "separate weights only where every lane has one",
        "wrong result",
        GRADIENTS,
        (r"vote\.sync\.any\.pred (%p\d+), (%p\d+), (%r\d+);", r"vote.sync.all.pred \1, \2, \3;", 1),
        problem=separate,
    )
    yield of(
        "the weight of the row after",
        "wrong result",
        GRADIENTS,
        (r"(ld\.global\.nc\.f32 %f\d+, \[%rd\d+)\]", r"\1+4]", 0),
    )
    yield of(
        "the weights of the columns after",
        "wrong result",
        GRADIENTS,
        (r"(ld\.global\.nc\.v2\.f32 \{[^}]*\}, \[%rd\d+)(\+?\d*)\]", r"\1+8]", 3),
    )
    yield of(
        "a row of stores swizzled as another's",
        ("race", "wrong result"),
        KEPT,
        (r"and\.b32 (%r\d+), (%r\d+), 7;", r"and.b32 \1, \2, 3;"),
    )
    yield of(
        "a label that one column does not know",
        "wrong result",
        SIGMOIDS,
        (r"setp\.eq\.s32 (%p\d+), (%r\d+), 8;", r"setp.eq.s32 \1, \2, 10;", 0),
    )
    yield of(
        "a term that is never stored",
        ("wrong result", "race"),
        TERMS,
        (r"(add\.s32 (%r\d+), \2, 1;\s*setp\.ne\.s32 %p\d+, \2, )3;", r"\g<1>2;", 2),
    )
    yield of(
        "a term in another's matrix",
        ("wrong result", "race"),
        TERMS,
        (
            r"(cp\.async\.bulk\.tensor\.3d\.global[^{]*\{%r\d+, %r\d+, )(%r\d+)([^;]*;)",
            r"{ .reg .b32 t; xor.b32 t, \2, 1; \1t\3 }",
            1,
        ),
    )
    yield of(
        "a term from which the one before is not subtracted",
        "wrong result",
        TERMS,
        (r"(mov\.b32 (%f\d+), %r\d+;\s*)sub\.f32 (%f\d+), \3, \2;", r"\1", 9),
    )
    yield of(
        "a remainder of the neighbour's",
        "wrong result",
        TERMS,
        (r"shl\.b32 (%r\d+), (%r\d+), 16;(\s*mov\.b32 %f\d+, \1;\s*sub)", r"and.b32 \1, \2, -65536;\3", 4),
    )
    yield of(
        "a stage of terms used again one store too early",
        "race",
        TERMS,
        (r"cp\.async\.bulk\.wait_group\.read 1;", "cp.async.bulk.wait_group.read 2;"),
    )


MISTAKES = list(_mistakes())
