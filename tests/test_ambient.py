"""What the program around a call has set changes no measure, and no measure changes what is set."""

import contextlib
import importlib.util
import locale
import logging
import math
import threading
import warnings
from dataclasses import fields, is_dataclass

import numpy as np
import pytest
import torch

from gapkern import Gaussian, MeanShift, Projection, Quantize, Replace, Uniform, best_alpha, gap_metrics, sweep
from gapkern._ambient import isolated, isolation, steps
from gapkern._logs import quiet
from gapkern._threads import one_thread
from gapkern.dynamics import descend, evaluate, isotropic_gaussians, measure, tight_clusters
from gapkern.evaluation import classification, mixed_retrieval, multiple_choice, retrieval, templates
from gapkern.evaluation.settings import Settings
from gapkern.gap import BASELINES, MixedShift, fuse, gap_structure
from gapkern.perturb import perturb
from gapkern.ranks import Rows
from gapkern.retrieval import recall
from gapkern.robustness import robustness
from gapkern.theory import assess, certify, freeze, leading_gradient, orthogonality, preservation, robustness_curve

faiss = pytest.mark.skipif(importlib.util.find_spec("faiss") is None, reason="faiss is not installed")


def pairs():
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(48, 12, generator=generator, dtype=torch.float32)
    texts = images + 0.4 * torch.randn(48, 12, generator=generator, dtype=torch.float32) + 0.5
    return images, texts


def fitted_baselines(x, y):
    found = {}
    for name, make in BASELINES.items():
        baseline = make().fit(y, x)
        found[name] = baseline.transform(y), baseline.transform_queries(x)
    return found


def shifts(x, y):
    parts = MeanShift().partial_fit(y[:20], x[:25]).merge(MeanShift().fit(y[20:], x[25:]))
    return [
        (s.gap_vector_, s.shift_vector_, s.n_components_, s.orthogonality_, s.agreement_, s.transform(y))
        for s in (MeanShift().fit(y, x), parts, MeanShift(normalize=True).fit(y, x).at(0.5))
    ]


def perturbed(x, y):
    return [
        perturb(y, p, seed=3)
        for p in (Gaussian(0.5), Uniform(0.5), Quantize(7), Quantize(7, "global"), Gaussian(0.1) | Quantize(5))
    ]


def robust(x, y):
    shift = MeanShift().fit(y, x)
    labels = list(range(len(x)))
    return [
        without_seconds(robustness(x, y, p, labels=labels, shift=s, method=m, trials=3))
        for p, s, m in (
            (Gaussian(0.5), None, "exact"),
            (Gaussian(0.5), shift, "projected"),
            (Uniform(0.5), shift, "sample"),
            (Quantize(4), shift, "auto"),
            (Replace(y.flip(1)), None, "auto"),
        )
    ]


def without_seconds(result):
    return {name: value for name, value in vars(result).items() if name != "seconds"}


def swept(x, y):
    rows = sweep(x, y, [0.0, 1.0], [Gaussian(0.5), Quantize(4)], range(len(x)), trials=2).rows
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def descents(x, y):
    options = {"lr": 0.1, "steps": 6, "record_every": 2}
    return [
        descend(x, y, 2.0, **options).rows,
        descend(x, y, 2.0, optimizer="adam", sphere=True, learn_scale=True, batch=16, snapshots=[3], **options),
    ]


def tasks(x, y):
    rows, others = Rows(x, 0, len(x)), Rows(y, 0, len(y))
    settings = Settings("auto", (Gaussian(0.2), Quantize(4)))
    of, all_rows = torch.arange(48, device="cpu") // 4, torch.arange(48, device="cpu")
    return [
        classification(rows, of, y[::4], settings),
        templates(rows, of, torch.stack([y[::4], y[1::4]]), ["a", "b"], settings),
        retrieval(rows, others, all_rows, (1, 5), settings),
        multiple_choice(Rows(x[::4], 0, 12), others, of, all_rows[:12] // 12, settings),
    ]


def indexes(x, y):
    from gapkern.retrieval import GapIndex, compare_quantisers

    shift = MeanShift().fit(y, x)
    found = [GapIndex(factory, shift=shift).train(y).add(y).search(x, 5) for factory in ("Flat", "IVF4,Flat", "SQ8")]
    rows = compare_quantisers(x, y, ["Flat", "SQ8"]).rows
    index, kept = GapIndex().add(y), GapIndex("IVF4,SQ8", "ip", Projection("exact", "ip").fit(y[:6], x)).train(y).add(y)
    removed = kept.remove_ids(torch.arange(3, device="cpu"))
    return (
        found,
        [removed, kept.search(x, 5), kept.reconstruct(7), kept.reconstruct_batch([9, 4])],
        [{k: v for k, v in r.items() if k != "queries_per_second"} for r in rows],
        recall(x, None, range(48), index=index),
    )


def mixed(x, y):
    names = ["image", "text", "fused"] * 16
    found = [MixedShift(method).fit(y, x, names) for method in ("means", "shift")]
    labels = torch.arange(48, device="cpu")
    outcomes = [mixed_retrieval(x, y, names, labels, labels, shift=shift).to_dict() for shift in [None, *found]]
    return outcomes, fuse(x, y), [shift.transform(y, names) for shift in found]


ENTRIES = {
    "gap_metrics": lambda x, y: gap_metrics(x, y),
    "gap_structure": lambda x, y: gap_structure(x, y, labels=torch.arange(48, device="cpu") % 5),
    "baselines": fitted_baselines,
    "mixed": mixed,
    "certify": lambda x, y: certify(x, y, y + 0.1, Projection("exact").fit(y[:20], x)).to_dict(),
    "mean_shift": shifts,
    "perturb": perturbed,
    "robustness": robust,
    "sweep": swept,
    "best_alpha": lambda x, y: best_alpha(x, y, Gaussian(0.5), shift=MeanShift().fit(y, x), tolerance=0.3),
    "assess": lambda x, y: assess(x, y, 2.0),
    "theory": lambda x, y: [
        leading_gradient(x, y, 2.0),
        freeze(x, y, 2.0),
        orthogonality(x, y),
        preservation(x, y, MeanShift().fit(y, x)),
        robustness_curve(x, y, Gaussian(0.5), alphas=[0, 1]),
    ],
    "dynamics": lambda x, y: [
        evaluate(x, y, 2.0),
        measure(x, y),
        tight_clusters(5, 3, 0.1, 1.0),
        isotropic_gaussians(5, 3, 1.0),
    ],
    "descend": descents,
    "recall": lambda x, y: recall(x, y, [[i, (i + 1) % 48] for i in range(48)], metric="l2"),
    "evaluation": tasks,
    "index": pytest.param(indexes, marks=faiss),
}


def plain(value):
    """Nested lists of plain values and arrays."""
    if isinstance(value, torch.Tensor):
        return (str(value.dtype), str(value.device), tuple(value.shape), value.detach().numpy().tobytes())
    if isinstance(value, np.ndarray):
        return (str(value.dtype), value.shape, value.tobytes())
    if is_dataclass(value):
        return [plain(getattr(value, f.name)) for f in fields(value)]
    if isinstance(value, dict):
        return [(k, plain(v)) for k, v in value.items()]
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return repr(value)


def close(value, truth):
    """The same to what the order of sums may do."""
    if isinstance(value, torch.Tensor):
        scale = float(truth.double().abs().max()) if truth.numel() else 0.0
        return torch.allclose(value.double(), truth.double(), rtol=1e-6, atol=1e-6 * scale, equal_nan=True)
    if isinstance(value, np.ndarray):
        return close(torch.from_numpy(value), torch.from_numpy(truth))
    if is_dataclass(value):
        return all(close(getattr(value, f.name), getattr(truth, f.name)) for f in fields(value))
    if isinstance(value, dict):
        return value.keys() == truth.keys() and all(close(value[k], truth[k]) for k in value)
    if isinstance(value, list | tuple):
        return len(value) == len(truth) and all(map(close, value, truth))
    if isinstance(value, float):
        return math.isclose(value, truth, rel_tol=1e-6, abs_tol=1e-7) or (math.isnan(value) and math.isnan(truth))
    return isinstance(value, str) or value == truth


def surroundings():
    """All that a call may not change."""

    def precision():
        try:
            return torch.get_float32_matmul_precision()
        except RuntimeError:
            return "mixed"

    return (
        [(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")],
        torch.is_autocast_cache_enabled(),
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.is_inference_mode_enabled(),
        torch.is_grad_enabled(),
        precision(),
        torch.backends.mkldnn.matmul.fp32_precision,
        torch.backends.cuda.matmul.fp32_precision,
        torch.backends.fp32_precision,
        torch.are_deterministic_algorithms_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
        torch.get_num_threads(),
        in_a_new_thread(),
        torch.random.get_rng_state().numpy().tobytes(),
        repr(np.random.get_state()),  # noqa: NPY002
        np.geterr(),
        locale.setlocale(locale.LC_ALL),
        logging.root.manager.disable,
        list(warnings.filters),
        torch.overrides._len_torch_function_stack(),
    )


def in_a_new_thread():
    seen = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return seen[0]


@contextlib.contextmanager
def changed(setter, value, back):
    try:
        setter(value)
        yield
    finally:
        setter(back)


@contextlib.contextmanager
def precision(where, value):
    before = where.fp32_precision
    where.fp32_precision = value
    try:
        yield
    finally:
        where.fp32_precision = before


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def matmul_precision(value):
    torch.set_float32_matmul_precision(value)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


def a_locale():
    """One with a decimal comma where the machine has it."""
    for name in ("de_DE.UTF-8", "de_DE.utf8", "fr_FR.UTF-8", "C"):
        with contextlib.suppress(locale.Error):
            locale.setlocale(locale.LC_ALL, name)
            return


@contextlib.contextmanager
def other_locale():
    before = locale.setlocale(locale.LC_ALL)
    try:
        a_locale()
        yield
    finally:
        locale.setlocale(locale.LC_ALL, before)


def dtype(value):
    return lambda: changed(torch.set_default_dtype, value, torch.float32)


STATES = {
    "autocast bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast float16": lambda: torch.autocast("cpu", torch.float16),
    "float64 by default": dtype(torch.float64),
    "float16 by default": dtype(torch.float16),
    "bfloat16 by default": dtype(torch.bfloat16),
    "meta by default": lambda: changed(torch.set_default_device, "meta", None),
    "within a meta device": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "deterministic": deterministic,
    "medium products": lambda: matmul_precision("medium"),
    "bfloat16 products of oneDNN": lambda: precision(torch.backends.mkldnn.matmul, "bf16"),
    "low precision throughout": lambda: precision(torch.backends, "bf16"),
    "strict NumPy": lambda: np.errstate(all="raise"),
    "another locale": other_locale,
}

# Where float32 products would be rounded they are formed in float64, which moves last bits.
ROUNDED = {"medium products", "bfloat16 products of oneDNN", "low precision throughout"}

_clean: dict[str, object] = {}


def clean(name, entry):
    if name not in _clean:
        _clean[name] = entry(*pairs())
    return _clean[name]


each_entry = pytest.mark.parametrize(
    ("name", "entry"),
    [
        pytest.param(name, *e.values, id=name, marks=e.marks)
        if hasattr(e, "values")
        else pytest.param(name, e, id=name)
        for name, e in ENTRIES.items()
    ],
)


@pytest.mark.parametrize("state", STATES)
@each_entry
def test_a_state_changes_no_bit_and_stays_as_it_is(name, entry, state):
    truth, (x, y) = clean(name, entry), pairs()
    with STATES[state]():
        before = surroundings()
        found = entry(x, y)
        assert surroundings() == before
    assert close(found, truth) if state in ROUNDED else plain(found) == plain(truth)


@each_entry
def test_inputs_that_require_gradients_or_are_inference_tensors_give_the_same(name, entry):
    truth = plain(clean(name, entry))
    assert plain(entry(*(t.requires_grad_() for t in pairs()))) == truth
    with torch.inference_mode():
        x, y = (t.clone() for t in pairs())
    assert plain(entry(x, y)) == truth


@each_entry
def test_one_thread_or_two_agree_and_the_number_stays(name, entry):
    truth, threads = clean(name, entry), torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            before = surroundings()
            assert close(entry(*pairs()), truth)
            assert surroundings() == before
    finally:
        torch.set_num_threads(threads)


REFUSED = {
    "gap_metrics": lambda x, y: gap_metrics(x, y[:5]),
    "fit": lambda x, y: MeanShift(n_components=-1).fit(y, x),
    "robustness": lambda x, y: robustness(x, y, Gaussian(0.5), method="sample", shift=MeanShift()),
    "sweep": lambda x, y: sweep(x, y, [0.0], [Gaussian(1.0)], labels=[-1] * 48),
    "assess": lambda x, y: assess(x, y[:5], 2.0),
    "descend": lambda x, y: descend(x, y, 1e4, lr=1e300, steps=5),
    "recall": lambda x, y: recall(x, y, [48] * 48),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_error_leaves_everything_as_it_was(name):
    x, y = pairs()
    with torch.autocast("cpu", torch.bfloat16), torch.device("meta"), np.errstate(all="raise"):
        before = surroundings()
        with pytest.raises((ValueError, RuntimeError)):
            REFUSED[name](x, y)
        assert surroundings() == before


def test_a_callback_runs_in_the_callers_surroundings():
    seen = []

    def look(row):
        seen.append((threading.current_thread(), surroundings()))

    x, y = pairs()
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode(), np.errstate(all="raise"):
        before = surroundings()
        descend(x, y, 2.0, lr=0.1, steps=4, record_every=1, on_record=look)
    assert seen == [(threading.current_thread(), before)] * 5


def test_a_callback_that_raises_stops_the_descent():
    def stop(row):
        raise KeyError("enough")

    before = surroundings()
    with pytest.raises(KeyError, match="enough"):
        descend(*pairs(), 2.0, lr=0.1, steps=4, on_record=stop)
    assert surroundings() == before


def test_a_generator_is_isolated_step_by_step():
    @isolated
    def states():
        try:
            for _ in range(3):
                yield torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.zeros(1).device.type
        finally:
            closed.append(torch.is_grad_enabled())

    closed = []
    with torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        before = surroundings()
        for inside in states():
            assert inside == (False, False, "cpu")
            assert surroundings() == before
        for _ in states():
            break
    assert closed[0] is False
    assert len(closed) == 2
    assert [float(v) for v in steps(iter([1.0, 2.0]))] == [1.0, 2.0]


def test_two_threads_at_once_leave_each_others_state_alone():
    """Each in its own state, and past a barrier: one is within the guard while the other enters and leaves."""
    x, y = pairs()
    truth = plain(ENTRIES["descend"](x, y))
    threads, failures = torch.get_num_threads(), []
    meet = threading.Barrier(2, timeout=60)

    def one(state):
        try:
            with STATES[state]():
                before = surroundings()[:6]
                for _ in range(2):
                    meet.wait()
                    if plain(ENTRIES["descend"](x, y)) != truth or surroundings()[:6] != before:
                        failures.append(state)
                meet.wait()
                with isolation():
                    meet.wait()
                    if torch.is_autocast_enabled("cpu"):
                        failures.append(f"{state}: autocast within")
                if surroundings()[:6] != before:
                    failures.append(f"{state}: after")
        except Exception as error:
            failures.append(error)
            meet.abort()

    workers = [threading.Thread(target=one, args=(s,)) for s in ("autocast bfloat16", "inference mode")]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert failures == []
    assert torch.get_num_threads() == in_a_new_thread() == threads
    assert torch.get_float32_matmul_precision() == "highest"


def test_one_thread_raises_what_its_function_raises():
    with one_thread() as run, pytest.raises(ZeroDivisionError):
        run(lambda: 1 / 0)


def test_transforms_keep_their_gradients():
    x, y = (t.double() for t in pairs())
    for shift in (MeanShift(normalize=True).fit(y, x), MeanShift(moves="queries").fit(y, x)):
        for move in (shift.transform, shift.transform_queries):
            z = y[:3].clone().requires_grad_()
            assert torch.autograd.gradcheck(move, (z,))
    with torch.inference_mode():
        shift = MeanShift().fit(y, x)
    z = y[:3].clone().requires_grad_()
    shift.transform(z).sum().backward()
    assert torch.equal(z.grad, torch.ones_like(z))


def test_only_the_thread_that_loads_a_model_is_quiet():
    root, seen = logging.root, []

    class Keep(logging.Handler):
        def emit(self, record):
            seen.append(record.getMessage())

    handlers, filters, keep = list(root.handlers), list(root.filters), Keep()
    root.handlers = [keep]
    try:
        entered, leave = threading.Event(), threading.Event()

        def load():
            with quiet():
                logging.error("from the loader")
                entered.set()
                leave.wait(60)
                logging.error("from the loader, later")
                logging.critical("too bad to drop")

        loader = threading.Thread(target=load)
        loader.start()
        entered.wait(60)
        with quiet():
            logging.error("from a second loader")
        logging.error("from the program")
        leave.set()
        loader.join()
        logging.error("after")
        assert seen == ["from the program", "too bad to drop", "after"]
        assert root.handlers == [keep]
        assert root.filters == filters
        root.handlers = []
        with quiet():
            logging.error("installs no handler")
        assert root.handlers == []
        assert root.manager.disable == 0
    finally:
        root.handlers = handlers
