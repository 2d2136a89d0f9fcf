"""What the program around a call has set changes no measure, and no measure changes what is set."""

import logging
import threading

import numpy as np
import pytest
import torch

from gapkern import Gaussian, MeanShift, gap_metrics, sweep
from gapkern._ambient import isolated, isolation, steps
from gapkern._logs import quiet
from gapkern._threads import one_thread
from gapkern.dynamics import descend
from gapkern.retrieval import recall
from gapkern.robustness import robustness
from gapkern.theory import assess
from tests.measures import ENTRIES, close, pairs, plain
from tests.states import STATES, in_a_new_thread, surroundings

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
