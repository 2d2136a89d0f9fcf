"""Pictures with captions in every file's form, embedded by the model of `tests.coded`, and measured."""

import csv
import io
import json
import random

import numpy as np

from gapkern.embeddings import Embeddings
from tests import coded


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


def numbered(tmp_path):
    """Pictures whose file names, ids and red values come in three orders."""
    for i, value in enumerate(NUMBERS):
        coded.picture(tmp_path / "pics" / f"{i}.png", value)
    return {f"{i}.png": value for i, value in enumerate(NUMBERS)}


def values(folder, kind="img_emb"):
    return coded.values(Embeddings(folder, kind)[:])


def table(delimiter, columns, rows, end="\n", mark=""):
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter, lineterminator=end)
    writer.writerows([columns, *rows])
    return (mark + text.getvalue()).encode()


def numbers(rows, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, 8)).astype(np.float32)
