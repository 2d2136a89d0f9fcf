"""`gapkern search`: nearest neighbours of embedding files in an index."""

from pathlib import Path

import numpy as np

from gapkern import _check, files
from gapkern.cli import common

SHOWN = 10  # queries in the table


def add(verbs) -> None:
    parser = verbs.add_parser(
        "search",
        help="search an index for the nearest neighbours of embeddings",
        description="Finds the K nearest vectors of each row of QUERIES in an index from 'gapkern index' or "
        "GapIndex.save; its shift is applied to the queries where it moves them.",
    )
    parser.add_argument("index", help="the folder of the index")
    parser.add_argument("queries", help="embeddings that ask, (Q, D), a file or a folder of shards")
    parser.add_argument("--k", type=int, default=10, help="neighbours of each query (default: %(default)s)")
    parser.add_argument("--out", help=".npz (distances and ids, (Q, K)), .parquet (query, rank, id, distance) or .json")
    parser.add_argument("--parameters", metavar="TEXT", help="FAISS search parameters, such as nprobe=16")
    parser.add_argument("--verify", action="store_true", help="compare the index's files with their hashes first")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto",
                        help="that searches codes; cuda needs FAISS built for it (default: %(default)s)")  # fmt: skip
    common.add_json(parser)
    parser.set_defaults(run=run)


def run(arguments) -> int:
    from gapkern.embeddings.folder import agreed, model_of
    from gapkern.retrieval import GapIndex

    out = Path(arguments.out) if arguments.out else None
    if out is not None and out.suffix not in (".npz", ".parquet", ".json"):
        raise ValueError(f"out: expected a name ending in .npz, .parquet or .json, got {out}")
    index = GapIndex.load(arguments.index, mmap=True, verify=arguments.verify, device=arguments.device)
    if arguments.parameters:
        index.set_parameters(arguments.parameters)
    agreed({"index": index.model, "queries": model_of(arguments.queries, name="queries")})
    count, dims = files.size(arguments.queries, name="queries")
    if dims != index.d:
        raise ValueError(f"queries: expected D = {index.d} as in {arguments.index}, got ({count}, {dims})")
    parts, done = [], 0
    with common.progress({"search": "searching"}) as step:
        for rows in files.chunks(arguments.queries, name="queries"):
            try:
                parts.append(index.search(rows, arguments.k))
            except ValueError as error:
                raise ValueError(f"{error} (of those from row {done} on)" if done else str(error)) from None
            done += len(rows)
            step("search", done, count)
    distances = np.concatenate([d.numpy() for d, _ in parts])
    ids = np.concatenate([i.numpy() for _, i in parts])
    if out is not None:
        _write(out, distances, ids)
    if arguments.json:
        common.print_json({"ids": ids, "distances": distances})
    elif out is not None:
        print(f"written: {out} ({count} queries, k = {arguments.k})")
    else:
        shown = [[q, *(f"{i} ({d:.4f})" for i, d in zip(ids[q], distances[q], strict=True))]
                 for q in range(min(count, SHOWN))]  # fmt: skip
        common.table(["query", *(f"{rank + 1}" for rank in range(arguments.k))], shown)
        if count > SHOWN:
            print(f"{count - SHOWN} more queries: use --out or --json")
    return 0


def _write(out: Path, distances: np.ndarray, ids: np.ndarray) -> None:
    if out.suffix == ".json":
        files.write_json(out, {"ids": ids, "distances": distances})
    elif out.suffix == ".npz":
        with files.replacing(out) as temporary, open(temporary, "wb") as file:
            np.savez(file, distances=distances, ids=ids)
    else:
        pandas = _check.extra("pandas", "pandas", "tables")
        _check.extra("pyarrow", "pyarrow", "tables")
        count, k = ids.shape
        columns = {"query": np.repeat(np.arange(count), k), "rank": np.tile(np.arange(1, k + 1), count)}
        frame = pandas.DataFrame({**columns, "id": ids.ravel(), "distance": distances.ravel()})
        files.write(out, lambda temporary: frame.to_parquet(temporary, index=False))
