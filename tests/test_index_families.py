"""Each family of FAISS's factory is served as FAISS itself answers, or refused in words; never is the process ended."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from gapkern.retrieval import GapIndex, disk
from tests import index_families
from tests.conftest import ROOT
from tests.scenes import searched

pytestmark = pytest.mark.faiss
WRAPPED = (
    "IDMap2,IVF8,Flat IVF8,Flat,IDMap Flat,IDMap2 PCA8,IDMap,Flat IVF8,PQ4x4np,RFlat IVF8,PQ4x4np,Refine(SQ8) "
    "IVF8,PQ4+4 IVF8,FlatDedup FlatL2Panorama4 IVF8,FlatPanorama4"
)
UNSERVED = (
    "NSG16,PQ4x4 HNSW8_2+PQ4 Residual8,PQ4x4 ZnLattice2x10_6 ZnLattice0x10_6 BFlat PQ4x4fs_64 IVF0,Flat PQ4x0 HNSW0 "
    "HNSW1 NSG2 LSQ0x4 RR0,Flat IVF8_HNSW0,Flat IVF8,FlatPanorama0 IVF1000000000,Flat IVF99999999999999999999,Flat "
    "IMI2x60,Flat ,"
)


@pytest.mark.slow
def test_the_table_of_families_is_that_of_the_docs(tmp_path):
    """In a process of its own: what ends it is the last name on its stderr."""
    import faiss

    out = tmp_path / "families.json"
    done = subprocess.run(
        [sys.executable, "-m", "tests.index_families", out],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(out.read_text())
    assert all(row["search"] == "refused" for f in index_families.FAMILIES["Nonsense"] for row in [found[f]])
    page = index_families.PAGE.read_text(encoding="utf-8")
    if faiss.__version__.startswith("1.15."):
        assert index_families.written(page, found) == page, "python -m tests.index_families writes the table anew"


@pytest.mark.filterwarnings("ignore:.*FAISS")
@pytest.mark.parametrize("factory", WRAPPED.split())
def test_ids_are_ours_whatever_is_around_the_index(factory):
    said = index_families.row(factory)
    assert said["search"] == said["mapped"] == "yes"
    assert said["gapkern index"] in ("in blocks", "at once")


@pytest.mark.filterwarnings("ignore:.*FAISS")
@pytest.mark.parametrize("factory", UNSERVED.split())
def test_what_faiss_cannot_serve_is_refused_before_anything_is_written(factory, tmp_path):
    with pytest.raises(ValueError, match="factory: expected a FAISS factory string for D = 16, got"):
        GapIndex(factory, d=16)
    np.save(tmp_path / "x.npy", searched("spread")[1])
    with pytest.raises(ValueError, match="factory: expected a FAISS factory string for D = 16, got"):
        disk.build(tmp_path / "x.npy", tmp_path / "index", factory)
    assert not (tmp_path / "index").exists()


def test_a_graph_that_cannot_be_built_leaves_the_index_empty():
    index = GapIndex("NSG16", d=16)
    with pytest.raises(ValueError, match="gallery: expected rows that differ for an NSG graph, got 1 of 600"):
        index.add(searched("equal")[1])
    with pytest.raises(ValueError, match="gallery: expected vectors that 'NSG16' can hold"):
        index.add(torch.randn(3, 16))
    assert (index.ntotal, len(index.ids())) == (0, 0)
    gallery = searched("spread")[1]
    assert torch.equal(index.add(gallery).search(gallery[:20], 1)[1][:, 0], torch.arange(20))
    with pytest.raises(ValueError, match="incremental"):
        index.add(torch.randn(200, 16))
    assert index.ntotal == len(index.ids()) == 600


def test_faiss_names(tmp_path):
    import faiss

    queries, gallery = searched("spread")
    index = GapIndex("IVF8,Flat", d=16)
    assert (index.ntotal, index.d, index.is_trained, index.nlist) == (0, 16, False, 8)
    assert (index.metric_type, GapIndex(metric="ip").metric_type) == (faiss.METRIC_L2, faiss.METRIC_INNER_PRODUCT)
    ids = torch.arange(600) * 3
    index.train(gallery).add(gallery, ids).set_parameters("nprobe=8")
    assert index.is_trained
    assert np.array_equal(index.reconstruct(30), gallery[10].numpy())
    assert np.array_equal(index.reconstruct_batch([30, 0, 30]), gallery[[10, 0, 10]].numpy())
    assert index.reconstruct_batch([]).shape == (0, 16)
    assert index.remove_ids([30, 33, 31]) == 2
    assert (index.ntotal, len(index)) == (598, 598)
    left = torch.cat([torch.arange(10), torch.arange(12, 600)])
    assert torch.equal(index.search(queries, 5)[1], GapIndex().add(gallery[left], ids[left]).search(queries, 5)[1])
    for act in (lambda: index.reconstruct(30), lambda: index.reconstruct_batch([0, 30])):
        with pytest.raises(ValueError, match="keys: expected ids of the index, got 30, which it does not hold"):
            act()
    index.add(gallery[10:11], [30])
    assert index.reconstruct(30)[0] == gallery[10, 0]
    with pytest.raises(ValueError, match="expected an index that FAISS removes vectors from, got 'HNSW8'"):
        GapIndex("HNSW8").add(gallery).remove_ids([1])
    with pytest.raises(TypeError, match="key: expected an integer, got str"):
        index.reconstruct("a")


def test_reconstruct_gives_the_shifted_row():
    from gapkern import MeanShift
    from gapkern.testing import clip_like

    images, texts = clip_like(300, 16)
    shift = MeanShift(n_components=4).fit(texts, images)
    index = GapIndex(shift=shift).add(texts)
    assert np.array_equal(index.reconstruct(7), shift.transform(texts)[7].numpy())
    distances, _ = index.search(images[:1], 300)
    moved = shift.transform_queries(images[:1]).numpy()
    expected = np.square(moved.astype(np.float64) - index.reconstruct_batch(range(300))).sum(1)
    np.testing.assert_allclose(np.sort(expected), distances[0].numpy(), rtol=1e-5)
