"""Rows have names: captions, class names and labels that come in any other order still meet the right rows."""

import csv
import json
import os
import random
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch

from gapkern.embeddings import Embeddings, keys, verify, write_folder
from tests import coded

pytest.importorskip("PIL")
pytest.importorskip("pyarrow")


pytestmark = pytest.mark.usefixtures("coded_models")


def embed(run, *line, out="out", status=0):
    found = run("embed", "--model", "coded", "--out", out, "--num_workers", "0", *line)
    assert found[0] == status, found
    assert status == 0 or (found[2].count("\n") == 1 and found[2].startswith("gapkern embed: ")), found[2]
    return found[2]


def measured(run, *line):
    status, out, err = run("eval", "--device", "cpu", "--json", *line)
    assert status == 0, err
    return json.loads(out)["results"][0]["metrics"]


def refused(run, *line):
    status, out, err = run(*line)
    assert (status, out, err.count("\n")) == (2, "", 1), (status, out, err)
    return err


NUMBERS = [10, 2, 33, 4, 25, 6, 17]


@pytest.fixture
def pictures(tmp_path):
    """Pictures whose file names, ids and red values come in three orders."""
    for i, value in enumerate(NUMBERS):
        coded.picture(tmp_path / "pics" / f"{i}.png", value)
    return {f"{i}.png": value for i, value in enumerate(NUMBERS)}


def coco(pictures, folder="", suffix=True, ids=None, each=2):
    names = list(pictures)
    random.Random(0).shuffle(names)
    ids = ids or [100 - 7 * i for i in range(len(names))]
    name = lambda n: folder + (n if suffix else n.removesuffix(".png"))  # noqa: E731
    return {
        "images": [{"id": i, "file_name": name(n)} for i, n in zip(ids, names, strict=True)],
        "annotations": [
            {"id": 1000 + 10 * k + i, "image_id": ids[k], "caption": f"try {i} of {pictures[n]}"}
            for i in range(each)
            for k, n in enumerate(names)
        ],
    }


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


@pytest.fixture
def classes(tmp_path):
    """Class folders zero ... nine, which come in the alphabet's order."""
    for i, name in enumerate(coded.NAMES):
        for n in range(1 + i % 3):
            coded.picture(tmp_path / "digits" / name / f"{n}.png", i)
    return sum(1 + i % 3 for i in range(10))


def numbers(run, expected=1.0):
    """Accuracy by `gapkern eval`, which is NumPy's from the files."""
    line = ["--images", "out", "--texts", "out/classes.npy", "--labels", "out/labels.npy"]
    found = measured(run, *line)["acc1"]
    images = Embeddings("out", "img_emb")[:].numpy()
    vectors, labels = np.load("out/classes.npy"), np.load("out/labels.npy")
    assert found == coded.accuracy(images, vectors, labels) == expected
    names = json.loads(Path("out/classnames.json").read_text())
    assert coded.values(vectors) == [coded.number(name) for name in names]
    assert [coded.number(names[label]) for label in labels] == coded.values(images)


@pytest.mark.parametrize(
    "names",
    [
        coded.NAMES,
        sorted(coded.NAMES),
        [name.upper() for name in coded.NAMES[::-1]],
        {name: f"the {name}" for name in coded.NAMES},
    ],
)
def test_class_folders_meet_class_names(run, classes, names, tmp_path):
    (tmp_path / "names.json").write_text(json.dumps(names))
    if isinstance(names, list) and names[0].isupper():
        (tmp_path / "names.json").write_text(json.dumps([name.lower().replace(" ", "_") for name in names]))
    embed(run, "--images", "digits", "--classnames", "names.json")
    numbers(run)
    assert len(np.load("out/labels.npy")) == classes


def test_class_names_of_another_set_are_refused(run, classes, tmp_path):
    for names, got in (
        (coded.NAMES[:7], "got 7 names, none for 'eight', 'nine', 'seven'"),
        ((*coded.NAMES, "ten"), "no class for 'ten'"),
        ((*coded.NAMES[:9], "eight"), "none for"),
        ({name: name for name in coded.NAMES[:9]}, "expected a name for each class, got none of 'nine'"),
    ):
        (tmp_path / "names.json").write_text(json.dumps(names))
        assert got in embed(run, "--images", "digits", "--classnames", "names.json", status=2)
    # A folder without images is the class of its name, of which there are none.
    (tmp_path / "digits" / "ten").mkdir()
    (tmp_path / "names.json").write_text(json.dumps([*coded.NAMES, "ten"]))
    embed(run, "--images", "digits", "--classnames", "names.json")
    numbers(run)


def test_numbered_folders_are_numbered(run, tmp_path):
    names = [f"number {i}" for i in range(12)]
    (tmp_path / "names.txt").write_text("\r\n".join(names) + "\r\n\r\n")
    for i in range(12):
        coded.picture(tmp_path / "numbered" / str(i) / "x.PNG", i)
    coded.picture(tmp_path / "numbered" / ".hidden" / "x.png", 40)
    coded.picture(tmp_path / "numbered" / "3" / "._x.png", 40)
    embed(run, "--images", "numbered", "--classnames", "names.txt")
    numbers(run)
    assert np.load("out/labels.npy").tolist() == list(range(12))
    (tmp_path / "numbered" / "0").rename(tmp_path / "numbered" / "12")
    embed(run, "--images", "numbered", "--classnames", "names.txt", out="one", status=2)


def test_what_stands_beside_goes_with_its_rows(run, classes, pictures, tmp_path):
    def there():
        return {p.name for p in (tmp_path / "out").iterdir() if p.is_file()}

    (tmp_path / "names.json").write_text(json.dumps(coded.NAMES))
    (tmp_path / "captions.json").write_text(json.dumps(coco(pictures)))
    embed(run, "--images", "digits", "--classnames", "names.json")
    assert there() == {"labels.npy", "classes.npy", "classnames.json", "rows.json"}
    embed(run, "--captions", "captions.json")
    assert there() == {"labels.npy", "classes.npy", "classnames.json", "rows.json", "image_of.npy"}
    numbers(run)
    # The same images without names: labels in the folders' order, so the vectors of the other order go.
    before = Path("out/img_emb/img_emb_0.npy").stat().st_mtime_ns
    embed(run, "--images", "digits")
    assert Path("out/img_emb/img_emb_0.npy").stat().st_mtime_ns == before
    assert [row["label"] for row in Embeddings("out", "img_emb").metadata()] == np.load("out/labels.npy").tolist()
    assert verify("out")
    assert "classes.npy" not in there()
    assert json.loads((tmp_path / "out/classnames.json").read_text()) == sorted(coded.NAMES)
    # Names alone, in another order: the labels that are there follow.
    embed(run, "--classnames", "names.json")
    numbers(run)
    (tmp_path / "few.json").write_text(json.dumps(coded.NAMES[:4]))
    embed(run, "--classnames", "few.json", status=2)
    numbers(run)
    embed(run, "--images", "pics", "--no_resume")
    assert there() == {"rows.json", "image_of.npy"}
    assert [NUMBERS[i] for i in np.load("out/image_of.npy")] == coded.values(Embeddings("out", "text_emb")[:])
    embed(run, "--images", "digits", "--no_resume")
    assert there() == {"labels.npy", "classnames.json", "rows.json", "image_of.npy"}
    line = ["--images", "out", "--texts", "out", "--labels", "out/image_of.npy", "--task", "zeroshot_retrieval"]
    assert "labels: expected one image of the name '0.png'" in refused(run, "eval", *line)
    np.save("out/labels.npy", np.zeros(classes, dtype=np.int64))
    np.save("vectors.npy", np.eye(10, 64, dtype=np.float32))
    line = ["eval", "--images", "out", "--texts", "vectors.npy", "--labels", "out/labels.npy"]
    assert "labels: expected out/labels.npy as out/rows.json has it, got another file" in refused(run, *line)


def test_labels_find_images_of_another_order(run, classes, tmp_path):
    (tmp_path / "names.json").write_text(json.dumps(coded.NAMES))
    embed(run, "--images", "digits", "--classnames", "names.json")
    x = Embeddings("out", "img_emb")
    order = np.random.default_rng(0).permutation(len(x))
    write_folder("shuffled", "img_emb", [x[:][order]], names=[x.keys()[i] for i in order])
    line = ["--images", "shuffled", "--texts", "out/classes.npy", "--labels", "out/labels.npy"]
    assert measured(run, *line)["acc1"] == 1
    shutil.rmtree("shuffled/metadata")
    assert "got those of another order" in refused(run, "eval", *line)
    # By key, from tables and objects, with names for numbers.
    named = {key: coded.NAMES[value] for key, value in zip(x.keys(), coded.values(x[:]), strict=True)}
    (tmp_path / "labels.json").write_text(json.dumps(dict(sorted(named.items(), key=lambda item: item[1]))))
    with open("labels.csv", "w", newline="") as file:
        csv.writer(file).writerows([("key", "label"), *((k, coded.NAMES.index(v)) for k, v in reversed(named.items()))])
    for file in ("labels.json", "labels.csv"):
        line = ["--images", "out", "--texts", "out/classes.npy", "--labels", file]
        assert measured(run, *line)["acc1"] == 1
    named.popitem()
    (tmp_path / "labels.json").write_text(json.dumps(named))
    assert "labels: expected a label for each row, got none for" in refused(
        run, "eval", "--images", "out", "--texts", "out/classes.npy", "--labels", "labels.json"
    )


def test_class_names_of_a_data_set(run, classes, tmp_path):
    line = ["--dataset", "imagefolder", "--dataset_root", "digits", "--model", "coded", "--num_workers", "0"]
    assert measured(run, *line)["acc1"] == 1
    for names in (
        coded.NAMES,
        {"imagefolder": coded.NAMES},
        {name: f"is {name}" for name in coded.NAMES},
        {"imagefolder": {name: name for name in coded.NAMES}},
    ):
        (tmp_path / "names.json").write_text(json.dumps(names))
        assert measured(run, *line, "--custom_classname_file", "names.json")["acc1"] == 1
    for names in (coded.NAMES[:7], [*coded.NAMES, "ten"], ["a", *coded.NAMES[1:]]):
        (tmp_path / "names.json").write_text(json.dumps(names))
        assert "classnames: expected the names of the images' 10 classes" in refused(
            run, "eval", *line, "--custom_classname_file", "names.json"
        )


def test_wordnet_ids_take_names_in_their_order(run, tmp_path):
    for i, name in enumerate(("n03", "n01", "n02")):
        coded.picture(tmp_path / "val" / f"{name}000000" / "x.png", (3, 1, 2)[i])
    (tmp_path / "names.json").write_text('{"imagenet1k": ["one", "two", "three"]}')
    line = ["--dataset", "imagenet1k", "--dataset_root", ".", "--model", "coded", "--num_workers", "0"]
    assert measured(run, *line, "--custom_classname_file", "names.json")["acc1"] == 1


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


@pytest.fixture
def sides(tmp_path):
    generator = torch.Generator().manual_seed(0)
    gallery = torch.randn(40, 8, generator=generator)
    queries = gallery + 0.5 * torch.randn(40, 8, generator=generator)
    np.save("gallery.npy", gallery.numpy())
    np.save("queries.npy", queries.numpy())
    np.save("few.npy", queries[:10].numpy())
    right = np.random.default_rng(0).integers(0, 40, 40)
    near = torch.cdist(queries, gallery).argmin(1).numpy()
    return right, float((near == right).mean()), float((near == np.arange(40)).mean())


def test_labels_from_any_file(run, sides, tmp_path):
    right, expected, paired = sides
    np.save("l.npy", right.astype(np.uint8))
    np.savez("l.npz", right.astype(np.int32))
    (tmp_path / "l.json").write_text(json.dumps(right.tolist()))
    (tmp_path / "l.txt").write_text("\n".join(map(str, right)) + "\n\n")
    (tmp_path / "l.csv").write_text("label\n" + "\n".join(map(str, right)) + "\n")
    (tmp_path / "l.tsv").write_text("query\tlabel\n" + "\n".join(f"q\t{n}" for n in right) + "\n")
    compare = ["shift", "compare", "gallery.npy", "queries.npy", "--components", "0", "--json", "--labels"]
    for name in ("l.npy", "l.npz", "l.json", "l.txt", "l.csv", "l.tsv"):
        status, out, err = run(*compare, name)
        assert status == 0, err
        assert json.loads(out)["clean_accuracy"] == pytest.approx(expected)
    assert json.loads(run(*compare, "paired")[1])["clean_accuracy"] == pytest.approx(paired)


WRONG = {
    "a column": (lambda r: r[:, None], "labels: expected shape (40,), one per query, got (40, 1)"),
    "one": (lambda r: r[:1], "labels: expected shape (40,), one per query, got (1,)"),
    "a number": (lambda r: r[0], "labels: expected shape (40,), one per query, got ()"),
    "none": (lambda r: r[:0], "labels: expected shape (40,), one per query, got (0,)"),
    "floats": (lambda r: r.astype(float), "labels: expected integers, got torch.float64"),
    "truths": (lambda r: r > 3, "labels: expected integers, got torch.bool"),
    "strings": (lambda r: r.astype(str), "labels: expected integers, got strings such as"),
    "beyond": (lambda r: np.where(np.arange(40) == 7, 40, r), "[0, 40), gallery rows, got 40 in row 7"),
    "below": (lambda r: np.where(np.arange(40) == 7, -1, r), "[0, 40), gallery rows, got -1 in row 7"),
    "from one": (lambda r: np.arange(1, 41), "got 40 in row 39; they count from 0"),
    "objects": (lambda r: np.array([{}] * 40, dtype=object), "labels: expected a .npy file"),
}


@pytest.mark.parametrize("case", WRONG)
def test_labels_are_checked_by_every_verb(run, sides, case):
    change, message = WRONG[case]
    np.save("l.npy", change(sides[0]), allow_pickle=True)
    for line in (
        ["shift", "compare", "gallery.npy", "queries.npy"],
        ["robust", "queries.npy", "gallery.npy", "--gaussian", "1"],
        ["index", "gallery.npy", "--compare", "queries.npy", "--factory", "Flat"],
    ):
        assert message in refused(run, *line, "--labels", "l.npy")
    line = ["eval", "--images", "queries.npy", "--texts", "gallery.npy", "--labels", "l.npy"]
    assert message.replace("gallery rows", "classes").replace("query", "image") in refused(run, *line)


def test_paired_needs_as_many(run, sides):
    for line in (
        ["shift", "compare", "gallery.npy", "few.npy"],
        ["shift", "compare", "few.npy", "queries.npy"],
        ["robust", "queries.npy", "few.npy", "--gaussian", "1"],
    ):
        assert "labels: expected paired, one of" in refused(run, *line, "--labels", "paired")
    assert "labels: cannot read absent.npy" in refused(
        run, "shift", "compare", "gallery.npy", "queries.npy", "--labels", "absent.npy"
    )


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


def test_robustness_to_class_vectors_of_another_order(run, classes, tmp_path):
    (tmp_path / "names.json").write_text(json.dumps(coded.NAMES))
    embed(run, "--images", "digits", "--classnames", "names.json")
    embed(run, "--images", "digits", out="alphabet")
    line = ["--gaussian", "0.000001", "--alphas", "0,1", "--components", "2", "--json"]
    for labels in ("out/labels.npy", "alphabet/labels.npy"):
        status, out, err = run("robust", "out/img_emb", "out/classes.npy", *line, "--labels", labels)
        assert status == 0, err
        assert json.loads(out)["rows"][0]["clean_accuracy"] == 1
    line = ["--images", "out", "--texts", "out/classes.npy", "--labels", "alphabet/labels.npy"]
    assert measured(run, *line)["acc1"] == 1
    assert "classnames: expected the order of out/classes.npy" in refused(
        run, "eval", *line, "--custom_classname_file", "alphabet/classnames.json"
    )


def test_harm_to_what_says_whose_rows_these_are(run, classes, tmp_path):
    embed(run, "--images", "digits", "--shard_rows", "8")
    assert verify("out")
    shutil.copytree("out", "kept")

    def harmed(harm):
        shutil.rmtree("out")
        shutil.copytree("kept", "out")
        harm()
        return refused(run, "embed", "--verify", "out")

    swapped = json.loads((tmp_path / "out/img_emb/manifest.json").read_text()) | {"order": "0" * 64}
    assert "labels.npy: expected the order of out/img_emb, got another's" in harmed(
        lambda: (tmp_path / "out/img_emb/manifest.json").write_text(json.dumps(swapped))
    )
    assert "labels.npy: missing, rows.json has it" in harmed((tmp_path / "out/labels.npy").unlink)
    assert "labels.npy as out/rows.json has it, got another file" in harmed(
        lambda: np.save("out/labels.npy", np.zeros(classes, np.int64))
    )
    assert "metadata_0.parquet" in harmed(lambda: (tmp_path / "out/metadata/metadata_0.parquet").write_bytes(b"PAR1"))
    np.save("vectors.npy", np.eye(10, 64, dtype=np.float32))
    (tmp_path / "byname.json").write_text('{"a.png": 1}')
    line = ["eval", "--images", "out", "--texts", "vectors.npy", "--labels", "byname.json"]
    assert "images: expected Parquet beside out/img_emb" in refused(run, *line)
    for name, content in (("rows.json", '{"files": 3}'), ("rows.json", "{"), ("img_emb/manifest.json", "[]")):
        (tmp_path / "out" / name).write_text(content)
        refused(run, "eval", "--images", "out", "--texts", "vectors.npy", "--labels", "out/labels.npy")


def test_names_that_are_not_utf8(run, tmp_path):
    names = [b"caf\xe9.png", b"a.png"]
    for i, name in enumerate(names):
        coded.picture(tmp_path / "pics" / f"{i}.png", 7 + i).rename(tmp_path / "pics" / os.fsdecode(name))
    embed(run, "--images", "pics")
    images = Embeddings("out", "img_emb")
    assert (images.keys(), coded.values(images[:])) == (["a.png", "caf\\xe9.png"], [8, 7])
