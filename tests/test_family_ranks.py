"""The family of losses over ranks: ids and masks reach across them, and all is as on one process."""

import weakref

import pytest
import torch

from gapkern import losses
from gapkern.testing import assert_near
from tests.ranks import together

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

ROWS, DIMS = 5, 6
ALL = ("q-d", "d-q", "q-q", "d-d")


def whole_batch(world):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *size: torch.nn.functional.normalize(  # noqa: E731
        torch.randn(*size, generator=generator, dtype=torch.float64), dim=-1
    )
    n = world * ROWS
    leaves = {"x": draw(n, DIMS), "y": draw(n, DIMS), "hard": draw(n, 2, DIMS)}
    constants = {
        "u": draw(n, 4),
        "v": draw(n, 4),
        # Captions of an image on another rank.
        "ids": torch.randint(0, ROWS, (n,), generator=generator),
        "other": torch.randint(0, ROWS, (n,), generator=generator),
        "weights": torch.rand(n, generator=generator, dtype=torch.float64),
    }
    return leaves, constants


CALLS = {
    "q-d": lambda t, s, **o: losses.info_nce_loss(
        t["x"], t["y"], s, ids=t["ids"], margin=0.2, weights=t["weights"], **o
    ),
    "joint": lambda t, s, **o: losses.info_nce_loss(
        t["x"],
        t["y"],
        s,
        hard_negatives=t["hard"],
        share_hard_negatives=True,
        directions=ALL,
        ids=(t["ids"], t["other"]),
        margin=0.4,
        hardness=2.0,
        label_smoothing=0.1,
        **o,
    ),
    "separate": lambda t, s, **o: losses.info_nce_loss(
        t["x"], t["y"], s, directions=ALL, partition="separate", label_smoothing=0.1, debias=0.05, ids=t["ids"], **o
    ),
    "hardness": lambda t, s, **o: losses.info_nce_loss(
        t["x"], t["y"], s, directions=("q-d", "d-q"), hardness=3.0, hardness_of="all", hard_negatives=t["hard"], **o
    ),
    "d-q": lambda t, s, **o: losses.info_nce_loss(
        t["x"], t["y"], s, directions=("d-q", "d-d"), ids=(t["ids"], t["other"]), decoupled=True, **o
    ),
    "ntxent, decoupled": lambda t, s, **o: losses.ntxent_loss(
        t["x"], t["y"], s, decoupled=True, ids=t["ids"], weights=t["weights"], **o
    ),
    "matryoshka": lambda t, s, **o: losses.Matryoshka(losses.contrastive_loss, (6, 4, 2))(t["x"], t["y"], s, **o),
    "matryoshka, ids": lambda t, s, **o: losses.Matryoshka(losses.info_nce_loss, (6, 3), (1.0, 0.5))(
        t["x"], t["y"], s, hard_negatives=t["hard"], ids=t["ids"], margin=0.3, **o
    ),
    "ntxent": lambda t, s, **o: losses.ntxent_loss(t["x"], t["y"], s, **o),
    "plain clip": lambda t, s, **o: losses.contrastive_loss(t["x"], t["y"], s, **o),
    "plain sum": lambda t, s, **o: losses.contrastive_loss(
        t["x"], t["y"], s, -1.0, similarity="sqeuclidean", reduction="sum", memory="keep", **o
    ),
    "plain siglip": lambda t, s, **o: losses.sigmoid_loss(t["x"], t["y"], s, -2.0, **o),
    "smoothed clip": lambda t, s, **o: losses.contrastive_loss(t["x"], t["y"], s, label_smoothing=0.1, **o),
    "weighted clip": lambda t, s, **o: losses.contrastive_loss(t["x"], t["y"], s, weights=t["weights"], **o),
    "clip": lambda t, s, **o: losses.contrastive_loss(t["x"], t["y"], s, ids=(t["ids"], t["other"]), **o),
    "clip in": lambda t, s, **o: losses.contrastive_loss(
        t["x"], t["y"], s, ids=t["ids"], positives="in", similarity="sqeuclidean", reduction="sum", **o
    ),
    "siglip": lambda t, s, **o: losses.sigmoid_loss(t["x"], t["y"], s, -2.0, ids=t["ids"], positives="mean", **o),
    "soft siglip": lambda t, s, **o: losses.sigmoid_loss(
        t["x"], t["y"], s, -2.0, ids=t["ids"], positives="mean", symmetric=False, soft_label=True, **o
    ),
    "supcon in": lambda t, s, **o: losses.supcon_loss(
        t["x"], t["ids"], s, positives="in", weights=t["weights"], reduction="sum", **o
    ),
    "supcon": lambda t, s, **o: losses.supcon_loss(t["x"], t["ids"], s, **o),
    "mil, weights": lambda t, s, **o: losses.mil_nce_loss(t["x"], t["hard"], s, weights=t["weights"], **o),
    "gist, relative": lambda t, s, **o: losses.gist_loss(
        t["x"],
        t["y"],
        s,
        t["u"],
        t["v"],
        margin=0.05,
        margin_strategy="relative",
        contrast_queries=False,
        weights=t["weights"],
        **o,
    ),
    "mil": lambda t, s, **o: losses.mil_nce_loss(t["x"], t["hard"], s, **o),
    "gist": lambda t, s, **o: losses.gist_loss(t["x"], t["y"], s, t["u"], t["v"], margin=0.1, **o),
    "uniformity": lambda t, s, **o: losses.uniformity_loss(t["x"], s, **o),
}


def value_and_gradients(call, leaves, constants, **options):
    leaves = {k: v.clone().requires_grad_() for k, v in leaves.items()}
    s = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
    value = call(leaves | constants, s, **options)
    gradients = torch.autograd.grad(value, (*leaves.values(), s), allow_unused=True)
    return value.detach(), gradients


def test_every_loss_is_called_over_ranks():
    """Whatever `gapkern.losses` has that takes a group."""
    named = set().union(*(call.__code__.co_names for call in CALLS.values()))
    takes_group = {name for name in losses.__all__ if "group" in getattr(getattr(losses, name), "__annotations__", {})}
    assert takes_group <= named, takes_group - named
    assert "info_nce_loss" in takes_group


def equal_to_one_process(rank, world):
    leaves, constants = whole_batch(world)
    own = slice(rank * ROWS, (rank + 1) * ROWS)
    for name, call in CALLS.items():
        value, gradients = value_and_gradients(call, leaves, constants)
        mine = [{k: v[own] for k, v in part.items()} for part in (leaves, constants)]
        for exchange in ("gather", "ring"):
            found, parts = value_and_gradients(call, *mine, group=True, exchange=exchange)
            assert_near(found, value, 1e-11, name=f"{name} {exchange}")
            for i, (a, b) in enumerate(zip(parts, gradients, strict=True)):
                assert (a is None) == (b is None), f"{name} {exchange}: gradient {i}"
                if a is not None:
                    assert_near(a, b[own] if i < 3 else b, 1e-10, name=f"{name} {exchange}: gradient {i}")


def refused_on_every_rank(rank, world):
    x = torch.eye(4)
    with pytest.raises(ValueError, match=r"rank 1: ids: expected shape \(4,\), got \(3,\)"):
        losses.info_nce_loss(x, x, 1.0, ids=torch.arange(3 if rank == 1 else 4), group=True)
    with pytest.raises(ValueError, match="expected the same call on every rank"):
        losses.info_nce_loss(x, x, 1.0, margin=float(rank), group=True)
    with pytest.raises(ValueError, match=r"rank 1: ids: expected shape \(4,\), got \(3,\)"):
        losses.info_nce_loss(x, x, 1.0, ids=torch.arange(3 if rank == 1 else 4), group=True, exchange="ring")
    with pytest.raises(ValueError, match="rank 0: exchange: expected one of 'auto', 'gather', 'ring', got 'fast'"):
        losses.supcon_loss(x, torch.arange(4), 1.0, group=True, exchange="ring" if rank else "fast")
    for loss in (losses.contrastive_loss, losses.info_nce_loss, lambda *t, **o: losses.sigmoid_loss(*t, 0.0, **o)):
        with pytest.raises(ValueError, match=r"expected the same call on every rank, got .*, in a ring"):
            loss(x, x, 1.0, group=True, exchange="gather" if rank == 1 else "ring")
        uneven = x[: 3 + (rank == 0)]
        with pytest.raises(ValueError, match="expected the same shape and dtype on every rank"):
            loss(uneven, uneven, 1.0, group=True, exchange="ring")
    with pytest.raises(ValueError, match=r"hard_negatives \(4, 2, 4\)"):
        losses.info_nce_loss(
            x, x, 1.0, hard_negatives=x[:, None].repeat(1, 1 + (rank == 0), 1), group=True, exchange="ring"
        )


def a_ring_of_one(rank, world):
    x, alone = torch.eye(4), torch.distributed.new_group([0])
    if rank == 0:
        found = losses.info_nce_loss(x, x, 1.0, group=alone, exchange="ring")
        assert_near(found, losses.info_nce_loss(x, x, 1.0), 1e-7)


def a_ring_holds_three_ranks_rows(rank, world):
    """Whatever the number of ranks: the graph keeps none of the visitors."""
    from gapkern.losses import ring

    alive, parts, most = [], [], [0]
    transfer, part_made = ring._Transfer.__init__, ring._Part.__init__

    def remembered(self, *arguments):
        part_made(self, *arguments)
        parts.append(weakref.ref(self))

    def watched(self, tensors, place, tag):
        transfer(self, tensors, place, tag)
        if tag == ring.ROWS:
            alive.extend(weakref.ref(t) for t in self.received)
        most[0] = max(most[0], sum(t() is not None for t in alive))

    ring._Transfer.__init__, ring._Part.__init__ = watched, remembered
    try:
        leaves, constants = whole_batch(world)
        x, y = (leaves[k][rank * ROWS : (rank + 1) * ROWS].clone().requires_grad_() for k in ("x", "y"))
        ids = constants["ids"][rank * ROWS : (rank + 1) * ROWS]
        for loss in (
            lambda: losses.contrastive_loss(x, y, 5.0, group=True, exchange="ring"),
            lambda: losses.contrastive_loss(x, y, 5.0, ids=ids, group=True, exchange="ring"),
            lambda: losses.info_nce_loss(x, y, 5.0, hardness=1.0, group=True, exchange="ring"),
            lambda: losses.sigmoid_loss(x, y, 5.0, -1.0, group=True, exchange="ring"),
        ):
            value = loss()
            assert sum(t() is not None for t in alive) == 0
            value.backward()
            del value
            assert parts
            assert not any(part() for part in parts)  # no circles: at once, not when they are collected
            assert alive
            assert most[0] <= 2
            alive.clear()
    finally:
        ring._Transfer.__init__, ring._Part.__init__ = transfer, part_made


def half_precision_travels(rank, world):
    leaves, _ = whole_batch(world)
    own = slice(rank * ROWS, (rank + 1) * ROWS)
    found = []
    for exchange in ("gather", "ring"):
        x, y = (leaves[k][own].bfloat16().requires_grad_() for k in ("x", "y"))
        value = losses.contrastive_loss(x, y, 5.0, group=True, exchange=exchange)
        found.append([value, *torch.autograd.grad(value, (x, y))])
    for a, b in zip(*found, strict=True):
        assert a.dtype == b.dtype
        assert_near(a.detach(), b.detach(), 2e-2)


def a_ring_breaks_a_graph_and_is_differentiated_once(rank, world):
    leaves, _ = whole_batch(world)
    x, y = (leaves[k][rank * ROWS : (rank + 1) * ROWS].clone().requires_grad_() for k in ("x", "y"))

    def loss(x, y):
        return 2 * losses.contrastive_loss(x, y, 5.0, group=True, exchange="ring")

    plain, compiled = loss(x, y), torch.compile(loss, backend="eager")(x, y)
    assert_near(compiled.detach(), plain.detach(), 1e-12)
    for a, b in zip(torch.autograd.grad(compiled, (x, y)), torch.autograd.grad(plain, (x, y)), strict=True):
        assert_near(a, b, 1e-12)
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(loss(x, y), x, create_graph=True)


def auto_goes_by_memory(rank, world):
    from gapkern.losses import spread

    place = losses.distributed.shard(True)
    assert not spread.by_ring("auto", place, torch.empty(1024, 512))
    assert spread.by_ring("auto", place, torch.empty(2**30 // (512 * 4 * world) + 1, 512, device="meta"))
    assert not spread.by_ring("ring", None, torch.empty(1))


def cached_synchronises_once(rank, world):
    torch.manual_seed(0)
    encoder = torch.nn.Sequential(torch.nn.Linear(DIMS, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4)).double()
    leaves, _ = whole_batch(world)
    whole = torch.nn.Sequential(*encoder)
    expected = torch.autograd.grad(
        losses.info_nce_loss(whole(leaves["x"]), whole(leaves["y"]), 3.0), list(whole.parameters())
    )
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    counts = [0]

    def counted(state, bucket):
        counts[0] += 1
        return allreduce_hook(None, bucket)

    class Both(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = encoder

        def forward(self, x):
            return self.inner(x)

    wrapped = torch.nn.parallel.DistributedDataParallel(Both())
    wrapped.register_comm_hook(None, counted)
    own = slice(rank * ROWS, (rank + 1) * ROWS)
    pair = torch.stack([leaves["x"][own], leaves["y"][own]], 1)

    def loss(both, s):
        return losses.info_nce_loss(both[:, 0], both[:, 1], s, group=True) * world  # DDP averages

    losses.cached(loss, wrapped, 2)([pair], 3.0).backward()
    assert counts == [1]
    for p, g in zip(encoder.parameters(), expected, strict=True):
        assert_near(p.grad, g, 1e-10)


@pytest.mark.parametrize("world", [2, 4])
def test_losses_over_ranks(world):
    together(
        world,
        equal_to_one_process,
        refused_on_every_rank,
        a_ring_of_one,
        a_ring_holds_three_ranks_rows,
        half_precision_travels,
        auto_goes_by_memory,
        a_ring_breaks_a_graph_and_is_differentiated_once,
        cached_synchronises_once,
    )
