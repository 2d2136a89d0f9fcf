"""The examples, run as they are on tiny models and a few pictures; what they train equals what the libraries train."""

import csv
import importlib.util
import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import tiny_models
from tests.scenes import HANGS

ROOT = Path(__file__).resolve().parent.parent / "examples"
COUNT = 12
pytest.importorskip("transformers", minversion="5")
pytest.importorskip("torchvision")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with pairs.csv, images/, a tiny CLIP of transformers in clip/, and tiny.json, one of open_clip."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("examples")
    draw = np.random.default_rng(0)
    (folder / "images").mkdir()
    with open(folder / "pairs.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption"])
        for i in range(COUNT):
            picture = draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(picture).save(folder / "images" / f"{i}.png")
            writer.writerow([f"images/{i}.png", f"item {i}"])
    tiny_models.clip(folder / "clip")
    return folder


@pytest.fixture
def example(monkeypatch):
    """Imports an example by its name, with the folder of examples on the path as Python has it for a script."""
    monkeypatch.syspath_prepend(str(ROOT))

    def example(name):
        spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    yield example
    sys.modules.pop("pairs", None)


def clip(place, name="clip"):
    from transformers import AutoModel

    return AutoModel.from_pretrained(place / name)


def batch(place):
    """All pairs at once, as the examples prepare them."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(place / "clip")
    sys.path.insert(0, str(ROOT))
    try:
        from pairs import Pairs
    finally:
        sys.path.remove(str(ROOT))
    return torch.utils.data.default_collate(list(Pairs(place / "pairs.csv", processor)))


def expected(place, steps=1, lr=1e-3):
    """The tiny CLIP after steps on all pairs with transformers' own loss."""
    model, given, losses = clip(place), batch(place), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for _ in range(steps):
        value = model(**given, return_loss=True).loss
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(float(value.detach()))
    return model, losses


def assert_same(found, truth, atol=2e-5):
    for (name, x), y in zip(found.named_parameters(), truth.parameters(), strict=True):
        if name.endswith("k_proj.bias"):  # its gradient is 0, and Adam's step the sign of rounding
            continue
        torch.testing.assert_close(x, y, atol=atol, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("name", sorted(path.stem for path in ROOT.glob("*.py")))
def test_each_is_short(name):
    assert len((ROOT / f"{name}.py").read_text().splitlines()) <= 60


def test_gradcache_takes_the_steps_of_the_whole_batch(place, example):
    found, losses = example("gradcache").main(place / "clip", place / "pairs.csv", COUNT, chunk=5, epochs=2, lr=1e-3)
    truth, values = expected(place, 2)
    assert losses == pytest.approx(values, abs=1e-4)
    assert_same(found, truth)
    assert losses[1] < losses[0]


def test_transformers_trainer(place, example, tmp_path):
    pytest.importorskip("accelerate")
    options = {"use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "max_grad_norm": 0.0, "weight_decay": 0.01}
    trainer = example("transformers_trainer").main(
        place / "clip", place / "pairs.csv", str(tmp_path / "out"), COUNT, 2, learning_rate=1e-3,
        lr_scheduler_type="constant", **options,
    )  # fmt: skip
    truth, values = expected(place, 2)
    assert trainer.state.log_history[-1]["train_loss"] == pytest.approx(np.mean(values), abs=1e-4)
    assert_same(clip(tmp_path, "out"), truth)
    from gapkern import models

    assert models.load(f"hf:{tmp_path / 'out'}", device="cpu").encode_texts("item 3").shape == (1, 16)


@pytest.mark.slow
def test_lightning(place, example):
    pytest.importorskip("pytorch_lightning")
    quiet = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = example("lightning").main(
        place / "clip", place / "pairs.csv", COUNT, 1, enable_model_summary=False, **quiet
    )
    truth, values = expected(place, 1, 1e-5)
    assert float(trainer.logged_metrics["loss"]) == pytest.approx(values[0], abs=1e-4)
    assert_same(trainer.lightning_module.model, truth)


@pytest.mark.slow
def test_sentence_transformers_trainer(example, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers", minversion="6")
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("accelerate")
    from sentence_transformers.sentence_transformer import losses

    model = str(tiny_models.sentences(tmp_path))
    rows = datasets.Dataset.from_dict(
        {"anchor": [f"item {i}" for i in range(8)], "positive": [f"{i}" for i in range(8)]}
    )
    options = {"use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "seed": 0, "learning_rate": 1e-2}
    module, found = example("sentence_transformers_trainer"), []
    for loss in (module.MultipleNegativesRankingLoss, losses.MultipleNegativesRankingLoss):
        module.MultipleNegativesRankingLoss = loss
        module.main(model, rows, str(tmp_path / loss.__module__), 4, 1, device="cpu", **options)
        trained = sentence_transformers.SentenceTransformer(str(tmp_path / loss.__module__), device="cpu")
        found.append(trained.encode(["item 3", "4"]))
    assert np.allclose(found[0], found[1], atol=1e-4)
    before = sentence_transformers.SentenceTransformer(model, device="cpu").encode(["item 3", "4"])
    assert not np.allclose(found[0], before, atol=1e-3)


@pytest.fixture
def logging_as_before():
    """open_clip's trainer sets up the root logger for good."""
    root, level = logging.root, logging.root.level
    handlers = list(root.handlers)
    yield
    for handler in [h for h in root.handlers if h not in handlers]:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)


@pytest.mark.open_clip
def test_open_clips_trainer(place, tmp_path, monkeypatch, logging_as_before):
    """A run of open_clip's trainer as the example starts it, and one with its own loss."""
    open_clip = pytest.importorskip("open_clip")
    main = pytest.importorskip("open_clip_train.main").main
    import runpy

    import gapkern

    vision = {"image_size": 16, "patch_size": 8, "layers": 1, "width": 32, "head_width": 16}
    text = {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    config = tmp_path / "tiny_for_examples.json"
    config.write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(config)
    with open(place / "pairs.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    table = "".join(f"{place / row['image']}\t{row['caption']}\n" for row in rows)
    (tmp_path / "pairs.tsv").write_text("filepath\ttitle\n" + table)
    calls = []
    forward = gapkern.ClipLoss.forward
    monkeypatch.setattr(gapkern.ClipLoss, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k))
    states = []
    for name in ("ours", "theirs"):
        line = ["--model", "tiny_for_examples", "--train-data", str(tmp_path / "pairs.tsv"), "--dataset-type", "csv"]
        line += ["--batch-size", "4", "--epochs", "1", "--workers", "0", "--device", "cpu", "--precision", "fp32"]
        line += ["--logs", str(tmp_path), "--name", name, "--warmup", "1", "--lr", "1e-3", "--save-frequency", "1"]
        if name == "ours":
            monkeypatch.setattr(sys, "argv", ["open_clip_trainer.py", *line])
            runpy.run_path(str(ROOT / "open_clip_trainer.py"), run_name="__main__")
            assert len(calls) == COUNT // 4
        else:
            main(line)
            assert len(calls) == COUNT // 4, "the patch has ended"
        saved = torch.load(tmp_path / name / "checkpoints" / "epoch_1.pt", weights_only=True)
        states.append(saved["state_dict"])
    for name, x in states[0].items():
        y = states[1][name]
        if name.endswith("in_proj_bias"):  # the keys' part has gradient 0, and Adam's step is the sign of rounding
            x, y = (torch.cat([part[: len(part) // 3], part[-len(part) // 3 :]]) for part in (x, y))
        torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.distributed
def test_torchrun_takes_the_steps_of_the_whole_batch(place, tmp_path):
    script = tmp_path / "run.py"
    arguments = [str(place / "clip"), str(place / "pairs.csv"), COUNT // 2, 1, 1e-3, str(tmp_path / "out")]
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r}); import ddp; ddp.main(*{arguments!r})")
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=HANGS, check=False)
    assert done.returncode == 0, done.stderr
    truth, values = expected(place, 1)
    assert float(done.stdout.split("loss ")[1]) == pytest.approx(values[0], abs=1e-4)
    assert_same(clip(tmp_path, "out"), truth)
