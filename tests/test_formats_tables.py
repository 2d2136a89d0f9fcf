"""Tables of embeddings: folders of them, keys and labels in their columns, what each verb reads of them and writes."""

import json

import numpy as np
import pytest
import torch

from gapkern import embeddings, files, layout
from gapkern.cli import main
from gapkern.embeddings import Embeddings, provenance, shifted, verification
from gapkern.embeddings.labels import Side, load
from tests.written import DIMS, NAMES, ROWS, datasets, drawn, lance, lists, npy, parquet, same, table

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
h5py = pytest.importorskip("h5py")


def test_folders_of_tables(tmp_path):
    matrix = drawn()
    folder = tmp_path / "data"
    folder.mkdir()
    for i, low in ((2, 0), (10, 12)):
        pq.write_table(table(matrix).slice(low, 12), folder / f"train-{i}.parquet")
    (folder / "README.md").write_text("x")
    same(folder, matrix)
    same(f"{folder}[embedding]", matrix)
    assert Embeddings(folder).keys() == NAMES
    assert provenance.described(folder)["order"] == embeddings.folder.keys.order(NAMES)
    pq.write_table(table(matrix), folder / "test-0.parquet")
    with pytest.raises(ValueError, match=r"expected the shards of one matrix in .*test-\*.parquet \(1\), train-"):
        files.load_embeddings(folder)
    np.save(folder / "img_emb_0.npy", matrix[:3])  # as clip-retrieval's, with tables beside
    assert files.size(folder) == (3, DIMS)


def test_a_folder_that_datasets_saved(tmp_path):
    module = pytest.importorskip("datasets")
    matrix = drawn()
    saved = datasets(tmp_path / "one", matrix)
    (saved / "cache-0.arrow").write_bytes(b"not one of the list")
    assert Embeddings(saved).keys() == NAMES
    same(saved, matrix.astype(np.float64))
    split = module.load_from_disk(saved)
    module.DatasetDict({"train": split, "test": split.select(range(3))}).save_to_disk(tmp_path / "two")
    with pytest.raises(ValueError, match=r"expected one split in .*, got train, test: name one, such as .*/two/train"):
        files.load_embeddings(tmp_path / "two")
    assert files.size(tmp_path / "two" / "test") == (3, DIMS)
    module.DatasetDict({"train": split}).save_to_disk(tmp_path / "single")
    with layout.notes() as said:
        same(tmp_path / "single", matrix.astype(np.float64))
    assert said == [f"path: {tmp_path / 'single' / 'train'}"]
    (saved / "state.json").write_text(json.dumps({"_data_files": [{"filename": "../x.arrow"}]}))
    with pytest.raises(ValueError, match="expected the names of Arrow's files"):
        files.load_embeddings(saved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_parquet_is_written(dtype, tmp_path):
    x = torch.from_numpy(drawn()).to(dtype)
    path = files.save_embeddings(tmp_path / "x.parquet", x)
    same(path, x)
    read = pq.read_table(path)
    assert read.schema.field("embedding").type.list_size == DIMS
    assert np.array_equal(np.stack(read["embedding"].to_numpy()), x.numpy())
    with pytest.raises(ValueError, match=r"path: \.parquet has no bfloat16"):
        files.save_embeddings(path, x.bfloat16())
    embeddings.write_folder(tmp_path / "out", "img_emb", [x[:9], x[9:]], suffix=".parquet", names=NAMES)
    assert torch.equal(Embeddings(tmp_path / "out")[:], x)
    assert verification.verify(tmp_path / "out")["img_emb"]["rows"] == ROWS


def test_labels_are_read_from_columns_and_joined_by_key(tmp_path):
    matrix = drawn()
    path = parquet(tmp_path / "x.parquet", matrix)
    order = np.random.default_rng(3).permutation(ROWS)
    pq.write_table(
        pa.table({"key": [NAMES[i] for i in order], "label": [int(i) % 4 for i in order]}), tmp_path / "l.parquet"
    )
    wanted = torch.arange(ROWS) % 4
    rows = Side(str(path), ROWS, "images")
    assert torch.equal(load(str(tmp_path / "l.parquet"), rows, 4, "classes"), wanted)
    assert torch.equal(load(f"{tmp_path / 'l.parquet'}[label]", rows, 4, "classes"), wanted)
    stored = Side(str(npy(tmp_path / "x.npy", matrix)), ROWS, "images")
    assert torch.equal(load(f"{path}[n]", stored, ROWS, "classes"), torch.arange(ROWS))
    (tmp_path / "several").mkdir()
    for i, low in enumerate((0, 9)):
        pq.write_table(
            pq.read_table(tmp_path / "l.parquet").slice(low, 9 if i == 0 else 99), tmp_path / f"several/{i}.parquet"
        )
    for text in (f"{tmp_path}/several", f"{tmp_path}/several[label]"):
        assert torch.equal(load(text, rows, 4, "classes"), wanted)
    with pytest.raises(ValueError, match="labels: expected a column label or labels"):
        load(str(path), rows, 4, "classes")


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A table of documents, with captions, images' and texts' embeddings; and the same as .npy."""
    folder = tmp_path_factory.mktemp("both")
    images, texts = drawn(rows=40) + 2, drawn(rows=40, seed=1)
    ids = [f"{i:03d}.jpg" for i in range(40)]
    columns = {"id": ids, "image": lists(images), "text": lists(texts, "list"), "caption": [f"c {i}" for i in ids]}
    whole = pa.table(columns)
    (folder / "data").mkdir()
    for i in range(2):
        pq.write_table(whole.slice(20 * i, 20), folder / "data" / f"part-{i}.parquet")
    for name, matrix in (("images", images), ("texts", texts)):
        np.save(folder / f"{name}.npy", matrix)
    return folder, images, texts


def told(capsys, *arguments):
    capsys.readouterr()
    assert main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.faiss
def test_every_verb_takes_a_folder_of_tables(both, tmp_path, capsys, monkeypatch):
    pytest.importorskip("faiss")
    folder, _, _ = both
    monkeypatch.chdir(folder)
    x, t = "data[image]", "data[text]"

    def alike(verb, *rest):
        """The same figures from tables and from .npy; what they were made from is said."""
        mine = told(capsys, *(each for each in verb), x, t, *rest)
        theirs = told(capsys, *(each for each in verb), "images.npy", "texts.npy", *rest)
        inputs = mine.pop("inputs", None)
        theirs.pop("inputs", None)
        for row in (*mine.get("rows", []), *theirs.get("rows", [])):
            row.pop("seconds", None)
        assert mine == theirs
        return inputs

    inputs = alike(["gap"])
    assert [len(inputs[side]["sha256"]) for side in ("images", "texts")] == [2, 2]
    assert (inputs["images"]["key"], inputs["texts"]["key"]) == ("image", "text")
    assert inputs["images"]["order"] == inputs["texts"]["order"]
    alike(["robust"], "--gaussian", "0.1", "--labels", "paired")
    alike(["shift", "compare"], "--labels", "paired", "--components", "exact")
    for verb in ("shift", "project"):
        fits = [
            told(capsys, verb, "fit", *sides, "--out", tmp_path / f"{verb}.safetensors")
            for sides in ((x, t), ("images.npy", "texts.npy"))
        ]
        assert fits[0]["components"] == fits[1]["components"]
    plan = told(capsys, "index", x, "--out", tmp_path / "index")["plan"]
    assert plan["order"] == inputs["images"]["order"]
    found = told(capsys, "search", tmp_path / "index", t, "--k", 3)
    assert told(capsys, "index", "images.npy", "--out", tmp_path / "other")["count"] == 40
    assert found["ids"] == told(capsys, "search", tmp_path / "other", "texts.npy", "--k", 3)["ids"]
    told(capsys, "eval", "--task", "zeroshot_retrieval", "--images", x, "--texts", t, "--labels", "paired")
    repaired = told(capsys, "index", "repair", tmp_path / "other", "--queries", t, "--embeddings", x)
    assert repaired["inputs"]["embeddings"]["key"] == "image"


def test_moved_tables_keep_their_other_columns(both, tmp_path, capsys, monkeypatch):
    folder, _, _ = both
    monkeypatch.chdir(folder)
    assert main(["shift", "fit", "data[image]", "data[text]", "--out", str(tmp_path / "s.safetensors")]) == 0
    for source, out, column in (("data[text]", tmp_path / "moved", "text"), ("data[image]", tmp_path / "m2", "image")):
        apply = ["shift", "apply", tmp_path / "s.safetensors", source, "--out", out]
        first = told(capsys, *apply, "--side", "gallery")
        assert first["rows"] == 40
        before, after = pq.read_table("data"), pq.read_table(sorted(out.glob("*.parquet")))
        assert after.schema.types == before.schema.types
        assert after.drop_columns(column).equals(before.drop_columns(column))
        np.save(tmp_path / "plain.npy", files.load_embeddings(source).numpy())
        told(capsys, "shift", "apply", tmp_path / "s.safetensors", tmp_path / "plain.npy", "--out", tmp_path / "p.npy")
        assert np.array_equal(files.load_embeddings(f"{out}[{column}]"), np.load(tmp_path / "p.npy"))
        assert told(capsys, *apply, "--side", "gallery") == first  # all were there already
    one = tmp_path / "one.parquet"
    told(capsys, "shift", "apply", tmp_path / "s.safetensors", "data/part-0.parquet[text]", "--out", one)
    assert pq.read_table(one)["caption"].to_pylist() == [f"c {i:03d}.jpg" for i in range(20)]
    assert provenance.described(f"{one}[text]")["transforms"][0]["alpha"] == 1.0
    with pytest.raises(ValueError, match="expected embeddings that no shift has moved"):
        shifted.check_unmoved(f"{one}[text]")


def test_lance_is_hashed_and_moved(tmp_path, capsys):
    path = lance(tmp_path / "x.lance", drawn())
    assert Embeddings(path).keys() == NAMES
    hashed = provenance.made_from(path)["sha256"]
    assert hashed == provenance.made_from(f"{path}/")["sha256"]
    np.save(tmp_path / "q.npy", drawn(seed=5))
    assert main(["shift", "fit", str(path), str(tmp_path / "q.npy"), "--out", str(tmp_path / "s.safetensors")]) == 0
    moved = tmp_path / "moved.parquet"
    told(capsys, "shift", "apply", tmp_path / "s.safetensors", path, "--out", moved)
    assert pq.read_table(moved)["n"].to_pylist() == list(range(ROWS))
