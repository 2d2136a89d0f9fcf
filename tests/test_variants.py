"""Names in other spellings, orders and places than expected: each number against NumPy's, or one line that refuses."""

import csv
import io
import json
import os
import random
import tarfile
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch

from gapkern import MeanShift, files, layout
from gapkern.embeddings import Embeddings, keys, verify, write_folder
from tests import coded

pytest.importorskip("PIL")
pytest.importorskip("pyarrow")
from tests.test_rows import NUMBERS, embed, measured, refused

pytestmark = pytest.mark.usefixtures("coded_models")


def values(folder, kind="img_emb"):
    return coded.values(Embeddings(folder, kind)[:])


def tar(path, members):
    """An uncompressed tar of (name, bytes or red value)."""
    with tarfile.open(path, "w") as opened:
        for name, content in members:
            if isinstance(content, int):
                content = coded.picture(Path("member.png"), content).read_bytes()
            info = tarfile.TarInfo(name)
            info.size = len(content)
            opened.addfile(info, io.BytesIO(content))
    return path


def retrieval(run, images="out", texts="out", labels="out/image_of.npy"):
    """Text-to-image recall@1: as eval says, once it is what NumPy says of the rows themselves."""
    x, y = Embeddings(images, "img_emb")[:].numpy(), Embeddings(texts, "text_emb")[:].numpy()
    line = ["--images", images, "--texts", texts, "--labels", labels, "--recall_k", "1"]
    found = measured(run, *line, "--task", "zeroshot_retrieval")["image_retrieval_recall@1"]
    right = (x @ y.T).argmax(0) == np.asarray([coded.values(x).index(v) for v in coded.values(y)])
    assert found == pytest.approx(right.mean())
    return found


def said_of(pictures):
    """Two captions of each picture, in another order."""
    rows = [(name, f"{word} {value}") for word in ("first", "second") for name, value in pictures.items()]
    random.Random(1).shuffle(rows)
    return rows


def table(delimiter, columns, rows, end="\n", mark=""):
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter, lineterminator=end)
    writer.writerows([columns, *rows])
    return (mark + text.getvalue()).encode()


@pytest.fixture
def pictures():
    for i, value in enumerate(NUMBERS):
        coded.picture(Path("pics") / f"{i}.png", value)
    return {f"{i}.png": value for i, value in enumerate(NUMBERS)}


TABLES = {
    "open_clip's, tabs": lambda rows: table("\t", ["filepath", "title"], [(f"/data/{n}", t) for n, t in rows]),
    "open_clip's, commas": lambda rows: table(",", ["title", "filepath"], [(t, n) for n, t in rows], "\r\n"),
    "marked, cased, more columns": lambda rows: table(
        ",", ["", "Image", "Caption"], [(i, n.removesuffix(".png"), t) for i, (n, t) in enumerate(rows)], mark="\ufeff"
    ),
    "lines and commas within": lambda rows: table(
        ",", ["image", "caption"], [(n, f"a line,\nthe \u2028 {t}") for n, t in rows]
    ),
}


@pytest.mark.parametrize("form", TABLES)
@pytest.mark.parametrize("option", ["--captions", "--texts"])
def test_tables_of_captions(run, pictures, form, option):
    Path("said.csv").write_bytes(TABLES[form](said_of(pictures)))
    embed(run, "--images", "pics", option, "said.csv", "--shard_rows", "4")
    texts, image_of = values("out", "text_emb"), np.load("out/image_of.npy")
    assert len(texts) == 2 * len(NUMBERS)
    assert [NUMBERS[i] for i in image_of] == texts
    assert retrieval(run) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a,b\n1,2\n", "expected columns of images"),
        (b"", "expected columns of images"),
        (b"image,caption\n0.png\n", "expected 2 columns in said.csv, got 1 in row 0"),
        (b"image,caption\n,1\n", "got no image in row 0"),
        (b'image,caption\n0.png,"1\n', "expected a table of images and captions in said.csv"),
        (b"image,caption\n0.png,\xff\n", "expected text in UTF-8 in said.csv"),
        (b"image,caption\n", "expected at least one caption, got none in said.csv"),
    ],
)
def test_tables_that_are_none(run, pictures, content, message):
    Path("said.csv").write_bytes(content)
    assert message in embed(run, "--images", "pics", "--captions", "said.csv", status=2)
    assert not Path("out").exists()


@pytest.mark.parametrize("key", ["stem", "path", "tar path", "NFD", "upper case"])
def test_captions_keyed_in_other_ways(run, key):
    names = {f"é{i}.png": value for i, value in enumerate(NUMBERS)}
    for name, value in names.items():
        coded.picture(Path("pics/sub") / name, value)
    spelt = {
        "stem": lambda n: n.removesuffix(".png"),
        "path": lambda n: f"/mnt/data/pics/sub/{n}",
        "tar path": lambda n: f"./sub/{n}",
        "NFD": lambda n: unicodedata.normalize("NFD", n),
        "upper case": lambda n: n.upper(),
    }[key]
    told = [{"image": spelt(name), "captions": [f"x {value}", f"y {value}"]} for name, value in names.items()]
    Path("said.json").write_text(json.dumps(told[::-1]))
    embed(run, "--images", "pics", "--captions", "said.json")
    assert [values("out")[i] for i in np.load("out/image_of.npy")] == values("out", "text_emb")
    assert retrieval(run) == 1


def test_members_of_tars_in_another_order_than_the_captions(run):
    order = [3, 0, 6, 1, 5, 2, 4]
    tar("b.tar", [(f"{i}.png", NUMBERS[i]) for i in order[:4]])
    tar("a.tar", [(f"{i}.png", NUMBERS[i]) for i in order[4:]])
    said = {f"{i}.png": f"the number {value}" for i, value in enumerate(NUMBERS)}
    Path("said.json").write_text(json.dumps(said))
    for sources in (["a.tar", "b.tar"], ["b.tar", "a.tar"]):
        embed(run, "--images", *sources, "--captions", "said.json", "--no_resume", "--shard_rows", "2")
        assert [values("out")[i] for i in np.load("out/image_of.npy")] == NUMBERS
        assert retrieval(run) == 1


def test_a_key_in_two_tars(run):
    tar("a.tar", [("1.png", 11), ("2.png", 12)])
    tar("b.tar", [("2.png", 22), ("3.png", 23)])
    embed(run, "--images", "a.tar", "b.tar")
    assert dict(zip(Embeddings("out").keys(), values("out"), strict=True)) == {
        "a.tar/1.png": 11,
        "a.tar/2.png": 12,
        "b.tar/2.png": 22,
        "b.tar/3.png": 23,
    }
    for told, right in (({"a.tar/2.png": "12", "b.tar/2.png": "22"}, [12, 22]), ({"3.png": "23", "1": "11"}, [23, 11])):
        Path("said.json").write_text(json.dumps(told))
        embed(run, "--captions", "said.json", "--no_resume")
        assert [values("out")[i] for i in np.load("out/image_of.npy")] == right
    Path("said.json").write_text(json.dumps({"2.png": "12"}))
    message = embed(run, "--images", "a.tar", "b.tar", "--captions", "said.json", out="other", status=2)
    assert "expected one image of the name '2.png', got a.tar/2.png and b.tar/2.png" in message


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


def test_an_image_that_went_between_two_runs(run, pictures):
    Path("said.json").write_text(json.dumps({n: f"a {v}" for n, v in reversed(pictures.items())}))
    embed(run, "--images", "pics", "--captions", "said.json", "--shard_rows", "3")
    os.remove("pics/1.png")
    # The captions are still of all images: the run that is told of them refuses, the one that skips leaves one out.
    message = embed(run, "--images", "pics", "--captions", "said.json", "--shard_rows", "3", status=2)
    assert "expected an image for each caption, got none of the name '1.png'" in message
    embed(run, "--images", "pics", "--captions", "said.json", "--shard_rows", "3", "--on-error", "skip")
    assert values("out") == [v for n, v in pictures.items() if n != "1.png"]
    assert [values("out")[i] for i in np.load("out/image_of.npy")] == values("out", "text_emb")
    assert retrieval(run) == 1
    # Images alone: what image_of says is then of the images that are there, or it is of none.
    os.remove("pics/0.png")
    embed(run, "--images", "pics", "--shard_rows", "3")
    message = refused(
        run, "eval", "--images", "out", "--texts", "out", "--labels", "out/image_of.npy", "--task", "zeroshot_retrieval"
    )
    assert "'0.png'" in message or "order" in message


def numbers(rows, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, 8)).astype(np.float32)


def stored(folder, x, size, names=None, kind="img_emb"):
    parts = [torch.from_numpy(x[i : i + size]) for i in range(0, len(x), size)]
    return write_folder(folder, kind, parts, model="mine", names=names)


def test_shards_in_another_order_are_other_rows(run):
    x = numbers(6)
    stored("a", x, 2, [f"k{i}" for i in range(6)])
    first, second = Path("a/img_emb/img_emb_0.npy"), Path("a/img_emb/img_emb_1.npy")
    a, b = first.read_bytes(), second.read_bytes()
    first.write_bytes(b), second.write_bytes(a)
    assert "holds img_emb_1.npy's rows" in refused(run, "embed", "--verify", "a")
    np.save("y.npy", numbers(6, 1))
    status, out, _ = run("gap", "a", "y.npy", "--json")
    told = json.loads(out)["inputs"]["images"]
    assert status == 0
    assert told["sha256"] == [files.digest(p) for p in (first, second, "a/img_emb/img_emb_2.npy")]


def test_keys_that_come_twice_across_shards(run):
    with pytest.raises(ValueError, match="expected each row's key once, got 'k1' twice"):
        stored("a", numbers(4), 2, ["k0", "k1", "k2", "k1"])
    assert not list(Path("a").rglob("*.npy"))


def test_a_shift_follows_fewer_shards(run):
    x, y = numbers(12), numbers(12, 1) + 1
    np.save("y.npy", y)
    stored("a", x, 2)
    MeanShift(n_components=0).fit(x, y).save("s.safetensors")
    assert run("shift", "apply", "s.safetensors", "a", "--out", "moved")[0] == 0
    for size in (5, 12, 3):
        for old in Path("a/img_emb").iterdir():
            old.unlink()
        stored("a", x, size)
        status, _, err = run("shift", "apply", "s.safetensors", "a", "--out", "moved")
        assert status == 0, err
        assert np.allclose(Embeddings("moved")[:].numpy(), x + (y.mean(0) - x.mean(0)), atol=1e-5)
        assert len(list(Path("moved").glob("*.npy"))) == -(-12 // size)
        assert verify("moved")
    assert "expected embeddings that no shift has moved" in refused(
        run, "shift", "apply", "s.safetensors", "moved", "--out", "twice"
    )


def test_a_note_names_no_files_elsewhere(run):
    x = numbers(4)
    stored("a", x, 2)
    Path("kept.npy").write_bytes(b"mine")
    MeanShift(n_components=0).fit(x, x + 1).save("s.safetensors")
    assert run("shift", "apply", "s.safetensors", "a", "--out", "deep/moved")[0] == 0
    note = Path("deep/moved/shift.json")
    told = json.loads(note.read_text())
    for name in ("../../kept.npy", str(Path("kept.npy").absolute()), "..", "", "shift.json", "a/b.npy"):
        note.write_text(json.dumps(told | {"shards": {**told["shards"], name: {}}}))
        message = refused(run, "shift", "apply", "s.safetensors", "a", "--out", "deep/moved")
        assert "expected the names of shards" in message, message
    assert Path("kept.npy").read_bytes() == b"mine"


def test_a_gallery_that_changed_after_its_index(run):
    pytest.importorskip("faiss")
    x, y = numbers(40), numbers(3, 1)
    np.save("y.npy", y)
    names = [f"k{i}" for i in range(40)]
    stored("a", x, 7, names)

    def searched():
        status, out, err = run("search", "index", "y.npy", "--k", "4", "--json")
        assert status == 0, err
        return np.asarray(json.loads(out)["ids"])

    def right(rows):
        return ((y[:, None].astype(float) - rows[None]) ** 2).sum(2).argsort(1, kind="stable")[:, :4]

    assert run("index", "a", "--out", "index")[0] == 0
    assert np.array_equal(searched(), right(x))
    manifest = json.loads(Path("index/manifest.json").read_text())
    assert manifest["plan"]["order"] == keys.order(names) == Embeddings("a").order
    # Rows of the same size and time, in another order and under their own names.
    for old in Path("a").rglob("*.*"):
        old.unlink()
    stored("a", x[::-1].copy(), 7, names[::-1])
    assert run("index", "a", "--out", "index")[0] == 0
    assert np.array_equal(searched(), right(x[::-1]))
    assert json.loads(Path("index/manifest.json").read_text())["plan"]["order"] == keys.order(names[::-1])


def test_sides_the_wrong_way_round(run, pictures):
    Path("said.json").write_text(json.dumps({n: f"a {v}" for n, v in pictures.items()}))
    embed(run, "--images", "pics", "--captions", "said.json")
    line = ["eval", "--labels", "paired", "--task", "zeroshot_retrieval"]
    for images, texts in (("out/text_emb", "out/img_emb"), (Path("out/text_emb").absolute(), "out/img_emb/")):
        assert "the wrong way round" in refused(run, *line, "--images", images, "--texts", texts)
    assert measured(run, *line[1:], "--images", "out/img_emb", "--texts", "out/text_emb")


def test_results_say_what_they_were_made_from(run):
    pytest.importorskip("pandas")
    pytest.importorskip("matplotlib")
    x, y = numbers(12), numbers(12, 1) + 1
    stored("a", x, 5, [f"k{i}" for i in range(12)], "text_emb")
    np.save("y.npy", y)
    np.save("labels.npy", np.arange(12))
    gallery = {"sha256": [files.digest(p) for p in layout.shards("a")], "order": Embeddings("a").order}
    queries, labels = {"sha256": [files.digest("y.npy")]}, {"sha256": [files.digest("labels.npy")]}
    assert run("shift", "fit", "a", "y.npy", "--out", "s.safetensors", "--components", "0")[0] == 0
    from safetensors import safe_open

    with safe_open("s.safetensors", "pt") as file:
        assert eval(file.metadata()["made_from"]) == {"gallery": gallery, "queries": queries}
    shift = MeanShift.load("s.safetensors")
    assert np.allclose(shift.shift_vector_, y.mean(0, dtype=float) - x.mean(0, dtype=float))
    status, out, err = run(
        "robust",
        "y.npy",
        "a",
        "--gaussian",
        "0.1",
        "--alphas",
        "0,1",
        "--labels",
        "labels.npy",
        "--shift",
        "s.safetensors",
        "--out",
        "swept",
        "--json",
    )
    assert status == 0, err
    wanted = {
        "queries": queries,
        "gallery": gallery,
        "labels": labels,
        "shift": {
            "name": "mean_shift",
            "shift": files.fingerprint(shift.shift_vector_),
            "alpha": 1.0,
            "normalize": False,
            "moves": "gallery",
            "fitted_here": False,
        },
    }
    assert json.loads(out)["inputs"] == json.loads(Path("swept/inputs.json").read_text()) == wanted
    status, out, _ = run(
        "index", "a", "--compare", "y.npy", "--factory", "SQ8", "--labels", "labels.npy", "--json", "--out", "kinds"
    )
    assert status == 0
    found = json.loads(out)["inputs"]
    assert found == json.loads(Path("kinds/inputs.json").read_text())
    assert (found["gallery"], found["compare"], found["labels"]) == (gallery, queries, labels)
    assert run("index", "a", "--out", "built")[0] == 0
    status, out, _ = run("search", "built", "y.npy", "--k", "1", "--json", "--out", "found.json")
    assert status == 0
    assert json.loads(out) == json.loads(Path("found.json").read_text())
    assert json.loads(out)["inputs"] == {
        "index": {"sha256": files.digest("built/manifest.json")},
        "queries": queries,
    }
    status, out, _ = run("gap", "y.npy", "a", "--json", "--out", "gap.json")
    told = json.loads(out)
    assert told == json.loads(Path("gap.json").read_text())
    assert told["inputs"] == {"images": queries, "texts": gallery}
    status, out, err = run("shift", "compare", "a", "y.npy", "--components", "0", "--labels", "labels.npy", "--json")
    assert status == 0, err
    assert json.loads(out)["inputs"] == {"gallery": gallery, "queries": queries, "labels": labels}
    assert told["centroid_distance"] == pytest.approx(float(np.linalg.norm(x.mean(0) - y.mean(0))), rel=1e-5)
    status, out, err = run("eval", "--images", "y.npy", "--texts", "a", "--labels", "labels.npy", "--json")
    assert status == 0, err
    assert json.loads(out)["results"][0]["inputs"] == {"images": queries, "texts": gallery, "labels": labels}


def test_pairs_of_a_report_meet_by_name(run):
    from gapkern.experiments.reproduce.embeddings import from_files

    x = numbers(6)
    names = [f"k{i}" for i in range(6)]
    stored("a", x, 6, names)
    stored("b", x[::-1].copy(), 6, names[::-1], "text_emb")
    np.save("right.npy", np.arange(6)[::-1].copy())
    source = from_files("a", "b", labels="right.npy")
    assert source.facts["inputs"]["gallery"]["order"] == keys.order(names[::-1])
    assert source.facts["inputs"]["labels"] == {"sha256": [files.digest("right.npy")]}
    np.save("wrong.npy", np.arange(1, 7))
    with pytest.raises(ValueError, match=r"expected values in \[0, 6\), gallery rows, got 6 in row 5; they count"):
        from_files("a", "b", labels="wrong.npy")


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


@pytest.mark.parametrize("value", ["1.0", True, [1.0], {"a": 1}])
def test_metrics_are_numbers(run, value):
    result = dict.fromkeys(("dataset", "model", "pretrained", "task", "language"), "x")
    Path("result.json").write_text(json.dumps(result | {"metrics": {"acc1": value}}))
    assert "expected numbers for metrics" in refused(run, "build", "result.json", "--out", "table.csv")
    assert not Path("table.csv").exists()
    Path("result.json").write_text(json.dumps(result | {"metrics": {"acc1": 0.25, "acc5": None}}))
    assert run("build", "result.json", "--out", "table.csv")[0] == 0
    with open("table.csv", encoding="utf-8", newline="") as file:
        assert [(row["acc1"], row["acc5"]) for row in csv.DictReader(file)] == [("0.25", "")]


def test_reading_images_draws_nothing_of_the_callers(run, pictures):
    torch.manual_seed(5)
    wanted = torch.get_rng_state()
    embed(run, "--images", "pics", "--num_workers", "2")
    assert values("out") == NUMBERS
    assert torch.equal(torch.get_rng_state(), wanted)
