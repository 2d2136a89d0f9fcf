"""`gapkern search`: nearest neighbours of embedding files in an index."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from gapkern import _check, _progress, files
from gapkern.cli import common

SHOWN = 10  # queries in the table
MOST = 10_000  # neighbours that may be asked for where there are fewer vectors


def add(verbs: Any) -> None:
    parser = verbs.add_parser(
        "search",
        help="search an index for the nearest neighbours of embeddings",
        description="Finds the K nearest vectors of each row of QUERIES in an index from 'gapkern index' or "
        "GapIndex.save, whose shift is applied to the queries where it moves them; or in FAISS's file.",
    )
    parser.add_argument("index", help="the folder of the index; or FAISS's file, or a folder with one, of any origin")
    parser.add_argument("queries", help="embeddings that ask, (Q, D), a file or a folder of shards")
    parser.add_argument("--k", type=int, default=10, help="neighbours of each query (default: %(default)s)")
    parser.add_argument(
        "--out",
        help=".npz (distances and ids, (Q, K)), .parquet (query, rank, id, distance) or "
        ".json; where there are fewer than K neighbours, -1, no row, or null",
    )
    parser.add_argument("--parameters", metavar="TEXT", help="FAISS search parameters, such as nprobe=16")
    parser.add_argument(
        "--verify",
        action="store_true",
        default=None,
        help="compare the index's files with their hashes first, also beyond 1 GiB",
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="that searches codes; cuda needs FAISS built for it (default: %(default)s)",
    )
    parser.add_argument(
        "--project",
        metavar="FILE",
        help="a file from 'gapkern project fit' or 'gapkern index repair', by which the queries are moved first",
    )
    common.add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from gapkern.embeddings.provenance import agreed, model_of
    from gapkern.retrieval import GapIndex, lookup

    out = Path(arguments.out) if arguments.out else None
    if out is not None and out.suffix not in (".npz", ".parquet", ".json"):
        raise ValueError(f"out: expected a name ending in .npz, .parquet or .json, got {out}")
    if out is not None and out.suffix == ".parquet":
        _tables()
    theirs = _theirs(arguments.index)
    if theirs is None:
        index = GapIndex.load(arguments.index, mmap=True, verify=arguments.verify, device=arguments.device)
    else:
        index = GapIndex.from_faiss(theirs, device=arguments.device)
    if arguments.parameters:
        index.set_parameters(arguments.parameters)
    if arguments.project:
        index = _projected(index, arguments.project)
    agreed({"index": index.model, "queries": model_of(arguments.queries, name="queries")})
    k = _check.integer("k", arguments.k, low=1, high=max(index.ntotal, MOST))
    count, dims = files.size(arguments.queries, name="queries")
    lookup.room(count, k)
    if dims != index.d:
        raise ValueError(f"queries: expected D = {index.d} as in {arguments.index}, got ({count}, {dims})")
    parts, done = [], 0
    with _progress.shown({"search": "searching"}, {"search": "queries"}) as step:
        for rows in files.chunks(arguments.queries, name="queries"):
            try:
                parts.append(index.search(rows, k))
            except ValueError as error:
                raise ValueError(f"{error} (of those from row {done} on)" if done else str(error)) from None
            done += len(rows)
            step("search", done, count)
    distances = np.concatenate([d.numpy() for d, _ in parts])
    ids = np.concatenate([i.numpy() for _, i in parts])
    inputs = _inputs(arguments) if arguments.json or (out is not None and out.suffix == ".json") else {}
    if out is not None:
        _write(out, distances, ids, inputs)
    if arguments.json:
        common.print_json({"inputs": inputs, **_listed(distances, ids)})
    elif out is not None:
        print(f"written: {out} ({count} queries, k = {arguments.k})")
    else:
        some = [zip(ids[q], distances[q], strict=True) for q in range(min(count, SHOWN))]
        shown = [[q, *("-" if i < 0 else f"{i} ({d:.4g})" for i, d in found)] for q, found in enumerate(some)]
        common.table(["query", *(f"{rank + 1}" for rank in range(k))], shown)
        if count > SHOWN:
            print(f"{count - SHOWN} more queries: use --out or --json")
    return 0


def _theirs(path: str) -> Path | None:
    """FAISS's file, where the index is none of ours."""
    from gapkern.retrieval import foreign

    place = Path(path)
    if foreign.is_ours(place) or not (place.is_file() or (place.is_dir() and foreign.holds(place))):
        return None
    return foreign.located(place, "index")


def _projected(index: Any, path: str) -> Any:
    """The index with its queries moved by a projection's file, once it is known to fit."""
    from gapkern import Projection
    from gapkern.gap import transforms

    if index.shift is not None:
        raise ValueError(f"project: expected an index without a shift, got one with {index.shift!r}")
    projection = Projection.load(path)
    transforms.fits_metric("project", projection, index.metric)
    if projection.reduce:
        raise ValueError("project: expected a projection that keeps the width, got one that reduces it")
    if projection.n_features_in_ != index.d:
        raise ValueError(f"project: expected D = {index.d} as the index, got D = {projection.n_features_in_} in {path}")
    if None not in (index.model, projection.model) and index.model != projection.model:
        raise ValueError(f"project: expected one of model {index.model}, got one of {projection.model}")
    index.shift = projection
    return index


def _inputs(arguments: Any) -> dict[str, Any]:
    """What the answer was made from: the files' hashes; an index's are those of its manifest, which has the others'."""
    from gapkern.embeddings import provenance
    from gapkern.retrieval.store import MANIFEST

    inputs = {
        "index": {"sha256": files.digest(_theirs(arguments.index) or Path(arguments.index) / MANIFEST)},
        "queries": provenance.made_from(arguments.queries, name="queries"),
    }
    if arguments.project:
        inputs["project"] = {"sha256": files.digest(arguments.project)}
    return inputs


def _listed(distances: np.ndarray, ids: np.ndarray) -> dict[str, Any]:
    """As JSON has it: of a neighbour that is missing, null."""
    found = [[int(i) if i >= 0 else None for i in row] for row in ids]
    near = np.where(ids >= 0, distances, np.nan).tolist()  # JSON has null for it
    return {"ids": found, "distances": near}


def _write(out: Path, distances: np.ndarray, ids: np.ndarray, inputs: dict[str, Any]) -> None:
    """In .npz a missing neighbour is id -1 at the largest distance, as in FAISS; a .parquet has no row for it."""
    if out.suffix == ".json":
        files.write_json(out, {"inputs": inputs, **_listed(distances, ids)})
    elif out.suffix == ".npz":
        with files.replacing(out) as temporary, open(temporary, "wb") as file:
            np.savez(file, distances=distances, ids=ids)
    else:
        pandas = _tables()
        count, k = ids.shape
        columns = {"query": np.repeat(np.arange(count), k), "rank": np.tile(np.arange(1, k + 1), count)}
        frame = pandas.DataFrame({**columns, "id": ids.ravel(), "distance": distances.ravel()})
        frame = frame[frame["id"] >= 0]
        files.write(out, lambda temporary: frame.to_parquet(temporary, index=False))


def _tables() -> Any:
    _check.extra("pyarrow", "pyarrow", "tables")
    return _check.extra("pandas", "pandas", "tables")
