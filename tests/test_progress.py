"""What long work says where no bar can be drawn: lines at a distance, with what is left."""

import io
import json

import numpy as np
import pytest

from gapkern import Gaussian, _progress, robustness, sweep
from gapkern.cli import common, main


class Clock:
    def __init__(self):
        self.seconds = 0.0

    def __call__(self):
        return self.seconds


@pytest.fixture
def heard():
    """Steps of two stages to a stream that is no terminal, and the clock they are timed by."""
    clock, stream = Clock(), io.StringIO()
    with _progress.shown({"train": "training"}, {"train": "steps"}, stream=stream, clock=clock) as step:
        yield step, clock, lambda: stream.getvalue().splitlines()


def test_a_line_every_half_minute_and_none_before(heard):
    step, clock, lines = heard
    for second in range(100):
        clock.seconds = second
        step("train", second, 1200, "loss 3.4")
    assert lines() == [
        f"training: {s}/1200 steps, loss 3.4, {left} left"
        for s, left in ((30, "20 min"), (60, "19 min"), (90, "18 min"))
    ]


def test_short_work_is_silent(heard):
    step, clock, lines = heard
    for second in range(29):
        clock.seconds = second
        step("train", second, 29)
    assert lines() == []


def test_the_time_left_is_of_the_stage_and_not_of_what_was_there_already(heard):
    step, clock, lines = heard
    clock.seconds = 1000
    step("sweep", 900, 1000)
    clock.seconds = 1040
    step("sweep", 910, 1000)  # ten of them in forty seconds
    clock.seconds = 1075
    step("sweep", 1000, 1000)
    assert lines() == ["sweep: 900/1000", "sweep: 910/1000, 6 min left", "sweep: 1000/1000"]


def test_a_reader_that_has_left_stops_nothing():
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    clock = Clock()
    with _progress.shown({}, stream=Closed(), clock=clock) as step:
        clock.seconds = 31
        step("any", 1, 2)


def test_bars_on_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    with _progress.shown({"train": "training"}, stream=stream) as step:
        step("train", 1, 3, "loss 3.4")
        step("train", 3, 3, "loss 2.1")
    assert "training" in stream.getvalue()
    assert "3/3" in stream.getvalue()
    assert "loss 2.1" in stream.getvalue()


@pytest.fixture
def told(monkeypatch):
    """Every step is a line."""
    monkeypatch.setattr(_progress, "EVERY", 0.0)


def test_the_verbs_say_how_far_they_are(told, tmp_path, monkeypatch, capsys, undrawn):
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    for name in ("images", "texts"):
        np.save(f"{name}.npy", generator.standard_normal((20, 8)).astype(np.float32))
    pytest.importorskip("faiss")
    said = {}
    for line in (
        "robust images.npy texts.npy --gaussian 0.1 0.2 --alphas 0,1 --json",
        "index texts.npy --out index --json",
        "search index images.npy --json",
        "shift fit texts.npy images.npy --out shift.safetensors --json",
    ):
        assert main(line.split()) == 0
        out, err = capsys.readouterr()
        json.loads(out)
        said[line.split()[0]] = err
    assert "sweep: 3/4 cases, " in said["robust"]
    assert "adding vectors: 20/20 rows" in said["index"]
    assert "searching: 20/20 queries" in said["search"]
    assert "reading the gallery: 20/20 rows" in said["shift"]


@pytest.mark.open_clip
def test_training_says_its_loss(told, tmp_path, capsys, undrawn, monkeypatch):
    from gapkern.experiments import demo

    monkeypatch.setattr(demo, "ALPHAS", (0.0, 1.0))
    with _progress.shown({"train": "training"}, {"train": "steps"}) as step:
        demo.run(tmp_path / "demo", steps=2, on_progress=step)
    err = capsys.readouterr().err
    assert "training: 1/2 steps, loss " in err
    assert "sweep: 2/2" in err


def test_the_library_is_silent_until_asked(told, capsys):
    gallery = np.eye(3, 8, dtype=np.float32)
    robustness.robustness(gallery, gallery, Gaussian(0.1))
    sweep(gallery, gallery, [0.0], Gaussian(0.1))
    assert capsys.readouterr().err == ""
    robustness.robustness(gallery, gallery, Gaussian(0.1), progress=True)
    assert "3/3 queries" in capsys.readouterr().err


@pytest.mark.parametrize(("available", "expected"), [({0}, 1), ({0, 1}, 2), (set(range(64)), 4)])
def test_images_are_read_by_no_more_processes_than_processors(monkeypatch, available, expected):
    from gapkern.cli import parser

    monkeypatch.setattr("os.sched_getaffinity", lambda process: available, raising=False)
    for verb in ("embed", "eval"):
        assert common.workers(parser().parse_args([verb])) == expected
        assert common.workers(parser().parse_args([verb, "--num-workers", "7"])) == 7
