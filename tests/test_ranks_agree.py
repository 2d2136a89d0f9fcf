"""A rank's bad input raises on every rank at once; local and distilled losses over ranks are open_clip's definition."""

import sys

import pytest
import torch
import torch.distributed as dist

from gapkern import ClipLoss, CoCaLoss, DistillClipLoss, SigLipLoss, contrastive_loss, sigmoid_loss
from gapkern.losses import agreement, distributed
from gapkern.testing import assert_near
from tests.ranks import together

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(sys.platform != "linux", reason="gloo over the loopback interface"),
]
ROWS, DIMS = 5, 8


def features(count, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(count, DIMS, generator=generator, dtype=torch.float64), dim=1).to(
        dtype
    )


def entries(rank, world):
    place = {"rank": rank, "world_size": world}

    def coca(x, y, s):
        return CoCaLoss(1.0, 1.0, **place)(x, y, torch.zeros(2, 3, 4), torch.ones(2, 3).long(), s)[0]

    def distill(x, y, s):
        teacher = features(len(x) if isinstance(x, torch.Tensor) else ROWS, 3, torch.float32)
        return DistillClipLoss(**place)(x, y, s, teacher, teacher, torch.tensor(2.0))[1]

    return {
        "contrastive_loss": lambda x, y, s: contrastive_loss(x, y, s, group=True),
        "sigmoid_loss": lambda x, y, s: sigmoid_loss(x, y, s, -1.0, group=True),
        "ClipLoss": ClipLoss(**place),
        "ClipLoss, local": ClipLoss(local_loss=True, gather_with_grad=True, **place),
        "SigLipLoss": lambda x, y, s: SigLipLoss(**place)(x, y, s, torch.tensor(-1.0)),
        "CoCaLoss": coca,
        "DistillClipLoss": distill,
    }


def bad_input(rank, world):
    """What the last rank does, beside good input of the others; every rank hears the same, and the next call works."""
    good, scale = features(ROWS, rank, torch.float32), torch.tensor(3.0)
    bad = {
        r"rank {last}: image\w*: expected at least one row, got shape \(0, 8\)": (good[:0], good[:0], scale),
        r"rank {last}: text\w*: expected D = 8 as in image\w*, got shape \(5, 3\)": (good, good[:, :3], scale),
        r"rank {last}: text\w*: expected 5 rows as in image\w*, got shape \(4, 8\)": (good, good[:4], scale),
        r"rank {last}: text\w*: expected torch.float32 as in image\w*": (good, good.double(), scale),
        r"rank {last}: image\w*: expected a torch.Tensor or numpy.ndarray, got str": ("none", good, scale),
        r"rank {last}: logit_scale: expected a finite number, got nan": (good, good, float("nan")),
        r"rank {last}: logit_scale: expected a number, got str": (good, good, "3"),
        r"rank {last}: logit_scale: expected one element": (good, good, torch.ones(2)),
        r"expected the same shape and dtype.*\(4, 8\) float32 on rank {last}": (good[:4], good[:4], scale),
        r"expected the same shape and dtype.*\(5, 3\) float32 on rank {last}": (good[:, :3], good[:, :3], scale),
        r"expected the same shape and dtype.*\(5, 8\) float64 on rank {last}": (good.double(), good.double(), scale),
        r"same call on every rank.*gradients of images.* on rank {last}": (good.clone().requires_grad_(), good, scale),
    }
    for name, loss in entries(rank, world).items():
        for message, arguments in bad.items():
            if rank != world - 1:
                arguments = good, good, scale
            with pytest.raises((ValueError, TypeError), match=message.format(last=world - 1)):
                loss(*arguments)
        assert torch.isfinite(loss(good, good, scale)), name


def unlike_calls(rank, world):
    x, last = features(ROWS, rank), rank == world - 1
    for message, call in {
        r"reduction='mean'\).* on ranks? 0.*reduction='none'\)": lambda: contrastive_loss(
            x, x, 2.0, reduction="none" if last else "mean", group=True
        ),
        r"similarity='sqeuclidean'": lambda: contrastive_loss(
            x, x, 2.0, similarity="sqeuclidean" if last else "dot", group=True
        ),
        r"rank \d: similarity: expected one of": lambda: contrastive_loss(
            x, x, 2.0, similarity="cosine" if last else "dot", group=True
        ),
        r"local_loss=True": lambda: ClipLoss(local_loss=last, rank=rank, world_size=world)(x, x, torch.tensor(2.0)),
        r"rank \d: rank and world_size: expected": lambda: ClipLoss(rank=0 if last else rank, world_size=world)(
            x, x, torch.tensor(2.0)
        ),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


def groups(rank, world):
    x = features(ROWS, rank)
    expected = contrastive_loss(x, x, 4.0, group=True)
    mesh = dist.device_mesh.init_device_mesh("cpu", (world,), mesh_dim_names=("dp",))
    assert torch.equal(contrastive_loss(x, x, 4.0, group=mesh), expected)
    assert torch.equal(contrastive_loss(x, x, 4.0, group=mesh.get_group()), expected)
    flat = dist.device_mesh.init_device_mesh("cpu", (1, world), mesh_dim_names=("tp", "dp"))
    assert torch.equal(sigmoid_loss(x, x, 4.0, 0.0, group=flat["dp"]), sigmoid_loss(x, x, 4.0, 0.0, group=True))
    with pytest.raises(ValueError, match="group: expected a one-dimensional DeviceMesh, got one of 2 dimensions"):
        contrastive_loss(x, x, 4.0, group=flat)
    with pytest.raises(TypeError, match=r"group: expected a torch.distributed group.* got str"):
        contrastive_loss(x, x, 4.0, group="world")
    alone = dist.new_group([0])
    if rank:
        with pytest.raises(ValueError, match="group: expected a group that this process is in"):
            contrastive_loss(x, x, 4.0, group=alone)
    else:
        assert_near(contrastive_loss(x, x, 4.0, group=alone), contrastive_loss(x, x, 4.0), 1e-14)
    sharded = dist.tensor.DTensor.from_local(x, mesh, [dist.tensor.Shard(0)])
    for call in (lambda: contrastive_loss(sharded, x, 4.0), lambda: sigmoid_loss(x, sharded, 4.0, 0.0)):
        with pytest.raises(TypeError, match=r"(images|texts): expected a tensor of this rank, got a DTensor; pass"):
            call()


def without_a_cpu_side(rank, world):
    """A group of NCCL alone has no CPU side: gloo beside it carries the terms."""
    x = features(ROWS, rank)
    found = agreement._on_the_cpu
    agreement._on_the_cpu = lambda group: False
    agreement._channels.clear()
    try:
        value = contrastive_loss(x, x, 4.0, group=True)
        assert agreement._channel(dist.group.WORLD) is not dist.group.WORLD
        with pytest.raises(ValueError, match=f"rank {world - 1}: images: expected at least one row"):
            contrastive_loss(x[: ROWS * (rank < world - 1)], x, 4.0, group=True)
    finally:
        agreement._on_the_cpu = found
        agreement._channels.clear()
    assert torch.equal(value, contrastive_loss(x, x, 4.0, group=True))


def surroundings(rank, world):
    x = features(ROWS, rank, torch.float32)
    expected = contrastive_loss(x, x, 4.0, group=True)
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.float16)
    try:
        assert torch.equal(contrastive_loss(x, x, 4.0, group=True), expected)
        with pytest.raises(ValueError, match="same shape and dtype"):
            contrastive_loss(x[rank == 0 :], x[rank == 0 :], 4.0, group=True)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    with torch.inference_mode():
        assert torch.equal(contrastive_loss(x, x, 4.0, group=True), expected)
    leaf = x.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="gapkern: losses over ranks have no forward-mode derivative"):
        torch.func.jvp(lambda a: contrastive_loss(a, x, 4.0, group=True), (x,), (x,))
    gradient = torch.func.grad(lambda a: contrastive_loss(a, x, 4.0, group=True))(x)
    contrastive_loss(leaf, x, 4.0, group=True).backward()
    assert torch.equal(gradient, leaf.grad)


def distilled(rank, world):
    """Value by open_clip's definition in float64; gradients by the table of gapkern.losses.open_clip."""
    x, y, a, b = (features(world * ROWS, seed) for seed in range(4))
    own = slice(rank * ROWS, (rank + 1) * ROWS)

    def definition(x, y, s):
        logits, targets = s * x @ y.T, 9.0 * a @ b.T
        of_rows = -(targets.softmax(1) * logits.log_softmax(1)).sum(1)
        of_columns = -(targets.T.softmax(1) * logits.T.log_softmax(1)).sum(1)
        return (of_rows + of_columns) / 2

    leaves = [t.clone().requires_grad_() for t in (x, y, torch.tensor(7.0, dtype=torch.float64))]
    truth = definition(*leaves)
    gradients = torch.autograd.grad(truth.mean(), leaves)
    for local in (False, True):
        for with_grad in (False, True):
            loss = DistillClipLoss(local, with_grad, rank=rank, world_size=world)
            mine = [x[own].clone().requires_grad_(), y[own].clone().requires_grad_(), leaves[2]]
            value = loss(*mine, a[own], b[own], torch.tensor(9.0))[1]
            assert_near(value, truth[own].mean() if local else truth.mean(), 1e-12)
            found = torch.autograd.grad(value, mine)
            factor = world if local or with_grad else 1
            for i in (0, 1):
                assert_near(found[i], factor * gradients[i][own], 1e-11, name=f"{local} {with_grad} {i}")
            assert_near(found[2], gradients[2], 1e-11)


def hooks(rank, world):
    """A subclass's logits over ranks: what open_clip's own path gives."""
    x, y = features(ROWS, rank), features(ROWS, rank + 10)

    class Half(ClipLoss):
        def get_logits(self, *arguments, **options):
            return [logits / 2 for logits in super().get_logits(*arguments, **options)]

    for local, with_grad in ((False, False), (False, True), (True, True)):
        results = []
        for loss, scale in ((Half, 8.0), (ClipLoss, 4.0)):
            leaves = [x.clone().requires_grad_(), y.clone().requires_grad_()]
            value = loss(local, with_grad, rank=rank, world_size=world)(*leaves, torch.tensor(scale).double())
            results.append([value, *torch.autograd.grad(value, leaves)])
        for ours, expected in zip(*results, strict=True):
            assert_near(ours, expected, 1e-12)

    class Spread(SigLipLoss):
        def get_logits(self, *arguments, **options):
            return super().get_logits(*arguments, **options) / 2

    results = []
    for loss, scale in ((Spread, (8.0, -4.0)), (SigLipLoss, (4.0, -2.0))):
        leaves = [x.clone().requires_grad_(), y.clone().requires_grad_()]
        value = loss(rank=rank, world_size=world)(*leaves, *(torch.tensor(v).double() for v in scale))
        results.append([value, *torch.autograd.grad(value, leaves)])
    for ours, expected in zip(*results, strict=True):
        assert_near(ours, expected, 1e-12)


def compiled(rank, world):
    """One graph, with the ranks' agreement inside: a later uneven batch raises everywhere."""
    for loss in (
        lambda x, y: contrastive_loss(x, y, 5.0, group=True),
        lambda x, y: sigmoid_loss(x, y, 5.0, -2.0, group=True),
    ):
        whole = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
        for rows in (ROWS, ROWS + 2):
            leaves = [features(rows, seed + rank).requires_grad_() for seed in (0, 20)]
            found, expected = whole(*leaves), loss(*leaves)
            assert_near(found, expected, 1e-12)
            for ours, truth in zip(
                torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True
            ):
                assert_near(ours, truth, 1e-12)
        leaves = [t[rank == 0 :].detach().requires_grad_() for t in leaves]
        with pytest.raises(ValueError, match="expected the same shape and dtype on every rank"):
            whole(*leaves)
    module = torch.compile(ClipLoss(rank=rank, world_size=world), fullgraph=True, backend="aot_eager")
    x = features(ROWS, rank)
    expected = ClipLoss(rank=rank, world_size=world)(x, x, torch.tensor(2.0))
    assert_near(module(x, x, torch.tensor(2.0)), expected, 1e-12)


def once_a_step(rank, world):
    """One number a step goes around, and the terms only where they differ."""
    x, calls = features(ROWS, rank), []
    gather_object = dist.all_gather_object
    dist.all_gather_object = lambda *a, **k: (calls.append(1), gather_object(*a, **k))
    try:
        for _ in range(3):
            contrastive_loss(x, x, 4.0, group=True)
        assert calls == []
        with pytest.raises(ValueError, match="images: expected"):
            contrastive_loss(x[: ROWS * rank], x[: ROWS * rank], 4.0, group=True)
        assert calls == [1]
    finally:
        dist.all_gather_object = gather_object
    assert distributed.shard(True).world == world


def test_two_ranks():
    together(
        2, bad_input, unlike_calls, groups, without_a_cpu_side, surroundings, distilled, hooks, once_a_step, compiled
    )


def test_four_ranks():
    together(4, bad_input, unlike_calls, distilled, hooks)
