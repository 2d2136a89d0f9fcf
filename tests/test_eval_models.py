"""`gapkern eval` and `gapkern build` from a model: the digits, and metrics as of CLIP_benchmark."""

import csv
import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from gapkern import datasets, models
from tests.evaluated import environment, port, run
from tests.scenes import HANGS, Batches


@pytest.fixture(scope="module")
def digits_model(tmp_path_factory, trained_digits):
    """What `gapkern demo --export` writes, and the model's embeddings."""
    from safetensors.torch import save_file

    from gapkern.experiments import digits

    folder = tmp_path_factory.mktemp("model")
    data, trained = trained_digits
    digits.export(trained, data, folder)
    images = digits.embed_images(trained, data.test_images)
    tensors = {"images": images, "prompts": digits.embed_prompts(trained, digits.TEMPLATES)}
    save_file({**tensors, "labels": data.test_digits}, folder / "embeddings.safetensors")
    return folder


@pytest.mark.slow
@pytest.mark.open_clip
def test_digits_from_the_model_and_from_embeddings(digits_model, tmp_path, capsys):
    common = ["--shift", "exact", "--gaussian", "0.128", "--seeds", *range(5), "--device", "cpu", "--dataset", "digits"]
    given = [
        *common,
        "--model",
        f"local-dir:{digits_model}/model",
        "--num_workers",
        "0",
        "--custom_template_file",
        digits_model / "templates.json",
        "--dump_templates",
        "--dump_classnames",
    ]
    status, out, error = run(capsys, "eval", *given, "--out", tmp_path / "model", "--json")
    assert status == 0, error
    plain, noisy, closed, closed_noisy = json.loads(out)["results"]
    assert plain["metrics"]["acc1"] == closed["metrics"]["acc1"] > 0.4
    assert closed_noisy["metrics"]["acc1"] > noisy["metrics"]["acc1"] + 0.05
    assert (plain["task"], plain["language"], plain["dataset"]) == ("zeroshot_classification", "en", "digits")
    assert (plain["classnames"][3], len(plain["templates"])) == ("three", 7)
    assert closed["transform"]["orthogonality"] > 0.5
    assert (plain["pretrained"], plain["precision"]) == ("none", "float32")
    assert plain["model_id"] == models.load(f"local-dir:{digits_model}/model", device="cpu").id

    stored = f"{digits_model}/embeddings.safetensors"
    files = ["--images", f"{stored}[images]", "--texts", f"{stored}[prompts]", "--labels", f"{stored}[labels]"]
    status, out, error = run(capsys, "eval", *files, *common, "--json")
    assert status == 0, error
    # The scans pass through eight bits on their way to the model.
    for ours, theirs in zip(json.loads(out)["results"], (plain, noisy, closed, closed_noisy), strict=True):
        assert ours["metrics"]["acc1"] == pytest.approx(theirs["metrics"]["acc1"], abs=0.01)

    more = ["--task", "template_robustness", "--out", tmp_path / "model"]
    status, out, error = run(capsys, "eval", *given, *more)
    assert status == 0, error
    assert "acc1_template_worst" in out
    assert "worst template, none, none: '" in out
    status, out, _ = run(capsys, "build", tmp_path / "model", "--out", tmp_path / "results.csv")
    assert (status, out) == (0, f"8 results: {tmp_path}/results.csv\n")
    with open(tmp_path / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["transform"] for row in rows} == {"none", "mean_shift exact"}
    assert sum(float(row["acc1"]) == plain["metrics"]["acc1"] for row in rows) >= 2
    assert {row["seeds"] for row in rows} == {"", "0 1 2 3 4"}


@pytest.mark.slow
@pytest.mark.open_clip
def test_a_models_metrics_are_clip_benchmarks(digits_model, tmp_path, capsys, monkeypatch):
    """The model by its configuration and checkpoint, with class-specific prompts; CLIP_benchmark runs it itself."""
    theirs = pytest.importorskip("clip_benchmark.metrics.zeroshot_classification")
    monkeypatch.setattr(theirs, "float", lambda value: float(np.asarray(value).item()), raising=False)
    from safetensors.torch import load_file

    config = json.loads((digits_model / "model" / "open_clip_config.json").read_text())
    (tmp_path / "towers.json").write_text(json.dumps(config["model_cfg"]))
    torch.save(load_file(digits_model / "model" / "open_clip_model.safetensors"), tmp_path / "weights.pt")
    model, data = models.load(f"local-dir:{digits_model}/model", device="cpu"), datasets.load("digits")
    prompts = {name: [f"the number {name}", f"digit {name}", name][: 1 + i % 3] for i, name in enumerate(data.classes)}
    (tmp_path / "prompts.json").write_text(json.dumps({"digits": prompts}))
    # As open_clip scales the pictures for towers without a preprocessing of their own.
    named = models.load(str(tmp_path / "towers.json"), tmp_path / "weights.pt", device="cpu")
    images = torch.stack([named.preprocess(data.image(i)) for i in range(len(data))])
    loader = Batches(zip(images.split(50), torch.tensor(data.labels).split(50), strict=True), data.classes)
    expected = theirs.evaluate(model.module, loader, model.tokenizer, data.classes, prompts, "cpu", amp=False)
    status, out, error = run(
        capsys,
        "eval",
        "--dataset",
        "digits",
        "--model",
        tmp_path / "towers.json",
        "--pretrained",
        tmp_path / "weights.pt",
        "--custom_template_file",
        tmp_path / "prompts.json",
        "--device",
        "cpu",
        "--json",
        "--num_workers",
        "0",
    )
    assert status == 0, error
    (found,) = json.loads(out)["results"]
    assert found["metrics"] == pytest.approx(expected, abs=1e-6)
    assert found["model_id"] == named.id != model.id
    assert found["pretrained"] == str(tmp_path / "weights.pt")
    words = (tmp_path / "prompts.json").read_bytes()
    assert found["inputs"]["custom_template_file"] == {"sha256": hashlib.sha256(words).hexdigest()}
    assert found["inputs"]["dataset"] == {"sha256": datasets.fingerprint(data), "rows": len(data)}


@pytest.mark.slow
@pytest.mark.open_clip
@pytest.mark.distributed
@pytest.mark.skipif(sys.platform != "linux", reason="gloo over the loopback interface")
def test_ranks_encode_what_one_encodes(digits_model, tmp_path):
    """Batches of 50 do not end where the ranks' shares do."""
    command = [
        "-m",
        "gapkern",
        "eval",
        "--dataset",
        "digits",
        "--model",
        f"local-dir:{digits_model}/model",
        "--shift",
        "exact",
        "--device",
        "cpu",
        "--num_workers",
        "0",
        "--batch_size",
        "50",
        "--out",
    ]
    many = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=3", "--master_port", port()]
    for start, out in (([sys.executable], "one"), (many, "three")):
        done = subprocess.run(
            [*start, *command, out], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=HANGS
        )
        assert done.returncode == 0, done.stderr
    for file in (tmp_path / "one").iterdir():
        one, three = (json.loads((tmp_path / out / file.name).read_text()) for out in ("one", "three"))
        assert (one.pop("env")["ranks"], three.pop("env")["ranks"]) == (1, 3)
        assert one == three
    assert len(list((tmp_path / "three").iterdir())) == 2


@pytest.mark.slow
@pytest.mark.open_clip
def test_retrieval_and_multiple_choice_from_the_model(digits_model, tmp_path, capsys):
    """Pictures of digits on disk with captions and questions: what the model scores equals its embeddings' scores."""
    from gapkern.experiments import digits

    data = datasets.load("digits")
    for i in range(20):
        data.image(i).save(tmp_path / f"{i:012d}.png")
    names = [datasets.DIGITS[label] for label in data.labels[:20]]
    captions = [f"the number {name}" for name in names]
    (tmp_path / "captions.json").write_text(
        json.dumps(
            {
                "images": [{"id": i, "file_name": f"{i:012d}.png"} for i in range(20)],
                "annotations": [{"image_id": i, "caption": text} for i, text in enumerate(captions)],
            }
        )
    )
    questions = [
        {
            "image": f"{i:012d}.png",
            "question": "the number",
            "choices": list(datasets.DIGITS),
            "correct_choice_idx": data.labels[i],
        }
        for i in range(20)
    ]
    (tmp_path / "questions.json").write_text(json.dumps(questions))
    common = [
        "--model",
        f"local-dir:{digits_model}/model",
        "--dataset_root",
        tmp_path,
        "--num_workers",
        "1",
        "--json",
        "--batch_size",
        "7",
        "--device",
        "cpu",
    ]
    status, out, error = run(
        capsys,
        "eval",
        "--dataset",
        "mscoco_captions",
        *common,
        "--recall_k",
        1,
        5,
        "--annotation_file",
        tmp_path / "captions.json",
    )
    assert status == 0, error
    (retrieved,) = json.loads(out)["results"]
    assert set(retrieved["metrics"]) == {f"{d}_retrieval_recall@{k}" for d in ("image", "text") for k in (1, 5)}
    status, out, error = run(
        capsys, "eval", "--dataset", "aokvqa", *common, "--annotation_file", tmp_path / "questions.json"
    )
    assert status == 0, error
    (chosen,) = json.loads(out)["results"]
    from safetensors.torch import load_file

    stored = load_file(digits_model / "embeddings.safetensors")
    near = torch.cdist(stored["images"][:20], stored["prompts"][digits.TEMPLATES.index("the number {}")]).argmin(1)
    expected = float((near == stored["labels"][:20]).double().mean())
    assert chosen["task"] == "multiple_choice"
    assert chosen["metrics"]["accuracy"] == pytest.approx(expected, abs=0.051)
    assert chosen["metrics"]["chance"] == pytest.approx(0.1)
