"""Certificates for codes: what they certify never changes, and what projecting the queries adds is certified."""

import numpy as np
import pytest
import torch

from gapkern.gap import NotFittedError, Projection
from gapkern.theory import certify


def scene(rows, dims, rank, queries, seed):
    """A gallery of some rank, and queries with a gap and an offset of their own; float64 numpy."""
    random = np.random.default_rng(seed)
    basis = np.linalg.qr(random.standard_normal((dims, rank)))[0]
    gallery = random.standard_normal((rows, rank)) @ basis.T + random.standard_normal(dims)
    near = gallery[random.integers(rows, size=queries)]
    return gallery, near + random.uniform(0, 0.8) * random.standard_normal((queries, dims)) + 0.3


def scalar(x, random, bits):
    low, high = x.min(0), x.max(0)
    step = np.where(high > low, (high - low) / (2**bits - 1), 1)
    return low + np.round((x - low) / step) * step


def product(x, random, parts):
    """Every part of a row by the nearest of a few rows' parts."""
    coded = np.empty_like(x)
    for columns in np.array_split(np.arange(x.shape[1]), parts):
        book = x[random.choice(len(x), min(6, len(x)), replace=False)][:, columns]
        coded[:, columns] = book[((x[:, None, columns] - book) ** 2).sum(2).argmin(1)]
    return coded


def signs(x, random, _):
    """RaBitQ's code: the signs of the centred row, scaled so that <code, row> is the row's own square."""
    centred = x - x.mean(0)
    code = np.sign(centred) + (centred == 0)
    scale = (centred**2).sum(1) / np.maximum((code * centred).sum(1), 1e-300)
    return x.mean(0) + scale[:, None] * code


def toward(x, random, size):
    """Errors that point from every row to one place: the worst there are."""
    place = x.mean(0) + 3 * random.standard_normal(x.shape[1])
    apart = place - x
    return x + size * apart / np.linalg.norm(apart, axis=1, keepdims=True)


QUANTISERS = [(scalar, 4), (scalar, 6), (scalar, 8), (product, 8), (signs, 0), (toward, 0.05), (toward, 0.5)]


def costs(y, x, z, metric, centre):
    """(Q, G) what codes order rows by, as the definitions read."""
    if centre is None:
        return ((y[:, None] - z) ** 2).sum(2) if metric == "l2" else -y @ z.T
    if metric == "l2":
        return ((y[:, None] - x) ** 2).sum(2) - 2 * (y - centre) @ (z - x).T
    return -y @ x.T - (y - centre) @ (z - x).T


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
def test_what_is_certified_is_first_in_ten_thousand_cases(metric):
    cases, certified = 0, dict.fromkeys([(whole, name) for whole in (True, False) for name in ("before", "after")], 0.0)
    for trial in range(42):
        random = np.random.default_rng(trial)
        rows, dims = int(random.integers(2, 30)), int(random.integers(4, 60))
        rank = int(random.integers(1, dims + 1))
        x, y = scene(rows, dims, rank, 40, trial)
        x = x / np.linalg.norm(x, axis=1, keepdims=True) if metric == "cosine" else x
        quantiser, amount = QUANTISERS[trial % len(QUANTISERS)]
        z = quantiser(x, random, amount)
        centre = x.mean(0) if trial % 3 == 0 else None
        by = "l2" if metric == "l2" else "ip"
        for k in ("exact", 1 + trial % 4):  # whole hulls and parts of them
            projection = Projection(k, metric).fit(x, y)
            found = certify(y, x, z, projection, centre=centre)
            exact = costs(y, x, x, by, None).argmin(1)
            assert np.array_equal(found.nearest.numpy(), exact)
            for name, asked in (("before", y), ("after", projection.transform_queries(y))):
                one = getattr(found, name)
                found_costs = costs(asked, x, z, by, centre)
                right = found_costs.argmin(1) == exact
                two = np.sort(found_costs, 1)
                clear = two[:, 1] - two[:, 0] > 1e-9  # rows of one code are tied
                assert not bool((one.certified & ~torch.from_numpy(right)).any()), (trial, name)
                assert not bool((one.by_norms & ~one.certified).any())
                assert np.array_equal(one.kept.numpy()[clear], right[clear])
                assert torch.equal(one.candidates == 1, one.certified)
                cases += len(y)
                certified[k == "exact", name] += float(one.certified.double().mean()) / 42
    assert 3 * cases > 10_000
    assert 0.05 < certified[True, "before"] < 0.9
    assert certified[True, "after"] > certified[True, "before"] + 0.03


@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_errors_as_bad_as_the_bound_allows_do_change_the_neighbour(metric):
    """The bound is no looser than Cauchy and Schwarz: two rows, errors along their own sides."""
    x = np.array([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    y = np.array([[0.4, 0.0, 0.0]]) if metric == "l2" else np.array([[0.2, 0.0, 0.0]])
    projection = Projection("exact", metric).fit(x)
    for size, certified in ((0.9, True), (1.1, False)):
        step = size * 0.1
        if metric == "l2":  # 0.36 - 0.16 = 2 (0.4 + 0.6) step, and the squares of both steps cancel
            z = x + step * np.array([[-1.0, 0, 0], [-1.0, 0, 0]])
        else:  # the second row has 0.2, the first 0
            z = x + 5 * step * np.array([[1.0, 0, 0], [-1.0, 0, 0]])
        found = certify(y, x, z, projection)
        assert bool(found.before.certified) is bool(found.after.certified) is certified
        assert bool(found.before.kept) is certified


def test_blocks_change_nothing(monkeypatch):
    from gapkern.theory import certificates

    x, y = scene(25, 12, 9, 31, 0)
    z, projection = scalar(x, None, 5), Projection("exact").fit(x)
    whole = certify(y, x, z, projection)
    monkeypatch.setattr(certificates, "_ROWS", 4)
    monkeypatch.setattr(certificates, "_QUERIES", 7)
    assert certify(y, x, z, projection) == whole
    torch32 = certify(*(torch.from_numpy(t).float() for t in (y, x, z)), projection)
    assert float((torch32.after.certified == whole.after.certified).double().mean()) > 0.9


def test_certified_of_class_prompts_in_four_bits(real_data):
    """Ten captions as class prompts, scalar codes of four bits: what can be said before and after."""
    images, texts = (t.astype(np.float64) for t in real_data("clip"))
    prompts = texts[:10]
    for metric, least, most in (("l2", 0.75, 0.1), ("ip", 0.9, 0.1)):
        found = certify(images, prompts, scalar(prompts, None, 4), Projection("exact", metric).fit(prompts)).to_dict()
        assert found["before"]["certified"] < most
        assert found["after"]["certified"] > least
        assert found["after"]["kept"] > found["before"]["kept"]


def test_what_is_refused():
    x, y = scene(6, 8, 5, 3, 0)
    fitted = Projection("exact").fit(x)
    for arguments, error, message in (
        ((y, x, x, None), TypeError, "projection: expected a Projection, got NoneType"),
        ((y, x, x, Projection()), NotFittedError, "Projection: call fit before use"),
        ((y, x, x, Projection("exact", reduce=True).fit(x)), ValueError, "projection: expected one without reduce"),
        ((y[:, :5], x, x, fitted), ValueError, "queries: expected D = 8 as fitted"),
        ((y, x, x[:4], fitted), ValueError, "decoded: expected 6 rows as in gallery"),
        ((y, x, x * np.nan, fitted), ValueError, "decoded: expected finite values"),
    ):
        with pytest.raises(error, match=message):
            certify(*arguments)
    with pytest.raises(ValueError, match=r"centre: expected shape \(8,\), got \(3,\)"):
        certify(y, x, x, fitted, centre=np.zeros(3))
