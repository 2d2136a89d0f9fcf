"""Names in other spellings, orders and places than expected: each number against NumPy's, or one line that refuses."""

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

from gapkern.embeddings import Embeddings
from tests import coded
from tests.rows_of import NUMBERS, embed, measured, refused, table, values

pytest.importorskip("PIL")
pytest.importorskip("pyarrow")


pytestmark = pytest.mark.usefixtures("coded_models")


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


def test_sides_the_wrong_way_round(run, pictures):
    Path("said.json").write_text(json.dumps({n: f"a {v}" for n, v in pictures.items()}))
    embed(run, "--images", "pics", "--captions", "said.json")
    line = ["eval", "--labels", "paired", "--task", "zeroshot_retrieval"]
    for images, texts in (("out/text_emb", "out/img_emb"), (Path("out/text_emb").absolute(), "out/img_emb/")):
        assert "the wrong way round" in refused(run, *line, "--images", images, "--texts", texts)
    assert measured(run, *line[1:], "--images", "out/img_emb", "--texts", "out/text_emb")


def test_reading_images_draws_nothing_of_the_callers(run, pictures):
    torch.manual_seed(5)
    wanted = torch.get_rng_state()
    embed(run, "--images", "pics", "--num_workers", "2")
    assert values("out") == NUMBERS
    assert torch.equal(torch.get_rng_state(), wanted)
