"""What `GapIndex` and `gapkern index` do with each family of FAISS's factory: `python -m tests.index_families`.

Every answer is compared with FAISS itself, fed row by row's number without our wrapping. The result is the table of
docs/indexes.md.
"""

import json
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

PAGE = Path(__file__).resolve().parent.parent / "docs" / "indexes.md"
D, N, QUERIES, K = 16, 420, 40, 5
FAMILIES = {
    kind: factories.split()
    for kind, factories in {
        "Flat": "Flat FlatL2Panorama4",
        "Scalar quantisers": "SQ4 SQ6 SQ8 SQfp16 SQbf16 SQ8_direct SQ8_direct_signed",
        "Product quantisers": "PQ4x4 PQ4x4np PQ4x4fs PQ4x4fs_64",
        "Additive quantisers": (
            "RQ2x4 RQ2x4_Nfloat RQ2x4_Nqint8 LSQ2x4 PRQ2x2x4 PLSQ2x2x4 RQ4x4fs_Nrq2x4 LSQ4x4fs_Nlsq2x4 "
            "PRQ2x2x4fs_Nrq2x4 PLSQ2x2x4fs_Nlsq2x4"
        ),
        "RaBitQ": "RaBitQ RaBitQ4 RaBitQfs",
        "Hashes and lattices": "LSH LSHr LSHt LSHrt ITQ8,LSH ZnLattice2x10_6",
        "Inverted lists": (
            "IVF8,Flat IVF8,SQ8 IVF8,PQ4x4np IVF8,RQ2x4 IVF8,LSQ2x4 IVF8,PRQ2x2x4 IVF8,PLSQ2x2x4 IVF8,RaBitQ "
            "IVF8,RaBitQ4 IMI2x3,Flat"
        ),
        "Inverted lists, coarse quantisers": (
            "IVF8_HNSW8,Flat IVF8(HNSW8),Flat IVF8(SQ8),Flat IVF8(PCA4,Flat),Flat IVF105_NSG8,Flat"
        ),
        "Inverted lists in blocks of codes": (
            "IVF8,PQ4x4fs IVF8,PQ4x4fsr IVF8,RaBitQfs IVF8,RQ4x4fs_Nrq2x4 IVF8,FlatPanorama4"
        ),
        "Inverted lists by row number": "IVF8,PQ4+4 IVF8,FlatDedup",
        "HNSW": "HNSW8 HNSW8,Flat HNSW8_SQ8 HNSW8,PQ4x4 HNSW8_FlatPanorama4 HNSW8_2+PQ4",
        "NSG": "NSG16 NSG16,Flat NSG16,SQ8 NSG16,PQ4x4",
        "Refinement": (
            "PQ4x4,RFlat SQ4,RFlat HNSW8,RFlat IVF8,PQ4x4np,RFlat IVF8,PQ4x4np,Refine(SQ8) PQ4x4,Refine(PQ8x4)"
        ),
        "Transforms": (
            "PCA8,Flat PCAR8,SQ8 PCAW8,Flat RR8,Flat ITQ8,Flat L2norm,Flat Pad32,Flat OPQ4,PQ4x4np "
            "PCA8,IVF8,Flat L2norm,PCA8,IVF8,SQ8 OPQ4_8,IVF8,PQ4x4np PCA8,SQ4,RFlat"
        ),
        "Id maps": (
            "IDMap,Flat Flat,IDMap IDMap2,IVF8,Flat IVF8,Flat,IDMap IVF8,Flat,IDMap2 PCA8,IDMap,Flat "
            "IDMap,IDMap2,Flat IDMap2,IVF8,PQ4x4np,RFlat"
        ),
        "Two layers": "Residual8,PQ4x4 Residual2x3,PQ4x4",
        "Binary": "BFlat BIVF8 BHNSW16 BHash4",
        "Nonsense": (
            ", Flut IVF0,Flat IVF8 PQ0 PQ4x0 PQ5 PQ4x30 HNSW0 HNSW1 IVF8_HNSW0,Flat NSG0 NSG2 LSH0 LSQ0x4 "
            "RR0,Flat PCA32,Flat ZnLattice0x10_6 IMI2x0,Flat IVF8,FlatPanorama0 IVF99999999999,Flat "
            "IVF1000000000,Flat IVF8,Flat,IDMap3"
        ),
    }.items()
}
COLUMNS = ("add", "search", "ip", "save, load", "mapped", "reconstruct", "remove_ids", "gapkern index")


def scene(factory):
    rows = np.random.default_rng(0).standard_normal((N + QUERIES, D)).astype(np.float32)
    if "direct" in factory:  # codes are the values, as whole numbers
        rows = np.clip(np.round(20 * rows) + (0 if "signed" in factory else 100), -128, 255)
    ids = np.random.default_rng(1).permutation(10**6)[:N] * 2**30
    return rows[:N], rows[N:], ids


def plain(index):
    """FAISS's index inside of ours: an IDMap's inner one."""
    import faiss

    index = faiss.downcast_index(index)
    return faiss.downcast_index(index.index) if isinstance(index, faiss.IndexIDMap) else index


def everywhere(index):
    """All lists are probed, and all that a refinement sees is looked at."""
    import faiss

    ivf = faiss.try_extract_index_ivf(index)
    if ivf is not None:
        ivf.nprobe = ivf.nlist
    return index


def reference(trained, rows, queries, ids, batches=(None,)):
    """FAISS's answer to the rows added by number: distances, and the ids that the numbers stand for."""
    import faiss

    index = faiss.deserialize_index(trained)
    for part in (faiss.downcast_index(index), getattr(index, "index", None)):
        if part is not None and hasattr(part, "build_type"):
            part.build_type = 0
    for start, end in zip((0, *batches), (*batches, None), strict=False):
        if start is not None:
            index.add(rows[start:end])
    distances, found = everywhere(index).search(queries, K)
    return index, distances, np.where(found >= 0, ids[found], -1)


def same(got, expected, factory=""):
    """Distances agree, and ids but where distances are equal."""
    distances, ids = (np.asarray(x) for x in got)
    if "LSQ" in factory:  # encodes with random starts, a batch at a time
        assert np.abs(distances - expected[0]).mean() < 0.15 * np.abs(expected[0]).mean()
        return
    np.testing.assert_allclose(np.sort(distances, 1), np.sort(expected[0], 1), rtol=1e-4, atol=1e-4)
    order = np.argsort(expected[0], 1)
    assert (np.sort(ids, 1) == np.sort(np.take_along_axis(expected[1], order, 1), 1)).mean() > 0.9


def word(error):
    assert isinstance(error, ValueError | TypeError), repr(error)
    assert "\n" not in str(error)
    return "refused"


def row(factory):
    """What each operation does: "yes", "refused", or how; and why the first refusal came."""
    import faiss

    from gapkern.retrieval import GapIndex

    rows, queries, ids = scene(factory)
    said = dict.fromkeys(COLUMNS, "refused")
    try:
        index = GapIndex(factory, d=D).train(rows)
        trained = faiss.serialize_index(plain(index.faiss_index))
        once = factory.startswith("NSG")
        index.add(rows[: N if once else 300], ids[: N if once else 300])
        if not once:
            index.add(rows[300:], ids[300:])
    except ValueError as error:
        word(error)
        said["why"] = str(error)
        said["gapkern index"] = from_files(factory, rows, queries, None)
        assert said["gapkern index"] == "refused", "what memory refuses, files refuse"
        return said
    said["add"] = "at once" if once else "yes"
    everywhere(index.faiss_index)
    inner, *expected = reference(trained, rows, queries, ids, (None,) if once else (300,))
    before = index.search(queries, K)
    same(before, expected)
    assert index.search(queries, N + 3)[1][0, -1] == -1, "more neighbours than vectors"
    said["search"] = "yes"
    assert index.ntotal == len(index) == N
    assert sorted(index.ids()) == sorted(ids)
    for wrong in (ids[:1], [ids[7]]):
        with pytest.raises(ValueError, match="holds already"):
            index.add(rows[:1], wrong)
    after = index.search(queries, K)
    assert np.array_equal(before[0], after[0])
    assert np.array_equal(before[1], after[1])
    said["ip"] = inner_products(factory, rows, queries, ids)
    files(index, queries, before, said)
    said["reconstruct"] = reconstructed(index, inner, ids, rows)
    said["gapkern index"] = from_files(factory, rows, queries, reference(trained, rows, queries, ids)[1:])
    said["remove_ids"] = removed(index, trained, rows, queries, ids)
    if once:
        with pytest.raises(ValueError, match="incremental"):
            index.add(rows[:1], [5])
        assert index.ntotal == N
    else:
        assert 5 in index.add(rows[:1], [5]).ids()
    return said


def inner_products(factory, rows, queries, ids):
    import faiss

    from gapkern.retrieval import GapIndex

    try:
        index = GapIndex(factory, "ip", d=D).train(rows)
        trained = faiss.serialize_index(plain(index.faiss_index))
        index.add(rows, ids)
    except ValueError as error:
        return word(error)
    everywhere(index.faiss_index)
    same(index.search(queries, K), reference(trained, rows, queries, ids)[1:])
    return "yes"


def files(index, queries, before, said):
    from gapkern.retrieval import GapIndex

    with tempfile.TemporaryDirectory() as folder:
        index.save(folder)
        for mmap, column in ((False, "save, load"), (True, "mapped")):
            loaded = GapIndex.load(folder, mmap=mmap)
            everywhere(loaded.faiss_index)
            got = loaded.search(queries, K)
            assert np.array_equal(got[0], before[0])
            assert np.array_equal(got[1], before[1])
            assert sorted(loaded.ids()) == sorted(index.ids())
            said[column] = "yes"


def reconstructed(index, inner, ids, rows):
    import faiss

    wanted = [3, 100, 401]
    try:
        got = index.reconstruct_batch(ids[wanted])
    except ValueError as error:
        return word(error)
    if "LSH" not in index.factory and "direct" not in index.factory:
        whole = index.reconstruct_batch(ids)
        assert np.square(whole - rows).sum() < 0.8 * np.square(rows).sum(), "nearer to the rows than 0 is"
    ivf = faiss.try_extract_index_ivf(inner)
    if ivf is not None and not isinstance(inner, faiss.IndexRefine):
        if type(faiss.downcast_InvertedLists(ivf.invlists)) is not faiss.ArrayInvertedLists:
            return "yes"  # FAISS's direct map does not know these lists
        ivf.make_direct_map()
    np.testing.assert_allclose(got, [inner.reconstruct(w) for w in wanted], rtol=1e-4, atol=1e-4)
    # A transform is undone by BLAS, which sums one row in another order than three.
    np.testing.assert_allclose(index.reconstruct(int(ids[100])), got[1], rtol=1e-5, atol=1e-6)
    return "yes"


def removed(index, trained, rows, queries, ids):
    gone = np.arange(0, N, 7)
    left = np.setdiff1d(np.arange(N), gone)
    before = index.search(queries, K)
    try:
        assert index.remove_ids([*ids[gone], 1]) == len(gone)
    except ValueError as error:
        assert np.array_equal(index.search(queries, K)[1], before[1])
        return word(error)
    assert sorted(index.ids()) == sorted(ids[left])
    same(index.search(queries, K), reference(trained, rows[left], queries, ids[left])[1:], index.factory)
    return "yes"


def from_files(factory, rows, queries, expected):
    from gapkern.retrieval import GapIndex, disk

    with tempfile.TemporaryDirectory() as folder:
        np.save(f"{folder}/x.npy", rows)
        np.save(f"{folder}/ids.npy", scene(factory)[2])
        try:
            disk.build(
                f"{folder}/x.npy", f"{folder}/index", factory, ids=f"{folder}/ids.npy", block=100, progress=count
            )
        except ValueError as error:
            return word(error)
        blocks = "in blocks" if count.adds > 4 else "at once"
        loaded = GapIndex.load(f"{folder}/index")
        same(everywhere(loaded.faiss_index) and loaded.search(queries, K), expected, factory)
        loaded.add(rows[:1], [9]) if not factory.startswith("NSG") else None
        mapped = GapIndex.load(f"{folder}/index", mmap=True)
        same(everywhere(mapped.faiss_index) and mapped.search(queries, K), expected, factory)
        return blocks


def count(stage, done, total):
    if stage == "train" and done == 0:
        count.adds = 0
    count.adds += stage == "add"


count.adds = 0


def collect(factories):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found = {}
    for factory in factories:
        print(factory, file=sys.stderr, flush=True)
        found[factory] = row(factory)
    return found


def markdown(found):
    """The table, a section for each kind."""
    lines = [f"| factory string | {' | '.join(COLUMNS)} |", "| --- " * (1 + len(COLUMNS)) + "|"]
    for kind, factories in FAMILIES.items():
        if kind == "Nonsense":
            continue
        lines.append(f"| **{kind}** |" + " |" * len(COLUMNS))
        lines += [f"| `{f}` | " + " | ".join(found[f][c] for c in COLUMNS) + " |" for f in factories]
    return "\n".join(lines) + "\n"


def written(page, found):
    """The page with the table in its place."""
    before, _, rest = page.partition("<!-- families -->\n")
    _, mark, after = rest.partition("<!-- end of families -->")
    return f"{before}<!-- families -->\n\n{markdown(found)}\n{mark}{after}"


if __name__ == "__main__":
    result = collect([f for factories in FAMILIES.values() for f in factories])
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps(result, indent=1))
    else:
        PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), result), encoding="utf-8")
