"""What surrounds a loss: ambient state, precision settings, compilers and exporters, unusual inputs."""

import contextlib
import warnings

import numpy as np
import pytest
import torch

from gapkern import ClipLoss, DistillClipLoss, SigLipLoss, contrastive_loss, sigmoid_loss
from gapkern.losses import inputs
from gapkern.ops import autocast
from gapkern.ops.contrastive import dispatch, lse_pair
from gapkern.ops.contrastive.arguments import LseBackwardArguments
from gapkern.ops.precision import matmul_precision
from gapkern.testing import assert_near
from tests import warm

GENERATOR = torch.Generator().manual_seed(0)
X, Y, A, B = (torch.nn.functional.normalize(torch.randn(40, 16, generator=GENERATOR), dim=1) for _ in range(4))
SCALE, BIAS = torch.tensor(9.0), torch.tensor(-4.0)
LOSSES = {
    "contrastive_loss": lambda x, y, s=SCALE: contrastive_loss(x, y, s, BIAS),
    "sqeuclidean": lambda x, y, s=SCALE: contrastive_loss(x, y, s, similarity="sqeuclidean"),
    "sigmoid_loss": lambda x, y, s=SCALE: sigmoid_loss(x, y, s, BIAS),
    "ClipLoss": lambda x, y, s=SCALE: ClipLoss()(x, y, s),
    "SigLipLoss": lambda x, y, s=SCALE: SigLipLoss()(x, y, s, None),
    "DistillClipLoss": lambda x, y, s=SCALE: sum(DistillClipLoss()(x, y, s, A, B, SCALE)),
}


def value_and_gradients(loss):
    leaves = [t.clone().requires_grad_() for t in (X, Y)]
    value = loss(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


AMBIENT = {
    "default dtype float64": lambda: default_dtype(torch.float64),
    "default dtype float16": lambda: default_dtype(torch.float16),
    "default device meta": lambda: torch.device("meta"),
    "one thread": lambda: threads(1),
}


def state():
    return (
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.get_num_threads(),
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_inference_mode_enabled(),
        torch.get_float32_matmul_precision(),
    )


@pytest.mark.parametrize("ambient", AMBIENT)
@pytest.mark.parametrize("name", LOSSES)
def test_ambient_state_changes_nothing_and_ours_stays_in(name, ambient):
    expected, before = value_and_gradients(LOSSES[name]), state()
    with AMBIENT[ambient]():
        inside = state()
        found = value_and_gradients(LOSSES[name])
        number = LOSSES[name](X, Y, 9)
        assert state() == inside
    assert state() == before
    for a, b in zip(found, expected, strict=True):
        assert a.device.type == "cpu"
        assert a.dtype == b.dtype
        assert_near(a, b, 1e-6)
    assert_near(number, expected[0], 1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_without_gradients_and_from_inference_mode(name):
    expected = value_and_gradients(LOSSES[name])
    leaf = X.clone().requires_grad_()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            value = LOSSES[name](leaf, Y)
        assert torch.equal(value, expected[0])
        assert not value.requires_grad
    with torch.inference_mode():
        frozen = Y.clone()
    LOSSES[name](leaf, frozen).backward()
    assert torch.equal(leaf.grad, expected[1])


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_rounds_the_embeddings_once(name, dtype):
    with torch.autocast("cpu", dtype=dtype):
        found = LOSSES[name](X, Y)
    teacher = [v.to(dtype) for v in (A, B)]
    if name == "DistillClipLoss":
        expected = sum(DistillClipLoss()(X.to(dtype), Y.to(dtype), SCALE, *teacher, SCALE))
    else:
        expected = LOSSES[name](X.to(dtype), Y.to(dtype))
    assert torch.equal(found, expected)
    assert found.dtype == torch.float32


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("first", [True, False])
def test_one_side_in_float64_under_autocast_is_named(name, first):
    x, y = (X.double(), Y) if first else (X, Y.double())
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(TypeError, match="autocast leaves float64 alone"):
        LOSSES[name](x, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = contrastive_loss(X.double(), Y.double(), SCALE)
    assert value.dtype == torch.float64


def test_chunked_products_are_not_autocasts():
    """The kernels of devices without their own, forward and backward."""
    assert not dispatch.uses_sm90(X, "dot")
    forward, backward, sigmoid_loss = (
        autocast.untouched(kernel)
        for kernel in (
            dispatch.contrastive_lse,
            lambda *inputs: dispatch.contrastive_lse_backward(LseBackwardArguments(*inputs)),
            dispatch.sigmoid_loss,
        )
    )
    weights = [torch.linspace(0.5, 1, 40, dtype=torch.float64)] * 3
    results = []
    for lower in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=lower):
            row, col, positive, *saved = forward(X, Y, SCALE, "dot", 0, "highest", 0)
            gradients = backward(*weights, X, Y, SCALE, *saved, "dot", 0, "highest", [True] * 3)
            sigmoid = sigmoid_loss(X, Y, SCALE, BIAS, 0, "highest", [True] * 2)
        results.append([row, col, positive, *gradients, *sigmoid])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


_PRECISION = """
import torch
{setting}
import gapkern
from gapkern.ops.precision import matmul_precision
x, y = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)), torch.eye(64, 32)
exact = gapkern.contrastive_loss(x.double(), y.double(), 9.0)
error = float((gapkern.contrastive_loss(x, y, 9.0) - exact).abs() / exact)
gapkern.sigmoid_loss(x, y, 9.0, 0.0), gapkern.DistillClipLoss()(x, y, torch.tensor(9.0), x, y, torch.tensor(9.0))
print(matmul_precision("cpu"), matmul_precision("cuda"), matmul_precision("xpu"), error < 1e-6)
"""


@pytest.mark.parametrize(
    ("setting", "cpu", "cuda"),
    [
        ("pass", "highest", "highest"),
        ("torch.set_float32_matmul_precision('high')", "high", "high"),
        ("torch.set_float32_matmul_precision('medium')", "medium", "medium"),
        ("torch.backends.cuda.matmul.fp32_precision = 'tf32'", "highest", "high"),
        ("torch.backends.mkldnn.matmul.fp32_precision = 'bf16'", "medium", "highest"),
        ("torch.backends.fp32_precision = 'tf32'", "high", "high"),
        ("torch.backends.fp32_precision = 'ieee'", "highest", "highest"),
        (
            "torch.set_float32_matmul_precision('medium'); torch.backends.mkldnn.matmul.fp32_precision = 'ieee'",
            "highest",
            "medium",
        ),
    ],
)
def test_precision_settings_old_and_new_are_read(setting, cpu, cuda):
    done = warm.run(_PRECISION.format(setting=setting))
    assert done.returncode == 0, done.stderr
    found = done.stdout.split()
    assert found[:2] == [cpu, cuda]
    assert found[3] == "True" or cpu == "medium"  # only "medium" allows a product of bfloat16


def test_high_is_float32():
    results = [lse_pair(X, Y, SCALE, precision=p) for p in ("highest", "high")]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert matmul_precision("cpu") == "highest"


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_numpy_embeddings(name, dtype):
    if name == "DistillClipLoss":
        found = sum(DistillClipLoss()(*(v.numpy().astype(dtype) for v in (X, Y)), 9.0, A.numpy(), B.numpy(), 9.0))
    else:
        found = LOSSES[name](X.numpy().astype(dtype), Y.numpy().astype(dtype)[::-1][::-1])
    to = torch.from_numpy(np.empty(0, dtype)).dtype
    assert torch.equal(found, LOSSES[name](X.to(to), Y.to(to)))


def test_scales_of_every_kind():
    expected = contrastive_loss(X, Y, 9.0)
    for scale in (9, np.float32(9), np.array(9.0), np.array([9]), torch.tensor(9), torch.tensor([[9.0]]), SCALE.half()):
        assert_near(contrastive_loss(X, Y, scale), expected, 1e-7)
    leaf = torch.tensor([9.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(contrastive_loss(X, Y, leaf), leaf)
    assert gradient.shape == (1,)


def test_a_scale_on_the_cpu_goes_to_the_embeddings_device():
    x = X.to("meta").requires_grad_()
    for scale in (torch.tensor(9.0, requires_grad=True), 9.0, torch.tensor(9.0, device="meta")):
        assert inputs.scalar("logit_scale", scale, x).device.type == "meta"
        assert contrastive_loss(x, x, scale, torch.tensor(0.0)).device.type == "meta"
        assert sigmoid_loss(x, x, scale, torch.tensor(0.0)).device.type == "meta"
    for loss in LOSSES.values():
        if loss is not LOSSES["DistillClipLoss"]:
            value = loss(x, x)
            value.backward()
            assert value.shape == ()
            assert x.grad.shape == x.shape


META = torch.tensor(1.0, device="meta")


def nested():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([X[:2], X[:3]])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: contrastive_loss(X, Y, torch.tensor(1.0, device="meta")),
            ValueError,
            "logit_scale: expected device cpu",
        ),
        (
            lambda: sigmoid_loss(X, Y, 1.0, torch.tensor(1.0, device="meta")),
            ValueError,
            "logit_bias: expected device cpu",
        ),
        (lambda: contrastive_loss(X, Y.to("meta"), 1.0), ValueError, "texts: expected device cpu as images, got meta"),
        (lambda: contrastive_loss(X, Y, torch.tensor(True)), TypeError, "logit_scale: expected a real number"),
        (lambda: contrastive_loss(X, Y, torch.tensor(1j)), TypeError, "logit_scale: expected a real number"),
        (lambda: contrastive_loss(X, Y, None), TypeError, "logit_scale: expected a number, got NoneType"),
        (lambda: contrastive_loss(X, Y, np.ones(2)), TypeError, "logit_scale: expected a number, got ndarray"),
        (lambda: contrastive_loss(X.numpy(), Y.double(), 1.0), TypeError, "texts: expected torch.float32 as in images"),
        (lambda: contrastive_loss(X.numpy().astype(int), Y, 1.0), TypeError, "images: expected float16, float32 or"),
        (lambda: contrastive_loss(X.to_sparse(), Y, 1.0), TypeError, "images: expected a dense tensor, got sparse_coo"),
        (lambda: sigmoid_loss(X, nested(), 1.0, 0.0), TypeError, "texts: expected a dense tensor, got a nested tensor"),
        (lambda: ClipLoss()("x", Y, SCALE), TypeError, "image_features: expected a torch.Tensor"),
        (
            lambda: SigLipLoss()(X, Y[:3], SCALE, None),
            ValueError,
            "text_features: expected 40 rows as in image_features",
        ),
    ],
)
def test_unusual_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


class Exported(torch.nn.Module):
    def __init__(self, loss):
        super().__init__()
        self.loss = loss
        self.scale = torch.nn.Parameter(torch.tensor(5.0))

    def forward(self, x, y):
        return self.loss(x, y, self.scale)


EXPORTED = {
    "auto": contrastive_loss,
    "keep": lambda x, y, s: contrastive_loss(x, y, s, memory="keep"),
    "bytes": lambda x, y, s: contrastive_loss(x, y, s, memory=900),
    "none": lambda x, y, s: contrastive_loss(x, y, s, reduction="none", similarity="sqeuclidean"),
    "sigmoid": lambda x, y, s: sigmoid_loss(x, y, s, -3.0),
    "ClipLoss": ClipLoss(),
    "SigLipLoss": lambda x, y, s, loss=SigLipLoss(): loss(x, y, s, torch.tensor(-3.0)),  # noqa: B008
    "DistillClipLoss": lambda x, y, s, loss=DistillClipLoss(): sum(loss(x, y, s, x / 2, y, s)),  # noqa: B008
}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", EXPORTED)
def test_exports_with_a_dynamic_batch(name, strict):
    batch = torch.export.Dim("batch", min=2, max=10**6)
    module = Exported(EXPORTED[name])
    shapes = ({0: batch}, {0: batch})
    program = torch.export.export(module, (X[:12], Y[:12]), dynamic_shapes=shapes, strict=strict).module()
    for n in (2, 12, 40):
        assert torch.equal(program(X[:n], Y[:n]), module(X[:n], Y[:n]))


@pytest.mark.parametrize("name", ["contrastive_loss", "sigmoid_loss", "ClipLoss", "DistillClipLoss"])
def test_a_scale_that_is_a_number_and_changes_compiles_twice_at_most(name):
    torch._dynamo.reset()
    graphs = []

    def backend(graph, example):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example)

    loss = LOSSES[name]
    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    for scale in (2.0, 3.5, 4.25, 10.0, 0.125, 77.0, 5.5, 6.5, 7.5, 8.5, 9.5):
        leaves = [t.clone().requires_grad_() for t in (X, Y)]
        found, expected = compiled(*leaves, scale), loss(*leaves, scale)
        assert torch.equal(found, expected)
        for a, b in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True):
            assert torch.equal(a, b)
    assert len(graphs) <= 2
