"""The losses as users call them, and open_clip's classes against open_clip's own."""

import inspect
from types import SimpleNamespace

import pytest
import torch

import gapkern.losses
from gapkern import ClipLoss, CoCaLoss, DistillClipLoss, SigLipLoss, contrastive_loss, patch_open_clip, sigmoid_loss
from gapkern.reference import contrastive as reference
from gapkern.testing import assert_near, assert_three_way
from tests.software_gpu.fixture import on_gpu


def features(n=24, d=16, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(n, d, generator=generator, dtype=torch.float64) for _ in range(2))
    x, y = (torch.nn.functional.normalize(t, dim=1).to(dtype).requires_grad_() for t in (x, y + x))
    return x, y


def gradients(loss, *inputs):
    return [loss.detach(), *torch.autograd.grad(loss, inputs, allow_unused=True)]


@pytest.mark.parametrize("similarity", ["dot", "sqeuclidean"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("memory", ["auto", "recompute", "keep", 1000])
@pytest.mark.parametrize("bias", [False, True])
def test_contrastive_loss_is_its_definition(similarity, reduction, memory, bias):
    x, y = features()
    scale = torch.tensor(10.0, requires_grad=True)
    b = torch.tensor(-3.0, requires_grad=True) if bias else None
    inputs = (x, y, scale, b) if bias else (x, y, scale)
    ours = contrastive_loss(x, y, scale, b, similarity=similarity, reduction=reduction, memory=memory)
    theirs = reference.contrastive_loss(x, y, scale, b, similarity=similarity, reduction=reduction)
    truth_inputs = [t.detach().double().requires_grad_() for t in inputs]
    truth = reference.contrastive_loss(*truth_inputs, similarity=similarity, reduction=reduction)
    assert ours.shape == theirs.shape
    assert ours.dtype == torch.float32
    weights = torch.linspace(0.5, 2, 24) if reduction == "none" else torch.ones(())
    found = [
        gradients((loss * weights.to(loss.dtype)).sum(), *given)
        for loss, given in ((ours, inputs), (theirs, inputs), (truth, truth_inputs))
    ]
    for i, (a, t, c) in enumerate(zip(*found, strict=True)):
        # The gradient of logit_scale is a small difference of large sums.
        assert_three_way(a, t, c, 3e-6 if i < 3 else 1e-5, name=f"output {i}")


def test_gradcheck_of_every_option():
    x, y = (t.detach()[:5, :4].clone().requires_grad_() for t in features(dtype=torch.float64))
    scale, bias = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (3.0, -1.0))
    for options in (
        {},
        {"similarity": "sqeuclidean"},
        {"reduction": "sum"},
        {"reduction": "none"},
        {"memory": "keep"},
        {"memory": "recompute"},
        {"similarity": "sqeuclidean", "memory": "keep", "reduction": "none"},
    ):
        assert torch.autograd.gradcheck(lambda *t, o=options: contrastive_loss(*t, **o), (x, y, scale, bias))
    assert torch.autograd.gradcheck(sigmoid_loss, (x, y, scale, bias))


def test_numbers_do_for_scale_and_bias():
    x, y = features()
    assert torch.equal(contrastive_loss(x, y, 10), contrastive_loss(x, y, torch.tensor(10.0)))
    assert_near(sigmoid_loss(x, y, 10, -5), sigmoid_loss(x, y, torch.tensor([10.0]), torch.tensor(-5.0)), 1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_give_a_float32_loss(dtype):
    x, y = features(dtype=dtype)
    loss = contrastive_loss(x, y, torch.tensor(100.0))
    loss.backward()
    assert loss.dtype == torch.float32
    assert x.grad.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(100, 48), *on_gpu((200, 48), (3000, 512))])
@pytest.mark.parametrize("memory", ["recompute", "keep"])
def test_losses_on_cuda_are_those_of_the_cpu(cuda_device, shape, dtype, memory):
    x, y = features(*shape, dtype=dtype)

    def run(name, x, y):
        x, y = (t.detach().requires_grad_() for t in (x, y))
        losses = {
            "contrastive": lambda: contrastive_loss(x, y, 20.0, memory=memory),
            "euclidean": lambda: contrastive_loss(x, y, 5.0, similarity="sqeuclidean", memory=memory),
            "sigmoid": lambda: sigmoid_loss(x, y, 20.0, -10.0),
        }
        return gradients(losses[name](), x, y)

    for name in ("contrastive", "euclidean", "sigmoid"):
        for a, b in zip(cuda_device.on(run, name, x, y), run(name, x.double(), y.double()), strict=True):
            assert_near(a, b, 1e-4 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("loss", ["ClipLoss", "SigLipLoss", "DistillClipLoss"])
def test_open_clips_classes_on_cuda(cuda_device, loss):
    x, y = features(40, 24)
    teacher = [t.detach() for t in features(40, 24, seed=7)]
    scale, bias = torch.tensor(20.0), torch.tensor(-10.0)
    arguments = {"ClipLoss": (), "SigLipLoss": (bias,), "DistillClipLoss": (*teacher, torch.tensor(30.0))}[loss]

    def run(x, y, scale, *rest):
        x, y, scale = (t.detach().requires_grad_() for t in (x, y, scale))
        value = getattr(gapkern.losses, loss)()(x, y, scale, *rest)
        return gradients(sum(value) if isinstance(value, tuple) else value, x, y, scale)

    found, expected = cuda_device.on(run, x, y, scale, *arguments), run(x, y, scale, *arguments)
    for a, b in zip(found, expected, strict=True):
        assert_near(a, b, 1e-4)


def test_compiles_whole_with_dynamic_batches():
    compiled = torch.compile(ClipLoss(), fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (8, 12, 30):
        x, y = features(n)
        assert_near(compiled(x, y, torch.tensor(10.0)), contrastive_loss(x, y, 10.0), 1e-6)


X, Y = (t.detach() for t in features())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: contrastive_loss(X, Y[:5], 1.0), ValueError, "texts: expected 24 rows as in images"),
        (lambda: contrastive_loss(X, Y[:, :5], 1.0), ValueError, "texts: expected D = 16 as in images"),
        (lambda: contrastive_loss(X[0], Y, 1.0), ValueError, r"images: expected shape \(N, D\), got \(16,\)"),
        (lambda: contrastive_loss(X[:0], Y[:0], 1.0), ValueError, "images: expected at least one row"),
        (lambda: contrastive_loss(X, Y.double(), 1.0), TypeError, "texts: expected torch.float32 as in images"),
        (lambda: contrastive_loss(X.int(), Y, 1.0), TypeError, "images: expected float32"),
        (lambda: contrastive_loss(X, Y, "1"), TypeError, "logit_scale: expected a number, got str"),
        (lambda: contrastive_loss(X, Y, torch.ones(2)), ValueError, "logit_scale: expected one element"),
        (lambda: contrastive_loss(X, Y, 1.0, torch.ones(2)), ValueError, "logit_bias: expected one element"),
        (lambda: contrastive_loss(X, Y, 1.0, similarity="cos"), ValueError, "similarity: expected one of 'dot'"),
        (lambda: contrastive_loss(X, Y, 1.0, reduction="max"), ValueError, "reduction: expected one of 'mean'"),
        (lambda: contrastive_loss(X, Y, 1.0, memory="low"), ValueError, "memory: expected one of 'auto'"),
        (lambda: contrastive_loss(X, Y, 1.0, memory=-1), ValueError, "memory: expected an integer >= 0"),
        (lambda: contrastive_loss(X, Y, 1.0, group=True), RuntimeError, "group: torch.distributed is not initialised"),
        (lambda: sigmoid_loss(X, Y[:5], 1.0, 0.0), ValueError, "texts: expected 24 rows as in images"),
        (lambda: sigmoid_loss(X, Y, 1.0, None), TypeError, "logit_bias: expected a number, got NoneType"),
        (lambda: ClipLoss(use_horovod=True), ValueError, "use_horovod: expected False"),
        (lambda: SigLipLoss(dist_impl="ring"), ValueError, "dist_impl: expected one of 'bidir'"),
        (lambda: ClipLoss(rank=1, world_size=2)(X, Y, torch.tensor(1.0)), RuntimeError, "is not initialised"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.open_clip
@pytest.mark.parametrize("name", ["ClipLoss", "CoCaLoss", "DistillClipLoss", "SigLipLoss"])
def test_signatures_are_open_clips(name):
    import open_clip

    theirs, ours = getattr(open_clip.loss, name), getattr(gapkern.losses, name)
    for method in ("__init__", "forward"):
        expected = inspect.signature(getattr(theirs, method)).parameters
        found = list(inspect.signature(getattr(ours, method)).parameters.values())
        for a, b in zip(expected.values(), found, strict=False):
            assert (a.name, a.default) == (b.name, b.default), (name, method)
        assert len(found) >= len(expected)
        assert all(p.default is not p.empty for p in found[len(expected) :])


@pytest.mark.open_clip
@pytest.mark.parametrize("output_dict", [False, True])
@pytest.mark.parametrize("bias", [None, -10.0])
@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss"])
def test_values_gradients_and_dicts_are_open_clips(name, bias, output_dict):
    import open_clip

    x, y = features()
    scale = torch.tensor(20.0, requires_grad=True)
    bias = None if bias is None else torch.tensor(bias, requires_grad=True)
    results = []
    for owner in (gapkern.losses, open_clip.loss):
        result = getattr(owner, name)()(x, y, scale, bias, output_dict)
        if output_dict:
            assert list(result) == ["contrastive_loss"]
            result = result["contrastive_loss"]
        results.append(gradients(result, x, y, scale))
    for a, b in zip(*results, strict=True):
        assert_near(a, b, 2e-5)


@pytest.mark.open_clip
def test_distillation_is_open_clips():
    import open_clip

    x, y = features()
    teacher = [t.detach() for t in features(seed=7)]
    scale = torch.tensor(20.0, requires_grad=True)
    arguments = (x, y, scale, *teacher, torch.tensor(30.0))
    for key in ("contrastive_loss", "distill_loss"):
        ours = gradients(DistillClipLoss()(*arguments, output_dict=True)[key], x, y, scale)
        theirs = gradients(open_clip.DistillClipLoss()(*arguments, output_dict=True)[key], x, y, scale)
        for a, b in zip(ours, theirs, strict=True):
            assert_near(a, b, 3e-5, name=key)
    for a, b in zip(DistillClipLoss()(*arguments), open_clip.DistillClipLoss()(*arguments), strict=True):
        assert_near(a, b, 1e-5)


def test_distillation_gradcheck():
    x, y = (t.detach()[:5, :4].clone().requires_grad_() for t in features(dtype=torch.float64))
    teacher = [t.detach()[:5, :3] for t in features(seed=7, dtype=torch.float64)]
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *t: sum(DistillClipLoss()(*t, *teacher, torch.tensor(5.0))), (x, y, scale))


@pytest.mark.open_clip
@pytest.mark.parametrize("weight", [0.0, 1.5])
def test_coca_is_open_clips(weight):
    import open_clip

    x, y = features()
    logits = torch.randn(24, 6, 11, requires_grad=True)
    labels = torch.randint(0, 11, (24, 6))
    arguments = (x, y, logits, labels, torch.tensor(20.0))
    ours = CoCaLoss(2.0, weight)(*arguments)
    theirs = open_clip.CoCaLoss(2.0, weight)(*arguments)
    for a, b in zip(ours, theirs, strict=True):
        assert_near(a, b, 1e-5)
    assert list(CoCaLoss(2.0, weight)(*arguments, output_dict=True)) == ["contrastive_loss", "caption_loss"]


ARGUMENTS = SimpleNamespace(
    distill=False,
    model="ViT-B-32",
    siglip=False,
    local_loss=True,
    gather_with_grad=True,
    rank=0,
    world_size=1,
    horovod=False,
    loss_dist_impl=None,
    coca_caption_loss_weight=2.0,
    coca_contrastive_loss_weight=1.0,
)


@pytest.mark.open_clip
@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, ClipLoss),
        ({"distill": True}, DistillClipLoss),
        ({"model": "coca_ViT-B-32"}, CoCaLoss),
        ({"siglip": True}, SigLipLoss),
    ],
)
def test_open_clips_create_loss_returns_ours_while_patched(changed, expected):
    import open_clip
    from open_clip import create_loss  # taken before the patch, as training scripts do

    arguments = SimpleNamespace(**{**vars(ARGUMENTS), **changed})
    assert not isinstance(create_loss(arguments), expected)
    with patch_open_clip():
        assert type(create_loss(arguments)) is expected
        assert type(open_clip.create_loss(arguments)) is expected
    assert type(create_loss(arguments)).__module__ == "open_clip.loss"
    patch = patch_open_clip()
    assert type(create_loss(arguments)) is expected
    patch.undo()
    patch.undo()
    assert type(create_loss(arguments)).__module__ == "open_clip.loss"


@pytest.mark.open_clip
@pytest.mark.parametrize("loss_name", ["ClipLoss", "SigLipLoss"])
def test_fifty_training_steps_of_a_small_model_are_open_clips(loss_name):
    """open_clip's own way of a step: model with output_dict, loss(**output, output_dict=True), backward, step."""
    import open_clip

    def train(loss):
        torch.manual_seed(0)
        model = open_clip.model.CLIP(
            embed_dim=32,
            vision_cfg={"image_size": 8, "patch_size": 4, "layers": 1, "width": 32, "head_width": 16},
            text_cfg={"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1},
            init_logit_bias=-10.0 if loss_name == "SigLipLoss" else None,
            output_dict=True,
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses = []
        for step in range(50):
            generator = torch.Generator().manual_seed(step)
            images = torch.randn(16, 3, 8, 8, generator=generator)
            texts = torch.randint(1, 64, (16, 8), generator=generator)
            output = model(images, texts)
            total = sum(loss(**output, output_dict=True).values())
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            losses.append(total.item())
        return torch.tensor(losses)

    ours, theirs = train(getattr(gapkern.losses, loss_name)()), train(getattr(open_clip.loss, loss_name)())
    assert float((ours - theirs).abs().max()) < 1e-4
    assert ours[-1] < ours[0]
