"""Rows have names: captions, class names and labels that come in any other order still meet the right rows."""

import json
import os
import shutil
import unicodedata

import numpy as np
import pytest

from gapkern.embeddings import Embeddings, keys, verify, write_folder
from tests import coded
from tests.rows_of import NUMBERS, coco, embed, measured, numbered, refused

pytest.importorskip("PIL")
pytest.importorskip("pyarrow")
pytestmark = pytest.mark.usefixtures("coded_models")


@pytest.fixture
def pictures(tmp_path):
    return numbered(tmp_path)


def karpathy(pictures):
    return {
        "images": [
            {
                "filename": n,
                "filepath": "val2014",
                "cocoid": 5 * i,
                "split": "test",
                "sentences": [{"raw": f"caption of {v}", "sentid": 2 * i + s} for s in range(2)],
            }
            for i, (n, v) in enumerate(reversed(pictures.items()))
        ]
        + [{"filename": "not.png", "filepath": "val2014", "split": "val", "sentences": [{"raw": "1"}]}]
    }


FORMS = {
    "ids in another order": coco,
    "in folders": lambda p: coco(p, "val2014/"),
    "by an absolute path": lambda p: coco(p, "/data/coco/"),
    "by Windows' paths": lambda p: coco(p, "C:\\pics\\"),
    "without suffixes": lambda p: coco(p, suffix=False),
    "ids as text": lambda p: coco(p, ids=[str(9 * i + 2) for i in range(len(p))]),
    "Karpathy's": karpathy,
    "an object": lambda p: {n: [f"a {v}", f"the {v}"] for n, v in reversed(p.items())},
    "a list": lambda p: [{"image": n, "caption": f"{v}"} for n, v in reversed(p.items())],
}


@pytest.mark.parametrize("form", FORMS)
def test_captions_meet_their_images(run, pictures, form, tmp_path):
    (tmp_path / "captions.json").write_text(json.dumps(FORMS[form](pictures)), encoding="utf-8-sig")
    embed(run, "--images", "pics", "--captions", "captions.json", "--shard_rows", "3")
    images, texts, image_of = Embeddings("out", "img_emb"), Embeddings("out", "text_emb"), np.load("out/image_of.npy")
    assert coded.values(images[:]) == NUMBERS
    assert [NUMBERS[i] for i in image_of] == coded.values(texts[:])
    line = [
        "--images",
        "out",
        "--texts",
        "out",
        "--labels",
        "out/image_of.npy",
        "--task",
        "zeroshot_retrieval",
        "--recall_k",
        "1",
    ]
    found = measured(run, *line)
    assert found["image_retrieval_recall@1"] == coded.recall(images[:].numpy(), texts[:].numpy(), image_of) == 1
    assert found["text_retrieval_recall@1"] == 1
    assert images.keys() == list(pictures)
    assert images.order == keys.order(pictures)
    # Images that are embedded once more in another order: the captions find them again.
    for i, value in enumerate(NUMBERS):
        coded.picture(tmp_path / "tars" / f"{'abcdefg'[(3 * i) % 7]}" / f"{i}.png", value)
    embed(run, "--images", "tars", "--no_resume")
    images = Embeddings("out", "img_emb")
    assert coded.values(images[:]) != NUMBERS
    image_of = np.load("out/image_of.npy")
    assert coded.recall(images[:].numpy(), texts[:].numpy(), image_of) == 1
    assert measured(run, *line)["image_retrieval_recall@1"] == 1
    assert verify("out")


def test_captions_of_an_earlier_runs_images_and_labels_of_another_folder(run, pictures, tmp_path):
    (tmp_path / "captions.json").write_text(json.dumps(coco(pictures)))
    embed(run, "--images", "pics")
    embed(run, "--captions", "captions.json")
    images, texts = (Embeddings("out", kind)[:].numpy() for kind in ("img_emb", "text_emb"))
    assert coded.recall(images, texts, np.load("out/image_of.npy")) == 1
    # The same captions alone, and the same images in another order, in folders of their own.
    embed(run, "--captions", "captions.json", out="texts")
    for i, value in enumerate(NUMBERS):
        coded.picture(tmp_path / "other" / f"{6 - i}" / f"{i}.png", value)
    embed(run, "--images", "other", out="images")
    line = ["--task", "zeroshot_retrieval", "--recall_k", "1"]
    found = measured(run, *line, "--images", "images", "--texts", "texts", "--labels", "texts/image_of.npy")
    assert found["image_retrieval_recall@1"] == 1
    err = refused(run, "eval", *line, "--images", "images", "--texts", "texts", "--labels", "2")
    assert "labels: expected '2' only where each of the texts belongs to the row of its number" in err
    write_folder("nameless", "img_emb", [Embeddings("images", "img_emb")[:]])
    assert measured(run, *line, "--images", "nameless", "--texts", "texts", "--labels", "2")  # rows as stored
    edited = json.loads((tmp_path / "texts/text_emb/manifest.json").read_text()) | {"order": "0" * 64}
    (tmp_path / "texts/text_emb/manifest.json").write_text(json.dumps(edited))
    shutil.rmtree("texts/text_metadata")
    err = refused(run, "eval", *line, "--images", "images", "--texts", "texts", "--labels", "texts/image_of.npy")
    assert "labels: expected labels of the rows of texts, got those of another order" in err


def test_captions_that_cannot_be_joined_are_refused(run, pictures, tmp_path):
    def attempt(captions, **more):
        (tmp_path / "captions.json").write_text(json.dumps(captions))
        return embed(run, "--images", "pics", "--captions", "captions.json", status=2)

    assert "got none of the name 'x.png' (1 of 8 images" in attempt(coco(pictures | {"x.png": 3}))
    assert not (tmp_path / "out").exists()
    (tmp_path / "pics" / "more").mkdir()
    shutil.copy("pics/3.png", "pics/more/3.png")
    (tmp_path / "pics" / "3.png").rename(tmp_path / "pics" / "more" / "03.png")
    shutil.copytree("pics/more", "pics/most")
    assert "expected one image of the name '3.png', got more/3.png and most/3.png" in attempt(coco(pictures))
    for value, got in ((None, "None"), (7, "7"), ({}, "{}"), ("\ud800", "a lone surrogate in '\\ud800'")):
        assert f"got {got}" in attempt({"0.png": value}), value
    assert "expected the split 'test', got train" in attempt(
        {"images": [{"filename": "0.png", "split": "train", "sentences": [{"raw": "a"}]}]}
    )
    bad = coco(pictures)
    bad["annotations"][3]["image_id"] = 5
    assert "got image_id 5 in annotation 3" in attempt(bad)


def test_unicode_names_in_either_form(run, tmp_path):
    names = [unicodedata.normalize("NFD", name) for name in ("é.png", "Ä b.png", "ñ.png")]
    for i, name in enumerate(names):
        coded.picture(tmp_path / "pics" / name, 5 + i)
    told = {unicodedata.normalize("NFC", name): f"{5 + i}" for i, name in enumerate(names)}
    (tmp_path / "captions.json").write_text(json.dumps(told))
    embed(run, "--images", "pics", "--captions", "captions.json")
    images, texts = (Embeddings("out", kind)[:].numpy() for kind in ("img_emb", "text_emb"))
    assert coded.recall(images, texts, np.load("out/image_of.npy")) == 1


def test_images_pair_with_texts_by_name(run, pictures, tmp_path):
    told = {name: f"a {value}" for name, value in pictures.items()}
    (tmp_path / "captions.json").write_text(json.dumps(told))
    embed(run, "--images", "pics", "--captions", "captions.json", out="straight")
    status, out, err = run("gap", "straight", "straight", "--json")
    assert status == 0
    assert json.loads(out)["mean_pair_distance"] == pytest.approx(0, abs=1e-6)
    assert "images: straight/img_emb" in err
    assert "texts: straight/text_emb" in err
    (tmp_path / "captions.json").write_text(json.dumps(dict(reversed(told.items()))))
    embed(run, "--images", "pics", "--captions", "captions.json", out="crossed")
    for line in (
        ["gap", "crossed", "crossed"],
        ["shift", "compare", "crossed/text_emb", "crossed/img_emb", "--labels", "paired"],
        ["robust", "crossed/img_emb", "crossed/text_emb", "--gaussian", "1", "--labels", "paired"],
        ["index", "crossed/text_emb", "--compare", "crossed/img_emb", "--factory", "Flat", "--labels", "paired"],
    ):
        assert "known by name and come in other orders" in refused(run, *line), line


def test_questions_meet_their_images(run, pictures, tmp_path):
    """Ids as COCO's file names have them; images come in the files' order, questions in another, some twice."""
    for i, value in enumerate(NUMBERS):
        coded.picture(tmp_path / "coco" / f"{900 - i:012d}.png", value)
    asked = [3, 0, 6, 3, 1, 5, 2, 4]
    entries = [
        {
            "image": f"val/{900 - i:012d}.png",
            "question": "is it",
            "correct_choice_idx": n % 3,
            "choices": [str(NUMBERS[i]) if c == n % 3 else str(40 + c) for c in range(3)],
        }
        for n, i in enumerate(asked)
    ]
    (tmp_path / "questions.json").write_text(json.dumps(entries))
    (tmp_path / "choices.txt").write_text("\n".join(c for entry in entries for c in entry["choices"]))
    embed(run, "--images", "coco", "--texts", "choices.txt")
    line = ["--images", "out", "--texts", "out", "--annotation_file", "questions.json", "--task", "multiple_choice"]
    assert coded.values(Embeddings("out", "img_emb")[:]) == NUMBERS[::-1]
    assert measured(run, *line)["accuracy"] == 1
    (tmp_path / "questions.json").write_text(json.dumps([entries[0] | {"image": "absent.png"}, *entries[1:]]))
    assert "images: expected those of all questions in out, got none of the name 'absent.png'" in refused(
        run, "eval", *line
    )


def test_names_that_are_not_utf8(run, tmp_path):
    names = [b"caf\xe9.png", b"a.png"]
    for i, name in enumerate(names):
        coded.picture(tmp_path / "pics" / f"{i}.png", 7 + i).rename(tmp_path / "pics" / os.fsdecode(name))
    embed(run, "--images", "pics")
    images = Embeddings("out", "img_emb")
    assert (images.keys(), coded.values(images[:])) == (["a.png", "caf\\xe9.png"], [8, 7])
