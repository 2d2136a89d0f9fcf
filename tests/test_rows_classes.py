"""Which label and class name a row has, by name and by number: labels that are wrong are refused by every verb."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from gapkern.embeddings import Embeddings, verify, write_folder
from tests import coded
from tests.rows_of import NUMBERS, coco, embed, measured, numbered, refused

pytest.importorskip("PIL")
pytest.importorskip("pyarrow")


pytestmark = pytest.mark.usefixtures("coded_models")


@pytest.fixture
def pictures(tmp_path):
    return numbered(tmp_path)


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
