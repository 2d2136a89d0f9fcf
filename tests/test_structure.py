"""Clusters, Fisher scores and intrinsic dimensions of both modalities, against scikit-learn and plain sums."""

import math

import numpy as np
import pytest
import torch

from gapkern.cli import main
from gapkern.gap import clustering_scores, fisher_scores, gap_structure, intrinsic_dimension
from gapkern.gap.structure import _agreement
from tests.scenes import strict


def modalities(rows=200, dims=20, gap=2.0, seed=0):
    random = np.random.default_rng(seed)
    labels = random.integers(4, size=rows)
    centres = random.standard_normal((4, dims))
    images, texts = (centres[labels] + 0.2 * random.standard_normal((rows, dims)) for _ in range(2))
    return images, texts + gap * random.standard_normal(dims), labels


@pytest.mark.parametrize("seed", range(5))
def test_agreement_is_scikit_learns(seed):
    metrics = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(seed)
    true, found = random.integers(5, size=60), random.integers(1 + seed, size=60)
    ours = _agreement(torch.from_numpy(found), torch.from_numpy(true))
    assert ours["ari"] == pytest.approx(metrics.adjusted_rand_score(true, found), abs=1e-12)
    assert ours["nmi"] == pytest.approx(metrics.normalized_mutual_info_score(true, found), abs=1e-12)
    whole = metrics.homogeneity_completeness_v_measure(true, found)
    assert [ours[name] for name in ("homogeneity", "completeness", "v_measure")] == pytest.approx(whole, abs=1e-12)


def test_clusters_are_scikit_learns():
    cluster = pytest.importorskip("sklearn.cluster")
    metrics = pytest.importorskip("sklearn.metrics")
    images, texts, labels = modalities(gap=0.1)
    pooled = np.concatenate([x / np.linalg.norm(x, axis=1, keepdims=True) for x in (images, texts)])
    theirs = cluster.KMeans(4, n_init=10, random_state=0).fit_predict(pooled)
    ours = clustering_scores(images, texts, labels)
    assert ours["ari"] == pytest.approx(metrics.adjusted_rand_score(np.tile(labels, 2), theirs), abs=1e-9)
    assert ours["ari"] > 0.95  # clusters are of what the rows show, without a gap
    assert abs(clustering_scores(images, texts)["ari"]) < 0.05
    wide, _, _ = modalities(gap=0.0)
    assert clustering_scores(wide, texts + 9)["ari"] == 1.0


def test_a_sample_is_drawn_by_the_seed():
    images, texts, labels = modalities(rows=300)
    few = clustering_scores(images, texts, labels, rows=50)
    assert few == clustering_scores(images, texts, labels, rows=50)
    assert few != clustering_scores(images, texts, labels, rows=50, seed=1)
    assert intrinsic_dimension(images, rows=100) == intrinsic_dimension(images, rows=100)
    assert intrinsic_dimension(images, rows=100) != intrinsic_dimension(images, rows=100, seed=1)


def test_fisher_scores_are_the_sums_of_the_definition():
    images, texts, _ = modalities(rows=30)
    texts = texts[:20]
    mean = np.concatenate([images, texts]).mean(0)
    between = sum(len(x) * (x.mean(0) - mean) ** 2 for x in (images, texts))
    within = sum(len(x) * x.var(0) for x in (images, texts))
    np.testing.assert_allclose(fisher_scores(images, texts).numpy(), between / within, rtol=1e-10)
    found = gap_structure(images, texts, ["fisher"])
    assert found["fisher_ratio"] == pytest.approx(between.sum() / within.sum(), rel=1e-10)
    assert found["fisher_largest"] == pytest.approx((between / within).max(), rel=1e-10)
    share = np.cumsum(np.sort(between)[::-1]) / between.sum()
    assert found["fisher_dimensions"] == np.argmax(share >= 0.5) + 1
    flat = torch.ones(3, 2)
    assert fisher_scores(flat, flat - torch.tensor([1.0, 0.0])).tolist() == [math.inf, 0.0]


@pytest.mark.parametrize("dims", [1, 3, 6])
def test_dimensions_of_known_sheets(dims):
    random = np.random.default_rng(0)
    sheet = np.tanh(random.uniform(-1, 1, (2000, dims)) @ random.standard_normal((dims, 12)))
    assert intrinsic_dimension(sheet) == pytest.approx(dims, rel=0.15)
    flat = random.standard_normal((2000, dims)) @ np.linalg.qr(random.standard_normal((12, dims)))[0].T
    assert intrinsic_dimension(flat, "participation") == pytest.approx(dims, rel=0.05)
    values = np.linalg.eigvalsh(np.cov(flat.T))
    assert intrinsic_dimension(flat, "participation") == pytest.approx(values.sum() ** 2 / (values**2).sum())


def test_the_two_nearest_by_hand_and_repeats_left_out():
    random = np.random.default_rng(1)
    x = random.standard_normal((60, 5))
    apart = np.sort(np.linalg.norm(x[:, None] - x, axis=2), 1)
    by_hand = 59 / np.log(apart[:, 2] / apart[:, 1]).sum()
    assert intrinsic_dimension(x) == pytest.approx(by_hand, rel=1e-9)
    assert intrinsic_dimension(x.astype(np.float32) * np.float32(1e-25)) == pytest.approx(by_hand, rel=1e-4)
    twice = np.concatenate([x, x])
    assert intrinsic_dimension(twice) == pytest.approx(119 / 59 * by_hand / 2, rel=1e-9)
    assert math.isnan(intrinsic_dimension(np.ones((5, 2))))
    assert math.isnan(intrinsic_dimension(np.ones((5, 2)), "participation"))


def test_real_embeddings(real_data, tmp_path, capsys):
    images, texts = real_data("clip")
    found = gap_structure(images, texts)
    assert found["cluster_ari"] == found["cluster_v_measure"] == 1.0  # k-means finds nothing but the modality
    between = 250 * (images.mean(0, dtype=np.float64) - texts.mean(0, dtype=np.float64)) ** 2
    within = 500 * (images.astype(np.float64).var(0) + texts.astype(np.float64).var(0))
    assert found["fisher_ratio"] == pytest.approx(between.sum() / within.sum(), rel=1e-6)
    assert found["fisher_dimensions"] <= 3
    np.save(tmp_path / "clip.npy", real_data("clip"))
    line = ["gap", f"{tmp_path}/clip.npy[0]", f"{tmp_path}/clip.npy[1]", "--also", "fisher", "dimension", "--json"]
    assert main(line) == 0
    told = strict(capsys.readouterr().out)
    assert {name: told[name] for name in found if "cluster" not in name} == pytest.approx(
        {name: value for name, value in found.items() if "cluster" not in name}
    )
    assert "cluster_ari" not in told
    assert told["centroid_distance"] == pytest.approx(0.85135, abs=1e-5)


def test_what_is_refused():
    images, texts, labels = modalities(rows=10)
    for call, error, message in (
        (lambda: gap_structure(images, texts, ["cluster"]), ValueError, "which: expected one of"),
        (lambda: intrinsic_dimension(images, "mle"), ValueError, "method: expected one of"),
        (lambda: clustering_scores(images, texts, labels[:4]), ValueError, "labels: expected shape"),
        (lambda: clustering_scores(images, texts, labels * 0.5), TypeError, "labels: expected integers"),
        (lambda: clustering_scores(images, texts[:4], labels), ValueError, "texts: expected 10 rows"),
        (lambda: clustering_scores(images, texts, clusters=0), ValueError, "clusters: expected an integer"),
        (lambda: fisher_scores(images, texts[:, :3]), ValueError, "texts: expected D = 20"),
        (lambda: fisher_scores(images * np.nan, texts), ValueError, "images: expected finite"),
    ):
        with pytest.raises(error, match=message):
            call()
