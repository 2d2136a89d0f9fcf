"""`gapkern embed` on a tiny model with seeded weights and real digits: the same bytes however it runs and is killed."""

import hashlib
import io
import json
import os
import pickle
import random
import shutil
import socket
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from gapkern import models
from gapkern.cli import main
from gapkern.embeddings import Embeddings, embed, sources, verify
from tests.scenes import HANGS, Forks, strict

open_clip = pytest.importorskip("open_clip")
pytest.importorskip("sklearn")
pytest.importorskip("pyarrow")
pytestmark = pytest.mark.open_clip

CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 8, "patch_size": 4, "layers": 1, "width": 32, "head_width": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
COUNT = 240


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with model/ (for local-dir:), tiny.json and tiny.pt, images/ in ten classes, images.tar, words.txt."""
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


def command(place, out, *more):
    return [sys.executable, "-m", "gapkern", *line(place, out, *more)]


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


def test_embeddings_are_the_models_own(place, whole):
    model = models.load(f"local-dir:{place / 'model'}", device="cpu")
    images, words = Embeddings(place / "whole", "img_emb"), Embeddings(place / "whole", "text_emb")
    source = sources.images(place / "images")
    with torch.no_grad():
        batch = torch.stack([model.preprocess(source.read(i)) for i in range(COUNT)])
        expected = torch.nn.functional.normalize(model.module.encode_image(batch), dim=1)
        texts = model.module.encode_text(model.tokenizer((place / "words.txt").read_text().splitlines()))
    assert torch.allclose(images[:], expected, atol=1e-6)
    assert torch.allclose(words[:], torch.nn.functional.normalize(texts, dim=1), atol=1e-6)
    assert images.counts == [16] * 15
    assert images.model == words.model == model.id
    assert str(place) not in (place / "whole" / "img_emb" / "manifest.json").read_text()
    told = list(images.metadata())
    assert [row["image_path"] for row in told] == list(source.names)
    assert np.load(place / "whole" / "labels.npy").tolist() == [int(n.split("/")[0]) for n in source.names]
    assert [row["caption"] for row in words.metadata()] == (place / "words.txt").read_text().splitlines()
    assert verify(place / "whole")["img_emb"]["metadata"]
    assert torch.equal(pickle.loads(pickle.dumps(model.preprocess))(source.read(3)), batch[3]), "it goes to workers"
    one = model.encode_texts("a cat")
    assert torch.equal(one, model.encode_texts(["a cat"]))
    assert one.shape == (1, 16)
    with pytest.raises(TypeError, match="texts: expected strings, got int"):
        model.encode_texts([3])


def test_checkpoint_folder_tar_and_function_agree(place, whole, tmp_path):
    options = {"batch_size": 8, "shard_rows": 16, "device": "cpu"}
    found = embed(str(place / "tiny.json"), place / "tiny.pt", images=place / "images.tar", out=tmp_path, **options)
    assert found["img_emb"]["model"].startswith("tiny/sha256:")
    by_tar = Embeddings(tmp_path)
    rows = {int(row["image_path"].split("/")[1].split(".")[0]): i for i, row in enumerate(by_tar.metadata())}
    order = [rows[int(Path(name).stem)] for name in sources.images(place / "images").names]
    assert torch.allclose(by_tar[:][order], Embeddings(place / "whole", "img_emb")[:], atol=1e-6)
    first = next(by_tar.metadata())
    assert first["caption"] == f"digit {first['label']}"


def test_class_vectors(place, tmp_path):
    model = models.load(f"local-dir:{place / 'model'}", device="cpu")
    names, templates = ["zero", "one"], ["a {c}", "the digit {c}", "{c}"]
    embed(model, out=tmp_path, classnames=names, templates=templates)
    expected = []
    with torch.no_grad():
        for name in names:
            tokens = model.tokenizer([t.replace("{c}", name) for t in templates])
            mean = torch.nn.functional.normalize(model.module.encode_text(tokens), dim=1).mean(0)
            expected.append(mean / mean.norm())
    assert torch.allclose(torch.from_numpy(np.load(tmp_path / "classes.npy")), torch.stack(expected), atol=1e-6)
    with pytest.raises(ValueError, match=r"templates: expected a string with \{c\} for the class, got 'a \{x\}'"):
        model.classifier(names, ["a {x}"])


def test_half_raw_and_workers(place, whole, tmp_path):
    assert main(line(place, tmp_path / "half", "--dtype", "float16", "--no_metadata", "--num_workers", "2")) == 0
    half = Embeddings(tmp_path / "half", "img_emb")
    full = Embeddings(place / "whole", "img_emb")[:]
    assert half.dtype == torch.float16
    assert torch.allclose(half[:].float(), full, atol=5e-4)
    assert not (tmp_path / "half" / "metadata").exists()
    assert main(line(place, tmp_path / "raw", "--raw")) == 0
    raw = Embeddings(tmp_path / "raw", "img_emb")[:]
    assert not torch.allclose(raw.norm(dim=1), torch.ones(COUNT), atol=1e-2)
    assert torch.allclose(torch.nn.functional.normalize(raw, dim=1), full, atol=1e-6)


def test_a_finished_run_is_not_done_again_and_a_spoilt_shard_is(place, whole, tmp_path, capsys, one_thread):
    out = Path(shutil.copytree(place / "whole", tmp_path / "out"))
    before = {p: p.stat().st_mtime_ns for p in out.glob("*/*.npy")}
    assert main(line(place, out, "--json")) == 0
    assert strict(capsys.readouterr().out)["computed"] == {"img_emb": 0, "text_emb": 0}
    assert {p: p.stat().st_mtime_ns for p in out.glob("*/*.npy")} == before
    data = (out / "img_emb" / "img_emb_3.npy").read_bytes()
    (out / "img_emb" / "img_emb_3.npy").write_bytes(data[:-1] + b"\x00")
    (out / "metadata" / "metadata_5.parquet").unlink()
    assert main(line(place, out, "--json")) == 0
    assert strict(capsys.readouterr().out)["computed"] == {"img_emb": 32, "text_emb": 0}
    assert contents(out) == whole


def test_another_run_is_refused_with_what_differs(place, whole, tmp_path, capsys):
    out = Path(shutil.copytree(place / "whole", tmp_path / "out"))
    assert main(line(place, out, "--dtype", "float16", "--batch_size", "4")) == 2
    message = capsys.readouterr().err
    assert "stored float32 there, float16 now; batch_size 8 there, 4 now" in message
    assert contents(out) == whole
    assert main(line(place, out, "--dtype", "float16", "--no_resume")) == 0
    assert verify(out)["img_emb"]["dtype"] == "float16"


def test_other_pictures_of_the_same_names_and_sizes_are_another_source(place, tmp_path):
    shutil.copytree(place / "images", tmp_path / "images")
    before = sources.images(place / "images").fingerprint
    assert sources.images(tmp_path / "images").fingerprint == before
    picture = tmp_path / "images" / "3" / "13.png"
    data = bytearray(picture.read_bytes())
    data[-20] ^= 1
    picture.write_bytes(data)
    assert sources.images(tmp_path / "images").fingerprint != before
    tar = bytearray((place / "images.tar").read_bytes())
    (tmp_path / "images.tar").write_bytes(tar)
    assert sources.images(tmp_path / "images.tar").fingerprint == sources.images(place / "images.tar").fingerprint
    tar[tar.index(b"IDAT") + 8] ^= 1
    (tmp_path / "images.tar").write_bytes(tar)
    assert sources.images(tmp_path / "images.tar").fingerprint != sources.images(place / "images.tar").fingerprint


def test_a_bad_image_is_named(place, tmp_path, capsys):
    shutil.copytree(place / "images", tmp_path / "images")
    (tmp_path / "images" / "3" / "13.png").write_bytes(b"no picture")
    for workers in ("0", "2"):
        arguments = line(place, tmp_path / "out", "--num_workers", workers)
        arguments[arguments.index("--images") + 1] = str(tmp_path / "images")
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("gapkern embed: images: cannot read 3/13.png (cannot identify")
        assert error.count("\n") == 1


def test_embeddings_that_are_not_finite_are_named(place, tmp_path):
    model = models.load(f"local-dir:{place / 'model'}", device="cpu")
    texts = [f"word {i}" for i in range(40)]
    tokenizer = model.tokenizer
    dark = tokenizer(texts[21:22])[0]

    class Spoilt(torch.nn.Module):
        def encode_text(self, tokens):
            return torch.where((tokens == dark).all(1)[:, None], torch.inf, torch.ones(len(tokens), 16))

    spoilt = models.Model(Spoilt(), model.preprocess, tokenizer, "spoilt", model.device)
    with pytest.raises(ValueError, match=r"text_emb: expected finite .*, got NaN or infinity in row 21, 'word 21'"):
        embed(spoilt, texts=texts, out=tmp_path, shard_rows=16, batch_size=8)
    assert shards(tmp_path) == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model", "ViT-B-32"], "pretrained: expected a tag or a checkpoint, got None for ViT-B-32"),
        (["--pretrained", "openai"], "pretrained: expected none, as the weights come with the model, got 'openai'"),
        (["--model", "local-dir:/absent"], "model: expected a folder with open_clip_config.json, got /absent"),
        (["--model", "ViT-B-32", "--pretrained", "absent"], "model: cannot load ViT-B-32 (absent): Pretrained value"),
        (["--texts", "/absent.txt"], "texts: cannot read /absent.txt"),
        (["--images", "/absent"], "images: expected a folder or an uncompressed .tar, got /absent"),
        (["--batch_size", "0"], "batch_size: expected an integer >= 1, got 0"),
        (["--templates", "x"], "templates: expected --classnames beside them, got none"),
        (["--images", "x", "--dataset", "digits"], "images: expected --images or --dataset, got both"),
    ],
)
def test_bad_input_is_one_line(place, tmp_path, capsys, more, message):
    assert main(line(place, tmp_path / "out", *more)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_datasets_and_captions(place, tmp_path):
    out, model = tmp_path / "digits", f"local-dir:{place / 'model'}"
    assert main(["embed", "--model", model, "--dataset", "digits", "--out", str(out), "--num_workers", "0"]) == 0
    assert len(Embeddings(out)) == len(np.load(out / "labels.npy")) == 597
    note = {
        "images": [{"id": 7, "file_name": "b"}, {"id": 2, "file_name": "a"}],
        "annotations": [
            {"image_id": 7, "caption": "seven"},
            {"image_id": 2, "caption": "two"},
            {"image_id": 7, "caption": "7"},
        ],
    }
    (tmp_path / "captions.json").write_text(json.dumps(note))
    out = tmp_path / "coco"
    assert main(["embed", "--model", model, "--captions", str(tmp_path / "captions.json"), "--out", str(out)]) == 0
    assert [row["caption"] for row in Embeddings(out).metadata()] == ["two", "seven", "7"]
    assert np.load(out / "image_of.npy").tolist() == [0, 1, 1]


def test_damaged_tars_are_named(place, tmp_path):
    data = (place / "images.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(data[: 512 * 40 + 600])
    with pytest.raises(ValueError, match=r"images: expected .*tar, got .*cut\.tar"):
        sources.images(tmp_path / "cut.tar")


def shards(folder: Path) -> int:
    return len(list(folder.glob("*/[it]*_emb_*.npy")))


@pytest.mark.slow
def test_ten_kills_change_nothing(place, whole, tmp_path):
    out, chance = tmp_path / "out", random.Random(0)
    survivors: dict[str, int] = {}
    modules = "open_clip, pyarrow.parquet, torchvision, gapkern.evaluation, gapkern.embeddings.run"
    with Forks(modules, OMP_NUM_THREADS="1") as forks:
        for kill in range(10):
            child = forks.start(line(place, out))
            # Once another shard has appeared (the last time: as it starts), and a moment later: while it encodes,
            # writes a shard, its metadata or its note, or renames.
            wanted = shards(out) + 1 if kill < 9 else 0
            deadline = time.monotonic() + HANGS
            while shards(out) < wanted and time.monotonic() < deadline:
                time.sleep(0.0002)
            time.sleep(chance.random() * 0.01)
            assert forks.kill(child), "it ended before it was killed"
            for name, written in survivors.items():
                assert (out / name).stat().st_mtime_ns == written, f"{name} was computed again"
            survivors = {p.relative_to(out).as_posix(): p.stat().st_mtime_ns for p in out.glob("*/[it]*_emb_*.npy")}
        assert 9 <= len(survivors) < 19
        forks.start(line(place, out))
        assert forks.status() == 0
    assert contents(out) == whole
    assert {name: (out / name).stat().st_mtime_ns for name in survivors} == survivors


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_write_the_same(place, whole, tmp_path):
    run = [*TORCHRUN, "-m", "gapkern", *line(place, tmp_path / "out", "--json")]
    done = subprocess.run(run, check=True, env=ENVIRONMENT, capture_output=True, text=True)
    assert json.loads(done.stdout)["computed"] == {"img_emb": COUNT, "text_emb": 50}
    assert contents(tmp_path / "out") == whole


_DIES = """
import os, sys
from gapkern.cli import main
from gapkern.embeddings import pictures
if os.environ["RANK"] == "1":
    decode = pictures.decode
    def dying(content, name):
        if name == os.environ["DIES_AT"]:
            os.kill(os.getpid(), 9)
        return decode(content, name)
    pictures.decode = dying
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("launcher", ["torchrun", "bare"])
def test_a_rank_that_dies_ends_the_others_and_loses_nothing(place, whole, tmp_path, launcher, one_thread):
    out, script = tmp_path / "out", tmp_path / "dies.py"
    script.write_text(_DIES)
    dying = sources.images(place / "images").names[16 * 5 + 3]  # in a shard of rank 1
    environment = {**ENVIRONMENT, "DIES_AT": dying}
    if launcher == "torchrun":
        run = subprocess.run(
            [*TORCHRUN, str(script), *line(place, out)], env=environment, capture_output=True, text=True, timeout=HANGS
        )
        assert run.returncode != 0
    else:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        common = {**environment, "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        run = [sys.executable, str(script), *line(place, out)]
        ranks = [
            subprocess.Popen(run, stderr=subprocess.PIPE, text=True, env={**common, "RANK": r, "LOCAL_RANK": r})
            for r in ("0", "1")
        ]
        errors = [rank.communicate(timeout=HANGS)[1] for rank in ranks]
        assert [rank.returncode for rank in ranks] == [1, -9]
        assert "gapkern embed: rank 0: lost another rank" in errors[0]
    assert not (out / "img_emb" / "manifest.json").exists()
    assert shards(out) > 0
    assert main(line(place, out)) == 0
    assert contents(out) == whole


def test_the_demos_export_embeds_as_the_demo_does(tmp_path):
    from gapkern import datasets
    from gapkern.experiments import digits

    data = datasets.scans(0)
    trained = digits.train(data, steps=2)
    digits.export(trained, data, tmp_path)
    there = {
        "model": "model",
        "images": "images",
        "texts": "captions.txt",
        "classnames": "classnames.json",
        "templates": "templates.json",
        "out": "out",
    }
    arguments = [part for key, name in there.items() for part in (f"--{key}", str(tmp_path / name))]
    arguments[1] = f"local-dir:{arguments[1]}"
    assert main(["embed", *arguments, "--num_workers", "0"]) == 0
    found = Embeddings(tmp_path / "out", "img_emb")
    names = [row["image_path"] for row in found.metadata()]
    rows = [int(Path(name).stem) for name in names]
    assert torch.allclose(found[:], digits.embed_images(trained, data.test_images)[rows], atol=2e-2)  # 8 bits per pixel
    assert np.load(tmp_path / "out" / "labels.npy").tolist() == data.test_digits[rows].tolist()
    prompts = digits.embed_prompts(trained, digits.TEMPLATES)
    classes = torch.nn.functional.normalize(prompts.mean(0), dim=1)
    assert torch.allclose(torch.from_numpy(np.load(tmp_path / "out" / "classes.npy")), classes, atol=1e-5)
    captions = (tmp_path / "captions.txt").read_text().splitlines()
    assert all(datasets.DIGITS[d] in text for d, text in zip(data.test_digits[rows], captions, strict=True))
