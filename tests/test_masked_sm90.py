"""Classes of pairs on Hopper: their orchestration here, with PyTorch's operations as steps, and the kernels there."""

import itertools
import math

import pytest
import torch

from gapkern.ops.contrastive import dispatch, masked_chunked, masked_lse, masked_sigmoid_sum, masked_sm90, sm90
from gapkern.ops.contrastive.arguments import (
    MaskedArguments,
    MaskedBackwardArguments,
    MaskedSigmoidArguments,
    absent,
    given,
)
from gapkern.reference import classes as reference
from gapkern.testing import assert_near, assert_three_way
from tests.software_gpu import masked_problems
from tests.software_gpu.masked_problems import IDS, LIMITS, NAMES, check, pairs, weighted


def arguments_of(x, y, scale, masks, options):
    none, integers, matrix = absent(x)
    kinds = dict.fromkeys(LIMITS, none) | dict.fromkeys(IDS, integers)
    masks = {name: given(masks.get(name), kind) for name, kind in kinds.items()}
    guides = {"guide_x": matrix, "guide_y": matrix, "guide_row_limit": none, "guide_col_limit": none}
    defaults = {"similarity": "dot", "label_offset": 0, "label": "counted", "equal": "left_out", "precision": "highest"}
    return MaskedArguments(x=x, y=y, logit_scale=scale, **masks, **guides, **(defaults | options))


def steps(x, y, scale, masks, options, needs=(True, True, True), module=masked_sm90):
    """Classes and gradients by this module's functions, without the dispatcher's choice."""
    arguments = arguments_of(x, y, scale, masks, options)
    found = module.masked_lse(arguments)
    grads = tuple(weighted(found[:5]))
    gradients = module.masked_lse_backward(MaskedBackwardArguments(grads, found[:4], found[5:], arguments, list(needs)))
    return [*found[:5], *gradients]


CHOICES = [(), IDS, LIMITS[:1], LIMITS[1:], (*IDS, *LIMITS)]


@pytest.mark.parametrize("shape", [(1, 1, 8), (1, 6, 8), (13, 17, 16), (17, 13, 8), (130, 260, 24)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("chosen", range(len(CHOICES)))
def test_orchestration_against_float64(poisoned, shape, dtype, chosen):
    x, y, masks = pairs(*shape, dtype)
    masks = {name: masks[name] for name in CHOICES[chosen]}
    similarities = ("dot",) if dtype == torch.float16 else ("dot", "sqeuclidean")
    cases = itertools.product(similarities, (0, 3, -2), ("counted", "left_out", "none"))
    for i, (similarity, offset, label) in enumerate(cases):
        if shape[0] > 100 and (i + chosen) % 5:  # one or two of the cases
            continue
        equal = ("positive", "left_out")[i % 2]
        options = {"similarity": similarity, "label_offset": offset, "label": label, "equal": equal}
        scale = torch.tensor((7.0, 30.0, -2.0)[i % 3])
        check(steps(x, y, scale, masks, options), x, y, scale, masks, options)


@pytest.mark.parametrize("scale", [1.0, 30.0, 100.0])
@pytest.mark.parametrize("size", [1.0, 5.0, 20.0])
@pytest.mark.parametrize("equal", ["positive", "left_out"])
def test_orchestration_at_any_scale_and_norm(scale, size, equal):
    x, y, masks = pairs(140, 270, 32, torch.bfloat16, size=size)
    scale, options = torch.tensor(scale), {"label_offset": 3, "equal": equal}
    for chosen in (IDS, LIMITS, (*IDS, *LIMITS)):
        some = {name: masks[name] for name in chosen}
        check(steps(x, y, scale, some, options), x, y, scale, some, options)


def passes(monkeypatch):
    """Whether anything was pending after each pass of what runs next."""
    pending, merge = [], torch.ops.gapkern.contrastive_sm90_masked_merge

    def counted(*arguments):
        condition, control = merge(*arguments)
        pending.append(bool(condition))
        return condition, control

    monkeypatch.setattr(torch.ops.gapkern, "contrastive_sm90_masked_merge", counted)
    return pending


@pytest.mark.parametrize(
    ("scale", "limit", "expected"),
    [
        (67.0, -0.9, [False, False, False]),  # no exponential of unit vectors is flushed
        (100.0, 2.0, [False, False, False]),
        (100.0, -0.5, [True, False, False]),
        (200.0, -0.5, [True, True, False]),
        (400.0, -0.5, [True, True, True]),
    ],
)
def test_what_a_limit_leaves_is_found_by_a_pass_of_its_own(monkeypatch, scale, limit, expected):
    """All large logits are left out: their sums' terms underflow at the shift that those need."""
    x, y, _ = pairs(40, 60, 16, torch.bfloat16)
    x = torch.cat([x, -y[:30]])  # negatives near -1 of these rows and columns
    masks = {"row_limit": torch.full((70,), limit), "col_limit": torch.full((60,), limit)}
    if limit < 0:
        masks["row_limit"][5] = -2.0  # and one row has no negatives at all
    scale, options = torch.tensor(scale), {"label": "none"}
    pending = passes(monkeypatch)
    found = steps(x, y, scale, masks, options)
    assert pending == expected
    assert (found[0][5] == -math.inf) == (limit < 0)
    assert (found[0] > -math.inf).sum() >= 30
    check(found, x, y, scale, masks, options)


def test_a_class_that_ids_leave_empty_is_not_pending(monkeypatch):
    x, y, _ = pairs(40, 60, 16, torch.bfloat16)
    ids = torch.arange(60)
    pending = passes(monkeypatch)
    options = {"equal": "positive", "label_offset": 0}
    found = steps(x, y, torch.tensor(100.0), {"row_ids": ids[:40], "col_ids": ids}, options)
    assert pending == [False] * 3
    assert all(bool((v == -math.inf).all()) for v in found[2:4])  # the labels are the only pairs of equal ids


def test_limits_in_a_repair_are_wider_than_what_the_tensor_cores_decided():
    """A pair that they counted must not be missing in the sum that its gradient is divided by."""
    x, y, _ = pairs(20, 30, 16, torch.bfloat16, size=40.0)
    t = x.double() @ y.double().T
    limit = t.max(1).values.float()
    limit = torch.where(limit.double() < t.max(1).values, limit, torch.nextafter(limit, limit.new_tensor(-math.inf)))
    masks, options = {"row_limit": limit}, {"label": "none"}
    found = steps(x, y, torch.tensor(40.0), masks, options)
    everything = reference.masked_lse(x.double(), y.double(), 40.0, label="none")
    assert_near(found[0], everything[0], 1e-6)
    assert float(found[5].abs().max()) < 40 * 40 * 4  # scale, norm and weights


def test_orchestration_in_blocks(monkeypatch):
    x, y, masks = pairs(700, 705, 24, torch.bfloat16)
    scale, options = torch.tensor(20.0), {"equal": "positive", "label_offset": 2}
    whole = steps(x, y, scale, masks, options)
    monkeypatch.setattr(sm90, "SUPER_ROWS", 256)
    monkeypatch.setattr(sm90, "GRADIENT_ELEMENTS", 150 * 705)
    for name, a, b in zip(NAMES, steps(x, y, scale, masks, options), whole, strict=True):
        # The library adds up a product of float32 in an order that its number of rows decides.
        assert_near(a, b, 5e-3 if name.startswith("grad") else 1e-6, name=name)


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)])
def test_orchestration_forms_only_what_is_needed(needs):
    x, y, masks = pairs(40, 44, 16, torch.bfloat16)
    scale = torch.tensor(10.0)
    every, some = (steps(x, y, scale, masks, {}, needs=n) for n in ((True, True, True), needs))
    for wanted, a, b in zip(needs, some[5:], every[5:], strict=True):
        assert a.numel() == (b.numel() if wanted else 0)
        if wanted:
            assert_near(a, b, 1e-2)


def test_not_a_number_reaches_its_own_classes():
    x, y, _ = pairs(12, 12, 8, torch.bfloat16)
    x[4, 2] = math.nan
    ids = torch.arange(12) // 2
    found = steps(x, y, torch.tensor(2.0), {"row_ids": ids, "col_ids": ids}, {"equal": "positive", "label": "none"})
    assert found[0].isnan().tolist() == [i == 4 for i in range(12)]
    assert found[1].isnan().tolist() == [i // 2 != 2 for i in range(12)]
    assert found[2].isnan().tolist() == [i == 4 for i in range(12)]
    assert found[3].isnan().tolist() == [i // 2 == 2 for i in range(12)]


def sigmoid_steps(x, y, scale, bias, masks, needs=(True, True), soft=False):
    return list(masked_sm90.masked_sigmoid(MaskedSigmoidArguments(x, y, scale, bias, *masks, soft, "medium", needs)))


@pytest.mark.parametrize("shape", [(1, 1, 8), (13, 17, 16), (130, 260, 24), (260, 130, 8)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", [1.0, 8.0])
def test_sigmoid_orchestration_against_float64(poisoned, shape, dtype, size):
    x, y, masks = masked_problems.sigmoid_pairs(*shape, dtype, size)
    scale, bias = torch.tensor(14.3), torch.tensor(-6.0)
    for soft in (False, True):
        ours = sigmoid_steps(x, y, scale, bias, masks, soft=soft)
        masked_problems.check_sigmoid(ours, x, y, scale, bias, masks, soft)


def test_sigmoid_orchestration_in_blocks_forms_only_what_is_needed(monkeypatch):
    x, y, masks = masked_problems.sigmoid_pairs(700, 705, 24, torch.bfloat16)
    scale, bias = torch.tensor(10.0), torch.tensor(-5.0)
    whole = sigmoid_steps(x, y, scale, bias, masks)
    monkeypatch.setattr(sm90, "GRADIENT_ELEMENTS", 150 * 705)
    for needs in ((True, True), (True, False), (False, False)):
        some = sigmoid_steps(x, y, scale, bias, masks, needs)
        for wanted, a, b in zip((True, *needs, True, True), some, whole, strict=True):
            assert a.numel() == (b.numel() if wanted else 0)
            if wanted:
                assert_near(a, b, 1e-5)


def test_the_dispatcher_tells_guides_apart(monkeypatch):
    taken = []
    for module, name in itertools.product((masked_sm90, masked_chunked), ("masked_lse", "masked_lse_backward")):
        monkeypatch.setattr(module, name, lambda _, name=name, module=module: taken.append((module, name)))
    for module in (masked_sm90, masked_chunked):
        monkeypatch.setattr(module, "masked_sigmoid", lambda *_, module=module: taken.append((module, "sigmoid")))
    monkeypatch.setattr(dispatch, "requested_kernel", lambda: "auto")
    monkeypatch.setattr(
        dispatch, "unsupported_reason", lambda device, dtype, *_: "" if dtype == torch.bfloat16 else "no"
    )
    x, v = torch.ones(3, 8), torch.ones(1)
    guide = torch.ones(3, 4)
    for dtype, guided in ((torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, False)):
        arguments = arguments_of(x.to(dtype), x.to(dtype), v, {}, {})
        if guided:
            arguments = arguments._replace(guide_x=guide, guide_y=guide)
        dispatch.masked_lse(arguments)
        dispatch.masked_lse_backward(MaskedBackwardArguments((), (), (), arguments, [True] * 3))
        dispatch.masked_sigmoid(MaskedSigmoidArguments(x.to(dtype), x, v, v, v, v, v, v, False, "highest", [True] * 2))
        here, there = masked_sm90 if dtype == torch.bfloat16 else masked_chunked, masked_chunked
        expected = there if guided else here
        assert taken == [(expected, "masked_lse"), (expected, "masked_lse_backward"), (here, "sigmoid")]
        taken.clear()
    monkeypatch.setattr(dispatch, "requested_kernel", lambda: "sm90")
    assert dispatch.uses_sm90(x.bfloat16(), "dot")
    assert not dispatch.uses_sm90(x.bfloat16(), "dot", "highest", True, True)  # refused of CUDA tensors alone
    monkeypatch.setattr(dispatch, "unsupported_reason", lambda *_: "")
    assert [dispatch.uses_sm90(x, "dot", p, True) for p in ("highest", "medium")] == [False, True]


@pytest.mark.sm90
@pytest.mark.parametrize("size", [1.0, 30.0])
def test_every_step_as_in_pytorch(cuda_device, size):
    x, y, masks = pairs(140, 270, 64, torch.bfloat16, size=size)
    scale, options = torch.tensor(10.0), {"equal": "positive", "label_offset": 5}
    there = cuda_device.on(steps, x, y, scale, masks, options)
    for name, a, b in zip(NAMES, there, steps(x, y, scale, masks, options), strict=True):
        assert_three_way(a, b, b, 5e-3 if name.startswith("grad") else 1e-5, name=name)


@pytest.mark.gpu
@pytest.mark.sm90
class TestOnHopper:
    """Two runs at a size that fills the device, and graphs."""

    @pytest.fixture(autouse=True)
    def on_hopper(self):
        if not dispatch.built():
            pytest.skip("the library was built without the Hopper kernels")
        assert dispatch.uses_sm90(torch.empty(8, 8, dtype=torch.bfloat16, device="cuda"), "dot")

    def problem(self, n, m, d):
        x, y, masks = pairs(n, m, d, torch.bfloat16)
        return x.cuda(), y.cuda(), {name: v.cuda() for name, v in masks.items()}

    def test_two_runs_agree_bit_for_bit(self):
        x, y, masks = self.problem(3001, 3003, 256)
        scale, options = torch.tensor(100.0, device="cuda"), {"equal": "positive", "label_offset": 1}
        first, second = (steps(x, y, scale, masks, options) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    def test_captured_in_a_graph(self):
        x, y, masks = self.problem(1000, 1000, 128)
        scale, options = torch.tensor(20.0, device="cuda"), {"equal": "positive"}
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            steps(x, y, scale, masks, options)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = steps(x, y, scale, masks, options)
        # Replayed on embeddings that need further passes and the repair, which the captured ones did not.
        x.copy_(pairs(1000, 1000, 128, torch.bfloat16, size=30.0)[0])
        scale.fill_(70.0)
        graph.replay()
        expected = steps(x, y, scale, masks, options)
        assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))

    def test_the_public_functions_run_there(self):
        x, y, masks = self.problem(500, 600, 64)
        scale = torch.tensor(20.0, device="cuda")
        found = masked_lse(x, y, scale, **masks, equal="positive")
        truth = reference.masked_lse(
            x.double(),
            y.double(),
            scale.double(),
            **{k: v.double() if k in LIMITS else v for k, v in masks.items()},
            equal="positive",
        )
        for name, a, b in zip(NAMES, found, truth, strict=False):
            assert_near(a, b, 1e-5, name=name)
        weights = torch.rand(500, device="cuda").double(), torch.rand(600, device="cuda").double()
        bias = torch.tensor(-5.0, device="cuda")
        total = masked_sigmoid_sum(x, y, scale, bias, masks["row_ids"], masks["col_ids"], *weights)
        parts = masked_problems.sigmoid_reference(
            x.double(), y.double(), scale.double(), bias.double(), masks["row_ids"], masks["col_ids"], *weights, False
        )
        assert_near(total, parts, 2e-5)
