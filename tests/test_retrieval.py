"""Search, recall, quantisers, and indexes that outlive a killed run."""

import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from gapkern import MeanShift, cli, files
from gapkern.retrieval import GapIndex, compare_quantisers, disk, exact, recall, store
from gapkern.testing import clip_like, peak_memory

pytestmark = pytest.mark.faiss
FACTORIES = ("Flat", "SQ8", "SQ4", "PQ4x4", "IVF8,PQ4x4", "OPQ4,PQ4x4", "RaBitQ", "IVF8,SQ8", "HNSW8")


def truth(queries, gallery, metric="l2"):
    """All gallery rows by float64 cost, equal ones by number; and the costs."""
    q, g = queries.double(), gallery.double()
    cost = torch.stack([-(g * x).sum(1) if metric == "ip" else (g - x).square().sum(1) for x in q])
    return cost.argsort(dim=1, stable=True), cost


def data(kind: str, seed: int = 0):
    """Queries (150, 16) and a gallery (600, 16): spread out, on a grid of ties, all equal, or far from 0."""
    torch.manual_seed(seed)
    queries, gallery = torch.randn(150, 16), torch.randn(600, 16)
    if kind == "grid":
        return (queries / 1.5).round(), (gallery / 1.5).round()
    if kind == "equal":
        return queries, gallery[:1].repeat(600, 1)
    if kind == "far":
        return queries + 300, gallery + 300
    return queries, gallery


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("kind", ["spread", "grid", "equal", "far"])
def test_flat_search_is_exact_and_ties_go_to_the_lowest_id(kind, metric):
    queries, gallery = data(kind)
    ids = torch.randperm(6000)[:600]
    order = ids.argsort()
    expected, cost = truth(queries, gallery[order], metric)
    index = GapIndex(metric=metric).add(gallery, ids)
    distances, found = index.search(queries, 10)
    assert torch.equal(found, ids[order][expected[:, :10]])
    sign = 1 if metric == "l2" else -1
    # FAISS forms squared distances from norms and products.
    torch.testing.assert_close(
        distances.double(), sign * cost.gather(1, expected[:, :10]), rtol=1e-5, atol=1e-5 if kind != "far" else 1.0
    )
    # The search that CUDA tensors take gives the same rows.
    assert torch.equal(ids[exact.search(queries, gallery, 10, metric=metric, ids=ids)[1]], found)


@pytest.mark.cuda
def test_cuda_queries_find_what_cpu_queries_find():
    queries, gallery = data("grid")
    index = GapIndex().add(gallery)
    distances, ids = index.search(queries.cuda(), 10)
    assert distances.is_cuda
    assert torch.equal(ids.cpu(), index.search(queries, 10)[1])


@pytest.mark.parametrize("make", [
    lambda x: x.numpy(), lambda x: x.double().numpy(), lambda x: x.half().numpy(), lambda x: x.numpy()[::-1][::-1],
    lambda x: np.asfortranarray(x.numpy()), lambda x: x.numpy().astype(">f4"), lambda x: x.bfloat16(),
    lambda x: x.half(),
    lambda x: x.double(), lambda x: x.T.contiguous().T, lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    lambda x: x.clone().requires_grad_(),
])  # fmt: skip
def test_any_dtype_and_strides(make):
    queries, gallery = data("grid")  # whole numbers: every dtype holds them
    expected = GapIndex().add(gallery).search(queries, 5)
    distances, ids = GapIndex().add(make(gallery)).search(make(queries), 5)
    assert isinstance(ids, np.ndarray) == isinstance(make(queries), np.ndarray)
    assert (str(distances.dtype).split(".")[-1], str(ids.dtype).split(".")[-1]) == ("float32", "int64")
    assert torch.equal(torch.as_tensor(ids), expected[1])
    assert torch.equal(torch.as_tensor(distances), expected[0])


@pytest.mark.parametrize("factory", FACTORIES)
@pytest.mark.parametrize("mmap", [False, True])
def test_ids_stay_with_their_rows_through_files(tmp_path, factory, mmap):
    queries, gallery = data("spread")
    ids = torch.randperm(10**6)[:600] * 2**40
    index = GapIndex(factory).train(gallery).add(gallery[:400], ids[:400]).add(gallery[400:], ids[400:])
    before = index.search(queries, 10)
    assert np.isin(before[1][before[1] >= 0], ids).all()
    own = index.search(gallery[::7], 10)[1]
    assert (own == ids[::7, None]).any(1).double().mean() > 0.5, "rows find themselves"
    index.save(tmp_path / "index")
    loaded = GapIndex.load(tmp_path / "index", mmap=mmap)
    after = loaded.search(queries, 10)
    assert torch.equal(before[1], after[1])
    assert torch.equal(before[0], after[0])
    assert sorted(loaded.ids()) == sorted(ids.tolist())
    if mmap:
        with pytest.raises(ValueError, match="got one mapped from files; load it with mmap=False"):
            loaded.add(gallery)
    else:
        assert max(loaded.add(gallery[:1]).ids()) == ids.max() + 1


def test_more_neighbours_than_vectors_and_no_queries():
    index = GapIndex().add(torch.eye(3))
    distances, ids = index.search(torch.eye(3)[:1], 5)
    assert ids.tolist() == [[0, 1, 2, -1, -1]]
    assert distances[0, 3] == torch.finfo(torch.float32).max
    assert index.search(torch.empty(0, 3), 2)[1].shape == (0, 2)
    assert GapIndex(metric="ip").add(torch.eye(3)).search(np.eye(3), 4)[0][0, 3] == np.finfo(np.float32).min


@pytest.mark.parametrize(("act", "error", "message"), [
    (lambda i: i.add(torch.zeros(2, 5)), ValueError, r"gallery: expected D = 4, got shape \(2, 5\)"),
    (lambda i: i.search(torch.zeros(2, 5), 1), ValueError, r"queries: expected D = 4, got shape \(2, 5\)"),
    (lambda i: i.add(torch.tensor([[0.0] * 4, [1, 2, float("nan"), 0]])), ValueError, "gallery: .* first in row 1"),
    (lambda i: i.search(np.array([[1e300, 0, 0, 0]]), 1), ValueError, "queries: .*float32.* first in row 0"),
    (lambda i: i.add(torch.zeros(2, 4), [1]), ValueError, r"ids: expected shape \(2,\).*got \(1,\)"),
    (lambda i: i.add(torch.zeros(2, 4), [7, 7]), ValueError, "ids: expected each id once, got 7 2 times"),
    (lambda i: i.add(torch.zeros(1, 4), [3]), ValueError, "ids: expected new ids, got 3, which the index holds"),
    (lambda i: i.add(torch.zeros(1, 4), [-1]), ValueError, r"ids: expected 0 <= id .*got -1 in row 0"),
    (lambda i: i.add(torch.zeros(1, 4), [0.5]), TypeError, "ids: expected integers, got float64"),
    (lambda i: i.add(torch.zeros(1, 4, dtype=torch.int32)), TypeError, "gallery: expected float32"),
    (lambda i: i.search(torch.zeros(1, 4), 0), ValueError, "k: expected an integer >= 1, got 0"),
    (lambda i: i.train(torch.zeros(1, 4)), ValueError, "expected an empty index to train, got one of 4 vectors"),
    (lambda i: i.set_parameters("nprobe=3"), ValueError, "text: expected FAISS search parameters"),
    (lambda i: GapIndex("Flut").add(torch.eye(4)), ValueError, "factory: expected a FAISS factory string for D = 4"),
    (lambda i: GapIndex("IVF2,Flat").add(torch.eye(4)), ValueError, r"call train\(sample\) before add"),
    (lambda i: GapIndex("IVF8,Flat").train(torch.eye(4)), ValueError, "sample: expected enough rows .* got 4.*8"),
    (lambda i: GapIndex().search(torch.eye(4), 1), ValueError, "expected vectors to search, got none"),
    (lambda i: GapIndex().save("x"), ValueError, "train or add before save"),
    (lambda i: GapIndex(metric="cosine"), ValueError, "metric: expected one of 'l2', 'ip'"),
    (lambda i: GapIndex(shift=3), TypeError, r"shift: expected a gapkern\.MeanShift, got int"),
])  # fmt: skip
def test_what_is_wrong_is_named(act, error, message):
    index = GapIndex().add(torch.eye(4))
    with pytest.raises(error, match=message):
        act(index)
    assert index.count == 4, "a rejected call leaves the index as it was"


@pytest.mark.parametrize("moves", ["gallery", "queries"])
def test_the_shift_moves_its_side_and_is_kept(tmp_path, moves):
    images, texts = clip_like(300, 64)
    shift = MeanShift(components=8, moves=moves, model="a model").fit(texts, images)
    index = GapIndex(shift=shift).add(texts)
    expected = truth(shift.transform_queries(images), shift.transform(texts))[0]
    assert torch.equal(index.search(images, 5)[1], expected[:, :5])
    index.save(tmp_path)
    loaded = GapIndex.load(tmp_path)
    assert torch.equal(loaded.search(images, 5)[1], expected[:, :5])
    assert (loaded.shift.moves, loaded.model, store.manifest(tmp_path)["count"]) == (moves, "a model", 300)
    with pytest.warns(UserWarning, match="metric='ip' gains nothing from a shift"):
        GapIndex(metric="ip", shift=shift)
    with pytest.raises(ValueError, match="shift: expected one of model another, got one of a model"):
        GapIndex(shift=shift, model="another")


def test_changed_and_foreign_folders_are_named(tmp_path):
    index, folder = GapIndex().add(torch.eye(4)), tmp_path / "index"
    with pytest.raises(ValueError, match=r"path: expected a folder with an index, got .*which has no manifest\.json"):
        GapIndex.load(folder)
    index.save(folder)
    (path,) = folder.glob("index-*")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"\x01")
    with pytest.raises(ValueError, match=r"path: expected SHA-256 .* it was changed"):
        GapIndex.load(folder)
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=rf"path: expected {len(whole)} bytes in"):
        GapIndex.load(folder, mmap=True)
    found = json.loads((folder / "manifest.json").read_text())
    files.write_json(folder / "manifest.json", {**found, "version": 99})
    with pytest.raises(ValueError, match=r"path: expected a gapkern\.GapIndex of version 1, got .* 99"):
        GapIndex.load(folder)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"path: expected an empty folder .*holds index"):
        index.save(tmp_path)


_SAVING = """
import sys, torch
from gapkern.retrieval import GapIndex
print("ready", flush=True)
for n in range(2, 10**6):
    GapIndex().add(torch.full((n * 2000, 8), float(n))).save(sys.argv[1])
"""


def test_a_killed_save_leaves_the_old_or_the_new(tmp_path):
    GapIndex().add(torch.full((2000, 8), 1.0)).save(tmp_path)
    generator = np.random.default_rng(0)
    for _ in range(3):
        with subprocess.Popen([sys.executable, "-c", _SAVING, tmp_path], stdout=subprocess.PIPE) as run:
            assert run.stdout.readline() == b"ready\n"
            time.sleep(generator.uniform(0.02, 0.3))
            run.kill()
        loaded = GapIndex.load(tmp_path, verify=True)
        value = loaded.count // 2000
        assert loaded.count == value * 2000
        assert loaded.search(torch.full((1, 8), float(value)), 1)[0].item() == 0


@pytest.mark.parametrize("order", ["import torch, faiss", "import faiss, torch", "import gapkern, faiss"])
def test_torch_and_faiss_in_either_order(order):
    code = f"""
{order}
import torch, numpy as np
from gapkern.retrieval import GapIndex
for _ in range(3):
    x = torch.randn(3000, 64)
    (x @ x.T).sum()
    GapIndex().add(x).search(x, 3)
    GapIndex("IVF8,SQ8").train(x).add(x).search(x, 3)
print("done")
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_without_faiss_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r"faiss-cpu is needed here; run `pip install 'gapkern\[retrieval\]'`"):
        GapIndex()
    assert recall(torch.eye(2), torch.eye(2), [0, 1], ks=[1])["image_retrieval_recall@1"] == 1, "recall needs none"


def defined(queries, gallery, positives, ks, metric="l2"):
    """Recall as it is defined, with whole matrices."""
    right = torch.zeros(len(queries), len(gallery), dtype=torch.bool)
    for q, rows in enumerate(positives):
        right[q, torch.as_tensor(rows)] = True
    result = {}
    for name, mine, a, b in (("image", right, queries, gallery), ("text", right.T, gallery, queries)):
        order = truth(a, b, metric)[0]
        for k in ks:
            hit = mine.gather(1, order[:, :k]).any(1)[mine.any(1)]
            result[f"{name}_retrieval_recall@{k}"] = float(hit.double().mean())
    return result


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize(("noise", "kind"), [(0.1, "spread"), (1, "spread"), (3, "grid"), (1, "equal"), (1, "far")])
@pytest.mark.parametrize(("texts", "images"), [(2500, 70), (90, 2300), (1, 1), (33, 31)])
def test_recall_is_as_defined(noise, kind, metric, texts, images):
    generator = torch.Generator().manual_seed(texts)
    gallery = torch.randn(images, 12, generator=generator)
    first = torch.randint(0, images, (texts,), generator=generator)
    queries = gallery[first] + noise * torch.randn(texts, 12, generator=generator)
    if kind == "grid":
        queries, gallery = (queries / 2).round(), (gallery / 2).round()
    if kind == "equal":
        gallery = gallery[:1].repeat(images, 1)
    if kind == "far":
        queries, gallery = queries + 100, gallery + 100
    positives = [[int(p), *([0] if q % 3 == 0 and p != 0 else [])] for q, p in enumerate(first)]
    assert recall(queries, gallery, positives, metric=metric) == defined(
        queries, gallery, positives, (1, 5, 10), metric
    )


def test_recall_takes_positives_in_every_form():
    queries, gallery = data("spread")
    lists = [[q, q + 100] if q % 2 else [q] for q in range(150)]
    table = np.array([[q, q + 100] if q % 2 else [q, -1] for q in range(150)])
    expected = recall(queries, gallery, lists)
    for positives in (table, torch.from_numpy(table), [np.array(p) for p in lists], [tuple(p) for p in lists]):
        assert recall(queries, gallery, positives) == expected
    one = recall(queries.numpy(), gallery.half(), torch.arange(150), ks=[3], names=("text_retrieval", None))
    assert list(one) == ["text_retrieval_recall@3"]


@pytest.mark.parametrize(("positives", "error", "message"), [
    ([0], ValueError, "positives: expected one entry for each of 2 queries, got 1"),
    ([[0], []], ValueError, "positives: expected at least one for every query, got none for query 1"),
    ([0, 3], ValueError, r"positives: expected gallery rows in \[0, 3\), got 3 for query 1"),
    ([0, -1], ValueError, r"got -1 for query 1"),
    ([0.0, 1.0], TypeError, "positives: expected integers, got float64"),
])  # fmt: skip
def test_recall_names_wrong_positives(positives, error, message):
    with pytest.raises(error, match=message):
        recall(torch.eye(3)[:2], torch.eye(3), positives)


def test_recall_by_an_index_uses_its_ids():
    queries, gallery = data("spread")
    ids = torch.randperm(10**6)[:600]
    index = GapIndex().add(gallery, ids)
    exact_one = recall(queries, gallery, torch.arange(150), names=("image_retrieval", None))
    assert recall(queries, None, ids[:150], index=index) == exact_one
    assert recall(queries, None, ids[:150, None].repeat(1, 2), index=index) == exact_one


def test_recall_never_holds_all_scores():
    setup = """
import torch
torch.set_num_threads(2)
from gapkern.retrieval import recall
recall(torch.randn(3000, 32), torch.randn(3000, 32), torch.arange(3000))
queries, gallery = torch.randn(40000, 32), torch.randn(20000, 32)
"""
    used = peak_memory("recall(queries, gallery, torch.arange(40000) % 20000)", setup=setup)
    assert used < 300, "all scores in float32 have 3052 MiB"


def check_quantisers(images, texts):
    labels = np.arange(len(images))
    result = compare_quantisers(images, texts, positives=labels)
    rows = {(row["factory"], row["shift"]): row for row in result.rows}
    assert not result.left_out
    assert rows["Flat", False]["agreement"] == rows["Flat", False]["overlap@10"] == 1
    assert rows["Flat", False]["recall@1"] == pytest.approx(
        recall(images, texts, labels, ks=[1])["image_retrieval_recall@1"]
    )
    dims = images.shape[1]
    assert [rows[f, True]["bytes_per_vector"] for f in ("Flat", "SQ8", "SQ4")] == [4 * dims, dims, dims / 2]
    return result, rows


@pytest.mark.filterwarnings("ignore:sample. FAISS")
@pytest.mark.parametrize("name", ["clip", "convirt", "videoclip"])
def test_closing_the_gap_helps_quantisers_on_real_embeddings(real_data, name):
    images, texts = torch.from_numpy(real_data(name))
    _, rows = check_quantisers(images, texts)
    coarse = [f for f, shift in rows if shift and f != "Flat" and not f.startswith("IVF")]
    gains = [rows[f, True]["overlap@10"] - rows[f, False]["overlap@10"] for f in coarse]
    assert sum(gains) > 0
    assert rows["SQ4", True]["overlap@10"] > 0.7


@pytest.mark.filterwarnings("ignore:sample. FAISS")
def test_quantisers_on_synthetic_pairs_and_their_files(tmp_path):
    images, texts = clip_like(1000, 64)
    result, rows = check_quantisers(images, texts)
    assert rows["SQ4", True]["overlap@10"] > rows["SQ4", False]["overlap@10"]
    result.to_json(tmp_path / "q.json"), result.to_csv(tmp_path / "q.csv"), result.plot(tmp_path / "q.png")
    assert len((tmp_path / "q.csv").read_text().splitlines()) == 1 + 12
    assert json.loads((tmp_path / "q.json").read_text())["rows"] == files.plain(result.rows)
    some = compare_quantisers(images, texts, ["Flat", "PQ7"], k=3)
    assert list(some.left_out) == ["PQ7"]


@pytest.fixture
def folder(tmp_path):
    """A gallery in shards, and queries."""
    images, texts = clip_like(2100, 32)
    (tmp_path / "texts").mkdir()
    for n, part in enumerate(texts.split(700)):
        files.save_embeddings(tmp_path / "texts" / f"text_emb_{n}.npy", part)
    files.save_embeddings(tmp_path / "images.npy", images[:50])
    return tmp_path


def contents(path):
    return {p.name: p.read_bytes() for p in path.iterdir()}


@pytest.mark.parametrize(
    "factory", ["Flat", "IVF8,Flat", "SQ8", "IVF8,SQ8", "OPQ4,IVF8,PQ4x4", "HNSW8", "IVF8,PQ4x4fs"]
)
def test_an_index_from_files_is_the_index_of_memory(folder, factory):
    texts, images = files.load_embeddings(folder / "texts"), files.load_embeddings(folder / "images.npy")
    shift = MeanShift(components=4).fit(texts, images)
    manifest = disk.build(folder / "texts", folder / "index", factory, shift=shift, block=400)
    assert (manifest["count"], manifest["dims"]) == (2100, 32)
    loaded = GapIndex.load(folder / "index", verify=True)
    assert sorted(loaded.ids()) == list(range(2100))
    memory = GapIndex(factory, shift=shift).train(texts).add(texts)
    expected, got = memory.search(images, 5), loaded.search(images, 5)
    assert (expected[1] == got[1]).double().mean() > 0.99
    shutil.move(folder / "index", folder / "moved")
    assert torch.equal(GapIndex.load(folder / "moved").search(images, 5)[1], got[1]), "the folder may move"
    GapIndex.load(folder / "moved").save(folder / "copy")
    shutil.rmtree(folder / "moved")
    assert torch.equal(GapIndex.load(folder / "copy").search(images, 5)[1], got[1])


def _build(folder, *more):
    command = [sys.executable, "-m", "gapkern", "index", folder / "texts", "--factory", "IVF8,SQ8", "--block", "150"]
    return subprocess.Popen([*command, "--out", *more], stdout=subprocess.DEVNULL)


@pytest.mark.slow
def test_a_build_killed_ten_times_gives_the_same_bytes(folder):
    started = time.perf_counter()
    assert _build(folder, folder / "straight").wait() == 0
    whole = time.perf_counter() - started
    generator, killed = np.random.default_rng(0), 0
    out = folder / "killed"
    while killed < 10:
        run = _build(folder, out)
        # Mostly in the part after the imports, where files are written.
        deadline = time.perf_counter() + generator.uniform(0.5, 1.0) * whole
        while time.perf_counter() < deadline and run.poll() is None:
            time.sleep(0.005)
        if run.poll() is None:
            run.send_signal(signal.SIGKILL)
            run.wait()
            killed += 1
        else:
            shutil.rmtree(out)
    assert _build(folder, out).wait() == 0
    assert contents(out) == contents(folder / "straight")
    assert sorted(GapIndex.load(out).ids()) == list(range(2100))


def test_a_build_goes_on_where_it_stopped_at_every_step(folder, monkeypatch):
    """The same at each file that is put in its place: stopped there, taken up, the same bytes."""
    disk.build(folder / "texts", folder / "straight", "IVF8,SQ8", block=500)
    replace, out = disk.os.replace, folder / "stopped"
    stops = 0
    while True:
        left = stops + 1

        def stop(source, target):
            nonlocal left
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
            replace(source, target)

        monkeypatch.setattr(disk.os, "replace", stop)
        shutil.rmtree(out, ignore_errors=True)
        try:
            disk.build(folder / "texts", out, "IVF8,SQ8", block=500)
        except KeyboardInterrupt:
            stops += 1
            monkeypatch.setattr(disk.os, "replace", replace)
            disk.build(folder / "texts", out, "IVF8,SQ8", block=500)
            assert contents(out) == contents(folder / "straight")
            continue
        break
    assert stops == 10, "plan, trained index, five blocks, lists, index, manifest"


def test_another_plan_starts_anew_and_replaces_the_old_index_at_the_end(folder):
    out = folder / "index"
    disk.build(folder / "texts", out, "Flat")
    files.write_json(files.folder(out / "unfinished") / "plan.json", {"another": "plan"})
    (out / "unfinished" / "block-000000.faiss").write_bytes(b"of another gallery")
    np.save(folder / "ids.npy", np.arange(2100)[::-1] + 5)
    disk.build(folder / "texts", out, "SQ8", ids=folder / "ids.npy", block=800)
    loaded = GapIndex.load(out)
    assert (loaded.factory, loaded.ids()[0], len(list(out.iterdir()))) == ("SQ8", 2104, 2)


def test_command_line(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    assert cli.main(["shift", "fit", "texts", "images.npy", "--out", "shift.safetensors", "--components", "4"]) == 0
    capsys.readouterr()
    arguments = ["index", "texts", "--out", "index", "--factory", "IVF8,Flat", "--shift", "shift.safetensors", "--json"]
    assert cli.main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["count"] == 2100
    assert (
        cli.main(["search", "index", "images.npy", "--k", "3", "--parameters", "nprobe=8", "--json", "--verify"]) == 0
    )
    found = json.loads(capsys.readouterr().out)
    shift = MeanShift.load("shift.safetensors")
    expected = truth(files.load_embeddings("images.npy"), shift.transform(files.load_embeddings("texts")))[0][:, :3]
    assert found["ids"] == expected.tolist()
    for out in ("r.npz", "r.parquet", "r.json"):
        assert cli.main(["search", "index", "images.npy", "--k", "3", "--parameters", "nprobe=8", "--out", out]) == 0
    assert np.array_equal(np.load("r.npz")["ids"], expected)
    import pandas

    frame = pandas.read_parquet("r.parquet")
    assert frame["id"].tolist() == expected.flatten().tolist()
    assert json.loads((folder / "r.json").read_text())["ids"] == expected.tolist()
    capsys.readouterr()
    compare = ["index", "texts", "--compare", "images.npy", "--factory", "Flat", "SQ4", "--labels", "paired"]
    assert cli.main([*compare, "--out", "table"]) == 0
    assert "SQ4" in capsys.readouterr().out
    assert {p.name for p in (folder / "table").iterdir()} == {"quantisers.json", "quantisers.csv", "quantisers.png"}
    assert cli.main(["search", "index", "images.npy", "--out", "r.txt"]) == 2
    assert "expected a name ending in .npz, .parquet or .json, got r.txt" in capsys.readouterr().err
