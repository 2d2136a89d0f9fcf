"""Forward mode, torch.func's transforms and second derivatives of every operator: right, or refused in words."""

import pytest
import torch
from torch import func
from torch.autograd import forward_ad

from gapkern import ClipLoss, DistillClipLoss, SigLipLoss, contrastive_loss, sigmoid_loss
from gapkern.ops import derivatives
from gapkern.reference import contrastive as reference
from gapkern.testing import assert_near

OPS = torch.ops.gapkern
TWICE = "can be differentiated once; double backward"


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X, Y, SCALE, BIAS, SHIFT = (
    draw(6, 4),
    draw(6, 4, seed=1),
    torch.tensor(1.7).double(),
    torch.tensor(-0.4).double(),
    draw(4),
)


def normalised(v):
    return v / v.norm(dim=1, keepdim=True)


NOISE = OPS.perturb_noise(X, "gaussian", 0.1, 1, 2, 0) - X
TEACHER = draw(6, 3, seed=5), draw(6, 3, seed=6), torch.tensor(2.0).double()


def distillation(x, y, s):
    logits, targets = s * x @ y.T, TEACHER[2] * TEACHER[0] @ TEACHER[1].T
    both = ((targets, logits), (targets.T, logits.T))
    return sum(-(t.softmax(1) * v.log_softmax(1)).sum(1).mean() for t, v in both) / 2


# name: ours, the definition, inputs
CASES = {
    "contrastive_loss": (contrastive_loss, reference.contrastive_loss, (X, Y, SCALE)),
    "sqeuclidean": (
        lambda *t: contrastive_loss(*t, similarity="sqeuclidean"),
        lambda *t: reference.contrastive_loss(*t, similarity="sqeuclidean"),
        (X, Y, SCALE),
    ),
    "none": (
        lambda *t: contrastive_loss(*t, reduction="none", memory="keep"),
        lambda *t: reference.contrastive_loss(*t, reduction="none"),
        (X, Y, SCALE),
    ),
    "sigmoid_loss": (sigmoid_loss, lambda *t: reference.sigmoid_sum(*t) / 6, (X, Y, SCALE, BIAS)),
    "ClipLoss": (ClipLoss(), reference.contrastive_loss, (X, Y, SCALE)),
    "SigLipLoss": (SigLipLoss(), lambda *t: reference.sigmoid_sum(*t) / 6, (X, Y, SCALE, BIAS)),
    "meanshift_sum": (OPS.meanshift_sum, lambda x: x.sum(0), (X,)),
    "meanshift_gram": (OPS.meanshift_gram, lambda x, m: (x - m).T @ (x - m), (X, SHIFT)),
    "meanshift_apply": (lambda x, s: OPS.meanshift_apply(x, s, True), lambda x, s: normalised(x + s), (X, SHIFT)),
    "without norms": (lambda x, s: OPS.meanshift_apply(x, s, False), lambda x, s: x + s, (X, SHIFT)),
    "perturb_noise": (lambda x: OPS.perturb_noise(x, "gaussian", 0.1, 1, 2, 0), lambda x: x + NOISE, (X,)),
    "before": (
        lambda x, s: OPS.perturb_noisy_gallery(x, s, "gaussian", 0.1, 1, 2, 0, True, "before"),
        lambda x, s: normalised(x + NOISE + s),
        (X, SHIFT),
    ),
    "after": (
        lambda x, s: OPS.perturb_noisy_gallery(x, s, "gaussian", 0.1, 1, 2, 0, True, "after"),
        lambda x, s: normalised(x + s) + NOISE,
        (X, SHIFT),
    ),
}
REVERSE = {"distillation": (lambda *t: DistillClipLoss()(*t, *TEACHER)[1], distillation, (X, Y, SCALE))}


def tangents(inputs):
    return tuple(draw(*t.shape, seed=9 + i) for i, t in enumerate(inputs))


def dual(f, inputs):
    with forward_ad.dual_level():
        pairs = zip(inputs, tangents(inputs), strict=True)
        return forward_ad.unpack_dual(f(*(forward_ad.make_dual(t, d) for t, d in pairs))).tangent


def every(inputs):
    return tuple(range(len(inputs)))


def first_alone(f, inputs):
    return func.jvp(lambda x: f(x, *inputs[1:]), inputs[:1], tangents(inputs)[:1])[1]


def examples(f, inputs):
    return func.vmap(f, in_dims=(0, *(None,) * (len(inputs) - 1)))(torch.stack([inputs[0]] * 3), *inputs[1:])


def total(f):
    return lambda *t: f(*t).sum()


FORWARD = {
    "jvp": lambda f, t: func.jvp(f, t, tangents(t))[1],
    "jvp of one input": first_alone,
    "jacfwd": lambda f, t: func.jacfwd(f, every(t))(*t),
    "dual tensors": dual,
    "jvp without grad": lambda f, t: torch.no_grad()(lambda: func.jvp(f, t, tangents(t))[1])(),
    "grad of jvp": lambda f, t: func.grad(lambda *a: func.jvp(f, a, tangents(t))[1].sum(), every(t))(*t),
}
BACKWARD = {
    "grad": lambda f, t: func.grad(total(f), every(t))(*t),
    "vjp": lambda f, t: func.vjp(total(f), *t)[1](torch.tensor(2.0).double()),
    "jacrev": lambda f, t: func.jacrev(f, every(t))(*t),
    "vmap": examples,
    "vmap of grad": lambda f, t: examples(func.grad(total(f), every(t)), t),
    "grad of vmap": lambda f, t: func.grad(lambda *a: examples(f, a).sum(), every(t))(*t),
}


def same(ours, truth):
    ours, truth = (v if isinstance(v, tuple) else (v,) for v in (ours, truth))
    for a, b in zip(ours, truth, strict=True):
        assert a.shape == b.shape
        assert_near(a.detach(), b.detach(), 1e-10)


@pytest.mark.parametrize("name", CASES)
def test_transforms_are_those_of_the_definition(name):
    ours, truth, inputs = CASES[name]
    for transform in (FORWARD | BACKWARD).values():
        same(transform(ours, inputs), transform(truth, inputs))


def test_distillation_in_reverse_mode_and_no_other():
    ours, truth, inputs = REVERSE["distillation"]
    for transform in BACKWARD.values():
        same(transform(ours, inputs), transform(truth, inputs))
    for name in ("jvp", "jacfwd", "dual tensors"):
        with pytest.raises(RuntimeError, match="gapkern: distill_cross has no forward-mode derivative"):
            FORWARD[name](ours, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_mode_in_low_precision(dtype):
    inputs = [t.to(dtype) for t in (X, Y)]
    moved = [t.to(dtype) for t in tangents((X, Y))]
    for ours, truth in (
        (lambda x, y: contrastive_loss(x, y, 3.0), lambda x, y: reference.contrastive_loss(x, y, 3.0)),
        (lambda x, y: sigmoid_loss(x, y, 3.0, -1.0), lambda x, y: reference.sigmoid_sum(x, y, 3.0, -1.0) / 6),
    ):
        found = func.jvp(ours, tuple(inputs), tuple(moved))[1]
        expected = func.jvp(truth, tuple(t.double() for t in inputs), tuple(t.double() for t in moved))[1]
        assert found.dtype == torch.float32
        assert_near(found, expected, 2e-6)


@pytest.mark.parametrize(
    "name", ["contrastive_loss", "sqeuclidean", "sigmoid_loss", "ClipLoss", "SigLipLoss", "distillation"]
)
def test_second_derivatives_are_refused_at_the_same_moment_in_the_same_words(name):
    loss, _, inputs = (CASES | REVERSE)[name]
    leaves = [t.clone().requires_grad_() for t in inputs]
    value = loss(*leaves)
    gradients = torch.autograd.grad(value, leaves, create_graph=True)
    for gradient in gradients:
        with pytest.raises(RuntimeError, match=TWICE):
            torch.autograd.grad(gradient.sum(), leaves, retain_graph=True)
    for second in (
        lambda: func.hessian(loss)(*inputs),
        lambda: func.jacrev(func.jacrev(loss))(*inputs),
        lambda: func.grad(lambda x: func.grad(loss)(x, *inputs[1:]).sum())(inputs[0]),
        lambda: func.jvp(func.grad(loss), inputs, tangents(inputs)),
    ):
        with pytest.raises(RuntimeError, match=f"{TWICE}|gapkern: distill_cross has no forward-mode derivative"):
            second()


@pytest.mark.parametrize("transform", ["jvp", "dual tensors", "grad"])
@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("robustness", lambda x: OPS.robustness_nearest(x.float(), x.float(), x.float().mean(0))[1]),
        ("robustness", lambda x: OPS.robustness_exact(x.abs(), torch.zeros(6, 1, dtype=torch.int64), 0.1, 4)),
        ("perturb_quantize", lambda x: OPS.perturb_quantize(X, x.amin(0), x.amax(0), 4)),
    ],
)
def test_what_has_no_derivative_says_so(name, call, transform):
    with pytest.raises(RuntimeError, match=f"gapkern: {name}.*(not differentiable|no derivative)"):
        (FORWARD | BACKWARD)[transform](call, (X,))


def test_steps_and_bits_are_constant():
    low, high = X.amin(0), X.amax(0)
    value, tangent = func.jvp(lambda x: OPS.perturb_quantize(x, low, high, 4), (X,), tangents((X,)))
    assert torch.equal(value, OPS.perturb_quantize(X, low, high, 4))
    assert not tangent.any()
    assert torch.equal(func.vmap(lambda x: OPS.perturb_bits(x, 1, 2, 0))(X[None])[0], OPS.perturb_bits(X, 1, 2, 0))


def test_every_operator_has_its_rules():
    """None is left to PyTorch's default, which loses tangents without a word."""
    names = {n.split("::")[1].split(".")[0] for n in torch._C._dispatch_get_all_op_names() if n.startswith("gapkern::")}
    assert {"contrastive_lse", "ranks_gather", "distill_cross", "robustness_nearest"} <= names
    for name in names:
        if not any("Tensor" in str(a.type) for a in getattr(OPS, name).default._schema.arguments):
            continue  # of no tensor there is nothing to differentiate
        for key in ("Autograd", "FuncTorchBatched"):
            registered = torch._C._dispatch_has_kernel_for_dispatch_key(f"gapkern::{name}", key) or (
                key == "Autograd" and torch._C._dispatch_has_kernel_for_dispatch_key(f"gapkern::{name}", "AutogradCPU")
            )
            assert registered, (name, key)
    assert derivatives.TWICE.startswith("gapkern")
