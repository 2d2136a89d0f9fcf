"""`gapkern eval` and `gapkern build` from files and folders; what is wrong is said in one line."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from gapkern import MeanShift
from gapkern.embeddings import write_folder
from gapkern.evaluation import inputs, records
from tests.evaluated import run


@pytest.fixture
def folders(files_of_all_tasks, tmp_path, monkeypatch):
    """Images and captions as `gapkern embed` writes them, and a command line that retrieves one by the other."""
    monkeypatch.chdir(tmp_path)
    for kind, name in (("img_emb", "images"), ("text_emb", "captions")):
        write_folder("out", kind, torch.from_numpy(np.load(f"{name}.npy")).split(40), model="tiny/1")
    return ["--task", "zeroshot_retrieval", "--labels", "image_of.npy", "--recall_k", "1", "5", "--json"]


def test_folders_are_evaluated_as_files_are(folders, tmp_path, capsys):
    expected = run(capsys, "eval", "--images", "images.npy", "--texts", "captions.npy", *folders)
    (expected,) = json.loads(expected[1])["results"]
    x = torch.from_numpy(np.load("images.npy"))
    MeanShift(n_components=2, model="tiny/1").fit(x, x + 1).save("s.safetensors")
    status, out, error = run(capsys, "eval", "--images", "out", "--texts", "out", *folders, "--shift", "s.safetensors")
    assert status == 0, error
    found = json.loads(out)["results"][0]
    assert (found["metrics"], found["model"], found["model_id"]) == (expected["metrics"], "embeddings", "tiny/1")
    assert "model_id" not in expected
    shutil.rmtree("out/text_emb")
    classes = torch.from_numpy(np.load("prompts.npy")[0])
    write_folder("out", "text_emb", classes.split(5))
    arguments = ["eval", "--images", "out", "--labels", "labels.npy", "--json"]
    by_folder = json.loads(run(capsys, *arguments, "--texts", "out")[1])["results"][0]
    np.save("classes.npy", classes.numpy())
    by_file = json.loads(run(capsys, *arguments, "--texts", "classes.npy")[1])["results"][0]
    assert by_folder["metrics"] == by_file["metrics"]
    assert by_folder["model_id"] == "tiny/1"


def edited(place, **facts):
    note = json.loads(Path(place, "manifest.json").read_text())
    Path(place, "manifest.json").write_text(json.dumps({**note, **facts}))


def append(file):
    Path(file).write_bytes(Path(file).read_bytes() + b"more")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (
            lambda: edited("out/img_emb", dtype="float16"),
            "images: out/img_emb differs from its manifest: img_emb_0.npy: expected float16, got float32",
        ),
        (
            lambda: edited("out/text_emb", dims=23),
            "texts: out/text_emb differs from its manifest: text_emb_0.npy: expected D = 23, got 24",
        ),
        (
            lambda: edited("out/img_emb", rows=91),
            "images: out/img_emb differs from its manifest: expected 91 rows, got 90",
        ),
        (
            lambda: np.save("out/img_emb/img_emb_1.npy", np.zeros((39, 24), np.float32)),
            "img_emb_1.npy: expected 40 rows",
        ),
        (lambda: append("out/img_emb/img_emb_1.npy"), "img_emb_1.npy: expected 3968 bytes, got 3972"),
        (
            lambda: os.remove("out/text_emb/text_emb_3.npy"),
            "texts: out/text_emb differs from its manifest: text_emb_3.npy is missing",
        ),
        (
            lambda: edited("out/text_emb", model="huge/2"),
            "texts: expected embeddings of tiny/1 as in images, got those of huge/2",
        ),
        (lambda: shutil.rmtree("out/text_emb"), "texts: expected text_emb in out, got img_emb"),
    ],
)
def test_a_folder_that_differs_from_its_manifest_is_named(folders, harm, message, capsys):
    harm()
    status, out, error = run(capsys, "eval", "--images", "out", "--texts", "out", *folders)
    assert (status, out, error.count("\n")) == (2, "", 1)
    assert message in error


def test_existing_results_are_skipped_or_filled_in(files_of_all_tasks, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["eval", *files_of_all_tasks[2], "--out", "results"]
    assert run(capsys, *command)[0] == 0
    files = sorted((tmp_path / "results").iterdir())
    assert len(files) == 6
    assert "embeddings_none_embeddings_en_zeroshot_retrieval.json" in {file.name for file in files}
    before = {file: (file.stat().st_mtime_ns, file.read_text()) for file in files}
    files[2].unlink()
    assert run(capsys, *command, "--skip_existing")[0] == 0
    assert files[2].exists()
    assert all(file.stat().st_mtime_ns == before[file][0] for file in files if file != files[2])
    monkeypatch.setattr(inputs, "measure", None)  # nothing is measured any more
    status, out, _ = run(capsys, *command, "--skip_existing", "--json")
    assert (status, len(json.loads(out)["results"])) == (0, 6)


def test_build_says_what_it_leaves_out(tmp_path, capsys):
    theirs = {"dataset": "d", "model": "m", "pretrained": "p", "task": "t", "metrics": {"acc1": 0.5}, "language": "en"}
    (tmp_path / "theirs.json").write_text(json.dumps(theirs))
    (tmp_path / "other.json").write_text("{}")
    status, out, error = run(capsys, "build", tmp_path, "--out", tmp_path / "r.csv", "--json")
    assert (status, json.loads(out)["rows"][0]["acc1"]) == (0, 0.5)
    assert "1 JSON files are no results and were left out" in error
    status, _, error = run(capsys, "build", tmp_path / "other.json")
    assert (status, error.count("\n")) == (2, 1)
    assert "expected a result with dataset, model" in error
    (tmp_path / "theirs.json").unlink()
    assert run(capsys, "build", tmp_path)[0] == 2


STORED = ["--images", "images.npy", "--texts", "prompts.npy", "--labels", "labels.npy"]
BAD = {
    "unknown data set": (["--dataset", "cifar11", "--model", "x"], "dataset: expected one of 'aokvqa', 'cifar10'"),
    "nothing to evaluate": ([], "expected --images and --texts, or --dataset and --model"),
    "one side": (["--images", "images.npy"], "images and texts: expected both, got one"),
    "no such file": (
        ["--images", "images.npy", "--texts", "absent.npy", "--labels", "labels.npy"],
        "texts: expected a file, got absent.npy, which does not exist",
    ),
    "no labels": (["--images", "images.npy", "--texts", "prompts.npy"], "labels: expected a file of integers"),
    "labels out of range": (
        ["--images", "images.npy", "--texts", "prompts.npy", "--labels", "high.npy"],
        "labels: expected values in [0, 12), classes, got 12 in row 3",
    ),
    "labels of floats": (
        ["--images", "images.npy", "--texts", "prompts.npy", "--labels", "images.npy"],
        "labels: expected integers, got",
    ),
    "too few labels": (
        ["--images", "images.npy", "--texts", "prompts.npy", "--labels", "image_of.npy"],
        "labels: expected shape (90,), one per image, got (180,)",
    ),
    "captions that do not fit": (
        ["--images", "images.npy", "--texts", "captions.npy", "--labels", "3", "--task", "zeroshot_retrieval"],
        "labels: expected 3 texts for each of 90 images, got 180 texts",
    ),
    "too few choices": (
        [
            "--images",
            "images.npy",
            "--texts",
            "captions.npy",
            "--annotation_file",
            "questions.json",
            "--task",
            "multiple_choice",
        ],
        "texts: expected 270 rows, one per choice, got 180",
    ),
    "a template without {c}": (
        ["--dataset", "digits", "--model", "x", "--custom_template_file", "bad.json"],
        "templates: expected a string with {c} for the class, got 'a {}'",
    ),
    "templates of another number": (
        [*STORED, "--task", "template_robustness", "--custom_template_file", "two.json"],
        "names: expected 4, one per template, got 2",
    ),
    "another width": (
        ["--images", "images.npy", "--texts", "narrow.npy", "--labels", "labels.npy"],
        "classes: expected shape (C, 24), D as the images', got (12, 7)",
    ),
    "a shift that is none": (
        [*STORED, "--shift", "much"],
        "shift: expected a file, 'auto', 'exact' or components, got 'much'",
    ),
    "a shift of another model": (
        [*STORED, "--shift", "s.safetensors", "--model", "mine"],
        "shift: expected one fitted on mine, got one of theirs",
    ),
    "one name for several results": (
        [*STORED, "--shift", "auto", "--output", "x.json"],
        "output: expected {variant} in the template of several results",
    ),
    "a bad variance": (
        [*STORED, "--gaussian", "-1"],
        "variance: expected a finite number >= 0, got -1",
    ),
    "a task of another data set": (
        ["--dataset", "digits", "--model", "local-dir:nowhere", "--task", "zeroshot_retrieval"],
        "model: expected a folder with open_clip_config.json, got nowhere",
    ),
    "a model without weights": (
        ["--dataset", "digits", "--model", "ViT-B-32"],
        "pretrained: expected a tag or a checkpoint, got None for ViT-B-32",
    ),
    "weights for a model that has its own": (
        ["--dataset", "digits", "--model", "hf-hub:a/b", "--pretrained", "openai"],
        "pretrained: expected none, as the weights come with the model, got 'openai'",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case, files_of_all_tasks, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    labels = np.load("labels.npy")
    np.save("high.npy", np.where(np.arange(90) < 3, labels, 12))
    np.save("narrow.npy", np.load("prompts.npy")[0, :, :7])
    (tmp_path / "bad.json").write_text('["a {c}", "a {}"]')
    (tmp_path / "two.json").write_text('["a {c}", "the {c}"]')
    x = torch.randn(30, 24)
    shift = MeanShift(n_components=2, model="theirs").fit(x, x + 1)
    shift.save("s.safetensors")
    arguments, message = BAD[case]
    status, out, error = run(capsys, "eval", *arguments, "--device", "cpu")
    assert (status, out) == (2, ""), error
    assert error.startswith("gapkern eval: ")
    assert message in error
    assert error.count("\n") == 1


def test_file_names():
    facts = {"dataset": "a/b", "model": "m", "pretrained": "p", "language": "en", "task": "t"}
    assert records.path("{dataset}_{model}{variant}.json", facts, "_x", True).name == "a_b_m_x.json"
    with pytest.raises(ValueError, match=r"output: expected places among \{dataset\}"):
        records.path("{nothing}.json", facts, "", False)
