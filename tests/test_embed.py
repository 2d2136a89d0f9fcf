"""`gapkern embed`: embeddings are the model's own, however they are asked for, and what is wrong is named."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from gapkern import models
from gapkern.cli import main
from gapkern.embeddings import Embeddings, embed, sources, verify
from tests import embedded
from tests.embedded import COUNT, contents, line, shards
from tests.scenes import strict

pytest.importorskip("open_clip")
pytest.importorskip("sklearn")
pytest.importorskip("pyarrow")
pytestmark = pytest.mark.open_clip
place, whole, one_thread = embedded.place, embedded.whole, embedded.one_thread


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
