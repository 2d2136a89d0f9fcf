"""Distillation: open_clip's formula in float64 is the truth, whatever autocast and cancellation would make of it."""

import pytest
import torch

from gapkern import DistillClipLoss
from gapkern.ops import distill
from gapkern.testing import assert_near
from tests.warm import peak_memory


def unit(n, d, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(n, d, generator=generator, dtype=torch.float64), dim=1).to(dtype)


def definition(x, y, s, a, b, t):
    """The distillation's value in float64."""
    logits, targets = s.double() * (x.double() @ y.double().T), t.double() * (a.double() @ b.double().T)
    both = ((targets, logits), (targets.T, logits.T))
    return sum(-(r.softmax(1) * q.log_softmax(1)).sum(1).mean() for r, q in both) / 2


def value_and_gradients(loss, x, y, s, *teacher):
    leaves = [v.detach().clone().requires_grad_() for v in (x, y, s)]
    value = loss(*leaves, *teacher)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def distilled(*arguments):
    return DistillClipLoss()(*arguments)[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 20.0, 100.0])
def test_a_student_that_is_its_teacher(dtype, scale):
    x = unit(40, 16, 0, dtype)
    y = (x.float() + 0.1 * unit(40, 16, 1)).to(dtype)
    s = torch.tensor(scale)
    value, *gradients = value_and_gradients(distilled, x, y, s, x, y, s)
    truth = float(definition(x, y, s, x, y, s))
    assert abs(float(value) - truth) <= 3e-5 * truth  # logits of 100 have 1e-5 of rounding in float32
    for gradient in gradients:
        assert not gradient.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("features", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("same", [True, False])
def test_autocast_rounds_the_features_and_nothing_else(dtype, features, same):
    x, y = unit(64, 32, 0, features), unit(64, 32, 0, features)
    a, b = (x, y) if same else (unit(64, 24, 2, features), unit(64, 24, 3, features))
    s, t = torch.tensor(80.0), torch.tensor(80.0 if same else 9.0)
    with torch.autocast("cpu", dtype=dtype):
        found = value_and_gradients(distilled, x, y, s, a, b, t)
        contrastive = DistillClipLoss()(x, y, s, a, b, t)[0]
    rounded = [v.to(dtype) for v in (x, y, a, b)]
    truth = value_and_gradients(definition, *(v.double() for v in rounded[:2]), s, *rounded[2:], t)
    assert_near(found[0], truth[0], 3e-5)
    labels = torch.arange(64)
    logits = s.double() * rounded[0].double() @ rounded[1].double().T
    crossed = sum(torch.nn.functional.cross_entropy(v, labels) for v in (logits, logits.T)) / 2
    assert float((contrastive - crossed).abs()) < 1e-6 * max(1, float(crossed))
    for gradient, expected in zip(found[1:], truth[1:], strict=True):
        if same:
            assert float((gradient.double() - expected).abs().max()) < 1e-9
        else:
            assert_near(gradient, expected, 6e-3)


def test_backward_inside_autocast_is_the_same():
    x, y, a, b = (unit(30, 16, seed) for seed in range(4))
    s = torch.tensor(20.0)
    results = []
    for inside in (False, True):
        leaves = [v.clone().requires_grad_() for v in (x, y)]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = distilled(*leaves, s, a, b, s)
            if inside:
                value.backward()
        if not inside:
            value.backward()
        results.append([v.grad for v in leaves])
    assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))


@pytest.mark.parametrize("scale", [0.1, 10.0, 100.0, 1000.0])
def test_any_scale_against_float64(scale):
    x, y, a, b = unit(70, 24, 0), unit(70, 24, 1), unit(70, 12, 2), unit(70, 12, 3)
    s, t = torch.tensor(scale), torch.tensor(scale / 2)
    found = value_and_gradients(distilled, x, y, s, a, b, t)
    truth = value_and_gradients(definition, x.double(), y.double(), s.double(), a, b, t)
    for ours, expected, margin in zip(found, truth, (1e-6, 3e-5, 3e-5, 1e-6), strict=True):
        assert_near(ours, expected, margin)


def test_chunks_of_rows_change_nothing(monkeypatch):
    arguments = [unit(50, 8, seed, torch.float64) for seed in range(2)] + [torch.tensor(9.0).double()]
    teacher = [unit(50, 6, seed, torch.float64) for seed in (5, 6)] + [torch.tensor(4.0).double()]
    whole = value_and_gradients(distilled, *arguments, *teacher)
    monkeypatch.setattr(distill, "CHUNK_ELEMENTS", 7 * 50)
    for ours, expected in zip(value_and_gradients(distilled, *arguments, *teacher), whole, strict=True):
        assert_near(ours, expected, 1e-13)


def test_a_teacher_from_inference_mode_and_of_another_dtype():
    x, y = (v.requires_grad_() for v in (unit(20, 8, 0), unit(20, 8, 1)))
    with torch.inference_mode():
        teacher = unit(20, 5, 2, torch.float64), unit(20, 5, 3, torch.float64)
    value = distilled(x, y, torch.tensor(5.0), *teacher, torch.tensor(3.0))
    value.backward()
    assert_near(value, definition(x, y, torch.tensor(5.0), *teacher, torch.tensor(3.0)), 1e-6)
    assert x.grad.isfinite().all()


def test_memory_grows_linearly():
    setup = (
        "import torch, gapkern\ntorch.set_num_threads(1)\n"
        "gapkern.losses.steps.AUTO_BYTES = 0\n"  # what the contrastive part may keep
        "def run(n):\n"
        "    v = [torch.nn.functional.normalize(torch.randn(n, 8), dim=1).requires_grad_() for _ in range(4)]\n"
        "    s = torch.tensor(9.0)\n"
        "    gapkern.DistillClipLoss()(v[0], v[1], s, v[2], v[3], s)[1].backward()\n"
        "run(64)\n"
    )
    assert peak_memory("run(9000)", setup=setup) < 250  # one matrix of logits has 309 MiB


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ((unit(5, 4, 0), unit(5, 4, 0)), "dist_image_features: expected 6 rows as in image_features"),
        ((unit(6, 4, 0), unit(6, 3, 0)), "dist_text_features: expected D = 4 as in dist_image_features"),
        ((unit(6, 4, 0)[:0], unit(6, 4, 0)), "dist_image_features: expected at least one row"),
    ],
)
def test_a_bad_teacher_is_named(teacher, message):
    x, s = unit(6, 4, 1), torch.tensor(1.0)
    with pytest.raises(ValueError, match=message):
        DistillClipLoss()(x, x, s, *teacher, s)


def test_operators_are_sound():
    x, y, a, b = (unit(6, 4, seed, torch.float64) for seed in range(4))
    s = torch.tensor(3.0).double()
    student = [v.requires_grad_() for v in (x, y, s.clone())]
    stats = [*distill.stats(*student), *distill.stats(a, b, s)]
    torch.library.opcheck(torch.ops.gapkern.distill_stats, (a, b, s))
    torch.library.opcheck(torch.ops.gapkern.distill_cross, (*student, a, b, s, *stats))
    assert torch.autograd.gradcheck(
        lambda *t: distill.cross(t, (a, b, s), distill.stats(*t), distill.stats(a, b, s)), student
    )
