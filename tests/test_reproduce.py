"""`gapkern reproduce`: its numbers are true, repeat, and survive an interrupt."""

import csv
import html.parser
import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from gapkern import Gaussian, MeanShift
from gapkern._search import nearest
from gapkern.cli import main
from gapkern.experiments import reproduce
from gapkern.experiments.reproduce import Claim, Context, Figure, Result, Target
from gapkern.experiments.reproduce import embeddings as sources
from gapkern.robustness import robustness
from gapkern.testing import hears_interrupts
from tests.reproduced import OURS, given
from tests.scenes import HANGS, strict


def run(capsys, *arguments):
    try:
        status = main(["reproduce", *(str(a) for a in arguments)])
    except SystemExit as exit:
        status = exit.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def numbers(value):
    """A report without its times and where it was written."""
    if isinstance(value, dict):
        return {k: numbers(v) for k, v in value.items() if k not in ("seconds", "command", "env")}
    return [numbers(v) for v in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def pair(reproduced):
    return reproduced.inputs


@pytest.fixture(scope="module")
def done(reproduced):
    return reproduced.out, json.loads((reproduced.out / "report.json").read_text())


class _Table(html.parser.HTMLParser):
    """The rows of the claims' table: the exact and the shown numbers, and the verdict's words."""

    def __init__(self):
        super().__init__()
        self.rows, self.inside, self.value, self.outside = [], False, None, []

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.inside |= tag == "table" and found.get("class") == "sortable"
        if self.inside and tag == "tr":
            self.rows.append(([], []))
        if self.inside and tag == "data":
            self.value = found["value"]
        self.outside += [
            v for k, v in attributes if k in ("src", "srcset", "href") and v[:1] != "#" and v[:5] != "data:"
        ]

    def handle_endtag(self, tag):
        self.inside &= tag != "table"

    def handle_data(self, data):
        if self.value is not None:
            self.rows[-1][0].append((self.value, data))
            self.value = None
        elif self.inside and self.rows:
            self.rows[-1][1].append(data)


def test_the_tables_numbers_are_those_of_the_json(done):
    out, report = done
    page = _Table()
    page.feed((out / "report.html").read_text())
    assert page.outside == []
    rows = page.rows[1:]
    assert len(rows) == len(report["claims"]) > 10
    for (shown, words), claim in zip(rows, report["claims"], strict=True):
        assert [float(exact) for exact, _ in shown] == list(claim["number"].values())
        for exact, text in shown:
            assert float(text) == pytest.approx(float(exact), rel=1e-3, abs=5e-5)
        verdict = {True: "holds", False: "does not hold", None: "cannot tell"}[claim["holds"]]
        assert verdict in words
        assert claim["holds"] is True or claim["reason"]
    for name in OURS:
        alone = json.loads((out / f"{name}.json").read_text())
        assert [{"target": name, **c} for c in alone["claims"]] == [c for c in report["claims"] if c["target"] == name]


def test_every_figure_has_its_files_and_nothing_else_is_left(done):
    out, report = done
    wanted = {"report.html", "report.json", "narrow", *(f"{name}.json" for name in OURS)}
    for entry in report["targets"].values():
        for figure in entry["figures"]:
            wanted |= {f"{figure['name']}.{kind}" for kind in ("png", "pdf", "csv")}
            assert (out / f"{figure['name']}.png").read_bytes()[:4] == b"\x89PNG"
            assert (out / f"{figure['name']}.pdf").read_bytes()[:4] == b"%PDF"
            assert (out / "narrow" / f"{figure['name']}.png").exists()
            assert figure["caption"].endswith(".")
    assert {path.name for path in out.iterdir()} == wanted


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_figure_8_draws_what_robustness_says(done, pair):
    out, _ = done
    images, texts = np.load(pair / "images.npy"), np.load(pair / "texts.npy")
    shift = MeanShift(n_components="auto").fit(texts, images)
    points = [r for r in rows_of(out / "fig8_images___texts.csv") if r["perturbation"] == "gaussian 0.04 total"]
    assert [float(r["alpha"]) for r in points] == [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5]
    for row in points:
        found = robustness(images, texts, Gaussian(0.04), labels=np.arange(60), shift=shift.at(float(row["alpha"])))
        for name in ("robustness", "agreement", "accuracy"):
            assert float(row[name]) == pytest.approx(getattr(found, name), abs=1e-12), name


def test_figure_2_moves_by_the_whole_gap(done, pair):
    out, _ = done
    images, texts = (torch.from_numpy(np.load(pair / f"{n}.npy")) for n in ("images", "texts"))
    gap = images.double().mean(0) - texts.double().mean(0)
    for row in rows_of(out / "fig2.csv"):
        if row["shift"] == "whole gap":
            found = nearest(images, (texts.double() + float(row["alpha"]) * gap).float())
            assert float(row["accuracy"]) == float((found == torch.arange(60)).double().mean())


def test_every_baseline_is_answered_for(done):
    _, report = done
    (table,) = report["targets"]["baselines"]["tables"]
    from gapkern.gap import BASELINES

    assert [row["method"] for row in table["rows"]] == list(BASELINES)
    none, naive, ours = (
        next(r for r in table["rows"] if r["method"] == m) for m in ("none", "mean_shift", "projected_shift")
    )
    assert none["agreement"] == 1
    assert none["robustness"] == pytest.approx(0.7, abs=0.06), "half of the images, at noise that keeps 0.7 of all"
    assert ours["agreement"] >= 0.96
    assert ours["robustness"] > none["robustness"]
    assert naive["agreement"] < ours["agreement"]
    assert all(0 <= row["gini"] <= 1 and row["answer"] for row in table["rows"])


def test_a_seed_repeats_every_number(tmp_path, capsys, monkeypatch, undrawn):
    pytest.importorskip("open_clip")
    monkeypatch.setattr(sources, "QUICK_STEPS", 4)

    def found(name, seed):
        status, out, _ = run(capsys, "fig8", "--quick", "--seed", seed, "--out", tmp_path / name, "--json")
        assert status == 0
        return numbers(strict(out))

    first = found("a", 5)
    assert {e["kind"] for e in first["settings"]["embeddings"]} == {"synthetic", "digits"}
    assert first == found("b", 5)
    assert (tmp_path / "a" / "fig8_digits.csv").read_text() == (tmp_path / "b" / "fig8_digits.csv").read_text()
    assert first["claims"] != found("c", 6)["claims"]


@pytest.fixture
def counted():
    """Two small targets in the place of all others; what they are asked is counted."""
    calls = []

    def target(name):
        def reproduce_it(context):
            calls.append(name)
            context.progress(1, 1)
            value = float(torch.rand((), generator=torch.Generator().manual_seed(context.seed)))
            return Result(
                [Claim("It is", "a draw", {"value": value}, True)],
                [Figure(f"{name}_a", "A line.", draw, [{"x": 0, "y": value}])],
            )

        return reproduce_it

    def draw(tall=False):
        from gapkern.figures.canvas import panels

        return panels(1, tall=tall)[0]

    class Fake(Target):
        def __call__(self, context):
            return target(self.name)(context)

    fakes = {name: Fake(name, "a title", "", "", uses_embeddings=name == "fig2") for name in ("fig1", "fig2")}
    before = dict(reproduce.TARGETS)
    reproduce.TARGETS.clear()
    reproduce.TARGETS.update(fakes)
    yield calls, draw
    reproduce.TARGETS.clear()
    reproduce.TARGETS.update(before)


def test_what_is_finished_is_not_done_again(counted, tmp_path, pair, capsys, undrawn):
    calls, _ = counted
    first = ("fig1", "--out", tmp_path / "r", "--quick")
    assert run(capsys, *first)[0] == 0
    stamp = (tmp_path / "r" / "fig1_a.png").stat().st_mtime_ns
    assert run(capsys, *first)[0] == 0
    assert calls == ["fig1"]
    assert (tmp_path / "r" / "fig1_a.png").stat().st_mtime_ns == stamp
    status, out, _ = run(capsys, "all", "--out", tmp_path / "r", "--quick", "--json")
    assert (status, calls) == (0, ["fig1", "fig2"])
    assert [c["target"] for c in strict(out)["claims"]] == ["fig1", "fig2"]
    run(capsys, *first, "--again")
    assert calls == ["fig1", "fig2", "fig1"]
    run(capsys, *first, "--seed", "1")
    assert calls[3:] == ["fig1"], "another seed"
    run(capsys, "fig1", "--out", tmp_path / "r", "--seed", "1")
    assert calls[4:] == ["fig1"], "other sizes"
    (tmp_path / "r" / "fig1_a.csv").unlink()
    run(capsys, "fig1", "--out", tmp_path / "r", "--seed", "1")
    assert calls[5:] == ["fig1"], "a file is gone"
    run(capsys, "all", *given(pair), "--out", tmp_path / "r", "--seed", "1")
    assert calls[6:] == ["fig1", "fig2"], "other sizes again; other embeddings"
    run(capsys, "all", *given(pair)[:3], "--quick", "--out", tmp_path / "r", "--seed", "1")
    assert calls[8:] == ["fig2"], "embeddings without rewordings; figure 1 does not depend on them here"


def test_an_interrupt_leaves_no_half_file(counted, tmp_path, capsys, monkeypatch):
    calls, draw = counted
    real = type(draw()).savefig
    written = []

    def interrupted(self, path, **options):
        written.append(path)
        if len(written) == 5:  # within the PDF of the second figure
            with open(path, "w") as file:
                file.write("half")
            raise KeyboardInterrupt
        return real(self, path, **options)

    monkeypatch.setattr(type(draw()), "savefig", interrupted)
    status, _, err = run(capsys, "all", "--out", tmp_path)
    assert status == 130
    assert "the same command goes on from there" in err
    there = {path.name for path in tmp_path.iterdir()}
    assert there == {"fig1.json", "fig1_a.png", "fig1_a.pdf", "fig1_a.csv", "narrow", "fig2_a.png"}
    assert run(capsys, "all", "--out", tmp_path)[0] == 0
    assert calls == ["fig1", "fig2", "fig2"]


def test_a_signal_from_outside(pair, tmp_path):
    command = [sys.executable, "-m", "gapkern", "reproduce", *OURS, *map(str, given(pair)), "--out", str(tmp_path)]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=hears_interrupts
    )
    until = time.monotonic() + HANGS
    while not (tmp_path / "fig1.json").exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=HANGS)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    for path in tmp_path.rglob("*"):
        assert not path.name.startswith("."), path
        if path.suffix == ".json":
            json.loads(path.read_text())
    assert (tmp_path / "fig1.json").exists()
    assert not (tmp_path / "report.html").exists()


def test_what_is_wrong_is_said(pair, tmp_path, capsys):
    images, texts = pair / "images.npy", pair / "texts.npy"
    np.save(tmp_path / "wide.npy", np.zeros((60, 40), np.float32))
    np.save(tmp_path / "labels.npy", np.full(60, 60))
    (tmp_path / "file").write_text("")
    for arguments, message in (
        (("fig7",), "target: expected all or some of fig1, fig2"),
        (("--embeddings", images, texts, images), "embeddings: expected one or two files, got 3"),
        (("--embeddings", images, tmp_path / "wide.npy"), "expected D = 32"),
        (("--embeddings", images), "[0] of shape (60, 32)"),
        (
            ("--embeddings", images, texts, "--labels", tmp_path / "labels.npy"),
            "labels: expected values in [0, 60), gallery rows, got 60 in row",
        ),
        (("--embeddings", images, texts, "--paraphrase", tmp_path / "wide.npy"), "paraphrase: expected shape (60, 32)"),
        (("--labels", tmp_path / "labels.npy"), "expected --embeddings beside them"),
        (("--model", "ViT-B-32"), "model, dataset: expected both or neither"),
        (("--model", "ViT-B-32", "--dataset", tmp_path / "none"), "dataset: expected a folder"),
        (("--pretrained", "openai"), "pretrained: expected --model beside it"),
        (("fig2", "--out", tmp_path / "file"), "out: cannot write to the folder"),
        (("fig2", "--seed", "-1"), "seed: expected an integer >= 0"),
    ):
        status, _, err = run(capsys, "--out", tmp_path / "r", *arguments)
        assert (status, err.count("\n")) == (2, 1), err
        assert message in err


def test_claims_say_why():
    with pytest.raises(ValueError, match="reason: expected why 'It is' does not hold"):
        Claim("It is", "here", {"a": 1.0}, None)
    with pytest.raises(ValueError, match="number: expected what"):
        Claim("It is", "here", {}, True)


def test_embeddings_are_loaded_once():
    loads = []
    context = Context(load=lambda: loads.append(1) or [])
    assert context.embeddings == context.embeddings == []
    assert loads == [1]


def test_real_embeddings(real_data, tmp_path, capsys):
    arguments = []
    for name in ("clip", "convirt", "videoclip"):
        np.save(tmp_path / f"{name}.npy", real_data(name))
        arguments += ["--embeddings", tmp_path / f"{name}.npy"]
    status, out, _ = run(capsys, "fig2", *arguments, "--quick", "--out", tmp_path / "r", "--json")
    assert status == 0
    report = strict(out)
    broken = [c["number"]["promises broken"] for c in report["claims"] if "promises broken" in c["number"]]
    assert broken == [0, 0, 0]
    (table,) = report["targets"]["fig2"]["tables"]
    rows = {(r["embeddings"], r["components"]): r for r in table["rows"]}
    assert rows["clip", "0"]["accuracy"] == pytest.approx(0.300)
    assert rows["clip", "0"]["kept"] == pytest.approx(0.31, abs=0.006)
    assert rows["clip", "exact"]["kept"] == 1
    assert rows["clip", "exact"]["closed"] == pytest.approx(1 / 3, abs=0.05)
    for name in ("clip", "convirt", "videoclip"):
        assert rows[name, "auto"]["kept"] >= 0.99
        assert rows[name, "exact"]["robust"] >= rows[name, "exact"]["open"]


def test_a_model_on_a_folder_of_images(tmp_path, capsys):
    open_clip = pytest.importorskip("open_clip")
    from PIL import Image

    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 8, "patch_size": 4, "layers": 1, "width": 16, "head_width": 8},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "gapkern-tiny.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "configs")
    generator = np.random.default_rng(0)
    for name in ("red_fox", "owl", "bee"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(5):
            pixels = generator.integers(0, 256, (9, 9, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
    arguments = ("fig1", "fig10", "--model", "gapkern-tiny", "--dataset", tmp_path / "images", "--out", tmp_path / "r")
    status, out, err = run(capsys, *arguments, "--json")
    assert status == 0, err
    report = strict(out)
    assert "15 images of 3 classes" in report["targets"]["fig1"]["text"]
    assert rows_of(tmp_path / "r" / "fig1_gapkern_tiny_images_rewordings.csv")[0]["template"] == "a photo of a …"
    kept = (tmp_path / "r" / "embeddings" / "model.safetensors").stat().st_mtime_ns
    assert run(capsys, *arguments, "--again")[0] == 0
    assert (tmp_path / "r" / "embeddings" / "model.safetensors").stat().st_mtime_ns == kept, "images embedded once"
    status, _, err = run(
        capsys, "fig1", "--model", "no-such", "--dataset", tmp_path / "images", "--out", tmp_path / "r"
    )
    assert (status, "model: expected one of open_clip.list_models()" in err) == (2, True)


@pytest.mark.slow
@pytest.mark.open_clip
def test_everything_quickly(tmp_path, capsys):
    status, out, _ = run(capsys, "all", "--quick", "--out", tmp_path / "r", "--json")
    assert status == 0
    report = strict(out)
    assert list(report["targets"]) == list(reproduce.TARGETS)
    assert {c["target"] for c in report["claims"]} == set(reproduce.TARGETS)
    by_claim = {(c["target"], c["claim"][:30], c["run"].split(":")[0]): c for c in report["claims"]}
    gain = by_claim["fig8", "Closing the gap makes nearest ", "Digits"]
    assert gain["holds"] is True
    assert gain["number"]["gain"] > 0.1
    assert report["settings"]["quick"] is True
    steps = [source["steps"] for source in report["settings"]["embeddings"] if source["kind"] == "digits"]
    assert steps == [sources.QUICK_STEPS]
    assert sources.QUICK_STEPS <= sources.STEPS // 2
