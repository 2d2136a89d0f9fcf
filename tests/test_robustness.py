"""Three estimators of one number, against each other and brute force; sweeps over the share of the gap."""

import math
import sys

import numpy as np
import pytest
import torch

from gapkern import Gaussian, MeanShift, Quantize, Replace, Uniform, best_alpha, sweep
from gapkern._search import nearest
from gapkern.perturb import perturb
from gapkern.reference import robustness as reference
from gapkern.robustness import robustness
from tests.scenes import cloud
from tests.software_gpu.fixture import on_gpu


def test_float32_distances_serve_where_noise_drowns_their_rounding():
    queries, gallery = cloud(queries=500, gallery=60, dims=256)
    for variance in (1e-6, 1e-5, 1e-4, 1e-3):
        noise = Gaussian(variance, "per_coordinate")
        found = robustness(queries, gallery, noise).per_query
        exact = robustness(queries.double(), gallery.double(), noise).per_query
        assert float((found - exact).abs().max()) < 2e-5
    # A gallery far from the origin: rounding is of the size of the offset there, the noise is not.
    far, away = queries + 100, gallery + 100
    exact = robustness(far.double(), away.double(), Gaussian(1e-4, "per_coordinate")).per_query
    found = robustness(far, away, Gaussian(1e-4, "per_coordinate")).per_query
    assert float((found - exact).abs().max()) < 2e-5


@pytest.mark.parametrize("moves", ["gallery", "queries"])
@pytest.mark.parametrize("normalize", [False, True])
def test_noise_before_the_shift_in_one_pass_is_noise_then_shift(moves, normalize):
    queries, gallery = cloud(dims=12)
    shift = MeanShift(0.7, moves=moves, normalize=normalize).fit(gallery, queries)
    for noise in (Gaussian(0.3), Uniform(0.3)):
        found = robustness(queries, gallery, noise, shift=shift, on=moves, when="before", method="sample", trials=4)
        # A chain is perturbed and shifted in two steps.
        chain = noise | Gaussian(0.0)
        apart = robustness(queries, gallery, chain, shift=shift, on=moves, when="before", method="sample", trials=4)
        assert torch.equal(found.per_query, apart.per_query)
        assert found.robustness < 1


@pytest.mark.parametrize("method", ["exact", "projected", "sample"])
@pytest.mark.parametrize("when", ["after", "before"])
def test_robustness_on_cuda_is_that_of_the_cpu(cuda_device, method, when):
    queries, gallery = cloud(*on_gpu(300, 60, 64) or (70, 20, 24))
    shift = MeanShift(n_components=5).fit(gallery, queries)
    labels = nearest(queries, gallery)
    options = {"shift": shift, "when": when, "method": method, "trials": 4, "labels": labels, "seed": 3}
    on_cpu = robustness(queries, gallery, Gaussian(0.2), **options)
    on_cuda = cuda_device.on(robustness, queries, gallery, Gaussian(0.2), **options)
    assert on_cuda.per_query.device.type == "cpu"
    assert torch.equal(on_cuda.nearest, on_cpu.nearest)
    for name in ("robustness", "agreement", "accuracy"):
        ours, theirs = getattr(on_cuda, name), getattr(on_cpu, name)
        # "projected" draws from the device's own generator.
        margin = 5 * on_cpu.stderr if method == "projected" else 1e-3
        assert ours == pytest.approx(theirs, abs=margin), name
    assert on_cuda.clean_accuracy == on_cpu.clean_accuracy


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
def test_robustness_of_any_metric_on_cuda(cuda_device, metric):
    queries, gallery = cloud(queries=40, gallery=20, dims=24)
    noise = Gaussian(0.002)
    on_cpu = robustness(queries, gallery, noise, metric=metric)
    on_cuda = cuda_device.on(robustness, queries, gallery, noise, metric=metric)
    assert torch.equal(on_cuda.nearest, on_cpu.nearest)
    torch.testing.assert_close(on_cuda.per_query, on_cpu.per_query, rtol=0, atol=1e-4)
    assert 0.1 < on_cpu.robustness < 0.99


@pytest.mark.parametrize("variance", [1e-3, 5e-3])
def test_brute_force_confirms_every_query(variance):
    queries, gallery = cloud()
    trials = 4000
    expected = reference.stays_nearest(
        queries, gallery, nearest(queries, gallery), variance, trials, torch.Generator().manual_seed(1)
    )
    noise = Gaussian(variance, "per_coordinate")
    for method, own in (("exact", 0), ("projected", trials), ("sample", 1000)):
        found = robustness(queries, gallery, noise, method=method, trials=max(own, 1), seed=3)
        p = found.per_query.clamp(1e-4, 1 - 1e-4)
        sigma = (p * (1 - p)).sqrt() * math.sqrt(1 / trials + (1 / own if own else 0))
        assert float(((found.per_query - expected).abs() / sigma.clamp_min(1e-3)).max()) < 5, method
        assert found.method == method


@pytest.mark.parametrize("model", ["clip", "convirt", "videoclip"])
@pytest.mark.parametrize("variance", [0.005, 0.04])
def test_the_methods_agree_on_real_embeddings(real_data, model, variance):
    images, texts = real_data(model)
    labels = np.arange(len(images))
    shift = MeanShift(n_components=0.9).fit(texts, images)
    exact = robustness(images, texts, Gaussian(variance), labels=labels, shift=shift)
    assert (exact.method, exact.trials, exact.stderr) == ("exact", 0, 0.0)
    for method in ("projected", "sample"):
        drawn = robustness(
            images, texts, Gaussian(variance), labels=labels, shift=shift, method=method, trials=60, seed=11
        )
        for name in ("robustness", "agreement", "accuracy"):
            difference = getattr(drawn, name) - getattr(exact, name)
            assert abs(difference) < 4.5 * drawn.stderr + 1e-4, (method, name)
        assert drawn.clean_accuracy == exact.clean_accuracy


def test_the_standard_error_is_that_of_shared_noise():
    queries, gallery = cloud(queries=200, gallery=4, dims=8)
    runs = [robustness(queries, gallery, Gaussian(0.05), method="sample", trials=20, seed=s) for s in range(40)]
    spread = torch.tensor([run.robustness for run in runs]).std().item()
    stated = float(np.mean([run.stderr for run in runs]))
    assert 0.7 < spread / stated < 1.4
    assert math.isnan(robustness(queries, gallery, Gaussian(0.05), method="sample", trials=1).stderr)


def test_draws_repeat_for_a_seed_and_differ_between_seeds():
    queries, gallery = cloud()
    for method in ("sample", "projected"):
        first, again, other = (
            robustness(queries, gallery, Gaussian(0.2), method=method, trials=5, seed=s).per_query for s in (1, 1, 2)
        )
        assert torch.equal(first, again)
        assert not torch.equal(first, other)


def test_classes_of_several_rows():
    queries, gallery = cloud(gallery=12)
    classes = torch.arange(12) // 3 + 100
    labels = classes[nearest(queries, gallery)]
    noise = Gaussian(0.01, "per_coordinate")
    exact = robustness(queries, gallery, noise, labels=labels, gallery_labels=classes)
    drawn = robustness(queries, gallery, noise, labels=labels, gallery_labels=classes, method="projected", trials=2000)
    assert exact.clean_accuracy == 1
    assert exact.accuracy > exact.robustness
    assert drawn.accuracy == pytest.approx(exact.accuracy, abs=5 * drawn.stderr)


def test_labels_that_no_row_has_are_never_right():
    queries, gallery = cloud(gallery=4)
    found = robustness(queries, gallery, Gaussian(0.01), labels=[77] * 40, gallery_labels=[1, 2, 3, 4])
    assert (found.accuracy, found.clean_accuracy) == (0, 0)


@pytest.mark.parametrize("perturbation", [Quantize(16), Gaussian(0.0), Uniform(0.0), Quantize(8) | Quantize(4)])
def test_what_is_not_random_is_done_once(perturbation):
    queries, gallery = cloud()
    found = robustness(queries, gallery, perturbation, trials=50)
    assert (found.method, found.trials, found.stderr) == ("none drawn", 1, 0.0)
    assert set(found.per_query.tolist()) <= {0.0, 1.0}


def test_a_perturbation_of_nothing_changes_nothing():
    queries, gallery = cloud()
    found = robustness(queries, gallery, Gaussian(0.0), labels=nearest(queries, gallery))
    assert (found.robustness, found.agreement, found.accuracy, found.clean_accuracy) == (1, 1, 1, 1)


def test_quantisation_is_literal():
    queries, gallery = cloud(dims=6)
    low, high = gallery.amin(0), gallery.amax(0)
    cells = low + (((gallery - low) / (high - low) * 5).clamp(0, 4).floor() + 0.5) * (high - low) / 5
    expected = (nearest(queries, cells) == nearest(queries, gallery)).double()
    assert torch.equal(robustness(queries, gallery, Quantize(5)).per_query, expected)


def test_replaced_galleries_take_the_same_shift():
    queries, gallery = cloud()
    other = gallery + 0.02 * torch.randn(15, 32, generator=torch.Generator().manual_seed(9))
    shift = MeanShift(n_components="exact").fit(gallery, queries)
    moved = shift.transform(other)
    expected = (nearest(queries, moved) == nearest(queries, shift.transform(gallery))).double()
    assert torch.equal(robustness(queries, gallery, Replace(other), shift=shift).per_query, expected)


def test_agreement_looks_back_to_the_neighbours_before_the_shift():
    queries, gallery = cloud(offset=0.0)
    queries = queries + 2 * (gallery[0] - gallery.mean(0))
    shift = MeanShift(n_components=0).fit(gallery, queries)
    found = robustness(queries, gallery, Gaussian(1e-9), shift=shift)
    kept = (nearest(queries, gallery) == nearest(queries, shift.transform(gallery))).double().mean().item()
    assert kept < 1
    assert found.robustness == pytest.approx(1, abs=1e-6)
    assert found.agreement == pytest.approx(kept, abs=1e-6)


def test_noise_on_the_queries_gains_nothing_from_closing_the_gap():
    queries, gallery = cloud(queries=200, offset=1.0)
    shift = MeanShift(n_components="exact").fit(gallery, queries)
    found = [
        robustness(queries, gallery, Gaussian(0.3), on="queries", shift=shift.at(a), trials=60).robustness
        for a in (0, 1)
    ]
    assert found[1] == pytest.approx(found[0], abs=0.02)
    with pytest.raises(ValueError, match="method: 'exact' is for Gaussian noise on the gallery"):
        robustness(queries, gallery, Gaussian(0.3), on="queries", method="exact")


def test_gini_tells_even_from_uneven():
    gallery = torch.eye(4)
    assert robustness(gallery.repeat(5, 1), gallery, Gaussian(0.0)).gini == pytest.approx(0)
    assert robustness(gallery[:1].repeat(5, 1), gallery, Gaussian(0.0)).gini == pytest.approx(0.75)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_and_arrays(dtype):
    queries, gallery = (x.to(dtype) for x in cloud())
    expected = robustness(queries.float(), gallery.float(), Gaussian(0.1)).robustness
    assert robustness(queries, gallery, Gaussian(0.1)).robustness == pytest.approx(expected, abs=1e-3)
    if dtype != torch.bfloat16:
        arrays = robustness(queries.numpy(), gallery.numpy(), Gaussian(0.1))
        assert arrays.robustness == pytest.approx(expected, abs=1e-3)


def test_one_row_always_wins_and_duplicates_share():
    queries, gallery = cloud(gallery=1)
    assert robustness(queries, gallery, Gaussian(1.0)).robustness == pytest.approx(1, abs=1e-12)
    twice = torch.cat([gallery, gallery])
    assert robustness(queries, twice, Gaussian(0.01)).robustness == pytest.approx(0.5, abs=1e-5)


def test_sweep_tables_and_plots(tmp_path):
    queries, gallery = cloud()
    labels = nearest(queries, gallery)
    perturbations = [Gaussian(0.2), Quantize(32), Gaussian(0.1) | Quantize(8)]
    result = sweep(queries, gallery, [0.0, 0.5, 1.0], perturbations, labels, trials=3)
    assert len(result.rows) == 9
    first = result.rows[0]
    assert first["robustness"] == robustness(queries, gallery, Gaussian(0.2), shift=result.shift.at(0.0)).robustness
    assert (first["alpha"], first["perturbation"], first["variance"], first["bins"]) == (0.0, "gaussian", 0.2, None)
    assert result.best()["gaussian 0.2 total"] == 1.0
    frame = result.to_dataframe()
    assert list(frame["alpha"]) == [0.0] * 3 + [0.5] * 3 + [1.0] * 3
    result.to_json(tmp_path / "sweep.json")
    result.to_csv(tmp_path / "sweep.csv")
    figure = result.plot(tmp_path / "sweep.png")
    assert len(figure.axes) == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["sweep.csv", "sweep.json", "sweep.png"]


def test_the_best_alpha_closes_the_gap():
    queries, gallery = cloud(queries=100, offset=1.0, noise=0.01)
    shift = MeanShift(n_components="exact").fit(gallery, queries)
    found = best_alpha(queries, gallery, Gaussian(0.3), shift=shift)
    assert found == pytest.approx(1.0, abs=0.03)
    peak = robustness(queries, gallery, Gaussian(0.3), shift=shift.at(found)).robustness
    assert all(
        robustness(queries, gallery, Gaussian(0.3), shift=shift.at(a)).robustness <= peak + 1e-6 for a in (0, 0.5, 1.4)
    )
    with pytest.raises(ValueError, match="high: expected a number above low = 1, got 0"):
        best_alpha(queries, gallery, Gaussian(0.3), shift=shift, low=1, high=0)


Q, G = cloud()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: robustness(Q, G[:, :5], Gaussian(1.0)), ValueError, "queries: expected D = 5 as in gallery"),
        (lambda: robustness(Q, G[:0], Gaussian(1.0)), ValueError, "gallery: expected at least one row"),
        (lambda: robustness(Q * math.nan, G, Gaussian(1.0)), ValueError, "queries: expected finite values"),
        (lambda: robustness(Q, G, 0.1), TypeError, "perturbation: expected Gaussian"),
        (lambda: robustness(Q, G, Gaussian(1.0), method="fast"), ValueError, "method: expected one of 'auto', 'exact'"),
        (lambda: robustness(Q, G, Quantize(4), method="exact"), ValueError, "method: 'exact' is for Gaussian noise"),
        (lambda: robustness(Q, G, Uniform(1.0), method="projected"), ValueError, "method: 'projected' is for Gaussian"),
        (lambda: robustness(Q, G, Gaussian(1.0), trials=0), ValueError, "trials: expected an integer >= 1"),
        (lambda: robustness(Q, G, Gaussian(1.0), seed=1.5), TypeError, "seed: expected an integer, got float"),
        (lambda: robustness(Q, G, Gaussian(1.0), on="both"), ValueError, "on: expected one of 'gallery', 'queries'"),
        (lambda: robustness(Q, G, Gaussian(1.0), shift="mean"), TypeError, "shift: .*Projection, got str"),
        (lambda: robustness(Q, G, Gaussian(1.0), labels=[1, 2]), ValueError, r"labels: expected shape \(40,\)"),
        (lambda: robustness(Q, G, Gaussian(1.0), labels=[0.5] * 40), TypeError, "labels: expected integers"),
        (lambda: robustness(Q, G, Gaussian(1.0), labels=[15] * 40), ValueError, "labels: expected gallery rows"),
        (lambda: robustness(Q, G, Gaussian(1.0), gallery_labels=[0] * 15), ValueError, "expected labels beside"),
        (lambda: robustness(Q, G, Replace(G[:3])), ValueError, r"gallery: expected shape \(15, 32\)"),
        (lambda: robustness(Q, G, Replace(Q), on="queries"), ValueError, "on: expected 'gallery' for Replace"),
        (lambda: sweep(Q, G, [], Gaussian(1.0)), ValueError, "alphas and perturbations: expected at least one each"),
        (lambda: sweep(Q, G, ["a"], Gaussian(1.0)), TypeError, "alphas: expected a number, got str"),
        (lambda: sweep(Q, G, [0], [None]), TypeError, "perturbation: expected Gaussian"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_an_interval_covers_what_more_queries_show():
    queries, gallery = cloud(queries=3000)
    noise = Gaussian(3e-3, "per_coordinate")
    whole = robustness(queries, gallery, noise).robustness
    inside = 0
    for part in queries.split(100):
        low, high = robustness(part, gallery, noise).interval(0.9)
        inside += low <= whole <= high
    assert 22 <= inside <= 30, "about 27 of 30"
    sampled = robustness(queries[:100], gallery, noise, method="sample", trials=4)
    exact = robustness(queries[:100], gallery, noise)
    assert np.ptp(sampled.interval()) > np.ptp(exact.interval())
    assert robustness(queries[:1], gallery, noise).interval() == (0.0, 1.0)
    with pytest.raises(ValueError, match="confidence: expected"):
        exact.interval(1.0)


def test_flips_name_who_takes_the_place():
    gallery = torch.eye(4, 8)
    queries = torch.stack([gallery[0] + 0.9 * gallery[2], gallery[1]])
    noise = Gaussian(0.1, "per_coordinate")
    for method in ("exact", "projected", "sample"):
        found = robustness(queries, gallery, noise, method=method, trials=300)
        assert found.nearest.tolist() == [0, 1]
        assert found.rivals[0] == 2, method
        (flip,) = found.flips(0.3)
        assert (flip["query"], flip["nearest"], flip["rival"]) == (0, 0, 2)
        assert flip["probability"] == 1 - float(found.per_query[0])
    moved = gallery.clone()
    moved[[0, 3]] = gallery[[3, 0]]
    assert robustness(queries, gallery, Replace(moved)).flips() == [
        {"query": 0, "nearest": 0, "rival": 3, "probability": 1.0}
    ]
    assert robustness(queries, gallery, Replace(gallery)).flips(0.0) == []
    assert robustness(queries, gallery[:1], noise).rivals.tolist() == [-1, -1]


def test_before_the_shift_is_another_order_and_the_same_where_it_must_be():
    queries, gallery = cloud(queries=200, gallery=60, dims=16, noise=0.08)
    shift = MeanShift(n_components=3, normalize=True).fit(gallery, queries)
    plain = MeanShift(n_components=3).fit(gallery, queries)
    noise, cells = Gaussian(1e-3, "per_coordinate"), Quantize(3)
    found = robustness(queries, gallery, cells, shift=shift, when="before").per_query
    moved = nearest(queries, shift.transform(perturb(gallery, cells, 0)))
    assert torch.equal(found, (moved == nearest(queries, shift.transform(gallery))).double())
    # One range for all dimensions: it differs once the queries have moved.
    cells, moves_queries = Quantize(3, "global"), MeanShift(n_components=3, moves="queries").fit(gallery, queries)
    before, after = (
        robustness(queries, gallery, cells, shift=moves_queries, on="queries", when=w) for w in ("before", "after")
    )
    moved = nearest(moves_queries.transform_queries(perturb(queries, cells, 0)), gallery)
    assert torch.equal(before.per_query, (moved == before.nearest).double())
    assert not torch.equal(before.per_query, after.per_query)
    a, b = (robustness(queries, gallery, noise, shift=plain, when=w) for w in ("before", "after"))
    assert a.method == b.method == "exact"
    assert torch.equal(a.per_query, b.per_query)
    assert robustness(queries, gallery, noise, shift=shift, when="before", trials=3).method == "sample"
    with pytest.raises(ValueError, match=r"method: 'exact' is for Gaussian noise .* before it is normalised"):
        robustness(queries, gallery, noise, shift=shift, when="before", method="exact")
    with pytest.raises(ValueError, match="when: expected"):
        robustness(queries, gallery, noise, when="later")


def test_an_interrupted_sweep_goes_on_where_it_was(tmp_path, monkeypatch):
    queries, gallery = cloud()
    noises = [Gaussian(1e-3, "per_coordinate"), Uniform(0.05)]
    whole = sweep(queries, gallery, [0, 0.5, 1], noises, trials=5)
    journal, calls = tmp_path / "rows.jsonl", []
    module = sys.modules["gapkern.robustness.sweep"]

    def failing(*arguments, **options):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return robustness(*arguments, **options)

    monkeypatch.setattr(module, "robustness", failing)
    with pytest.raises(KeyboardInterrupt):
        sweep(queries, gallery, [0, 0.5, 1], noises, trials=5, journal=journal)
    with open(journal, "a") as file:
        file.write('[[1.0, {"perturb')  # a kill in the middle of a line
    again = sweep(queries, gallery, [0, 0.5, 1], noises, trials=5, journal=journal)
    assert len(calls) == 4 + 3
    timeless = [[{k: v for k, v in row.items() if k != "seconds"} for row in r.rows] for r in (whole, again)]
    assert timeless[0] == timeless[1]
    # Other arguments are other rows.
    sweep(queries, gallery + 1e-3, [0], noises[0], journal=journal)
    assert len(calls) == 8
    sweep(queries, gallery + 1e-3, [0], noises[0], journal=journal, seed=1)
    assert len(calls) == 9
