"""Folders of embeddings: read as they were written, and every way in which they can be spoilt is named."""

import json
import shutil

import numpy as np
import pytest
import torch

from gapkern import MeanShift, files
from gapkern.cli import main
from gapkern.embeddings import Embeddings, model_of, verify, write_folder


@pytest.fixture
def folder(tmp_path):
    """Eleven shards of three rows, and the whole."""
    x = torch.nn.functional.normalize(torch.randn(33, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    write_folder(tmp_path, "img_emb", x.split(3), model="tiny/1")
    return tmp_path, x


def test_what_was_written_is_read(folder):
    path, x = folder
    found = Embeddings(path)
    assert [p.rsplit("_", 1)[1] for p in found.shards] == [f"{i}.npy" for i in range(11)]
    assert (len(found), found.dims, found.model, model_of(path)) == (33, 8, "tiny/1", "tiny/1")
    assert torch.equal(found[:], x)
    assert torch.equal(found[5:20], x[5:20])
    assert torch.equal(found[-1], x[-1])
    assert found[4:4].shape == (0, 8)
    assert torch.equal(torch.cat(list(found.chunks(2))), x)
    assert verify(path)["img_emb"] == {
        "rows": 33,
        "dims": 8,
        "dtype": "float32",
        "shards": 11,
        "model": "tiny/1",
        "manifest": True,
        "metadata": False,
    }
    with pytest.raises(IndexError, match="rows: expected a row of 33, got 33"):
        found[33]


def swap(folder):
    a, b, c = folder / "img_emb_2.npy", folder / "img_emb_10.npy", folder / "spare"
    a.rename(c), b.rename(a), c.rename(b)


def spoil(folder):
    x = np.load(folder / "img_emb_4.npy")
    x[1, 3] = np.nan
    np.save(folder / "img_emb_4.npy", x)


def change(folder):
    x = np.load(folder / "img_emb_4.npy")
    np.save(folder / "img_emb_4.npy", -x)


def cut(folder):
    data = (folder / "img_emb_4.npy").read_bytes()
    (folder / "img_emb_4.npy").write_bytes(data[:-40])


def edit(folder):
    note = json.loads((folder / "manifest.json").read_text())
    note["dtype"] = "float16"
    (folder / "manifest.json").write_text(json.dumps(note))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (cut, r"img_emb_4\.npy: expected 3 rows of 8, got 56 of 96 bytes: truncated in row 1"),
        (swap, r"img_emb_2\.npy: holds img_emb_10\.npy's rows, from row 0 on: reordered"),
        (
            lambda f: shutil.copy(f / "img_emb_0.npy", f / "img_emb_7.npy"),
            r"img_emb_7\.npy: holds img_emb_0\.npy's rows, from row 0 on: there twice",
        ),
        (
            lambda f: shutil.copy(f / "img_emb_0.npy", f / "img_emb_11.npy"),
            r"img_emb_11\.npy: not in the manifest; it repeats img_emb_0\.npy",
        ),
        (spoil, r"img_emb_4\.npy: NaN or infinity in row 1 \(row 13 of all\)"),
        (change, r"img_emb_4\.npy: expected SHA-256 .*: changed"),
        (
            lambda f: np.save(f / "img_emb_4.npy", np.array([{"a": 1}], dtype=object)),
            r"img_emb_4\.npy: expected numbers, got pickled objects, which are not loaded",
        ),
        (lambda f: (f / "img_emb_4.npy").unlink(), r"img_emb_4\.npy: missing, the manifest has it"),
        (edit, r"expected dtype float16 as in the manifest, got float32"),
        (lambda f: (f / "manifest.json").write_text('{"format": "other"}'), r"version 1, got 'other', None"),
    ],
)
def test_harm_is_named(folder, harm, message):
    harm(folder[0] / "img_emb")
    with pytest.raises(ValueError, match=message):
        verify(folder[0])


def test_reading_refuses_what_the_manifest_does_not_have(folder):
    path, x = folder
    files.save_embeddings(path / "img_emb" / "img_emb_3.npy", x[:2])
    with pytest.raises(ValueError, match=r"differs from its manifest: img_emb_3\.npy: expected 3 rows, got 2"):
        Embeddings(path)
    files.save_embeddings(path / "img_emb" / "img_emb_3.npy", x[:3].half())
    with pytest.raises(ValueError, match=r"expected D = 8 and torch\.float32 as in .*_0\.npy, got .*float16"):
        Embeddings(path)


def test_clip_retrieval_folders_without_a_manifest(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for kind in ("img_emb", "text_emb", "metadata"):
        (tmp_path / kind).mkdir()
    x = np.random.default_rng(0).standard_normal((25, 4)).astype(np.float16)
    for i in range(5):
        rows = slice(5 * i, 5 * i + 5)
        np.save(tmp_path / "img_emb" / f"img_emb_{i}.npy", x[rows])
        np.save(tmp_path / "text_emb" / f"text_emb_{i}.npy", -x[rows])
        table = pyarrow.table({"image_path": [f"{n}.png" for n in range(25)[rows]], "caption": ["c"] * 5})
        parquet.write_table(table, tmp_path / "metadata" / f"metadata_{i}.parquet")
    assert {k: v["rows"] for k, v in verify(tmp_path).items()} == {"img_emb": 25, "text_emb": 25}
    with pytest.raises(ValueError, match=r"path: expected img_emb or text_emb in .*, got img_emb and text_emb"):
        Embeddings(tmp_path)
    found = Embeddings(tmp_path, "text_emb")
    assert torch.equal(found[:], -torch.from_numpy(x))
    assert [row["image_path"] for row in found.metadata(["image_path"])] == [f"{n}.png" for n in range(25)]
    (tmp_path / "img_emb" / "img_emb_3.npy").unlink()
    with pytest.raises(ValueError, match=r"img_emb_3\.npy: missing, later shards are there"):
        verify(tmp_path)
    shutil.copy(tmp_path / "img_emb" / "img_emb_0.npy", tmp_path / "img_emb" / "img_emb_3.npy")
    with pytest.raises(ValueError, match=r"img_emb_3\.npy: holds img_emb_0\.npy's rows, from row 0 on: there twice"):
        verify(tmp_path)
    parquet.write_table(table.slice(0, 2), tmp_path / "metadata" / "metadata_2.parquet")
    with pytest.raises(ValueError, match=r"metadata_2\.parquet: expected 5 rows .*, got 2: row 2 has no match"):
        verify(tmp_path)


def test_writing_refuses(tmp_path):
    with pytest.raises(ValueError, match=r"parts\[1\]: expected finite values, got NaN or infinity, first in row 1"):
        write_folder(tmp_path, "img_emb", [torch.zeros(2, 3), torch.tensor([[0.0] * 3, [0.0, torch.nan, 0.0]])])
    with pytest.raises(ValueError, match="out: expected a folder without shards"):
        write_folder(tmp_path, "img_emb", [torch.zeros(2, 3)])
    with pytest.raises(ValueError, match="kind: expected one of 'img_emb', 'text_emb', got 'audio'"):
        write_folder(tmp_path, "audio", [torch.zeros(2, 3)])


def test_command_lines_know_the_model_from_the_manifests(tmp_path, capsys, monkeypatch):
    pytest.importorskip("faiss")
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    for folder, model in (("mine", "tiny/1"), ("theirs", "huge/2")):
        write_folder(folder, "text_emb", torch.randn(60, 8, generator=generator).split(20), model=model)
        write_folder(folder, "img_emb", torch.randn(60, 8, generator=generator).split(20), model=model)

    def run(*line):
        status = main(list(line))
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    fit, out = ["shift", "fit", "mine/text_emb"], ["--components", "2", "--out", "s.safetensors"]
    status, said = run(*fit, "mine/img_emb", *out)
    assert status == 0
    assert "model: tiny/1, as the manifest of mine/text_emb and of mine/img_emb says" in said
    assert MeanShift.load("s.safetensors").model == "tiny/1"
    assert json.loads(run(*fit, "mine/img_emb", *out, "--json")[1])["model"] == "tiny/1"
    two = "expected embeddings of tiny/1 as in gallery, got those of huge/2"
    assert run(*fit, "theirs/img_emb", *out) == (2, f"gapkern shift: queries: {two}\n")
    status, said = run(*fit, "mine/img_emb", *out, "--model", "huge/2")
    assert (status, said) == (
        2,
        "gapkern shift: gallery: expected embeddings of huge/2 as in --model, got those of tiny/1\n",
    )
    status, said = run("shift", "apply", "s.safetensors", "theirs/text_emb", "--out", "moved")
    assert (status, "model: expected embeddings of tiny/1, as fitted, got huge/2" in said) == (2, True)

    status, said = run("index", "mine/text_emb", "--out", "index")
    assert status == 0
    assert "model: tiny/1, as the manifest of mine/text_emb says" in said
    assert json.loads((tmp_path / "index" / "manifest.json").read_text())["model"] == "tiny/1"
    status, said = run("index", "theirs/text_emb", "--shift", "s.safetensors", "--out", "other")
    assert (status, "shift: expected one of model huge/2, got one of tiny/1" in said) == (2, True)
    status, said = run("search", "index", "theirs/img_emb", "--k", "1")
    assert (status, "queries: expected embeddings of tiny/1 as in index, got those of huge/2" in said) == (2, True)
    assert run("search", "index", "mine/img_emb", "--k", "1")[0] == 0
    status, said = run("index", "mine/text_emb", "--compare", "theirs/img_emb", "--factory", "Flat")
    assert (status, said) == (2, f"gapkern index: queries: {two}\n")
    for line in (
        ["gap", "mine/img_emb", "theirs/text_emb"],
        ["shift", "compare", "mine/text_emb", "theirs/img_emb"],
        ["robust", "mine/img_emb", "theirs/text_emb", "--gaussian", "1"],
    ):
        status, said = run(*line)
        assert (status, "expected embeddings of tiny/1 as in" in said, "got those of huge/2" in said) == (2, True, True)
    line = ["robust", "theirs/img_emb", "theirs/text_emb", "--gaussian", "1", "--shift", "s.safetensors"]
    two = "embeddings: expected embeddings of tiny/1 as in shift, got those of huge/2"
    assert run(*line) == (2, f"gapkern robust: {two}\n")
