"""`gapkern embed` on a tiny model with seeded weights and real digits, and what a run that nothing disturbs writes."""

import hashlib
import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from gapkern.cli import main

CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 8, "patch_size": 4, "layers": 1, "width": 32, "head_width": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
COUNT = 240


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with model/ (for local-dir:), tiny.json and tiny.pt, images/ in ten classes, images.tar, words.txt."""
    import open_clip
    from PIL import Image
    from safetensors.torch import save_file
    from sklearn.datasets import load_digits

    folder = tmp_path_factory.mktemp("embed")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = open_clip.model.CLIP(**CONFIG).state_dict()
    (folder / "model").mkdir()
    (folder / "model" / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG, "preprocess_cfg": {}}))
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "model" / "open_clip_model.safetensors")
    (folder / "tiny.json").write_text(json.dumps(CONFIG))
    torch.save(state, folder / "tiny.pt")
    digits = load_digits()
    with tarfile.open(folder / "images.tar", "w") as tar:
        for i in range(COUNT):
            picture = Image.fromarray((digits.images[i] * 15).astype(np.uint8))
            path = folder / "images" / str(digits.target[i]) / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
            for name, data in (
                (f"{i:04d}.png", path.read_bytes()),
                (f"{i:04d}.cls", str(digits.target[i]).encode()),
                (f"{i:04d}.txt", f"digit {digits.target[i]}".encode()),
            ):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    (folder / "words.txt").write_text("\n".join(f"the number {i}" for i in range(50)) + "\n")
    return folder


def contents(folder: Path) -> dict[str, str]:
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def line(place, out, *more):
    return [
        "embed",
        "--model",
        f"local-dir:{place / 'model'}",
        "--images",
        str(place / "images"),
        "--texts",
        str(place / "words.txt"),
        "--out",
        str(out),
        "--batch_size",
        "8",
        "--shard_rows",
        "16",
        "--num_workers",
        "0",
        *more,
    ]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def one_thread():
    """As the runs that are compared with."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole(place):
    """What one run that nothing disturbs writes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert main(line(place, place / "whole")) == 0
    torch.set_num_threads(threads)
    return contents(place / "whole")


def shards(folder: Path) -> int:
    return len(list(folder.glob("*/[it]*_emb_*.npy")))
