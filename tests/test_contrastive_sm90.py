"""The losses on Hopper: their orchestration here, with PyTorch's operations as steps, and the kernels there."""

import math

import pytest
import torch

from gapkern import cli
from gapkern.ops.contrastive import chunked, dispatch, lse_pair, sm90
from gapkern.ops.contrastive.arguments import LseBackwardArguments
from gapkern.reference import contrastive as reference
from gapkern.testing import assert_near, assert_three_way
from tests.software_gpu.fixture import on_gpu

NAMES = ("row_lse", "col_lse", "positive", "grad_images", "grad_texts", "grad_logit_scale")
SHAPES = [(1, 1, 8), (3, 9, 16), (127, 129, 64), (128, 256, 64), (300, 517, 72), (515, 515, 136)]
# What rounding dS and the results once costs; statistics are never rounded.
ROUNDING = {torch.bfloat16: 5e-3, torch.float16: 7e-4, torch.float32: 5e-3}


def pair(n, m, d, dtype, device="cpu", size=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(rows, d, generator=generator, dtype=torch.float64) for rows in (n, m))
    y[:n] += x[: len(y[:n])]
    return [(size * v / v.norm(dim=1, keepdim=True)).to(dtype).to(device) for v in (x, y)]


def weights(row, col, positive):
    """Gradients of the three statistics that differ by element, so that no error cancels; both signs, and zeros."""
    weighted = [
        torch.linspace(0.5, 1.5, len(v), dtype=torch.float64, device=v.device) * w / len(v)
        for v, w in ((row, 1.0), (col, -0.7), (positive, -1.3))
    ]
    weighted[1][::3] = 0
    return weighted


def steps(x, y, scale, offset=0, work_bytes=0, needs=(True,) * 3, module=sm90, similarity="dot", precision="highest"):
    """Statistics and gradients by this module's functions, without the dispatcher's choice."""
    row, col, positive, *stats = module.contrastive_lse(x, y, scale, similarity, offset, precision, work_bytes)
    arguments = (*weights(row, col, positive), x, y, scale, *stats, similarity, offset, precision, list(needs))
    gradients = module.contrastive_lse_backward(LseBackwardArguments(*arguments))
    return [row, col, positive, *gradients]


def by_autograd(function, x, y, scale, offset=0, **options):
    inputs = [t.detach().clone().requires_grad_() for t in (x, y, scale)]
    statistics = function(*inputs, label_offset=offset, **options)
    total = sum((v.double() * w).sum() for v, w in zip(statistics, weights(*statistics), strict=True))
    return [*(v.detach() for v in statistics), *torch.autograd.grad(total, inputs)]


def check(ours, x, y, scale, offset, names=NAMES, **options):
    truth = by_autograd(reference.lse_pair, x.double(), y.double(), scale.double(), offset, **options)
    single = by_autograd(reference.lse_pair, x.float(), y.float(), scale.float(), offset, **options)
    for name, a, b, c in zip(NAMES, ours, single, truth, strict=True):
        if name in names:
            # The scale's gradient is a sum of both signs: a share of what is summed, not of the sum.
            margin = ROUNDING[x.dtype] if name.startswith("grad") else 5e-6
            assert_three_way(a.reshape(c.shape), b, c, margin * (10 if name == NAMES[-1] else 1), name=name)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("work_bytes", [0, 2**40])
def test_orchestration_against_float64(poisoned, shape, dtype, work_bytes):
    n, m, d = shape
    x, y = pair(n, m, d, dtype)
    scale, offset = torch.tensor(14.3), (m - n) // 2
    check(steps(x, y, scale, offset, work_bytes), x, y, scale, offset)


@pytest.mark.parametrize("scale", [1.0, 30.0, 100.0])
@pytest.mark.parametrize("size", [1.0, 5.0, 20.0])
@pytest.mark.parametrize("work_bytes", [0, 2**40])
def test_orchestration_at_any_scale_and_norm(scale, size, work_bytes):
    x, y = pair(140, 270, 32, torch.bfloat16, size=size)
    scale = torch.tensor(scale)
    check(steps(x, y, scale, 3, work_bytes), x, y, scale, 3)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("scale", "size"), [(1.0, 1.0), (14.3, 1.0), (100.0, 1.0), (30.0, 5.0), (-2.0, 3.0)])
@pytest.mark.parametrize("work_bytes", [0, 2**40])
def test_euclidean_orchestration(poisoned, shape, scale, size, work_bytes):
    n, m, d = shape
    x, y = pair(n, m, d, torch.bfloat16, size=size)
    scale, offset = torch.tensor(scale), (m - n) // 2
    ours = steps(x, y, scale, offset, work_bytes, similarity="sqeuclidean")
    check(ours, x, y, scale, offset, similarity="sqeuclidean")


def test_euclidean_distances_near_nothing():
    """Rows that differ by a thousandth of their norm, far from the origin: differences, not cancelled norms."""
    x, y = pair(40, 40, 64, torch.float64)
    x, y = ((100 + v).bfloat16() for v in (x, y))
    row, _, positive, *_ = steps(x, y, torch.tensor(0.5), similarity="sqeuclidean")
    distances = torch.cdist(x.double(), y.double()).square()
    assert_near(positive, -distances.diagonal() / 2, 1e-7)
    cancelled = 2.0**-22 * float(x.double().square().sum(1).max())  # of the others' logits
    assert float((row - (-distances / 2).logsumexp(1)).abs().max()) < cancelled


def test_orchestration_in_blocks_some_of_them_kept(monkeypatch):
    x, y = pair(700, 705, 24, torch.bfloat16)
    scale = torch.tensor(20.0)
    whole = steps(x, y, scale, 2)
    monkeypatch.setattr(sm90, "SUPER_ROWS", 256)
    monkeypatch.setattr(sm90, "GRADIENT_ELEMENTS", 150 * 705)
    work_bytes = 200 * 4 * 705
    kept = sm90.contrastive_lse(x, y, scale, "dot", 2, "highest", work_bytes)[-1]
    assert kept.shape == (200, 705)
    assert sm90._exponentials(kept, x, y).shape == (384, 712)  # three tiles of bfloat16 in 200 rows of float32
    for name, a, b in zip(NAMES, steps(x, y, scale, 2, work_bytes), whole, strict=True):
        assert_near(a, b, 5e-3 if name.startswith("grad") else 1e-12, name=name)


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)])
def test_orchestration_forms_only_what_is_needed(needs):
    x, y = pair(40, 44, 16, torch.bfloat16)
    scale = torch.tensor(10.0)
    every, some = steps(x, y, scale), steps(x, y, scale, needs=needs)
    for wanted, a, b in zip(needs, some[3:], every[3:], strict=True):
        assert a.numel() == (b.numel() if wanted else 0)
        if wanted:
            assert_near(a, b, 1e-2)


def rounded(*values):
    """float32 embeddings as the products see them."""
    return [v.bfloat16().float() for v in values]


@pytest.mark.parametrize("work_bytes", [0, 2**40])
def test_float32_is_rounded_once_and_has_float32_gradients(poisoned, work_bytes):
    x, y = pair(130, 270, 72, torch.float32)
    scale = torch.tensor(14.3)
    ours = steps(x, y, scale, 5, work_bytes, precision="medium")
    assert [g.dtype for g in ours[3:5]] == [torch.float32] * 2
    assert any(not torch.equal(g, g.bfloat16().float()) for g in ours[3:5])
    check(ours, *rounded(x, y), scale, 5)


def sigmoid_steps(x, y, scale, bias, offset=0, needs=(True, True), module=sm90):
    return list(module.sigmoid_loss(x, y, scale, bias, offset, "medium", list(needs)))


def check_sigmoid(ours, x, y, scale, bias, offset):
    """Loss and gradients, in the operator's order."""
    inputs = [t.detach().double().requires_grad_() for t in (x, y, scale, bias)]
    truth = reference.sigmoid_sum(*inputs, label_offset=offset)
    gradients = torch.autograd.grad(truth, inputs)
    size = float(truth.detach())
    assert_near(ours[0], truth.detach(), 2e-5, name="loss")
    for name, a, b in zip(("images", "texts"), ours[1:3], gradients, strict=False):
        assert a.dtype == torch.float32
        assert_near(a, b, ROUNDING[x.dtype], name=name)
    # Sums of both signs, of float32 values that were not rounded: a share of the loss.
    for name, a, b in zip(("logit_scale", "logit_bias"), ours[3:], gradients[2:], strict=True):
        assert abs(float(a) - float(b)) <= 2e-5 * (size + abs(float(b))), name


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("side", [-1, 0, 1])
def test_sigmoid_orchestration_against_float64(poisoned, shape, dtype, side):
    n, m, d = shape
    x, y = pair(n, m, d, dtype)
    scale, bias, offset = torch.tensor(14.3), torch.tensor(-6.0), side * (n // 2 + 1)
    ours = sigmoid_steps(x, y, scale, bias, offset)
    check_sigmoid(ours, *(rounded(x, y) if dtype == torch.float32 else (x, y)), scale, bias, offset)


def test_sigmoid_orchestration_in_blocks_forms_only_what_is_needed(monkeypatch):
    x, y = pair(700, 705, 24, torch.bfloat16)
    scale, bias = torch.tensor(10.0), torch.tensor(-5.0)
    whole = sigmoid_steps(x, y, scale, bias, 3)
    monkeypatch.setattr(sm90, "GRADIENT_ELEMENTS", 150 * 705)
    for needs in ((True, True), (True, False), (False, True), (False, False)):
        some = sigmoid_steps(x, y, scale, bias, 3, needs)
        for wanted, a, b in zip((True, *needs, True, True), some, whole, strict=True):
            assert a.numel() == (b.numel() if wanted else 0)
            if wanted:
                assert_near(a, b, 1e-5)


def test_sigmoid_results_are_what_the_fake_kernel_says():
    x, y = pair(12, 14, 8, torch.bfloat16)
    scale, bias = torch.tensor(10.0), torch.tensor(-5.0)
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        fake = torch.ops.gapkern.sigmoid_loss(
            *(mode.from_tensor(t) for t in (x, y, scale, bias)), 0, "highest", [True, False]
        )
    for a, b in zip(sigmoid_steps(x, y, scale, bias, needs=(True, False)), fake, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


def test_rows_of_a_gradient_block():
    assert [sm90._gradient_rows(32768, 32768, d) for d in (512, 768, 1024)] == [8448, 5632, 8448]
    assert sm90._gradient_rows(300, 517, 72) == 300
    assert sm90._gradient_rows(10**6, 2 * 10**6, 768) == 512
    assert sm90._gradient_rows(10**7, 10**7, 768) == 256
    # 2 GiB of dS; clusters of two tiles leave none over.
    assert sm90._gradient_rows(262_144, 262_144, 512) == 4096
    for m in (32768, 65536, 100_000, 262_144, 500_000):
        for d in (8, 512, 768, 1024):
            assert sm90._gradient_rows(10**7, m, d) % 256 == 0


@pytest.mark.parametrize("side", ["row", "column"])
def test_one_separate_weight_leaves_the_others_common(side):
    x, y = pair(20, 30, 16, torch.bfloat16)
    ops, scale, ones = torch.ops.gapkern, torch.tensor(5.0), [torch.ones(20), torch.ones(30)]
    control = ops.contrastive_sm90_shift(*ones, scale)
    logits = 5 * (x.double() @ y.double().T)
    lse2 = [logits.logsumexp(i) / math.log(2) for i in (1, 0)]
    grads = [v.double() for v in ones]
    grads[side == "column"][3] = -1e-70
    *weights, separate = ops.contrastive_sm90_weights(*lse2, *grads, control)
    tags = [w.view(torch.int32) & 1 for w in weights]
    assert separate == 1
    assert [int(t.sum()) for t in tags] == ([1, 0] if side == "row" else [0, 1])
    assert tags[side == "column"][3]
    assert (weights[1].shape, int(weights[1][30:].count_nonzero())) == ((256,), 0)
    label = torch.arange(20)
    truth = sum(
        g * (logits - v * math.log(2)).exp() for g, v in ((grads[0][:, None], lse2[0][:, None]), (grads[1], lse2[1]))
    )
    truth[label, label] = torch.linspace(-1, 1, 20, dtype=torch.float64)
    for kept in (x.new_empty(0, 32), torch.zeros(20, 32, dtype=torch.bfloat16)):  # flushed ones are not used
        ds = ops.contrastive_sm90_gradient(x, y, control, separate, *weights, kept, truth.diagonal(), 0)
        assert_near(ds[:, :30], truth, 4e-3)


def test_not_a_number_reaches_the_results():
    x, y = pair(12, 12, 8, torch.bfloat16)
    x[4, 2] = math.nan
    row, col, *_ = steps(x, y, torch.tensor(2.0))
    assert row.isnan().tolist() == [i == 4 for i in range(12)]
    assert col.isnan().all()


def test_the_environment_chooses(monkeypatch):
    x = torch.ones(2, 8, dtype=torch.bfloat16)
    for kernel in ("auto", "chunked", "sm90"):
        monkeypatch.setenv("GAPKERN_KERNEL", kernel)
        dispatch.requested_kernel.cache_clear()
        assert dispatch.requested_kernel() == kernel
        assert not dispatch.uses_sm90(x, "dot")  # on the CPU its own kernels run
    monkeypatch.setenv("GAPKERN_KERNEL", "fast")
    dispatch.requested_kernel.cache_clear()
    with pytest.raises(ValueError, match="GAPKERN_KERNEL: expected auto, chunked or sm90, got 'fast'"):
        dispatch.uses_sm90(x, "dot")
    monkeypatch.undo()
    dispatch.requested_kernel.cache_clear()


def test_reasons(monkeypatch):
    assert "CUDA device" in dispatch.unsupported_reason(torch.device("cpu"), torch.bfloat16, 8)
    monkeypatch.setattr(dispatch, "built", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    device = torch.device("cuda", 0)
    assert dispatch.unsupported_reason(device, torch.bfloat16, 8) == ""
    for precision in ("highest", "medium"):
        assert dispatch.unsupported_reason(device, torch.float32, 8, precision=precision) == ""
    assert "with matmul precision 'medium'" in dispatch.unsupported_reason(device, torch.float32, 8, "sqeuclidean")
    assert dispatch.unsupported_reason(device, torch.float32, 8, "sqeuclidean", "medium") == ""
    assert "got 'high'" in dispatch.unsupported_reason(device, torch.float32, 8, precision="high")
    assert "got float64" in dispatch.unsupported_reason(device, torch.float64, 8, precision="medium")
    assert "multiple of 8, got 12" in dispatch.unsupported_reason(device, torch.float16, 12)
    assert dispatch.unsupported_reason(device, torch.bfloat16, 16, "sqeuclidean") == ""
    assert "sqeuclidean" in dispatch.unsupported_reason(device, torch.float16, 16, "sqeuclidean")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    assert "got 8.0" in dispatch.unsupported_reason(device, torch.bfloat16, 8)


def test_the_dispatcher_reads_the_precision(monkeypatch):
    taken = []
    for name in ("contrastive_lse", "contrastive_lse_backward", "sigmoid_loss"):
        monkeypatch.setattr(sm90, name, lambda *_, name=name: taken.append(name))
        monkeypatch.setattr(chunked, name, lambda *_: taken.append("chunked"))
    monkeypatch.setattr(dispatch, "requested_kernel", lambda: "auto")
    seen = []

    def unsupported_reason(device, dtype, dims, similarity, precision):
        seen.append((dtype, dims, similarity, precision))
        return "" if precision == "medium" else "precision"

    monkeypatch.setattr(dispatch, "unsupported_reason", unsupported_reason)
    x, y, v = torch.ones(3, 8), torch.ones(5, 8), torch.ones(1)
    for precision in ("medium", "highest"):
        dispatch.contrastive_lse(x, y, v, "dot", 1, precision, 0)
        backward = LseBackwardArguments(v, v, v, x, y, v, v, v, v, "dot", 1, precision, [True] * 3)
        dispatch.contrastive_lse_backward(backward)
        dispatch.sigmoid_loss(x, y, v, v, 0, precision, [True] * 2)
    assert taken == ["contrastive_lse", "contrastive_lse_backward", "sigmoid_loss"] + ["chunked"] * 3
    assert seen == [(torch.float32, 8, "dot", p) for p in ("medium",) * 3 + ("highest",) * 3]


def test_the_doctor_names_the_kernels(capsys):
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "contrastive cpu: the processor's kernels" in out
    assert ("Hopper (sm90)" in out) == dispatch.built()


@pytest.mark.sm90
@pytest.mark.parametrize("size", [1.0, 30.0])
def test_every_step_as_in_pytorch(cuda_device, size):
    x, y = pair(140, 270, 64, torch.bfloat16, size=size)
    scale = torch.tensor(10.0)
    there = cuda_device.on(steps, x, y, scale, 5, 2**30)
    for name, a, b in zip(NAMES, there, steps(x, y, scale, 5, 2**30), strict=True):
        assert_near(a, b, 5e-3 if name.startswith("grad") else 1e-5, name=name)


@pytest.mark.sm90
@pytest.mark.parametrize("shape", [(140, 270, 72), *on_gpu((2000, 2500, 384))])
def test_against_chunks_of_the_library(cuda_device, shape):
    x, y = pair(*shape, torch.bfloat16)
    scale = torch.tensor(40.0)
    ours, other = (cuda_device.on(steps, x, y, scale, 9, module=module) for module in (sm90, chunked))
    for name, a, b in zip(NAMES, ours, other, strict=True):
        assert_near(a.reshape(b.shape), b, 1e-2 if name.startswith("grad") else 1e-5, name=name)


@pytest.mark.gpu
@pytest.mark.sm90
class TestOnHopper:
    """Two runs at a size that fills the device, graphs, streams, and what only a CUDA tensor is refused for."""

    @pytest.fixture(autouse=True)
    def on_hopper(self):
        if not dispatch.built():
            pytest.skip("the library was built without the Hopper kernels")
        assert dispatch.uses_sm90(torch.empty(8, 8, dtype=torch.bfloat16, device="cuda"), "dot")

    @pytest.mark.parametrize("work_bytes", [0, 2**32])
    def test_two_runs_agree_bit_for_bit(self, work_bytes):
        x, y = pair(3001, 3003, 256, torch.bfloat16, "cuda")
        scale, bias = torch.tensor(50.0, device="cuda"), torch.tensor(-6.0, device="cuda")
        first, second = (by_autograd(lse_pair, x, y, scale, 1, work_bytes=work_bytes) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        first, second = (sigmoid_steps(x, y, scale, bias, 5) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    def test_captured_in_a_graph(self):
        x, y = pair(1000, 1000, 128, torch.bfloat16, "cuda")
        scale = torch.tensor(20.0, device="cuda")
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            steps(x, y, scale)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = steps(x, y, scale)
        # Replayed on embeddings that need the repair, which the captured ones did not.
        x.copy_(pair(1000, 1000, 128, torch.bfloat16, "cuda", size=30.0, seed=1)[0])
        scale.fill_(70.0)
        graph.replay()
        expected = steps(x, y, scale)
        assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))

    def test_on_a_stream_of_its_own(self):
        x, y = pair(1500, 1500, 256, torch.bfloat16, "cuda")
        scale = torch.tensor(20.0, device="cuda")
        expected = steps(x, y, scale)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10**8)  # inputs of another stream's launch would be read too early
            late_x, late_y = x * 1, y * 1
            found = steps(late_x, late_y, scale)
        stream.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

    def test_what_it_cannot_take_is_refused_when_forced(self, monkeypatch):
        monkeypatch.setattr(dispatch, "requested_kernel", lambda: "sm90")
        x = torch.randn(16, 12, device="cuda", dtype=torch.bfloat16)
        with pytest.raises(ValueError, match="multiple of 8, got 12"):
            lse_pair(x, x, torch.tensor(1.0, device="cuda"))
