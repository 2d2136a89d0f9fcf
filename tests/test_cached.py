"""GradCache: the gradients of the whole batch, from chunks of it."""

import copy

import pytest
import torch

from gapkern import losses
from gapkern.testing import assert_near, assert_three_way


def encoder(seed, width=12, dropout=0.0):
    torch.manual_seed(seed)
    layers = (torch.nn.Linear(width, 32), torch.nn.GELU(), torch.nn.Dropout(dropout), torch.nn.Linear(32, 8))
    return torch.nn.Sequential(*layers)


class Unit(torch.nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return torch.nn.functional.normalize(self.module(x), dim=-1)


def gradients(modules, *others):
    return [p.grad.clone() for m in modules for p in m.parameters()] + [t.grad.clone() for t in others]


@pytest.mark.parametrize("loss", [losses.contrastive_loss, losses.info_nce_loss, losses.ntxent_loss])
def test_eight_chunks_are_the_whole_batch(loss):
    images, texts = torch.randn(64, 12), torch.randn(64, 12)
    found = []
    for chunk in (64, 8, 24):
        modules = [Unit(encoder(0)), Unit(encoder(1))]
        scale = torch.tensor(10.0, requires_grad=True)
        if chunk == 64:
            value = loss(modules[0](images), modules[1](texts), scale)
        else:
            value = losses.cached(loss, modules, chunk)([images, texts], scale)
        value.backward()
        found.append([value.detach(), *gradients(modules, scale)])
    for other in found[1:]:
        for a, b in zip(other, found[0], strict=True):
            assert_near(a, b, 1e-6)


def test_random_numbers_are_those_of_the_first_pass():
    x = torch.randn(12, 12)
    module = Unit(encoder(0, dropout=0.5))
    seen = []
    module.register_forward_hook(lambda m, i, o: seen.append(o.detach()))
    step = losses.cached(losses.info_nce_loss, module, 4)
    value = step([x, x + 1], 5.0)
    before = torch.get_rng_state()
    value.backward()
    assert torch.equal(torch.get_rng_state(), before)
    assert len(seen) == 12
    for first, second in zip(seen[:6], sorted_again(seen[6:], seen[:6]), strict=True):
        assert torch.equal(first, second)


def sorted_again(found, like):
    """Which input goes first in the backward pass is autograd's choice."""
    return [min(found, key=lambda t, o=other: float((t - o).abs().sum())) for other in like]


def test_one_encoder_for_nested_inputs():
    class Pairs(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = encoder(0)

        def forward(self, batch):
            return self.inner(batch["x"]) * batch["mask"][:, None]

    batch = {"x": torch.randn(10, 12), "mask": torch.rand(10)}
    other = {"x": torch.randn(10, 12), "mask": torch.rand(10)}
    a, b = Pairs(), Pairs()
    losses.cached(losses.info_nce_loss, a, 3)([batch, other], 2.0).backward()
    losses.info_nce_loss(b(batch), b(other), 2.0).backward()
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert_near(p.grad, q.grad, 2e-6)


@pytest.mark.parametrize("inside", [True, False])
def test_autocast_and_grad_scaler(inside):
    x, y = torch.randn(16, 12), torch.randn(16, 12)
    modules = [encoder(0), encoder(1)]
    whole = copy.deepcopy(modules)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = losses.cached(losses.contrastive_loss, modules, 4)([x, y], 1.0)
        expected = losses.contrastive_loss(whole[0](x), whole[1](y), 1.0)
        if inside:
            scaler.scale(value).backward()
    if not inside:
        scaler.scale(value).backward()
    scaler.scale(expected).backward()
    assert_near(value, expected, 1e-6)
    exact = [copy.deepcopy(m).double() for m in whole]
    for p in (p for m in exact for p in m.parameters()):
        p.grad = None
    (1024 * losses.contrastive_loss(exact[0](x.double()), exact[1](y.double()), 1.0)).backward()
    for p, q, truth in zip(gradients(modules), gradients(whole), gradients(exact), strict=True):
        assert_three_way(p, q, truth, 3e-2)


def test_without_gradients_it_is_the_loss():
    x = torch.randn(6, 12)
    module = encoder(0)
    with torch.no_grad():
        value = losses.cached(losses.info_nce_loss, module, 4)([x, x], 1.0)
        assert_near(value, losses.info_nce_loss(module(x), module(x), 1.0), 1e-6)
    assert not value.requires_grad


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: losses.cached(losses.info_nce_loss, encoder(0), 0),
            ValueError,
            "chunk: expected an integer >= 1, got 0",
        ),
        (
            lambda: losses.cached(losses.info_nce_loss, [encoder(0)], 2)([torch.ones(2, 12)] * 2, 1.0),
            ValueError,
            "inputs: expected 1, one for each encoder, got 2",
        ),
        (
            lambda: losses.cached(losses.info_nce_loss, encoder(0), 2)(torch.ones(2, 12), 1.0),
            TypeError,
            "inputs: expected a list of the encoders' inputs, got Tensor",
        ),
        (
            lambda: losses.cached(losses.info_nce_loss, encoder(0), 2)([(torch.ones(2, 12), torch.ones(3))], 1.0),
            ValueError,
            r"inputs: expected tensors of one number of rows, at least one, got \[2, 3\]",
        ),
    ],
)
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()
