"""Workers that read images, started in each of the three ways: the same numbers, and a bad image is one line."""

import json
import pickle
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch

from gapkern import datasets
from gapkern.embeddings import loading, sources
from tests import coded
from tests.conftest import ROOT

pytest.importorskip("PIL")
pytest.importorskip("pyarrow")

# One process runs all commands of a start method: its imports are most of the time.
_LINES = """
import contextlib, io, json, sys
import torch
from tests import coded
if __name__ == "__main__":
    torch.multiprocessing.set_start_method(sys.argv[1])
    torch.multiprocessing.set_forkserver_preload(["tests.coded"])
    from gapkern import models
    from gapkern.cli import main
    models.load = coded.model
    results = []
    for line in json.loads(sys.argv[2]):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main(line)
        results.append([status, out.getvalue(), err.getvalue()])
    print(json.dumps(results))
"""


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_workers_started_in_any_way(method, tmp_path):
    for i in range(4):
        coded.picture(tmp_path / "pics" / "val" / coded.NAMES[i] / "x.png", i)
    shutil.copytree(tmp_path / "pics", tmp_path / "bad")
    (tmp_path / "bad" / "val" / "two" / "x.png").write_bytes(b"no picture")
    model = ["--model", "coded", "--batch_size", "2", "--num_workers", "1", "--json"]
    lines = [
        ["embed", *model, "--images", "pics/val", "--out", "out"],
        ["eval", *model, "--device", "cpu", "--dataset", "imagefolder", "--dataset_root", "bad"],
    ]
    if method != "spawn":  # whose every worker imports everything
        lines += [
            ["embed", *model, "--images", "bad/val", "--out", "bad_out"],
            ["eval", *model, "--device", "cpu", "--dataset", "imagefolder", "--dataset_root", "pics"],
        ]
    script = tmp_path / "lines.py"
    script.write_text(_LINES)
    done = subprocess.run(
        [sys.executable, str(script), method, json.dumps(lines)],
        cwd=tmp_path,
        env={**coded.environment(), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    embedded, unread, *more = json.loads(done.stdout.strip().split("\n")[-1])
    assert embedded[0] == 0, embedded
    assert coded.values(np.load(tmp_path / "out" / "img_emb" / "img_emb_0.npy")) == [1, 3, 2, 0]
    assert unread[:2] == [2, ""]
    assert unread[2].startswith("gapkern eval: dataset_root: cannot read the image bad/val/two/x.png (cannot identify")
    assert unread[2].count("\n") == 1
    if more:
        assert more[0] == [
            2,
            "",
            "gapkern embed: images: cannot read two/x.png (cannot identify image file its bytes)\n",
        ]
        assert json.loads(more[1][1])["results"][0]["metrics"]["acc1"] == 1


def test_every_data_sets_images_can_be_sent(tmp_path):
    coded.picture(tmp_path / "a" / "x.png", 7)
    shutil.copytree(tmp_path / "a", tmp_path / "set" / "a")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(tmp_path / "a" / "x.png", "x.png")
    (tmp_path / "captions.json").write_text('{"a/x.png": "7"}')
    (tmp_path / "questions.json").write_text(
        json.dumps([{"image": "a/x.png", "question": "?", "choices": ["7"], "correct_choice_idx": 0}])
    )
    readers = [
        sources.images(tmp_path / "a").read,
        sources.images(tmp_path / "x.tar").signed,
        sources.images(tmp_path).signed,
        datasets.load("imagefolder", tmp_path / "set").image,
        datasets.load("mscoco_captions", tmp_path, annotation_file=tmp_path / "captions.json").image,
        datasets.load("aokvqa", tmp_path, annotation_file=tmp_path / "questions.json").image,
        datasets.Arrays(np.full((1, 2, 3), 7, np.uint8)),
    ]
    for reader in readers:
        found = pickle.loads(pickle.dumps(loading.Unsigned(reader)))(0)[1]
        image = found[1] if isinstance(found, tuple) else found
        assert image.getpixel((0, 0))[0] == 7


def test_what_cannot_be_sent_is_said(monkeypatch):
    monkeypatch.setattr(torch.multiprocessing, "get_start_method", lambda: "spawn")
    found = loading.batches(lambda i: ("", None), coded.preprocess, [[0]], 1)
    with pytest.raises(ValueError, match="num_workers: expected 0 for images or a preprocessing that cannot be sent"):
        next(found)
