"""Losses over ranks: equal to the whole batch on one process, refused where ranks differ, the same training."""

import itertools
import sys

import pytest
import torch

from gapkern import ClipLoss, DistillClipLoss, MeanShift, Projection, SigLipLoss, contrastive_loss, sigmoid_loss
from gapkern.testing import assert_near
from tests.ranks import together

pytestmark = pytest.mark.distributed

ROWS, DIMS = 6, 10


def whole_batch(world, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(world * ROWS, DIMS, generator=generator, dtype=torch.float64) for _ in range(2))
    return tuple(torch.nn.functional.normalize(t, dim=1) for t in (x, x + y))


def expected(loss, world, *scalars):
    """Value and gradients on one process."""
    x, y = (t.requires_grad_() for t in whole_batch(world))
    scalars = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in scalars]
    value = loss(x, y, *scalars)
    return [value.detach(), *torch.autograd.grad(value, (x, y, *scalars), allow_unused=True)]


def mine(loss, rank, world, *scalars):
    """Value and gradients of this rank, features first."""
    x, y = (t[rank * ROWS : (rank + 1) * ROWS].clone().requires_grad_() for t in whole_batch(world))
    scalars = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in scalars]
    value = loss(x, y, *scalars)
    return [value.detach(), *torch.autograd.grad(value, (x, y, *scalars), allow_unused=True)]


def compare(found, whole, rank, factor, name, value=True):
    own = slice(rank * ROWS, (rank + 1) * ROWS)
    if value:
        assert_near(found[0], whole[0], 1e-12, name=f"{name}: value")
    for i in (1, 2):
        assert_near(found[i], factor * whole[i][own], 1e-11, name=f"{name}: gradient {i}")
    for i in range(3, len(found)):
        assert_near(found[i], whole[i], 1e-11, name=f"{name}: scalar {i}")


def functions(rank, world):
    for similarity, memory in itertools.product(("dot", "sqeuclidean"), ("recompute", "keep")):
        options = {"similarity": similarity, "memory": memory}
        for reduction in ("mean", "sum"):
            whole = expected(lambda *t, o=options, r=reduction: contrastive_loss(*t, reduction=r, **o), world, 7.0)
            found = mine(
                lambda *t, o=options, r=reduction: contrastive_loss(*t, reduction=r, group=True, **o), rank, world, 7.0
            )
            compare(found, whole, rank, 1, f"contrastive {similarity} {memory} {reduction}")
    weights = torch.linspace(0.5, 2, world * ROWS, dtype=torch.float64)
    own = slice(rank * ROWS, (rank + 1) * ROWS)
    whole = expected(lambda *t: (weights * contrastive_loss(*t, reduction="none")).sum(), world, 7.0)
    found = mine(lambda *t: (weights[own] * contrastive_loss(*t, reduction="none", group=True)).sum(), rank, world, 7.0)
    compare(found, whole, rank, 1, "contrastive none", value=False)
    whole = expected(sigmoid_loss, world, 7.0, -4.0)
    compare(mine(lambda *t: sigmoid_loss(*t, group=True), rank, world, 7.0, -4.0), whole, rank, 1, "sigmoid")


def classes(rank, world):
    whole = expected(contrastive_loss, world, 7.0)
    parts = [expected(contrastive_loss_rows(r), world, 7.0)[0] for r in range(world)]
    for local, with_grad in itertools.product((False, True), repeat=2):
        loss = ClipLoss(local, with_grad, rank=rank, world_size=world)
        found = mine(loss, rank, world, 7.0)
        compare(found, whole, rank, world if local or with_grad else 1, f"ClipLoss {local} {with_grad}", value=False)
        assert_near(found[0], parts[rank] if local else whole[0], 1e-12)
        compare_with_open_clip(found, local, with_grad, rank, world)
    whole = expected(sigmoid_loss, world, 7.0, -4.0)
    found = mine(SigLipLoss(rank=rank, world_size=world), rank, world, 7.0, -4.0)
    compare(found, whole, rank, world, "SigLipLoss", value=False)
    teacher = whole_batch(world, seed=5)
    own = slice(rank * ROWS, (rank + 1) * ROWS)
    for i in range(2):
        whole = expected(lambda *t, i=i: DistillClipLoss()(*t, *teacher, torch.tensor(9.0))[i], world, 7.0)
        loss = DistillClipLoss(gather_with_grad=True, rank=rank, world_size=world)
        found = mine(
            lambda *t, i=i, loss=loss: loss(*t, *(t[own] for t in teacher), torch.tensor(9.0))[i], rank, world, 7.0
        )
        compare(found, whole, rank, world, f"DistillClipLoss {i}")


def contrastive_loss_rows(rank):
    return lambda *t: contrastive_loss(*t, reduction="none")[rank * ROWS : (rank + 1) * ROWS].mean()


def compare_with_open_clip(found, local, with_grad, rank, world):
    """Ours against theirs wherever theirs is the whole gradient."""
    try:
        import open_clip
    except ImportError:
        return
    theirs = mine(open_clip.ClipLoss(local, with_grad, rank=rank, world_size=world), rank, world, 7.0)
    assert_near(found[0], theirs[0], 1e-12)
    if with_grad or not local:
        for i in (1, 2):
            assert_near(found[i], theirs[i], 1e-11, name=f"open_clip's gradient {i}, {local} {with_grad}")


def uneven(rank, world):
    x = torch.randn(ROWS - (rank == world - 1), DIMS)
    for loss in (ClipLoss(True, True, rank=rank, world_size=world), lambda *t: sigmoid_loss(*t, 0.0, group=True)):
        with pytest.raises(ValueError, match=r"images: expected the same shape and dtype on every rank.*drop_last"):
            loss(x, x, torch.tensor(1.0))


def model():
    torch.manual_seed(3)
    return torch.nn.ModuleList([torch.nn.Linear(DIMS, 8), torch.nn.Linear(DIMS, 8)]).double()


def embed(towers, images, texts):
    return [torch.nn.functional.normalize(t(v), dim=1) for t, v in zip(towers, (images, texts), strict=True)]


class Towers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.towers = model()
        self.scale = torch.nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, images, texts):
        return *embed(self.towers, images, texts), self.scale.exp()


def training(rank, world):
    """DDP over ranks and one process with the whole batch: the same parameters after every step."""
    alone = Towers()
    spread = torch.nn.parallel.DistributedDataParallel(Towers())
    loss = ClipLoss(True, True, rank=rank, world_size=world)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.5) for m in (alone, spread)]
    own = slice(rank * ROWS, (rank + 1) * ROWS)
    for step in range(10):
        images, texts = whole_batch(world, seed=100 + step)
        losses = contrastive_loss(*alone(images, texts)), loss(*spread(images[own], texts[own]))
        for value, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        for a, b in zip(alone.parameters(), spread.parameters(), strict=True):
            assert_near(b, a, 1e-9, name=f"step {step}")


def shifts(rank, world):
    generator = torch.Generator().manual_seed(4)
    gallery, queries = (torch.randn(world * ROWS, DIMS, generator=generator) + i for i in range(2))
    own = slice(rank * ROWS, (rank + 1) * ROWS)
    for components in (2, "exact", "auto"):
        whole = MeanShift(n_components=components).fit(gallery, queries)
        found = MeanShift(n_components=components).fit(gallery[own], queries[own]).all_reduce()
        assert found.n_components_ == whole.n_components_
        assert_near(found.gap_vector_, whole.gap_vector_, 1e-12)
        assert float((found.shift_vector_ - whole.shift_vector_).abs().max()) < 1e-12
        for metric in ("l2", "cosine"):
            whole = Projection(components, metric).fit(gallery, queries)
            found = Projection(components, metric).fit(gallery[own], queries[own]).all_reduce()
            assert found.n_components_ == whole.n_components_
            assert_near(found.transform_queries(queries.double()), whole.transform_queries(queries.double()), 1e-9)


def a_rank_with_nothing(rank, world):
    """Every rank is told, at once, instead of waiting for one that raised alone."""
    if world == 1:
        return
    shift = MeanShift(n_components=2)
    if rank != 1:
        shift.fit(torch.eye(4, 3), torch.eye(4, 3) + 1)
    with pytest.raises(ValueError, match="rank 1: MeanShift: nothing was seen here; call fit"):
        shift.all_reduce()
    other = MeanShift(n_components=2).fit(torch.eye(4, 3 + rank), torch.eye(4, 3 + rank) + 1)
    with pytest.raises(ValueError, match="rank 1: expected D = 3 as on rank 0, got 4"):
        other.all_reduce()


def misplaced(rank, world):
    with pytest.raises(ValueError, match="rank and world_size: expected"):
        ClipLoss(rank=0, world_size=world + 1)(torch.eye(2), torch.eye(2), torch.tensor(1.0))


@pytest.mark.skipif(sys.platform != "linux", reason="gloo over the loopback interface")
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_ranks_together_do_what_one_process_does(world):
    together(
        world, functions, classes, *([uneven] if world > 1 else []), training, shifts, a_rank_with_nothing, misplaced
    )
