"""Class names and labels in other spellings, languages, sets and orders: accuracy is NumPy's, or one line refuses."""

import json
import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from gapkern.embeddings import Embeddings, verify
from tests import coded
from tests.rows_of import embed, measured, numbers, refused, table, values

pytest.importorskip("PIL")
pytest.importorskip("pyarrow")
pytestmark = pytest.mark.usefixtures("coded_models")


@pytest.fixture
def classes():
    """Pictures of the classes three, one and seven, which alphabetical order puts one, seven, three."""
    for name in ("three", "one", "seven"):
        for i in range(4):
            coded.picture(Path("data") / name / f"{i}.png", coded.number(name))


def zeroshot(run, folder="out"):
    """Accuracy: as eval says, once it is what NumPy says of labels, rows and class vectors."""
    x, y = Embeddings(folder, "img_emb")[:].numpy(), np.load(f"{folder}/classes.npy")
    labels = np.load(f"{folder}/labels.npy")
    line = ["--images", folder, "--texts", f"{folder}/classes.npy", "--labels", f"{folder}/labels.npy"]
    found = measured(run, *line)["acc1"]
    assert found == pytest.approx(coded.accuracy(x, y, labels))
    return found


def test_sets_of_class_names(run, classes):
    many = {"imagenet1k": ["two", "four"], "digits": ["seven", "three", "one"], "others": ["one", "two", "three"]}
    Path("many.json").write_text(json.dumps(many))
    for names in ("many.json", "many.json[digits]"):
        embed(run, "--images", "data", "--classnames", names, out=f"out {names}")
        assert coded.values(np.load(f"out {names}/classes.npy")) == [7, 3, 1]
        assert zeroshot(run, f"out {names}") == 1
    message = embed(run, "--images", "data", "--classnames", "many.json[others]", out="no", status=2)
    assert "none for 'seven'" in message
    assert "no class for 'two'" in message
    assert "expected 'such'" in embed(run, "--images", "data", "--classnames", "many.json[such]", out="no", status=2)
    Path("many.json").write_text(json.dumps({**many, "again": ["one", "three", "seven"]}))
    message = embed(run, "--images", "data", "--classnames", "many.json", out="no", status=2)
    assert "'digits', 'again', which all fit" in message
    Path("many.json").write_text(json.dumps({"a": ["one"], "b": ["two"]}))
    assert "many.json[NAME]" in embed(run, "--images", "data", "--classnames", "many.json", out="no", status=2)
    assert not Path("no").exists()


@pytest.mark.parametrize(
    ("names", "right"),
    [
        (["SEVEN", "Three", "oNe"], True),
        (["  seven", "three ", "one"], True),
        (["sieben", "drei", "eins"], False),
        (["seven", "three", "three"], False),
    ],
)
def test_class_names_in_another_spelling_or_language(run, classes, names, right):
    Path("names.json").write_text(json.dumps(names))
    embed(run, "--images", "data", "--classnames", "names.json", status=0 if right else 2)
    if right:
        labels = np.load("out/labels.npy")
        assert [names[i].strip().lower() for i in labels] == ["one"] * 4 + ["seven"] * 4 + ["three"] * 4


def test_class_names_in_another_language_by_a_mapping(run, classes):
    Path("names.json").write_text(json.dumps({"seven": "sept 7", "one": "un 1", "three": "trois 3"}))
    embed(run, "--images", "data", "--classnames", "names.json")
    assert coded.values(np.load("out/classes.npy")) == [7, 1, 3]
    assert zeroshot(run) == 1


def test_class_names_in_another_form_of_unicode(run):
    for name, value in (("zoé 2", 2), ("ária 5", 5)):
        coded.picture(Path("data") / unicodedata.normalize("NFD", name) / "0.png", value)
    Path("names.json").write_text(json.dumps([unicodedata.normalize("NFC", n) for n in ("Zoé 2", "Ária 5")]))
    embed(run, "--images", "data", "--classnames", "names.json")
    assert [[2, 5][i] for i in np.load("out/labels.npy")] == values("out")
    assert zeroshot(run) == 1


def test_labels_that_count_from_one(run, classes):
    Path("names.json").write_text(json.dumps(["one", "seven", "three"]))
    embed(run, "--images", "data", "--classnames", "names.json")
    np.save("labels.npy", np.load("out/labels.npy") + 1)
    message = refused(run, "eval", "--images", "out", "--texts", "out/classes.npy", "--labels", "labels.npy")
    assert "expected values in [0, 3), classes, got 3 in row 8; they count from 0" in message


def test_labels_by_key_in_another_order(run, classes):
    Path("names.json").write_text(json.dumps(["one", "seven", "three"]))
    embed(run, "--images", "data", "--classnames", "names.json", "--shard_rows", "5")
    rows = [(f"/data/{n}/{i}.png", n) for n in ("three", "one", "seven") for i in (2, 0, 3, 1)]
    Path("labels.csv").write_bytes(table(",", ["filepath", "label"], rows))
    line = ["--images", "out", "--texts", "out/classes.npy", "--labels", "labels.csv"]
    assert measured(run, *line)["acc1"] == 1
    Path("labels.csv").write_bytes(table(",", ["filepath", "label"], [*rows, rows[0]]))
    assert "expected each row's key once" in refused(run, "eval", *line)
    Path("labels.csv").write_bytes(table(",", ["filepath", "label"], rows[1:]))
    assert "expected a label for each row, got none for 'three/2.png'" in refused(run, "eval", *line)


def test_two_sets_of_classes_into_one_folder(run, classes):
    for name in ("two", "nine"):
        coded.picture(Path("more") / name / "0.png", coded.number(name))
    Path("first.json").write_text(json.dumps(["seven", "one", "three"]))
    Path("second.json").write_text(json.dumps(["nine", "two"]))
    embed(run, "--images", "data", "--classnames", "first.json")
    before = {p: p.read_bytes() for p in Path("out").rglob("*") if p.is_file()}
    message = embed(run, "--classnames", "second.json", status=2)
    assert "none for 'seven', 'one', 'three'" in message
    embed(run, "--images", "more", "--classnames", "second.json", status=2)
    assert {p: p.read_bytes() for p in Path("out").rglob("*") if p.is_file()} == before
    embed(run, "--images", "more", "--classnames", "second.json", "--no_resume")
    assert json.loads(Path("out/classnames.json").read_text()) == ["nine", "two"]
    assert zeroshot(run) == 1
    assert verify("out")


@pytest.mark.parametrize("device", ["/dev/full", "/dev/zero", "/dev/null", "pipe"])
def test_devices_are_no_files(run, classes, device):
    if device == "pipe":
        os.mkfifo("pipe")
    for suffix in ("", ".json", ".csv"):
        link = Path(f"link{suffix}")
        link.symlink_to(device)
        for option in ("--texts", "--captions"):
            embed(run, option, link, status=2)
        for option in ("--classnames", "--templates"):
            more = ["--classnames", "names.json"] if option == "--templates" else []
            Path("names.json").write_text(json.dumps(["one", "seven", "three"]))
            embed(run, "--images", "data", *more, option, link, status=2)
    assert not Path("out").exists()
    for name in ("one/9.png", "shard.tar"):
        Path("images", name).parent.mkdir(parents=True, exist_ok=True)
        Path("images", name).symlink_to(Path(device).absolute())
        assert "a device or a pipe" in embed(run, "--images", "images", status=2)
        assert "a device or a pipe" in embed(run, "--images", Path("images", name), status=2)
        Path("images", name).unlink()
    coded.picture(Path("images/one/1.png"), 1)
    Path("images/one/2.png").symlink_to(Path(device).absolute())
    embed(run, "--images", "images", "--on-error", "skip", out="skipped")
    assert values("skipped") == [1]
    # What a manifest names is read only where it is a file.
    manifest = Path("skipped/img_emb/manifest.json")
    told = json.loads(manifest.read_text())
    told["metadata"][0]["name"] = str(Path(device).absolute())
    manifest.write_text(json.dumps(told))
    refused(run, "embed", "--verify", "skipped")
    np.save("x.npy", numbers(4))
    for suffix in (".npy", ".json", ".csv", ".safetensors", ".npz"):
        link = Path(f"labels{suffix}")
        link.symlink_to(device)
        refused(run, "eval", "--images", "x.npy", "--texts", "x.npy", "--labels", link)
        refused(run, "shift", "compare", "x.npy", "x.npy", "--labels", link)
    refused(run, "build", "link.json", "--out", "table.csv")
    refused(run, "shift", "apply", "labels.safetensors", "x.npy", "--out", "moved.npy")
    refused(run, "index", "x.npy", "--out", "index", "--ids", "labels.npy")
    Path("whole").mkdir()
    np.save("whole/x.npy", numbers(4))
    for name in ("manifest.json", "rows.json", "x.npy.json"):
        Path("whole", name).symlink_to(device if device != "pipe" else Path("pipe").absolute())
    status, out, err = run("gap", "whole/x.npy", "x.npy", "--json")
    assert status == 0, err
    assert np.isclose(json.loads(out)["centroid_distance"], 0)
