"""`GapIndex`: exact and coded search, ids, shifts, folders, and what is wrong with what it is given."""

import json
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from gapkern import MeanShift, _search, files
from gapkern.retrieval import GapIndex, recall, store
from gapkern.testing import clip_like
from tests import warm
from tests.scenes import searched, truth

pytestmark = pytest.mark.faiss
FACTORIES = ("Flat", "SQ8", "SQ4", "PQ4x4", "IVF8,PQ4x4", "OPQ4,PQ4x4", "RaBitQ", "IVF8,SQ8", "HNSW8")


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("kind", ["spread", "grid", "equal", "far"])
def test_flat_search_is_exact_and_ties_go_to_the_lowest_id(kind, metric):
    queries, gallery = searched(kind)
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
    assert torch.equal(ids[_search.search(queries, gallery, 10, metric=metric, ids=ids)[1]], found)


@pytest.mark.gpu
def test_cuda_queries_find_what_cpu_queries_find():
    queries, gallery = searched("grid")
    index = GapIndex().add(gallery)
    distances, ids = index.search(queries.cuda(), 10)
    assert distances.is_cuda
    assert torch.equal(ids.cpu(), index.search(queries, 10)[1])


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.numpy(),
        lambda x: x.double().numpy(),
        lambda x: x.half().numpy(),
        lambda x: x.numpy()[::-1][::-1],
        lambda x: np.asfortranarray(x.numpy()),
        lambda x: x.numpy().astype(">f4"),
        lambda x: x.bfloat16(),
        lambda x: x.half(),
        lambda x: x.double(),
        lambda x: x.T.contiguous().T,
        lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
        lambda x: x.clone().requires_grad_(),
    ],
)
def test_any_dtype_and_strides(make):
    queries, gallery = searched("grid")  # whole numbers: every dtype holds them
    expected = GapIndex().add(gallery).search(queries, 5)
    distances, ids = GapIndex().add(make(gallery)).search(make(queries), 5)
    assert isinstance(ids, np.ndarray) == isinstance(make(queries), np.ndarray)
    assert (str(distances.dtype).split(".")[-1], str(ids.dtype).split(".")[-1]) == ("float32", "int64")
    assert torch.equal(torch.as_tensor(ids), expected[1])
    assert torch.equal(torch.as_tensor(distances), expected[0])


@pytest.mark.parametrize("factory", FACTORIES)
@pytest.mark.parametrize("mmap", [False, True])
def test_ids_stay_with_their_rows_through_files(tmp_path, factory, mmap):
    queries, gallery = searched("spread")
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


@pytest.mark.parametrize(
    ("factory", "centroids"),
    [
        ("PQ4x4", 16),
        ("IVF64,Flat", 64),
        ("OPQ4,IVF16,PQ4x4fs", 256),
        ("IVF8,PQ4x6,RFlat", 64),
        ("IVF8,PQ4+8", 256),
        ("RQ2x8", 256),
        ("PRQ2x2x6", 64),
        ("HNSW8_PQ4x4", 16),
        ("IMI2x5,Flat", 32),
    ],
)
def test_few_rows_to_learn_from_make_one_warning(factory, centroids, capfd):
    """And nothing on stderr, where FAISS prints a line for each clustering: one that is left there was not found."""
    with pytest.warns(UserWarning, match="FAISS") as warned:
        GapIndex(factory).train(searched("spread")[1])
    message = f"sample: FAISS: clustering 600 points to {centroids} centroids: please provide at least {39 * centroids}"
    assert [str(w.message) for w in warned] == [f"{message} training points"]
    assert warned[0].filename == __file__
    assert capfd.readouterr() == ("", "")


def test_rotations_are_learned_as_faiss_learns_them():
    import faiss

    gallery = searched("spread")[1]
    theirs = faiss.index_factory(16, "OPQ4,PQ4x4")
    theirs.train(gallery.numpy()), theirs.add(gallery.numpy())
    with pytest.warns(UserWarning, match="to 256 centroids"):
        ours = GapIndex("OPQ4,PQ4x4").train(gallery).add(gallery)
    distances, ids = theirs.search(gallery.numpy(), 1)
    found = ours.search(gallery, 1)
    assert torch.equal(found[0], torch.from_numpy(distances))
    assert (found[1].numpy() == ids).mean() > 0.9, "but for ties"


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_codes_are_searched_by_the_device_that_is_there(device, tmp_path):
    queries, gallery = searched("spread")
    index = GapIndex("IVF8,SQ8", device=device).train(gallery).add(gallery)
    expected = index.search(queries, 3)[1]
    index.save(tmp_path)
    loaded = GapIndex.load(tmp_path, device=device)
    assert loaded.device == device
    assert torch.equal(loaded.search(queries, 3)[1], expected)
    few = index.search(queries, 3)[1]
    index.set_parameters("nprobe=8")
    assert not torch.equal(index.search(queries, 3)[1], few), "parameters reach whatever searches"


def test_a_gpu_that_faiss_does_not_have_is_named(tmp_path, capsys):
    import faiss

    if hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus():
        pytest.skip("FAISS sees a GPU here")
    message = "device: expected 'auto' or 'cpu', as FAISS .*, got 'cuda'"
    with pytest.raises(ValueError, match=message):
        GapIndex("SQ8", device="cuda")
    GapIndex().add(torch.eye(4)).save(tmp_path)
    with pytest.raises(ValueError, match=message):
        GapIndex.load(tmp_path, device="cuda")
    with pytest.raises(ValueError, match="device: expected one of 'auto', 'cpu', 'cuda', got 'gpu'"):
        GapIndex(device="gpu")


def test_more_neighbours_than_vectors_and_no_queries():
    index = GapIndex().add(torch.eye(3))
    distances, ids = index.search(torch.eye(3)[:1], 5)
    assert ids.tolist() == [[0, 1, 2, -1, -1]]
    assert distances[0, 3] == torch.finfo(torch.float32).max
    assert index.search(torch.empty(0, 3), 2)[1].shape == (0, 2)
    assert GapIndex(metric="ip").add(torch.eye(3)).search(np.eye(3), 4)[0][0, 3] == np.finfo(np.float32).min


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
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
        (
            lambda i: GapIndex("Flut").add(torch.eye(4)),
            ValueError,
            "factory: expected a FAISS factory string for D = 4",
        ),
        (lambda i: GapIndex("IVF2,Flat").add(torch.eye(4)), ValueError, r"call train\(sample\) before add"),
        (lambda i: GapIndex("IVF8,Flat").train(torch.eye(4)), ValueError, "sample: expected enough rows .* got 4.*8"),
        (lambda i: GapIndex().search(torch.eye(4), 1), ValueError, "expected vectors to search, got none"),
        (lambda i: GapIndex().save("x"), ValueError, "train or add before save"),
        (lambda i: GapIndex(metric="cosine"), ValueError, "metric: expected one of 'l2', 'ip'"),
        (lambda i: GapIndex(shift=3), TypeError, r"shift: expected a MeanShift or a Projection, got int"),
    ],
)
def test_what_is_wrong_is_named(act, error, message):
    index = GapIndex().add(torch.eye(4))
    with pytest.raises(error, match=message):
        act(index)
    assert index.count == 4, "a rejected call leaves the index as it was"


@pytest.mark.parametrize("moves", ["gallery", "queries"])
def test_the_shift_moves_its_side_and_is_kept(tmp_path, moves):
    images, texts = clip_like(300, 64)
    shift = MeanShift(n_components=8, moves=moves, model="a model").fit(texts, images)
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
    start = [sys.executable, "-W", "ignore", "-c", code]
    first = order.startswith("import faiss")
    done = subprocess.run(start, capture_output=True, text=True) if first else warm.run(code)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_without_faiss_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r"faiss-cpu is needed here; run `pip install 'gapkern\[retrieval\]'`"):
        GapIndex()
    assert recall(torch.eye(2), torch.eye(2), [0, 1], ks=[1])["image_retrieval_recall@1"] == 1, "recall needs none"
