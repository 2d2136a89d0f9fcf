"""Hooks of open_clip's loss classes, and patches of open_clip undone in any order."""

import copy
import inspect
import pickle
import random

import pytest
import torch

import gapkern.losses
from gapkern import ClipLoss, patch_open_clip
from gapkern.testing import assert_near

pytestmark = pytest.mark.open_clip
NAMES = ("ClipLoss", "CoCaLoss", "DistillClipLoss", "SigLipLoss")


def unit(seed, n=10, d=6):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(n, d, generator=generator, dtype=torch.float64), dim=1)


def arguments(name):
    s = torch.tensor(8.0, dtype=torch.float64, requires_grad=True)
    x, y = (unit(seed).requires_grad_() for seed in (0, 1))
    if name == "CoCaLoss":
        return x, y, torch.zeros(2, 3, 4, dtype=torch.float64), torch.ones(2, 3).long(), s
    if name == "DistillClipLoss":
        return x, y, s, unit(2), unit(3), torch.tensor(4.0, dtype=torch.float64)
    if name == "SigLipLoss":
        return x, y, s, torch.tensor(-2.0, dtype=torch.float64, requires_grad=True)
    return x, y, s


def make(base, name, **options):
    return base(1.0, 1.0, **options) if name == "CoCaLoss" else base(**options)


def results(loss, name):
    """Values and gradients."""
    given = arguments(name)
    values = loss(*given)
    values = values if isinstance(values, tuple) else (values,)
    leaves = [v for v in given if v.requires_grad]
    return [*values, *torch.autograd.grad(sum(values), leaves, allow_unused=True)]


def halved_logits(base):
    class Half(base):
        def get_logits(self, *args, **kwargs):
            logits = super().get_logits(*args, **kwargs)
            return logits / 2 if isinstance(logits, torch.Tensor) else tuple(v / 2 for v in logits)

    return Half


def other_labels(base):
    class Other(base):
        def get_ground_truth(self, *args, **kwargs):
            return super().get_ground_truth(*args, **kwargs).roll(1, 0)

    return Other


def other_distillation(base):
    class Squared(base):
        def dist_loss(self, teacher_logits, student_logits):
            return (teacher_logits - student_logits).square().mean()

    return Squared


def other_loss(base):
    class Doubled(base):
        def _loss(self, *args, **kwargs):
            return 2 * super()._loss(*args, **kwargs)

    return Doubled


def own_forward(base):
    class Own(base):
        def forward(self, x, y, s, *rest):
            logits = self.get_logits(x, y, s)
            logits = logits if isinstance(logits, torch.Tensor) else logits[0]
            return (
                logits * self.get_ground_truth(x.device, *([x.dtype] if "Sig" in base.__name__ else []), len(x))
            ).sum()

    return Own


CASES = [
    *((halved_logits, name) for name in NAMES),
    *((other_labels, name) for name in NAMES),
    (other_distillation, "DistillClipLoss"),
    (other_loss, "SigLipLoss"),
    (own_forward, "ClipLoss"),
    (own_forward, "SigLipLoss"),
]


@pytest.mark.parametrize(("change", "name"), CASES)
def test_an_overridden_hook_is_used(change, name):
    import open_clip

    ours, theirs = (results(make(change(getattr(m, name)), name), name) for m in (gapkern.losses, open_clip.loss))
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert_near(a, b, 1e-11)
    if change is not own_forward:
        plain = results(make(getattr(gapkern.losses, name), name), name)
        assert any(float((a - b).detach().abs().max()) > 1e-6 for a, b in zip(ours, plain, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_hook_set_on_the_instance_or_the_class_is_used(name, monkeypatch):
    base = getattr(gapkern.losses, name)
    half = make(halved_logits(base), name)
    expected = results(half, name)
    loss = make(base, name)
    loss.get_logits = half.get_logits
    for a, b in zip(results(loss, name), expected, strict=True):
        assert_near(a, b, 1e-12)
    original = base.get_logits

    def halved(self, *args, **kwargs):
        logits = original(self, *args, **kwargs)
        return logits / 2 if isinstance(logits, torch.Tensor) else tuple(v / 2 for v in logits)

    monkeypatch.setattr(base, "get_logits", halved)
    for a, b in zip(results(make(base, name), name), expected, strict=True):
        assert_near(a, b, 1e-12)


def test_labels_put_into_the_cache_are_used():
    import open_clip

    order = torch.randperm(10, generator=torch.Generator().manual_seed(1))
    values = []
    for base in (ClipLoss, open_clip.ClipLoss):
        loss = base()
        loss.prev_num_logits, loss.labels = 10, {torch.device("cpu"): order}
        values.append(results(loss, "ClipLoss"))
    for a, b in zip(*values, strict=True):
        assert_near(a, b, 1e-11)
    loss = ClipLoss(cache_labels=True)
    labels = loss.get_ground_truth(torch.device("cpu"), 10)
    assert loss.prev_num_logits == 10
    assert loss.labels[torch.device("cpu")] is labels
    assert not loss._is_dense(unit(0))  # its own labels change nothing
    assert not copy.deepcopy(loss)._is_dense(unit(0))
    labels[0] = 3
    assert loss._is_dense(unit(0))


@pytest.mark.parametrize("name", NAMES)
def test_hooks_are_open_clips(name):
    import open_clip

    theirs, ours = make(getattr(open_clip.loss, name), name), make(getattr(gapkern.losses, name), name)
    hooks = {"ClipLoss": ("get_logits", "get_ground_truth"), "DistillClipLoss": ("get_logits", "dist_loss")}
    for hook in hooks.get(name, ("get_logits", "get_ground_truth") + ("_loss",) * (name == "SigLipLoss")):
        expected, found = (
            [(p.name, p.default) for p in inspect.signature(getattr(v, hook)).parameters.values()]
            for v in (theirs, ours)
        )
        assert found == expected, hook
    assert (ours.prev_num_logits, ours.labels) == (theirs.prev_num_logits, theirs.labels)
    x, y, s = unit(0), unit(1), torch.tensor(3.0, dtype=torch.float64)
    found, expected = ours.get_logits(x, y, s, logit_bias=s), theirs.get_logits(x, y, s, logit_bias=s)
    assert_near(torch.stack(list(found)), torch.stack(list(expected)), 1e-14)
    if name == "SigLipLoss":
        for negative in (False, True):
            assert_near(ours._loss(x, y, s, -s, negative), theirs._loss(x, y, s, -s, negative), 1e-12)
            labels = [v.get_ground_truth(x.device, x.dtype, 4, negative_only=negative) for v in (ours, theirs)]
            assert torch.equal(*labels)
    else:
        assert torch.equal(ours.get_ground_truth(x.device, 7), theirs.get_ground_truth(x.device, 7))


def bindings():
    import open_clip

    return [getattr(m, n) for m in (open_clip, open_clip.loss, open_clip.factory) for n in NAMES if hasattr(m, n)]


def test_patches_come_off_in_any_order():
    before = bindings()
    for seed in range(4):
        patches = [patch_open_clip() for _ in range(3)]
        random.Random(seed).shuffle(patches)
        for patch in patches[:-1]:
            patch.undo()
            patch.undo()  # counts once
            import open_clip

            assert open_clip.ClipLoss is ClipLoss
        patches[-1].undo()
        assert bindings() == before
    with patch_open_clip() as outer:
        inner = patch_open_clip()
        outer.undo()
        assert bindings() != before
        inner.undo()
        assert bindings() == before
    assert bindings() == before


def test_a_name_that_somebody_else_took_stays_theirs(monkeypatch):
    import open_clip

    class Mine(open_clip.ClipLoss):
        pass

    original = open_clip.ClipLoss
    with patch_open_clip():
        open_clip.ClipLoss = Mine
    assert open_clip.ClipLoss is Mine
    open_clip.ClipLoss = original


def test_instances_pass_isinstance_on_both_sides_of_a_patch():
    import open_clip

    theirs = {name: getattr(open_clip.loss, name) for name in NAMES}
    earlier = {name: make(theirs[name], name) for name in NAMES}
    assert not isinstance(earlier["ClipLoss"], ClipLoss)
    with patch_open_clip():
        for name in NAMES:
            patched = getattr(open_clip.loss, name)
            assert isinstance(earlier[name], patched)
            assert isinstance(make(patched, name), patched)
            assert isinstance(make(patched, name), theirs[name])
            assert not isinstance(torch.nn.Linear(1, 1), patched)
        assert isinstance(earlier["CoCaLoss"], open_clip.ClipLoss)
        assert not isinstance(earlier["SigLipLoss"], open_clip.ClipLoss)
        later = {name: make(getattr(open_clip.loss, name), name) for name in NAMES}
    for name in NAMES:
        assert isinstance(later[name], theirs[name])
        assert isinstance(later[name], getattr(gapkern.losses, name))
        assert not isinstance(earlier[name], getattr(gapkern.losses, name))
        assert type(pickle.loads(pickle.dumps(later[name]))) is type(later[name])
        results(later[name], name)
    assert isinstance(later["CoCaLoss"], theirs["ClipLoss"])
