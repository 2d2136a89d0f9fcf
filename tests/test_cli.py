"""The command line as its users type it."""

import hashlib
import json
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from gapkern import MeanShift, gap_metrics
from gapkern.cli import main
from tests import warm


@pytest.fixture
def pair(tmp_path):
    generator = np.random.default_rng(0)
    texts = generator.standard_normal((30, 16)).astype(np.float32) * 0.2
    images = texts + 0.05 * generator.standard_normal((30, 16)).astype(np.float32) + np.eye(16, dtype=np.float32)[0]
    np.save(tmp_path / "images.npy", images)
    np.save(tmp_path / "texts.npy", texts)
    return tmp_path


def run(capsys, *arguments):
    try:
        status = main([str(a) for a in arguments])
    except SystemExit as exit:
        status = exit.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_gap(pair, capsys):
    status, out, _ = run(capsys, "gap", pair / "images.npy", pair / "texts.npy", "--json", "--out", pair / "gap.json")
    assert status == 0
    expected = gap_metrics(np.load(pair / "images.npy"), np.load(pair / "texts.npy"))
    found = json.loads(out)
    inputs = {name: [hashlib.sha256((pair / f"{name}.npy").read_bytes()).hexdigest()] for name in ("images", "texts")}
    assert {name: facts["sha256"] for name, facts in found.pop("inputs").items()} == inputs
    assert found == pytest.approx(expected, nan_ok=True)
    assert json.loads((pair / "gap.json").read_text()) == json.loads(out)
    status, out, _ = run(capsys, "gap", pair / "images.npy", pair / "texts.npy")
    assert status == 0
    assert "centroid_distance" in out
    assert "\x1b" not in out


def test_gap_says_what_holds_and_what_projecting_buys(pair, capsys):
    from gapkern.theory import assess

    line = ("gap", pair / "images.npy", pair / "texts.npy", "--assess", "texts")
    found = json.loads(run(capsys, *line, "--json")[1])["verdicts"]
    expected = assess(np.load(pair / "images.npy"), np.load(pair / "texts.npy"))
    assert [(v["statement"], v["applies"], v["sentence"]) for v in found] == [
        (v.statement, v.applies, v.sentence) for v in expected
    ]
    assert found[-1]["numbers"]["offset"] > 0
    out = run(capsys, *line)[1]
    assert "projection: " in out
    assert expected[-1].sentence in out


def test_golden_values_from_the_command_line(real_data, tmp_path, capsys):
    np.save(tmp_path / "clip.npy", real_data("clip"))
    _, out, _ = run(capsys, "gap", f"{tmp_path}/clip.npy[0]", f"{tmp_path}/clip.npy[1]", "--json")
    assert json.loads(out)["centroid_distance"] == pytest.approx(0.85135, abs=1e-5)


def test_shift_fit_and_apply(pair, capsys):
    fitted, moved = pair / "shift.safetensors", pair / "moved.npy"
    status, out, _ = run(
        capsys, "shift", "fit", pair / "texts.npy", pair / "images.npy", "--out", fitted, "--components", "4", "--json"
    )
    assert status == 0
    assert json.loads(out)["components"] == 4
    status, _, _ = run(capsys, "shift", "apply", fitted, pair / "texts.npy", "--out", moved, "--alpha", "0.5")
    assert status == 0
    texts, images = np.load(pair / "texts.npy"), np.load(pair / "images.npy")
    expected = MeanShift(0.5, n_components=4).fit(texts, images).transform(texts)
    assert np.array_equal(np.load(moved), expected)


def test_shift_apply_goes_on_with_a_folder_where_it_was(pair, capsys):
    shards, out, whole = pair / "shards", pair / "moved", np.load(pair / "texts.npy")
    shards.mkdir()
    for n in range(12):
        np.save(shards / f"text_emb_{n}.npy", whole[n::12])
    fitted = pair / "shift.safetensors"
    run(capsys, "shift", "fit", shards, pair / "images.npy", "--out", fitted, "--components", "4")
    assert run(capsys, "shift", "apply", fitted, shards, "--out", out)[0] == 0
    shift = MeanShift.load(fitted)
    for n in range(12):
        assert np.array_equal(np.load(out / f"text_emb_{n}.npy"), shift.transform(whole[n::12]))
    (out / "text_emb_3.npy").unlink()
    untouched = (out / "text_emb_4.npy").stat().st_mtime_ns
    status, text, _ = run(capsys, "shift", "apply", fitted, shards, "--out", out)
    assert (status, "11 of 12 shards were there already" in text) == (0, True)
    assert (out / "text_emb_4.npy").stat().st_mtime_ns == untouched
    assert np.array_equal(np.load(out / "text_emb_3.npy"), shift.transform(whole[3::12]))
    for arguments, message in (
        (("--alpha", "0.5"), "out: expected an empty folder or one of the same shift"),
        (("--side", "queries"), "out: expected an empty folder or one of the same shift"),
    ):
        status, _, err = run(capsys, "shift", "apply", fitted, shards, "--out", out, *arguments)
        assert (status, message in err) == (2, True)
    assert run(capsys, "shift", "apply", fitted, shards, "--out", shards)[0] == 2
    assert run(capsys, "shift", "apply", fitted, pair / "shards", "--out", pair)[0] == 2, "other files lie there"


def test_a_shift_of_another_model_is_refused(pair, capsys):
    fitted, out = pair / "shift.safetensors", pair / "moved.npy"
    run(capsys, "shift", "fit", pair / "texts.npy", pair / "images.npy", "--out", fitted, "--model", "ViT-B-32/openai")
    status, _, err = run(capsys, "shift", "apply", fitted, pair / "texts.npy", "--out", out, "--model", "RN50/openai")
    assert (status, out.exists()) == (2, False)
    assert err == "gapkern shift: model: expected embeddings of ViT-B-32/openai, as fitted, got RN50/openai\n"
    assert run(capsys, "shift", "apply", fitted, pair / "texts.npy", "--out", out, "--model", "ViT-B-32/openai")[0] == 0


def test_the_best_alpha_for_a_noise(pair, capsys):
    _, out, _ = run(
        capsys,
        "shift",
        "fit",
        pair / "texts.npy",
        pair / "images.npy",
        "--out",
        pair / "s.safetensors",
        "--alpha",
        "best:0.3",
        "--components",
        "4",
        "--json",
    )
    alpha = json.loads(out)["alpha"]
    assert MeanShift.load(pair / "s.safetensors").alpha == alpha
    assert 0.8 < alpha < 1.2


def test_the_published_k_table_in_one_command(real_data, tmp_path, capsys):
    np.save(tmp_path / "clip.npy", real_data("clip"))
    status, out, _ = run(
        capsys,
        "shift",
        "compare",
        f"{tmp_path}/clip.npy[1]",
        f"{tmp_path}/clip.npy[0]",
        "--components",
        "0",
        "100",
        "200",
        "499",
        "--labels",
        "paired",
        "--json",
    )
    assert status == 0
    table = json.loads(out)
    assert table["clean_accuracy"] == pytest.approx(0.554), "0.552 by cosines: norms differ by 5e-4"
    for row, (accuracy, kept) in zip(
        table["rows"], ((0.300, 0.31), (0.530, 0.78), (0.556, 0.88), (0.554, 1.0)), strict=True
    ):
        assert row["accuracy"] == pytest.approx(accuracy)
        assert row["agreement"] == pytest.approx(kept, abs=0.006)
    assert table["rows"][3]["closed"] == pytest.approx(1 / 3, abs=0.05)
    status, out, _ = run(capsys, "shift", "compare", f"{tmp_path}/clip.npy[1]", f"{tmp_path}/clip.npy[0]")
    assert (status, "exact" in out) == (0, True)


def test_robust_writes_a_table_and_a_plot(pair, capsys):
    out_folder = pair / "out"
    status, out, _ = run(
        capsys,
        "robust",
        pair / "images.npy",
        pair / "texts.npy",
        "--alphas",
        "0:1:3",
        "--gaussian",
        ".1",
        "0.3",
        "--quantize",
        "32",
        "--replace",
        pair / "texts.npy",
        "--labels",
        "paired",
        "--components",
        "exact",
        "--out",
        out_folder,
        "--json",
    )
    assert status == 0
    rows = json.loads(out)["rows"]
    assert [row["alpha"] for row in rows] == [0.0] * 4 + [0.5] * 4 + [1.0] * 4
    assert all(row["robustness"] == 1 for row in rows if row["perturbation"] == "replace")
    assert {p.name for p in out_folder.iterdir()} == {
        "inputs.json",
        "robustness.json",
        "robustness.csv",
        "robustness.png",
    }
    assert json.loads((out_folder / "robustness.json").read_text()) == rows


_KILLED = """
import os, signal, sys
from gapkern.cli import main
from gapkern.robustness.journal import Journal
add, rows = Journal.add, []
def killed(journal, key, row):
    add(journal, key, row)
    rows.append(row)
    if len(rows) == 25:
        os.kill(os.getpid(), signal.SIGKILL)
Journal.add = killed
main(sys.argv[1:])
"""


def test_robust_goes_on_after_a_kill(pair, capsys):
    command = [
        "robust",
        pair / "images.npy",
        pair / "texts.npy",
        "--alphas",
        "0:1.5:20",
        "--gaussian",
        "0.1",
        "0.2",
        "0.3",
        "--uniform",
        "0.1",
        "--trials",
        "20",
        "--out",
        pair / "out",
    ]
    first = warm.run(_KILLED, *command)
    assert first.returncode == -signal.SIGKILL
    journal = (pair / "out" / "unfinished.jsonl").read_text()
    assert journal.count("\n") == 1 + 25
    assert not (pair / "out" / "robustness.json").exists()
    assert run(capsys, *command)[0] == 0
    rows = json.loads((pair / "out" / "robustness.json").read_text())
    assert len(rows) == 80
    finished = [json.loads(line)[1] for line in journal.split("\n")[1:-1]]
    assert all(row in rows for row in finished), "with the seconds they took then"
    assert sorted(p.name for p in (pair / "out").iterdir()) == [
        "inputs.json",
        "robustness.csv",
        "robustness.json",
        "robustness.png",
    ]


def test_robust_takes_a_fitted_shift_and_labels_from_a_file(pair, capsys):
    np.save(pair / "labels.npy", np.arange(30))
    run(capsys, "shift", "fit", pair / "texts.npy", pair / "images.npy", "--out", pair / "s.safetensors")
    common = ("robust", pair / "images.npy", pair / "texts.npy", "--gaussian", "0.2", "--alphas", "0,1", "--json")
    _, fitted, _ = run(capsys, *common, "--shift", pair / "s.safetensors", "--labels", pair / "labels.npy")
    _, fresh, _ = run(capsys, *common, "--labels", "paired")
    drop_times = lambda text: [{k: v for k, v in row.items() if k != "seconds"} for row in json.loads(text)["rows"]]  # noqa: E731
    assert drop_times(fitted) == drop_times(fresh)


def test_doctor_is_well(capsys):
    status, out, _ = run(capsys, "doctor")
    assert status == 0
    assert "FAILED" not in out
    assert "Philox bits" in out
    assert "executed   every CUDA kernel, instruction by instruction in emulation" in out
    status, out, _ = run(capsys, "doctor", "--json")
    assert json.loads(out)["healthy"] is True


def test_doctor_tells_when_something_is_wrong(capsys, monkeypatch):
    from gapkern import selfcheck

    monkeypatch.setattr(selfcheck, "_CHECKS", (*selfcheck._CHECKS, ("broken", lambda: 1 / 0)))
    status, out, err = run(capsys, "doctor")
    assert status == 1
    assert "FAILED  broken: ZeroDivisionError: division by zero" in out
    assert "something is wrong" in err


def test_python_m_gapkern_and_version():
    out = subprocess.run(
        [sys.executable, "-m", "gapkern", "--version"], capture_output=True, text=True, check=True
    ).stdout
    assert out.startswith("gapkern 0.")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gap", "absent.npy", "texts.npy"], "gapkern gap: images: expected a file, got"),
        (["gap", "images.npy", "bad.npy"], "gapkern gap: texts: expected a .npy file, got"),
        (["gap", "images.npy", "wide.npy"], "gapkern gap: texts: expected D = 16 as in images, got shape (30, 5)"),
        (["gap", "images.npy", "short.npy"], "gapkern gap: texts: expected 30 rows as in images, got shape (7, 16)"),
        (["gap", "images.npy", "nan.npy"], "gapkern gap: texts: expected finite values, got NaN or infinity"),
        (["gap", "images.npy", "flat.npy"], "gapkern gap: texts: expected shape (N, D), got (16,)"),
        (["gap", "images.npy", "texts.npy", "--out", "absent/x.json"], "gapkern gap: path: cannot write"),
        (["robust", "images.npy", "texts.npy"], "gapkern robust: expected at least one of --gaussian"),
        (["robust", "images.npy", "texts.npy", "--gaussian", "-1"], "gapkern robust: variance: expected a finite"),
        (["robust", "images.npy", "texts.npy", "--quantize", "1"], "gapkern robust: bins: expected an integer >= 2"),
        (
            ["robust", "images.npy", "texts.npy", "--gaussian", "1", "--method", "guess"],
            "gapkern robust: method: expected",
        ),
        (
            ["robust", "images.npy", "texts.npy", "--gaussian", "1", "--alphas", "a:b"],
            "argument --alphas: expected FIRST",
        ),
        (["robust", "images.npy", "texts.npy", "--gaussian", "1", "--trials", "0"], None),
        (["robust", "images.npy", "texts.npy", "--uniform", "1", "--trials", "0"], "gapkern robust: trials: expected"),
        (["robust", "images.npy", "texts.npy", "--gaussian", "1", "--labels", "bad.npy"], "gapkern robust: labels:"),
        (["robust", "images.npy", "texts.npy", "--gaussian", "1", "--out", "bad.npy/x"], "gapkern robust: out: cannot"),
        (["shift", "fit", "texts.npy", "wide.npy", "--out", "s"], "gapkern shift: queries: expected D = 16"),
        (["shift", "fit", "texts.npy", "images.npy", "--out", "s", "--components", "most"], "argument --components"),
        (["shift", "apply", "bad.npy", "texts.npy", "--out", "x.npy"], "gapkern shift: path: expected a safetensors"),
        (["demo", "--steps", "0"], "gapkern demo: steps: expected an integer >= 1, got 0"),
        (["demo", "--seed", "-1"], "gapkern demo: seed: expected an integer >= 0"),
        (["demo", "--out", "bad.npy/report"], "gapkern demo: out: cannot write to the folder"),
        (["dance"], "invalid choice: 'dance'"),
        ([], "the following arguments are required: VERB"),
    ],
)
def test_bad_input_is_one_line_and_a_status(pair, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(pair)
    (pair / "bad.npy").write_text("no array")
    np.save("wide.npy", np.zeros((30, 5), dtype=np.float32))
    np.save("short.npy", np.zeros((7, 16), dtype=np.float32))
    np.save("flat.npy", np.zeros(16, dtype=np.float32))
    np.save("nan.npy", np.full((30, 16), np.nan, dtype=np.float32))
    status, _, err = run(capsys, *arguments)
    if message is None:  # what is not drawn needs no trials, but a wrong number is still refused
        message = "gapkern robust: trials: expected"
    assert status == 2
    assert message in err
    assert err.count("\n") == 1, err


def test_an_interrupt_is_quiet(capsys, monkeypatch):
    from gapkern.cli import gap

    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(gap, "run", interrupted)
    status, _, err = run(capsys, "gap", "a", "b")
    assert (status, err) == (130, "gapkern gap: interrupted\n")


def test_options_have_two_spellings():
    from gapkern.cli import parser

    for line in (
        ["embed", "--batch{}size", "3", "--num{}workers", "1", "--on{}error", "skip"],
        ["eval", "--batch{}size", "3", "--num{}workers", "1", "--recall{}k", "5", "--custom{}classname{}file", "x"],
        ["gap", "a", "b", "--logit{}scale", "3"],
    ):
        hyphens, underscores = (parser().parse_args([part.replace("{}", mark) for part in line]) for mark in "-_")
        assert {**vars(hyphens), "run": 0} == {**vars(underscores), "run": 0}


def test_help_lists_every_verb(capsys):
    status, out, _ = run(capsys, "--help")
    assert status == 0
    for verb in ("demo", "gap", "shift", "robust", "doctor"):
        assert verb in out
        assert run(capsys, verb, "--help")[0] == 0


def test_bfloat16_files(pair, capsys):
    from safetensors.torch import save_file

    save_file({"x": torch.from_numpy(np.load(pair / "texts.npy")).bfloat16()}, pair / "t.safetensors")
    save_file({"x": torch.from_numpy(np.load(pair / "images.npy")).bfloat16()}, pair / "i.safetensors")
    assert run(capsys, "gap", pair / "i.safetensors", pair / "t.safetensors")[0] == 0
