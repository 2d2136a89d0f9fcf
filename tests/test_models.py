"""Models of transformers and sentence-transformers, a few weights each: what their own libraries make of the same."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gapkern import models
from gapkern.embeddings import Embeddings
from gapkern.models import transformers as ours
from tests import tiny_models
from tests.scenes import strict

transformers = pytest.importorskip("transformers", minversion="5")
pytest.importorskip("torchvision")
TEXTS = [
    "a cat",
    "the number 7",
    "a dog that runs and runs, all day and all night, until it is tired of running and sleeps",
    "",
]


def pictures(count=5):
    from PIL import Image

    draw = np.random.default_rng(0)
    return [Image.fromarray(draw.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8)) for i in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Each tiny model's folder by its name, made once."""
    made = {}

    def folder(name):
        if name not in made:
            if "sentences" in name:
                pytest.importorskip("sentence_transformers", minversion="6")
            if name == "siglip":
                pytest.importorskip("sentencepiece")
            made[name] = getattr(tiny_models, name)(tmp_path_factory.mktemp(name) / "model")
        return made[name]

    return folder


@pytest.mark.parametrize(
    ("name", "padding", "context"),
    [("clip", True, 12), ("siglip", "max_length", 12), ("siglip2", "max_length", 64), ("align", "max_length", 64)],
)
def test_transformers_models_are_their_own(folder, name, padding, context):
    place, images = folder(name), pictures()
    model = models.load(f"hf:{place}", device="cpu")
    theirs = transformers.AutoModel.from_pretrained(place).eval()
    processor = transformers.AutoProcessor.from_pretrained(place)
    given = processor(
        images=images, text=TEXTS, padding=padding, truncation=True, max_length=context, return_tensors="pt"
    )
    with torch.no_grad():
        found = theirs(**given)
    batch = models.batch([model.preprocess(image) for image in images])
    torch.testing.assert_close(model.encode_images(batch), found.image_embeds, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(model.encode_texts(TEXTS), found.text_embeds, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(model.encode_texts(TEXTS[:2])[0], model.encode_texts(TEXTS[:2])[1], atol=1e-5)
    assert model.context == context
    lengths = [len(ids) for ids in processor.tokenizer(TEXTS)["input_ids"]]
    assert model.truncated(TEXTS) == sum(n > context for n in lengths) >= 1
    again = pickle.loads(pickle.dumps(model.preprocess))(images[0])
    assert torch.equal(models.batch([again])["pixel_values"] if name == "siglip2" else again[None], first(batch))
    with pytest.raises(ValueError, match="pretrained: expected none, as the weights come with the model, got 'openai'"):
        models.load(f"hf:{place}", "openai")


def first(batch):
    return (batch["pixel_values"] if isinstance(batch, dict) else batch)[:1]


def test_a_text_of_the_context_is_whole_and_one_more_token_is_not(folder):
    model = models.load(f"hf:{folder('clip')}", device="cpu")
    whole, longer = "a" * (tiny_models.CONTEXT - 2), "a" * (tiny_models.CONTEXT - 1)
    assert model.truncated([whole, "é"]) == 0
    assert model.truncated([whole, longer, longer + "é"]) == 2
    assert torch.equal(model.encode_texts(longer), model.encode_texts(longer + "bc"))
    assert not torch.equal(model.encode_texts(whole), model.encode_texts(whole[:-1] + "b"))


def test_outputs_of_either_kind_are_understood(folder):
    """get_image_features returned a tensor before transformers 5, an output since; ours is the same for both."""
    place = folder("clip")
    model = models.load(f"hf:{place}", device="cpu")
    batch = models.batch([model.preprocess(image) for image in pictures()])
    expected = model.encode_images(batch)
    inner = model.module.model
    tensors = SimpleNamespace(
        get_image_features=lambda **given: inner.get_image_features(**given).pooler_output,
        get_text_features=lambda **given: inner.get_text_features(**given, return_dict=False),
    )
    texts = model.encode_texts(TEXTS)
    model.module.model = None
    del model.module.model
    object.__setattr__(model.module, "model", tensors)
    assert torch.equal(model.encode_images(batch), expected)
    assert torch.equal(model.encode_texts(TEXTS), texts)
    with pytest.raises(ValueError, match="model: expected a tensor or an output with pooler_output, got SimpleNamesp"):
        ours.features(SimpleNamespace())
    tensors.get_image_features = lambda **given: torch.ones(5, 4, 16)
    with pytest.raises(ValueError, match=r"model: expected embeddings \(B, D\) of hf/sha256:.*, got \(5, 4, 16\)"):
        model.encode_images(batch)


def test_weights_in_half_precision_are_taken_in_float32(folder, tmp_path):
    half = transformers.AutoModel.from_pretrained(folder("clip")).half()
    place = shutil.copytree(folder("clip"), tmp_path / "half")
    half.save_pretrained(place)
    assert {p.dtype for p in transformers.AutoModel.from_pretrained(place).parameters()} == {torch.float16}
    model = models.load(f"hf:{place}", device="cpu")
    assert {p.dtype for p in model.module.parameters()} == {torch.float32}
    autocast = models.load(f"hf:{place}", device="cpu", precision="bfloat16")
    near, exact = autocast.encode_texts(TEXTS), model.encode_texts(TEXTS)
    assert near.dtype == torch.float32
    assert not torch.equal(near, exact)
    assert torch.allclose(near, exact, atol=0.05)


def test_sentence_transformers_are_their_own(folder):
    from sentence_transformers import SentenceTransformer

    place = folder("sentences")
    theirs = SentenceTransformer(str(place), device="cpu")
    model = models.load(f"st:{place}", device="cpu")
    expected = theirs.encode(TEXTS, convert_to_tensor=True)
    assert expected.shape == (4, 8)
    assert torch.allclose(model.encode_texts(TEXTS, normalize=False), expected, atol=1e-6)
    unit = theirs.encode(TEXTS, convert_to_tensor=True, normalize_embeddings=True)
    assert torch.allclose(model.encode_texts(TEXTS), unit, atol=1e-6)
    assert not torch.allclose(theirs.encode(TEXTS, convert_to_tensor=True, prompt=""), expected, atol=1e-3)
    assert (model.context, model.modalities) == (16, ("text",))
    # [CLS], [SEP] and the prompt "q " are three tokens: 13 characters are left, and 14 are too many.
    assert (model.truncated(["a" * 13]), model.truncated(["a" * 14])) == (0, 1)
    with pytest.raises(ValueError, match=r"images: expected a model of images, got st/sha256:.* of texts alone"):
        model.encode_images(pictures())


def test_sentence_transformers_with_images_are_their_own(folder):
    from sentence_transformers import SentenceTransformer

    place, images = folder("clip_sentences"), pictures()
    theirs = SentenceTransformer(str(place), device="cpu")
    model = models.load(f"st:{place}", device="cpu")
    expected = theirs.encode(images, convert_to_tensor=True)
    found = model.encode_images(models.batch([model.preprocess(image) for image in images]), normalize=False)
    assert torch.allclose(found, expected, atol=1e-6)
    hf = models.load(f"hf:{folder('clip')}", device="cpu")
    batch = models.batch([hf.preprocess(image) for image in images])
    assert torch.allclose(hf.encode_images(batch, normalize=False), expected, atol=1e-6)
    assert torch.allclose(hf.encode_texts(TEXTS), model.encode_texts(TEXTS), atol=1e-6)


@pytest.mark.parametrize("name", ["siglip2", "clip_sentences"])
def test_embed_takes_them(folder, name, tmp_path, capsys):
    """Images that are dictionaries or pictures in batches, workers, a bad one left out; the same after an interrupt."""
    from gapkern.cli import main

    (tmp_path / "images").mkdir()
    for i, picture in enumerate(pictures(10)):
        picture.save(tmp_path / "images" / f"{i}.png")
    (tmp_path / "images" / "4.png").write_bytes(b"no picture")
    texts = [*TEXTS[:3], "a" * 11, *(f"word {i}" for i in range(7))]
    (tmp_path / "texts.txt").write_text("\n".join(texts) + "\n")
    spec = f"{'st' if 'sent' in name else 'hf'}:{folder(name)}"
    line = ["embed", "--model", spec, "--images", str(tmp_path / "images"), "--texts", str(tmp_path / "texts.txt")]
    line += ["--out", str(tmp_path / "out"), "--shard-rows", "4", "--batch-size", "3", "--on-error", "skip"]
    assert main([*line, "--num-workers", "2"]) == 0
    out = capsys.readouterr().out
    model = models.load(spec, device="cpu")
    readable = [picture for i, picture in enumerate(pictures(10)) if i != 4]
    expected = model.encode_images(models.batch([model.preprocess(picture) for picture in readable]))
    assert torch.allclose(Embeddings(tmp_path / "out", "img_emb")[:], expected, atol=1e-5)
    assert torch.allclose(Embeddings(tmp_path / "out", "text_emb")[:], model.encode_texts(texts), atol=1e-5)
    cut = model.truncated(texts)
    assert cut == sum(len(ids) > model.context for ids in tiny_tokens(name, texts)) > 0
    told = f"text_emb: {cut} of 11 texts are longer than the {model.context} tokens that the model reads"
    assert told in out
    manifest = json.loads((tmp_path / "out" / "text_emb" / "manifest.json").read_text())
    assert (manifest["model"], manifest["context"], manifest["truncated"]) == (model.id, model.context, cut)
    assert str(folder(name)) not in json.dumps(manifest)
    (tmp_path / "out" / "text_emb" / "text_emb_1.npy").unlink()
    assert main([*line, "--num-workers", "0", "--json"]) == 0
    found = strict(capsys.readouterr().out)
    assert found["computed"]["text_emb"] == 4
    assert json.loads((tmp_path / "out" / "text_emb" / "manifest.json").read_text()) == manifest


def tiny_tokens(name, texts):
    tokenizer = tiny_models.gemma_tokenizer() if name == "siglip2" else tiny_models.clip_tokenizer()
    return tokenizer(texts)["input_ids"]


def test_a_model_of_texts_alone_embeds_no_images(folder, tmp_path, capsys):
    from gapkern.cli import main

    (tmp_path / "images").mkdir()
    pictures(1)[0].save(tmp_path / "images" / "0.png")
    line = ["embed", "--model", f"st:{folder('sentences')}", "--images", str(tmp_path / "images"), "--out"]
    capsys.readouterr()
    assert main([*line, str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("gapkern embed: images: expected a model of images, got st/sha256:")
    assert error.count("\n") == 1
    assert not (tmp_path / "out" / "img_emb").exists()


@pytest.mark.faiss
@pytest.mark.parametrize("name", ["clip", "clip_sentences"])
def test_the_way_from_a_model_to_an_index_and_a_report(folder, name, tmp_path, monkeypatch, run, undrawn):
    """The README's commands after `demo --export`, on real digits and another library's model."""
    from PIL import Image

    digits = pytest.importorskip("sklearn.datasets").load_digits()
    for module in ("faiss", "pyarrow", "pandas"):
        pytest.importorskip(module)
    spec = f"{'st' if 'sent' in name else 'hf'}:{folder(name)}"
    monkeypatch.chdir(tmp_path)
    for i in range(60):
        place = tmp_path / "images" / str(digits.target[i])
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray((digits.images[i] * 15).astype(np.uint8)).save(place / f"{i}.png")
    (tmp_path / "captions.txt").write_text("\n".join(f"the {i}" for i in digits.target[:60]) + "\n")
    (tmp_path / "classnames.json").write_text(json.dumps([str(i) for i in range(10)]))
    (tmp_path / "t.json").write_text(json.dumps(["{c}", "the {c}"]))
    shift = ["--shift", "shift.safetensors"]
    for line in (
        "embed --images images --texts captions.txt --classnames classnames.json --templates t.json --out digits",
        "gap digits/img_emb digits/text_emb",
        "shift fit digits/classes.npy digits/img_emb --components exact --out shift.safetensors",
        "index digits/classes.npy --factory Flat --out digits-index",
        "search digits-index digits/img_emb --k 1 --out found.json",
        "eval --images digits/img_emb --texts digits/classes.npy --labels digits/labels.npy --gaussian .02 --out R",
        "build R --out results.csv",
        "robust digits/img_emb digits/classes.npy --labels digits/labels.npy --gaussian .02 --alphas 0:1:3 --out S",
        "embed --verify digits",
    ):
        words = line.split()
        words += ["--model", spec, "--num-workers", "0"] if line.startswith("embed --images") else []
        words += shift if words[0] in ("index", "eval") else []
        status, out, error = run(*words)
        assert (status, bool(out)) == (0, True), (line, error)
    model = models.load(spec, device="cpu")
    expected = model.classifier([str(i) for i in range(10)], ["{c}", "the {c}"])
    assert np.allclose(np.load("digits/classes.npy"), expected, atol=1e-6)
    assert any(model.id in path.read_text() for path in (tmp_path / "digits-index").glob("*.json"))
    status, out, error = run("eval", "--dataset", "digits", "--model", spec, "--num_workers", "0", "--out", "direct")
    assert status == 0, error
    record = json.loads(next((tmp_path / "direct").glob("*.json")).read_text())
    assert (record["model_id"], record["pretrained"]) == (model.id, "none")


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_write_what_one_does(folder, tmp_path):
    (tmp_path / "images").mkdir()
    for i, picture in enumerate(pictures(12)):
        picture.save(tmp_path / "images" / f"{i}.png")
    (tmp_path / "texts.txt").write_text("\n".join(f"word {i} {'a' * i}" for i in range(12)) + "\n")
    written = []
    for ranks in (1, 2):
        line = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        line += ["-m", "gapkern", "embed", "--model", f"hf:{folder('siglip2')}", "--images", str(tmp_path / "images")]
        line += ["--texts", str(tmp_path / "texts.txt"), "--out", str(tmp_path / str(ranks)), "--shard-rows", "4"]
        line += ["--batch-size", "3", "--num-workers", "0"]
        subprocess.run(line, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        whole = sorted(path for path in (tmp_path / str(ranks)).rglob("*") if path.is_file())
        written.append({path.relative_to(tmp_path / str(ranks)): path.read_bytes() for path in whole})
    assert written[0] == written[1]
    assert json.loads((tmp_path / "2" / "text_emb" / "manifest.json").read_text())["context"] == 64


def test_open_clip_counts_what_it_cuts():
    open_clip = pytest.importorskip("open_clip")
    from gapkern.models.open_clip import Longer

    tokenizer = open_clip.SimpleTokenizer(context_length=8)
    words = [" ".join(["cat"] * n) for n in range(12)]
    assert Longer(tokenizer, 8)(words) == [len(tokenizer.encode(text)) + 2 > 8 for text in words]
    assert Longer(tokenizer, 8)(words).count(True) == 5


@pytest.mark.parametrize("strip", [False, True])
def test_open_clips_wrapped_tokenizers_count_what_they_cut(tmp_path, strip):
    open_clip = pytest.importorskip("open_clip")
    from gapkern.models.open_clip import Longer

    tiny_models.word_tokenizer().save_pretrained(tmp_path)
    tokenizer = open_clip.tokenizer.HFTokenizer(str(tmp_path), context_length=8, strip_sep_token=strip)
    words = ["c" * n for n in range(1, 12)]
    assert Longer(tokenizer, 8)(words) == [n + 2 > 8 for n in range(1, 12)]


def test_the_id_is_the_files_and_no_path(folder, tmp_path):
    place = shutil.copytree(folder("clip"), tmp_path / "elsewhere")
    before = models.load(f"hf:{folder('clip')}", device="cpu").id
    assert before.startswith("hf/sha256:")
    (place / "README.md").write_text("words")
    assert models.load(f"hf:{place}", device="cpu").id == before
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**config, "logit_scale_init_value": 1.0}))
    assert models.load(f"hf:{place}", device="cpu").id != before


def broken(change):
    def prepare(place):
        change(place)
        return f"hf:{place}"

    return prepare


def _without_a_weight(place):
    from safetensors.torch import load_file, save_file

    state = load_file(place / "model.safetensors")
    del state["visual_projection.weight"]
    save_file(state, place / "model.safetensors", {"format": "pt"})


def _another_model(place):
    config = transformers.BertConfig(vocab_size=64, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    shutil.rmtree(place)
    transformers.BertModel(config).save_pretrained(place)
    tiny_models.word_tokenizer().save_pretrained(place)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda place: "hf:/absent", "expected hf:NAME or hf:FOLDER, got no folder '/absent'"),
        (lambda place: "st:", "expected st:NAME or st:FOLDER, got no folder ''"),
        (broken(lambda place: (place / "config.json").unlink()), "expected a folder with config.json, got"),
        (
            broken(_without_a_weight),
            r"expected weights of all its parameters, got none of visual_projection.weight",
        ),
        (broken(_another_model), "expected a model with get_image_features and get_text_features, got BertModel"),
    ],
)
def test_what_cannot_be_loaded_says_why_in_a_line(folder, tmp_path, model, message):
    place = shutil.copytree(folder("clip"), tmp_path / "model")
    with pytest.raises(ValueError, match=rf"model: cannot load (hf|st):.* \(its own weights\): {message}") as caught:
        models.load(model(place), device="cpu")
    assert "\n" not in str(caught.value)


def test_progress_bars_of_the_library_stay_as_they_were(folder, capfd):
    from transformers.utils import logging

    assert logging.is_progress_bar_enabled()
    models.load(f"hf:{folder('clip')}", device="cpu")
    assert logging.is_progress_bar_enabled()
    assert capfd.readouterr().err == ""
