"""`MeanShift` and the baselines as scikit-learn's users expect estimators to behave."""

import copy
import pickle

import numpy as np
import pytest
import torch

from gapkern import Gaussian, MeanShift, Quantize
from gapkern.dynamics import descend, evaluate
from gapkern.gap import BASELINES, NotFittedError
from gapkern.gap.moments import Sample
from gapkern.ranks import Rows
from gapkern.robustness import robustness
from gapkern.theory import freeze, leading_gradient, preservation, robustness_curve

CLASSES = sorted({c.__name__: c for c in BASELINES.values()}.items())
FITTED = ("gap_vector_", "shift_vector_", "n_components_", "orthogonality_", "agreement_", "n_features_in_")
each_class = pytest.mark.parametrize("make", [c for _, c in CLASSES], ids=[name for name, _ in CLASSES])


def pairs(n=30, dims=6):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(n, dims, generator=generator)
    return x, x + 0.2 * torch.randn(n, dims, generator=generator) + 1


@each_class
def test_init_only_assigns(make):
    names = list(make().get_params())
    odd = {name: object() for name in names}
    estimator = make(**odd)
    assert estimator.get_params() == odd
    assert {name: value for name, value in vars(estimator).items() if name in odd} == odd
    if odd:
        with pytest.raises((TypeError, ValueError), match=rf"^({'|'.join(names)}): expected"):
            estimator.fit(*pairs())


@each_class
def test_parameters_clones_copies_and_pickles(make):
    sklearn = pytest.importorskip("sklearn.base")
    from sklearn.exceptions import NotFittedError as Theirs
    from sklearn.utils.validation import check_is_fitted

    gallery, queries = pairs()
    estimator = make()
    with pytest.raises(Theirs):
        check_is_fitted(estimator)
    with pytest.raises(NotFittedError, match="call fit before transform"):
        estimator.transform(gallery)
    assert estimator.fit(gallery, queries) is estimator
    check_is_fitted(estimator)
    assert estimator.n_features_in_ == 6
    for twin in (copy.copy(estimator), copy.deepcopy(estimator), pickle.loads(pickle.dumps(estimator))):
        assert torch.equal(twin.transform(gallery), estimator.transform(gallery))
        assert twin.get_params() == estimator.get_params()
    for name in estimator.get_params():
        changed = sklearn.clone(estimator).set_params(**{name: getattr(estimator, name)})
        assert changed.get_params() == estimator.get_params()
    fresh = sklearn.clone(estimator)
    assert type(fresh) is make
    with pytest.raises(NotFittedError):
        fresh.transform(gallery)
    with pytest.raises(ValueError, match=rf"{make.__name__}: expected parameters out of .*, got 'wrong'"):
        estimator.set_params(wrong=1)
    assert repr(estimator).startswith(f"{make.__name__}(")


def test_a_pipeline_takes_it():
    pipeline = pytest.importorskip("sklearn.pipeline")
    gallery, queries = (t.numpy() for t in pairs())
    piped = pipeline.make_pipeline(MeanShift(n_components=2))
    moved = piped.set_params(meanshift__alpha=0.5).fit(gallery, queries).transform(gallery)
    assert np.array_equal(moved, MeanShift(0.5, n_components=2).fit(gallery, queries).transform(gallery))


def test_asking_what_is_there_never_raises():
    gallery, queries = pairs()
    for shift in (MeanShift(), MeanShift().partial_fit(gallery), MeanShift().partial_fit(queries=queries)):
        assert not shift.is_fitted
        for name in FITTED:
            assert not hasattr(shift, name)
            with pytest.raises(AttributeError):
                getattr(shift, name)
            with pytest.raises(ValueError, match="MeanShift: "):
                getattr(shift, name)
    fitted = MeanShift().fit(gallery, queries)
    assert all(hasattr(fitted, name) for name in FITTED)
    assert not hasattr(fitted, "nothing")
    assert not hasattr(BASELINES["center"](), "g")


def test_a_fit_keeps_the_parameters_it_was_asked_with():
    gallery, queries = pairs()
    shift = MeanShift(n_components=2).fit(gallery, queries)
    shift.set_params(n_components=4)
    assert shift.n_components_ == 2
    assert shift.fit(gallery, queries).n_components_ == 4


def test_a_loaded_shift_refuses_more_rows_and_copies_do_not_share(tmp_path):
    gallery, queries = pairs()
    shift = MeanShift(n_components=2).fit(gallery, queries)
    shift.save(tmp_path / "s.safetensors")
    loaded = MeanShift.load(tmp_path / "s.safetensors")
    for call in (
        lambda: loaded.partial_fit(gallery),
        lambda: loaded.at(0.5).partial_fit(queries=queries),
        lambda: loaded.merge(shift),
        lambda: shift.merge(loaded),
        loaded.samples,
    ):
        with pytest.raises(ValueError, match="a loaded shift can be applied but not added to"):
            call()
    assert torch.equal(loaded.shift_vector_, shift.shift_vector_)
    assert torch.equal(loaded.fit(queries, gallery).gap_vector_, -shift.gap_vector_)
    before, other = shift.gap_vector_.clone(), shift.at(0.5)
    other.partial_fit(queries=queries + 5)
    copy.copy(shift).partial_fit(gallery - 5)
    assert not torch.equal(other.gap_vector_, before)
    assert torch.equal(shift.partial_fit(gallery[:0]).gap_vector_, before)


def test_a_refused_batch_leaves_the_fit_as_it_was():
    gallery, queries = pairs()
    shift = MeanShift(n_components=2).fit(gallery, queries)
    before = shift.gap_vector_.clone()
    bad = queries.clone()
    bad[-1, 2] = torch.nan
    for more in ({"gallery": gallery, "queries": bad}, {"gallery": gallery[:, :5]}, {"gallery": gallery, "queries": 1}):
        with pytest.raises((ValueError, TypeError)):
            shift.partial_fit(**more)
        assert torch.equal(shift.gap_vector_, before)
    other = MeanShift().partial_fit(gallery[:, :5])
    with pytest.raises(ValueError, match="other: expected D = 6, got a shift of D = 5"):
        shift.merge(other)
    with pytest.raises(TypeError, match="other: expected a MeanShift, got Tensor"):
        shift.merge(gallery)
    assert torch.equal(shift.gap_vector_, before)


@pytest.mark.parametrize(
    "parameters",
    [
        {"n_components": np.int64(2)},
        {"n_components": np.float32(0.5)},
        {"n_components": np.float64(0.5)},
        {"n_components": np.str_("exact")},
        {"alpha": np.float32(0.5)},
        {"alpha": 1},
        {"normalize": np.bool_(True)},
        {"model": np.str_("a model")},
        {"moves": np.str_("queries")},
        {"agreement": np.float64(0.9)},
    ],
    ids=repr,
)
def test_parameters_of_numpy_are_saved_as_plain_ones(parameters, tmp_path):
    gallery, queries = pairs()
    shift = MeanShift(**parameters).fit(gallery, queries)
    shift.save(tmp_path / "s.safetensors")
    loaded = MeanShift.load(tmp_path / "s.safetensors")
    assert loaded.get_params() == shift.get_params()
    assert {type(v) for v in loaded.get_params().values()} <= {int, float, str, bool, type(None)}
    assert torch.equal(loaded.transform(gallery), shift.transform(gallery))


@pytest.mark.parametrize(
    ("facts", "tensors", "message"),
    [
        ({"alpha": None}, {}, "alpha"),
        ({"alpha": "import os"}, {}, "got invalid syntax"),
        ({"components": "'most'"}, {}, "n_components: expected one of"),
        ({"components_": "-1"}, {}, "components_"),
        ({"normalize": "[" * 300}, {}, "parenthes"),
        ({}, {"gap_vector": torch.ones(5).double()}, "vectors"),
        ({}, {"shift_vector": torch.full((6,), torch.nan).double()}, "finite"),
        ({}, {"gap_vector": None}, "gap_vector"),
    ],
)
def test_a_spoilt_file_is_refused_in_one_line(facts, tensors, message, tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    path = tmp_path / "s.safetensors"
    MeanShift().fit(*pairs()).save(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        stored = {name: file.get_tensor(name) for name in ("gap_vector", "shift_vector")}
    metadata, stored = (
        {k: v for k, v in (a | b).items() if v is not None} for a, b in ((metadata, facts), (stored, tensors))
    )
    save_file(stored, path, metadata)
    with pytest.raises(ValueError, match=rf"path: expected .*{message}") as error:
        MeanShift.load(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_shards_draw_different_positions():
    generator = torch.Generator().manual_seed(0)
    shards = [torch.randn(4000, 1, generator=generator) for _ in range(2)]
    places = []
    for rows in shards:
        sample = Sample(1, 400)
        sample.update(rows)
        places.append(set((rows[:, 0][:, None] == sample.rows[:, 0]).any(1).nonzero()[:, 0].tolist()))
    assert len(places[0] & places[1]) < 80, "40 by chance"
    again = Sample(1, 400)
    again.update(shards[0])
    first = Sample(1, 400)
    first.update(shards[0])
    assert torch.equal(again.rows, first.rows)


def test_results_with_tensors_compare():
    x, y = (t.double() for t in pairs())
    shift = MeanShift(n_components=2).fit(y, x)
    make = [
        lambda s: robustness(x, y, Gaussian(s), labels=range(30)),
        lambda s: robustness(x, y, Quantize(int(2 + s))),
        lambda s: preservation(x, y, shift, alpha=s),
        lambda s: robustness_curve(x, y, Gaussian(s), alphas=[0, 1], shift=shift),
        lambda s: leading_gradient(x, y, s),
        lambda s: freeze(x, y, s),
        lambda s: evaluate(x, y, s),
        lambda s: descend(x, y, s, lr=0.1, steps=2, snapshots=[1]),
        lambda s: descend(x, y, s, lr=0.1, steps=2, snapshots=[1]).snapshots[1],
        lambda s: Rows(s * x, 0, 30),
    ]
    for call in make:
        assert call(1.0) == call(1.0)
        assert call(1.0) != call(3.0)
        assert call(1.0) != "another kind"
