"""Gradient descent on the contrastive loss: the path, what is recorded of it, and how it is kept."""

import json

import pytest
import torch

from gapkern.dynamics import Trajectory, descend, evaluate, isotropic_gaussians, measure, tight_clusters
from gapkern.dynamics.measures import spearman
from gapkern.dynamics.trajectory import COLUMNS
from gapkern.reference import contrastive as oracle

spearmanr = pytest.importorskip("scipy.stats").spearmanr

SIMILARITIES = ["dot", "sqeuclidean"]


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 3e-5)])
@pytest.mark.parametrize(
    ("n", "dims", "scale", "size"), [(1, 1, 1.0, 1.0), (7, 3, 5.0, 1.0), (130, 33, 0.3, 1.0), (20, 4, 3e6, 1e-3)]
)
def test_evaluation_equals_the_definition(similarity, dtype, tolerance, n, dims, scale, size):
    x, y = (size * t for t in isotropic_gaussians(n, dims, 1.0, 0.7, seed=n))
    at = evaluate(x.to(dtype), y.to(dtype), scale, similarity=similarity)
    x, y = x.to(dtype).double().requires_grad_(), y.to(dtype).double().requires_grad_()
    s = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    loss = oracle.contrastive_loss(x, y, s, similarity=similarity)
    of_x, of_y, of_s = torch.autograd.grad(loss, (x, y, s))
    logits, loss = oracle.logits(x, y, s, similarity).detach(), loss.detach()
    assert at.loss == pytest.approx(float(loss), rel=tolerance, abs=tolerance)
    size_of = max(float(of_x.norm()), float(of_y.norm()), scale * size)
    assert float((at.images - of_x).norm()) <= 30 * tolerance * size_of
    assert float((at.texts - of_y).norm()) <= 30 * tolerance * size_of
    assert at.logit_scale == pytest.approx(
        float(of_s), rel=30 * tolerance, abs=30 * tolerance * max(float(loss), 0.1) / scale
    )
    sums = logits.softmax(1).sum(0), logits.softmax(0).sum(1)
    assert torch.allclose(at.sums_texts, sums[0], rtol=10 * tolerance, atol=10 * tolerance)
    assert torch.allclose(at.sums_images, sums[1], rtol=10 * tolerance, atol=10 * tolerance)
    assert at.residual_texts == pytest.approx(float((sums[0] - 1).abs().max()), abs=100 * tolerance * n)


def test_measures_equal_their_definitions():
    x, y = isotropic_gaussians(50, 6, 2.0)
    y = 0.5 * y + 0.5 * x
    found = measure(x, y, evaluate(x, y, 0.5))
    g = y.mean(0) - x.mean(0)
    u = g / g.norm()
    a, b = x - x.mean(0), y - y.mean(0)
    assert found["gap_norm"] == pytest.approx(float(g.norm()))
    for name, centred in (("images", a), ("texts", b)):
        along = float((centred @ u).square().mean())
        assert found[f"variance_along_{name}"] == pytest.approx(along)
        assert found[f"variance_across_{name}"] == pytest.approx(float(centred.square().sum(1).mean()) - along)
    aligned = 2 * float((a * b).sum()) / float(a.square().sum() + b.square().sum())
    assert found["relative_alignment"] == pytest.approx(aligned)
    sums = oracle.logits(x, y, 0.5, "sqeuclidean").softmax(1).sum(0)
    expected = spearmanr(sums.numpy(), (y - x.mean(0)).norm(dim=1).numpy()).statistic
    assert found["sum_distance_correlation"] == pytest.approx(expected)
    ties = torch.randint(5, (40,), generator=torch.Generator().manual_seed(0)).double()
    assert spearman(ties, x[:40, 0]) == pytest.approx(spearmanr(ties.numpy(), x[:40, 0].numpy()).statistic)


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("sphere", [False, True])
def test_plain_descent_is_what_autograd_and_hand_say(similarity, sphere):
    x, y = isotropic_gaussians(9, 4, 1.0)
    path = descend(x, y, 2.0, lr=0.1, steps=5, similarity=similarity, sphere=sphere)

    def unit(t):
        return t / t.norm(dim=1, keepdim=True)

    if sphere:
        x, y = unit(x), unit(y)
    for _ in range(5):
        x.requires_grad_()
        y.requires_grad_()
        gradients = torch.autograd.grad(oracle.contrastive_loss(x, y, 2.0, similarity=similarity), (x, y))
        x, y = x.detach(), y.detach()
        if sphere:
            gradients = [v - (v * t).sum(1, keepdim=True) * t for v, t in zip(gradients, (x, y), strict=True)]
        x, y = x - 0.1 * gradients[0], y - 0.1 * gradients[1]
        if sphere:
            x, y = unit(x), unit(y)
    assert torch.allclose(path.images, x, rtol=1e-10, atol=1e-12)
    assert torch.allclose(path.texts, y, rtol=1e-10, atol=1e-12)


def test_batches_and_adam_and_the_temperature_descend_too():
    x, y = isotropic_gaussians(60, 8, 3.0)
    start = evaluate(x, y, 0.3).loss
    for options in (
        {"optimizer": "sgd", "batch": 16, "lr": 2.0},
        {"optimizer": "adam", "lr": 0.05},
        {"optimizer": "adam", "batch": 20, "lr": 0.05},
        {"learn_scale": True, "lr": 0.5},
    ):
        path = descend(x, y, 0.3, steps=60, record_every=20, **options)
        assert [row["step"] for row in path.rows] == [0, 20, 40, 60]
        assert path.rows[0]["loss"] == pytest.approx(start)
        assert path.rows[-1]["loss"] < 0.7 * start, options
        again = descend(x, y, 0.3, steps=60, record_every=7, **options)
        assert torch.equal(again.images, path.images), "how often is recorded changes nothing"
    assert path.logit_scale != 0.3
    assert path.rows[-1]["logit_scale"] == pytest.approx(path.logit_scale)
    other = descend(x, y, 0.3, lr=2.0, steps=60, optimizer="sgd", batch=16, seed=1)
    first = descend(x, y, 0.3, lr=2.0, steps=60, optimizer="sgd", batch=16, seed=0)
    assert not torch.equal(other.images, first.images)


def test_the_temperature_follows_its_gradient():
    x, y = isotropic_gaussians(10, 3, 1.0)
    path = descend(x, y, 0.5, lr=0.1, steps=1, learn_scale=True)
    of_scale = evaluate(x, y, 0.5).logit_scale
    assert path.logit_scale == pytest.approx(0.5 * torch.tensor(-0.1 * of_scale * 0.5).exp().item(), rel=1e-6)


def test_figure_4_tight_clusters_keep_an_orthogonal_gap_at_nearly_no_loss():
    path = descend(*tight_clusters(20, 10, 1e-2, 2.0), 2.0, lr=1.0, steps=1500)
    first, last = path.rows[0], path.rows[-1]
    assert last["loss"] < 1e-3 * first["loss"]
    assert last["gap_norm"] > 0.9 * first["gap_norm"]
    assert last["orthogonality"] > 0.999 > 0.5 > first["orthogonality"]
    assert last["relative_alignment"] > 0.999
    assert last["variance_along_texts"] < 1e-3 * first["variance_along_texts"]
    assert last["variance_across_texts"] > 1e3 * first["variance_across_texts"]


@pytest.mark.parametrize("seed", range(5))
def test_figure_5_mass_falls_with_distance_and_the_gap_direction_shrinks_first(seed):
    x, y = isotropic_gaussians(200, 2, 6.0, seed=seed)
    path = descend(x, y, 0.5, lr=10.0, steps=40, snapshots=[0, 40])
    first, last = path.rows[0], path.rows[-1]
    assert first["sum_distance_correlation"] < -0.95
    begin = path.snapshots[0]
    distance = (begin.texts - begin.images.mean(0)).norm(dim=1)
    assert spearmanr(begin.sums_texts.numpy(), distance.numpy()).statistic < -0.95
    assert last["variance_along_texts"] < 0.1 * first["variance_along_texts"]
    assert last["variance_across_texts"] > first["variance_across_texts"]
    assert last["gap_norm"] > 0.8 * first["gap_norm"]
    assert torch.equal(path.snapshots[40].images, path.images)


@pytest.mark.parametrize("start", ["tight", "isotropic"])
def test_figure_6_doubly_stochastic_comes_late(start):
    if start == "tight":
        path = descend(*tight_clusters(20, 10, 1e-2, 2.0), 2.0, lr=1.0, steps=400, record_every=5)
    else:
        path = descend(*isotropic_gaussians(100, 8, 6.0), 0.5, lr=4.0, steps=400, record_every=5)
    rows = path.rows
    shrunk = next(row for row in rows if row["variance_along_texts"] < 0.1 * rows[0]["variance_along_texts"])
    stochastic = next(row for row in rows if row["residual_texts"] < 2e-3)
    assert shrunk["step"] < 0.2 * stochastic["step"]
    assert shrunk["loss"] > 10 * stochastic["loss"]
    # From there on it stays.
    assert max(row["residual_texts"] for row in rows if row["step"] >= stochastic["step"]) < 2e-3


def test_no_n_by_n_matrix_is_formed():
    """20,000 pairs: logits would be 3.2 GB in float64; PyTorch's allocations are watched by the profiler."""
    x, y = isotropic_gaussians(20_000, 4, 3.0, dtype=torch.float32)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        path = descend(x, y, 0.2, lr=1.0, steps=1, optimizer="sgd", batch=512)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest < 600 * 2**20, "the loss keeps up to 256 MiB, and little else"
    assert len(path.rows) == 2
    assert path.settings["batch"] == 512


def test_results_are_kept(tmp_path):
    seen = []
    path = descend(
        *tight_clusters(6, 4, 0.1, 1.0), 2.0, lr=0.1, steps=10, record_every=4, snapshots=[5], on_record=seen.append
    )
    assert isinstance(path, Trajectory)
    assert seen == path.rows
    assert path.series("loss")[0] == [0, 4, 5, 8, 10]
    frame = path.to_dataframe()
    assert list(frame.columns) == list(COLUMNS)
    path.to_json(tmp_path / "path.json")
    read = json.loads((tmp_path / "path.json").read_text())
    assert read["rows"] == path.rows
    assert read["settings"]["pairs"] == 6
    path.to_csv(tmp_path / "path.csv")
    assert (tmp_path / "path.csv").read_text().count("\n") == 6
    figure = path.plot(tmp_path / "path.png")
    assert (tmp_path / "path.png").stat().st_size > 10_000
    assert len(figure.axes) == 4


def test_the_start_is_left_alone_and_threads_are_given_back():
    x, y = tight_clusters(5, 3, 0.1, 1.0)
    before, threads = (x.clone(), y.clone()), torch.get_num_threads()
    descend(x, y, 1.0, lr=0.1, steps=3)
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])
    with pytest.raises(RuntimeError, match=r"the loss is (inf|nan) after \d+ steps; a smaller lr may help"):
        descend(1e3 * x, y, 1e4, lr=1e300, steps=50)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": 0.0}, ValueError, "lr: expected a finite number > 0, got 0"),
        ({"steps": -1}, ValueError, "steps: expected an integer >= 0, got -1"),
        ({"optimizer": "lion"}, ValueError, "optimizer: expected one of 'gd', 'sgd', 'adam', got 'lion'"),
        ({"batch": 2}, ValueError, "batch: expected None for optimizer='gd'"),
        ({"batch": 9, "optimizer": "sgd"}, ValueError, "batch: expected an integer >= 1 and <= 5, got 9"),
        ({"similarity": "cosine"}, ValueError, "similarity: expected one of 'dot', 'sqeuclidean'"),
        ({"snapshots": [4]}, ValueError, "snapshots: expected an integer >= 0 and <= 3, got 4"),
        ({"logit_scale": 0.0}, ValueError, "logit_scale: expected a finite number > 0"),
        ({"record_every": 0}, ValueError, "record_every: expected an integer >= 1"),
    ],
)
def test_bad_arguments_are_named(options, error, message):
    x, y = tight_clusters(5, 3, 0.1, 1.0)
    arguments = {"logit_scale": 1.0, "lr": 0.1, "steps": 3, **options}
    with pytest.raises(error, match=message):
        descend(x, y, **arguments)


def test_bad_embeddings_are_named():
    x, y = tight_clusters(5, 3, 0.1, 1.0)
    with pytest.raises(ValueError, match="texts: expected 5 rows as in images"):
        descend(x, y[:4], 1.0, lr=0.1, steps=1)
    with pytest.raises(TypeError, match=r"images: expected float32 or float64, got torch\.float16"):
        descend(x.half(), y.half(), 1.0, lr=0.1, steps=1)
    with pytest.raises(TypeError, match=r"texts: expected torch\.float64 as in images"):
        descend(x, y.float(), 1.0, lr=0.1, steps=1)
    with pytest.raises(ValueError, match="images: expected rows of a length above 0"):
        descend(torch.zeros_like(x), y, 1.0, lr=0.1, steps=1, sphere=True)
    x[2, 1] = torch.nan
    with pytest.raises(ValueError, match="images: expected finite values, got NaN or infinity, first in row 2"):
        descend(x, y, 1.0, lr=0.1, steps=1)
